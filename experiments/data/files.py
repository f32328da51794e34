"""Files that may be hostile: opened only where regular, unpacked as a stream, errors in one line that names the file."""

import contextlib
import gzip
import os
import pathlib
import stat
import zlib
from collections.abc import Iterator
from typing import BinaryIO, cast

from experiments.errors import DataError


def environment_root() -> pathlib.Path | None:
  """The directory that POWERPROP_DATA names; None where it is not set. Raises: DataError where there is no such directory, as one
  that was mistyped would go unnoticed while another source has the set."""
  named = os.environ.get('POWERPROP_DATA')
  if not named:
    return None
  root = pathlib.Path(named).expanduser()
  if not root.is_dir():
    raise DataError(f'POWERPROP_DATA names {root}, which is not a directory; unset it to do without')
  return root


@contextlib.contextmanager
def open_unpacked(path: str | os.PathLike[str]) -> Iterator[BinaryIO]:
  """A file's bytes as a stream, unpacked where it is gzip (told by its first bytes). The reader bounds what it reads.

  Raises: DataError that names the file, where it is not a regular file or cannot be opened, and for whatever fails
    while it is read inside the `with`.
  """
  try:
    if not stat.S_ISREG(os.stat(path).st_mode):  # opening a named pipe would wait for ever
      kind = 'a directory' if os.path.isdir(path) else 'not a regular file'
      raise DataError(f'{path}: {kind} where a file is expected')
    with open(path, 'rb') as file:
      packed = file.read(2) == b'\x1f\x8b'
      file.seek(0)
      with gzip.GzipFile(fileobj=file) if packed else contextlib.nullcontext(file) as stream:
        yield cast(BinaryIO, stream)
  except EOFError:
    raise DataError(f'{path}: truncated gzip file') from None
  except (gzip.BadGzipFile, zlib.error) as error:
    raise DataError(f'{path}: corrupt gzip file ({error})') from None
  except OSError as error:
    raise DataError(f'{path}: cannot be read ({error.strerror or error})') from None

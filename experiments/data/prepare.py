"""Prepares ImageNet for training from its official archives, by tensorflow-datasets but without TensorFlow.

  python -m experiments.data.prepare --archives=DIRECTORY --to=DIRECTORY

--archives holds ILSVRC2012_img_train.tar and ILSVRC2012_img_val.tar as they were downloaded; training takes both of them. The
result, in --to/imagenet2012/VERSION, is what `tfds build --file_format=array_record` makes, but for a score of files that are
CMYK or PNG: those stay as they are, and are converted when they are read. It takes the room of the archives once more, and as
long as copying.
"""
import importlib
import os
import pathlib
import tarfile
import types
from typing import IO

from absl import flags, logging

from experiments.commands import run
from experiments.errors import UserError

FLAGS = flags.FlagValues()   # of this command alone
ARCHIVES = flags.DEFINE_string('archives', None, 'Required. Directory of the official archives.', flag_values=FLAGS)
TO = flags.DEFINE_string('to', None, 'Required. Directory for the prepared set; made if it is not there.', flag_values=FLAGS)

TRAIN, VALIDATION = 'ILSVRC2012_img_train.tar', 'ILSVRC2012_img_val.tar'


def prepare(archives: pathlib.Path, to: pathlib.Path) -> pathlib.Path:
  """The folder of the prepared set. One that is there is left as it is.

  Raises: UserError where there are no archives, or damaged ones, no room for the result, or tensorflow-datasets cannot read them.
  """
  if not archives.is_dir():
    raise UserError(f'--archives={archives} is no directory.')
  both = TRAIN, VALIDATION
  if (missing := [name for name in both if not (archives / name).is_file()]):
    raise UserError(f'--archives={archives} holds no {" and no ".join(missing)}; training takes both archives.')
  for name in both:
    check(archives / name)
  try:
    to.mkdir(parents=True, exist_ok=True)
  except OSError as error:
    raise UserError(f'--to={to} cannot be made ({error.strerror}).') from None
  try:
    import tensorflow_datasets as tfds
  except ImportError as error:
    raise UserError(f"preparing takes tensorflow-datasets: pip install -e '.[imagenet]' ({error}).") from None
  without_tensorflow()
  builder = tfds.builder('imagenet2012', data_dir=str(to), file_format='array_record')
  if pathlib.Path(builder.data_dir).exists():
    print(f'{builder.data_dir} is there, and is left as it is; for other archives give another --to, or remove it.', flush=True)
  settings = tfds.download.DownloadConfig(manual_dir=str(archives), try_download_gcs=False)
  try:
    builder.download_and_prepare(download_dir=str(to / 'downloads'), download_config=settings)
  except Exception as error:   # whatever its readers raise of a damaged archive
    reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
    raise UserError(f'{archives} cannot be prepared ({reason}).') from None
  return pathlib.Path(builder.data_dir)


def check(archive: pathlib.Path) -> None:
  """Raises UserError for an archive that is not whole, which tensorflow-datasets would take for a shorter one, and for validation
  images other than the first so many, to which it would give the labels of others: it counts them."""
  try:
    with archive.open('rb') as file:
      found = sorted(names(file))
  except (tarfile.TarError, OSError) as error:
    raise UserError(f'{archive} cannot be prepared ({error}).') from None
  if archive.name == VALIDATION:
    for i, name in enumerate(found, 1):
      if name != (wanted := f'ILSVRC2012_val_{i:08d}.JPEG'):
        raise UserError(f'{archive} cannot be prepared ({name} is where {wanted} should be, and would get its label).')


def names(file: IO[bytes]) -> list[str]:
  """Of all files in an uncompressed tar; tars within it are looked through as well. Raises tarfile.TarError where one is damaged,
  or ends without the zeros that end a tar."""
  with tarfile.open(fileobj=file, mode='r:') as opened:
    members = opened.getmembers()
    file.seek(opened.offset)   # where it has found no other header
    if file.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
      raise tarfile.ReadError(f'cut off or damaged after {members[-1].name}')
    for member in members:
      if member.name.endswith('.tar') and (inner := opened.extractfile(member)):
        try:
          names(inner)
        except tarfile.TarError as error:
          raise tarfile.ReadError(f'{member.name}: {error}') from None
  return [member.name for member in members]


def without_tensorflow() -> None:
  """Gives tensorflow-datasets the few calls of TensorFlow that preparing this set makes: opening local files."""
  files = types.SimpleNamespace(GFile=open, exists=os.path.exists)
  stand_in = types.SimpleNamespace(io=types.SimpleNamespace(gfile=files), compat=types.SimpleNamespace(as_text=_text))
  for name in ('core.download.extractor', 'datasets.imagenet2012.imagenet2012_dataset_builder',
               'datasets.imagenet2012.imagenet_common'):
    vars(importlib.import_module(f'tensorflow_datasets.{name}'))['tf'] = stand_in
  vars(importlib.import_module('tensorflow_datasets.core.utils')).update(jpeg_cmyk_to_rgb=bytes, png_to_jpeg=bytes)


def _text(value: str | bytes) -> str:
  return value.decode() if isinstance(value, bytes) else value


def main(argv: list[str]) -> None:
  if len(argv) > 1:
    raise UserError(f'unknown argument {argv[1]!r}; flags are given as --name=value.')
  for flag in (ARCHIVES, TO):
    if not flag.value:
      raise UserError(f'--{flag.name} is needed; see --help.')
  logging.set_verbosity(logging.WARNING)
  print(f'prepared {prepare(pathlib.Path(str(ARCHIVES.value)), pathlib.Path(str(TO.value)))}')


if __name__ == '__main__':
  run(main, __doc__ or '', FLAGS)

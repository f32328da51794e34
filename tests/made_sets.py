"""A small set in the layout of MNIST, with a table of checksums of its own, for tests of where sets are found."""

import dataclasses
import gzip
import hashlib
import struct

import numpy as np

from experiments.data import mnist


def as_idx(array):
  """IDX bytes by struct: the format's description, not the code under test."""
  return struct.pack(f'>4B{array.ndim}I', 0, 0, 8, array.ndim, *array.shape) + array.tobytes()


@dataclasses.dataclass
class Small:
  """Four arrays, and the table that says what they are."""
  arrays: list
  files: mnist.Files

  def write(self, folder, name='{stem}-idx{ndim}-ubyte.gz', **change):
    """Writes the four files; `change` maps a stem (dashes as underscores) to other bytes or to None."""
    folder.mkdir(parents=True, exist_ok=True)
    for part, array in zip(self.files.parts, self.arrays, strict=True):
      payload = change.get(part.stem.replace('-', '_'), as_idx(array))
      path = folder / name.format(stem=part.stem, ndim=array.ndim)
      if payload is not None:
        path.write_bytes(gzip.compress(payload, 1) if path.suffix == '.gz' else payload)
    return folder


def make_small():
  """30 train and 9 test images: noise."""
  rng = np.random.default_rng(0)
  arrays = []
  for count in (30, 9):
    arrays += [rng.integers(0, 256, (count, 28, 28), np.uint8), rng.integers(0, 10, count, np.uint8)]
  stems = ('train-images', 'train-labels', 't10k-images', 't10k-labels')
  parts = [mnist.Part(stem, array.shape, hashlib.sha256(as_idx(array)).hexdigest())
           for stem, array in zip(stems, arrays, strict=True)]
  return Small(arrays, mnist.Files('tiny', 'Tiny', 10, tuple(parts), 'http://127.0.0.1:1/',
                                   ('tiny-package', 'tiny_package/data'), 'To get it: ask.'))


def hide_all(monkeypatch, tmp_path):
  """No set is to be found unless the test puts it there, nor anything to be downloaded."""
  for name in ('POWERPROP_DATA', 'no_proxy', 'NO_PROXY'):
    monkeypatch.delenv(name, raising=False)
  for name in ('http_proxy', 'https_proxy'):
    monkeypatch.setenv(name, 'http://127.0.0.1:1')
  monkeypatch.setenv('TFDS_DATA_DIR', str(tmp_path / 'no_tfds'))


def check(dataset, small):
  """All four arrays, their types, and the shape that the Dataset promises."""
  for array, expected, ndim in zip(dataset[:4], small.arrays, (4, 1, 4, 1), strict=True):
    assert array.dtype == (np.uint8 if ndim == 4 else np.int32) and array.ndim == ndim
    np.testing.assert_array_equal(array.reshape(expected.shape), expected)
  assert dataset.classes == 10 and dataset.name == 'Tiny'

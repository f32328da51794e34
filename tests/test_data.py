"""experiments.data: checksums, and where a set is looked for."""

import gzip
import hashlib
import os
import pathlib
import sys

import numpy as np
import pytest
from made_sets import as_idx, check, hide_all, make_small

from experiments import data
from experiments.data import cifar, mnist
from experiments.errors import DataError, UserError

REAL = os.environ.get('POWERPROP_DATA')


@pytest.fixture(scope='module')
def small():
  return make_small()


@pytest.fixture(autouse=True)
def nothing_around(monkeypatch, tmp_path):
  hide_all(monkeypatch, tmp_path)


# Files in a folder

@pytest.mark.parametrize('ending', ['', '.gz'])
@pytest.mark.parametrize('name', ['{stem}-idx{ndim}-ubyte', '{stem}.idx{ndim}-ubyte'])
def test_folder_with_any_usual_file_names(small, tmp_path, name, ending):
  dataset = mnist.load_files(small.files, str(small.write(tmp_path / 'here', name + ending)))
  check(dataset, small)
  assert data.describe(dataset) == (
    'Tiny: 30 train and 9 test images from official IDX files in the folder here, checksums good')


def test_gzip_is_told_by_content_and_not_by_name(small, tmp_path):
  payload = as_idx(small.arrays[0])
  small.write(tmp_path, '{stem}-idx{ndim}-ubyte', train_images=gzip.compress(payload))  # packed, no ending
  (tmp_path / 't10k-labels-idx1-ubyte').rename(tmp_path / 't10k-labels-idx1-ubyte.gz')  # the other way round
  check(mnist.load_files(small.files, str(tmp_path)), small)


def test_folder_that_bears_a_files_name_is_passed_over_for_the_file(small, tmp_path):
  small.write(tmp_path)
  (tmp_path / 'train-images-idx3-ubyte').mkdir()
  check(mnist.load_files(small.files, str(tmp_path)), small)


def damages(small):
  """Stem to damage → its new content (by write), and what the error says besides the file."""
  images, labels, test_images, test_labels = map(as_idx, small.arrays)
  wrong_label, other_label, other_pixel = bytearray(labels), bytearray(labels), bytearray(images)
  wrong_label[8 + 4] = 10
  other_label[8] = (other_label[8] + 1) % 10
  other_pixel[-1] ^= 1
  wider = as_idx(np.zeros((30, 28, 29), np.uint8))
  swapped_bytes = labels[:4] + labels[4:8][::-1] + labels[8:]
  return {
    'cut': ('train_images', images[:-1], r'truncated, 23,535 bytes where 30 images of 28x28 take 23,536'),
    'cut in the header': ('train_images', images[:10], r'truncated, 10 bytes where the header takes 16'),
    'empty': ('train_labels', b'', r'truncated, 0 bytes where an IDX header takes at least 8'),
    'trailing': ('t10k_labels', test_labels + b'\0', r'too long, bytes follow after the 17 of 9 labels'),
    'signed bytes': ('train_images', images.replace(b'\x08', b'\x09', 1),
                     r'wrong magic number 00 00 09 03 instead of 00 00 08 03'),
    'not IDX': ('train_labels', b'<html>', r'wrong magic number 3c 68 74 6d instead of 00 00 08 01'),
    'little endian': ('train_labels', swapped_bytes, r'holds 503,316,480 labels instead of 30 labels'),
    'fewer images': ('train_images', as_idx(small.arrays[0][:29]), r'holds 29 images of 28x28 instead of 30'),
    'fewer labels': ('train_labels', as_idx(small.arrays[1][:29]), r'holds 29 labels instead of 30 labels$'),
    'wrong shape': ('train_images', wider, r'holds 30 images of 28x29 instead of 30 images of 28x28'),
    'labels for images': ('train_images', labels, r'holds 30 labels instead of 30 images.* swapped\?'),
    'images for labels': ('train_labels', images, r'holds 30 images.* instead of 30 labels.* swapped\?'),
    'test for train': ('train_images', test_images, r'holds 9 images of 28x28 instead of 30 images'),
    'label 10': ('train_labels', bytes(wrong_label), r'label 10 at position 4, allowed: 0 to 9'),
    'another label': ('train_labels', bytes(other_label), r'bad checksum, not the official train-labels'),
    'another pixel': ('train_images', bytes(other_pixel), r'bad checksum, not the official train-images'),
  }


DAMAGES = [
  'cut', 'cut in the header', 'empty', 'trailing', 'signed bytes', 'not IDX', 'little endian', 'fewer images',
  'fewer labels', 'wrong shape', 'labels for images', 'images for labels', 'test for train', 'label 10',
  'another label', 'another pixel']


@pytest.mark.parametrize('packed', [False, True])
@pytest.mark.parametrize('damage', DAMAGES)
def test_damaged_file_is_named_with_the_reason(small, tmp_path, damage, packed):
  assert set(damages(small)) == set(DAMAGES)
  stem, payload, reason = damages(small)[damage]
  small.write(tmp_path, '{stem}-idx{ndim}-ubyte' + '.gz' * packed, **{stem: payload})
  with pytest.raises(DataError, match=reason) as caught:
    mnist.load_files(small.files, str(tmp_path))
  ndim = 3 if 'images' in stem else 1
  assert str(caught.value).startswith(f'{tmp_path}/{stem.replace("_", "-")}-idx{ndim}-ubyte')
  assert '\n' not in str(caught.value)


def test_checksum_error_gives_both_sums(small, tmp_path):
  changed = small.arrays[0].copy()
  changed[0, 0, 0] ^= 255
  with pytest.raises(DataError) as caught:
    mnist.load_files(small.files, str(small.write(tmp_path, train_images=as_idx(changed))))
  assert hashlib.sha256(as_idx(changed)).hexdigest() in str(caught.value)
  assert small.files.parts[0].sha256 in str(caught.value)


def test_truncated_gzip(small, tmp_path):
  path = small.write(tmp_path) / 'train-images-idx3-ubyte.gz'
  path.write_bytes(path.read_bytes()[:-9])  # the last byte of the data and the trailer
  with pytest.raises(DataError, match=r'train-images-idx3-ubyte.gz: truncated gzip file'):
    mnist.load_files(small.files, str(tmp_path))


def test_gzip_with_a_wrong_crc(small, tmp_path):
  path = small.write(tmp_path) / 'train-labels-idx1-ubyte.gz'
  raw = bytearray(path.read_bytes())
  raw[-8] ^= 1
  path.write_bytes(raw)
  with pytest.raises(DataError, match=r'train-labels-idx1-ubyte.gz: corrupt gzip file .CRC check failed'):
    mnist.load_files(small.files, str(tmp_path))


def test_what_is_no_file_or_cannot_be_read(small, tmp_path):
  path = small.write(tmp_path) / 'train-images-idx3-ubyte.gz'
  path.unlink()
  path.mkdir()
  with pytest.raises(DataError, match=f'{path}: a directory where a file is expected'):
    mnist.load_files(small.files, str(tmp_path))
  path.rmdir()
  os.mkfifo(path)
  with pytest.raises(DataError, match=f'{path}: not a regular file'):
    mnist.load_files(small.files, str(tmp_path))
  path.unlink()
  path.symlink_to(tmp_path / 'gone')
  with pytest.raises(DataError, match=f'{path}: cannot be read .No such file'):
    mnist.load_files(small.files, str(tmp_path))
  if os.geteuid() != 0:  # root reads everything
    path.unlink()
    path.write_bytes(b'')
    path.chmod(0)
    with pytest.raises(DataError, match=f'{path}: cannot be read .Permission denied'):
      mnist.load_files(small.files, str(tmp_path))


def test_incomplete_set_names_what_is_missing(small, tmp_path):
  small.write(tmp_path / 'tiny', train_labels=None)
  with pytest.raises(DataError, match=r'tiny: incomplete Tiny, train-labels-idx1-ubyte\[.gz\] not found'):
    mnist.load_files(small.files, str(tmp_path))


# Where a set is looked for

def test_data_dir_is_the_folder_or_its_parent(small, tmp_path):
  small.write(tmp_path / 'x' / 'tiny')
  for folder in (tmp_path / 'x', tmp_path / 'x' / 'tiny'):
    check(mnist.load_files(small.files, str(folder)), small)


def test_data_dir_without_the_set_is_an_error_that_lists_the_names(small, tmp_path, monkeypatch):
  monkeypatch.setenv('POWERPROP_DATA', str(small.write(tmp_path / 'full' / 'tiny').parent))
  (tmp_path / 'empty').mkdir()
  with pytest.raises(DataError) as caught:
    mnist.load_files(small.files, str(tmp_path / 'empty'))
  for word in (str(tmp_path / 'empty'), 'train-images-idx3-ubyte', 't10k-labels-idx1-ubyte', 'folder tiny'):
    assert word in str(caught.value)
  with pytest.raises(DataError, match=f'data_dir {tmp_path}/nowhere is not a directory'):
    mnist.load_files(small.files, str(tmp_path / 'nowhere'))


def install(small, monkeypatch, site, **change):
  """A package with the data, as pip leaves it; importing it fails."""
  small.write(site / 'tiny_package' / 'data', '{stem}.idx{ndim}-ubyte', **change)
  (site / 'tiny_package' / '__init__.py').write_text('raise RuntimeError("was imported")')
  info = site / 'tiny_package-0.3.dist-info'
  info.mkdir()
  (info / 'METADATA').write_text('Metadata-Version: 2.1\nName: tiny-package\nVersion: 0.3\n')
  monkeypatch.syspath_prepend(site)


def test_environment_comes_before_the_package(small, tmp_path, monkeypatch):
  install(small, monkeypatch, tmp_path / 'site')
  monkeypatch.setenv('POWERPROP_DATA', str(small.write(tmp_path / 'env' / 'tiny').parent))
  dataset = mnist.load_files(small.files)
  check(dataset, small)
  assert dataset.source == 'official IDX files in the folder tiny'


def test_an_environment_that_names_no_directory_is_a_mistake(small, tmp_path, monkeypatch):
  """Whatever other source has the set: the name was mistyped, or a disk is not there."""
  install(small, monkeypatch, tmp_path / 'site')
  monkeypatch.setenv('POWERPROP_DATA', str(tmp_path / 'nowhere'))
  for load in (mnist.load_files, lambda files: cifar.load_files(cifar.CIFAR10)):
    with pytest.raises(DataError, match=f'^POWERPROP_DATA names {tmp_path}/nowhere, which is not a directory'):
      load(small.files)
  check(mnist.load_files(small.files, str(small.write(tmp_path / 'given' / 'tiny'))), small)   # it is not asked then


def test_environment_without_the_set_goes_on_to_the_package(small, tmp_path, monkeypatch):
  install(small, monkeypatch, tmp_path / 'site')
  monkeypatch.setenv('POWERPROP_DATA', str(tmp_path))
  dataset = mnist.load_files(small.files)
  check(dataset, small)
  assert dataset.source == 'tiny-package 0.3 (installed package)'
  assert 'tiny_package' not in sys.modules


def test_environment_with_a_damaged_set_does_not_go_on(small, tmp_path, monkeypatch):
  install(small, monkeypatch, tmp_path / 'site')
  monkeypatch.setenv('POWERPROP_DATA', str(tmp_path / 'env'))
  small.write(tmp_path / 'env' / 'tiny', train_labels=b'')
  with pytest.raises(DataError, match=r'train-labels-idx1-ubyte.gz: truncated'):
    mnist.load_files(small.files)


def test_package_is_checked_too(small, tmp_path, monkeypatch):
  install(small, monkeypatch, tmp_path / 'site', t10k_labels=as_idx(np.zeros(9, np.uint8)))
  with pytest.raises(DataError, match=r'site/tiny_package/data/t10k-labels.idx1-ubyte: bad checksum'):
    mnist.load_files(small.files)


def test_found_nowhere_says_where_it_looked_and_what_to_do(small, tmp_path):
  with pytest.raises(DataError) as caught:
    mnist.load_files(small.files)
  message = str(caught.value)
  for words in ('Tiny not found: ', 'POWERPROP_DATA is not set', f'not prepared it in {tmp_path}/no_tfds',
                'package tiny-package is not installed', 'To get it: ask.'):
    assert words in message
  assert '\n' not in message


def test_unknown_name_lists_the_known_ones():
  with pytest.raises(UserError, match="unknown data set 'mnits'; known: cifar10, cifar100, fashion_mnist, mnist"):
    data.load('mnits')


# The real sets

# MD5 of the unpacked official files as other projects publish them, and the images per class.
MD5 = {
  'mnist': ('6bbc9ace898e44ae57da46a324031adb', 'a25bea736e30d166cdddb491f175f624',
            '2646ac647ad5339dbf082846283269ea', '27ae3e4e09519cfbb04c329615203637'),
  'fashion_mnist': ('f4a8712d7a061bf5bd6d2ca38dc4d50a', '9018921c3c673c538a1fc5bad174d6f9',
                    '8181f5470baa50b63fa0f6fddb340f0a', '15d484375f8d13e6eb1aabb0c3f46965'),
}
PER_CLASS = {
  'mnist': ([5923, 6742, 5958, 6131, 5842, 5421, 5918, 6265, 5851, 5949],
            [980, 1135, 1032, 1010, 982, 892, 958, 1028, 974, 1009]),
  'fashion_mnist': ([6000] * 10, [1000] * 10),
}


@pytest.mark.parametrize('name', list(MD5))
def test_registered_set_is_the_official_one(name, monkeypatch):
  if REAL:
    monkeypatch.setenv('POWERPROP_DATA', REAL)
  try:
    dataset = data.load(name)
  except DataError as error:
    if 'not found' not in str(error):
      raise
    pytest.skip(f'{name} is not on this machine')
  assert np.bincount(dataset.train_labels).tolist() == PER_CLASS[name][0]
  assert np.bincount(dataset.test_labels).tolist() == PER_CLASS[name][1]
  assert dataset.train_images.shape == (60000, 28, 28, 1) and dataset.test_images.shape == (10000, 28, 28, 1)
  assert dataset.train_images.dtype == np.uint8 and dataset.train_labels.dtype == np.int32
  assert f': 60,000 train and 10,000 test images from {dataset.source}, ' in data.describe(dataset)
  for array, md5 in zip(dataset[:4], MD5[name], strict=True):
    payload = as_idx(array[..., 0] if array.ndim == 4 else array.astype(np.uint8))
    assert hashlib.md5(payload, usedforsecurity=False).hexdigest() == md5


def test_one_set_in_the_place_of_the_other_is_recognised():
  folder = pathlib.Path(REAL or '/nonexistent', 'fashion_mnist')
  if not folder.is_dir():
    pytest.skip('POWERPROP_DATA has no fashion_mnist')
  with pytest.raises(DataError, match=r'not the official .* of MNIST.*; this is .* of Fashion-MNIST'):
    data.load('mnist', str(folder))

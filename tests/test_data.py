"""experiments.data: the IDX parser on hostile bytes, checksums, and where a set is looked for."""

import dataclasses
import gzip
import hashlib
import io
import json
import os
import pathlib
import struct
import sys
import time
import tracemalloc

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from experiments import data
from experiments.data import mnist
from experiments.errors import DataError, UserError

REAL = os.environ.get('POWERPROP_DATA')


# Small sets of the same layout, with a table of checksums of their own

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


@pytest.fixture(scope='module')
def small():
  rng = np.random.default_rng(0)
  arrays = []
  for count in (30, 9):
    arrays += [rng.integers(0, 256, (count, 28, 28), np.uint8), rng.integers(0, 10, count, np.uint8)]
  stems = ('train-images', 'train-labels', 't10k-images', 't10k-labels')
  parts = [mnist.Part(stem, array.shape, hashlib.sha256(as_idx(array)).hexdigest())
           for stem, array in zip(stems, arrays, strict=True)]
  return Small(arrays, mnist.Files('tiny', 'Tiny', 10, tuple(parts), 'http://127.0.0.1:1/',
                                   ('tiny-package', 'tiny_package/data'), 'To get it: ask.'))


@pytest.fixture(autouse=True)
def nothing_around(monkeypatch, tmp_path):
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


# The parser

def reference_parse(raw):
  """(shape, values) by struct and a loop, or None where the bytes are not exactly one IDX array."""
  if len(raw) < 4 or tuple(raw[:3]) != (0, 0, 8) or raw[3] not in (1, 2, 3, 4) or len(raw) < 4 + 4 * raw[3]:
    return None
  shape = struct.unpack_from(f'>{raw[3]}I', raw, 4)
  count = 1
  for size in shape:
    count *= size
  values = list(raw[4 + 4 * raw[3]:])
  return (shape, values) if count > 0 and len(values) == count else None


@st.composite
def idx_like(draw):
  """Bytes that are IDX, nearly IDX, or nothing of the kind."""
  if draw(st.integers(0, 5)) == 0:
    return draw(st.binary(max_size=64))
  shape = draw(st.lists(st.integers(0, 5), max_size=5))
  magic = draw(st.sampled_from([b'\0\0\x08'] * 5 + [b'\0\0\x09', b'\0\x01\x08', b'\x1f\x8b\x08']))
  raw = bytearray(magic + bytes([len(shape)]) + b''.join(struct.pack('>I', size) for size in shape))
  raw += draw(st.binary(max_size=4)) if draw(st.integers(0, 3)) == 0 else bytes(int(np.prod(shape)))
  change = draw(st.sampled_from(['none', 'cut', 'add', 'set']))
  if change == 'cut':
    raw = raw[:draw(st.integers(0, len(raw)))]
  elif change == 'add':
    raw += draw(st.binary(min_size=1, max_size=3))
  elif change == 'set':
    raw[draw(st.integers(0, len(raw) - 1))] = draw(st.sampled_from([0, 1, 2, 127, 255]))
  return bytes(raw)


@settings(max_examples=1000, deadline=None)
@given(idx_like())
@example(b'\0\0\x08\x02' + b'\xff' * 8)  # claims 2^64 values
@example(b'\0\0\x08\x03' + bytes(4) + b'\xff' * 8)  # none of them, but of a shape that NumPy refuses
@example(b'\0\0\x08\x04' + struct.pack('>4I', 1, 1, 1, 2) + b'\1\2')
@example(b'\0\0\x08\0')
def test_parser_agrees_with_reference_on_any_bytes(raw):
  expected = reference_parse(raw)
  if expected is None:
    with pytest.raises(DataError, match=r'^hostile: .'):
      mnist.parse_idx(raw, 'hostile')
  else:
    array = mnist.parse_idx(raw, 'hostile')
    assert array.dtype == np.uint8 and array.shape == expected[0] and array.ravel().tolist() == expected[1]


@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(1, 6), min_size=1, max_size=4), st.randoms(use_true_random=False))
def test_parser_returns_what_was_written(shape, random):
  array = np.array([random.randrange(256) for _ in range(int(np.prod(shape)))], np.uint8).reshape(shape)
  np.testing.assert_array_equal(mnist.parse_idx(as_idx(array), 'x'), array)
  np.testing.assert_array_equal(mnist.parse_idx(as_idx(array), 'x', array.shape), array)


def peak_bytes(function):
  """Result, and the most memory that Python and NumPy held for it at once."""
  tracemalloc.start()
  try:
    return function(), tracemalloc.get_traced_memory()[1]
  finally:
    tracemalloc.stop()


def test_parser_allocates_nothing_for_what_a_header_claims_or_holds():
  def claim():
    with pytest.raises(DataError, match='truncated'):
      mnist.parse_idx(b'\0\0\x08\x01' + struct.pack('>I', 2 ** 31) + bytes(100), 'x')
  raw = as_idx(np.zeros((1000, 1000), np.uint8))
  assert peak_bytes(claim)[1] < 100_000  # pytest.raises and the message; the claim is 2 GB
  assert peak_bytes(lambda: mnist.parse_idx(raw, 'x'))[1] < 100_000  # a view: the values are 1 MB


def test_gzip_bomb_costs_no_more_than_the_expected_size(tmp_path):
  path = tmp_path / 'train-images-idx3-ubyte.gz'
  header = struct.pack('>4B3I', 0, 0, 8, 3, 10, 28, 28)
  with gzip.open(path, 'wb', 9) as file:
    file.write(header)
    for _ in range(64):
      file.write(bytes(2 ** 20))
  def read():
    with pytest.raises(DataError, match='too long'):
      mnist.read_idx(path, (10, 28, 28))
  assert peak_bytes(read)[1] < 2 ** 20  # 7,857 bytes are wanted, gzip's buffers take 100 kB, the whole 64 MB


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_reader_on_damaged_gzip_gives_the_array_or_a_data_error(tmp_path_factory, draw):
  array = np.arange(60, dtype=np.uint8).reshape(3, 4, 5)
  raw = bytearray(gzip.compress(as_idx(array), mtime=0))
  for _ in range(draw.draw(st.integers(0, 3))):
    raw[draw.draw(st.integers(0, len(raw) - 1))] = draw.draw(st.integers(0, 255))
  raw = raw[:draw.draw(st.sampled_from([len(raw), len(raw), len(raw) - 1, 9, 2, 1, 0]))]
  raw += draw.draw(st.sampled_from([b'', b'', b'\0\0', b'rest', bytes(raw)]))
  path = tmp_path_factory.getbasetemp() / 'damaged.gz'
  path.write_bytes(raw)
  try:
    result = mnist.read_idx(path, (3, 4, 5))
  except DataError as error:
    assert str(error).startswith(f'{path}: ')  # which file, and below a single line
    assert '\n' not in str(error)
  else:
    np.testing.assert_array_equal(result, array)  # gzip's CRC covers every byte of it


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


def test_download_without_a_network_fails_quickly(small, tmp_path, monkeypatch):
  for module in ('tensorflow', 'tensorflow_datasets'):  # there to be found; importing them fails
    (tmp_path / 'site' / module).mkdir(parents=True)
    (tmp_path / 'site' / module / '__init__.py').write_text('raise RuntimeError("was imported")')
  monkeypatch.syspath_prepend(tmp_path / 'site')
  start = time.monotonic()
  reason = mnist.from_tfds(small.files)
  assert 'cannot download it (urllib.error.URLError: <urlopen error' in reason
  assert time.monotonic() - start < mnist.PROBE_SECONDS + 5
  assert mnist._python('import time; time.sleep(60)', [], 0.2) == 'no answer within 0.2 s'
  assert mnist._python('raise SystemExit(3)', [], 60) == 'exit status 3'
  assert mnist._python('', [], 60) == ''


def test_unknown_name_lists_the_known_ones():
  with pytest.raises(UserError, match="unknown data set 'mnits'; known: fashion_mnist, mnist"):
    data.load('mnits')


# tensorflow-datasets: sets that its own writer made, without TensorFlow

@pytest.fixture(scope='module')
def prepared(small, tmp_path_factory):
  tfds = pytest.importorskip('tensorflow_datasets')
  pytest.importorskip('array_record')
  image_module = pytest.importorskip('PIL.Image')
  arrays = small.arrays

  def png(image):
    buffer = io.BytesIO()
    image_module.fromarray(image).save(buffer, 'PNG')
    return buffer.getvalue()

  class Tiny(tfds.core.GeneratorBasedBuilder):
    VERSION = tfds.core.Version('3.0.1')

    def _info(self):
      return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict({
        'image': tfds.features.Image(shape=(28, 28, 1)), 'label': tfds.features.ClassLabel(num_classes=10)}))

    def _split_generators(self, dl_manager):
      return {'train': self._generate_examples(*arrays[:2]), 'test': self._generate_examples(*arrays[2:])}

    def _generate_examples(self, images, labels):
      for i, (image, label) in enumerate(zip(images, labels, strict=True)):
        yield i, {'image': png(image), 'label': int(label)}

  root = tmp_path_factory.mktemp('tfds')
  Tiny(data_dir=str(root), file_format='array_record').download_and_prepare()
  return root / 'tiny' / '3.0.1'


def copy_prepared(prepared, root, as_tfrecord):
  """A copy of the prepared set under `root`; the same records framed as TFRecord if asked for."""
  folder = root / 'tiny' / '3.0.1'
  folder.mkdir(parents=True)
  for path in prepared.iterdir():
    (folder / path.name).write_bytes(path.read_bytes())
  if as_tfrecord:
    from array_record.python.array_record_module import ArrayRecordReader
    for path in list(folder.glob('*.array_record-*')):
      records = ArrayRecordReader(str(path)).read_all()
      frames = [struct.pack('<QI', len(record), 0) + record + bytes(4) for record in records]
      path.with_name(path.name.replace('array_record', 'tfrecord')).write_bytes(b''.join(frames))
      path.unlink()
    info = json.loads((folder / 'dataset_info.json').read_text())
    info['fileFormat'] = 'tfrecord'
    (folder / 'dataset_info.json').write_text(json.dumps(info))
  return folder


@pytest.mark.parametrize('as_tfrecord', [False, True])
def test_tfds_comes_back_in_the_official_order(small, prepared, tmp_path, monkeypatch, as_tfrecord):
  copy_prepared(prepared, tmp_path, as_tfrecord)
  for name in ('incomplete.X_9.0.0', '2.9.10'):  # neither the unfinished nor the older one is to be chosen
    (tmp_path / 'tiny' / name).mkdir()
    (tmp_path / 'tiny' / name / 'dataset_info.json').write_text('{}')
  monkeypatch.setenv('TFDS_DATA_DIR', str(tmp_path))
  dataset = mnist.load_files(small.files)
  check(dataset, small)
  assert dataset.source == 'tensorflow-datasets tiny 3.0.1'


def test_tfds_version_is_the_newest_by_number(tmp_path):
  assert mnist._prepared(tmp_path / 'nowhere') is None
  for name in ('9.0.0', '10.0.0', '10.0'):
    (tmp_path / name).mkdir()
    (tmp_path / name / 'dataset_info.json').write_text('{}')
  (tmp_path / '11.0.0').mkdir()  # nothing was prepared in it
  assert mnist._prepared(tmp_path) == tmp_path / '10.0.0'


@pytest.mark.parametrize('as_tfrecord', [False, True])
def test_tfds_damaged_names_folder_and_split(small, prepared, tmp_path, monkeypatch, as_tfrecord):
  folder = copy_prepared(prepared, tmp_path, as_tfrecord)
  path = next(folder.glob('tiny-test.*'))
  raw = path.read_bytes()
  monkeypatch.setenv('TFDS_DATA_DIR', str(tmp_path))
  for damaged in (raw[:len(raw) // 2], b'', raw[:200] + b'\xff' * 200 + raw[400:]):
    path.write_bytes(damaged)
    with pytest.raises(DataError, match=f'^{folder}: split test cannot be read') as caught:
      mnist.load_files(small.files)
    assert '\n' not in str(caught.value)


def test_tfds_with_other_counts_or_contents(small, prepared, tmp_path, monkeypatch):
  folder = copy_prepared(prepared, tmp_path, as_tfrecord=True)
  monkeypatch.setenv('TFDS_DATA_DIR', str(tmp_path))
  parts = small.files.parts
  fewer_images, fewer_labels = parts[2]._replace(shape=(8, 28, 28)), parts[3]._replace(shape=(8,))
  fewer = small.files._replace(parts=(*parts[:2], fewer_images, fewer_labels))
  with pytest.raises(DataError, match=r'split test cannot be read .ValueError: 9 examples instead of 8'):
    mnist.load_files(fewer)
  other = small.files._replace(parts=(parts[0]._replace(shape=(30, 14, 28)), *parts[1:]))
  with pytest.raises(DataError, match=r'split train cannot be read .*\(28, 28\).* instead of \(28, 14\)'):
    mnist.load_files(other)
  path = next(folder.glob('tiny-train.*'))
  raw = path.read_bytes()
  size = 16 + struct.unpack('<Q', raw[:8])[0]
  path.write_bytes(raw[size:] + raw[:size])  # the same examples in another order
  with pytest.raises(DataError, match=f'{folder}, train-images: bad checksum'):
    mnist.load_files(small.files)


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


@pytest.mark.parametrize('name', list(data.DATASETS))
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

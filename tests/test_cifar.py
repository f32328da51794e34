"""experiments.data.cifar: the binary format, the archive, checksums, and where the set is looked for."""

import dataclasses
import gzip
import hashlib
import io
import os
import tarfile

import numpy as np
import pytest
from made_sets import hide_all

from experiments import data
from experiments.data import cifar
from experiments.errors import DataError

REAL = os.environ.get('POWERPROP_DATA')
NAMES = ('data_batch_1.bin', 'data_batch_2.bin', 'test_batch.bin')
COUNT = 4  # records of a batch


@dataclasses.dataclass
class Small:
  """Three batches of noise as bytes, what they hold, and the table that says so."""
  batches: dict
  images: np.ndarray
  labels: np.ndarray
  files: cifar.Files

  def write(self, folder, **change):
    """Writes the batches; `change` maps a name without its ending to other bytes or to None."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, payload in self.changed(change).items():
      (folder / name).write_bytes(payload)
    return folder

  def pack(self, folder, prefix='cifar-10-batches-bin/', **change):
    """Writes an archive like the official one."""
    members = {'batches.meta.txt': b'airplane\n', **self.changed(change), 'readme.html': b'<html>'}
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode='w') as archive:
      for name, payload in members.items():
        member = tarfile.TarInfo(prefix + name)
        member.size = len(payload)
        archive.addfile(member, io.BytesIO(payload))
    return self.put(folder, buffer.getvalue())

  def put(self, folder, raw):
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / 'cifar-10-binary.tar.gz'
    path.write_bytes(gzip.compress(raw))
    return path

  def changed(self, change):
    batches = {name: change.get(name[:-4], payload) for name, payload in self.batches.items()}
    return {name: payload for name, payload in batches.items() if payload is not None}


@pytest.fixture(scope='module')
def small():
  rng = np.random.default_rng(0)
  images = rng.integers(0, 256, (3 * COUNT, 32, 32, 3), np.uint8)
  labels = rng.integers(0, 10, 3 * COUNT, np.uint8)
  batches = {}
  for k, name in enumerate(NAMES):
    payload = b''
    for i in range(k * COUNT, (k + 1) * COUNT):  # by the words of the format's description, colour by colour
      payload += bytes([labels[i]]) + b''.join(images[i, :, :, colour].tobytes() for colour in range(3))
    batches[name] = payload
  table = [cifar.Batch(name, COUNT, hashlib.sha256(payload).hexdigest()) for name, payload in batches.items()]
  files = cifar.CIFAR10._replace(name='tiny', title='Tiny', train=tuple(table[:2]), test=tuple(table[2:]),
                                 origin='http://127.0.0.1:1/', advice='To get it: ask.')
  return Small(batches, images, labels, files)


@pytest.fixture(autouse=True)
def nothing_around(monkeypatch, tmp_path):
  hide_all(monkeypatch, tmp_path)


def check(dataset, small):
  """All four arrays with their types, and the order of the batches."""
  for found, expected, dtype in ((dataset.train_images, small.images[:2 * COUNT], np.uint8),
                                 (dataset.train_labels, small.labels[:2 * COUNT], np.int32),
                                 (dataset.test_images, small.images[2 * COUNT:], np.uint8),
                                 (dataset.test_labels, small.labels[2 * COUNT:], np.int32)):
    assert found.dtype == dtype
    np.testing.assert_array_equal(found, expected)
  assert dataset.classes == 10 and dataset.name == 'Tiny'


# Where the set is looked for

PLACES = ['.', 'tiny', 'cifar-10-batches-bin', 'tiny/cifar-10-batches-bin']


@pytest.mark.parametrize('by_environment', [False, True])
@pytest.mark.parametrize('place', PLACES)
def test_batches_in_any_usual_place(small, tmp_path, monkeypatch, place, by_environment):
  small.write(tmp_path / 'root' / place)
  if by_environment:
    monkeypatch.setenv('POWERPROP_DATA', str(tmp_path / 'root'))
  dataset = cifar.load_files(small.files, None if by_environment else str(tmp_path / 'root'))
  check(dataset, small)
  folder = (tmp_path / 'root' / place).name
  assert data.describe(dataset) == (
    f'Tiny: 8 train and 4 test images from official batches in the folder {folder}, checksums good')


@pytest.mark.parametrize('prefix', ['cifar-10-batches-bin/', './cifar-10-batches-bin/'])
@pytest.mark.parametrize('place', PLACES)
def test_archive_in_any_usual_place(small, tmp_path, place, prefix):
  small.pack(tmp_path / 'root' / place, prefix)
  before = sorted(tmp_path.rglob('*'))
  dataset = cifar.load_files(small.files, str(tmp_path / 'root'))
  check(dataset, small)
  assert dataset.source == 'official archive cifar-10-binary.tar.gz'
  assert sorted(tmp_path.rglob('*')) == before  # nothing was unpacked to disk


def test_batches_come_before_the_archive(small, tmp_path):
  small.put(small.write(tmp_path / 'cifar-10-batches-bin').parent / 'tiny', b'no archive')
  check(cifar.load_files(small.files, str(tmp_path)), small)


def test_found_nowhere_says_where_it_looked_what_is_there_and_what_to_do(small, tmp_path, monkeypatch):
  for name in ('labels.npy', 'test.webp', 'train_1.webp', 'train_2.webp', 'train_3.webp'):
    (tmp_path / 'tiny').mkdir(exist_ok=True)
    (tmp_path / 'tiny' / name).write_bytes(b'')
  for data_dir in (None, str(tmp_path)):
    monkeypatch.setenv('POWERPROP_DATA', str(tmp_path))
    with pytest.raises(DataError) as caught:
      cifar.load_files(small.files, data_dir)
    message = str(caught.value)
    for words in (f'Tiny not found: {tmp_path} and its folders tiny, tiny/cifar-10-batches-bin, ',
                  'none of data_batch_1.bin, data_batch_2.bin, test_batch.bin, nor cifar-10-binary.tar.gz',
                  f'({tmp_path}/tiny holds labels.npy, test.webp, train_1.webp, train_2.webp and 1 more)', 'To get it: ask.'):
      assert words in message
    assert '\n' not in message
    assert ('tensorflow' in message) == (data_dir is None)
  monkeypatch.delenv('POWERPROP_DATA')
  with pytest.raises(DataError, match=r'POWERPROP_DATA is not set; tensorflow-datasets has not prepared it in'):
    cifar.load_files(small.files)
  with pytest.raises(DataError, match=f'data_dir {tmp_path}/nowhere is not a directory'):
    cifar.load_files(small.files, str(tmp_path / 'nowhere'))


# Damage: stem, its new content, and what the error says

def damages(small):
  first, second, test = small.batches.values()
  wrong_label, other_pixel = bytearray(first), bytearray(test)
  wrong_label[2 * 3073] = 10
  other_pixel[-1] ^= 1
  return {
    'cut': ('data_batch_2', second[:-1], r'truncated, 12,291 bytes instead of the 12,292 bytes of 4 records of 3,073'),
    'empty': ('test_batch', b'', r'truncated, 0 bytes'),
    'trailing': ('data_batch_1', first + b'\0', r'too long, bytes follow after the 12,292 bytes of 4 records'),
    'label 10': ('data_batch_1', bytes(wrong_label), r'label 10 at position 2, allowed: 0 to 9'),
    'another pixel': ('test_batch', bytes(other_pixel), r'bad checksum, not the official test_batch.bin of Tiny'),
    'swapped': ('data_batch_1', second, r'bad checksum, .*; this is data_batch_2.bin of Tiny'),
    'test for train': ('data_batch_2', test, r'bad checksum, .*; this is test_batch.bin of Tiny'),
  }


DAMAGES = ['cut', 'empty', 'trailing', 'label 10', 'another pixel', 'swapped', 'test for train']


@pytest.mark.parametrize('packed', [False, True])
@pytest.mark.parametrize('damage', DAMAGES)
def test_damaged_batch_is_named_with_the_reason(small, tmp_path, damage, packed):
  assert set(damages(small)) == set(DAMAGES)
  stem, payload, reason = damages(small)[damage]
  (small.pack if packed else small.write)(tmp_path, **{stem: payload})
  with pytest.raises(DataError, match=reason) as caught:
    cifar.load_files(small.files, str(tmp_path))
  within = 'cifar-10-binary.tar.gz, cifar-10-batches-bin/' if packed else ''
  assert str(caught.value).startswith(f'{tmp_path}/{within}{stem}.bin: ')
  assert '\n' not in str(caught.value)


def test_checksum_error_gives_both_sums(small, tmp_path):
  _, payload, _ = damages(small)['another pixel']
  small.write(tmp_path, test_batch=payload)
  with pytest.raises(DataError, match=f'{hashlib.sha256(payload).hexdigest()} instead of {small.files.test[0].sha256}$'):
    cifar.load_files(small.files, str(tmp_path))


def test_incomplete_set_names_what_is_missing(small, tmp_path):
  small.write(tmp_path / 'x', data_batch_2=None, test_batch=None)
  with pytest.raises(DataError, match=r'x: incomplete Tiny, data_batch_2.bin and test_batch.bin not found'):
    cifar.load_files(small.files, str(tmp_path / 'x'))
  path = small.pack(tmp_path / 'y', data_batch_2=None)
  with pytest.raises(DataError, match=f'{path}: incomplete Tiny, no file cifar-10-batches-bin/data_batch_2.bin in it'):
    cifar.load_files(small.files, str(tmp_path / 'y'))


def test_what_is_no_file_or_cannot_be_read(small, tmp_path):
  path = small.write(tmp_path) / 'test_batch.bin'
  path.unlink()
  path.mkdir()
  with pytest.raises(DataError, match=f'{path}: a directory where a file is expected'):
    cifar.load_files(small.files, str(tmp_path))
  path.rmdir()
  os.mkfifo(path)
  with pytest.raises(DataError, match=f'{path}: not a regular file'):
    cifar.load_files(small.files, str(tmp_path))


# Archives that are not what they should be

def tar_of(*members):
  buffer = io.BytesIO()
  with tarfile.open(fileobj=buffer, mode='w') as archive:
    for member, payload in members:
      archive.addfile(member, io.BytesIO(payload))
  return buffer.getvalue()


def test_links_in_an_archive_are_not_followed(small, tmp_path):
  small.write(tmp_path / 'elsewhere')
  members = []
  for name in NAMES:
    member = tarfile.TarInfo(f'cifar-10-batches-bin/{name}')
    member.type, member.linkname = tarfile.SYMTYPE, str(tmp_path / 'elsewhere' / name)
    members.append((member, b''))
  small.put(tmp_path / 'root', tar_of(*members))
  with pytest.raises(DataError, match=r'incomplete Tiny, no file .*data_batch_1.bin and .*test_batch.bin in it'):
    cifar.load_files(small.files, str(tmp_path / 'root'))


def test_archive_that_unpacks_to_too_much_is_not_read_to_its_end(small, tmp_path):
  member = tarfile.TarInfo('padding')
  member.size = 3 * cifar.ARCHIVE_EXTRA
  path = small.put(tmp_path, tar_of((member, bytes(member.size))))
  with pytest.raises(DataError, match=f'{path}: too long, more than {3 * COUNT * 3073 + 2**20:,} bytes unpacked'):
    cifar.load_files(small.files, str(tmp_path))


def test_damaged_archive(small, tmp_path):
  path = small.pack(tmp_path)
  packed, unpacked = path.read_bytes(), gzip.decompress(path.read_bytes())
  for raw, reason in ((packed[:len(packed) // 2], r'truncated gzip file'),
                      (packed[:20] + b'\xff' * 20 + packed[40:], r'corrupt (gzip file|archive)'),
                      (gzip.compress(b'<html>' * 300), r'corrupt archive'),
                      (gzip.compress(unpacked[:20_000]), r'corrupt archive \(unexpected end of data\)'),
                      (b'', r'corrupt archive \(empty file\)')):
    path.write_bytes(raw)
    with pytest.raises(DataError, match=f'^{path}: {reason}') as caught:
      cifar.load_files(small.files, str(tmp_path))
    assert '\n' not in str(caught.value)


# tensorflow-datasets

@pytest.fixture(scope='module')
def prepared(small, tmp_path_factory):
  library = pytest.importorskip('tensorflow_datasets')
  pytest.importorskip('array_record')
  image_module = pytest.importorskip('PIL.Image')

  def png(image):
    buffer = io.BytesIO()
    image_module.fromarray(image).save(buffer, 'PNG')
    return buffer.getvalue()

  class TinyPhotos(library.core.GeneratorBasedBuilder):
    VERSION = library.core.Version('3.0.2')

    def _info(self):
      return library.core.DatasetInfo(builder=self, features=library.features.FeaturesDict({
        'id': library.features.Text(), 'image': library.features.Image(shape=(32, 32, 3)),
        'label': library.features.ClassLabel(num_classes=10)}))

    def _split_generators(self, dl_manager):
      return {'train': self._generate_examples('train', range(2 * COUNT)),
              'test': self._generate_examples('test', range(2 * COUNT, 3 * COUNT))}

    def _generate_examples(self, split, which):
      for number, i in enumerate(which):
        yield number, {'id': f'{split}_{number:05}', 'image': png(small.images[i]), 'label': int(small.labels[i])}

  root = tmp_path_factory.mktemp('tfds')
  TinyPhotos(data_dir=str(root), file_format='array_record').download_and_prepare()
  return root


def test_tfds_comes_back_in_the_official_order(small, prepared, monkeypatch, tmp_path):
  monkeypatch.setenv('TFDS_DATA_DIR', str(prepared))
  monkeypatch.setenv('POWERPROP_DATA', str(tmp_path))  # has nothing
  dataset = cifar.load_files(small.files._replace(name='tiny_photos'))
  check(dataset, small)
  assert dataset.source == 'tensorflow-datasets tiny_photos 3.0.2'


def test_tfds_with_other_contents_names_the_batch(small, prepared, monkeypatch):
  monkeypatch.setenv('TFDS_DATA_DIR', str(prepared))
  train = (small.files.train[0], small.files.train[1]._replace(sha256='0' * 64))
  other = small.files._replace(name='tiny_photos', train=train)
  with pytest.raises(DataError, match=rf'{prepared}/tiny_photos/3.0.2, images of data_batch_2.bin: bad checksum'):
    cifar.load_files(other)


# The real set

# SHA-1 of the official files, as other projects publish them.
SHA1 = ['aadd24acce27caa71bf4b10992e9e7b2d74c2540', 'c0ba65cce70568cd57b4e03e9ac8d2a5367c1795',
        '1dd00a74ab1d17a6e7d73e185b69dbf31242f295', 'aab85764eb3584312d3c7f65fd2fd016e36a258e',
        '26e2849e66a845b7f1e4614ae70f4889ae604628', '67eb016db431130d61cd03c7ad570b013799c88c']


def test_registered_set_is_the_official_one(monkeypatch):
  if REAL:
    monkeypatch.setenv('POWERPROP_DATA', REAL)
  try:
    dataset = data.load('cifar10')
  except DataError as error:
    if 'not found' not in str(error):
      raise
    pytest.skip('CIFAR-10 is not on this machine')
  assert dataset.train_images.shape == (50000, 32, 32, 3) and dataset.test_images.shape == (10000, 32, 32, 3)
  assert np.bincount(dataset.train_labels).tolist() == [5000] * 10
  assert np.bincount(dataset.test_labels).tolist() == [1000] * 10
  assert dataset.train_labels[:5].tolist() == [6, 9, 9, 4, 1]  # frog, truck, truck, deer, automobile
  images = np.concatenate([dataset.train_images, dataset.test_images])
  labels = np.concatenate([dataset.train_labels, dataset.test_labels])
  for k, sha1 in enumerate(SHA1):
    digest = hashlib.sha1(usedforsecurity=False)
    for image, label in zip(images[k * 10000:(k + 1) * 10000], labels[k * 10000:(k + 1) * 10000], strict=True):
      digest.update(bytes([label]) + np.moveaxis(image, -1, 0).tobytes())
    assert digest.hexdigest() == sha1


# ---- CIFAR-100 ------------------------------------------------------------------------------------------------------

def make_hundred():
  """Six records of its form, two label bytes in front of the pixels, and the table that says so."""
  rng = np.random.default_rng(5)
  images, fine = rng.integers(0, 256, (6, 32, 32, 3), np.uint8), np.array([0, 99, 17, 63, 1, 42], np.uint8)
  coarse = rng.integers(0, 20, 6, np.uint8)
  raw = [bytes([c, f]) + b''.join(image[..., plane].tobytes() for plane in range(3))
         for c, f, image in zip(coarse, fine, images, strict=True)]
  parts = {'train.bin': b''.join(raw[:4]), 'test.bin': b''.join(raw[4:])}
  train, test = ((cifar.Batch(name, len(part) // 3074, hashlib.sha256(part).hexdigest(), 2),) for name, part in parts.items())
  return parts, images, fine, cifar.CIFAR100._replace(name='hundred', train=train, test=test)


def test_cifar100_has_two_labels_of_which_the_second_counts(tmp_path):
  parts, images, fine, files = make_hundred()
  folder = tmp_path / 'hundred' / 'cifar-100-binary'
  folder.mkdir(parents=True)
  for name, part in parts.items():
    (folder / name).write_bytes(part)
  dataset = cifar.load_files(files, str(tmp_path))
  np.testing.assert_array_equal(np.concatenate([dataset.train_images, dataset.test_images]), images)
  assert dataset.train_labels.tolist() + dataset.test_labels.tolist() == fine.tolist()
  assert dataset.classes == 100 and dataset.name == 'CIFAR-100'
  (folder / 'test.bin').write_bytes(parts['test.bin'][:-1])
  with pytest.raises(DataError, match=r'test.bin: truncated, 6,147 bytes instead of the 6,148 bytes of 2 records of 3,074'):
    cifar.load_files(files, str(tmp_path))


def test_cifar100_not_found(monkeypatch, tmp_path):
  hide_all(monkeypatch, tmp_path)
  with pytest.raises(DataError, match=r'CIFAR-100 not found: .*is not read from tensorflow-datasets.*cifar-100-binary.tar.gz'):
    data.load('cifar100')

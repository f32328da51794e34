"""Sets from tensorflow-datasets: sets that its own writer made, read without TensorFlow."""

import io
import json
import struct
import time

import pytest
from made_sets import check, hide_all, make_small

from experiments.data import mnist, tfds
from experiments.errors import DataError


@pytest.fixture(scope='module')
def small():
  return make_small()


@pytest.fixture(autouse=True)
def nothing_around(monkeypatch, tmp_path):
  hide_all(monkeypatch, tmp_path)


@pytest.fixture(scope='module')
def prepared(small, tmp_path_factory):
  library = pytest.importorskip('tensorflow_datasets')
  pytest.importorskip('array_record')
  image_module = pytest.importorskip('PIL.Image')
  arrays = small.arrays

  def png(image):
    buffer = io.BytesIO()
    image_module.fromarray(image).save(buffer, 'PNG')
    return buffer.getvalue()

  class Tiny(library.core.GeneratorBasedBuilder):
    VERSION = library.core.Version('3.0.1')

    def _info(self):
      return library.core.DatasetInfo(builder=self, features=library.features.FeaturesDict({
        'image': library.features.Image(shape=(28, 28, 1)), 'label': library.features.ClassLabel(num_classes=10)}))

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
  assert tfds.newest_prepared(tmp_path / 'nowhere') is None
  for name in ('9.0.0', '10.0.0', '10.0'):
    (tmp_path / name).mkdir()
    (tmp_path / name / 'dataset_info.json').write_text('{}')
  (tmp_path / '11.0.0').mkdir()  # nothing was prepared in it
  assert tfds.newest_prepared(tmp_path) == tmp_path / '10.0.0'


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


def test_download_without_a_network_fails_quickly(small, tmp_path, monkeypatch):
  for module in ('tensorflow', 'tensorflow_datasets'):  # there to be found; importing them fails
    (tmp_path / 'site' / module).mkdir(parents=True)
    (tmp_path / 'site' / module / '__init__.py').write_text('raise RuntimeError("was imported")')
  monkeypatch.syspath_prepend(tmp_path / 'site')
  start = time.monotonic()
  reason = mnist.from_tfds(small.files)
  assert 'cannot download it (urllib.error.URLError: <urlopen error' in reason
  assert time.monotonic() - start < tfds.PROBE_SECONDS + 5
  assert tfds._python('import time; time.sleep(60)', [], 0.2) == 'no answer within 0.2 s'
  assert tfds._python('raise SystemExit(3)', [], 60) == 'exit status 3'
  assert tfds._python('', [], 60) == ''

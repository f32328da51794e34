"""Photographs from folders and from tensorflow-datasets, and batches of them: the same ones by every road."""
import contextlib
import os
import pathlib
import pickle
import shutil
import signal
import struct
import subprocess
import sys
import tarfile
import time

import numpy as np
import pytest
from made_photographs import CLASSES, ODD, encoded, pictures, ramp, write_archives, write_folders

from experiments.data import images, prepare
from experiments.data.images import CONVERTED, REPLACED, Batch, Folders, Load, Prepared
from experiments.errors import DataError, UserError

for _package in ('grain', 'simplejpeg', 'cv2'):
  pytest.importorskip(_package)


@pytest.fixture(scope='module')
def tree(tmp_path_factory):
  return write_folders(tmp_path_factory.mktemp('tree'))


@pytest.fixture(scope='module')
def prepared(tmp_path_factory):
  """The miniature, prepared from its archives by the real builder."""
  pytest.importorskip('tensorflow_datasets')
  root = tmp_path_factory.mktemp('prepared')
  return prepare.prepare(write_archives(root / 'archives'), root / 'sets')


# ---- sources --------------------------------------------------------------------------------------------------------


def test_folders(tree):
  source = images.open_source(tree, 'train')
  assert isinstance(source, Folders) and len(source) == 18 and source.classes == 3 and source.names == list(CLASSES)
  for index in range(18):
    name, label = f'{CLASSES[index // 6]}/{CLASSES[index // 6]}_{index % 6}.JPEG', index // 6
    assert (source.name(index), source[index]) == (name, ((tree / 'train' / name).read_bytes(), label))
  assert len(images.open_source(tree, 'validation')) == 12
  assert source.described == '18 images of 3 classes in the folder train'


def test_validation_by_another_name(tree, tmp_path):
  shutil.copytree(tree / 'val', tmp_path / 'validation')
  assert len(images.open_source(tmp_path, 'validation')) == 12


def test_folders_that_are_none(tmp_path):
  with pytest.raises(DataError, match='nowhere: is no directory'):
    images.open_source(tmp_path / 'nowhere', 'train')
  with pytest.raises(DataError, match=r'holds neither folders of images \(train/CLASS/IMAGE\) nor a set'):
    images.open_source(tmp_path, 'train')
  (tmp_path / prepare.TRAIN).touch()
  with pytest.raises(DataError, match=r'dataset_info\.json\); archives are for python -m experiments\.data\.prepare'):
    images.open_source(tmp_path, 'train')
  (tmp_path / 'train').mkdir()
  with pytest.raises(DataError, match='train: holds no folders of classes'):
    images.open_source(tmp_path, 'train')
  (tmp_path / 'train' / 'cat').mkdir()
  (tmp_path / 'train' / 'cat' / 'readme.txt').touch()
  with pytest.raises(DataError, match=r'cat: holds no images \(.jpeg, .jpg, .png, .webp\)'):
    images.open_source(tmp_path, 'train')


def as_tfrecord(prepared, root):
  """The same records framed as TFRecord: length, CRC, record, CRC."""
  readers = pytest.importorskip('array_record.python.array_record_module')
  folder = root / 'imagenet2012' / prepared.name
  shutil.copytree(prepared, folder)
  info = folder / 'dataset_info.json'
  info.write_text(info.read_text().replace('array_record', 'tfrecord'))
  for path in list(folder.glob('*.array_record-*')):
    reader = readers.ArrayRecordReader(str(path))
    framed = b''.join(struct.pack('<Q', len(r)) + bytes(4) + r + bytes(4) for r in reader.read(0, reader.num_records()))
    path.with_name(path.name.replace('array_record', 'tfrecord')).write_bytes(framed)
    reader.close()
    path.unlink()
  return folder


@pytest.fixture(scope='module')
def framed(prepared, tmp_path_factory):
  return as_tfrecord(prepared, tmp_path_factory.mktemp('framed'))


def test_what_was_prepared_is_what_was_in_the_archives(prepared, framed):
  """Official labels: those of training are the places of their classes in the list of synsets, of validation a list."""
  written = {f'{name}_{i}.JPEG': data for number, name in enumerate(CLASSES)
             for i, data in pictures(6, number)}
  for folder in (prepared, framed):
    source = images.open_source(folder.parents[1], 'train')
    assert isinstance(source, Prepared) and len(source) == 18 and source.classes == 1000
    found = {source.name(i): source[i] for i in range(len(source))}
    assert {name: data for name, (data, _) in found.items()} == written
    assert all(label == CLASSES.index(name.partition('_')[0]) for name, (_, label) in found.items())
    assert source.described == '18 images of 1000 classes that tensorflow-datasets prepared as imagenet2012'
    validation = Prepared(folder, 'validation')
    labels = {validation.name(i): validation[i][1] for i in range(5)}
    # The first of the official labels, by synset: n01751748, n09193705, n02105855, n04263257, n03125729.
    assert labels == {f'ILSVRC2012_val_{i + 1:08d}.JPEG': n for i, n in enumerate((65, 970, 230, 809, 516))}
    copy = pickle.loads(pickle.dumps(source))
    assert copy[3] == source[3] and copy.name(7) == source.name(7)
  with pytest.raises(DataError, match=r"has the splits \['train', 'validation'\], not 'test'"):
    Prepared(prepared, 'test')


def test_the_newest_version_of_one_set(prepared, tmp_path):
  """Version 10 is newer than 9, what is incomplete is none; a second set is refused, and may be named."""
  for name in ('imagenet2012/9.0.0', 'imagenet2012/10.0.0', 'other/1.0.0'):
    shutil.copytree(prepared, tmp_path / name)
  (tmp_path / 'imagenet2012' / 'incomplete.X_11.0.0').mkdir()
  (tmp_path / 'imagenet2012' / 'incomplete.X_11.0.0' / 'dataset_info.json').write_text('{}')
  newest = tmp_path / 'imagenet2012' / '10.0.0'
  assert images.open_source(tmp_path / 'imagenet2012', 'train').folder == newest
  assert images.open_source(newest, 'train').folder == newest
  with pytest.raises(DataError, match=r'several prepared sets; config\.data_dir must name one of .*/imagenet2012, .*/other$'):
    images.open_source(tmp_path, 'train')
  shutil.rmtree(tmp_path / 'other')
  assert images.open_source(tmp_path, 'train').folder == newest


def test_damaged_sets(framed, tmp_path):
  folder = tmp_path / 'set' / framed.name
  shutil.copytree(framed, folder)
  path = max(folder.glob('*train.tfrecord-*'), key=lambda path: path.stat().st_size)
  whole = path.read_bytes()
  path.write_bytes(whole[:-5])
  with pytest.raises(DataError, match=r'ends within record \d+'):
    Prepared(folder, 'train')
  path.write_bytes(whole)
  path.write_bytes(whole[:images.frames(path)[-1, 0] - 12])
  with pytest.raises(DataError, match='split train has 17 records instead of 18'):
    Prepared(folder, 'train')
  length = int.from_bytes(whole[:8], 'little')
  path.write_bytes(whole[:12] + b'\xff' * length + whole[12 + length:])
  source = Prepared(folder, 'train')
  with pytest.raises(DataError, match=r'example \d+ of split train cannot be read'):
    [source[i] for i in range(len(source))]
  (folder / 'dataset_info.json').write_text('{')
  with pytest.raises(DataError, match='cannot be opened'):
    Prepared(folder, 'train')


HEADER = 512   # bytes of a tar's


@pytest.mark.parametrize('which', ['train', 'validation'])
@pytest.mark.parametrize(('damage', 'message'), [
    (lambda raw, at: raw[:HEADER + 188], 'cut off|unexpected end of data'),      # amid the first file
    (lambda raw, at: raw[:at], 'cut off or damaged after '),                     # between two
    (lambda raw, at: raw[:at + 100], 'cut off or damaged after |truncated'),     # amid a header
    (lambda raw, at: raw[:at] + b'x' * HEADER + raw[at + HEADER:], 'cut off or damaged after ')])
def test_prepare_names_the_archive_that_is_not_whole(tmp_path, which, damage, message):
  """Without a word tensorflow-datasets would prepare what comes before the damage."""
  archives = write_archives(tmp_path / 'archives', train=4)
  path = archives / {'train': prepare.TRAIN, 'validation': prepare.VALIDATION}[which]
  with tarfile.open(path) as opened:
    last = opened.getmembers()[-1].offset
  path.write_bytes(damage(path.read_bytes(), last))
  with pytest.raises(UserError, match=rf'^[^ ]*/{path.name} cannot be prepared \(.*({message})'):
    prepare.prepare(archives, tmp_path / 'to')
  assert not (tmp_path / 'to').exists()


def test_prepare_looks_into_the_archives_of_classes(tmp_path):
  archives = write_archives(tmp_path / 'archives', train=4)
  path = archives / prepare.TRAIN
  with tarfile.open(path) as opened:
    inner = opened.getmembers()[1]
    with tarfile.open(fileobj=opened.extractfile(inner)) as of_class:
      header = inner.offset_data + of_class.getmembers()[2].offset
  raw = path.read_bytes()
  path.write_bytes(raw[:header] + b'x' * HEADER + raw[header + HEADER:])
  with pytest.raises(UserError, match=rf'\({CLASSES[1]}.tar: cut off or damaged after {CLASSES[1]}_1.JPEG'):
    prepare.prepare(archives, tmp_path / 'to')


def test_prepare_gives_no_image_the_label_of_another(tmp_path):
  archives = write_archives(tmp_path / 'archives', train=4)
  with tarfile.open(archives / prepare.VALIDATION, 'w') as archive:
    for i in (1, 3):
      archive.addfile(tarfile.TarInfo(f'ILSVRC2012_val_{i:08d}.JPEG'))
  with pytest.raises(UserError, match=r'\(ILSVRC2012_val_00000003.JPEG is where ILSVRC2012_val_00000002.JPEG should be'):
    prepare.prepare(archives, tmp_path / 'to')


def test_prepare_says_that_it_leaves_a_set_as_it_is(prepared, capfd):
  root = prepared.parents[2]
  assert prepare.prepare(root / 'archives', root / 'sets') == prepared
  assert f'{prepared} is there, and is left as it is' in capfd.readouterr().out


def test_prepare_says_what_is_missing(tmp_path):
  with pytest.raises(UserError, match=r'--archives=.*nowhere is no directory'):
    prepare.prepare(tmp_path / 'nowhere', tmp_path / 'to')
  with pytest.raises(UserError, match=r'holds no ILSVRC2012_img_train\.tar and no ILSVRC2012_img_val\.tar; training takes both'):
    prepare.prepare(tmp_path, tmp_path / 'to')
  train, validation = tmp_path / prepare.TRAIN, tmp_path / prepare.VALIDATION
  tarfile.open(train, 'w').close()
  with pytest.raises(UserError, match=r'holds no ILSVRC2012_img_val\.tar; training takes both'):
    prepare.prepare(tmp_path, tmp_path / 'to')
  tarfile.open(validation, 'w').close()
  with pytest.raises(UserError, match=r'--to=.*train.tar/to cannot be made \(Not a directory\)'):
    prepare.prepare(tmp_path, train / 'to')
  train.write_bytes(b'no archive')
  with pytest.raises(UserError, match=r'ILSVRC2012_img_train\.tar cannot be prepared'):
    prepare.prepare(tmp_path, tmp_path / 'to')
  train.unlink()
  train.symlink_to('/proc/self/mem')   # as a bad disk has it
  with pytest.raises(UserError, match=r'ILSVRC2012_img_train\.tar cannot be prepared \(.*Input/output error'):
    prepare.prepare(tmp_path, tmp_path / 'to')


def test_frames(tmp_path):
  path = tmp_path / 'a'
  path.write_bytes(b''.join(struct.pack('<Q', n) + b'crc1' + b'x' * n + b'crc2' for n in (3, 0, 5)))
  assert images.frames(path).tolist() == [[12, 3], [31, 0], [47, 5]]
  path.write_bytes(b'')
  assert images.frames(path).shape == (0, 2)


# ---- loading --------------------------------------------------------------------------------------------------------


def test_odd_files_are_marked(tree):
  load = Load(images.open_source(tree, 'train'), 16, 'fail')
  for index in range(18):
    batch = load.evaluate(index)
    assert batch.odd == (CONVERTED if ODD.get(index % 6) in ('cmyk', 'png') else 0)
    assert (batch.labels, batch.index) == (index // 6, index) and batch.images.shape == (16, 16, 3)


@pytest.fixture
def damaged(tree, tmp_path):
  shutil.copytree(tree / 'train', tmp_path / 'train')
  for i in (4, 5):
    (tmp_path / 'train' / CLASSES[2] / f'{CLASSES[2]}_{i}.JPEG').write_bytes(encoded(ramp(50, 50))[:500])
  return images.open_source(tmp_path, 'train')


def test_damaged_files_by_policy(damaged):
  with pytest.raises(DataError, match=rf'{CLASSES[2]}/{CLASSES[2]}_4.JPEG cannot be read \((?i:.*truncated)'):
    Load(damaged, 16, 'fail').evaluate(16)
  batch = Load(damaged, 16, 'skip').evaluate(16)
  assert (batch.odd, batch.index, batch.labels) == (REPLACED, 16, -1) and not batch.images.any()


@pytest.mark.parametrize(('among', 'stands_in'), [(None, 0), ([3, 7, 16, 17], 3), ([7, 16], 7), ([2, 16, 17], 2)])
def test_what_stands_in_for_damaged_files_is_of_the_same_part(damaged, among, stands_in):
  """16 and 17 are damaged: the next of those for training, from the first on again."""
  load = Load(damaged, 16, 'skip', None if among is None else np.array(among, np.int32))
  batch, expected = (load.train(i, np.random.default_rng(1)) for i in (16, stands_in))
  assert (batch.odd, batch.index, batch.labels) == (REPLACED, 16, stands_in // 6)
  np.testing.assert_array_equal(batch.images, expected.images)


def test_a_set_of_nothing_but_damage(tmp_path):
  (tmp_path / 'train' / 'a').mkdir(parents=True)
  (tmp_path / 'train' / 'a' / '1.jpeg').write_bytes(b'x')
  with pytest.raises(DataError, match='none of the 1 images of 1 classes in the folder train can be read'):
    Load(images.open_source(tmp_path, 'train'), 16, 'skip').train(0, np.random.default_rng(0))


def test_labels_out_of_range(tree):
  source = images.open_source(tree, 'train')
  source.classes = 2
  with pytest.raises(DataError, match='has the label 2; there are 2 classes'):
    Load(source, 16, 'skip').evaluate(17)


# ---- batches --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope='module')
def load(tree):
  return Load(images.open_source(tree, 'train'), 16, 'fail')


def take(count, load, batch_size=4, seed=0, **how):
  stream = images.train_batches(load, np.arange(18, dtype=np.int32), batch_size, seed, **how)
  return [own(next(stream)) for _ in range(count)]


def own(batch):
  """A copy: worker processes hand over memory that they share."""
  return Batch(*map(np.array, batch))


def same(found, wanted):
  assert len(found) == len(wanted)
  for a, b in zip(found, wanted, strict=True):
    for x, y in zip(a, b, strict=True):
      np.testing.assert_array_equal(x, y)


def test_an_epoch_is_a_permutation(load):
  batches = take(27, load)   # 6 epochs of 18
  order = np.concatenate([batch.index for batch in batches]).reshape(6, 18)
  np.testing.assert_array_equal(np.sort(order, 1), np.tile(np.arange(18), (6, 1)))
  assert len({tuple(row) for row in order}) == 6
  assert all(batch.labels.tolist() == (batch.index // 6).tolist() for batch in batches)
  crops = [batch.images[k] for batch in batches for k in range(4) if batch.index[k] == 0]
  assert len(crops) == 6 and all((a != b).any() for i, a in enumerate(crops) for b in crops[:i])


def test_crops_and_flips_are_at_random(load):
  """A ramp grows to the right, and to the left where it has been flipped: half of them."""
  pixels = np.concatenate([batch.images for batch in take(100, load)]).astype(int)
  flipped = (pixels[:, 8, 0, 0] > pixels[:, 8, -1, 0]).mean()
  assert abs(flipped - 0.5) < 5 * 0.5 / 400**0.5


def test_batches_depend_on_seed_and_number_alone(load):
  whole = take(12, load)
  same(take(12, load), whole)
  same(take(5, load, start=7), whole[7:])
  assert any((a.index != b.index).any() for a, b in zip(take(12, load, seed=1), whole, strict=True))
  for hosts in (2, 4):
    parts = [take(12, load, host=host, hosts=hosts) for host in range(hosts)]
    for number, batch in enumerate(whole):
      for host in range(hosts):
        same([parts[host][number]], [Batch(*(x[host::hosts] for x in batch))])


@pytest.mark.parametrize('workers', [1, 3])
def test_whatever_the_number_of_processes(load, workers):
  same(take(7, load, workers=workers, start=2), take(9, load)[2:])


def children(parent):
  """Processes that this one has started: /proc has the parent's number behind the name in brackets and the state."""
  found = []
  for path in pathlib.Path('/proc').glob('[0-9]*/stat'):
    with contextlib.suppress(OSError):
      if path.read_text().rpartition(')')[2].split()[1] == str(parent):
        found.append(int(path.parent.name))
  return found


ENDLESS = """if __name__ == '__main__':
  import pathlib, sys
  import numpy as np
  from experiments.data import images
  load = images.Load(images.open_source(pathlib.Path(sys.argv[1]), 'train'), 16, 'fail')
  for batch in images.train_batches(load, np.arange(18, dtype=np.int32), 4, 0, workers=2):
    print(len(batch.index), flush=True)
"""


@pytest.mark.skipif(not pathlib.Path('/proc/self/stat').exists(), reason='processes are found by /proc')
def test_workers_outlive_a_signal_and_end_with_the_main_process(tree, tmp_path):
  """Batches go on after SIGTERM and SIGINT to each worker; none is left when the main process is killed."""
  (tmp_path / 'endless.py').write_text(ENDLESS)
  root = pathlib.Path(images.__file__).parents[2]
  main = subprocess.Popen([sys.executable, str(tmp_path / 'endless.py'), str(tree)], env=os.environ | {'PYTHONPATH': str(root)},
                          stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
  try:
    assert [main.stdout.readline() for _ in range(20)] == ['4\n'] * 20
    workers = [child for child in children(main.pid) if 'spawn_main' in pathlib.Path(f'/proc/{child}/cmdline').read_text()]
    assert len(workers) == 2
    for worker in workers:
      os.kill(worker, signal.SIGTERM)
      os.kill(worker, signal.SIGINT)
    assert [main.stdout.readline() for _ in range(200)] == ['4\n'] * 200
  finally:
    main.kill()
    main.communicate(timeout=60)
  until = time.monotonic() + 30
  while any(pathlib.Path(f'/proc/{worker}').exists() for worker in workers):
    assert time.monotonic() < until
    time.sleep(0.05)


def test_a_worker_names_what_it_cannot_read(damaged):
  stream = images.train_batches(Load(damaged, 16, 'fail'), np.arange(18, dtype=np.int32), 6, 0, workers=1)
  with pytest.raises(Exception, match=r'_[45].JPEG cannot be read'):
    [next(stream) for _ in range(3)]


def test_evaluation_sees_every_image_once(load):
  indices = np.array([3, 5, 7, 11, 13], np.int32)
  for hosts in (1, 2):
    batches = [list(images.evaluation_batches(load, indices, 4, host, hosts)) for host in range(hosts)]
    assert [len(part) for part in batches] == [2] * hosts
    seen = np.concatenate([batch.index for part in batches for batch in part])
    labels = np.concatenate([batch.labels for part in batches for batch in part])
    assert sorted(seen.tolist()) == [-1, -1, -1, 3, 5, 7, 11, 13]
    assert dict(zip(seen.tolist(), labels.tolist(), strict=True)) == {-1: -1, 3: 0, 5: 0, 7: 1, 11: 1, 13: 2}
    same([Batch(*(x[:1] for x in batches[0][0]))], [images.stack([load.evaluate(3)])])


def test_a_batch_that_hosts_cannot_share(load):
  with pytest.raises(UserError, match='must be a multiple of the 3 hosts, got 4'):
    take(1, load, hosts=3)


def test_images_kept_from_training():
  train, kept = images.divide(10, 4)
  assert kept.tolist() == [3, 7] and train.tolist() == [0, 1, 2, 4, 5, 6, 8, 9]
  train, kept = images.divide(3, 0)
  assert kept.tolist() == [] and train.tolist() == [0, 1, 2]


def test_the_command(tmp_path):
  root = pathlib.Path(images.__file__).parents[2]
  def run(*flags):
    return subprocess.run([sys.executable, '-m', 'experiments.data.prepare', *flags], cwd=root, capture_output=True, text=True)
  assert run().returncode == 2 and 'error: --archives is needed' in run().stderr
  done = run(f'--archives={tmp_path}', f'--to={tmp_path / "to"}')
  assert done.returncode == 2 and 'holds no ILSVRC2012_img_train.tar' in done.stderr

"""The protocol 'streamed' from flags to report: a small network on made photographs, stopped, damaged and gone on with."""
import csv
import json
import os
import pathlib
import shutil
import signal
import socket
import subprocess
import sys
import time

import numpy as np
import pytest
from made_photographs import CLASSES, encoded, ramp, write_folders
from tiny_photographs import network

from configs import imagenette
from experiments import dry_run, streamed
from experiments.errors import UserError
from experiments.models import MODELS

ROOT = pathlib.Path(streamed.__file__).parents[1]
STEPS = 12


def overrides(**change):
  return {'model': 'tiny_photographs', 'batch_size': 8, 'steps': STEPS, 'stream.image_size': 16, 'stream.classes': 3,
          'stream.held_out': 6, 'stream.log_steps': 3, 'stream.checkpoint_steps': 4, 'stream.evaluate_steps': 6,
          'sparse.every_steps': 2, 'sweep.learning_rate': (0.1,), 'sweep.sparsity': (0.5,), 'prune.sampled_weights': 100,
          'prune.densities': (0.5,), 'prune.figure_density': 0.5} | change


def make_config(variant='rigl_powerprop', **change):
  config = imagenette.get_config(variant)
  with config.unlocked():
    config.update_from_flattened_dict(overrides(**change))
  return config


@pytest.fixture(scope='module', autouse=True)
def tiny():
  with pytest.MonkeyPatch.context() as patch:
    patch.setitem(MODELS, 'tiny_photographs', network)
    yield


@pytest.fixture(scope='module')
def tree(tmp_path_factory):
  return write_folders(tmp_path_factory.mktemp('tree'), train=8)


def start(tree, workdir, cache, *more, devices=2, **change):
  flags = [f'--config.{key}={value}' for key, value in (overrides(**change) | {'data_dir': tree}).items()]
  environment = os.environ | {
      'XLA_FLAGS': f'--xla_force_host_platform_device_count={devices}', 'JAX_COMPILATION_CACHE_DIR': str(cache),
      'JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS': '0', 'JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES': '0',
      'PYTHONPATH': f'{ROOT}:{ROOT / "tests"}'}
  return subprocess.Popen([sys.executable, '-m', 'tests.tiny_photographs', '--config=configs/imagenette.py:rigl_powerprop',
                           f'--workdir={workdir}', *flags, *more], cwd=ROOT, env=environment, text=True,
                          stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def ended(process, code=0):
  out, err = process.communicate(timeout=600)
  assert process.returncode == code, out + err
  return out, err


@pytest.fixture(scope='module')
def cache(tmp_path_factory):
  return tmp_path_factory.mktemp('cache')


@pytest.fixture(scope='module')
def finished(tree, cache, tmp_path_factory):
  workdir = tmp_path_factory.mktemp('finished')
  out, err = ended(start(tree, workdir, cache, **{'stream.profile_steps': 5}))   # of which three are left
  return workdir, out, err


def rows(workdir, name='results'):
  with (workdir / f'{name}.csv').open() as file:
    return list(csv.DictReader(file))


def records(workdir):
  return [json.loads(line) for line in (workdir / 'metrics.jsonl').read_text().splitlines()]


def test_a_run_leaves_everything(finished):
  workdir, out, err = finished
  (row,) = rows(workdir)
  # 216 + 1,152 + 48 weights of 3×3×3×8, 3×3×8×16 and 16×3.
  assert (row['alpha'], row['algorithm'], row['kept'], row['weights']) == ('2.0', 'rigl', '708', '1416')
  assert 0 <= float(row['test_accuracy']) <= 1 and 0 <= float(row['validation_accuracy']) <= 1
  lines = records(workdir)
  assert [line['step'] for line in lines] == [3, 4, 6, 8, 9, 12]
  assert all(line['images_per_second'] > 0 and 0 <= line['input_wait'] <= 1 for line in lines)
  assert [line['step'] for line in lines if 'accuracy' in line] == [6, 12]
  # Of each class number 1 is CMYK and number 3 a PNG: each is named once.
  assert lines[-1]['converted_images'] > 0 and lines[-1]['replaced_images'] == 0
  assert err.count('is no JPEG in grey or YCbCr, and read by Pillow') <= 6 and f'{CLASSES[0]}_1.JPEG' in err
  assert {path.name for path in (workdir / 'checkpoints').iterdir()} == {'8', '12'}
  assert len(list((workdir / 'best').iterdir())) == 1
  assert list((workdir / 'profile').rglob('*.xplane.pb'))
  for name in ('report.html', 'table.md', 'run.json', 'figures/compare.png', 'statistics.csv', 'weights.npz'):
    assert (workdir / name).stat().st_size > 0
  (statistics,) = rows(workdir, 'statistics')
  assert 0 < float(statistics['training_operations']) < 1
  assert 'step 12/12' in out


@pytest.mark.parametrize('when', ['killed', 'killed at the end', 'asked to stop', 'damaged'])
def test_goes_on_to_the_same_numbers(finished, tree, cache, tmp_path, when):
  workdir, _, _ = finished
  mine = tmp_path / 'run'
  if when in ('damaged', 'killed at the end'):
    shutil.copytree(workdir, mine)
    for name in ('run.json', 'results.csv'):
      (mine / name).unlink()
  if when == 'killed at the end':
    out, _ = ended(start(tree, mine, cache))
    assert 'goes on from step 12' in out
  elif when == 'damaged':
    later = mine / 'best' / '100'   # of a step that the run has not come to again
    shutil.copytree(next((mine / 'best').iterdir()), later)
    newest = max((path for path in (mine / 'checkpoints' / '12').rglob('*') if path.is_file() and path.name != 'sha256.json'),
                 key=lambda path: path.stat().st_size)
    newest.write_bytes(bytes(len(newest.read_bytes())))
    out, err = ended(start(tree, mine, cache))
    assert 'goes on from step 8' in out and 'cannot be read' in err
    assert not later.exists()
  else:
    workers = 0 if when == 'killed' else 2   # and after it the other way round
    process = start(tree, mine, cache, **{'stream.log_steps': 1, 'stream.workers': workers})
    while not ((mine / 'metrics.jsonl').exists() and len(records_so_far(mine)) >= 2):
      assert process.poll() is None
      time.sleep(0.01)
    process.send_signal(signal.SIGKILL if when == 'killed' else signal.SIGTERM)
    out, err = process.communicate(timeout=600)
    # The run may have ended before the signal came.
    assert process.returncode in ((-signal.SIGKILL, 0) if when == 'killed' else (143, 0)), out + err
    if process.returncode == 143:
      assert 'stopped by a signal after step' in out
    ended(start(tree, mine, cache, **{'stream.log_steps': 1, 'stream.workers': 2 - workers}))
  assert rows(mine) == rows(workdir)
  (ours,), (theirs,) = rows(mine, 'statistics'), rows(workdir, 'statistics')   # operations: sums of other parts
  assert float(ours.pop('training_operations')) == pytest.approx(float(theirs.pop('training_operations')), rel=1e-6)
  assert ours == theirs
  with np.load(mine / 'weights.npz') as found, np.load(workdir / 'weights.npz') as wanted:
    for name in wanted:
      np.testing.assert_array_equal(found[name], wanted[name])


def records_so_far(workdir):
  return [line for line in (workdir / 'metrics.jsonl').read_text().splitlines() if line.endswith('}')]


@pytest.mark.parametrize('done', [0, 8])
def test_two_hosts(finished, tree, cache, tmp_path, done):
  """Two processes of one device each, over loopback, from the start and from a checkpoint of one process with two: its losses,
  and the same number of weights."""
  if done:
    shutil.copytree(finished[0], tmp_path / 'run')
    (tmp_path / 'run' / 'run.json').unlink()
    shutil.rmtree(tmp_path / 'run' / 'checkpoints' / '12')
  with socket.socket() as found:
    found.bind(('127.0.0.1', 0))
    port = found.getsockname()[1]
  hosts = [start(tree, tmp_path / 'run', cache, f'--coordinator=127.0.0.1:{port}', '--processes=2', f'--process={i}', devices=1)
           for i in range(2)]
  for process in hosts:
    ended(process)
  assert rows(tmp_path / 'run')[0]['kept'] == rows(finished[0])[0]['kept']
  for one, other in zip(records(tmp_path / 'run'), records(finished[0]), strict=True):
    assert one['step'] == other['step']
    for name, losses in one['train_loss'].items():   # sums over the batch in another order
      np.testing.assert_allclose(losses, other['train_loss'][name], rtol=1e-4)


def test_a_run_that_has_ended_is_only_drawn_again(finished, tree, cache):
  out, _ = ended(start(tree, finished[0], cache))
  assert 'has ended; its report is drawn again' in out


def test_what_is_no_longer_finite_stops_the_run(tree, cache, tmp_path):
  _, err = ended(start(tree, tmp_path / 'run', cache, **{'sweep.learning_rate': (1e30,), 'stream.evaluate_steps': 0}), 2)
  assert 'error: training is no longer finite after step ' in err and 'arrays of parameters' in err
  assert not list((tmp_path / 'run' / 'checkpoints').glob('[0-9]*'))


def test_photographs_that_cannot_be_read(tree, cache, tmp_path):
  shutil.copytree(tree, tmp_path / 'tree')
  (tmp_path / 'tree' / 'train' / CLASSES[0] / f'{CLASSES[0]}_5.JPEG').write_bytes(encoded(ramp(50, 50))[:400])
  _, err = ended(start(tmp_path / 'tree', tmp_path / 'a', cache, **{'stream.held_out': 0}), 2)
  assert f'error: {CLASSES[0]}/{CLASSES[0]}_5.JPEG cannot be read' in err and 'Traceback' not in err
  _, err = ended(start(tmp_path / 'tree', tmp_path / 'b', cache, **{'stream.held_out': 0, 'stream.on_damage': 'skip'}))
  assert f'{CLASSES[0]}_5.JPEG cannot be read, and left out' in err
  assert records(tmp_path / 'b')[-1]['replaced_images'] > 0
  (row,) = rows(tmp_path / 'b')   # no image was held out
  assert row['validation_accuracy'] == 'nan' and 0 <= float(row['test_accuracy']) <= 1


@pytest.mark.parametrize(('change', 'message'), [
    ({'sweep.alpha': (1.0, 2.0)}, r'config.sweep.alpha must be a single value for the protocol .streamed.*got \(1.0, 2.0\)'),
    ({'stream.shards': 3}, r'config.stream.shards must be a divisor of the 8 devices, got 3'),
    ({'batch_size': 12}, r'config.batch_size must be a multiple of the 8 devices, got 12'),
    ({'stream.batch_norm_parts': 3}, r'config.stream.batch_norm_parts must be a divisor of batch_size=8, got 3'),
    ({'stream.held_out': 1}, r'config.stream.held_out must be 0, or at least 2, got 1'),
    ({'stream.on_damage': 'ignore'}, r"config.stream.on_damage must be one of \['fail', 'skip'\], got 'ignore'"),
    ({'stream.compute': 'float16'}, r"config.stream.compute must be one of \['bfloat16', 'float32'\], got 'float16'"),
    ({'stream.log_steps': 0}, r'config.stream.log_steps must be positive, got 0')])
def test_check_says_what_is_allowed(change, message):
  streamed.check(make_config())
  with pytest.raises(UserError, match=message):
    streamed.check(make_config(**change))


def test_photographs_have_to_be_there(tree, tmp_path, monkeypatch):
  monkeypatch.delenv('POWERPROP_DATA', raising=False)
  with pytest.raises(UserError, match=r'photographs are needed: --config\.data_dir=DIRECTORY'):
    streamed.run(make_config(), tmp_path / 'run')
  with pytest.raises(UserError, match=r'config\.stream\.classes is 5, and there are 24 images of 3 classes'):
    streamed.run(make_config(**{'stream.classes': 5, 'data_dir': str(tree)}), tmp_path / 'run')
  with pytest.raises(UserError, match='must be at most the 20 images for training, got 24'):
    streamed.run(make_config(**{'batch_size': 24, 'data_dir': str(tree)}), tmp_path / 'run')
  assert not (tmp_path / 'run').exists()


# ---- dry runs -------------------------------------------------------------------------------------------------------


def test_a_dry_run_tells_what_a_run_then_does(finished):
  """The share of dense training that the finished run measured: masks of constant size, and dense gradients at times."""
  text = dry_run.describe(make_config())
  (statistics,) = rows(finished[0], 'statistics')
  share = float(text.partition('operations, ')[2].partition(' of dense')[0])
  assert share == pytest.approx(float(statistics['training_operations']), abs=0.002)
  assert '1,467 parameters, 1,416 of them weights' in text and '12 steps of 8 images: 96 images' in text


@pytest.mark.parametrize('variant', ['dense', 'gradual', 'top_kast'])
def test_shares_by_rule(variant):
  """Two thirds of the operations go with the forward densities, one with the backward ones."""
  config = make_config(variant, steps=400, **{'sparse.distribution': 'uniform', 'sweep.sparsity': (0.5 * (variant != 'dense'),)})
  text = dry_run.describe(config)
  found = float(text.partition('operations, ')[2].partition(' of dense')[0])
  if variant == 'gradual':
    # Density 1 until step 100, then 1 − ½(1 − (1 − t)³) in steps of 2 until 300, then ½.
    density = [1 - 0.5 * (1 - (1 - min(max((n // 2 * 2 - 100) / 200, 0), 1)) ** 3) for n in range(400)]
    share = np.mean(density)
  elif variant == 'dense':
    share = 1
  else:
    # ½ forward, and a backward set twice as large, which is all; from three quarters on it is the forward set.
    share = 3 / 4 * (2 / 3 * 0.5 + 1 / 3) + 1 / 4 * 0.5
  assert found == pytest.approx(share, abs=0.003)

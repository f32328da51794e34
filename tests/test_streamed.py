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
import threading
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from made_photographs import CLASSES, encoded, ramp, write_folders
from tiny_photographs import network

from configs import imagenette
from experiments import dry_run, photographs, programs, streamed
from experiments.data.images import Batch
from experiments.errors import UserError
from experiments.models import MODELS

ROOT = pathlib.Path(streamed.__file__).parents[1]
STEPS = 60


def overrides(**change):
  return {'model': 'tiny_photographs', 'batch_size': 8, 'steps': STEPS, 'stream.image_size': 16, 'stream.classes': 3,
          'stream.held_out': 6, 'stream.log_steps': 15, 'stream.checkpoint_steps': 20, 'stream.evaluate_steps': 30,
          'sparse.every_steps': 10, 'sweep.learning_rate': (0.1,), 'sweep.sparsity': (0.5,), 'prune.sampled_weights': 100,
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
  out, err = ended(start(tree, workdir, cache, **{'stream.profile_steps': 100}))   # of which 51 are left
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
  assert [line['step'] for line in lines] == [15, 20, 30, 40, 45, 60]
  assert all(line['images_per_second'] > 0 and 0 <= line['input_wait'] <= 1 for line in lines)
  assert [line['step'] for line in lines if 'accuracy' in line] == [30, 60]
  # Of each class number 1 is CMYK and number 3 a PNG: each is named once.
  assert lines[-1]['converted_images'] > 0 and lines[-1]['replaced_images'] == 0
  named = {line.split()[1] for line in err.splitlines() if 'is no JPEG in grey or YCbCr, and read by Pillow' in line}
  assert named == {f'{name}/{name}_{i}.JPEG' for name in CLASSES for i in (1, 3)}
  assert {path.name for path in (workdir / 'checkpoints').iterdir()} == {'40', '60'}
  assert len(list((workdir / 'best').iterdir())) == 1
  assert list((workdir / 'profile').rglob('*.xplane.pb'))
  for name in ('report.html', 'table.md', 'run.json', 'figures/compare.png', 'statistics.csv', 'weights.npz'):
    assert (workdir / name).stat().st_size > 0
  (statistics,) = rows(workdir, 'statistics')
  assert 0 < float(statistics['training_operations']) < 1
  assert 'step 60/60' in out


def test_masks_change_when_they_are_due(tree, cache, tmp_path):
  """From all weights to half of each layer, at step 45: the count tells, where RigL's is the same all along. On a single device,
  where convolutions are ours."""
  ended(start(tree, tmp_path, cache, devices=1, **{'sweep.algorithm': ('one_shot',), 'sparse.distribution': 'uniform',
                                                   'stream.evaluate_steps': 0}))
  (row,) = rows(tmp_path)
  assert (row['algorithm'], row['kept'], row['weights']) == ('one_shot', '708', '1416')
  (statistics,) = rows(tmp_path, 'statistics')
  assert float(statistics['training_operations']) == pytest.approx((45 + 15 / 2) / 60, abs=0.003)   # a step is 0.008


def damage(checkpoint):
  largest = max((path for path in checkpoint.rglob('*') if path.is_file() and path.name != 'sha256.json'),
                key=lambda path: path.stat().st_size)
  largest.write_bytes(bytes(len(largest.read_bytes())))


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
    assert 'goes on from step 60' in out
  elif when == 'damaged':
    later = mine / 'best' / '100'   # of a step that the run has not come to again
    shutil.copytree(next((mine / 'best').iterdir()), later)
    damage(mine / 'checkpoints' / '60')
    out, err = ended(start(tree, mine, cache))
    assert 'goes on from step 40' in out and 'cannot be read' in err
    assert not later.exists()
  else:
    workers = 0 if when == 'killed' else 2   # and after it the other way round
    process = start(tree, mine, cache, **{'stream.log_steps': 1, 'stream.workers': workers})
    while len(records_so_far(mine)) < 2:
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
  assert records(mine)[-1]['converted_images'] == records(workdir)[-1]['converted_images']
  (ours,), (theirs,) = rows(mine, 'statistics'), rows(workdir, 'statistics')   # operations: sums of other parts
  assert float(ours.pop('training_operations')) == pytest.approx(float(theirs.pop('training_operations')), rel=1e-6)
  assert ours == theirs
  with np.load(mine / 'weights.npz') as found, np.load(workdir / 'weights.npz') as wanted:
    for name in wanted:
      np.testing.assert_array_equal(found[name], wanted[name])


@pytest.mark.slow
def test_killed_ten_times(tree, cache, tmp_path):
  """At random moments, in training or before it; a run of 2,000 steps ends with the numbers of one that was left alone."""
  change = {'steps': 2_000, 'stream.checkpoint_steps': 100, 'stream.evaluate_steps': 500}
  ended(start(tree, tmp_path / 'alone', cache, **change))
  moments, killed = np.random.default_rng(int(time.time())).uniform(0, 8, 10), 0
  for moment in moments:
    process = start(tree, tmp_path / 'run', cache, **change)
    before = len(records_so_far(tmp_path / 'run'))
    while process.poll() is None and len(records_so_far(tmp_path / 'run')) <= before:
      time.sleep(0.01)
    try:
      process.wait(moment)
    except subprocess.TimeoutExpired:
      process.kill()
      killed += 1
    process.communicate(timeout=600)
  ended(start(tree, tmp_path / 'run', cache, **change))
  assert killed, moments
  assert rows(tmp_path / 'run') == rows(tmp_path / 'alone'), moments
  with np.load(tmp_path / 'run' / 'weights.npz') as found, np.load(tmp_path / 'alone' / 'weights.npz') as wanted:
    for name in wanted:
      np.testing.assert_array_equal(found[name], wanted[name])


def records_so_far(workdir):
  path = workdir / 'metrics.jsonl'
  return [line for line in path.read_text().splitlines() if line.endswith('}')] if path.exists() else []


def job(tree, workdir, cache, processes, devices, **change):
  """So many processes of so many devices each, over loopback."""
  with socket.socket() as found:
    found.bind(('127.0.0.1', 0))
    port = found.getsockname()[1]
  return [start(tree, workdir, cache, f'--coordinator=127.0.0.1:{port}', f'--processes={processes}', f'--process={i}',
                devices=devices, **change) for i in range(processes)]


def seen_by_all(workdir, processes):
  """The masks that each process of a job has held at the end, which tests/tiny_photographs.py leaves; the same for all."""
  masks = [np.load(workdir / f'masks_{i}.npz') for i in range(processes)]
  for other in masks[1:]:
    assert masks[0].files == other.files
    for name in other.files:
      np.testing.assert_array_equal(masks[0][name], other[name])
  return masks[0]


def assert_alike(workdir, other):
  """Losses and weights of two runs whose sums over the batch are in another order."""
  assert rows(workdir)[0]['kept'] == rows(other)[0]['kept']
  for one, two in zip(records(workdir), records(other), strict=True):
    assert (one['step'], one['converted_images']) == (two['step'], two['converted_images'])
    for name, losses in one['train_loss'].items():
      np.testing.assert_allclose(losses, two['train_loss'][name], rtol=1e-4)


@pytest.mark.parametrize(('processes', 'devices', 'done'), [(2, 2, 0), (4, 2, 40)])
def test_several_hosts(finished, tree, cache, tmp_path, processes, devices, done):
  """From the start, and from a checkpoint of one process of two devices: its losses, and the same masks on all."""
  workdir = tmp_path / 'run'
  if done:
    shutil.copytree(finished[0], workdir)
    (workdir / 'run.json').unlink()
    damage(workdir / 'checkpoints' / '60')   # all take the one before
  for process in job(tree, workdir, cache, processes, devices):
    ended(process)
  assert (workdir / 'checkpoints' / '60.damaged').exists() == bool(done)
  assert_alike(workdir, finished[0])
  found, wanted = seen_by_all(workdir, processes), seen_by_all(finished[0], 1)
  assert {name: int(found[name].sum()) for name in found.files} == {name: int(wanted[name].sum()) for name in wanted.files}


def test_several_hosts_stop_and_go_on(finished, tree, cache, tmp_path):
  """A signal to one of two processes ends both, with a checkpoint; without one of them the other ends with a line that says so,
  also without the first, which the others are joined by; and the same command goes on."""
  workdir = tmp_path / 'run'

  def interrupt(signal_number, which=1):
    before = len(records_so_far(workdir))
    both = job(tree, workdir, cache, 2, 1, **{'stream.log_steps': 1})
    while len(records_so_far(workdir)) <= before:
      assert both[0].poll() is None and both[1].poll() is None
      time.sleep(0.01)
    both[which].send_signal(signal_number)
    return [(*process.communicate(timeout=600), process.returncode) for process in both]

  (out, err, code), (_, _, other) = interrupt(signal.SIGTERM)
  assert code == other == 143 and 'stopped by a signal after step' in out, err
  (_, err, code), (_, _, other) = interrupt(signal.SIGKILL)
  assert (code, other) == (1, -signal.SIGKILL), err
  assert 'error: process 0 cannot go on' in err and 'by the same command' in err and 'Traceback' not in err
  (_, _, other), (_, err, code) = interrupt(signal.SIGKILL, 0)
  assert code in (1, -signal.SIGABRT) and other == -signal.SIGKILL, err   # JAX, that tells it by a dump, may be first
  assert 'error: process 1 cannot go on' in err or 'another task died' in err
  for process in job(tree, workdir, cache, 2, 1, **{'stream.log_steps': 1}):
    ended(process)
  assert rows(workdir)[0]['kept'] == rows(finished[0])[0]['kept']
  lines = records(workdir)
  assert [line['step'] for line in lines] == list(range(1, STEPS + 1))
  wanted = {line['step']: line['train_loss'] for line in records(finished[0])}[15]   # mean of the steps from 1 on
  for name, (loss,) in wanted.items():
    assert np.mean([line['train_loss'][name][0] for line in lines[:15]]) == pytest.approx(loss, rel=1e-4)


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
  assert '--config.stream.on_damage=skip goes on without it' in err
  ended(start(tmp_path / 'tree', tmp_path / 'a', cache, **{'stream.held_out': 0, 'stream.on_damage': 'skip'}))
  (tmp_path / 'tree' / 'val' / CLASSES[1] / f'{CLASSES[1]}_0.JPEG').write_bytes(encoded(ramp(50, 50))[:400])
  _, err = ended(start(tmp_path / 'tree', tmp_path / 'b', cache, **{'stream.held_out': 0, 'stream.on_damage': 'skip'}))
  assert all(f'{name} cannot be read, and left out' in err for name in (f'{CLASSES[0]}_5.JPEG', f'{CLASSES[1]}_0.JPEG'))
  assert records(tmp_path / 'b')[-1]['replaced_images'] > 0
  (row,) = rows(tmp_path / 'b')   # no image was held out
  assert row['validation_accuracy'] == 'nan'
  assert json.loads((tmp_path / 'b' / 'run.json').read_text())['evaluated_images'] == {'validation': 0, 'test': 11}   # of 12
  assert rows(tmp_path / 'a')[0]['kept'] == row['kept']
  hits = 11 * float(row['test_accuracy'])
  assert hits > 0 and hits == pytest.approx(round(hits))


@pytest.mark.parametrize(('change', 'message'), [
    ({'sweep.alpha': (1.0, 2.0)}, r'config.sweep.alpha must be a single value for the protocol .streamed.*got \(1.0, 2.0\)'),
    ({'stream.shards': 3}, r'config.stream.shards must be a divisor of the 8 devices, got 3'),
    ({'batch_size': 12}, r'config.batch_size must be a multiple of the 8 devices, got 12'),
    ({'stream.batch_norm_parts': 3}, r'config.stream.batch_norm_parts must be a divisor of batch_size=8, got 3'),
    ({'stream.held_out': 1}, r'config.stream.held_out must be 0, or at least 2, got 1'),
    ({'stream.on_damage': 'ignore'}, r"config.stream.on_damage must be one of \['fail', 'skip'\], got 'ignore'"),
    ({'compute': 'float16'}, r"config.compute must be one of \['bfloat16', 'float32'\], got 'float16'"),
    ({'stream.log_steps': 0}, r'config.stream.log_steps must be positive, got 0')])
def test_check_says_what_is_allowed(change, message):
  streamed.check(make_config())
  with pytest.raises(UserError, match=message):
    streamed.check(make_config(**change))


@pytest.mark.parametrize(('kind', 'peak'), [
    ('TPU v5', 459e12), ('TPU v5 lite', 197e12), ('NVIDIA H100 80GB HBM3', 989e12), ('NVIDIA H100 PCIe', 756e12),
    ('NVIDIA H100 NVL', 835e12), ('NVIDIA A100-SXM4-80GB', 312e12), ('cpu', 0.0)])
def test_peaks_by_the_names_that_jax_has(kind, peak):
  assert streamed.known_peak(kind)[0] == peak


def test_a_number_of_the_first_host_comes_whole():
  assert streamed.of_first_host(0.1) == 0.1


def test_without_a_trace_no_step_is_waited_for(tmp_path):
  trace = streamed.Trace(tmp_path, 10, 0)
  for step in range(1, 30):
    trace.begin(step)
    trace.end(step, None)   # which cannot be waited for
  trace.close()
  assert not list(tmp_path.iterdir())


def test_throughput_is_of_the_steps_after_compiling(tmp_path, monkeypatch):
  """100 s for the first step; then 10 steps of 8 images in 4 s, half a second of it waiting for images, and 5 in 1 s."""
  setting, now = programs.prepare(make_config()), [0.0]
  sums = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), programs.Sums(setting.shapes.tally, setting.shapes.guard))
  sums = sums._replace(guard=sums.guard._replace(step=np.int32(-1)))
  monkeypatch.setattr(streamed.time, 'monotonic', lambda: now[0])

  def batches():
    now[0] += 0.5
    yield Batch(None, None, np.zeros(0), np.zeros(0)), None
  log = streamed.Log(setting, tmp_path, 0, photographs.Odd(None))
  now[0] = 100.0
  log.restart(1)
  log.take(1, sums)
  log.wait(batches())
  now[0] = 104.0
  log.take(11, sums)
  now[0] = 154.0
  log.restart(11)   # a checkpoint
  now[0] = 155.0
  log.take(16, sums)
  log.flush()
  log.close()
  assert [(line['step'], line.get('images_per_second'), line.get('input_wait')) for line in records(tmp_path)] == [
      (1, None, None), (11, 20.0, 0.125), (16, 40.0, 0.0)]


def test_the_best_network_is_kept(tmp_path):
  """Only what is better than all before is saved, also after a run has gone on."""
  def steps():
    return [path.name for path in tmp_path.iterdir()]
  state = {'w': jnp.zeros(3)}
  with streamed.Best(tmp_path, True, -1.0, 0) as best:
    best.offer(1, 0.5, lambda x: x, state)
    best.offer(2, 0.4, lambda x: x, state)
    best.offer(3, 0.5, lambda x: x, state)
  assert steps() == ['1']
  with streamed.Best(tmp_path, True, 0.5, 3) as best:
    best.offer(4, 0.5, lambda x: x, state)
    best.offer(5, 0.6, lambda x: x, state)
  assert steps() == ['5']


def test_photographs_have_to_be_there(tree, tmp_path, monkeypatch):
  monkeypatch.delenv('POWERPROP_DATA', raising=False)
  with pytest.raises(UserError, match=r'photographs are needed: --config\.data_dir=DIRECTORY'):
    streamed.run(make_config(), tmp_path / 'run')
  monkeypatch.setenv('POWERPROP_DATA', str(tmp_path / 'nowhere'))
  with pytest.raises(UserError, match=f'POWERPROP_DATA names {tmp_path}/nowhere, which is not a directory'):
    streamed.run(make_config(), tmp_path / 'run')
  with pytest.raises(UserError, match=r'config\.stream\.classes is 5, and there are 24 images of 3 classes'):
    streamed.run(make_config(**{'stream.classes': 5, 'data_dir': str(tree)}), tmp_path / 'run')
  with pytest.raises(UserError, match='must be at most the 20 images for training, got 24'):
    streamed.run(make_config(**{'batch_size': 24, 'data_dir': str(tree)}), tmp_path / 'run')
  shutil.copytree(tree, tmp_path / 'tree')
  (tmp_path / 'tree' / 'val' / CLASSES[1]).rename(tmp_path / 'tree' / 'val' / 'n99')
  with pytest.raises(UserError, match=f'must have classes of the same names; only one of them has {CLASSES[1]}, n99'):
    streamed.run(make_config(**{'data_dir': str(tmp_path / 'tree')}), tmp_path / 'run')
  assert not (tmp_path / 'run').exists()


def test_the_thread_that_hears_of_signals_neither_draws_nor_compiles_nor_evaluates(tree, tmp_path, monkeypatch):
  """It would hear of none while XLA is at work."""
  def at_work(*_):
    raise ZeroDivisionError(threading.current_thread() is threading.main_thread())
  config = make_config(**{'data_dir': str(tree)})
  for name, program in {'make_first': lambda _: at_work, 'compile_step': at_work}.items():
    with monkeypatch.context() as patch:
      patch.setattr(programs, name, program)
      with pytest.raises(ZeroDivisionError, match='False'):
        streamed.run(config, tmp_path / name)
  monkeypatch.setattr(streamed, 'fit', lambda *_: (None, 0.0, 0.0))
  monkeypatch.setattr(streamed, 'final_evaluation', at_work)
  with pytest.raises(ZeroDivisionError, match='False'):
    streamed.run(config, tmp_path / 'b')


# ---- dry runs -------------------------------------------------------------------------------------------------------


def test_a_dry_run_tells_what_a_run_then_does(finished):
  """The share of dense training that the finished run measured: masks of constant size, and dense gradients at times."""
  text = dry_run.describe(make_config())
  (statistics,) = rows(finished[0], 'statistics')
  share = float(text.partition('operations, ')[2].partition(' of dense')[0])
  assert share == pytest.approx(float(statistics['training_operations']), abs=0.002)
  assert '1,467 parameters, 1,416 of them weights' in text and '60 steps of 8 images: 480 images' in text


def test_a_dry_run_says_where_densities_are_learned():
  text = dry_run.describe(make_config(**{'sweep.algorithm': ('soft_threshold',), 'sweep.sparsity': (0.0,),
                                         'sweep.penalty': (3e-5,)}))
  assert 'densities are learned, and not those below: config.sweep.penalty, here 3e-05, decides' in text
  assert 'densities are learned' not in dry_run.describe(make_config())


def test_what_reads_photographs_is_named_where_it_is_missing(monkeypatch):
  monkeypatch.setattr(photographs, 'READERS', ('json', 'no_such_reader'))
  with pytest.raises(UserError, match=r"reading photographs takes no_such_reader: pip install -e '\.\[imagenet\]'\.$"):
    photographs.open_images(make_config())


def test_a_dry_run_of_more_devices_than_there_are():
  """As many of the CPU stand in for them; a run would be refused."""
  environment = {key: value for key, value in os.environ.items() if key != 'XLA_FLAGS'} | {'PYTHONPATH': f'{ROOT}'}
  flags = ['--config=configs/imagenette.py:rigl', '--dry_run', '--config.stream.image_size=32', '--config.model=resnet_18']
  texts = []
  for shards in (1, 8):
    done = subprocess.run([sys.executable, '-m', 'experiments.main', *flags, f'--config.stream.shards={shards}'], cwd=ROOT,
                          env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    texts.append(done.stdout)
  assert 'images on 1 x cpu' in texts[0] and 'images on 8 x cpu' in texts[1]
  one, eight = (float(text.partition('memory of each device: ')[2].partition(' GB')[0]) for text in texts)
  assert eight < 0.5 * one


@pytest.mark.parametrize('variant', ['dense', 'gradual', 'top_kast'])
def test_shares_by_rule(variant):
  """Two thirds of the operations go with the forward densities, one with the backward ones."""
  config = make_config(variant, steps=400, **{'sparse.distribution': 'uniform', 'sweep.sparsity': (0.5 * (variant != 'dense'),)})
  text = dry_run.describe(config)
  found = float(text.partition('operations, ')[2].partition(' of dense')[0])
  if variant == 'gradual':
    # Density 1 until step 100, then 1 − ½(1 − (1 − t)³) in steps of 10 until 300, then ½.
    density = [1 - 0.5 * (1 - (1 - min(max((n // 10 * 10 - 100) / 200, 0), 1)) ** 3) for n in range(400)]
    share = np.mean(density)
  elif variant == 'dense':
    share = 1
  else:
    # ½ forward, and a backward set twice as large, which is all; from three quarters on it is the forward set.
    share = 3 / 4 * (2 / 3 * 0.5 + 1 / 3) + 1 / 4 * 0.5
  assert found == pytest.approx(share, abs=0.003)

"""Checkpoints: what was saved comes back, on any devices, and damage is found."""
import json
import os
import re
import signal
import time
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from experiments import train
from experiments.checkpoint import Checkpoints
from experiments.errors import UserError


def mesh_of(devices):
  return jax.make_mesh((devices,), (train.NETS,), axis_types=(jax.sharding.AxisType.Auto,), devices=jax.devices()[:devices])


def make_tree(seed, devices=8):
  """States of two groups as a run has them: three networks, one group with Adam's moments and counts."""
  rng = np.random.default_rng(seed)
  phi = {'linear': {'w': rng.normal(size=(3, 40, 5)).astype(np.float32), 'b': np.zeros((3, 5), np.float32)}}
  phi['linear']['w'][0, 0] = [0.0, -0.0, np.inf, np.nan, 1e-45]   # bits, not values
  states = [train.TrainState(phi, jax.vmap(chain.init)(phi), {}) for chain in (optax.sgd(0.1), optax.adam(0.1))]
  return train.replicate(states, mesh_of(devices))


def assert_same_bits(found, wanted):
  assert jax.tree.structure(found) == jax.tree.structure(wanted)
  for x, y in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
    assert x.dtype == y.dtype and np.asarray(x).tobytes() == np.asarray(y).tobytes()


def save(folder, steps, kept=2, background=False):
  checkpoints = Checkpoints(folder, kept, background)
  for step in steps:
    checkpoints.save(step, make_tree(step))
  checkpoints.close()


def restore(folder, like, kept=2):
  checkpoints = Checkpoints(folder, kept)
  try:
    return checkpoints.restore(like)
  finally:
    checkpoints.close()


@pytest.mark.parametrize('background', [False, True])
def test_the_newest_comes_back_bit_by_bit_and_the_oldest_go(tmp_path, background):
  assert restore(tmp_path, make_tree(0)) is None
  save(tmp_path, [5, 10, 100], background=background)
  assert sorted(p.name for p in tmp_path.iterdir()) == ['10', '100']
  assert all((folder / 'sha256.json').exists() for folder in tmp_path.iterdir())
  step, found = restore(tmp_path, make_tree(0))
  assert step == 100
  assert_same_bits(found, make_tree(100))


def test_another_number_of_devices(tmp_path):
  save(tmp_path, [5])
  for devices in (1, 3):
    _, found = restore(tmp_path, make_tree(0, devices))
    assert_same_bits(found, make_tree(5))
    assert {len(x.sharding.device_set) for x in jax.tree.leaves(found)} == {devices}


def test_another_structure_is_refused(tmp_path):
  save(tmp_path, [5])
  like = make_tree(0)
  with pytest.warns(UserWarning, match='5 cannot be read'), pytest.raises(UserError, match='no checkpoint in'):
    restore(tmp_path, [like[0]._replace(phi={'linear': {'w': like[0].phi['linear']['w']}}), like[1]])


def test_a_save_that_was_killed_leaves_nothing_in_the_way(tmp_path):
  """Orbax writes into a folder of another name, which it renames at the end."""
  save(tmp_path, [5])
  (tmp_path / '10.orbax-checkpoint-tmp' / 'default').mkdir(parents=True)
  (tmp_path / '10.orbax-checkpoint-tmp' / 'default' / 'half').write_bytes(b'half')
  step, _ = restore(tmp_path, make_tree(0))
  assert step == 5
  save(tmp_path, [10])
  assert restore(tmp_path, make_tree(0))[0] == 10
  assert sorted(p.name for p in tmp_path.iterdir()) == ['10', '5']


def data_file(folder):
  """The largest file of a checkpoint: the arrays."""
  return max((p for p in folder.rglob('*') if p.is_file()), key=lambda p: p.stat().st_size)


def flip(path):
  data = bytearray(path.read_bytes())
  data[len(data) // 2] ^= 1
  path.write_bytes(data)


def truncate(path):
  path.write_bytes(path.read_bytes()[:-10])


DAMAGE = {
  'flipped bit': (lambda folder: flip(data_file(folder)), 'damaged'),   # Orbax itself would read it without a word
  'truncated data': (lambda folder: truncate(data_file(folder)), 'damaged'),
  'empty data': (lambda folder: data_file(folder).write_bytes(b''), 'damaged'),
  'no data': (lambda folder: data_file(folder).unlink(), 'missing'),
  'truncated metadata': (lambda folder: truncate(folder / 'default' / '_METADATA'), 'damaged'),
  'no manifest': (lambda folder: (folder / 'default' / 'manifest.ocdbt').unlink(), 'missing'),
  'no checksums, truncated data': (lambda folder: ((folder / 'sha256.json').unlink(), truncate(data_file(folder))), '.'),
}


@pytest.mark.parametrize('damage, reason', DAMAGE.values(), ids=DAMAGE)
def test_a_damaged_checkpoint_gives_way_to_the_one_before(tmp_path, damage, reason):
  save(tmp_path, [5, 10])
  damage(tmp_path / '10')
  checkpoints = Checkpoints(tmp_path, 2)
  with pytest.warns(UserWarning, match=rf'^checkpoint {re.escape(str(tmp_path))}/10 cannot be read \(.*{reason}.*\)\.$'):
    step, found = checkpoints.restore(make_tree(0))
  assert step == 5
  assert_same_bits(found, make_tree(5))
  checkpoints.save(7, make_tree(7))   # between the two, if checkpoints are now wanted more often
  checkpoints.save(10, make_tree(10))   # and the run comes by the same step again
  step, found = checkpoints.restore(make_tree(0))
  assert step == 10
  assert_same_bits(found, make_tree(10))
  assert sorted(p.name for p in tmp_path.iterdir()) == ['10', '10.damaged', '7']
  flip(data_file(tmp_path / '10'))   # as happens twice on a bad disk
  with pytest.warns(UserWarning, match='10 cannot be read'):
    assert checkpoints.restore(make_tree(0))[0] == 7
  assert sorted(p.name for p in tmp_path.iterdir()) == ['10.damaged', '10.damaged_2', '7']
  checkpoints.close()
  assert restore(tmp_path, make_tree(0))[0] == 7


def test_what_is_set_aside_is_as_it_was(tmp_path, monkeypatch):
  """Not the files may be at fault but the memory; given back its name, the checkpoint is whole."""
  save(tmp_path, [5, 10])
  checkpoints = Checkpoints(tmp_path, 2)
  whole = checkpoints._manager.restore
  def restore_if_small(step, **how):
    if step == 10:
      raise MemoryError
    return whole(step, **how)
  monkeypatch.setattr(checkpoints._manager, 'restore', restore_if_small)
  with pytest.warns(UserWarning, match=r'10 cannot be read \(MemoryError\)'):
    assert checkpoints.restore(make_tree(0))[0] == 5
  checkpoints.close()
  (tmp_path / '10.damaged').rename(tmp_path / '10')
  step, found = restore(tmp_path, make_tree(0))
  assert step == 10
  assert_same_bits(found, make_tree(10))


def test_checksums_are_there_before_the_next_checkpoint(tmp_path):
  """So that what a killed run leaves can be trusted."""
  checkpoints = Checkpoints(tmp_path, 2, background=True)
  checkpoints.save(5, make_tree(5))
  until = time.monotonic() + 30
  while not (tmp_path / '5' / 'sha256.json').exists():
    assert time.monotonic() < until
    time.sleep(0.01)
  checkpoints.close()


def test_an_error_waits_for_what_is_being_saved(tmp_path, monkeypatch):
  """A process that ended meanwhile would lose it, in a page of tracebacks."""
  with pytest.raises(UserError, match='a damaged image'), Checkpoints(tmp_path / 'a', 2, background=True) as checkpoints:
    checkpoints.save(5, make_tree(5))
    raise UserError('a damaged image')
  assert (tmp_path / 'a' / '5' / 'sha256.json').exists()
  assert restore(tmp_path / 'a', make_tree(0))[0] == 5
  # Of several processes the others may have gone, and would be waited for.
  left = Checkpoints(tmp_path / 'b', 2)
  with monkeypatch.context() as patch, pytest.raises(UserError):
    patch.setattr(jax, 'process_count', lambda: 2)
    patch.setattr(left, 'close', lambda: pytest.fail('waited'))
    with left:
      raise UserError('a damaged image')
  left.close()


@pytest.mark.parametrize('number', [signal.SIGINT, signal.SIGTERM])
def test_a_signal_while_saving_is_heeded_when_the_checkpoint_is_whole(tmp_path, monkeypatch, number):
  """An exception amid Orbax's threads is lost, or leaves one that the process waits for when it should end."""
  class Heeded(Exception):
    pass

  def heed(*_):
    raise Heeded

  checkpoints = Checkpoints(tmp_path, 2)
  sign = checkpoints._sign
  monkeypatch.setattr(checkpoints, '_sign', lambda step: (os.kill(os.getpid(), number), time.sleep(0.2), sign(step)))
  before = signal.signal(number, heed)
  try:
    with pytest.raises(Heeded):
      checkpoints.save(5, make_tree(5))
    assert (tmp_path / '5' / 'sha256.json').exists()
    assert signal.getsignal(number) is heed
    signal.signal(number, signal.SIG_IGN)
    checkpoints.save(10, make_tree(10))   # nothing to raise
  finally:
    signal.signal(number, before)
  checkpoints.close()
  assert restore(tmp_path, make_tree(0))[0] == 10


def test_nothing_is_deleted_when_all_are_damaged(tmp_path):
  save(tmp_path, [5, 10])
  for step in (5, 10):
    flip(data_file(tmp_path / str(step)))
  before = sorted(tmp_path.rglob('*'))
  with pytest.warns(UserWarning, match='cannot be read') as caught, pytest.raises(UserError) as error:
    restore(tmp_path, make_tree(0))
  assert len(caught) == 2
  assert str(error.value) == f'no checkpoint in {tmp_path} can be read (tried [10, 5]); delete it to start over.'
  assert sorted(tmp_path.rglob('*')) == before


def test_a_checkpoint_without_checksums_is_read(tmp_path):
  """A kill between Orbax's rename and the checksums leaves one."""
  save(tmp_path, [5])
  listed = json.loads((tmp_path / '5' / 'sha256.json').read_text())
  assert set(listed) == {str(p.relative_to(tmp_path / '5')) for p in (tmp_path / '5').rglob('*') if p.is_file()} - {'sha256.json'}
  (tmp_path / '5' / 'sha256.json').unlink()
  with warnings.catch_warnings():
    warnings.simplefilter('error')
    _, found = restore(tmp_path, jax.tree.map(jnp.zeros_like, make_tree(0)))
  assert_same_bits(found, make_tree(5))

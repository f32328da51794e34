"""Sparse training in experiments: exact counts, accuracies of the weights in the checkpoint, operations by hand, and resuming."""
import csv
import itertools
import json
import shutil

import haiku as hk
import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest
import tiny

from configs import base
from experiments import supervised, sweep, train
from experiments.algorithms import ALGORITHMS, FIRST_MASKS
from experiments.errors import UserError
from experiments.sparse_table import TITLES

STEPS, KEPT, WEIGHTS = 36, 276, 1380   # two epochs; a fifth of the weights of 36-30-10
NAMES = ('dense', 'rigl', 'top_kast', 'gradual', 'snip')
LAYERS = ('mlp/~/linear_0', 'mlp/~/linear_1')


pytestmark = pytest.mark.usefixtures('data_dir')


def make_config(data_dir, **change):
  config = base.get_config()
  config.update_from_flattened_dict({
    'data_dir': str(data_dir), 'dataset': 'tiny', 'model': 'tiny', 'train_images': 360, 'batch_size': 20, 'steps': STEPS,
    'schedule': 'cosine', 'sweep.alpha': (2.0,), 'sweep.seed': (0, 1), 'sweep.optimizer': ('momentum',), 'alpha_rates': (0.07,),
    'sweep.algorithm': NAMES, 'sweep.sparsity': (0.8,), 'sparse.every_steps': 5, 'prune.densities': (0.2,),
    'prune.output_factor': 1.0, 'prune.sampled_weights': 500, 'report': (), 'checkpoint_epochs': 1, 'checkpoints_kept': 3,
    **change})
  return config


@pytest.fixture(scope='module')
def finished(compiled_once, data_dir, tmp_path_factory):
  workdir = tmp_path_factory.mktemp('finished')
  supervised.run(make_config(data_dir), workdir)
  return workdir


def read_csv(path):
  return list(csv.DictReader(path.read_text().splitlines()))


def test_counts_are_exact_and_accuracies_those_of_the_checkpoint(finished):
  """Masks are read as bits, φ turned into θ and the images classified by NumPy in float64."""
  rows = read_csv(finished / 'results.csv')
  assert [(row['algorithm'], row['seed']) for row in rows] == [(name, seed) for name in NAMES for seed in '01']
  with ocp.StandardCheckpointer() as checkpointer:
    groups = checkpointer.restore(finished / 'checkpoints' / str(STEPS) / 'default')
  _, _, images, labels = tiny.ARRAYS
  for row, (group, k) in zip(rows, itertools.product(groups, range(2)), strict=True):
    assert (row['kept'], row['weights'], row['learning_rate']) == (str(KEPT), str(WEIGHTS), '0.07')
    if row['algorithm'] == 'dense':
      continue
    assert (row['scope'], row['sparsity'], row['density']) == ('trained', '0.8', str(KEPT / WEIGHTS))
    x, kept = images.reshape(len(images), -1) / 255, 0
    for i, layer in enumerate(LAYERS):
      phi = np.asarray(group['phi'][layer]['w'][k], np.float64)
      bits = np.asarray(group['opt_state']['masks']['forward'][layer]['w'])
      assert bits.dtype == np.uint8 and bits.shape == (2, -(-phi.size // 8))   # one bit a weight
      mask = np.unpackbits(bits[k], count=phi.size).reshape(phi.shape).astype(bool)
      kept += mask.sum()
      assert row['algorithm'] == 'top_kast' or not phi[~mask].any()
      x = x @ np.where(mask, np.sign(phi) * phi**2, 0) + np.asarray(group['phi'][layer]['b'][k], np.float64)
      x = np.maximum(x, 0) if i == 0 else x
    assert kept == KEPT
    assert row['test_accuracy'] == repr(float(np.mean(np.argmax(x, 1) == labels)))
  accuracies = {float(row['test_accuracy']) for row in rows}
  assert len(accuracies) > 5 and max(accuracies) > 0.3   # ten classes: some have learned something in so few steps


def gradual_share():
  """Mean density over the steps: from 9 to 27 by the cubic, every 5 and at the end. As many operations as weights."""
  density, densities = 1.0, []
  for n in range(1, STEPS + 1):
    densities.append(density)   # of step n, whose update changes the masks for the next
    if n in (9, 14, 19, 24, 27):
      density = 1 - 0.8 * (1 - (1 - (n - 9) / 18) ** 3)
  return np.mean(densities)


@pytest.mark.parametrize('name, forward, training', [
  ('dense', 1, 1), ('snip', 0.2, 0.2),
  ('rigl', 0.2, 0.2 + 5 / STEPS * 0.8 / 3),               # dense gradients at 5, 10, ..., 25, before 27
  ('top_kast', 0.2, (2 * 0.2 + 0.4 * 27 / STEPS + 0.2 * 9 / STEPS) / 3),   # the larger set, twice as dense, until 27
  ('gradual', 0.2, gradual_share())])
def test_operations_by_hand(finished, name, forward, training):
  for row in read_csv(finished / 'statistics.csv'):
    if row['algorithm'] == name:
      assert float(row['forward_operations']) == pytest.approx(forward, abs=1e-9)
      # Counts of layers are whole numbers: at five steps of a schedule each is off by a half at most.
      assert float(row['training_operations']) == pytest.approx(training, abs=1e-3 if name == 'gradual' else 1e-5)


def test_stopped_in_the_middle_and_gone_on_with(finished, data_dir, tmp_path):
  workdir = shutil.copytree(finished, tmp_path / 'copy')
  for name in ('run.json', 'results.csv', 'statistics.csv', 'overlap.csv', 'weights.npz'):
    (workdir / name).unlink()
  shutil.rmtree(workdir / 'checkpoints' / str(STEPS))   # one is left, of the middle of the ramp
  supervised.run(make_config(data_dir), workdir)
  for name in ('results.csv', 'statistics.csv', 'overlap.csv', 'weights.npz'):
    assert (workdir / name).read_bytes() == (finished / name).read_bytes(), name
  last = [json.loads((w / 'metrics.jsonl').read_text().splitlines()[-1])['operations'] for w in (workdir, finished)]
  assert last[0] == last[1] and len(last[0]) == len(NAMES)


def test_every_algorithm_makes_a_group(data_dir):
  config = make_config(data_dir, **{'sweep.algorithm': tuple(ALGORITHMS), 'sweep.sparsity': (0.8, 0.9)})
  sweep.check(config)
  groups = sweep.make_groups(config)
  masked = [name for name, make in ALGORITHMS.items() if make]
  assert len(groups) == len(ALGORITHMS) + len(masked)   # the others have no sparsity
  assert [group.sparse for group in groups] == [group.axes['algorithm'] in masked for group in groups]
  assert ALGORITHMS.keys() <= TITLES.keys() and FIRST_MASKS.keys() <= ALGORITHMS.keys()


HUNDREDS = range(100, 1001, 100)
RAMP = range(250, 751, 100)
# Updates of the masks in 1,000 steps by the defaults of base.py; and those that look at the gradient of all weights.
SCHEDULES = {
  'static': ([], []), 'snip': ([], []), 'grasp': ([], []), 'synflow': ([], []),
  'set': (range(100, 701, 100), []), 'dsr': (range(100, 701, 100), []), 'rigl': (range(100, 701, 100), range(100, 701, 100)),
  'snfs': (range(100, 701, 100), range(1, 750)), 'granet': (RAMP, range(250, 651, 100)),
  'gradual': (RAMP, []), 'gradual_returns': (RAMP, []), 'one_shot': ([750], []), 'straight_through': (HUNDREDS, []),
  'top_kast': ([*range(100, 701, 100), 750, *range(800, 1001, 100)], []),
  'ac_dc': ([*range(100, 701, 100), 750], [])}   # phases of a tenth, the last of them dense up to 700


def test_schedules_are_those_of_the_config():
  config, steps = base.get_config(), np.arange(1, 1001)
  config.steps = 1000
  updaters = {name: make(0.8, config) for name, make in ALGORITHMS.items() if make}
  assert updaters.keys() == SCHEDULES.keys()
  for name, updater in updaters.items():
    for found, expected in zip((updater.due, updater.dense_gradient), SCHEDULES[name], strict=True):
      assert steps[np.broadcast_to(found(steps), 1000)].tolist() == list(expected), name
  assert {name for name, updater in updaters.items() if updater.keeps} == {'gradual_returns', 'straight_through', 'top_kast'}


def test_side_by_side_as_one_after_another(data_dir, tmp_path):
  """Networks of a group batched, as on a GPU: the same masks, and an update of masks is still a branch."""
  config = make_config(data_dir, **{'sweep.algorithm': ('rigl',), 'sweep.seed': (0, 1, 2)})
  setting = supervised.prepare(config, sweep.make_groups, tmp_path)
  counts = [slot.number for slot in setting.slots]
  found = []
  for batched in (False, True):
    epoch = train.make_epoch(setting.groups, hk.transform_with_state(setting.model.forward), 20, setting.mesh, batched=batched)
    arguments = (setting.first(), [slot.nets for slot in setting.slots], counts, setting.data['train'], 0, 0, 12)
    assert str(jax.make_jaxpr(epoch)(*arguments)).count('cond[') > 0
    states, tallies = epoch(*arguments)
    found.append(train.gather([(states[0].phi, states[0].opt_state.masks, tallies[0])], setting.slots)[0])
  (phi, masks, tally), (other_phi, other_masks, other_tally) = found
  jax.tree.map(np.testing.assert_array_equal, masks, other_masks)
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), (phi, tally), (other_phi, other_tally))


@pytest.mark.parametrize('key, value, message', [
  ('sweep.algorithm', ('riggl',), f"config.sweep.algorithm must be a tuple of some of {sorted(ALGORITHMS)}, got ('riggl',)."),
  ('sweep.sparsity', (1.0,), 'config.sweep.sparsity must be a tuple of shares in [0, 1), got (1.0,).'),
  ('sparse.distribution', 'erg', "config.sparse.distribution must be one of ['erk', 'global', 'uniform'], got 'erg'."),
  ('sparse.end_share', 0.1, 'config.sparse.end_share must be at least sparse.start_share, got 0.1.'),
  ('sparse.drop_fraction', 0.0, 'config.sparse.drop_fraction must be a share in (0, 1], got 0.0.'),
  ('sparse.entry', -0.5, 'config.sparse.entry must be at least 0, got -0.5.'),
  ('clip_norm', -1.0, 'config.clip_norm must be at least 0, got -1.0.'),
  ('sparse.backward_factor', 0.5, 'config.sparse.backward_factor must be at least 1, got 0.5.'),
  ('sparse.every_steps', 0, 'config.sparse.every_steps must be positive, got 0.'),
  ('schedule', 'linear', "config.schedule must be one of ['constant', 'cosine', 'steps'], got 'linear'."),
  ('augment', 'flip', "config.augment must be one of ['crop_and_flip', 'none'], got 'flip'."),
  ('sparse.initial_sparsity', 1.0, 'config.sparse.initial_sparsity must be a share in [0, 1), got 1.0.'),
  ('sparse.phase_share', 0.0, 'config.sparse.phase_share must be a share in (0, 1], got 0.0.'),
  ('sweep.learning_rate', (0.3,), 'config.sweep.learning_rate must be left at (0.1,) where config.alpha_rates, here (0.07,), has '
   'the rates, got (0.3,).'),
  ('alpha_rates', (0.1, 0.2), 'config.alpha_rates must be (), or a positive number for each of sweep.alpha, here '
   '(2.0,), got (0.1, 0.2).')])
def test_mistakes(data_dir, key, value, message):
  config = make_config(data_dir, **{key: value})
  with pytest.raises(UserError) as error:
    sweep.check(config)
  assert str(error.value) == message


@pytest.mark.parametrize('change, message', [
  ({'sparse.dense': ('conv*',)}, "dense has the pattern 'conv\\*', which fits none of"),
  ({'sweep.sparsity': (0.9999,)}, 'less than one'),
  ({'sparse.every_steps': 1000}, r'^rigl: nothing would ever be exchanged: .* Here config.steps=\d+, .*every_steps=1000, ')])
def test_what_fits_no_network_is_a_mistake_of_the_user(data_dir, tmp_path, change, message):
  with pytest.raises(UserError, match=message):
    supervised.run(make_config(data_dir, **change), tmp_path)


# ---- networks with parameters of their own -------------------------------------------------------------------------


def test_thresholds_and_gates_reach_what_they_report(data_dir, tmp_path):
  """STR and L0 at two penalties, v⊙v − u⊙u pruned afterwards: counts and accuracies by NumPy from the checkpoint."""
  names = ('soft_threshold', 'hard_concrete', 'square_difference')
  supervised.run(make_config(data_dir, **{'sweep.algorithm': names, 'sweep.penalty': (0.0, 0.02), 'sweep.seed': (0,),
                                          'sweep.alpha': (2.0,), 'alpha_rates': (0.1,)}), tmp_path)
  rows = read_csv(tmp_path / 'results.csv')
  assert [(row['algorithm'], row['penalty']) for row in rows] == [(name, p) for name in names for p in ('0.0', '0.02')]
  with ocp.StandardCheckpointer() as checkpointer:
    groups = checkpointer.restore(tmp_path / 'checkpoints' / str(STEPS) / 'default')
  _, _, images, labels = tiny.ARRAYS
  for row, (group, k) in zip(rows, itertools.product(groups, range(2)), strict=True):
    x, kept = images.reshape(len(images), -1) / 255, 0
    for i, layer in enumerate(LAYERS):
      p = {name: np.asarray(v[k], np.float64) for name, v in group['phi'][layer].items()}
      p |= {name: np.sign(p[name]) * p[name]**2 for name in ('w', 'w_v', 'w_u') if name in p}
      if row['algorithm'] == 'soft_threshold':
        theta = np.sign(p['w']) * np.maximum(np.abs(p['w']) - 1 / (1 + np.exp(-p['w_threshold'])), 0)
      elif row['algorithm'] == 'hard_concrete':
        theta = p['w'] * np.clip(1.2 / (1 + np.exp(-p['w_gate'])) - 0.1, 0, 1)
      else:
        theta = p['w_v']**2 - p['w_u']**2
        theta = np.where(np.abs(theta) >= np.sort(np.abs(theta).ravel())[-theta.size // 5], theta, 0)
      kept += np.sum(theta != 0)
      x = x @ theta + p['b']
      x = np.maximum(x, 0) if i == 0 else x
    assert int(row['kept']) == kept and row['scope'] == ('layer' if row['algorithm'] == 'square_difference' else 'trained')
    assert float(row['test_accuracy']) == np.mean(np.argmax(x, 1) == labels)
  kept = {(row['algorithm'], row['penalty']): int(row['kept']) for row in rows}
  assert kept['soft_threshold', '0.02'] < kept['soft_threshold', '0.0']
  costs = {(row['algorithm'], row['penalty']): float(row['forward_operations']) for row in read_csv(tmp_path / 'statistics.csv')}
  assert costs['soft_threshold', '0.02'] == pytest.approx(kept['soft_threshold', '0.02'] / WEIGHTS)
  assert costs['square_difference', '0.0'] == 1

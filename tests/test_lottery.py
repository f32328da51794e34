"""Lottery tickets: nested masks of exact counts, weights rewound to the bit, and a run that was stopped."""
import csv
import shutil

import numpy as np
import orbax.checkpoint as ocp
import pytest

from configs import base
from experiments import lottery
from experiments.errors import UserError

STEPS, REWIND, ROUNDS = 36, 4, 2
LAYERS = ('mlp/~/linear_0', 'mlp/~/linear_1')
# Of 1,080 and 300 weights: half of the first layer goes in each round, a quarter of the output layer.
COUNTS = [(1080, 300), (540, 225), (270, 169)]


pytestmark = pytest.mark.usefixtures('data_dir')


def make_config(data_dir, **change):
  config = base.get_config()
  config.update_from_flattened_dict({
    'protocol': 'lottery', 'data_dir': str(data_dir), 'dataset': 'tiny', 'model': 'tiny', 'train_images': 360, 'batch_size': 20,
    'steps': STEPS, 'sweep.alpha': (1.0, 2.0), 'sweep.seed': (0, 1), 'sweep.optimizer': ('momentum',),
    'sweep.learning_rate': (0.05,), 'lottery.rounds': ROUNDS, 'lottery.prune_share': 0.5, 'lottery.rewind_steps': REWIND,
    'prune.densities': (0.5,), 'prune.sampled_weights': 100, 'report': (), 'checkpoint_epochs': 1, 'checkpoints_kept': 3,
    **change})
  return config


@pytest.fixture(scope='module')
def finished(compiled_once, data_dir, tmp_path_factory):
  workdir = tmp_path_factory.mktemp('finished')
  lottery.run(make_config(data_dir), workdir)
  return workdir


def read(workdir, part, step):
  """φ and masks of the networks: [group][layer] → arrays [K, ...]."""
  with ocp.StandardCheckpointer() as checkpointer:
    groups = checkpointer.restore(workdir / part / 'checkpoints' / str(step) / 'default')
  found = []
  for group in groups:
    phi = {layer: np.asarray(group['phi'][layer]['w']) for layer in LAYERS}
    bits = {layer: np.asarray(group['opt_state']['masks']['forward'][layer]['w']) for layer in LAYERS}
    masks = {layer: np.unpackbits(bits[layer], axis=1, count=phi[layer][0].size).reshape(phi[layer].shape).astype(bool)
             for layer in LAYERS}
    found.append((phi, masks))
  return found


def test_masks_are_the_largest_of_the_round_before(finished):
  before = None
  for number, counts in enumerate(COUNTS):
    now = read(finished, f'round_{number}', STEPS)
    for g, (phi, masks) in enumerate(now):
      for layer, count in zip(LAYERS, counts, strict=True):
        assert masks[layer].reshape(2, -1).sum(1).tolist() == [count, count]
        assert not phi[layer][~masks[layer]].any()
        if before:
          old_phi, old = (part[layer] for part in before[g])
          assert not (masks[layer] & ~old).any()
          for k in range(2):
            smallest = np.abs(old_phi[k][masks[layer][k]]).min()
            assert np.abs(old_phi[k][old[k] & ~masks[layer][k]]).max() <= smallest
    before = now


def test_every_round_begins_where_it_was_rewound_to(finished, data_dir, tmp_path):
  """With a single step after rewinding and SGD without momentum, the live weights have moved by a step's length at most."""
  config = make_config(data_dir, **{'steps': REWIND + 1, 'sweep.optimizer': ('sgd',), 'sweep.learning_rate': (1e-4,),
                                    'sweep.alpha': (1.0,), 'lottery.rounds': 1})
  lottery.run(config, tmp_path)
  ((start, _),) = read(tmp_path, 'rewind', REWIND)
  for number in range(2):
    ((phi, masks),) = read(tmp_path, f'round_{number}', REWIND + 1)
    for layer in LAYERS:
      np.testing.assert_allclose(phi[layer], np.where(masks[layer], start[layer], 0), atol=2e-4)
      assert np.abs(start[layer]).max() > 0.1


def test_results_have_a_row_for_each_round(finished):
  rows = list(csv.DictReader((finished / 'results.csv').read_text().splitlines()))
  totals = [str(sum(counts)) for counts in COUNTS]
  assert [(row['kept'], row['alpha'], row['seed']) for row in rows] == [
    (total, alpha, seed) for total in totals for alpha in ('1.0', '2.0') for seed in '01']
  assert {row['algorithm'] for row in rows} == {'lottery'} and {row['scope'] for row in rows} == {'trained'}
  statistics = list(csv.DictReader((finished / 'statistics.csv').read_text().splitlines()))
  # What was spent is the sum over rounds: 4 steps dense, then 32 of each round at its density.
  for number, row in ((0, statistics[0]), (1, statistics[4]), (2, statistics[8])):
    spent = REWIND + sum(32 * sum(counts) / 1380 for counts in COUNTS[:number + 1])
    assert float(row['training_operations']) == pytest.approx(spent / STEPS, rel=1e-5)
    assert float(row['forward_operations']) == pytest.approx(sum(COUNTS[number]) / 1380)


def test_stopped_and_gone_on_with(finished, data_dir, tmp_path):
  """Before the last round has begun, and in the middle of the one before it."""
  for cut in ('between', 'within'):
    workdir = shutil.copytree(finished, tmp_path / cut)
    for name in ('run.json', 'results.csv', 'statistics.csv'):
      (workdir / name).unlink()
    shutil.rmtree(workdir / 'round_2')
    if cut == 'within':
      shutil.rmtree(workdir / 'round_1' / 'checkpoints' / str(STEPS))
    lottery.run(make_config(data_dir), workdir)
    for name in ('results.csv', 'statistics.csv'):
      assert (workdir / name).read_bytes() == (finished / name).read_bytes(), (cut, name)


@pytest.mark.parametrize('key, value, message', [
  ('lottery.rounds', 0, 'config.lottery.rounds must be at least 1, got 0.'),
  ('lottery.prune_share', 1.0, r'config.lottery.prune_share must be a share in \(0, 1\), got 1.0.'),
  ('lottery.rewind_steps', STEPS, f'config.lottery.rewind_steps must be at least 0 and below steps={STEPS}, got {STEPS}.'),
  ('sweep.algorithm', ('rigl',), r"config.sweep.algorithm must be \('dense',\) for the protocol 'lottery', got \('rigl',\).")])
def test_mistakes(data_dir, key, value, message):
  with pytest.raises(UserError, match=message):
    lottery.check(make_config(data_dir, **{key: value}))

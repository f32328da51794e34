"""The sweep as a whole: what a run writes, against NumPy; going on after a stop; several devices and hosts."""
import csv
import importlib.util
import itertools
import json
import os
import pathlib
import re
import shutil
import socket
import subprocess
import sys

import haiku as hk
import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest
import tiny
from hypothesis import given
from hypothesis import strategies as st

from configs import base
from experiments import data as datasets
from experiments import evaluate, supervised, sweep, train
from experiments.errors import UserError
from experiments.models import MODELS

ROOT = pathlib.Path(__file__).parents[1]
STEPS = 50   # epochs have 18: two of them and most of a third
ALPHAS, SEEDS, RATES, DENSITIES = (1.0, 2.0), (0, 1, 5), (0.1, 0.03), (0.1, 0.5, 1.0)


pytestmark = pytest.mark.usefixtures('data_dir')


SETTINGS = {
  'dataset': 'tiny', 'model': 'tiny', 'train_images': 360, 'batch_size': 20, 'steps': STEPS,
  'sweep.alpha': ALPHAS, 'sweep.seed': SEEDS, 'sweep.learning_rate': RATES,
  'prune.densities': DENSITIES, 'prune.scopes': ('layer', 'global'), 'prune.sampled_weights': 500,
  'report': (), 'checkpoint_epochs': 1, 'checkpoints_kept': 3}


def make_config(data_dir, **change):
  config = base.get_config()
  config.update_from_flattened_dict({'data_dir': str(data_dir), **SETTINGS, **change})
  return config


@pytest.fixture(scope='module')
def finished(compiled_once, data_dir, tmp_path_factory):
  """Workdir of a run on eight devices, which nobody changes."""
  workdir = tmp_path_factory.mktemp('finished')
  supervised.run(make_config(data_dir), workdir)
  return workdir


@pytest.fixture
def copy(finished, tmp_path):
  """A workdir like it, to be changed."""
  return shutil.copytree(finished, tmp_path / 'copy')


def read_csv(path):
  return list(csv.DictReader(path.read_text().splitlines()))


def read_metrics(workdir):
  """The records, the seconds left out."""
  records = [json.loads(line) for line in (workdir / 'metrics.jsonl').read_text().splitlines()]
  return [{key: value for key, value in record.items() if key != 'seconds'} for record in records]


OUTPUTS = ('results.csv', 'overlap.csv', 'statistics.csv', 'weights.npz', 'config.json', 'table.md')


def assert_same_results(workdir, other):
  for name in OUTPUTS:
    assert (workdir / name).read_bytes() == (other / name).read_bytes(), name
  assert read_metrics(workdir) == read_metrics(other)


# ---- parts ---------------------------------------------------------------------------------------------------------

SCOPES = f'config.prune.scopes must be a tuple of some of {list(evaluate.SCOPES)}'
MISTAKES = [
  ('compute', 'float16', "config.compute must be one of ['bfloat16', 'float32'], got 'float16'."),
  ('model', 'vgg', f"config.model must be one of {sorted([*MODELS, 'tiny'])}, got 'vgg'."),
  ('steps', 0, 'config.steps must be positive, got 0.'),
  ('batch_size', -1, 'config.batch_size must be positive, got -1.'),
  ('checkpoints_kept', 0, 'config.checkpoints_kept must be positive, got 0.'),
  ('bias_stddev', float('nan'), 'config.bias_stddev must be at least 0, got nan.'),
  ('sweep.alpha', (), 'config.sweep.alpha must be a tuple of at least one value, as "(1.0, 2.0)", got ().'),
  ('sweep.alpha', (1.0, 0.5), 'config.sweep.alpha must be a tuple of numbers of at least 1, got (1.0, 0.5).'),
  ('sweep.alpha', (float('inf'),), 'config.sweep.alpha must be a tuple of numbers of at least 1, got (inf,).'),
  ('sweep.alpha', (float('nan'),), 'config.sweep.alpha must be a tuple of numbers of at least 1, got (nan,).'),
  ('sweep.alpha', ([1],), 'config.sweep.alpha must be a tuple of numbers of at least 1, got ([1],).'),
  ('sweep.alpha', ('2',), "config.sweep.alpha must be a tuple of numbers of at least 1, got ('2',)."),
  ('sweep.alpha', (2, 2.0), 'config.sweep.alpha must be a tuple without repetitions, got (2, 2.0).'),
  ('sweep.seed', (1.5,), 'config.sweep.seed must be a tuple of integers in [0, 2**31), got (1.5,).'),
  ('sweep.seed', (2**31,), 'config.sweep.seed must be a tuple of integers in [0, 2**31), got (2147483648,).'),
  ('sweep.learning_rate', (0,), 'config.sweep.learning_rate must be a tuple of positive numbers, got (0,).'),
  ('sweep.optimizer', ('sdg',),
   "config.sweep.optimizer must be a tuple of some of ['adam', 'adamw', 'momentum', 'momentum_decay', 'sgd'], got ('sdg',)."),
  ('sweep.update', ('naive',),
   "config.sweep.update must be a tuple of some of ['backpropagation', 'target_propagation'], got ('naive',)."),
  ('sweep.biases', ('none',), "config.sweep.biases must be a tuple of some of ['plain', 'reparameterised'], got ('none',)."),
  ('prune.densities', (), 'config.prune.densities must be a tuple of different shares in (0, 1], got ().'),
  ('prune.densities', (0.0, 0.5), 'config.prune.densities must be a tuple of different shares in (0, 1], got (0.0, 0.5).'),
  ('prune.densities', (0.5, 0.5), 'config.prune.densities must be a tuple of different shares in (0, 1], got (0.5, 0.5).'),
  ('prune.densities', ('a',), "config.prune.densities must be a tuple of different shares in (0, 1], got ('a',)."),
  ('prune.figure_density', 1.1, 'config.prune.figure_density must be a share in (0, 1], got 1.1.'),
  ('prune.output_factor', 0.0, 'config.prune.output_factor must be positive, got 0.0.'),
  ('prune.sampled_weights', 0, 'config.prune.sampled_weights must be positive, got 0.'),
  ('prune.scopes', ('net',), SCOPES + ", got ('net',)."),
  ('prune.scopes', (['layer'],), SCOPES + ", got (['layer'],)."),
  ('report', ('figure2',),
   "config.report must be a tuple of some of ['compare', 'continual', 'figure1', 'learning_rate'], got ('figure2',)."),
]


@pytest.mark.parametrize('key, value, message', MISTAKES)
def test_check_says_what_is_allowed(key, value, message):
  config = base.get_config()
  sweep.check(config)
  config.update_from_flattened_dict({key: value})
  with pytest.raises(UserError) as error:
    sweep.check(config)
  assert str(error.value) == message


def test_split():
  images, labels, test_images, test_labels = tiny.ARRAYS
  data = datasets.Dataset(images, labels, test_images, test_labels, 10, 'here')
  parts = supervised.split(data, 400, 20)
  assert {name: len(part.images) for name, part in parts.items()} == {'train': 400, 'validation': 80, 'test': 150}
  np.testing.assert_array_equal(parts['train'].images, images[:400])   # the first ones
  np.testing.assert_array_equal(parts['validation'].labels, labels[400:])
  np.testing.assert_array_equal(parts['test'].images, test_images)
  for train_images, batch_size in ((480, 20), (19, 20)):
    with pytest.raises(UserError, match=f'train_images must leave some of the 480 .* of {batch_size}, got {train_images}'):
      supervised.split(data, train_images, batch_size)


@pytest.mark.parametrize('compute', ['float32', 'bfloat16'])
def test_convolutions_and_their_gradients_are_in_the_precision_asked_for(data_dir, tmp_path, compute):
  config = make_config(data_dir, model='conv_16_32_64', compute=compute, **{'sweep.alpha': (2.0,)})
  setting = supervised.prepare(config, sweep.make_groups, tmp_path)
  text = str(jax.make_jaxpr(setting.epoch)(setting.first(), [slot.nets for slot in setting.slots],
                                           [slot.number for slot in setting.slots], setting.data['train'], 0, 0, 12))
  (first, *_), products = re.findall(r'(\w+)\[[\d,]*\] = conv_general_dilated', text), text.count('conv_general_dilated[')
  assert products >= 5 and first == {'float32': 'f32', 'bfloat16': 'bf16'}[compute]
  assert {str(x.dtype) for x in jax.tree.leaves(setting.theta0)} == {'float32'}


def test_groups_are_the_product_of_what_changes_the_program():
  config = base.get_config()
  config.update_from_flattened_dict({'sweep.alpha': (1.0, 2.0), 'sweep.seed': (3, 4), 'sweep.learning_rate': (0.1, 0.2, 0.5),
                                     'sweep.update': ('target_propagation', 'backpropagation'), 'sweep.optimizer': ('adam',)})
  groups, nets = sweep.make_groups(config), sweep.make_nets(config)
  assert [sweep.group_name(group, config) for group in groups] == [
    'alpha=1 update=target_propagation', 'alpha=1 update=backpropagation',
    'alpha=2 update=target_propagation', 'alpha=2 update=backpropagation']
  assert nets.seed.tolist() == [3, 3, 3, 4, 4, 4] and nets.seed.dtype == np.int32
  assert nets.learning_rate.tolist() == np.float32([0.1, 0.2, 0.5] * 2).tolist()
  theta = {'linear': {'w': np.float32([[0.25]]), 'b': np.float32([4.0])}}
  assert [float(group.reparam.inverse(theta)['linear']['w'][0, 0]) for group in groups] == [0.25, 0.25, 0.5, 0.5]
  # Each group has its own update: the naive order undoes the slope 2·0.5, Adam's first step being of the size of the rate.
  phi = groups[2].reparam.inverse(theta)
  ones = jax.tree.map(np.ones_like, theta)
  def step(group):
    tx = group.optimizer(0.1, None, None)
    return float(tx.update(ones, tx.init(phi), phi)[0]['linear']['w'][0, 0])
  phi['linear']['w'] = phi['linear']['w'] / 2   # slope 0.5
  assert step(groups[2]) == pytest.approx(-0.05, rel=1e-5) and step(groups[3]) == pytest.approx(-0.1, rel=1e-5)


def test_reparameterised_biases():
  config = base.get_config()
  config.update_from_flattened_dict({'sweep.alpha': (2.0,), 'sweep.biases': ('plain', 'reparameterised')})
  theta = {'linear': {'w': np.float32([[0.25]]), 'b': np.float32([4.0])}}
  assert [float(group.reparam.inverse(theta)['linear']['b'][0]) for group in sweep.make_groups(config)] == [4.0, 2.0]


@given(steps=st.integers(1, 200), steps_per_epoch=st.integers(1, 50), data=st.data())
def test_epochs_cover_the_rest_of_the_run(steps, steps_per_epoch, data):
  whole = list(supervised.epochs(0, steps, steps_per_epoch))
  taken = [number * steps_per_epoch + t for number, first, last in whole for t in range(first, last)]
  assert taken == list(range(steps))
  assert all(first == 0 and last <= steps_per_epoch for _, first, last in whole)
  done = data.draw(st.sampled_from([0, steps, *(number * steps_per_epoch for number, _, _ in whole)]))
  rest = [number * steps_per_epoch + t for number, first, last in supervised.epochs(done, steps, steps_per_epoch)
          for t in range(first, last)]
  assert rest == list(range(done, steps))


# ---- what a run writes ---------------------------------------------------------------------------------------------

LAYERS = ('mlp/~/linear_0', 'mlp/~/linear_1')


@pytest.fixture(scope='module')
def weights(finished):
  """(α, network) → θ in float64, out of the last checkpoint as Orbax itself reads it; network: seed, rate."""
  with ocp.StandardCheckpointer() as checkpointer:
    groups = checkpointer.restore(finished / 'checkpoints' / str(STEPS) / 'default')
  out = {}
  for alpha, group in zip(ALPHAS, groups, strict=True):
    for k, net in enumerate(itertools.product(SEEDS, RATES)):
      phi = {layer: {leaf: np.asarray(group['phi'][layer][leaf][k], np.float64) for leaf in 'wb'} for layer in LAYERS}
      out[alpha, net] = {layer: {'w': np.sign(x['w']) * np.abs(x['w']) ** alpha, 'b': x['b']} for layer, x in phi.items()}
  return out


@pytest.fixture(scope='module')
def initial_weights(compiled_once):
  net = hk.transform_with_state(tiny.mlp(tiny.CLASSES, 0.0).forward)
  make = train.make_weights(net, (tiny.SIDE, tiny.SIDE, 1), train.make_mesh())
  theta0, _ = jax.tree.map(np.asarray, make(np.array(SEEDS, np.int32)))
  return {seed: jax.tree.map(lambda x, k=k: x[k], theta0) for k, seed in enumerate(SEEDS)}


def numpy_masks(theta, p, scope):
  counts = [int(p * 1080), int(min(1, 2 * p) * 300)]   # weights of 36-30-10
  sizes = [np.abs(theta[layer]['w']) for layer in LAYERS]
  if scope == 'global':
    threshold = np.sort(np.concatenate([x.ravel() for x in sizes]))[-sum(counts)]
    return [x >= threshold for x in sizes]
  return [x >= np.sort(x.ravel())[-k] for x, k in zip(sizes, counts, strict=True)]


def numpy_accuracy(theta, masks, images, labels):
  x = images.reshape(len(images), -1) / 255
  for i, (layer, mask) in enumerate(zip(LAYERS, masks, strict=True)):
    x = x @ np.where(mask, theta[layer]['w'], 0) + theta[layer]['b']
    x = np.maximum(x, 0) if i == 0 else x
  return np.mean(np.argmax(x, 1) == labels)


def test_results_are_those_of_the_weights_in_the_checkpoint(finished, weights, initial_weights):
  """Every row of results.csv and overlap.csv, worked out by NumPy in float64 from the last checkpoint."""
  results, overlap = read_csv(finished / 'results.csv'), read_csv(finished / 'overlap.csv')
  images, labels, test_images, test_labels = tiny.ARRAYS
  wanted = list(itertools.product(ALPHAS, SEEDS, RATES, ('layer', 'global'), DENSITIES))
  assert len(results) == len(overlap) == len(wanted) == 72
  for row, other, (alpha, seed, rate, scope, density) in zip(results, overlap, wanted, strict=True):
    axes = {'alpha': str(alpha), 'seed': str(seed), 'learning_rate': str(rate), 'optimizer': 'sgd',
            'update': 'target_propagation', 'biases': 'plain', 'algorithm': 'dense',
            'sparsity': '0.0', 'penalty': '0.0', 'scope': scope, 'density': str(density)}
    theta = weights[alpha, (seed, rate)]
    masks, old = numpy_masks(theta, density, scope), numpy_masks(initial_weights[seed], density, scope)
    agree = np.concatenate([(a == b).ravel() for a, b in zip(masks, old, strict=True)])
    validation = numpy_accuracy(theta, masks, images[360:], labels[360:])
    test = numpy_accuracy(theta, masks, test_images, test_labels)
    assert row == axes | {'kept': str(sum(m.sum() for m in masks)), 'weights': '1380',
                          'validation_accuracy': repr(float(validation)), 'test_accuracy': repr(float(test))}
    assert float(other.pop('overlap')) == pytest.approx(agree.mean(), rel=1e-6) and other == axes
  accuracies = [float(row['test_accuracy']) for row in results if row['density'] == '1.0' and row['learning_rate'] == '0.1']
  assert min(accuracies[:6]) > 0.5   # ten classes: they have learned something


def test_statistics_and_sampled_weights(finished, weights, initial_weights):
  rows = read_csv(finished / 'statistics.csv')
  axes = [(float(row['alpha']), int(row['seed']), float(row['learning_rate'])) for row in rows]
  assert axes == list(itertools.product(ALPHAS, SEEDS, RATES))
  for row, (alpha, seed, rate) in zip(rows, axes, strict=True):
    theta = np.concatenate([weights[alpha, (seed, rate)][layer]['w'].ravel() for layer in LAYERS])
    theta0 = np.concatenate([initial_weights[seed][layer]['w'].ravel() for layer in LAYERS])
    kept = np.concatenate([m.ravel() for m in numpy_masks(weights[alpha, (seed, rate)], 0.1, 'layer')])
    flips = theta0 * theta < 0
    assert float(row['sign_flips']) == pytest.approx(flips.mean(), rel=1e-5)
    assert float(row['survivor_sign_flips']) == pytest.approx(flips[kept].mean(), rel=1e-5)
    centred = theta - theta.mean()
    assert float(row['kurtosis']) == pytest.approx(np.mean(centred**4) / np.mean(centred**2) ** 2 - 3, rel=1e-3)
    small = [np.abs(w) < np.median(np.abs(w)) for w in (initial_weights[seed][layer]['w'] for layer in LAYERS)]
    small = np.concatenate([x.ravel() for x in small])
    assert float(row['survivors_from_smaller_half']) == pytest.approx(small[kept].mean(), rel=1e-5)
  with np.load(finished / 'weights.npz', allow_pickle=False) as arrays:
    assert arrays['alpha'].tolist() == list(ALPHAS) and arrays['density'] == 0.1
    for i, alpha in enumerate(ALPHAS):   # the first network of each α: the same weights of the same initialisation
      theta = np.concatenate([weights[alpha, (0, 0.1)][layer]['w'].ravel() for layer in LAYERS])
      theta0 = np.concatenate([initial_weights[0][layer]['w'].ravel() for layer in LAYERS])
      kept = np.concatenate([m.ravel() for m in numpy_masks(weights[alpha, (0, 0.1)], 0.1, 'layer')])
      place = {value: at for at, value in enumerate(theta0.tolist())}
      at = np.array([place[value] for value in arrays[f'initial_{i}'].tolist()])
      assert len(at) == 500
      np.testing.assert_array_equal(arrays['initial_0'], arrays[f'initial_{i}'])
      np.testing.assert_allclose(arrays[f'final_{i}'], theta[at], rtol=1e-6)
      np.testing.assert_array_equal(arrays[f'kept_{i}'], kept[at])


def test_metrics_and_records(finished, data_dir):
  records = read_metrics(finished)
  assert [record['step'] for record in records] == [18, 36, 50]
  for record in records:
    assert record.keys() == {'step', 'train_loss', 'operations'}
    assert record['train_loss'].keys() == record['operations'].keys() == {'alpha=1', 'alpha=2'}
    # Dense training: three times a forward pass of a batch of 20, two operations for each of 1,380 weights.
    assert record['operations']['alpha=2'] == [record['step'] * 3 * 20 * 2 * 1380] * 6
    assert np.shape(list(record['train_loss'].values())) == (2, 6)
  first, last = (np.array(list(records[i]['train_loss'].values())) for i in (0, -1))
  assert np.all(last < first) and np.all(first < 2.5)   # below log 10 soon
  run = json.loads((finished / 'run.json').read_text())
  source = f'official IDX files in the folder {data_dir.name}'
  assert run['data'] == f'Tiny: 480 train and 150 test images from {source}, checksums good'
  assert run['seconds'].keys() == {'start', 'training', 'evaluation'}
  assert json.loads((finished / 'config.json').read_text())['sweep']['alpha'] == list(ALPHAS)
  if importlib.util.find_spec('tensorboardX'):
    assert list((finished / 'tensorboard').glob('events.out.tfevents.*'))
  assert not [path for path in finished.rglob('.*')]   # no file half written


# ---- going on ------------------------------------------------------------------------------------------------------


def remove_outputs(workdir):
  for name in (*OUTPUTS[:4], 'table.md', 'run.json', 'report.html'):
    (workdir / name).unlink()


def test_a_finished_run_is_not_trained_again(finished, copy, data_dir, capsys):
  remove_outputs(copy)
  supervised.run(make_config(data_dir), copy)
  told = capsys.readouterr().out
  assert 'goes on from step 50.' in told and 'ms a step' not in told
  assert_same_results(copy, finished)
  assert (copy / 'metrics.jsonl').read_bytes() == (finished / 'metrics.jsonl').read_bytes()


def truncate_all(folder):
  for path in folder.rglob('*'):
    if path.is_file():
      path.write_bytes(path.read_bytes()[:path.stat().st_size // 2])


def test_goes_on_from_the_checkpoint_before_a_damaged_one(finished, copy, data_dir, capsys):
  remove_outputs(copy)
  shutil.rmtree(copy / 'checkpoints' / '50')
  truncate_all(copy / 'checkpoints' / '36')
  with (copy / 'metrics.jsonl').open('a') as file:
    file.write('{"step": 68, "sec')
  with pytest.warns(UserWarning, match=r'checkpoints/36 cannot be read \('):
    supervised.run(make_config(data_dir, checkpoint_epochs=2), copy)
  assert 'goes on from step 18.' in capsys.readouterr().out
  kept = json.loads((copy / 'config.json').read_text())
  assert kept['checkpoint_epochs'] == 2   # a key without effect
  (copy / 'config.json').write_bytes((finished / 'config.json').read_bytes())
  assert_same_results(copy, finished)
  assert sorted(path.name for path in (copy / 'checkpoints').iterdir()) == ['18', '36', '36.damaged', '50']


def test_starts_over_only_when_told(copy, data_dir):
  for step in (18, 36, 50):
    truncate_all(copy / 'checkpoints' / str(step))
  (copy / 'run.json').unlink()   # as of a run that has not ended
  with pytest.warns(UserWarning, match='cannot be read'), pytest.raises(UserError, match='delete it to start over'):
    supervised.run(make_config(data_dir), copy)


def test_goes_on_with_another_number_of_devices(finished, copy, data_dir, monkeypatch, capsys):
  """Eight devices before, three after: not bit-identical by promise, but the same networks."""
  for step in (36, 50):
    shutil.rmtree(copy / 'checkpoints' / str(step))
  (copy / 'weights.npz').unlink()
  (copy / 'run.json').unlink()
  monkeypatch.setattr(train, 'make_mesh', lambda: jax.make_mesh(
      (3,), (train.NETS,), axis_types=(jax.sharding.AxisType.Auto,), devices=jax.devices()[:3]))
  supervised.run(make_config(data_dir), copy)
  assert 'on 3 cpu devices' in capsys.readouterr().out
  assert_close_results(copy, finished)


def assert_close_results(workdir, other, images=120):
  """Equal but for rounding: weights to 1e-5, an accuracy by two images."""
  with np.load(workdir / 'weights.npz') as found, np.load(other / 'weights.npz') as wanted:
    assert set(found) == set(wanted)
    for name in wanted:
      np.testing.assert_allclose(found[name], wanted[name], rtol=0, atol=1e-5)
  for row, theirs in zip(read_csv(workdir / 'results.csv'), read_csv(other / 'results.csv'), strict=True):
    for name in row:
      if name.endswith('accuracy'):
        assert float(row[name]) == pytest.approx(float(theirs[name]), abs=2 / images)
      else:
        assert row[name] == theirs[name]
  for record, theirs in zip(read_metrics(workdir), read_metrics(other), strict=True):
    assert record['step'] == theirs['step']
    for name in theirs['train_loss']:
      np.testing.assert_allclose(record['train_loss'][name], theirs['train_loss'][name], rtol=0, atol=1e-5)


# ---- odd sweeps ----------------------------------------------------------------------------------------------------


ODD = {'sweep.alpha': (2.0,), 'sweep.seed': (0,), 'sweep.learning_rate': (0.1, 1e30), 'prune.scopes': ('layer',)}


def test_a_network_that_diverges(compiled_once, data_dir, tmp_path, caplog):
  """It says so, in valid JSON, and spoils no other one."""
  supervised.run(make_config(data_dir, **ODD), tmp_path)
  for line in (tmp_path / 'metrics.jsonl').read_text().splitlines():
    losses = json.loads(line, parse_constant=pytest.fail)['train_loss']['alpha=2']
    assert losses[1] is None and 0 < losses[0] < 3
  rows = [row for row in read_csv(tmp_path / 'results.csv') if row['density'] == '1.0']
  assert float(rows[0]['test_accuracy']) > 0.3 and rows[1]['test_accuracy'] == rows[1]['validation_accuracy'] == 'nan'
  good, bad = read_csv(tmp_path / 'statistics.csv')
  measured = ('sign_flips', 'survivor_sign_flips', 'survivors_from_smaller_half', 'kurtosis')
  assert [bad[name] for name in measured] == 4 * ['nan'] and 'nan' not in [good[name] for name in measured]
  rate = bad['learning_rate']
  assert {row['overlap'] == 'nan' for row in read_csv(tmp_path / 'overlap.csv') if row['learning_rate'] == rate} == {True}
  assert not caplog.records


def test_a_run_that_has_ended_is_only_drawn_again(copy, data_dir, capsys):
  (copy / 'report.html').unlink()
  before = {path.name: path.read_bytes() for path in copy.iterdir() if path.suffix in ('.csv', '.json', '.npz', '.jsonl')}
  supervised.run(make_config(data_dir), copy)
  told = capsys.readouterr().out
  assert 'which has ended' in told and 'evaluated group' not in told and (copy / 'report.html').exists()
  assert {path.name: path.read_bytes() for path in copy.iterdir() if path.name in before} == before


def test_compiles_alike_for_few_and_many_epochs(compiled_once, data_dir, tmp_path):
  compilations = []
  jax.monitoring.register_event_duration_secs_listener(
      lambda event, _, **more: compilations.append(event) if event.endswith('backend_compile_duration') else None)
  counts = []
  for steps in (18, 120):
    compilations.clear()
    supervised.run(make_config(data_dir, **ODD, steps=steps), tmp_path / str(steps))
    counts.append(len(compilations))
  assert counts[0] == counts[1] > 5


# ---- several hosts -------------------------------------------------------------------------------------------------


def test_two_hosts(finished, data_dir, tmp_path):
  """Two processes over loopback, one device each: the results of one process, written by the first alone."""
  with socket.socket() as probe:
    probe.bind(('127.0.0.1', 0))
    port = probe.getsockname()[1]
  command = [sys.executable, '-m', 'tests.tiny', '--config=configs/base.py', f'--workdir={tmp_path / "two"}',
             f'--config.data_dir={data_dir}', *(f'--config.{key}={value}' for key, value in SETTINGS.items()),
             f'--coordinator=127.0.0.1:{port}', '--processes=2']
  environment = os.environ | {'XLA_FLAGS': '--xla_force_host_platform_device_count=1'}
  processes = [subprocess.Popen([*command, f'--process={i}'], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
                                env=environment, cwd=ROOT) for i in range(2)]
  try:
    told = [process.communicate(timeout=300)[0] for process in processes]
  finally:
    for process in processes:
      process.kill()   # does nothing to one that has ended
  assert [process.returncode for process in processes] == [0, 0], told
  assert 'on 2 cpu devices' in told[0] and 'ms a step' in told[0]
  assert not re.search('network|wrote|step', told[1])
  assert_close_results(tmp_path / 'two', finished)

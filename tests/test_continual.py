"""The protocol 'continual' on a tiny set: results are those of the weights in its checkpoints, a run that was stopped ends alike,
and from the second task on nothing is compiled."""
import csv
import json
import re
import shutil
import warnings

import haiku as hk
import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest
import tiny

from configs import base
from experiments import report, train
from experiments.checkpoint import Checkpoints
from experiments.continual import figures as continual_figures
from experiments.continual import problem, protocol, table
from experiments.continual import results as continual_results
from experiments.continual.methods import METHODS
from experiments.errors import UserError
from experiments.figures import Curve
from experiments.workdir import write_csv

STEPS, TASKS, SEEDS = 40, 3, 2
GROUPS = [(2.0, 'fine_tune'), (2.0, 'efficient_packnet')]
DENSEST = 'ignore:.*even the densest mask is not above gamma:UserWarning'
pytestmark = [pytest.mark.filterwarnings(DENSEST), pytest.mark.usefixtures('data_dir', 'compiled_quickly')]
LAYERS = ('mlp/~/linear_0', 'mlp/~/linear_1')
OUTPUTS = ('results.csv', 'statistics.csv', 'matrix.csv', 'capacity.csv', 'mask_overlap.csv', 'table.md')


def make_config(data_dir, **change):
  """40 steps of a task are 2 epochs of 18 and 4 more; masks are chosen after 30."""
  config = base.get_config()
  config.update_from_flattened_dict({
    'protocol': 'continual', 'data_dir': str(data_dir), 'dataset': 'tiny', 'model': 'tiny', 'train_images': 360, 'batch_size': 20,
    'steps': STEPS, 'sweep.alpha': (2.0,), 'sweep.seed': (0, 1), 'sweep.optimizer': ('momentum',),
    'sweep.learning_rate': (0.05,), 'sweep.algorithm': ('fine_tune', 'efficient_packnet'), 'continual.tasks': TASKS,
    'continual.retrain_share': 0.25, 'continual.densities': (0.1, 0.2, 0.4), 'continual.gamma': 0.9, 'report': ('continual',),
    'continual.inferred_images': 60, 'checkpoint_epochs': 1, 'checkpoints_kept': 20, **change})
  return config


@pytest.fixture(scope='module')
def finished(compiled_quickly, compiled_once, data_dir, tmp_path_factory):
  """A workdir, how many programs had been compiled at each checkpoint, and what was warned of."""
  workdir, compiled, at = tmp_path_factory.mktemp('finished'), [], {}
  jax.monitoring.register_event_duration_secs_listener(
      lambda event, _, **more: compiled.append(event) if event.endswith('backend_compile_duration') else None)
  save = Checkpoints.save
  def counted(self, step, tree):
    save(self, step, tree)
    at[step] = len(compiled)
  with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings(record=True) as warned:
    warnings.simplefilter('always')
    patch.setattr(Checkpoints, 'save', counted)
    protocol.run(make_config(data_dir), workdir)
  return workdir, at, [str(one.message) for one in warned if 'densest' in str(one.message)]


def read(path):
  return list(csv.DictReader(path.read_text().splitlines()))


@pytest.mark.parametrize(('compute', 'expected'), [('float32', 'f32'), ('bfloat16', 'bf16')])
def test_convolutions_are_in_the_precision_asked_for(data_dir, tmp_path, compute, expected):
  setting = protocol.prepare(make_config(data_dir, model='conv_16_32_64', compute=compute), tmp_path)
  net = setting.problems[0].net
  images = np.zeros((2, 6, 6, 1), np.float32)
  theta, state = jax.eval_shape(net.init, jax.random.key(0), images, True)
  text = str(jax.make_jaxpr(lambda p, s: net.apply(p, s, None, images, True))(theta, state))
  assert re.findall(r'(\w+)\[[\d,]*\] = (?:conv_general_dilated|custom_vjp_call)', text)[0] == expected
  assert {str(x.dtype) for x in jax.tree.leaves(theta)} == {'float32'}


def test_nothing_is_compiled_from_the_second_task_on(finished):
  _, at, _ = finished
  assert sorted(at) == [18, 36, 40, 58, 76, 80, 98, 116, 120]
  assert at[18] > 0 and at[40] == at[120]


# ---- results -------------------------------------------------------------------------------------------------------


def networks(workdir, step=TASKS * STEPS):
  """(alpha, method, seed) → φ, and masks [T] of each layer or None; from a checkpoint."""
  with ocp.StandardCheckpointer() as checkpointer:
    groups = checkpointer.restore(workdir / 'checkpoints' / str(step) / 'default')
  found = {}
  for (alpha, method), group in zip(GROUPS, groups, strict=True):
    for k in range(SEEDS):
      phi = {layer: {n: np.float64(x[k]) for n, x in group['trained']['phi'][layer].items()} for layer in LAYERS}
      masks = None
      if method != 'fine_tune':
        masks = {layer: np.unpackbits(np.asarray(group['memory']['tasks']['bits'][layer]['w'][k]), axis=1,
                                      count=phi[layer]['w'].size).reshape(TASKS, *phi[layer]['w'].shape).astype(bool)
                 for layer in LAYERS}
      found[alpha, method, k] = phi, masks
  return found


def logits(alpha, phi, scale, task, part):
  """By NumPy, on the images of a task: permuted, but the first; each θ times what `scale` has for it. And the labels."""
  rng = np.random.default_rng(0)
  orders = [np.arange(36), *(rng.permutation(36) for _ in range(TASKS - 1))]
  images, labels = {'test': tiny.ARRAYS[2:], 'validation': [x[360:] for x in tiny.ARRAYS[:2]]}[part]
  x = images.reshape(len(images), 36)[:, orders[task]] / 255
  for i, layer in enumerate(LAYERS):
    x = x @ (phi[layer]['w'] * np.abs(phi[layer]['w']) ** (alpha - 1) * scale[layer]) + phi[layer]['b']
    x = np.maximum(x, 0) if i == 0 else x
  return x, labels


def accuracy(alpha, phi, masks, task, part):
  scale = dict.fromkeys(LAYERS, 1) if masks is None else {layer: masks[layer][task] for layer in LAYERS}
  x, labels = logits(alpha, phi, scale, task, part)
  return np.mean(x.argmax(1) == labels)


def found_by_gradient(alpha, phi, masks, task):
  """Does the mean entropy of 60 images fall fastest along this task's weight in the mean of all masks? By differences."""
  def certain(weights):
    mixed = {layer: np.tensordot(weights, masks[layer].astype(float), 1) for layer in LAYERS}
    x = logits(alpha, phi, mixed, task, 'test')[0][:60]
    log_p = x - x.max(1, keepdims=True)
    log_p -= np.log(np.exp(log_p).sum(1, keepdims=True))
    return (np.exp(log_p) * log_p).sum(1).mean()
  middle, step = np.full(TASKS, 1 / TASKS), 1e-5 * np.eye(TASKS)
  return int(np.argmax([certain(middle + e) - certain(middle - e) for e in step]) == task)


def test_results_are_those_of_the_weights_in_the_checkpoints(finished):
  workdir, *_ = finished
  rows = {(float(r['alpha']), r['algorithm'], int(r['seed'])): r for r in read(workdir / 'results.csv')}
  statistics = {(float(r['alpha']), r['algorithm'], int(r['seed'])): r for r in read(workdir / 'statistics.csv')}
  matrix = {(float(r['alpha']), r['algorithm'], int(r['seed']), int(r['after']), int(r['task'])): float(r['test_accuracy'])
            for r in read(workdir / 'matrix.csv')}
  last = networks(workdir)
  assert rows.keys() == last.keys()
  for (alpha, method, k), (phi, masks) in last.items():
    row = rows[alpha, method, k]
    for part in ('test', 'validation'):
      mean = np.mean([accuracy(alpha, phi, masks, task, part) for task in range(TASKS)])
      assert float(row[f'{part}_accuracy']) == pytest.approx(mean, abs=1e-9)
    if masks is None:
      # After a task and after the switch a network without masks is the same: its checkpoints are those of the tests.
      for after in (1, 2, 3):
        then = networks(workdir, after * STEPS)[alpha, method, k][0]
        for task in range(min(after + 1, TASKS)):
          assert matrix[alpha, method, k, after, task + 1] == pytest.approx(accuracy(alpha, then, None, task, 'test'), abs=1e-9)
      assert [key[3:] for key in matrix if key[:3] == (alpha, method, k)] == [
        (0, 1), (0, 2), (0, 3), (1, 1), (1, 2), (2, 1), (2, 2), (2, 3), (3, 1), (3, 2), (3, 3)]
    else:
      for task in range(1, TASKS + 1):   # never forgotten, to the last image
        assert len({matrix[alpha, method, k, after, task] for after in range(task, TASKS + 1)}) == 1
      assert float(row['forgetting']) == float(row['backward_transfer']) == 0 and row['forward_transfer'] == 'nan'
      union = sum(int(masks[layer].any(0).sum()) for layer in LAYERS)
      assert (int(row['kept']), int(row['weights'])) == (union, 1380) and float(row['inferred_accuracy']) <= 1
      expected = np.mean([found_by_gradient(alpha, phi, masks, task) for task in range(TASKS)])
      assert float(statistics[alpha, method, k]['tasks_found_by_gradient']) == pytest.approx(expected)
    told = statistics[alpha, method, k]
    assert float(told['learned']) == pytest.approx(np.mean([matrix[alpha, method, k, t, t] for t in (1, 2, 3)]))
    assert float(told['worst_task']) == min(matrix[alpha, method, k, TASKS, t] for t in (1, 2, 3))
    assert float(told['network_bytes']) == 4 * sum(x.size for x in jax.tree.leaves(phi)) >= 4 * 1380
    assert float(told['bytes_per_task']) == (0 if masks is None else sum(-(-masks[layer][0].size // 8) for layer in LAYERS))
  assert np.mean([float(r['test_accuracy']) for r in rows.values()]) > 0.5   # they do learn


def test_capacity_and_overlap(finished):
  workdir, *_ = finished
  capacity, overlap = read(workdir / 'capacity.csv'), read(workdir / 'mask_overlap.csv')
  for (alpha, method, k), (_, masks) in networks(workdir).items():
    if masks is None:
      continue
    bits = np.concatenate([masks[layer].reshape(TASKS, -1) for layer in LAYERS], 1)
    def mine(row, who=(alpha, method, k)):
      return (float(row['alpha']), row['algorithm'], int(row['seed'])) == who
    for t, row in enumerate(filter(mine, capacity)):
      before = bits[:t].any(0)
      for name, expected in (('used', bits[t]), ('new', bits[t] & ~before), ('reused', bits[t] & before),
                             ('total', bits[t] | before)):
        assert float(row[name]) == pytest.approx(expected.mean(), rel=1e-6), name
      assert bits[t].sum() in (138, 276, 552)   # of 1,380
      # Two thirds of a step go forward and to the inputs, one to the weights that may change; dense, then under the mask.
      dense, under = 2 * 1380 + (~before).sum(), 2 * bits[t].sum() + (bits[t] & ~before).sum()
      assert float(row['training_operations']) == pytest.approx((0.75 * dense + 0.25 * under) / (3 * 1380), rel=1e-6)
      assert (row['met'] == '1') == (float(row['mask_accuracy']) > 0.9 * float(row['dense_accuracy']))
    for row in filter(mine, overlap):
      a, b = bits[int(row['task']) - 1], bits[int(row['other']) - 1]
      assert float(row['overlap']) == pytest.approx((a & b).sum() / (a | b).sum(), rel=1e-6)


def test_masks_that_are_not_good_enough_are_warned_of(finished):
  workdir, _, warned = finished
  failed = [int(row['task']) for row in read(workdir / 'capacity.csv') if row['met'] == '0']
  assert warned == [f'alpha=2 algorithm=efficient_packnet: on task {task} even the densest mask is not above gamma=0.9 times '
                    f'the accuracy of all weights in {failed.count(task)} of 2 networks; it is kept.'
                    for task in sorted(set(failed))] and warned


def test_report(finished):
  workdir, *_ = finished
  page = (workdir / 'report.html').read_text()
  for title in ('Accuracy against the number of tasks', 'Capacity against', 'Accuracy after each task', 'Overlap of the masks'):
    assert title in page
  assert '3 tasks one after another, 40 steps of each task' in page and 'short run' not in page
  text = (workdir / 'table.md').read_text()
  assert 'forgetting' in text and 'EfficientPackNet' in text and 'of all classes' not in text   # outputs are shared
  assert {path.stem for path in (workdir / 'figures').glob('*.png')} == {'tasks', 'capacity', 'matrix', 'mask_overlap'}
  assert report.write_report(workdir)[-1].name == 'report.html'


def test_runs_side_by_side(finished, tmp_path):
  """The same networks from two runs, which are then told apart by their workdirs; other tasks are refused."""
  workdir, *_ = finished
  other = shutil.copytree(workdir, tmp_path / 'other')
  paths = table.write(tmp_path / 'table', [workdir, other])
  assert {path.name for path in paths} >= {'tasks.png', 'matrix.svg', 'mask_overlap.png', 'table.md'}
  lines = (tmp_path / 'table' / 'table.md').read_text().splitlines()
  assert [[cell.strip() for cell in line.split('|')[1:3]] for line in lines[4:8]] == [
    [method, '/'.join(run.parts[-2:])] for method in ('fine-tuning', 'EfficientPackNet') for run in (workdir, other)]
  with pytest.raises(UserError, match='a workdir is named twice'):
    table.write(tmp_path / 'table', [workdir, workdir])
  text = (other / 'config.json').read_text()
  (other / 'config.json').write_text(json.dumps(json.loads(text) | {'momentum': 0.5}))
  table.write(tmp_path / 'table', [workdir, other])
  told = (tmp_path / 'table' / 'table.md').read_text().splitlines()
  assert told[:-2] == lines and told[-2:] == ['', f'note: runs differ in momentum: 0.9 ({workdir.name}), 0.5 (other).']
  (other / 'config.json').write_text(text.replace('"tasks": 3', '"tasks": 4'))
  with pytest.raises(UserError, match=r'other has other tasks than .*: tasks is 4 and 3\.'):
    table.write(tmp_path / 'table', [workdir, other])


def test_networks_that_diverged_are_counted_out(finished, tmp_path):
  """One of two of EfficientPackNet, and both of fine-tuning, made NaN in the files: figures, captions and table say so."""
  workdir = shutil.copytree(finished[0], tmp_path / 'lost')
  for name in ('results', 'matrix', 'statistics'):
    rows = read(workdir / f'{name}.csv')
    for row in rows:
      if row['algorithm'] == 'fine_tune' or row['seed'] == '1':
        row |= {key: 'nan' for key in row if key.endswith('accuracy') or key in (
          'forgetting', 'backward_transfer', 'forward_transfer', 'learned', 'worst_task', 'tasks_found')}
    write_csv(workdir / f'{name}.csv', rows)
  run = report.read_run(workdir)
  of = {one.stem: one for one in continual_results.shown(run)}
  for stem in ('tasks', 'capacity'):   # one network is left: it has no spread
    assert of[stem].caption.endswith('One network each: its spread is unknown. Networks that diverged, left out: 3.')
  (legend,) = of['tasks'].figure.legends
  assert [text.get_text() for text in legend.get_texts()] == ['EfficientPackNet']
  assert legend.get_title().get_text() == 'one network each\nfine-tuning: diverged'
  rows = [row for row in read(workdir / 'capacity.csv') if row['seed'] == '0']
  (line,) = of['capacity'].figure.axes[0].get_lines()
  np.testing.assert_allclose(line.get_ydata(), [100 * float(row['total']) for row in rows])
  told = report.table(run.results).splitlines()
  assert told[-1] == 'Diverged, and in no mean: fine-tuning: 2 of 2; EfficientPackNet: 1 of 2.'
  assert 'diverged' not in (finished[0] / 'table.md').read_text().lower()


def net_rows(tasks, accuracies, **axes):
  base = {'alpha': 1.0, 'seed': 0, 'learning_rate': 0.1, 'optimizer': 'momentum', 'update': 'u', 'biases': 'plain',
          'algorithm': 'efficient_packnet', 'sparsity': 0.0, 'penalty': 0.0} | axes
  return [base | {'after': after, 'task': task, 'test_accuracy': accuracies[task - 1] if after == tasks else 0.01}
          for after in range(tasks + 1) for task in range(1, tasks + 1)]


def test_accuracies_by_when_a_task_was_learned():
  """Seven tasks in four columns, of the last line of a matrix alone; a network that diverged is in none."""
  rows = (net_rows(7, (.9, .8, .7, .6, .5, .4, .3)) + net_rows(7, (.8, .7, .7, .6, .5, .4, .1), seed=1)
          + net_rows(7, (.5,) * 7, alpha=2.0) + net_rows(7, (np.nan,) * 7, alpha=2.0, seed=1))
  capacity = [row | {'dense_accuracy': 0.9, 'met': int(row['task'] < 6 or row['seed'] == 1)} for row in rows if row['after'] == 7]
  found = continual_results.by_position(rows, capacity)
  assert found.header == ['algorithm', 'α', 'n', 'tasks 1 to 2', 'tasks 3 to 4', 'tasks 5 to 6', 'task 7', 'γ reached']
  assert found.rows == [
    ['EfficientPackNet', '1', '2', '80.00 ± 7.07', '65.00 ± 0.00', '45.00 ± 0.00', '20.00 ± 14.14', '12 of 14'],
    ['EfficientPackNet', '2', '1', '50.00', '50.00', '50.00', '50.00', '5 of 7']]
  given = [row | {'dense_accuracy': np.nan} for row in capacity]   # PackNet's: no mask was searched for
  assert continual_results.by_position(rows, given).header[-1] == 'task 7'


def test_tables_of_a_run_tell_when_tasks_were_learned(finished):
  workdir, *_ = finished
  told = (workdir / 'table.md').read_text()
  matrix = [row for row in read(workdir / 'matrix.csv') if row['after'] == '3' and row['algorithm'] == 'fine_tune']
  mean = [100 * np.mean([float(row['test_accuracy']) for row in matrix if row['task'] == task]) for task in '123']
  (line,) = [line for line in told.splitlines()[6:] if line.startswith('| fine-tuning') and line.rstrip(' |').endswith('–')]
  assert [float(cell.split('±')[0]) for cell in line.split('|')[3:6]] == pytest.approx(mean, abs=0.005)


def test_a_figure_of_networks_that_all_diverged():
  figure = continual_figures.tasks_figure([Curve('EWC', *np.zeros((3, 0)))], 'Accuracy', 'n = 0')
  assert [text.get_text() for text in figure.axes[0].texts] == ['all networks diverged']


# ---- stopped and gone on with --------------------------------------------------------------------------------------


class Stopped(Exception):
  pass


def metrics(workdir):
  records = map(json.loads, (workdir / 'metrics.jsonl').read_text().splitlines())
  return [{key: value for key, value in record.items() if key != 'seconds'} for record in records]


@pytest.mark.parametrize('calls', [2, 7])
def test_stopped_anywhere_and_gone_on_with(finished, data_dir, tmp_path, monkeypatch, calls):
  """In the first task, before its mask is chosen, and in the second under its mask, with what was written after a checkpoint."""
  workdir, *_ = finished
  left = calls
  show = protocol.Progress.show
  def stop(self, step, losses):
    nonlocal left
    left -= 1
    if left == 0:
      raise Stopped
    show(self, step, losses)
  with monkeypatch.context() as patch:
    patch.setattr(protocol.Progress, 'show', stop)
    with pytest.raises(Stopped):
      protocol.run(make_config(data_dir), tmp_path)
  assert not (tmp_path / 'results.csv').exists()
  protocol.run(make_config(data_dir, report=()), tmp_path)
  for name in OUTPUTS:
    assert (tmp_path / name).read_bytes() == (workdir / name).read_bytes(), name
  for a, b in zip(jax.tree.leaves(networks(tmp_path)), jax.tree.leaves(networks(workdir)), strict=True):
    np.testing.assert_array_equal(a, b)
  assert metrics(tmp_path) == metrics(workdir)


def test_goes_on_after_the_last_task(finished, data_dir, tmp_path, capsys):
  """Killed before its results were written: nothing is trained again. Then only its report is drawn."""
  workdir, *_ = finished
  copy = shutil.copytree(workdir, tmp_path / 'copy')
  for name in ('run.json', 'results.csv', 'matrix.csv'):
    (copy / name).unlink()
  protocol.run(make_config(data_dir), copy)
  assert 'had learned all tasks' in capsys.readouterr().out
  for name in OUTPUTS:
    assert (copy / name).read_bytes() == (workdir / name).read_bytes(), name
  (copy / 'report.html').unlink()
  protocol.run(make_config(data_dir), copy)
  assert 'which has ended' in capsys.readouterr().out and (copy / 'report.html').exists()


def test_pieces_of_a_task():
  assert list(protocol.pieces(0, 40, 18, [30])) == [(0, 0, 18, 18), (1, 0, 12, 30), (1, 12, 18, 36), (2, 0, 4, 40)]
  assert list(protocol.pieces(30, 40, 18, [30])) == [(1, 12, 18, 36), (2, 0, 4, 40)]
  assert list(protocol.pieces(0, 36, 18, [36])) == [(0, 0, 18, 18), (1, 0, 18, 36)]


@pytest.fixture(scope='module')
def competing(compiled_quickly, compiled_once, data_dir, tmp_path_factory):
  """Methods that remember other things, on tasks of classes of their own, all of whose outputs compete."""
  config = make_config(data_dir, **{
    'sweep.algorithm': ('ewc', 'synaptic_intelligence', 'replay', 'a_gem'), 'sweep.penalty': (1.0,), 'sweep.alpha': (1.0,),
    'sweep.seed': (0,), 'continual.sequence': 'split', 'continual.scenario': 'class', 'continual.tasks': 2, 'steps': 12,
    'continual.fisher_images': 6, 'continual.memory_images': 20})
  workdir = tmp_path_factory.mktemp('competing')
  protocol.run(config, workdir)
  return config, workdir


def test_outputs_that_compete(competing):
  """Accuracies of the weights in the checkpoint, with the outputs of all tasks and with those of each task alone."""
  _, workdir = competing
  with ocp.StandardCheckpointer() as checkpointer:
    groups = checkpointer.restore(workdir / 'checkpoints' / '24' / 'default')
  half, (images, labels) = tiny.CLASSES // 2, tiny.ARRAYS[2:]
  held_out = [x[360:] for x in tiny.ARRAYS[:2]]
  images, labels = (np.concatenate(pair) for pair in zip((images, labels), held_out, strict=True))
  testing = np.arange(len(labels)) < len(tiny.ARRAYS[3])
  for row, group in zip(read(workdir / 'results.csv'), groups, strict=True):
    x = images.reshape(len(images), 36) / 255
    for i, layer in enumerate(LAYERS):
      x = x @ np.float64(group['trained']['phi'][layer]['w'][0]) + np.float64(group['trained']['phi'][layer]['b'][0])
      x = np.maximum(x, 0) if i == 0 else x
    own = np.where(np.arange(tiny.CLASSES)[None] // half == labels[:, None] // half, x, -np.inf)
    for name, logits_, part in (('test_accuracy', x, testing), ('class_accuracy', x, testing), ('task_accuracy', own, testing),
                                ('validation_accuracy', x, ~testing)):
      mean = np.mean([np.mean(logits_[at].argmax(1) == labels[at]) for at in (part & (labels // half == t) for t in (0, 1))])
      assert float(row[name]) == pytest.approx(mean, abs=1e-9), (row['algorithm'], name)
  assert 'task told' in (workdir / 'table.md').read_text()


def test_what_methods_remember_is_in_checkpoints(competing, tmp_path, monkeypatch):
  """Stopped in the second task and gone on with."""
  config, workdir = competing
  save = Checkpoints.save
  def stop(self, step, tree):
    save(self, step, tree)
    if step == 12:
      self.close()
      raise Stopped
  with monkeypatch.context() as patch:
    patch.setattr(Checkpoints, 'save', stop)
    with pytest.raises(Stopped):
      protocol.run(config, tmp_path)
  protocol.run(config, tmp_path)
  for name in ('results.csv', 'statistics.csv', 'matrix.csv'):
    assert (tmp_path / name).read_bytes() == (workdir / name).read_bytes(), name


@pytest.mark.parametrize('key, value, message', [
  ('label_smoothing', 0.1, "config.label_smoothing must be 0 for the protocol 'continual', got 0.1."),
  ('continual.retrain_share', 0.99, 'continual.retrain_share must be a share that leaves at least one of 40 .*, got 0.99.'),
  ('continual.scenario', 'class', "config.continual.scenario must be 'task' or 'domain' for efficient_packnet, .*got 'class'"),
  ('sweep.algorithm', ('rigl',), r"config.sweep.algorithm must be a tuple of some of \['a_gem', .*, got \('rigl',\)"),
  ('sweep.algorithm', ('ewc',), r'config.sweep.penalty must be positive for ewc, whose strength it is, got \(0.0,\).'),
  ('continual.sequence', 'sorted', r"config.continual.sequence must be one of \['mixed', .*, got 'sorted'."),
  ('continual.scenario', 'both', "config.continual.scenario must be one of .*'domain', 'task', 'class'.*, got 'both'."),
  ('continual.tasks', 1, 'config.continual.tasks must be at least 2, got 1.'),
  ('continual.gamma', 1.5, r'config.continual.gamma must be a share in \[0, 1\], got 1.5.'),
  ('continual.densities', (0.5, 0.2), r'config.continual.densities must be a tuple of increasing shares in .*, got \(0.5, 0.2\)'),
  ('continual.reinitialise', 'anew', "config.continual.reinitialise must be one of .*'fresh', 'left', 'zero'.*, got 'anew'."),
  ('continual.estimate', 'loss', "config.continual.estimate must be one of .*'accuracy', 'taylor'.*, got 'loss'."),
  ('sweep.sparsity', (0.5,), r"config.sweep.sparsity must be \(0.0,\) for the protocol 'continual', got \(0.5,\).")])
def test_mistakes(data_dir, key, value, message):
  with pytest.raises(UserError, match=message):
    protocol.check(make_config(data_dir, **{key: value}))


@pytest.mark.parametrize('change, message', [
  ({'sweep.algorithm': ('packnet',), 'continual.prune_rounds': 12},
   'config.continual.prune_rounds must be so many that each has a step, of the 10 of continual.retrain_share, got 12.'),
  ({'continual.sequence': 'rotated', 'continual.degrees': 540.0}, r'config.continual.degrees must be in \(0, 360\], got 540.0.'),
  ({'continual.sequence': 'rotated', 'continual.degrees': 0.0}, r'config.continual.degrees must be in \(0, 360\], got 0.0.')])
def test_mistakes_in_two_keys(data_dir, change, message):
  with pytest.raises(UserError, match=message):
    protocol.check(make_config(data_dir, **change))


def test_densities_that_keep_nothing_of_a_layer_are_refused_before_training(data_dir, tmp_path):
  config = make_config(data_dir, **{'continual.layerwise': True, 'continual.densities': (0.0005, 0.5)})
  with pytest.raises(UserError, match=r'config.continual.densities: density 0.0005 keeps less than one of \d+ weights.'):
    protocol.prepare(config, tmp_path)


def test_methods_are_named_in_the_documentation_of_the_module():
  from experiments.continual import methods
  assert all(name in methods.__doc__ for name in METHODS)


# ---- five tasks of two classes, some of fewer images than others, in a network that is full after three ---------------

PAIRS, APART = 5, ('packnet', 'joint', 'separate', 'fine_tune', 'ewc_online')


@pytest.fixture(scope='module')
def apart(compiled_quickly, compiled_once, data_dir, tmp_path_factory):
  """A workdir, and what was warned of. 32 images at once are fewer than a task has."""
  config = make_config(data_dir, **{
    'sweep.algorithm': APART, 'sweep.penalty': (0.5,), 'sweep.alpha': (1.0,), 'sweep.seed': (0,),
    'continual.sequence': 'split', 'continual.scenario': 'task', 'continual.tasks': PAIRS, 'steps': 12,
    'continual.share': 0.4, 'continual.prune_rounds': 2, 'continual.retrain_share': 0.5, 'continual.reinitialise': 'zero',
    'continual.restart': False, 'continual.matrix_every': 3, 'continual.fisher_images': 6, 'continual.inferred_images': 20})
  workdir = tmp_path_factory.mktemp('apart')
  with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings(record=True) as warned:
    warnings.simplefilter('always')
    patch.setattr(problem, 'IMAGES_AT_ONCE', 32)
    protocol.run(config, workdir)
  return workdir, [str(one.message) for one in warned if 'task' in str(one.message)]


def pair_of(workdir, step):
  """Method → its group in a checkpoint, of one network."""
  with ocp.StandardCheckpointer() as checkpointer:
    groups = checkpointer.restore(workdir / 'checkpoints' / str(step) / 'default')
  return {name: jax.tree.map(lambda x: x[0], group) for name, group in zip(APART, groups, strict=True)}


def right_of_pair(phi, task, masks=None):
  """By NumPy: guesses among the outputs of a task for its test images, as shares of their counts."""
  images, labels = (x[tiny.ARRAYS[3] // 2 == task] for x in tiny.ARRAYS[2:])
  x = images.reshape(len(images), 36) / 255
  for i, layer in enumerate(LAYERS):
    w = np.float64(phi[layer]['w'])
    x = x @ (w * masks[task] if masks is not None and i == 0 else w) + np.float64(phi[layer]['b'])
    x = np.maximum(x, 0) if i == 0 else x
  return np.mean(x[:, 2 * task:2 * task + 2].argmax(1) == labels % 2)


def bits_of(group):
  packed = np.asarray(group['memory']['tasks']['bits'][LAYERS[0]]['w'])
  return np.unpackbits(packed, axis=1, count=36 * 30).reshape(PAIRS, 36, 30).astype(bool)


def test_tasks_of_their_own_outputs(apart):
  workdir, _ = apart
  rows = {row['algorithm']: row for row in read(workdir / 'results.csv')}
  last = pair_of(workdir, 12 * PAIRS)
  for method in ('packnet', 'joint', 'fine_tune', 'ewc_online'):
    masks = bits_of(last[method]) if method == 'packnet' else None
    expected = np.mean([right_of_pair(last[method]['trained']['phi'], task, masks) for task in range(PAIRS)])
    assert float(rows[method]['test_accuracy']) == pytest.approx(expected, abs=1e-9), method


def test_separate_networks_begin_anew_and_stay_what_they_were(apart):
  workdir, _ = apart
  matrix = {(r['algorithm'], int(r['after']), int(r['task'])): float(r['test_accuracy']) for r in read(workdir / 'matrix.csv')}
  assert matrix['separate', 1, 1] == matrix['fine_tune', 1, 1]   # so far they are the same
  model = tiny.mlp(2 * PAIRS, 0.0)
  net = hk.transform_with_state(model.forward)
  for task in range(1, PAIRS):
    phi = pair_of(workdir, 12 * task)['separate']['trained']['phi']
    expected, _ = jax.jit(net.init, static_argnums=2)(jax.random.fold_in(train.init_key(0), task), np.zeros((1, 6, 6, 1)), True)
    jax.tree.map(np.testing.assert_array_equal, phi, hk.data_structures.to_mutable_dict(expected))
    for after in range(task + 1, PAIRS + 1):
      assert matrix['separate', after, task] == matrix['separate', task, task]


def test_which_tasks_are_tested_after_which(apart):
  """All after every third and the last; else the last and, where something is known of it, the next."""
  workdir, _ = apart
  for method, expected in (('joint', [(1, 1), (1, 2), (2, 2), (2, 3), *((3, t) for t in (1, 2, 3, 4)), (4, 4), (4, 5),
                                     *((5, t) for t in (1, 2, 3, 4, 5))]),
                           ('packnet', [(1, 1), (2, 2), (3, 1), (3, 2), (3, 3), (4, 4), *((5, t) for t in (1, 2, 3, 4, 5))])):
    found = [(int(r['after']), int(r['task'])) for r in read(workdir / 'matrix.csv') if r['algorithm'] == method]
    assert [pair for pair in found if pair[0]] == expected


def test_packnet_has_its_share_of_a_task_until_it_is_full(apart):
  """Two fifths of 1,080 weights: 432, 432, and the 216 that are left; then none, which is warned of."""
  workdir, warned = apart
  rows = read(workdir / 'capacity.csv')
  assert [round(float(row['new']) * 1080) for row in rows] == [432, 432, 216, 0, 0]
  assert [int(row['left']) for row in rows] == [648, 216, 0, 0, 0]
  assert [float(row['more']) for row in rows] == pytest.approx([1.5, 0.5, 0, 0, 0])
  assert warned[0] == ('config.continual.share=0.4 has room for 2 of the 5 tasks of packnet: those after them have what is left, '
                       'or nothing.')
  assert warned[1:] == [f'alpha=1 algorithm=packnet: no weight is free for task {task} in 1 of 1 network; it has those of '
                        'earlier tasks.' for task in (4, 5)]
  # What is free goes on from 0, by config; and the optimiser does not begin anew.
  packnet, joint = (pair_of(workdir, 12)[name] for name in ('packnet', 'joint'))
  weights, used = np.asarray(packnet['trained']['phi'][LAYERS[0]]['w']), bits_of(packnet)[0]
  assert not weights[~used].any() and weights[used].all()
  assert any(np.abs(x).max() > 1e-3 for x in jax.tree.leaves(joint['trained']['opt_state']) if np.ndim(x) == 2)


def test_the_task_of_an_image_is_the_one_of_least_entropy(apart):
  """Inferred among all five masks; an image is right when its task is found and its class among that task's outputs."""
  workdir, _ = apart
  group = pair_of(workdir, 12 * PAIRS)['packnet']
  masks, phi = bits_of(group), group['trained']['phi']
  found, right = [], []
  for task in range(PAIRS):
    images, labels = (x[tiny.ARRAYS[3] // 2 == task][:20] for x in tiny.ARRAYS[2:])
    entropy, guess = [], []
    for t in range(PAIRS):
      hidden = np.maximum(images.reshape(-1, 36) / 255 @ (np.float64(phi[LAYERS[0]]['w']) * masks[t])
                          + np.float64(phi[LAYERS[0]]['b']), 0)
      x = (hidden @ np.float64(phi[LAYERS[1]]['w']) + np.float64(phi[LAYERS[1]]['b']))[:, 2 * t:2 * t + 2]
      p = np.exp(x) / np.exp(x).sum(1, keepdims=True)
      entropy.append(-(p * np.log(p)).sum(1))
      guess.append(x.argmax(1))
    chosen = np.argmin(entropy, 0)
    found.append(np.mean(chosen == task))
    right.append(np.mean((chosen == task) & (np.array(guess)[chosen, np.arange(len(labels))] == labels % 2)))
  row = next(r for r in read(workdir / 'results.csv') if r['algorithm'] == 'packnet')
  assert float(row['inferred_accuracy']) == pytest.approx(np.mean(right), abs=1e-9)
  row = next(r for r in read(workdir / 'statistics.csv') if r['algorithm'] == 'packnet')
  assert float(row['tasks_found']) == pytest.approx(np.mean(found), abs=1e-9)


def test_free_weights_begin_anew_with_another_draw_for_each_task(finished, data_dir):
  """The default: Ψ⁻¹ of a new initialisation of this task and seed, where no mask is; and moments begin at 0."""
  workdir, *_ = finished
  net = hk.transform_with_state(tiny.mlp(tiny.CLASSES, 0.0).forward)
  with ocp.StandardCheckpointer() as checkpointer:
    group = checkpointer.restore(workdir / 'checkpoints' / str(2 * STEPS) / 'default')[1]
  for k in range(SEEDS):
    theta, _ = jax.jit(net.init, static_argnums=2)(jax.random.fold_in(train.init_key(k), 2), np.zeros((1, 6, 6, 1)), True)
    phi, masks = networks(workdir, 2 * STEPS)[2.0, 'efficient_packnet', k]
    for layer in LAYERS:
      free = ~masks[layer].any(0)
      new = np.float64(theta[layer]['w'])
      np.testing.assert_allclose(phi[layer]['w'][free], (np.sign(new) * np.sqrt(np.abs(new)))[free], rtol=1e-6)
  assert not any(np.abs(x).max() for x in jax.tree.leaves(group['trained']['opt_state']['inner']) if np.ndim(x) == 3)

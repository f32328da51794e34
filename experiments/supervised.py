"""Protocol: train every network of a sweep, prune after training, evaluate over densities, report."""
import functools
import itertools
import json
import pathlib
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import UTC, datetime
from typing import Any, NamedTuple

import haiku as hk
import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import optax
from jax.experimental import multihost_utils
from jax.sharding import Mesh

import powerprop
from experiments import data as datasets
from experiments import evaluate, report, train
from experiments import workdir as workdirs
from experiments.algorithms import ALGORITHMS, DISTRIBUTIONS, FIRST_MASKS, OWN_PARAMETERS
from experiments.augment import AUGMENTATIONS
from experiments.checkpoint import Checkpoints, pack, unpack
from experiments.errors import UserError
from experiments.models import BIASES, MODELS, Model
from experiments.optimizers import OPTIMIZERS, SCHEDULES, UPDATES, phi_decay
from experiments.progress import Progress, plural, say
from experiments.results import TRAINED, read_results, table
from powerprop import flops

STATIC_AXES: dict[str, Mapping[str, Any]] = {
    'optimizer': OPTIMIZERS, 'update': UPDATES, 'biases': BIASES, 'algorithm': ALGORITHMS}


class Setting(NamedTuple):
  """What training and evaluation of a config are made of; programs are compiled once, at their first use."""
  config: ml_collections.ConfigDict
  groups: list[train.Group]
  nets: train.Nets
  model: Model
  mesh: Mesh
  slots: list[train.Slots]
  data: dict[str, train.Batches]           # on every device: train, validation, test
  theta0: Any                              # initial weights [K, ...]
  costs: flops.Costs
  first: Callable[[], list[train.TrainState]]   # states before the first step
  epoch: Callable[..., Any]
  gather: Callable[[Any], Any]             # states by place → as they are in checkpoints
  scatter: Callable[[Any], Any]            # and back
  measure: dict[tuple[str, ...], Callable[..., evaluate.Evaluation]]   # by scopes
  described: str                           # where the data come from


def run(config: ml_collections.ConfigDict, workdir: pathlib.Path) -> None:
  """Trains, or goes on training, evaluates and reports. Raises UserError for a config that makes no sense."""
  check(config)
  origin = workdirs.provenance()   # now: the commit may be another one when the run ends
  started = time.monotonic()
  setting = prepare(config, make_groups, workdir)
  if setting is None:
    return
  ready = time.monotonic()
  states, spent, seconds = fit(setting, config.steps, workdir)
  trained = time.monotonic()
  outcome = evaluate_groups(setting, setting.groups, states)
  finished = time.monotonic()
  conclude(setting, workdir, origin, setting.groups, outcome, shares_of_dense(config.steps, setting.costs, spent, outcome),
           {'start': ready - started, 'training': seconds, 'evaluation': finished - trained})


def prepare(config: ml_collections.ConfigDict, grouped: Callable[[ml_collections.ConfigDict], list[train.Group]],
            workdir: pathlib.Path) -> Setting | None:
  """Everything but training, for the groups that `grouped` makes; None where the workdir holds the run, ended: its report is then
  drawn again."""
  data = datasets.load(config.dataset, config.data_dir)
  say(datasets.describe(data))
  splits = split(data, config.train_images, config.batch_size)
  model = MODELS[config.model](data.classes, config.bias_stddev)
  net = hk.transform_with_state(model.forward)
  groups, nets, image_shape = grouped(config), make_nets(config), splits['train'].images.shape[1:]
  check_sparsities(groups, net, image_shape)
  if jax.process_index() == 0:
    workdirs.bind(workdir, config)   # not before all of the config has been found good
  if (workdir / 'run.json').exists():   # written when all the numbers are
    if jax.process_index() == 0:
      say(f'{workdir} holds this run, which has ended; its report is drawn again.')
      finish(workdir)
    return None

  mesh = train.make_mesh()
  say(f'{plural(len(groups) * len(nets.seed), "network")} of {config.steps:,} steps in {plural(len(groups), "group")} on '
      f'{plural(mesh.size, f"{jax.devices()[0].platform} device")}.')
  slots = train.deal(nets, len(groups), mesh.size)
  on_device = {name: train.replicate(part, mesh) for name, part in splits.items()}
  theta0, net_state0 = train.make_weights(net, image_shape, mesh)(nets.seed)
  make_states = functools.partial(train.make_init(groups, slots, net, config.batch_size, mesh), theta0, net_state0,
                                  on_device['train'])
  whole = jax.eval_shape(lambda: train.gather(make_states(), slots))
  return Setting(
      config, groups, nets, model, mesh, slots, on_device, theta0,
      train.count_operations(net, theta0, net_state0, (config.batch_size, *image_shape)), make_states,
      train.make_epoch(groups, net, config.batch_size, mesh, AUGMENTATIONS[config.augment],
                       smoothing=config.label_smoothing),
      jax.jit(lambda tree: pack(train.gather(tree, slots)), out_shardings=train.replicated(mesh)),
      jax.jit(lambda tree: train.scatter(unpack(tree, whole), slots), out_shardings=train.by_net(mesh)),
      {scopes: evaluate.make_evaluate(net, scopes, mesh) for scopes in (tuple(config.prune.scopes), (TRAINED,))},
      datasets.describe(data))


def conclude(setting: Setting, workdir: pathlib.Path, origin: dict[str, Any], groups: Sequence[train.Group],
             outcome: Sequence[dict[str, Any]], shares: Sequence[dict[str, list[float]]], seconds: dict[str, float]) -> None:
  """Writes the files of a run that has ended, and its report."""
  if jax.process_index() == 0:
    sizes = {name: len(part.labels) for name, part in setting.data.items()}
    workdir_files(setting.config, setting.nets, sizes, workdir, groups, outcome, shares)
    write_run(workdir, origin | {'data': setting.described}, seconds)
    finish(workdir)


def finish(workdir: pathlib.Path) -> None:
  for path in report.write_report(workdir):
    say(f'wrote {path}')
  say(table(read_results(workdir)))


def check(config: ml_collections.ConfigDict) -> None:
  """Raises UserError naming the first key whose value cannot be used."""
  def value_of(key: str) -> Any:
    return functools.reduce(lambda part, name: part[name], key.split('.'), config)

  def need(ok: bool, key: str, allowed: str) -> None:
    if not ok:
      raise UserError(f'config.{key} must be {allowed}, got {value_of(key)!r}.')

  def is_number(x: Any) -> bool:
    return type(x) in (int, float)

  need(config.model in MODELS, 'model', f'one of {sorted(MODELS)}')
  for axis, values in config.sweep.items():
    need(isinstance(values, tuple) and len(values) > 0, f'sweep.{axis}', 'a tuple of at least one value, as "(1.0, 2.0)"')
    need(not any(v in values[:i] for i, v in enumerate(values)), f'sweep.{axis}', 'a tuple without repetitions')
  for axis, rows in STATIC_AXES.items():
    need(all(v in list(rows) for v in config.sweep[axis]), f'sweep.{axis}', f'a tuple of some of {sorted(rows)}')
  for key, rows in (('augment', AUGMENTATIONS), ('schedule', SCHEDULES), ('sparse.distribution', DISTRIBUTIONS)):
    need(value_of(key) in list(rows), key, f'one of {sorted(rows)}')
  need(all(is_number(s) and 0 <= s < 1 for s in config.sweep.sparsity), 'sweep.sparsity', 'a tuple of shares in [0, 1)')
  need(all(is_number(p) and 0 <= p < float('inf') for p in config.sweep.penalty), 'sweep.penalty',
       'a tuple of numbers of at least 0')
  for key in ('sparse.start_share', 'sparse.end_share', 'sparse.drop_fraction'):
    need(0 < value_of(key) <= 1, key, 'a share in (0, 1]')
  need(config.sparse.start_share <= config.sparse.end_share, 'sparse.end_share', 'at least sparse.start_share')
  need(type(config.sparse.rescale) is bool, 'sparse.rescale', 'True or False')
  need(config.sparse.entry >= 0, 'sparse.entry', 'at least 0')
  need(config.sparse.decay >= 0, 'sparse.decay', 'at least 0')
  need(config.sparse.backward_factor >= 1, 'sparse.backward_factor', 'at least 1')
  need(all(type(name) is str for name in config.sparse.dense), 'sparse.dense', "a tuple of patterns, as \"('conv2_d/w',)\"")
  need(all(is_number(a) and 1 <= a < float('inf') for a in config.sweep.alpha), 'sweep.alpha',
       'a tuple of numbers of at least 1')
  need(all(type(s) is int and 0 <= s < 2**31 for s in config.sweep.seed), 'sweep.seed', 'a tuple of integers in [0, 2**31)')
  need(all(is_number(r) and 0 < r < float('inf') for r in config.sweep.learning_rate), 'sweep.learning_rate',
       'a tuple of positive numbers')
  need(config.alpha_rates == () or (len(config.alpha_rates) == len(config.sweep.alpha) and len(config.sweep.learning_rate) == 1
                                    and all(is_number(r) and 0 < r < float('inf') for r in config.alpha_rates)), 'alpha_rates',
       '(), or a positive number for each of sweep.alpha and sweep.learning_rate a single one')
  for key in ('steps', 'batch_size', 'train_images', 'checkpoint_epochs', 'checkpoints_kept', 'prune.sampled_weights',
              'prune.recalibration_batches', 'sparse.every_steps'):
    need(value_of(key) > 0, key, 'positive')
  need(config.bias_stddev >= 0, 'bias_stddev', 'at least 0')
  need(config.phi_decay >= 0, 'phi_decay', 'at least 0')
  need(0 <= config.label_smoothing < 1, 'label_smoothing', 'a share in [0, 1)')
  densities, scopes = config.prune.densities, config.prune.scopes
  need(len(densities) > 0 and all(is_number(p) and 0 < p <= 1 for p in densities) and len(set(densities)) == len(densities),
       'prune.densities', 'a tuple of different shares in (0, 1]')
  need(0 < config.prune.figure_density <= 1, 'prune.figure_density', 'a share in (0, 1]')
  need(config.prune.output_factor > 0, 'prune.output_factor', 'positive')
  need(len(scopes) > 0 and all(s in evaluate.SCOPES for s in scopes) and len(set(scopes)) == len(scopes), 'prune.scopes',
       f'a tuple of some of {list(evaluate.SCOPES)}')
  need(all(kind in list(report.KINDS) for kind in config.report), 'report', f'a tuple of some of {sorted(report.KINDS)}')


def check_sparsities(groups: Sequence[train.Group], net: hk.TransformedWithState, image_shape: tuple[int, ...]) -> None:
  """Raises UserError for a sparsity, or layers to leave dense, that do not fit the network. Works on shapes alone."""
  theta, _ = jax.eval_shape(lambda key: net.init(key, np.zeros((1, *image_shape), np.float32), True), jax.random.key(0))
  for group in groups:
    if group.sparse and not group.first_masks:
      try:
        jax.eval_shape(lambda phi, g=group: g.optimizer(0.1, jax.random.key(0), None).init(phi), theta)
      except ValueError as error:
        raise UserError(f'{group.axes["algorithm"]}: {error}') from None


def split(data: datasets.Dataset, train_images: int, batch_size: int) -> dict[str, train.Batches]:
  """The first `train_images` for training, the rest of the training set for validation, the whole test set."""
  n = len(data.train_images)
  if not batch_size <= train_images < n:
    raise UserError(f'config.train_images must leave some of the {n:,} images for validation and fill a batch of '
                    f'{batch_size}, got {train_images}.')
  return {
      'train': train.Batches(data.train_images[:train_images], data.train_labels[:train_images]),
      'validation': train.Batches(data.train_images[train_images:], data.train_labels[train_images:]),
      'test': train.Batches(data.test_images, data.test_labels),
  }


def make_groups(config: ml_collections.ConfigDict) -> list[train.Group]:
  """One group for each combination of the axes that change the program; a single one for dense training."""
  axes = ('alpha', *STATIC_AXES, 'sparsity')
  combinations = [dict(zip(axes, values, strict=True)) for values in itertools.product(*(config.sweep[axis] for axis in axes))]
  for one in combinations:
    one['sparsity'] = one['sparsity'] if ALGORITHMS[one['algorithm']] else 0.0
  return [make_group(config, one) for i, one in enumerate(combinations) if one not in combinations[:i]]


def make_group(config: ml_collections.ConfigDict, axes: dict[str, Any]) -> train.Group:
  where = is_factor if axes['algorithm'] == 'square_difference' else BIASES[axes['biases']]
  reparam = powerprop.powerpropagation(axes['alpha'], where)

  def dense(rate):
    rate = rate_of(config, axes) or rate
    chain = UPDATES[axes['update']](OPTIMIZERS[axes['optimizer']](rate, config), reparam)
    return optax.chain(chain, phi_decay(rate, config)) if config.phi_decay else chain

  make, own_parameters = ALGORITHMS[axes['algorithm']], OWN_PARAMETERS.get(axes['algorithm'])
  if make is None:
    own = own_parameters and own_parameters()
    return train.Group(axes, reparam, lambda rate, key, first: dense(rate), own=own)
  weights = reparam._replace(where=powerprop.powerpropagation(axes['alpha']).where)   # biases are never masked
  updater = make(axes['sparsity'], config)
  scored = FIRST_MASKS.get(axes['algorithm'])

  def sparse(rate, key, first):
    rule = powerprop.updaters.given(first) if scored else updater
    return powerprop.sparsify(dense(rate), rule, weights, key, config.sparse.entry)
  return train.Group(axes, reparam, sparse, True, updater.dense_gradient, scored and scored(axes['sparsity'], config),
                     config.sparse.rescale)


def is_factor(name: str, leaf: Any) -> bool:
  """v and u of v⊙v − u⊙u."""
  return name.endswith(('/w_v', '/w_u'))


def rate_of(config: ml_collections.ConfigDict, axes: Mapping[str, Any]) -> float | None:
  """The learning rate of the group's power, where powers have rates of their own."""
  return config.alpha_rates[config.sweep.alpha.index(axes['alpha'])] if config.alpha_rates else None


def make_nets(config: ml_collections.ConfigDict) -> train.Nets:
  sweep = config.sweep
  columns = zip(*itertools.product(sweep.seed, sweep.learning_rate, sweep.penalty), strict=True)
  return train.Nets(*(np.array(column, dtype) for column, dtype in zip(columns, (np.int32, np.float32, np.float32), strict=True)))


def fit(setting: Setting, steps: int, workdir: pathlib.Path,
        begin: tuple[int, list[train.TrainState]] | None = None) -> tuple[list[train.TrainState], np.ndarray, float]:
  """States after so many steps, from the newest checkpoint on; the operations that each network [groups, K] and the seconds that
  all have taken, over all runs on `workdir`.

  `begin`: a step, and states to begin with there. A checkpoint holds the networks in their own order, so it can be read on
  another number of devices.
  """
  config, groups, slots, data = setting.config, setting.groups, setting.slots, setting.data['train']
  steps_per_epoch = data.labels.shape[0] // config.batch_size
  nets, counts = [s.nets for s in slots], [s.number for s in slots]
  # Training overwrites what it begins with.
  done, states = (begin[0], jax.tree.map(jnp.copy, begin[1])) if begin else (0, setting.first())

  checkpoints = Checkpoints(workdir / 'checkpoints', config.checkpoints_kept)
  if (found := checkpoints.restore(setting.gather(states))) is not None:
    done, states = found[0], setting.scatter(found[1])
    say(f'goes on from step {done:,}.')
  elif (workdir / 'metrics.jsonl').exists():
    say('was stopped before its first checkpoint: begins anew.')
  metrics = workdirs.Metrics(workdir, done) if jax.process_index() == 0 else None
  before = metrics.last if metrics else {}
  progress = Progress(steps, done, sum(len(s.place) for s in slots), before.get('seconds', 0.0))
  names = [group_name(g, config) for g in groups]
  begun = before.get('operations', {})
  spent = np.array([begun.get(name, [0.0] * len(slot.place)) for name, slot in zip(names, slots, strict=True)])

  def note(step, taken, tallies):
    tallies = train.gather(to_host(tallies), slots)
    losses = np.stack([tally.loss for tally in tallies])
    spent[:] += [train.operations(setting.costs, taken, tally) for tally in tallies]
    if metrics:
      # A network that has diverged: JSON has no NaN, and TensorBoard's writer complains of it.
      listed = [[x if np.isfinite(x) else None for x in row] for row in losses.tolist()]
      tags = ['train_loss/' + name.replace('=', '_').replace(' ', '/') for name in names]
      metrics.write(step, {'seconds': round(progress.seconds, 3), 'train_loss': dict(zip(names, listed, strict=True)),
                           'operations': dict(zip(names, spent.tolist(), strict=True))},
                    {tag: float(x) for tag, x in zip(tags, losses.mean(axis=1), strict=True) if np.isfinite(x)})
    progress.show(step, losses)

  pending = None
  say('compiling; then progress after each epoch.')
  for number, first, last in epochs(done, steps, steps_per_epoch):
    states, tallies = setting.epoch(states, nets, counts, data, number, first, last)
    if pending:
      note(*pending)   # the device works on the next epoch meanwhile
    step = number * steps_per_epoch + last
    pending = step, last - first, tallies
    if (last == steps_per_epoch and (number + 1) % config.checkpoint_epochs == 0) or step == steps:
      note(*pending)   # metrics first: a checkpoint stands for all that came before it
      pending = None
      checkpoints.save(step, setting.gather(states))
  progress.end()
  checkpoints.close()
  if metrics:
    metrics.close()
  return states, spent, progress.seconds


def shares_of_dense(steps: int, costs: flops.Costs, spent: np.ndarray,
                    outcome: Sequence[dict[str, Any]]) -> list[dict[str, list[float]]]:
  """What a forward pass, and the training, of each network take of the operations of a dense one: [K] for each group."""
  forward, training = flops.forward(costs), steps * flops.training_step(costs)

  def share(kept, k):
    return flops.forward(costs, flops.densities(costs, jax.tree.map(lambda n: int(n[k]), kept)) if kept else {}) / forward
  return [{'forward_operations': [share(found['kept'], k) for k in range(len(one))],
           'training_operations': [round(x / training, 9) for x in one.tolist()]}
          for one, found in zip(spent, outcome, strict=True)]


def epochs(done: int, steps: int, steps_per_epoch: int) -> Iterator[tuple[int, int, int]]:
  """(epoch, first step in it, last step in it + 1) from step `done` to `steps`."""
  while done < steps:
    number, first = divmod(done, steps_per_epoch)
    last = min(steps_per_epoch, steps - number * steps_per_epoch)
    yield number, first, last
    done = number * steps_per_epoch + last


def group_name(group: train.Group, config: ml_collections.ConfigDict) -> str:
  """What tells the group from the others of its sweep: 'alpha=2', 'alpha=2 update=backpropagation'."""
  told = [f'{axis}={value}' for axis, value in group.axes.items() if axis != 'alpha' and len(config.sweep[axis]) > 1]
  return ' '.join([f'alpha={group.axes["alpha"]:g}', *told])


def to_host(tree: Any) -> Any:
  """The whole arrays on this host, wherever their parts lie."""
  if jax.process_count() > 1:
    return multihost_utils.process_allgather(tree, tiled=True)
  return jax.tree.map(np.asarray, tree)


def evaluate_groups(setting: Setting, groups: Sequence[train.Group], states: Sequence[train.TrainState]) -> list[dict[str, Any]]:
  """For each group its `Evaluation` of all networks on the host, and the weights that figures 1c and 1d show."""
  config, model, theta0, data, mesh = setting.config, setting.model, setting.theta0, setting.data, setting.mesh
  prune = config.prune
  shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape[1:], x.dtype), theta0)
  def counts_of(densities):
    return evaluate.layer_counts(shapes, densities, model.output_layer, prune.output_factor)
  counts = jax.tree.map(lambda *k: np.array(k, np.int32), *counts_of(prune.densities))
  figure_counts = counts_of([prune.figure_density])[0]
  by_place = jax.jit(lambda tree, index: jax.tree.map(lambda x: x[index], tree), out_shardings=train.by_net(mesh))
  rows = np.random.default_rng(0).choice(len(data['train'].labels), (prune.recalibration_batches, config.batch_size))
  batches = jax.jit(lambda images, rows: images[rows], out_shardings=train.replicated(mesh))(data['train'].images, rows)

  def one_net(theta0, theta, trained, at):
    before, after, mask = (jax.tree.map(lambda x: x[at], tree) for tree in (theta0, theta, trained))
    return before, after, evaluate.select(after, figure_counts, 'layer') if mask is None else mask
  shown = jax.jit(one_net, out_shardings=train.replicated(mesh))

  outcome = []
  for i, (group, slot, state) in enumerate(zip(groups, setting.slots, states, strict=True)):
    final = jax.jit(jax.vmap(lambda s, g=group: (train.final_weights(g, s.phi), train.final_masks(g, s))),
                    out_shardings=train.by_net(mesh))
    before, (after, trained) = by_place(theta0, slot.source), final(state)
    scopes = scopes_of(group, config)
    measured = setting.measure[scopes](before, after, state.net_state, trained, slot.number, counts, figure_counts, batches,
                                data['validation'], data['test'])
    theta_before, theta_after, survivors = to_host(shown(before, after, trained, slot.place[0]))
    outcome.append({'evaluation': train.gather([to_host(measured)], [slot])[0],
                    'sample': evaluate.sample_weights(theta_before, theta_after, survivors, prune.sampled_weights),
                    'kept': {} if trained is None else to_host(jax.jit(jax.vmap(powerprop.masks.counts))(
                        train.gather([trained], [slot])[0])),
                    'weights': sum(x.size for x in jax.tree.leaves(survivors))})
    say(f'evaluated group {i + 1}/{len(groups)}: {group_name(group, config)}')
  return outcome


def scopes_of(group: train.Group, config: ml_collections.ConfigDict) -> tuple[str, ...]:
  """How the networks of a group are pruned after training; those that are sparse already are not."""
  return (TRAINED,) if group.sparse or (group.own and group.own.zeros) else tuple(config.prune.scopes)


def workdir_files(config: ml_collections.ConfigDict, nets: train.Nets, sizes: Mapping[str, float], workdir: pathlib.Path,
                  groups: Sequence[train.Group], outcome: Sequence[dict[str, Any]],
                  shares_of_dense: Sequence[dict[str, list[float]]]) -> None:
  """results.csv, overlap.csv, statistics.csv and weights.npz: everything that the report is made of. `sizes`: numbers of images
  for 'validation' and 'test'."""
  results, overlap, statistics = [], [], []
  for group, found, cost in zip(groups, outcome, shares_of_dense, strict=True):
    e = found['evaluation']
    for k, (seed, rate, penalty) in enumerate(zip(nets.seed.tolist(), nets.learning_rate, nets.penalty, strict=True)):
      own = rate_of(config, group.axes)
      axes = {'alpha': float(group.axes['alpha']), 'seed': seed, 'learning_rate': float(str(own or rate)),
              **{axis: group.axes[axis] for axis in (*STATIC_AXES, 'sparsity')}, 'penalty': float(str(penalty))}
      statistics.append(axes | {name: float(v[k]) for name, v in e.statistics.items()}
                        | {name: v[k] for name, v in cost.items()})
      scopes = scopes_of(group, config)
      densities = [float(e.kept[k, 0, 0]) / found['weights']] if scopes == (TRAINED,) else config.prune.densities
      for (s, scope), (d, density) in itertools.product(enumerate(scopes), enumerate(densities)):
        row = axes | {'scope': scope, 'density': density}
        # A network of NaN puts all images into one class; its tenth of hits would pass for an accuracy.
        shares = {'validation_accuracy': int(e.validation[k, s, d]) / sizes['validation'],
                  'test_accuracy': int(e.test[k, s, d]) / sizes['test'], 'overlap': float(str(e.overlap[k, s, d]))}
        shares = shares if e.finite[k] else dict.fromkeys(shares, float('nan'))
        overlap.append(row | {'overlap': shares.pop('overlap')})
        results.append(row | {'kept': int(e.kept[k, s, d]), 'weights': found['weights']} | shares)
  for name, rows in (('results', results), ('overlap', overlap), ('statistics', statistics)):
    workdirs.write_csv(workdir / f'{name}.csv', rows)
  # The notebook has one group for each α; of several settings the first is shown.
  shown = {group.axes['alpha']: found['sample'] for group, found in reversed(list(zip(groups, outcome, strict=True)))}
  arrays = {f'{name}_{i}': x for i, alpha in enumerate(sorted(shown)) for name, x in shown[alpha].items()}
  workdirs.write_npz(workdir / 'weights.npz', alpha=np.array(sorted(shown), np.float64),
                     density=np.float64(config.prune.figure_density), **arrays)


def write_run(workdir: pathlib.Path, origin: dict[str, Any], seconds: dict[str, float]) -> None:
  record = origin | {'seconds': {k: round(v, 1) for k, v in seconds.items()},
                     'finished': datetime.now(UTC).isoformat(timespec='seconds')}
  workdirs.write_atomic(workdir / 'run.json', json.dumps(record, indent=2) + '\n')

"""Protocol: train every network of a sweep, prune after training, evaluate over densities, report."""
import functools
import pathlib
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh

import powerprop
from experiments import data as datasets
from experiments import evaluate, models, run_files, sweep, train
from experiments import workdir as workdirs
from experiments.augment import AUGMENTATIONS
from experiments.checkpoint import Checkpoints, pack, unpack
from experiments.errors import UserError
from experiments.models import Model
from experiments.progress import Progress, plural, say
from experiments.results import TRAINED
from powerprop import flops


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
  sweep.check(config)
  origin = workdirs.provenance()   # now: the commit may be another one when the run ends
  started = time.monotonic()
  setting = prepare(config, sweep.make_groups, workdir)
  if setting is None:
    return
  ready = time.monotonic()
  states, spent, seconds = fit(setting, config.steps, workdir)
  trained = time.monotonic()
  outcome = evaluate_groups(setting, setting.groups, states)
  finished = time.monotonic()
  shares = run_files.shares_of_dense(config.steps, setting.costs, spent, outcome)
  conclude(setting, workdir, origin, setting.groups, outcome, shares,
           {'start': ready - started, 'training': seconds, 'evaluation': finished - trained})


def prepare(config: ml_collections.ConfigDict, grouped: Callable[[ml_collections.ConfigDict], list[train.Group]],
            workdir: pathlib.Path) -> Setting | None:
  """Everything but training, for the groups that `grouped` makes; None where the workdir holds the run, ended: its report is then
  drawn again."""
  data = datasets.load(config.dataset, config.data_dir)
  say(datasets.describe(data))
  splits = split(data, config.train_images, config.batch_size)
  model, net = models.build(config, data.classes)
  groups, nets, image_shape = grouped(config), sweep.make_nets(config), splits['train'].images.shape[1:]
  sweep.check_sparsities(groups, net, image_shape)
  if run_files.has_ended(workdir, config):   # not before all of the config has been found good
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
    run_files.workdir_files(setting.config, setting.nets, sizes, workdir, groups, outcome, shares)
    run_files.write_run(workdir, origin | {'data': setting.described}, seconds)
    run_files.finish(workdir)


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
  names = [sweep.group_name(g, config) for g in groups]
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


def epochs(done: int, steps: int, steps_per_epoch: int) -> Iterator[tuple[int, int, int]]:
  """(epoch, first step in it, last step in it + 1) from step `done` to `steps`."""
  while done < steps:
    number, first = divmod(done, steps_per_epoch)
    last = min(steps_per_epoch, steps - number * steps_per_epoch)
    yield number, first, last
    done = number * steps_per_epoch + last


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
  batches = jax.jit(lambda images: evaluate.recalibration_batches(images, prune.recalibration_batches, config.batch_size,
                                                                  AUGMENTATIONS[config.augment]),
                    out_shardings=train.replicated(mesh))(data['train'].images)

  def one_net(theta0, theta, trained, at):
    before, after, mask = (jax.tree.map(lambda x: x[at], tree) for tree in (theta0, theta, trained))
    return before, after, evaluate.select(after, figure_counts, 'layer') if mask is None else mask
  shown = jax.jit(one_net, out_shardings=train.replicated(mesh))

  outcome = []
  for i, (group, slot, state) in enumerate(zip(groups, setting.slots, states, strict=True)):
    final = jax.jit(jax.vmap(lambda s, g=group: (train.final_weights(g, s.phi), train.final_masks(g, s))),
                    out_shardings=train.by_net(mesh))
    before, (after, trained) = by_place(theta0, slot.source), final(state)
    scopes = sweep.scopes_of(group, config)
    measured = setting.measure[scopes](before, after, state.net_state, trained, slot.number, counts, figure_counts, batches,
                                data['validation'], data['test'])
    theta_before, theta_after, survivors = to_host(shown(before, after, trained, slot.place[0]))
    outcome.append({'evaluation': train.gather([to_host(measured)], [slot])[0],
                    'sample': evaluate.sample_weights(theta_before, theta_after, survivors, prune.sampled_weights),
                    'kept': {} if trained is None else to_host(jax.jit(jax.vmap(powerprop.masks.counts))(
                        train.gather([trained], [slot])[0])),
                    'weights': sum(x.size for x in jax.tree.leaves(survivors))})
    say(f'evaluated group {i + 1}/{len(groups)}: {sweep.group_name(group, config)}')
  return outcome

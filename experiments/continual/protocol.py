"""Protocol: task after task. After each, every network is tested on the tasks so far.

  for each task:   train; at `retrain_share` before its end find its mask (packnet, efficient_packnet) and train on under it;
                   consolidate; test; make ready for the next

All networks of a config train side by side, on the same tasks and batches. A checkpoint holds everything, what was measured
included, so a run that was stopped goes on by the same command and ends with the same numbers, bit for bit.
"""
import contextlib
import functools
import pathlib
import time
import warnings
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import jax
import ml_collections
import numpy as np
from jax.sharding import Mesh

from experiments import models, run_files, sweep, train
from experiments import workdir as workdirs
from experiments.checkpoint import Checkpoints, pack, unpack
from experiments.continual import files, packing, programs
from experiments.continual.methods import METHODS
from experiments.continual.problem import Heads, Problem, State
from experiments.data import tasks as sequences
from experiments.errors import UserError
from experiments.progress import Progress, plural, say
from experiments.supervised import epochs, to_host


class Setting(NamedTuple):
  config: ml_collections.ConfigDict
  tasks: sequences.Tasks
  problems: list[Problem]    # one for each group
  nets: train.Nets
  mesh: Mesh
  slots: list[train.Slots]
  data: programs.Data        # on every device
  theta0: Any
  first: Any                 # () → states before the first task
  programs: programs.Programs
  gather: Any                # states by place → as they are in checkpoints
  scatter: Any               # and back


def run(config: ml_collections.ConfigDict, workdir: pathlib.Path) -> None:
  """Learns all tasks, or goes on with them, and reports. Raises UserError for a config that makes no sense."""
  check(config)
  origin, started = workdirs.provenance(), time.monotonic()
  setting = prepare(config, workdir)
  if setting is None:
    return
  ready = time.monotonic()
  states, seconds = fit(setting, workdir)
  if jax.process_index() == 0 or jax.process_count() > 1:
    whole = to_host(jax.jit(lambda s: train.gather(s, setting.slots), out_shardings=train.replicated(setting.mesh))(states))
  if jax.process_index() == 0:
    files.write(config, setting.tasks, setting.problems, setting.nets, whole, workdir)
    run_files.write_run(workdir, origin | {'data': setting.tasks.described}, {'start': ready - started, 'training': seconds})
    run_files.finish(workdir)


def check(config: ml_collections.ConfigDict) -> None:
  """Raises UserError naming the first key whose value cannot be used."""
  sweep.check(config)
  wanted = config.continual

  def need(ok: bool, key: str, allowed: str) -> None:
    if not ok:
      raise UserError(f'config.continual.{key} must be {allowed}, got {wanted[key]!r}.')
  for key, known in (('sequence', sorted(sequences.SEQUENCES)), ('scenario', ['domain', 'task', 'class']),
                     ('search', ['list', 'binary']), ('estimate', ['accuracy', 'taylor']),
                     ('reinitialise', ['fresh', 'left', 'zero']), ('rest', ['frozen', 'own'])):
    need(wanted[key] in known, key, f'one of {known}')
  if wanted.sequence == 'mixed':
    need(wanted.tasks == len(wanted.datasets), 'tasks', f'the number of continual.datasets, {len(wanted.datasets)}')
  need(wanted.tasks >= 2, 'tasks', 'at least 2')
  need(wanted.sequence != 'rotated' or 0 < wanted.degrees <= 360, 'degrees', 'in (0, 360]')
  need(wanted.sequence_seed >= 0, 'sequence_seed', 'at least 0')
  for key in ('matrix_every', 'prune_rounds', 'fisher_images', 'memory_images', 'inferred_images'):
    need(wanted[key] >= 1, key, 'at least 1')
  for key in ('retrain_share', 'share'):
    need(0 <= wanted[key] < 1, key, 'a share in [0, 1)')
  need(not any(METHODS[name].prune for name in config.sweep.algorithm) or cuts(config)[0] >= 1, 'retrain_share',
       f'a share that leaves at least one of {config.steps} steps before it')
  need(wanted.prune_rounds == 1 or 'packnet' not in config.sweep.algorithm
       or len({*cuts(config), config.steps}) > wanted.prune_rounds, 'prune_rounds',
       f'so many that each has a step, of the {round(wanted.retrain_share * config.steps)} of continual.retrain_share')
  need(0 <= wanted.gamma <= 1, 'gamma', 'a share in [0, 1]')
  need(0 <= wanted.ewc_decay <= 1, 'ewc_decay', 'a share in [0, 1]')
  need(wanted.damping > 0, 'damping', 'positive')
  need(wanted.search_steps >= 0, 'search_steps', 'at least 0')
  s = wanted.densities
  need(len(s) > 0 and list(s) == sorted(set(s)) and s[0] > 0 and s[-1] <= 1, 'densities',
       'a tuple of increasing shares in (0, 1]')
  need(wanted.restart or config.schedule == 'constant', 'restart', f'True where config.schedule is {config.schedule!r}')
  for name in config.sweep.algorithm:
    if METHODS[name].pulls and not all(config.sweep.penalty):
      raise UserError(f'config.sweep.penalty must be positive for {name}, whose strength it is, got {config.sweep.penalty!r}.')
    if METHODS[name].separate and wanted.scenario == 'class':
      raise UserError(f"config.continual.scenario must be 'task' or 'domain' for {name}, which is told the task in testing, got "
                      "'class'; what it reaches without being told is inferred_accuracy.")
  if 'packnet' in config.sweep.algorithm and wanted.share * wanted.tasks > 1 + 1e-6:
    warnings.warn(f'config.continual.share={wanted.share:g} has room for {int(1 / wanted.share + 1e-6)} of the {wanted.tasks} '
                  'tasks of packnet: those after them have what is left, or nothing.', stacklevel=2)
  if config.label_smoothing:
    raise UserError(f"config.label_smoothing must be 0 for the protocol 'continual', got {config.label_smoothing!r}.")
  if config.sweep.sparsity != (0.0,):
    raise UserError(f"config.sweep.sparsity must be (0.0,) for the protocol 'continual', got {config.sweep.sparsity!r}.")


def prepare(config: ml_collections.ConfigDict, workdir: pathlib.Path) -> Setting | None:
  """Everything but training; None where the workdir holds the run, ended: its report is then drawn again."""
  tasks = sequences.load(config)
  say(tasks.described)
  scenario = config.continual.scenario
  if tasks.apart == (scenario == 'domain'):
    say(f"note: {'tasks of different classes share' if tasks.apart else 'tasks of the same classes do not share'} their outputs.")
  heads = Heads(scenario, tasks.classes, len(tasks.names))
  model, net = models.build(config, heads.units)
  problems = [Problem(config, net, group, METHODS[group.axes['algorithm']], heads, model.output_layer, model.batch_norm, {}, None)
              for group in sweep.make_groups(config)]
  nets = sweep.make_nets(config)
  if run_files.has_ended(workdir, config):   # not before all of the config has been found good
    return None

  mesh = train.make_mesh()
  say(f'{plural(len(problems) * len(nets.seed), "network")}, {plural(heads.tasks, "task")} of {config.steps:,} steps each, in '
      f'{plural(len(problems), "group")} on {plural(mesh.size, f"{jax.devices()[0].platform} device")}.')
  slots = train.deal(nets, len(problems), mesh.size)
  data = train.replicate(programs.Data(tasks.parts, tasks.pixels), mesh)
  theta0, net_state0 = train.make_weights(net, tasks.parts['train'].images.shape[1:], mesh)(nets.seed)
  made = programs.make(problems, slots, mesh)
  first = functools.partial(made.init, theta0, net_state0, data)
  whole = jax.eval_shape(lambda: train.gather(first(), slots))
  return Setting(config, tasks, problems, nets, mesh, slots, data, theta0, first, made,
                 jax.jit(lambda tree: pack(train.gather(tree, slots)), out_shardings=train.replicated(mesh)),
                 jax.jit(lambda tree: train.scatter(unpack(tree, whole), slots), out_shardings=train.by_net(mesh)))


# ---- training -------------------------------------------------------------------------------------------------------


def cuts(config: ml_collections.ConfigDict) -> list[int]:
  """Steps of a task after which masks are chosen: a step for each round."""
  rounds, retrain = config.continual.prune_rounds, config.continual.retrain_share * config.steps
  return [config.steps - round(retrain * (rounds - r) / rounds) for r in range(rounds)]


def pieces(done: int, steps: int, steps_per_epoch: int, at: list[int]) -> Iterator[tuple[int, int, int, int]]:
  """(epoch, first step in it, last step in it + 1, steps of the task then) from step `done` of a task to `steps`; epochs, cut
  where `at` says."""
  for stop in sorted({*(c for c in at if done < c < steps), steps}):
    for number, first, last in epochs(done, stop, steps_per_epoch):
      yield number, first, last, number * steps_per_epoch + last
    done = stop


def fit(setting: Setting, workdir: pathlib.Path) -> tuple[list[State], float]:
  """States after the last task, from the newest checkpoint on, and the seconds that all runs on `workdir` have taken."""
  config, slots, steps, size = setting.config, setting.slots, setting.config.steps, len(setting.tasks.names)
  steps_per_epoch = setting.data.parts['train'].rows.shape[1] // config.batch_size
  at = cuts(config) if any(p.method.prune for p in setting.problems) else []
  checkpoints = Checkpoints(workdir / 'checkpoints', config.checkpoints_kept)
  done, states = 0, setting.first()
  if (found := checkpoints.restore(setting.gather(states))) is not None:
    done, states = found[0], setting.scatter(found[1])
    say(f'goes on from step {done % steps:,} of task {done // steps + 1}.' if done < size * steps else 'had learned all tasks.')
  elif (workdir / 'metrics.jsonl').exists():
    say('was stopped before its first checkpoint: begins anew.')
  if done == 0:
    states = setting.programs.measure(states, setting.data, -1, True, False)

  with contextlib.ExitStack() as stack:
    metrics = workdirs.Metrics(workdir, done) if jax.process_index() == 0 else None
    if metrics:
      stack.callback(metrics.close)
    before = metrics.last if metrics else {}
    progress = Progress(size * steps, done, sum(len(s.place) for s in slots), before.get('seconds', 0.0))
    say('compiling; then progress after each epoch.')
    pending = None
    for task in range(done // steps, size):
      if task:
        warn_of_full(setting, states, task)
      for number, first, last, step in pieces(max(done - task * steps, 0), steps, steps_per_epoch, at):
        trained = setting.programs.epoch(states, setting.data, task, number, first, last)
        states, losses = [s for s, _ in trained], [loss for _, loss in trained]
        if pending:
          note(setting, metrics, progress, *pending)   # the devices work on the next part meanwhile
        pending = task * steps + step, losses
        for turn in [r for r, cut in enumerate(at) if cut == step]:
          states = setting.programs.prune(states, setting.data, task, turn)
          if turn == 0:
            warn_of_failed(setting, states, task)
        if step == steps:
          states = end_of_task(setting, states, task)
        if step == steps or (last == steps_per_epoch and (number + 1) % config.checkpoint_epochs == 0):
          note(setting, metrics, progress, *pending)   # metrics first: a checkpoint stands for all that came before it
          pending = None
          checkpoints.save(task * steps + step, setting.gather(states))
    progress.end()
    checkpoints.close()
    return states, progress.seconds


def end_of_task(setting: Setting, states: list[State], task: int) -> list[State]:
  """What was learned is made to last, every network is tested, and made ready for the next task, if there is one."""
  made, data, last = setting.programs, setting.data, task + 1 == len(setting.tasks.names)
  states = made.consolidate(states, data, task)
  states = made.measure(states, data, task, last or (task + 1) % setting.config.continual.matrix_every == 0, last)
  return states if last else made.switch(states, data, task + 1)


def note(setting: Setting, metrics: workdirs.Metrics | None, progress: Progress, step: int, losses: Sequence[Any]) -> None:
  """A line of metrics, and how far it is."""
  rows = np.stack([to_host(x)[s.place] for x, s in zip(losses, setting.slots, strict=True)])
  names = [sweep.group_name(p.group, setting.config) for p in setting.problems]
  if metrics:
    listed = [[x if np.isfinite(x) else None for x in row] for row in rows.tolist()]   # JSON has no NaN
    tags = ['train_loss/' + name.replace('=', '_').replace(' ', '/') for name in names]
    metrics.write(step, {'seconds': round(progress.seconds, 3), 'task': (step - 1) // setting.config.steps + 1,
                         'train_loss': dict(zip(names, listed, strict=True))},
                  {tag: float(x) for tag, x in zip(tags, rows.mean(1), strict=True) if np.isfinite(x)})
  progress.show(step, rows)


def warn_of_failed(setting: Setting, states: Sequence[State], task: int) -> None:
  """Of networks in which no mask was good enough."""
  which = {'accuracy': 'even the densest mask', 'taylor': 'the mask that the estimate chose'}[setting.config.continual.estimate]
  for name, memory, count in _with_masks(setting, states):
    if failed := int(np.sum(~memory.met[:, task])):
      warnings.warn(f'{name}: on task {task + 1} {which} is not above gamma={setting.config.continual.gamma:g} times the '
                    f'accuracy of all weights in {failed} of {count}; it is kept.', stacklevel=2)


def warn_of_full(setting: Setting, states: Sequence[State], task: int) -> None:
  """Of networks in which nothing is free for a task that begins. Those beside them may have room, so the run goes on; what they
  have learned stays as it is, and all that they learn of the task is outputs of its own."""
  for name, memory, count in _with_masks(setting, states):
    if full := int(np.sum(memory.left == 0)):
      warnings.warn(f'{name}: no weight is free for task {task + 1} in {full} of {count}; it has those of earlier tasks.',
                    stacklevel=2)


def _with_masks(setting: Setting, states: Sequence[State]) -> Iterator[tuple[str, packing.Packed, str]]:
  """Name, memories on the host, and number of networks, of each group that keeps masks."""
  for p, state, slot in zip(setting.problems, states, setting.slots, strict=True):
    if p.method.packs:
      known = state.memory._replace(tasks=(), forward=())   # the numbers alone
      yield (sweep.group_name(p.group, setting.config), jax.tree.map(lambda x, s=slot: to_host(x)[s.place], known),
             plural(len(slot.place), 'network'))

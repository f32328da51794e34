"""Protocol: one network on all devices of all hosts, on photographs that are read and decoded while it trains.

The training state, step and updaters are those of the sweeps (experiments/train.py); here the step is one program a call. The
host runs ahead of the devices: nothing that is logged is waited for, but where a checkpoint or an accuracy is due.
"""
import collections
import contextlib
import functools
import pathlib
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
from jax.experimental import multihost_utils

from experiments import commands, photographs, programs, run_files, sweep, train
from experiments import workdir as workdirs
from experiments.checkpoint import Checkpoints
from experiments.data import images
from experiments.errors import UserError
from experiments.photographs import Loads, hosts
from experiments.programs import Guard, Setting
from experiments.progress import Progress, say
from experiments.streamed_evaluate import Evaluator, final_evaluation
from powerprop import flops
from powerprop.reparam import leaf_name

ODD = {images.CONVERTED: 'converted_images', images.REPLACED: 'replaced_images'}   # in metrics: of all hosts and steps so far
IN_FLIGHT = 4            # steps that the host may be ahead of the devices

# Dense operations a second at best, multiplication and addition counted as two, by what JAX calls the device: bfloat16, and
# float32 as JAX multiplies by default (TF32 on these GPUs). From the makers' data sheets. The first whose name it begins with.
PEAKS = {'NVIDIA A100': (312e12, 156e12), 'NVIDIA H100 PCIe': (756e12, 378e12), 'NVIDIA H100 NVL': (835e12, 418e12),
         'NVIDIA H100': (989e12, 495e12), 'NVIDIA H200 NVL': (835e12, 418e12), 'NVIDIA H200': (989e12, 495e12),
         'TPU v4': (275e12, 275e12), 'TPU v5 lite': (197e12, 197e12), 'TPU v5': (459e12, 459e12)}   # the last is v5p


def run(config: ml_collections.ConfigDict, workdir: pathlib.Path) -> None:
  """Trains, or goes on training, evaluates and reports. Raises UserError for a config that makes no sense."""
  check(config)
  origin = workdirs.provenance()
  started = time.monotonic()
  setting = programs.prepare(config)
  loads = photographs.open_images(config)
  if run_files.has_ended(workdir, config):
    return
  ready = time.monotonic()
  state, spent, seconds = fit(setting, loads, workdir)
  trained = time.monotonic()
  found = commands.heeding(lambda: final_evaluation(setting, loads, state))
  finished = time.monotonic()
  if jax.process_index() == 0:
    sizes = {part: n or float('nan') for part, n in found['images'].items()}   # no accuracy on no images
    shares = run_files.shares_of_dense(config.steps, setting.costs, np.array([[spent]]), [found])
    run_files.workdir_files(config, setting.nets, sizes, workdir, [setting.group], [found], shares)
    run_files.write_run(workdir, origin | {'data': loads.load.source.described, 'evaluated_images': found['images']},
                         {'start': ready - started, 'training': seconds, 'evaluation': finished - trained})
    run_files.finish(workdir)


def check(config: ml_collections.ConfigDict, devices: int | None = None) -> None:
  """Raises UserError naming the first key whose value cannot be used, on so many devices, or those that there are."""
  sweep.check(config)
  stream = config.stream

  def need(ok: bool, key: str, allowed: str) -> None:
    if not ok:
      raise UserError(f'config.{key} must be {allowed}, got {functools.reduce(lambda c, k: c[k], key.split("."), config)!r}.')

  for axis, values in config.sweep.items():
    need(len(values) == 1, f'sweep.{axis}', "a single value for the protocol 'streamed', as \"(2.0,)\"")
  for key in ('classes', 'image_size', 'shards', 'batch_norm_parts', 'log_steps', 'checkpoint_steps'):
    need(stream[key] > 0, f'stream.{key}', 'positive')
  for key in ('held_out', 'workers', 'evaluate_steps', 'profile_steps', 'peak_flops'):
    need(stream[key] >= 0, f'stream.{key}', 'at least 0')
  need(stream.held_out != 1, 'stream.held_out', '0, or at least 2')
  need(stream.on_damage in images.ON_DAMAGE, 'stream.on_damage', f'one of {list(images.ON_DAMAGE)}')
  devices = devices or jax.device_count()
  need(devices % stream.shards == 0, 'stream.shards', f'a divisor of the {devices} devices')
  need(config.batch_size % devices == 0, 'batch_size', f'a multiple of the {devices} devices')
  need(config.batch_size % stream.batch_norm_parts == 0, 'stream.batch_norm_parts',
       f'a divisor of batch_size={config.batch_size}')


# ---- training -------------------------------------------------------------------------------------------------------


def fit(setting: Setting, loads: Loads, workdir: pathlib.Path) -> tuple[train.TrainState, float, float]:
  """The trained state, the operations that it took and the seconds, over all runs on `workdir`."""
  config, stream, mesh, seed = setting.config, setting.config.stream, setting.mesh, int(setting.nets.seed[0])
  running, done = commands.heeding(lambda: programs.make_first(setting)(scored_images(setting, loads))), 0
  gather, scatter = programs.in_checkpoints(running.state, mesh)
  checkpoints = Checkpoints(workdir / 'checkpoints', config.checkpoints_kept, background=True)
  if (found := checkpoints.restore(gather(running.state))) is not None:
    done, running = found[0], running._replace(state=scatter(found[1]))
    say(f'goes on from step {done:,}.')
  due = train.at_steps(setting.group.due, np.arange(1, config.steps + 1)).tolist()
  say('compiling; then progress.')
  one_step = commands.heeding(lambda: {change: programs.compile_step(setting, change) for change in sorted(set(due[done:]))})
  log, stop = Log(setting, workdir, done, photographs.Odd(loads.load)), Stop()
  best = Best(workdir / 'best', stream.evaluate_steps > 0, log.best, done)
  evaluator, trace = Evaluator(setting, loads), Trace(workdir / 'profile', done + 10, stream.profile_steps)
  cut = programs.make_cut(setting)
  batches = programs.to_devices(images.train_batches(loads.load, loads.train, config.batch_size, seed, done, **hosts(),
                                                     workers=stream.workers), mesh)
  flying: collections.deque[jax.Array] = collections.deque()
  stopping, step = False, done
  with contextlib.closing(log), contextlib.closing(trace), contextlib.closing(stop), checkpoints, best:
    for step in range(done + 1, config.steps + 1):
      trace.begin(step)
      batch = log.wait(batches)
      running, loss = one_step[due[step - 1]](running, step - 1, batch.images, batch.labels)
      if step == done + 1:
        loss.block_until_ready()
        log.begin(step)   # what comes before it, as compiling, is no part of the speed
      flying.append(loss)
      if len(flying) > IN_FLIGHT:
        flying.popleft().block_until_ready()
      trace.end(step, loss)
      stopping = stop.asked(step)
      saving = stopping or step == config.steps or step % stream.checkpoint_steps == 0
      scoring = stream.evaluate_steps > 0 and step % stream.evaluate_steps == 0
      if saving or scoring or step % stream.log_steps == 0:
        running, sums = cut(running)
        log.take(step, sums)
      if scoring:
        log.add(evaluator.scores(running.state))
        best.offer(step, log.best, gather, running.state)
      if saving:
        log.flush()   # first: a checkpoint stands for all that came before it
        checkpoints.save(step, gather(running.state))
        log.restart(step)
      if stopping:
        break
  if stopping:
    say(f'stopped by a signal after step {step:,}; the same command goes on from there.')
    if jax.process_count() > 1:
      jax.distributed.shutdown()   # waits for all: the end of the first process would abort those that are later
    raise commands.Stopped(128 + signal.SIGTERM)
  return running.state, log.spent, log.seconds


class Log:
  """Metrics and progress. What is taken from the devices is written when more is taken, since they are past it then."""

  def __init__(self, setting: Setting, workdir: pathlib.Path, done: int, odd: photographs.Odd):
    self._setting, self._odd, self._name = setting, odd, sweep.group_name(setting.group, setting.config)
    self._metrics = workdirs.Metrics(workdir, done) if jax.process_index() == 0 else None
    last = self._metrics.last if self._metrics else {}
    self.spent, self.best = last.get('operations', {}).get(self._name, [0.0])[0], last.get('best', -1.0)
    self._progress = Progress(setting.config.steps, done, 1, last.get('seconds', 0.0))
    self._pending: tuple[int, int, int, programs.Sums, jax.Array, float, float] | None = None
    self._over_hosts, self._odd_before = programs.make_sum(setting.mesh), [last.get(name, 0) for name in ODD.values()]
    self._scores: dict[str, float] = {}
    if jax.process_count() > 1:   # the file is the first host's; all decide alike on what is the best
      self.best = of_first_host(self.best)
    self._leaves = [leaf_name(path) for path, _ in jax.tree_util.tree_leaves_with_path(setting.shapes.state.phi)]
    self._since = done
    self.restart(done)

  @property
  def seconds(self) -> float:
    return self._progress.seconds

  def restart(self, step: int) -> None:
    """The clock of the throughput, which is of the steps after this one: compiling, checkpoints and evaluation are left out."""
    self._timed, self._waited, self._began = step, 0.0, time.monotonic()

  def begin(self, step: int) -> None:
    self._progress.begin(step)
    self.restart(step)

  def wait(self, batches: Iterator[tuple[images.Batch, images.Batch]]) -> images.Batch:
    began = time.monotonic()
    on_host, batch = next(batches)
    self._waited += time.monotonic() - began
    self._odd.see(on_host)
    return batch

  def take(self, step: int, sums: programs.Sums) -> None:
    self.flush()
    seconds = time.monotonic() - self._began
    odd = self._over_hosts([self._odd.counts[kind] for kind in ODD])
    self._pending = step, step - self._since, step - self._timed, sums, odd, self._waited, seconds
    self._since = step
    self.restart(step)

  def add(self, scores: dict[str, float]) -> None:
    """Accuracies go with what was taken last."""
    self._scores, self.best = scores, max(self.best, scores['accuracy'])
    self.flush()
    self.restart(self._since)

  def flush(self) -> None:
    """Writes what was taken. Raises UserError where training is no longer finite."""
    if self._pending is None:
      return
    (step, taken, timed, sums, odd, waited, seconds), self._pending = self._pending, None
    config, costs = self._setting.config, self._setting.costs
    tally, guard = jax.tree.map(np.asarray, sums)
    refuse(self._leaves, guard)
    mean = jax.tree.map(lambda x: np.asarray(x)[None] / taken, tally)
    loss, values = float(mean.loss[0]), dict(self._scores)
    self.spent += train.operations(costs, taken, mean)[0]
    if timed:   # after the first step alone there is nothing to tell yet
      speed = timed * config.batch_size / seconds
      values |= {'images_per_second': round(speed, 2), 'input_wait': round(waited / seconds, 4)}
      if (peak := peak_flops(config)):
        dense = flops.training_step(costs) / config.batch_size   # of an image: what a dense network would take
        values['utilisation'] = round(speed * dense / (peak * jax.device_count()), 4)
    record = {'seconds': round(self.seconds, 3), 'train_loss': {self._name: [loss]},
              'operations': {self._name: [self.spent]}, 'best': self.best,
              **dict(zip(ODD.values(), (np.asarray(odd) + self._odd_before).tolist(), strict=True))}
    self._scores = {}
    if self._metrics:
      self._metrics.write(step, record | values, {'train_loss': loss, **values})
    self._progress.show(step, np.array([loss]))

  def close(self) -> None:
    self._progress.end()
    if self._metrics:
      self._metrics.close()


def of_first_host(x: float) -> float:
  """The first host's number on all, to the bit: JAX would make float32 of it."""
  return float(np.asarray(multihost_utils.broadcast_one_to_all(np.array([x]).view(np.uint32))).view(np.float64)[0])


def scored_images(setting: Setting, loads: Loads) -> Any:
  """Batches that masks are scored on at the start, from a stream of their own."""
  if setting.group.first_masks is None:
    return None
  config = setting.config
  batches = images.train_batches(loads.load, loads.train, config.batch_size, int(setting.nets.seed[0]) + 1, **hosts())
  stream = programs.to_devices(batches, setting.mesh)
  taken = [next(stream)[1] for _ in range(train.SCORED)]
  return jax.jit(lambda *xs: tuple(jnp.stack(x) for x in xs))([b.images for b in taken], [b.labels for b in taken])


def refuse(phi: Sequence[str], guard: Guard) -> None:
  """Raises UserError where a step has made something infinite or NaN."""
  if guard.step >= 0:
    bad = [name for name, on in zip(phi, guard.leaves.tolist(), strict=True) if on]
    where = f'{len(bad)} of {len(phi)} arrays of parameters, {bad[0]} among them' if bad else 'its loss'
    raise UserError(f'training is no longer finite after step {int(guard.step):,}: {where}. A smaller learning rate or a longer '
                    'warm-up may help; checkpoints, where there are any, are from before.')


def peak_flops(config: ml_collections.ConfigDict) -> float:
  """Operations a second of one device at best; 0 where that is not known."""
  if config.stream.peak_flops:
    return config.stream.peak_flops
  return known_peak(jax.devices()[0].device_kind)[0 if config.compute == 'bfloat16' else 1]


def known_peak(kind: str) -> tuple[float, float]:
  return next((peaks for known, peaks in PEAKS.items() if kind.startswith(known)), (0.0, 0.0))


class Stop:
  """Has this run been asked to end? By SIGTERM, which schedulers send before they take a machine away; on several hosts by one to
  any of them, and all learn of it at the same step."""

  def __init__(self) -> None:
    self._asked = False
    self._before = signal.signal(signal.SIGTERM, self._handle) if jax.process_count() == 1 else None

  def _handle(self, *_: Any) -> None:
    self._asked = True

  def close(self) -> None:
    """What comes after training has no checkpoints, and may be ended by the signal."""
    if self._before is not None:
      signal.signal(signal.SIGTERM, self._before)

  def asked(self, step: int) -> bool:
    return self._asked if jax.process_count() == 1 else multihost_utils.reached_preemption_sync_point(step)


class Trace:
  """A profile of some steps, for TensorBoard or Perfetto."""

  def __init__(self, folder: pathlib.Path, first: int, steps: int):
    self._folder, self._first, self._steps, self._on = folder, first, steps, False

  def begin(self, step: int) -> None:
    if self._steps and step == self._first:
      jax.profiler.start_trace(str(self._folder))
      self._on = True

  def end(self, step: int, loss: jax.Array) -> None:
    if self._on and step == self._first + self._steps - 1:
      loss.block_until_ready()
      self.close()

  def close(self) -> None:
    if self._on:
      jax.profiler.stop_trace()
      self._on = False


class Best:
  """The network of the highest accuracy so far, in a directory of its own."""

  def __init__(self, directory: pathlib.Path, wanted: bool, score: float, done: int):
    self._score, self._checkpoints = score, Checkpoints(directory, 1) if wanted else None
    if self._checkpoints:
      self._checkpoints.drop_after(done)

  def offer(self, step: int, score: float, gather: Callable[[Any], Any], state: train.TrainState) -> None:
    if self._checkpoints and score > self._score:
      self._score = score
      self._checkpoints.save(step, gather(state))

  def __enter__(self) -> 'Best':
    return self

  def __exit__(self, *error: Any) -> None:
    if self._checkpoints:
      self._checkpoints.__exit__(*error)

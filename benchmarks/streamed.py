"""A training step of a ResNet-50 by the protocol 'streamed': what α, masks and the protocol itself cost, and what devices say to
each other. On CPUs an eighth of its width, in processes of its own, since the number of devices is fixed when JAX begins: those
are this file with WHAT PROCESSES PROCESS PORT, and print their rows as JSON. On accelerators the whole protocol as well, fed from
JPEGs.
"""
import functools
import json
import math
import os
import pathlib
import re
import socket
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from concurrent import futures
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import optax

from benchmarks import photographs
from benchmarks.paired import Row, Times, per, ratio, row, take_turns
from configs import imagenet
from experiments import models, programs, train
from experiments import photographs as given
from experiments import streamed as protocol
from powerprop import flops

CPU = {'model': 'resnet_50_eighth', 'batch_size': 64, 'stream.image_size': 64, 'compute': 'float32'}
ACCELERATOR = {'batch_size': 256}
AHEAD = 10   # steps that are sent to an accelerator before the last one is waited for
LAYOUTS = ((1, 1), (1, 2), (1, 4), (1, 8), (2, 4), (4, 2))   # processes, devices of each
KINDS = ('all-reduce', 'all-gather', 'all-to-all', 'collective-permute', 'reduce-scatter')


def make_config(cell: str, **change: Any) -> ml_collections.ConfigDict:
  config = imagenet.get_config(cell)
  with config.unlocked():
    config.update_from_flattened_dict((CPU if jax.default_backend() == 'cpu' else ACCELERATOR) | change)
  return config


def pictures(config: ml_collections.ConfigDict) -> tuple[np.ndarray, np.ndarray]:
  """A batch of noise; every process of a job makes its own part."""
  rng, size = np.random.default_rng(jax.process_index()), config.stream.image_size
  mine = config.batch_size // jax.process_count()
  return rng.integers(0, 256, (mine, size, size, 3), np.uint8), rng.integers(0, config.stream.classes, mine, np.int32)


def stepper(config: ml_collections.ConfigDict, n: int) -> tuple[Callable[[], Any], str]:
  """`together` more steps of the protocol at each call, all as if n had been taken; and the compiled program as text."""
  setting = programs.prepare(config)
  put = functools.partial(jax.make_array_from_process_local_data, programs.by_image(setting.mesh))
  images, labels = (put(x) for x in pictures(config))
  running = programs.make_first(setting)(None)
  (due,), number = train.at_steps(setting.group.due, np.array([n + 1])).tolist(), jnp.int32(n)
  step = programs.compile_step(setting, due)

  def turn() -> jax.Array:
    nonlocal running
    for _ in range(together()):
      running, loss = step(running, number, images, labels)
    return loss.block_until_ready()
  return turn, step.as_text()


def together() -> int:
  return 1 if jax.default_backend() == 'cpu' else AHEAD


def bare(config: ml_collections.ConfigDict, own: bool) -> Callable[[], Any]:
  """As many steps, as one writes them without this package: Haiku's network, optax, jit. `own`: on CPUs with our convolutions."""
  _, net = models.build(config, config.stream.classes, own)
  images, labels = map(jnp.asarray, pictures(config))
  tx = optax.chain(optax.add_decayed_weights(config.weight_decay), optax.sgd(0.1, config.momentum))

  @functools.partial(jax.jit, donate_argnums=0)
  def step(state: Any, images: jax.Array, labels: jax.Array) -> Any:
    params, net_state, opt_state = state
    def loss_fn(params: Any) -> Any:
      logits, new = net.apply(params, net_state, None, train.pixels(images), True)
      wanted = optax.smooth_labels(jax.nn.one_hot(labels, logits.shape[-1]), config.label_smoothing)
      return optax.softmax_cross_entropy(logits, wanted).mean(), new
    (loss, net_state), grads = jax.value_and_grad(loss_fn, has_aux=True)(params)
    updates, opt_state = tx.update(grads, opt_state, params)
    return (optax.apply_updates(params, updates), net_state, opt_state), loss

  setting = programs.prepare(config)
  params, net_state = jax.jit(functools.partial(programs.first_weights, net, programs.image_shape(setting)),
                              compiler_options=programs.once(setting))(0)
  state = params, net_state, jax.jit(tx.init)(params)

  def turn() -> jax.Array:
    nonlocal state
    for _ in range(together()):
      state, loss = step(state, images, labels)
    return loss.block_until_ready()
  return turn


def steps(quick: bool) -> list[Row]:
  """Ratios of steps on one device, in turns; on an accelerator images a second and utilisation as well."""
  cpu, config = jax.default_backend() == 'cpu', make_config('dense')
  functions: dict[str, Callable[[], Any]] = {'bare': bare(config, own=True)}
  if cpu:
    functions['Haiku'] = bare(config, own=False)
  functions['bare']()   # compiled alone: what an accelerator finds out about its convolutions, the others take over
  # Steps of the schedule at which masks change, and do not: RigL's every 100 steps, those of gradual pruning every 1,000.
  cells = {'dense': ('dense', 10_500), 'α = 2': ('dense_powerprop', 10_500),
           'RigL': ('rigl_erk_90', 10_550), 'RigL at': ('rigl_erk_90', 10_999),
           'gradual': ('gradual_erk_90', 10_550), 'gradual at': ('gradual_erk_90', 10_999)}
  with futures.ThreadPoolExecutor() as pool:   # a minute each to compile
    functions |= dict(zip(cells, pool.map(lambda cell: stepper(make_config(cell[0]), cell[1])[0], cells.values()), strict=True))
  # On CPUs turns of one step, so that both sides of a ratio are close in time; an accelerator's steps are sent together.
  rounds, seconds = (101, 0.0) if cpu else (11, 1.0)
  times = {name: per(found, together()) for name, found in take_turns(functions, 3 if quick else rounds, seconds).items()}
  dense, title = times['dense'], 'ResNet-50' + (', an eighth of its width' if cpu else '')
  alike = 'bare loop with the same convolutions' if cpu else 'bare Haiku loop'
  rows = [ratio(f'{title}, step: {alike} / ours', times['bare'], dense, 0.98, least=True),
          *([ratio(f'{title}, step: bare Haiku loop / ours', times['Haiku'], dense)] if cpu else []),
          ratio(f'{title}, step: α = 2 / α = 1', times['α = 2'], dense, 1.05 if cpu else 1.02)]
  for name, every in (('RigL', 100), ('gradual', 1_000)):
    weighed = Times(*([((every - 1) * b + a) / every for a, b in zip(x, y, strict=True)]
                      for x, y in zip(times[f'{name} at'], times[name], strict=True)))
    rows.append(ratio(f'{title}, step: {name}, masks every {every:,} steps / dense', weighed, dense, 1.03))
  step = statistics.median(dense.wall)
  rows.append(row(f'{title}: dense training at {config.stream.image_size}², batch {config.batch_size}, {config.compute}',
                  config.batch_size / step, 'images/s'))
  if (peak := protocol.peak_flops(config)):
    speed = flops.training_step(programs.prepare(config).costs) / jax.device_count() / step
    rows.append(row(f'{title}: utilisation of {peak / 1e12:.0f} TFLOP/s in that', speed / peak, 'of 1'))
  return rows


def fed(config: ml_collections.ConfigDict, steps: int, distinct: int) -> list[Row]:
  """Training from JPEGs of 500×375 on this disk by the whole protocol, checkpoint and metrics included: what the last lines of
  metrics tell. `distinct`: so many of the images differ; a folder tree of ImageNet's form has links to them."""
  with tempfile.TemporaryDirectory() as name:
    root, workdir = pathlib.Path(name, 'images'), pathlib.Path(name, 'run')
    root.mkdir()
    for i, data in enumerate(photographs.make(distinct)):
      (root / f'{i}.jpg').write_bytes(data)
    per_class = -(-config.batch_size // config.stream.classes) + 1   # more than a batch
    for split, count in (('train', per_class), ('val', 1)):
      for c in range(config.stream.classes):
        folder = root / split / f'class_{c:04d}'
        folder.mkdir(parents=True)
        for i in range(count):
          (folder / f'{i}.jpg').hardlink_to(root / f'{(c * count + i) % distinct}.jpg')
    with config.unlocked():
      config.data_dir, config.steps = str(root), steps
      config.stream.workers, config.stream.log_steps = len(os.sched_getaffinity(0)) - 1, steps // 4
    workdir.mkdir()
    protocol.fit(programs.prepare(config), given.open_images(config), workdir)
    lines = [json.loads(line) for line in (workdir / 'metrics.jsonl').read_text().splitlines()]
  title, last = f'trained from JPEGs, read by {config.stream.workers} processes', lines[-2:]   # the first ones fill the queues
  names = {'images_per_second': ('speed', 'images/s'), 'input_wait': ('share of the time spent waiting for images', 'of 1'),
           'utilisation': ('utilisation', 'of 1')}
  return [row(f'{title}: {label}', statistics.mean(line[key] for line in last), unit)
          for key, (label, unit) in names.items() if key in last[0]]


def layout(processes: int) -> list[Row]:
  """What a compiled step of RigL that makes new masks exchanges on the devices that there are, and the time of one between."""
  config = make_config('rigl_erk_90')
  (between, _), (_, text) = (stepper(config, n) for n in (10_550, 10_999))
  wall = take_turns({'between': between}, 7)['between'].wall
  title = f'RigL, {processes} × {jax.local_device_count()} processes × devices'
  counts = exchanged(text)
  told = [row(f'{title}: {kind}', counts[kind][0], 'a step', elements=counts[kind][1]) for kind in KINDS if kind in counts]
  return [row(f'{title}: a step', statistics.median(wall), 's', low=min(wall), high=max(wall)), *told]


def exchanged(text: str) -> dict[str, tuple[int, int]]:
  """Kind of collective → how many a program has, and how many elements they bring together."""
  found: dict[str, tuple[int, int]] = {}
  for what, kind in re.findall(rf'= (.*?) ({"|".join(KINDS)})(?:-start)?\(', text):
    sizes = [math.prod(int(n) for n in shape.split(',') if n) for shape in re.findall(r'\[([\d,]*)\]', what)]
    count, elements = found.get(kind, (0, 0))
    found[kind] = count + 1, elements + sum(sizes)
  return found


# ---- processes ------------------------------------------------------------------------------------------------------


def run(quick: bool) -> list[Row]:
  if jax.default_backend() != 'cpu':
    return steps(quick) + fed(make_config('dense'), 200 if quick else 400, 64)
  return children(['steps', *(['quick'] if quick else [])], 1, 1)


def devices(quick: bool) -> list[Row]:
  """What devices of a CPU, and processes, say to each other."""
  rows: list[Row] = []
  if jax.default_backend() != 'cpu':
    return rows
  for processes, of_each in ((1, 1), (1, 8), (2, 4)) if quick else LAYOUTS:
    rows += children(['layout'], processes, of_each)
  return rows


def children(arguments: Sequence[str], processes: int, devices: int) -> list[Row]:
  """The rows that the first of so many processes prints, each with so many devices of the CPU."""
  with socket.socket() as found:
    found.bind(('127.0.0.1', 0))
    port = found.getsockname()[1]
  environment = os.environ | {'XLA_FLAGS': f'--xla_force_host_platform_device_count={devices}'}
  started = [subprocess.Popen([sys.executable, '-m', 'benchmarks.streamed', *arguments, str(processes), str(i), str(port)],
                              env=environment, stdout=subprocess.PIPE, text=True) for i in range(processes)]
  printed = [child.communicate()[0] for child in started]
  if any(child.returncode for child in started):
    raise RuntimeError(f'benchmarks.streamed {" ".join(arguments)} failed with {processes} processes of {devices} devices')
  return json.loads(printed[0].splitlines()[-1])


def main(argv: Sequence[str]) -> None:
  what, *rest = argv
  processes, index, port = map(int, rest[-3:])
  if processes > 1:
    jax.distributed.initialize(f'127.0.0.1:{port}', processes, index)
  print(json.dumps(steps('quick' in rest) if what == 'steps' else layout(processes)))


if __name__ == '__main__':
  main(sys.argv[1:])

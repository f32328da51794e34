"""Times of training LeNet-300-100 on MNIST: the real training loop against loops as one would write them by hand.

Comparisons of single networks have one device and the same batches on both sides. The sweep has a device a core, as a run of
experiments.main has.
"""
import functools
import itertools
import json
import math
import pathlib
import statistics
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import haiku as hk
import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
from jax import lax

from benchmarks.paired import Row, Times, per, ratio, row, take_turns
from configs import mnist_lenet
from experiments import train
from experiments.models import MODELS
from experiments.sweep import make_groups, make_nets
from powerprop import psi_inverse

# The full figure: five α, five seeds, 50,000 steps.
FIGURE = mnist_lenet.get_config('full')
FIGURE_RUN = pathlib.Path(__file__).parents[1] / 'results' / 'mnist_lenet' / 'run.json'
# Learning rates at which the networks train; how fast a step is does not depend on them.
RATES = {'sgd': 0.1, 'momentum': 0.01, 'adam': 1e-3}
ROOT = 1.375   # Ψ by square roots


class Plan(NamedTuple):
  """How much is measured."""
  rounds: int
  seconds: float         # of a turn of each side, at least
  steps: int | None      # of an epoch of a single network, None for all; the permutation is for the whole epoch either way
  sweep_rounds: int
  loop_steps: int        # of each network in a turn of the Python loop


FULL = Plan(rounds=7, seconds=0.5, steps=None, sweep_rounds=7, loop_steps=100)
QUICK = Plan(rounds=3, seconds=0.1, steps=400, sweep_rounds=2, loop_steps=40)


class Program(NamedTuple):
  epoch: Callable[[], Any]    # trains an epoch more, waits for it, and gives the state, which the next call may overwrite
  steps: int                  # of each network in an epoch


def program(state: Any, epoch: Callable[[Any, int], Any], steps: int) -> Program:
  """`epoch`: (state, number of the epoch) → state."""
  numbers = itertools.count()
  def one_more() -> Any:
    nonlocal state
    state = jax.block_until_ready(epoch(state, next(numbers)))
    return state
  return Program(one_more, steps)


# ---- the programs -----------------------------------------------------------------------------------------------


def real_loop(config: ml_collections.ConfigDict, data: train.Batches, devices: int, steps: int | None) -> Program:
  """The program of experiments.train for the networks of a config, on the first so many devices."""
  net, groups = network(config), quiet_groups(config)
  mesh = jax.make_mesh((devices,), (train.NETS,), axis_types=(jax.sharding.AxisType.Auto,), devices=jax.devices()[:devices])
  slots = train.deal(make_nets(config), len(groups), devices)
  places, numbers, on_device = [s.nets for s in slots], [s.number for s in slots], train.replicate(data, mesh)
  init = train.make_init(groups, slots, net, config.batch_size, mesh)
  states = init(train.replicate(initial_weights(config, data), mesh), {}, on_device)
  epoch = train.make_epoch(groups, net, config.batch_size, mesh)
  steps = steps or len(data.labels) // config.batch_size
  return program(states, lambda states, number: epoch(states, places, numbers, on_device, number, 0, steps)[0], steps)


def bare_loop(config: ml_collections.ConfigDict, data: train.Batches, steps: int | None, alpha: float = 1.0) -> Program:
  """Plain SGD in plain JAX on one device, from the weights and on the batches of the real loop; Ψ is φ·pow(|φ|, α−1)."""
  rate, batch = RATES['sgd'], config.batch_size
  steps = steps or len(data.labels) // batch

  def weights(phi):
    return phi if alpha == 1 else phi * jnp.power(jnp.abs(phi), alpha - 1)

  def loss_fn(params, images, labels):
    x = images.reshape(batch, -1).astype(jnp.float32) / 255
    for w, b in params[:-1]:
      x = jax.nn.relu(x @ weights(w) + b)
    w, b = params[-1]
    return -jnp.mean(jax.nn.log_softmax(x @ weights(w) + b)[jnp.arange(batch), labels])

  def epoch(params, key, images, labels):
    def step(params, pick):
      loss, grads = jax.value_and_grad(loss_fn)(params, images[pick], labels[pick])
      return jax.tree.map(lambda p, g: p - rate * g, params, grads), loss
    order = jax.random.permutation(key, len(labels))
    return lax.scan(step, params, order[:steps * batch].reshape(steps, batch))

  theta = sorted(initial_weights(config, data).items())
  params = [(psi_inverse(jnp.asarray(layer['w'][0]), alpha), jnp.asarray(layer['b'][0])) for _, layer in theta]
  seed = config.sweep.seed[0]
  jitted, on_device = jax.jit(epoch, donate_argnums=0), jax.device_put(data, jax.devices()[0])
  return program(params, lambda params, number: jitted(params, train.batches_key(seed, number), *on_device)[0], steps)


def python_loop(config: ml_collections.ConfigDict, data: train.Batches, steps: int | None) -> Program:
  """The same networks as people train them: one after another, a jitted step for each batch, batches picked in NumPy."""
  steps = steps or len(data.labels) // config.batch_size
  loss_fn, theta = train.make_loss(network(config)), initial_weights(config, data)
  states, jitted, seeds = [], [], []
  for group in quiet_groups(config):
    tx = group.optimizer(config.sweep.learning_rate[0], None, None)
    step = jax.jit(functools.partial(train_batch, loss_fn, group, tx))
    for i, seed in enumerate(config.sweep.seed):
      phi = group.reparam.inverse(jax.tree.map(lambda x, i=i: jnp.asarray(x[i]), theta))
      states.append(train.TrainState(phi, tx.init(phi), {}))
      jitted.append(step)
      seeds.append(seed)

  def train_net(step, state, seed, number):
    order = np.random.default_rng((seed, number)).permutation(len(data.labels))
    for t in range(steps):
      pick = order[t * config.batch_size:(t + 1) * config.batch_size]
      state, _ = step(state, data.images[pick], data.labels[pick])
    return state

  def epoch(states, number):
    return [train_net(step, state, seed, number) for step, state, seed in zip(jitted, states, seeds, strict=True)]

  return program(states, epoch, steps)


def train_batch(loss_fn: Any, group: train.Group, tx: Any, state: train.TrainState, images: Any, labels: Any) -> Any:
  return train.train_step(loss_fn, group, tx, state, None, train.pixels(images), labels)


def network(config: ml_collections.ConfigDict) -> hk.TransformedWithState:
  return _network(config.model, config.bias_stddev)


def initial_weights(config: ml_collections.ConfigDict, data: train.Batches) -> Any:
  """θ0 of each seed on the host, leaves [seeds, ...]."""
  return _initial_weights(network(config), config.sweep.seed, data.images.shape[1:])


@functools.cache
def _network(model: str, bias_stddev: float) -> hk.TransformedWithState:
  return hk.transform_with_state(MODELS[model](10, bias_stddev).forward)


@functools.cache   # a compilation each
def _initial_weights(net: hk.TransformedWithState, seeds: tuple[int, ...], image_shape: tuple[int, ...]) -> Any:
  return jax.device_get(train.make_weights(net, image_shape, train.make_mesh())(np.array(seeds, np.int32))[0])


def quiet_groups(config: ml_collections.ConfigDict) -> list[train.Group]:
  with warnings.catch_warnings():
    warnings.filterwarnings('ignore', 'alpha = .* is above')   # the figure has them
    return make_groups(config)


def one_net(alpha: float = 1.0, optimizer: str = 'sgd', update: str = 'target_propagation') -> ml_collections.ConfigDict:
  """The figure's config with a single network."""
  config = mnist_lenet.get_config('quick')
  config.sweep.update({'alpha': (alpha,), 'seed': (0,), 'optimizer': (optimizer,), 'update': (update,),
                       'learning_rate': (RATES[optimizer],)})
  return config


# ---- the measurements -------------------------------------------------------------------------------------------


def compare(one: Program, base: Program, plan: Plan) -> tuple[Times, Times]:
  """Times of a step of either."""
  times = take_turns({'one': one.epoch, 'base': base.epoch}, plan.rounds, plan.seconds)
  return per(times['one'], one.steps), per(times['base'], base.steps)


def milliseconds(name: str, times: Times, **more: Any) -> Row:
  return row(name, 1e3 * statistics.median(times.wall), 'ms', low=1e3 * min(times.wall), high=1e3 * max(times.wall), **more)


def steps(data: train.Batches, plan: Plan) -> list[Row]:
  """What the real loop costs above the bare one without a reparameterisation, and what Ψ and its slope cost above that."""
  dense, bare = real_loop(one_net(), data, 1, plan.steps), bare_loop(one_net(), data, plan.steps)
  times, base = compare(dense, bare, plan)
  rows = [milliseconds('bare loop, step of one network', base), milliseconds('real loop, α = 1, step of one network', times),
          ratio('real loop, α = 1 / bare loop', times, base, 1.1)]
  for alpha, target in ((2.0, 1.25), (3.0, 1.25), (4.0, 1.25), (ROOT, 1.8)):
    one = real_loop(one_net(alpha), data, 1, plan.steps)
    rows.append(ratio(f'real loop, α = {alpha:g} / α = 1', *compare(one, dense, plan), target))
  power = bare_loop(one_net(), data, plan.steps, ROOT)
  return [*rows, ratio(f'bare loop, α = {ROOT:g} by jnp.power / α = 1', *compare(power, bare, plan))]


def updates(data: train.Batches, plan: Plan) -> list[Row]:
  """What target propagation costs above the naive order."""
  rows = []
  for optimizer in ('momentum', 'adam'):
    target, naive = (real_loop(one_net(2.0, optimizer, update), data, 1, plan.steps)
                     for update in ('target_propagation', 'backpropagation'))
    rows.append(ratio(f'{optimizer}, α = 2: target propagation / naive order', *compare(target, naive, plan), 1.1))
  return rows


def sweep(data: train.Batches, plan: Plan) -> list[Row]:
  """The quick sweep as one program against a Python loop, and what that makes for the full figure."""
  config = mnist_lenet.get_config('quick')
  nets = len(make_nets(config).seed) * len(config.sweep.alpha)
  real = real_loop(config, data, jax.device_count(), None)
  loop = python_loop(config, data, plan.loop_steps)
  times = take_turns({'loop': loop.epoch, 'real': real.epoch}, plan.sweep_rounds)
  by_loop, by_real = per(times['loop'], nets * loop.steps), per(times['real'], nets * real.steps)
  figure = math.prod(len(values) for values in FIGURE.sweep.values()) * FIGURE.steps
  rows = [
      milliseconds(f'sweep of {nets} networks by a Python loop, step of one network', by_loop),
      milliseconds(f'sweep of {nets} networks in one program, step of one network', by_real),
      ratio(f'sweep of {nets} networks: Python loop / one program', by_loop, by_real, 2.0, least=True),
      row('full figure, projected from that: training', statistics.median(by_real.wall) * figure / 60, 'min', 9.0),
  ]
  return rows + recorded_run()


def recorded_run() -> list[Row]:
  """The time that the full figure really took, where its run was recorded, with the machine that it ran on."""
  if not FIGURE_RUN.exists():
    return []
  record = json.loads(FIGURE_RUN.read_text())
  minutes = sum(record['seconds'].values()) / 60
  return [row('full figure, recorded run: all of it', minutes, 'min', 9.0, machine=record['devices'])]

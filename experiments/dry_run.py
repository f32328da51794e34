"""What a run of the protocol 'streamed' would be: parameters, densities, operations, memory and steps. Needs no data."""
import itertools
import math
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np

from experiments import programs, sweep, train
from experiments.algorithms import ALGORITHMS, DISTRIBUTIONS
from experiments.programs import Setting
from experiments.results import Table, markdown
from powerprop import flops
from powerprop.distributions import leave_dense, make_counts
from powerprop.reparam import Tree, is_weight, leaf_name
from powerprop.sparse import Masks, trained

SURROGATE = 100, 100   # of the leaf on which masks are tried: densities in steps of 0.01 %


def describe(config: ml_collections.ConfigDict) -> str:
  """Lines for a reader, and a table of the layers as Markdown."""
  on = devices_for(config)
  setting = programs.prepare(config, on)
  theta, _ = jax.eval_shape(lambda: programs.first_weights(setting.net, programs.image_shape(setting), 0))
  size, devices = sum(math.prod(x.shape) for x in jax.tree.leaves(theta)), len(on)
  plan = phases(setting, theta)
  images, dense = config.steps * config.batch_size, config.steps * flops.training_step(setting.costs)
  spent = flops.training(setting.costs, plan)
  state, gradients = (bytes_a_device(tree, setting) for tree in (setting.shapes.state, setting.shapes.state.phi))
  lines = [
      f'{config.name}: {sweep.group_name(setting.group, config)}, {setting.group.axes["algorithm"]}',
      f'{size:,} parameters, {sum(setting.costs.sizes[name] for name in weights_of(theta)):,} of them weights',
      f'{config.steps:,} steps of {config.batch_size:,} images: {images:,} images on {devices} x {on[0].device_kind}',
      f'training: {spent:.3g} operations, {spent / dense:.3f} of dense training; a forward pass of one image: '
      f'{flops.forward(setting.costs) / config.batch_size:.3g} dense, '
      f'{flops.forward(setting.costs, plan[-1].forward) / config.batch_size:.3g} at the end',
      f'memory of each device: {state / 1e9:.3f} GB of parameters, optimiser state and masks, {gradients / 1e9:.3f} GB of '
      f'gradients, and the activations of {config.batch_size // devices} images']
  if config.sweep.algorithm == ('soft_threshold',):
    lines.append(f'densities are learned, and not those below: config.sweep.penalty, here {config.sweep.penalty[0]:g}, decides '
                 'them, and is to be chosen for each sparsity')
  rows = [[name, str(setting.costs.sizes[name]), f'{100 * plan[-1].forward.get(name, 1.0):.2f}',
           f'{setting.costs.leaves[name] / config.batch_size:.3g}'] for name in weights_of(theta)]
  return '\n'.join(lines) + '\n\n' + markdown(
      Table(['layer', 'weights', '% kept at the end', 'operations of one image'], rows))


def devices_for(config: ml_collections.ConfigDict) -> list[jax.Device]:
  """Those that there are, or, where they are no multiple of the shards, as many of the CPU, in place of the real ones."""
  shards = max(1, config.stream.shards)
  return jax.devices() if jax.device_count() % shards == 0 else jax.devices('cpu')[:shards]


def weights_of(theta: Tree) -> list[str]:
  named = [(leaf_name(path), x) for path, x in jax.tree_util.tree_leaves_with_path(theta)]
  return [name for name, x in named if is_weight(name, x)]


def bytes_a_device(tree: Tree, setting: Setting) -> int:
  places = jax.tree.leaves(programs.layout(tree, setting.mesh))
  return sum(math.prod(place.shard_shape(x.shape)) * x.dtype.itemsize
             for x, place in zip(jax.tree.leaves(tree), places, strict=True))


def phases(setting: Setting, theta: Tree) -> list[flops.Phase]:
  """The densities of the whole training. Where weights move between layers (DSR, SNFS, global thresholds, scores), layers are
  taken to stay as they begin, or to be alike."""
  config, group = setting.config, setting.group
  if not group.sparse:
    return [flops.Phase(config.steps, {})]
  weights = jax.tree.map(lambda on, x: x if on else None, group.reparam.where(theta), theta)
  weights = leave_dense(weights, config.sparse.dense)
  distribution = DISTRIBUTIONS[config.sparse.distribution]

  def at(density: float) -> dict[str, float]:
    if density >= 1:
      return {}
    counts = None if group.first_masks else make_counts(weights, round(1 - density, 9), distribution)
    if counts is None or isinstance(counts, int):
      return {leaf_name(path): density for path, _ in jax.tree_util.tree_leaves_with_path(weights)}
    return flops.densities(setting.costs, counts)

  steps = np.arange(1, config.steps + 1)
  dense = train.at_steps(group.dense_gradient, steps)
  if group.first_masks:
    return [flops.Phase(config.steps, at(1 - group.axes['sparsity']))]
  found = timeline(group.axes, config, steps)
  edges = [*found, config.steps]
  return [flops.Phase(last - first, at(found[first][0]), at(found[first][1]), float(dense[first:last].mean()))
          for first, last in itertools.pairwise(edges) if last > first]


def timeline(axes: dict[str, Any], config: ml_collections.ConfigDict, steps: np.ndarray) -> dict[int, tuple[float, float]]:
  """Steps done → density of what the network sees, and of what is trained, from there on: by the updater, on a leaf of noise."""
  make = ALGORITHMS[axes['algorithm']]
  assert make is not None
  whole = config.copy_and_resolve_references()
  with whole.unlocked():
    whole.sparse.dense = ()
  updater = make(axes['sparsity'], whole)
  theta, gradient = ({'w': jax.random.normal(jax.random.key(seed), SURROGATE)} for seed in (0, 1))
  masks, memory = updater.init(theta, jax.random.key(2))
  update = jax.jit(updater.update)

  def densities(masks: Masks) -> tuple[float, float]:
    return tuple(float(jnp.mean(tree['w'])) for tree in (masks.forward, trained(masks)))   # type: ignore[return-value]

  found = {0: densities(masks)}
  for n in steps[train.at_steps(updater.due, steps)].tolist():
    masks, memory = update(n, masks, memory, theta, gradient)
    found[n] = densities(masks)
  return found

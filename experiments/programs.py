"""One network on all devices: how its arrays are laid out, and the compiled programs that begin, step, score and save it.

The mesh is 'data' × 'shards': images are shared out over all devices; parameters and the optimiser's state are copied along the
first axis, and shared out along the second.
"""
import collections
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import haiku as hk
import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from experiments import models, sweep, train
from experiments.checkpoint import pack, unpack
from experiments.data import images
from experiments.models import Model
from powerprop import flops
from powerprop.reparam import Tree

AXES = 'data', 'shards'
SHARDED_FROM = 2**14     # smallest number of entries of a leaf that is worth being shared out


class Guard(NamedTuple):
  """Where a run went wrong first."""
  step: jax.Array     # int32: the first step after which something was not finite; −1: none
  leaves: jax.Array   # bool [leaves of φ]: which were not finite then


class Running(NamedTuple):
  """What the step takes and gives, on the devices."""
  state: train.TrainState
  tally: train.Tally      # sums since the last line of metrics
  guard: Guard


class Sums(NamedTuple):
  """What is logged, of the steps since the last time."""
  tally: train.Tally
  guard: Guard


class Setting(NamedTuple):
  config: ml_collections.ConfigDict
  group: train.Group
  nets: train.Nets           # of one network
  model: Model
  net: hk.TransformedWithState
  mesh: Mesh
  costs: flops.Costs         # of a forward pass of one batch
  shapes: Any                # of `Running`; None before they are known


def prepare(config: ml_collections.ConfigDict, devices: Sequence[jax.Device] | None = None) -> Setting:
  """Network, group and costs, by shapes alone: no data are needed. `devices`: by default all that there are."""
  stream = config.stream
  devices = jax.devices() if devices is None else devices
  model, net = models.build(config, stream.classes, own=len(devices) == 1)
  (group,) = sweep.make_groups(config)
  shape = stream.image_size, stream.image_size, 3
  sweep.check_sparsities([group], net, shape)
  mesh = jax.make_mesh((len(devices) // stream.shards, stream.shards), AXES, axis_types=(AxisType.Auto,) * 2, devices=devices)
  theta, net_state = jax.eval_shape(functools.partial(first_weights, net, shape), 0)
  batch = jax.ShapeDtypeStruct((config.batch_size, *shape), jnp.float32)
  costs = flops.count(lambda p, s, x: net.apply(p, s, None, x, True)[0], theta, net_state, batch)
  setting = Setting(config, group, sweep.make_nets(config), model, net, mesh, costs, None)
  return setting._replace(shapes=jax.eval_shape(functools.partial(begin, setting), scored_shapes(setting)))


def first_weights(net: hk.TransformedWithState, shape: tuple[int, ...], seed: Any) -> tuple[Tree, Tree]:
  return net.init(train.init_key(seed), jnp.zeros((1, *shape)), True)


def in_parts(loss_fn: Callable[..., Any], parts: int) -> Callable[..., Any]:
  """The loss with BatchNorm's statistics over each of so many parts of the batch: mean of the losses, and of the new averages."""
  if parts == 1:
    return loss_fn

  def wrapped(theta, net_state, images, labels):
    images, labels = (x.reshape(parts, -1, *x.shape[1:]) for x in (images, labels))
    loss, states = jax.vmap(loss_fn, (None, None, 0, 0))(theta, net_state, images, labels)
    return loss.mean(), jax.tree.map(lambda x: x.mean(0).astype(x.dtype), states)
  return wrapped


# ---- layout ---------------------------------------------------------------------------------------------------------


def layout(tree: Tree, mesh: Mesh) -> Tree:
  """Where each leaf lies, [...] or a shape: its largest axis that the shards divide is shared out among them; small leaves, and
  all where there is one shard, are on every device."""
  shards = mesh.shape[AXES[1]]

  def place(x: Any) -> NamedSharding:
    axes = [axis for axis, n in enumerate(x.shape) if n % shards == 0]
    if shards == 1 or np.prod(x.shape) < SHARDED_FROM or not axes:
      return NamedSharding(mesh, PartitionSpec())
    chosen = max(axes, key=lambda axis: x.shape[axis])
    return NamedSharding(mesh, PartitionSpec(*(AXES[1] if axis == chosen else None for axis in range(len(x.shape)))))
  return jax.tree.map(place, tree)


def by_image(mesh: Mesh) -> NamedSharding:
  return NamedSharding(mesh, PartitionSpec(AXES))


def everywhere(mesh: Mesh) -> NamedSharding:
  return NamedSharding(mesh, PartitionSpec())


def to_devices(batches: Iterator[images.Batch], mesh: Mesh, ahead: int = 2) -> Iterator[tuple[images.Batch, images.Batch]]:
  """Each batch as it is on this host, and its images and labels on the devices, sent some batches before they are wanted."""
  def send(batch: images.Batch) -> tuple[images.Batch, images.Batch]:
    put = functools.partial(jax.make_array_from_process_local_data, by_image(mesh))
    return batch._replace(images=None), batch._replace(images=put(batch.images), labels=put(batch.labels))
  waiting: collections.deque[Any] = collections.deque()
  for batch in batches:
    waiting.append(send(batch))
    if len(waiting) > ahead:
      yield waiting.popleft()
  yield from waiting


def in_checkpoints(state: train.TrainState, mesh: Mesh) -> tuple[Callable[[Any], Any], Callable[[Any], Any]]:
  """State → as it is in checkpoints, masks one bit a weight and all with an axis of one network, and back."""
  shapes = jax.eval_shape(lambda tree: jax.tree.map(lambda x: x[None], tree), state)
  def to(tree):
    return pack(jax.tree.map(lambda x: x[None], tree))
  def back(tree):
    return jax.tree.map(lambda x: x[0], unpack(tree, shapes))
  return (jax.jit(to, out_shardings=layout(jax.eval_shape(to, state), mesh)), jax.jit(back, out_shardings=layout(state, mesh)))


# ---- programs -------------------------------------------------------------------------------------------------------


def image_shape(setting: Setting) -> tuple[int, int, int]:
  return setting.config.stream.image_size, setting.config.stream.image_size, 3


def begin(setting: Setting, scored: Any) -> Running:
  """The state before the first step. `scored`: images uint8 [M, B, S, S, 3] and labels [M, B], or None where none are."""
  group, seed = setting.group, int(setting.nets.seed[0])
  theta, net_state = first_weights(setting.net, image_shape(setting), seed)
  scored = scored and (train.pixels(scored[0]), scored[1])
  state = train.first_state(setting.net, group, theta, net_state, seed, float(setting.nets.learning_rate[0]), scored)
  tally = jax.tree.map(jnp.zeros_like, train.tally(group, state, 0))
  return Running(state, tally, Guard(jnp.int32(-1), jnp.zeros(len(jax.tree.leaves(state.phi)), bool)))


def once(setting: Setting) -> dict[str, Any]:
  """Options for programs that draw weights: they run once, and on CPUs LLVM would take minutes over those of a ResNet-50, whose
  small loops it unrolls."""
  return {'xla_backend_optimization_level': 0} if setting.mesh.devices.flat[0].platform == 'cpu' else {}


def make_first(setting: Setting) -> Callable[[Any], Running]:
  """The program `begin`."""
  places = layout(setting.shapes, setting.mesh)
  return jax.jit(functools.partial(begin, setting), out_shardings=places, compiler_options=once(setting))


def make_weights(setting: Setting) -> Callable[[], Tree]:
  """The program () → θ before the first step, on every device."""
  def weights():
    return first_weights(setting.net, image_shape(setting), int(setting.nets.seed[0]))[0]
  return jax.jit(weights, out_shardings=everywhere(setting.mesh), compiler_options=once(setting))


def make_step(setting: Setting) -> jax.stages.Wrapped:
  """The program (running, steps taken, images uint8 [B, S, S, 3], labels [B], do masks change?) → running after one more step,
  and its loss. It is compiled for steps at which masks change, and for those at which they stay: a branch would keep a GPU's host
  from sending steps ahead. Without the last argument there is one.
  """
  config, group = setting.config, setting.group
  loss_fn = in_parts(train.make_loss(setting.net, config.label_smoothing), config.stream.batch_norm_parts)
  seed, penalty = int(setting.nets.seed[0]), float(setting.nets.penalty[0])
  tx = group.optimizer(float(setting.nets.learning_rate[0]), train.stream(seed, train.MASKS), None)

  def step(running, n, images, labels, due=None):
    now = train.tally(group, running.state, n)
    state, loss = train.train_step(loss_fn, group, tx, running.state, n, train.pixels(images), labels, train.gates_key(seed, n),
                                   penalty, due)
    fine = jnp.stack([jnp.isfinite(jnp.sum(x)) for x in jax.tree.leaves(state.phi)])
    first = (running.guard.step < 0) & ~(jnp.isfinite(loss) & jnp.all(fine))
    guard = Guard(jnp.where(first, n + 1, running.guard.step), jnp.where(first, ~fine, running.guard.leaves))
    return Running(state, jax.tree.map(jnp.add, running.tally, now._replace(loss=loss)), guard), loss
  places = layout(setting.shapes, setting.mesh)
  whole, mapped = everywhere(setting.mesh), by_image(setting.mesh)
  return jax.jit(step, donate_argnums=0, static_argnums=4, in_shardings=(places, whole, mapped, mapped),
                 out_shardings=(places, whole))


def compile_step(setting: Setting, due: bool) -> Callable[..., tuple[Running, jax.Array]]:
  """`make_step` compiled for steps at which masks change, or stay, by shapes alone."""
  size, batch = setting.config.stream.image_size, setting.config.batch_size
  images, labels = jax.ShapeDtypeStruct((batch, size, size, 3), jnp.uint8), jax.ShapeDtypeStruct((batch,), jnp.int32)
  return make_step(setting).lower(setting.shapes, 0, images, labels, due).compile()


def make_cut(setting: Setting) -> Callable[[Running], tuple[Running, Sums]]:
  """The program running → running with its sums at 0, and the sums."""
  def cut(running):
    return running._replace(tally=jax.tree.map(jnp.zeros_like, running.tally)), Sums(running.tally, running.guard)
  places = layout(setting.shapes, setting.mesh)
  return jax.jit(cut, donate_argnums=0, in_shardings=(places,), out_shardings=(places, everywhere(setting.mesh)))


def make_sum(mesh: Mesh) -> Callable[[Sequence[int]], jax.Array]:
  """The function: numbers of each host → int32 [N], their sums over all hosts. It does not wait for the devices."""
  add = jax.jit(lambda x: jnp.sum(x, 0), out_shardings=everywhere(mesh))

  def over_hosts(numbers: Sequence[int]) -> jax.Array:
    mine = np.zeros((len(mesh.local_devices), len(numbers)), np.int32)
    mine[0] = numbers
    return add(jax.make_array_from_process_local_data(by_image(mesh), mine))
  return over_hosts


def scored_shapes(setting: Setting) -> Any:
  if setting.group.first_masks is None:
    return None
  size, batch = setting.config.stream.image_size, setting.config.batch_size
  return (jax.ShapeDtypeStruct((train.SCORED, batch, size, size, 3), jnp.uint8),
          jax.ShapeDtypeStruct((train.SCORED, batch), jnp.int32))


class Hits(NamedTuple):
  """Sums over images: int32, and float32 for the loss."""
  images: Any
  first: Any     # put into their class
  fifth: Any     # whose class is among the five likeliest
  loss: Any


def make_score(setting: Setting) -> Callable[..., Hits]:
  """The program (θ, network state, images uint8, labels, with −1 for none) → sums. Of equal logits the first is the likelier, and
  an image with one that is NaN is wrong."""
  def score(theta, net_state, images, labels):
    logits = setting.net.apply(theta, net_state, None, train.pixels(images), False)[0]
    real = labels >= 0
    own = jnp.take_along_axis(logits, jnp.maximum(labels, 0)[:, None], 1)
    earlier = jnp.arange(logits.shape[1])[None] < labels[:, None]
    above = jnp.sum((logits > own) | (logits == own) & earlier, 1)
    above = jnp.where(jnp.any(jnp.isnan(logits), 1), 5, above)   # not among the five likeliest
    entropy = jax.nn.logsumexp(logits, axis=1) - own[:, 0]
    def total(x):
      return jnp.sum(jnp.where(real, x, 0), dtype=jnp.int32)
    return Hits(total(jnp.ones_like(real)), total(above < 1), total(above < 5), jnp.sum(jnp.where(real, entropy, 0)))
  whole, mapped = everywhere(setting.mesh), by_image(setting.mesh)
  return jax.jit(score, in_shardings=(None, None, mapped, mapped), out_shardings=whole)

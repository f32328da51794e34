"""Training of many networks as one compiled program: a group for each setting that changes the program, networks mapped in it."""
import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from powerprop.reparam import Reparam, Tree

NETS = 'nets'   # the one mesh axis: the networks of a group are dealt out to the devices


class TrainState(NamedTuple):
  phi: Tree
  opt_state: Any


class Group(NamedTuple):
  """Networks that share a program: what is static in training."""
  axes: dict[str, Any]                                          # alpha, optimizer, update, biases
  reparam: Reparam
  optimizer: Callable[[Any], optax.GradientTransformation]      # learning rate → chain in its wrapper


class Nets(NamedTuple):
  """What tells the networks of a group apart; [K] each."""
  seed: np.ndarray             # int32
  learning_rate: np.ndarray    # float32


class Slots(NamedTuple):
  """The networks of one group on n devices, S places on each: [n·S], a device's own networks first, then repetitions."""
  nets: Nets
  number: np.ndarray           # int32 [n]: networks of each device that are no repetitions
  place: np.ndarray            # int32 [K]: where each network of the group is
  source: np.ndarray           # int32 [n·S]: which network is at each place


class Batches(NamedTuple):
  """A data set: images uint8 [N, H, W, C] and labels int32 [N]."""
  images: jax.Array | np.ndarray
  labels: jax.Array | np.ndarray


def train_step(loss_fn: Callable[..., jax.Array], reparam: Reparam, tx: optax.GradientTransformation, state: TrainState,
               images: jax.Array, labels: jax.Array) -> tuple[TrainState, jax.Array]:
  """One step of one network: images uint8 [B, H, W, C], labels int32 [B] → state and loss before the step."""
  theta = reparam.weights(state.phi)
  loss, grads = jax.value_and_grad(loss_fn)(theta, images.astype(jnp.float32) / 255, labels)
  updates, opt_state = tx.update(grads, state.opt_state, state.phi)
  return TrainState(optax.apply_updates(state.phi, updates), opt_state), loss


def make_loss(net: hk.Transformed) -> Callable[..., jax.Array]:
  """(θ, images [B, H, W, C] in [0, 1], labels [B]) → mean cross-entropy."""
  def loss_fn(theta, images, labels):
    logits = net.apply(theta, images)
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()
  return loss_fn


def make_weights(net: hk.Transformed, image_shape: tuple[int, ...], mesh: Mesh) -> Callable[[np.ndarray], Tree]:
  """Seeds [K] → initial weights θ0, leaves [K, ...] on every device. They depend on the seed alone: alike in every group."""
  def one(seed):
    return net.init(init_key(seed), jnp.zeros((1, *image_shape)))
  return jax.jit(jax.vmap(one), out_shardings=replicated(mesh))


def make_init(groups: Sequence[Group], slots: Sequence[Slots], mesh: Mesh) -> Callable[[Tree], list[TrainState]]:
  """θ0 by network → states of each group by place, leaves [n·S, ...]."""
  def one(group, theta, learning_rate):
    phi = group.reparam.inverse(theta)
    return TrainState(phi, group.optimizer(learning_rate).init(phi))
  def init(theta0):
    return [jax.vmap(lambda t, r, g=group: one(g, t, r))(jax.tree.map(lambda x, s=s: x[s.source], theta0), s.nets.learning_rate)
            for group, s in zip(groups, slots, strict=True)]
  return jax.jit(init, out_shardings=by_net(mesh))


def init_key(seed: Any) -> jax.Array:
  return jax.random.fold_in(jax.random.key(seed), 0)


def batches_key(seed: Any, epoch: Any) -> jax.Array:
  return jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), 1), epoch)


def make_epoch(groups: Sequence[Group], net: hk.Transformed, batch_size: int, mesh: Mesh,
               batched: bool | None = None) -> Callable[..., Any]:
  """The program (states, slots, data, epoch, first, last) → (states, losses): steps first ≤ t < last of an epoch.

  Batch t of an epoch is the t-th slice of a permutation that depends on seed and epoch only, so all groups see the same
  batches, and a run may stop after any epoch and go on bit-identically. The bounds are traced: one compilation. The states are
  donated. Losses are means over the steps taken, [n·S] for each group.

  A GPU or TPU trains the networks of a group side by side, as one batched network; a CPU core is filled by one network already,
  trains one after another, and skips the repetitions. `batched` chooses by hand.
  """
  loss_fn = make_loss(net)
  if batched is None:
    batched = mesh.devices.flat[0].platform != 'cpu'

  def one_net(group, data, number, first, last, state, seed, learning_rate):
    tx = group.optimizer(learning_rate)
    order = jax.random.permutation(batches_key(seed, number), data.labels.size)

    def step(t, carry):
      state, total = carry
      pick = jax.lax.dynamic_slice_in_dim(order, t * batch_size, batch_size)
      state, loss = train_step(loss_fn, group.reparam, tx, state, data.images[pick], data.labels[pick])
      return state, total + loss

    state, total = jax.lax.fori_loop(first, last, step, (state, jnp.float32(0)))
    return state, total / (last - first)

  def epoch(states, nets, counts, data, number, first, last):
    out = []
    for group, state, n, count in zip(groups, states, nets, counts, strict=True):
      train = functools.partial(one_net, group, data, number, first, last)
      out.append(jax.vmap(train)(state, *n) if batched else each(train, count[0], state, *n))
    return [state for state, _ in out], [loss for _, loss in out]

  mapped, whole = PartitionSpec(NETS), PartitionSpec()
  # Networks never talk to each other, so each device runs its own; nothing is left for a partitioner to decide.
  return jax.jit(jax.shard_map(epoch, mesh=mesh, in_specs=(mapped, mapped, mapped, whole, whole, whole, whole),
                               out_specs=mapped, check_vma=False), donate_argnums=0)


def each(f: Callable[..., Tree], count: jax.Array, *xs: Tree) -> Tree:
  """`f` of the first `count` (traced) elements of `xs`, one after another; zeros for the rest. Conditions stay branches."""
  shape = jax.eval_shape(f, *jax.tree.map(lambda x: x[0], xs))
  length = jax.tree.leaves(xs)[0].shape[0]

  def body(i, out):
    one = f(*jax.tree.map(lambda x: jax.lax.dynamic_index_in_dim(x, i, keepdims=False), xs))
    return jax.tree.map(lambda all_, x: jax.lax.dynamic_update_index_in_dim(all_, x, i, 0), out, one)

  empty = jax.tree.map(lambda s: jnp.zeros((length, *s.shape), s.dtype), shape)
  return jax.lax.fori_loop(0, count, body, empty)


# ---- layout -----------------------------------------------------------------------------------------------------


def make_mesh() -> Mesh:
  """All devices of all hosts in a row."""
  return jax.make_mesh((jax.device_count(),), (NETS,), axis_types=(jax.sharding.AxisType.Auto,))


def deal(nets: Nets, groups: int, devices: int) -> list[Slots]:
  """Deals the networks of all groups out in turn, so that no device gets more than its share of the whole sweep."""
  k = len(nets.seed)
  places = -(-k // devices)
  slots = []
  for g in range(groups):
    device = (g * k + np.arange(k)) % devices
    count = np.bincount(device, minlength=devices)
    rank = np.array([np.sum(device[:i] == device[i]) for i in range(k)])
    place = device * places + rank
    index = np.full(devices * places, k - 1)
    index[place] = np.arange(k)
    slots.append(Slots(Nets(*(x[index] for x in nets)), count.astype(np.int32), place, index))
  return slots


def gather(states: Sequence[Tree], slots: Sequence[Slots]) -> list[Tree]:
  """Leaves [n·S, ...] by place → [K, ...] by network."""
  return [jax.tree.map(lambda x, s=s: x[s.place], state) for state, s in zip(states, slots, strict=True)]


def scatter(states: Sequence[Tree], slots: Sequence[Slots]) -> list[Tree]:
  """Leaves [K, ...] by network → [n·S, ...] by place."""
  return [jax.tree.map(lambda x, s=s: x[s.source], state) for state, s in zip(states, slots, strict=True)]


def by_net(mesh: Mesh) -> NamedSharding:
  return NamedSharding(mesh, PartitionSpec(NETS))


def replicated(mesh: Mesh) -> NamedSharding:
  return NamedSharding(mesh, PartitionSpec())


def replicate(tree: Tree, mesh: Mesh) -> Tree:
  return jax.device_put(tree, replicated(mesh))

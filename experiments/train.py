"""Training of many networks as one compiled program: a group for each setting that changes the program, networks mapped in it."""
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from powerprop.reparam import Reparam, Tree

NETS = 'nets'   # the one mesh axis: networks of a group are laid out over the devices


class TrainState(NamedTuple):
  phi: Tree
  opt_state: Any


class Group(NamedTuple):
  """Networks that share a program: what is static in training."""
  axes: dict[str, Any]                                          # alpha, optimizer, update, biases
  reparam: Reparam
  optimizer: Callable[[Any], optax.GradientTransformation]      # learning rate → chain with its wrapper


class Nets(NamedTuple):
  """What tells the networks of a group apart; [K] each, the same for every group."""
  seed: np.ndarray             # int32
  learning_rate: np.ndarray    # float32


class Batches(NamedTuple):
  """A data set on the devices, and how it is cut."""
  images: jax.Array            # uint8 [N, H, W, C]
  labels: jax.Array            # int32 [N]


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


def make_init(groups: Sequence[Group], net: hk.Transformed, image_shape: tuple[int, ...],
              mesh: Mesh) -> Callable[[Nets], list[TrainState]]:
  """Nets → one state a group with leaves [K, ...]. The weights θ0 depend on the seed alone: alike in every group."""
  def one(group, seed, learning_rate):
    phi = group.reparam.inverse(net.init(init_key(seed), jnp.zeros((1, *image_shape))))
    return TrainState(phi, group.optimizer(learning_rate).init(phi))
  def init(nets):
    return [jax.vmap(lambda s, r, g=group: one(g, s, r))(nets.seed, nets.learning_rate) for group in groups]
  return jax.jit(init, out_shardings=NamedSharding(mesh, PartitionSpec(NETS)))


def init_key(seed: Any) -> jax.Array:
  return jax.random.fold_in(jax.random.key(seed), 0)


def batches_key(seed: Any, epoch: Any) -> jax.Array:
  return jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), 1), epoch)


def make_epoch(groups: Sequence[Group], net: hk.Transformed, batch_size: int, mesh: Mesh) -> Callable[..., Any]:
  """The program (states, nets, data, epoch, first, last) → (states, losses [G, K]): steps first ≤ t < last of an epoch.

  Batch t of an epoch is the t-th slice of a permutation that depends on seed and epoch only, so every group sees the same
  batches, and a run may stop after any epoch and go on bit-identically. Bounds are traced: one compilation. The states are
  donated. Losses are means over the steps taken.
  """
  loss_fn = make_loss(net)

  def epoch(states, nets, data, number, first, last):
    keys = jax.vmap(lambda seed: batches_key(seed, number))(nets.seed)
    order = jax.vmap(lambda key: jax.random.permutation(key, data.labels.size))(keys)

    def step(t, carry):
      states, totals = carry
      pick = jax.lax.dynamic_slice_in_dim(order, t * batch_size, batch_size, axis=1)
      images, labels = data.images[pick], data.labels[pick]
      out = [jax.vmap(lambda rate, *args, g=group: train_step(loss_fn, g.reparam, g.optimizer(rate), *args))(
          nets.learning_rate, state, images, labels) for group, state in zip(groups, states, strict=True)]
      return [state for state, _ in out], [total + loss for total, (_, loss) in zip(totals, out, strict=True)]

    totals = [jnp.zeros(nets.seed.shape) for _ in groups]
    states, totals = jax.lax.fori_loop(first, last, step, (states, totals))
    return states, jnp.stack(totals) / (last - first)

  mapped, whole = PartitionSpec(NETS), PartitionSpec()
  # Networks never talk to each other, so each device runs its own; nothing is left for a partitioner to decide.
  return jax.jit(jax.shard_map(
      epoch, mesh=mesh, in_specs=(mapped, mapped, whole, whole, whole, whole),
      out_specs=(mapped, PartitionSpec(None, NETS)), check_vma=False), donate_argnums=0)


def make_mesh() -> Mesh:
  """All devices of all hosts in a row."""
  return jax.make_mesh((jax.device_count(),), (NETS,), axis_types=(jax.sharding.AxisType.Auto,))


def pad(nets: Nets, mesh: Mesh) -> Nets:
  """`nets` with its last network repeated until the devices divide their number; what is added is dropped at the end."""
  missing = -len(nets.seed) % mesh.size
  return Nets(*(np.concatenate([x, np.repeat(x[-1:], missing)]) for x in nets))


def replicate(tree: Tree, mesh: Mesh) -> Tree:
  return jax.device_put(tree, NamedSharding(mesh, PartitionSpec()))

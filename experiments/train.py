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

import powerprop
from powerprop import flops
from powerprop.reparam import Reparam, Tree

NETS = 'nets'   # the one mesh axis: the networks of a group are dealt out to the devices
MASKS = 2       # the stream of random masks; others are initialisation (0), batches (1), augmentation (3) and gates (4)
SCORED = 4      # batches on which masks are scored at the start


class TrainState(NamedTuple):
  phi: Tree
  opt_state: Any
  net_state: Tree   # running averages of BatchNorm; empty for networks without it


class OwnParameters(NamedTuple):
  """STR, L0 and their kin."""
  expand: Callable[[Tree], Tree]                # θ → parameters
  fold: Callable[[Tree, Any], Tree]             # (parameters, key or None) → θ
  regulariser: Callable[[Tree], jax.Array]      # parameters → scalar, which `penalty` weighs in the loss
  zeros: bool                                   # are pruned weights exactly 0?


class Group(NamedTuple):
  """Networks that share a program: what is static in training."""
  axes: dict[str, Any]                                          # alpha, optimizer, update, biases, algorithm, sparsity
  reparam: Reparam
  optimizer: Callable[..., optax.GradientTransformation]        # (learning rate, key, masks at the start) → chain in its wrappers
  sparse: bool = False                                          # is there a `sparsify` in the chain?
  due: Callable[[Any], Any] = lambda step: False                # do masks change at this update, counted from 1?
  dense_gradient: Callable[[Any], Any] = lambda step: False     # does the algorithm look at the gradient of all weights now?
  first_masks: Callable[..., Tree] | None = None                # (loss, network, θ, batches) → masks, scored at the start
  rescale: bool = False                                         # do the live weights start with the norm of the whole layer?
  own: OwnParameters | None = None                              # parameters that the network has in place of its weights


class Nets(NamedTuple):
  """What tells the networks of a group apart; [K] each."""
  seed: np.ndarray             # int32
  learning_rate: np.ndarray    # float32
  penalty: np.ndarray          # float32: weight of the regulariser of networks with parameters of their own


class Slots(NamedTuple):
  """The networks of one group on n devices, S places on each: [n·S], a device's own networks first, then repetitions."""
  nets: Nets
  number: np.ndarray           # int32 [n]: networks of each device that are no repetitions
  place: np.ndarray            # int32 [K]: where each network of the group is
  source: np.ndarray           # int32 [n·S]: which network is at each place


class Tally(NamedTuple):
  """Means over the steps of a part of an epoch: float32."""
  loss: jax.Array
  forward: Tree           # density of what the network sees; None for leaves that are never masked; () for dense training
  backward: Tree          # density of what the optimiser moves
  dense_gradient: jax.Array    # share of steps whose gradient is wanted at all weights


class Batches(NamedTuple):
  """A data set: images uint8 [N, H, W, C] and labels int32 [N]."""
  images: jax.Array | np.ndarray
  labels: jax.Array | np.ndarray


def train_step(loss_fn: Callable[..., Any], group: Group, tx: optax.GradientTransformation, state: TrainState, step: Any,
               images: jax.Array, labels: jax.Array, key: Any = None, penalty: Any = 0.0,
               due: bool | None = None) -> tuple[TrainState, jax.Array]:
  """One step of one network: images float [B, H, W, C] in [0, 1], labels int32 [B] → state and loss before the step.

  `step`: updates applied before this one; where it is not mapped over networks, an update of masks stays a branch. `key` and
  `penalty` are for networks with parameters of their own. `due`: do masks change? None: the step decides, by a branch.
  """
  def objective(params):
    theta = params if group.own is None else group.own.fold(params, key)
    loss, net_state = loss_fn(theta, state.net_state, images, labels)
    return loss if group.own is None else loss + penalty * group.own.regulariser(params), (loss, net_state)

  params = group.reparam.weights(state.phi)
  params = powerprop.masked(state.opt_state, params) if group.sparse else params   # what the network sees
  grads, (loss, net_state) = jax.grad(objective, has_aux=True)(params)
  updates, opt_state = tx.update(grads, state.opt_state, state.phi, step=step, due=due)
  return TrainState(optax.apply_updates(state.phi, updates), opt_state, net_state), loss


def final_weights(group: Group, phi: Tree) -> Tree:
  """θ of a trained network, before any mask."""
  params = group.reparam.weights(phi)
  return params if group.own is None else group.own.fold(params, None)


def final_masks(group: Group, state: TrainState) -> Tree | None:
  """The masks that training has made, or None where it has made none."""
  if group.own is not None:
    return powerprop.parameterisations.nonzero(final_weights(group, state.phi)) if group.own.zeros else None
  return state.opt_state.masks.forward if group.sparse else None


def make_loss(net: hk.TransformedWithState, smoothing: float = 0.0) -> Callable[..., Any]:
  """(θ, state of the network, images [B, H, W, C] in [0, 1], labels [B]) → mean cross-entropy, new state.

  `smoothing`: the share of each label that is spread over all classes alike (Szegedy et al. 2016, arXiv:1512.00567).
  """
  def loss_fn(theta, net_state, images, labels):
    logits, net_state = net.apply(theta, net_state, None, images, True)
    entropy = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
    if smoothing:   # log Σ exp z − the mean of z is the cross-entropy with all classes alike
      uniform = jax.nn.logsumexp(logits, axis=-1) - logits.mean(axis=-1)
      entropy = (1 - smoothing) * entropy + smoothing * uniform
    return entropy.mean(), net_state
  return loss_fn


def make_weights(net: hk.TransformedWithState, image_shape: tuple[int, ...],
                 mesh: Mesh) -> Callable[[np.ndarray], tuple[Tree, Tree]]:
  """Seeds [K] → initial weights θ0 and state of the network, leaves [K, ...] on every device. They depend on the seed alone:
  alike in every group."""
  def one(seed):
    return net.init(init_key(seed), jnp.zeros((1, *image_shape)), True)
  return jax.jit(jax.vmap(one), out_shardings=replicated(mesh))


def make_init(groups: Sequence[Group], slots: Sequence[Slots], net: hk.TransformedWithState, batch_size: int,
              mesh: Mesh) -> Callable[..., list[TrainState]]:
  """The program (θ0, network states, data) by network → states of each group by place, leaves [n·S, ...]."""
  def one(group, data, theta, net_state, seed, learning_rate, penalty):
    scored = None
    if group.first_masks:
      shape = SCORED, min(batch_size, data.labels.size // SCORED)
      pick = jax.random.choice(stream(seed, MASKS), data.labels.size, shape, False)
      scored = pixels(data.images[pick]), data.labels[pick]
    return first_state(net, group, theta, net_state, seed, learning_rate, scored)

  def init(theta0, net_states, data):
    out = []
    for group, slot in zip(groups, slots, strict=True):
      theta, net_state = jax.tree.map(lambda x, s=slot: x[s.source], (theta0, net_states))
      out.append(jax.vmap(functools.partial(one, group, data))(theta, net_state, *slot.nets))
    return out
  return jax.jit(init, out_shardings=by_net(mesh))


def first_state(net: hk.TransformedWithState, group: Group, theta: Tree, net_state: Tree, seed: Any, learning_rate: Any,
                scored: Any = None) -> TrainState:
  """The state before the first step of a network that begins at θ. `scored`: images in [0, 1] [M, B, H, W, C] and labels [M, B],
  for masks that are scored."""
  def loss(theta, batch):   # batch statistics, as at the first step of training
    return make_loss(net)(theta, net_state, *batch)[0]
  def network(theta, images):
    return net.apply(theta, net_state, None, images, False)[0]
  first = group.first_masks(loss, network, theta, scored) if group.first_masks else None
  phi = group.reparam.inverse(theta if group.own is None else group.own.expand(theta))
  opt_state = group.optimizer(learning_rate, stream(seed, MASKS), first).init(phi)
  if group.rescale:
    phi = group.reparam.inverse(powerprop.rescaled(opt_state, group.reparam.weights(phi)))
  return TrainState(phi, opt_state, net_state)


def stream(seed: Any, which: int) -> jax.Array:
  """A key for one purpose: streams of different purposes are independent."""
  return jax.random.fold_in(jax.random.key(seed), which)


def init_key(seed: Any) -> jax.Array:
  return stream(seed, 0)


def batches_key(seed: Any, epoch: Any) -> jax.Array:
  return jax.random.fold_in(stream(seed, 1), epoch)


def augment_key(seed: Any, step: Any) -> jax.Array:
  return jax.random.fold_in(stream(seed, 3), step)


def gates_key(seed: Any, step: Any) -> jax.Array:
  return jax.random.fold_in(stream(seed, 4), step)


def pixels(images: jax.Array) -> jax.Array:
  """uint8 → float32 in [0, 1]."""
  return images.astype(jnp.float32) / 255


def make_epoch(groups: Sequence[Group], net: hk.TransformedWithState, batch_size: int, mesh: Mesh,
               augment: Callable[[jax.Array, jax.Array], jax.Array] | None = None,
               batched: bool | None = None, smoothing: float = 0.0) -> Callable[..., Any]:
  """The program (states, slots, data, epoch, first, last) → (states, tallies): steps first ≤ t < last of an epoch.

  Batch t of an epoch is the t-th slice of a permutation that depends on seed and epoch only, so all groups see the same
  batches, and a run may stop after any epoch and go on bit-identically. The bounds are traced: one compilation. The states are
  donated. A tally is a mean over the steps taken, leaves [n·S] for each group.

  `batched`: the networks of a group train side by side, as one batched network; else one after another, without the repetitions.
  By default as `side_by_side` says. `augment`: (key, images uint8) → images. `smoothing`: of labels.
  """
  loss_fn = make_loss(net, smoothing)

  def one_net(group, data, number, first, last, state, seed, learning_rate, penalty):
    tx = group.optimizer(learning_rate, stream(seed, MASKS), None)
    order = jax.random.permutation(batches_key(seed, number), data.labels.size)
    before = number * (data.labels.size // batch_size)   # steps of the epochs before

    def step(t, carry):
      state, total = carry
      pick = jax.lax.dynamic_slice_in_dim(order, t * batch_size, batch_size)
      images = data.images[pick] if augment is None else augment(augment_key(seed, before + t), data.images[pick])
      now = tally(group, state, before + t)
      state, loss = train_step(loss_fn, group, tx, state, before + t, pixels(images), data.labels[pick],
                               gates_key(seed, before + t), penalty)
      return state, jax.tree.map(jnp.add, total, now._replace(loss=loss))

    zeros = jax.tree.map(jnp.zeros_like, tally(group, state, before))
    state, total = jax.lax.fori_loop(first, last, step, (state, zeros))
    return state, jax.tree.map(lambda x: x / (last - first), total)

  def epoch(states, nets, counts, data, number, first, last):
    out = []
    for group, state, n, count in zip(groups, states, nets, counts, strict=True):
      train = functools.partial(one_net, group, data, number, first, last)
      together = side_by_side(state.phi, mesh) if batched is None else batched
      out.append(jax.vmap(train)(state, *n) if together else each(train, count[0], state, *n))
    return [state for state, _ in out], [tallies for _, tallies in out]

  mapped, whole = PartitionSpec(NETS), PartitionSpec()
  # Networks never talk to each other, so each device runs its own; nothing is left for a partitioner to decide.
  return jax.jit(jax.shard_map(epoch, mesh=mesh, in_specs=(mapped, mapped, mapped, whole, whole, whole, whole),
                               out_specs=mapped, check_vma=False), donate_argnums=0)


def side_by_side(params: Tree, mesh: Mesh) -> bool:
  """Does a device train the networks of a group (leaves [K, ...]) best as one batched network? A GPU or TPU is far from filled by
  small dense layers. A CPU core is filled by one network; and convolutions of different weights batched are grouped ones,
  slow everywhere."""
  return mesh.devices.flat[0].platform != 'cpu' and not is_convolutional(jax.tree.map(lambda x: x[0], params))


def is_convolutional(params: Tree) -> bool:
  return any(x.ndim > 2 for x in jax.tree.leaves(params))


def tally(group: Group, state: TrainState, step: Any) -> Tally:
  """Of the step to come; without its loss."""
  zero = jnp.float32(0)
  if not group.sparse:
    return Tally(zero, (), (), zero)
  def densities(kept, masks):
    return jax.tree.map(lambda k, m: k.astype(jnp.float32) / m.size, kept, masks)
  kept, masks = state.opt_state.kept, state.opt_state.masks
  return Tally(zero, densities(kept.forward, masks.forward), densities(kept.backward, masks.backward),
               jnp.asarray(group.dense_gradient(step + 1), jnp.float32))


def at_steps(schedule: Callable[[Any], Any], steps: np.ndarray) -> np.ndarray:
  """What a schedule of truth values says of each of these steps [N], on the host."""
  return np.broadcast_to(np.asarray(jax.vmap(lambda n: jnp.asarray(schedule(n)))(steps)), steps.shape)


def count_operations(net: hk.TransformedWithState, theta: Tree, net_state: Tree, images: tuple[int, ...]) -> flops.Costs:
  """Operations of one forward pass of a batch [B, H, W, C]. `theta` and `net_state` are those of several networks."""
  theta, net_state = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape[1:], x.dtype), (theta, net_state))
  batch = jax.ShapeDtypeStruct(images, jnp.float32)
  return flops.count(lambda p, s, x: net.apply(p, s, None, x, True)[0], theta, net_state, batch)


def operations(costs: flops.Costs, steps: int, tally: Tally) -> list[float]:
  """Of each network [K] in so many steps of such means."""
  def one(k):
    at, moved = (jax.tree.map(lambda x: min(1.0, float(x[k])), tree) for tree in (tally.forward, tally.backward))
    return flops.training(costs, [flops.Phase(steps, at, moved or None, float(tally.dense_gradient[k]))])
  return [one(k) for k in range(len(tally.loss))]


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

"""Trained networks → accuracy at every density, masks compared, statistics of weights. Never trains."""
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, PartitionSpec

from experiments.results import TRAINED
from experiments.train import NETS, Batches, each, is_convolutional, pixels
from powerprop import masks, statistics
from powerprop.reparam import Tree, is_weight, leaf_name

IMAGES_AT_ONCE = 1000   # times 20 densities: 24 MB of the widest activations of LeNet-300-100, and still large products


SCOPES = ('layer', 'global', 'layer recalibrated', 'global recalibrated')   # of pruning after training


class Evaluation(NamedTuple):
  """Of one network (leading axes are added by mapping); S scopes, D densities, L weight leaves. Arrays of JAX or NumPy."""
  kept: Any               # int32 [S, D]: weights kept
  overlap: Any            # [S, D]: share of weights on which the masks of θ0 and of θ agree
  validation: Any         # int32 [S, D]: images put into their class
  test: Any               # int32 [S, D]
  finite: Any             # bool: no weight is NaN or infinite
  statistics: dict[str, Any]   # NaN where not finite


def layer_counts(theta: Tree, densities: Sequence[float], output_layer: str, output_factor: float) -> list[Tree]:
  """For each density p a tree of counts: int(p n) of a hidden layer's n weights, int(min(1, factor p) n) of the output
  layer's, None for leaves that are never pruned. The rule of the paper's released notebook."""
  def count(path, x, p):
    name = leaf_name(path)
    if not is_weight(name, x):
      return None
    share = min(1.0, output_factor * p) if name == output_layer else p
    return int(share * x.size)
  names = [leaf_name(path) for path, _ in jax.tree_util.tree_leaves_with_path(theta)]
  if output_layer not in names:
    raise ValueError(f'no leaf is called {output_layer!r}; there are {names}.')
  return [jax.tree_util.tree_map_with_path(lambda path, x, p=p: count(path, x, p), theta) for p in densities]


def hits(net: hk.TransformedWithState, theta: Tree, net_state: Tree, data: Batches) -> jax.Array:
  """How many images the network puts into their class: int32, exact."""
  def right(example):
    image, label = example
    return jnp.argmax(net.apply(theta, net_state, None, pixels(image[None]), False)[0][0]) == label
  return jnp.sum(jax.lax.map(right, (data.images, data.labels), batch_size=min(data.labels.size, IMAGES_AT_ONCE)))


def recalibration_batches(images: jax.Array, count: int, size: int,
                          augment: Callable[[jax.Array, jax.Array], jax.Array]) -> jax.Array:
  """uint8 [M, B, H, W, C]: training images [N, H, W, C] drawn at random, and changed at random as they are in training.

  As they are stored they have other averages: on CIFAR-10 ResNet-20s that were not pruned lost 1.6 and 2.6 points by them.
  """
  rows = np.random.default_rng(0).choice(len(images), (count, size))
  return jax.lax.map(lambda x: augment(jax.random.fold_in(jax.random.key(0), x[0]), images[x[1]]), (jnp.arange(count), rows))


def recalibrate(net: hk.TransformedWithState, theta: Tree, net_state: Tree, batches: jax.Array) -> Tree:
  """The network's state after it has seen images uint8 [M, B, H, W, C] in training mode: BatchNorm's averages are those of the
  weights that there are now, and no longer of those before pruning."""
  def one(state, images):
    return net.apply(theta, state, None, pixels(images), True)[1], None
  return jax.lax.scan(one, net_state, batches)[0]


def select(theta: Tree, counts: Tree, scope: str) -> Tree:
  """Exact masks of the largest |θ|: by layer, or of the same total over all layers together."""
  if scope.startswith('layer'):
    return masks.layerwise(theta, counts)
  chosen = jax.tree.map(lambda k, x: None if k is None else x, counts, theta, is_leaf=lambda k: k is None)
  return masks.top_k_global(chosen, sum(jax.tree.leaves(counts)))


def evaluate_net(net: hk.TransformedWithState, scopes: Sequence[str], theta0: Tree, theta: Tree, net_state: Tree, trained: Tree,
                 counts: Tree, figure_counts: Tree, batches: jax.Array, validation: Batches, test: Batches) -> Evaluation:
  """One network at all densities, or with the masks that training has made.

  `trained`: these masks; None where there are none. `counts`: a tree of int32 [D]; the masks are found one density after
  another, so that the search for a threshold stays one branch. `batches`: images to recalibrate BatchNorm with.
  """
  def one_scope(scope):
    def at_density(k):
      before, after = select(theta0, k, scope), select(theta, k, scope)
      return after, masks.overlap(before, after)
    if scope == TRAINED:
      kept = jax.tree.map(lambda m: m[None], trained)
      before = select(theta0, masks.counts(trained), 'layer')
      overlap = masks.overlap(before, trained)[None]
    else:
      kept, overlap = jax.lax.map(at_density, counts)
    total = sum(jnp.sum(m, axis=tuple(range(1, m.ndim)), dtype=jnp.int32) for m in jax.tree.leaves(kept))

    def score(mask):
      pruned = masks.apply(mask, theta)
      state = recalibrate(net, pruned, net_state, batches) if scope.endswith('recalibrated') else net_state
      return [hits(net, pruned, state, data) for data in (validation, test)]
    # Small dense layers of many networks are one product; convolutions with weights of their own would be slow as a grouped one.
    scores = jax.lax.map(score, kept) if is_convolutional(theta) else jax.vmap(score)(kept)
    return total, overlap, *scores

  kept, overlap, on_validation, on_test = (jnp.stack(column) for column in zip(*map(one_scope, scopes), strict=True))
  finite = jnp.all(jnp.stack([jnp.all(jnp.isfinite(x)) for x in jax.tree.leaves(theta)]))
  survivors = select(theta, figure_counts, 'layer') if trained is None else trained
  measured = weight_statistics(theta0, theta, survivors)
  return Evaluation(kept, overlap, on_validation, on_test, finite,
                    jax.tree.map(lambda x: jnp.where(finite, x, jnp.nan), measured))


def weight_statistics(theta0: Tree, theta: Tree, survivors: Tree) -> dict[str, jax.Array]:
  """Plain measures of what figures 1c and 1d show: sign flips, heavy tails, and from where the survivors come."""
  chosen = jax.tree.map(lambda m: m is not None, survivors, is_leaf=lambda m: m is None)

  def pick(tree):
    return jax.tree.map(lambda on, x: x if on else None, chosen, tree)

  before, after = pick(theta0), pick(theta)
  half = select(theta0, jax.tree.map(lambda x: x.size - x.size // 2, before), 'layer')
  from_small = jax.tree.map(lambda s, h: jnp.sum(s & ~h), pick(survivors), half)
  kept = sum(jnp.sum(m) for m in jax.tree.leaves(survivors))
  return {
      'sign_flips': statistics.sign_flips(before, after),
      'survivor_sign_flips': statistics.sign_flips(before, after, pick(survivors)),
      'kurtosis': statistics.kurtosis(after),
      'survivors_from_smaller_half': jnp.asarray(sum(jax.tree.leaves(from_small)) / kept),
  }


def make_evaluate(net: hk.TransformedWithState, scopes: Sequence[str], mesh: Mesh) -> Callable[..., Evaluation]:
  """The program (theta0, theta, network state, masks or None, count, layer counts, figure_counts, batches, validation, test) →
  `Evaluation` with leading axis [n·S]."""
  def nets(theta0, theta, net_state, trained, count, *rest):
    return each(lambda *own: evaluate_net(net, scopes, *own, *rest), count[0], theta0, theta, net_state, trained)
  mapped, whole = PartitionSpec(NETS), PartitionSpec()
  return jax.jit(jax.shard_map(nets, mesh=mesh, in_specs=(mapped,) * 5 + (whole,) * 5, out_specs=mapped, check_vma=False))


def sample_weights(theta0: Tree, theta: Tree, survivors: Tree, n: int, seed: int = 0) -> dict[str, np.ndarray]:
  """At most `n` weights of a network, drawn without replacement: initial and final value, and whether it survived."""
  chosen = [m is not None for m in jax.tree.leaves(survivors, is_leaf=lambda m: m is None)]
  def flat(tree: Any) -> np.ndarray:
    leaves = jax.tree.leaves(tree, is_leaf=lambda m: m is None)
    return np.concatenate([np.asarray(x).reshape(-1) for x, on in zip(leaves, chosen, strict=True) if on])
  initial, final, kept = flat(theta0), flat(theta), flat(survivors)
  pick = np.random.default_rng(seed).choice(initial.size, min(n, initial.size), replace=False)
  return {'initial': initial[pick], 'final': final[pick], 'kept': kept[pick]}

"""What the algorithms share: where masks begin, how entries are chosen by layer or over all layers, and random scores."""
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from powerprop import masks
from powerprop.distributions import Distribution, Sparsity, leave_dense, make_counts
from powerprop.masks import is_none
from powerprop.reparam import Tree


def budget(weights: Tree, sparsity: Sparsity, distribution: Distribution, dense: Sequence[str]) -> tuple[Tree, Any]:
  """The leaves that may be pruned and are not named in `dense`, None in place of others; and how many weights of each are kept,
  or of all of them together."""
  weights = leave_dense(weights, dense)
  return weights, make_counts(weights, sparsity, distribution)


def everything(weights: Tree) -> Tree:
  """Masks that keep all."""
  return jax.tree.map(lambda x: jnp.ones(x.shape, bool), weights)


def under(mask: Tree, tree: Tree) -> Tree:
  """The leaves of `tree` that have a mask; None in place of the others."""
  return jax.tree.map(lambda m, x: None if m is None else x, mask, tree, is_leaf=is_none)


def targets(weights: Tree, counts: Any, share: jax.Array) -> Any:
  """Counts at a share of the way from dense to `counts`: n − round(share (n − k)), exactly k at share 1. int32."""
  def leaf(k: int, size: int) -> jax.Array:
    return jnp.where(share >= 1, k, size - jnp.round(share * (size - k)).astype(jnp.int32)).astype(jnp.int32)
  if isinstance(counts, int):
    return leaf(counts, sum(x.size for x in jax.tree.leaves(weights)))
  return jax.tree.map(lambda k, x: leaf(k, x.size), counts, weights)


def select(scores: Tree, counts: Any, together: bool, live: Tree = None) -> Tree:
  """Masks of the largest |score| among the live: of one number over all leaves `together`, or by leaf of a tree of counts."""
  return (masks.top_k_global if together else masks.layerwise)(scores, counts, live)


def random_scores(key: jax.Array, like: Tree) -> Tree:
  """Independent uniform numbers in [0, 1), float32, a key for each leaf."""
  leaves, treedef = jax.tree.flatten(like)
  keys = jax.random.split(key, len(leaves))
  return jax.tree.unflatten(treedef, [jax.random.uniform(k, x.shape) for k, x in zip(keys, leaves, strict=True)])


def need_key(key: jax.Array | None, name: str) -> jax.Array:
  if key is None:
    raise ValueError(f'{name} draws at random: sparsify needs key=jax.random.key(...).')
  return key

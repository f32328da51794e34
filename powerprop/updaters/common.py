"""What the algorithms share: where masks begin, how entries are chosen, exchanged, and shared out between layers."""
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

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
  return jax.tree.map(lambda x: jnp.ones_like(x, bool), weights)


def under(mask: Tree, tree: Tree) -> Tree:
  """The leaves of `tree` that have a mask; None in place of the others."""
  return jax.tree.map(lambda m, x: None if m is None else x, mask, tree, is_leaf=is_none)


def sizes(weights: Tree, together: bool) -> Any:
  """Counts that keep all: one number, or a tree of int."""
  return sum(x.size for x in jax.tree.leaves(weights)) if together else jax.tree.map(lambda x: x.size, weights)


def targets(begin: Any, end: Any, share: jax.Array) -> Any:
  """Counts at a share of the way from one to the other: b − round(share (b − e)), exactly e at share 1. int32."""
  def leaf(b: int, e: int) -> jax.Array:
    return jnp.where(share >= 1, e, b - jnp.round(share * (b - e)).astype(jnp.int32)).astype(jnp.int32)
  return jax.tree.map(leaf, begin, end)


def select(scores: Tree, counts: Any, together: bool, live: Tree = None) -> Tree:
  """Masks of the largest |score| among the live: of one number over all leaves `together`, or by leaf of a tree of counts."""
  return (masks.top_k_global if together else masks.layerwise)(scores, counts, live)


def exchange(theta: Tree, scores: Tree, live: Tree, counts: Any, together: bool, fraction: jax.Array) -> Tree:
  """Masks of exactly `counts`: the live weights of largest |θ| but for a fraction, and the others of largest |score|.

    d = round(f k);   kept = top(|θ|, k − d, live);   kept ∪ top(|score|, k − |kept|, the rest)

  One live weight at least stays: for α > 1 those that come back are placed by it. Live weights above the count are pruned; a
  mask from elsewhere may have fewer: what is missing is grown.
  """
  stay = jax.tree.map(lambda k: jnp.maximum(k - jnp.round(fraction * k).astype(jnp.int32), jnp.minimum(k, 1)), counts)
  kept = select(theta, stay, together, live)
  found = sum_counts(kept) if together else masks.counts(kept)
  missing = jax.tree.map(lambda k, n: k - n, counts, found)
  grown = select(scores, missing, together, jax.tree.map(jnp.logical_not, kept))
  return jax.tree.map(jnp.logical_or, kept, grown)


def sum_counts(mask: Tree) -> jax.Array:
  """Entries kept in all leaves together: int32 scalar."""
  return _sum(jnp.stack(jax.tree.leaves(masks.counts(mask))))


def share_out(total: int | jax.Array, weights: jax.Array, capacity: jax.Array) -> jax.Array:
  """Integers in proportion to `weights`, none above its capacity, that add up to `total`: by largest remainder.

    n_l = min(c_l, ε w_l), rounded, with ε such that Σ n_l = total

  Where that leaves a rest, as all that still have room weigh 0, it is shared out in proportion to their capacity. All of it is
  integer arithmetic: weights that are integers, of a sum below 2²⁹, get what fractions without rounding would give them;
  floating ones are first rounded to multiples of 2⁻²⁹ of their sum. Equal remainders: the first come first.

  Args:
    total: integer scalar, traced or not; cut to [0, Σ c_l].
    weights: [L] integer or floating, at least 0, finite.
    capacity: [L] int32, at least 0, of a sum below 2³¹.
  Returns: [L] int32.
  """
  capacity = jnp.asarray(capacity, jnp.int32)
  total = jnp.clip(jnp.asarray(total, jnp.int32), 0, _sum(capacity))
  weights, room = _parts(jnp.asarray(weights)), _parts(capacity)

  def divide(full: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """What is left for those that are not full, and of it ⌊rest w_l / Σ w⌋ with its remainder, in Σ w-ths."""
    rest = total - _sum(jnp.where(full, capacity, 0))
    open_weights = jnp.where(full, 0, weights)
    parts = jnp.where(jnp.sum(open_weights) > 0, open_weights, jnp.where(full, 0, room))
    whole = jnp.maximum(_sum(parts), 1)

    def digit(i: jax.Array, c: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
      # Long multiplication and division, a binary digit of `rest` at a time: the product itself would take 64 bits.
      quotient, remainder = c
      grown = 2 * remainder + jnp.where((rest >> (30 - i)) & 1, parts, 0)   # below 3 Σ w, and so below 2³¹
      return 2 * quotient + grown // whole, grown % whole

    return rest, *lax.fori_loop(0, 31, digit, (jnp.zeros_like(parts), jnp.zeros_like(parts)))

  def fill(c: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
    full, _ = c
    more = full | (divide(full)[1] >= capacity)
    return more, jnp.any(more != full)

  # Each round finds at least one more that is full, or is the last.
  full, _ = lax.while_loop(lambda c: c[1], fill, (capacity <= 0, jnp.array(True)))
  rest, quotient, remainder = divide(full)
  shares = jnp.where(full, 0, quotient)
  order = jnp.argsort(jnp.where(full, 1, -remainder), stable=True)
  one_more = jnp.zeros_like(full).at[order].set(jnp.arange(full.size) < rest - _sum(shares))
  return jnp.where(full, capacity, shares + one_more)


def _sum(x: jax.Array) -> jax.Array:
  """int32 also where jnp.sum would make int64 of it, under jax_enable_x64."""
  return jnp.sum(x, dtype=jnp.int32)


def _parts(weights: jax.Array) -> jax.Array:
  """Weights as int32 of a sum below 2²⁹ + L: integers as they are while they fit. What is not finite counts as 0."""
  limit = 2.0 ** 29
  if jnp.issubdtype(weights.dtype, jnp.integer):
    fits = jnp.sum(weights.astype(jnp.float32)) < limit   # the sum itself is below 2³¹
    return jnp.where(fits, weights, jnp.maximum(weights >> 2, weights > 0)).astype(jnp.int32)
  weights = jnp.where(jnp.isfinite(weights), weights, 0).astype(jnp.float32)
  weights = weights / jnp.maximum(jnp.max(weights), jnp.finfo(jnp.float32).tiny)   # no sum overflows
  return jnp.round(weights / jnp.maximum(jnp.sum(weights), 1) * limit).astype(jnp.int32)


def random_scores(key: jax.Array, like: Tree) -> Tree:
  """Independent uniform numbers in [0, 1), float32, a key for each leaf."""
  leaves, treedef = jax.tree.flatten(like)
  keys = jax.random.split(key, len(leaves))
  # The sum takes over the sharding of `like`, which a mesh with explicit axes asks for.
  scores = [jax.random.uniform(k, x.shape) + jnp.zeros_like(x, jnp.float32) for k, x in zip(keys, leaves, strict=True)]
  return jax.tree.unflatten(treedef, scores)


def need_key(key: jax.Array | None, name: str) -> jax.Array:
  if key is None:
    raise ValueError(f'{name} draws at random: sparsify needs key=jax.random.key(...).')
  return key


def check_share(name: str, value: float) -> None:
  """Raises ValueError unless `value` lies in (0, 1]."""
  if not 0 < value <= 1:
    raise ValueError(f'{name} must lie in (0, 1], got {value!r}.')

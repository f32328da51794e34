"""From scores and counts to exact boolean masks, by layer or over a whole tree, and what one does with masks.

A mask is True where a weight is kept. In a tree of masks None stands for a leaf that is never pruned.
Everything here runs under jit, vmap and scan, and on sharded arrays, whose layout their masks take over;
inside `jax.shard_map`, which wants check_vma=False, it sees the shard. What measures a tree measures
all its entries together; `jax.tree.map` over the same function measures leaf by leaf.
"""
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from powerprop.thresholds import (
  candidates,
  check_k,
  check_mask,
  check_structure,
  kth_pattern,
  magnitude_bits,
  rankable,
)

# ---- making masks ------------------------------------------------------------------------------------------


def top_k(score: jax.Array, k: int | jax.Array, live: jax.Array | None = None) -> jax.Array:
  """Mask of the k entries of largest |score|: exactly min(k, live count) of them.

  Among equals a fixed hash of the flat index decides: evenly spread, and the same on every run, replica and
  sharding. That work is done only where the k-th and the next are equal, by `lax.cond`. Under vmap a cond
  becomes a select and every call pays for both sides, so batched callers use `jax.lax.map`.

  Args:
    score: [...] float16, bfloat16, float32 or float64; NaN ranks above infinity.
    k: integer scalar, traced or not. A traced k is cut to [0, live count].
    live: None, or [...] bool: the entries that may be kept.
  Returns: [...] bool, sharded as `score` is.
  Raises: ValueError when k is known and not in [0, entries], or for a dtype or shape that does not fit.

  >>> top_k(jnp.array([0.5, -3.0, 2.0]), 2)
  Array([False,  True,  True], dtype=bool)
  """
  if not hasattr(score, 'shape'):
    raise ValueError(f'top_k takes one array, layerwise and top_k_global trees; got {type(score).__name__}')
  return top_k_global(score, k, live)


def top_k_global(scores: Any, k: int | jax.Array, live: Any = None) -> Any:
  """Masks of the k entries of largest |score| in a whole tree: one common threshold, min(k, live count) kept.

  Args:
    scores: pytree of arrays as in `top_k`; a leaf that is None is not ranked and stays None. Leaves of
      several dtypes are compared in the one that they promote to.
    k: integer scalar, traced or not.
    live: None, or a tree of bool like `scores`.
  Returns: tree of bool like `scores`. Ties are spread over the leaves, as within one.
  Raises: ValueError as `top_k` does, and where the structures differ.
  """
  leaves = rankable(scores)
  k = check_k(k, sum(x.size for x in leaves))
  masks = [jnp.array(True)] * len(leaves) if live is None else jax.tree.leaves(live)
  rank = kth_pattern(candidates(scores, leaves, live), k)

  def at_least() -> list[jax.Array]:
    return [mask & (magnitude_bits(x) >= rank.pattern) for x, mask in zip(leaves, masks, strict=True)]

  def split_ties() -> list[jax.Array]:
    above = [mask & (magnitude_bits(x) > rank.pattern) for x, mask in zip(leaves, masks, strict=True)]
    ties = [mask & (magnitude_bits(x) == rank.pattern) for x, mask in zip(leaves, masks, strict=True)]
    hashes = hashes_of_places([x.shape for x in leaves])
    wanted = k - rank.above
    least = kth_pattern([jnp.where(tie, h, 0) for tie, h in zip(ties, hashes, strict=True)], wanted).pattern
    # For k = 0 `least` is the largest integer, which one hash equals.
    return [a | (tie & (h >= least) & (wanted > 0)) for a, tie, h in zip(above, ties, hashes, strict=True)]

  return jax.tree.unflatten(jax.tree.structure(scores), lax.cond(rank.reached > k, split_ties, at_least))


def layerwise(scores: Any, counts: Any, live: Any = None) -> Any:
  """Masks that keep a number of its own in every leaf: `top_k` leaf by leaf.

  Args:
    scores: pytree of arrays as in `top_k`, or None for leaves that are never pruned.
    counts: tree like `scores` of integers, traced or not; None for leaves that are not pruned.
    live: None, or a tree like `scores` of bool; None for leaves that are live throughout.
  Returns: tree like `scores` of bool; None where scores or counts are None.
  Raises: ValueError as `top_k` does, with the leaf, and where the structures differ.
  """
  def leaf(path: Any, score: Any, count: Any, mask: Any) -> Any:
    if score is None or count is None:
      return None
    try:
      return top_k(score, count, mask)
    except ValueError as error:
      raise ValueError(f'{error}, in the leaf {jax.tree_util.keystr(path)}') from None

  if live is None:
    live = jax.tree.map(lambda _: None, scores)
  if isinstance(counts, int) and not hasattr(scores, 'shape'):
    raise ValueError(f'counts is a tree like scores, an integer or None for each leaf; got {counts!r}. '
                     'top_k_global keeps one number of all leaves together')
  check_structure('counts', counts, 'scores', scores, is_leaf=is_none)
  check_structure('live', live, 'scores', scores, is_leaf=is_none)
  return jax.tree_util.tree_map_with_path(leaf, scores, counts, live, is_leaf=is_none)


def hashes_of_places(shapes: list[tuple[int, ...]]) -> list[jax.Array]:
  """[...] int32 in [0, 2³¹) for each shape: a fixed order of all entries, no two alike, blind to the axes.

  The flat index runs on from leaf to leaf, a sum of one iota per axis: a reshape would move sharded data.
  """
  hashes, offset = [], 0
  for shape in shapes:
    index, stride = jnp.uint32(offset), 1
    for axis in reversed(range(len(shape))):
      index = index + lax.broadcasted_iota(jnp.uint32, shape, axis) * jnp.uint32(stride)
      stride *= shape[axis]
    # Each line maps [0, 2³¹) one to one onto itself: an odd factor has an inverse modulo 2³¹, and x ^ (x >>
    # s) keeps the upper s bits, from which the others follow. Shifts and factors are those of MurmurHash3's
    # finaliser.
    index = index ^ (index >> 16)
    index = (index * jnp.uint32(0x85ebca6b)) & 0x7fffffff
    index = index ^ (index >> 13)
    index = (index * jnp.uint32(0xc2b2ae35)) & 0x7fffffff
    index = index ^ (index >> 16)
    hashes.append(index.astype(jnp.int32))
    offset += stride
  return hashes


# ---- using masks -------------------------------------------------------------------------------------------


def apply(masks: Any, tree: Any) -> Any:
  """where(mask, x, 0), so that a pruned NaN is 0 too; leaves whose mask is None pass unchanged.

  Args:
    masks: tree of bool or None, of the structure and shapes of `tree`.
    tree: pytree of arrays [...] of any dtype, which they keep.
  Raises: ValueError where structure, shape or dtype of the masks do not fit, with the leaf.
  """
  def leaf(path: Any, mask: Any, x: Any) -> Any:
    if mask is None or x is None:
      return x
    check_mask(mask, x, path)
    return jnp.where(mask, x, jnp.zeros_like(x))

  check_structure('masks', masks, 'the tree', tree, is_leaf=is_none)
  return jax.tree_util.tree_map_with_path(leaf, masks, tree, is_leaf=is_none)


def counts(masks: Any) -> Any:
  """Entries kept in every leaf: int32 scalars in a tree like `masks`; None stays None."""
  return jax.tree.map(lambda mask: jnp.sum(mask, dtype=jnp.int32), masks)


def density(masks: Any) -> jax.Array:
  """Kept share of all entries that have a mask: float32 scalar, NaN where no leaf has one."""
  leaves = jax.tree.leaves(masks)
  return _share(leaves, sum(x.size for x in leaves))


def overlap(a: Any, b: Any) -> jax.Array:
  """Share of entries on which two masks, or trees of masks, agree: both keep or both prune.

  Independent masks of density p agree on p² + (1 − p)². The paper's figure 1b compares so the masks by
  magnitude before and after training.

  Returns: float32 scalar. Leaves that are None have no entries.
  Raises: ValueError where structure, shape or dtype differ.
  """
  pairs = _pairs(a, b)
  return _share([x == y for x, y in pairs], sum(x.size for x, _ in pairs))


def intersection_over_union(a: Any, b: Any) -> jax.Array:
  """|a ∧ b| / |a ∨ b|: among the entries that either mask keeps, the share that both keep.

  It tells sparse masks apart, which `overlap` finds alike for the zeros that they share.

  Returns: float32 scalar, NaN where nothing is kept.
  Raises: ValueError where structure, shape or dtype differ.
  """
  pairs = _pairs(a, b)
  size = sum(x.size for x, _ in pairs)
  return _share([x & y for x, y in pairs], size) / _share([x | y for x, y in pairs], size)


# ---- one bit a weight --------------------------------------------------------------------------------------


def pack(masks: Any) -> Any:
  """Masks as one bit a weight, to be kept: uint8 [⌈n / 8⌉] for each [...] bool of n entries, row by row, the first entry in the
  highest bit, zeros after the last; None stays None.

  Raises: ValueError for a leaf that is not bool.
  """
  def leaf(path: Any, mask: Any) -> jax.Array:
    check_mask(mask, mask, path)
    return jnp.packbits(jnp.ravel(mask))
  return jax.tree_util.tree_map_with_path(leaf, masks)


def unpack(bits: Any, like: Any) -> Any:
  """What `pack` was given: bool of the shapes of `like`, a tree of arrays or shapes; None where the bits are None.

  Raises: ValueError where structures or numbers of bytes do not fit, with the leaf.
  """
  def leaf(path: Any, packed: Any, x: Any) -> Any:
    if packed is None:
      return None
    size = math.prod(jnp.shape(x))
    if packed.dtype != jnp.uint8 or packed.shape != (-(-size // 8),):
      raise ValueError(f'a mask of {size} entries is uint8 {(-(-size // 8),)} in bits; got {packed.dtype} {packed.shape} at '
                       f'{jax.tree_util.keystr(path)}')
    return jnp.unpackbits(packed, count=size).reshape(jnp.shape(x)).astype(bool)
  check_structure('bits', bits, 'the tree', like, is_leaf=is_none)
  return jax.tree_util.tree_map_with_path(leaf, bits, like, is_leaf=is_none)


def is_none(x: Any) -> bool:
  return x is None


def _share(hits: list[jax.Array], size: int) -> jax.Array:
  # Exact counts by leaf, summed as floats: the tree may hold more than 2³¹ entries. Rounding may add up to more than it has.
  total = sum((jnp.sum(x, dtype=jnp.int32).astype(jnp.float32) for x in hits), start=jnp.float32(0))
  return jnp.minimum(total / jnp.float32(size), 1)


def _pairs(a: Any, b: Any) -> list[tuple[jax.Array, jax.Array]]:
  check_structure('one tree of masks', a, 'the other', b)
  for (path, x), y in zip(jax.tree_util.tree_leaves_with_path(a), jax.tree.leaves(b), strict=True):
    check_mask(x, x, path)
    check_mask(y, x, path)
  return list(zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True))

"""Plain measures of trained weights: sign flips, survival by initial magnitude, heaviness of tails.

Each takes an array or a tree and measures all its entries together; `jax.tree.map` over the same function
measures leaf by leaf. Leaves whose mask is None are never pruned and are left out.
"""
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from powerprop.masks import is_none
from powerprop.reparam import Reparam
from powerprop.thresholds import (
  candidates,
  check_mask,
  check_structure,
  count_at_least,
  kth_pattern,
  rankable,
)


class Survival(NamedTuple):
  """Share kept by initial magnitude. Bin i holds edges[i] ≤ |x| < edges[i+1], the last its upper edge too."""
  edges: jax.Array  # [bins + 1] in the dtype of the weights
  share: jax.Array  # [bins] float32 in [0, 1]; NaN in an empty bin
  size: jax.Array   # [bins] int32: entries in the bin


def sign_flips(before: Any, after: Any, mask: Any = None) -> jax.Array:
  """Share of weights with sign(before)·sign(after) < 0: one that is 0 at either end has not changed its sign.

  Args:
    before: array or tree of arrays [...].
    after: the same structure and shapes.
    mask: None for all entries, or a tree like `before` of bool or None: the entries that are measured.
  Returns: float32 scalar in [0, 1]; NaN where nothing is measured. An entry that is NaN counts as one that kept its sign.
  Raises: ValueError where structure or shape differ or a mask is not bool.
  Source: Schwarz et al. 2021, section 3: under Powerpropagation weights are less likely to change sign.
  """
  rows = _rows(mask, before, after)
  flipped = _sum([m & (jnp.sign(x) * jnp.sign(y) < 0) for m, x, y in rows])
  return flipped / _sum([m for m, _, _ in rows])


def survival_by_magnitude(initial: Any, mask: Any, bins: int = 10) -> Survival:
  """Share of weights kept, by quantile of initial magnitude: is what began small pruned?

  The edges are exact quantiles, found without a sort. Equals share a bin, so ties make bins of unequal size.

  Args:
    initial: array or tree of arrays [...] floating: the weights before training.
    mask: tree like `initial` of bool or None: what was kept after it.
    bins: number of bins, from 1 to the number of entries; static.
  Raises: ValueError where structure, shape, dtype or `bins` do not fit.
  Source: Schwarz et al. 2021, section 3: weights initialised close to zero are less likely to survive.
  """
  rows = _rows(mask, initial)
  arrays, masks = [x for _, x in rows], [m for m, _ in rows]
  leaves = rankable(arrays)
  kept = candidates(arrays, leaves, masks)
  entries = sum(x.size for x in leaves)
  if not 1 <= bins <= entries:
    raise ValueError(f'bins lie between 1 and the number of entries, {entries}; got {bins}')
  ranks = jnp.array([entries - i * entries // bins for i in range(bins)] + [1], jnp.int32)
  patterns = jax.vmap(lambda k: kth_pattern(leaves, k).pattern)(ranks)

  def by_bin(of: list[jax.Array], total: Any) -> jax.Array:
    # A count at 0 would take in what the mask has set to 0.
    at_least = jnp.where(patterns > 0, count_at_least(of, patterns), total)[:-1]
    return at_least - jnp.append(at_least[1:], 0)

  size = by_bin(leaves, entries)
  share = by_bin(kept, sum(jnp.sum(m, dtype=jnp.int32) for m in masks)).astype(jnp.float32) / size
  return Survival(lax.bitcast_convert_type(patterns, leaves[0].dtype), share, size)


def kurtosis(x: Any) -> jax.Array:
  """Excess kurtosis E[(x − μ)⁴] / E[(x − μ)²]² − 3: 0 for normal, 3 for Laplace, more for heavier tails.

  Two passes over values scaled by the largest magnitude, so that fourth powers neither overflow nor vanish.

  Args:
    x: array or tree of arrays [...] floating, pooled.
  Returns: scalar, float64 for float64, else float32; NaN where all entries are equal or subnormal, or one is not finite.
    Its gradient is zero: it is a measure, no regulariser.
  Raises: ValueError for another dtype and for a tree without arrays.
  """
  leaves = [leaf.astype(jnp.promote_types(leaf.dtype, jnp.float32)) for leaf in rankable(x)]
  entries = sum(leaf.size for leaf in leaves)
  largest = jnp.max(jnp.stack([jnp.max(jnp.abs(leaf), initial=0) for leaf in leaves]))
  scaled = [leaf / largest for leaf in leaves]
  mean = _sum(scaled) / entries
  centred = [leaf - mean for leaf in scaled]
  rest = _sum(centred) / entries   # the mean's rounding error, as large as the deviations where these are small
  squares = [(leaf - rest) ** 2 for leaf in centred]
  variance = _sum(squares) / entries
  return _sum([(square / variance) ** 2 for square in squares]) / entries - 3


def mean_squared_slope(reparam: Reparam, phi: Any) -> jax.Array:
  """Mean of (α|φ|^(α−1))² over the weights that `reparam` acts on: 1 at α = 1, at usual initialisations 0.05 to 0.2 at α = 2.

  SGD on φ at rate η moves θ by −η (α|φ|^(α−1))² ∂L/∂θ to first order. So the rate of plain training divided by this mean, taken
  at initialisation, makes steps of the same mean length: where BatchNorm lets a network stand large rates, a good first guess.

  Args:
    reparam: of the network.
    phi: its parameters.
  Returns: float32 scalar; NaN where `reparam` acts on nothing.
  """
  acts, slopes = reparam.where(phi), reparam.slope(phi)
  chosen = [x.astype(jnp.float32) for on, x in zip(jax.tree.leaves(acts), jax.tree.leaves(slopes), strict=True) if on]
  return _sum([x ** 2 for x in chosen]) / jnp.float32(sum(x.size for x in chosen))


def _sum(leaves: list[jax.Array]) -> jax.Array:
  """Sum of all entries; of bool an exact count by leaf, then float32, which holds more than 2³¹."""
  bools = leaves and leaves[0].dtype == jnp.bool_
  sums = [jnp.sum(x, dtype=jnp.int32).astype(jnp.float32) if bools else jnp.sum(x) for x in leaves]
  return sum(sums, start=jnp.float32(0))


def _rows(mask: Any, *trees: Any) -> list[tuple[jax.Array, ...]]:
  """(mask, x, ...) of every leaf that is measured, checked."""
  if mask is None:
    mask = jax.tree.map(lambda x: jnp.ones(jnp.shape(x), bool), trees[0])
  for name, tree in (('the mask', mask), *(('the later weights', tree) for tree in trees[1:])):
    check_structure(name, tree, 'the weights', trees[0], is_leaf=is_none)
  columns = [jax.tree.leaves(tree, is_leaf=is_none) for tree in (mask, *trees)]
  rows = [row for row in zip(*columns, strict=True) if not any(is_none(x) for x in row)]
  for m, first, *others in rows:
    check_mask(m, first)
    for x in others:
      if jnp.shape(x) != jnp.shape(first):
        raise ValueError(f'weights are compared in one shape; got {jnp.shape(first)} and {jnp.shape(x)}')
  return rows

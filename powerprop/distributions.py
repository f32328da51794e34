"""From one sparsity to the number of weights that each layer keeps: integers, made once, that add up to the total exactly.

A distribution is a function (weights, sparsity) → counts. `weights` is a tree with an array or a shape for each leaf that may be
pruned, and None for the others; the counts are a tree of int like it, or one int for all leaves together (`globally`).
"""
import fnmatch
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from powerprop.masks import is_none
from powerprop.reparam import Tree, leaf_name

Distribution = Callable[[Tree, float], Any]
Sparsity = float | Mapping[str, float]


def uniform(weights: Tree, sparsity: float) -> Tree:
  """The same share of every leaf: k_l ≈ (1 − s) n_l, with Σ k_l = round((1 − s) Σ n_l), halves up.

  Raises: ValueError when the sparsity is not in [0, 1), or leaves some leaf less than one weight.
  """
  sizes = _sizes(weights)
  return _round(weights, {name: (1 - _check(sparsity)) * n for name, n in sizes.items()}, sparsity)


def erk(weights: Tree, sparsity: float) -> Tree:
  """Erdős-Rényi-kernel: the density of a leaf is proportional to Σ shape / Π shape, so that small and narrow layers stay denser.

    k_l = min(1, ε Σ_d shape_d / Π_d shape_d) n_l, with ε such that Σ k_l = round((1 − s) Σ n_l)

  Leaves that would exceed 1 are dense, and ε is solved again for the rest until none does.

  Raises: ValueError as `uniform` does.
  Source: Mocanu et al. 2018 (arXiv:1707.04780); kernels by Evci et al. 2020 (arXiv:1911.11134), section 3.
  """
  sizes = _sizes(weights)
  shapes = {leaf_name(path): x.shape for path, x in jax.tree_util.tree_leaves_with_path(weights)}
  raw = {name: sum(shape) / math.prod(shape) for name, shape in shapes.items()}
  total = (1 - _check(sparsity)) * sum(sizes.values())
  dense: set[str] = set()
  while True:
    rest = [name for name in sizes if name not in dense]
    budget = total - sum(sizes[name] for name in dense)
    scale = budget / sum(raw[name] * sizes[name] for name in rest) if rest else 0.0
    over = {name for name in rest if scale * raw[name] > 1}
    if not over:
      break
    dense |= over
  ideal = {name: float(n) if name in dense else scale * raw[name] * n for name, n in sizes.items()}
  return _round(weights, ideal, sparsity)


def globally(weights: Tree, sparsity: float) -> int:
  """One number for all leaves together, round((1 − s) Σ n_l): the scores decide how many each of them keeps."""
  total = _whole((1 - _check(sparsity)) * sum(_sizes(weights).values()))
  if total < 1:
    raise ValueError(f'sparsity {sparsity:g} keeps less than one of {sum(_sizes(weights).values())} weights.')
  return total


def make_counts(weights: Tree, sparsity: Sparsity, distribution: Distribution = uniform) -> Any:
  """Counts by a distribution, or by a mapping from patterns of leaf names to sparsities, of which the first that fits counts.

  >>> import numpy as np
  >>> weights = {'a': np.zeros((10, 10)), 'b': np.zeros((5, 4))}
  >>> make_counts(weights, {'a': 0.9, '*': 0.5})
  {'a': 10, 'b': 10}

  Raises: ValueError as the distribution does, for a leaf that no pattern fits, and for a pattern that no leaf fits.
  """
  if not isinstance(sparsity, Mapping):
    if not callable(distribution):
      raise ValueError(f'distribution is a function, as distributions.erk, got {distribution!r}.')
    return distribution(weights, sparsity)
  table = {pattern: _check(value) for pattern, value in sparsity.items()}

  def leaf(path: Any, x: Any) -> int | None:
    if x is None:
      return None
    name = leaf_name(path)
    for pattern, value in table.items():
      if fnmatch.fnmatchcase(name, pattern):
        return _at_least_one(name, (1 - value) * x.size, x.size, value)
    raise ValueError(f'sparsity has no pattern for {name}; it has {list(table)}: add it, or "*" for the rest.')
  counts = jax.tree_util.tree_map_with_path(leaf, weights, is_leaf=is_none)
  _check_patterns('sparsity', table, weights)
  return counts


def leave_dense(weights: Tree, patterns: Sequence[str]) -> Tree:
  """`weights` with None for the leaves whose name fits one of the patterns: these are not pruned and not counted.

  Raises: ValueError for a pattern that no leaf fits. Names, not places, tell layers apart: a tree's order is not the network's.
  """
  if isinstance(patterns, str):
    raise ValueError(f'dense is a sequence of patterns, as ({patterns!r},), got {patterns!r}.')
  _check_patterns('dense', patterns, weights)
  return jax.tree_util.tree_map_with_path(
      lambda path, x: None if any(fnmatch.fnmatchcase(leaf_name(path), p) for p in patterns) else x, weights)


def _check_patterns(what: str, patterns: Iterable[str], weights: Tree) -> None:
  names = [leaf_name(path) for path, _ in jax.tree_util.tree_leaves_with_path(weights)]
  for pattern in patterns:
    if not any(fnmatch.fnmatchcase(name, pattern) for name in names):
      raise ValueError(f'{what} has the pattern {pattern!r}, which fits none of {names}.')


def _sizes(weights: Tree) -> dict[str, int]:
  sizes = {leaf_name(path): math.prod(x.shape) for path, x in jax.tree_util.tree_leaves_with_path(weights)}
  if not sizes:
    raise ValueError('no leaf is left that may be pruned.')
  if len(sizes) < len(jax.tree.leaves(weights)):
    raise ValueError(f'leaves are told apart by their names, and two have the same one; there are {sorted(sizes)}.')
  if empty := [name for name, n in sizes.items() if n == 0]:
    raise ValueError(f'{empty[0]} has no weights.')
  return sizes


def _check(sparsity: Any) -> float:
  if isinstance(sparsity, bool) or not isinstance(sparsity, int | float | np.integer | np.floating) or not 0 <= sparsity < 1:
    raise ValueError(f'sparsity is a share removed, at least 0 and below 1; got {sparsity!r}.')
  return float(sparsity)


def _whole(ideal: float) -> int:
  """The nearest integer, halves up: also where a half has lost a bit, as 0.1 · 25 has."""
  return math.floor(ideal + 0.5 + 1e-6)


def _at_least_one(name: str, ideal: float, size: int, sparsity: float) -> int:
  if _whole(ideal) < 1:
    raise ValueError(f'sparsity {sparsity:g} keeps {ideal:.3g} of the {size} weights of {name}, less than one.')
  return _whole(ideal)


def _round(weights: Tree, ideal: dict[str, float], sparsity: float) -> Tree:
  """Integers nearest to the ideal counts that add up to their rounded total, by largest remainder; at least 1 each."""
  sizes = _sizes(weights)
  for name, value in ideal.items():
    _at_least_one(name, value, sizes[name], sparsity)
  # A count that is whole but for rounding, as 0.1 · 30, is not to lose one.
  counts = {name: min(max(math.floor(value + 1e-6), 1), sizes[name]) for name, value in ideal.items()}
  missing = _whole(sum(ideal.values())) - sum(counts.values())
  order = sorted(ideal, key=lambda name: (counts[name] - ideal[name], name))   # largest remainder first, names among equals
  step = 1 if missing > 0 else -1
  while missing:   # more than one round where many leaves were lifted to one weight
    before = missing
    for name in order if step > 0 else reversed(order):
      if missing and (counts[name] < sizes[name] if step > 0 else counts[name] > 1):
        counts[name] += step
        missing -= step
    if missing == before:
      break
  if missing:
    raise ValueError(f'sparsity {sparsity:g} keeps {sum(counts.values()) + missing} weights, less than one for each of '
                     f'{len(counts)} leaves.')
  return jax.tree_util.tree_map_with_path(lambda path, x: counts[leaf_name(path)], weights)

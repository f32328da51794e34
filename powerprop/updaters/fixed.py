"""Masks that never change: drawn at random, or given from outside."""
from collections.abc import Sequence
from typing import Any

import jax
import optax

from powerprop.distributions import Distribution, Sparsity, erk
from powerprop.reparam import Tree
from powerprop.sparse import Masks, SparsityUpdater
from powerprop.thresholds import check_mask, check_structure
from powerprop.updaters.common import budget, need_key, random_scores, select


def static(sparsity: Sparsity, distribution: Distribution = erk, dense: Sequence[str] = ()) -> SparsityUpdater:
  """Static random sparsity: m drawn at initialisation, never changed. The floor that every other algorithm is to beat.

    m ← random(k_l) of each layer at n = 0, and it stays

  Cost: that of the sparse network, forward and backward. Drop score: none; grow score: none; distribution: ERK; schedule: fixed
  from the start; scope: by layer, all together where the distribution is `globally`.

  Args:
    sparsity: share of weights removed, or a mapping from patterns of leaf names to shares.
    distribution: `distributions.uniform`, `erk` or `globally`.
    dense: patterns of leaf names that are not pruned and not counted.
  Source: 'Static' in Evci et al. 2020 (arXiv:1911.11134), section 4.
  """
  def init(weights: Tree, key: jax.Array | None) -> tuple[Masks, Any]:
    mask = random_masks(weights, sparsity, distribution, dense, need_key(key, 'static'))
    return Masks(mask), ()
  return SparsityUpdater(init, never, lambda step: False)


def given(mask: Tree) -> SparsityUpdater:
  """A mask from outside: a lottery ticket, a score at initialisation, a sparse checkpoint.

    m ← mask at n = 0, and it stays

  Cost: that of the sparse network, forward and backward, after what has made the mask. Drop score: none; grow score: none;
  distribution and scope: those of the mask; schedule: fixed from the start. Source: as used by the lottery ticket hypothesis,
  Frankle & Carbin 2019 (arXiv:1803.03635).

  Args:
    mask: tree of bool like the parameters, or None for leaves that are not masked.
  Raises: ValueError at `init` where it does not fit the parameters.
  """
  def init(weights: Tree, key: jax.Array | None) -> tuple[Masks, Any]:
    def absent(x: Any) -> bool:   # a leaf that is no weight, or that optax.partition gives to another transformation
      return x is None or isinstance(x, optax.MaskedNode)

    def leaf(x: Any, m: Any) -> Any:
      if m is not None and not absent(x):
        check_mask(m, x)
      return x if isinstance(x, optax.MaskedNode) else m
    check_structure('the given masks', jax.tree.map(lambda _: 0, mask, is_leaf=absent), 'the parameters',
                    jax.tree.map(lambda _: 0, weights, is_leaf=absent))
    return Masks(jax.tree.map(leaf, weights, mask, is_leaf=absent)), ()
  return SparsityUpdater(init, never, lambda step: False, at_hand=True)


def random_masks(weights: Tree, sparsity: Sparsity, distribution: Distribution, dense: Sequence[str], key: jax.Array) -> Tree:
  """Masks of exactly the budget, drawn at random."""
  weights, counts = budget(weights, sparsity, distribution, dense)
  return select(random_scores(key, weights), counts, isinstance(counts, int))


def never(step: Any, masks: Masks, memory: Any, theta: Tree, grads: Tree) -> tuple[Masks, Any]:
  """The `update` of an updater that is never due."""
  return masks, memory

"""Training that begins dense and ends at exactly the sparsity asked for: one-shot, gradual, straight-through."""
from collections.abc import Sequence
from typing import Any

import jax

from powerprop.distributions import Distribution, Sparsity, make_counts, uniform
from powerprop.reparam import Tree
from powerprop.schedules import check_steps, cubic, due
from powerprop.sparse import Masks, SparsityUpdater
from powerprop.updaters.common import budget, everything, select, targets, under


def gradual(sparsity: Sparsity, start_step: int, end_step: int, every_steps: int, distribution: Distribution = uniform,
            dense: Sequence[str] = (), returns: bool = False) -> SparsityUpdater:
  """Gradual magnitude pruning: at n = start, start + every, ..., end keep the largest |θ|,

    k_l(n) = N_l − (N_l − k_l)(1 − (1 − (n − start) / (end − start))³)

  exactly k_l from the end on, also where `every_steps` does not divide the span.

  Cost: dense until the start, then by the schedule; each update finds one threshold a layer. Drop score: |θ|; grow score: none.

  Args:
    sparsity: share of weights removed at the end, or a mapping from patterns of leaf names to shares.
    start_step, end_step, every_steps: in applied updates.
    distribution: `distributions.uniform`, `erk`, or `globally` for one threshold over all layers.
    dense: patterns of leaf names that are not pruned and not counted.
    returns: pruned weights keep their stored value and are ranked again at each update, so that one that was pruned may return;
      else they are 0 and stay so.
  Raises: ValueError for a schedule that ends before it starts.
  Source: Zhu & Gupta 2017 (arXiv:1710.01878).
  """
  check_steps(start_step, end_step, every_steps)

  def init(weights: Tree, key: jax.Array | None) -> tuple[Masks, Any]:
    weights, _ = budget(weights, sparsity, distribution, dense)
    mask = everything(weights)
    return Masks(mask), ()

  def update(step: Any, masks: Masks, memory: Any, theta: Tree, grads: Tree) -> tuple[Masks, Any]:
    theta = under(masks.forward, theta)
    final = make_counts(theta, sparsity, distribution)
    now = targets(theta, final, cubic(step, start_step, end_step))
    mask = select(theta, now, isinstance(final, int), None if returns else masks.forward)
    return Masks(mask), memory

  return SparsityUpdater(init, update, lambda step: due(step, start_step, end_step, every_steps), keeps=returns)


def one_shot(sparsity: Sparsity, step: int, distribution: Distribution = uniform, dense: Sequence[str] = ()) -> SparsityUpdater:
  """Dense until `step` updates are applied, then the largest |θ| for good: `gradual` of one update.

  Args: as for `gradual`.
  Source: Han et al. 2015 (arXiv:1506.02626), without its iterations.
  """
  return gradual(sparsity, step, step, 1, distribution, dense)


def straight_through(sparsity: Sparsity, distribution: Distribution = uniform, dense: Sequence[str] = (),
                     every_steps: int = 1) -> SparsityUpdater:
  """Straight-through estimator: the network sees the largest |θ|, and the gradient at them moves all weights.

  Cost: sparse forward, dense backward; a threshold a layer every `every_steps`. Drop score: |θ|; grow score: |θ|.

  Args: as for `gradual`; sparse from the first step on.
  Source: Bengio et al. 2013 (arXiv:1308.3432) for the estimator.
  """
  check_steps(0, 1, every_steps)

  def largest(theta: Tree) -> Masks:
    counts = make_counts(theta, sparsity, distribution)
    mask = select(theta, counts, isinstance(counts, int))
    return Masks(mask, jax.tree.map(lambda m: None, mask))   # the optimiser may change all weights

  def init(weights: Tree, key: jax.Array | None) -> tuple[Masks, Any]:
    return largest(budget(weights, sparsity, distribution, dense)[0]), ()

  def update(step: Any, masks: Masks, memory: Any, theta: Tree, grads: Tree) -> tuple[Masks, Any]:
    return largest(under(masks.forward, theta)), memory

  return SparsityUpdater(init, update, lambda step: every_steps == 1 or step % every_steps == 0, keeps=True)

"""Training that begins dense, or denser, and ends at exactly the sparsity asked for: one-shot, gradual, straight-through, GraNet
and AC/DC."""
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from powerprop.distributions import Distribution, Sparsity, erk, globally, make_counts, uniform
from powerprop.reparam import Tree
from powerprop.schedules import check_steps, cosine, cubic, due, is_integer
from powerprop.sparse import Masks, SparsityUpdater
from powerprop.updaters.common import budget, check_share, everything, exchange, need_key, select, sizes, targets, under
from powerprop.updaters.fixed import random_masks


def gradual(sparsity: Sparsity, start_step: int, end_step: int, every_steps: int, distribution: Distribution = uniform,
            dense: Sequence[str] = (), returns: bool = False) -> SparsityUpdater:
  """Gradual magnitude pruning: at n = start, start + every, ..., end keep the largest |θ|,

    k_l(n) = N_l − (N_l − k_l)(1 − (1 − (n − start) / (end − start))³)

  exactly k_l from the end on, also where `every_steps` does not divide the span.

  Cost: dense until the start, then by the schedule; each update finds one threshold a layer. Drop score: |θ|; grow score: none;
  distribution: uniform; schedule: cubic; scope: by layer, all together where the distribution is `globally`.

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
    together = isinstance(final, int)
    now = targets(sizes(theta, together), final, cubic(step, start_step, end_step))
    mask = select(theta, now, together, None if returns else masks.forward)
    return Masks(mask), memory

  return SparsityUpdater(init, update, lambda step: due(step, start_step, end_step, every_steps), keeps=returns)


def one_shot(sparsity: Sparsity, step: int, distribution: Distribution = uniform, dense: Sequence[str] = ()) -> SparsityUpdater:
  """Dense until `step` updates are applied, then the largest |θ| for good: `gradual` of one update.

    m = 1 for n < step;   at n = step: m ← top(|θ|, k_l), and it stays

  Cost: dense until then, sparse from then on; one threshold a layer. Drop score: |θ|; grow score: none; distribution: uniform;
  schedule: one step; scope: as for `gradual`.

  Args: as for `gradual`; `step` in applied updates, at least 1.
  Raises: ValueError for another step.
  Source: Han et al. 2015 (arXiv:1506.02626), without its iterations.
  """
  if not is_integer(step) or step < 1:
    raise ValueError(f'step must be an integer of at least 1, got {step!r}.')
  return gradual(sparsity, step, step, 1, distribution, dense)


def straight_through(sparsity: Sparsity, distribution: Distribution = uniform, dense: Sequence[str] = (),
                     every_steps: int = 1) -> SparsityUpdater:
  """Straight-through estimator: the network sees the largest |θ|, and the gradient at them moves all weights.

    m ← top(|θ|, k_l) every so often;   u ← inner(∂L/∂θ at θ ∘ m), applied to every weight

  Cost: sparse forward, dense backward; a threshold a layer every `every_steps`. Drop score: |θ|; grow score: |θ|; distribution:
  uniform; schedule: constant, for ever; scope: as for `gradual`.

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


def granet(sparsity: Sparsity, start_step: int, end_step: int, every_steps: int, initial_sparsity: float = 0.5,
           drop_fraction: float = 0.5, distribution: Distribution = erk, dense: Sequence[str] = ()) -> SparsityUpdater:
  """GraNet: gradual magnitude pruning that drops a share more at each update, and grows it back by gradient.

    k_l(n) = b_l − (b_l − k_l)(1 − (1 − (n − start) / (end − start))³)
    d_l = round(f(n) k_l(n)),   f(n) = (f₀ / 2)(1 + cos(π n / end));   m ← top(|θ|, k_l(n) − d_l, m) ∪ top(|g|, d_l, the rest)

  from b_l weights, drawn at random, to exactly k_l at the end, also where `every_steps` does not divide the span. A weight that
  was dropped in the same update may be grown again; it then keeps its value.

  Cost: that of a network of the initial sparsity at first, falling by the schedule, and a dense gradient at each update. Drop
  score: |θ|; grow score: |∂L/∂θ|; distribution: ERK; schedule: cubic, with exchanges under a cosine; scope: as for `gradual`.
  Differs from the paper: pruning ends with exploration, since nothing is exchanged after the end; and as said in `rigl`.

  Args:
    sparsity: share of weights removed at the end, or a mapping from patterns of leaf names to shares.
    start_step, end_step, every_steps: in applied updates; until the start the random masks stay.
    initial_sparsity: by the same distribution, and of every leaf alike where `sparsity` is a mapping; 0 begins dense.
    drop_fraction: f₀ in (0, 1].
    distribution, dense: as for `gradual`.
  Raises: ValueError for a schedule that ends before it starts, and when the network would begin sparser than it is to end.
  Source: Liu et al. 2021 (arXiv:2106.10404), section 4.
  """
  check_steps(start_step, end_step, every_steps)
  check_share('drop_fraction', drop_fraction)
  begin = {'*': initial_sparsity} if isinstance(sparsity, Mapping) else initial_sparsity

  def both(weights: Tree) -> tuple[Any, Any]:
    first, final = (make_counts(weights, share, distribution) for share in (begin, sparsity))
    if sum(jax.tree.leaves(first)) < sum(jax.tree.leaves(final)):
      raise ValueError(f'initial_sparsity must not be above sparsity; got {initial_sparsity} and {sparsity}.')
    return first, final

  def init(weights: Tree, key: jax.Array | None) -> tuple[Masks, Any]:
    both(budget(weights, sparsity, distribution, dense)[0])
    mask = random_masks(weights, begin, distribution, dense, need_key(key, 'granet'))
    return Masks(mask), ()

  def update(step: Any, masks: Masks, memory: Any, theta: Tree, grads: Tree) -> tuple[Masks, Any]:
    theta, grads = under(masks.forward, theta), under(masks.forward, grads)
    first, final = both(theta)
    now = targets(first, final, cubic(step, start_step, end_step))
    mask = exchange(theta, grads, masks.forward, now, isinstance(final, int), cosine(step, end_step, drop_fraction))
    return Masks(mask), memory

  def now(step: Any) -> Any:
    return due(step, start_step, end_step, every_steps)

  return SparsityUpdater(init, update, now, dense_gradient=lambda step: now(step) & (step < end_step))


def ac_dc(sparsity: Sparsity, warmup_steps: int, compressed_steps: int, decompressed_steps: int, end_step: int,
          distribution: Distribution = globally, dense: Sequence[str] = ()) -> SparsityUpdater:
  """AC/DC: dense training, then phases under the mask of the largest |θ| at their start, and dense ones, in turn.

    m = 1 for n < warmup;   at n = warmup + i (C + D): m ← top(|θ|, k);   at n = warmup + i (C + D) + C: m ← 1

  and from the end on the mask of the largest |θ| for good: that of the phase, or a new one where the end cuts a dense phase.

  Cost: dense in warm-up and dense phases, sparse in the others; one threshold a phase. Drop score: |θ|; grow score: none, all
  come back; distribution: `globally`; schedule: phases; scope: all together, by layer for other distributions. Differs from the
  paper: where weights come back for α > 1 is said in `sparsify`; for α = 1 at 0, as there.

  Args:
    sparsity: share of weights removed at the end, or a mapping from patterns of leaf names to shares.
    warmup_steps: the first phase, dense; in applied updates, as all others, and at least 1.
    compressed_steps, decompressed_steps: C and D, at least 1.
    end_step: not before the warm-up is over.
    distribution: `globally`, as in the paper's tables, `erk` or `uniform`.
    dense: as for `gradual`.
  Raises: ValueError for phases of no length, and for an end within the warm-up.
  Source: Peste et al. 2021 (arXiv:2106.12379), algorithm 1.
  """
  for name, value in (('warmup_steps', warmup_steps), ('compressed_steps', compressed_steps),
                      ('decompressed_steps', decompressed_steps)):
    if not is_integer(value) or value < 1:
      raise ValueError(f'{name} must be an integer of at least 1, got {value!r}.')
  if not is_integer(end_step) or end_step < warmup_steps:
    raise ValueError(f'end_step must be an integer of at least warmup_steps={warmup_steps}, got {end_step!r}.')

  def phase(step: Any) -> Any:
    return (step - warmup_steps) % (compressed_steps + decompressed_steps)

  def init(weights: Tree, key: jax.Array | None) -> tuple[Masks, Any]:
    mask = everything(budget(weights, sparsity, distribution, dense)[0])
    return Masks(mask), ()

  def update(step: Any, masks: Masks, memory: Any, theta: Tree, grads: Tree) -> tuple[Masks, Any]:
    theta = under(masks.forward, theta)
    counts = make_counts(theta, sparsity, distribution)
    sparse = (step >= end_step) | (phase(step) == 0)
    # Among the live: at an end within a compressed phase its own mask is found again.
    mask = lax.cond(sparse, lambda: select(theta, counts, isinstance(counts, int), masks.forward), lambda: everything(theta))
    return Masks(mask), memory

  def due(step: Any) -> Any:
    step = jnp.asarray(step)
    change = (phase(step) == 0) | (phase(step) == compressed_steps)
    return (step == end_step) | ((step >= warmup_steps) & (step < end_step) & change)

  return SparsityUpdater(init, update, due)

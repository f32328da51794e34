"""Training that is sparse from the first step to the last: SET, RigL and Top-KAST."""
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from powerprop.distributions import Distribution, Sparsity, erk, make_counts, uniform
from powerprop.reparam import Tree
from powerprop.schedules import check_exchanges, check_steps, cosine, is_integer
from powerprop.sparse import Masks, SparsityUpdater
from powerprop.updaters.common import budget, check_share, exchange, need_key, random_scores, select, under
from powerprop.updaters.fixed import random_masks

Grow = Callable[[jax.Array, Tree], Tree]   # (key of this update, gradients) → scores


def rigl(sparsity: Sparsity, end_step: int, every_steps: int = 100, drop_fraction: float = 0.3,
         distribution: Distribution = erk, dense: Sequence[str] = (), average_steps: int = 1) -> SparsityUpdater:
  """RigL: every ΔT updates drop the live weights of smallest |θ| and grow as many of largest dense |∂L/∂θ|.

    d_l = round(f(n) k_l),   f(n) = (f₀ / 2)(1 + cos(π n / end));   m ← top(|θ|, k_l − d_l, m) ∪ top(|g|, d_l, the rest)

  A weight that was dropped in the same update may be grown again; it then keeps its value.

  Cost: that of the sparse network, and a dense gradient in `average_steps` of every ΔT updates. Drop score: |θ|; grow score:
  |∂L/∂θ|; distribution: ERK; schedule: every ΔT under a cosine; scope: by layer, all together where the distribution is
  `globally`. Differs from the paper: an update of the masks comes after a gradient step, not in its place, and θ is that after
  the step; where weights that are grown start is said in `sparsify`.

  Args:
    sparsity: share of weights removed, or a mapping from patterns of leaf names to shares.
    end_step: from this update on the masks stay; the paper takes three quarters of the training.
    every_steps: ΔT, in applied updates.
    drop_fraction: f₀ in (0, 1].
    distribution, dense: as for `gradual`.
    average_steps: g is the mean gradient of so many updates before an exchange, that of the exchange included; at most ΔT. Above
      1 it takes memory for a dense float32 copy of the weights, and a sum at each of these updates, none at the others. The
      paper takes 1; several are for small batches.
  Raises: ValueError for shares and numbers of steps out of their range.
  Source: Evci et al. 2020 (arXiv:1911.11134), section 3.
  """
  check_exchanges(end_step, every_steps)
  if not is_integer(average_steps) or not 1 <= average_steps <= every_steps:
    raise ValueError(f'average_steps must be an integer of at least 1 and at most every_steps={every_steps}, '
                     f'got {average_steps!r}.')
  plain = _exchange('rigl', lambda key, grads: grads, sparsity, end_step, every_steps, drop_fraction, distribution, dense)
  return plain if average_steps == 1 else _averaging(plain, every_steps, end_step, average_steps)


def set_(sparsity: Sparsity, end_step: int, every_steps: int = 100, drop_fraction: float = 0.3,
         distribution: Distribution = erk, dense: Sequence[str] = ()) -> SparsityUpdater:
  """SET: every ΔT updates drop the live weights of smallest |θ| and grow as many at random.

    d_l and f(n) as for `rigl`;   m ← top(|θ|, k_l − d_l, m) ∪ random(d_l, the rest)

  Cost: that of the sparse network. Drop score: |θ|; grow score: random; distribution, schedule, scope: as for `rigl`. Differs
  from the paper: the drop fraction is annealed as in `rigl`, which the comparisons of the RigL paper do too, and drops the
  smallest magnitudes of both signs together.

  Args: as for `rigl`.
  Source: Mocanu et al. 2018 (arXiv:1707.04780).
  """
  return _exchange('set', random_scores, sparsity, end_step, every_steps, drop_fraction, distribution, dense)


def _exchange(name: str, grow: Grow, sparsity: Sparsity, end_step: int, every_steps: int, drop_fraction: float,
              distribution: Distribution, dense: Sequence[str]) -> SparsityUpdater:
  """Drop by |θ|, grow by a score, as many, in every layer or over all layers together."""
  check_exchanges(end_step, every_steps)
  check_share('drop_fraction', drop_fraction)

  def init(weights: Tree, key: jax.Array | None) -> tuple[Masks, Any]:
    now, later = jax.random.split(need_key(key, name))
    mask = random_masks(weights, sparsity, distribution, dense, now)
    return Masks(mask), later

  def update(step: Any, masks: Masks, memory: Any, theta: Tree, grads: Tree) -> tuple[Masks, Any]:
    theta, grads = under(masks.forward, theta), under(masks.forward, grads)
    counts = make_counts(theta, sparsity, distribution)
    scores = grow(jax.random.fold_in(memory, step), grads)
    mask = exchange(theta, scores, masks.forward, counts, isinstance(counts, int), cosine(step, end_step, drop_fraction))
    return Masks(mask), memory

  def due(step: Any) -> Any:
    return (step < end_step) & (step % every_steps == 0)

  return SparsityUpdater(init, update, due, dense_gradient=due if name == 'rigl' else lambda step: False)


def _averaging(updater: SparsityUpdater, every_steps: int, end_step: int, average_steps: int) -> SparsityUpdater:
  """`updater` that gets, in place of gradients, their mean over the last steps before it acts."""
  def init(weights: Tree, key: jax.Array | None) -> tuple[Masks, Any]:
    masks, memory = updater.init(weights, key)
    return masks, (memory, jax.tree.map(lambda m: jnp.zeros_like(m, jnp.float32), masks.forward))

  def observe(step: Any, memory: Any, grads: Tree) -> Any:
    inner, mean = memory
    left = -step % every_steps   # steps until masks change

    def add(mean: Tree) -> Tree:
      return jax.tree.map(lambda v, g: jnp.where(left == average_steps - 1, 0, v) + g.astype(jnp.float32) / average_steps,
                          mean, under(mean, grads))
    return inner, lax.cond(averages(step), add, lambda same: same, mean)

  last = (end_step - 1) // every_steps * every_steps   # after this exchange no mean is wanted

  def averages(step: Any) -> Any:
    return (-step % every_steps < average_steps) & (step <= last)

  def update(step: Any, masks: Masks, memory: Any, theta: Tree, grads: Tree) -> tuple[Masks, Any]:
    inner, mean = memory
    masks, inner = updater.update(step, masks, inner, theta, mean)   # None for leaves without a mask, which are not looked at
    return masks, (inner, mean)

  return SparsityUpdater(init, update, updater.due, observe=observe, dense_gradient=averages)


def top_kast(sparsity: Sparsity, backward_sparsity: Sparsity, every_steps: int = 1, end_step: int | None = None,
             decay: float = 0.0, distribution: Distribution = uniform, dense: Sequence[str] = ()) -> SparsityUpdater:
  """Top-KAST: the network sees the set A of the largest |θ|, the optimiser moves a larger set B ⊇ A; all weights are stored.

    A = top(|θ|, k_A);   B = top(|θ|, k_B);   g ← g + λ θ on A, g + (λ / D) θ on B \\ A,   D = max(k_A, 1) / N of the leaf

  The decay is the paper's exploration regulariser, as a gradient of ½λ‖θ‖² and so before the inner optimiser.

  Cost: forward at the density of A, backward at that of B. Drop score: |θ|; grow score: |θ|, which moves within B; distribution:
  uniform; schedule: every so many updates; scope: by layer, all together where the distribution is `globally`.

  Args:
    sparsity: share of weights outside A, or a mapping from patterns of leaf names to shares.
    backward_sparsity: the same for B, no larger.
    every_steps: masks are found anew every so many applied updates.
    end_step: from this update on B = A: exploration ends. None: never.
    decay: λ, at least 0.
    distribution, dense: as for `gradual`.
  Raises: ValueError when B would be smaller than A.
  Source: Jayakumar et al. 2020 (arXiv:2106.03517), sections 2.1 to 2.3.
  """
  check_steps(0, 1 if end_step is None else end_step, every_steps)
  if not decay >= 0:
    raise ValueError(f'decay must be at least 0, got {decay!r}.')

  def both(theta: Tree, explore: Any) -> Masks:
    inner, outer = (make_counts(theta, share, distribution) for share in (sparsity, backward_sparsity))
    if isinstance(inner, int) != isinstance(outer, int):
      raise ValueError('sparsity and backward_sparsity are both shares or both mappings where the distribution is globally; got '
                       f'{sparsity} and {backward_sparsity}.')
    if any(a > b for a, b in zip(jax.tree.leaves(inner), jax.tree.leaves(outer), strict=True)):
      raise ValueError(f'backward_sparsity must not be larger than sparsity; got {backward_sparsity} and {sparsity}.')
    forward = select(theta, inner, isinstance(inner, int))
    wide = select(theta, outer, isinstance(outer, int))
    # B holds A as it is, by the same order and the same rule for ties; without exploration it is A.
    return Masks(forward, jax.tree.map(lambda f, b: f | (b & explore), forward, wide))

  def init(weights: Tree, key: jax.Array | None) -> tuple[Masks, Any]:
    return both(budget(weights, sparsity, distribution, dense)[0], True), ()

  def update(step: Any, masks: Masks, memory: Any, theta: Tree, grads: Tree) -> tuple[Masks, Any]:
    return both(under(masks.forward, theta), True if end_step is None else step < end_step), memory

  def due(step: Any) -> Any:
    if every_steps == 1:
      return True
    return (step % every_steps == 0) | (step == (end_step or 0))

  def shape(masks: Masks, theta: Tree, grads: Tree) -> Tree:
    def leaf(f: Any, g: jax.Array, x: jax.Array) -> jax.Array:
      if f is None:
        return g
      share = jnp.maximum(jnp.sum(f, dtype=jnp.int32), 1) / f.size   # one threshold over all leaves may leave a leaf nothing
      return g + (decay * x * jnp.where(f, 1, 1 / share)).astype(g.dtype)
    return jax.tree.map(leaf, masks.forward, grads, theta, is_leaf=lambda x: x is None)

  return SparsityUpdater(init, update, due, keeps=True, shape=shape if decay else None)

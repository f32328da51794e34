"""Training that is sparse throughout, in which weights move between layers too: SNFS and DSR. The total stays exact."""
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from powerprop import masks as masks_lib
from powerprop.distributions import Distribution, Sparsity, make_counts, uniform
from powerprop.reparam import Tree
from powerprop.schedules import check_exchanges, cosine
from powerprop.sparse import Masks, SparsityUpdater
from powerprop.updaters.common import check_share, need_key, random_scores, select, share_out, sum_counts, under
from powerprop.updaters.fixed import random_masks


def snfs(sparsity: Sparsity, end_step: int, every_steps: int = 100, drop_fraction: float = 0.3,
         distribution: Distribution = uniform, dense: Sequence[str] = (), momentum: float = 0.9) -> SparsityUpdater:
  """Sparse momentum: every ΔT drop by |θ| in each layer, share the dropped out by momentum, and grow by momentum.

    v ← μ v + (1 − μ) ∂L/∂θ at every step;   drop round(f(n) k_l), f as for `rigl`, of the smallest live |θ| of each layer
    r_l = mean |v| of the live;   grow n_l ∝ r_l, no more than have room, Σ n_l = Σ dropped;   by |v|, n_l of each layer

  A layer keeps at least one live weight, as an empty one has no r_l and would stay empty. A weight that was dropped in the same
  update may be grown again; it then keeps its value.

  Cost: a dense gradient at every step, and a dense float32 copy of the weights: sparse in its result, not in its training. Drop
  score: |θ|; grow score: |v|; distribution: uniform at the start; schedule: every ΔT under a cosine; scope: by layer, counts by
  r_l. Differs from the paper: v is a mean of gradients of its own and not the optimiser's buffer, so that any optimiser may
  stand inside; counts are exact, by largest remainder; the drop fraction is annealed to 0 at the end by a cosine.

  Args:
    sparsity: share of weights removed in total, or a mapping from patterns of leaf names to shares.
    end_step: from this update on the masks stay.
    every_steps: ΔT, in applied updates; one epoch in the paper.
    drop_fraction: f₀ in (0, 1]; 0.5 in the paper.
    distribution: of the random masks at the start; later only its total counts.
    dense: patterns of leaf names that are not pruned and not counted.
    momentum: μ in [0, 1).
  Raises: ValueError for settings out of their range.
  Source: Dettmers & Zettlemoyer 2019 (arXiv:1907.04840), algorithm 2.
  """
  check_exchanges(end_step, every_steps)
  check_share('drop_fraction', drop_fraction)
  if not 0 <= momentum < 1:
    raise ValueError(f'momentum must lie in [0, 1), got {momentum!r}.')

  def init(weights: Tree, key: jax.Array | None) -> tuple[Masks, Any]:
    mask = random_masks(weights, sparsity, distribution, dense, need_key(key, 'snfs'))
    return Masks(mask), jax.tree.map(lambda m: jnp.zeros_like(m, jnp.float32), mask)

  def observe(step: Any, memory: Any, grads: Tree) -> Any:
    return jax.tree.map(lambda v, g: momentum * v + (1 - momentum) * g.astype(jnp.float32), memory, under(memory, grads))

  def update(step: Any, masks: Masks, memory: Any, theta: Tree, grads: Tree) -> tuple[Masks, Any]:
    live, theta = masks.forward, under(masks.forward, theta)
    fraction = cosine(step, end_step, drop_fraction)
    stay = jax.tree.map(lambda k: jnp.maximum(k - jnp.round(fraction * k).astype(jnp.int32), jnp.minimum(k, 1)),
                        masks_lib.counts(live))
    kept = select(theta, stay, False, live)
    means = jax.tree.map(lambda v, m: jnp.sum(jnp.abs(v), where=m) / jnp.maximum(jnp.sum(m), 1), memory, live)
    mask = _regrow(kept, make_counts(theta, sparsity, distribution), means, memory)
    return Masks(mask), memory

  def due(step: Any) -> Any:
    return (step < end_step) & (step % every_steps == 0)

  return SparsityUpdater(init, update, due, observe=observe, dense_gradient=lambda step: step < end_step)


def dsr(sparsity: Sparsity, end_step: int, every_steps: int = 100, drop_fraction: float = 0.3,
        distribution: Distribution = uniform, dense: Sequence[str] = ()) -> SparsityUpdater:
  """Dynamic sparse reparameterisation: every ΔT drop the smallest live |θ| of all layers together, and grow as many at random.

    kept = top(|θ|, K − round(f(n) K), m) over all layers;   grow n_l ∝ kept weights of the layer, no more than have room

  A layer keeps its largest weight, whatever the others, as an empty one would stay empty.

  Cost: that of the sparse network. Drop score: |θ|; grow score: random; distribution: uniform at the start; schedule: every ΔT
  under a cosine; scope: global, regrowth by what layers keep. Differs from the paper: there a threshold is adapted until about
  as many weights as wanted are dropped; here it is exactly so many, a share annealed as in `rigl`.

  Args: as for `snfs`.
  Raises: ValueError for settings out of their range.
  Source: Mostafa & Wang 2019 (arXiv:1902.05967), algorithm 1.
  """
  check_exchanges(end_step, every_steps)
  check_share('drop_fraction', drop_fraction)

  def init(weights: Tree, key: jax.Array | None) -> tuple[Masks, Any]:
    now, later = jax.random.split(need_key(key, 'dsr'))
    mask = random_masks(weights, sparsity, distribution, dense, now)
    return Masks(mask), later

  def update(step: Any, masks: Masks, memory: Any, theta: Tree, grads: Tree) -> tuple[Masks, Any]:
    live, theta = masks.forward, under(masks.forward, theta)
    total = sum_counts(live)
    stay = total - jnp.round(cosine(step, end_step, drop_fraction) * total).astype(jnp.int32)
    kept = select(jax.tree.map(_largest_first, theta, live), stay, True, live)
    mask = _regrow(kept, make_counts(theta, sparsity, distribution), masks_lib.counts(kept),
                   random_scores(jax.random.fold_in(memory, step), theta))
    return Masks(mask), memory

  return SparsityUpdater(init, update, lambda step: (step < end_step) & (step % every_steps == 0))


def _largest_first(x: jax.Array, live: jax.Array) -> jax.Array:
  """|x| as a score, infinite for the largest of the live."""
  size = jnp.abs(x)
  return jnp.where(live & (size == jnp.max(jnp.where(live, size, 0))) & (size > 0), jnp.inf, size)


def _regrow(kept: Tree, counts: Any, shares: Tree, scores: Tree) -> Tree:
  """`kept` and as many others as are missing to the sum of `counts`, shared out between the leaves, by |score| in each."""
  leaves, treedef = jax.tree.flatten(kept)
  found = jax.tree.leaves(masks_lib.counts(kept))
  room = jnp.stack([m.size - n for m, n in zip(leaves, found, strict=True)])
  missing = sum(jax.tree.leaves(counts)) - sum_counts(kept)
  grow = share_out(missing, jnp.stack(jax.tree.leaves(shares)), room)
  grown = select(scores, jax.tree.unflatten(treedef, list(grow)), False, jax.tree.map(jnp.logical_not, kept))
  return jax.tree.map(jnp.logical_or, kept, grown)

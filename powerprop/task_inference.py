"""Which task is this? The mask is chosen from inputs alone, without labels.

The paper's own procedure is in a supplement that was not to be had; these are the two of Wortsman et al. 2020, Supermasks in
Superposition (SupSup, arXiv:2006.14769), section 3: the mask under which outputs are most certain, and one gradient step on
weights of the masks.
"""
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from powerprop.reparam import Tree
from powerprop.task_masks import Memory, recall


class Inferred(NamedTuple):
  task: jax.Array     # int32 [...]: the slot of the largest score; −1 where no score is a number, or no task is there
  scores: jax.Array   # float32 [slots, ...]: the higher the likelier; −inf for a slot that is not in use, and in place of NaN


def entropy(logits: jax.Array) -> jax.Array:
  """H = −Σ p log p over the last axis, p = softmax: [...] of logits [..., C], in nats. A logit of −∞ has no part in it."""
  log_p = jax.nn.log_softmax(logits)
  p = jnp.exp(log_p)
  return -jnp.sum(p * jnp.where(p == 0, 0, log_p), axis=-1)


def infer_by_entropy(logits: jax.Array, here: jax.Array, together: bool = False) -> Inferred:
  """The task under whose mask the output is most certain: argmin_t H(f(x, θ ∘ M_t)).

  One forward pass for each task: `lax.map(lambda t: net.apply(reparam.weights(recall(memory, t, phi)), x), jnp.arange(slots))`.

  Args:
    logits: [slots, ..., C], of the same inputs under every mask.
    here: bool [slots], `Memory.here`.
    together: all inputs are known to be of one task: their mean entropy decides.
  Returns: a task for each input [...], or one.
  Raises: ValueError when there is not one set of logits for each slot.
  Source: Wortsman et al. 2020, section 3.
  """
  if jnp.ndim(logits) < 2 or jnp.shape(here) != logits.shape[:1]:
    raise ValueError(f'logits are [slots, ..., classes] and here is [slots]; got {jnp.shape(logits)} and {jnp.shape(here)}.')
  scores = -entropy(logits.astype(jnp.float32))
  return _best(jnp.mean(scores.reshape(scores.shape[0], -1), axis=1) if together else scores, here)


def infer_by_gradient(logits: Callable[[Tree], jax.Array], memory: Memory, phi: Tree,
                      weights: Callable[[Tree], Tree] = lambda phi: phi) -> Inferred:
  """SupSup's one gradient step: the task whose weight in a mixture of all masks would fall the entropy fastest.

    θ̄ = Σ_t a_t θ ∘ M_t with a_t = 1/T;   task = argmax_t −∂H(f(x, θ̄)) / ∂a_t = argmax_t −⟨∂H/∂θ̄, θ ∘ M_t⟩

  One forward and one backward pass, whatever the number of tasks, and two sweeps over the weights for each. Leaves of the tasks'
  own are mixed alike; frozen ones, and those that are no floats, are no part of it.

  Args:
    logits: θ → [..., C], of inputs of one task; their mean entropy counts. For a task for each input, map over inputs.
    memory: of the tasks.
    phi: parameters.
    weights: φ → θ, `reparam.weights`. Masks are mixed at θ: Ψ of a mixture of φ is another.
  Source: Wortsman et al. 2020, section 3 ("One-Shot").
  """
  slots = memory.here.shape[0]
  share = memory.here / jnp.maximum(jnp.sum(memory.here), 1)
  theta = weights(phi)

  def fixed(x: Any, bits: Any, own: Any) -> bool:
    """What all tasks have alike; and a count, such as that of BatchNorm's averages, has no slope."""
    return (bits is None and own is None) or not jnp.issubdtype(x.dtype, jnp.inexact)

  def of(task: Any) -> list[Any]:
    """θ under the mask of a task, the leaves that differ between tasks."""
    seen = weights(recall(memory, task, phi))
    return jax.tree.leaves(jax.tree.map(lambda x, bits, own: None if fixed(x, bits, own) else x, seen, memory.bits, memory.own))
  mixed = lax.fori_loop(0, slots, lambda t, sums: [s + share[t].astype(s.dtype) * x for s, x in zip(sums, of(t), strict=True)],
                        [jnp.zeros(x.shape, x.dtype) for x in jax.eval_shape(of, 0)])

  def certain(mixed: list[Any]) -> jax.Array:
    rest = iter(mixed)
    whole = jax.tree.map(lambda x, bits, own: x if fixed(x, bits, own) else next(rest), theta, memory.bits, memory.own)
    return -jnp.mean(entropy(logits(whole).astype(jnp.float32)))
  slope = jax.grad(certain)(mixed)
  scores = lax.map(lambda t: sum(jnp.sum(g * x, dtype=jnp.float32) for g, x in zip(slope, of(t), strict=True)), jnp.arange(slots))
  return _best(scores, memory.here)


def _best(scores: jax.Array, here: jax.Array) -> Inferred:
  counts = here.reshape(-1, *[1] * (scores.ndim - 1)) & ~jnp.isnan(scores)   # a task that has diverged wins nothing
  scores = jnp.where(counts, scores, -jnp.inf)
  return Inferred(jnp.where(jnp.any(counts, axis=0), jnp.argmax(scores, axis=0), -1).astype(jnp.int32), scores)

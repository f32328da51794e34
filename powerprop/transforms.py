"""Optax wrappers for parameters φ that a network sees as θ = Ψ(φ). The gradient given to `update` is always the one at θ.

Both wrap an inner chain rather than stand in it, so that decay, clipping and trust ratios inside see what they should.
"""
import collections
import contextvars
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from optax import contrib

from powerprop.reparam import Reparam, Tree, describe_leaves

Update = Callable[[Tree, Any, Tree], tuple[Tree, Any]]   # optax's: (gradients, state, parameters) → (updates, state)


_begun: contextvars.ContextVar[list[tuple[Reparam, Tree]] | None] = contextvars.ContextVar('begun', default=None)


class Outermost(optax.GradientTransformationExtraArgs):
  """A transformation whose updates nothing around it may change: what `sparsify` and `protect` give. The type of its state has a
  true `outermost`, by which it is found within other transformations too."""
  zeroes: bool = False   # does it set weights to 0 that it does not train? `protect` cannot stand around that


class Propagation(optax.GradientTransformationExtraArgs):
  """What the wrappers below give; `reparam` is the one that they were given."""
  reparam: Reparam


def target_propagation(inner: optax.GradientTransformation, reparam: Reparam) -> optax.GradientTransformationExtraArgs:
  """The paper's update around any inner chain. Give `update` the gradient at θ = Ψ(φ), the weights that the network saw.

    Δφ = optim(∂L/∂Ψ(φ)) · diag(α|φ|^(α−1))

  Never give it ∂L/∂φ: differentiate the loss of the original network at `reparam.weights(phi)`. A gradient of a network
  transformed by `reparameterise` has the slope in it already, and it would be applied twice.

      theta = reparam.weights(phi)
      loss, grads = jax.value_and_grad(loss_fn)(theta, batch)
      updates, state = tx.update(grads, state, phi)
      phi = optax.apply_updates(phi, updates)

  `inner` sees θ as its parameters and moves it to a virtual target θ + u; φ takes one step of gradient descent on
  ½‖Ψ(φ) − (θ + u)‖², that is u times the slope. So Adam's second moments correct for the curvature of the problem, not for
  that of Ψ. Decay inside `inner` acts on θ. With plain SGD this equals `backpropagation`. The paper's proof that the step
  descends holds when `inner` preserves the signs of the gradient (SGD, Adam's first step, signed methods); momentum, which
  may point elsewhere, can be turned uphill by the slope: u = (3, −1), g = (1, 1) and slopes² (0.1, 1) give ⟨Δφ, ∂L/∂φ⟩ < 0.

  State of `inner` is kept in float32 when parameters are bfloat16 or float16 (in float64 for float64): moments of 8 bits of
  mantissa stop moving after some hundred steps. Gradients are converted; updates come back in the dtype of the gradients.

  Args:
    inner: any optax transformation, chains with extra arguments included; these are passed on.
    reparam: from `powerpropagation`.
  Returns: a transformation whose `init` takes φ and whose `update` takes (∂L/∂θ, state, φ) and needs φ.
  Raises: ValueError when `update` gets no parameters or gradients of another structure, a None in place of a leaf included; and
    as `reparam` does for a tree without weights (inside optax.partition, wrap the groups that have some).
  Source: Schwarz et al. 2021 (arXiv:2110.00296), section 2; the curvature argument is its footnote 1.
  """
  def update(inner_update: Update, grads: Tree, state: Any, phi: Tree) -> tuple[Tree, Any]:
    u, state = inner_update(grads, state, reparam.weights(phi))
    return _times_slope(reparam, phi, u), state
  return _wrap(inner, reparam, lambda phi: reparam.weights(phi), update)


def backpropagation(inner: optax.GradientTransformation, reparam: Reparam) -> optax.GradientTransformationExtraArgs:
  """Δφ = optim(∂L/∂Ψ(φ) · diag(α|φ|^(α−1))): the naive order, in which `optim` sees the gradient at φ.

  Behind the same interface as `target_propagation`: `update` takes the gradient at θ = Ψ(φ), the weights that the network
  saw, and multiplies by the slope itself. This is what jax.grad through `reparameterise` and then `inner` would give; an
  adaptive `inner` undoes much of the slope. Decay inside `inner` acts on φ: L2 on φ is an L_(2/α) penalty on θ.

  Args, Returns, Raises: as for `target_propagation`, state in float32 included.
  Source: Schwarz et al. 2021, section 2, eq. (1).
  """
  def update(inner_update: Update, grads: Tree, state: Any, phi: Tree) -> tuple[Tree, Any]:
    return inner_update(_times_slope(reparam, phi, grads), state, phi)
  return _wrap(inner, reparam, lambda phi: phi, update)


# They scale, average or now and then leave out the updates inside.
_UNFIT = (contrib.ScheduleFreeState, contrib.MechanicState, contrib.SAMState, optax.LookaheadState,
          optax.ConditionallyTransformState)


def find_states(opt_state: Any, kind: type, what: str) -> list[Any]:
  """The states of `kind` in an optimiser's state, at any nesting; `what` has made them.

  Raises: ValueError where something is chained after one, or around it makes other updates of its updates.
  """
  def walk(x: Any) -> list[Any]:
    if isinstance(x, kind):
      return [x]
    parts = list(x.values()) if isinstance(x, dict) else list(x) if isinstance(x, tuple | list) else []
    found = [walk(part) for part in parts]
    if type(x) in (tuple, collections.OrderedDict) and any(found[:-1]):   # the state of optax.chain, of optax.named_chain
      raise ValueError(f'something is chained after {what} and would change its updates: put it inside, as in '
                       f'{what}(optax.chain(...)).')
    if isinstance(x, _UNFIT) and any(found):
      raise ValueError(f'{type(x).__name__.removesuffix("State")} around {what} makes other updates of its updates; '
                       f'{what} stands outermost.')
    return [state for some in found for state in some]
  return walk(opt_state)


def begin(inner: optax.GradientTransformation, params: Tree) -> tuple[Any, list[tuple[Reparam, Tree]]]:
  """The first state of `inner`, and what was given to each of the wrappers above that are in it, at any depth: reparam and φ."""
  token = _begun.set([])
  try:
    return inner.init(params), _begun.get() or []
  finally:
    _begun.reset(token)


def holds_outermost(state: Any) -> bool:
  """Is there the state of a `sparsify` or `protect` in it, at any depth?"""
  def marked(x: Any) -> bool:
    return getattr(x, 'outermost', False) is True
  return any(marked(x) for x in jax.tree.leaves(state, is_leaf=marked))


def _wrap(inner: optax.GradientTransformation, reparam: Reparam, seen: Callable[[Tree], Tree],
          step: Callable[[Update, Tree, Any, Tree], tuple[Tree, Any]]) -> optax.GradientTransformationExtraArgs:
  """What the two share: checks, extra arguments, float32 inside and the caller's dtype outside. `inner` begins at seen(φ)."""
  if not isinstance(reparam, Reparam) or not hasattr(inner, 'update'):
    raise ValueError(f'an optax transformation and a Reparam are wanted, in this order; got {type(inner).__name__} and '
                     f'{type(reparam).__name__}.')
  wrong = ('what sparsify or protect makes stands outermost: sparsify(target_propagation(inner, reparam), updater, reparam), '
           'protect(target_propagation(inner, reparam)).')
  if isinstance(inner, Outermost):
    raise ValueError(wrong)
  inner = optax.with_extra_args_support(inner)

  def init(params: Tree) -> Any:
    if (begun := _begun.get()) is not None:
      begun.append((reparam, params))
    # Empty trees are optax's own: groups of `partition` without parameters, placeholders of `optax.tree.map_params`.
    state = inner.init(seen(_promote(params)) if jax.tree.leaves(params) else params)
    if holds_outermost(state):   # in a chain, MultiSteps, inject_hyperparams
      raise ValueError(wrong)
    return state

  # optax hands `params` over by keyword as well.
  def update(updates: Tree, state: Any, params: Tree = None, **extra_args: Any) -> tuple[Tree, Any]:
    if params is None:
      raise ValueError('update needs the stored parameters φ: tx.update(grads, state, phi).')
    structure: Any = jax.tree.structure(updates)
    if structure != jax.tree.structure(params):
      raise ValueError(f'gradients and parameters differ in structure: got {describe_leaves(updates)}; '
                       f'parameters are {describe_leaves(params)}.')
    if not jax.tree.leaves(params):
      return inner.update(updates, state, params, **extra_args)
    u, state = step(functools.partial(inner.update, **extra_args), _promote(updates), state, _promote(params))
    return _cast(u, updates), state

  made = Propagation(init, update)
  made.reparam = reparam
  return made


def _times_slope(reparam: Reparam, phi: Tree, v: Tree) -> Tree:
  """Jᵀv at φ: v times α|φ|^(α−1), a power that XLA finds computed already for θ. Other leaves as they are."""
  return jax.tree.map(lambda on, s, x: s * x.astype(s.dtype) if on else x, reparam.where(phi), reparam.slope(phi), v)


def _cast(tree: Tree, like: Tree) -> Tree:
  return jax.tree.map(lambda x, y: x.astype(y.dtype), tree, like)


def _promote(tree: Tree) -> Tree:
  """Floating leaves in at least float32; others as they are."""
  def leaf(x: Any) -> Any:
    return x.astype(jnp.promote_types(x.dtype, jnp.float32)) if jnp.issubdtype(x.dtype, jnp.floating) else x
  return jax.tree.map(leaf, tree)

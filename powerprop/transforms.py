"""Optax wrappers for parameters φ that a network sees as θ = Ψ(φ). The gradient given to `update` is always the one at θ.

Both wrap an inner chain rather than stand in it, so that decay, clipping and trust ratios inside see what they should.
"""
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from powerprop.reparam import Reparam, Tree, describe_leaves


def target_propagation(inner: optax.GradientTransformation, reparam: Reparam) -> optax.GradientTransformationExtraArgs:
  """Δφ = optim(∂L/∂Ψ(φ)) · diag(α|φ|^(α−1)), the paper's update, around any inner chain `optim`.

  `update` takes the gradient at θ = Ψ(φ), the weights that the network saw, never ∂L/∂φ: differentiate the loss of the
  original network at `reparam.weights(phi)`. A gradient of a network transformed by `reparameterise` has the slope in it
  already, and it would be applied twice.

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
  mantissa stop moving after some hundred steps. Gradients are converted; updates come back in the dtype of the parameters.

  Args:
    inner: any optax transformation, chains with extra arguments included; these are passed on.
    reparam: from `powerpropagation`.
  Returns: a transformation whose `init` takes φ and whose `update` takes (∂L/∂θ, state, φ) and needs φ.
  Raises: ValueError when `update` gets no parameters or gradients of another structure.
  Source: Schwarz et al. 2021 (arXiv:2110.00296), section 2; the curvature argument is its footnote 1.
  """
  def update(inner_update, pull, grads, state, theta, phi):
    u, state = inner_update(grads, state, theta)
    return pull(u), state
  return _wrap(inner, reparam, reparam.weights, update)


def backpropagation(inner: optax.GradientTransformation, reparam: Reparam) -> optax.GradientTransformationExtraArgs:
  """Δφ = optim(∂L/∂Ψ(φ) · diag(α|φ|^(α−1))): the naive order, in which `optim` sees the gradient at φ.

  Behind the same interface as `target_propagation`: `update` takes the gradient at θ = Ψ(φ), the weights that the network
  saw, and multiplies by the slope itself. This is what jax.grad through `reparameterise` and then `inner` would give; an
  adaptive `inner` undoes much of the slope. Decay inside `inner` acts on φ: L2 on φ is an L_(2/α) penalty on θ.

  Args, Returns, Raises: as for `target_propagation`, state in float32 included.
  Source: Schwarz et al. 2021, section 2, eq. (1).
  """
  def update(inner_update, pull, grads, state, theta, phi):
    return inner_update(pull(grads), state, phi)
  return _wrap(inner, reparam, lambda phi: phi, update)


def _wrap(inner: optax.GradientTransformation, reparam: Reparam, seen: Callable[[Tree], Tree],
          step: Callable[..., Any]) -> optax.GradientTransformationExtraArgs:
  """What the two share: float32 inside, the caller's dtype outside, Ψ and its transposed Jacobian from one evaluation."""
  inner = optax.with_extra_args_support(inner)

  def init(params):
    return inner.init(seen(_promote(params)))

  def update(updates, state, params=None, **extra_args):   # optax hands `params` over by keyword as well
    if params is None:
      raise ValueError('update needs the stored parameters φ: tx.update(grads, state, phi).')
    if jax.tree.structure(updates) != jax.tree.structure(params):
      raise ValueError(f'gradients and parameters differ in structure: got {describe_leaves(updates)}; '
                       f'parameters are {describe_leaves(params)}.')
    phi = _promote(params)
    theta, pull = jax.vjp(reparam.weights, phi)
    u, state = step(lambda g, s, p: inner.update(g, s, p, **extra_args), lambda u: pull(u)[0],
                    jax.tree.map(lambda g, p: g.astype(p.dtype), updates, phi), state, theta, phi)
    return jax.tree.map(lambda u, p: u.astype(p.dtype), u, params), state

  return optax.GradientTransformationExtraArgs(init, update)


def _promote(tree: Tree) -> Tree:
  """Floating leaves in at least float32; others as they are."""
  def leaf(x):
    return x.astype(jnp.promote_types(x.dtype, jnp.float32)) if jnp.issubdtype(x.dtype, jnp.floating) else x
  return jax.tree.map(leaf, tree)

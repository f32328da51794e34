"""Haiku network transforms: the same network, with other parameters."""
import functools
import inspect
from collections.abc import Callable
from typing import Any, TypeVar

import haiku as hk
import jax
import numpy as np
from jax.extend.core import Literal, jaxpr_as_fun

from powerprop.reparam import Reparam, Tree, leaf_name, with_zeros

Net = TypeVar('Net', hk.Transformed, hk.TransformedWithState)


def reparameterise(net: Net, reparam: Reparam) -> Net:
  """The network whose parameters are φ and whose weights are θ = Ψ(φ).

  `init` gives φ = Ψ⁻¹(θ0) for the θ0 of `net.init`, so that the function at initialisation is that of `net`, to float
  precision; `apply` takes φ. For evaluation, plain jax.grad (which then gives ∂L/∂φ) and training loops of others. With
  `target_propagation` use `net` itself at `reparam.weights(phi)` instead, since it wants the gradient at θ.

  A weight leaf that `net` initialises with zeros (as hk.nets.ResNet50 does its classifier) keeps α = 1 and is named in a
  warning: for α > 1 it would never move, and nothing before it either. Which leaves these are is read off a trace of
  `net.init`, once per structure of parameters and never off values, so `apply` needs no `init` before it (after a restart,
  say). `keep_zeros` does the same to a `Reparam`.

  Args:
    net: hk.transform or hk.transform_with_state of anything, hk.without_apply_rng included.
    reparam: from `powerpropagation`.
  Returns: a network of the same type and signatures.
  Raises: ValueError when `reparam` chooses no leaf of the network's parameters.

  Example:
    >>> import haiku as hk, jax, jax.numpy as jnp, powerprop
    >>> net = hk.without_apply_rng(hk.transform(lambda x: hk.nets.MLP([300, 100, 10])(x)))
    >>> net = powerprop.reparameterise(net, powerprop.powerpropagation(2.0))
    >>> phi = net.init(jax.random.key(0), jnp.zeros([1, 784]))
    >>> net.apply(phi, jnp.zeros([8, 784])).shape
    (8, 10)
  Source: Schwarz et al. 2021, section 2.
  """
  stateful = isinstance(net, hk.TransformedWithState)
  # What of apply's arguments after the parameters is for init as well; hk.without_apply_rng takes the key away.
  signature = inspect.signature(net.apply)
  inputs_at = 1 + stateful + ('rng' in signature.parameters)
  settled: dict[Any, Reparam] = {}                          # a cache: a pure function of the key

  def settle(params: Tree, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Reparam:
    leaves, treedef = jax.tree.flatten(params)
    key = treedef, tuple((x.shape, x.dtype) for x in leaves)
    if key not in settled:
      constant = _constant_params(net.init, stateful, reparam, args, kwargs)
      zeros = frozenset(name for name, value in constant.items() if not np.any(value))
      settled[key] = with_zeros(reparam, zeros, params)
    return settled[key]

  @functools.wraps(net.init)   # haiku's own combinators look at what it hangs on these functions
  def init(rng: Any, *args: Any, **kwargs: Any) -> Any:
    out: Any = net.init(rng, *args, **kwargs)
    theta = out[0] if stateful else out
    phi = settle(theta, args, kwargs).inverse(theta)
    return (phi, out[1]) if stateful else phi

  @functools.wraps(net.apply)
  def apply(params: Tree, *rest: Any, **kwargs: Any) -> Any:
    call = signature.bind(params, *rest, **kwargs)
    theta = settle(params, call.args[inputs_at:], call.kwargs).weights(params)
    return net.apply(theta, *rest, **kwargs)

  return type(net)(init, apply)


def _constant_params(init: Callable[..., Any], stateful: bool, reparam: Reparam, args: tuple[Any, ...],
                     kwargs: dict[str, Any]) -> dict[str, np.ndarray]:
  """Name → value of the reparameterised leaves to which `init` gives the same value whatever the key and the inputs are."""
  leaves, treedef = jax.tree.flatten((args, kwargs))
  dynamic = [i for i, x in enumerate(leaves) if isinstance(x, jax.Array | np.ndarray)]

  def from_arrays(key: jax.Array, arrays: list[jax.Array]) -> Tree:
    filled = list(leaves)
    for i, x in zip(dynamic, arrays, strict=True):
      filled[i] = x
    a, k = jax.tree.unflatten(treedef, filled)
    out = init(key, *a, **k)
    return out[0] if stateful else out

  shapes = [jax.ShapeDtypeStruct(leaves[i].shape, leaves[i].dtype) for i in dynamic]
  closed, out = jax.make_jaxpr(from_arrays, return_shape=True)(jax.random.key(0), shapes)
  names = [leaf_name(path) for path, _ in jax.tree_util.tree_leaves_with_path(out)]
  # The network's own parameters: an apply may be handed more than these.
  values = _known_outputs(closed, [alpha != 1 for alpha in jax.tree.leaves(reparam.alphas(out))])
  return {name: np.asarray(value) for name, value in zip(names, values, strict=True) if value is not None}


def _known_outputs(closed: Any, wanted: list[bool]) -> list[Any]:
  """Values of the `wanted` outputs of a jaxpr that depend on none of its inputs; None for the others."""
  jaxpr = closed.jaxpr
  unknown, eqns = set(jaxpr.invars), []
  for eqn in jaxpr.eqns:
    if any(not isinstance(v, Literal) and v in unknown for v in eqn.invars):
      unknown.update(eqn.outvars)
    else:
      eqns.append(eqn)
  picked = [want and (isinstance(v, Literal) or v not in unknown)
            for v, want in zip(jaxpr.outvars, wanted, strict=True)]
  outvars = [v for v, pick in zip(jaxpr.outvars, picked, strict=True) if pick]
  needed = {v for v in outvars if not isinstance(v, Literal)}
  kept = []
  for eqn in reversed(eqns):
    if needed.intersection(eqn.outvars):
      needed.update(v for v in eqn.invars if not isinstance(v, Literal))
      kept.append(eqn)
  part = jaxpr.replace(invars=[], outvars=outvars, eqns=kept[::-1], debug_info=jaxpr.debug_info.with_unknown_names())
  with jax.ensure_compile_time_eval():   # the caller may be inside jit
    values = iter(jaxpr_as_fun(closed.replace(jaxpr=part))())
  return [next(values) if pick else None for pick in picked]

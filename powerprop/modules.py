"""Haiku network transforms: the same network, with other parameters."""
import functools
import inspect
from collections.abc import Callable
from typing import Any, TypeVar

import haiku as hk
import jax
import numpy as np
from jax.extend.core import Literal

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
  say). It looks into jit, hk.remat and hk.layer_stack and knows that zero times anything is zero; an initialiser that makes
  its zeros in a stranger way is not seen. `keep_zeros` does the same to a `Reparam` and looks at values.

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
      settled[key] = with_zeros(reparam, zero_params(net.init, stateful, args, kwargs), params)
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


def zero_params(init: Callable[..., Any], stateful: bool, args: tuple[Any, ...], kwargs: dict[str, Any]) -> frozenset[str]:
  """Names of the leaves that `init` fills with zeros whatever the key and the values of the inputs are."""
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
  zero = _zero_outputs(closed, [False] * len(closed.jaxpr.invars))
  names = [leaf_name(path) for path, _ in jax.tree_util.tree_leaves_with_path(out)]
  return frozenset(name for name, is_zero in zip(names, zero, strict=True) if is_zero)


# Operations that give zeros for operands that are all zero, and those for which one such operand is enough.
_ALL_ZERO = frozenset({
    'abs', 'add', 'add_any', 'broadcast_in_dim', 'concatenate', 'convert_element_type', 'copy', 'device_put', 'erf_inv', 'expm1',
    'gather', 'imag', 'log1p', 'max', 'min', 'neg', 'pad', 'real', 'reduce_max', 'reduce_min', 'reduce_sum', 'reshape', 'rev',
    'sharding_constraint', 'sign', 'sin', 'slice', 'sqrt', 'square', 'squeeze', 'stop_gradient', 'sub', 'tanh', 'transpose'})
_ANY_ZERO = frozenset({'conv_general_dilated', 'dot_general', 'mul'})


def _zero_outputs(closed: Any, given: list[bool]) -> list[bool]:
  """Which outputs of a jaxpr are surely all zero, when the inputs marked in `given` are. Looks into jit, remat and scan."""
  jaxpr = closed.jaxpr if hasattr(closed, 'jaxpr') else closed
  zero = {var for var, is_zero in zip(jaxpr.invars, given, strict=True) if is_zero}
  zero.update(var for var, value in zip(jaxpr.constvars, getattr(closed, 'consts', ()), strict=False) if _is_zero(value))
  # Most of a network's `init` is its forward pass, of which no parameter is made.
  for eqn in jaxpr.eqns:
    operands = [_is_zero(v.val) if isinstance(v, Literal) else v in zero for v in eqn.invars]
    zero.update(var for var, is_zero in zip(eqn.outvars, _zero_results(eqn, operands), strict=True) if is_zero)
  return [_is_zero(v.val) if isinstance(v, Literal) else v in zero for v in jaxpr.outvars]


def _zero_results(eqn: Any, operands: list[bool]) -> list[bool]:
  name = eqn.primitive.name
  inner = eqn.params.get('jaxpr', eqn.params.get('call_jaxpr'))
  if name == 'scan':   # what is carried has another value in each turn; what is scanned over has an axis more than in the body
    body = inner.jaxpr if hasattr(inner, 'jaxpr') else inner
    return _zero_outputs(inner, [is_zero and len(outer.aval.shape) > len(var.aval.shape)
                                 for is_zero, outer, var in zip(operands, eqn.invars, body.invars, strict=True)])
  if inner is not None and len((inner.jaxpr if hasattr(inner, 'jaxpr') else inner).invars) == len(operands):
    return _zero_outputs(inner, operands)
  if name == 'select_n':   # its first operand says which of the others
    operands, name = operands[1:], 'max'
  elif name == 'div':
    operands, name = operands[:1], 'max'
  return [any(operands) and (name in _ANY_ZERO or (name in _ALL_ZERO and all(operands)))] * len(eqn.outvars)


def _is_zero(value: Any) -> bool:
  if isinstance(value, jax.core.Tracer):
    return False
  return np.issubdtype(getattr(value, 'dtype', type(value)), np.number) and not np.any(value)

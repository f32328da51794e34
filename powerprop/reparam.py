"""The reparameterisation θ = Ψ(φ) = φ|φ|^(α−1), its inverse and its slope, on arrays and on trees of parameters.

Source: Schwarz et al., "Powerpropagation: a sparsity inducing weight reparameterisation", NeurIPS 2021
(arXiv:2110.00296), section 2.
"""
import fnmatch
import functools
import math
import warnings
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.custom_derivatives import SymbolicZero

Tree = Any
Where = Callable[[str, Any], bool]
Arrays = tuple[jax.Array, ...]
Alpha = float | Mapping[str, float] | Callable[[str, Any], float]

# The paper suggests α in (1, 3] "for numerical stability reasons" (its footnote 2).
LARGEST_SUGGESTED_ALPHA = 3.0


# ---- on arrays --------------------------------------------------------------------------------------------------


def psi(phi: jax.Array, alpha: float | jax.Array) -> jax.Array:
  """Weight of a stored parameter: Ψ(φ) = φ|φ|^(α−1). Odd, increasing, the identity at α = 1; Ψ(0) = 0.

  Differentiable in forward and reverse mode, also at 0, where autodiff of the formula is NaN for α < 2: the rule is
  dΨ/dφ = α|φ|^(α−1), eq. (1) of the paper, and dΨ/dα = Ψ(φ) log|φ| for a traced α. The second derivative at 0,
  which is infinite for 1 < α < 2, is taken to be 0.

  Args:
    phi: [...] floating. bfloat16 and float16 are computed in float32 and rounded once.
    alpha: power, at least 1. A Python number is static, the fast way; a traced scalar costs a general power.
  Returns: [...] in the dtype of `phi`; `phi` itself for a static α = 1.
  Raises: ValueError when `alpha` is below 1, where the slope at 0 is infinite, or not finite, or no scalar; when
    `phi` is not floating.
  Source: Schwarz et al. 2021, section 2.
  """
  alpha = _check(phi, alpha)
  if isinstance(alpha, float):
    return phi if alpha == 1 else _psi(jnp.asarray(phi), alpha)
  return _psi_traced(jnp.asarray(phi), alpha)


def psi_inverse(theta: jax.Array, alpha: float | jax.Array) -> jax.Array:
  """Stored parameter of a weight: Ψ⁻¹(θ) = sign(θ)|θ|^(1/α).

  Its slope (1/α)|θ|^(1/α−1) is infinite at 0 for α > 1, and so is its gradient there.

  Args:
    theta: [...] floating.
    alpha: as for `psi`.
  Returns: [...] in the dtype of `theta`; `theta` itself for a static α = 1.
  Raises: ValueError as `psi` does.
  Source: Schwarz et al. 2021, section 2 (initialisation).
  """
  alpha = _check(theta, alpha)
  if isinstance(alpha, float) and alpha == 1:
    return theta
  theta = jnp.asarray(theta)
  return _psi_inverse(theta, jnp.asarray(alpha, _compute_dtype(theta)))


def psi_slope(phi: jax.Array, alpha: float | jax.Array) -> jax.Array:
  """Slope of Ψ: α|φ|^(α−1), the diagonal of its Jacobian. 1 everywhere at α = 1; 0 at φ = 0 for α > 1.

  Args, Returns, Raises: as for `psi`.
  Source: Schwarz et al. 2021, eq. (1).
  """
  alpha, phi = _check(phi, alpha), jnp.asarray(phi)
  if isinstance(alpha, float):
    return jnp.ones_like(phi) if alpha == 1 else _slope(phi, alpha)
  return _slope_traced(phi, alpha)


def _check(x: jax.Array, alpha: float | jax.Array) -> float | jax.Array:
  """`alpha` as a checked float when its value is known, else as the traced scalar that it is."""
  try:
    dtype = jnp.result_type(x)
  except TypeError:
    raise ValueError(f'Ψ acts on floating arrays, got {type(x).__name__}.') from None
  if not jnp.issubdtype(dtype, jnp.floating):
    raise ValueError(f'Ψ acts on floating arrays, got dtype {dtype}.')
  if isinstance(alpha, jax.core.Tracer):
    if alpha.shape or not jnp.issubdtype(alpha.dtype, jnp.floating):
      raise ValueError(f'a traced alpha must be a floating scalar, got {alpha.dtype}{list(alpha.shape)}.')
    return alpha
  return check_alpha(alpha)


def check_alpha(alpha: Any, what: str = 'alpha') -> float:
  """`alpha` as a Python float. Raises ValueError, naming `what`, unless it is one finite number of at least 1."""
  if isinstance(alpha, jax.core.Tracer):
    raise ValueError(f'{what} must be a Python number here, got a traced value; psi(phi, alpha) takes traced ones.')
  try:
    if isinstance(alpha, bool | str) or np.ndim(alpha):
      raise TypeError
    value = float(alpha)
  except (TypeError, ValueError):
    raise ValueError(f'{what} must be one number of at least 1, got {alpha!r}.') from None
  if not (math.isfinite(value) and value >= 1):
    raise ValueError(f'{what} must be finite and at least 1, got {value}: below 1 the slope of Ψ at 0 is infinite.')
  return value


def _compute_dtype(x: jax.Array) -> Any:
  return jnp.promote_types(x.dtype, jnp.float32)


def _compute(x: jax.Array) -> jax.Array:
  return x.astype(_compute_dtype(x))


def _power(a: jax.Array, c: float) -> jax.Array:
  """a^c for a ≥ 0 and a static c. Powers in eighths are products and square roots, 2 to 4 times faster than a
  general power; else the fractional part is exp(f log a), twice as fast as one, with a relative error of at most
  |f log a| ulp. 0^c is 0 for c > 0 and inf for c < 0."""
  if c < 0:
    return 1 / _power(a, -c)
  whole, part = divmod(c, 1)
  factors = [jax.lax.integer_pow(a, int(whole))] if whole else []
  eighths, rest = divmod(part * 8, 1)
  if rest:
    factors.append(jnp.exp(part * jnp.log(a)))
  else:
    root = a
    for bit in (4, 2, 1):
      if int(eighths) & (2 * bit - 1):
        root = jnp.sqrt(root)
        if int(eighths) & bit:
          factors.append(root)
  return functools.reduce(jnp.multiply, factors) if factors else jnp.ones_like(a)


@functools.partial(jax.custom_jvp, nondiff_argnums=(1,))
def _psi(phi: jax.Array, alpha: float) -> jax.Array:
  x = _compute(phi)
  return (x * _power(jnp.abs(x), alpha - 1)).astype(phi.dtype)


@_psi.defjvp
def _psi_jvp(alpha: float, primals: Arrays, tangents: Arrays) -> tuple[jax.Array, jax.Array]:
  # A custom rule, since pruned weights sit at exactly 0. The two powers are one after common-subexpression elimination.
  (phi,), (dphi,) = primals, tangents
  return _psi(phi, alpha), _slope(phi, alpha) * dphi


@functools.partial(jax.custom_jvp, nondiff_argnums=(1,))
def _slope(phi: jax.Array, alpha: float) -> jax.Array:
  return (alpha * _power(jnp.abs(_compute(phi)), alpha - 1)).astype(phi.dtype)


@_slope.defjvp
def _slope_jvp(alpha: float, primals: Arrays, tangents: Arrays) -> tuple[jax.Array, jax.Array]:
  (phi,), (dphi,) = primals, tangents
  x = _compute(phi)
  curvature = alpha * (alpha - 1) * jnp.sign(x) * _power(_nonzero(x), alpha - 2)   # sign(0) = 0
  return _slope(phi, alpha), curvature.astype(phi.dtype) * dphi


@jax.custom_jvp
def _psi_traced(phi: jax.Array, alpha: jax.Array) -> jax.Array:
  x, a = _compute(phi), jnp.asarray(alpha, _compute_dtype(phi))
  return (x * jnp.power(jnp.abs(x), a - 1)).astype(phi.dtype)   # 0^0 = 1, so α = 1 is exact here too


@_psi_traced.defjvp
def _psi_traced_jvp(primals: Arrays, tangents: Arrays) -> tuple[jax.Array, jax.Array]:
  (phi, alpha), (dphi, dalpha) = primals, tangents
  value = _psi_traced(phi, alpha)
  by_alpha = _compute(value) * _log_abs(_compute(phi)) * jnp.asarray(dalpha, _compute_dtype(phi))   # Ψ(0) log 0 → 0
  return value, _slope_traced(phi, alpha) * dphi + by_alpha.astype(phi.dtype)


@jax.custom_jvp
def _slope_traced(phi: jax.Array, alpha: jax.Array) -> jax.Array:
  x, a = _compute(phi), jnp.asarray(alpha, _compute_dtype(phi))
  return (a * jnp.power(jnp.abs(x), a - 1)).astype(phi.dtype)


@_slope_traced.defjvp
def _slope_traced_jvp(primals: Arrays, tangents: Arrays) -> tuple[jax.Array, jax.Array]:
  (phi, alpha), (dphi, dalpha) = primals, tangents
  x, a = _compute(phi), jnp.asarray(alpha, _compute_dtype(phi))
  curvature = a * (a - 1) * jnp.sign(x) * jnp.power(_nonzero(x), a - 2)   # sign(0) = 0
  by_alpha = jnp.power(jnp.abs(x), a - 1) * (1 + a * _log_abs(x))
  tangent = curvature * jnp.asarray(dphi, x.dtype) + by_alpha * jnp.asarray(dalpha, x.dtype)
  return _slope_traced(phi, alpha), tangent.astype(phi.dtype)


def _nonzero(x: jax.Array) -> jax.Array:
  """|x|, but 1 at 0, where a sign or a zero beside it decides."""
  return jnp.where(x == 0, jnp.ones_like(x), jnp.abs(x))


def _log_abs(x: jax.Array) -> jax.Array:
  return jnp.log(_nonzero(x))


@jax.custom_jvp
def _psi_inverse(theta: jax.Array, alpha: jax.Array) -> jax.Array:
  # A general power, not `_power`: it is called once at initialisation, where a function is to be preserved.
  x = _compute(theta)
  return (jnp.sign(x) * jnp.power(jnp.abs(x), 1 / alpha)).astype(theta.dtype)


@functools.partial(_psi_inverse.defjvp, symbolic_zeros=True)
def _psi_inverse_jvp(primals: Arrays, tangents: Arrays) -> tuple[jax.Array, jax.Array]:
  (theta, alpha), (dtheta, dalpha) = primals, tangents
  x = _compute(theta)
  phi = jnp.sign(x) * jnp.power(jnp.abs(x), 1 / alpha)
  tangent = -phi * _log_abs(x) / alpha**2 * _filled(dalpha, x.dtype)
  if not isinstance(dtheta, SymbolicZero):   # the slope at θ = 0 is infinite, and a derivative by α alone is not
    tangent += jnp.power(jnp.abs(x), 1 / alpha - 1) / alpha * jnp.asarray(dtheta, x.dtype)
  return phi.astype(theta.dtype), tangent.astype(theta.dtype)


def _filled(tangent: Any, dtype: Any) -> jax.Array:
  return jnp.zeros((), dtype) if isinstance(tangent, SymbolicZero) else jnp.asarray(tangent, dtype)


# ---- on trees ---------------------------------------------------------------------------------------------------


class Reparam(NamedTuple):
  """A reparameterisation of a tree of parameters: what the optimiser stores (φ) and what the network sees (θ).

  Each function takes a tree (of arrays; `where` and `alphas` also take shapes) and returns one of the same structure.
  """
  weights: Callable[[Tree], Tree]    # φ → θ = Ψ(φ)
  inverse: Callable[[Tree], Tree]    # θ → φ = Ψ⁻¹(θ)
  slope: Callable[[Tree], Tree]      # φ → α|φ|^(α−1); ones where a leaf is left alone
  where: Callable[[Tree], Tree]      # tree of bool: which leaves are weights, and so may be masked
  alphas: Callable[[Tree], Tree]     # tree of float: α of each leaf, 1 for a leaf that is left alone


def is_weight(name: str, leaf: Any) -> bool:
  """True for weights of linear and convolutional Haiku layers: leaves called `w` with at least two axes.

  Biases, normalisation scales and offsets, embeddings and running averages have other names.

  Args:
    name: path of the leaf, as 'mlp/~/linear_0/w'.
    leaf: array or shape.
  """
  return name.rpartition('/')[2] == 'w' and len(leaf.shape) >= 2


def leaf_name(path: tuple[Any, ...]) -> str:
  """Name of a leaf from its key path: its keys joined by '/', as 'mlp/~/linear_0/w'."""
  return jax.tree_util.keystr(path, simple=True, separator='/')


def powerpropagation(alpha: Alpha, where: Where = is_weight) -> Reparam:
  """The reparameterisation θ = φ|φ|^(α−1) of the leaves that `where` chooses; other leaves are handed on as they are.

  Said once, and given to `reparameterise`, `target_propagation` and the rest. α is static: it decides what is compiled.

  Args:
    alpha: power, at least 1 and by the paper's advice at most 3; or a mapping from patterns of leaf names (as
      {'*/conv*': 2.0, '*': 1.5}; the first that fits counts, and every weight needs one); or a function of leaf name and
      leaf. α = 1 leaves a leaf bit-identical to no reparameterisation.
    where: predicate of leaf name and leaf, as `is_weight`, the default. To have embeddings too:
      `lambda name, leaf: is_weight(name, leaf) or name.endswith('/embeddings')`.
  Returns: the functions on trees. They raise ValueError when `where` chooses no leaf of a tree, or one that is not
    floating, and when a leaf's α is wrong.
  Raises: ValueError when α is below 1 or no finite number. Warns (UserWarning) when it is above 3.

  Example:
    >>> import jax.numpy as jnp
    >>> reparam = powerpropagation(2.0)
    >>> phi = {'linear': {'w': jnp.array([[0.5, -3.0]]), 'b': jnp.array([7.0, 7.0])}}
    >>> reparam.weights(phi)['linear']['w'].tolist()
    [[0.25, -9.0]]
  """
  rule = _alpha_rule(alpha)

  def chosen(tree: Tree) -> Tree:
    tree_where = jax.tree_util.tree_map_with_path(lambda path, x: bool(where(leaf_name(path), x)), tree)
    if not any(jax.tree.leaves(tree_where)):
      raise ValueError(f'the `where` of powerpropagation chose none of these leaves: {describe_leaves(tree)}.')
    return tree_where

  def alphas(tree: Tree) -> Tree:
    return jax.tree_util.tree_map_with_path(
        lambda path, x, on: rule(leaf_name(path), x) if on else 1.0, tree, chosen(tree))

  return make_reparam(chosen, alphas)


def make_reparam(where: Callable[[Tree], Tree], alphas: Callable[[Tree], Tree]) -> Reparam:
  """A `Reparam` from the trees of its weights (bool) and powers (float), given as functions of a tree."""

  def on_tree(f: Callable[[jax.Array, float], jax.Array]) -> Callable[[Tree], Tree]:
    def leaf(path: tuple[Any, ...], x: jax.Array, alpha: float) -> jax.Array:
      if not jnp.issubdtype(x.dtype, jnp.floating):
        raise ValueError(f'the `where` of powerpropagation chose {leaf_name(path)}, whose dtype {x.dtype} is not floating.')
      return f(x, alpha)
    return lambda tree: jax.tree_util.tree_map_with_path(
        lambda path, x, on, alpha: leaf(path, x, alpha) if on else x, tree, where(tree), alphas(tree))

  slope = on_tree(psi_slope)
  return Reparam(
      weights=on_tree(psi), inverse=on_tree(psi_inverse), where=where, alphas=alphas,
      slope=lambda phi: jax.tree.map(lambda on, x, s: s if on else jnp.ones_like(x), where(phi), phi, slope(phi)))


def keep_zeros(reparam: Reparam, theta: Tree) -> Reparam:
  """`reparam`, but with α = 1 for every weight leaf that is all zero in `theta`, the weights at initialisation.

  For α > 1, 0 is a critical point: a leaf of zeros never leaves it, and before a classifier of zeros (hk.nets.ResNet50)
  nothing else moves either. `reparameterise` does the same by itself; call this for a training loop that uses
  `target_propagation` on such a network. Names are remembered, not values: the same network gives the same answer later.

  Args:
    theta: parameters as the network's own `init` gave them; concrete arrays.
  Warns: UserWarning naming the leaves, if there are any.
  Raises: ValueError when `theta` is traced.
  """
  leaves = jax.tree_util.tree_leaves_with_path(theta)
  if any(isinstance(x, jax.core.Tracer) for _, x in leaves):
    raise ValueError('keep_zeros looks at values: call it outside jit, with the parameters that init gave.')
  return with_zeros(reparam, frozenset(leaf_name(path) for path, x in leaves if not np.any(np.asarray(x))), theta)


def with_zeros(reparam: Reparam, zeros: frozenset[str], tree: Tree) -> Reparam:
  """`reparam` with α = 1 for the leaves named in `zeros`; warns of those that it would have reparameterised in `tree`."""
  named = jax.tree_util.tree_leaves_with_path(reparam.alphas(tree))
  stuck = sorted(name for path, alpha in named if alpha != 1 and (name := leaf_name(path)) in zeros)
  if not stuck:
    return reparam
  warnings.warn(f'all zero at initialisation, so kept at alpha = 1 (0 is a critical point for alpha > 1): '
                f'{", ".join(stuck)}.', UserWarning, stacklevel=3)
  skip = frozenset(stuck)
  return make_reparam(reparam.where, lambda t: jax.tree_util.tree_map_with_path(
      lambda path, alpha: 1.0 if leaf_name(path) in skip else alpha, reparam.alphas(t)))


def change_alpha(phi: Tree, old: Reparam, new: Reparam) -> Tree:
  """φ of `new` for the same weights as φ of `old`: Ψ_new⁻¹(Ψ_old(φ)). The network's function stays as it is.

  State of `target_propagation` lives at θ and stays valid; that of `backpropagation` lives at φ and should be made anew.
  """
  return new.inverse(old.weights(phi))


def describe_leaves(tree: Tree, most: int = 8) -> str:
  """The leaves of a tree for an error message: 'linear/w float32[784, 300], ...', at most `most` of them."""
  leaves = jax.tree_util.tree_leaves_with_path(tree)
  names = [f'{leaf_name(path)} {jnp.result_type(x)}{list(jnp.shape(x))}' for path, x in leaves[:most]]
  more = f' and {len(leaves) - most} more' if len(leaves) > most else ''
  return ', '.join(names) + more if names else 'the tree is empty'


def _alpha_rule(alpha: Alpha) -> Callable[[str, Any], float]:
  """(leaf name, leaf) → checked α; numbers are checked now, what a function returns when it is called."""
  if callable(alpha):
    return lambda name, x: _warn_above(check_alpha(alpha(name, x), f'alpha of {name}'))
  if isinstance(alpha, Mapping):
    table = {pattern: _warn_above(check_alpha(a, f'alpha of {pattern!r}')) for pattern, a in alpha.items()}
    def look_up(name: str, x: Any) -> float:
      for pattern, value in table.items():
        if fnmatch.fnmatchcase(name, pattern):
          return value
      raise ValueError(f'alpha has no pattern for the weight {name}; it has {list(table)}: add it, or "*" for the rest.')
    return look_up
  value = _warn_above(check_alpha(alpha))
  return lambda name, x: value


def _warn_above(alpha: float) -> float:
  if alpha > LARGEST_SUGGESTED_ALPHA:
    warnings.warn(f'alpha = {alpha:g} is above the range (1, 3] that the paper suggests for numerical stability.',
                  UserWarning, stacklevel=4)
  return alpha

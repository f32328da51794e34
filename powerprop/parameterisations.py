"""Sparsity methods in which the network has parameters of its own: STR, L0 regularisation, v⊙v − u⊙u. Any optimiser trains them.

The leaves that `where` chooses are replaced by leaves of the same dict; `fold` makes of them the weights that the network sees.
STR and L0 keep the magnitudes under the old name `w`, so that they go together with Powerpropagation:

    params = method.expand(net.init(key, x))                       # once
    phi, state = reparam.inverse(params), tx.init(reparam.inverse(params))
    loss = lambda params: loss_fn(method.fold(params, key), batch) + strength * method.penalty(params)
    grads = jax.grad(loss)(reparam.weights(phi))                   # and the rest as ever: tx.update(grads, state, phi)

Neither changes what α > 1 does to signs: small steps take no weight through 0. v⊙v − u⊙u can.
"""
import functools
import inspect
import math
import warnings
import zlib
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import DictKey, tree_leaves_with_path, tree_map_with_path

from powerprop.modules import Net, zero_params
from powerprop.reparam import Tree, Where, describe_leaves, is_weight, leaf_name

Parts = dict[str, jax.Array]      # suffix of the name → parameter: what one weight leaf is replaced by
Path = tuple[Any, ...]


class Parameterisation(NamedTuple):
  """Parameters that a network has in place of its weights. All three run under jit, vmap and grad, on any tree of dicts.

  `expand` also takes `zeros`, the names of leaves that are all zero, for a method under which those would never move (STR
  alone); without it the values are looked at, where they are known.
  """
  expand: Callable[..., Tree]      # θ → parameters; see each method for how well the function is preserved
  fold: Callable[..., Tree]        # (parameters, key=None) → θ, structure and dtypes as expand got them; key: with L0's noise
  penalty: Callable[[Tree], jax.Array]   # parameters → float32 scalar, to be weighted and added to the loss; 0 but for L0


# ---- the methods ------------------------------------------------------------------------------------------------


def soft_threshold(s0: float = -10.0, where: Where = is_weight) -> Parameterisation:
  """STR, a learned threshold for each leaf: θ = sign(w) · relu(|w| − g(s)), g the logistic function.

  Slopes: ∂θ/∂w = 1 and ∂θ/∂s = −sign(w) g(s)(1 − g(s)) where |w| > g(s), else both are 0: a weight under the threshold moves by
  decay and momentum only, until the threshold falls below it. Sparsity comes from decay of s towards 0, that is of g(s)
  towards ½, so decay s as well as w: any optax decay without a mask does. Far below 0 the slope of g is about g itself, and
  decay alone moves s. The authors' configuration of ResNet-50 at 90.23 % has s0 = −3200 and one decay, 2.25e-5;
  −10 suits short runs with more decay.

  A weight leaf `w` gets a sibling `w_threshold`: s, a scalar, in float32 at least (bfloat16 has steps of 1/16 at −10). `expand`
  gives w = θ + sign(θ) g(s0), so that the function is preserved to rounding. A leaf that is all zero would never move: it is
  left without a threshold and named in a warning, where its values are known or `parameterise` reads them off.
  Costs: one scalar a leaf and one elementwise pass. `penalty` is 0.

  Differs from the paper: it starts at w = θ, so that weights below g(s0) are pruned from the start; at its s0 that is the same.
  Thresholds by channel or for the whole network are left out.

  Args:
    s0: s at initialisation, finite.
    where: which leaves get a threshold.
  Raises: ValueError for a wrong `s0`, and as `expand` and `fold` of every method do: when no leaf of the tree is concerned, and
    in `expand` when a chosen one is not floating, is no entry of a dict, or has a sibling with one of the new names.
  Source: Kusupati et al., "Soft threshold weight reparameterization for learnable sparsity", ICML 2020 (arXiv:2002.03231).
  """
  if not math.isfinite(s0):
    raise ValueError(f's0 of soft_threshold must be finite, got {s0!r}.')

  def split(theta: jax.Array) -> Parts:
    s = jnp.full((), s0, _wide(theta).dtype)
    return {'': (_wide(theta) + jnp.sign(_wide(theta)) * jax.nn.sigmoid(s)).astype(theta.dtype), '_threshold': s}

  def join(parts: Parts, key: jax.Array | None) -> jax.Array:
    w = _wide(parts[''])
    shrunk = jnp.sign(w) * jax.nn.relu(jnp.abs(w) - jax.nn.sigmoid(parts['_threshold'].astype(w.dtype)))
    return shrunk.astype(parts[''].dtype)

  return _parameterisation('soft_threshold', ('', '_threshold'), where, split, join, stuck_at_zero=True)


def hard_concrete(drop_rate: float = 0.1, beta: float = 2 / 3, gamma: float = -0.1, zeta: float = 1.1,
                  where: Where = is_weight) -> Parameterisation:
  """L0 regularisation: θ = w · z with a random gate for each weight, and the expected number of open gates as a penalty.

    training    z = clip(s(ζ − γ) + γ, 0, 1),   s = logistic((log u − log(1 − u) + log α)/β),   u uniform on (0, 1)
    evaluation  ẑ = clip(logistic(log α)(ζ − γ) + γ, 0, 1)
    penalty     Σ P(z ≠ 0) = Σ logistic(log α − β log(−γ/ζ))

  A weight leaf `w` gets a sibling `w_gate`: log α, in w's shape and float32 at least. At initialisation it is
  log(1 − drop_rate) − log(drop_rate) throughout, and `expand` gives w = θ/ẑ, so that the function at evaluation is preserved to
  rounding; the one of training is noisy, with a mean of θ that is 0.90, 1.00 and 1.24 times the weight at drop rates of 0.1,
  0.5 and 0.7. A weight with ẑ = 0 is pruned in evaluation, and training still opens its gate at times. `fold` with a key
  draws one gate a weight for the whole batch; under vmap each copy wants its own key.
  Costs: a second array of parameters (with its optimiser state), and a random number for each weight and training step.

  Differs from the paper: its networks have a gate for each input unit or feature map; here any weight may go. The authors'
  code starts log α with noise of standard deviation 0.01, and w at θ.

  Args:
    drop_rate: 1 − logistic(log α) at initialisation, above 0 and below ζ/(ζ − γ), from where on all ẑ would be 0.
    beta: temperature, above 0.
    gamma, zeta: ends of the stretched interval, below 0 and above 1.
    where: which leaves get gates.
  Raises: ValueError for a wrong setting; else as `soft_threshold` does.
  Source: Louizos et al., "Learning sparse neural networks through L0 regularization", ICLR 2018 (arXiv:1712.01312).
  """
  if not (0 < beta < math.inf and -math.inf < gamma < 0 and 1 < zeta < math.inf):
    raise ValueError(f'hard_concrete takes beta > 0, gamma < 0 and zeta > 1, all finite; got {beta!r}, {gamma!r} and {zeta!r}.')
  if not 0 < drop_rate < zeta / (zeta - gamma):
    raise ValueError(f'drop_rate of hard_concrete must be above 0 and below {zeta / (zeta - gamma):.4g}, got {drop_rate!r}.')

  def stretched(s: jax.Array) -> jax.Array:
    return jnp.clip(s * (zeta - gamma) + gamma, 0, 1)

  def split(theta: jax.Array) -> Parts:
    log_alpha = jnp.full_like(_wide(theta), math.log1p(-drop_rate) - math.log(drop_rate))
    return {'': (_wide(theta) / stretched(jax.nn.sigmoid(log_alpha))).astype(theta.dtype), '_gate': log_alpha}

  def join(parts: Parts, key: jax.Array | None) -> jax.Array:
    log_alpha = _wide(parts['_gate'])
    if key is None:
      z = stretched(jax.nn.sigmoid(log_alpha))
    else:   # log u − log(1 − u) is a logistic variable
      z = stretched(jax.nn.sigmoid((jax.random.logistic(key, log_alpha.shape, log_alpha.dtype) + log_alpha) / beta))
    return (_wide(parts['']) * z).astype(parts[''].dtype)

  def penalty(parts: Parts) -> jax.Array:
    return jnp.sum(jax.nn.sigmoid(_wide(parts['_gate']) - beta * math.log(-gamma / zeta)))

  return _parameterisation('hard_concrete', ('', '_gate'), where, split, join, penalty)


def square_difference(floor: float = 0.01, where: Where = is_weight) -> Parameterisation:
  """θ = v⊙v − u⊙u: two parameters for each weight, and gradient descent leans towards sparse θ by itself.

  Slopes: ∂θ/∂v = 2v, ∂θ/∂u = −2u. Under gradient flow v·u never changes, so θ moves by −4√(θ² + 4(vu)²) ∂L/∂θ: Powerpropagation
  with α = 2 moves by −4|θ| ∂L/∂θ, the limit vu → 0. With vu > 0 a weight can pass through 0, where the slope is 8vu.

  A weight leaf `w` is replaced by `w_v` and `w_u`, in its shape and dtype. `expand` solves v² − u² = θ and vu = floor²: the
  larger of the two is √((|θ| + √(θ² + 4 floor⁴))/2), so that a weight 0 has v = u = floor, and the function is preserved to
  a few units in the last place of |θ| + 2 floor². The smaller the floor, the slower weights near 0 move (the slope there is
  8 floor²), and the sparser θ becomes.

  No weight becomes exactly 0, so prune by magnitude afterwards, to an exact count: `masks.layerwise` of fold(parameters). It
  takes the place of Powerpropagation, which finds no weight among the new leaves.
  Costs: a second array of parameters with its optimiser state, and one elementwise pass. `penalty` is 0.

  Differs from its source: that starts at θ = 0, v = u a small constant, for linear regression; a deep network starts at random
  weights, so the constant is kept as what v·u is, and θ is the network's own.

  Args:
    floor: √(vu) at initialisation, above 0 and finite.
    where: which leaves are split in two.
  Raises: ValueError for a wrong `floor`; else as `soft_threshold` does.
  Source: w = v⊙v − u⊙u is reference [19] of Schwarz et al. 2021, as its section 2 says; analysed, with this initialisation, in
    Vaškevičius et al., "Implicit regularization for optimal sparse recovery", NeurIPS 2019 (arXiv:1909.05122).
  """
  if not 0 < floor < math.inf:
    raise ValueError(f'floor of square_difference must be above 0 and finite, got {floor!r}.')

  def split(theta: jax.Array) -> Parts:
    x = _wide(theta)
    # At least `floor` in exact arithmetic; said again for a floor whose fourth power is 0 in floats.
    large = jnp.maximum(jnp.sqrt((jnp.abs(x) + jnp.hypot(x, 2 * floor**2)) / 2), floor)
    small = floor * (floor / large)
    v, u = jnp.where(x >= 0, large, small), jnp.where(x >= 0, small, large)
    return {'_v': v.astype(theta.dtype), '_u': u.astype(theta.dtype)}

  def join(parts: Parts, key: jax.Array | None) -> jax.Array:
    v, u = _wide(parts['_v']), _wide(parts['_u'])
    return (v * v - u * u).astype(parts['_v'].dtype)

  return _parameterisation('square_difference', ('_v', '_u'), where, split, join)


# ---- using them -------------------------------------------------------------------------------------------------


def parameterise(net: Net, parameterisation: Parameterisation, stochastic: bool = False) -> Net:
  """The network whose parameters are those of `parameterisation`: `init` gives them expanded, `apply` takes them.

  Args:
    net: hk.transform or hk.transform_with_state of anything, hk.without_apply_rng included.
    parameterisation: from `soft_threshold`, `hard_concrete` or `square_difference`.
    stochastic: `apply` draws gates from a part of its `rng`, for training with `hard_concrete`. By default it evaluates.
  Returns: a network of the same type and signatures.
  Raises: ValueError as the parameterisation does; for a stochastic network whose `apply` has no rng, or gets none.

  Example:
    >>> import haiku as hk, jax, jax.numpy as jnp
    >>> from powerprop.parameterisations import parameterise, soft_threshold
    >>> net = hk.without_apply_rng(hk.transform(lambda x: hk.Linear(10)(x)))
    >>> net = parameterise(net, soft_threshold())
    >>> sorted(net.init(jax.random.key(0), jnp.zeros([1, 784]))['linear'])
    ['b', 'w', 'w_threshold']
  """
  stateful = isinstance(net, hk.TransformedWithState)
  signature = inspect.signature(net.apply)
  if stochastic and 'rng' not in signature.parameters:
    raise ValueError('a stochastic network draws from the rng of apply: give it without hk.without_apply_rng.')

  @functools.wraps(net.init)   # haiku's own combinators look at what it hangs on these functions
  def init(rng: Any, *args: Any, **kwargs: Any) -> Any:
    out: Any = net.init(rng, *args, **kwargs)
    params = parameterisation.expand(out[0] if stateful else out, zero_params(net.init, stateful, args, kwargs))
    return (params, out[1]) if stateful else params

  @functools.wraps(net.apply)
  def apply(params: Tree, *rest: Any, **kwargs: Any) -> Any:
    if not stochastic:
      return net.apply(parameterisation.fold(params), *rest, **kwargs)
    call = signature.bind(params, *rest, **kwargs)
    if call.arguments['rng'] is None:
      raise ValueError('a stochastic network draws from the rng of apply, which got None.')
    keys = hk.PRNGSequence(call.arguments['rng'])
    call.arguments.update(params=parameterisation.fold(params, next(keys)), rng=next(keys))
    return net.apply(*call.args, **call.kwargs)

  return type(net)(init, apply)


def nonzero(theta: Tree, where: Where = is_weight) -> Tree:
  """Masks of the weights that are not 0, for the functions of `masks`: `counts` says how many there are, `density` their share.

  Args:
    theta: weights, as `fold` gives them.
  Returns: tree of bool like `theta`, None for leaves that `where` does not choose.
  """
  return tree_map_with_path(lambda path, x: x != 0 if where(leaf_name(path), x) else None, theta)


# ---- what they share --------------------------------------------------------------------------------------------


def _wide(x: jax.Array) -> jax.Array:
  return x.astype(jnp.promote_types(x.dtype, jnp.float32))


def _parameterisation(method: str, suffixes: tuple[str, str], where: Where, split: Callable[[jax.Array], Parts],
                      join: Callable[[Parts, jax.Array | None], jax.Array],
                      cost: Callable[[Parts], jax.Array] | None = None, stuck_at_zero: bool = False) -> Parameterisation:
  """On trees: what `split` and `join` do to one weight leaf, whose parts are called by its name and the suffixes."""

  def whole(node: Mapping[str, Any]) -> list[str]:   # names of the leaves whose parts are all here
    names = [k.removesuffix(suffixes[1]) for k in node if isinstance(k, str) and k.endswith(suffixes[1])]
    return [name for name in names if name + suffixes[0] in node]

  def expand(theta: Tree, zeros: frozenset[str] | None = None) -> Tree:
    chosen = _chosen(method, where, theta)
    if stuck_at_zero:
      chosen = _without_zeros(method, chosen, _all_zero(chosen) if zeros is None else zeros)

    def rule(at: Path, node: Mapping[str, Any]) -> dict[str, Any]:
      names = [k for k in node if leaf_name((*at, DictKey(k))) in chosen]
      taken = {k + s for k in names for s in suffixes if s and k + s in node}
      taken.update(k + s for k in whole(node) for s in suffixes)
      if taken:
        raise ValueError(f'{leaf_name(at) or "the tree"} has leaves already by names that {method} gives: '
                         f'{", ".join(sorted(taken))}. Was it expanded before?')
      new: dict[str, Any] = {}
      for k, x in node.items():
        new.update({k + s: part for s, part in split(x).items()} if k in names else {k: x})
      return new
    return _on_dicts(rule, theta)

  def parts(params: Tree) -> list[tuple[str, Parts]]:
    found: list[tuple[str, Parts]] = []

    def rule(at: Path, node: Mapping[str, Any]) -> Mapping[str, Any]:
      found.extend((leaf_name((*at, DictKey(k))), {s: node[k + s] for s in suffixes}) for k in whole(node))
      return node
    _on_dicts(rule, params)
    if not found:
      raise ValueError(f'no leaf of {method} among these, which expand would give: {describe_leaves(params)}.')
    return found

  def fold(params: Tree, key: jax.Array | None = None) -> Tree:
    # Keys by name: a layer more or less leaves the noise of the others as it is.
    theta = {name: join(p, None if key is None else jax.random.fold_in(key, zlib.crc32(name.encode())))
             for name, p in parts(params)}

    def rule(at: Path, node: Mapping[str, Any]) -> dict[str, Any]:
      names = whole(node)
      first, gone = {k + suffixes[0]: k for k in names}, {k + suffixes[1] for k in names}
      return {first.get(k, k): theta[leaf_name((*at, DictKey(first[k])))] if k in first else x
              for k, x in node.items() if k not in gone}
    return _on_dicts(rule, params)

  def penalty(params: Tree) -> jax.Array:
    costs = [cost(p) for _, p in parts(params)] if cost is not None else []
    return sum((c.astype(jnp.float32) for c in costs), start=jnp.float32(0))

  return Parameterisation(expand, fold, penalty)


def _on_dicts(rule: Callable[[Path, Mapping[str, Any]], Mapping[str, Any]], tree: Tree, at: Path = ()) -> Tree:
  """The tree with every dict replaced by what `rule` makes of its path and of it, from the innermost out."""
  def node(path: Path, x: Any) -> Any:
    if not isinstance(x, Mapping):
      return x
    here = (*at, *path)
    # The type is kept, as an OrderedDict is another structure than a dict.
    inside = {k: _on_dicts(rule, child, (*here, DictKey(k))) for k, child in x.items()}
    return type(x)(rule(here, inside))   # type: ignore[call-arg]
  return tree_map_with_path(node, tree, is_leaf=lambda x: isinstance(x, Mapping))


def _chosen(method: str, where: Where, theta: Tree) -> dict[str, Any]:
  """Name → leaf of those that `where` chooses; raises ValueError unless there are some, floating ones in dicts."""
  leaves = {leaf_name(path): (path, x) for path, x in tree_leaves_with_path(theta) if where(leaf_name(path), x)}
  if not leaves:
    raise ValueError(f'the `where` of {method} chose none of these leaves: {describe_leaves(theta)}.')
  for name, (path, x) in leaves.items():
    if not (path and isinstance(path[-1], DictKey) and isinstance(path[-1].key, str)):
      raise ValueError(f'the `where` of {method} chose {name or "the whole tree"}, which is no named entry of a dict.')
    if not jnp.issubdtype(x.dtype, jnp.floating):
      raise ValueError(f'the `where` of {method} chose {name}, whose dtype {x.dtype} is not floating.')
  return {name: x for name, (_, x) in leaves.items()}


def _all_zero(leaves: dict[str, Any]) -> frozenset[str]:
  return frozenset(name for name, x in leaves.items() if not isinstance(x, jax.core.Tracer) and not np.any(np.asarray(x)))


def _without_zeros(method: str, leaves: dict[str, Any], zeros: frozenset[str]) -> dict[str, Any]:
  if stuck := sorted(zeros & leaves.keys()):
    warnings.warn(f'all zero at initialisation, so left as they are (under {method} they would never move): {", ".join(stuck)}.',
                  UserWarning, stacklevel=3)
  return {name: x for name, x in leaves.items() if name not in zeros}

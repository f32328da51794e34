"""Operations of a network, dense and sparse, in one forward pass and over a whole training run.

A multiplication and an addition are two operations. Matrix products and convolutions are counted, from shapes alone and as if
every zero weight were skipped. What costs a few operations an entry (normalisation, activations, pooling, biases, the optimiser,
finding the masks) is not. Positions at which a kernel hangs over the edge count as if it did not.

A layer l with c_l dense operations forward, forward density d_l and backward density b_l costs in one step of training

  c_l d_l  (forward)  +  c_l d_l  (gradient at its input, through the same weights)  +  c_l b_l  (gradient at its weights)

where d is the share of weights that the network sees, and b of those whose gradient is needed. The first layer is charged for
the gradient at its input too, which nobody needs, so that a dense step is three times a forward pass f_D and a sparse one 3 f_S.
  method                                   backward density b      steps with the gradient at all weights
  static, SET, DSR, gradual, AC/DC         d                       none
  SNIP, GraSP, SynFlow                     d                       none; what scores before the first step is left out
  Top-KAST                                 that of its larger set  none
  straight-through                         1                       all, by its b
  RigL, GraNet                             d                       one every ΔT steps, until masks stay
  SNFS                                     d                       all
  STR, L0, v⊙v − u⊙u                       1, and d is 1           dense throughout: they are sparse at the end
which gives 2 f_S + f_D for a step of SNFS and (3 f_S ΔT + 2 f_S + f_D) / (ΔT + 1) for RigL's, if an update of its masks is a step
of its own as in its paper; here one step in ΔT is charged, by `phases`, or any share of them, by `Phase`.

The ratios that RigL's authors print for training ResNet-50 with ΔT = 100 come out: 0.23 and 0.13 at 80 and 90 % when all layers
but the first convolution are uniformly sparse, the classifier too; 0.42 and 0.24 by ERK over all layers. They print the same four
for one forward pass, where 0.22 and 0.41 come out at 80 %: they add one operation for every output of a layer, and take the first
convolution to have 115² outputs in place of 112². With these two, their table agrees from 80 to 96.5 % (tests/test_flops.py).

Source: Evci et al. 2020 (arXiv:1911.11134), the appendix on operations; Jayakumar et al. 2020 (arXiv:2106.03517) for Top-KAST.
"""
import itertools
import math
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.extend.core import Literal

from powerprop.reparam import Tree, leaf_name

Densities = Tree   # leaf name → density in [0, 1], flat or nested like the parameters; a leaf that is left out, or None, is dense

# ---- one forward pass ------------------------------------------------------------------------------------------------


class Costs(NamedTuple):
  """Dense operations of one forward pass, of the whole batch that was given: exact integers."""
  leaves: dict[str, int]   # leaf name → operations with it; every leaf of the parameters has an entry, a bias 0
  other: int               # operations with no weight, or with several: no density changes them
  sizes: dict[str, int]    # leaf name → entries


def count(apply: Callable[..., Any], params: Tree, *args: Any, **kwargs: Any) -> Costs:
  """Operations of `apply(params, *args, **kwargs)`, found in its jaxpr: nothing is computed.

    product [B, M, K] × [B, K, N]:    2 B M K N
    convolution:                      2 · outputs · kernel positions · input channels / groups, zeros that pad included;
                                      transposed: 2 · inputs · kernel positions · output channels / groups

  An operation belongs to the leaf of `params` that one operand is made of: cast, reshaped, sliced, masked, normalised,
  reparameterised. A leaf that is used twice has both. Of several leaves in one operand it is the largest, and the one called `w`
  among equals (a soft threshold, a gate). Operations with two activations, as in attention, or with two leaves are `other`; so
  are those with weights that are themselves a product, or that several leaves were concatenated to.

  It looks into jit, remat, custom derivatives and scan (times its length), and takes the costliest branch of cond.

  Args:
    apply: `apply` of any Haiku transform, or another function of parameters.
    params: tree of arrays or shapes (jax.ShapeDtypeStruct).
    args, kwargs: what else `apply` takes; arrays may be shapes. What is neither is handed on as it is. Keys, scalars and arrays
      of bool leave the weights that they act on weights; another array, as a mask of floats, makes activations of them.
  Raises: ValueError for products inside a while loop, whose number of turns is not in its shapes, and inside what has no plain
    inner function, as shard_map or a kernel.

  Example:
    >>> import haiku as hk, jax, jax.numpy as jnp
    >>> net = hk.without_apply_rng(hk.transform(lambda x: hk.nets.MLP([300, 100, 10])(x)))
    >>> images = jax.ShapeDtypeStruct([1, 784], jnp.float32)
    >>> costs = count(net.apply, jax.eval_shape(net.init, jax.random.key(0), images), images)
    >>> costs.leaves['mlp/~/linear_0/w'], costs.other, forward(costs)
    (470400, 0, 532400)
    >>> sparse = {name: 0.1 for name in costs.leaves if name.endswith('/w')}
    >>> round(ratio(costs, [Phase(steps=1000, forward=sparse, dense_share=0.01)]), 4)   # RigL: a dense gradient every 100 steps
    0.103
  """
  values, structure = jax.tree.flatten((args, kwargs))
  arrays = {i: x for i, x in enumerate(values) if hasattr(x, 'shape') and hasattr(x, 'dtype')}

  def from_arrays(params: Tree, arrays: dict[int, Any]) -> Any:
    a, k = jax.tree.unflatten(structure, [arrays.get(i, x) for i, x in enumerate(values)])
    return apply(params, *a, **k)

  jaxpr = jax.make_jaxpr(from_arrays)(params, arrays).jaxpr
  sizes = {leaf_name(path): math.prod(x.shape) for path, x in jax.tree_util.tree_leaves_with_path(params)}
  avals: list[Any] = [v.aval for v in jaxpr.invars[len(sizes):]]
  inputs = [_CONSTANT if _is_no_activation(aval) or aval.dtype == bool else None for aval in avals]
  tally, _ = _walk(jaxpr, [*(frozenset([name]) for name in sizes), *inputs], sizes)
  return Costs({name: tally[name] for name in sizes}, tally[None], sizes)


def densities(costs: Costs, counts: Tree) -> dict[str, float]:
  """Leaf name → density, from the number of weights that are kept: by `distributions.make_counts`, or `masks.counts` of a mask.

  Args:
    counts: tree of integers like the parameters, or a flat dict by leaf name; None for a leaf that is not pruned.
  Raises: ValueError for an unknown leaf, for a number that the leaf has not, and for one number of all leaves together.
  """
  if jax.tree_util.treedef_is_leaf(jax.tree.structure(counts)):
    raise ValueError(f'counts is a number for each leaf; got {counts!r}. Under a common threshold count the masks.')
  named = _by_name(costs, counts, 'counts')
  for name, kept in named.items():
    if int(kept) != kept or not 0 <= kept <= costs.sizes[name]:
      raise ValueError(f'counts has {kept} for {name}, which has {costs.sizes[name]} entries.')
  return {name: int(kept) / costs.sizes[name] for name, kept in named.items()}


def forward(costs: Costs, at: Densities | None = None) -> float:
  """Operations of one forward pass at the densities `at`: Σ c_l d_l + other. Dense, and an exact integer, without them.

  Raises: ValueError for an unknown leaf and for a density outside [0, 1].
  """
  return _weighted(costs, at) + costs.other


# ---- training --------------------------------------------------------------------------------------------------------


class Phase(NamedTuple):
  """Steps of training that cost the same."""
  steps: int
  forward: Densities                  # share of weights that the network sees
  backward: Densities | None = None   # share whose gradient is needed; None: as forward
  dense_share: float = 0.0            # share of the steps that need the gradient at all weights


def training_step(costs: Costs, forward_densities: Densities | None = None, backward_densities: Densities | None = None) -> float:
  """Operations of one step of training: 2 Σ c_l d_l + Σ c_l b_l + 3 other.

  Args:
    costs: of one forward pass of the batch.
    forward_densities: d; dense without them.
    backward_densities: b; without them those of the forward pass. A leaf that they leave out is dense, so {} is dense throughout.
  Raises: ValueError as `forward` does.
  """
  if backward_densities is None:
    backward_densities = forward_densities
  return 2 * _weighted(costs, forward_densities) + _weighted(costs, backward_densities) + 3 * costs.other


def phases(steps: int, forward: Mapping[int, Densities], backward: Mapping[int, Densities] | None = None,
           dense_steps: Collection[int] = ()) -> list[Phase]:
  """Phases of a run from the densities measured at its updates of masks.

  Args:
    steps: of the run.
    forward: n → densities once n steps are done; what is given for 0 is how training begins. So of a gradual schedule,
      {0: {}, 1000: {'linear/w': 0.7}, 2000: {'linear/w': 0.5}}.
    backward: the same for the backward densities; None: as forward. {0: {}} is a dense backward pass throughout.
    dense_steps: the steps, from 1 on, that need the gradient at all weights: range(100, 25000, 100) for RigL, range(1, steps + 1)
      for SNFS.
  Raises: ValueError when nothing is given for 0, or something outside the run.
  """
  for what, table in (('forward', forward), ('backward', {0: None} if backward is None else backward)):
    if 0 not in table or not 0 <= min(table) <= max(table) <= steps:
      raise ValueError(f'{what} needs densities for 0 and none outside 0 to {steps}; it has them for {sorted(table)}.')
  if dense_steps and not 1 <= min(dense_steps) <= max(dense_steps) <= steps:
    raise ValueError(f'dense_steps lie in 1 to {steps}; got {min(dense_steps)} to {max(dense_steps)}.')
  edges = sorted({*forward, *(backward or ()), steps})
  found = []
  for start, end in itertools.pairwise(edges):
    now = forward[max(n for n in forward if n <= start)]
    moved = None if backward is None else backward[max(n for n in backward if n <= start)]
    dense = sum(start < n <= end for n in set(dense_steps))
    found.append(Phase(end - start, now, moved, dense / (end - start)))
  return found


def training(costs: Costs, run: Sequence[Phase]) -> float:
  """Operations of a whole run: Σ over its phases of steps · ((1 − share) · step(d, b) + share · step(d, 1)).

  Raises: ValueError as `forward` does, and for negative steps or a share outside [0, 1].
  """
  total = 0.0
  for phase in run:
    if phase.steps < 0 or not 0 <= phase.dense_share <= 1:
      raise ValueError(f'a phase has steps of at least 0 and a dense_share in [0, 1]; got {phase.steps} and {phase.dense_share}.')
    sparse = training_step(costs, phase.forward, phase.backward)
    dense = training_step(costs, phase.forward, {})
    total += phase.steps * (sparse + phase.dense_share * (dense - sparse))
  return total


def ratio(costs: Costs, run: Sequence[Phase], steps: int | None = None) -> float:
  """Operations of a run over those of dense training for `steps` steps; without them, for as many as the run has.

  Raises: ValueError as `training` does, and when there is nothing to compare with.
  """
  steps = sum(phase.steps for phase in run) if steps is None else steps
  dense = steps * training_step(costs)
  if not dense > 0:
    raise ValueError(f'dense training of {steps} steps of {training_step(costs)} operations is nothing to compare with.')
  return training(costs, run) / dense


def _weighted(costs: Costs, at: Densities | None) -> float:
  named = _by_name(costs, {} if at is None else at, 'densities')
  for name, density in named.items():
    if not 0 <= density <= 1:
      raise ValueError(f'a density lies in [0, 1]; got {density} for {name}. Numbers of weights go through densities() first.')
  return sum(operations * named.get(name, 1) for name, operations in costs.leaves.items())


def _by_name(costs: Costs, tree: Tree, what: str) -> dict[str, Any]:
  named = {leaf_name(path): x.item() if hasattr(x, 'item') else x for path, x in jax.tree_util.tree_leaves_with_path(tree)}
  if strange := sorted(named.keys() - costs.leaves.keys()):
    raise ValueError(f'{what} has {strange[0]!r}, which the parameters lack; they have {sorted(costs.leaves)[:8]}.')
  return named


# ---- the walk through a jaxpr ----------------------------------------------------------------------------------------

Origin = frozenset[str] | None    # the leaves that a value is made of, and of no activation; None: an activation
Tally = Counter[str | None]       # leaf, or None for `other` → operations
_CONSTANT: frozenset[str] = frozenset()


def _walk(jaxpr: Any, given: Sequence[Origin], sizes: dict[str, int]) -> tuple[Tally, list[Origin]]:
  """Operations in a jaxpr, and what its outputs are made of when its inputs are made of `given`."""
  body = getattr(jaxpr, 'jaxpr', jaxpr)
  origins: dict[Any, Origin] = dict(zip(body.invars, given, strict=True))
  tally: Tally = Counter()

  def look_up(v: Any) -> Origin:
    return _CONSTANT if isinstance(v, Literal) else origins.get(v, _CONSTANT)

  for eqn in body.eqns:
    found, results = _equation(eqn, [look_up(v) for v in eqn.invars], sizes)
    tally.update(found)
    for v, result in zip(eqn.outvars, results, strict=True):
      origins[v] = _CONSTANT if result is None and _is_no_activation(v.aval) else result
  return tally, [look_up(v) for v in body.outvars]


def _equation(eqn: Any, operands: list[Origin], sizes: dict[str, int]) -> tuple[Tally, list[Origin]]:
  name = eqn.primitive.name
  if name in _PRODUCTS:
    owners = _owners(operands, sizes)
    return Counter({owners.pop() if len(owners) == 1 else None: _PRODUCTS[name](eqn)}), [None]
  if name in _LOOKS_INTO:
    return _LOOKS_INTO[name](eqn, operands, sizes)
  inner = _inner(eqn)
  for jaxpr in inner:   # jit, remat, custom derivatives: under other names in other versions of JAX
    body = getattr(jaxpr, 'jaxpr', jaxpr)
    if _shapes(body.invars) == _shapes(eqn.invars) and _shapes(body.outvars) == _shapes(eqn.outvars):
      return _walk(jaxpr, operands, sizes)
  if name in _REFUSED or any(has_products(jaxpr) for jaxpr in inner):
    raise ValueError(f'the operations inside {name} are not counted: write it as plain products, or count it by itself.')
  if name == 'select_n':   # its first operand says which of the others
    operands = operands[1:]
  made_of = None if name == 'concatenate' and len(_owners(operands, sizes)) > 1 else _joined(operands)
  return Counter(), [made_of] * len(eqn.outvars)


def _scan(eqn: Any, operands: list[Origin], sizes: dict[str, int]) -> tuple[Tally, list[Origin]]:
  jaxpr = eqn.params['jaxpr']
  body = getattr(jaxpr, 'jaxpr', jaxpr)
  # What is scanned over or stacked up has an axis more outside than in the body; inputs are constants, carry, scanned.
  scanned = sum(outer != inner for outer, inner in zip(_shapes(eqn.invars), _shapes(body.invars), strict=True))
  carried = sum(outer == inner for outer, inner in zip(_shapes(eqn.outvars), _shapes(body.outvars), strict=True))
  constants = len(operands) - scanned - carried
  tally, results = _settle(jaxpr, operands, slice(constants, constants + carried), sizes)
  return Counter({leaf: eqn.params['length'] * operations for leaf, operations in tally.items()}), results


def _while(eqn: Any, operands: list[Origin], sizes: dict[str, int]) -> tuple[Tally, list[Origin]]:
  if any(has_products(jaxpr) for jaxpr in _inner(eqn)):
    raise ValueError('a while loop with products in it has no number of operations: its turns are not in its shapes. Use scan, '
                     'or fori_loop with bounds that are Python numbers.')
  operands = operands[eqn.params['cond_nconsts']:]
  return _settle(eqn.params['body_jaxpr'], operands, slice(eqn.params['body_nconsts'], len(operands)), sizes)


def _settle(jaxpr: Any, operands: list[Origin], carried: slice, sizes: dict[str, int]) -> tuple[Tally, list[Origin]]:
  """One turn of a loop, once what is carried is made of all that any turn puts into it."""
  length = carried.stop - carried.start
  while True:
    tally, results = _walk(jaxpr, operands, sizes)
    carry = [_joined(pair) for pair in zip(operands[carried], results[:length], strict=True)]
    if carry == operands[carried]:
      return tally, [*carry, *results[length:]]
    operands = [*operands[:carried.start], *carry, *operands[carried.stop:]]


def _cond(eqn: Any, operands: list[Origin], sizes: dict[str, int]) -> tuple[Tally, list[Origin]]:
  found = [_walk(branch, operands[1:], sizes) for branch in eqn.params['branches']]
  tally = max((tally for tally, _ in found), key=lambda tally: sum(tally.values()))
  return tally, [_joined(results) for results in zip(*(results for _, results in found), strict=True)]


def _dot(eqn: Any) -> int:
  (contracted, _), _ = eqn.params['dimension_numbers']
  left, = _shapes(eqn.invars[:1])
  return 2 * math.prod(eqn.outvars[0].aval.shape) * math.prod(left[axis] for axis in contracted)


def _convolution(eqn: Any) -> int:
  inputs, kernel = _shapes(eqn.invars)
  out_channels, in_channels, *spatial = (kernel[axis] for axis in eqn.params['dimension_numbers'].rhs_spec)
  if any(dilation > 1 for dilation in eqn.params['lhs_dilation']):   # transposed: most taps of an output meet zeros in between
    groups = eqn.params['feature_group_count'] * eqn.params['batch_group_count']
    return 2 * math.prod(inputs) * math.prod(spatial) * out_channels // groups
  return 2 * math.prod(eqn.outvars[0].aval.shape) * math.prod(spatial) * in_channels   # of one group


_PRODUCTS: dict[str, Callable[[Any], int]] = {'dot_general': _dot, 'conv_general_dilated': _convolution}
_LOOKS_INTO: dict[str, Callable[..., tuple[Tally, list[Origin]]]] = {'scan': _scan, 'while': _while, 'cond': _cond}
# Products whose work is not in their shapes, or that only an accelerator's library knows.
_REFUSED = frozenset({
    'dot_product_attention_fp8_fwd_wrapper', 'dot_product_attention_fwd_wrapper', 'ragged_dot', 'ragged_dot_general',
    'scaled_dot', 'scaled_matmul_wrapper'})



def _inner(eqn: Any) -> list[Any]:
  """The jaxprs among the parameters of an equation."""
  found = [x for value in eqn.params.values() for x in (value if isinstance(value, tuple | list) else [value])]
  return [x for x in found if hasattr(x, 'eqns')]


def has_products(jaxpr: Any) -> bool:
  return any(eqn.primitive.name in _PRODUCTS or eqn.primitive.name in _REFUSED or any(map(has_products, _inner(eqn)))
             for eqn in jaxpr.eqns)


def _joined(origins: Sequence[Origin]) -> Origin:
  """What a value is made of that is made of several."""
  known = [origin for origin in origins if origin is not None]
  return _CONSTANT.union(*known) if len(known) == len(origins) else None


def _owners(origins: Sequence[Origin], sizes: dict[str, int]) -> set[str | None]:
  """The leaf that each operand stands for, of those that are made of leaves."""
  return {max(origin, key=lambda name: (sizes[name], name.rpartition('/')[2] == 'w', name)) for origin in origins if origin}


def _is_no_activation(aval: Any) -> bool:
  """True for scalars (a traced α, a norm, a threshold) and keys of random numbers: a weight that they act on is one still."""
  return not getattr(aval, 'shape', ()) or jnp.issubdtype(aval.dtype, jax.dtypes.prng_key)


def _shapes(variables: Sequence[Any]) -> list[tuple[int, ...]]:
  return [getattr(v.aval, 'shape', ()) for v in variables]

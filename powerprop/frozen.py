"""Backward passes that grow cheaper as weights fill up: counted, and for layers that are frozen as a whole, not computed."""
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.extend.core import Literal

from powerprop.flops import Costs, densities, has_products
from powerprop.masks import counts
from powerprop.reparam import Tree, leaf_name
from powerprop.thresholds import check_structure

_CALLS = ('jit', 'pjit', 'closed_call')


def skip_frozen(f: Callable[..., Any]) -> Callable[..., Any]:
  """`f` whose gradient at the weights of a product is computed only where some of them may change, and is 0 elsewhere.

      trainable = jax.tree.map(jnp.any, free)                     # at a task switch
      loss, grads = jax.value_and_grad(skip_frozen(loss_fn))(theta, trainable, images, labels)

  Each product of an activation with a weight gets a backward pass of its own, in which the product for the weight's gradient
  stands in a `lax.cond`: nothing is compiled anew when a layer fills up, and its third of the training step is not computed.
  Gradients at inputs and at other leaves, such as biases, are as before. With all layers frozen a gradient took half of its time
  on two cores; with none the same time, but 1.1 to 1.35 times as long inside a compiled loop. Under vmap with a
  `trainable` for each network a cond becomes a select and nothing is saved: map with lax.map, or let one network be one program.

  It wants the weights themselves: of `masks.apply(mask, θ)`, which is made of two arrays, nothing is saved; apply masks outside.

  It looks into jit. Products inside scan, while, cond and remat stay as they are, and are correct; so do those of weights that
  are made of several leaves, and on CPUs JAX's own convolutions, whose gradient in a branch takes XLA thirty times as long there.
  (A function with a gradient of its own, in which images and kernels keep their order, is looked at as one product on all
  devices.) Reverse mode only.

  Args:
    f: function of parameters and of arrays. Its other arguments are closed over.
  Returns: the function of parameters, a tree of bool scalars like them, and the same arrays.
  Raises: ValueError, when called, for a tree of another structure, and for leaves of it that are not one bool.
  """
  def wrapped(params: Tree, trainable: Tree, *args: Any) -> Any:
    closed, shape = jax.make_jaxpr(f, return_shape=True)(params, *args)
    check_structure('trainable', trainable, 'the parameters', params)
    for path, x in jax.tree_util.tree_leaves_with_path(trainable):
      if jnp.shape(x) != () or jnp.result_type(x) != jnp.bool_:
        raise ValueError(f'trainable has one bool for each leaf, jax.tree.map(jnp.any, free); got {jnp.result_type(x)} '
                         f'{jnp.shape(x)} at {leaf_name(path)}.')
    leaves, flags, rest = jax.tree.leaves(params), jax.tree.leaves(trainable), jax.tree.leaves(args)
    out, _ = _run(closed.jaxpr, closed.consts, [*leaves, *rest], [*flags, *[None] * len(rest)])
    return jax.tree.unflatten(jax.tree.structure(shape), out)
  return wrapped


def backward_densities(costs: Costs, free: Tree, whole_layers: bool = False) -> dict[str, float]:
  """Leaf name → share of its gradient that training needs under protection, for `flops.training_step` and `flops.Phase`:

      flops.training_step(costs, {}, backward_densities(costs, free))

  Args:
    costs: by `flops.count`.
    free: tree of bool like the parameters, concrete.
    whole_layers: what `skip_frozen` saves, that is leaves in which nothing is free; else as if every product with a protected
      weight were left out, as `flops` counts throughout.
  """
  found = densities(costs, counts(free))
  return {name: float(share > 0) for name, share in found.items()} if whole_layers else found


def _run(jaxpr: Any, consts: Sequence[Any], args: Sequence[Any], flags: Sequence[Any]) -> tuple[list[Any], list[Any]]:
  """Values of the outputs, and the flag of each that is made of one leaf and of no activation."""
  values: dict[Any, Any] = {}
  owner: dict[Any, Any] = {}

  def put(variables: Sequence[Any], found: Sequence[Any], of: Sequence[Any]) -> None:
    for v, x, flag in zip(variables, found, of, strict=True):
      values[v], owner[v] = x, flag

  def value(v: Any) -> Any:
    return v.val if isinstance(v, Literal) else values[v]

  put(jaxpr.constvars, consts, [None] * len(consts))
  put(jaxpr.invars, args, flags)
  for eqn in jaxpr.eqns:
    ins = [value(v) for v in eqn.invars]
    of = [None if isinstance(v, Literal) else owner[v] for v in eqn.invars]
    if eqn.primitive.name in _CALLS:
      inner = eqn.params['jaxpr'] if 'jaxpr' in eqn.params else eqn.params['call_jaxpr']
      put(eqn.outvars, *_run(inner.jaxpr, inner.consts, ins, of))
      continue
    if sum(flag is not None for flag in of) == 1 and _is_product(eqn):
      at = next(i for i, flag in enumerate(of) if flag is not None)
      found = _gated(eqn, at, ins, of[at])
      put(eqn.outvars, found if eqn.primitive.multiple_results else [found], [None] * len(eqn.outvars))
      continue
    found = eqn.primitive.bind(*ins, **eqn.primitive.get_bind_params(eqn.params))
    found = found if eqn.primitive.multiple_results else [found]
    # A weight that is cast, reshaped or scaled by a number is one still.
    arrays = [flag for v, flag in zip(eqn.invars, of, strict=True) if not isinstance(v, Literal)]
    single = arrays[0] if len(arrays) == 1 else None
    put(eqn.outvars, found, [single] * len(found))
  return [value(v) for v in jaxpr.outvars], [None if isinstance(v, Literal) else owner[v] for v in jaxpr.outvars]


def _is_product(eqn: Any) -> bool:
  name = eqn.primitive.name
  if name == 'conv_general_dilated':
    return jax.default_backend() != 'cpu'
  return name == 'dot_general' or (name == 'custom_vjp_call' and has_products(eqn.params['call_jaxpr']))


def _gated(eqn: Any, at: int, operands: Sequence[Any], trainable: Any) -> Any:
  """The product, whose gradient at operand `at` is in a branch."""
  def product(w: Any, *others: Any) -> Any:
    return eqn.primitive.bind(*others[:at], w, *others[at:], **eqn.primitive.get_bind_params(eqn.params))

  @jax.custom_vjp
  def gated(trainable: Any, w: Any, *others: Any) -> Any:
    return product(w, *others)

  def forward(trainable: Any, w: Any, *others: Any) -> Any:
    return product(w, *others), (trainable, w, others)

  def backward(kept: Any, ct: Any) -> Any:
    trainable, w, others = kept
    at_others = jax.vjp(lambda *others: product(w, *others), *others)[1](ct)
    at_w = lax.cond(trainable, lambda: jax.vjp(lambda w: product(w, *others), w)[1](ct)[0], lambda: jnp.zeros_like(w))
    return None, at_w, *at_others

  gated.defvjp(forward, backward)
  return gated(trainable, operands[at], *operands[:at], *operands[at + 1:])

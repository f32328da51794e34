"""Weights that no optimiser moves: one optax wrapper whose updates are exactly nothing where a weight is protected.

    tx = powerprop.protect(powerprop.target_propagation(optax.adam(1e-3), reparam))
    opt_state = tx.init(phi)                                        # all is free
    opt_state = powerprop.with_free(opt_state, free)                # from a task's end on: same shapes, nothing is compiled anew
    opt_state = powerprop.with_free(tx.init(phi), free)             # the same, with an optimiser that begins anew
"""
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from powerprop.reparam import Tree, leaf_name
from powerprop.thresholds import check_mask, check_structure
from powerprop.transforms import Outermost, find_states


class ProtectState(NamedTuple):
  free: Tree   # bool like all parameters, biases too. True: the optimiser may change the entry
  inner: Any

  @property
  def outermost(self) -> bool:   # see transforms.Outermost
    return True


def protect(inner: optax.GradientTransformation) -> optax.GradientTransformationExtraArgs:
  """Gradient masking that holds: a weight that is not free keeps its bits, whatever the optimiser remembers or decays.

    u ← inner(g ∘ free);   φ ← φ + (u where free, else −0)

  Masking the gradient alone does not protect: momentum, Adam's moments and decay go on moving a weight of gradient 0. The update
  is −0 since x + (−0) is x for every x, −0 included, and x + 0 is not. (On CPUs XLA takes subnormal numbers for 0 in every sum,
  this one too: a protected weight below 1e-38 becomes 0 as it was for the network all along.)

  It stands outermost: anything may be inside, `target_propagation`, `sparsify` with an updater that keeps masked weights, and
  optax.MultiSteps, apply_if_finite, inject_hyperparams and partition. These four may stand around it as well; apply_if_finite
  then adds +0 at a step that it leaves out, at which a −0 loses its sign. Within partition it protects its own group alone, and
  the state holds one. It is refused by what would move its weights after it: `target_propagation`, `backpropagation`, `sparsify`;
  and by `with_free` in a chain that goes on after it, or in what averages its updates, as optax.contrib.schedule_free.

  `inner` sees all parameters, and in norms over all of them (clipping, LAMB) protected entries have gradient 0. The cost is one
  select for each gradient and each update.

  Args:
    inner: any optax transformation.
  Returns: a transformation whose state is a `ProtectState`, with everything free at first.
  Source: the backward mask of Algorithm 1 in Schwarz et al. 2021 (arXiv:2110.00296), after PackNet, Mallya & Lazebnik 2018
    (arXiv:1711.05769). Differs from both: they mask the gradient.
  """
  if not hasattr(inner, 'update'):
    raise ValueError(f'protect takes an optax transformation, got {type(inner).__name__}.')
  if getattr(inner, 'zeroes', False):
    raise ValueError('this updater sets masked weights to 0, which protect would not let it do to protected ones; inside protect '
                     'sparsify takes one that keeps them: top_kast, straight_through, or gradual with returns=True.')
  inner = optax.with_extra_args_support(inner)

  def init(params: Tree) -> ProtectState:
    return ProtectState(jax.tree.map(lambda x: jnp.ones_like(x, bool), params), inner.init(params))

  def update(updates: Tree, state: ProtectState, params: Tree = None, **extra_args: Any) -> tuple[Tree, ProtectState]:
    check_structure('gradients', updates, 'the parameters of init', state.free)
    gated = jax.tree.map(lambda free, g: jnp.where(free, g, jnp.zeros_like(g)), state.free, updates)
    u, inner_state = inner.update(gated, state.inner, params, **extra_args)
    u = jax.tree.map(lambda free, x: jnp.where(free, x, -jnp.zeros_like(x)), state.free, u)
    return u, ProtectState(state.free, inner_state)

  return Outermost(init, update)


def with_free(opt_state: Any, free: Tree) -> Any:
  """`opt_state` with another tree of what is free, found at any depth. Values are arguments of a program: nothing is compiled.

  State of the optimiser stays as it is: moments of a weight that is protected from now on fade unseen. To begin it anew at the
  switch to another task, give the state that `tx.init(phi)` makes.

  Args:
    opt_state: state of a transformation with one `protect` in it.
    free: bool like the parameters: `task_masks.free`, or what is free and in the mask of a task, to retrain under it. Within
      optax.partition it is of the whole tree, too.
  Raises: ValueError when there is not exactly one, when something is chained after it (by optax.chain), for a tree that does not
    fit, and outside jit for entries that are not free in a group of optax.partition without `protect`.
  """
  states = find_states(opt_state, ProtectState, 'protect')
  if len(states) != 1:
    raise ValueError(f'with_free wants one protect in the state, got {len(states)}; the optimiser is wrapped as protect(tx).')

  def absent(x: Any) -> bool:   # a leaf that optax.partition gives to another transformation
    return isinstance(x, optax.MaskedNode)

  def leaf(path: Any, old: Any, new: Any) -> Any:
    if absent(old):
      if not isinstance(new, jax.core.Tracer) and not np.all(new):
        raise ValueError(f'{leaf_name(path)} has protected entries, and optax.partition gives it to a transformation without '
                         'protect: put protect around the partition, or let it be free.')
      return old
    check_mask(new, old, path)
    return jnp.array(new)   # a copy: the state may be donated to a step, and `free` is wanted after it
  check_structure('free', jax.tree.map(lambda _: 0, free, is_leaf=absent), 'the parameters',
                  jax.tree.map(lambda _: 0, states[0].free, is_leaf=absent))
  new = jax.tree_util.tree_map_with_path(leaf, states[0].free, free, is_leaf=absent)
  return jax.tree.map(lambda x: x._replace(free=new) if isinstance(x, ProtectState) else x,
                      opt_state, is_leaf=lambda x: isinstance(x, ProtectState))


def keep(free: Tree, new: Tree, old: Tree) -> Tree:
  """`new` where free, the bits of `old` elsewhere: for what no optimiser changes, as running averages of BatchNorm."""
  return jax.tree.map(lambda on, a, b: jnp.where(on, a, b), free, new, old)


def average(ema: Tree, params: Tree, decay: float | jax.Array, free: Tree) -> Tree:
  """Exponential moving average of parameters that leaves protected entries alone: ema + (1 − decay)(params − ema) where free.

  The average of an entry that does not change is no constant by optax.incremental_update, whose two products round. Where a task
  is to be used with its averaged weights, they become the parameters before its mask is chosen and remembered.

  Args:
    ema, params: trees alike. The average begins as a copy of the parameters, and so it does for weights that were made anew:
      `keep(free, params, ema)`.
    decay: in [0, 1], traced or not.
    free: tree of bool, as for `with_free`.
  Raises: ValueError for another decay.
  """
  if not isinstance(decay, jax.core.Tracer) and not 0 <= decay <= 1:
    raise ValueError(f'decay of an average is in [0, 1]; got {decay}.')
  return keep(free, jax.tree.map(lambda e, p: (e + (1 - decay) * (p - e)).astype(e.dtype), ema, params), ema)

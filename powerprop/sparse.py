"""One optax wrapper that makes any training sparse: masks live in its state and are applied inside its update.

The same four lines train every algorithm of `powerprop.updaters`:

    theta = powerprop.masked(opt_state, reparam.weights(phi))      # what the network sees
    loss, grads = jax.value_and_grad(loss_fn)(theta, batch)        # the gradient at all weights, masked ones included
    updates, opt_state = tx.update(grads, opt_state, phi)
    phi = optax.apply_updates(phi, updates)
"""
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import lax

from powerprop.masks import apply, counts, is_none
from powerprop.reparam import Reparam, Tree, leaf_name, powerpropagation, psi_inverse
from powerprop.thresholds import check_mask, check_structure
from powerprop.transforms import Outermost, Propagation, begin, find_states, holds_outermost


class Masks(NamedTuple):
  """Trees of bool like the parameters; None where a leaf is never masked."""
  forward: Tree          # True: the network sees the weight
  backward: Tree = ()    # True: the optimiser may change it; holds `forward`. (): the same tree, stored once


class SparsityUpdater(NamedTuple):
  """A rule that makes masks and changes them. It knows the weights θ only, whatever the parameters φ are.

  `step` is the number of updates applied, the current one included: an int32 scalar. `init` gets None for leaves that are no
  weights.
  """
  init: Callable[[Tree, jax.Array | None], tuple[Masks, Any]]   # (θ, key) → masks, memory
  update: Callable[[Any, Masks, Any, Tree, Tree], tuple[Masks, Any]]   # (step, masks, memory, θ after the step, gradients at θ)
  due: Callable[[Any], Any]                    # step → does `update` act now? False at all steps: masks stay
  at_hand: bool = False                        # `init` hands on masks that are there already
  keeps: bool = False                          # masked weights keep their stored value; else they are exactly 0
  observe: Callable[[Any, Any, Tree], Any] | None = None   # (step, memory, gradients) → memory, at every step
  shape: Callable[[Masks, Tree, Tree], Tree] | None = None   # (masks, θ, gradients) → gradients that the optimiser gets
  dense_gradient: Callable[[Any], Any] = lambda step: False   # step → is the gradient at masked weights wanted? For `flops`


class SparsifyState(NamedTuple):
  step: jax.Array       # int32: updates applied
  masks: Masks
  kept: Masks           # int32 scalars: how many weights of each leaf the masks keep
  memory: Any           # the updater's own arrays
  inner: Any

  @property
  def outermost(self) -> bool:   # see transforms.Outermost
    return True


def sparsify(inner: optax.GradientTransformation, updater: SparsityUpdater, reparam: Reparam | None = None,
             key: jax.Array | None = None, entry: float = 0.3) -> optax.GradientTransformationExtraArgs:
  """Trains under masks that `updater` makes, with any optimiser inside, and keeps masked weights exactly 0.

    u ← inner(g ∘ m_B);   φ ← φ + u ∘ m_B;   every so often: m ← updater(θ, g), φ ← φ ∘ m_F

  It stands outermost: `sparsify(target_propagation(optax.adam(1e-3), reparam), updater, reparam)`; where α > 1 a
  `target_propagation` or `backpropagation` inside is needed, since gradients are those at θ. Only optax.MultiSteps,
  apply_if_finite, inject_hyperparams and partition may stand around it; a chain that goes on after it is refused by `masked`,
  and the wrappers of `powerprop.transforms` refuse it. Before the first update the parameters may be dense: it is `masked` that
  the network sees, always.

  A weight that comes back starts at θ = −sign(g) · entry · (mean |θ| of those of its leaf that stayed live) where α > 1, with
  sign(0) = 1, and at 0 where α = 1; where more come back than stayed, at less, by the ratio of their numbers. Differs from the
  papers of the algorithms, in which it starts at 0: for α > 1 that is a critical point, and it would never move. Moments of the
  optimiser, and whatever else of its state has the shape of the parameters, begin anew, at 0, for every weight whose backward
  mask has changed.

  Args:
    inner: any optax transformation; it sees gradients that are 0 where the optimiser may change nothing.
    updater: from `powerprop.updaters`.
    reparam: the one of the network; its `where` says which leaves may be masked. None: that of `inner`, where it is what
      `target_propagation` or `backpropagation` gave; else no reparameterisation, which is an error where there is one deeper in.
    key: typed key for updaters that draw at random; kept in the state. Inside a map over seeds, each has to have its own.
    entry: see above; at least 0.
  Returns: a transformation whose `update` takes (gradient at `masked(state, θ)`, state, φ) and, by keyword, `step`: a number of
    updates applied so far that is to be used in place of its own. Under vmap over seeds, give one that is not mapped: the
    update of masks then stays a branch, where it else would be computed at every step. It counts updates that were applied, as
    the state does by itself: under optax.MultiSteps or apply_if_finite a loop's counter runs ahead of them, and a step that is
    left out may be the one at which masks settle. And, by keyword, `due`: `updater.due(n + 1)` as a bool, after n updates that
    were applied, where the loop knows it: `sparsify` has no branch then, at which a GPU's host would wait. (Rules that gather
    something at some steps, as RigL by mean gradients, have theirs.) As a static argument of the jitted step it makes two
    programs, and no more; what is said of `step` and a loop's counter holds for it too.
  Raises: ValueError for a negative `entry`, for another α than inside, for a `due` that is no bool, and when `update` gets no
    parameters. A warning where a weight has α > 1 and nothing inside that propagates.
  """
  if not isinstance(updater, SparsityUpdater):
    raise ValueError('sparsify(inner, updater, reparam) takes what a rule of powerprop.updaters gives, as updaters.rigl(0.9, 99);'
                     f' got {getattr(updater, "__name__", type(updater).__name__)} as the second argument.')
  if not hasattr(inner, 'update'):
    raise ValueError(f'inner is an optax transformation, as optax.adam(1e-3); got {getattr(inner, "__name__", inner)!r}.')
  inside = 'sparsify moves masked weights to 0, and what is within must let it: put protect around it, not inside.'
  if isinstance(inner, Outermost):
    raise ValueError(inside)
  if not 0 <= entry < float('inf'):
    raise ValueError(f'entry must be at least 0, and finite; got {entry!r}.')
  if reparam is not None and not isinstance(reparam, Reparam):
    raise ValueError(f'reparam is what powerpropagation(alpha) gives, got {reparam!r}.')
  if key is not None and not jnp.issubdtype(jnp.result_type(key), jax.dtypes.prng_key):
    raise ValueError(f'key is a typed key, as jax.random.key(0), got {key!r}.')
  propagated = inner.reparam if isinstance(inner, Propagation) else None
  reparam = reparam or propagated or powerpropagation(1.0)
  inner = optax.with_extra_args_support(inner)

  def init(params: Tree) -> SparsifyState:
    step = jnp.zeros([], jnp.int32)
    if not jax.tree.leaves(params):   # optax's own placeholders
      return SparsifyState(step, Masks(params), Masks(params), (), inner.init(params))
    masks, memory = _first(updater, _maskable(reparam, params), key)
    seen = params if updater.keeps else apply(masks.forward, params)
    inner_state, propagations = begin(inner, seen)
    if holds_outermost(inner_state):
      raise ValueError(inside)
    _check_alike(reparam, propagations, params)
    return SparsifyState(step, masks, count_kept(masks), memory, inner_state)

  def update(updates: Tree, state: SparsifyState, params: Tree = None, *, step: Any = None, due: bool | None = None,
             **extra_args: Any) -> tuple[Tree, SparsifyState]:
    if params is None:
      raise ValueError('update needs the stored parameters φ: tx.update(grads, state, phi).')
    if not (due is None or isinstance(due, bool)):
      raise ValueError(f'due is True or False, a static argument of the step; got {due!r}.')
    grads, masks = updates, state.masks
    check_structure('gradients', grads, 'parameters', params)
    # What is masked is 0 already, but for the first update.
    seen = params if updater.keeps else apply(masks.forward, params)
    shaped = grads if updater.shape is None else updater.shape(masks, reparam.weights(params), grads)
    u, inner_state = inner.update(apply(trained(masks), shaped), state.inner, seen, **extra_args)
    u = _still(masks, u, params, updater.keeps)
    n = (state.step if step is None else jnp.asarray(step, jnp.int32)) + 1
    memory = state.memory if updater.observe is None else updater.observe(n, state.memory, grads)

    def change(masks: Masks, kept: Masks, memory: Any, places: Tree) -> Any:
      theta = reparam.weights(optax.apply_updates(seen, u))
      new, memory = updater.update(n, masks, memory, theta, grads)
      if not updater.keeps:
        places = _places(reparam, entry, masks.forward, new.forward, theta)
      return new, count_kept(new), memory, places

    # Only what a change of masks makes goes through the branch: it costs a copy, at every step.
    now = updater.due(n)
    now = now if due is None or now is False else due
    parts = masks, state.kept, memory, jax.tree.map(lambda x: jnp.zeros([], jnp.result_type(x)), params)
    if now is not False:
      parts = change(*parts) if now is True else lax.cond(now, change, lambda *same: same, *parts)
    new, kept, memory, places = parts
    if now is not False:
      if not updater.keeps:
        u = _still(new, _enter(masks.forward, new.forward, places, grads, params, u), params, keeps=False)
      inner_state = _restart(inner, inner_state, _map(lambda a, b: a ^ b, trained(new), trained(masks)))
    return u, SparsifyState(state.step + 1, new, kept, memory, inner_state)

  made = Outermost(init, update)
  made.zeroes = not updater.keeps
  return made


def masked(opt_state: Any, params: Tree, which: str = 'forward') -> Tree:
  """where(mask, x, 0): the weights that the network sees, for training, evaluation and averaged copies alike.

  Args:
    opt_state: state of a transformation with one or several `sparsify` in it, at any depth.
    params: φ, θ or a copy of them, of the structure that `init` got.
    which: 'forward', or 'backward' for what the optimiser may change.
  Raises: ValueError when there is no `sparsify` in the state, when something is chained after one (by optax.chain or
    named_chain; states of several optimisers go into a list or a dictionary), for other parameters, and for another word.
  """
  if which not in ('forward', 'backward'):
    raise ValueError(f"which is 'forward' or 'backward'; got {which!r}.")
  by_name: dict[str, jax.Array] = {}
  for state in _states(opt_state):
    for path, mask in jax.tree_util.tree_leaves_with_path(trained(state.masks) if which == 'backward' else state.masks.forward):
      by_name[leaf_name(path)] = mask
  paths = [leaf_name(path) for path, _ in jax.tree_util.tree_leaves_with_path(params)]
  if strange := sorted(by_name.keys() - set(paths)):
    raise ValueError(f'the state has a mask for {strange[0]}, which these parameters lack; they have {paths[:8]}.')
  masks = jax.tree_util.tree_map_with_path(lambda path, x: by_name.get(leaf_name(path)), params)
  return apply(masks, params)


def with_masks(opt_state: Any, masks: Masks) -> Any:
  """`opt_state` with other masks in its one `sparsify`: from a sparse checkpoint, say. Same shapes, nothing is compiled anew.

  `masks` has a backward tree where that of the state has one: with Top-KAST, for example. Rules that only prune (static,
  one_shot, gradual without return) never add to what they are given: fewer live weights than they are to keep stay fewer.
  Raises: ValueError when there is not exactly one, and for masks of another structure, shape or dtype, or whose backward tree
    lacks weights of the forward one (looked for outside jit).
  """
  states = _states(opt_state)
  if len(states) != 1:
    raise ValueError(f'with_masks wants one sparsify in the state, got {len(states)}.')
  if not isinstance(masks, Masks):
    raise ValueError('with_masks takes powerprop.Masks(forward, backward), and Masks(tree) where the backward tree is the same; '
                     f'got {type(masks).__name__}.')

  def fits(path: Any, mask: Any, old: Any) -> None:
    if (mask is None) != (old is None):
      raise ValueError(f'{leaf_name(path)} is {"never" if old is None else "always"} masked: its mask is '
                       f'{"None" if old is None else "an array of bool"}, got {"None" if mask is None else "an array"}.')
    if mask is not None:
      check_mask(mask, old, path)
  for name, tree, old in zip(Masks._fields, masks, states[0].masks, strict=True):
    check_structure(f'the {name} masks', tree, 'those of the state', old, is_leaf=is_none)
    jax.tree_util.tree_map_with_path(fits, tree, old, is_leaf=is_none)

  def holds(path: Any, seen: jax.Array, moves: Any) -> None:
    lacks = jnp.any(seen & ~moves) if moves is not None else False   # None: the optimiser may change all
    if not isinstance(lacks, jax.core.Tracer) and lacks:
      raise ValueError(f'{leaf_name(path)} has weights in the forward mask that the backward mask lacks.')
  jax.tree_util.tree_map_with_path(holds, masks.forward, trained(masks))
  return jax.tree.map(lambda x: x._replace(masks=masks, kept=count_kept(masks)) if isinstance(x, SparsifyState) else x,
                      opt_state, is_leaf=lambda x: isinstance(x, SparsifyState))


def rescaled(opt_state: Any, theta: Tree) -> Tree:
  """θ_l · ‖θ_l‖ / ‖m_l ∘ θ_l‖: the live weights of each leaf get the norm that all of it had.

  For initial weights of a network that is sparse from the start and has no normalisation, in which signals would fade from layer
  to layer: `phi = reparam.inverse(rescaled(opt_state, reparam.weights(phi)))` after `opt_state = tx.init(phi)`. At random masks
  the factor is about 1/√density, and less where the largest weights are live, as with Top-KAST; leaves that are dense, never
  masked, or whose live weights are all 0 stay as they are. Masks by layer stay what they are; an inner optimiser that keeps a
  copy of the parameters has to be initialised again.

  Source: Evci et al. 2022 (arXiv:2010.03533). Differs from the paper: by layer and not by output, and by the weights that are
  there and not by their distribution.
  Raises: ValueError as `masked` does.
  """
  def leaf(x: Any, live: Any) -> Any:
    if x is None:
      return None
    # Relative to the largest: the squares of small weights are 0.
    wide, seen = (jnp.asarray(v).astype(jnp.promote_types(jnp.result_type(v), jnp.float32)) for v in (x, live))
    largest = jnp.max(jnp.abs(seen), initial=0)
    whole, part = (jnp.sum(jnp.square(v / jnp.where(largest > 0, largest, 1))) for v in (wide, seen))
    as_it_is = jnp.all(seen == wide) | (part == 0)
    return (wide * jnp.where(as_it_is, 1, jnp.sqrt(whole / jnp.where(part > 0, part, 1)))).astype(jnp.result_type(x))
  return jax.tree.map(leaf, theta, masked(opt_state, theta), is_leaf=is_none)


def trained(masks: Masks) -> Tree:
  """The backward masks: what the optimiser may change."""
  return masks.forward if isinstance(masks.backward, tuple) and not masks.backward else masks.backward


def count_kept(masks: Masks) -> Masks:
  """How many weights each leaf keeps: int32 scalars; None stays None."""
  return Masks(counts(masks.forward), counts(masks.backward))


def _states(opt_state: Any) -> list[SparsifyState]:
  states = find_states(opt_state, SparsifyState, 'sparsify')
  if not states:
    raise ValueError('there is no sparsify in this optimiser state.')
  return states


def _first(updater: SparsityUpdater, weights: Tree, key: jax.Array | None) -> tuple[Masks, Any]:
  """Masks and memory at the start, as one program: op by op, those of a ResNet-50 would take minutes. Where weights have been put
  on devices, what has their shape lies as they do."""
  if updater.at_hand:
    return updater.init(weights, key)
  places = {x.shape: x.sharding for x in jax.tree.leaves(weights)
            if isinstance(x, jax.Array) and not isinstance(x, jax.core.Tracer) and x.committed}
  if not places:
    return jax.jit(updater.init)(weights, key)
  shapes = jax.eval_shape(updater.init, weights, key)
  return jax.jit(updater.init, out_shardings=jax.tree.map(lambda x: places.get(x.shape), shapes))(weights, key)


def _check_alike(reparam: Reparam, inside: list[tuple[Reparam, Tree]], params: Tree) -> None:
  """Raises ValueError where a leaf that may be masked has another α inside, and warns where it should have one and has none."""
  found: dict[str, float] = {}
  for other, some in inside:   # of optax.partition each has its part
    found |= {leaf_name(path): alpha for path, alpha in jax.tree_util.tree_leaves_with_path(other.alphas(some))}
  bare = []
  on = jax.tree.leaves(reparam.where(params))
  for (path, alpha), weight in zip(jax.tree_util.tree_leaves_with_path(reparam.alphas(params)), on, strict=True):
    name = leaf_name(path)
    if weight and alpha != found.get(name, alpha):
      raise ValueError(f'{name} has α = {alpha:g} in sparsify and α = {found[name]:g} in the transformation inside; give both '
                       'the same reparam.')
    if weight and alpha > 1 and name not in found:
      bare.append(name)
  if bare:
    warnings.warn(f'{bare[0]} has α > 1, and its gradient, at θ, becomes an update of φ without the slope: '
                  'sparsify(target_propagation(inner, reparam), updater, reparam).', stacklevel=3)


def _maskable(reparam: Reparam, params: Tree) -> Tree:
  """θ where a leaf is a weight, None elsewhere."""
  return jax.tree.map(lambda on, x: x if on else None, reparam.where(params), reparam.weights(params))


def _map(f: Callable[..., Any], mask: Tree, *rest: Tree) -> Tree:
  """f on the leaves that have a mask; None stays None."""
  return jax.tree.map(lambda m, *xs: None if m is None else f(m, *xs), mask, *rest, is_leaf=is_none)


def _still(masks: Masks, u: Tree, params: Tree, keeps: bool) -> Tree:
  """Updates that leave what is masked at its stored value, or bring it to 0, to the last bit."""
  def leaf(mask: Any, x: jax.Array, p: jax.Array) -> jax.Array:
    if mask is None:
      return x
    if keeps:   # p + (−0) is p, −0 included
      return jnp.where(mask, x, -jnp.zeros_like(x))
    wide = jnp.promote_types(x.dtype, p.dtype)   # p + (−p) is 0 where −p is exact
    return jnp.where(mask, x.astype(wide), -p.astype(wide))
  return jax.tree.map(leaf, trained(masks) if keeps else masks.forward, u, params, is_leaf=is_none)


def _places(reparam: Reparam, entry: float, old: Tree, new: Tree, theta: Tree) -> Tree:
  """|φ| at which weights that come back start: a scalar for each leaf."""
  def place(alpha: float, a: Any, b: Any, x: Any) -> Any:
    if x is None:
      return None
    if a is None or alpha == 1:
      return jnp.zeros([], jnp.result_type(x))
    # Not of the smallest: those are the last that came, and each exchange would place its own below them, soon at 0.
    # Nor more in all than that share of what stayed, where nearly all come back at once, as in AC/DC: networks diverged.
    stayed, back = a & b, b & ~a
    total = jnp.sum(jnp.where(stayed, jnp.abs(x), 0), dtype=jnp.float32)
    return psi_inverse((entry * total / jnp.maximum(jnp.maximum(jnp.sum(stayed), jnp.sum(back)), 1)).astype(x.dtype), alpha)
  return jax.tree.map(place, reparam.alphas(theta), old, new, theta, is_leaf=is_none)


def _enter(old: Tree, new: Tree, places: Tree, grads: Tree, params: Tree, u: Tree) -> Tree:
  """Updates that bring weights which come back to their place, against the gradient."""
  def leaf(a: Any, b: Any, place: jax.Array, g: jax.Array, p: jax.Array, x: jax.Array) -> jax.Array:
    return x if a is None else jnp.where(b & ~a, jnp.where(g < 0, place, -place) - p, x).astype(x.dtype)
  return jax.tree.map(leaf, old, new, places, grads, params, u, is_leaf=is_none)


def _restart(inner: optax.GradientTransformation, state: Any, changed: Tree) -> Any:
  """Every parameter-shaped slot of the optimiser's state at 0 where a mask has changed; slots of other shapes as they are."""
  def slot(x: Any, c: Any) -> Any:
    if c is None or isinstance(x, optax.MaskedNode) or jnp.shape(x) != jnp.shape(c):
      return x
    return jnp.where(c, jnp.zeros_like(x), x)
  return optax.tree.map_params(inner, slot, state, changed, is_leaf=lambda x: x is None or isinstance(x, optax.MaskedNode))

"""PackNet and EfficientPackNet: task after task in one network, each in some of its weights (Algorithm 1 of the paper).

  for each task t:
    train on it, weights of earlier tasks protected            protect, with_free
    P ← score of all weights on the held-out set of task t
    for s from the densest to the sparsest:                    search, search_binary
      M_t ← the ⌊s · dim⌋ weights of largest |φ|               efficient_masks; packnet_masks
      until the score of φ ∘ M_t is γP or less; M_t is the last one before
    M_b ← ¬∨ M_i                                               task_masks.remember, free
    weights that are free begin anew at Ψ⁻¹(θ), θ ~ p(θ)       reinitialise

`begin_task` and `end_task` are what comes before the training on a task and what comes after it, in two calls.

The printed loop keeps the first mask that *fails*, scores it on "task T", and calls s a sparsity rate although TopK keeps
⌊s · dim⌋. Here the mask is the last that passed, scored on the current task, and s is a density. No number of tasks is asked for
in advance.

Source: Schwarz et al. 2021 (arXiv:2110.00296), section 4; PackNet: Mallya & Lazebnik 2018 (arXiv:1711.05769).
"""
import math
import warnings
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax

from powerprop import masks
from powerprop.masks import is_none
from powerprop.protection import keep, with_free
from powerprop.reparam import Tree, leaf_name
from powerprop.task_masks import Capacity, Memory, capacity, check_intact, check_room, free, intact, remember, shared
from powerprop.thresholds import check_mask, check_structure

Choose = Callable[[Any], Tree]            # number of weights, or a tree of numbers → mask
Evaluate = Callable[[Tree], jax.Array]    # mask → score on the held-out set, the higher the better, at least 0


# ---- one mask --------------------------------------------------------------------------------------------------------


def efficient_masks(phi: Tree, count: Any) -> Tree:
  """EfficientPackNet's choice: the weights of largest |φ| among all, those of earlier tasks included, which are thus reused.

  Args:
    phi: shared leaves, None in place of others: `task_masks.shared(memory, phi)`.
    count: integer scalar, one threshold for all leaves, as in the paper; or a tree of integers, one for each leaf.
  Returns: tree of bool like `phi`, exactly `count` of them True.
  """
  return masks.top_k_global(phi, count) if _one(count) else masks.layerwise(phi, count)


def packnet_masks(phi: Tree, free: Tree, count: Any, live: Tree = None) -> Tree:
  """PackNet's choice: all weights of earlier tasks, and `count` new ones, of largest |φ| among the free.

  Where fewer are free, it takes them all.

  Args:
    phi: shared leaves, None in place of others.
    free: tree of bool like `phi`, or like all parameters.
    count: as for `efficient_masks`; PackNet's own is a number for each layer, `packnet_counts`.
    live: the mask of the round before; what it has left out does not come back.
  Source: Mallya & Lazebnik 2018, section 3.
  """
  candidates = _candidates(phi, free, live)
  new = masks.top_k_global(phi, count, candidates) if _one(count) else masks.layerwise(phi, count, candidates)
  return jax.tree.map(lambda n, f: None if n is None else n | ~f, new, free, is_leaf=is_none)


def packnet_counts(phi: Tree, free: Tree, share: float, round: int | jax.Array = 0, rounds: int = 1, live: Tree = None) -> Tree:
  """How many new weights of each leaf a task keeps after each of PackNet's rounds: ⌊share · dim⌋ of them after the last.

    k = min(max(1, ⌊share · dim⌋), a) of the a free weights that are live;   k_r = k + [(a − k)(1 − 1/(R − r))]

  What goes is shared out evenly among the rounds r = 0 … R − 1, with training after each. [·] rounds to the nearest.

    seen = None
    for r in range(rounds):
      seen = packnet.packnet_masks(shared, free, packnet.packnet_counts(shared, free, 0.1, r, rounds, seen), seen)
      ...   # trains on, with the gradients of masks.apply(seen, θ) and `seen & free` as what may change

  Args:
    phi, free, live: as for `packnet_masks`.
    share: of a leaf's weights, in (0, 1], that each task gets, fixed beforehand; the last ones get what is left.
    round: r, traced or not, from 0 on; a traced one beyond the last counts as the last.
    rounds: R.
  Returns: tree of int32 scalars.
  Raises: ValueError for another share, number of rounds or round.
  Source: Mallya & Lazebnik 2018, section 3, where the last round is the only one.
  """
  if not 0 < share <= 1 or rounds < 1:
    raise ValueError(f'share is in (0, 1] and rounds at least 1; got {share!r} and {rounds!r}.')
  if not _traced(round) and not 0 <= int(round) < rounds:
    raise ValueError(f'round is one of 0 to {rounds - 1}; got {round}.')
  round = jnp.clip(round, 0, rounds - 1) if _traced(round) else round

  def of(x: jax.Array) -> jax.Array:
    there = jnp.sum(x, dtype=jnp.int32)
    final = jnp.minimum(max(1, math.floor(share * x.size + 1e-6)), there)   # a product that is whole but for rounding
    return final + jnp.round((there - final) * (1 - 1 / (rounds - round))).astype(jnp.int32)
  return jax.tree.map(of, _candidates(phi, free, live))


def _candidates(phi: Tree, free: Tree, live: Tree) -> Tree:
  """What is free, in shared leaves, and was not left out before."""
  found = jax.tree.map(lambda x, f: None if x is None else f, phi, free, is_leaf=is_none)
  return found if live is None else jax.tree.map(jnp.logical_and, found, live)


def make_counts(phi: Tree, densities: Sequence[float], layerwise: bool = False) -> Any:
  """⌊s · dim⌋ for each density, to be given to a search: int32 [D], or a tree of them for one number a leaf.

  A product that is whole but for rounding, as 0.29 · 100, is that number.

  Args:
    phi: shared leaves, or their shapes, None in place of others.
    densities: shares of weights kept, increasing, in (0, 1].
  Raises: ValueError for other densities, and for one that keeps no weight of a leaf.
  """
  if np.ndim(densities) != 1:
    raise ValueError(f'densities are a list of numbers; got {densities!r}.')
  densities = [float(s) for s in densities]
  if not densities or densities != sorted(set(densities)) or not 0 < densities[0] <= densities[-1] <= 1:
    raise ValueError(f'densities increase and lie in (0, 1]; got {densities!r}.')

  def of(size: int) -> jax.Array:
    found = [math.floor(s * size + 1e-6) for s in densities]
    if found[0] < 1:
      raise ValueError(f'density {densities[0]:g} keeps less than one of {size} weights.')
    return jnp.array(found, jnp.int32)
  if layerwise:
    return jax.tree.map(lambda x: of(math.prod(jnp.shape(x))), phi)
  return of(sum(math.prod(jnp.shape(x)) for x in jax.tree.leaves(phi)))


# ---- the sparsest mask that is good enough ---------------------------------------------------------------------------


class Found(NamedTuple):
  mask: Tree
  count: Any            # the one that the mask was chosen by: int32 scalar, or a tree of them
  score: jax.Array      # of the mask
  met: jax.Array        # bool. False: not even the densest passes, and the mask is the densest. To be warned of
  scores: jax.Array     # of all that were tried: by `search` in the order of counts, by `search_binary` in that of its steps


def search(evaluate: Evaluate, choose: Choose, counts: Any, dense_score: jax.Array, gamma: float | jax.Array,
           side_by_side: bool = True) -> Found:
  """Lines 6 to 11 of Algorithm 1: from the densest mask to the sparsest, the last before the first whose score is not above γP.

  All candidates are scored in one program, none of them twice, and the walk is over their scores: what it skips is computed and
  not looked at.

      counts = packnet.make_counts(task_masks.shared(memory, phi), [0.05, 0.1, 0.2, 0.4])
      found = packnet.search(
          lambda mask: accuracy(reparam.weights(masks.apply(mask, phi)), held_out),
          lambda count: packnet.efficient_masks(task_masks.shared(memory, phi), count),
          counts, accuracy(reparam.weights(phi), held_out), gamma=0.98)

  Args:
    evaluate: mask → score of φ ∘ M, at least 0; NaN does not pass.
    choose: count → mask.
    counts: int32 [D], increasing, or a tree of them, as `make_counts` makes it.
    dense_score: P, on the same held-out set of the same task.
    gamma: γ in [0, 1], traced or not.
    side_by_side: score all masks in one batch, which holds D copies of the weights; else one after another, which is faster on
      CPUs (RESULTS.md).
  Raises: ValueError when counts have no common length; and where they are known, for those that do not increase, for another γ
    and for a score below 0, of which a share is no bound.
  """
  _check_search(dense_score, gamma)
  lengths = {jnp.shape(x) for x in jax.tree.leaves(counts)}
  if len(lengths) != 1 or len(next(iter(lengths))) != 1 or next(iter(lengths)) == (0,):
    raise ValueError(f'counts are of one length, at least 1, one for each candidate; got the shapes {sorted(lengths)}.')
  for x in jax.tree.leaves(counts):
    if not _traced(x) and (np.diff(np.asarray(x)) < 0).any():
      raise ValueError(f'counts increase; got {np.asarray(x).tolist()}.')
  # A threshold is searched for in a branch, which vmap would take both sides of.
  if side_by_side:
    scores = jax.vmap(evaluate)(lax.map(choose, counts))
  else:
    scores = lax.map(lambda count: evaluate(choose(count)), counts)
  passes = scores > gamma * dense_score
  run = jnp.sum(jnp.cumprod(passes[::-1].astype(jnp.int32)))   # how many pass before the first that does not
  index = scores.shape[0] - jnp.maximum(run, 1)
  count = jax.tree.map(lambda x: x[index], counts)
  return Found(choose(count), count, scores[index], run > 0, scores)


def search_binary(evaluate: Evaluate, choose: Choose, least: Any, most: Any, dense_score: jax.Array, gamma: float | jax.Array,
                  steps: int) -> Found:
  """A count between two by bisection: the sparsest mask that passes, if all denser ones pass as well, in `steps` + 1 evaluations.

    s_0 = most;   s_i = ⌊(lo + hi) / 2⌋ with hi the smallest that passed and lo the largest that did not, at first `least`

  `least` itself is scored only when nothing lies between. Where several leaves have a number each, all are halved at once.

  Args:
    evaluate, choose, dense_score, gamma: as for `search`.
    least, most: integers, traced or not, or trees of them.
    steps: of bisection; each halves the range.
  Raises: ValueError for a negative number of steps; and where they are known, for `least` above `most`, another γ, and a score
    below 0.
  Source: Schwarz et al. 2021, section 4 (a).
  """
  if steps < 0:
    raise ValueError(f'steps is at least 0; got {steps}.')
  _check_search(dense_score, gamma)
  for a, b in zip(jax.tree.leaves(least), jax.tree.leaves(most), strict=True):
    if not _traced(a) and not _traced(b) and int(a) > int(b):
      raise ValueError(f'least is at most most; got {int(a)} and {int(b)}.')
  least, most = (jax.tree.map(lambda x: jnp.asarray(x, jnp.int32), tree) for tree in (least, most))
  first = evaluate(choose(most))
  met = first > gamma * dense_score
  scores = jnp.full((steps + 1,), first)

  def halve(i: Any, carry: Any) -> Any:
    low, high, score, scores = carry
    middle = jax.tree.map(lambda a, b: a + (b - a) // 2, low, high)
    now = evaluate(choose(middle))
    good = met & (now > gamma * dense_score)
    low = jax.tree.map(lambda a, m: jnp.where(good, a, m), low, middle)
    high = jax.tree.map(lambda b, m: jnp.where(good, m, b), high, middle)
    return low, high, jnp.where(good, now, score), scores.at[i + 1].set(now)
  _, count, score, scores = lax.fori_loop(0, steps, halve, (least, most, first, scores))
  return Found(choose(count), count, score, met, scores)


def taylor_change(theta: Tree, grads: Tree, mask: Tree, curvature: Tree = None) -> jax.Array:
  """What removing weights would add to the loss, without evaluating it: its Taylor expansion around all weights, at δ = −θ ∘ ¬M,

    ΔL ≈ Σ g δ + ½ Σ h δ²

  For a search whose candidates cost a sum each and no forward pass. A loss becomes a score of the size of an accuracy as the
  likelihood exp(−L), so that γ bounds its loss, ΔL < −log γ:

      evaluate = lambda mask: jnp.exp(-(loss + packnet.taylor_change(theta, grads, mask, curvature)))
      found = packnet.search(evaluate, choose, counts, jnp.exp(-loss), gamma)

  To be trusted for small removals. To first order alone little is left of it where training has converged and g is about 0: it
  then underestimates, and by how much is measured in tests/test_packnet.py.

  Args:
    theta: weights that the loss is taken at.
    grads: g, the mean gradient of the loss at θ, on the held-out set.
    mask: tree of bool, None for leaves that nothing is removed of.
    curvature: h, the diagonal of the Hessian or the mean of squared gradients of single examples in its place; None: first order.
  Returns: float32 scalar, which may be negative.
  Raises: ValueError for a mask that is not bool and shaped like its weights.
  Source: the first term of a set of weights, squared, is its importance in Molchanov et al. 2019 (arXiv:1906.10771); second order
    with a diagonal Hessian is LeCun et al. 1989, with squared gradients Theis et al. 2018 (arXiv:1801.05787). The paper names a
    Taylor expansion and no order.
  """
  def leaf(path: Any, m: Any, x: jax.Array, g: jax.Array, h: Any) -> jax.Array:
    if m is None:
      return jnp.float32(0)
    check_mask(m, x, path)
    change = -x * g if h is None else -x * g + h * x * x / 2
    return jnp.sum(jnp.where(m, 0, change), dtype=jnp.float32)
  curvature = jax.tree.map(lambda _: None, theta) if curvature is None else curvature
  return jax.tree.reduce(jnp.add, jax.tree_util.tree_map_with_path(leaf, mask, theta, grads, curvature, is_leaf=is_none))


# ---- between two tasks -----------------------------------------------------------------------------------------------


def reinitialise(memory: Memory, phi: Tree, fresh: Tree, how: str = 'fresh') -> Tree:
  """Weights that are free begin anew, as at initialisation: line 13 of Algorithm 1. Protected ones keep their bits.

  Leaves of the tasks' own begin anew as well, whatever `how` says.

  Args:
    memory: with the mask of the task that has ended.
    phi: at its end.
    fresh: Ψ⁻¹(θ) with θ from the initial distribution: `reparam.inverse(net.init(key, x))`, of another key for each task. It
      takes the dtypes of `phi`.
    how: 'fresh'; 'left': free weights go on from where they are, which the authors found slightly worse; 'zero', as PackNet
      leaves them, is a critical point for α > 1: such weights never move again, and no later task can use them.
  Raises: ValueError for another word, and for `fresh` of another structure or shape.
  """
  if how not in ('fresh', 'left', 'zero'):
    raise ValueError(f"how is 'fresh', 'left' or 'zero'; got {how!r}.")

  check_structure('fresh', fresh, 'phi', phi)

  def start(path: Any, x: jax.Array, new: jax.Array, bits: Any) -> jax.Array:
    if jnp.shape(new) != jnp.shape(x):
      raise ValueError(f'fresh has {jnp.shape(new)} where phi has {jnp.shape(x)}, at {leaf_name(path)}.')
    if bits is None or how == 'fresh':
      return new.astype(x.dtype)
    return x if how == 'left' else jnp.zeros_like(x)
  return keep(free(memory, phi), jax.tree_util.tree_map_with_path(start, phi, fresh, memory.bits), phi)


# ---- a task's beginning and end --------------------------------------------------------------------------------------


@jax.jit   # outside a program of the caller's: else every task would compile the loops in them anew
def _look(memory: Memory, tree: Tree) -> tuple[jax.Array, Capacity, Tree]:
  return intact(memory, tree), capacity(memory, tree), free(memory, tree)


def begin_task(tx: optax.GradientTransformation, memory: Memory, phi: Tree, state: Tree = None) -> Any:
  """State of an optimiser that begins anew, with the weights of all tasks that are remembered protected.

      opt_state = packnet.begin_task(tx, memory, phi)

  To be called outside jit: what it looks at are numbers.

  Args:
    tx: with one `protect` in it.
    memory, phi: as the task before has left them.
    state: what Haiku keeps beside the parameters (averages of BatchNorm), where the memory was begun with both of them; it is no
      business of the optimiser.
  Raises: ValueError where there is no room for another task (`task_masks.check_room`), where weights of an earlier one have
    changed (`task_masks.check_intact`), and inside jit.
  """
  if any(_traced(x) for x in jax.tree.leaves((memory, phi, state))):
    raise ValueError('begin_task looks at how much is free, and refuses: call it outside jit.')
  if state is None:
    unchanged, room, may_change = _look(memory, phi)
  else:
    unchanged, room, may_change = _look(memory, hk.data_structures.merge(phi, state))
    may_change = {module: {name: may_change[module][name] for name in leaves} for module, leaves in phi.items()}
  check_intact(unchanged)
  check_room(room)
  return with_free(tx.init(phi), may_change)


class Ended(NamedTuple):
  memory: Memory   # with the task
  phi: Tree        # with which the next task begins
  found: Found     # what was chosen. Where `found.met` is False no mask was good enough, and the densest was kept


def end_task(memory: Memory, task: int | jax.Array, phi: Tree, fresh: Tree, score: Callable[[Tree], jax.Array],
             densities: Sequence[float], gamma: float | jax.Array = 0.98, layerwise: bool = False,
             how: str = 'fresh', side_by_side: bool = True, steps: int | None = None) -> Ended:
  """Lines 5 to 13 of Algorithm 1: the sparsest mask that is good enough is found and remembered, and what is free begins anew.

      ended = packnet.end_task(memory, t, phi, reparam.inverse(net.init(key, x)), score, [0.02, 0.05, 0.1, 0.2, 0.4])

  To be jitted with what `score` closes over as arguments; outside jit it warns where no mask was good enough. Inside jit, too, it
  warns where the slot holds a task, which is replaced, and where weights of earlier tasks have changed: the optimiser's state was
  not that of `begin_task`. Where the task is to be trained on under its mask before it ends, or has PackNet's mask, the parts are
  called one by one.

  Args:
    memory, task: as for `remember`.
    phi: at the end of training on the task.
    fresh, how: as for `reinitialise`.
    score: φ → score on the held-out set of the task, at least 0, the higher the better: `lambda p: accuracy(reparam.weights(p))`.
    densities, layerwise: as for `make_counts`.
    gamma: share of the score of all weights that a mask has to be above.
    side_by_side: as for `search`: False takes the memory of one candidate.
    steps: None: each of the densities is tried. A number: bisection between the first and the last of them, `search_binary`.
  Raises: ValueError as its parts do.
  """
  weights = shared(memory, phi)
  counts = make_counts(weights, densities, layerwise)

  # What is wrong with the rest is said before the search, by tracing it.
  every = jax.tree.map(lambda x: jnp.ones(jnp.shape(x), bool), weights)
  jax.eval_shape(lambda: reinitialise(remember(memory, task, every, phi), phi, fresh, how))

  def evaluate(mask: Tree) -> jax.Array:
    return score(masks.apply(mask, phi))

  def choose(count: Any) -> Tree:
    return efficient_masks(weights, count)
  _warn_of_lost_tasks(memory, task, phi)
  dense = score(phi)
  if steps is None:
    found = search(evaluate, choose, counts, dense, gamma, side_by_side)
  else:
    least, most = (jax.tree.map(lambda k, i=i: k[i], counts) for i in (0, -1))
    found = search_binary(evaluate, choose, least, most, dense, gamma, steps)
  if not _traced(found.met) and not found.met:
    warnings.warn(f'task {task}: even the densest mask scores {float(found.score):.4g}, which is not above gamma={gamma} times '
                  f'the score of all weights, {float(dense):.4g}; it is kept.', stacklevel=2)
  memory = remember(memory, task, found.mask, phi)
  return Ended(memory, reinitialise(memory, phi, fresh, how), found)


def _warn_of_lost_tasks(memory: Memory, task: int | jax.Array, phi: Tree) -> None:
  """Warnings and no errors: a program that runs on a device can raise none."""
  def look(unchanged: Any, here: Any, task: Any) -> None:   # on a thread of JAX's: no line of the caller's is above it
    if 0 <= task < len(here) and here[task]:
      warnings.warn(f'end_task replaces task {task}, which was remembered, and is lost. A task has a slot of its own; one is '
                    'freed by task_masks.forget.', stacklevel=1)
    try:
      check_intact(unchanged)
    except ValueError as error:
      warnings.warn(str(error), stacklevel=1)
  jax.debug.callback(look, intact(memory, phi) | (jnp.arange(memory.here.shape[0]) == task), memory.here, task)


def _check_search(dense_score: Any, gamma: Any) -> None:
  if jnp.shape(dense_score) != ():
    raise ValueError(f'a score is one number; all weights have an array of shape {jnp.shape(dense_score)}.')
  if not _traced(gamma) and not 0 <= float(gamma) <= 1:
    raise ValueError(f'gamma is a share of the dense score, in [0, 1]; got {gamma}.')
  if not _traced(dense_score) and not float(dense_score) >= 0:
    raise ValueError(f'scores are at least 0, the higher the better; all weights have {float(dense_score):g}.'
                     + (' Is the held-out set empty, or has training diverged?' if np.isnan(dense_score) else ''))


def _traced(x: Any) -> bool:
  return isinstance(x, jax.core.Tracer)


def _one(count: Any) -> bool:
  return jax.tree_util.treedef_is_leaf(jax.tree.structure(count))

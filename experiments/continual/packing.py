"""PackNet and EfficientPackNet as methods: powerprop.packnet, on the outputs, data and networks of the protocol.

Outputs of a task's own are columns of one layer, which only that task may change; all other weights are shared by masks.
"""
from collections.abc import Callable
from typing import Any, NamedTuple

import haiku as hk
import jax
import jax.numpy as jnp
import optax

import powerprop
from experiments import train
from experiments.continual.problem import Method, Nets, Problem, State, fresh, hits, optimizer
from experiments.data import tasks
from experiments.errors import UserError
from experiments.train import is_convolutional
from powerprop import packnet, task_inference, task_masks
from powerprop.masks import is_none
from powerprop.reparam import Tree

ESTIMATE = 9   # stream of randomness: images that a mask's loss is estimated on


class Packed(NamedTuple):
  tasks: task_masks.Memory
  forward: Tree      # bool: what the network sees in training; None for leaves without masks
  score: jax.Array   # float32 [T]: validation accuracy with the mask, when it was chosen; NaN: none was measured
  dense: jax.Array   # float32 [T]: with all weights, just before
  met: jax.Array     # bool [T]: did a mask pass?
  left: jax.Array    # int32: weights that were free when the task began


def packing(efficient: bool) -> Method:
  """PackNet: `continual.share` of each layer for every task, in `continual.prune_rounds` rounds (Mallya and Lazebnik 2018,
  arXiv:1711.05769); differs from theirs in what becomes of free weights, by default: they begin anew, where theirs stay 0
  (`continual.reinitialise`). EfficientPackNet: Algorithm 1 of Schwarz et al. 2021 (arXiv:2110.00296)."""
  def memory(p, phi, net_state):
    tree, size = body(p, phi, net_state), p.heads.tasks
    begun = task_masks.begin(tree, size, rest=p.config.continual.rest)
    if efficient:   # now, and not when the first task has been trained on
      counts_of(p, task_masks.shared(begun, tree))
    unknown = jnp.full(size, jnp.nan)
    return Packed(begun, everything(begun, tree), unknown, unknown, jnp.ones(size, bool),
                  task_masks.capacity(begun, tree).left)

  def prune(p, n, s, task, number):
    if not efficient:
      return under(p, s, task, chosen_by_share(p, s, number))
    # There is one search, however many rounds PackNet has.
    return jax.lax.cond(number == 0, lambda s: searched(p, n, s, task), lambda s: s, s)

  return Method(memory=memory, wrap=powerprop.protect, start=lambda p, n, s: with_free(p, s, 0, s.trained.opt_state),
                seen=lambda memory, theta: apply(memory.forward, theta), prune=prune, consolidate=consolidate, switch=switch,
                recall=recall, infer=inferred, separate=True, packs=True, bytes_kept=bytes_kept)


# ---- the tree that masks are of -------------------------------------------------------------------------------------


def body(p: Problem, phi: Tree, net_state: Tree) -> Tree:
  """What tasks share: parameters but for outputs of a task's own, and the running averages of BatchNorm."""
  own = head(p, phi)
  return hk.data_structures.merge({name: leaves for name, leaves in phi.items() if name not in own}, net_state)


def head(p: Problem, phi: Tree) -> Tree:
  """The output layer, where tasks have outputs of their own."""
  name = p.output_layer.rpartition('/')[0]
  return {} if p.heads.scenario == 'domain' else {name: phi[name]}


def parts(p: Problem, tree: Tree, s: State) -> tuple[Tree, Tree]:
  """φ and state of the network, of a `body`; outputs are those of `s`."""
  phi, net_state = s.trained.phi, s.trained.net_state
  own = head(p, phi)
  def taken(like: Tree) -> Tree:   # a module may have leaves in both
    return {name: {leaf: tree[name][leaf] for leaf in leaves} for name, leaves in like.items() if name not in own}
  return hk.data_structures.merge(taken(phi), own), taken(net_state)


def everything(memory: task_masks.Memory, tree: Tree) -> Tree:
  return jax.tree.map(lambda x: None if x is None else jnp.ones(jnp.shape(x), bool), task_masks.shared(memory, tree),
                      is_leaf=is_none)


def apply(forward: Tree, theta: Tree) -> Tree:
  """θ as the network sees it; `forward` lacks the outputs of tasks, and θ the statistics of BatchNorm."""
  return {name: {leaf: x if forward.get(name, {}).get(leaf) is None else jnp.where(forward[name][leaf], x, 0)
                 for leaf, x in leaves.items()} for name, leaves in theta.items()}


# ---- what is free ---------------------------------------------------------------------------------------------------


def with_free(p: Problem, s: State, task: Any, opt_state: Any) -> State:
  """The state with what `task` may change: what no task uses and the network sees, and the task's outputs."""
  phi, memory = s.trained.phi, s.memory
  free = task_masks.free(memory.tasks, body(p, phi, s.trained.net_state))
  free = jax.tree.map(lambda seen, f: f if seen is None else seen & f, memory.forward, free, is_leaf=is_none)
  columns = jax.tree.map(lambda x: jnp.broadcast_to(jnp.arange(x.shape[-1]) // p.heads.classes == task, x.shape), head(p, phi))
  free = {name: (columns if name in columns else free)[name] for name in phi}
  return s._replace(trained=s.trained._replace(opt_state=powerprop.with_free(opt_state, free)))


# ---- the mask of a task ---------------------------------------------------------------------------------------------


def chosen_by_share(p: Problem, s: State, number: Any) -> Packed:
  """PackNet's mask after a round."""
  wanted, memory = p.config.continual, s.memory
  tree = body(p, s.trained.phi, s.trained.net_state)
  weights, free = task_masks.shared(memory.tasks, tree), task_masks.free(memory.tasks, tree)
  counts = packnet.packnet_counts(weights, free, wanted.share or 1 / p.heads.tasks, number, wanted.prune_rounds, memory.forward)
  return memory._replace(forward=packnet.packnet_masks(weights, free, counts, memory.forward))


def searched(p: Problem, n: Nets, s: State, task: Any) -> State:
  """EfficientPackNet's: the sparsest of the largest |φ| of all whose validation accuracy, or estimated likelihood, is above γ
  times the dense one."""
  wanted, memory = p.config.continual, s.memory
  phi, net_state = s.trained.phi, s.trained.net_state
  weights = task_masks.shared(memory.tasks, body(p, phi, net_state))
  theta, part = p.group.reparam.weights(phi), p.parts['validation']

  def accuracy(mask):
    right = hits(p, apply(mask, theta), net_state, 'validation', task, task)[0]
    return right / part.counts[task % len(part.counts)]

  def choose(count):
    return packnet.efficient_masks(weights, count)
  dense, counts = accuracy(memory.forward), counts_of(p, weights)
  score, best = (accuracy, dense) if wanted.estimate == 'accuracy' else likelihood(p, n, s, task)
  if wanted.search == 'binary':
    least, most = (jax.tree.map(lambda k, i=i: k[i], counts) for i in (0, -1))
    found = packnet.search_binary(score, choose, least, most, best, wanted.gamma, wanted.search_steps)
  else:
    found = packnet.search(score, choose, counts, best, wanted.gamma, side_by_side=not is_convolutional(phi))
  # An estimate may choose a mask that is not good enough: that is told by the accuracy in any case.
  reached, met = (found.score, found.met) if wanted.estimate == 'accuracy' else (accuracy(found.mask), None)
  met = reached > wanted.gamma * dense if met is None else met
  return under(p, s, task, memory._replace(forward=found.mask, score=memory.score.at[task].set(reached),
                                           dense=memory.dense.at[task].set(dense), met=memory.met.at[task].set(met)))


def counts_of(p: Problem, weights: Tree) -> Any:
  """How many weights each candidate keeps. Raises: UserError where that is none of a layer."""
  try:
    return packnet.make_counts(weights, p.config.continual.densities, p.config.continual.layerwise)
  except ValueError as error:
    raise UserError(f'config.continual.densities: {error}') from None


def likelihood(p: Problem, n: Nets, s: State, task: Any) -> tuple[Callable[[Tree], jax.Array], jax.Array]:
  """mask → exp(−L) by a Taylor expansion of the mean loss L around all weights, and exp(−L) there: no candidate is evaluated.

  Over `continual.fisher_images` validation images, drawn at random; the squared gradient of each stands for the curvature.
  """
  phi, net_state = s.trained.phi, s.trained.net_state
  theta, part, count = p.group.reparam.weights(phi), p.parts['validation'], p.config.continual.fisher_images
  positions = jax.random.randint(jax.random.fold_in(train.stream(n.seed, ESTIMATE), task), (count,), 0,
                                 part.counts[task % len(part.counts)])
  images, labels = tasks.take(part, p.pixels, task, positions)

  def loss_of(theta, image, label):
    logits, _ = p.net.apply(theta, net_state, None, train.pixels(image[None]), False)
    return optax.softmax_cross_entropy_with_integer_labels(p.heads.among(logits, task, task, 'task'),
                                                           p.heads.labels(label[None], task))[0]

  def add_one(i, total):
    loss, g = jax.value_and_grad(loss_of)(theta, images[i], labels[i])
    return jax.tree.map(jnp.add, total, (loss, g, jax.tree.map(jnp.square, g)))
  zeros = jax.tree.map(jnp.zeros_like, theta)
  total = jax.lax.fori_loop(0, count, add_one, (jnp.float32(0), zeros, zeros))
  loss, *expansion = jax.tree.map(lambda x: x / count, total)
  at, g, h = (body(p, tree, net_state) for tree in (theta, *expansion))
  return lambda mask: jnp.exp(-loss - packnet.taylor_change(at, g, mask, h)), jnp.exp(-loss)


def under(p: Problem, s: State, task: Any, memory: Packed) -> State:
  """The state with that mask: the rest of the task is for training under it."""
  return with_free(p, s._replace(memory=memory), task, s.trained.opt_state)


# ---- between tasks --------------------------------------------------------------------------------------------------


def consolidate(p: Problem, n: Nets, s: State, task: Any) -> State:
  memory, tree = s.memory, body(p, s.trained.phi, s.trained.net_state)
  return s._replace(memory=memory._replace(tasks=task_masks.remember(memory.tasks, task, memory.forward, tree)))


def switch(p: Problem, n: Nets, s: State, task: Any) -> State:
  """Line 13 of Algorithm 1, and the optimiser for the next task."""
  memory, tree = s.memory, body(p, s.trained.phi, s.trained.net_state)
  anew = packnet.reinitialise(memory.tasks, tree, body(p, *fresh(p, n, task)), p.config.continual.reinitialise)
  phi, net_state = parts(p, anew, s)
  opt_state = optimizer(p, n).init(phi) if p.config.continual.restart else s.trained.opt_state
  memory = memory._replace(forward=everything(memory.tasks, tree), left=task_masks.capacity(memory.tasks, tree).left)
  s = State(train.TrainState(phi, opt_state, net_state), memory, s.record)
  return with_free(p, s, task, opt_state)


def recall(p: Problem, s: State, task: Any) -> tuple[Tree, Tree]:
  tree = task_masks.recall(s.memory.tasks, task, body(p, s.trained.phi, s.trained.net_state))
  phi, net_state = parts(p, tree, s)
  return p.group.reparam.weights(phi), net_state


def inferred(p: Problem, s: State, task: Any) -> jax.Array:
  """Of the first `continual.inferred_images` test images of a task: how many are put into their class under the mask that makes
  outputs most certain, and for how many that is the task's; and is the task found from all of them together by SupSup's one
  gradient step? −1 where outputs are not shared. int32 [3]."""
  part, size = p.parts['test'], p.heads.tasks
  count = jnp.minimum(part.counts[task % len(part.counts)], p.config.continual.inferred_images)
  positions = jnp.arange(min(part.rows.shape[1], p.config.continual.inferred_images))
  images, labels = tasks.take(part, p.pixels, task, positions)

  def under_mask(t):
    theta, net_state = recall(p, s, t)
    logits = p.net.apply(theta, net_state, None, train.pixels(images), False)[0]
    own = 0 if p.heads.scenario == 'domain' else t * p.heads.classes
    return jax.lax.dynamic_slice_in_dim(logits, own, p.heads.classes, axis=1)
  logits = jax.lax.map(under_mask, jnp.arange(size))
  guess = task_inference.infer_by_entropy(logits, s.memory.tasks.here).task
  chosen = jnp.take_along_axis(logits, guess[None, :, None], 0)[0]
  right = (jnp.argmax(chosen, 1) == labels) & (guess >= 0)
  if p.heads.scenario != 'domain':   # the same place among the outputs of another task is another class
    right &= guess == task
  found = jnp.sum(jnp.stack([right, guess == task]) & (positions < count)[None], 1, dtype=jnp.int32)
  return jnp.append(found, by_gradient(p, s, images) == task if p.heads.scenario == 'domain' else -1)


def by_gradient(p: Problem, s: State, images: jax.Array) -> jax.Array:
  """The task that these images [B, H, W, C] are of, where tasks share the outputs."""
  def weights(tree: Tree) -> Tree:
    phi, net_state = parts(p, tree, s)
    return body(p, p.group.reparam.weights(phi), net_state)

  def logits(tree: Tree) -> jax.Array:
    theta, net_state = parts(p, tree, s)
    return p.net.apply(theta, net_state, None, train.pixels(images), False)[0]
  tree = body(p, s.trained.phi, s.trained.net_state)
  return task_inference.infer_by_gradient(logits, s.memory.tasks, tree, weights).task


def bytes_kept(p: Problem, s: State, image: int) -> float:
  """Masks, and leaves of the tasks' own."""
  return float(sum(x.size * x.dtype.itemsize for x in jax.tree.leaves((s.memory.tasks.bits, s.memory.tasks.own))))

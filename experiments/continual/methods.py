"""Ways to learn task after task: each a few functions, called inside the compiled programs of programs.py.

  fine_tune                 nothing is done about forgetting
  separate                  a network for each task
  joint                     batches of all tasks so far
  ewc, ewc_online           a quadratic pull towards earlier weights, as strong as the Fisher information of each
  synaptic_intelligence     the same, as strong as each weight's part in the falling of the loss
  replay                    half of what is learned from, from a reservoir of earlier images
  a_gem                     gradients that would raise the loss on such a reservoir are projected
  packnet, efficient_packnet   a mask for each task: packing.py

All of them see the weights θ, whatever the parameters φ. A pull's strength is `sweep.penalty`.
"""
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from experiments import train
from experiments.augment import AUGMENTATIONS
from experiments.continual.packing import packing
from experiments.continual.problem import Method, Nets, Problem, State, fresh, loss_and_gradient, optimizer
from experiments.data import tasks
from powerprop.reparam import Tree

MEMORY, FISHER = 5, 6   # streams of randomness: what is kept of earlier images, and those that the Fisher information is of


# ---- separate networks ----------------------------------------------------------------------------------------------


def _another(p: Problem, n: Nets, s: State, task: Any) -> State:
  phi, net_state = fresh(p, n, task)
  return s._replace(trained=train.TrainState(phi, optimizer(p, n).init(phi), net_state))


# ---- pulls: EWC and Synaptic Intelligence ---------------------------------------------------------------------------


class Anchor(NamedTuple):
  """A penalty ½ Σ strength · (θ − centre)²."""
  strength: Tree
  centre: Tree


def add(anchor: Anchor, strength: Tree, centre: Tree) -> Anchor:
  """The sum of two such penalties, but for a constant: strengths add up, the centre is their weighted mean.

  So the penalties of all tasks are kept in two copies of the weights, however many they are.
  """
  total = jax.tree.map(jnp.add, anchor.strength, strength)
  def mean(t, a, c, new, x):
    return jnp.where(t > 0, c + new / jnp.where(t > 0, t, 1) * (x - c), x)
  return Anchor(total, jax.tree.map(mean, total, anchor.strength, anchor.centre, strength, centre))


def pull(anchor: Anchor, theta: Tree, strength: Any, g: Tree) -> Tree:
  """g + strength · ∂penalty/∂θ."""
  return jax.tree.map(lambda g, a, c, x: g + strength * a * (x - c), g, anchor.strength, anchor.centre, theta)


def _two_copies(p: Problem, s: State, image: int) -> float:
  return 2.0 * _bytes(s.trained.phi)


def _bytes(tree: Tree) -> int:
  return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(tree))


def _other_networks(p: Problem, s: State, image: int) -> float:
  return float(_bytes((s.trained.phi, s.trained.net_state)) * (p.heads.tasks - 1))


def _images(p: Problem) -> int:
  counts = np.asarray(p.parts['train'].counts)
  return int(counts.sum()) * p.heads.tasks // len(counts)


def _no_anchor(theta: Tree) -> Anchor:
  return Anchor(jax.tree.map(jnp.zeros_like, theta), theta)


def fisher(p: Problem, n: Nets, theta: Tree, net_state: Tree, task: Any) -> Tree:
  """Diagonal of the Fisher information, F = E_x Σ_y p(y|x) (∂ log p(y|x) / ∂θ)², over `continual.fisher_images` training images
  of the task; the sum over classes is exact, no label is drawn."""
  part, count = p.parts['train'], p.config.continual.fisher_images
  positions = jax.random.randint(jax.random.fold_in(train.stream(n.seed, FISHER), task), (count,), 0,
                                 part.counts[task % len(part.counts)])
  images, _ = tasks.take(part, p.pixels, task, positions)
  first = 0 if p.heads.scenario == 'domain' else p.heads.classes * task
  width = p.heads.units if p.heads.scenario == 'class' else p.heads.classes   # classes that compete with those of the task

  def log_p(theta, image):
    logits = p.net.apply(theta, net_state, None, train.pixels(image[None]), False)[0]
    found = jax.nn.log_softmax(p.heads.among(logits, task, task))[0]
    return found if width == p.heads.units else jax.lax.dynamic_slice_in_dim(found, first, width)

  def add_one(i, total):
    image, y = images[i // width], i % width
    value, g = jax.value_and_grad(lambda t: log_p(t, image)[y])(theta)
    share = jnp.where(jnp.isfinite(value), jnp.exp(value), 0)
    return jax.tree.map(lambda t, g: t + jnp.where(share > 0, share * jnp.square(g), 0), total, g)
  total = jax.lax.fori_loop(0, count * width, add_one, jax.tree.map(jnp.zeros_like, theta))
  return jax.tree.map(lambda x: x / count, total)


def _ewc(online: bool) -> Method:
  """½ λ Σ_t Σ F_t (θ − θ_t)², a penalty for each task (Kirkpatrick et al. 2017, arXiv:1612.00796); online: one penalty around the
  latest weights, F decayed by `continual.ewc_decay` at each task (Schwarz et al. 2018, arXiv:1805.06370)."""
  def consolidate(p, n, s, task):
    theta = p.group.reparam.weights(s.trained.phi)
    found = fisher(p, n, theta, s.trained.net_state, task)
    if online:
      decay = p.config.continual.ewc_decay
      return s._replace(memory=Anchor(jax.tree.map(lambda a, f: decay * a + f, s.memory.strength, found), theta))
    return s._replace(memory=add(s.memory, found, theta))
  return Method(memory=lambda p, phi, net_state: _no_anchor(p.group.reparam.weights(phi)), consolidate=consolidate, pulls=True,
                gradient=lambda p, n, s, theta, g, task, key: pull(s.memory, theta, n.penalty, g),
                bytes_kept=_two_copies)


class Path(NamedTuple):
  anchor: Anchor
  begun: Tree   # θ at the beginning of the task
  work: Tree    # −Σ g Δθ since then


def _si() -> Method:
  """Ω += max(0, ω) / (Δ² + ξ) with ω = −Σ g Δθ along the task and Δ its whole change; penalty c Σ Ω (θ − θ*)². g is the
  gradient of the loss without the penalty. Source: Zenke et al. 2017 (arXiv:1703.04200); the maximum is that of their code."""
  def after(memory, before, now, g):
    return memory._replace(work=jax.tree.map(lambda w, g, a, b: w - g * (b - a), memory.work, g, before, now))

  def consolidate(p, n, s, task):
    theta, damping = p.group.reparam.weights(s.trained.phi), p.config.continual.damping
    found = jax.tree.map(lambda o, w, a, b: o + jnp.maximum(w, 0) / (jnp.square(b - a) + damping),
                  s.memory.anchor.strength, s.memory.work, s.memory.begun, theta)
    return s._replace(memory=Path(Anchor(found, theta), theta, jax.tree.map(jnp.zeros_like, theta)))
  def begin(theta):
    return Path(_no_anchor(theta), theta, jax.tree.map(jnp.zeros_like, theta))
  return Method(memory=lambda p, phi, net_state: begin(p.group.reparam.weights(phi)), after=after,
                consolidate=consolidate, pulls=True,
                gradient=lambda p, n, s, theta, g, task, key: pull(s.memory.anchor, theta, 2 * n.penalty, g),
                bytes_kept=_two_copies)   # the path itself is gone between tasks


# ---- a reservoir: replay and A-GEM ----------------------------------------------------------------------------------


class Reservoir(NamedTuple):
  """Images kept, as task and position in its training set: [M]. A place that is empty has the rank ∞."""
  rank: Any
  task: Any
  position: Any


def keep_some(memory: Reservoir, ranks: jax.Array, task: Any) -> Reservoir:
  """What is kept after images of ranks [N] have come by: the M of smallest rank. With independent uniform ranks that is a uniform
  sample without replacement of all images so far, as by algorithm R (Vitter 1985), and no order of theirs matters."""
  joined = Reservoir(jnp.concatenate([memory.rank, ranks]),
                     jnp.concatenate([memory.task, jnp.full(ranks.shape, task, jnp.int32)]),
                     jnp.concatenate([memory.position, jnp.arange(ranks.size, dtype=jnp.int32)]))
  _, chosen = jax.lax.top_k(-joined.rank, memory.rank.size)
  return Reservoir(*(x[chosen] for x in joined))


def _remember(p: Problem, n: Nets, s: State, task: Any) -> State:
  part = p.parts['train']
  ranks = jax.random.uniform(jax.random.fold_in(train.stream(n.seed, MEMORY), task), part.rows.shape[1:])
  real = jnp.arange(ranks.size) < part.counts[task % len(part.counts)]
  return s._replace(memory=keep_some(s.memory, jnp.where(real, ranks, jnp.inf), task))


def _memory_gradient(p: Problem, s: State, theta: Tree, task: Any, key: Any) -> tuple[Tree, jax.Array]:
  """Gradient of the loss on as many images of the reservoir as a batch has, and whether there are any."""
  held = jnp.sum(jnp.isfinite(s.memory.rank))
  pick = jax.random.randint(key, (p.config.batch_size,), 0, jnp.maximum(held, 1))   # the smallest ranks are in front
  own = s.memory.task[pick]
  images, labels = tasks.take_each(p.parts['train'], p.pixels, own, s.memory.position[pick])
  images = AUGMENTATIONS[p.config.augment](jax.random.fold_in(key, 1), images)
  return loss_and_gradient(p, theta, s.trained.net_state, images, labels, own, task)[0], held > 0


def project(g: Tree, reference: Tree) -> Tree:
  """g, or where g · r < 0 what is left of it at right angles to r: g − (g · r / r · r) r."""
  def dot(a, b):
    return sum(jax.tree.leaves(jax.tree.map(lambda x, y: jnp.sum(x * y), a, b)))
  along, length = dot(g, reference), dot(reference, reference)
  share = jnp.where((along < 0) & (length > 0), along / jnp.where(length > 0, length, 1), 0)
  return jax.tree.map(lambda x, r: x - share * r, g, reference)


def _with_reservoir(change: Callable[[Tree, Tree, jax.Array], Tree]) -> Method:
  def gradient(p, n, s, theta, g, task, key):
    own, any_held = _memory_gradient(p, s, theta, task, key)
    return change(g, own, any_held)

  def memory(p, phi, net_state):
    size = p.config.continual.memory_images
    return Reservoir(jnp.full(size, jnp.inf), jnp.zeros(size, jnp.int32), jnp.zeros(size, jnp.int32))
  return Method(memory=memory, gradient=gradient, consolidate=_remember, gradients=2.0,
                bytes_kept=lambda p, s, image: p.config.continual.memory_images * (image + 2.0))   # its label and task


def _replay(g: Tree, own: Tree, held: jax.Array) -> Tree:
  """The mean over both halves. Source: Chaudhry et al. 2019 (arXiv:1902.10486)."""
  return jax.tree.map(lambda a, b: jnp.where(held, (a + b) / 2, a), g, own)


def _a_gem(g: Tree, own: Tree, held: jax.Array) -> Tree:
  """Source: Chaudhry et al. 2019 (arXiv:1812.00420)."""
  return project(g, jax.tree.map(lambda x: jnp.where(held, x, 0), own))


METHODS: dict[str, Method] = {
    'fine_tune': Method(),
    'separate': Method(switch=_another, separate=True, bytes_kept=_other_networks),
    'joint': Method(all_tasks=True, bytes_kept=lambda p, s, image: (image + 2.0) * _images(p)),
    'ewc': _ewc(online=False),
    'ewc_online': _ewc(online=True),
    'synaptic_intelligence': _si(),
    'replay': _with_reservoir(_replay),
    'a_gem': _with_reservoir(_a_gem),
    'packnet': packing(efficient=False),
    'efficient_packnet': packing(efficient=True),
}

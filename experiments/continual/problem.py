"""What a method of continual learning is, and what it is given: outputs, data, networks."""
from collections.abc import Callable
from typing import Any, NamedTuple

import haiku as hk
import jax
import jax.numpy as jnp
import ml_collections
import optax

from experiments import train
from experiments.data import tasks
from powerprop.reparam import Tree

IMAGES_AT_ONCE = 1000   # as in experiments.evaluate


class Heads(NamedTuple):
  """How the outputs of the network stand for the K classes of each of the T tasks. In training it is told which task an image is
  of, in testing with 'task' alone (van de Ven and Tolias 2019, arXiv:1904.07734).

    domain   K outputs, those of all tasks
    task     K outputs for each task, one after another; the others have no part in it
    class    the same, and the outputs of all tasks so far compete
  """
  scenario: str
  classes: int
  tasks: int

  @property
  def units(self) -> int:
    return self.classes * (1 if self.scenario == 'domain' else self.tasks)

  def labels(self, labels: Any, task: Any) -> Any:
    """The outputs that stand for classes [B] of a task, or of one each."""
    return labels if self.scenario == 'domain' else labels + self.classes * task

  def headline(self, found: Any) -> Any:
    """What the scenario measures, of what `hits` has found [2]."""
    return found[1 if self.scenario == 'class' else 0]

  def among(self, logits: jax.Array, task: Any, latest: Any, scenario: str | None = None) -> jax.Array:
    """Logits [B, U], −∞ where an output has no part. `task`: a scalar or [B]; `latest`: the last of the tasks so far."""
    if self.scenario == 'domain':
      return logits
    of = (jnp.arange(self.units) // self.classes)[None]
    own = jnp.broadcast_to(task, logits.shape[:1])[:, None]
    return jnp.where(of <= latest if (scenario or self.scenario) == 'class' else of == own, logits, -jnp.inf)


class Nets(NamedTuple):
  """What tells one network of a group from the others, as train.Nets has it. `penalty`: strength of a pull."""
  seed: Any
  learning_rate: Any
  penalty: Any


class Record(NamedTuple):
  """What was measured of one network: int32, images put into their class, −1 where that was not looked at. Line 0 of a matrix is
  before the first task, line t + 1 after task t."""
  told: Any         # [T + 1, T], with the outputs of the image's own task
  among_all: Any    # [T + 1, T], with the outputs of all tasks so far
  validation: Any   # [T], after the last task, with outputs as the scenario has them
  inferred: Any     # [T], after the last task, with the mask inferred from each image alone; of networks with masks
  found: Any        # [T], images whose task was the one inferred
  by_gradient: Any  # [T], 1 where it was inferred from all of them together by one gradient step


class State(NamedTuple):
  """One network."""
  trained: train.TrainState
  memory: Any        # the method's
  record: Record


class Method(NamedTuple):
  """What is done where; p: Problem, n: Nets, s: State. By default nothing."""
  memory: Callable[..., Any] = lambda p, phi, net_state: ()        # before the first task
  wrap: Callable[[optax.GradientTransformation], optax.GradientTransformation] = lambda chain: chain
  start: Callable[..., State] | None = None      # (p, n, s) → s, before the first task
  all_tasks: bool = False                                          # batches are of all tasks so far
  seen: Callable[..., Tree] = lambda memory, theta: theta          # what the network sees in training
  gradient: Callable[..., Tree] | None = None    # (p, n, s, θ, g, task, key) → g, at each step
  after: Callable[..., Any] | None = None        # (memory, θ before, θ after, gradient of the loss) → memory, at each step
  prune: Callable[..., State] | None = None      # (p, n, s, task, round) → s, in the middle of a task
  consolidate: Callable[..., State] | None = None    # (p, n, s, task) → s, at its end; then comes the measuring, then
  switch: Callable[..., State] | None = None     # (p, n, s, next task) → s; None: the optimiser begins anew, if it is to
  recall: Callable[..., tuple[Tree, Tree]] | None = None   # (p, s, task) → θ and state of the network on a task it has learned
  infer: Callable[..., jax.Array] | None = None   # (p, s, task) → what Record has of tasks that are not told [3]
  separate: bool = False   # what was learned stays as it is, and of tasks to come nothing is known
  pulls: bool = False      # does it want a strength?
  packs: bool = False      # does it keep masks?
  gradients: float = 1.0   # operations of a training step, in those of a plain one; of methods without masks
  bytes_kept: Callable[..., float] = lambda p, s, image: 0.0   # for all tasks, beside the network; s: shapes, bytes of an image


class Problem(NamedTuple):
  """What a method is given of its group. Data are arguments of the programs, all else is static."""
  config: ml_collections.ConfigDict
  net: hk.TransformedWithState
  group: train.Group
  method: Method
  heads: Heads
  output_layer: str        # name of its weights
  batch_norm: bool
  parts: dict[str, tasks.Part]
  pixels: Any


def loss_and_gradient(p: Problem, theta: Tree, net_state: Tree, images: jax.Array, labels: jax.Array, task: Any,
                      latest: Any) -> tuple[Tree, jax.Array, Tree]:
  """Gradient, loss and state of the network, of images uint8 [B, H, W, C] with labels [B] of one task, or of a task [B] each."""
  frozen = p.batch_norm and p.method.packs and p.config.continual.rest == 'frozen'

  def loss_fn(theta):
    def logits_of(training):
      return p.net.apply(theta, net_state, None, train.pixels(images), training)
    # Statistics of BatchNorm that are frozen are those that the network uses, from the second task on.
    logits, new = jax.lax.cond(latest > 0, lambda: logits_of(False), lambda: logits_of(True)) if frozen else logits_of(True)
    entropy = optax.softmax_cross_entropy_with_integer_labels(p.heads.among(logits, task, latest), p.heads.labels(labels, task))
    return entropy.mean(), new
  (loss, net_state), grads = jax.value_and_grad(loss_fn, has_aux=True)(theta)
  return grads, loss, net_state


def recall(p: Problem, s: State, task: Any) -> tuple[Tree, Tree]:
  """θ and state of the network on a task that it has learned."""
  if p.method.recall:
    return p.method.recall(p, s, task)
  return p.group.reparam.weights(s.trained.phi), s.trained.net_state


def optimizer(p: Problem, n: Nets) -> optax.GradientTransformation:
  return p.group.optimizer(n.learning_rate, None, None)


def fresh(p: Problem, n: Nets, task: Any) -> tuple[Tree, Tree]:
  """φ and state of a network as it begins, another one for each task."""
  shape = (1, *p.parts['train'].images.shape[1:])
  theta, net_state = p.net.init(jax.random.fold_in(train.init_key(n.seed), task), jnp.zeros(shape), True)
  return p.group.reparam.inverse(theta), net_state


def hits(p: Problem, theta: Tree, net_state: Tree, name: str, task: Any, latest: Any) -> jax.Array:
  """How many images of a task, in the part `name`, are put into their class: int32 [2], exact. With the task's own outputs, and
  with those of all tasks up to `latest`."""
  part = p.parts[name]
  length, count = part.rows.shape[1], part.counts[task % len(part.counts)]
  size = min(length, IMAGES_AT_ONCE)

  def add(i, total):
    positions = i * size + jnp.arange(size)
    images, labels = tasks.take(part, p.pixels, task, jnp.minimum(positions, length - 1))
    logits, _ = p.net.apply(theta, net_state, None, train.pixels(images), False)
    right = [jnp.argmax(p.heads.among(logits, task, latest, scenario), 1) == p.heads.labels(labels, task)
             for scenario in ('task', 'class')]
    return total + jnp.sum(jnp.stack(right) & (positions < count)[None], 1, dtype=jnp.int32)
  return jax.lax.fori_loop(0, -(-count // size), add, jnp.zeros(2, jnp.int32))

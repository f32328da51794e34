"""The compiled programs of the protocol, each of all networks at once. Tasks, steps and data are arguments: from the second task
on nothing is compiled.

Networks lie on the devices as in experiments.train: a group for each method and α, its networks dealt out to the devices.
"""
import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, PartitionSpec

from experiments import train
from experiments.augment import AUGMENTATIONS
from experiments.continual.problem import Nets, Problem, Record, State, hits, loss_and_gradient, optimizer, recall
from experiments.data import tasks

DRAWS, TASKS = 7, 8   # streams of randomness: what a method draws at a step, and the tasks of a batch of several


class Data(NamedTuple):
  """On every device."""
  parts: dict[str, tasks.Part]
  pixels: Any


class Programs(NamedTuple):
  """Each takes and gives the states of all groups, leaves [n·S, ...], and is compiled once."""
  init: Callable[..., Any]          # (θ0, network states, data) by network → states
  epoch: Callable[..., Any]         # (states, data, task, epoch, first, last) → states, losses [n·S] of each group
  prune: Callable[..., Any]         # (states, data, task, round) → states
  consolidate: Callable[..., Any]   # (states, data, task) → states
  measure: Callable[..., Any]       # (states, data, task, whole, last) → states; task −1: before the first
  switch: Callable[..., Any]        # (states, data, next task) → states


def make(problems: Sequence[Problem], slots: Sequence[train.Slots], mesh: Mesh) -> Programs:
  """`problems`: one for each group, without their data."""
  def over_nets(f: Callable[..., Any]) -> Callable[..., Any]:
    return _over_nets(f, problems, slots, mesh)
  return Programs(make_init(problems, slots, mesh), *(over_nets(f) for f in (epoch, prune, consolidate, measure, switch)))


def _over_nets(f: Callable[..., Any], problems: Sequence[Problem], slots: Sequence[train.Slots],
               mesh: Mesh) -> Callable[..., Any]:
  """The program of `f`(problem, nets, state, ...) of one network, for all of them. States are overwritten."""
  def every(states, nets, counts, data, *args):
    out = []
    for problem, state, n, count in zip(problems, states, nets, counts, strict=True):
      p = problem._replace(parts=data.parts, pixels=data.pixels)
      def one(s, seed, rate, penalty, p=p):
        return f(p, Nets(seed, rate, penalty), s, *args)
      together = train.side_by_side(state.trained.phi, mesh)
      out.append(jax.vmap(one)(state, *n) if together else train.each(one, count[0], state, *n))
    return out

  mapped, whole = PartitionSpec(train.NETS), PartitionSpec()
  @functools.partial(jax.jit, donate_argnums=0)
  def program(states, nets, counts, data, *args):
    specs = (mapped, mapped, mapped, whole, *(whole for _ in args))
    return jax.shard_map(every, mesh=mesh, in_specs=specs, out_specs=mapped, check_vma=False)(states, nets, counts, data, *args)

  nets, counts = [s.nets for s in slots], [s.number for s in slots]
  return lambda states, data, *args: program(states, nets, counts, data, *args)


def make_init(problems: Sequence[Problem], slots: Sequence[train.Slots], mesh: Mesh) -> Callable[..., list[State]]:
  def init(theta0, net_states, data):
    def one(p, theta, net_state, seed, rate, penalty):
      n = Nets(seed, rate, penalty)
      phi = p.group.reparam.inverse(theta)
      size = p.heads.tasks
      unknown = jnp.full((size + 1, size), -1, jnp.int32)
      record = Record(unknown, unknown, *(jnp.full(size, -1, jnp.int32),) * 4)
      s = State(train.TrainState(phi, optimizer(p, n).init(phi), net_state), p.method.memory(p, phi, net_state), record)
      return p.method.start(p, n, s) if p.method.start else s
    out = []
    for problem, slot in zip(problems, slots, strict=True):
      p = problem._replace(parts=data.parts, pixels=data.pixels)
      theta, net_state = jax.tree.map(lambda x, s=slot: x[s.source], (theta0, net_states))
      out.append(jax.vmap(functools.partial(one, p))(theta, net_state, *slot.nets))
    return out
  return jax.jit(init, out_shardings=train.by_net(mesh))


# ---- one network ----------------------------------------------------------------------------------------------------


def step(p: Problem, n: Nets, s: State, task: Any, images: jax.Array, labels: jax.Array, own: Any,
         key: Any) -> tuple[State, jax.Array]:
  """One step on images uint8 [B, H, W, C] of tasks `own`, a scalar or [B] → state, and loss before it."""
  method, reparam, (phi, opt_state, net_state) = p.method, p.group.reparam, s.trained
  theta = reparam.weights(phi)
  g, loss, net_state = loss_and_gradient(p, method.seen(s.memory, theta), net_state, images, labels, own, task)
  wanted = method.gradient(p, n, s, theta, g, task, key) if method.gradient else g
  updates, opt_state = optimizer(p, n).update(wanted, opt_state, phi)
  phi = optax.apply_updates(phi, updates)
  memory = method.after(s.memory, theta, reparam.weights(phi), g) if method.after else s.memory
  return State(train.TrainState(phi, opt_state, net_state), memory, s.record), loss


def epoch(p: Problem, n: Nets, s: State, task: Any, number: Any, first: Any, last: Any) -> tuple[State, jax.Array]:
  """Steps first ≤ t < last of an epoch of a task; the mean of their losses. As in experiments.train, batches depend on the
  seed, the task, the epoch and the step alone: they are the same for all methods."""
  part, size, wanted = p.parts['train'], p.config.batch_size, p.config
  length = part.rows.shape[1]
  per_task = -(-wanted.steps // (length // size))    # epochs, the last perhaps cut short
  order = jax.random.permutation(train.batches_key(n.seed, task * per_task + number), length)
  before = task * wanted.steps + number * (length // size)
  augment = AUGMENTATIONS[wanted.augment]

  def one(t, carry):
    s, total = carry
    positions, now = jax.lax.dynamic_slice_in_dim(order, t * size, size), before + t
    own = task
    if p.method.all_tasks:
      own = jax.random.randint(jax.random.fold_in(train.stream(n.seed, TASKS), now), (size,), 0, task + 1)
      # A task may have fewer images than the longest: its rows repeat, so that every position is one of its own.
      images, labels = tasks.take_each(part, p.pixels, own, positions)
    else:
      images, labels = tasks.take(part, p.pixels, task, positions)
    images = augment(train.augment_key(n.seed, now), images)
    s, loss = step(p, n, s, task, images, labels, own, jax.random.fold_in(train.stream(n.seed, DRAWS), now))
    return s, total + loss
  s, total = jax.lax.fori_loop(first, last, one, (s, jnp.float32(0)))
  return s, total / (last - first)


def prune(p: Problem, n: Nets, s: State, task: Any, number: Any) -> State:
  return p.method.prune(p, n, s, task, number) if p.method.prune else s


def consolidate(p: Problem, n: Nets, s: State, task: Any) -> State:
  return p.method.consolidate(p, n, s, task) if p.method.consolidate else s


def switch(p: Problem, n: Nets, s: State, task: Any) -> State:
  if p.method.switch:
    return p.method.switch(p, n, s, task)
  if not p.config.continual.restart:
    return s
  return s._replace(trained=s.trained._replace(opt_state=optimizer(p, n).init(s.trained.phi)))


def measure(p: Problem, n: Nets, s: State, task: Any, whole: Any, last: Any) -> State:
  """A line of the matrices, after `task`: of all tasks learned and the next, or where not `whole` of the last and the next.
  `last`: the validation images of all tasks as well."""
  size = p.heads.tasks
  knows_next = not p.method.separate
  begin = jnp.where(whole, 0, jnp.maximum(task, 0))
  # Before the first task: all of them, which is what transfer is measured from.
  end = jnp.minimum(jnp.where(task < 0, size if knows_next else 0, task + 1 + knows_next), size)
  if p.method.separate and not p.method.packs:
    begin = jnp.maximum(task, 0)   # the other networks are no more

  def one(j, record):
    theta, net_state = recall(p, s, j)
    found = hits(p, theta, net_state, 'test', j, jnp.maximum(task, j))
    return record._replace(told=record.told.at[task + 1, j].set(found[0]),
                           among_all=record.among_all.at[task + 1, j].set(found[1]))

  def held_out(j, record):
    theta, net_state = recall(p, s, j)
    found = p.heads.headline(hits(p, theta, net_state, 'validation', j, task))
    return record._replace(validation=record.validation.at[j].set(found))
  record = jax.lax.fori_loop(begin, end, one, s.record)
  if p.method.separate and not p.method.packs:   # a network of its own for each task: what it was then it is still
    def kept(matrix):
      line = jnp.where(jnp.arange(size) < task, matrix[jnp.maximum(task, 0)], matrix[task + 1])
      return matrix.at[task + 1].set(line)
    record = record._replace(told=kept(record.told))
    first, upto = jnp.maximum(task, 0), task + 1
  else:
    first, upto = jnp.int32(0), jnp.where(last, size, 0)
  record = jax.lax.fori_loop(first, upto, held_out, record)
  if infer := p.method.infer:
    def inferred(j, record):
      found = infer(p, s, j)
      return record._replace(inferred=record.inferred.at[j].set(found[0]), found=record.found.at[j].set(found[1]),
                             by_gradient=record.by_gradient.at[j].set(found[2]))
    record = jax.lax.fori_loop(0, jnp.where(last, size, 0), inferred, record)
  return s._replace(record=record)

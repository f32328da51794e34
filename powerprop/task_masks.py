"""What a network that learns task after task has to remember of each: a mask of one bit a weight, and the leaves of its own.

Every leaf of the parameters is one of three, decided once, by `begin`:

  shared   a task uses some of its entries, by a mask, and those are protected from then on
  own      every task has a leaf of its own: a head, biases, BatchNorm. It is stored with the task, and always free
  frozen   it is learned with the first task and protected, all of it, as long as any task is remembered

All functions are pure and run under jit, vmap over seeds and lax.map. What training needs is `free` alone, whose shapes never
change: neither another task nor a larger memory compiles it anew.
"""
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from powerprop.masks import apply, hashes_of_places, is_none, pack, unpack
from powerprop.reparam import Reparam, Tree, Where, describe_leaves, is_weight, leaf_name
from powerprop.thresholds import check_mask, check_structure


class Memory(NamedTuple):
  """Tasks in slots; a slot that is not in use is all zeros. Trees like the parameters, from which leaves have their names."""
  bits: Tree        # shared leaves: uint8 [slots, bytes], a mask packed as by `masks.pack`; None for the others
  own: Tree         # leaves of the tasks' own: [slots, ...]; None for the others
  sums: jax.Array   # uint32 [slots]: of the bits of what is protected for the task, for `intact`
  here: jax.Array   # bool [slots]


def begin(params: Tree, slots: int = 8, where: Where = is_weight, rest: str = 'frozen',
          heads: Where | None = None) -> Memory:
  """A memory of no task.

  Args:
    params: parameters, or their shapes. What Haiku keeps as state, such as running averages of BatchNorm, may be among them
      (hk.data_structures.merge).
    slots: tasks that there is room for; `check_room` refuses another one, and `grow` makes more.
    where: predicate of leaf name and leaf: the shared ones.
    rest: 'frozen' or 'own': what becomes of leaves that are neither shared nor heads (biases, normalisation). Statistics of
      BatchNorm that are frozen also have to be left alone by the caller, by `protection.keep`.
    heads: predicate of the leaves that every task has for itself, whatever `where` says of them. None: one shared head.
  Raises: ValueError when no leaf is shared, when `heads` names none, for less than one slot, and for another word.
  """
  if not isinstance(slots, (int, np.integer)) or slots < 1:
    raise ValueError(f'a memory has at least one slot, a whole number of them; got {slots!r}.')
  if rest not in ('frozen', 'own'):
    raise ValueError(f"rest is 'frozen' or 'own'; got {rest!r}.")
  for name, which in (('where', where), ('heads', heads)):
    if which is not None and not callable(which):
      raise ValueError(f'{name} is a predicate of leaf name and leaf, as lambda name, leaf: ...; got {which!r}.')

  def kind(path: Any, x: Any) -> str:
    name = leaf_name(path)
    if heads is not None and heads(name, x):
      return 'own'
    return 'shared' if where(name, x) else rest
  kinds = jax.tree_util.tree_map_with_path(kind, params)
  if heads is not None and not any(heads(leaf_name(path), x) for path, x in jax.tree_util.tree_leaves_with_path(params)):
    raise ValueError(f'heads names none of these leaves: {describe_leaves(params)}.')
  if 'shared' not in jax.tree.leaves(kinds):
    raise ValueError(f'tasks share none of these leaves: {describe_leaves(params)}.')
  bits = jax.tree.map(lambda k, x: jnp.zeros((slots, -(-math.prod(x.shape) // 8)), jnp.uint8) if k == 'shared' else None,
                      kinds, params)
  own = jax.tree.map(lambda k, x: jnp.zeros((slots, *x.shape), x.dtype) if k == 'own' else None, kinds, params)
  return Memory(bits, own, jnp.zeros(slots, jnp.uint32), jnp.zeros(slots, bool))


def grow(memory: Memory, slots: int) -> Memory:
  """The same tasks with room for `slots`. Raises: ValueError for fewer than there are."""
  if not isinstance(slots, (int, np.integer)) or slots < memory.here.shape[0]:
    raise ValueError(f'a memory grows; it has {memory.here.shape[0]} slots, and {slots!r} were asked for.')
  missing = slots - memory.here.shape[0]
  return jax.tree.map(lambda x: jnp.concatenate([x, jnp.zeros((missing, *x.shape[1:]), x.dtype)]), memory)


def remember(memory: Memory, task: int | jax.Array, mask: Tree, params: Tree) -> Memory:
  """Stores a task: its mask, and its own leaves as they are in `params`. A task that was there before is replaced.

  Args:
    task: slot, traced or not. A traced one without a slot is dropped in silence: let `check_room` look before a task begins.
    mask: tree of bool, None for leaves that are not shared, as `shared` makes them.
    params: φ at the end of the task.
  Raises: ValueError for a task without a slot, and for masks or parameters of another structure, shape or dtype.
  """
  task = _slot(memory, task)
  check_structure('the mask', mask, 'the shared leaves', memory.bits)
  _check(memory, params)

  def check_own(path: Any, x: Any, old: Any) -> None:
    if old is not None and (jnp.shape(x), jnp.result_type(x)) != (old.shape[1:], old.dtype):
      raise ValueError(f"a task's own {leaf_name(path)} is {old.dtype} {old.shape[1:]}, as the memory was begun with; got "
                       f'{jnp.result_type(x)} {jnp.shape(x)}.')
  jax.tree_util.tree_map_with_path(check_own, params, memory.own)
  jax.tree_util.tree_map_with_path(lambda path, x, m: check_mask(m, x, path), shared(memory, params), mask)
  packed = pack(mask)
  bits = jax.tree.map(lambda old, new: old.at[task].set(new, mode='drop'), memory.bits, packed)
  own = jax.tree.map(lambda x, old: None if old is None else old.at[task].set(x, mode='drop'), params, memory.own)
  sums = memory.sums.at[task].set(_sum_of_bits(mask, memory.own, params), mode='drop')
  return Memory(bits, own, sums, memory.here.at[task].set(True, mode='drop'))


def forget(memory: Memory, task: int | jax.Array) -> Memory:
  """The memory without a task: weights that no other task uses are free again. They keep their values until something moves them.

  Raises: ValueError for a task without a slot, or that is not remembered where that can be known, outside jit.
  """
  task = _known(memory, _slot(memory, task))
  return jax.tree.map(lambda x: x.at[task].set(jnp.zeros_like(x[0]), mode='drop'), memory)


def recall(memory: Memory, task: int | jax.Array, params: Tree) -> Tree:
  """The parameters that the network has on a task: weights outside its mask 0, its own leaves, frozen leaves as they are.

    net.apply(reparam.weights(recall(memory, task, phi)), x)

  They are the same to the last bit whatever was learned since. Of a task that is not remembered all weights are 0 where `task` or
  the memory is traced.

  Args:
    task: slot, traced or not; an array of tasks goes through vmap or lax.map.
    params: φ; or θ, where `remember` was given θ.
  Raises: ValueError for a task without a slot, outside jit for one that is not remembered, and for parameters of another
    structure or shape.
  """
  task = _known(memory, _slot(memory, task))
  seen = apply(task_mask(memory, task, params), params)
  return jax.tree.map(lambda x, own: x if own is None else _at(own, task), seen, memory.own)


def intact(memory: Memory, params: Tree) -> jax.Array:
  """Is what was protected for each task (its shared weights, and frozen leaves) as it was when the task was remembered?

  By a sum of mixed bits, which the change of one number changes, and any other change but for one case in 2³². Where it is False
  something has trained without `protect`, or with a state that had all weights free, and what the task has learned is lost.

  Args:
    params: as `remember` was given them.
  Returns: bool [slots]; True for slots that are not in use.
  """
  _check(memory, params)
  sums = lax.map(lambda t: _sum_of_bits(task_mask(memory, t, params), memory.own, params), jnp.arange(memory.here.shape[0]))
  return (sums == memory.sums) | ~memory.here


def check_intact(intact: jax.Array) -> None:
  """Raises ValueError naming the tasks whose weights have changed since. `intact`: concrete, of one memory or several."""
  lost = np.flatnonzero(~np.asarray(intact).reshape(-1, np.shape(intact)[-1]).all(0)).tolist()
  if lost:
    raise ValueError(f'what the tasks {lost} use has changed since they were remembered. Train with the state that '
                     "packnet.begin_task gives, and not tx.init's, which leaves every weight free; and keep frozen averages of "
                     'BatchNorm by protection.keep. To go on, take parameters from before, or task_masks.forget these tasks.')


def export(memory: Memory, task: int | jax.Array, phi: Tree, reparam: Reparam) -> Tree:
  """The weights θ of one task, for a network of its own: nothing of other tasks is left in them.

  Shared leaves are exact zeros outside the mask, which any compression finds.

  Raises: ValueError as `recall` does.
  """
  return reparam.weights(recall(memory, task, phi))


def task_mask(memory: Memory, task: int | jax.Array, like: Tree) -> Tree:
  """Mask of a task: bool in the shapes of `like`, parameters or their shapes; None for leaves that are not shared."""
  task = _slot(memory, task)
  return unpack(jax.tree.map(lambda bits: _at(bits, task), memory.bits), shared(memory, like))


def free(memory: Memory, params: Tree) -> Tree:
  """¬∨ M_t: what the next task may change; bool like all parameters, for `with_free`. Line 12 of Algorithm 1.

  Leaves of the tasks' own are free; frozen ones as long as no task is remembered.
  """
  _check(memory, params)
  used = unpack(jax.tree.map(_union, memory.bits), shared(memory, params))
  first = ~jnp.any(memory.here)

  def leaf(x: Any, mask: Any, own: Any) -> jax.Array:
    if mask is not None:
      return ~mask
    return jnp.ones(jnp.shape(x), bool) if own is not None else jnp.broadcast_to(first, jnp.shape(x))
  return jax.tree.map(leaf, params, used, memory.own)


def shared(memory: Memory, tree: Tree) -> Tree:
  """The shared leaves of a tree like the parameters, None in place of the others: what masks are chosen among.

  Raises: ValueError for another structure.
  """
  _check(memory, tree)
  return jax.tree.map(lambda x, bits: None if bits is None else x, tree, memory.bits)


class Capacity(NamedTuple):
  """Shares are of all entries of shared leaves, float32."""
  used: jax.Array     # [slots]: in the mask of the task
  new: jax.Array      # [slots]: in no mask of a slot before
  reused: jax.Array   # [slots]: in one of those, too
  total: jax.Array    # in any mask
  left: jax.Array     # int32: entries in no mask
  by_leaf: Tree       # the same for each shared leaf, None for the others: a small one may be full long before the network is
  size: jax.Array     # int32: entries
  tasks: jax.Array    # int32: tasks remembered
  slots: jax.Array    # int32: tasks that the memory has room for, remembered ones among them
  more: jax.Array     # float32: tasks that still fit at the mean of `new`; inf where that is 0


def capacity(memory: Memory, params: Tree) -> Capacity:
  """How full the network is. Counted in the packed bits: nothing of the size of the parameters is made."""
  sizes = [math.prod(jnp.shape(x)) for x in jax.tree.leaves(shared(memory, params))]
  leaves, structure = jax.tree.flatten(memory.bits)
  size = sum(sizes)

  def in_each(packed: list[jax.Array]) -> list[jax.Array]:
    return [jnp.sum(lax.population_count(x).astype(jnp.int32)) for x in packed]

  def ones(packed: list[jax.Array]) -> jax.Array:
    return sum(in_each(packed), start=jnp.int32(0))

  def add(before: list[jax.Array], now: list[jax.Array]) -> tuple[list[jax.Array], tuple[jax.Array, jax.Array]]:
    after = [a | b for a, b in zip(before, now, strict=True)]
    return after, (ones(now), ones([a ^ b for a, b in zip(after, before, strict=True)]))
  union, (used, new) = lax.scan(add, [jnp.zeros_like(x[0]) for x in leaves], leaves)
  total, tasks = ones(union), jnp.sum(memory.here, dtype=jnp.int32)
  left = size - total
  by_leaf = jax.tree.unflatten(structure, [n - x for n, x in zip(sizes, in_each(union), strict=True)])
  more = jnp.where(total > 0, left * (tasks / jnp.maximum(total, 1)), jnp.inf)
  return Capacity(used / size, new / size, (used - new) / size, total / size, left, by_leaf, jnp.int32(size), tasks,
                  jnp.int32(memory.here.shape[0]), more)


def check_room(capacity: Capacity, least: int = 1) -> None:
  """Refuses another task where no slot is left for it, or fewer than `least` weights are free: before it begins, when all that is
  remembered is untouched.

  Args:
    capacity: of one memory, or of several that were mapped over: concrete, outside jit.
  Raises: ValueError with the numbers, and for what is no capacity.
  """
  if not isinstance(capacity, Capacity):
    raise ValueError(f'check_room takes capacity(memory, params), got {type(capacity).__name__}.')
  tasks, slots = (int(np.ravel(np.asarray(x)).max()) for x in (capacity.tasks, capacity.slots))
  if tasks >= slots:
    raise ValueError(f'no slot for another task: the memory has {slots}, all in use; grow(memory, {2 * slots}) makes more.')
  left = np.ravel(np.asarray(capacity.left))
  if left.min() < least:
    i = int(left.argmin())
    tasks, size = (int(np.ravel(np.asarray(x))[i]) for x in (capacity.tasks, capacity.size))
    raise ValueError(f'no room for another task: of {size} weights {size - int(left[i])} are in use (tasks: {tasks}), and '
                     f'{int(left[i])} are free where at least {least} are wanted; forget a task, or choose sparser masks.')


def _sum_of_bits(mask: Tree, own: Tree, params: Tree) -> jax.Array:
  """Σ mix(word ⊕ hash of its place) modulo 2³², of shared leaves under a mask and of all of the frozen ones.

  `mix` maps 32 bits one to one, so one word that changes, changes the sum; it is far from linear, so changes of several do not
  cancel. −0 and subnormal numbers count as 0: they are not 0 to bits alone, and an optimiser on a CPU may make it of them.
  """
  def words(x: Any) -> jax.Array:
    x = jnp.asarray(x)
    if jnp.iscomplexobj(x):
      x = jnp.stack([x.real, x.imag], -1)
    if jnp.issubdtype(x.dtype, jnp.floating):
      x = jnp.where(jnp.abs(x) < jnp.finfo(x.dtype).tiny, jnp.zeros_like(x), x)
    x = x.astype(jnp.uint8) if x.dtype == bool else x
    return lax.bitcast_convert_type(x, f'uint{8 * min(x.dtype.itemsize, 4)}').astype(jnp.uint32)

  def mix(x: jax.Array) -> jax.Array:   # MurmurHash3's finaliser
    x = (x ^ (x >> 16)) * jnp.uint32(0x85ebca6b)
    x = (x ^ (x >> 13)) * jnp.uint32(0xc2b2ae35)
    return x ^ (x >> 16)
  kept = jax.tree.map(lambda x, m, own: None if own is not None else (words(x), m), params, mask, own)
  pairs = jax.tree.leaves(kept, is_leaf=lambda x: isinstance(x, tuple))
  total = jnp.uint32(0)
  for (word, m), place in zip(pairs, hashes_of_places([word.shape for word, _ in pairs]), strict=True):
    mixed = mix(word ^ mix(place.astype(jnp.uint32)))
    if m is not None:
      mixed = jnp.where(m.reshape(m.shape + (1,) * (mixed.ndim - m.ndim)), mixed, 0)
    total += jnp.sum(mixed, dtype=jnp.uint32)
  return total


def _at(slots: jax.Array, task: int | jax.Array) -> jax.Array:
  """What a slot holds; zeros where a traced task has none."""
  return jnp.asarray(slots).at[task].get(mode='fill', fill_value=0)


def _union(bits: jax.Array) -> jax.Array:
  return lax.reduce(bits, np.uint8(0), lax.bitwise_or, (0,))


def _slot(memory: Memory, task: int | jax.Array) -> int | jax.Array:
  slots = memory.here.shape[0]
  if isinstance(task, jax.core.Tracer):
    return jnp.where(jnp.less(task, 0), slots, task)   # no slot either, though an index counts from the end
  found = np.asarray(task)
  if not np.issubdtype(found.dtype, np.integer):
    raise ValueError(f'a task is a whole number, the index of a slot; got {task!r}.')
  for known in found.ravel().tolist():
    if not 0 <= known < slots:
      raise ValueError(f'task {known} has no slot: the memory has {slots}, from 0 on; grow(memory, slots) makes more.')
  return task


def _known(memory: Memory, task: int | jax.Array) -> int | jax.Array:
  """The task, if it is remembered, or nobody can know."""
  if not isinstance(task, jax.core.Tracer) and not isinstance(memory.here, jax.core.Tracer):
    here = np.asarray(memory.here)
    for known in np.ravel(task).tolist():
      if not here[known]:
        raise ValueError(f'task {known} is not remembered; these are: {np.flatnonzero(here).tolist()}.')
  return task


def _check(memory: Memory, tree: Tree) -> None:
  if not isinstance(memory, Memory):
    raise ValueError(f'a memory is what task_masks.begin makes; got a {type(memory).__name__}.')
  trees = [jax.tree.map(lambda x: 0, t, is_leaf=is_none) for t in (tree, memory.bits)]
  check_structure('the tree', trees[0], 'the memory', trees[1])

  def leaf(path: Any, x: Any, bits: Any) -> None:   # the memory knows no more of a shape than its bytes
    if bits is not None and x is not None and bits.shape[1] != -(-math.prod(jnp.shape(x)) // 8):
      raise ValueError(f'{leaf_name(path)} has masks of {bits.shape[1]} bytes in the memory, not one bit for each entry of '
                       f'{jnp.shape(x)}: the memory was begun with parameters of other shapes.')
  jax.tree_util.tree_map_with_path(leaf, tree, memory.bits, is_leaf=is_none)

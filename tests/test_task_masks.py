"""The memory of tasks against Python's own sets, and what becomes of leaves that no mask is for."""
import functools

import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from powerprop import powerpropagation, protection, task_masks
from powerprop.task_masks import Memory

RNG = np.random.default_rng(11)
PARAMS = {'a': {'w': jnp.asarray(RNG.normal(size=(5, 7)), jnp.float32), 'b': jnp.arange(7.0)},
          'head': {'w': jnp.asarray(RNG.normal(size=(7, 3)), jnp.float32), 'b': jnp.arange(3.0)}}
SIZE = 35 + 21


def is_head(name, leaf):
  return name.startswith('head')


def random_mask(rng, share=0.3):
  return {'a': {'w': jnp.asarray(rng.random((5, 7)) < share), 'b': None},
          'head': {'w': jnp.asarray(rng.random((7, 3)) < share), 'b': None}}


def as_set(mask):
  return {(layer, *map(int, i)) for layer in mask for i in np.argwhere(np.asarray(mask[layer]['w']))}


def bits(x):
  return np.asarray(x).view(np.uint8)


def equal(a, b):
  assert jax.tree.structure(a) == jax.tree.structure(b)
  jax.tree.map(lambda x, y: np.testing.assert_array_equal(bits(x), bits(y)), a, b)


def test_a_random_life_of_a_memory():
  """Remember, replace, forget and grow in any order: masks, what is free, and capacity as by sets of coordinates."""
  rng = np.random.default_rng(5)
  memory, tasks = task_masks.begin(PARAMS, slots=4), {}
  remember, forget = jax.jit(task_masks.remember), jax.jit(task_masks.forget)
  see = jax.jit(lambda m, t: (task_masks.free(m, PARAMS), task_masks.capacity(m, PARAMS), task_masks.task_mask(m, t, PARAMS)))
  for move in range(24):
    if move == 12:
      memory = task_masks.grow(memory, 6)
    slot = int(rng.integers(4 if move < 12 else 6))
    if tasks and rng.random() < 0.3:
      slot = int(rng.choice(list(tasks)))
      memory = forget(memory, slot)
      del tasks[slot]
    else:
      mask = random_mask(rng)
      memory, tasks[slot] = remember(memory, slot, mask, PARAMS), as_set(mask)
    free, capacity, mask = see(memory, slot)
    union = set().union(*tasks.values())
    assert as_set({k: {'w': ~free[k]['w']} for k in free}) == union
    assert as_set(mask) == tasks.get(slot, set())
    slots = memory.here.shape[0]
    before = [set().union(*(tasks[i] for i in tasks if i < t)) for t in range(slots)]
    used = [len(tasks.get(t, ())) for t in range(slots)]
    new = [len(tasks.get(t, set()) - before[t]) for t in range(slots)]
    np.testing.assert_allclose(capacity.used, np.array(used) / SIZE, rtol=1e-6)
    np.testing.assert_allclose(capacity.new, np.array(new) / SIZE, rtol=1e-6)
    np.testing.assert_allclose(capacity.reused, (np.array(used) - new) / SIZE, rtol=1e-6)
    np.testing.assert_allclose(capacity.total, len(union) / SIZE, rtol=1e-6)
    assert (int(capacity.left), int(capacity.size), int(capacity.tasks)) == (SIZE - len(union), SIZE, len(tasks))
    assert int(capacity.slots) == slots and jax.tree.structure(capacity.by_leaf) == jax.tree.structure(memory.bits)
    assert [int(capacity.by_leaf[k]['w']) for k in ('a', 'head')] == [size - sum(layer == k for layer, *_ in union)
                                                                    for k, size in (('a', 35), ('head', 21))]
    np.testing.assert_allclose(capacity.more, (SIZE - len(union)) / (sum(new) / len(tasks)) if sum(new) else np.inf, rtol=1e-6)


def test_forgetting_frees_what_nobody_else_uses():
  """By hand: of the first task's {0, 1, 2} the second uses {2, 3}."""
  params = {'l': {'w': jnp.ones((2, 3))}}
  def of(*kept):
    return {'l': {'w': jnp.asarray(np.isin(np.arange(6), kept).reshape(2, 3))}}
  memory = task_masks.remember(task_masks.begin(params, 2), 0, of(0, 1, 2), params)
  memory = task_masks.remember(memory, 1, of(2, 3), params)
  equal(task_masks.free(memory, params), of(4, 5))
  equal(task_masks.free(task_masks.forget(memory, 0), params), of(0, 1, 4, 5))
  assert task_masks.capacity(memory, params).reused.tolist() == pytest.approx([0, 1 / 6])
  assert float(task_masks.capacity(memory, params).more) == 1.0   # two are free, and a task took two new ones on average


@pytest.mark.parametrize('rest', ['frozen', 'own'])
def test_leaves_that_are_not_shared(rest):
  memory = task_masks.begin(PARAMS, 2, rest=rest, heads=is_head)
  assert (memory.own['a']['b'] is None) == (rest == 'frozen')
  assert memory.own['head']['w'].shape == (2, 7, 3) and memory.bits['head']['w'] is None
  assert all(f.all() for f in jax.tree.leaves(task_masks.free(memory, PARAMS)))   # before the first task
  mask = random_mask(RNG)
  mask['head']['w'] = None
  memory = task_masks.remember(memory, 0, mask, PARAMS)
  free = task_masks.free(memory, PARAMS)
  equal(free['a']['w'], ~mask['a']['w'])
  assert bool(free['a']['b'].all()) == bool(free['a']['b'].any()) == (rest == 'own')
  assert free['head']['w'].all() and free['head']['b'].all()

  later = jax.tree.map(lambda f, x: jnp.where(f, x + 1, x), free, PARAMS)   # another task
  memory = task_masks.remember(memory, 1, mask, later)
  for task, params in enumerate((PARAMS, later)):
    expected = {'a': {'w': jnp.where(mask['a']['w'], PARAMS['a']['w'], 0), 'b': params['a']['b']}, 'head': params['head']}
    equal(task_masks.recall(memory, task, later), expected)
    equal(jax.jit(task_masks.recall)(memory, jnp.int32(task), later), expected)
  equal(task_masks.export(memory, 0, later, powerpropagation(2.0)),
        powerpropagation(2.0).weights(task_masks.recall(memory, 0, later)))
  memory = task_masks.forget(task_masks.forget(memory, 0), 1)
  assert all(f.all() for f in jax.tree.leaves(task_masks.free(memory, PARAMS)))
  assert not any(x.any() for x in jax.tree.leaves(memory))


def test_a_hundred_tasks_of_a_million_weights():
  shapes = {'l': {'w': jax.ShapeDtypeStruct((1000, 1000), jnp.float32), 'b': jax.ShapeDtypeStruct((1000,), jnp.float32)}}
  memory = jax.eval_shape(functools.partial(task_masks.begin, slots=100), shapes)
  assert sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(memory)) == 100 * (1_000_000 // 8 + 5)   # 12.5 MB


def test_each_seed_has_its_own_under_vmap():
  rng = np.random.default_rng(8)
  masks = [random_mask(rng) for _ in range(3)]
  stacked = jax.tree.map(lambda *m: jnp.stack(m), *masks)
  many = jax.tree.map(lambda x: jnp.stack([x, x, x]), PARAMS)

  @jax.jit
  @jax.vmap
  def one(params, mask):
    memory = task_masks.remember(task_masks.begin(params, 2), 1, mask, params)
    return task_masks.free(memory, params), task_masks.capacity(memory, params).left
  free, left = one(many, stacked)
  for i, mask in enumerate(masks):
    expected = {'a': {'w': ~mask['a']['w'], 'b': jnp.zeros(7, bool)}, 'head': {'w': ~mask['head']['w'], 'b': jnp.zeros(3, bool)}}
    equal(jax.tree.map(lambda f: f[i], free), expected)   # noqa: B023
    assert int(left[i]) == SIZE - len(as_set(mask))


@pytest.mark.parametrize('rest', ['frozen', 'own'])
def test_batch_normalisation_keeps_what_a_task_had(rest):
  """Scales, offsets and running averages: frozen after the first task, or a set for each."""
  def forward(x, training):
    x = hk.BatchNorm(True, True, 0.9)(hk.Linear(4)(x), training)
    return hk.Linear(2)(x)
  net = hk.without_apply_rng(hk.transform_with_state(forward))
  x = jnp.asarray(np.random.default_rng(0).normal(size=(8, 3)), jnp.float32)
  params, state = jax.jit(net.init, static_argnums=2)(jax.random.key(1), x, True)
  apply = jax.jit(net.apply, static_argnums=3)
  free, remember, recall = (jax.jit(f) for f in (task_masks.free, task_masks.remember, task_masks.recall))

  def split(whole):
    return hk.data_structures.partition(lambda module, name, value: module in params, whole)

  def learn(whole, which, inputs):
    """Everything free moves; the statistics by the network itself."""
    p, s = split(whole)
    _, s = apply(p, s, inputs, True)
    whole = hk.data_structures.merge(jax.tree.map(lambda v: v + 0.3, p), s)
    return protection.keep(which, whole, old)

  old = hk.data_structures.merge(params, state)
  memory = task_masks.begin(old, 2, rest=rest)
  first = learn(old, free(memory, old), x)
  mask = jax.tree.map(lambda v: jnp.abs(v) > 0.4, task_masks.shared(memory, first))
  memory = remember(memory, 0, mask, first)
  logits, _ = apply(*split(recall(memory, 0, first)), x, False)

  old = first
  second = learn(first, free(memory, first), 3 * x + 1)
  memory = remember(memory, 1, mask, second)
  moved = [name for name in second for leaf in second[name] if not np.array_equal(first[name][leaf], second[name][leaf])]
  assert any('batch_norm' in name for name in moved) == (rest == 'own')
  again, _ = apply(*split(recall(memory, 0, second)), x, False)
  np.testing.assert_array_equal(bits(again), bits(logits))
  other, _ = apply(*split(recall(memory, 1, second)), x, False)
  assert np.array_equal(other, logits) == (rest == 'frozen')   # of the same mask: all that could differ is the rest


def test_a_change_of_one_bit_is_seen_in_the_tasks_that_use_it():
  rng = np.random.default_rng(2)
  params = PARAMS | {'odd': {'w': jnp.asarray(rng.normal(size=(3, 4)), jnp.bfloat16), 'z': jnp.ones(2, jnp.complex64)}}
  masks = [random_mask(rng) | {'odd': {'w': jnp.asarray(rng.random((3, 4)) < 0.5), 'z': None}} for _ in range(3)]
  memory = task_masks.begin(params, 4, where=lambda name, leaf: name.endswith('/w'))   # biases, and z, are frozen
  assert task_masks.intact(memory, params).all()
  for t, mask in enumerate(masks):
    memory = jax.jit(task_masks.remember)(memory, t, mask, params)
  look = jax.jit(task_masks.intact)
  assert look(memory, params).all() and look(task_masks.grow(memory, 9), params).all()

  def with_words(module, name, change):
    x = np.array(params[module][name])
    words = x.reshape(-1).view(np.uint16 if x.dtype.itemsize == 2 else np.uint32)
    change(words)
    return params | {module: params[module] | {name: jnp.asarray(x)}}

  def flipped(module, name, i, bit):
    return with_words(module, name, lambda words: words.__setitem__(i, words[i] ^ (1 << bit)))
  for module in masks[0]:
    for i in range(params[module]['w'].size):
      users = [bool(mask[module]['w'].ravel()[i]) for mask in masks]
      for bit in (0, 15) if module == 'odd' else (0, 13, 31):   # of the mantissa, of the sign
        assert look(memory, flipped(module, 'w', i, bit)).tolist() == [not u for u in users] + [True]
  changed = flipped('a', 'b', 3, 7)
  assert look(memory, changed).tolist() == [False, False, False, True]   # frozen for all
  with pytest.raises(ValueError, match=r'what the tasks \[0, 1, 2\] use has changed since they were remembered'):
    task_masks.check_intact(look(memory, changed))
  forgotten = task_masks.forget(task_masks.forget(memory, 0), 2)
  with pytest.raises(ValueError, match=r'tasks \[1\] use'):
    task_masks.check_intact(jnp.stack([look(forgotten, params), look(forgotten, changed)]))   # of several memories
  task_masks.check_intact(look(memory, params))


@pytest.mark.parametrize('change', [
  lambda p: jax.tree.map(jnp.negative, p), lambda p: {name: 2 * x for name, x in p.items()}, lambda p: p | {'a': -4 * p['a']},
  lambda p: p | {'a': -p['a']}, lambda p: {'a': p['c'], 'c': p['a']}, lambda p: p | {'a': p['a'][::-1]},
  lambda p: p | {'a': p['a'].at[0, 0].mul(-1).at[3, 2].mul(-1)}, lambda p: p | {'a': p['a'].at[0, 0].mul(2).at[3, 2].mul(2)},
  lambda p: p | {'a': p['a'].at[0, 0].set(p['a'][1, 1]).at[1, 1].set(p['a'][0, 0])}])
def test_changes_of_many_do_not_cancel(change):
  """Those that a sum of the numbers' bits would not see: the top bit of each weighs the same, wherever it stands."""
  params = {name: jnp.asarray(np.random.default_rng(i).normal(size=(8, 6)), jnp.float32) for i, name in enumerate('ac')}
  memory = task_masks.begin(params, 2, where=lambda name, leaf: True)
  memory = task_masks.remember(memory, 0, jax.tree.map(lambda x: jnp.ones(x.shape, bool), params), params)
  assert task_masks.intact(memory, params).tolist() == [True, True]
  assert task_masks.intact(memory, change(params)).tolist() == [False, True]


def test_zero_by_any_other_name_is_intact():
  """What XLA's sums on CPUs make of subnormal numbers, and apply_if_finite of −0."""
  params = {'w': jnp.asarray([1.0, -0.0, 1e-40, -1e-39, np.nan, -np.inf], jnp.float32)}
  memory = task_masks.begin(params, 1, where=lambda name, leaf: True)
  memory = task_masks.remember(memory, 0, {'w': jnp.ones(6, bool)}, params)
  assert task_masks.intact(memory, {'w': jnp.asarray([1.0, 0.0, 0.0, -0.0, np.nan, -np.inf], jnp.float32)}).all()
  assert not task_masks.intact(memory, {'w': jnp.asarray([1.0, 0.0, 2e-38, 0.0, np.nan, -np.inf], jnp.float32)}).any()


def test_no_room_is_refused_with_its_numbers():
  memory = task_masks.begin(PARAMS, 2)
  full = jax.tree.map(lambda x: jnp.ones(x.shape, bool), task_masks.shared(memory, PARAMS))
  task_masks.check_room(task_masks.capacity(memory, PARAMS))
  memory = task_masks.remember(memory, 0, full, PARAMS)
  with pytest.raises(ValueError, match=r'of 56 weights 56 are in use \(tasks: 1\), and 0 are free where at least 1'):
    task_masks.check_room(task_masks.capacity(memory, PARAMS))
  two = jax.tree.map(lambda *x: jnp.stack(x), task_masks.forget(memory, 0), memory)
  with pytest.raises(ValueError, match='56 are in use'):   # one of two seeds
    task_masks.check_room(jax.vmap(lambda m: task_masks.capacity(m, PARAMS))(two))
  task_masks.check_room(task_masks.capacity(task_masks.forget(memory, 0), PARAMS), least=56)
  nothing = jax.tree.map(jnp.zeros_like, full)   # two tasks that take no weight take the slots
  for task in range(2):
    memory = task_masks.remember(memory, task, nothing, PARAMS)
  with pytest.raises(ValueError, match=r'no slot for another task: the memory has 2, all in use; grow\(memory, 4\) makes more'):
    task_masks.check_room(task_masks.capacity(memory, PARAMS))
  task_masks.check_room(task_masks.capacity(task_masks.grow(memory, 4), PARAMS))


def test_misuse_is_said_at_once():
  memory = task_masks.begin(PARAMS, 2)
  assert isinstance(memory, Memory)
  mask = random_mask(RNG)
  for task in (-1, 2):
    with pytest.raises(ValueError, match=f'task {task} has no slot: the memory has 2'):
      task_masks.recall(memory, task, PARAMS)
  remember = jax.jit(task_masks.remember)
  for task in (-1, 2):   # traced: in silence, and nothing else is touched
    equal(remember(memory, task, mask, PARAMS), memory)
    seen = jax.jit(task_masks.recall)(remember(memory, 1, mask, PARAMS), task, PARAMS)   # of no task: nothing of the last one
    assert not any(jnp.any(x) for x, bits in zip(jax.tree.leaves(seen), jax.tree.leaves(memory.bits, is_leaf=lambda x: x is None),
                                                 strict=True) if bits is not None)
  with pytest.raises(ValueError, match='a memory grows; it has 2 slots, and 1 were asked for'):
    task_masks.grow(memory, 1)
  with pytest.raises(ValueError, match='a memory has at least one slot, a whole number of them; got 0'):
    task_masks.begin(PARAMS, 0)
  with pytest.raises(ValueError, match=r"heads is a predicate of leaf name and leaf, as lambda name, leaf: \.\.\.; got 'w'"):
    task_masks.begin({'w': jnp.ones(3)}, heads='w')
  with pytest.raises(ValueError, match="rest is 'frozen' or 'own'; got 'thawed'"):
    task_masks.begin(PARAMS, rest='thawed')
  with pytest.raises(ValueError, match='tasks share none of these leaves'):
    task_masks.begin(PARAMS, where=lambda name, leaf: False)
  with pytest.raises(ValueError, match='the mask and the shared leaves differ in structure'):
    task_masks.remember(memory, 0, jax.tree.map(lambda x: jnp.ones(x.shape, bool), PARAMS), PARAMS)
  with pytest.raises(ValueError, match='the tree and the memory differ in structure'):
    task_masks.free(memory, {'a': PARAMS['a']})
  with pytest.raises(ValueError, match=r'a mask is bool and shaped like its array'):
    task_masks.remember(memory, 0, mask | {'head': {'w': jnp.ones((3, 7), bool), 'b': None}}, PARAMS)


def test_what_a_memory_does_not_fit_is_said():
  def begin():
    return task_masks.begin(PARAMS, 3, rest='own', heads=is_head)
  memory, mask = begin(), random_mask(RNG) | {'head': {'w': None, 'b': None}}
  for leaf, shown in ((jnp.ones(1), r'float32 \(1,\)'), (jnp.ones(4), r'float32 \(4,\)'),
                      (jnp.ones(7, jnp.bfloat16), r'bfloat16 \(7,\)')):
    with pytest.raises(ValueError, match=rf"a task's own a/b is float32 \(7,\), as the memory was begun with; got {shown}"):
      task_masks.remember(memory, 0, mask, PARAMS | {'a': PARAMS['a'] | {'b': leaf}})
  with pytest.raises(ValueError, match=r'a/w has masks of 5 bytes in the memory, not one bit for each entry of \(7, 7\)'):
    task_masks.free(memory, PARAMS | {'a': PARAMS['a'] | {'w': jnp.ones((7, 7))}})
  memory = task_masks.remember(memory, 2, mask, PARAMS)
  for absent in (task_masks.recall, functools.partial(task_masks.export, reparam=powerpropagation(2.0))):
    with pytest.raises(ValueError, match=r'task 1 is not remembered; these are: \[2\]'):
      absent(memory, 1, PARAMS)
  with pytest.raises(ValueError, match=r'task 0 is not remembered'):
    task_masks.forget(memory, 0)
  with pytest.raises(ValueError, match='task 9 has no slot: the memory has 3'):
    task_masks.forget(memory, np.array([2, 9]))
  with pytest.raises(ValueError, match=r'a task is a whole number, the index of a slot; got 1\.0'):
    task_masks.recall(memory, 1.0, PARAMS)
  with pytest.raises(ValueError, match='heads names none of these leaves: '):
    task_masks.begin(PARAMS, heads=lambda name, leaf: name.startswith('haed'))
  with pytest.raises(ValueError, match=r'a whole number of them; got 2\.0'):
    task_masks.begin(PARAMS, 2.0)
  with pytest.raises(ValueError, match=r'it has 3 slots, and 4\.0 were asked for'):
    task_masks.grow(memory, 4.0)
  with pytest.raises(ValueError, match=r'check_room takes capacity\(memory, params\), got Memory'):
    task_masks.check_room(memory)

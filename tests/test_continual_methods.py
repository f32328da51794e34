"""Each method against NumPy in float64: a linear network, whose gradients and Fisher information are formulas."""
import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_tasks import config as task_config
from test_tasks import made

from configs import base
from experiments import sweep, train
from experiments.augment import AUGMENTATIONS
from experiments.continual import measures, methods, packing, programs
from experiments.continual.problem import Heads, Nets, Problem, Record, State, hits
from experiments.data import tasks

pytestmark = pytest.mark.usefixtures('compiled_quickly')

CLASSES, TASKS, BATCH, RATE = 6, 3, 4, 0.3
NET = Nets(jnp.int32(0), jnp.float32(RATE), jnp.float32(0.7))


def make(algorithm, scenario='domain', sequence=tasks.permuted, alpha=1.0, optimizer='sgd', forward=None, **change):
  """A problem, and its first state: images → outputs by one layer."""
  config = base.get_config()
  config.update_from_flattened_dict({
    'protocol': 'continual', 'steps': 6, 'batch_size': BATCH,
    'sweep.algorithm': (algorithm,), 'sweep.optimizer': (optimizer,), 'sweep.alpha': (alpha,),
    'continual.tasks': TASKS, 'continual.scenario': scenario, 'continual.fisher_images': 5, 'continual.memory_images': 7,
    'continual.inferred_images': 5, **{f'continual.{key}': value for key, value in change.items()}})
  found = sequence([made()], task_config())
  heads = Heads(scenario, found.classes, TASKS)
  forward = forward or (lambda units: lambda images, training: hk.Linear(units, name='output')(hk.Flatten()(images)))
  net = hk.transform_with_state(forward(heads.units))
  (group,) = sweep.make_groups(config)
  parts = jax.tree.map(jnp.asarray, found.parts)
  p = Problem(config, net, group, methods.METHODS[algorithm], heads, 'output/w', False, parts, jnp.asarray(found.pixels))
  theta, net_state = net.init(jax.random.key(3), jnp.zeros((1, 4, 4, 1)), True)
  phi = group.reparam.inverse(theta)
  opt_state = group.optimizer(RATE, None, None).init(phi)
  record = Record(*(jnp.full((TASKS + 1, TASKS), -1),) * 2, *(jnp.full(TASKS, -1),) * 4)
  s = State(train.TrainState(phi, opt_state, net_state), p.method.memory(p, phi, net_state), record)
  return p, p.method.start(p, NET, s) if p.method.start else s


def weights(s):
  return {name: np.float64(x) for name, x in s.trained.phi['output'].items()}


def softmax(z):
  e = np.exp(z - z.max(-1, keepdims=True))
  return e / e.sum(-1, keepdims=True)


def inputs(images):
  return np.float64(images).reshape(len(images), -1) / 255


def gradient(theta, images, labels):
  """Of the mean cross-entropy of a linear network."""
  x = inputs(images)
  d = (softmax(x @ theta['w'] + theta['b']) - np.eye(CLASSES)[labels]) / len(x)
  return {'w': x.T @ d, 'b': d.sum(0)}


def batch(p, task, positions):
  return tasks.take(p.parts['train'], p.pixels, task, jnp.asarray(positions))


def compiled(p):
  """A step and the end of a task: (s, task, positions, key) → s, images, labels; (s, task) → s."""
  @jax.jit
  def step(s, task, positions, key):
    images, labels = tasks.take(p.parts['train'], p.pixels, task, positions)
    return programs.step(p, NET, s, task, images, labels, task, key)[0], images, labels
  return (lambda s, task, positions, key=0: step(s, task, jnp.array(positions), jax.random.key(key)),
          jax.jit(lambda s, task: programs.consolidate(p, NET, s, task)))


def close(found, expected, **tolerance):
  for name in ('w', 'b'):
    np.testing.assert_allclose(found[name], expected[name], **({'rtol': 2e-5, 'atol': 2e-6} | tolerance))


# ---- outputs ---------------------------------------------------------------------------------------------------------


def test_which_outputs_have_a_part():
  logits = jnp.arange(12.0).reshape(2, 6)
  inf = np.inf
  assert Heads('domain', 6, 3).units == 6 and Heads('task', 2, 3).units == Heads('class', 2, 3).units == 6
  np.testing.assert_array_equal(Heads('domain', 6, 3).among(logits, 1, 1), logits)
  np.testing.assert_array_equal(Heads('task', 2, 3).among(logits, 1, 2), [[-inf, -inf, 2, 3, -inf, -inf],
                                                                        [-inf, -inf, 8, 9, -inf, -inf]])
  np.testing.assert_array_equal(Heads('task', 2, 3).among(logits, jnp.array([0, 2]), 2), [[0, 1, -inf, -inf, -inf, -inf],
                                                                                        [-inf, -inf, -inf, -inf, 10, 11]])
  np.testing.assert_array_equal(Heads('class', 2, 3).among(logits, 0, 1)[0], [0, 1, 2, 3, -inf, -inf])
  np.testing.assert_array_equal(Heads('task', 2, 3).among(logits, 0, 1, 'class')[0], [0, 1, 2, 3, -inf, -inf])
  assert Heads('class', 2, 3).labels(jnp.array([0, 1]), jnp.array([0, 2])).tolist() == [0, 5]
  assert Heads('domain', 2, 3).labels(jnp.array([0, 1]), 2).tolist() == [0, 1]


def test_hits_are_counted_exactly_with_outputs_of_the_task_and_of_all():
  p, s = make('fine_tune', 'task', tasks.split)
  theta = weights(s)
  count = jax.jit(lambda phi, task, latest: hits(p, phi, {}, 'test', task, latest))
  for task, latest in ((0, 0), (1, 2), (2, 2)):
    rows = np.asarray(p.parts['test'].rows)[task][:int(p.parts['test'].counts[task])]
    z = inputs(p.parts['test'].images[rows]) @ theta['w'] + theta['b']
    labels = np.asarray(p.parts['test'].labels)[rows]
    own = z[:, 2 * task:2 * task + 2].argmax(1) == labels
    every = z[:, :2 * (latest + 1)].argmax(1) == labels + 2 * task
    assert count(s.trained.phi, task, latest).tolist() == [own.sum(), every.sum()]


# ---- pulls -----------------------------------------------------------------------------------------------------------


def test_penalties_of_several_tasks_add_up_in_two_copies():
  rng = np.random.default_rng(0)
  strengths, centres = rng.random((3, 5)) * (rng.random((3, 5)) > 0.3), rng.normal(size=(3, 5))
  strengths[:, 0] = 0
  anchor = methods.Anchor(jnp.zeros(5), jnp.array(centres[0], jnp.float32))
  for strength, centre in zip(strengths, centres, strict=True):
    anchor = methods.add(anchor, jnp.array(strength, jnp.float32), jnp.array(centre, jnp.float32))
  theta, g = rng.normal(size=5), rng.normal(size=5)
  expected = g + 0.7 * (strengths * (theta - centres)).sum(0)
  np.testing.assert_allclose(methods.pull(anchor, jnp.array(theta, jnp.float32), 0.7, jnp.array(g, jnp.float32)), expected,
                             rtol=2e-5, atol=1e-6)


def fisher(theta, images):
  """E_x Σ_y p_y (x (e_y − p))²: the gradient of log p_y of a linear network."""
  x = inputs(images)
  p = softmax(x @ theta['w'] + theta['b'])
  d = np.eye(CLASSES)[None] - p[:, None]   # [x, y, output]
  weight = p[:, :, None] * d ** 2
  return {'w': np.einsum('ni,nyo->io', x ** 2, weight) / len(x), 'b': weight.sum((0, 1)) / len(x)}


def fisher_images(p, task):
  key = jax.random.fold_in(train.stream(0, methods.FISHER), task)
  return batch(p, task, jax.random.randint(key, (5,), 0, 24))[0]


@pytest.mark.parametrize('algorithm', ['ewc', 'ewc_online'])
def test_ewc(algorithm):
  """Two tasks, then two steps on the third, whose gradients have the penalties of both."""
  p, s = make(algorithm, ewc_decay=0.5)
  step, end = compiled(p)
  past = []
  for task in range(2):
    s, images, labels = step(s, task, [1, 5, 7, 2])
    theta = weights(s)
    s = end(s, task)
    past.append((fisher(theta, fisher_images(p, task)), theta))
  if algorithm == 'ewc_online':
    past = [({name: 0.5 * past[0][0][name] + past[1][0][name] for name in 'wb'}, past[1][1])]
  close(s.memory.strength['output'], {name: sum(f[name] for f, _ in past) for name in 'wb'})
  s, *_ = step(s, 2, [4, 6, 10, 11])   # at the first step there is nothing that pulls back to the latest weights
  before = weights(s)
  s, images, labels = step(s, 2, [0, 3, 8, 9])
  g = gradient(before, images, labels)
  pulled = {name: g[name] + 0.7 * sum(f[name] * (before[name] - centre[name]) for f, centre in past) for name in 'wb'}
  close(weights(s), {name: before[name] - RATE * pulled[name] for name in 'wb'})


def test_fisher_information_of_own_outputs_counts_theirs_alone():
  p, s = make('ewc', 'task', tasks.split)
  found = jax.jit(lambda phi: methods.fisher(p, NET, phi, {}, 1))(s.trained.phi)['output']['w']
  assert (found[:, 2:4] > 0).any() and not found[:, :2].any() and not found[:, 4:].any()
  p, s = make('ewc', 'class', tasks.split)
  found = jax.jit(lambda phi: methods.fisher(p, NET, phi, {}, 1))(s.trained.phi)['output']['w']
  assert (found[:, :4] > 0).any(0).all() and not found[:, 4:].any() and np.isfinite(found).all()


def test_fisher_information_is_of_images_of_the_task():
  """Of five images, and not of those that fill up its rows."""
  p, s = make('ewc', 'task', tasks.split, fisher_images=20)
  part = p.parts['train']._replace(counts=jnp.array([8, 5, 8]))
  def of(filled):
    rows = part.rows.at[1, 5:].set(part.rows[filled, 5:])
    return jax.jit(lambda phi: methods.fisher(p._replace(parts=p.parts | {'train': part._replace(rows=rows)}), NET, phi, {}, 1))(
      s.trained.phi)['output']['w']
  np.testing.assert_array_equal(of(0), of(2))
  assert (of(0) > 0).any()


def test_weights_that_made_the_loss_rise_have_no_importance():
  p, s = make('synaptic_intelligence', damping=0.01)
  work = jax.tree.map(lambda x: jnp.where(jnp.arange(x.size).reshape(x.shape) % 2 == 0, -0.5, 0.25), s.memory.work)
  found = p.method.consolidate(p, NET, s._replace(memory=s.memory._replace(work=work)), 0).memory.anchor.strength
  jax.tree.map(lambda w, x: np.testing.assert_allclose(x, np.where(w < 0, 0, 25), rtol=1e-6), work, found)


def test_synaptic_intelligence():
  p, s = make('synaptic_intelligence', damping=0.01)
  step, end = compiled(p)
  begun, work = weights(s), {'w': 0.0, 'b': 0.0}
  omega, centre = {'w': 0.0, 'b': 0.0}, begun
  for task in range(2):
    for positions in ([1, 5, 7, 2], [3, 4, 6, 9]):
      before = weights(s)
      s, images, labels = step(s, task, positions)
      g = gradient(before, images, labels)
      expected = {n: before[n] - RATE * (g[n] + 2 * 0.7 * omega[n] * (before[n] - centre[n])) for n in 'wb'}
      close(weights(s), expected, atol=1e-5)
      work = {n: work[n] - g[n] * (weights(s)[n] - before[n]) for n in 'wb'}
    s = end(s, task)
    centre = weights(s)
    omega = {n: omega[n] + np.maximum(work[n], 0) / ((centre[n] - begun[n]) ** 2 + 0.01) for n in 'wb'}
    close(s.memory.anchor.strength['output'], omega, rtol=1e-3, atol=1e-4)   # small changes of float32 are squared
    begun, work = centre, {'w': 0.0, 'b': 0.0}


# ---- a reservoir -----------------------------------------------------------------------------------------------------


def test_a_reservoir_is_a_uniform_sample_of_all_that_came_by():
  size, counts = 5, np.zeros((2, 8))
  @jax.jit
  @jax.vmap
  def two_tasks(key):
    empty = methods.Reservoir(jnp.full(size, jnp.inf), jnp.zeros(size, jnp.int32), jnp.zeros(size, jnp.int32))
    ranks = jax.random.uniform(key, (2, 8))
    return ranks, methods.keep_some(methods.keep_some(empty, ranks[0], 0), ranks[1], 1)
  ranks, kept = jax.tree.map(np.asarray, two_tasks(jax.random.split(jax.random.key(0), 2000)))
  smallest = np.argsort(ranks.reshape(2000, 16), 1)[:, :size]
  np.testing.assert_array_equal(kept.task * 8 + kept.position, smallest)
  np.add.at(counts, (kept.task, kept.position), 1)
  # 2,000 · 5/16 = 625 times each, with standard deviation 21.
  assert np.abs(counts - 625).max() < 4 * 21


def test_fewer_images_than_the_reservoir_holds():
  p, s = make('replay', 'task', tasks.split)
  s = p.method.consolidate(p, NET, s, 0)
  assert np.isfinite(s.memory.rank).sum() == 7 and (s.memory.task == 0).all()   # of 8
  p, s = make('replay', 'task', tasks.split, memory_images=20)
  s = p.method.consolidate(p, NET, s, 0)
  assert np.isfinite(s.memory.rank).sum() == 8 and np.sort(s.memory.position[:8]).tolist() == list(range(8))


def test_a_reservoir_holds_each_image_once_with_a_rank_of_its_own():
  """Tasks of eight and five images: rows that fill up the second are none, and no two tasks have the same ranks."""
  p, s = make('replay', 'task', tasks.split, memory_images=20)
  part = p.parts['train']._replace(counts=jnp.array([8, 5, 8]))
  p = p._replace(parts=p.parts | {'train': part})
  for task in range(2):
    s = p.method.consolidate(p, NET, s, task)
  held = np.isfinite(s.memory.rank)
  assert held.sum() == 13 and len(set(np.asarray(s.memory.rank)[held])) == 13
  kept = sorted(zip(np.asarray(s.memory.task)[held].tolist(), np.asarray(s.memory.position)[held].tolist(), strict=True))
  assert kept == [(0, i) for i in range(8)] + [(1, i) for i in range(5)]


@pytest.mark.parametrize('algorithm', ['replay', 'a_gem'])
def test_earlier_images_are_learned_with_the_outputs_of_their_task(algorithm):
  p, s = make(algorithm, 'task', tasks.split)
  step, end = compiled(p)
  s = end(step(s, 0, [1, 5, 7, 2])[0], 0)

  def of(theta, task, images, labels):
    """With outputs of one task alone: others are as good as not there."""
    own = slice(2 * task, 2 * task + 2)
    x = inputs(images)
    d = (softmax(x @ theta['w'][:, own] + theta['b'][own]) - np.eye(2)[labels]) / len(x)
    g = {n: np.zeros_like(theta[n]) for n in 'wb'}
    g['w'][:, own], g['b'][own] = x.T @ d, d.sum(0)
    return g
  pick = np.asarray(jax.random.randint(jax.random.key(0), (BATCH,), 0, 7))
  before = weights(s)
  old = of(before, 0, *batch(p, 0, s.memory.position[pick]))
  s, images, labels = step(s, 1, [0, 3, 4, 6])
  g = of(before, 1, images, labels)
  if algorithm == 'replay':
    g = {n: (g[n] + old[n]) / 2 for n in 'wb'}   # of A-GEM nothing is to be projected: no output is of both
  close(weights(s), {n: before[n] - RATE * g[n] for n in 'wb'})


@pytest.mark.parametrize('algorithm', ['replay', 'a_gem'])
def test_learning_with_a_reservoir(algorithm):
  p, s = make(algorithm)
  step, end = compiled(p)
  before = weights(s)
  s, images, labels = step(s, 0, [1, 5, 7, 2])
  close(weights(s), {n: before[n] - RATE * gradient(before, images, labels)[n] for n in 'wb'})   # nothing to be replayed yet
  s = end(s, 0)
  for attempt in range(4):
    pick = np.asarray(jax.random.randint(jax.random.key(attempt), (BATCH,), 0, 7))
    old = gradient(weights(s), *batch(p, 0, s.memory.position[pick]))
    before = weights(s)
    s, images, labels = step(s, 1, [0, 3, 8, 9], attempt)
    g = gradient(before, images, labels)
    if algorithm == 'replay':
      g = {n: (g[n] + old[n]) / 2 for n in 'wb'}
    elif (along := sum((g[n] * old[n]).sum() for n in 'wb')) < 0:
      g = {n: g[n] - along / sum((old[m] ** 2).sum() for m in 'wb') * old[n] for n in 'wb'}
    close(weights(s), {n: before[n] - RATE * g[n] for n in 'wb'})


def test_earlier_images_are_changed_at_random_as_those_of_the_task_are(monkeypatch):
  p, s = make('replay')
  step, end = compiled(p)
  s = end(step(s, 0, [1, 5, 7, 2])[0], 0)
  p.config.augment = 'inverted'
  monkeypatch.setitem(AUGMENTATIONS, 'inverted', lambda key, images: 255 - images)
  pick = np.asarray(jax.random.randint(jax.random.key(0), (BATCH,), 0, 7))
  images, labels = batch(p, 0, s.memory.position[pick])
  before, old = weights(s), gradient(weights(s), 255 - images, labels)
  s, images, labels = compiled(p)[0](s, 1, [0, 3, 8, 9])
  close(weights(s), {n: before[n] - RATE * (gradient(before, images, labels)[n] + old[n]) / 2 for n in 'wb'})


def test_what_is_kept_of_the_past_in_bytes():
  """By hand: 16 · 6 + 6 weights of four bytes; two copies of them; two networks more; 7 or 3 · 24 images of 16 pixels with label
  and task; masks of 12 bytes for each of three tasks."""
  expected = {'ewc': 2 * 4 * 102, 'synaptic_intelligence': 2 * 4 * 102, 'separate': 2 * 4 * 102, 'replay': 7 * 18,
              'joint': 3 * 24 * 18, 'efficient_packnet': 3 * 12, 'fine_tune': 0}
  for algorithm, size in expected.items():
    p, s = make(algorithm, densities=(0.1, 0.5))
    s = s._replace(trained=s.trained._replace(net_state={'norm': {'average': np.zeros(5, np.float32)}}))
    if algorithm != 'separate':   # BatchNorm's averages are the network's own, of which a pull keeps no copy
      assert p.method.bytes_kept(p, s, 16) == size, algorithm
    else:
      assert p.method.bytes_kept(p, s, 16) == size + 2 * 4 * 5


def test_projection():
  """(1, −2) against (0, 1): what is left is (1, 0). Where both agree, and against nothing, it is the gradient itself."""
  g = {'a': jnp.array([1.0]), 'b': jnp.array([-2.0])}
  for reference, expected in (((0.0, 3.0), (1, 0)), ((0.0, -1.0), (1, -2)), ((0.0, 0.0), (1, -2)), ((-1.0, 0.0), (0, -2))):
    found = methods.project(g, {'a': jnp.array(reference[:1]), 'b': jnp.array(reference[1:])})
    np.testing.assert_allclose([found['a'][0], found['b'][0]], expected, atol=1e-7)


def test_joint_batches_are_of_all_tasks_so_far():
  p, s = make('joint')
  drawn = {t: np.asarray(jax.random.randint(jax.random.fold_in(train.stream(0, programs.TASKS), 12 + t), (BATCH,), 0, 3))
           for t in range(3)}
  order = np.asarray(jax.random.permutation(train.batches_key(0, 2), 24))   # six steps of a task: one epoch each
  expected = weights(s)
  for t in range(3):
    pairs = [batch(p, int(task), [position]) for task, position in zip(drawn[t], order[4 * t:4 * t + 4], strict=True)]
    g = gradient(expected, np.concatenate([x for x, _ in pairs]), np.concatenate([y for _, y in pairs]))
    expected = {n: expected[n] - RATE * g[n] for n in 'wb'}
  s, _ = jax.jit(lambda s: programs.epoch(p, NET, s, 2, 0, 0, 3))(s)
  close(weights(s), expected, atol=1e-5)


# ---- masks -----------------------------------------------------------------------------------------------------------


def two_layers(units):
  return lambda images, training: hk.Linear(units, name='output')(jax.nn.relu(hk.Linear(5, name='hidden')(hk.Flatten()(images))))


@pytest.mark.parametrize('scenario, sequence, restart', [
  ('domain', tasks.permuted, True), ('task', tasks.split, True), ('task', tasks.split, False)])
def test_packnet(scenario, sequence, restart):
  """Exact shares by layer in two rounds; what a task has learned keeps its bits, and its outputs are no other's, under momentum
  that goes on from task to task as well."""
  p, s = make('packnet', scenario, sequence, 2.0, 'momentum', two_layers, prune_rounds=2, restart=restart)
  learn = jax.jit(lambda s, task, first, last: programs.epoch(p, NET, s, task, 0, first, last)[0])
  prune, consolidate, switch, recall = (jax.jit(lambda s, *a, f=f: f(p, NET, s, *a)) for f in (
    programs.prune, programs.consolidate, programs.switch, lambda p, n, s, task: packing.recall(p, s, task)))
  own = set() if scenario == 'domain' else {'output'}
  # A third of 80 weights, and of 30 of the outputs, to each task; half of what goes does so in the first round.
  counts = {'hidden': ((53, 26), (40, 26), (27, 26)), 'output': ((20, 10), (15, 10), (10, 10))}
  learned = []
  for task in range(TASKS):
    s = learn(s, task, 0, 2)
    for number in range(2):
      before = jax.tree.map(np.abs, s.trained.phi)
      live = {n: np.asarray(s.memory.forward[n]['w']) for n in s.memory.forward}
      s = prune(s, task, number)
      for name in {'hidden', 'output'} - own:
        mask, used = np.asarray(s.memory.forward[name]['w']), s.memory.tasks.bits[name]['w'][:task]
        old = np.unpackbits(np.asarray(used), axis=1, count=mask.size).any(0).reshape(mask.shape)
        fresh = mask & ~old
        assert (mask & old == old).all() and fresh.sum() == counts[name][task][number]
        kept, gone = before[name]['w'][fresh], before[name]['w'][live[name] & ~mask]
        assert gone.size == 0 or kept.min() >= gone.max()
      s = learn(s, task, 2 + 2 * number, 4 + 2 * number)
    s = consolidate(s, task)
    learned.append(jax.tree.map(np.asarray, recall(s, task)[0]))
    if own:   # the columns of a task in the layer of outputs
      learned[-1]['output'] = {n: x[..., 2 * task:2 * task + 2] for n, x in learned[-1]['output'].items()}
    if task + 1 < TASKS:
      s = switch(s, task + 1)
  for task, before in enumerate(learned):
    now = jax.tree.map(np.asarray, recall(s, task)[0])
    if own:
      now['output'] = {n: x[..., 2 * task:2 * task + 2] for n, x in now['output'].items()}
    for a, b in zip(jax.tree.leaves(before), jax.tree.leaves(now), strict=True):
      np.testing.assert_array_equal(a.view(np.uint32), b.view(np.uint32))
  assert np.abs(learned[0]['hidden']['w'] - learned[2]['hidden']['w']).max() > 0


def test_efficient_packnet_keeps_the_sparsest_mask_before_one_that_fails():
  densities = (0.1, 0.3, 0.6, 0.9)
  p, s = make('efficient_packnet', alpha=1.0, forward=two_layers, densities=densities, gamma=0.8)
  s = jax.jit(lambda s: programs.epoch(p, NET, s, 0, 0, 0, 6)[0])(s)
  theta = jax.tree.map(np.float64, s.trained.phi)
  images, labels = tasks.take(p.parts['validation'], p.pixels, 0, jnp.arange(6))
  flat = np.concatenate([np.abs(theta[name]['w']).ravel() for name in ('hidden', 'output')])

  def accuracy(count):
    least = np.sort(flat)[-count]
    w = {name: np.where(np.abs(theta[name]['w']) >= least, theta[name]['w'], 0) for name in ('hidden', 'output')}
    h = np.maximum(inputs(images) @ w['hidden'] + theta['hidden']['b'], 0)
    return ((h @ w['output'] + theta['output']['b']).argmax(1) == np.asarray(labels)).mean()
  dense, chosen = accuracy(110), None
  for density in densities[::-1]:
    count = int(density * 110)
    if not accuracy(count) > 0.8 * dense:
      break
    chosen = count
  s = jax.jit(lambda s: programs.prune(p, NET, s, 0, 0))(s)
  kept = sum(int(x.sum()) for x in jax.tree.leaves(s.memory.forward))
  assert kept == (chosen or 99) and bool(s.memory.met[0]) == (chosen is not None)
  assert float(s.memory.dense[0]) == pytest.approx(dense) and float(s.memory.score[0]) == pytest.approx(accuracy(kept))
  free = s.trained.opt_state.free
  for name in ('hidden', 'output'):   # under the mask until the task ends
    np.testing.assert_array_equal(free[name]['w'], s.memory.forward[name]['w'])
  again = jax.jit(lambda s: programs.prune(p, NET, s, 0, 1))(s)   # one search, whatever the number of rounds
  assert jax.tree.all(jax.tree.map(lambda a, b: bool(jnp.array_equal(a, b)), s.memory.forward, again.memory.forward))


def test_efficient_packnet_by_taylor_expansion():
  """The loss of a mask is not evaluated: L + Σ g δ + ½ Σ h δ², with gradients of a network of two layers by hand."""
  densities, gamma = (0.1, 0.3, 0.6, 0.9), 0.9
  p, s = make('efficient_packnet', alpha=2.0, forward=two_layers, densities=densities, gamma=gamma, estimate='taylor',
              fisher_images=8)
  s = jax.jit(lambda s: programs.epoch(p, NET, s, 1, 0, 0, 6)[0])(s)
  phi = jax.tree.map(np.float64, s.trained.phi)
  theta = {name: {'w': x['w'] * np.abs(x['w']), 'b': x['b']} for name, x in phi.items()}
  key = jax.random.fold_in(train.stream(0, packing.ESTIMATE), 1)
  images, labels = tasks.take(p.parts['validation'], p.pixels, 1, jax.random.randint(key, (8,), 0, 6))

  loss, g, h = 0.0, {'hidden': 0.0, 'output': 0.0}, {'hidden': 0.0, 'output': 0.0}
  for x, label in zip(inputs(images), np.asarray(labels), strict=True):
    before = x @ theta['hidden']['w'] + theta['hidden']['b']
    hidden = np.maximum(before, 0)
    share = softmax(hidden @ theta['output']['w'] + theta['output']['b'])
    d = share - np.eye(CLASSES)[label]
    of = {'output': np.outer(hidden, d), 'hidden': np.outer(x, (theta['output']['w'] @ d) * (before > 0))}
    loss -= np.log(share[label]) / 8
    g = {name: g[name] + of[name] / 8 for name in g}
    h = {name: h[name] + of[name] ** 2 / 8 for name in h}

  def keeping(count):
    least = np.sort(np.concatenate([np.abs(phi[name]['w']).ravel() for name in g]))[-count]
    return {name: np.abs(phi[name]['w']) >= least for name in g}

  def likelihood(count):
    change = 0.0
    for name, mask in keeping(count).items():
      delta = np.where(mask, 0, -theta[name]['w'])
      change += (g[name] * delta + h[name] * delta ** 2 / 2).sum()
    return np.exp(-loss - change)
  passed = [int(density * 110) for density in densities]
  while passed and likelihood(passed[-1]) > gamma * np.exp(-loss):
    chosen = passed.pop()
  assert 0 < len(passed) < len(densities)   # some pass, some do not
  s = jax.jit(lambda s: programs.prune(p, NET, s, 1, 0))(s)
  for name, mask in keeping(chosen).items():
    np.testing.assert_array_equal(s.memory.forward[name]['w'], mask)
  images, labels = tasks.take(p.parts['validation'], p.pixels, 1, jnp.arange(6))   # told of it is the accuracy, as ever
  w = {name: np.where(keeping(chosen)[name], x['w'], 0) for name, x in theta.items()}
  out = np.maximum(inputs(images) @ w['hidden'] + theta['hidden']['b'], 0) @ w['output'] + theta['output']['b']
  reached = (out.argmax(1) == np.asarray(labels)).mean()
  hidden = np.maximum(inputs(images) @ theta['hidden']['w'] + theta['hidden']['b'], 0)
  dense = ((hidden @ theta['output']['w'] + theta['output']['b']).argmax(1) == np.asarray(labels)).mean()
  assert float(s.memory.score[1]) == pytest.approx(reached) and float(s.memory.dense[1]) == pytest.approx(dense)
  # The estimate let this mask pass; whether it is good enough is told by its accuracy.
  assert bool(s.memory.met[1]) == (reached > gamma * dense)


def normalised(units):
  def forward(images, training):
    x = hk.Linear(5, with_bias=False, name='hidden')(hk.Flatten()(images) - 0.5)
    return hk.Linear(units, name='output')(jax.nn.relu(hk.BatchNorm(True, True, 0.9, name='norm')(x, training)))
  return forward


@pytest.mark.parametrize('rest', ['own', 'frozen'])
def test_batch_norm(rest):
  """A task's own: scale, offset and averages are stored with it. Frozen: those of the first task are all that there are."""
  p, s = make('packnet', 'domain', forward=normalised, rest=rest)
  p = p._replace(batch_norm=True)
  learn = jax.jit(lambda s, task: programs.epoch(p, NET, s, task, 0, 0, 6)[0])
  prune, consolidate, switch, recall = (jax.jit(lambda s, *a, f=f: f(p, NET, s, *a)) for f in (
    programs.prune, programs.consolidate, programs.switch, lambda p, n, s, task: packing.recall(p, s, task)))
  learned = []
  for task in range(TASKS):
    s = consolidate(prune(learn(s, task), task, 0), task)
    learned.append(jax.tree.map(np.asarray, recall(s, task)))
    assert all(np.isfinite(x).all() for x in jax.tree.leaves((learned[-1], s.trained.phi)))
    if task + 1 < TASKS:
      s = switch(s, task + 1)
  for task, before in enumerate(learned):
    jax.tree.map(np.testing.assert_array_equal, before, jax.tree.map(np.asarray, recall(s, task)))
  scales, averages = ([found[i][name][leaf] for found in learned]
                      for i, name, leaf in ((0, 'norm', 'scale'), (1, 'norm/~/mean_ema', 'average')))
  for values in (scales, averages):
    assert (values[0] != np.ones_like(values[0])).any() and (values[0] != 0).any()
    assert np.array_equal(values[0], values[2]) == (rest == 'frozen')


# ---- measures --------------------------------------------------------------------------------------------------------

NAN = np.nan
MATRIX = np.array([[0.1, 0.2, 0.15], [0.9, 0.3, NAN], [0.8, 0.7, 0.2], [0.6, 0.75, 0.8]])


def test_measures_by_hand():
  np.testing.assert_allclose(measures.averages(MATRIX), [0.9, 0.75, (0.6 + 0.75 + 0.8) / 3])
  assert measures.backward_transfer(MATRIX) == pytest.approx(((0.6 - 0.9) + (0.75 - 0.7)) / 2)
  assert measures.forward_transfer(MATRIX) == pytest.approx(((0.3 - 0.2) + (0.2 - 0.15)) / 2)
  assert measures.forgetting(MATRIX) == pytest.approx(((0.9 - 0.6) + (0.7 - 0.75)) / 2)
  some = np.where(np.arange(4)[:, None] == 2, np.where(np.eye(4, 3, -1, bool), MATRIX, NAN), MATRIX)   # line 2: its own task
  assert measures.forgetting(some) == pytest.approx(((0.9 - 0.6) + (0.7 - 0.75)) / 2)
  assert np.isnan(measures.averages(some)[1]) and np.isnan(measures.forward_transfer(np.where(MATRIX == 0.15, NAN, MATRIX)))


def test_overlap_of_masks_by_hand():
  found = measures.intersection_over_union(np.array([[1, 1, 0, 0], [0, 1, 1, 1], [0, 0, 0, 0]], bool))
  np.testing.assert_allclose(found, [[1, 1 / 4, 0], [1 / 4, 1, 0], [0, 0, 1]])

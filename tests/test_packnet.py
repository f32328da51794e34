"""Algorithm 1: masks against a sort, the walk over densities against tables and a loop, and three tasks learned for good."""
import functools
import warnings
from fractions import Fraction

import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from powerprop import masks, packnet, powerpropagation, protect, target_propagation, task_masks, with_free
from powerprop.packnet import Found

RNG = np.random.default_rng(2)
PHI = {'a': jnp.asarray(RNG.normal(size=(6, 5)), jnp.float32), 'b': None, 'c': jnp.asarray(RNG.normal(size=(4, 3)), jnp.float32)}
FREE = {'a': jnp.asarray(RNG.random((6, 5)) < 0.4), 'b': jnp.ones(7, bool), 'c': jnp.asarray(RNG.random((4, 3)) < 0.4)}
QUICK = functools.partial(jax.jit, compiler_options={'xla_backend_optimization_level': '0'})   # compiling is nearly all the time
LINE = {'w': jnp.arange(1.0, 17.0)}   # the k largest are the last k


def bits(x):
  return np.asarray(x).view(np.uint8)


def largest(x, k):
  """By a sort."""
  mask = np.zeros(x.size, bool)
  mask[np.argsort(-np.abs(x))[:k]] = True
  return mask


# ---- one mask --------------------------------------------------------------------------------------------------------


def test_efficient_masks_are_the_largest_of_all():
  choose = QUICK(packnet.efficient_masks)
  for k in (0, 7, 42):
    found = choose(PHI, jnp.int32(k))
    assert found['b'] is None
    both = np.concatenate([np.ravel(PHI['a']), np.ravel(PHI['c'])])
    np.testing.assert_array_equal(np.concatenate([np.ravel(found['a']), np.ravel(found['c'])]), largest(both, k))
  found = choose(PHI, {'a': jnp.int32(4), 'b': None, 'c': jnp.int32(9)})
  np.testing.assert_array_equal(np.ravel(found['a']), largest(np.ravel(PHI['a']), 4))
  np.testing.assert_array_equal(np.ravel(found['c']), largest(np.ravel(PHI['c']), 9))


def test_packnet_masks_are_all_that_is_used_and_the_largest_of_the_free():
  choose = QUICK(packnet.packnet_masks)
  for counts in ({'a': 3, 'b': None, 'c': 2}, {'a': 30, 'b': None, 'c': 12}):   # of the second there are fewer: it takes them all
    found = choose(PHI, FREE, jax.tree.map(jnp.int32, counts))
    for name in ('a', 'c'):
      free = np.ravel(FREE[name])
      new = largest(np.where(free, np.ravel(PHI[name]), 0), min(counts[name], free.sum()))
      np.testing.assert_array_equal(np.ravel(found[name]), new | ~free)
  found = choose(PHI, FREE, jnp.int32(5))
  both = np.concatenate([np.where(np.ravel(FREE[n]), np.ravel(PHI[n]), 0) for n in ('a', 'c')])
  used = np.concatenate([~np.ravel(FREE[n]) for n in ('a', 'c')])
  np.testing.assert_array_equal(np.concatenate([np.ravel(found['a']), np.ravel(found['c'])]), largest(both, 5) | used)


def test_packnet_rounds():
  """10 of 40 weights to a task, in four rounds: 30 go, in as equal parts as can be, and none comes back; the next has the rest.

  Counts by hand: 40 → 32.5, rounded to even, → 32 − 22/3 = 24.67 → 25 − 15/2 = 17.5 → 18 → 10; then of 30 free, 30 − 20/4 = 25
  → 20 → 15 → 10."""
  rng = np.random.default_rng(4)
  counts, choose = QUICK(packnet.packnet_counts, static_argnums=(2, 4)), QUICK(packnet.packnet_masks)
  free = {'w': jnp.ones(40, bool)}
  for expected in ([32, 25, 18, 10], [25, 20, 15, 10]):
    seen = {'w': jnp.ones(40, bool)}
    for number, k in enumerate(expected):
      phi = {'w': jnp.asarray(rng.normal(size=40), jnp.float32)}   # as training between rounds may leave them
      count = counts(phi, free, 0.25, number, 4, seen)
      assert count['w'].dtype == jnp.int32 and count == {'w': k}
      live = np.asarray(seen['w'] & free['w'])
      seen = choose(phi, free, count, seen)
      np.testing.assert_array_equal(seen['w'], largest(np.where(live, phi['w'], 0), k) | ~np.asarray(free['w']))
    free = {'w': free['w'] & ~seen['w']}
  assert packnet.packnet_counts(PHI, FREE, 1.0) == {'a': int(FREE['a'].sum()), 'b': None, 'c': int(FREE['c'].sum())}
  assert packnet.packnet_counts(PHI, FREE, 0.01) == {'a': 1, 'b': None, 'c': 1}
  assert packnet.packnet_counts({'w': jnp.ones(100)}, {'w': jnp.ones(100, bool)}, 0.29) == {'w': 29}
  for share, rounds in ((0.0, 1), (1.1, 1), (0.5, 0)):
    with pytest.raises(ValueError, match=rf'share is in .* got {share} and {rounds}\.'):
      packnet.packnet_counts(PHI, FREE, share, rounds=rounds)


def test_rounds_are_counted_from_zero():
  tree = {'w': jnp.ones(40)}, {'w': jnp.ones(40, bool)}
  for number in (-1, 4, 5):
    with pytest.raises(ValueError, match=f'round is one of 0 to 3; got {number}'):
      packnet.packnet_counts(*tree, 0.25, number, 4)
  last = QUICK(lambda r: packnet.packnet_counts(*tree, 0.25, r, 4))
  assert int(last(9)['w']) == int(last(3)['w']) == 10


def test_counts_are_floors_of_densities_as_they_are_written():
  """⌊s · dim⌋ with s as the fraction that its digits mean: 0.29 · 100 is 29, where floats have 28.999."""
  weights = {'a': jnp.zeros((10, 10)), 'b': None, 'c': jnp.zeros((3, 7, 1, 1))}
  digits = ['0.07', '0.29', '0.5', '0.57', '1']
  for layerwise in (False, True):
    found = packnet.make_counts(weights, [float(d) for d in digits], layerwise)
    expected = {n: [int(Fraction(d) * n) for d in digits] for n in (100, 21, 121)}
    assert jax.tree.map(list, jax.tree.map(np.asarray, found)) == (
      {'a': expected[100], 'b': None, 'c': expected[21]} if layerwise else expected[121])
  np.testing.assert_array_equal(packnet.make_counts(weights, np.array([0.5, 1.0])), packnet.make_counts(weights, [0.5, 1.0]))
  with pytest.raises(ValueError, match=r'densities are a list of numbers; got 0\.2'):
    packnet.make_counts(weights, 0.2)
  for bad in ([], [0.5, 0.2], [0.2, 0.2], [0.0, 0.5], [0.5, 1.1]):
    with pytest.raises(ValueError, match=r'densities increase and lie in \(0, 1\]; got \['):
      packnet.make_counts(weights, bad)
  with pytest.raises(ValueError, match=r'density 0\.01 keeps less than one of 21 weights'):
    packnet.make_counts(weights, [0.01, 1.0], layerwise=True)


# ---- the walk over densities -----------------------------------------------------------------------------------------


def kept(mask):
  return jnp.sum(mask['w'], dtype=jnp.int32)


@functools.partial(QUICK, static_argnames='side_by_side')
def search(table, counts, dense, gamma, side_by_side=True):
  """The score of a mask is what `table` [17] has for its number of weights."""
  return packnet.search(lambda mask: table[kept(mask)], functools.partial(packnet.efficient_masks, LINE), counts, dense, gamma,
                        side_by_side=side_by_side)


NAN = float('nan')
WALKS = {   # scores of 2, 4, 8 and 16 weights; dense score 0.8 and γ = 0.5: a score passes above 0.4. How many are kept
    'all pass': ([.5, .6, .7, .8], 2, True), 'two pass': ([.1, .2, .5, .8], 8, True),
    'only the densest': ([.1, .2, .3, .41], 16, True), 'none: the densest, and it is said': ([.1, .2, .3, .39], 16, False),
    'none, though a sparser one would': ([.9, .9, .9, .3], 16, False),
    'the walk ends at the first that fails': ([.9, .2, .5, .8], 8, True),
    'γP itself is not enough': ([.1, .4, .5, .8], 8, True), 'NaN is not enough': ([.5, NAN, .7, .8], 8, True)}


@pytest.mark.parametrize('side_by_side', [True, False])
def test_the_last_that_passed_before_the_first_that_did_not(side_by_side):
  counts = jnp.array([2, 4, 8, 16])
  for name, (scores, count, met) in WALKS.items():
    table = jnp.zeros(17).at[counts].set(jnp.array(scores))
    found = search(table, counts, jnp.float32(0.8), jnp.float32(0.5), side_by_side=side_by_side)
    assert (int(found.count), bool(found.met)) == (count, met), name
    np.testing.assert_array_equal(found.mask['w'], np.arange(16) >= 16 - count)
    np.testing.assert_array_equal(found.scores, np.float32(scores))
    np.testing.assert_array_equal(found.score, np.float32(scores[[2, 4, 8, 16].index(count)]))


def test_a_search_by_layers_and_by_packnets_rule():
  counts = packnet.make_counts(PHI, [0.1, 0.5, 1.0], layerwise=True)
  found = QUICK(lambda: packnet.search(masks.density, lambda k: packnet.packnet_masks(PHI, FREE, k), counts, 1.0, 0.8))()
  assert isinstance(found, Found) and jax.tree.map(int, found.count) == {'a': 15, 'b': None, 'c': 6}
  np.testing.assert_allclose(found.score, masks.density(found.mask))
  with pytest.raises(ValueError, match='counts are of one length'):
    packnet.search(masks.density, lambda k: PHI, {'a': jnp.arange(3), 'c': jnp.arange(2)}, 1.0, 0.5)


def test_what_a_search_cannot_mean_is_said():
  choose, counts = functools.partial(packnet.efficient_masks, LINE), jnp.array([2, 4])
  for find in (lambda dense, gamma: packnet.search(masks.density, choose, counts, dense, gamma),
               lambda dense, gamma: packnet.search_binary(masks.density, choose, 2, 4, dense, gamma, 1)):
    with pytest.raises(ValueError, match=r'gamma is a share of the dense score, in \[0, 1\]; got 98'):
      find(1.0, 98)
    with pytest.raises(ValueError, match=r'scores are at least 0, the higher the better; all weights have -0.5'):
      find(-0.5, 0.9)
  with pytest.raises(ValueError, match=r'counts increase; got \[4, 2\]'):
    packnet.search(masks.density, choose, counts[::-1], 1.0, 0.5)
  with pytest.raises(ValueError, match='least is at most most; got 16 and 4'):
    packnet.search_binary(masks.density, choose, 16, 4, 1.0, 0.5, 2)


def test_bisection_is_that_of_a_plain_loop():
  """Every threshold from too low to too high, monotone scores: and with enough steps the least count that passes."""
  table = jnp.linspace(0, 1, 17)

  @functools.partial(QUICK, static_argnames='steps')
  def every(gammas, steps):
    choose = functools.partial(packnet.efficient_masks, LINE)
    score = lambda mask: table[kept(mask)]   # noqa: E731
    return jax.lax.map(lambda gamma: packnet.search_binary(score, choose, 1, 15, 1.0, gamma, steps), gammas)
  gammas = np.arange(-1, 33, 3) / 32
  for steps in (2, 6):
    found = every(jnp.asarray(gammas, jnp.float32), steps)
    for i, gamma in enumerate(gammas):
      low, high, met, scores = 1, 15, gamma < 15 / 16, [15 / 16]
      for _ in range(steps):
        middle = (low + high) // 2
        scores.append(middle / 16)
        low, high = (low, middle) if met and middle / 16 > gamma else (middle, high)
      assert (int(found.count[i]), bool(found.met[i]), int(found.mask['w'][i].sum())) == (high, met, high)
      np.testing.assert_allclose(found.scores[i], scores, rtol=1e-6)
      np.testing.assert_allclose(found.score[i], high / 16, rtol=1e-6)
      if steps == 6 and met:
        assert high == next(k for k in range(1, 16) if k / 16 > gamma)
  with pytest.raises(ValueError, match='steps is at least 0; got -1'):
    packnet.search_binary(lambda m: 1.0, lambda k: LINE, 1, 2, 1.0, 0.5, -1)


def test_bisection_keeps_the_densest_where_that_fails():
  """Though sparser ones would pass, as `search` does."""
  found = QUICK(lambda: packnet.search_binary(lambda mask: 1.0 / kept(mask), functools.partial(packnet.efficient_masks, LINE),
                                              1, 15, 1.0, 0.1, 4))()
  assert (int(found.count), bool(found.met), int(kept(found.mask))) == (15, False, 15)


def test_bisection_of_several_leaves_at_once():
  run = QUICK(lambda gamma: packnet.search_binary(
      masks.density, lambda k: packnet.efficient_masks(PHI, k), {'a': 2, 'b': None, 'c': 4}, {'a': 30, 'b': None, 'c': 12}, 1.0,
      gamma, 2))
  assert jax.tree.map(int, run(0.5).count) == {'a': 16, 'b': None, 'c': 8}   # 24 of 42; of (9, 6) it is 15
  assert jax.tree.map(int, run(0.2).count) == {'a': 9, 'b': None, 'c': 6}


# ---- without evaluating ----------------------------------------------------------------------------------------------


def test_taylor_change_in_numpy_and_where_it_is_exact():
  """A loss ½ Σ h (θ − c)² has no other terms: to second order the estimate is the change itself."""
  h, c, theta = (RNG.normal(size=(6, 5)) for _ in range(3))
  mask = np.asarray(FREE['a'])
  loss = lambda x: np.sum(h * (x - c) ** 2) / 2   # noqa: E731
  tree = lambda x: {'w': jnp.asarray(x, jnp.float32), 'b': jnp.ones(3)}   # noqa: E731
  change = functools.partial(packnet.taylor_change, tree(theta), tree(h * (theta - c)), {'w': jnp.asarray(mask), 'b': None})
  np.testing.assert_allclose(change(tree(h)), loss(theta * mask) - loss(theta), rtol=1e-4)
  np.testing.assert_allclose(change(), -np.sum((h * (theta - c) * theta)[~mask]), rtol=1e-4)
  for wrong in (jnp.asarray(mask[0]), jnp.asarray(mask, jnp.float32)):
    with pytest.raises(ValueError, match=r"a mask is bool and shaped like its array, \(6, 5\); got .* at \['w'\]"):
      packnet.taylor_change(tree(theta), tree(h), {'w': wrong, 'b': None})


def test_how_far_taylor_is_from_evaluating():
  """Logistic regression on made-up data, trained to a small gradient; the smallest 40 and 80 % of its weights are removed.

  Measured: the loss grows by 0.0030 and by 0.083. The estimate to second order, with the mean of squared gradients for curvature,
  is 0.84 and 0.72 of that; to first order it is 0.05 and 0.06.
  """
  rng = np.random.default_rng(4)
  x = rng.normal(size=(400, 20))
  y = (rng.random(400) < 1 / (1 + np.exp(-x @ (rng.normal(size=20) * np.linspace(0, 2, 20))))).astype(float)
  def loss(t):
    return np.mean(np.logaddexp(0, x @ t) - y * (x @ t))
  def gradients(t):
    return (1 / (1 + np.exp(-x @ t)) - y)[:, None] * x
  theta = np.zeros(20)
  for _ in range(200):
    theta -= 0.5 * gradients(theta).mean(0)
  g, fisher = gradients(theta).mean(0), (gradients(theta) ** 2).mean(0)
  def tree(v):
    return {'w': jnp.asarray(v, jnp.float32)}
  for removed in (0.4, 0.8):
    mask = largest(theta, round(20 * (1 - removed)))
    real = loss(theta * mask) - loss(theta)
    of = functools.partial(packnet.taylor_change, tree(theta), tree(g), {'w': jnp.asarray(mask)})
    first, second = float(of()), float(of(tree(fisher)))
    assert real == pytest.approx({0.4: 0.0030, 0.8: 0.083}[removed], rel=0.02)
    assert 0.65 * real < second < 0.9 * real and 0 < first < 0.1 * real


# ---- task after task -------------------------------------------------------------------------------------------------

REPARAM = powerpropagation(2.0)
NET = hk.without_apply_rng(hk.transform(lambda x: hk.Linear(3, name='head')(jax.nn.relu(hk.nets.MLP([24, 24])(x)))))
INPUTS = jnp.asarray(RNG.normal(size=(96, 8)), jnp.float32)
LABELS = jnp.asarray(np.argmax(RNG.normal(size=(3, 96, 3)) * 0.2 + INPUTS @ RNG.normal(size=(3, 8, 3)), -1))   # of three tasks
TX = protect(target_propagation(optax.adamw(0.02, weight_decay=0.01), REPARAM))


def accuracy(theta, labels):
  return jnp.mean(jnp.argmax(NET.apply(theta, INPUTS), 1) == labels)


@QUICK
def learn(phi, state, labels):
  def step(carry, _):
    phi, state = carry
    loss = lambda w: optax.softmax_cross_entropy_with_integer_labels(NET.apply(w, INPUTS), labels).mean()   # noqa: E731
    updates, state = TX.update(jax.grad(loss)(REPARAM.weights(phi)), state, phi)
    return (optax.apply_updates(phi, updates), state), None
  return jax.lax.scan(step, (phi, state), None, 120)[0]


@QUICK
def end(memory, task, phi, labels, key):
  """Lines 5 to 13: the mask, and the weights with which the next task begins."""
  weights = task_masks.shared(memory, phi)
  found = packnet.search(lambda mask: accuracy(REPARAM.weights(masks.apply(mask, phi)), labels),
                         lambda count: packnet.efficient_masks(weights, count),
                         packnet.make_counts(weights, [0.1, 0.2, 0.35, 0.5]), accuracy(REPARAM.weights(phi), labels), gamma=0.9)
  memory = task_masks.remember(memory, task, found.mask, phi)
  return memory, packnet.reinitialise(memory, phi, REPARAM.inverse(NET.init(key, INPUTS))), found


@pytest.fixture(scope='module')
def life():
  """Three tasks: (memory, parameters, logits under the mask) after each, and what was found."""
  phi = REPARAM.inverse(QUICK(NET.init)(jax.random.key(0), INPUTS))
  memory = task_masks.begin(phi, 3, heads=lambda name, leaf: name.startswith('head'))
  state, told = TX.init(phi), []
  for task in range(3):
    phi, state = learn(phi, with_free(TX.init(phi), task_masks.free(memory, phi)) if task != 1 else
                       with_free(state, task_masks.free(memory, phi)), LABELS[task])   # the second goes on with old moments
    trained = phi
    memory, phi, found = end(memory, task, phi, LABELS[task], jax.random.key(task + 1))
    told.append((memory, phi, logits(memory, task, trained), found))
  return told


@QUICK
def logits(memory, task, phi):
  return NET.apply(REPARAM.weights(task_masks.recall(memory, task, phi)), INPUTS)


def test_three_tasks_come_back_to_the_last_bit(life):
  memory, phi, _, _ = life[-1]
  for task, (_, _, expected, found) in enumerate(life):
    np.testing.assert_array_equal(bits(logits(memory, task, phi)), bits(expected))
    assert bool(found.met) and np.mean(np.argmax(expected, 1) == LABELS[task]) == pytest.approx(float(found.score))
    assert found.score > 0.8   # chance is 0.33: it has learned
  fill = QUICK(task_masks.capacity)(memory, phi)
  assert (np.asarray(fill.reused)[1:] > 0).all() and 0 < float(fill.total) < 0.9
  assert learn._cache_size() == end._cache_size() == logits._cache_size() == 1   # a switch compiles nothing


def test_two_calls_are_their_parts(life):
  _, phi, _, _ = life[0]
  def head(name, leaf):
    return name.startswith('head')
  memory, key = task_masks.begin(phi, 1, heads=head), jax.random.key(1)
  phi, _ = learn(phi, packnet.begin_task(TX, memory, phi), LABELS[0])
  expected = end(memory, 0, phi, LABELS[0], key)
  found = QUICK(lambda memory, phi: packnet.end_task(
    memory, 0, phi, REPARAM.inverse(NET.init(key, INPUTS)), lambda p: accuracy(REPARAM.weights(p), LABELS[0]),
    [0.1, 0.2, 0.35, 0.5], gamma=0.9))(memory, phi)
  jax.tree.map(lambda a, b: np.testing.assert_array_equal(*map(bits, np.atleast_1d(a, b))), tuple(found), expected)
  with pytest.raises(ValueError, match='no slot for another task: the memory has 1, all in use'):
    packnet.begin_task(TX, found.memory, found.phi)
  state = packnet.begin_task(TX, task_masks.grow(found.memory, 2), found.phi)
  jax.tree.map(np.testing.assert_array_equal, state.free, task_masks.free(found.memory, found.phi))
  jax.tree.map(np.testing.assert_array_equal, state.inner, TX.init(found.phi).inner)


@pytest.mark.parametrize('steps', [None, 3])
def test_the_end_of_a_second_task_by_layers(life, steps):
  """Masks among all weights, those of the first task too, by numbers of each layer; free weights go on from where they are."""
  memory, phi, _, _ = life[0]
  phi, _ = learn(phi, packnet.begin_task(TX, memory, phi), LABELS[1])
  fresh = REPARAM.inverse(QUICK(NET.init)(jax.random.key(9), INPUTS))
  densities, gamma = [0.1, 0.2, 0.35, 0.5, 0.9], 0.9
  found = QUICK(lambda memory, phi: packnet.end_task(
    memory, 1, phi, fresh, lambda p: accuracy(REPARAM.weights(p), LABELS[1]), densities, gamma, layerwise=True, how='left',
    side_by_side=False, steps=steps))(memory, phi)
  layers = ('mlp/~/linear_0', 'mlp/~/linear_1')

  def under(counts):
    seen = jax.tree.map(lambda x: x, phi)
    for layer, k in zip(layers, counts, strict=True):
      w = np.asarray(phi[layer]['w'])
      seen[layer] = phi[layer] | {'w': np.where(largest(w.ravel(), k).reshape(w.shape), w, 0)}
    return seen
  sizes = [phi[layer]['w'].size for layer in layers]
  def passes(counts):
    return accuracy(REPARAM.weights(under(counts)), LABELS[1]) > np.float32(gamma) * accuracy(REPARAM.weights(phi), LABELS[1])
  tried = [[int(Fraction(str(d)) * n) for n in sizes] for d in densities]
  assert passes(tried[-1])
  if steps is None:
    chosen = tried[-1]
    for counts in tried[-2::-1]:
      if not passes(counts):
        break
      chosen = counts
  else:
    low, chosen = tried[0], tried[-1]
    for _ in range(steps):
      middle = [(a + b) // 2 for a, b in zip(low, chosen, strict=True)]
      low, chosen = (low, middle) if passes(middle) else (middle, chosen)
  mask = task_masks.task_mask(found.memory, 1, phi)
  for layer, k in zip(layers, chosen, strict=True):
    np.testing.assert_array_equal(np.ravel(mask[layer]['w']), largest(np.ravel(phi[layer]['w']), k))
    np.testing.assert_array_equal(bits(found.phi[layer]['w']), bits(phi[layer]['w']))
  assert float(task_masks.capacity(found.memory, phi).reused[1]) > 0 and bool(found.found.met)


def test_an_end_that_is_not_good_enough_is_warned_of(life):
  """Outside jit, where the numbers are known."""
  memory, phi, _, _ = life[0]
  def end(gamma):
    return packnet.end_task(memory, 1, phi, phi, lambda p: jnp.float32(0.5), [0.2, 0.5], gamma, how='left', side_by_side=False)
  with pytest.warns(UserWarning, match=r'mask scores 0\.5, which is not above gamma=1\.0 times the score of all weights, 0\.5;'):
    assert not end(1.0).found.met
  with pytest.raises(ValueError, match='begin_task looks at how much is free, and refuses: call it outside jit'):
    jax.jit(lambda memory: packnet.begin_task(TX, memory, phi))(memory)


def test_a_forgotten_begin_task_is_told_at_the_end(life):
  """An optimiser that begins by its own `init` protects nothing: said inside jit, outside, of mapped memories, and at the next
  beginning."""
  memory, phi, _, _ = life[0]
  kept, _ = learn(phi, packnet.begin_task(TX, memory, phi), LABELS[1])
  lost, _ = learn(phi, TX.init(phi), LABELS[1])

  def end(memory, phi):
    return packnet.end_task(memory, 1, phi, phi, lambda p: jnp.float32(0.5), [0.2, 0.5], 0.0, how='left', side_by_side=False)
  told = r'what the tasks \[0\] use has changed since they were remembered'
  twice = [jax.tree.map(lambda *x: jnp.stack(x), *pair) for pair in ((memory, memory), (kept, lost))]
  for ends, arguments in ((end, (memory, lost)), (jax.jit(end), (memory, lost)), (jax.jit(jax.vmap(end)), twice)):
    with pytest.warns(UserWarning, match=told) as warned:
      jax.block_until_ready(ends(*arguments))
      jax.effects_barrier()
    assert len(warned) == 1
  with pytest.raises(ValueError, match=r'what the tasks \[0, 1\] use has changed'):
    packnet.begin_task(TX, jax.jit(end)(memory, kept).memory, lost)
  with warnings.catch_warnings():
    warnings.simplefilter('error')
    ended = jax.jit(end)(memory, kept)
    jax.effects_barrier()
    packnet.begin_task(TX, ended.memory, ended.phi)


def test_a_task_in_the_slot_of_another_is_warned_of(life):
  memory, phi, _, _ = life[0]

  def end(memory, task, phi):
    return packnet.end_task(memory, task, phi, phi, lambda p: jnp.float32(0.5), [0.2, 0.5], 0.0, how='left', side_by_side=False)
  for ends in (end, jax.jit(end)):   # what the slot held is lost, and no other task has changed
    with pytest.warns(UserWarning, match='end_task replaces task 0, which was remembered, and is lost') as warned:
      jax.block_until_ready(ends(memory, 0, phi))
      jax.effects_barrier()
    assert len(warned) == 1
  with warnings.catch_warnings():
    warnings.simplefilter('error')
    for task in (1, memory.here.shape[0]):   # the last has no slot, and is dropped
      jax.block_until_ready(jax.jit(end)(memory, task, phi))
    end(task_masks.forget(memory, 0), 0, phi)
    jax.effects_barrier()


def test_a_beginning_compiles_nothing_anew(life):
  memory, phi, _, _ = life[0]
  packnet.begin_task(TX, memory, phi)
  other = task_masks.remember(memory, 1, task_masks.task_mask(memory, 0, phi), phi)
  compiled = []
  jax.monitoring.register_event_duration_secs_listener(
      lambda event, _, **more: compiled.append(event) if event.endswith('backend_compile_duration') else None)
  packnet.begin_task(TX, other, phi)
  assert not compiled
  jax.jit(lambda x: x + 1.25)(jnp.ones(3))
  assert compiled   # what is counted is what is compiled


def test_running_averages_are_in_the_memory_and_not_in_the_optimiser():
  def forward(x):
    return hk.Linear(3)(hk.BatchNorm(True, True, 0.9)(hk.Linear(4)(x), is_training=True))
  phi, state = hk.transform_with_state(forward).init(jax.random.key(0), INPUTS)
  for rest in ('own', 'frozen'):
    tree = hk.data_structures.merge(phi, state)
    memory = task_masks.begin(tree, 2, rest=rest)
    mask = jax.tree.map(lambda x: jnp.abs(x) > 0.1, task_masks.shared(memory, tree))
    memory = task_masks.remember(memory, 0, mask, tree)
    opt_state = packnet.begin_task(TX, memory, phi, state)
    free = task_masks.free(memory, tree)
    assert jax.tree.structure(opt_state.free) == jax.tree.structure(phi)
    jax.tree.map(np.testing.assert_array_equal, opt_state.free, {k: {n: free[k][n] for n in v} for k, v in phi.items()})
    assert opt_state.free['batch_norm']['scale'].all() == (rest == 'own') and not opt_state.free['linear']['w'].all()


def test_what_is_wrong_with_the_end_of_a_task_is_said_before_the_search(life):
  memory, phi, _, _ = life[0]
  def score(_):
    raise AssertionError('searched')
  slots = memory.here.shape[0]
  for change, message in (({'task': slots}, f'task {slots} has no slot'),
                          ({'how': 'anew'}, "how is 'fresh', 'left' or 'zero'; got 'anew'"),
                          ({'fresh': {}}, 'fresh and phi differ in structure'),
                          ({'memory': phi}, r'a memory is what task_masks\.begin makes; got a dict')):
    given = {'memory': memory, 'task': 1, 'phi': phi, 'fresh': phi, 'score': score, 'densities': [0.2, 0.5]} | change
    with pytest.raises(ValueError, match=message):
      packnet.end_task(**given)
  with pytest.raises(ValueError, match=r'a score is one number; all weights have an array of shape \(3,\)'):
    packnet.end_task(memory, 1, phi, phi, lambda p: jnp.ones(3), [0.2, 0.5])
  with pytest.raises(ValueError, match=r'all weights have nan\. Is the held-out set empty'):
    packnet.end_task(memory, 1, phi, phi, lambda p: jnp.mean(jnp.zeros(0)), [0.2, 0.5])
  with pytest.raises(ValueError, match=r'a memory is what task_masks\.begin makes; got a dict'):
    packnet.begin_task(TX, phi, memory)


@pytest.mark.parametrize('how', ['fresh', 'left', 'zero'])
def test_where_free_weights_begin(life, how):
  memory, phi, _, _ = life[0]
  fresh = REPARAM.inverse(QUICK(NET.init)(jax.random.key(9), INPUTS))
  found = QUICK(packnet.reinitialise, static_argnames='how')(memory, phi, fresh, how=how)
  mask = task_masks.task_mask(memory, 0, phi)
  for module, leaves in phi.items():
    for name, x in leaves.items():
      new = fresh[module][name]
      if module == 'head':   # of the task's own
        expected = new
      elif name == 'b':      # frozen
        expected = x
      else:
        expected = np.where(mask[module][name], x, {'fresh': new, 'left': x, 'zero': np.zeros_like(x)}[how])
      np.testing.assert_array_equal(bits(found[module][name]), bits(expected))
  with pytest.raises(ValueError, match="how is 'fresh', 'left' or 'zero'; got 'kept'"):
    packnet.reinitialise(memory, phi, fresh, 'kept')
  half = packnet.reinitialise(memory, jax.tree.map(lambda x: x.astype(jnp.bfloat16), phi), fresh)
  assert {x.dtype for x in jax.tree.leaves(half)} == {jnp.dtype(jnp.bfloat16)}
  with pytest.raises(ValueError, match='fresh and phi differ in structure'):
    packnet.reinitialise(memory, phi, {'head': fresh['head']})
  with pytest.raises(ValueError, match=r'fresh has \(5,\) where phi has \(3,\), at head/b'):
    packnet.reinitialise(memory, phi, fresh | {'head': fresh['head'] | {'b': jnp.ones(5)}})


def test_a_leak_of_one_weight_is_seen(life):
  """That the comparison of bits above can fail: with one protected weight let go, an old task no longer is what it was."""
  memory, phi, expected, _ = life[0]
  free = task_masks.free(memory, phi)
  layer = 'mlp/~/linear_1'
  i = tuple(np.argwhere(~np.asarray(free[layer]['w']))[0])
  free[layer]['w'] = free[layer]['w'].at[i].set(True)
  after, _ = learn(phi, with_free(TX.init(phi), free), LABELS[1])
  assert not np.array_equal(bits(logits(memory, 0, after)), bits(expected))
  mask, phi, after = task_masks.task_mask(memory, 0, phi), task_masks.shared(memory, phi), task_masks.shared(memory, after)
  assert sum(map(int, jax.tree.leaves(jax.tree.map(lambda m, a, b: jnp.sum(m & (a != b)), mask, after, phi)))) == 1

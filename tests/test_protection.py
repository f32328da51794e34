"""protect around optax: what is protected keeps its bits under every optimiser, and what is free trains as it would alone."""
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from optax import contrib

import powerprop
from powerprop import backpropagation, powerpropagation, protect, protection, sparsify, target_propagation, updaters, with_free
from powerprop.protection import ProtectState

REPARAM = powerpropagation(2.0)
RNG = np.random.default_rng(3)
PHI = {'a': {'w': jnp.asarray(RNG.normal(size=(6, 5)), jnp.float32), 'b': jnp.asarray(RNG.normal(size=5), jnp.float32)},
       'c': {'w': jnp.asarray(RNG.normal(size=(2, 2, 1, 3)), jnp.float32)}}
PHI['a']['w'] = PHI['a']['w'].at[0, :3].set(jnp.array([-0.0, 0.0, 1e-30]))   # a sign to lose, a critical point, a tiny weight
FREE = jax.tree.map(lambda x: jnp.asarray(RNG.random(x.shape) < 0.5), PHI)
FREE['a']['w'] = FREE['a']['w'].at[0, :3].set(False)
QUICK = {'xla_backend_optimization_level': '0'}
STEPS = 10


def labels(tree):
  return jax.tree.map(lambda x: 'w' if x.ndim > 1 else 'rest', tree)


def parts():
  return optax.partition({'w': target_propagation(optax.adam(0.05), REPARAM), 'rest': optax.sgd(0.1, 0.9)}, labels)


INNER = {
    'momentum': lambda: optax.sgd(0.1, 0.9, nesterov=True),
    'adam': lambda: target_propagation(optax.adam(0.05), REPARAM),
    'naive adam': lambda: backpropagation(optax.adam(0.05), REPARAM),
    'adamw': lambda: target_propagation(optax.adamw(0.05, weight_decay=0.3), REPARAM),
    'decay after': lambda: optax.chain(optax.sgd(0.1, 0.9), optax.add_decayed_weights(-0.1)),
    'lamb': lambda: optax.lamb(0.01),
    'clip': lambda: optax.chain(optax.clip_by_global_norm(0.5), optax.rmsprop(0.01, momentum=0.9)),
    'MultiSteps': lambda: optax.MultiSteps(optax.adamw(0.05, weight_decay=0.3), 3),
    'inject_hyperparams': lambda: optax.inject_hyperparams(optax.adamw)(0.05, weight_decay=0.3),
    'apply_if_finite': lambda: optax.apply_if_finite(optax.adam(0.05), 3),
    'partition': parts,
    'noise': lambda: optax.chain(optax.add_noise(0.1, 0.5, 0), optax.sgd(0.1, 0.9)),
}
OUTER = {
    'MultiSteps': lambda: optax.MultiSteps(protect(optax.adamw(0.05, weight_decay=0.3)), 2),
    'inject_hyperparams': lambda: optax.inject_hyperparams(lambda rate: protect(optax.adamw(rate, weight_decay=0.3)))(rate=0.05),
    'apply_if_finite': lambda: optax.apply_if_finite(protect(optax.adam(0.05)), 3),
    'partition': lambda: optax.partition({'w': protect(optax.adam(0.05)), 'rest': optax.sgd(0.0)}, labels),
}


def gradient(theta, n):
  return jax.tree.map(lambda x: jnp.cos(3 * x + 0.1 * n + jnp.arange(x.size, dtype=x.dtype).reshape(x.shape)), theta)


def train(tx, phi, state, steps=STEPS, start=0):
  """The gradient is dense: it is `protect` that leaves weights alone."""
  @functools.partial(jax.jit, compiler_options=QUICK)
  def step(phi, state, n):
    updates, state = tx.update(gradient(phi, n), state, phi)
    return optax.apply_updates(phi, updates), state
  for n in range(start, start + steps):
    phi, state = step(phi, state, n)
  return phi, state, step


def bits(x):
  x = np.asarray(x)
  return x.view(f'uint{8 * x.dtype.itemsize}')


def same(a, b, where):
  """The protected entries have the same bits, and all free ones have moved."""
  for x, y, free in zip(*map(jax.tree.leaves, (a, b, where)), strict=True):
    free = np.asarray(free)
    np.testing.assert_array_equal(bits(x)[~free], bits(y)[~free])
    assert (bits(x) != bits(y))[free].all()


@pytest.mark.parametrize('name', INNER)
def test_protected_entries_keep_their_bits_and_free_ones_move(name):
  """After steps in which all was free, so that momentum and moments of what is protected then are not 0."""
  tx = protect(INNER[name]())
  phi, state, step = train(tx, PHI, tx.init(PHI), 3)
  phi = jax.tree.map(lambda x, y, free: jnp.where(free, x, y), phi, PHI, FREE)   # −0 back in its place
  state = with_free(state, FREE)
  begin, compiled = phi, step._cache_size()
  for n in range(STEPS):
    phi, state = step(phi, state, n)
  same(begin, phi, FREE)
  assert step._cache_size() == compiled   # what is free is an argument


@pytest.mark.parametrize('name', OUTER)
def test_what_may_stand_around(name):
  tx = OUTER[name]()
  phi, state, _ = train(tx, PHI, tx.init(PHI), 4)
  free, unmoved = FREE, FREE
  if name == 'partition':
    with pytest.raises(ValueError, match=r'a/b has protected entries, and optax.partition gives it to a transformation without'):
      with_free(state, FREE)
    free, unmoved = (FREE | {'a': FREE['a'] | {'b': made(5, bool)}} for made in (jnp.ones, jnp.zeros))   # its group has rate 0
  after, _, _ = train(tx, phi, with_free(state, free))
  same(phi, after, unmoved)


def test_free_entries_train_as_if_the_others_were_not_there():
  """Adam with decoupled decay by entries alone: a vector of the free ones takes the same steps, in NumPy and float64."""
  tx = protect(optax.adamw(0.05, weight_decay=0.1))
  after, _, _ = train(tx, PHI, with_free(tx.init(PHI), FREE))
  x = np.asarray(PHI['a']['w'], np.float64)
  m = v = np.zeros_like(x)
  index = np.arange(x.size).reshape(x.shape)
  for n in range(STEPS):
    g = np.cos(3 * x + 0.1 * n + index)
    m, v = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g * g
    u = (m / (1 - 0.9 ** (n + 1))) / (np.sqrt(v / (1 - 0.999 ** (n + 1))) + 1e-8) + 0.1 * x
    x = np.where(FREE['a']['w'], x - 0.05 * u, x)
  np.testing.assert_allclose(after['a']['w'], x, rtol=1e-4, atol=1e-6)


def test_all_free_is_the_optimiser_bit_for_bit():
  tx, plain = protect(optax.sgd(0.1, 0.9)), optax.sgd(0.1, 0.9)
  a, _, _ = train(tx, PHI, tx.init(PHI))
  b, _, _ = train(plain, PHI, plain.init(PHI))
  jax.tree.map(lambda x, y: np.testing.assert_array_equal(bits(x), bits(y)), a, b)


@pytest.mark.parametrize('dtype', ['bfloat16', 'float16'])
def test_short_parameters(dtype):
  phi = jax.tree.map(lambda x: x.astype(dtype), PHI)
  tx = protect(target_propagation(optax.adamw(0.05, weight_decay=0.3), REPARAM))
  after, _, _ = train(tx, phi, with_free(tx.init(phi), FREE), 3)
  for x, y, free in zip(*map(jax.tree.leaves, (phi, after, FREE)), strict=True):
    np.testing.assert_array_equal(bits(x)[~np.asarray(free)], bits(y)[~np.asarray(free)])


def test_the_update_is_minus_zero():
  """x + (−0) has the bits of x for −0, infinities and NaN too; x + 0 turns −0 into 0."""
  tx = protect(optax.sgd(1.0))
  x = {'w': jnp.array([-0.0, 0.0, jnp.inf, -jnp.inf, jnp.nan, 1.0])}
  updates, _ = tx.update({'w': jnp.full(6, jnp.nan)}, with_free(tx.init(x), {'w': jnp.zeros(6, bool)}), x)
  np.testing.assert_array_equal(bits(updates['w']), np.full(6, 1 << 31, np.uint32))
  np.testing.assert_array_equal(bits(optax.apply_updates(x, updates)['w']), bits(x['w']))


@pytest.mark.parametrize('place', ['inside', 'around MultiSteps', 'around'])
def test_a_step_that_is_left_out_keeps_minus_zero(place):
  """But for apply_if_finite around it, whose update is then +0, as `protect` says."""
  tx = {'inside': lambda: protect(optax.apply_if_finite(optax.adam(0.05), 3)),
        'around MultiSteps': lambda: optax.MultiSteps(protect(optax.adam(0.05)), 2),
        'around': lambda: optax.apply_if_finite(protect(optax.adam(0.05)), 3)}[place]()
  x = {'w': jnp.array([-0.0, 1.5])}
  state = with_free(tx.init(x), {'w': jnp.array([False, False])})
  bad = jnp.array([1.0, 1.0 if place == 'around MultiSteps' else jnp.inf])
  updates, _ = jax.jit(tx.update, compiler_options=QUICK)({'w': bad}, state, x)
  expected = jnp.array([0.0 if place == 'around' else -0.0, 1.5])
  np.testing.assert_array_equal(bits(optax.apply_updates(x, updates)['w']), bits(expected))


def test_inner_sees_gradients_of_what_is_free_only():
  """So a norm over all of them is one over the free."""
  tx = protect(optax.chain(optax.clip_by_global_norm(1.0), optax.sgd(1.0)))
  grads = jax.tree.map(lambda x: np.full(x.shape, 100, np.float32), PHI)
  updates, _ = jax.jit(tx.update, compiler_options=QUICK)(grads, with_free(tx.init(PHI), FREE), PHI)
  number = sum(int(f.sum()) for f in jax.tree.leaves(FREE))
  for u, free in zip(jax.tree.leaves(updates), jax.tree.leaves(FREE), strict=True):
    np.testing.assert_allclose(u, np.where(free, -1 / np.sqrt(number), 0), rtol=1e-5)


def test_around_an_updater_that_keeps_masked_weights():
  tx = protect(sparsify(target_propagation(optax.adam(0.05), REPARAM), updaters.top_kast(0.5, 0.3, 2), REPARAM))
  after, state, _ = train(tx, PHI, with_free(jax.jit(tx.init, compiler_options=QUICK)(PHI), FREE))
  for x, y, free in zip(*map(jax.tree.leaves, (PHI, after, FREE)), strict=True):
    np.testing.assert_array_equal(bits(x)[~np.asarray(free)], bits(y)[~np.asarray(free)])
  assert int(jnp.sum(powerprop.masked(state, after)['a']['w'] != 0)) == 15


def test_decay_of_an_average_is_a_share():
  tree = {'w': jnp.ones(2)}
  for decay in (-0.1, 1.1, float('nan')):
    with pytest.raises(ValueError, match=rf'decay of an average is in \[0, 1\]; got {decay}'):
      protection.average(tree, tree, decay, {'w': jnp.ones(2, bool)})


def test_averages_keep_protected_entries():
  """ema + (1 − d)(p − ema) against float64, with the bits of entries that are protected though the parameters differ there."""
  ema, expected = PHI, jax.tree.map(lambda x: np.asarray(x, np.float64), PHI)
  other = jax.tree.map(lambda x: x + 1 / 3, PHI)
  step = jax.jit(protection.average)
  for _ in range(5):
    ema = step(ema, other, 0.9, FREE)
    expected = jax.tree.map(lambda e, p, f: np.where(f, 0.9 * e + 0.1 * np.asarray(p, np.float64), e), expected, other, FREE)
  jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-6), ema, expected)
  same(PHI, ema, FREE)


def test_under_vmap_over_seeds_each_has_its_own():
  tx = protect(optax.adam(0.05))
  many, free = jax.tree.map(lambda x: jnp.stack([x, 2 * x]), PHI), jax.tree.map(lambda f: jnp.stack([f, ~f]), FREE)

  def run(phi, free):
    state = with_free(tx.init(phi), free)
    for n in range(3):
      updates, state = tx.update(gradient(phi, n), state, phi)
      phi = optax.apply_updates(phi, updates)
    return phi
  same(many, jax.jit(jax.vmap(run), compiler_options=QUICK)(many, free), free)


def test_misuse_is_said_at_once():
  tx = protect(optax.adam(0.1))
  state = tx.init(PHI)
  assert isinstance(state, ProtectState) and all(f.all() for f in jax.tree.leaves(state.free))
  with pytest.raises(ValueError, match=r'wants one protect in the state, got 0; the optimiser is wrapped as protect\(tx\)'):
    with_free(optax.adam(0.1).init(PHI), FREE)
  named = optax.named_chain(('p', protect(optax.sgd(0.1))), ('d', optax.add_decayed_weights(0.1)))
  with pytest.raises(ValueError, match='something is chained after protect'):
    with_free(named.init(PHI), FREE)
  with pytest.raises(ValueError, match='something is chained after protect'):
    with_free(optax.chain(tx, optax.add_decayed_weights(0.1)).init(PHI), FREE)
  for around in (contrib.schedule_free(tx, learning_rate=0.1), contrib.mechanize(tx)):   # they average, or scale, what comes out
    with pytest.raises(ValueError, match='around protect makes other updates of its updates; protect stands outermost'):
      with_free(around.init(PHI), FREE)
  donated = with_free(state, FREE)
  jax.jit(lambda s: s, donate_argnums=0)(donated)
  assert jax.tree.leaves(donated)[0].is_deleted() and not any(x.is_deleted() for x in jax.tree.leaves(FREE))
  with pytest.raises(ValueError, match='free and the parameters differ in structure'):
    with_free(state, {'a': FREE['a']})
  with pytest.raises(ValueError, match=r"a mask is bool and shaped like its array, \(5,\); got float32 \(5,\) at \['a'\]\['b'\]"):
    with_free(state, FREE | {'a': FREE['a'] | {'b': jnp.ones(5)}})
  with pytest.raises(ValueError, match='gradients and the parameters of init differ in structure'):
    tx.update({'a': PHI['a']}, state, PHI)
  with pytest.raises(ValueError, match='protect takes an optax transformation, got float'):
    protect(0.1)
  for updater in (updaters.static(0.5), updaters.rigl(0.5, 200)):
    with pytest.raises(ValueError, match='this updater sets masked weights to 0, which protect would not let it do'):
      protect(sparsify(optax.sgd(0.1), updater, key=jax.random.key(0)))
  with pytest.raises(ValueError, match='what sparsify or protect makes stands outermost'):
    target_propagation(tx, REPARAM)
  with pytest.raises(ValueError, match='put protect around it, not inside'):
    sparsify(tx, updaters.static(0.5), key=jax.random.key(0))

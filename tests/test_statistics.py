"""Statistics of weights against NumPy in float64."""
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from powerprop import powerpropagation, statistics, target_propagation

RNG = np.random.default_rng(0)
BEFORE = {'w': np.float32(RNG.normal(size=(40, 30))), 'b': None, 'v': np.float32(RNG.normal(size=7))}
AFTER = jax.tree.map(lambda x: (x + RNG.normal(size=x.shape)).astype(np.float32), BEFORE)
MASK = jax.tree.map(lambda x: RNG.random(x.shape) < 0.4, BEFORE)

SURVIVAL = jax.jit(statistics.survival_by_magnitude, static_argnums=2)


def joined(tree):
  return np.concatenate([np.asarray(x).reshape(-1) for x in jax.tree.leaves(tree)])


def test_sign_flips_hand_typed():
  before = jnp.array([1.0, -2.0, 3.0, 0.0, -1e-30])
  after = jnp.array([-1.0, -1.0, 0.0, 4.0, 1e-30])  # the last product would underflow
  np.testing.assert_allclose(statistics.sign_flips(before, after), 2 / 5, rtol=1e-7)
  mask = jnp.array([True, True, False, False, False])
  np.testing.assert_allclose(statistics.sign_flips(before, after, mask), 1 / 2, rtol=1e-7)
  assert np.isnan(statistics.sign_flips(before, after, mask & False))


def test_sign_flips_of_a_tree():
  flipped = joined(BEFORE) * joined(AFTER).astype(np.float64) < 0
  flips = jax.jit(statistics.sign_flips)
  np.testing.assert_allclose(flips(BEFORE, AFTER), flipped.mean(), rtol=1e-6)
  np.testing.assert_allclose(flips(BEFORE, AFTER, MASK), flipped[joined(MASK)].mean(), rtol=1e-6)
  only_w = {'w': MASK['w'], 'b': None, 'v': None}
  np.testing.assert_allclose(flips(BEFORE, AFTER, only_w), flipped[7:][joined(only_w)].mean(), rtol=1e-6)


@pytest.mark.parametrize('bins', [1, 10, 13])
def test_survival_by_quantile(bins):
  magnitude = np.abs(joined(BEFORE))
  parts = np.split(np.argsort(magnitude), [i * magnitude.size // bins for i in range(1, bins)])
  found = SURVIVAL(BEFORE, MASK, bins)
  np.testing.assert_array_equal(found.size, [len(p) for p in parts])
  np.testing.assert_allclose(found.share, [joined(MASK)[p].mean() for p in parts], rtol=1e-6)
  np.testing.assert_array_equal(found.edges, [*(magnitude[p[0]] for p in parts), magnitude.max()])


def test_survival_with_ties_and_zeros():
  initial = jnp.array([0.0, -0.0, 0.0, 0.0, 0.0, 0.0, 1.0, 2.0])
  mask = jnp.array([True, False, False, False, False, False, True, False])
  found = SURVIVAL(initial, mask, 4)
  np.testing.assert_array_equal(found.edges, [0, 0, 0, 1, 2])
  np.testing.assert_array_equal(found.size, [0, 0, 6, 2])
  np.testing.assert_allclose(found.share, [np.nan, np.nan, 1 / 6, 1 / 2], rtol=1e-7)


@pytest.mark.parametrize(('sample', 'expected'), [
  (RNG.normal(size=100_000), 0), (RNG.laplace(size=100_000), 3), (RNG.uniform(size=100_000), -1.2)],
  ids=['normal', 'laplace', 'uniform'])
def test_kurtosis_of_known_distributions(sample, expected):
  found = statistics.kurtosis(jnp.asarray(sample, jnp.float32))
  assert abs(found - expected) < 0.3  # the sampling sd for Laplace is about 0.1
  centred = sample - sample.mean()
  # float32 sums of 100,000 terms
  np.testing.assert_allclose(found, (centred ** 4).mean() / (centred ** 2).mean() ** 2 - 3, atol=2e-4)


@pytest.mark.parametrize('scale', [1e-30, 1.0, 1e30])
def test_kurtosis_of_any_scale_and_dtype(scale):
  x = joined(BEFORE).astype(np.float64)
  expected = ((x - x.mean()) ** 4).mean() / x.var() ** 2 - 3
  found = statistics.kurtosis(jax.tree.map(lambda w: w * np.float32(scale), BEFORE))
  np.testing.assert_allclose(found, expected, rtol=1e-4)  # each entry of float32 is rounded by 6e-8


def test_kurtosis_dtypes():
  half = jnp.asarray(BEFORE['w'], jnp.bfloat16)
  found, x = statistics.kurtosis(half), np.asarray(half, np.float64)
  assert found.dtype == jnp.float32
  # Not computed in bfloat16, whose 2⁻⁹ would show.
  np.testing.assert_allclose(found, ((x - x.mean()) ** 4).mean() / x.var() ** 2 - 3, atol=1e-5)
  with jax.enable_x64(True):
    x = np.asarray(BEFORE['w'], np.float64)
    found = statistics.kurtosis(jnp.asarray(x))
    assert found.dtype == jnp.float64
    np.testing.assert_allclose(found, ((x - x.mean()) ** 4).mean() / x.var() ** 2 - 3, rtol=1e-12)
  assert np.isnan(statistics.kurtosis(jnp.full((9,), 0.1))) and np.isnan(statistics.kurtosis(jnp.zeros(3)))


@pytest.mark.parametrize(('call', 'message'), [
  (lambda: statistics.sign_flips(np.ones(3), np.ones(4)), r'in one shape; got \(3,\) and \(4,\)'),
  (lambda: statistics.sign_flips({'w': np.ones(3)}, {'v': np.ones(3)}), 'the later weights and the weights'),
  (lambda: statistics.sign_flips(np.ones(3), np.ones(3), np.ones(3)), 'got float32'),
  (lambda: statistics.survival_by_magnitude(np.ones(3), np.ones(3, bool), 4), 'number of entries, 3; got 4'),
  (lambda: statistics.survival_by_magnitude(np.ones(3), np.ones(2, bool)), r'\(3,\); got bool \(2,\)'),
  (lambda: statistics.kurtosis(np.arange(3)), 'got int'),
  (lambda: statistics.kurtosis({}), 'no arrays'),
])
def test_errors(call, message):
  with pytest.raises(ValueError, match=message):
    call()


@pytest.mark.parametrize('alpha, expected', [
  (1.0, 1.0), (2.0, 4 * (0.09 + 0.25 + 0.0 + 0.01) / 4), (3.0, 9 * (0.0081 + 0.0625 + 0.0 + 0.0001) / 4)])
def test_mean_squared_slope_by_hand(alpha, expected):
  """Biases do not count."""
  phi = {'a': {'w': jnp.array([[0.3, -0.5]]), 'b': jnp.array([7.0])}, 'c': {'w': jnp.array([[0.0], [0.1]])}}
  found = statistics.mean_squared_slope(powerpropagation(alpha), phi)
  np.testing.assert_allclose(found, expected, rtol=1e-6)


def test_mean_squared_slope_is_how_much_less_theta_moves():
  """A small step of SGD on φ, against one on θ, in a ratio of mean squares of equal gradients."""
  reparam, theta = powerpropagation(2.0), {'a': {'w': jax.random.normal(jax.random.key(0), (50, 40)) / 20}}
  phi, grads = reparam.inverse(theta), {'a': {'w': jnp.ones((50, 40))}}
  tx = target_propagation(optax.sgd(1e-4), reparam)
  updates, _ = tx.update(grads, tx.init(phi), phi)
  moved = reparam.weights(optax.apply_updates(phi, updates))['a']['w'] - theta['a']['w']
  np.testing.assert_allclose(jnp.mean(moved) / -1e-4, statistics.mean_squared_slope(reparam, phi), rtol=1e-2)   # first order

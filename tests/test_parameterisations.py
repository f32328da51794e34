"""STR, L0 gates and v⊙v − u⊙u against NumPy in float64, hand-typed numbers, finite differences and closed forms."""
import collections

import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from powerprop import masks, powerpropagation, target_propagation
from powerprop.parameterisations import hard_concrete, nonzero, parameterise, soft_threshold, square_difference

METHODS = {'soft_threshold': soft_threshold, 'hard_concrete': hard_concrete, 'square_difference': square_difference}
NEW = {'soft_threshold': {'w', 'w_threshold'}, 'hard_concrete': {'w', 'w_gate'}, 'square_difference': {'w_v', 'w_u'}}
VALUES = [[0.5, -0.02, 0.0, 3.0], [-1.0, 1e-6, -1e-3, 0.07]]


def logistic(x):
  return 1 / (1 + np.exp(-np.asarray(x, np.float64)))


def layer(w, **others):
  return {'linear': {'w': jnp.asarray(w), 'b': jnp.array([1.0, -2.0])} | others}


def tree(dtype='float32'):
  """Weights at several depths, beside what is no weight: biases, tuples, empty dicts, a vector called w, integers."""
  w = jnp.asarray(VALUES, dtype)
  return {'a': {'w': w, 'b': w[0]}, 'b': ({'w': -w, 'deep': {'w': 2 * w, 'n': jnp.arange(2)}}, {}, (jnp.ones(2, dtype),)),
          'c': [], 'd': {}, 'e': {'w': w[0]}, 'f': collections.OrderedDict([('w', w[:, :1]), ('b', w[0])])}


def is_same(a, b):
  return a.dtype == b.dtype and np.array_equal(a, b)


# ---- all three --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize('dtype', ['float32', 'bfloat16', 'float16'])
@pytest.mark.parametrize('name', METHODS)
def test_the_function_is_preserved_on_any_tree(name, dtype):
  method, theta = METHODS[name](), tree(dtype)
  params = jax.jit(lambda theta: method.expand(theta, frozenset()))(theta)
  assert set(params['a']) == {'b'} | NEW[name] and set(params['b'][0]['deep']) == {'n'} | NEW[name]
  found = jax.jit(method.fold)(params)
  assert jax.tree.structure(found) == jax.tree.structure(theta)
  # Two roundings of numbers up to the weight and, for STR, g(−10) = 4.5e-5, for the squares 2 · 0.01².
  eps = float(jnp.finfo(dtype).eps)
  for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(theta), strict=True):
    assert a.dtype == b.dtype
    np.testing.assert_allclose(np.float64(a), np.float64(b), rtol=2 * eps, atol=4e-4 * eps)
  untouched = [(x['a']['b'], x['b'][0]['deep']['n'], x['b'][2][0], x['e']['w'], x['f']['b']) for x in (theta, params, found)]
  assert all(is_same(a, b) and is_same(a, c) for a, b, c in zip(*untouched, strict=True))


@pytest.mark.parametrize('name', METHODS)
def test_under_jit_vmap_and_grad(name):
  method, key = METHODS[name](), jax.random.key(3)
  params = jax.jit(lambda theta: method.expand(theta, frozenset()))(layer(VALUES))
  assert jax.tree.structure(params) == jax.tree.structure(method.expand(layer(VALUES)))
  jitted = jax.jit(method.fold)(params, key)   # eager ones are everywhere else
  mapped = jax.jit(jax.vmap(method.fold))(jax.tree.map(lambda x: jnp.stack([2 * x, x]), params),
                                          jnp.stack([jax.random.key(8), key]))
  for k, x in jitted['linear'].items():
    np.testing.assert_allclose(mapped['linear'][k][1], x, rtol=1e-6, atol=1e-9)
  loss, grads = jax.jit(jax.value_and_grad(
    lambda p: sum(jnp.sum(x**2) for x in jax.tree.leaves(method.fold(p, key))) + method.penalty(p)))(params)
  assert all(np.isfinite(g).all() and g.any() for g in jax.tree.leaves(grads)) and loss.dtype == jnp.float32
  assert method.penalty(params).dtype == jnp.float32 and method.penalty(params).shape == ()


@pytest.mark.parametrize('name', ['soft_threshold', 'square_difference'])
def test_the_key_is_for_l0_alone(name):
  method = METHODS[name]()
  params = method.expand(layer(VALUES))
  assert all(map(is_same, *map(jax.tree.leaves, (method.fold(params), method.fold(params, jax.random.key(0))))))
  assert method.penalty(params) == 0


@pytest.mark.parametrize('name', METHODS)
def test_mistakes_are_named(name):
  method = METHODS[name]()
  with pytest.raises(ValueError, match=f'`where` of {name} chose none of these leaves: linear/b float32'):
    method.expand({'linear': {'b': jnp.ones(2)}})
  with pytest.raises(ValueError, match=f'no leaf of {name} among these, which expand would give: linear/b .*, linear/w '):
    method.fold(layer(VALUES))
  with pytest.raises(ValueError, match=f'linear has leaves already by names that {name} gives: .*{max(NEW[name])}'):
    method.expand(layer(VALUES, **{max(NEW[name]): jnp.ones(2)}))
  with pytest.raises(ValueError, match='Was it expanded before'):
    METHODS[name](where=lambda name, x: x.ndim == 2).expand(method.expand(layer(VALUES)))
  with pytest.raises(ValueError, match=f'`where` of {name} chose m/w, whose dtype int32 is not floating'):
    method.expand({'m': {'w': jnp.ones((2, 2), jnp.int32)}})
  for bare, where in (({'m': (jnp.ones(2),)}, 'm/0'), (jnp.ones(2), 'the whole tree')):
    with pytest.raises(ValueError, match=f'chose {where}, which is no named entry of a dict'):
      METHODS[name](where=lambda *_: True).expand(bare)


@pytest.mark.parametrize('make, message', [
    (lambda: soft_threshold(float('inf')), 's0 .* finite, got inf'),
    (lambda: hard_concrete(0.0), r'above 0 and below 0\.9167, got 0\.0'),
    (lambda: hard_concrete(0.92), r'above 0 and below 0\.9167, got 0\.92'),
    (lambda: hard_concrete(beta=0), 'beta > 0, gamma < 0 and zeta > 1, all finite; got 0, -0.1 and 1.1'),
    (lambda: hard_concrete(gamma=0.1), 'got .*, 0.1 and 1.1'),
    (lambda: hard_concrete(zeta=1.0), 'got .*, -0.1 and 1.0'),
    (lambda: square_difference(0.0), r'floor .* above 0 and finite, got 0\.0'),
    (lambda: square_difference(float('nan')), 'got nan')])
def test_wrong_settings(make, message):
  with pytest.raises(ValueError, match=message):
    make()


def test_another_where():
  method = square_difference(where=lambda name, x: name.endswith('/embeddings'))
  theta = {'embed': {'embeddings': jnp.asarray(VALUES)}} | layer(VALUES)
  params = method.expand(theta)
  assert set(params['embed']) == {'embeddings_v', 'embeddings_u'} and set(params['linear']) == {'w', 'b'}
  assert jax.tree.structure(method.fold(params)) == jax.tree.structure(theta)


def test_nonzero_is_a_tree_of_masks():
  theta = layer([[0.0, -0.0, 1e-30], [-2.0, 0.0, 0.0]])
  kept = nonzero(theta)
  assert kept['linear']['b'] is None
  np.testing.assert_array_equal(kept['linear']['w'], [[False, False, True], [True, False, False]])
  assert masks.counts(kept)['linear']['w'] == 2


# ---- each -------------------------------------------------------------------------------------------------------


def test_soft_threshold_by_hand():
  s = jnp.float32(np.log(0.25))   # g(s) = 0.25/1.25 = 0.2
  theta = soft_threshold().fold(layer([[0.5, -0.7, 0.1], [-0.19, 0.0, 1.2]], w_threshold=s))['linear']['w']
  np.testing.assert_allclose(theta, [[0.3, -0.5, 0.0], [0.0, 0.0, 1.0]], atol=1e-6)
  assert masks.counts(nonzero({'w': theta}))['w'] == 3   # exact zeros


def test_soft_threshold_starts_above_its_threshold():
  params = soft_threshold(-2.0).expand(layer([[0.01, -0.5], [0.0, 2.0]]))['linear']
  g = logistic(-2.0)
  np.testing.assert_allclose(params['w'], [[0.01 + g, -0.5 - g], [0.0, 2.0 + g]], rtol=1e-6)
  assert params['w_threshold'] == -2 and params['w_threshold'].shape == ()
  assert soft_threshold().expand(layer(jnp.ones((2, 2), jnp.bfloat16)))['linear']['w_threshold'].dtype == jnp.float32


def test_soft_threshold_gradient_is_that_of_finite_differences():
  with jax.enable_x64(True):
    method, rng = soft_threshold(), np.random.default_rng(0)
    w, s, c = rng.normal(size=(6, 5)), np.float64(-0.8), rng.normal(size=(6, 5))
    def loss(w, s):
      return jnp.sum(jnp.asarray(c) * jnp.sin(method.fold({'w': jnp.asarray(w), 'w_threshold': jnp.asarray(s)})['w']))
    by_w, by_s = jax.jit(jax.grad(loss, (0, 1)))(w, s)
    loss = jax.jit(loss)
    h = 1e-6   # central differences: h² of truncation and 1e-16/h of rounding; no |w| lies within h of the threshold
    assert np.abs(np.abs(w) - logistic(s)).min() > 1e-3
    np.testing.assert_allclose(by_s, (loss(w, s + h) - loss(w, s - h)) / (2 * h), rtol=1e-7)
    for i in np.ndindex(2, 5):
      step = np.zeros_like(w)
      step[i] = h
      np.testing.assert_allclose(by_w[i], (loss(w + step, s) - loss(w - step, s)) / (2 * h), rtol=1e-6, atol=1e-8)
    pruned = np.abs(w) < logistic(s)
    assert 5 < pruned.sum() < 25 and not by_w[pruned].any() and by_w[~pruned].all()


def test_soft_threshold_leaves_a_leaf_of_zeros_alone():
  theta = layer(VALUES) | {'head': {'w': jnp.zeros((2, 3))}}
  with pytest.warns(UserWarning, match=r'all zero at initialisation, so left as they are \(under soft_threshold .*: head/w\.$'):
    params = soft_threshold().expand(theta)
  assert set(params['head']) == {'w'} and set(params['linear']) == {'w', 'b', 'w_threshold'}
  net = hk.without_apply_rng(hk.transform(lambda x: hk.Linear(3, w_init=jnp.zeros, name='head')(hk.Linear(4)(x))))
  x = jnp.ones((2, 5))
  with pytest.warns(UserWarning, match=r': head/w\.$'):
    params = jax.jit(parameterise(net, soft_threshold()).init)(jax.random.key(0), x)   # no values to look at
  assert set(params['head']) == {'w', 'b'} and 'w_threshold' in params['linear']


@pytest.mark.parametrize('method', [hard_concrete(), square_difference()], ids=['hard_concrete', 'square_difference'])
def test_under_the_others_a_leaf_of_zeros_moves(method):
  grads = jax.grad(lambda p: method.fold(p)['w'].sum())(method.expand({'w': jnp.zeros((2, 3))}))
  assert grads[{'w', 'w_v'}.intersection(grads).pop()].all()


LOGITS = np.array([[-4.0, -2.5, -2.39, 0.0], [1.0, 2.39, 2.5, 30.0]])   # ẑ leaves 0 and reaches 1 at ∓log 11 = ∓2.398


def test_hard_concrete_by_hand():
  method = hard_concrete()
  params = layer(np.full(LOGITS.shape, 2, np.float32), w_gate=jnp.asarray(LOGITS, jnp.float32))
  expected = 2 * np.clip(1.2 * logistic(LOGITS) - 0.1, 0, 1)
  theta = method.fold(params)['linear']['w']
  np.testing.assert_allclose(theta, expected, rtol=1e-6, atol=1e-7)
  np.testing.assert_array_equal(theta == 0, [[True, True, False, False], [False] * 4])
  np.testing.assert_array_equal(theta == 2, [[False] * 4, [False, False, True, True]])
  assert expected[0, 3] == 1   # 2 · (1.2/2 − 0.1)
  # log α = 0: 1/(1 + 11^(−2/3)) = 1/(1 + 0.20218) = 0.83182
  gate = {'w': params['linear']['w'][:1, :1], 'w_gate': jnp.zeros((1, 1))}
  np.testing.assert_allclose(method.penalty(gate), 0.83182, atol=1e-5)
  np.testing.assert_allclose(method.penalty(params), logistic(LOGITS + np.log(11) * 2 / 3).sum(), rtol=1e-6)
  by_gate = jax.grad(method.penalty)(params)['linear']['w_gate']
  p = logistic(LOGITS + np.log(11) * 2 / 3)
  np.testing.assert_allclose(by_gate, p * (1 - p), rtol=1e-4, atol=1e-7)   # 1 − p is rounded at 30


def test_hard_concrete_starts_at_its_drop_rate():
  params = hard_concrete(0.3).expand(layer(VALUES))['linear']
  np.testing.assert_allclose(1 - logistic(params['w_gate']), np.full((2, 4), 0.3), rtol=1e-6)
  np.testing.assert_allclose(params['w'], np.array(VALUES) / (1.2 * 0.7 - 0.1), rtol=1e-6)
  assert hard_concrete().expand(layer(jnp.ones((2, 2), jnp.bfloat16)))['linear']['w_gate'].dtype == jnp.float32


@pytest.mark.parametrize('log_alpha, beta, gamma, zeta', [(0.0, 2 / 3, -0.1, 1.1), (-1.3, 0.4, -0.2, 1.05)])
def test_gates_have_the_closed_form_distribution(log_alpha, beta, gamma, zeta):
  """P(z ≤ x) = logistic(β log((x − γ)/(ζ − x)) − log α) for 0 ≤ x < 1."""
  n = 250_000
  method = hard_concrete(beta=beta, gamma=gamma, zeta=zeta)
  gates = {'w': jnp.ones((500, 500)), 'w_gate': jnp.full((500, 500), log_alpha)}
  z = np.asarray(jax.jit(method.fold)(gates, jax.random.key(1))['w'])
  assert z.min() == 0 and z.max() == 1
  for x in (0.0, 0.1, 0.5, 0.9, 1 - 1e-6):
    p = logistic(beta * np.log((x - gamma) / (zeta - x)) - log_alpha)
    assert abs(np.mean(z <= x) - p) < 5 * np.sqrt(p * (1 - p) / n)   # five standard deviations of a share
  p = np.mean(z != 0)
  assert abs(method.penalty(gates) / n - p) < 5 * np.sqrt(p * (1 - p) / n)


def test_noise_differs_by_leaf_and_key_and_not_by_the_other_leaves():
  method = hard_concrete(0.5)
  theta = {name: {'w': jnp.ones((20, 20))} for name in ('a', 'b')}
  params = method.expand(theta)
  fold = jax.jit(method.fold)
  first, again, other = (fold(params, jax.random.key(seed)) for seed in (0, 0, 1))
  assert is_same(first['a']['w'], again['a']['w']) and not np.array_equal(first['a']['w'], other['a']['w'])
  assert not np.array_equal(first['a']['w'], first['b']['w'])
  assert is_same(first['b']['w'], fold({'b': params['b']}, jax.random.key(0))['b']['w'])
  np.testing.assert_array_equal(method.fold(params)['a']['w'], theta['a']['w'])


def test_gate_gradient_is_that_of_finite_differences():
  with jax.enable_x64(True):
    method, key = hard_concrete(), jax.random.key(0)
    log_alpha = np.random.default_rng(0).normal(size=(4, 5))
    def loss(log_alpha, key):
      return jnp.sum(method.fold({'w': jnp.arange(20.0).reshape(4, 5), 'w_gate': jnp.asarray(log_alpha)}, key)['w'] ** 2)
    direction, h = np.random.default_rng(1).normal(size=(4, 5)), 1e-6   # no gate is within h of a clip
    grad, value = jax.jit(jax.grad(loss))(log_alpha, key), jax.jit(loss)
    expected = (value(log_alpha + h * direction, key) - value(log_alpha - h * direction, key)) / (2 * h)
    np.testing.assert_allclose(np.sum(grad * direction), expected, rtol=1e-6)


@pytest.mark.parametrize('floor', [1e-30, 0.01, 0.5])
def test_square_difference_is_balanced(floor):
  w = np.float32(np.append(np.ravel(VALUES), [-1e-20, 1e4])).reshape(2, 5)
  params = square_difference(floor).expand(layer(w))['linear']
  v, u = np.float64(params['w_v']), np.float64(params['w_u'])
  assert (v >= 0).all() and (u >= 0).all()
  np.testing.assert_allclose(v**2 - u**2, w, rtol=4e-7, atol=4e-7 * 2 * floor**2)
  # Below the smallest normal number of float32 a product says nothing.
  np.testing.assert_allclose(v * u, np.full(w.shape, floor**2), rtol=1e-6, atol=1e-34)
  zero = w == 0
  np.testing.assert_array_equal(v[zero], np.float32([floor]))
  np.testing.assert_array_equal(u[zero], np.float32([floor]))


def test_square_difference_gradient_by_hand():
  method = square_difference()
  params = {'w_v': jnp.array([[3.0, 0.5]]), 'w_u': jnp.array([[1.0, 2.0]])}
  np.testing.assert_array_equal(method.fold(params)['w'], [[8.0, -3.75]])
  grads = jax.grad(lambda p: jnp.sum(jnp.array([[2.0, -1.0]]) * method.fold(p)['w']))(params)
  np.testing.assert_array_equal(grads['w_v'], [[12.0, -1.0]])   # 2v · g
  np.testing.assert_array_equal(grads['w_u'], [[-4.0, 4.0]])    # −2u · g


# ---- with networks, with Powerpropagation -----------------------------------------------------------------------


def counting(x, is_training):
  """A linear layer and a state that counts the calls."""
  count = hk.get_state('count', [], init=jnp.zeros)
  hk.set_state('count', count + is_training)
  return hk.Linear(3)(x)


@pytest.mark.parametrize('stateful', [False, True])
def test_every_signature_of_haiku(stateful):
  x, method = np.random.default_rng(0).normal(size=(4, 5)).astype(np.float32), square_difference()
  net = hk.transform_with_state(counting) if stateful else hk.transform(lambda x, is_training: hk.Linear(3)(x))
  with_rng, without = parameterise(net, method), parameterise(hk.without_apply_rng(net), method)
  assert type(with_rng) is type(without) is type(net)
  out = jax.jit(with_rng.init, static_argnames='is_training')(jax.random.key(0), x, is_training=True)
  params, *state = out if stateful else (out,)
  assert set(params['linear']) == {'b', 'w_v', 'w_u'}
  v, u = np.float64(params['linear']['w_v']), np.float64(params['linear']['w_u'])
  assert np.std(v**2 - u**2) > 0.1
  for apply, rng in ((with_rng.apply, [None]), (without.apply, []), (hk.without_apply_rng(with_rng).apply, [])):
    found = apply(params, *state, *rng, x, is_training=True)
    if stateful:
      found, after = found
      assert after['~']['count'] == 1
    np.testing.assert_allclose(found, x @ (v**2 - u**2), rtol=1e-5, atol=1e-5)
  by_name = {'state': state[0]} if stateful else {}
  assert len(with_rng.apply(params=params, rng=None, x=x, is_training=False, **by_name)) == (2 if stateful else 4)


def test_a_stochastic_network_draws_from_its_rng():
  # Dropout of nothing, which wants a key of its own.
  plain, x = hk.transform(lambda x: hk.dropout(hk.next_rng_key(), 0.0, hk.Linear(3)(x))), jnp.ones((4, 50))
  net = parameterise(plain, hard_concrete(0.5), stochastic=True)
  params, apply = hard_concrete(0.5).expand({'linear': {'w': jnp.ones((50, 3)), 'b': jnp.zeros(3)}}), jax.jit(net.apply)
  first, again, other = (apply(params, jax.random.key(seed), x) for seed in (1, 1, 2))
  assert is_same(first, again) and not np.allclose(first, other, atol=1e-3)
  assert not np.allclose(first, parameterise(plain, hard_concrete(0.5)).apply(params, jax.random.key(1), x), atol=1e-3)
  with pytest.raises(ValueError, match='got None'):
    net.apply(params, None, x)
  with pytest.raises(ValueError, match=r'without hk\.without_apply_rng'):
    parameterise(hk.without_apply_rng(plain), hard_concrete(), stochastic=True)


@pytest.mark.parametrize('name', ['soft_threshold', 'hard_concrete'])
def test_goes_with_powerpropagation(name):
  method, reparam, theta = METHODS[name](), powerpropagation(2.0), layer(VALUES)
  params = method.expand(theta)
  assert reparam.alphas(params)['linear'] == {'b': 1.0, 'w': 2.0} | {k: 1.0 for k in NEW[name] - {'w'}}
  found = method.fold(reparam.weights(reparam.inverse(params)))
  np.testing.assert_allclose(found['linear']['w'], VALUES, rtol=1e-6, atol=1e-10)


def regression():
  """64 noiseless examples of 40 inputs, of which 5 count: inputs, outputs, the weights that made them."""
  rng = np.random.default_rng(0)
  w = np.zeros((40, 1))
  w[[3, 11, 17, 25, 38], 0] = [1.0, -0.8, 1.5, -1.2, 0.7]
  x = rng.normal(size=(64, 40))
  return jnp.asarray(x, jnp.float32), jnp.asarray(x @ w, jnp.float32), w


def train(method, tx, phi, weights, x, y, steps, strength=0.0):
  def error(theta):
    return jnp.mean((x @ theta['linear']['w'] - y) ** 2)

  def step(carry, key):
    phi, state = carry
    grads = jax.grad(lambda p: error(method.fold(p, key)) + strength * method.penalty(p))(weights(phi))
    updates, state = tx.update(grads, state, phi)
    return (optax.apply_updates(phi, updates), state), None

  keys = jax.random.split(jax.random.key(1), steps)
  (phi, _), _ = jax.jit(lambda phi: jax.lax.scan(step, (phi, tx.init(phi)), keys))(phi)
  theta = method.fold(weights(phi))
  return theta, error(theta), error


def start(method, signs=None):
  """Random weights; `signs`, where they are not 0, are given to those beneath."""
  w = np.random.default_rng(1).normal(size=(40, 1)) / np.sqrt(40)
  w = w if signs is None else np.where(signs == 0, w, np.abs(w) * np.sign(signs))
  return method.expand({'linear': {'w': jnp.asarray(w, jnp.float32)}})


@pytest.mark.parametrize('name, alpha', [('soft_threshold', 2.0), ('hard_concrete', 2.0), ('hard_concrete', 1.0)])
def test_trains_to_exact_zeros_with_powerpropagation(name, alpha):
  x, y, w = regression()
  reparam = powerpropagation(alpha)
  if name == 'soft_threshold':   # decay takes s from −5 to −2.2, the threshold from 0.007 to 0.1
    method, inner, strength = soft_threshold(-5.0), optax.chain(optax.add_decayed_weights(0.02), optax.sgd(0.05)), 0.0
  else:
    method, inner, strength = hard_concrete(), optax.adam(0.02), 0.05
  # For α > 1 small steps take no weight through 0, so the five begin on the right side.
  params = start(method, w if alpha > 1 else None)
  assert masks.density(nonzero(method.fold(params))) == 1
  tx = target_propagation(inner, reparam)
  theta, loss, _ = train(method, tx, reparam.inverse(params), reparam.weights, x, y, 800, strength)
  kept = np.asarray(nonzero(theta)['linear']['w'])
  # The five that count and at most as many again (5 to 9 were seen). The outputs have a variance of 4.2.
  assert kept[w != 0].all() and kept.sum() <= 10 and loss < 0.01


def test_square_difference_trains_towards_zeros():
  """Weights that change sign included. The rest becomes so small that pruning to an exact count costs nothing."""
  x, y, w = regression()
  method = square_difference()
  theta, loss, error = train(method, optax.sgd(0.05), start(method), lambda params: params, x, y, 800)
  pruned = masks.apply(masks.layerwise(theta, {'linear': {'w': 5}}), theta)
  np.testing.assert_array_equal(nonzero(pruned)['linear']['w'], w != 0)
  assert masks.density(nonzero(theta)) == 1 and loss < 0.005 and error(pruned) < 0.005

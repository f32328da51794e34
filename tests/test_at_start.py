"""Scores at initialisation, against formulas derived by hand for a linear network of two layers, in float64 NumPy."""
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from powerprop import masked, masks, powerpropagation, sparsify, target_propagation
from powerprop.distributions import erk, uniform
from powerprop.updaters import given, grasp_masks, snip_masks, synflow_masks

RNG = np.random.default_rng(3)
A, B = RNG.normal(size=(7, 6)), RNG.normal(size=(6, 5))   # x → x A B + bias
X, Y = RNG.normal(size=(3, 8, 7)), RNG.normal(size=(3, 8, 5))   # three batches of eight
THETA = {'a': {'w': jnp.float32(A)}, 'b': {'w': jnp.float32(B), 'b': jnp.zeros(5)}}
BATCHES = (jnp.float32(X), jnp.float32(Y))
QUICK = {'xla_backend_optimization_level': '0'}   # compiling is nearly all of the time here
SPARSITY, KEPT = 0.7, 22   # round(0.3 · 72) = 22


def compiled(make, f, theta, data, *more, **options):
  """make(f, theta, data, ...) as one program, compiled quickly; the shape that SynFlow gets is no array."""
  if make is synflow_masks:
    return jax.jit(lambda t: make(f, t, data, *more, **options), compiler_options=QUICK)(theta)
  return jax.jit(lambda t, d: make(f, t, d, *more, **options), compiler_options=QUICK)(theta, data)


def loss_fn(theta, batch):
  x, y = batch
  out = x @ theta['a']['w'] @ theta['b']['w'] + jnp.broadcast_to(theta['b']['b'], y.shape)
  return jnp.mean(jnp.sum((out - y) ** 2, -1)) / 2


def gradients(a, b):
  """Of the mean of ½‖x a b − y‖² over all examples."""
  x, y = X.reshape(-1, 7), Y.reshape(-1, 5)
  error = (x @ a @ b - y) / len(x)
  return x.T @ error @ b.T, (x @ a).T @ error


def largest(scores, k):
  """Masks of the k largest, with their signs, by an ordinary sort."""
  flat = np.concatenate([s.ravel() for s in scores])
  mask = np.zeros(flat.size, bool)
  mask[np.argsort(flat)[::-1][:k]] = True
  return np.split(mask, [scores[0].size])


def same(found, expected):
  assert found['b']['b'] is None
  for layer, mask in zip('ab', expected, strict=True):
    np.testing.assert_array_equal(found[layer]['w'], mask.reshape(found[layer]['w'].shape))


def flow_product(a, b):
  """H g by central differences of the gradient along g."""
  g, h = gradients(a, b), 1e-5
  plus, minus = gradients(a + h * g[0], b + h * g[1]), gradients(a - h * g[0], b - h * g[1])
  return [(p - m) / (2 * h) for p, m in zip(plus, minus, strict=True)]


def test_snip():
  g = gradients(A, B)
  same(compiled(snip_masks, loss_fn, THETA, BATCHES, SPARSITY), largest([np.abs(A * g[0]), np.abs(B * g[1])], KEPT))
  by_layer = [largest([np.abs(t * v), np.zeros(0)], k)[0] for t, v, k in ((A, g[0], 13), (B, g[1], 9))]
  same(compiled(snip_masks, loss_fn, THETA, BATCHES, SPARSITY, uniform), by_layer)


def test_snip_is_the_score_of_one_large_batch():
  whole = jax.tree.map(lambda x: x.reshape(1, 24, -1), BATCHES)
  jax.tree.map(np.testing.assert_array_equal, compiled(snip_masks, loss_fn, THETA, whole, SPARSITY),
               compiled(snip_masks, loss_fn, THETA, BATCHES, SPARSITY))


@pytest.mark.parametrize('sparsity, kept', [(0.7, 22), (0.2, 58), (0.05, 68)])   # of 72, some with scores below 0
def test_grasp(sparsity, kept):
  h = flow_product(A, B)
  scores = [A * h[0], B * h[1]]
  same(compiled(grasp_masks, loss_fn, THETA, BATCHES, sparsity), largest(scores, kept))
  assert 22 < sum(int((s > 0).sum()) for s in scores) < 58


def test_the_score_of_grasp_is_what_a_removal_costs():
  """What the formula stands for: shrinking a weight by a share of 10⁻⁶ lowers gᵀg by 2 · 10⁻⁶ of its score."""
  h, small = flow_product(A, B), 1e-6
  def flow(a):
    return sum(np.sum(g ** 2) for g in gradients(a, B))
  scores = A * h[0]
  for i in (np.unravel_index(scores.argmax(), A.shape), np.unravel_index(scores.argmin(), A.shape)):
    less = A.copy()
    less[i] *= 1 - small
    np.testing.assert_allclose((flow(less) - flow(A)) / small, -2 * scores[i], rtol=1e-3)


def rounds_of_synflow(a, b, total, kept, rounds, inputs=1.0):
  """R = 1ᵀ|a||b|1: the score of a_ij is |a_ij| (|b| 1)_j, of b_jk (1ᵀ|a|)_j |b_jk|."""
  live = [np.ones(a.shape, bool), np.ones(b.shape, bool)]
  for i in range(1, rounds + 1):
    p, q = np.abs(a) * live[0], np.abs(b) * live[1]
    scores = [p * q.sum(1), p.sum(0)[:, None] * q]
    flat = largest(scores, round(total * (kept / total) ** (i / rounds)))
    live = [m.reshape(s.shape) for m, s in zip(flat, scores, strict=True)]
  return live


def network(theta, x):
  return jax.nn.relu(x @ theta['a']['w']) @ theta['b']['w'] + theta['b']['b'][None]


@pytest.mark.parametrize('rounds', [7, 100])
def test_synflow(rounds):
  same(compiled(synflow_masks, network, THETA, (1, 7), SPARSITY, rounds=rounds), rounds_of_synflow(A, B, 72, KEPT, rounds))


@pytest.mark.parametrize('factor', [1e-9, 3e7])
def test_synflow_of_a_deep_network_stays_within_float32(factor):
  """Eight layers: R is 10^(∓65), and the masks are those of float64."""
  names = [f'l{i}' for i in range(8)]
  rng = np.random.default_rng(5)
  theta = {name: {'w': jnp.float32(rng.normal(size=(6, 6)) * factor)} for name in names}

  def deep(theta, x):
    for name in names:
      x = jax.nn.relu(x @ theta[name]['w'])
    return x
  size = [np.abs(np.asarray(theta[name]['w'], np.float64)) for name in names]
  scores = []
  for i, w in enumerate(size):
    before = np.linalg.multi_dot([np.ones((1, 6)), np.eye(6), *size[:i]]) if i else np.ones((1, 6))
    after = np.linalg.multi_dot([*size[i + 1:], np.eye(6), np.ones((6, 1))]) if i < 7 else np.ones((6, 1))
    scores.append(w * before.T * after.T)
  flat = np.concatenate([s.ravel() for s in scores])
  expected = flat >= np.sort(flat)[::-1][85]   # round(0.3 · 288) = 86
  found = compiled(synflow_masks, deep, theta, (1, 6), SPARSITY, rounds=1)
  np.testing.assert_array_equal(np.concatenate([np.asarray(found[name]['w']).ravel() for name in names]), expected)


@pytest.mark.parametrize('make, at_least, left', [(snip_masks, 0, 0), (snip_masks, 3, 3), (grasp_masks, 3, 3)])
def test_at_least_keeps_layers_alive_within_the_total(make, at_least, left):
  """A layer that matters a million times less is pruned away whole, unless so many are asked for."""
  faint = {'a': THETA['a'], 'b': THETA['b'], 'c': {'w': jnp.full((4, 4), 1e-6)}}
  def loss(theta, batch):
    return loss_fn({'a': theta['a'], 'b': theta['b']}, batch) + jnp.sum(theta['c']['w'] ** 2)
  found = compiled(make, loss, faint, BATCHES, 0.8, at_least=at_least)
  assert sum(int(n) for n in jax.tree.leaves(masks.counts(found))) == 18
  assert int(found['c']['w'].sum()) == left
  with pytest.raises(ValueError, match='at_least=9 keeps 27 weights, more than the 18'):
    make(loss, faint, BATCHES, 0.8, at_least=9)


def test_under_jit_and_over_seeds_into_a_training():
  """Four seeds in one program: masks of each are its own, and `update` takes the states that come back."""
  thetas = jax.tree.map(lambda x: jnp.stack([x + i * jnp.cos(jnp.arange(x.size)).reshape(x.shape) for i in range(4)]), THETA)
  batches = jax.tree.map(lambda x: jnp.stack([x, 2 * x, x + 1, -x]), BATCHES)
  reparam = powerpropagation(2.0)

  def begin(theta, batch):
    chosen = (snip_masks(loss_fn, theta, batch, SPARSITY), grasp_masks(loss_fn, theta, batch, SPARSITY),
              synflow_masks(network, theta, (1, 7), SPARSITY, rounds=3))
    return chosen, sparsify(target_propagation(optax.sgd(0.1), reparam), given(chosen[0])).init(reparam.inverse(theta))
  chosen, state = jax.jit(jax.vmap(begin), compiler_options=QUICK)(thetas, batches)
  one = jax.jit(begin, compiler_options=QUICK)
  for i in range(4):
    alone, _ = one(*jax.tree.map(lambda x, i=i: x[i], (thetas, batches)))
    jax.tree.map(np.testing.assert_array_equal, jax.tree.map(lambda x, i=i: x[i], chosen), alone)
  assert (np.asarray(chosen[0]['a']['w'][0]) != np.asarray(chosen[0]['a']['w'][3])).any()
  phi = reparam.inverse(thetas)
  tx = sparsify(target_propagation(optax.sgd(0.1), reparam), given(jax.tree.map(lambda x: x[0], chosen[0])))
  updates, state = jax.vmap(tx.update)(jax.vmap(jax.grad(loss_fn))(masked(state, reparam.weights(phi)),
                                                                    jax.tree.map(lambda x: x[:, 0], batches)), state, phi)
  phi = optax.apply_updates(phi, updates)
  np.testing.assert_array_equal(phi['a']['w'] != 0, chosen[0]['a']['w'])


def test_dense_leaves_and_other_distributions():
  found = compiled(grasp_masks, loss_fn, THETA, BATCHES, 0.5, uniform, dense=('a/*',))
  h = flow_product(A, B)
  assert found['a']['w'] is None   # but its gradient is part of the flow
  np.testing.assert_array_equal(found['b']['w'].ravel(), largest([B * h[1], np.zeros(0)], 15)[0])
  found = compiled(synflow_masks, network, THETA, (1, 7), 0.5, erk, rounds=4)
  assert sum(int(n) for n in jax.tree.leaves(masks.counts(found))) == 36


MISUSE = {
    'rounds must be an integer of at least 1, got 0': lambda: synflow_masks(network, THETA, (1, 7), 0.5, rounds=0),
    'at_least must be an integer of at least 0, got -1': lambda: snip_masks(loss_fn, THETA, BATCHES, 0.5, at_least=-1),
    'at_least is for one total over all leaves': lambda: snip_masks(loss_fn, THETA, BATCHES, 0.5, uniform, at_least=2),
    'batches need one leading axis over at least one': lambda: snip_masks(loss_fn, THETA, (BATCHES[0], BATCHES[1][:2]), 0.5),
    'sparsity is a share removed': lambda: snip_masks(loss_fn, THETA, BATCHES, 1.0),
    'no leaf is left': lambda: snip_masks(loss_fn, THETA, BATCHES, 0.5, where=lambda name, x: False)}


@pytest.mark.parametrize('message', MISUSE)
def test_misuse(message):
  with pytest.raises(ValueError, match=message):
    MISUSE[message]()

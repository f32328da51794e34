"""skip_frozen: the gradients of jax.grad, and of frozen layers no product; what the backward pass costs by hand."""
import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments import convolution
from powerprop import flops, powerpropagation
from powerprop.frozen import backward_densities, skip_frozen

REPARAM = powerpropagation(2.0)


def forward(x):
  with hk.intercept_methods(convolution.on_cpus):
    x = jax.nn.relu(hk.Conv2D(4, 3, w_init=hk.initializers.RandomNormal(0.3), name='conv')(x))
  x = jax.nn.gelu(hk.Linear(6, name='first')(x.mean(axis=(1, 2))))
  return hk.Linear(3, name='last')(x)


NET = hk.without_apply_rng(hk.transform(forward))
X = jnp.asarray(np.random.default_rng(0).normal(size=(5, 6, 6, 2)), jnp.float32)
THETA = jax.jit(NET.init)(jax.random.key(0), X)


def loss(theta, x, target):
  return jnp.mean((NET.apply(theta, x) - target) ** 2)


def test_gradients_are_those_of_jax_and_zero_where_frozen():
  """Each layer frozen or not, in all combinations, in one program."""
  target = jnp.ones((5, 3))
  expected = jax.jit(jax.grad(loss))(THETA, X, target)
  skipping = jax.jit(jax.value_and_grad(skip_frozen(loss)))
  for n in range(8):
    on = dict(zip(('conv', 'first', 'last'), (n & 1 > 0, n & 2 > 0, n & 4 > 0), strict=True))
    trainable = {name: {'w': jnp.array(on[name]), 'b': jnp.array(on[name])} for name in THETA}
    value, grads = skipping(THETA, trainable, X, target)
    np.testing.assert_allclose(value, jax.jit(loss)(THETA, X, target), rtol=1e-6)
    for name in THETA:
      np.testing.assert_allclose(grads[name]['w'], expected[name]['w'] * on[name], rtol=1e-5, atol=1e-7)
      np.testing.assert_allclose(grads[name]['b'], expected[name]['b'], rtol=1e-5, atol=1e-7)
  assert skipping._cache_size() == 1
  with pytest.raises(ValueError, match='trainable and the parameters differ in structure'):
    skipping(THETA, {'conv': trainable['conv']}, X, target)
  with pytest.raises(ValueError, match=r'trainable has one bool for each leaf, jax.tree.map\(jnp.any, free\); got bool \('):
    skipping(THETA, jax.tree.map(lambda x: jnp.ones(x.shape, bool), THETA), X, target)


def test_the_products_for_weights_stand_in_branches():
  """In the compiled program: two products forward and one for the hidden layer, and in branches one for each weight."""
  theta = {'a': jnp.ones((4, 5)), 'b': jnp.ones((5, 3))}
  f = skip_frozen(lambda theta, x: jnp.sum((jax.nn.relu(x @ theta['a']) @ theta['b']) ** 2))
  lowered = jax.jit(jax.grad(f)).lower(theta, jax.tree.map(lambda x: jnp.array(True), theta), jnp.ones((2, 4)))
  branches, entry = lowered.compile().as_text().split('\nENTRY ')
  assert (entry.count(' dot('), entry.count(' conditional(')) == (3, 2)
  assert [body.count(' dot(') for body in branches.split('\n}') if ' dot(' in body] == [1, 1]


def test_weights_that_are_made_of_one_leaf_and_those_that_are_not():
  """At φ, through Ψ and a cast: the product is one of the leaf. A weight made of two leaves, or in a scan, is left alone."""
  phi = REPARAM.inverse({'l': {'w': jnp.arange(1.0, 13).reshape(4, 3) / 12}, 'gate': jnp.ones((4, 3))})
  x = jnp.arange(8.0).reshape(2, 4)

  def through(p, x):
    return jnp.sum((x @ REPARAM.weights(p)['l']['w'].astype(jnp.float32)) ** 2)

  def gated(p, x):
    w = p['l']['w'] * p['gate']
    total, _ = jax.lax.scan(lambda c, row: (c + jnp.sum(row @ p['l']['w']), None), 0.0, x)
    return jnp.sum((x @ w) ** 2) + total

  def of_two(p, x):
    return jnp.sum((x @ (p['l']['w'] * p['gate'])) ** 2)
  off, on = ({'l': {'w': jnp.array(flag)}, 'gate': jnp.array(flag)} for flag in (False, True))
  for f in (through, gated, of_two):
    expected = jax.jit(jax.grad(f))(phi, x)
    skipping = jax.jit(jax.grad(skip_frozen(f)))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), skipping(phi, on, x), expected)
    zero = not np.any(skipping(phi, off, x)['l']['w'])
    assert zero == (f is through)


def test_cost_of_a_step_by_hand():
  """Two layers of 40 and 20 operations; half of the first is free and nothing of the second."""
  theta = {'a': {'w': jnp.ones((4, 5)), 'b': jnp.ones(5)}, 'c': {'w': jnp.ones((5, 2))}}
  costs = flops.count(lambda p, x: (x @ p['a']['w'] + jnp.stack([p['a']['b']])) @ p['c']['w'], theta, jnp.ones((1, 4)))
  assert costs.leaves == {'a/w': 40, 'a/b': 0, 'c/w': 20}
  free = {'a': {'w': jnp.arange(20).reshape(4, 5) < 10, 'b': jnp.zeros(5, bool)}, 'c': {'w': jnp.zeros((5, 2), bool)}}
  assert backward_densities(costs, free) == {'a/w': 0.5, 'a/b': 0.0, 'c/w': 0.0}
  assert flops.training_step(costs, {}, backward_densities(costs, free)) == 2 * 60 + 20
  assert flops.training_step(costs, {}, backward_densities(costs, free, whole_layers=True)) == 2 * 60 + 40

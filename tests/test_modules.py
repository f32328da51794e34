"""Networks whose parameters are φ: same function at initialisation, same signatures, leaves of zeros left alone."""
import warnings

import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from powerprop import keep_zeros, powerpropagation, reparameterise, target_propagation
from powerprop.reparam import leaf_name


def mlp(x):
  return hk.nets.MLP([16, 8, 3])(x)


def zero_head(x, is_training):
  """A network whose classifier begins at zero, with state."""
  x = hk.BatchNorm(True, True, 0.9)(hk.Linear(6)(x), is_training)
  return hk.Linear(3, w_init=jnp.zeros, name='logits')(jax.nn.relu(x))


def test_init_is_the_inverse_and_the_function_is_preserved():
  net = hk.transform(mlp)
  x = jax.random.normal(jax.random.key(1), (5, 4))
  theta = net.init(jax.random.key(0), x)
  transformed = reparameterise(net, powerpropagation(2.0))
  phi = transformed.init(jax.random.key(0), x)
  w = np.asarray(theta['mlp/~/linear_1']['w'], np.float64)
  np.testing.assert_allclose(phi['mlp/~/linear_1']['w'], np.sign(w) * np.sqrt(np.abs(w)), rtol=1e-6)
  assert all(np.array_equal(phi[m]['b'], theta[m]['b']) for m in theta)
  np.testing.assert_allclose(transformed.apply(phi, None, x), net.apply(theta, None, x), rtol=1e-5, atol=1e-6)


def test_alpha_one_changes_no_bit():
  net = hk.transform(mlp)
  x = jax.random.normal(jax.random.key(1), (5, 4))
  same = reparameterise(net, powerpropagation(1.0))
  theta, phi = net.init(jax.random.key(0), x), same.init(jax.random.key(0), x)
  assert all(np.array_equal(a, b) for a, b in zip(jax.tree.leaves(theta), jax.tree.leaves(phi), strict=True))
  np.testing.assert_array_equal(same.apply(phi, None, x), net.apply(theta, None, x))


def test_gradient_through_the_network_is_that_at_theta_times_the_slope():
  net = hk.without_apply_rng(hk.transform(mlp))
  x = jax.random.normal(jax.random.key(1), (5, 4))
  reparam = powerpropagation(3.0)
  transformed = reparameterise(net, reparam)
  phi = transformed.init(jax.random.key(0), x)
  got = jax.grad(lambda p: jnp.sum(transformed.apply(p, x) ** 2))(phi)
  at_theta = jax.grad(lambda p: jnp.sum(net.apply(p, x) ** 2))(reparam.weights(phi))
  for module in phi:
    slope = 3 * np.asarray(phi[module]['w'], np.float64) ** 2
    np.testing.assert_allclose(got[module]['w'], at_theta[module]['w'] * slope, rtol=1e-5, atol=1e-7)
    np.testing.assert_array_equal(got[module]['b'], at_theta[module]['b'])


@pytest.mark.parametrize('inner', [True, False])
def test_every_signature_of_haiku(inner):
  """With and without state, with and without the key, in either order of the combinators, arguments by keyword."""
  def with_rng(net):
    return hk.without_apply_rng(net) if not inner else net
  x = jnp.ones((2, 8, 8, 3))
  plain = reparameterise(with_rng(hk.transform(lambda x: mlp(x.reshape(2, -1)))), powerpropagation(2.0))
  plain = plain if not inner else hk.without_apply_rng(plain)
  assert isinstance(plain, hk.Transformed)
  assert plain.apply(plain.init(jax.random.key(0), x), x).shape == (2, 3)
  assert plain.apply(params=plain.init(jax.random.key(0), x=x), x=x).shape == (2, 3)
  net = hk.transform_with_state(lambda x, is_training: hk.BatchNorm(True, True, 0.9)(mlp(x.reshape(2, -1)), is_training))
  stateful = reparameterise(net, powerpropagation(2.0))
  assert isinstance(stateful, hk.TransformedWithState)
  params, state = stateful.init(jax.random.key(0), x, is_training=True)
  fresh = reparameterise(net, powerpropagation(2.0))     # as after a restart: apply without init
  out, new_state = jax.jit(fresh.apply, static_argnames='is_training')(params, state, None, x, is_training=True)
  assert out.shape == (2, 3) and jax.tree.structure(new_state) == jax.tree.structure(state)
  out, _ = fresh.apply(params, state=state, rng=None, x=x, is_training=False)
  assert out.shape == (2, 3)


def test_leaves_of_zeros_are_found_without_values():
  """In init and in apply, in any order, under jit and grad: the answer comes from the network, not from its parameters."""
  net = hk.transform_with_state(zero_head)
  x = jax.random.normal(jax.random.key(1), (4, 5))
  theta, state = jax.jit(net.init, static_argnames='is_training')(jax.random.key(0), x, is_training=True)
  assert not theta['logits']['w'].any()
  moved = jax.tree.map(lambda w: w + 0.5, theta)   # nothing in it is zero any more
  for first in ('init', 'apply'):
    transformed = reparameterise(net, powerpropagation(2.0))
    with pytest.warns(UserWarning, match=r'kept at alpha = 1 .*: logits/w\.$'):
      if first == 'init':
        phi, _ = jax.jit(transformed.init, static_argnames='is_training')(jax.random.key(0), x, is_training=True)
        assert not phi['logits']['w'].any()
      else:
        out, _ = jax.jit(transformed.apply, static_argnames='is_training')(moved, state, None, x, is_training=True)
    with warnings.catch_warnings():
      warnings.simplefilter('error')   # said once
      grads = jax.grad(lambda p, t=transformed: t.apply(p, state, None, x, is_training=True)[0].sum())(moved)
  with pytest.warns(UserWarning):
    expected = keep_zeros(powerpropagation(2.0), theta)
  np.testing.assert_allclose(out, net.apply(expected.weights(moved), state, None, x, is_training=True)[0], rtol=1e-4, atol=1e-5)
  assert grads['logits']['w'].any()


RANDOM = hk.initializers.RandomNormal()
WITH_ZERO = {   # leaf that is all zero → a network that has it after a linear layer of 4
    'a/w': lambda x: hk.Linear(4, w_init=lambda s, d: jax.jit(lambda: jnp.zeros((4, 4)) * 2.0)().astype(d), name='a')(x),
    'b/w': lambda x: hk.Linear(4, w_init=lambda s, d: RANDOM(s, d) * 0.0, name='b')(x),
    'c/w': lambda x: hk.remat(lambda y: hk.Linear(4, w_init=jnp.zeros, name='c')(y))(x),
    'd/w': lambda x: hk.Linear(4, w_init=hk.initializers.TruncatedNormal(0.0), name='d')(x),
    'e/w': lambda x: hk.Linear(4, w_init=hk.initializers.VarianceScaling(0.0), name='e')(x),
    '__layer_stack_no_per_layer/g/w': lambda x: hk.experimental.layer_stack(1)(
        lambda y: hk.Linear(4, w_init=jnp.zeros, name='g')(y))(x),
    'h/w': lambda x: hk.Linear(4, w_init=hk.initializers.Constant(np.zeros((4, 4), np.float32)), name='h')(x),
}


@pytest.mark.parametrize('name', WITH_ZERO)
@pytest.mark.parametrize('wrap', [lambda f: f, jax.jit], ids=['plain', 'jit'])
def test_zeros_of_any_origin_are_found(name, wrap):
  net = hk.without_apply_rng(hk.transform(lambda x: WITH_ZERO[name](hk.Linear(4)(x))))
  net = net._replace(init=wrap(net.init))
  x = jnp.ones((2, 3))
  theta = net.init(jax.random.key(0), x)
  with pytest.warns(UserWarning, match=rf': {name}\.$'):
    keep_zeros(powerpropagation(2.0), theta)   # by values
  transformed = reparameterise(net, powerpropagation(2.0))
  with pytest.warns(UserWarning, match=rf': {name}\.$'):
    phi = transformed.init(jax.random.key(0), x)
  grads = jax.grad(lambda p: jnp.sum(transformed.apply(p, x)))(phi)
  assert any(g.any() for path, g in jax.tree_util.tree_leaves_with_path(grads) if leaf_name(path) == name)


NOT_ZERO = {
    'ones': jnp.ones, 'an identity': hk.initializers.Identity(), 'random': RANDOM, 'a sum': lambda s, d: jnp.zeros(s, d) + 1,
    'a power': lambda s, d: jnp.zeros(s, d) ** 0, 'cosine': lambda s, d: jnp.cos(jnp.zeros(s, d)),
    'a choice': lambda s, d: jnp.where(RANDOM(s, d) > 0, jnp.zeros(s, d), 1),
    'a carry': lambda s, d: jax.lax.scan(lambda c, _: (c + 1, c), jnp.zeros(s, d), None, length=3)[0],
    'written': lambda s, d: jnp.zeros(s, d).at[0, 0].set(1)}


@pytest.mark.parametrize('name', NOT_ZERO)
def test_constants_that_are_not_zero_are_reparameterised(name):
  net = hk.without_apply_rng(hk.transform(lambda x: hk.Linear(4, w_init=NOT_ZERO[name])(x)))
  transformed, x = reparameterise(net, powerpropagation(2.0)), jnp.ones((1, 4))
  phi = jax.tree.map(lambda p: jnp.full_like(p, 3.0), transformed.init(jax.random.key(0), x))
  np.testing.assert_array_equal(transformed.apply(phi, x), np.full((1, 4), 4 * 9 + 3.0))


def test_one_transformed_network_serves_parameters_of_several_structures():
  """Inputs of another width make another network, whose zeros are found anew."""
  def net(x):
    return hk.Linear(2, w_init=jnp.zeros if x.shape[1] == 3 else jnp.ones)(x)
  transformed = reparameterise(hk.without_apply_rng(hk.transform(net)), powerpropagation(2.0))
  with pytest.warns(UserWarning, match='linear/w'):
    zeros = transformed.init(jax.random.key(0), jnp.ones((1, 3)))
  ones = transformed.init(jax.random.key(0), jnp.ones((1, 4)))
  threes = [jax.tree.map(lambda p: jnp.full_like(p, 3.0), phi) for phi in (zeros, ones)]
  np.testing.assert_array_equal(transformed.apply(threes[0], jnp.ones((1, 3))), [[12.0, 12.0]])   # α = 1: 3·3 + 3
  np.testing.assert_array_equal(transformed.apply(threes[1], jnp.ones((1, 4))), [[39.0, 39.0]])   # α = 2: 4·9 + 3


def test_parameters_of_other_networks_are_passed_by():
  net = reparameterise(hk.without_apply_rng(hk.transform(mlp)), powerpropagation(2.0))
  x = jnp.ones((2, 4))
  phi = net.init(jax.random.key(0), x)
  np.testing.assert_array_equal(net.apply(phi | {'other': {'w': jnp.ones((2, 2))}}, x), net.apply(phi, x))


def test_a_network_without_weights_is_an_error():
  net = reparameterise(hk.transform(lambda x: hk.LayerNorm(-1, True, True)(x)), powerpropagation(2.0))
  with pytest.raises(ValueError, match='chose none of these leaves: layer_norm/offset'):
    net.init(jax.random.key(0), jnp.ones((2, 3)))


def test_mobilenet_keeps_its_function():
  net = hk.transform_with_state(lambda x, is_training: hk.nets.MobileNetV1((1, 2), (8, 16), num_classes=3)(x, is_training))
  x = jax.random.normal(jax.random.key(1), (2, 16, 16, 3))
  init, transformed = jax.jit(net.init, static_argnames='is_training'), reparameterise(net, powerpropagation(2.0))
  theta, state = init(jax.random.key(0), x, is_training=True)
  phi, _ = jax.jit(transformed.init, static_argnames='is_training')(jax.random.key(0), x, is_training=True)
  names = {leaf_name(p) for p, a in jax.tree_util.tree_leaves_with_path(powerpropagation(2.0).alphas(phi)) if a != 1}
  assert len(names) == 6 and all(name.endswith('/w') for name in names)   # stem, two depthwise, two pointwise, classifier
  np.testing.assert_allclose(transformed.apply(phi, state, None, x, is_training=False)[0],
                             net.apply(theta, state, None, x, is_training=False)[0], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize('network', [hk.nets.ResNet18, pytest.param(hk.nets.ResNet50, marks=pytest.mark.slow)])
def test_every_leaf_of_a_stock_resnet_moves(network):
  """The stock networks, whose zero classifier would hold everything but its bias in place (all gradients are exactly 0)."""
  net = hk.transform_with_state(lambda x: network(3)(x, is_training=True))
  # Each image twice, with two labels: the loss cannot vanish, and its gradient neither.
  x = jnp.repeat(jax.random.normal(jax.random.key(1), (2, 16, 16, 3)), 2, axis=0)
  labels = jnp.array([0, 1, 1, 2])
  quick = {'xla_backend_optimization_level': '0'}   # compiling is nearly all of the time here
  theta, state = jax.jit(net.init, compiler_options=quick)(jax.random.key(0), x)
  with pytest.warns(UserWarning, match='/~/logits/w'):
    reparam = keep_zeros(powerpropagation(2.0), theta)
  tx = target_propagation(optax.sgd(0.3), reparam)
  start = phi = reparam.inverse(theta)

  def step(phi, state, opt_state):
    def loss(w):
      logits, new = net.apply(w, state, None, x)
      return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean(), new
    grads, state = jax.grad(loss, has_aux=True)(reparam.weights(phi))
    updates, opt_state = tx.update(grads, opt_state, phi)
    return optax.apply_updates(phi, updates), state, opt_state

  step, opt_state = jax.jit(step, compiler_options=quick), tx.init(phi)
  for _ in range(6):   # the classifier, then the zero scales before it, then what is under them: each step wakes the next
    phi, state, opt_state = step(phi, state, opt_state)
  still = [leaf_name(path) for (path, a), b in
           zip(jax.tree_util.tree_leaves_with_path(start), jax.tree.leaves(phi), strict=True) if np.array_equal(a, b)]
  assert still == []

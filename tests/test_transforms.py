"""Target propagation and the naive order around optax chains, against independent NumPy loops and exact identities."""
import functools
import inspect

import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np
import optax
import optax.contrib
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from powerprop import backpropagation, powerpropagation, reparameterise, target_propagation

ALPHA = 2.0
REPARAM = powerpropagation(ALPHA)
PHI = {'a': {'w': jnp.array([[0.5, -1.5, 0.0], [2.0, 0.25, -0.75]]), 'b': jnp.array([0.5, -0.5, 1.0])},
       'c': {'w': jnp.array([[1.0], [-1.0], [0.5]])}}
GRADS = [jax.tree.map(lambda p, s=s: jnp.cos(3 * p + s), PHI) for s in range(4)]

INNER = {
    'sgd': lambda: optax.sgd(0.1),
    'momentum': lambda: optax.sgd(0.1, momentum=0.9),
    'adam': lambda: optax.adam(0.1),
    'adamw': lambda: optax.adamw(0.1, weight_decay=0.1),
    'lamb': lambda: optax.lamb(0.1),
    'lion': lambda: optax.lion(0.1, weight_decay=0.1),
    'rmsprop': lambda: optax.rmsprop(0.1),
    'clip and decay': lambda: optax.chain(optax.clip_by_global_norm(0.5), optax.add_decayed_weights(0.1), optax.sgd(0.1)),
    # Its state begins as a copy of the parameters that it is shown.
    'schedule free': lambda: optax.contrib.schedule_free_sgd(0.1),
    'scheduled': lambda: optax.inject_hyperparams(optax.adam)(optax.linear_schedule(0.2, 0.01, 4)),
    'ema of updates': lambda: optax.chain(optax.ema(0.9), optax.scale(-0.1)),
}
WRAPPERS = {'target_propagation': target_propagation, 'backpropagation': backpropagation}


def close(a, b, rtol=1e-5):
  assert jax.tree.structure(a) == jax.tree.structure(b)
  for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
    np.testing.assert_allclose(x, y, rtol=rtol, atol=1e-7)


def equal(a, b):
  assert jax.tree.structure(a) == jax.tree.structure(b)
  for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
    assert x.dtype == y.dtype
    np.testing.assert_array_equal(x, y)


def run(tx, phi=PHI, grads=GRADS):
  state = tx.init(phi)
  for g in grads:
    updates, state = tx.update(g, state, phi)
    phi = optax.apply_updates(phi, updates)
  return phi


def slopes(phi):
  """α|φ|^(α−1) in float64, 1 for biases."""
  return {m: {n: ALPHA * np.abs(np.asarray(x, np.float64)) ** (ALPHA - 1) if n == 'w' else np.ones(x.shape)
              for n, x in leaves.items()} for m, leaves in phi.items()}


def theta_of(phi):
  return {m: {n: np.sign(x) * np.abs(np.asarray(x, np.float64)) ** ALPHA if n == 'w' else np.asarray(x, np.float64)
              for n, x in leaves.items()} for m, leaves in phi.items()}


@pytest.mark.parametrize('name', INNER)
def test_target_propagation_is_the_inner_update_at_theta_times_the_slope(name):
  inner, tx = INNER[name](), target_propagation(INNER[name](), REPARAM)
  phi, state = PHI, tx.init(PHI)
  theta = jax.tree.map(jnp.float32, theta_of(phi))
  inner_state = inner.init(theta)
  for g in GRADS:
    u, inner_state = inner.update(g, inner_state, theta)
    expected = jax.tree.map(lambda p, u, s: np.asarray(p, np.float64) + np.asarray(u, np.float64) * s, phi, u, slopes(phi))
    updates, state = tx.update(g, state, phi)
    phi = optax.apply_updates(phi, updates)
    close(phi, expected)
    theta = jax.tree.map(jnp.float32, theta_of(phi))
  assert not np.array_equal(phi['a']['w'], PHI['a']['w'])
  assert phi['a']['w'][0, 2] == 0   # a critical point


@pytest.mark.parametrize('name', INNER)
def test_backpropagation_is_the_inner_update_of_the_gradient_at_phi(name):
  inner = INNER[name]()
  phi, state = PHI, inner.init(PHI)
  for g in GRADS:
    at_phi = jax.tree.map(lambda g, s: jnp.float32(np.asarray(g, np.float64) * s), g, slopes(phi))
    u, state = inner.update(at_phi, state, phi)
    phi = optax.apply_updates(phi, u)
  close(run(backpropagation(INNER[name](), REPARAM)), phi)


def test_adam_by_hand():
  """Two steps of Adam inside target propagation, in float64 NumPy from the equations of both papers."""
  phi = np.array([[0.5, -2.0]])
  m = v = np.zeros_like(phi)
  gradients = [np.array([[1.0, -0.5]]), np.array([[0.25, 2.0]])]
  expected = phi.copy()
  for t, g in enumerate(gradients, 1):
    m, v = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g**2
    u = -0.1 * (m / (1 - 0.9**t)) / (np.sqrt(v / (1 - 0.999**t)) + 1e-8)
    expected = expected + u * 2 * np.abs(expected)
  got = run(target_propagation(optax.adam(0.1), REPARAM), {'l': {'w': jnp.float32(phi)}},
            [{'l': {'w': jnp.float32(g)}} for g in gradients])
  np.testing.assert_allclose(got['l']['w'], expected, rtol=1e-5)


def test_both_orders_are_one_for_sgd_and_equal_jax_grad_through_the_network():
  net = hk.without_apply_rng(hk.transform(lambda x: hk.nets.MLP([8, 3])(x)))
  x, labels = jax.random.normal(jax.random.key(0), (6, 4)), jnp.array([0, 1, 2, 0, 1, 2])
  loss = lambda apply, p: optax.softmax_cross_entropy_with_integer_labels(apply(p, x), labels).mean()   # noqa: E731
  through = reparameterise(net, REPARAM)
  phi = start = through.init(jax.random.key(1), x)
  for _ in range(3):
    phi = jax.tree.map(lambda p, g: p - 0.1 * g, phi, jax.grad(functools.partial(loss, through.apply))(phi))
  for wrapper in WRAPPERS.values():
    tx, other = wrapper(optax.sgd(0.1), REPARAM), start
    state = tx.init(other)
    for _ in range(3):
      grads = jax.grad(functools.partial(loss, net.apply))(REPARAM.weights(other))
      updates, state = tx.update(grads, state, other)
      other = optax.apply_updates(other, updates)
    close(other, phi, rtol=2e-5)


@pytest.mark.parametrize('wrapper', WRAPPERS)
@pytest.mark.parametrize('name', ['adamw', 'clip and decay'])
def test_alpha_one_is_the_inner_chain_bit_for_bit(wrapper, name):
  equal(run(WRAPPERS[wrapper](INNER[name](), powerpropagation(1.0))), run(INNER[name]()))


def test_the_two_orders_differ_for_adam():
  a, b = (run(wrapper(optax.adam(0.1), REPARAM)) for wrapper in WRAPPERS.values())
  assert np.abs(np.asarray(a['a']['w']) - b['a']['w']).max() > 0.05


# ---- inside and around other transformations -----------------------------------------------------------------------


@pytest.mark.parametrize('wrapper', WRAPPERS)
def test_multi_steps(wrapper):
  """Two mini-steps count as one of their mean gradient; params come by keyword there."""
  tx = optax.MultiSteps(WRAPPERS[wrapper](optax.adam(0.1), REPARAM), 2)
  mean = [jax.tree.map(lambda a, b: (a + b) / 2, GRADS[i], GRADS[i + 1]) for i in (0, 2)]
  close(run(tx), run(WRAPPERS[wrapper](optax.adam(0.1), REPARAM), grads=mean))


@pytest.mark.parametrize('wrapper', WRAPPERS)
def test_inject_hyperparams(wrapper):
  make = lambda learning_rate: WRAPPERS[wrapper](optax.adam(learning_rate), REPARAM)   # noqa: E731
  tx = optax.inject_hyperparams(make)(learning_rate=0.05)
  state = tx.init(PHI)
  state.hyperparams['learning_rate'] = jnp.float32(0.1)
  updates, _ = tx.update(GRADS[0], state, PHI)
  close(optax.apply_updates(PHI, updates), run(make(0.1), grads=GRADS[:1]))


@pytest.mark.parametrize('wrapper', WRAPPERS)
def test_partition(wrapper):
  labels = jax.tree_util.tree_map_with_path(lambda path, _: 'w' if path[-1].key == 'w' else 'b', PHI)
  tx = optax.partition({'w': WRAPPERS[wrapper](optax.adam(0.1), REPARAM), 'b': optax.sgd(0.5)}, labels)
  got, weights, biases = run(tx), run(WRAPPERS[wrapper](optax.adam(0.1), REPARAM)), run(optax.sgd(0.5))
  equal(got, {'a': {'w': weights['a']['w'], 'b': biases['a']['b']}, 'c': weights['c']})
  inside = WRAPPERS[wrapper](optax.partition({'w': optax.adam(0.1), 'b': optax.sgd(0.5)}, labels), REPARAM)
  close(run(inside), got)


@pytest.mark.parametrize('wrapper', WRAPPERS)
def test_apply_if_finite(wrapper):
  tx = optax.apply_if_finite(WRAPPERS[wrapper](optax.adam(0.1), REPARAM), 3)
  bad = jax.tree.map(lambda x: x * jnp.nan, GRADS[0])
  close(run(tx, grads=[GRADS[0], bad, GRADS[1]]), run(WRAPPERS[wrapper](optax.adam(0.1), REPARAM), grads=GRADS[:2]))


def test_ema_of_parameters():
  """The average is of φ or of θ, as the caller chooses; an entry that does not change stays as it is."""
  tx, ema, phi = target_propagation(optax.adam(0.1), REPARAM), REPARAM.weights(PHI), PHI
  state, expected = tx.init(phi), theta_of(PHI)
  for g in GRADS:
    updates, state = tx.update(g, state, phi)
    phi = optax.apply_updates(phi, updates)
    ema = jax.tree.map(lambda e, p: e + 0.1 * (p - e), ema, REPARAM.weights(phi))
    expected = jax.tree.map(lambda e, p: 0.9 * e + 0.1 * p, expected, theta_of(phi))
  close(ema, expected)
  assert ema['a']['w'][0, 2] == 0


def test_extra_arguments_reach_the_inner_chain():
  def update(updates, state, params=None, *, value, **extra):
    return jax.tree.map(lambda g: g * value, updates), state
  inner = optax.GradientTransformationExtraArgs(lambda params: optax.EmptyState(), update)
  for wrapper in WRAPPERS.values():
    tx = wrapper(inner, REPARAM)
    got, _ = tx.update(GRADS[0], tx.init(PHI), PHI, value=3.0, unused='x')
    close(got, jax.tree.map(lambda g, s: 3 * np.asarray(g) * s, GRADS[0], slopes(PHI)))
    assert list(inspect.signature(tx.update).parameters)[:3] == ['updates', 'state', 'params']


@pytest.mark.parametrize('wrapper', WRAPPERS)
@pytest.mark.parametrize('name', ['adam', 'lamb', 'clip and decay'])
def test_under_scan_vmap_and_jit_on_eight_devices(wrapper, name):
  tx = WRAPPERS[wrapper](INNER[name](), REPARAM)
  expected = run(tx)
  stacked = jax.tree.map(lambda *g: jnp.stack(g), *GRADS)

  def loop(phi):
    def step(carry, g):
      updates, state = tx.update(g, carry[1], carry[0])
      return (optax.apply_updates(carry[0], updates), state), None
    return jax.lax.scan(step, (phi, tx.init(phi)), stacked)[0][0]

  close(jax.jit(loop)(PHI), expected)
  many = jax.tree.map(lambda x: jnp.stack([x, 2 * x]), PHI)
  close(jax.tree.map(lambda x: x[0], jax.vmap(loop)(many)), expected)
  mesh = jax.make_mesh((8,), ('d',), axis_types=(AxisType.Auto,))
  eight = jax.device_put(jax.tree.map(lambda x: jnp.stack([x * (1 + i) for i in range(8)]), PHI),
                         NamedSharding(mesh, PartitionSpec('d')))
  out = jax.jit(jax.vmap(loop))(eight)
  assert len(out['a']['w'].sharding.device_set) == 8
  close(jax.tree.map(lambda x: x[0], out), expected)


# ---- dtypes and errors ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize('wrapper', WRAPPERS)
@pytest.mark.parametrize('dtype', ['bfloat16', 'float16'])
def test_state_is_float32_for_short_parameters(wrapper, dtype):
  tx = WRAPPERS[wrapper](optax.adam(0.1), REPARAM)
  phi = jax.tree.map(lambda x: x.astype(dtype), PHI)
  grads = jax.tree.map(lambda x: (x / 3).astype(dtype), GRADS[0])   # squares of thirds are inexact in these types
  state = tx.init(phi)
  updates, state = tx.update(grads, state, phi)
  assert {x.dtype.name for x in jax.tree.leaves(updates)} == {dtype}
  assert {x.dtype.name for x in jax.tree.leaves((state[0].mu, state[0].nu))} == {'float32'}
  full, _ = tx.update(jax.tree.map(jnp.float32, grads), tx.init(jax.tree.map(jnp.float32, phi)), jax.tree.map(jnp.float32, phi))
  equal(updates, jax.tree.map(lambda x: x.astype(dtype), full))   # computed in float32, rounded once


@pytest.mark.parametrize('wrapper', WRAPPERS)
@pytest.mark.parametrize('outer', [lambda tx: tx, lambda tx: optax.apply_if_finite(tx, 3), lambda tx: optax.MultiSteps(tx, 2)])
def test_updates_have_the_dtype_of_the_gradients(wrapper, outer):
  """As in optax: gradients summed in float32 for bfloat16 parameters are not rounded twice."""
  tx = outer(WRAPPERS[wrapper](optax.adam(0.1), REPARAM))
  phi = jax.tree.map(lambda x: x.astype('bfloat16'), PHI)
  updates, _ = jax.jit(tx.update)(GRADS[0], tx.init(phi), phi)
  assert {x.dtype.name for x in jax.tree.leaves(updates)} == {'float32'}
  assert {x.dtype.name for x in jax.tree.leaves(optax.apply_updates(phi, updates))} == {'bfloat16'}


@pytest.mark.parametrize('wrapper', WRAPPERS)
def test_empty_trees_of_optax(wrapper):
  """Placeholders of tree.map_params, by which moments are reset, and groups of partition that nothing belongs to."""
  tx = WRAPPERS[wrapper](optax.adam(0.1), REPARAM)
  _, state = tx.update(GRADS[0], tx.init(PHI), PHI)
  reset = optax.tree.map_params(tx, jnp.zeros_like, state)
  assert not any(x.any() for x in jax.tree.leaves((reset[0].mu, reset[0].nu))) and reset[0].count == 1
  labels = jax.tree.map(lambda _: 'all', PHI)
  parts = optax.partition({'all': optax.sgd(0.1), 'none': tx}, labels)
  equal(run(parts), run(optax.sgd(0.1)))


def test_state_is_float64_for_float64_parameters():
  with jax.enable_x64(True):
    phi = jax.tree.map(lambda x: jnp.asarray(np.asarray(x, np.float64)), PHI)
    tx = target_propagation(optax.adam(0.1), REPARAM)
    updates, state = tx.update(phi, tx.init(phi), phi)
    assert {x.dtype.name for x in jax.tree.leaves((updates, state[0].mu))} == {'float64'}


def test_missing_parameters_and_other_structures_are_named():
  for wrapper in WRAPPERS.values():
    tx = wrapper(optax.sgd(0.1), REPARAM)
    with pytest.raises(ValueError, match='needs the stored parameters'):
      tx.update(GRADS[0], tx.init(PHI))
    with pytest.raises(ValueError, match=r'differ in structure: got c/w float32\[3, 1\]; parameters are a/b float32\[3\]'):
      tx.update({'c': GRADS[0]['c']}, tx.init(PHI), PHI)


def test_descent_and_where_it_ends():
  """SGD descends; an update that leaves the gradient's orthant can be turned uphill by the slope: ⟨D²u, g⟩ = −0.7 by hand."""
  d = np.sqrt([0.1, 1.0])
  phi = {'l': {'w': jnp.array([d / 2])}}   # slope 2|φ| = D
  g = {'l': {'w': jnp.array([[1.0, 1.0]])}}
  turned = optax.stateless(lambda updates, params: jax.tree.map(lambda u: u * jnp.array([[3.0, -1.0]]), updates))
  def ascent(inner):
    tx = target_propagation(inner, REPARAM)
    delta, _ = tx.update(g, tx.init(phi), phi)
    return float(np.sum(np.asarray(delta['l']['w']) * d * np.asarray(g['l']['w'])))
  np.testing.assert_allclose(ascent(turned), 0.1 * 3 - 1, rtol=1e-6)
  np.testing.assert_allclose(ascent(optax.identity()), 1.1, rtol=1e-6)


@pytest.mark.parametrize('wrapper', WRAPPERS.values())
def test_swapped_arguments_are_said_at_once(wrapper):
  with pytest.raises(ValueError, match=r'in this order; got Reparam and GradientTransformation'):
    wrapper(REPARAM, optax.sgd(0.1))

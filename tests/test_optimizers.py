"""Chains of the configs: schedules and decay by hand."""
import jax.numpy as jnp
import numpy as np
import pytest

from configs import base
from experiments import sweep
from experiments.optimizers import OPTIMIZERS, SCHEDULES, phi_decay, scheduled

THETA = {'l': {'w': jnp.array([[2.0, -1.0]]), 'b': jnp.array([3.0, 3.0])}}
ONES = {'l': {'w': jnp.ones((1, 2)), 'b': jnp.ones(2)}}


def make_config(**change):
  config = base.get_config()
  config.update_from_flattened_dict(change)
  return config


def test_cosine():
  """A twentieth of warm-up, then half a wave to 0."""
  rate = scheduled(0.4, make_config(schedule='cosine', steps=200))
  wanted = {0: 0.0, 5: 0.2, 10: 0.4, 105: 0.2, 200: 0.0, 150: 0.2 * (1 + np.cos(np.pi * 140 / 190))}
  assert {n: float(rate(n)) for n in wanted} == pytest.approx(wanted, abs=1e-7)
  assert scheduled(0.4, make_config(schedule='constant')) == 0.4
  assert base.get_config().schedule in SCHEDULES


def test_steps():
  """A twentieth of warm-up, a tenth of the rate from 30, 70 and 90 % of the training on each time."""
  rate = scheduled(1.6, make_config(schedule='steps', steps=32_000))
  wanted = {0: 0, 800: 0.8, 1_600: 1.6, 9_599: 1.6, 9_601: 0.16, 22_399: 0.16, 22_401: 0.016, 28_799: 0.016, 28_801: 0.0016,
            31_999: 0.0016}
  assert {n: float(rate(n)) for n in wanted} == pytest.approx(wanted, rel=1e-6)


@pytest.mark.parametrize('schedule', ['constant', 'cosine'])
def test_decay_of_phi(schedule):
  """−rate · decay · φ of weights alone, at the rate of the step."""
  config = make_config(schedule=schedule, steps=200, phi_decay=0.1)
  tx = phi_decay(0.4, config)
  state, zeros = tx.init(THETA), {'l': {k: jnp.zeros_like(x) for k, x in THETA['l'].items()}}
  for rate in (0.4, 0.4, 0.4) if schedule == 'constant' else (0.0, 0.04, 0.08):   # ten steps of warm-up
    updates, state = tx.update(zeros, state, THETA)
    np.testing.assert_allclose(updates['l']['w'], [[-rate * 0.1 * 2, rate * 0.1]], rtol=1e-6)
    np.testing.assert_array_equal(updates['l']['b'], [0, 0])


def test_decay_of_phi_in_a_group():
  """A step of SGD by target propagation on a loss without gradient: φ shrinks by rate · decay, at every α."""
  config = make_config(phi_decay=0.1, **{'sweep.optimizer': ('sgd',)})
  group = sweep.make_group(config, {'alpha': 2.0, 'optimizer': 'sgd', 'update': 'target_propagation', 'biases': 'plain',
                                         'algorithm': 'dense', 'sparsity': 0.0})
  tx = group.optimizer(0.5, None, None)
  zeros = {'l': {k: jnp.zeros_like(x) for k, x in THETA['l'].items()}}
  updates, _ = tx.update(zeros, tx.init(THETA), THETA)
  np.testing.assert_allclose(updates['l']['w'], [[-0.1, 0.05]], rtol=1e-6)


@pytest.mark.parametrize(('protocol', 'algorithm'), [('supervised', 'dense'), ('continual', 'fine_tune'),
                                                     ('continual', 'packnet')])
@pytest.mark.parametrize(('clip', 'length'), [(0.0, 5.0), (10.0, 5.0), (1.0, 1.0)])
def test_long_gradients_are_shortened_before_target_propagation(clip, length, protocol, algorithm):
  """A gradient of length 5 at θ: the step is −rate · gradient · 2|φ|, and that of biases −rate · gradient."""
  config = make_config(clip_norm=clip, protocol=protocol, **{'sweep.optimizer': ('sgd',)})
  group = sweep.make_group(config, {'alpha': 2.0, 'optimizer': 'sgd', 'update': 'target_propagation', 'biases': 'plain',
                                         'algorithm': algorithm, 'sparsity': 0.0})
  tx = group.optimizer(0.5, None, None)
  gradient = {'l': {'w': jnp.array([[3.0, 0.0]]), 'b': jnp.array([0.0, 4.0])}}
  updates, _ = tx.update(gradient, tx.init(THETA), THETA)
  np.testing.assert_allclose(updates['l']['w'], [[-0.5 * 3 * length / 5 * 2 * 2, 0.0]], rtol=1e-6)
  np.testing.assert_allclose(updates['l']['b'], [0.0, -0.5 * 4 * length / 5], rtol=1e-6)


def test_decay_is_of_weights_alone():
  tx = OPTIMIZERS['momentum_decay'](0.5, make_config(weight_decay=0.1, momentum=0.9))
  state = tx.init(THETA)
  updates, state = tx.update(ONES, state, THETA)
  np.testing.assert_allclose(updates['l']['w'], [[-0.5 * 1.2, -0.5 * 0.9]], rtol=1e-6)
  np.testing.assert_allclose(updates['l']['b'], [-0.5, -0.5], rtol=1e-6)
  updates, _ = tx.update(ONES, state, THETA)   # 0.9 of what came before, and as much again
  np.testing.assert_allclose(updates['l']['w'], [[-0.5 * 1.2 * 1.9, -0.5 * 0.9 * 1.9]], rtol=1e-6)


@pytest.mark.parametrize('name', OPTIMIZERS)
def test_every_chain_steps_downhill_on_a_schedule(name):
  tx = OPTIMIZERS[name](0.1, make_config(schedule='cosine', steps=100))
  state, theta = tx.init(THETA), THETA
  for _ in range(3):   # the rate of the first step is 0
    updates, state = tx.update(ONES, state, theta)
    theta = {'l': {k: theta['l'][k] + updates['l'][k] for k in 'wb'}}
  assert all(np.all(theta['l'][k] < THETA['l'][k]) for k in 'wb')

"""Chains of the configs: schedules and decay by hand."""
import jax.numpy as jnp
import numpy as np
import pytest

from configs import base
from experiments.optimizers import OPTIMIZERS, SCHEDULES, scheduled

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

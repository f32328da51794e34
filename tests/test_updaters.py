"""Each rule against a plain version of it in float64 NumPy, stepped beside ours: same masks, same weights."""
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from powerprop import masked, powerpropagation, sparsify, target_propagation
from powerprop.distributions import uniform
from powerprop.sparse import trained
from powerprop.updaters import gradual, rigl, straight_through, top_kast

SHAPES = {'first': (9, 8), 'second': (8, 5)}
RNG = np.random.default_rng(0)
START = {name: RNG.normal(size=shape) for name, shape in SHAPES.items()}
RATE, STEPS = 0.05, 14


def gradient(theta, n):
  """A smooth function of weight and step with no two entries alike."""
  return {name: np.cos(3 * x + 0.1 * n + np.arange(x.size).reshape(x.shape)) for name, x in theta.items()}


def largest(score, k, live):
  """k entries of largest |score| among the live, by an ordinary sort."""
  order = np.argsort(np.where(live, np.abs(score), -1.0).ravel())[::-1]
  mask = np.zeros(score.size, bool)
  mask[order[:k]] = True
  return mask.reshape(score.shape)


class Plain:
  """SGD on φ with θ = φ|φ|^(α−1), one dictionary of weights; `change` is the rule."""

  def __init__(self, alpha, keeps, forward, backward=None):
    self.alpha, self.keeps = alpha, keeps
    self.phi = {name: np.sign(x) * np.abs(x) ** (1 / alpha) for name, x in START.items()}
    self.forward, self.backward = forward, backward or forward

  def theta(self, masked=True):
    out = {name: np.sign(p) * np.abs(p) ** self.alpha for name, p in self.phi.items()}
    return {name: np.where(self.forward[name], x, 0) for name, x in out.items()} if masked else out

  def step(self, n, change, decay=0.0, share=1.0):
    grads = gradient(self.theta(), n)
    for name, p in self.phi.items():
      p = p if self.keeps else np.where(self.forward[name], p, 0)
      g = grads[name] + decay * np.sign(p) * np.abs(p) ** self.alpha * np.where(self.forward[name], 1, 1 / share)
      slope = self.alpha * np.abs(p) ** (self.alpha - 1)
      self.phi[name] = p - RATE * g * slope * self.backward[name]
    change(self, n + 1, grads)


def run(updater, alpha, plain, change, **more):
  reparam = powerpropagation(alpha)
  tx = sparsify(target_propagation(optax.sgd(RATE), reparam), updater, reparam, jax.random.key(1))
  phi = reparam.inverse({name: {'w': jnp.float32(x)} for name, x in START.items()})
  state = tx.init(phi)
  if plain is None:   # begun from the same random masks
    first = {name: np.asarray(state.masks.forward[name]['w']) for name in SHAPES}
    plain = Plain(alpha, False, first)
  step = jax.jit(tx.update)
  for n in range(STEPS):
    seen = {name: np.asarray(x['w'], np.float64) for name, x in masked(state, reparam.weights(phi)).items()}
    grads = {name: {'w': jnp.float32(g)} for name, g in gradient(seen, n).items()}
    updates, state = step(grads, state, phi)
    phi = optax.apply_updates(phi, updates)
    plain.step(n, change, **more)
    for name in SHAPES:
      np.testing.assert_array_equal(state.masks.forward[name]['w'], plain.forward[name], err_msg=f'{name}, step {n}')
      moved = trained(state.masks)[name]['w']   # None: all weights
      moved = EVERYTHING[name] if moved is None else moved
      np.testing.assert_array_equal(moved, plain.backward[name], err_msg=f'{name}, step {n}')
      np.testing.assert_allclose(phi[name]['w'] if plain.keeps else masked(state, phi)[name]['w'],
                                 plain.phi[name] if plain.keeps else np.where(plain.forward[name], plain.phi[name], 0),
                                 rtol=1e-3, atol=1e-4)   # fourteen steps in float32


EVERYTHING = {name: np.ones(shape, bool) for name, shape in SHAPES.items()}


@pytest.mark.parametrize('alpha', [1.0, 1.375, 2.0])
@pytest.mark.parametrize('returns', [False, True])
def test_gradual(alpha, returns):
  def change(plain, n, grads):
    if n in (3, 7, 11, 12):   # every 4 from 3, and the end at 12
      share = 1 - (1 - (n - 3) / 9) ** 3
      for name, theta in plain.theta(masked=False).items():
        size = theta.size
        keep = size - round(share * (size - {72: 14, 40: 8}[size]))
        plain.forward[name] = largest(theta, keep, EVERYTHING[name] if returns else plain.forward[name])
      plain.backward = plain.forward
  run(gradual(0.8, 3, 12, 4, returns=returns), alpha, Plain(alpha, returns, dict(EVERYTHING)), change)


@pytest.mark.parametrize('alpha', [1.0, 2.0])
def test_rigl(alpha):
  counts = {name: k for name, k in zip(SHAPES, (14, 8), strict=True)}

  def change(plain, n, grads):
    if n % 3 or n >= 11:
      return
    for name, theta in plain.theta().items():
      k = counts[name]
      drop = round(0.5 / 2 * (1 + np.cos(np.pi * n / 11)) * k)
      kept = largest(theta, k - drop, plain.forward[name])
      new = kept | largest(grads[name], drop, ~kept)
      back = new & ~plain.forward[name]
      live = np.abs(theta[new & ~back & (theta != 0)]).min()
      place = -np.sign(grads[name]) * (0 if alpha == 1 else 0.5 * live)
      plain.phi[name] = np.where(back, np.sign(place) * np.abs(place) ** (1 / alpha), plain.phi[name])
      plain.phi[name] = np.where(new, plain.phi[name], 0)
      plain.forward[name] = new
    plain.backward = plain.forward
  run(rigl(0.8, 11, 3, drop_fraction=0.5, distribution=uniform), alpha, None, change)


@pytest.mark.parametrize('alpha, decay', [(1.0, 0.0), (2.0, 0.1)])
def test_top_kast(alpha, decay):
  def change(plain, n, grads):
    if n % 3 == 0 or n == 10:
      for name, theta in plain.theta(masked=False).items():
        plain.forward[name] = largest(theta, {72: 18, 40: 10}[theta.size], EVERYTHING[name])
        plain.backward[name] = largest(theta, {72: 36, 40: 20}[theta.size], EVERYTHING[name]) if n < 10 else plain.forward[name]
  first = {name: largest(x, x.size // 4, EVERYTHING[name]) for name, x in START.items()}
  wide = {name: largest(x, x.size // 2, EVERYTHING[name]) for name, x in START.items()}
  run(top_kast(0.75, 0.5, 3, end_step=10, decay=decay), alpha, Plain(alpha, True, first, wide), change, decay=decay, share=0.25)


def test_straight_through():
  def change(plain, n, grads):
    plain.forward = {name: largest(x, x.size // 4, EVERYTHING[name]) for name, x in plain.theta(masked=False).items()}
  first = {name: largest(x, x.size // 4, EVERYTHING[name]) for name, x in START.items()}
  run(straight_through(0.75), 2.0, Plain(2.0, True, first, dict(EVERYTHING)), change)

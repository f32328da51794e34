"""Each rule against a plain version of it in float64 NumPy, stepped beside ours: same masks, same weights."""
import math
from fractions import Fraction

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from powerprop import masked, powerpropagation, sparsify, target_propagation
from powerprop.distributions import globally, uniform
from powerprop.sparse import trained
from powerprop.updaters import ac_dc, dsr, gradual, granet, one_shot, rigl, set_, snfs, straight_through, top_kast
from powerprop.updaters.common import random_scores, share_out, sum_counts

SHAPES = {'first': (9, 8), 'second': (8, 5)}
RNG = np.random.default_rng(0)
START = {name: RNG.normal(size=shape) for name, shape in SHAPES.items()}
RATE, STEPS = 0.05, 14
BOTH = {'first': 1.0, 'second': 2.0}   # α of each leaf: one program tries the two rules of re-entry
QUICK = {'xla_backend_optimization_level': '0'}   # compiling is nearly all of the time here


def gradient(theta, n):
  """A smooth function of weight and step with no two entries alike."""
  return {name: np.cos(3 * x + 0.1 * n + np.arange(x.size).reshape(x.shape)) for name, x in theta.items()}


def largest(score, k, live):
  """k entries of largest |score| among the live, by an ordinary sort."""
  order = np.argsort(np.where(live, np.abs(score), -1.0).ravel())[::-1]
  mask = np.zeros(score.size, bool)
  mask[order[:k]] = True
  return mask.reshape(score.shape)


def chosen(scores, counts, live):
  """`largest` of each leaf by a number of its own, or by one number over both leaves laid end to end."""
  if isinstance(counts, dict):
    return {name: largest(scores[name], k, live[name]) for name, k in counts.items()}
  score, alive = (np.concatenate([tree[name].ravel() for name in SHAPES]) for tree in (scores, live))
  first, second = np.split(largest(score, counts, alive), [72])
  return {'first': first.reshape(9, 8), 'second': second.reshape(8, 5)}


def by_leaf(alpha):
  return alpha if isinstance(alpha, dict) else dict.fromkeys(SHAPES, alpha)


class Plain:
  """SGD on φ with θ = φ|φ|^(α−1), one dictionary of weights; `change` is the rule."""

  def __init__(self, alpha, keeps, forward, backward=None):
    self.alpha, self.keeps = by_leaf(alpha), keeps
    self.phi = {name: np.sign(x) * np.abs(x) ** (1 / self.alpha[name]) for name, x in START.items()}
    self.forward, self.backward = forward, backward or forward

  def theta(self, masked=True):
    out = {name: np.sign(p) * np.abs(p) ** self.alpha[name] for name, p in self.phi.items()}
    return {name: np.where(self.forward[name], x, 0) for name, x in out.items()} if masked else out

  def step(self, n, change, decay=0.0, share=1.0):
    grads = gradient(self.theta(), n)
    for name, p in self.phi.items():
      alpha = self.alpha[name]
      p = p if self.keeps else np.where(self.forward[name], p, 0)
      g = grads[name] + decay * np.sign(p) * np.abs(p) ** alpha * np.where(self.forward[name], 1, 1 / share)
      slope = alpha * np.abs(p) ** (alpha - 1)
      self.phi[name] = p - RATE * g * slope * self.backward[name]
    change(self, n + 1, grads)


def run(updater, alpha, plain, change, **more):
  reparam = powerpropagation({f'{name}/*': a for name, a in by_leaf(alpha).items()})
  tx = sparsify(target_propagation(optax.sgd(RATE), reparam), updater, reparam, jax.random.key(1))
  phi = reparam.inverse({name: {'w': jnp.float32(x)} for name, x in START.items()})
  state = jax.jit(tx.init, compiler_options=QUICK)(phi)
  if plain is None:   # begun from the same random masks
    first = {name: np.asarray(state.masks.forward[name]['w']) for name in SHAPES}
    plain = Plain(alpha, False, first)
  step = jax.jit(tx.update, compiler_options=QUICK)
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
      stored = plain.phi[name] if plain.keeps else np.where(plain.forward[name], plain.phi[name], 0)
      np.testing.assert_allclose(phi[name]['w'], stored, rtol=1e-3, atol=1e-4)   # fourteen steps in float32
  return state


def counts_of(state):
  return {name: int(state.masks.forward[name]['w'].sum()) for name in SHAPES}


COUNTS = {'first': 14, 'second': 8}   # 20 % of 72 and 40
EVERYTHING = {name: np.ones(shape, bool) for name, shape in SHAPES.items()}


@pytest.mark.parametrize('alpha, returns, distribution', [
    *((alpha, returns, uniform) for returns in (False, True) for alpha in (1.0, 1.375, 2.0)), (BOTH, False, globally)])
def test_gradual(alpha, returns, distribution):
  first, last = (112, 22) if distribution is globally else ({'first': 72, 'second': 40}, COUNTS)

  def change(plain, n, grads):
    if n in (3, 7, 11, 12):   # every 4 from 3, and the end at 12
      now = on_the_way(first, last, 1 - (1 - (n - 3) / 9) ** 3)
      plain.forward = plain.backward = chosen(plain.theta(masked=False), now, EVERYTHING if returns else plain.forward)
  run(gradual(0.8, 3, 12, 4, distribution, returns=returns), alpha, Plain(alpha, returns, dict(EVERYTHING)), change)


def test_one_shot():
  """All weights move until five updates are done, then the largest alone, which are not chosen again."""
  def change(plain, n, grads):
    if n == 5:
      plain.forward = plain.backward = chosen(plain.theta(), COUNTS, EVERYTHING)
  run(one_shot(0.8, 5), BOTH, Plain(BOTH, False, dict(EVERYTHING)), change)


def on_the_way(first, last, share):
  return jax.tree.map(lambda b, e: b - round(share * (b - e)), first, last)


def cosine(n, end, initial):
  return initial / 2 * (1 + np.cos(np.pi * n / end))


def change_masks(plain, new, grads):
  """New masks; weights that come back start against their gradient at a share of the mean |θ| that stayed, or at 0 for α = 1."""
  for name, theta in plain.theta().items():
    back = new[name] & ~plain.forward[name]
    stayed = new[name] & ~back
    size = 0 if plain.alpha[name] == 1 else 0.3 * np.abs(theta[stayed]).sum() / max(stayed.sum(), back.sum())
    place = -np.sign(grads[name]) * size
    plain.phi[name] = np.where(back, np.sign(place) * np.abs(place) ** (1 / plain.alpha[name]), plain.phi[name])
    plain.phi[name] = np.where(new[name], plain.phi[name], 0)
  plain.forward = plain.backward = new


def dropped_and_grown(plain, scores, counts, fraction):
  drop = jax.tree.map(lambda k: round(fraction * k), counts)
  kept = chosen(plain.theta(), jax.tree.map(lambda k, d: k - d, counts, drop), plain.forward)
  grown = chosen(scores, drop, {name: ~m for name, m in kept.items()})
  return {name: kept[name] | grown[name] for name in SHAPES}


@pytest.mark.parametrize('alpha, average, distribution', [
    (1.0, 1, uniform), (2.0, 1, uniform), (BOTH, 2, globally), (BOTH, 3, uniform)])
def test_rigl(alpha, average, distribution):
  seen, counts = [], 22 if distribution is globally else COUNTS

  def change(plain, n, grads):
    seen.append(grads)
    if n % 3 == 0 and n < 11:
      mean = {name: np.mean([g[name] for g in seen[-average:]], 0) for name in SHAPES}
      change_masks(plain, dropped_and_grown(plain, mean, counts, cosine(n, 11, 0.5)), grads)
  run(rigl(0.8, 11, 3, drop_fraction=0.5, distribution=distribution, average_steps=average), alpha, None, change)


@pytest.mark.parametrize('distribution, counts', [(uniform, COUNTS), (globally, 22)])
def test_set(distribution, counts):
  later = jax.random.split(jax.random.key(1))[1]   # of the key that `run` gives
  like = {name: {'w': jnp.zeros(shape)} for name, shape in SHAPES.items()}

  def change(plain, n, grads):
    if n % 3 == 0 and n < 11:
      random = random_scores(jax.random.fold_in(later, n), like)
      scores = {name: np.asarray(x['w'], np.float64) for name, x in random.items()}
      change_masks(plain, dropped_and_grown(plain, scores, counts, cosine(n, 11, 0.5)), grads)
  run(set_(0.8, 11, 3, drop_fraction=0.5, distribution=distribution), BOTH, None, change)


@pytest.mark.parametrize('initial, sparsity, distribution, first, last', [
    (0.5, 0.8, uniform, {'first': 36, 'second': 20}, COUNTS), (0.0, 0.8, uniform, {'first': 72, 'second': 40}, COUNTS),
    (0.5, 0.8, globally, 56, 22),
    (0.4, {'first/*': 0.75, '*': 0.9}, uniform, {'first': 43, 'second': 24}, {'first': 18, 'second': 4})])
def test_granet(initial, sparsity, distribution, first, last):
  def change(plain, n, grads):
    if n in (2, 5, 8, 11, 12):   # every 3 from 2, and the end at 12
      now = on_the_way(first, last, 1 - (1 - (n - 2) / 10) ** 3)
      change_masks(plain, dropped_and_grown(plain, grads, now, cosine(n, 12, 0.55)), grads)
  found = counts_of(run(granet(sparsity, 2, 12, 3, initial, 0.55, distribution), BOTH, None, change))
  assert (sum(found.values()) if distribution is globally else found) == last


@pytest.mark.parametrize('end', [11, 9])   # within a dense phase, and within a compressed one
def test_ac_dc(end):
  """Dense up to 2, compressed up to 5, dense up to 7, compressed up to 10, dense up to 11: one threshold for both leaves."""
  def change(plain, n, grads):
    compress, free = (2, 7, 11), (5, 10)
    if n in compress and n <= end:
      change_masks(plain, chosen(plain.theta(), 22, EVERYTHING), grads)
    elif n in free and n < end:
      change_masks(plain, dict(EVERYTHING), grads)
  state = run(ac_dc(0.8, 2, 3, 2, end), BOTH, Plain(BOTH, False, dict(EVERYTHING)), change)
  assert sum(counts_of(state).values()) == 22


def test_snfs():
  mean = {name: np.zeros(shape) for name, shape in SHAPES.items()}
  moved = []

  def change(plain, n, grads):
    for name in SHAPES:
      mean[name] = 0.8 * mean[name] + 0.2 * grads[name]
    if n % 3 or n >= 13:
      return
    kept, weights = {}, {}
    for name, theta in plain.theta().items():
      live = plain.forward[name]
      stay = live.sum() - round(cosine(n, 13, 0.6) * live.sum())
      kept[name], weights[name] = largest(theta, stay, live), np.abs(mean[name][live]).mean()
    room = [int((~m).sum()) for m in kept.values()]
    grow = shared_out(22 - sum(m.sum() for m in kept.values()), list(weights.values()), room)
    new = {name: kept[name] | largest(mean[name], k, ~kept[name]) for name, k in zip(SHAPES, grow, strict=True)}
    change_masks(plain, new, grads)
    moved.append([int(m.sum()) for m in new.values()])
  run(snfs(0.8, 13, 3, 0.6, momentum=0.8), BOTH, None, change)
  assert [14, 8] not in moved and {sum(c) for c in moved} == {22}


def test_dsr():
  later = jax.random.split(jax.random.key(1))[1]   # of the key that `run` gives
  like = {name: {'w': jnp.zeros(shape)} for name, shape in SHAPES.items()}
  moved = []

  def change(plain, n, grads):
    if n % 3 or n >= 13:
      return
    theta = plain.theta()
    # The largest of each leaf goes first: it stays whatever the others are.
    scores = [np.where(np.abs(x) == np.abs(x[plain.forward[name]]).max(), np.inf, x) for name, x in theta.items()]
    kept = chosen(dict(zip(SHAPES, scores, strict=True)), 22 - round(cosine(n, 13, 0.6) * 22), plain.forward)
    numbers = [int(m.sum()) for m in kept.values()]
    grow = shared_out(22 - sum(numbers), numbers, [m.size - k for m, k in zip(kept.values(), numbers, strict=True)])
    random = random_scores(jax.random.fold_in(later, n), like)
    new = {name: kept[name] | largest(np.asarray(random[name]['w'], np.float64), k, ~kept[name])
           for name, k in zip(SHAPES, grow, strict=True)}
    change_masks(plain, new, grads)
    moved.append([int(m.sum()) for m in new.values()])
  run(dsr(0.8, 13, 3, 0.6), BOTH, None, change)
  assert len({tuple(c) for c in moved}) > 1 and {sum(c) for c in moved} == {22}


@pytest.mark.parametrize('make', [snfs, dsr])
def test_no_layer_is_emptied(make):
  """All are to be dropped, and one leaf is a thousand times smaller: it keeps its largest weight, and so its part of the rest."""
  theta = {'first': {'w': jnp.float32(START['first'] / 1000)}, 'second': {'w': jnp.float32(START['second'])}}
  updater = make(0.8, 1000, 1, 0.9 if make is dsr else 1.0)
  masks, memory = updater.init(theta, jax.random.key(1))
  if updater.observe:
    memory = updater.observe(1, memory, theta)
  after, _ = jax.jit(updater.update, compiler_options=QUICK)(1, masks, memory, theta, theta)
  for name in SHAPES:
    live = np.where(masks.forward[name]['w'], np.abs(theta[name]['w']), 0)
    assert after.forward[name]['w'][np.unravel_index(live.argmax(), live.shape)]
  assert sum(int(after.forward[name]['w'].sum()) for name in SHAPES) == 22


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


@pytest.mark.parametrize('every', [1, 3])
def test_straight_through(every):
  def change(plain, n, grads):
    if n % every == 0:
      plain.forward = chosen(plain.theta(masked=False), {'first': 18, 'second': 10}, EVERYTHING)
  first = chosen(START, {'first': 18, 'second': 10}, EVERYTHING)
  run(straight_through(0.75, every_steps=every), 2.0, Plain(2.0, True, first, dict(EVERYTHING)), change)


@pytest.mark.parametrize('updater, changes, dense', [
    (rigl(0.8, 12, 4), [4, 8], [4, 8]), (rigl(0.8, 14, 4), [4, 8, 12], [4, 8, 12]), (set_(0.8, 12, 4), [4, 8], []),
    (rigl(0.8, 12, 4, average_steps=3), [4, 8], [2, 3, 4, 6, 7, 8]),
    (granet(0.8, 2, 12, 5), [2, 7, 12], [2, 7]), (straight_through(0.8, every_steps=6), [6, 12, 18], [])],
    ids=['end on the grid', 'end off it', 'set', 'mean gradients', 'granet', 'straight-through'])
def test_steps_at_which_masks_change_and_those_of_a_dense_gradient(updater, changes, dense):
  """Of 18, by hand. At an end on RigL's grid nothing would be exchanged, by a fraction of 0: a dense gradient for nothing. A mean
  of three gradients is of three dense ones. GraNet prunes at the end."""
  steps = np.arange(1, 19)
  for found, expected in ((updater.due, changes), (updater.dense_gradient, dense)):
    assert steps[np.broadcast_to(found(steps), 18)].tolist() == expected


# ---- counts between layers ------------------------------------------------------------------------------------------


def shared_out(total, weights, capacity):
  """Largest remainder with capacities, in fractions without rounding; equal remainders: the first come first."""
  weights, total = [Fraction(w) for w in weights], min(total, sum(capacity))
  full = {i for i, c in enumerate(capacity) if c <= 0}
  while True:
    left = [i for i in range(len(weights)) if i not in full]
    rest = total - sum(capacity[i] for i in full)
    parts = weights if sum(weights[i] for i in left) else [Fraction(c) for c in capacity]
    ideal = {i: rest * parts[i] / sum(parts[j] for j in left) for i in left}
    over = {i for i in left if ideal[i] >= capacity[i]}
    if not over:
      break
    full |= over
  counts = [capacity[i] if i in full else math.floor(ideal[i]) for i in range(len(weights))]
  for i in sorted(left, key=lambda i: math.floor(ideal[i]) - ideal[i])[:total - sum(counts)]:
    counts[i] += 1
  return counts


SHARE_OUT = jax.jit(share_out)   # a trace for each number of layers


WEIGHTS = st.sampled_from([0, 1, 2, 3, 7, 10 ** 6, 10 ** 8 + 7]) | st.integers(0, 10 ** 8)
CAPACITY = st.sampled_from([0, 1, 5, 2 ** 27]) | st.integers(0, 2 ** 27)


@hypothesis.given(st.integers(0, 2 ** 30) | st.integers(0, 20), st.lists(WEIGHTS, min_size=4, max_size=4),
                  st.lists(CAPACITY, min_size=4, max_size=4))
def test_share_out_is_exact(total, weights, capacity):
  found = SHARE_OUT(total, jnp.array(weights, jnp.int32), jnp.array(capacity, jnp.int32))
  assert found.tolist() == shared_out(total, weights, capacity)


@hypothesis.given(st.integers(0, 2 ** 31 - 1), st.lists(st.floats(0, 2 ** 100, width=32), min_size=5, max_size=5),
                  st.lists(st.integers(0, 2 ** 28), min_size=5, max_size=5))
def test_share_out_of_floating_weights_adds_up(total, weights, capacity):
  found = SHARE_OUT(total, jnp.array(weights, jnp.float32), jnp.array(capacity, jnp.int32))
  assert sum(found.tolist()) == min(total, sum(capacity))
  assert all(0 <= n <= c for n, c in zip(found.tolist(), capacity, strict=True))


@pytest.mark.parametrize('total, weights, capacity, expected', [
    (10, [1.0, 1.0, 2.0], [9, 9, 9], [3, 2, 5]),            # 2.5, 2.5, 5: the first of equals
    (10, [1.0, 1.0, 2.0], [9, 9, 3], [4, 3, 3]),            # the last is full
    (10, [0.0, 0.0, 1.0], [6, 2, 4], [5, 1, 4]),            # 6 left for weights of 0: 4.5 and 1.5 by capacity
    (99, [1.0, 1.0, 1.0], [6, 2, 4], [6, 2, 4]),            # more than there is room for
    (7, [1e30, 3e30, 0.0], [9, 9, 9], [2, 5, 0]),
    (7, [np.nan, 1.0, np.inf], [9, 4, 9], [2, 4, 1]),       # what is not finite counts as nothing: 3 left, 1.5 and 1.5
    (-3, [1.0, 1.0, 1.0], [6, 2, 4], [0, 0, 0])])
def test_share_out_by_hand(total, weights, capacity, expected):
  assert SHARE_OUT(total, jnp.array(weights, jnp.float32), jnp.array(capacity, jnp.int32)).tolist() == expected


def test_share_out_where_sums_would_be_of_64_bits():
  with jax.enable_x64(True):
    found = jax.jit(lambda: share_out(7, jnp.array([1, 2, 3], jnp.int32), jnp.array([5, 5, 2], jnp.int32)))()
    assert found.dtype == jnp.int32 and found.tolist() == [2, 3, 2]   # 2 fill the last; of the 5 left a third and two thirds
    kept = sum_counts({'a': jnp.ones(3, bool), 'b': jnp.zeros(2, bool)})
    assert kept.dtype == jnp.int32 and kept == 3


# ---- misuse ---------------------------------------------------------------------------------------------------------

MISUSE = {
    'average_steps must be an integer of at least 1 and at most every_steps=3, got 4': lambda: rigl(0.8, 9, 3, average_steps=4),
    'initial_sparsity must not be above sparsity; got 0.9 and 0.8': lambda: begun(granet(0.8, 1, 5, 1, 0.9)),
    'must not end before it starts: start_step=6, end_step=5': lambda: granet(0.8, 6, 5, 1),
    'a share removed, at least 0 and below 1; got 1.5': lambda: begun(granet(0.8, 1, 5, 1, 1.5)),
    'warmup_steps must be an integer of at least 1, got 0': lambda: ac_dc(0.8, 0, 1, 1, 9),
    'decompressed_steps must be an integer of at least 1, got 0': lambda: ac_dc(0.8, 1, 1, 0, 9),
    'end_step must be an integer of at least warmup_steps=5, got 4': lambda: ac_dc(0.8, 5, 1, 1, 4),
    r'momentum must lie in \[0, 1\), got 1': lambda: snfs(0.8, 9, 3, momentum=1),
    r'drop_fraction must lie in \(0, 1\], got 1.2': lambda: dsr(0.8, 9, 3, 1.2),
    'end_step must be an integer of at least 1, got 0': lambda: snfs(0.8, 0, 3),
    'snfs draws at random': lambda: begun(snfs(0.8, 9, 3), None), 'dsr draws at random': lambda: begun(dsr(0.8, 9, 3), None),
    'granet draws at random': lambda: begun(granet(0.8, 1, 5, 1), None)}


def begun(updater, key=jax.random.key(0)):   # noqa: B008
  return sparsify(optax.sgd(0.1), updater, key=key).init({name: {'w': jnp.float32(x)} for name, x in START.items()})


@pytest.mark.parametrize('message', MISUSE)
def test_misuse(message):
  with pytest.raises(ValueError, match=message):
    MISUSE[message]()

"""sparsify around optax: one contract for all updaters and optimisers, exact counts, exact zeros, and how it refuses misuse."""
import contextlib
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from powerprop import (
    backpropagation,
    masked,
    masks,
    powerpropagation,
    protect,
    rescaled,
    sparsify,
    target_propagation,
    with_masks,
)
from powerprop.distributions import erk, globally, uniform
from powerprop.sparse import Masks, SparsifyState, trained
from powerprop.updaters import (
    UPDATERS,
    ac_dc,
    dsr,
    given,
    gradual,
    granet,
    one_shot,
    rigl,
    set_,
    snfs,
    static,
    straight_through,
    top_kast,
)

KEY = jax.random.key(7)
SHAPES = {'a': {'w': (12, 10), 'b': (10,)}, 'norm': ({'scale': (10,)}, ()), 'c': {'w': (3, 3, 4, 5)}}
THETA = jax.tree.map(lambda shape: jnp.asarray(np.random.default_rng(len(shape) + sum(shape)).normal(size=shape), jnp.float32),
                     SHAPES, is_leaf=lambda x: isinstance(x, tuple) and all(isinstance(n, int) for n in x))
ONE = {name: THETA[name] for name in ('a', 'norm')}   # one leaf of weights, and two others, where the rule is not the question
COUNTS = {'a': 24, 'c': 36}   # 20 % of 120 and 180
STEPS = 12
QUICK = {'xla_backend_optimization_level': '0'}   # compiling is nearly all of the time here
GIVEN = jax.tree.map(lambda x: None, THETA)
for _layer in COUNTS:
  GIVEN[_layer]['w'] = masks.top_k(THETA[_layer]['w'], THETA[_layer]['w'].size // 5)

RULES = {
    'static': lambda: static(0.8, uniform), 'given': lambda: given(GIVEN), 'one_shot': lambda: one_shot(0.8, 7),
    'gradual': lambda: gradual(0.8, 2, 11, 4),   # the end is off the grid 2, 6, 10
    'gradual that lets return': lambda: gradual(0.8, 2, 11, 4, returns=True),
    'straight_through': lambda: straight_through(0.8), 'set': lambda: set_(0.8, 10, 3, distribution=uniform),
    'rigl': lambda: rigl(0.8, 10, 3, distribution=uniform),
    'rigl by mean gradients': lambda: rigl(0.8, 10, 3, distribution=uniform, average_steps=2),
    'granet': lambda: granet(0.8, 2, 11, 4, distribution=uniform),
    'ac_dc': lambda: ac_dc(0.8, 2, 3, 2, 11, uniform),   # compressed 2 to 5 and 7 to 10, then dense for one step
    'snfs': lambda: snfs(0.8, 10, 3, 0.6), 'dsr': lambda: dsr(0.8, 10, 3, 0.6),
    'top_kast': lambda: top_kast(0.8, 0.5, 2, end_step=9, decay=1e-2)}
MOVING = ('snfs', 'dsr')   # the total is exact, and layers have their part of it
# LAMB at 0.05 diverges for α = 2: its step grows with the weights, and the slope with them.
OPTIMIZERS = {
    'sgd': lambda: optax.sgd(0.1), 'momentum': lambda: optax.sgd(0.1, 0.9), 'adam': lambda: optax.adam(0.05),
    'adamw': lambda: optax.adamw(0.05, weight_decay=0.1), 'lamb': lambda: optax.lamb(0.01),
    'chain': lambda: optax.chain(optax.clip_by_global_norm(0.5), optax.add_decayed_weights(0.1), optax.sgd(0.1, 0.9)),
    'inject_hyperparams': lambda: optax.inject_hyperparams(optax.adam)(0.05),
    'partition': lambda: optax.partition({'w': optax.adam(0.05), 'rest': optax.sgd(0.1)}, labels)}


def every_rule(*always):
  """All rules, most of them in tests marked slow: what they do is alike but for some."""
  return [*always, *(pytest.param(rule, marks=pytest.mark.slow) for rule in RULES if rule not in always)]


def labels(tree):
  return jax.tree.map(lambda x: 'w' if x.ndim > 1 else 'rest', tree)


def gradient(theta, n=0):
  return jax.tree.map(lambda x: jnp.cos(3 * x + 0.1 * n + jnp.arange(x.size, dtype=x.dtype).reshape(x.shape)), theta)


def train(tx, reparam, phi, steps=STEPS, state=None, start=0, traces=1):
  state = jax.jit(tx.init, compiler_options=QUICK)(phi) if state is None else state
  traced = []

  @functools.partial(jax.jit, compiler_options=QUICK)
  def step(phi, state, n):
    traced.append(1)
    grads = gradient(masked(state, reparam.weights(phi)), n)
    updates, state = tx.update(grads, state, phi)
    return optax.apply_updates(phi, updates), state
  for n in range(start, start + steps):
    phi, state = step(phi, state, n)
  assert sum(traced) <= traces
  return phi, state


def weights(tree):
  return [tree[layer]['w'] for layer in COUNTS if layer in tree]


def equal(a, b):
  assert jax.tree.structure(a) == jax.tree.structure(b)
  jax.tree.map(lambda x, y: np.testing.assert_array_equal(unkey(x), unkey(y)), a, b)


def unkey(x):
  return jax.random.key_data(x) if jnp.issubdtype(x.dtype, jax.dtypes.prng_key) else x


def check(reparam, phi, state, keeps, moving=False):
  seen = masked(state, reparam.weights(phi))
  sparse = [x for x in jax.tree.leaves(state, is_leaf=lambda x: isinstance(x, SparsifyState)) if isinstance(x, SparsifyState)]
  found = [int(n) for n in jax.tree.leaves(masks.counts(sparse[0].masks.forward))]
  expected = [k for layer, k in COUNTS.items() if layer in phi]
  assert (sum(found), min(found) > 0) == (sum(expected), True) if moving else found == expected
  assert [int(jnp.sum(w != 0)) for w in weights(seen)] == found
  assert all(m.dtype == bool for m in jax.tree.leaves(sparse[0].masks))
  assert [int(n) for n in jax.tree.leaves(sparse[0].kept.forward)] == found   # counted when the masks changed
  equal(trained(sparse[0].kept), masks.counts(trained(sparse[0].masks)))
  if not keeps:
    equal(masked(state, phi), phi)   # stored, too, they are 0
  assert all(np.isfinite(x).all() for x in jax.tree.leaves(phi))
  assert not np.array_equal(phi['a']['b'], THETA['a']['b'])   # leaves without a mask have moved


@pytest.mark.parametrize('rule', RULES)
def test_every_updater_meets_its_counts_exactly(rule):
  reparam, updater = powerpropagation({'a/*': 1.0, '*': 2.0}), RULES[rule]()   # both rules of re-entry in one program
  tx = sparsify(target_propagation(optax.adamw(0.05, weight_decay=0.1), reparam), updater, reparam, KEY)
  phi, state = train(tx, reparam, reparam.inverse(THETA))
  check(reparam, phi, state, updater.keeps, rule in MOVING)


@pytest.mark.parametrize('rule', ['rigl', 'top_kast'])
@pytest.mark.parametrize('optimizer', OPTIMIZERS)
def test_every_optimizer_inside(rule, optimizer):
  reparam, updater = powerpropagation(2.0), RULES[rule]()
  tx = sparsify(target_propagation(OPTIMIZERS[optimizer](), reparam), updater, reparam, KEY)
  phi, state = train(tx, reparam, reparam.inverse(ONE))
  check(reparam, phi, state, updater.keeps)


def test_rows_of_the_registry_are_all_tested():
  assert {name.split()[0] for name in RULES} == UPDATERS.keys()


@pytest.mark.parametrize('outside', ['MultiSteps', 'apply_if_finite', 'inject_hyperparams', 'partition'])
@pytest.mark.parametrize('rule', ['rigl', 'top_kast'])
def test_what_may_stand_outside(rule, outside):
  reparam, updater = powerpropagation(2.0), RULES[rule]()
  def make(rate):
    return sparsify(target_propagation(optax.adam(rate), reparam), updater, reparam, KEY)
  tx = {'MultiSteps': lambda: optax.MultiSteps(make(0.05), 2), 'apply_if_finite': lambda: optax.apply_if_finite(make(0.05), 3),
        'inject_hyperparams': lambda: optax.inject_hyperparams(make)(rate=0.05),
        'partition': lambda: optax.partition({'w': make(0.05), 'rest': optax.sgd(0.1)}, labels)}[outside]()
  phi, state = train(tx, reparam, reparam.inverse(ONE), STEPS * (2 if outside == 'MultiSteps' else 1))
  check(reparam, phi, state, updater.keeps)


def test_given_masks_of_the_whole_tree_within_a_partition():
  reparam = powerpropagation(2.0)
  inner = sparsify(target_propagation(optax.adam(0.05), reparam), given(GIVEN), reparam)
  tx = optax.partition({'w': inner, 'rest': optax.sgd(0.1)}, labels)
  phi, state = train(tx, reparam, reparam.inverse(THETA))
  check(reparam, phi, state, keeps=False)
  equal(jax.tree.map(lambda w: w != 0, weights(phi)), weights(GIVEN))


@pytest.mark.slow
@pytest.mark.parametrize('outside', ['nothing', 'MultiSteps', 'apply_if_finite', 'inject_hyperparams', 'partition'])
@pytest.mark.parametrize('optimizer', OPTIMIZERS)
@pytest.mark.parametrize('rule', RULES)
def test_the_whole_product(rule, optimizer, outside):
  """Every updater with every optimizer inside and every wrapper outside, at α 1 and 2: exact counts, one trace, all finite."""
  reparam, updater = powerpropagation({'a/*': 1.0, '*': 2.0}), RULES[rule]()
  if outside == 'partition' and optimizer == 'partition':
    return   # labels of labels
  def make(scale):
    inner = optax.chain(OPTIMIZERS[optimizer](), optax.scale(scale))
    return sparsify(target_propagation(inner, reparam), updater, reparam, KEY)
  tx = {'nothing': lambda: make(1.0), 'MultiSteps': lambda: optax.MultiSteps(make(1.0), 2),
        'apply_if_finite': lambda: optax.apply_if_finite(make(1.0), 3),
        'inject_hyperparams': lambda: optax.inject_hyperparams(make)(scale=1.0),
        'partition': lambda: optax.partition({'w': make(1.0), 'rest': optax.sgd(0.1)}, labels)}[outside]()
  phi, state = train(tx, reparam, reparam.inverse(THETA), STEPS * (2 if outside == 'MultiSteps' else 1))
  check(reparam, phi, state, updater.keeps, rule in MOVING)


def test_masks_at_the_start_are_one_program():
  """Outside jit too: op by op it takes minutes for a large network."""
  program = jax.make_jaxpr(sparsify(optax.sgd(0.1), RULES['rigl'](), key=KEY).init)(THETA)
  assert 'scan[' in str(program) and not {'scan', 'while', 'cond'} & {step.primitive.name for step in program.eqns}


@pytest.mark.parametrize('rule', ['static', 'gradual', 'rigl by mean gradients', 'snfs', 'top_kast'])
def test_masks_lie_where_the_weights_do(rule):
  """On one device of several, and spread over two; what memory has their shape too. Outside jit."""
  tx = sparsify(optax.sgd(0.1), RULES[rule](), key=KEY)
  mesh = jax.make_mesh((2,), ('x',), axis_types=(AxisType.Auto,), devices=jax.devices()[2:4])
  for place in (jax.devices()[3], NamedSharding(mesh, PartitionSpec('x'))):
    theta = {'a': {'w': jax.device_put(THETA['a']['w'], place)}}
    state = tx.init(theta)
    alike = [x for x in jax.tree.leaves((state.masks, state.memory)) if x.shape == (12, 10)]
    assert alike and all(x.sharding == theta['a']['w'].sharding for x in alike)


def test_a_mask_that_is_given_is_taken_as_it_is():
  """With its sharding, and its values of the moment."""
  mesh = jax.make_mesh((2,), ('x',), axis_types=(AxisType.Auto,), devices=jax.devices()[:2])
  mask = {'w': jax.device_put(np.arange(20).reshape(2, 10) % 5 == 0, NamedSharding(mesh, PartitionSpec('x')))}
  theta = {'w': np.ones((2, 10), np.float32)}
  assert sparsify(optax.sgd(0.1), given(mask)).init(theta).masks.forward['w'].sharding == mask['w'].sharding
  edited = np.zeros((2, 10), bool)
  tx = sparsify(optax.sgd(0.1), given({'w': edited}))
  assert int(tx.init(theta).kept.forward['w']) == 0
  edited[0] = True
  assert int(tx.init(theta).kept.forward['w']) == 10
  with pytest.raises(ValueError, match='a mask is bool and shaped like its array'):
    sparsify(optax.sgd(0.1), given({'w': np.ones((3, 3), bool)})).init(theta)


def test_the_optimiser_sees_masked_weights_from_the_first_moment():
  """Dense parameters: `init` and the first update get them with zeros."""
  seen = []
  def init(params):
    seen.append(params)
    return ()
  def update(updates, state, params):
    seen.append(params)
    return updates, state
  tx = sparsify(optax.GradientTransformation(init, update), given(GIVEN))
  tx.update(THETA, tx.init(THETA), THETA)
  equal(seen, [masks.apply(GIVEN, THETA)] * 2)


def test_leaves_that_are_none_or_numbers_pass_through():
  theta = {'a': THETA['a'] | {'nothing': None, 'scale': 1.0}}
  tx = sparsify(optax.sgd(0.1), rigl(0.8, 10, 1, distribution=uniform), key=KEY)
  state, grads = tx.init(theta), jax.tree.map(jnp.ones_like, theta)
  for _ in range(2):   # masks change in both
    updates, state = tx.update(grads, state, theta)
    theta = optax.apply_updates(theta, updates)
  assert theta['a']['nothing'] is None and float(theta['a']['scale']) == pytest.approx(0.8)
  assert int(jnp.sum(theta['a']['w'] != 0)) == 24


def test_decay_of_top_kast_where_one_threshold_leaves_a_leaf_nothing():
  theta = {'large': {'w': THETA['a']['w']}, 'small': {'w': 1e-3 * THETA['a']['w']}}
  tx = sparsify(optax.sgd(0.1), top_kast(0.7, 0.3, 2, decay=1e-2, distribution=globally))
  state = tx.init(theta)
  assert int(state.kept.forward['small']['w']) == 0 and int(state.kept.backward['small']['w']) > 0
  updates, _ = tx.update(jax.tree.map(jnp.zeros_like, theta), state, theta)
  # λ / D with D = 1 / N, the smallest that it can be but for nothing, on the set B.
  expected = -0.1 * 1e-2 * 120 * np.where(trained(state.masks)['small']['w'], theta['small']['w'], 0)
  np.testing.assert_allclose(updates['small']['w'], expected, rtol=1e-5)


def test_no_layer_loses_all_its_live_weights_at_once():
  """All are to be dropped, and none has a gradient to grow back by: the largest stays, and the others are placed by it."""
  reparam = powerpropagation(2.0)
  tx = sparsify(target_propagation(optax.sgd(0.0), reparam), rigl(0.8, 1000, 1, 1.0, uniform), reparam, KEY)
  phi = reparam.inverse(ONE)
  state = tx.init(phi)
  live = np.abs(masked(state, phi)['a']['w'])
  grads = gradient(ONE)
  grads['a']['w'] = jnp.where(live > 0, 0, grads['a']['w'])
  updates, state = tx.update(grads, state, phi)
  after = np.abs(optax.apply_updates(phi, updates)['a']['w'])
  assert (after[live > 0] > 0).sum() == 1 and after[np.unravel_index(live.argmax(), live.shape)] == live.max()
  placed = live.max() * (0.3 / 23) ** 0.5   # 0.3 of θ = φ², in 23 parts
  np.testing.assert_allclose(after[(live == 0) & (after > 0)], placed, rtol=1e-6)
  assert (after > 0).sum() == 24


def test_masks_are_stored_once_where_they_are_one():
  """A byte a weight; Top-KAST has two masks, and straight-through needs none for what the optimiser may change."""
  sizes = {}
  for rule in RULES:
    state = sparsify(optax.sgd(0.1), RULES[rule](), key=KEY).init(THETA)
    sizes[rule] = sum(m.nbytes for m in jax.tree.leaves(state.masks))
  assert sizes == {rule: 600 if rule == 'top_kast' else 300 for rule in RULES}


def test_durations_count_applied_updates():
  tx = optax.MultiSteps(sparsify(optax.sgd(0.1), one_shot(0.8, 3)), 2)
  phi, state = train(tx, powerpropagation(1.0), THETA, 5)
  assert all((w != 0).all() for w in weights(phi))   # two updates applied
  phi, state = train(tx, powerpropagation(1.0), phi, 1, state)
  assert [int(jnp.sum(w != 0)) for w in weights(phi)] == list(COUNTS.values())


def test_without_sparsity_it_is_the_optimizer():
  everything = jax.tree.map(lambda x: jnp.ones(x.shape, bool) if x.ndim > 1 else None, ONE)
  for make in OPTIMIZERS.values():
    phi, _ = train(sparsify(make(), given(everything)), powerpropagation(1.0), ONE)
    tx = make()
    plain, state, update = ONE, tx.init(ONE), jax.jit(tx.update, compiler_options=QUICK)
    for n in range(STEPS):
      updates, state = update(gradient(plain, n), state, plain)
      plain = optax.apply_updates(plain, updates)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), phi, plain)   # XLA fuses them in other ways


def test_pruned_weights_are_those_of_a_network_without_them():
  """Adam with decay and clipping on the kept weights alone, gathered into vectors, takes the same steps."""
  tx = optax.chain(optax.clip_by_global_norm(0.5), optax.adamw(0.05, weight_decay=0.1))
  phi, _ = train(sparsify(tx, given(GIVEN)), powerpropagation(1.0), THETA)
  kept = [np.ones(x.shape, bool) if m is None else np.asarray(m)
          for m, x in zip(jax.tree.leaves(GIVEN, is_leaf=lambda x: x is None), jax.tree.leaves(THETA), strict=True)]
  small = [x[k] for x, k in zip(jax.tree.leaves(THETA), kept, strict=True)]
  state = tx.init(small)
  for n in range(STEPS):
    whole = [jnp.zeros(x.shape).at[k].set(v) for x, k, v in zip(jax.tree.leaves(THETA), kept, small, strict=True)]
    grads = jax.tree.leaves(gradient(jax.tree.unflatten(jax.tree.structure(THETA), whole), n))
    updates, state = tx.update([g[k] for g, k in zip(grads, kept, strict=True)], state, small)
    small = optax.apply_updates(small, updates)
  for x, k, v in zip(jax.tree.leaves(phi), kept, small, strict=True):
    np.testing.assert_allclose(x[k], v, rtol=1e-4, atol=1e-5)


def test_masked_weights_keep_every_bit_where_they_are_stored():
  phi0 = jax.tree.map(lambda x: x.at[(0,) * x.ndim].set(-0.0), THETA)
  tx = sparsify(optax.adamw(0.05, weight_decay=0.5), top_kast(0.8, 0.8, 100), powerpropagation(1.0))
  phi, state = train(tx, powerpropagation(1.0), phi0)
  for before, after, mask in zip(weights(phi0), weights(phi), weights(trained(state.masks)), strict=True):
    np.testing.assert_array_equal(np.asarray(before)[~mask].view(np.int32), np.asarray(after)[~mask].view(np.int32))
    assert (np.asarray(before)[mask] != np.asarray(after)[mask]).all()


@pytest.mark.parametrize('alpha, entry', [(1.0, 0.3), (2.0, 0.3), (2.0, 0.0), (3.0, 1.0)])
def test_a_weight_that_comes_back(alpha, entry):
  """RigL, one exchange by hand: of live .1, 2, −3 and 4 the smallest goes, the largest gradient of the others comes."""
  reparam = powerpropagation(alpha)
  theta = {'l': {'w': jnp.array([[0.1, 2.0, -3.0, 4.0, 9.0, 9.0, 9.0, 9.0]])}}
  grads = {'l': {'w': jnp.array([[0.0, 0.0, 0.0, 0.0, 0.1, 5.0, -7.0, 0.2]])}}
  tx = sparsify(target_propagation(optax.sgd(1.0, 0.9), reparam), rigl(0.5, 100, 1, drop_fraction=0.5), reparam, KEY, entry)
  phi, state = reparam.inverse(theta), tx.init(reparam.inverse(theta))
  first = {'l': {'w': jnp.array([[True] * 4 + [False] * 4])}}
  state = with_masks(state, Masks(first))
  state = state._replace(inner=jax.tree.map(lambda x: jnp.full_like(x, 0.5), state.inner))   # moments as of a live network
  updates, state = tx.update(grads, state, phi)
  phi = optax.apply_updates(phi, updates)
  # Two go, by a half of four (cos is 1 to 1e-3): .1, and the next after a step of momentum .45 upwards; −7 and 5 come.
  mask = np.asarray(state.masks.forward['l']['w'][0])
  assert mask.sum() == 4 and mask[5] and mask[6] and not mask[0]
  found = np.asarray(reparam.weights(phi)['l']['w'][0])
  live = np.abs(found[[i for i in range(5) if mask[i]]]).mean()
  size = 0.0 if alpha == 1 else entry * live
  np.testing.assert_allclose(found[[5, 6]], [-size, size], rtol=1e-5)   # against the gradient
  np.testing.assert_array_equal(found[~mask], 0)
  trace = jax.tree.leaves(state.inner)[0][0]
  assert not trace[5] and not trace[6] and trace[3] and not trace[0]   # begun anew; as it was; gone with its weight


def adam_by_hand(g, theta):
  return {'mu': 0.25 + 0.5 * g, 'nu': 0.25 + 0.5 * g ** 2}


def adafactor_by_hand(g, theta):
  """The first step, at which its own decay is 0: means over rows and columns, and momentum of clipped updates."""
  rows, columns = ((g ** 2).mean(axis) + 1e-30 for axis in (0, 1))
  u = g / np.sqrt(np.outer(columns, rows) / rows.mean())
  u *= 0.05 * np.sqrt((theta ** 2).mean()) / max(1, np.sqrt((u ** 2).mean()))
  return {'v_row': rows, 'v_col': columns, 'ema': 0.25 + 0.5 * u}


@pytest.mark.parametrize('inner, by_hand, rtol', [
    (optax.partition({'w': optax.adam(0.05, b1=0.5, b2=0.5), 'rest': optax.sgd(0.1)}, labels), adam_by_hand, 0),
    (optax.adafactor(0.05, momentum=0.5, min_dim_size_to_factor=4), adafactor_by_hand, 1e-5)], ids=['partition', 'adafactor'])
def test_moments_begin_anew(inner, by_hand, rtol):
  """One exchange, from moments of 1/2: 0 for weights that come or go, NumPy's in float64 for all others. Adam's, with decays of
  1/2 and gradients in sixteenths, take no rounding: to the bit. Adafactor's means over rows and columns stay what they are."""
  reparam = powerpropagation(2.0)
  tx = sparsify(target_propagation(inner, reparam), rigl(0.8, 100, 1, 0.5, uniform), reparam, KEY)
  phi = reparam.inverse(ONE)
  grads = jax.tree.map(lambda x: jnp.float32(np.random.default_rng(0).permutation(x.size).reshape(x.shape) / 8 - 65 / 16), ONE)
  state = tx.init(phi)
  state = state._replace(inner=jax.tree.map(lambda x: jnp.full_like(x, 0.5) if x.ndim else x, state.inner))
  _, after = jax.jit(tx.update, compiler_options=QUICK)(grads, state, phi)
  old, new = (np.asarray(s.masks.forward['a']['w']) for s in (state, after))
  assert min((new & ~old).sum(), (old & ~new).sum(), (old & new).sum()) > 5
  g, theta = (np.where(old, np.asarray(tree['a']['w'], np.float64), 0) for tree in (grads, ONE))
  for name, expected in by_hand(g, theta).items():
    expected = np.where(old ^ new, 0, expected) if expected.ndim == 2 else expected
    np.testing.assert_allclose(optax.tree.get(after.inner, name)['a']['w'], expected, rtol, err_msg=name)


def test_weights_come_back_to_life_under_alpha():
  """What a re-entry is for: at 0 a weight stays for ever when α > 1."""
  reparam = powerpropagation(2.0)
  stuck = []
  for entry in (0.0, 0.3):
    tx = sparsify(target_propagation(optax.sgd(0.05), reparam), rigl(0.8, 100, 2, distribution=uniform), reparam, KEY, entry)
    phi, state = train(tx, reparam, reparam.inverse(THETA), 7)
    stuck.append(sum(int(jnp.sum(m & (w == 0))) for m, w in zip(weights(state.masks.forward), weights(phi), strict=True)))
  assert stuck[0] > 5 and stuck[1] == 0


def test_places_do_not_sink_from_exchange_to_exchange():
  """A hundred exchanges, of fewer and fewer weights: those that came last stay, and the next ones do not begin below them."""
  reparam = powerpropagation(2.0)
  tx = sparsify(target_propagation(optax.sgd(0.01), reparam), rigl(0.8, 201, 2, 0.5, uniform), reparam, KEY)

  def step(carry, n):
    phi, state = carry
    before = masked(state, reparam.weights(phi))['a']['w']
    updates, state = tx.update(gradient(masked(state, reparam.weights(phi)), n), state, phi, step=n)
    phi = optax.apply_updates(phi, updates)
    size = jnp.abs(reparam.weights(phi)['a']['w'])
    live = state.masks.forward['a']['w']
    came = live & (before == 0)
    return (phi, state), (jnp.min(jnp.where(came, size, jnp.inf)) / jnp.mean(size, where=live), jnp.sum(came))
  phi = reparam.inverse(ONE)
  run = jax.jit(lambda phi: jax.lax.scan(step, (phi, tx.init(phi)), jnp.arange(200)), compiler_options=QUICK)
  _, (places, came) = run(phi)
  assert (np.asarray(came) > 0).sum() > 60
  assert np.asarray(places)[np.asarray(came) > 0].min() > 0.02


@pytest.mark.parametrize('rule', every_rule('top_kast', 'snfs', 'dsr'))
def test_alike_under_scan_vmap_and_sharding(rule):
  reparam = powerpropagation(2.0)
  tx = sparsify(target_propagation(optax.sgd(0.05, 0.9), reparam), RULES[rule](), reparam, KEY)
  phi0 = reparam.inverse(THETA)
  expected, state = train(tx, reparam, phi0)

  def step(carry, n):
    phi, state = carry
    updates, state = tx.update(gradient(masked(state, reparam.weights(phi)), n), state, phi, step=n)
    return (optax.apply_updates(phi, updates), state), None
  scan = jax.jit(lambda phi: jax.lax.scan(step, (phi, tx.init(phi)), jnp.arange(STEPS))[0], compiler_options=QUICK)
  two = jax.tree.map(lambda x: jnp.stack([x, x]), phi0)
  mapped = jax.tree.map(lambda x: x[1], jax.jit(lambda phi: jax.lax.scan(
      jax.vmap(step, (0, None)), (phi, jax.vmap(tx.init)(phi)), jnp.arange(STEPS))[0], compiler_options=QUICK)(two))
  mesh = jax.make_mesh((2,), ('x',), axis_types=(AxisType.Auto,), devices=jax.devices()[:2])
  spread = jax.tree.map(lambda x: jax.device_put(x, NamedSharding(mesh, PartitionSpec(*([None] * (x.ndim - 1) + ['x']
                                                 if x.ndim and x.shape[-1] % 2 == 0 else [])))), phi0)
  for found, found_state in (scan(phi0), mapped, scan(spread)):
    equal(found_state.masks, state.masks)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), found, expected)


@pytest.mark.parametrize('rule', every_rule('rigl', 'gradual', 'top_kast', 'static'))
def test_a_step_that_is_told_whether_masks_change_needs_no_branch(rule):
  reparam, updater, traced = powerpropagation(2.0), RULES[rule](), []
  tx = sparsify(target_propagation(optax.sgd(0.05, 0.9), reparam), updater, reparam, KEY)
  phi = reparam.inverse(THETA)
  expected, state = train(tx, reparam, phi)
  found = jax.jit(tx.init, compiler_options=QUICK)(phi)

  @functools.partial(jax.jit, static_argnames='due', compiler_options=QUICK)
  def step(phi, state, n, due):
    traced.append(due)
    updates, state = tx.update(gradient(masked(state, reparam.weights(phi)), n), state, phi, due=due)
    return optax.apply_updates(phi, updates), state
  for n in range(STEPS):
    phi, found = step(phi, found, n, bool(updater.due(n + 1)))
  assert sorted(traced) == sorted({bool(updater.due(n + 1)) for n in range(STEPS)})
  equal(found.masks, state.masks)
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), phi, expected)
  still = str(jax.make_jaxpr(functools.partial(step.__wrapped__, due=False))(phi, found, 0))
  if rule == 'static':   # never due, whatever it is told
    equal(jax.jit(tx.update, static_argnames='due')(phi, found, phi, due=True)[1].masks, state.masks)
  if rule != 'rigl by mean gradients':   # whose sums have a branch of their own
    assert not re.search(r'\b(cond|while|scan)\[', still)   # neither a branch nor a search


WIDE = {'a': {'w': jnp.cos(jnp.arange(128.0)).reshape(16, 8), 'b': jnp.ones(8)}}


@pytest.mark.parametrize('rule, kind', [*((rule, AxisType.Explicit) for rule in RULES if rule != 'given'),
                                        ('rigl', AxisType.Auto), ('top_kast', AxisType.Auto)], ids=str)
def test_the_same_masks_on_eight_devices(rule, kind):
  """Weights sharded over their columns, the optimiser's state with them."""
  reparam = powerpropagation(2.0)
  tx = sparsify(target_propagation(optax.sgd(0.05, 0.9), reparam), RULES[rule](), reparam, KEY)
  phi = reparam.inverse(WIDE)
  _, expected = train(tx, reparam, phi, 4)
  mesh = jax.make_mesh((8,), ('x',), axis_types=(kind,))
  with jax.set_mesh(mesh) if kind is AxisType.Explicit else contextlib.nullcontext():
    spread = {'a': {'w': jax.device_put(phi['a']['w'], NamedSharding(mesh, PartitionSpec(None, 'x'))),
                    'b': jax.device_put(phi['a']['b'], NamedSharding(mesh, PartitionSpec('x')))}}
    found, state = train(tx, reparam, spread, 4, traces=2)   # the layout of the first state is the compiler's choice
  equal(jax.device_get(state.masks), jax.device_get(expected.masks))
  assert len(found['a']['w'].sharding.device_set) == 8


def test_under_vmap_an_update_of_masks_stays_a_branch():
  tx = sparsify(optax.sgd(0.1), RULES['gradual']())
  two = jax.tree.map(lambda x: jnp.stack([x, x]), THETA)
  state = jax.vmap(tx.init)(two)

  def branches(axis, n):
    mapped = jax.vmap(lambda g, s, p, n: tx.update(g, s, p, step=n), (0, 0, 0, axis))
    return str(jax.make_jaxpr(mapped)(two, state, two, n)).count('cond[')
  assert branches(None, 3) > branches(0, jnp.array([3, 3]))


@pytest.mark.parametrize('updater', [static(0.8), set_(0.8, 10, 1)], ids=['at the start', 'and later'])
def test_every_seed_draws_masks_of_its_own(updater):
  """Of two networks that are alike, with masks that begin alike and are exchanged once, or that are drawn."""
  two = jax.tree.map(lambda x: jnp.stack([x, x]), THETA)
  def make(key, phi):
    tx = sparsify(optax.sgd(0.0), updater, key=key)
    state = tx.init(phi)
    if updater.due(1) is False:
      return state.masks.forward
    state = with_masks(state, Masks(jax.tree.map(lambda m, x: m if x is None else x, state.masks.forward, GIVEN)))
    return tx.update(jax.tree.map(jnp.ones_like, phi), state, phi)[1].masks.forward
  made = jax.jit(jax.vmap(make), compiler_options=QUICK)(jax.random.split(KEY), two)
  first, second = (weights(jax.tree.map(lambda m, i=i: m[i], made)) for i in range(2))
  assert all((a != b).any() for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize('rule', every_rule('gradual', 'rigl by mean gradients'))   # a key and means in its memory
def test_saved_and_gone_on_with_to_the_last_bit(rule, tmp_path):
  reparam = powerpropagation(2.0)
  tx = sparsify(target_propagation(optax.adam(0.05), reparam), RULES[rule](), reparam, KEY)
  whole = train(tx, reparam, reparam.inverse(THETA))
  half = train(tx, reparam, reparam.inverse(THETA), 5)   # in the middle of the ramp
  with ocp.StandardCheckpointer() as checkpointer:
    checkpointer.save(tmp_path / 'half', half)
    checkpointer.wait_until_finished()
    phi, state = checkpointer.restore(tmp_path / 'half', jax.eval_shape(lambda: half))
  equal(train(tx, reparam, phi, STEPS - 5, state, start=5), whole)


def test_a_run_begun_with_the_checkpoint_of_another(tmp_path):
  """Weights and masks of a static network of half the density, through Orbax; RigL grows what is missing."""
  reparam = powerpropagation(2.0)
  sparser = sparsify(target_propagation(optax.sgd(0.05), reparam), static(0.9, uniform), reparam, KEY)
  phi, state = train(sparser, reparam, reparam.inverse(THETA))
  with ocp.StandardCheckpointer() as checkpointer:
    other = {'phi': phi, 'masks': state.masks.forward}
    checkpointer.save(tmp_path / 'other', other)
    checkpointer.wait_until_finished()
    saved = checkpointer.restore(tmp_path / 'other', jax.eval_shape(lambda: other))
  tx = sparsify(target_propagation(optax.adam(0.05), reparam), rigl(0.8, 10, 3, distribution=uniform), reparam, KEY)
  phi, fewer = saved['phi'], saved['masks']
  state = with_masks(tx.init(phi), Masks(fewer))
  equal(state.kept.forward, masks.counts(fewer))
  equal(masked(state, phi)['a'], jax.tree.map(lambda x: x, masks.apply(fewer, phi)['a']))
  check(reparam, *train(tx, reparam, phi, STEPS, state), keeps=False)   # what was missing has grown


@pytest.mark.parametrize('rule', ['rigl', 'top_kast', 'straight_through'])   # one tree, two, and all weights in the second
def test_masks_of_its_own_are_taken_back(rule):
  state = sparsify(optax.sgd(0.1), RULES[rule](), key=KEY).init(THETA)
  equal(with_masks(state, state.masks), state)


@pytest.mark.parametrize('dtype, scale', [(jnp.float32, 1), (jnp.float32, 1e-25), (jnp.bfloat16, 1e-3)])
def test_live_weights_of_the_norm_of_their_layer(dtype, scale):
  """Against NumPy in float64, at random masks and at those of the largest weights."""
  theta = jax.tree.map(lambda x: (scale * x).astype(dtype), THETA)
  for rule in (static(0.8, uniform), top_kast(0.8, 0.5)):
    state = sparsify(optax.sgd(0.1), rule, key=KEY).init(theta)
    found, live = rescaled(state, theta), masked(state, theta)
    for layer in COUNTS:
      before, kept, after = (np.asarray(tree[layer]['w'], np.float64) for tree in (theta, live, found))
      factor = np.sqrt((before**2).sum() / (kept**2).sum())
      assert 1.2 < factor < 3
      np.testing.assert_allclose(after, before * factor, rtol=4 * float(jnp.finfo(dtype).eps))
    assert jax.tree.map(jnp.result_type, found) == jax.tree.map(jnp.result_type, theta)
    jax.tree.map(np.testing.assert_array_equal, (found['norm'], found['a']['b']), (theta['norm'], theta['a']['b']))
    jax.tree.map(np.testing.assert_array_equal, masked(sparsify(optax.sgd(0.1), rule, key=KEY).init(found), found),
                 masked(state, found))   # the same masks


def test_dense_layers_and_those_of_zeros_are_not_rescaled():
  for theta, sparsity in ((THETA, 0.0), (jax.tree.map(jnp.zeros_like, THETA), 0.8)):
    state = sparsify(optax.sgd(0.1), static(sparsity, uniform), key=KEY).init(theta)
    jax.tree.map(np.testing.assert_array_equal, jax.jit(rescaled)(state, theta), theta)


def test_averaged_copies_are_masked_alike():
  """An average over masks that changed keeps a part of what is gone: `masked` makes it 0, not −0, and keeps every bit of the
  others. The parameters, at 0 where they are pruned, say which are which."""
  tx = sparsify(optax.adam(0.05), RULES['rigl'](), key=KEY)

  @functools.partial(jax.jit, compiler_options=QUICK)
  def step(phi, state, average):
    updates, state = tx.update(gradient(masked(state, phi)), state, phi)
    phi = optax.apply_updates(phi, updates)
    return phi, state, optax.incremental_update(masked(state, phi), average, 0.1)
  phi, state = ONE, tx.init(ONE)
  average = masked(state, phi)
  for _ in range(STEPS):
    phi, state, average = step(phi, state, average)
  w, live = np.asarray(average['a']['w']), np.asarray(phi['a']['w'] != 0)
  assert live.sum() == COUNTS['a'] and (w[~live] < 0).sum() > 2 and (w[~live] > 0).sum() > 2
  found = np.asarray(masked(state, average)['a']['w'])
  np.testing.assert_array_equal(found.view(np.int32), np.where(live, w.view(np.int32), 0))


@pytest.mark.parametrize('distribution', [globally, erk])
@pytest.mark.parametrize('make', [
    lambda d: gradual(0.8, 2, 11, 4, d), lambda d: rigl(0.8, 10, 3, distribution=d), lambda d: static(0.8, d),
    lambda d: top_kast(0.8, 0.5, 2, distribution=d), lambda d: granet(0.8, 2, 11, 4, distribution=d),
    lambda d: ac_dc(0.8, 2, 3, 2, 11, d)], ids=['gradual', 'rigl', 'static', 'top_kast', 'granet', 'ac_dc'])
def test_other_distributions(make, distribution):
  _, state = train(sparsify(optax.sgd(0.05), make(distribution), key=KEY), powerpropagation(1.0), THETA)
  assert sum(int(n) for n in jax.tree.leaves(masks.counts(state.masks.forward))) == 60


def test_dense_layers_by_name_and_sparsity_by_name():
  phi, state = train(sparsify(optax.sgd(0.05), rigl(0.8, 10, 3, dense=('a/*',)), key=KEY), powerpropagation(1.0), THETA)
  assert state.masks.forward['a']['w'] is None and (phi['a']['w'] != 0).all()
  phi, state = train(sparsify(optax.sgd(0.05), gradual({'a/w': 0.5, '*': 0.9}, 2, 5, 1)), powerpropagation(1.0), THETA)
  assert [int(jnp.sum(w != 0)) for w in weights(phi)] == [60, 18]


def test_parameters_of_half_precision():
  half = jax.tree.map(lambda x: x.astype(jnp.bfloat16), THETA)
  reparam = powerpropagation(2.0)
  tx = sparsify(target_propagation(optax.adam(0.05), reparam), RULES['rigl'](), reparam, KEY)
  phi, state = train(tx, reparam, reparam.inverse(half))
  check(reparam, phi, state, keeps=False)
  assert {x.dtype for x in jax.tree.leaves(phi)} == {jnp.dtype('bfloat16')}


# ---- misuse --------------------------------------------------------------------------------------------------------


def test_what_is_chained_after_sparsify_is_refused():
  tx = optax.chain(sparsify(optax.sgd(0.1), RULES['gradual']()), optax.add_decayed_weights(0.1))
  with pytest.raises(ValueError, match='chained after sparsify'):
    masked(tx.init(THETA), THETA)
  masked(optax.chain(optax.clip(1.0), sparsify(optax.sgd(0.1), RULES['gradual']())).init(THETA), THETA)


@pytest.mark.parametrize('wrapper', [target_propagation, backpropagation])
def test_the_other_order_is_refused(wrapper):
  with pytest.raises(ValueError, match='what sparsify or protect makes stands outermost'):
    wrapper(sparsify(optax.sgd(0.1), RULES['gradual']()), powerpropagation(2.0))


@pytest.mark.parametrize('between', [
  lambda tx: optax.MultiSteps(tx, 2), lambda tx: optax.chain(optax.clip(1.0), tx), lambda tx: optax.apply_if_finite(tx, 3),
  lambda tx: optax.inject_hyperparams(lambda rate: tx)(rate=0.1)])
def test_the_other_order_is_refused_with_something_between(between):
  reparam = powerpropagation(2.0)
  for tx in (sparsify(optax.sgd(0.1), RULES['gradual']()), protect(optax.sgd(0.1))):
    for wrapped in (target_propagation(between(tx), reparam), sparsify(between(tx), RULES['gradual'](), reparam)):
      with pytest.raises(ValueError, match=r'stands outermost|must let it: put protect around it'):
        wrapped.init(THETA)


def test_a_reparam_that_is_not_given_is_that_of_the_transformation_inside():
  reparam, updater = powerpropagation(2.0), RULES['rigl']()
  inner = target_propagation(optax.sgd(0.1, 0.9), reparam)
  expected, _ = train(sparsify(inner, updater, reparam, KEY), reparam, reparam.inverse(THETA))
  found, _ = train(sparsify(inner, updater, key=KEY), reparam, reparam.inverse(THETA))
  equal(found, expected)
  sparsify(inner, updater, powerpropagation({'a/*': 2.0, '*': 2.0}), KEY).init(THETA)   # the same by another road


def test_powers_without_a_slope_are_warned_of():
  for inner in (optax.adam(0.1), optax.chain(optax.clip(1.0), optax.adam(0.1))):
    with pytest.warns(UserWarning, match='^a/w has α > 1, and its gradient, at θ, becomes an update of φ without the slope: '):
      sparsify(inner, RULES['gradual'](), powerpropagation(2.0)).init(THETA)
  propagated = target_propagation(optax.adam(0.1), powerpropagation(2.0))
  for inner in (optax.chain(optax.clip(1.0), propagated), optax.partition({'w': propagated, 'rest': optax.sgd(0.1)}, labels)):
    sparsify(inner, RULES['gradual'](), powerpropagation(2.0)).init(THETA)   # a warning would be an error here


def new_state():
  return sparsify(optax.sgd(0.1), RULES['gradual']()).init(THETA)


MISUSE = {
    'what a rule of powerprop.updaters gives, .* got gradual as the second argument': lambda: sparsify(optax.sgd(0.1), gradual),
    "inner is an optax transformation, .* got 'sgd'": lambda: sparsify(optax.sgd, RULES['gradual']()),
    "which is 'forward' or 'backward'; got 'Backward'": lambda: masked(new_state(), THETA, 'Backward'),
    'entry must be at least 0, and finite; got inf': lambda: sparsify(optax.sgd(0.1), RULES['gradual'](), entry=float('inf')),
    'entry must be at least 0, and finite; got -1': lambda: sparsify(optax.sgd(0.1), RULES['gradual'](), entry=-1),
    'static draws at random: sparsify needs key': lambda: sparsify(optax.sgd(0.1), static(0.8)).init(THETA),
    'there is no sparsify in this optimiser state': lambda: masked(optax.adam(0.1).init(THETA), THETA),
    'the state has a mask for a/w, which these parameters lack': lambda: masked(new_state(), {'c': THETA['c']}),
    'update needs the stored parameters': lambda: sparsify(optax.sgd(0.1), RULES['gradual']()).update(THETA, new_state()),
    'due is True or False, a static argument of the step; got 1': lambda: sparsify(optax.sgd(0.1), RULES['gradual']()).update(
        THETA, new_state(), THETA, due=1),
    'gradients and parameters differ in structure': lambda: sparsify(optax.sgd(0.1), RULES['gradual']()).update(
        {'a': THETA['a']}, new_state(), THETA),
    'a/w has α = 3 in sparsify and α = 2 in the transformation inside': lambda: sparsify(
        target_propagation(optax.sgd(0.1), powerpropagation(2.0)), RULES['gradual'](), powerpropagation(3.0)).init(THETA),
    'a/w has α = 1 in sparsify and α = 2 in the transformation inside': lambda: sparsify(
        optax.chain(optax.clip(1.0), target_propagation(optax.sgd(0.1), powerpropagation(2.0))), RULES['gradual']()).init(THETA),
    'a/w has α = 3 in sparsify and α = 2 in': lambda: sparsify(
        optax.partition({'w': target_propagation(optax.sgd(0.1), powerpropagation(2.0)), 'rest': optax.sgd(0.1)}, labels),
        RULES['gradual'](), powerpropagation(3.0)).init(THETA),
    'with_masks takes powerprop.Masks.forward, backward., .* got dict': lambda: with_masks(new_state(), THETA),
    'a/b is never masked: its mask is None, got an array': lambda: with_masks(new_state(), Masks(THETA)),
    'a mask is bool and shaped like its array': lambda: with_masks(
        state := new_state(), Masks(jax.tree.map(lambda x: x.T, state.masks.forward))),
    'a/w has weights in the forward mask that the backward mask lacks': lambda: with_masks(
        state := sparsify(optax.sgd(0.1), top_kast(0.8, 0.5)).init(THETA),
        state.masks._replace(backward=jax.tree.map(jnp.logical_not, state.masks.backward))),
    'Lookahead around sparsify makes other updates': lambda: masked(optax.lookahead(
        sparsify(optax.sgd(0.1), RULES['gradual']()), 5, 0.5).init(optax.LookaheadParams.init_synced(THETA)), THETA),
    'ConditionallyTransform around sparsify makes other updates': lambda: masked(optax.conditionally_transform(
        sparsify(optax.sgd(0.1), RULES['gradual']()), lambda n: n > 0).init(THETA), THETA),
    'reparam is what powerpropagation.alpha. gives, got 2.0': lambda: sparsify(optax.sgd(0.1), RULES['gradual'](), 2.0),
    'key is a typed key, as jax.random.key.0., got 0': lambda: sparsify(optax.sgd(0.1), static(0.8), key=0),
    'nothing would ever be exchanged: .* every_steps=100, and from end_step=50 on': lambda: rigl(0.8, 50),
    'nothing would ever be exchanged: .* every_steps=10, and from end_step=10 on': lambda: set_(0.8, 10, 10),
    'nothing would ever be exchanged: .* every_steps=7, and from end_step=6': lambda: snfs(0.8, 6, 7),
    'nothing would ever be exchanged: .* every_steps=8, and from end_step=6': lambda: dsr(0.8, 6, 8),
    '^step must be an integer of at least 1, got 0': lambda: one_shot(0.8, 0),
    'end_step must be an integer of at least 1, got 0': lambda: top_kast(0.8, 0.5, 3, end_step=0),
    'every_steps must be an integer of at least 1, got True': lambda: gradual(0.8, 1, 5, True),
    'both shares or both mappings where the distribution is globally': lambda: sparsify(
        optax.sgd(0.1), top_kast(0.8, {'*': 0.5}, distribution=globally)).init(THETA),
    "distribution is a function, as distributions.erk, got 'erk'": lambda: sparsify(
        optax.sgd(0.1), gradual(0.8, 1, 5, 1, 'erk')).init(THETA),
    "dense is a sequence of patterns, as ..a/w.,., got 'a/w'": lambda: sparsify(
        optax.sgd(0.1), gradual(0.8, 1, 5, 1, dense='a/w')).init(THETA),
    'drop_fraction must lie in': lambda: rigl(0.8, 1000, drop_fraction=0.0),
    'must not end before it starts': lambda: gradual(0.8, 10, 5, 1),
    'backward_sparsity must not be larger than sparsity; got 0.9 and 0.8': lambda: sparsify(
        optax.sgd(0.1), top_kast(0.8, 0.9)).init(THETA),
    'decay must be at least 0': lambda: top_kast(0.8, 0.5, decay=-1.0),
    'with_masks wants one sparsify in the state, got 2': lambda: with_masks({'a': new_state(), 'b': new_state()}, None),
    'given masks and the parameters differ in structure': lambda: sparsify(optax.sgd(0.1), given({'a': None})).init(THETA)}


@pytest.mark.parametrize('message', MISUSE)
def test_misuse(message):
  with pytest.raises(ValueError, match=message):
    MISUSE[message]()

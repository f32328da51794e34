"""The k-th largest magnitude against a sort in NumPy, bit for bit."""
import functools

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from powerprop.thresholds import kth_largest, kth_pattern

FLOATS = {'float16': np.uint16, 'bfloat16': np.uint16, 'float32': np.uint32}


def reference(x, k, live=None):
  """Bits of the k-th largest magnitude. IEEE orders magnitudes as unsigned integers, with NaN on top."""
  x = np.asarray(x)
  unsigned = np.dtype(f'u{x.dtype.itemsize}')
  magnitudes = x.view(unsigned) & unsigned.type(np.iinfo(unsigned).max >> 1)
  return np.sort(magnitudes[np.asarray(live)] if live is not None else magnitudes.reshape(-1))[-k]


def bits(x):
  x = np.asarray(x)
  return x.view(f'u{x.dtype.itemsize}')


def normal(shape, dtype='float32', seed=0):
  return jnp.asarray(np.random.default_rng(seed).normal(size=shape), dtype)


def primitives(jaxpr):
  """Names of all primitives, those inside loops and branches too."""
  for eqn in jaxpr.eqns:
    yield eqn.primitive.name
    for parameter in eqn.params.values():
      for inner in parameter if isinstance(parameter, tuple) else (parameter,):
        if hasattr(inner, 'jaxpr'):
          yield from primitives(inner.jaxpr)


@pytest.mark.parametrize('shape', [(), (31, 9), (3, 3, 8, 5)])
@pytest.mark.parametrize('dtype', FLOATS)
def test_equals_a_sort(dtype, shape):
  x = normal(shape, dtype)
  found = jax.jit(jax.vmap(kth_largest, in_axes=(None, 0)))(x, jnp.arange(1, x.size + 1))
  assert found.dtype == x.dtype
  np.testing.assert_array_equal(bits(found), [reference(x, k) for k in range(1, x.size + 1)])


def test_float64():
  with jax.enable_x64(True):
    # Neighbours that differ in the last bit of float64 are one float32.
    x = jnp.asarray([1.0, np.nextafter(1, 2), -np.nextafter(1, 0), 1e300, -5e-324, 0.0])
    for k in range(1, x.size + 1):
      assert bits(kth_largest(x, k)) == reference(x, k)
      assert kth_largest(x, k).dtype == np.float64


HARD = {  # repeated up to 4096 entries
  'all equal': [-2.5],
  'all zero': [0.0, -0.0],
  'subnormal': np.abs(np.arange(-2048, 2048, dtype=np.int32)).view(np.float32),
  'extremes': [np.inf, -np.inf, np.finfo(np.float32).max, np.finfo(np.float32).tiny, 1e-45, 0, -0.0],
  'sorted': np.linspace(-3, 3, 4096),
  'falling': np.geomspace(1e30, 1e-30, 4096),
  'periodic': [1e-3] * 63 + [1e3],
  'cluster': np.r_[7, np.nextafter(np.float32(1), np.float32(2)), 1 - 2 ** -24, np.ones(4093)],
  'a few of many': np.r_[-1, np.full(3, 1e-40), np.zeros(4092)],
}


EVERY_K = jax.jit(jax.vmap(kth_largest, in_axes=(None, 0)))


@pytest.mark.parametrize('name', HARD)
def test_exact_on_hard_data(name):
  x, ks = jnp.asarray(np.resize(np.float32(HARD[name]), 4096)), np.array([1, 2, 4, 64, 2048, 4095, 4096])
  found = EVERY_K(x, ks)
  np.testing.assert_array_equal(bits(found), [reference(x, k) for k in ks])


@pytest.mark.parametrize('dtype', FLOATS)
def test_exact_on_any_bits(dtype):
  unsigned, find = np.dtype(FLOATS[dtype]), jax.jit(kth_largest)
  pool = st.lists(st.integers(0, int(np.iinfo(unsigned).max)), min_size=1, max_size=60)

  @hypothesis.given(pool, st.randoms(use_true_random=False))
  def check(patterns, random):  # drawn from a pool of some values, which makes ties
    x = np.array(random.choices(patterns, k=60), unsigned).view(jnp.dtype(dtype))
    live = np.array(random.choices([True, False], k=60))
    live[0] = True
    for k in (1, random.randint(1, live.sum()), live.sum()):
      assert bits(find(x, k, live)) == reference(x, k, live)
      assert bits(find(x, k)) == reference(x, k)
  check()


def test_nan_ranks_above_infinity():
  x = jnp.array([1.0, np.nan, -np.inf, -np.nan])
  assert np.isnan(kth_largest(x, 2)) and kth_largest(x, 3) == np.inf and kth_largest(x, 4) == 1


def test_traced_k_out_of_range():
  x, find = normal((10,)), jax.jit(kth_largest)
  for k in (0, -3):
    assert not np.any(abs(x) >= find(x, k))
  assert find(x, 11) == 0
  assert find(x, 3, np.zeros(10, bool)) == 0
  assert find(x, 10) == np.min(abs(x))


def test_tree_is_ranked_as_one():
  tree = {'a': normal((5, 4)), 'b': [normal((3,), 'bfloat16', 1), None], 'c': normal((), seed=2)}
  live = jax.tree.map(lambda x: np.random.default_rng(3).random(x.shape) < 0.7, tree)
  joined = np.concatenate([np.asarray(x, np.float32).reshape(-1) for x in jax.tree.leaves(tree)])
  alive = np.concatenate([x.reshape(-1) for x in jax.tree.leaves(live)])
  find = jax.jit(kth_largest)
  for k in range(1, alive.sum() + 1):
    assert bits(find(tree, k)) == reference(joined, k)
    assert bits(find(tree, k, live)) == reference(joined, k, alive)


def test_half_precision_subnormals_keep_their_value_in_a_mixed_tree():
  tree = [jnp.array([2.0 ** -24], jnp.float16), jnp.array([2.0 ** -133], jnp.bfloat16), jnp.zeros(3)]
  assert float(kth_largest(tree, 1)) == 2.0 ** -24
  assert float(kth_largest(tree, 2)) == 2.0 ** -133


def test_counts_above_the_integers_of_float32():
  entries = 2 ** 24 + 9  # float32 counts every second one from 2²⁴ on
  x = jnp.full((entries,), 0.5, jnp.bfloat16).at[: 2 ** 24 + 1].set(-2)
  assert kth_largest(x, 2 ** 24 + 1) == 2
  assert kth_largest(x, 2 ** 24 + 2) == 0.5


def test_vmap_scan_and_lax_map_agree():
  x, ks = normal((4, 50)), jnp.array([1, 7, 25, 50])
  expected = [reference(row, k) for row, k in zip(x, ks, strict=True)]
  mapped = jax.vmap(kth_largest)(x, ks)
  scanned = jax.lax.scan(lambda _, pair: (None, kth_largest(*pair)), None, (x, ks))[1]
  np.testing.assert_array_equal(bits(mapped), expected)
  np.testing.assert_array_equal(bits(scanned), expected)


def test_gradient_is_zero():
  np.testing.assert_array_equal(jax.grad(lambda x: 2 * kth_largest(x, 3))(normal((9,))), np.zeros(9))


def test_no_gradient_is_computed():
  x = normal((9,))
  jaxpr = jax.make_jaxpr(lambda x, t: jax.jvp(lambda x: kth_largest(x, 3), (x,), (t,)))(x, x).jaxpr
  # A second one would carry the tangents round the loop.
  assert list(primitives(jaxpr)).count('optimization_barrier') == 1


def test_rank_counts_what_lies_at_and_above():
  x = jnp.round(2 * normal((300,)))
  rank_of = jax.jit(lambda k: kth_pattern([x], k))
  for k in (1, 2, 50, 150, 299, 300):
    rank, magnitudes, kth = rank_of(k), np.abs(x), np.sort(np.abs(x))[-k]
    assert (rank.reached, rank.above) == ((magnitudes >= kth).sum(), (magnitudes > kth).sum())


def test_one_trace_serves_every_k():
  traces = []
  find = jax.jit(lambda x, k: traces.append(k) or kth_largest(x, k))
  for k in (1, 5, 9):
    find(normal((9,)), k)
  assert len(traces) == 1


def test_counts_only():
  used = set(primitives(jax.make_jaxpr(kth_largest)(normal((6, 5)), 4).jaxpr))
  assert 'reduce' in used
  assert used.isdisjoint({'sort', 'top_k', 'gather', 'reshape', 'scatter'})


def test_needs_no_memory_of_the_size_of_the_data():
  x = normal((512, 512))
  assert jax.jit(kth_largest).lower(x, 9).compile().memory_analysis().temp_size_in_bytes < x.nbytes / 50


SPECS = [PartitionSpec('a', 'b'), PartitionSpec(None, ('b', 'a')), PartitionSpec('b')]


@pytest.mark.parametrize('spec', SPECS, ids=str)
@pytest.mark.parametrize('axis_type', [AxisType.Auto, AxisType.Explicit], ids=lambda t: t.name)
def test_sharded_arrays_stay_where_they_lie(axis_type, spec):
  mesh = jax.make_mesh((4, 2), ('a', 'b'), axis_types=(axis_type,) * 2)
  x = jax.device_put(normal((64, 48)), NamedSharding(mesh, spec))
  live = jax.device_put(np.random.default_rng(1).random(x.shape) < 0.5, x.sharding)
  program = jax.jit(functools.partial(kth_largest, live=live)).lower(x, jnp.int32(700)).compile()
  assert bits(program(x, jnp.int32(700))) == reference(x, 700, live)
  assert max(collectives(program.as_text()), default=0) <= mesh.size


COLLECTIVES = ('all-gather', 'all-to-all', 'collective-permute', 'all-reduce')


def collectives(text):
  """Number of elements of every array that devices exchange."""
  for line in text.splitlines():
    left, call, _ = line.partition('(') if ' = ' in line else ('', '', '')
    if call and any(name in left for name in COLLECTIVES):
      sizes = left.partition(' = ')[2].partition('[')[2].partition(']')[0]
      yield int(np.prod([int(d) for d in sizes.split(',') if d]))


def test_collectives_are_recognised():
  mesh = jax.make_mesh((8,), ('a',), axis_types=(AxisType.Auto,))
  x = jax.device_put(normal((64, 48)), NamedSharding(mesh, PartitionSpec('a')))
  gathered = jax.jit(lambda x: x + 1, out_shardings=NamedSharding(mesh, PartitionSpec())).lower(x).compile()
  assert max(collectives(gathered.as_text())) == x.size


def test_entries_are_limited_by_their_count():
  largest = jax.ShapeDtypeStruct((2 ** 31 - 1,), jnp.bfloat16)
  assert jax.eval_shape(lambda x: kth_largest(x, 1), largest).shape == ()
  with pytest.raises(ValueError, match='2147483647 of them; got 2147483648'):
    jax.eval_shape(lambda x: kth_largest(x, 1), [largest, jax.ShapeDtypeStruct((1,), jnp.bfloat16)])


@pytest.mark.parametrize(('arguments', 'message'), [
  (([1.0, 2.0], 0), 'between 1 and the number of entries, 2; got 0'),
  (([1.0, 2.0], 3), 'between 1 and the number of entries, 2; got 3'),
  ((np.ones(3), 1.5), 'k is one integer; got 1.5'),
  ((np.ones(3), True), 'k is one integer; got True'),
  ((np.ones(3), np.array([1, 2])), 'k is one integer'),
  (({'w': np.arange(3)}, 1), r"got int32 at \['w'\]"),
  ((np.ones(3, np.complex64), 1), 'got complex64'),
  (({}, 1), 'no arrays'),
  ((np.ones(3), 1, np.ones(4, bool)), r'\(3,\); got bool \(4,\)'),
  ((np.ones(3), 1, np.ones(3)), r'\(3,\); got float32'),
  (({'w': np.ones(3)}, 1, {'v': np.ones(3, bool)}), r"differ in structure: only live has \['v'\]"),
])
def test_errors(arguments, message):
  with pytest.raises(ValueError, match=message):
    kth_largest(*arguments)

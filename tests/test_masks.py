"""Masks against argsort in NumPy, hand-typed tables and exact identities."""
import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from test_thresholds import collectives

from powerprop import masks


def hashes(n, start=0):
  """The tie order in Python integers: of the equal ones the largest hash is kept first."""
  for i in range(start, start + n):
    i ^= i >> 16
    i = i * 0x85ebca6b % 2 ** 31
    i ^= i >> 13
    i = i * 0xc2b2ae35 % 2 ** 31
    yield i ^ i >> 16


def reference(score, k, live=None):
  """Mask of the min(k, live count) best by (magnitude, hash of the flat index), sorted in float64."""
  score = np.asarray(score, np.float64)
  live = np.ones(score.size, bool) if live is None else np.asarray(live).reshape(-1)
  rank = np.lexsort((list(hashes(score.size)), np.abs(score).reshape(-1), live))[::-1]
  mask = np.zeros(score.size, bool)
  mask[rank[:max(0, min(k, live.sum()))]] = True
  return mask.reshape(score.shape)


TOP_K = jax.jit(masks.top_k)
GLOBAL = jax.jit(masks.top_k_global)


def normal(shape, dtype='float32', seed=0):
  return jnp.asarray(np.random.default_rng(seed).normal(size=shape), dtype)


# ---- top_k -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize('dtype', ['float16', 'bfloat16', 'float32'])
@pytest.mark.parametrize('shape', [(), (3, 3, 8, 5)])
def test_equals_argsort(shape, dtype):
  score = normal(shape, dtype)
  for k in {0, 1, score.size // 3, score.size}:
    np.testing.assert_array_equal(TOP_K(score, k), reference(score, k))


def test_hand_typed():
  score = jnp.array([[0.1, -4.0, 0.0], [2.0, -0.2, 3.0]])
  np.testing.assert_array_equal(masks.top_k(score, 3), [[False, True, False], [True, False, True]])
  live = jnp.array([[True, False, True], [True, True, False]])
  np.testing.assert_array_equal(masks.top_k(score, 3, live), [[True, False, False], [True, True, False]])


@pytest.mark.parametrize('values', [[1.0], [0.0, -0.0], [1e-45, 0.0, 3e-45], [np.inf, -np.inf, 1.0]])
def test_exact_count_among_equals(values):
  score = jnp.asarray(np.resize(np.float32(values), (20, 15)))
  for k in (0, 1, 150, 299, 300):
    np.testing.assert_array_equal(TOP_K(score, k), reference(score, k))


@hypothesis.given(
  st.lists(st.floats(width=32, allow_nan=False), min_size=1, max_size=8),
  st.randoms(use_true_random=False), st.integers(-2, 62))
def test_any_ties_any_k(pool, random, k):
  score = np.float32(random.choices(pool, k=60)).reshape(6, 10)
  live = np.array(random.choices([True, False], k=60)).reshape(6, 10)
  np.testing.assert_array_equal(TOP_K(score, k), reference(score, k))
  np.testing.assert_array_equal(TOP_K(score, k, live), reference(score, k, live))


def test_nan_is_kept_first():
  score = jnp.array([1.0, np.nan, np.inf, -2.0])
  np.testing.assert_array_equal(masks.top_k(score, 1), [False, True, False, False])
  # All bits set is the largest pattern there is: k = 0 must not take it.
  largest = jnp.asarray(np.full(5, 0x7fffffff, np.uint32).view(np.float32))
  assert not np.any(TOP_K(largest, 0))
  assert np.sum(TOP_K(largest, 3)) == 3


@pytest.mark.parametrize('pattern', [0x7f81, 0x7fc1])
def test_exact_count_among_signalling_nans(pattern):
  score = jnp.asarray(np.full(40, pattern, np.uint16).view(jnp.bfloat16))
  assert np.sum(TOP_K(score, 7)) == 7
  assert np.sum(TOP_K(score, 7, np.arange(40) % 2 == 0)) == 7


def test_empty_array():
  assert masks.top_k(jnp.zeros((0, 3)), 0).shape == (0, 3)


def test_float64_is_told_apart_beyond_float32():
  with jax.enable_x64(True):
    score = 1 + jnp.arange(8.0) * 2 ** -50
    np.testing.assert_array_equal(masks.top_k(score, 3), [False] * 5 + [True] * 3)


def test_ties_are_spread_evenly():
  mask = np.asarray(TOP_K(jnp.ones((256, 512)), 256 * 512 // 4))
  # At random the number kept has sd sqrt(512 * 1/4 * 3/4) = 9.8 by row and 6.9 by column: five sd are one
  # case in 1.7 million, half an sd would be a lattice. Eight neighbours are all kept in 4⁻⁸ of cases.
  assert np.all(np.abs(mask.sum(1) - 128) < 49) and np.all(np.abs(mask.sum(0) - 64) < 35)
  assert mask.sum(1).std() > 5 and mask.sum(0).std() > 3.5
  assert np.mean(mask.reshape(-1, 8).all(1)) < 1e-3


def test_no_twohashes_of_places_are_alike():
  found = np.concatenate([np.asarray(h).reshape(-1) for h in masks.hashes_of_places([(300, 400), (), (7, 11, 13)])])
  np.testing.assert_array_equal(found[-1002:], list(hashes(1002, start=120_000)))
  assert np.unique(found).size == found.size and found.min() >= 0


def branches(jaxpr):
  """(primitives of each branch) of every cond, at any depth."""
  for eqn in jaxpr.eqns:
    if eqn.primitive.name == 'cond':
      yield [{e.primitive.name for e in branch.jaxpr.eqns} for branch in eqn.params['branches']]
    for parameter in eqn.params.values():
      if hasattr(parameter, 'jaxpr'):
        yield from branches(parameter.jaxpr)


def test_nothing_is_nothing_also_where_a_hash_is_the_largest_integer(monkeypatch):
  """Of the first 2³¹ entries that is number 428,789,825, too large for a test; and it has to tie: a NaN of all ones."""
  assert next(hashes(1, 428_789_825)) == 2 ** 31 - 1
  monkeypatch.setattr(masks, 'hashes_of_places', lambda shapes: [jnp.full(shape, 2 ** 31 - 1, jnp.int32) for shape in shapes])
  assert not masks.top_k(jnp.full(6, 0x7fffffff, jnp.int32).view(jnp.float32), 0).any()


def test_tie_work_is_a_branch():
  (found,) = branches(jax.make_jaxpr(masks.top_k)(normal((6, 5)), 4).jaxpr)
  plain, ties = sorted(found, key=len)
  assert 'iota' in ties and 'scan' in ties and plain.isdisjoint({'iota', 'scan', 'while', 'reduce'})


def test_vmap_and_lax_map_agree():
  score, ks = jnp.round(2 * normal((5, 30))), jnp.array([0, 1, 10, 29, 30])
  expected = [reference(row, k) for row, k in zip(score, ks.tolist(), strict=True)]
  np.testing.assert_array_equal(jax.vmap(TOP_K)(score, ks), expected)
  np.testing.assert_array_equal(jax.lax.map(lambda pair: TOP_K(*pair), (score, ks)), expected)


@pytest.mark.parametrize('spec', [PartitionSpec('a', 'b'), PartitionSpec(None, ('b', 'a'))], ids=str)
@pytest.mark.parametrize('axis_type', [AxisType.Auto, AxisType.Explicit], ids=lambda t: t.name)
def test_sharded_masks_are_the_same_and_lie_alike(axis_type, spec):
  mesh = jax.make_mesh((4, 2), ('a', 'b'), axis_types=(axis_type,) * 2)
  tree = {'ties': jnp.round(normal((64, 48))), 'replicated': jnp.round(normal((5, 3)))}
  sharded = tree | {'ties': jax.device_put(tree['ties'], NamedSharding(mesh, spec))}
  program = jax.jit(masks.top_k_global).lower(sharded, jnp.int32(700)).compile()
  found = program(sharded, jnp.int32(700))
  jax.tree.map(np.testing.assert_array_equal, found, GLOBAL(tree, 700))
  assert found['ties'].sharding.is_equivalent_to(sharded['ties'].sharding, 2)
  assert max(collectives(program.as_text())) <= mesh.size  # counts, one a device


# ---- trees -------------------------------------------------------------------------------------------------


def test_global_equals_top_k_of_the_joined_tree():
  half = jnp.round(normal((9,), 'bfloat16', 1))
  tree = {'a': jnp.round(normal((4, 6))), 'b': None, 'c': [half, jnp.ones(())]}
  live = jax.tree.map(lambda x: np.random.default_rng(x.size).random(x.shape) < 0.6, tree)
  joined = np.concatenate([np.asarray(x, np.float64).reshape(-1) for x in jax.tree.leaves(tree)])
  alive = np.concatenate([x.reshape(-1) for x in jax.tree.leaves(live)])
  for k in range(joined.size + 1):
    for found, expected in [(GLOBAL(tree, k), reference(joined, k)),
                            (GLOBAL(tree, k, live), reference(joined, k, alive))]:
      assert jax.tree.structure(found) == jax.tree.structure(tree)
      np.testing.assert_array_equal(np.concatenate([x.reshape(-1) for x in jax.tree.leaves(found)]), expected)


def test_global_ties_are_spread_over_leaves():
  tree = [jnp.zeros((100, 100))] * 5
  kept = [int(n) for n in masks.counts(GLOBAL(tree, 10_000))]
  # Hypergeometric, 2,000 each with sd sqrt(10000 * 0.2 * 0.8 * 0.8) = 36.
  assert sum(kept) == 10_000 and max(abs(n - 2000) for n in kept) < 180


def test_layerwise_keeps_its_number_in_every_leaf():
  tree = {'a': normal((4, 6)), 'b': {'w': normal((9,)), 'offset': normal((3,)), 'none': None}}
  counts = {'a': 7, 'b': {'w': jnp.int32(9), 'offset': None, 'none': None}}
  layerwise = jax.jit(masks.layerwise)
  found = layerwise(tree, counts)
  np.testing.assert_array_equal(found['a'], reference(tree['a'], 7))
  assert np.all(found['b']['w']) and found['b']['offset'] is None and found['b']['none'] is None
  live = {'a': tree['a'] > 0, 'b': {'w': None, 'offset': None, 'none': None}}
  found = layerwise(tree, counts, live)
  np.testing.assert_array_equal(found['a'], reference(tree['a'], 7, tree['a'] > 0))


# ---- using masks -------------------------------------------------------------------------------------------


@pytest.mark.parametrize('dtype', ['float32', 'bfloat16', 'int8'])
def test_apply(dtype):
  tree = {'w': jnp.array([[1, -2], [3, 4]], dtype), 'b': jnp.array([5, 6], dtype), 'none': None}
  found = masks.apply({'w': jnp.array([[True, False], [False, True]]), 'b': None, 'none': None}, tree)
  np.testing.assert_array_equal(found['w'], [[1, 0], [0, 4]])
  assert found['w'].dtype == dtype and found['b'] is tree['b'] and found['none'] is None


def test_apply_makes_a_pruned_nan_a_plain_zero():
  found = masks.apply(jnp.array([False, False, True]), jnp.array([np.nan, -0.0, -1.0]))
  np.testing.assert_array_equal(np.asarray(found).view(np.uint32), np.float32([0, 0, -1]).view(np.uint32))


A = {'v': jnp.array([True, True, False, False, False]), 'w': jnp.array([[True], [False]]), 'b': None}
B = {'v': jnp.array([True, False, True, False, False]), 'w': jnp.array([[True], [True]]), 'b': None}


def test_counts_density_overlap():
  counts = masks.counts(A)
  assert (int(counts['v']), int(counts['w']), counts['b']) == (2, 1, None)
  np.testing.assert_allclose(masks.density(A), 3 / 7, rtol=1e-7)
  np.testing.assert_allclose(masks.overlap(A, B), 4 / 7, rtol=1e-7)               # agree: 1, 0, 0, 1, 1, 1, 0
  np.testing.assert_allclose(masks.intersection_over_union(A, B), 2 / 5, rtol=1e-6)  # both: 2, either: 5
  by_leaf = jax.tree.map(masks.overlap, A, B)
  np.testing.assert_allclose([by_leaf['v'], by_leaf['w']], [3 / 5, 1 / 2], rtol=1e-7)


def test_overlap_is_one_with_itself_and_none_with_its_opposite():
  assert masks.overlap(A, A) == 1 == masks.intersection_over_union(A, A)
  assert masks.overlap(A, jax.tree.map(jnp.logical_not, A)) == 0
  assert np.isnan(masks.density({'b': None})) and np.isnan(masks.density(jnp.zeros((0,), bool)))


@pytest.mark.parametrize('p', [0.5, 0.15, 0.05])
def test_overlap_of_independent_masks(p):
  a, b = (TOP_K(normal((200, 500), seed=seed), round(p * 100_000)) for seed in (0, 1))
  # The sd of the share is at most 0.5 / sqrt(100,000) = 0.0016.
  assert abs(masks.overlap(a, b) - (p ** 2 + (1 - p) ** 2)) < 0.008


def test_measures_are_traceable():
  stack = jnp.stack([A['v'], B['v']])
  np.testing.assert_allclose(jax.jit(jax.vmap(masks.density))(stack), [0.4, 0.4], rtol=1e-7)
  overlaps = jax.jit(jax.vmap(masks.overlap, in_axes=(0, None)))(stack, A['v'])
  np.testing.assert_allclose(overlaps, [1, 0.6], rtol=1e-7)


@pytest.mark.parametrize('shape', [(1,), (7,), (8,), (9,), (3, 5), (2, 3, 4, 5)])
def test_masks_are_packed_as_by_numpy_and_come_back(shape):
  mask = np.random.default_rng(len(shape)).random(shape) < 0.5
  tree = {'w': jnp.asarray(mask), 'b': None}
  bits = jax.jit(masks.pack)(tree)
  assert bits['b'] is None and bits['w'].nbytes == -(-mask.size // 8)
  np.testing.assert_array_equal(bits['w'], np.packbits(mask))
  back = jax.jit(lambda bits: masks.unpack(bits, jax.ShapeDtypeStruct(shape, 'float32')))(bits['w'])
  assert back.dtype == bool
  np.testing.assert_array_equal(back, mask)


W = np.ones((2, 3), np.float32)
M = np.ones((2, 3), bool)


@pytest.mark.parametrize(('call', 'message'), [
  (lambda: masks.top_k(W, -1), 'between 0 and the number of entries, 6; got -1'),
  (lambda: masks.top_k(W, 7), 'between 0 and the number of entries, 6; got 7'),
  (lambda: masks.top_k(W, 2.0), 'k is one integer; got 2.0'),
  (lambda: masks.top_k(np.arange(4), 2), 'got int'),
  (lambda: masks.top_k(M, 2), 'got bool'),
  (lambda: masks.top_k({'w': W}, 2), 'top_k takes one array, .*; got dict'),
  (lambda: masks.top_k(W, 2, M[:1]), r'shaped like its array, \(2, 3\); got bool \(1, 3\)'),
  (lambda: masks.top_k_global({'w': W, 'v': W.astype(np.complex64)}, 2), r"complex64 at \['v'\]"),
  (lambda: masks.top_k_global({'w': W}, 2, {'w': None}), r"scores has \['w'\]"),
  (lambda: masks.layerwise({'a': {'w': W}}, {'a': {'w': 8}}), r"6; got 8, in the leaf \['a'\]\['w'\]"),
  (lambda: masks.layerwise({'w': W}, {'w': 3, 'v': 3}), r"differ .*: only counts has \['v'\]"),
  (lambda: masks.apply({'w': M}, {'w': W, 'b': W}), r"differ .*: only the tree has \['b'\]"),
  (lambda: masks.apply({'w': M[0]}, {'w': W}), r"\(2, 3\); got bool \(3,\) at \['w'\]"),
  (lambda: masks.apply({'w': W}, {'w': W}), r'got float32 \(2, 3\)'),
  (lambda: masks.overlap({'w': M, 'b': None}, {'w': M, 'b': M}), r"only the other has \['b'\]"),
  (lambda: masks.overlap(M, M[:, :1]), r'\(2, 3\); got bool \(2, 1\)'),
  (lambda: masks.overlap(W, W), 'got float32'),
  (lambda: masks.pack({'w': W}), r"got float32 \(2, 3\) at \['w'\]"),
  (lambda: masks.unpack({'w': np.zeros(2, np.uint8)}, {'w': W}), r"of 6 entries is uint8 \(1,\) .* got uint8 \(2,\) at \['w'\]"),
  (lambda: masks.unpack({'w': None}, {'w': W, 'b': W}), r"only the tree has \['b'\]"),
])
def test_errors(call, message):
  with pytest.raises(ValueError, match=message):
    call()

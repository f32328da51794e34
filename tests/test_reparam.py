"""Ψ, Ψ⁻¹ and the slope against float64 NumPy and hand-typed values; which leaves they act on."""
import contextlib
import warnings

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import powerprop
from powerprop import reparam as reparam_lib
from powerprop.reparam import change_alpha, keep_zeros, make_reparam, powerpropagation, psi, psi_inverse, psi_slope

ALPHAS = [1.0, 1.2, 1.375, 1.5, 2.0, 2.6, 3.0, 4.0]
# One rounding to the dtype after a computation in at least float32, whose own error (2e-6 covers exp(f log a) at these values)
# shows in float32 only.
TOLERANCE = {'float32': 2e-6, 'bfloat16': 2.0**-8 * 1.01, 'float16': 2.0**-11 * 1.01, 'float64': 1e-14}
VALUES = [0.0, -0.0, 1.0, -1.0, 0.5, -0.5, 0.5, 3.0, -2.75, 1e-3, -0.02]


def reference(x, alpha):
  x = np.asarray(x, np.float64)
  return np.sign(x) * np.abs(x) ** alpha


def reference_slope(x, alpha):
  return alpha * np.abs(np.asarray(x, np.float64)) ** (alpha - 1)   # NumPy: 0 ** 0 = 1


@contextlib.contextmanager
def precision(dtype):
  with jax.enable_x64(True) if dtype == 'float64' else contextlib.nullcontext():
    yield


@pytest.mark.parametrize('alpha', ALPHAS)
@pytest.mark.parametrize('dtype', TOLERANCE)
def test_values_and_slopes_match_numpy_in_float64(alpha, dtype):
  with precision(dtype):
    x = jnp.array(VALUES, dtype)
    tolerance = TOLERANCE[dtype]
    for compute, expected in ((psi(x, alpha), reference(x, alpha)), (psi_slope(x, alpha), reference_slope(x, alpha)),
                              (psi_inverse(x, alpha), reference(x, 1 / alpha)),
                              (jax.vmap(jax.grad(lambda v: psi(v, alpha)))(x), reference_slope(x, alpha)),
                              (jax.jvp(lambda v: psi(v, alpha), (x,), (jnp.ones_like(x),))[1], reference_slope(x, alpha)),
                              (jax.jit(jax.jacfwd(lambda v: psi(v, alpha).sum()))(x), reference_slope(x, alpha))):
      assert compute.dtype == x.dtype
      np.testing.assert_allclose(np.asarray(compute, np.float64), expected, rtol=tolerance,
                                 atol=2.0**-24 if dtype == 'float16' else 1e-30)   # float16's smallest step: 0.001² is subnormal


def test_hand_typed_values():
  x = jnp.array([-3.0, 0.0, 0.25])
  np.testing.assert_array_equal(psi(x, 2.0), [-9.0, 0.0, 0.0625])
  np.testing.assert_array_equal(psi_slope(x, 2.0), [6.0, 0.0, 0.5])
  np.testing.assert_array_equal(psi(x, 1.5), jnp.array([-3 * np.sqrt(np.float32(3)), 0.0, 0.125]))
  np.testing.assert_allclose(psi_inverse(jnp.array([-9.0, 0.0, 0.0625]), 2.0), x, rtol=1e-7)


@pytest.mark.parametrize('alpha', [1.0, 1.5, 2.0, 2.3, 3.0])
def test_traced_alpha_equals_static_and_has_its_derivative(alpha):
  x = jnp.array(VALUES)
  np.testing.assert_allclose(jax.jit(psi)(x, alpha), psi(x, alpha), rtol=2e-6)
  np.testing.assert_allclose(jax.jit(psi_slope)(x, alpha), psi_slope(x, alpha), rtol=2e-6)
  np.testing.assert_allclose(jax.jit(psi_inverse)(x, alpha), psi_inverse(x, alpha), rtol=2e-6)
  nonzero = np.where(np.asarray(x) == 0, 1, np.abs(x)).astype(np.float64)
  expected = reference(x, alpha) * np.log(nonzero)
  np.testing.assert_allclose(jax.vmap(jax.grad(psi, argnums=1), (0, None))(x, alpha), expected, rtol=1e-5, atol=1e-7)
  np.testing.assert_allclose(jax.vmap(jax.grad(psi), (0, None))(x, jnp.float32(alpha)), reference_slope(x, alpha), rtol=2e-6)
  step = 1e-6
  numeric = (reference(x, 1 / (alpha + step)) - reference(x, 1 / (alpha - step))) / (2 * step)
  got = jax.vmap(lambda v: jax.grad(lambda a: psi_inverse(v, a))(jnp.float32(alpha)))(x)
  np.testing.assert_allclose(got, numeric, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize('alpha', [1.5, 2.0, 3.0])
def test_second_derivative_is_finite_everywhere_and_right_away_from_zero(alpha):
  x = jnp.array([0.0, 0.5, -2.0])
  got = jax.vmap(jax.hessian(lambda v: psi(v, alpha)))(x)
  traced = jax.vmap(jax.hessian(lambda v: jax.jit(psi)(v, alpha)))(x)
  np.testing.assert_allclose(traced, got, rtol=1e-5)
  assert jax.grad(lambda a: jax.jvp(lambda v: psi(v, a), (0.0,), (1.0,))[1])(alpha) == 0
  away = np.array([0.5, -2.0])
  np.testing.assert_allclose(got[1:], alpha * (alpha - 1) * np.sign(away) * np.abs(away) ** (alpha - 2), rtol=1e-6)
  assert got[0] == 0


def test_python_numbers_are_scalars():
  assert psi(0.5, 2.0) == 0.25 and psi_slope(0.5, 2) == 1.0 and psi_inverse(0.25, 2.0) == 0.5
  assert jax.grad(psi)(0.5, 2.0) == 1.0
  value, by_alpha = jax.jvp(lambda a: psi(0.5, a), (2.0,), (1.0,))
  np.testing.assert_allclose([value, by_alpha], [0.25, 0.25 * np.log(0.5)], rtol=1e-6)
  assert jax.jvp(lambda a: psi_inverse(jnp.zeros(()), a), (2.0,), (1.0,))[1] == 0
  with pytest.raises(ValueError, match='acts on floating arrays, got list'):
    psi([0.5], 2.0)


def test_inverse_has_its_slope_and_an_infinite_one_at_zero():
  got = jax.vmap(jax.grad(lambda v: psi_inverse(v, 2.0)))(jnp.array([0.0, 0.25, -4.0]))
  np.testing.assert_allclose(got, [np.inf, 1.0, 0.25])


@hypothesis.given(st.floats(-1e3, 1e3, width=32), st.sampled_from(ALPHAS))
def test_inverse_undoes_psi(x, alpha):
  hypothesis.assume(abs(x) ** alpha > 1e-35 or x == 0)   # below, θ leaves float32's normal range
  got = psi_inverse(psi(jnp.float32(x), alpha), alpha)
  np.testing.assert_allclose(got, x, rtol=4e-6)


@hypothesis.given(st.floats(-1e3, 1e3, width=32), st.floats(1.0, 4.0))
def test_psi_is_odd_and_keeps_signs(x, alpha):
  y = psi(jnp.float32(x), alpha)
  assert y == -psi(jnp.float32(-x), alpha)
  assert np.sign(y) in (np.sign(x), 0) and (y != 0 or abs(x) ** alpha < 1e-35)


def test_alpha_one_hands_on_the_array_itself():
  x = jnp.array([0.0, -0.0, jnp.nan, jnp.inf, 1e-42])
  assert psi(x, 1) is x and psi_inverse(x, 1.0) is x
  traced = jax.jit(psi)(x, 1.0)
  assert np.asarray(traced)[:4].tobytes() == np.asarray(x)[:4].tobytes()


@pytest.mark.parametrize('kind', [AxisType.Auto, AxisType.Explicit])
def test_sharded_arrays_keep_their_layout(kind):
  mesh = jax.make_mesh((4, 2), ('a', 'b'), axis_types=(kind, kind))
  x = jnp.linspace(-1, 1, 64).reshape(8, 8)
  with jax.set_mesh(mesh) if kind is AxisType.Explicit else contextlib.nullcontext():
    placed = jax.device_put(x, NamedSharding(mesh, PartitionSpec('a', 'b')))
    value, slope = jax.jit(lambda v: (psi(v, 1.5), jax.grad(lambda w: psi(w, 1.5).sum())(v)))(placed)
  assert value.sharding.is_equivalent_to(placed.sharding, 2) and slope.sharding.is_equivalent_to(placed.sharding, 2)
  np.testing.assert_array_equal(value, psi(x, 1.5))
  np.testing.assert_allclose(slope, reference_slope(x, 1.5), rtol=1e-6)


@pytest.mark.parametrize('alpha', [0.99, 0, -2, float('nan'), float('inf'), '2', None, True, [2.0], np.array([2.0, 3.0])])
def test_wrong_alpha_is_named(alpha):
  for call in (lambda: psi(jnp.ones(2), alpha), lambda: psi_slope(jnp.ones(2), alpha), lambda: powerpropagation(alpha)):
    with pytest.raises(ValueError, match=r'alpha must be (finite and at least 1|one number of at least 1), got'):
      call()


@pytest.mark.parametrize('dtype', ['int32', 'bool', 'complex64'])
def test_wrong_dtype_is_named(dtype):
  with pytest.raises(ValueError, match=f'floating arrays, got dtype {dtype}'):
    psi(jnp.ones(2, dtype), 2.0)
  with pytest.raises(ValueError, match=f'chose l/w, whose dtype {dtype} is not floating'):
    powerpropagation(2.0).weights({'l': {'w': jnp.ones((2, 2), dtype)}})


def test_wrong_traced_alpha_is_named():
  with pytest.raises(ValueError, match=r'floating scalar, got float32\[2\]'):
    jax.jit(psi)(jnp.ones(2), jnp.ones(2))
  with pytest.raises(ValueError, match=r'Python number here, got a traced value'):
    jax.jit(lambda a: powerpropagation(a).weights(PARAMS))(2.0)


# ---- trees ------------------------------------------------------------------------------------------------------

PARAMS = {
    'embed': {'embeddings': jnp.array([[0.5, -0.5]])},
    'conv': {'w': jnp.array([[[[0.5, -2.0]]]]), 'b': jnp.array([0.5, 0.5])},
    'norm': {'scale': jnp.array([[0.5]]), 'offset': jnp.array([0.5])},
    'linear': {'w': jnp.array([[-3.0, 0.25]]), 'b': jnp.array([-3.0, 3.0])},
    'gain': {'w': jnp.array([0.5])},
}


def changed(reparam):
  theta = reparam.weights(PARAMS)
  return {reparam_lib.leaf_name(path) for (path, x), y in
          zip(jax.tree_util.tree_leaves_with_path(PARAMS), jax.tree.leaves(theta), strict=True) if x is not y}


def test_default_acts_on_weights_of_layers_only():
  reparam = powerpropagation(2.0)
  assert changed(reparam) == {'conv/w', 'linear/w'}
  theta = reparam.weights(PARAMS)
  np.testing.assert_array_equal(theta['linear']['w'], [[-9.0, 0.0625]])
  np.testing.assert_array_equal(theta['conv']['w'], [[[[0.25, -4.0]]]])
  slope = reparam.slope(PARAMS)
  np.testing.assert_array_equal(slope['linear']['w'], [[6.0, 0.5]])
  np.testing.assert_array_equal(slope['linear']['b'], [1.0, 1.0])
  assert reparam.where(PARAMS)['conv'] == {'w': True, 'b': False}
  assert reparam.alphas(PARAMS)['linear'] == {'w': 2.0, 'b': 1.0}


def test_embeddings_when_asked_for():
  where = lambda name, leaf: powerprop.is_weight(name, leaf) or name.endswith('/embeddings')   # noqa: E731
  assert changed(powerpropagation(2.0, where)) == {'conv/w', 'linear/w', 'embed/embeddings'}


def test_alpha_by_mapping_and_by_function():
  by_mapping = powerpropagation({'conv*': 3.0, '*': 1.0})
  assert by_mapping.alphas(PARAMS)['conv']['w'] == 3.0 and changed(by_mapping) == {'conv/w'}
  by_function = powerpropagation(lambda name, leaf: 2.0 if leaf.ndim == 2 else 1)
  assert changed(by_function) == {'linear/w'}
  with pytest.raises(ValueError, match=r"no pattern for the weight linear/w; it has \['conv\*'\]"):
    powerpropagation({'conv*': 2.0}).weights(PARAMS)
  with pytest.raises(ValueError, match=r"alpha of 'conv\*' must be finite and at least 1, got 0.5"):
    powerpropagation({'conv*': 0.5})
  with pytest.raises(ValueError, match=r"alpha of conv/w must be one number of at least 1, got 'x'"):
    powerpropagation(lambda name, leaf: 'x').weights(PARAMS)


@pytest.mark.parametrize('alpha', [1.0, 2.0])
def test_a_where_that_matches_nothing_says_what_is_there(alpha):
  reparam = powerpropagation(alpha, lambda name, leaf: name == 'nothing')
  for function in (reparam.weights, reparam.inverse, reparam.slope, reparam.where, reparam.alphas):
    with pytest.raises(ValueError, match=r'chose none of these leaves: conv/b float32\[2\], conv/w float32\[1, 1, 1, 2\]'):
      function(PARAMS)
  with pytest.raises(ValueError, match='the tree is empty'):
    powerpropagation(2.0).weights({})


def test_alpha_one_is_no_reparameterisation_at_all():
  theta = powerpropagation(1.0).weights(PARAMS)
  assert all(x is y for x, y in zip(jax.tree.leaves(theta), jax.tree.leaves(PARAMS), strict=True))


def test_a_warning_above_three_and_none_at_three():
  with warnings.catch_warnings():
    warnings.simplefilter('error')
    powerpropagation(3.0)
  with pytest.warns(UserWarning, match=r'alpha = 3.5 is above the range \(1, 3\]') as caught:
    powerpropagation(3.5)
  assert caught[0].filename == __file__   # it points at the caller's line


def test_change_of_alpha_keeps_the_weights():
  old, new = powerpropagation(2.0), powerpropagation({'conv*': 1.0, '*': 3.0})
  phi = change_alpha(PARAMS, old, new)
  for got, expected in zip(jax.tree.leaves(new.weights(phi)), jax.tree.leaves(old.weights(PARAMS)), strict=True):
    np.testing.assert_allclose(got, expected, rtol=1e-6)
  np.testing.assert_allclose(phi['linear']['w'], [[-9 ** (1 / 3), 0.0625 ** (1 / 3)]], rtol=1e-6)
  np.testing.assert_array_equal(phi['conv']['w'], [[[[0.25, -4.0]]]])


def test_leaves_of_zeros_keep_alpha_one_and_are_named():
  theta = {'a': {'w': jnp.ones((2, 2)), 'b': jnp.zeros(2)}, 'head': {'w': jnp.zeros((2, 3))}}
  with pytest.warns(UserWarning, match=r'kept at alpha = 1 .*: head/w\.$') as caught:
    reparam = keep_zeros(powerpropagation(2.0), theta)
  assert caught[0].filename == __file__
  assert reparam.alphas(theta) == {'a': {'w': 2.0, 'b': 1.0}, 'head': {'w': 1.0}}
  assert reparam.where(theta)['head']['w']   # it is a weight still, and may be pruned
  later = {'a': theta['a'], 'head': {'w': jnp.full((2, 3), 5.0)}}
  assert reparam.weights(later)['head']['w'] is later['head']['w']
  plain = powerpropagation(1.0)
  assert keep_zeros(plain, theta) is plain
  with pytest.raises(ValueError, match='outside jit'):
    jax.jit(lambda t: keep_zeros(plain, t).weights(t))(theta)


def test_trees_of_other_containers():
  tree = ({'w': jnp.full((1, 1), 2.0)}, [jnp.ones(3)])
  assert powerpropagation(2.0).weights(tree)[0]['w'].tolist() == [[4.0]]
  custom = make_reparam(lambda t: jax.tree.map(lambda x: True, t), lambda t: jax.tree.map(lambda x: 3.0, t))
  assert custom.weights([jnp.array([2.0])])[0].tolist() == [8.0]

"""experiments.convolution against JAX's convolution and Haiku's layer."""

import functools
import re

import haiku as hk
import jax
import jax.numpy as jnp
import jmp
import ml_collections
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from experiments.convolution import NHWC, conv, on_cpus
from experiments.models import MODELS, build


@pytest.mark.parametrize(('height', 'width', 'kernel', 'stride', 'padding'), [
  (8, 8, (3, 3), (1, 1), 'SAME'), (7, 8, (3, 3), (2, 2), 'SAME'), (8, 7, (1, 1), (2, 2), 'SAME'), (1, 1, (3, 3), (2, 2), 'SAME'),
  (2, 2, (3, 3), (1, 1), 'SAME'),
  (2, 9, (5, 2), (2, 3), 'SAME'), (8, 9, (2, 1), (3, 2), 'SAME'), (9, 8, (4, 3), (3, 2), 'VALID'),
  (10, 10, (5, 5), (2, 2), 'SAME'), (9, 11, (2, 1), (3, 4), 'VALID')])
def test_values_and_gradients_are_those_of_lax(height, width, kernel, stride, padding):
  rng = np.random.default_rng(0)
  x, w = rng.normal(size=(12, height, width, 3)).astype(np.float32), rng.normal(size=(*kernel, 3, 4)).astype(np.float32)
  lax_conv = functools.partial(jax.lax.conv_general_dilated, window_strides=stride, padding=padding,
                               dimension_numbers=('NHWC', 'HWIO', 'NHWC'))
  @functools.partial(jax.jit, static_argnums=0)
  def value_and_gradients(conv, x, w):
    y, pull = jax.vjp(conv, x, w)
    return y, *pull(jnp.cos(jnp.arange(y.size, dtype=jnp.float32)).reshape(y.shape))

  expected = value_and_gradients(lax_conv, x, w)
  found = value_and_gradients(functools.partial(conv, stride=stride, padding=padding), x, w)
  for own, other in zip(found, expected, strict=True):
    np.testing.assert_allclose(own, other, atol=1e-3)   # sums of up to 768 products in float32, in another order


def test_sums_over_images_are_float32_for_bfloat16():
  """Adding 1 to 256 in bfloat16 leaves 256."""
  x, w = jnp.ones((1023, 1, 1, 1), jnp.bfloat16), jnp.ones((1, 1, 1, 1), jnp.bfloat16)   # an odd number: image after image
  found = jax.grad(lambda w: jnp.sum(conv(x, w, (1, 1), 'SAME').astype(jnp.float32)))(w)
  assert found.dtype == jnp.bfloat16 and float(found[0, 0, 0, 0]) == 1024


def test_a_batch_that_is_spread_over_devices_stays_where_it_is():
  mesh = jax.make_mesh((8,), ('data',), axis_types=(AxisType.Auto,))
  x, w = jax.random.normal(jax.random.key(0), (64, 6, 6, 2)), jax.random.normal(jax.random.key(1), (3, 3, 2, 4))
  gradient = jax.jit(jax.grad(lambda w, x: jnp.sum(conv(x, w, (1, 1), 'SAME') ** 2)))
  spread = jax.device_put(x, NamedSharding(mesh, PartitionSpec('data'))), jax.device_put(w, NamedSharding(mesh, PartitionSpec()))
  program = gradient.lower(spread[1], spread[0]).compile().as_text()
  assert 'all-gather' not in program and 'all-reduce' in program
  np.testing.assert_allclose(gradient(spread[1], spread[0]), gradient(w, x), rtol=1e-4, atol=1e-2)


def replaced(net):
  """The forward function with its convolutions on CPUs by `conv`."""
  def wrapped(x):
    with hk.intercept_methods(on_cpus):
      return net(x)
  return wrapped


@pytest.mark.parametrize('options', [{}, {'with_bias': False}, {'w_init': hk.initializers.RandomNormal(), 'padding': 'VALID'},
                                     {'b_init': hk.initializers.RandomNormal()}])
def test_layer_is_haikus(options):
  ours, haikus = (hk.without_apply_rng(hk.transform(f(lambda x: hk.Conv2D(4, 3, 2, name='conv', **options)(x))))
                  for f in (replaced, lambda net: net))
  x = jax.random.normal(jax.random.key(0), (2, 7, 8, 3))
  params, expected = (net.init(jax.random.key(1), x) for net in (ours, haikus))
  jax.tree.map(np.testing.assert_array_equal, params, expected)
  np.testing.assert_allclose(ours.apply(params, x), haikus.apply(params, x), atol=1e-4)
  assert 'custom_vjp' in str(jax.make_jaxpr(ours.apply)(params, x))


def test_under_a_policy_of_bfloat16_layers_are_haikus():
  ours, haikus = (hk.without_apply_rng(hk.transform(f(lambda x: hk.Conv2D(4, 3)(x)))) for f in (replaced, lambda net: net))
  x = jax.random.normal(jax.random.key(0), (2, 7, 8, 3))
  with hk.mixed_precision.push_policy(hk.Conv2D, jmp.Policy(jnp.float32, jnp.bfloat16, jnp.bfloat16)):
    params = ours.init(jax.random.key(1), x)
    found, expected = (net.apply(params, x) for net in (ours, haikus))
  assert found.dtype == expected.dtype == jnp.bfloat16
  np.testing.assert_allclose(found.astype(np.float32), expected.astype(np.float32), rtol=1 / 64, atol=1 / 64)
  assert {x.dtype for x in jax.tree.leaves(params)} == {np.dtype('float32')}


def test_on_cpus_every_convolution_of_a_step_has_its_axes_in_order():
  """Others are slow inside a loop. Forward, both gradients, and the product with a Hessian that GraSP takes."""
  net = hk.without_apply_rng(hk.transform(replaced(lambda x: hk.Conv2D(4, 3, 2)(x))))
  x = jnp.zeros((2, 8, 8, 3))
  params = jax.eval_shape(net.init, jax.random.key(0), x)
  gradients = jax.grad(lambda p, x: jnp.sum(net.apply(p, x) ** 2), (0, 1))
  program = str(jax.make_jaxpr(lambda p, x: jax.jvp(gradients, (p, x), (p, x)))(params, x))
  orders = set(re.findall(r'(?:lhs|rhs|out)_spec=\([\d, ]+\)', program))
  assert orders == {'lhs_spec=(0, 3, 1, 2)', 'rhs_spec=(3, 2, 0, 1)', 'out_spec=(0, 3, 1, 2)'}
  assert NHWC == ('NHWC', 'HWIO', 'NHWC') and program.count('conv_general_dilated') >= 6


def test_images_smaller_than_the_kernel_are_a_product_of_matrices():
  """XLA's convolution takes 3 to 80 times as long there on CPUs."""
  x, w = jnp.zeros((2, 2, 2, 3)), jnp.zeros((3, 3, 3, 4))
  step = jax.grad(lambda x, w: jnp.sum(conv(x, w, (1, 1), 'SAME') ** 2), (0, 1))
  assert 'conv_general_dilated' not in str(jax.make_jaxpr(step)(x, w))


@pytest.mark.parametrize('size', [2, 8])
def test_all_products_have_the_precision_asked_for(size):
  """Of convolutions, and of those that are products of matrices; forward and both gradients."""
  layer = hk.without_apply_rng(hk.transform(replaced(lambda x: hk.Conv2D(4, 3)(x, precision=jax.lax.Precision.HIGHEST))))
  x = jnp.zeros((2, size, size, 3))
  params = jax.eval_shape(layer.init, jax.random.key(0), x)
  program = str(jax.make_jaxpr(jax.grad(lambda p, x: jnp.sum(layer.apply(p, x) ** 2), (0, 1)))(params, x))
  products = program.count('dot_general[') + program.count('conv_general_dilated[')
  assert products >= 5 and len(re.findall(r'precision=\(?(?:Precision\.)?HIGHEST', program)) == products


@pytest.mark.parametrize('size', [1, 2, 3])
def test_too_small_for_the_kernel_without_padding_gives_nothing(size):
  found = jax.vjp(lambda w: conv(jnp.ones((2, size, 8, 3)), w, (2, 2), 'VALID'), jnp.ones((4, 4, 3, 5)))
  assert found[0].shape == (2, 0, 3, 5) and not found[1](found[0])[0].any()


class Shifted(hk.Conv2D):
  """A layer that has a method of its own in place of Conv2D's."""

  def __call__(self, inputs):
    return super().__call__(inputs) + 1


@pytest.mark.parametrize('call', [lambda x: hk.Conv2D(4, 3)(inputs=x), lambda x: Shifted(4, 3)(x),
                                  lambda x: hk.Conv2D(4, 3)(x.tolist())])
def test_what_is_called_otherwise_is_left_to_haiku(call):
  x = np.random.default_rng(0).normal(size=(2, 4, 5, 3)).astype(np.float32)
  ours, haikus = (hk.without_apply_rng(hk.transform(f(call))) for f in (replaced, lambda net: net))
  params = haikus.init(jax.random.key(0), x)
  np.testing.assert_array_equal(ours.apply(params, x), haikus.apply(params, x))
  assert 'custom_vjp' not in str(jax.make_jaxpr(lambda params: ours.apply(params, x))(params))


def test_strides_beyond_the_kernel_cost_no_products():
  """Three of four pixels of a 1×1 convolution of stride 2 are under no tap."""
  x, w = jax.ShapeDtypeStruct((2, 8, 8, 3), jnp.float32), jax.ShapeDtypeStruct((1, 1, 3, 4), jnp.float32)
  step = jax.grad(lambda x, w: jnp.sum(conv(x, w, (2, 2), 'SAME') ** 2))
  outputs = re.findall(r'f32\[2,4,4,(\d+)\] = conv_general_dilated', str(jax.make_jaxpr(step)(x, w)))
  assert outputs == ['4', '3']   # forward, and the gradient at the pixels under the tap


def test_products_with_a_hessian_are_those_of_lax():
  x, w = (jax.random.normal(jax.random.key(i), shape) for i, shape in enumerate([(2, 7, 8, 3), (3, 3, 3, 4)]))
  def product(convolve):
    gradient = jax.grad(lambda w: jnp.sum(jnp.sin(convolve(x, w))))
    return jax.jit(lambda w: jax.jvp(gradient, (w,), (jnp.cos(w),))[1])(w)
  expected = product(lambda x, w: jax.lax.conv_general_dilated(x, w, (2, 2), 'SAME', dimension_numbers=NHWC))
  np.testing.assert_allclose(product(lambda x, w: conv(x, w, (2, 2), 'SAME')), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize('options', [{'rate': 2}, {'mask': jnp.ones((3, 3, 4, 4))}, {'feature_group_count': 2},
                                     {'padding': 'FULL'}, {'data_format': 'NCHW'}, {'padding': hk.pad.causal}])
def test_what_only_haiku_can_do_is_left_to_it(options):
  x = jax.random.normal(jax.random.key(0), (2, 4, 8, 4))
  ours, haikus = (hk.without_apply_rng(hk.transform(f(lambda x: hk.Conv2D(4, 3, **options)(x))))
                  for f in (replaced, lambda net: net))
  if options.get('padding') == 'FULL':   # Haiku's complaint, not another network
    with pytest.raises((RuntimeError, ValueError), match='FULL'):
      ours.init(jax.random.key(1), x)
    return
  params = haikus.init(jax.random.key(1), x)
  assert 'custom_vjp' not in str(jax.make_jaxpr(ours.apply)(params, x))
  np.testing.assert_array_equal(ours.apply(params, x), haikus.apply(params, x))


@pytest.mark.parametrize('model', MODELS)
def test_every_model_has_its_convolutions_replaced(model):
  _, net = build(ml_collections.ConfigDict({'model': model, 'bias_stddev': 0.0, 'compute': 'float32'}), 10)
  images = jax.ShapeDtypeStruct((2, 32, 32, 3), jnp.float32)
  params, state = jax.eval_shape(functools.partial(net.init, is_training=True), jax.random.key(0), images)
  program = str(jax.make_jaxpr(functools.partial(net.apply, is_training=True))(params, state, None, images))
  layers = [x for module in params.values() for name, x in module.items() if name == 'w' and x.ndim == 4]
  assert program.count('custom_vjp_call') == len(layers)

"""experiments.models: shapes and numbers of parameters by eval_shape, what they begin with, and running statistics."""

import functools
import math
import os

import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments import data, models
from experiments.errors import DataError
from experiments.models import MODELS
from powerprop import powerpropagation, statistics
from powerprop.reparam import is_weight, leaf_name

GREY, COLOUR = (28, 28, 1), (32, 32, 3)

# Entries of all parameters for ten classes, added up by hand from the published layer tables: weights, biases or BatchNorm's
# scale and offset.
PARAMETERS = {
  ('lenet_300_100', GREY): 266_610,
  ('mlp_100_100', GREY): 89_610,        # 78,500 + 10,100 + 1,010
  ('mlp_500_500', GREY): 648_010,       # 392,500 + 250,500 + 5,010
  ('mlp_2000_2000', GREY): 5_592_010,   # 1,570,000 + 4,002,000 + 20,010
  ('lenet_5', GREY): 431_080,           # 520 + 25,050 + 400,500 + 5,010
  ('lenet_5', COLOUR): 657_080,         # 1,520 + 25,050 + 625,500 + 5,010
  ('conv_16_32_64', COLOUR): 64_554,    # 448 + 4,640 + 18,496 + 40,970
  ('conv_32_64_128', COLOUR): 175_178,  # 896 + 18,496 + 73,856 + 81,930
  ('alexnet_small', COLOUR): 5_070_218,  # SNIP's 5.1 M: 5,066,784 weights and 3,434 biases
  ('resnet_20', COLOUR): 269_722,       # option A; 0.27 M in He et al.'s table 6. Option B would add 2,752.
  ('resnet_18', COLOUR): 11_173_962,
  ('wide_resnet_22_2', COLOUR): 1_079_642,
  ('wide_resnet_16_8', COLOUR): 10_961_370,  # 11.0 M in Zagoruyko and Komodakis' table 4
  ('resnet_50', COLOUR): 23_528_522,  # 25,557,032 for 1,000 classes, less 990 · 2,049
  ('resnet_50_eighth', COLOUR): 376_722,
}
LAYERS = {  # convolutional and dense ones, 1×1 shortcuts included
  'lenet_300_100': 3, 'mlp_100_100': 3, 'mlp_500_500': 3, 'mlp_2000_2000': 3, 'lenet_5': 4, 'conv_16_32_64': 4,
  'conv_32_64_128': 4, 'alexnet_small': 8,
  'resnet_20': 20, 'resnet_18': 21, 'wide_resnet_22_2': 23, 'wide_resnet_16_8': 17,
  'resnet_50': 54, 'resnet_50_eighth': 54,   # 1 + 16 · 3 + 4 + 1
}
BATCH_NORMS = {'resnet_20': 19, 'resnet_18': 20, 'wide_resnet_22_2': 19, 'wide_resnet_16_8': 13,
               'resnet_50': 53, 'resnet_50_eighth': 53}
# Cheap enough to be compiled and run.
SMALL = {'lenet_5': models.lenet_5, 'conv_16_32_64': MODELS['conv_16_32_64'],
         'resnet_8': functools.partial(models.resnet, (8, 16), 1, False),
         'wide_resnet_10_1': functools.partial(models.wide_resnet, 10, 1)}


def image_shape(name):
  return GREY if name.startswith(('lenet', 'mlp')) else COLOUR


def network(name, bias_stddev=0.0):
  return hk.without_apply_rng(hk.transform_with_state((MODELS | SMALL)[name](10, bias_stddev).forward))


@functools.cache
def shapes(name, image):
  return jax.eval_shape(lambda key: network(name).init(key, jnp.zeros((1, *image)), True), jax.random.key(0))


@functools.cache
def began(name):
  init = jax.jit(network(name).init, static_argnums=2, compiler_options={'xla_backend_optimization_level': '0'})
  return init(jax.random.key(0), jnp.zeros((1, *image_shape(name))), True)


def weights(tree):
  named = [(leaf_name(path), x) for path, x in jax.tree_util.tree_leaves_with_path(tree)]
  return {name: x for name, x in named if is_weight(name, x)}


@pytest.mark.parametrize(('name', 'image'), PARAMETERS)
def test_number_of_parameters(name, image):
  params, _ = shapes(name, image)
  assert sum(math.prod(x.shape) for x in jax.tree.leaves(params)) == PARAMETERS[name, image]
  assert len(weights(params)) == LAYERS[name]


@pytest.mark.parametrize('name', list(MODELS))
def test_every_row_has_a_count(name):
  assert name in {known for known, _ in PARAMETERS}


@pytest.mark.parametrize('is_training', [False, True])
@pytest.mark.parametrize('name', list(MODELS))
def test_logits_by_shape(name, is_training):
  image = image_shape(name)
  params, state = shapes(name, image)
  apply = functools.partial(network(name).apply, is_training=is_training)
  logits, new = jax.eval_shape(apply, params, state, images=jax.ShapeDtypeStruct((7, *image), jnp.float32))
  assert logits.shape == (7, 10) and logits.dtype == jnp.float32
  assert jax.tree.map(lambda x: (x.shape, x.dtype), new) == jax.tree.map(lambda x: (x.shape, x.dtype), state)


@pytest.mark.parametrize('name', list(MODELS))
def test_first_and_output_layer_are_named(name):
  model, (params, _) = MODELS[name](10, 0.0), shapes(name, image_shape(name))
  found, image = weights(params), image_shape(name)
  assert found[model.output_layer].shape[-1] == 10
  assert found[model.first_layer].shape[-2] == (math.prod(image) if name.startswith(('lenet_300', 'mlp')) else image[-1])


@pytest.mark.parametrize('name', list(MODELS))
def test_batch_norm_is_said(name):
  _, state = shapes(name, image_shape(name))
  assert MODELS[name](10, 0.0).batch_norm == (name in BATCH_NORMS) == bool(jax.tree.leaves(state))
  assert sum(module.endswith('mean_ema') for module in state) == BATCH_NORMS.get(name, 0)


def test_lenet_300_100_is_haikus_mlp_to_the_last_bit():
  images = jax.random.uniform(jax.random.key(1), (5, *GREY))
  plain = hk.without_apply_rng(hk.transform(lambda x: hk.nets.MLP([300, 100, 10])(x.reshape(len(x), -1))))
  expected = plain.init(jax.random.key(0), images)
  params, state = network('lenet_300_100').init(jax.random.key(0), images, True)
  assert list(params) == ['mlp/~/linear_0', 'mlp/~/linear_1', 'mlp/~/linear_2'] and not state
  jax.tree.map(np.testing.assert_array_equal, params, expected)
  logits, _ = network('lenet_300_100').apply(params, state, images, False)
  np.testing.assert_array_equal(logits, plain.apply(expected, images))


def test_lenet_5_against_numpy():
  images = np.random.default_rng(0).random((2, *GREY))
  params, state = began('lenet_5')
  found, _ = network('lenet_5').apply(params, state, jnp.asarray(images, jnp.float32), False)
  p = jax.tree.map(lambda x: np.asarray(x, np.float64), params)

  def layer(x, w):
    windows = np.lib.stride_tricks.sliding_window_view(x, w.shape[:2], axis=(1, 2))  # [B, H', W', C, h, w]
    return np.einsum('bijchw,hwco->bijo', windows, w)

  def pool(x):
    return np.maximum(np.maximum(x[:, ::2, ::2], x[:, 1::2, ::2]), np.maximum(x[:, ::2, 1::2], x[:, 1::2, 1::2]))

  x = pool(layer(pool(layer(images, p['conv_0']['w'])), p['conv_1']['w'])).reshape(2, -1)
  expected = np.maximum(x @ p['dense']['w'], 0) @ p['output']['w']
  np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)  # float32 over sums of 800


def test_max_pool_of_an_odd_size_leaves_the_last_out():
  x = jnp.arange(15.0).reshape(1, 3, 5, 1)
  assert models.max_pool(x)[0, :, :, 0].tolist() == [[6, 8]]


@pytest.mark.parametrize('name', SMALL)
def test_weights_begin_as_said(name):
  params, _ = began(name)
  for leaf, x in weights(params).items():
    x = np.asarray(x, np.float64)
    fan_in = math.prod(x.shape[:-1])
    stddev = math.sqrt((0.1 if leaf == 'output/w' else 2) / fan_in)
    assert np.all(x != 0)
    assert np.abs(x).max() < 2 * stddev / 0.8796  # the standard deviation of a normal distribution cut at 2 is 0.8796
    # Four standard errors of a standard deviation from n draws, for a distribution flatter than the normal one.
    assert abs(x.std() / stddev - 1) < 4 / math.sqrt(2 * x.size)


@pytest.mark.parametrize('name', SMALL)
def test_logits_begin_small(name):
  images = np.random.default_rng(0).random((16, *image_shape(name)), np.float32)
  logits, _ = jax.jit(network(name).apply, static_argnums=3)(*began(name), images, True)
  losses = -jax.nn.log_softmax(logits)   # for each label that an image might have
  assert abs(float(losses.mean()) - math.log(10)) < 0.3
  assert 0.01 < float(logits.std()) < 1


def test_statistics_move_in_training_only():
  net, (params, state) = network('resnet_8'), began('resnet_8')
  apply = jax.jit(net.apply, static_argnums=3)
  images = jax.random.uniform(jax.random.key(1), (16, *COLOUR))
  trained, once = apply(params, state, images, True)
  logits, same = apply(params, once, images, False)
  jax.tree.map(np.testing.assert_array_equal, same, once)
  assert all(np.any(x != y) for x, y in zip(jax.tree.leaves(state), jax.tree.leaves(once), strict=True))
  # Bias correction: after one update the averages are the batch's own statistics.
  np.testing.assert_allclose(logits, trained, atol=1e-3)
  other, _ = apply(params, once, images[:4], False)
  np.testing.assert_allclose(other, logits[:4], atol=1e-4)   # no image depends on the rest of its batch
  stem = params['stem']['w']
  x = jax.lax.conv_general_dilated(models.normalise(images), stem, (1, 1), 'SAME', dimension_numbers=('NHWC', 'HWIO', 'NHWC'))
  np.testing.assert_allclose(once['norm_stem/~/mean_ema']['average'].ravel(), x.mean((0, 1, 2)), atol=1e-4)


def test_biases_of_a_given_size():
  net = network('conv_16_32_64', 0.5)
  params, _ = net.init(jax.random.key(0), jnp.zeros((1, *COLOUR)), True)
  plain, _ = began('conv_16_32_64')
  assert all(np.all(layer['b'] == 0) for layer in plain.values())
  found = np.concatenate([np.asarray(layer['b']) for layer in params.values()])
  assert np.all(found != 0) and np.abs(found).max() < 1   # cut at two standard deviations


def test_grey_images_are_not_normalised():
  images = jax.random.uniform(jax.random.key(0), (2, *GREY))
  np.testing.assert_array_equal(models.normalise(images), images)


def test_cifar_constants_are_those_of_the_training_set(monkeypatch):
  if 'POWERPROP_DATA' not in os.environ:
    monkeypatch.setenv('TFDS_DATA_DIR', '/nonexistent')
  try:
    images = data.load('cifar10').train_images
  except DataError as error:
    if 'not found' not in str(error):
      raise
    pytest.skip('CIFAR-10 is not on this machine')
  counts = np.stack([np.bincount(images[..., c].ravel(), minlength=256) for c in range(3)])
  levels, n = np.arange(256) / 255, images.size // 3
  mean = counts @ levels / n
  np.testing.assert_allclose(models.CIFAR_MEAN, mean, atol=1e-8)
  np.testing.assert_allclose(models.CIFAR_STDDEV, np.sqrt(counts @ levels**2 / n - mean**2), atol=1e-8)
  some = np.asarray(models.normalise(jnp.asarray(images[:5000], jnp.float32) / 255), np.float64)
  np.testing.assert_allclose(some.mean((0, 1, 2)), 0, atol=0.03)
  np.testing.assert_allclose(some.std((0, 1, 2)), 1, atol=0.03)


def test_steps_of_a_resnet_18_are_eleven_times_smaller_at_alpha_2():
  """E[(2|φ|)²] = 4 E|θ| by the mean of a normal distribution cut at 2 sd: 1/0.087 is the factor for its learning rate."""
  net = hk.transform_with_state(MODELS['resnet_18'](10, 0.0).forward)
  params, _ = jax.jit(lambda key: net.init(key, jnp.zeros((1, *COLOUR)), True))(jax.random.key(0))
  reparam = powerpropagation(2.0)
  found = float(statistics.mean_squared_slope(reparam, reparam.inverse(params)))
  inside = math.erf(2 / math.sqrt(2))
  mean = 2 * (1 - math.exp(-2)) / math.sqrt(2 * math.pi) / inside   # of |z|, z normal and cut at 2
  sd = math.sqrt(1 - 4 * math.exp(-2) / math.sqrt(2 * math.pi) / inside)   # of z: Haiku scales by it
  total = count = 0.0
  for path, x in jax.tree_util.tree_leaves_with_path(params):
    if is_weight(leaf_name(path), x):
      scale = 0.1 if leaf_name(path) == 'output/w' else 2.0
      total += 4 * mean / sd * math.sqrt(scale / math.prod(x.shape[:-1])) * x.size
      count += x.size
  assert found == pytest.approx(total / count, rel=1e-3) and found == pytest.approx(0.087, abs=5e-4)

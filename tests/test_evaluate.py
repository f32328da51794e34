"""Evaluation: counts, masks, accuracies and statistics against NumPy in float64."""
import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments import evaluate, train

OUTPUT = 'mlp/~/linear_1/w'
SHAPES = {'mlp/~/linear_0': {'w': (12, 20), 'b': (20,)}, OUTPUT[:-2]: {'w': (20, 4), 'b': (4,)}}
NET = hk.transform_with_state(lambda x, is_training: hk.nets.MLP([20, 4])(hk.Flatten()(x)))
NONE = np.zeros((1, 1, 3, 4, 1), np.uint8)   # images to recalibrate with


def make_params(k, seed=0):
  rng = np.random.default_rng(seed)
  return {layer: {leaf: rng.normal(size=(k, *shape)).astype(np.float32) for leaf, shape in leaves.items()}
          for layer, leaves in SHAPES.items()}


def make_data(count, seed):
  rng = np.random.default_rng(seed)
  return train.Batches(rng.integers(0, 256, (count, 3, 4, 1), np.uint8), rng.integers(0, 4, count, np.int32))


def of_net(params, k):
  return {layer: {leaf: x[k].astype(np.float64) for leaf, x in leaves.items()} for layer, leaves in params.items()}


def numpy_logits(theta, images):
  x = images.reshape(len(images), -1).astype(np.float64) / 255
  x = np.maximum(x @ theta['mlp/~/linear_0']['w'] + theta['mlp/~/linear_0']['b'], 0)
  return x @ theta[OUTPUT[:-2]]['w'] + theta[OUTPUT[:-2]]['b']


def numpy_hits(theta, data):
  return int(np.sum(np.argmax(numpy_logits(theta, data.images), 1) == data.labels))


def numpy_masks(theta, counts, scope):
  """Layer → mask of its weights. Random floats have no ties, so any exact sort gives the same."""
  sizes = [np.abs(theta[layer]['w']) for layer in SHAPES]
  if scope == 'global':
    threshold = np.sort(np.concatenate([x.ravel() for x in sizes]))[-sum(counts)]
    return {layer: x >= threshold for layer, x in zip(SHAPES, sizes, strict=True)}
  return {layer: x >= np.sort(x.ravel())[-k] if k else np.zeros(x.shape, bool)
          for layer, x, k in zip(SHAPES, sizes, counts, strict=True)}


def trees(counts):
  """[hidden, output] → tree of counts."""
  return {'mlp/~/linear_0': {'w': counts[0], 'b': None}, OUTPUT[:-2]: {'w': counts[1], 'b': None}}


# ---- counts --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize('p, hidden, middle, output', [
  (0.01, 2352, 300, 20),
  (0.1, 23520, 3000, 200),
  (0.2575, 60564, 7725, 515),   # p n without a remainder in decimals
  (0.48329302385717527, 113670, 14498, 966),   # a density of the sweep: int() cuts off
  (0.5, 117600, 15000, 1000),
  (0.6, 141120, 18000, 1000),   # the output layer is whole from one half on
  (1.0, 235200, 30000, 1000),
])
def test_layer_counts_of_lenet(p, hidden, middle, output):
  shapes = {f'mlp/~/linear_{i}': {'w': np.zeros(shape, bool), 'b': np.zeros(shape[1:], bool)}
            for i, shape in enumerate([(784, 300), (300, 100), (100, 10)])}
  (found,) = evaluate.layer_counts(shapes, [p], 'mlp/~/linear_2/w', 2.0)
  assert [found[f'mlp/~/linear_{i}'] for i in range(3)] == [{'w': k, 'b': None} for k in (hidden, middle, output)]


def test_layer_counts_follow_the_factor_and_know_the_layer():
  theta = jax.tree.map(lambda x: x[0], make_params(1))
  found = evaluate.layer_counts(theta, [0.1, 0.3, 1.0], OUTPUT, 3.0)
  assert found == [trees([24, 24]), trees([72, 72]), trees([240, 80])]   # of 240 and 80 weights
  with pytest.raises(ValueError, match=r"no leaf is called 'head/w'; there are .*'mlp/~/linear_1/w'"):
    evaluate.layer_counts(theta, [0.1], 'head/w', 2.0)


# ---- masks, overlap, accuracy --------------------------------------------------------------------------------------


def test_networks_of_a_group_as_in_numpy():
  """Three networks on two devices, two scopes, five densities, validation and test: all numbers of an Evaluation."""
  scopes, seeds = ('layer', 'global'), np.arange(3, dtype=np.int32)
  theta0, theta = make_params(3, seed=1), make_params(3, seed=2)
  theta = jax.tree.map(lambda a, b: np.float32(0.6 * a + 0.8 * b), theta0, theta)   # masks that partly agree
  validation, test = make_data(700, seed=3), make_data(1300, seed=4)   # more images than go at once, and no multiple
  densities = [0.004, 0.05, 0.2, 0.5, 1.0]
  counts = [(0, 0), (12, 8), (48, 32), (120, 80), (240, 80)]   # int(p 240), int(min(1, 2p) 80), worked out by hand
  rows = evaluate.layer_counts(jax.tree.map(lambda x: x[0], theta), densities, OUTPUT, 2.0)
  assert rows == [trees(row) for row in counts]
  stacked = jax.tree.map(lambda *k: np.array(k, np.int32), *rows)

  mesh = jax.make_mesh((2,), (train.NETS,), axis_types=(jax.sharding.AxisType.Auto,), devices=jax.devices()[:2])
  (slots,) = train.deal(train.Nets(seeds, *np.ones((2, 3), np.float32)), 1, 2)
  before, after = train.scatter([theta0, theta], [slots, slots])
  found = evaluate.make_evaluate(NET, scopes, mesh)(before, after, {}, None, slots.number, stacked, trees([24, 16]), NONE,
                                                     validation, test)
  (found,) = train.gather([jax.tree.map(np.asarray, found)], [slots])

  for k in range(3):
    start, end = of_net(theta0, k), of_net(theta, k)
    for (s, scope), (d, pair) in ((a, b) for a in enumerate(scopes) for b in enumerate(counts)):
      if scope == 'global' and sum(pair) == 0:
        masks = old = {layer: np.zeros(end[layer]['w'].shape, bool) for layer in SHAPES}
      else:
        masks, old = numpy_masks(end, pair, scope), numpy_masks(start, pair, scope)
      assert sum(int(m.sum()) for m in masks.values()) == sum(pair) == found.kept[k, s, d]
      agree = np.concatenate([(masks[layer] == old[layer]).ravel() for layer in SHAPES])
      np.testing.assert_allclose(found.overlap[k, s, d], agree.mean(), rtol=1e-6)   # float32
      pruned = {layer: {'w': np.where(masks[layer], leaves['w'], 0), 'b': leaves['b']} for layer, leaves in end.items()}
      assert found.validation[k, s, d] == numpy_hits(pruned, validation)
      assert found.test[k, s, d] == numpy_hits(pruned, test)
  assert found.kept.dtype == found.test.dtype == np.int32
  assert len(np.unique(found.test)) > 12   # the comparisons can fail: nets, scopes and densities differ


def test_hits_of_more_images_than_go_at_once():
  theta, data = jax.tree.map(lambda x: x[0], make_params(1)), make_data(2 * evaluate.IMAGES_AT_ONCE + 137, seed=5)
  assert evaluate.hits(NET, theta, {}, data) == numpy_hits(of_net(make_params(1), 0), data)


def two_layers(first, second, bias):
  return {'a': {'w': first, 'b': bias}, 'c': {'w': second, 'b': bias}}


def test_select_by_layer_and_over_all_layers():
  theta = two_layers(jnp.array([[5., -4., 0.5], [3., 0., -0.1]]), jnp.array([[1.], [-2.], [0.2]]), jnp.array([9.]))
  counts = two_layers(2, 2, None)
  found = jax.jit(lambda theta: {scope: evaluate.select(theta, counts, scope) for scope in ('layer', 'global')})(theta)
  # The same total, and biases have no mask.
  assert jax.tree.map(lambda m: m.astype(int).tolist(), found) == {
    'layer': two_layers([[1, 1, 0], [0, 0, 0]], [[1], [1], [0]], None),
    'global': two_layers([[1, 1, 0], [1, 0, 0]], [[0], [1], [0]], None)}


# ---- statistics and samples ----------------------------------------------------------------------------------------


def test_weight_statistics_by_hand():
  theta0 = two_layers(jnp.array([[.1, -.2, .3, -.4]]), jnp.array([[.1], [.2], [.3], [-.4]]), jnp.full(4, 50.))
  theta = two_layers(jnp.array([[3., .2, -2., -.1]]), jnp.array([[0.], [1.], [-5.], [-4.]]), jnp.full(4, -50.))
  survivors = evaluate.select(theta, two_layers(1, 3, None), 'layer')
  found = jax.jit(evaluate.weight_statistics)(theta0, theta, survivors)
  # Of the eight weights survive 3 in the first layer, 1, −5 and −4 in the second. The signs of −.2 and .3 change, and of the
  # other .3; −5 survives.
  assert found['sign_flips'] == pytest.approx(3 / 8)
  assert found['survivor_sign_flips'] == pytest.approx(1 / 4)
  # The smaller half of each layer are .1 and .2: 3 and 1 come from there; of the four that are pruned, −.2's .2 and 0's .1.
  assert found['survivors_from_smaller_half'] == pytest.approx(2 / 4)
  x = np.array([3., .2, -2., -.1, 0., 1., -5., -4.])
  x = x - x.mean()
  assert found['kurtosis'] == pytest.approx(np.mean(x**4) / np.mean(x**2) ** 2 - 3, rel=1e-5)


def test_sample_weights():
  theta0 = two_layers(np.arange(12.).reshape(3, 4), 12. + np.arange(8.).reshape(4, 2), np.full(4, 99.))
  theta = jax.tree.map(lambda x: -x - 100, theta0)
  kept = two_layers(theta0['a']['w'] % 3 == 0, theta0['c']['w'] % 3 == 0, None)
  found = evaluate.sample_weights(theta0, theta, kept, 15)
  drawn = found['initial']
  assert len(set(drawn.tolist())) == 15 and set(drawn.tolist()) <= set(range(20))   # without replacement, no biases
  np.testing.assert_array_equal(found['final'], -drawn - 100)   # each weight with its own values
  np.testing.assert_array_equal(found['kept'], drawn % 3 == 0)
  again = evaluate.sample_weights(theta0, theta, kept, 15)
  jax.tree.map(np.testing.assert_array_equal, again, found)
  everything = evaluate.sample_weights(theta0, theta, kept, 10_000)
  assert sorted(everything['initial'].tolist()) == list(range(20))


# ---- BatchNorm -----------------------------------------------------------------------------------------------------

NORMALISED = hk.transform_with_state(lambda x, is_training: hk.Linear(4, name='second')(hk.BatchNorm(True, True, 0.5)(
    hk.Linear(6, name='first')(hk.Flatten()(x)), is_training)))


def numpy_normalised(theta, images, mean, variance):
  x = images.reshape(len(images), -1) / 255 @ theta['first']['w'] + theta['first']['b']
  scale, offset = (theta['batch_norm'][name].reshape(1, -1) for name in ('scale', 'offset'))
  x = (x - mean) / np.sqrt(variance + 1e-5) * scale + offset
  return x @ theta['second']['w'] + theta['second']['b']


def test_batches_to_recalibrate_with_are_training_images_changed_as_in_training():
  """Random ones of the set, and each batch by a key of its own."""
  images = make_data(30, 3).images
  found = np.asarray(jax.jit(lambda x: evaluate.recalibration_batches(x, 4, 20, lambda key, images: 255 - images))(images))
  assert found.shape == (4, 20, 3, 4, 1) and found.dtype == np.uint8
  where = [[np.flatnonzero((images == 255 - x).all((1, 2, 3))) for x in batch] for batch in found]
  assert all(len(at) == 1 for batch in where for at in batch)
  assert len({int(at[0]) for batch in where for at in batch}) > 20   # of 30, 80 draws
  noise = np.asarray(jax.jit(lambda x: evaluate.recalibration_batches(
    x, 4, 20, lambda key, images: jax.random.bits(key, images.shape, jnp.uint8)))(images))
  assert len({x.tobytes() for x in noise}) == 4


def test_batch_norm_is_recalibrated_after_pruning():
  """Averages of decay ½ over three batches, and the accuracies at two densities, in float64; without it those of training."""
  rng = np.random.default_rng(1)
  theta, state = NORMALISED.init(jax.random.key(3), jnp.zeros((1, 3, 4, 1)), True)
  theta = jax.tree.map(lambda x: np.float32(x + 0.1 * rng.normal(size=x.shape)), theta)
  _, state = NORMALISED.apply(theta, state, None, make_data(40, 5).images / np.float32(255), True)
  batches = np.stack([make_data(20, seed).images for seed in (6, 7, 8)])
  counts = {'first': {'w': np.array([8, 72], np.int32), 'b': None}, 'second': {'w': np.array([6, 24], np.int32), 'b': None},
            'batch_norm': {'scale': None, 'offset': None}}
  figure = jax.tree.map(lambda k: int(k[0]), counts)
  data = make_data(300, 9)
  scopes = ('layer', 'layer recalibrated')
  found = jax.jit(lambda: evaluate.evaluate_net(NORMALISED, scopes, theta, theta, state, None, counts, figure, batches, data,
                                                data))()
  wide = jax.tree.map(lambda x: np.asarray(x, np.float64), theta)
  old = jax.tree.map(np.asarray, state)
  for d in range(2):
    pruned = {layer: dict(leaves) for layer, leaves in wide.items()}
    for layer in ('first', 'second'):
      w = wide[layer]['w']
      pruned[layer]['w'] = np.where(np.abs(w) >= np.sort(np.abs(w).ravel())[-counts[layer]['w'][d]], w, 0)
    # Haiku keeps a sum that fades and divides it by what the weights of its terms add up to.
    sums = {name: np.asarray(old[f'batch_norm/~/{name}_ema']['hidden'], np.float64).reshape(1, -1) for name in ('mean', 'var')}
    for images in batches:
      x = images.reshape(20, -1) / 255 @ pruned['first']['w'] + pruned['first']['b']
      sums = {'mean': 0.5 * sums['mean'] + 0.5 * x.mean(0), 'var': 0.5 * sums['var'] + 0.5 * x.var(0)}
    new = [sums[name] / (1 - 0.5 ** 4) for name in ('mean', 'var')]
    before = [np.asarray(old[f'batch_norm/~/{name}_ema']['average'], np.float64).reshape(1, -1) for name in ('mean', 'var')]
    for s, (mean, variance) in enumerate((before, new)):
      hits = np.sum(np.argmax(numpy_normalised(pruned, data.images, mean, variance), 1) == data.labels)
      assert found.test[s, d] == found.validation[s, d] == hits
  assert found.test[0, 0] != found.test[1, 0]

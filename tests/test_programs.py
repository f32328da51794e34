"""One network on all devices: the step is that of the sweeps, whatever the layout; precision, parts of BatchNorm, checkpoints."""
import collections
import functools
import math
import re

import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_photographs import network

from configs import imagenette
from experiments import convolution, models, programs, train
from experiments.data.images import Batch
from experiments.models import MODELS
from powerprop import masks

SIZE, BATCH, CLASSES = 12, 16, 4


@pytest.fixture(scope='module', autouse=True)
def tiny():
  with pytest.MonkeyPatch.context() as patch:
    patch.setitem(MODELS, 'tiny_photographs', network)
    yield


def make_config(variant='rigl_powerprop', **change):
  config = imagenette.get_config(variant)
  with config.unlocked():
    config.update_from_flattened_dict({
        'model': 'tiny_photographs', 'batch_size': BATCH, 'stream.image_size': SIZE, 'stream.classes': CLASSES, 'steps': 40,
        'sparse.every_steps': 2, 'sweep.sparsity': (0.5,) if variant.partition('_')[0] != 'dense' else (0.0,),
        'sweep.learning_rate': (0.1,)} | change)
  return config


def batches(count, seed=0):
  rng = np.random.default_rng(seed)
  return [(rng.integers(0, 256, (BATCH, SIZE, SIZE, 3), np.uint8), rng.integers(0, CLASSES, BATCH, np.int32))
          for _ in range(count)]


def to_numpy(tree):
  def leaf(x):
    return np.asarray(jax.random.key_data(x) if jax.dtypes.issubdtype(x.dtype, jax.dtypes.prng_key) else x)
  return jax.tree.map(leaf, tree)


def trained(steps=6, **change):
  setting = programs.prepare(make_config(**change))
  running, step = programs.make_first(setting)(None), programs.make_step(setting)
  losses = []
  for n, (pictures, labels) in enumerate(batches(steps)):
    running, loss = step(running, n, pictures, labels)
    losses.append(float(loss))
  return setting, to_numpy(running), losses


@functools.cache
def began(classes=CLASSES):
  """Initial weights and network state, by a program that is quickly compiled."""
  net = hk.transform_with_state(network(classes, 0.0).forward)
  first = functools.partial(programs.first_weights, net, (SIZE, SIZE, 3))
  return jax.jit(first, compiler_options={'xla_backend_optimization_level': 0})(0)


def close(found, wanted, **tolerance):
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, **tolerance), found, wanted)


@pytest.fixture(scope='module')
def plain():
  return trained()


def test_the_step_is_that_of_the_sweeps(plain):
  """train.train_step on one device, batch by batch; losses and states after six steps, with three updates of masks."""
  setting, running, losses = plain
  theta, net_state = began()
  state = jax.jit(lambda *first: train.first_state(setting.net, setting.group, *first, 0, 0.1))(theta, net_state)
  tx = setting.group.optimizer(0.1, train.stream(0, train.MASKS), None)
  one = jax.jit(functools.partial(train.train_step, train.make_loss(setting.net, 0.1), setting.group, tx))
  expected, kept = [], []
  for n, (pictures, labels) in enumerate(batches(6)):
    kept.append(np.mean([float(k) / m.size for k, m in zip(jax.tree.leaves(state.opt_state.kept.forward),
                                                          jax.tree.leaves(state.opt_state.masks.forward), strict=True)]))
    state, loss = one(state, n, pictures / np.float32(255), labels)
    expected.append(float(loss))
  np.testing.assert_allclose(losses, expected, rtol=1e-5)
  jax.tree.map(np.testing.assert_array_equal, running.state.opt_state.masks, jax.tree.map(np.asarray, state.opt_state.masks))
  close(running.state.phi, jax.tree.map(np.asarray, state.phi), rtol=0, atol=1e-5)
  np.testing.assert_allclose(running.tally.loss, np.sum(expected), rtol=1e-5)
  assert running.guard.step == -1 and not running.guard.leaves.any()


def test_a_step_without_a_branch_is_the_same(plain):
  setting, running, losses = plain
  found, step = programs.make_first(setting)(None), programs.make_step(setting)
  due = train.at_steps(setting.group.due, np.arange(1, 7)).tolist()
  assert due == [False, True] * 3   # with every_steps = 2
  for n, (pictures, labels) in enumerate(batches(6)):
    found, loss = step(found, n, pictures, labels, due[n])
    np.testing.assert_allclose(loss, losses[n], rtol=1e-5)
  found = to_numpy(found)
  jax.tree.map(np.testing.assert_array_equal, found.state.opt_state.masks, running.state.opt_state.masks)
  close(found.state.phi, running.state.phi, rtol=0, atol=1e-5)


@pytest.mark.parametrize('change', [{'stream.shards': 4}])
def test_alike_however_it_is_laid_out(plain, change, monkeypatch):
  """Sums in another order: losses within 1e-5 after six steps, masks the same."""
  monkeypatch.setattr(programs, 'SHARDED_FROM', 64)
  setting, running, losses = trained(**change)
  shared = [place for place in jax.tree.leaves(programs.layout(setting.shapes, setting.mesh)) if not place.is_fully_replicated]
  assert len(shared) >= 5   # φ, its momentum and masks of the larger layers
  np.testing.assert_allclose(losses, plain[2], rtol=1e-5)
  jax.tree.map(np.testing.assert_array_equal, running.state.opt_state.masks, plain[1].state.opt_state.masks)


def test_layout_takes_the_largest_axis_that_divides():
  mesh = jax.make_mesh((2, 4), programs.AXES, axis_types=(jax.sharding.AxisType.Auto,) * 2)
  shapes = {'big': (3, 3, 64, 128), 'odd': (129, 256), 'small': (8, 8), 'none': (129, 1001), 'vector': (2**15,)}
  found = programs.layout({k: jax.ShapeDtypeStruct(v, jnp.float32) for k, v in shapes.items()}, mesh)
  assert {k: v.shard_shape(shapes[k]) for k, v in found.items()} == {
      'big': (3, 3, 64, 32), 'odd': (129, 64), 'small': (8, 8), 'none': (129, 1001), 'vector': (2**13,)}


def test_batch_norm_over_parts():
  """Two parts of a batch: the mean of the losses of each by itself, and of the averages."""
  setting = programs.prepare(make_config())
  theta, net_state = began()
  (pictures, labels), = batches(1)
  pictures = pictures / np.float32(255)
  loss_fn = train.make_loss(setting.net)
  loss_fn = jax.jit(loss_fn)
  halves = [loss_fn(theta, net_state, pictures[i:i + 8], labels[i:i + 8]) for i in (0, 8)]
  loss, state = jax.jit(programs.in_parts(loss_fn, 2))(theta, net_state, pictures, labels)
  np.testing.assert_allclose(loss, (halves[0][0] + halves[1][0]) / 2, rtol=1e-6)
  close(state, jax.tree.map(lambda a, b: (a + b) / 2, halves[0][1], halves[1][1]), rtol=1e-5, atol=1e-6)
  assert abs(float(loss) - float(loss_fn(theta, net_state, pictures, labels)[0])) > 1e-4
  assert programs.in_parts(loss_fn, 1) is loss_fn


def test_bfloat16_is_for_products_alone(plain):
  setting, running, losses = trained(**{'compute': 'bfloat16'})
  stored = jax.tree.leaves((running.state.phi, running.state.net_state))
  assert {str(x.dtype) for x in stored} == {'float32', 'int32'}
  np.testing.assert_allclose(losses, plain[2], rtol=0.03)   # 8 bits of mantissa
  assert losses != plain[2]
  theta, net_state = began()
  text = str(jax.make_jaxpr(lambda p, s, x: setting.net.apply(p, s, None, x, True)[0])(
      theta, net_state, jnp.zeros((2, SIZE, SIZE, 3))))
  products = [line for line in text.splitlines() if 'conv_general_dilated' in line or 'dot_general' in line]
  assert len(products) == 3 and all(':bf16[' in line for line in products[:2]) and ':f32[' in products[2]   # the classifier's
  assert setting.net.apply(theta, net_state, None, jnp.zeros((2, SIZE, SIZE, 3)), False)[0].dtype == jnp.float32


def test_bfloat16_is_for_our_convolutions_too():
  """The others are Haiku's. The classifier's product and bias are float32: no logit is on bfloat16's grid."""
  def forward(images, is_training):
    with hk.intercept_methods(convolution.on_cpus):
      x = hk.Conv2D(8, 3, name='first')(images)
    return hk.Linear(5, b_init=hk.initializers.Constant(1 / 3))(x.mean((1, 2)))
  net = hk.without_apply_rng(hk.transform(lambda x: models.in_precision(forward, jnp.bfloat16)(x, True)))
  pictures = jax.random.uniform(jax.random.key(0), (4, SIZE, SIZE, 3))
  theta = net.init(jax.random.key(1), pictures)
  assert {str(x.dtype) for x in jax.tree.leaves(theta)} == {'float32'}
  text = str(jax.make_jaxpr(net.apply)(theta, pictures))
  (product,) = [line for line in text.splitlines() if 'conv_general_dilated' in line]
  assert ':bf16[' in product
  logits = net.apply(theta, pictures)
  assert (logits != logits.astype(jnp.bfloat16).astype(jnp.float32)).all()


def test_no_slope_vanishes_under_bfloat16():
  """It is made of float32: of weights of 1e-6 under α = 3, to 1e-5 of itself, where bfloat16 has 4e-3."""
  setting = programs.prepare(make_config('dense_powerprop', **{'compute': 'bfloat16', 'sweep.alpha': (3.0,)}))
  phi = setting.group.reparam.inverse(jax.tree.map(
      lambda x: jnp.full_like(x, 1e-6), began()[0]))
  slope = setting.group.reparam.slope(phi)
  for name in ('first', 'second', 'output'):
    np.testing.assert_allclose(slope[name]['w'], 3 * 10 ** (-6 * 2 / 3), rtol=1e-5)


def test_a_step_that_is_not_finite_is_found_with_its_layers():
  setting = programs.prepare(make_config('dense'))
  running, step = programs.make_first(setting)(None), programs.make_step(setting)
  phi = jax.tree.map(jnp.copy, running.state.phi)
  phi['second']['w'] = phi['second']['w'].at[0, 0, 0, 0].set(jnp.inf)
  for n, (pictures, labels) in enumerate(batches(3)):
    if n == 1:
      running = running._replace(state=running.state._replace(phi=phi))
    running, _ = step(running, n, pictures, labels)
  assert running.guard.step == 2   # the second step, and not the third, which is as bad
  assert running.guard.leaves.any()


def test_cut_gives_the_sums_and_begins_anew(plain):
  setting = plain[0]
  running, step, cut = programs.make_first(setting)(None), programs.make_step(setting), programs.make_cut(setting)
  losses = []
  for n, (pictures, labels) in enumerate(batches(2)):
    running, loss = step(running, n, pictures, labels)
    losses.append(float(loss))
  running, sums = cut(running)
  np.testing.assert_allclose(sums.tally.loss, sum(losses), rtol=1e-6)
  assert float(running.tally.loss) == 0
  running, sums = cut(running)
  assert float(sums.tally.loss) == 0 and sums.guard.step == -1


@pytest.mark.parametrize('shards', [4])
def test_checkpoints_hold_the_state_to_the_bit(shards, monkeypatch):
  monkeypatch.setattr(programs, 'SHARDED_FROM', 64)
  setting = programs.prepare(make_config(**{'stream.shards': shards}))
  state = programs.make_first(setting)(None).state
  to, back = programs.in_checkpoints(state, setting.mesh)
  packed = to(state)
  sizes = [x.size for x in jax.tree.leaves(state.opt_state.masks)]
  assert [x.shape for x in jax.tree.leaves(packed.opt_state.masks)] == [(1, -(-n // 8)) for n in sizes]
  again = back(packed)
  jax.tree.map(np.testing.assert_array_equal, to_numpy(again), to_numpy(state))
  assert [x.sharding.is_equivalent_to(y.sharding, x.ndim) for x, y in zip(
      jax.tree.leaves(again), jax.tree.leaves(state), strict=True)].count(False) == 0


def test_scores():
  """Against NumPy: argmax, the five likeliest, cross-entropy; images of no label are left out."""
  setting = programs.prepare(make_config('dense', **{'stream.classes': 7}))
  theta, net_state = began(7)
  (pictures, labels), = batches(1)
  labels[-3:] = -1
  _, net_state = setting.net.apply(theta, net_state, None, pictures / np.float32(255), True)   # averages to be evaluated with
  hits = programs.make_score(setting)(theta, net_state, pictures, labels)
  logits = np.asarray(setting.net.apply(theta, net_state, None, pictures / np.float32(255), False)[0], np.float64)[:-3]
  labels = labels[:-3]
  order = np.argsort(-logits, 1)
  own = logits[np.arange(13), labels]
  assert (int(hits.images), int(hits.first)) == (13, (order[:, 0] == labels).sum())
  assert int(hits.fifth) == (order[:, :5] == labels[:, None]).any(1).sum()
  np.testing.assert_allclose(hits.loss, (np.log(np.exp(logits).sum(1)) - own).sum(), rtol=1e-5)


def test_scores_of_ties_and_of_what_is_no_number():
  """By hand: first and fifth of each row; the last two have no label, or are filled up."""
  setting = programs.prepare(make_config('dense', **{'stream.classes': 7}))
  setting = setting._replace(net=setting.net._replace(apply=lambda theta, *_: (theta, None)))   # logits as they are given
  equal, rising = np.zeros(7), np.arange(7.0)
  rows = [(equal, 0, 1, 1), (equal, 4, 0, 1), (equal, 5, 0, 0), (rising, 6, 1, 1), (rising, 2, 0, 1), (rising, 1, 0, 0),
          (np.full(7, np.nan), 0, 0, 0), (np.where(rising == 3, np.nan, rising), 6, 0, 0), *[(rising, -1, 0, 0)] * 8]
  logits, labels, first, fifth = (np.array(column) for column in zip(*rows, strict=True))
  pictures = np.zeros((BATCH, 1, 1, 3), np.uint8)
  hits = programs.make_score(setting)(logits.astype(np.float32), {}, pictures, labels.astype(np.int32))
  assert (int(hits.images), int(hits.first), int(hits.fifth)) == (8, first.sum(), fifth.sum())


def test_a_step_takes_batch_norm_over_parts(plain):
  """The first loss is that of two halves."""
  (pictures, labels), = batches(1)
  parts = programs.in_parts(train.make_loss(plain[0].net, 0.1), 2)
  state = programs.make_first(plain[0])(None).state
  theta = train.final_weights(plain[0].group, state.phi)
  theta = masks.apply(train.final_masks(plain[0].group, state), theta)
  wanted = float(jax.jit(parts)(theta, state.net_state, pictures / np.float32(255), labels)[0])
  _, _, (loss,) = trained(steps=1, **{'stream.batch_norm_parts': 2})
  assert loss == pytest.approx(wanted, rel=1e-5) and abs(loss - plain[2][0]) > 1e-4


def test_sums_over_hosts():
  """One host, of eight devices; several are in test_streamed.py."""
  over_hosts = programs.make_sum(programs.prepare(make_config('dense')).mesh)
  assert over_hosts([3, 40]).tolist() == [3, 40]


def test_batches_on_the_devices_are_those_of_the_host():
  setting = programs.prepare(make_config('dense'))
  made = [Batch(pictures, labels, np.arange(BATCH), np.zeros(BATCH, np.uint8)) for pictures, labels in batches(5)]
  found = list(programs.to_devices(iter(made), setting.mesh))
  assert len(found) == 5
  for batch, (on_host, sent) in zip(made, found, strict=True):
    np.testing.assert_array_equal(sent.images, batch.images)
    np.testing.assert_array_equal(sent.labels, batch.labels)
    assert on_host.images is None and sent.images.sharding == programs.by_image(setting.mesh)


def exchanged(variant, **change):
  """What devices exchange in a compiled step: name of the collective and number of elements, for each array."""
  setting = programs.prepare(make_config(variant, **change))
  image, label = jax.ShapeDtypeStruct((BATCH, SIZE, SIZE, 3), jnp.uint8), jax.ShapeDtypeStruct((BATCH,), jnp.int32)
  text = programs.make_step(setting).lower(setting.shapes, 0, image, label).compile().as_text()
  said = re.findall(r'= (.*?) (all-reduce|all-gather|all-to-all|collective-permute|reduce-scatter)(?:-start)?\(', text)
  return [(name, math.prod(int(n) for n in shape.split(',') if n))
          for what, name in said for shape in re.findall(r'\[([\d,]*)\]', what)]


@pytest.mark.parametrize('shards', [1, 2])
def test_what_devices_say_to_each_other(shards, monkeypatch):
  """A dense step: gradients, BatchNorm's sums, parameters where they are shared out; no activations, of 2,304 entries or more.
  RigL's: every device makes the same masks by itself; where weights are shared out, counts at three thresholds and the smallest
  live weight go to and fro beside that, and no weights."""
  monkeypatch.setattr(programs, 'SHARDED_FROM', 64)
  dense, rigl = (exchanged(variant, **{'stream.shards': shards}) for variant in ('dense', 'rigl_powerprop'))
  names = {name for name, _ in dense}
  assert 'all-reduce' in names and ('all-gather' in names) == (shards > 1)
  assert max(size for _, size in dense) <= 1152   # the largest parameter
  more = collections.Counter(rigl) - collections.Counter(dense)
  assert all(size <= 3 for _, size in more) and bool(more) == (shards > 1)


def test_the_model_of_haiku():
  """ResNet-50 of an eighth of the width is hk.nets.ResNet with the same arguments, and of the whole width has its parameters."""
  sizes = {}
  for name in ('resnet_50', 'resnet_50_eighth'):
    net = hk.transform_with_state(MODELS[name](1000, 0.0).forward)
    theta, _ = jax.eval_shape(lambda key, net=net: net.init(key, jnp.zeros((1, 64, 64, 3)), True), jax.random.key(0))
    sizes[name] = sum(x.size for x in jax.tree.leaves(theta))
  stock = hk.transform_with_state(lambda x: hk.nets.ResNet50(1000, resnet_v2=False)(x, True))
  theta, _ = jax.eval_shape(lambda key: stock.init(key, jnp.zeros((1, 64, 64, 3))), jax.random.key(0))
  assert sizes['resnet_50'] == sum(x.size for x in jax.tree.leaves(theta)) == 25_557_032


def test_on_one_cpu_convolutions_are_ours():
  """A batch that devices share out has Haiku's: the sums over a few images at a time of ours would be exchanged one by one."""
  image, label = jax.ShapeDtypeStruct((BATCH, SIZE, SIZE, 3), jnp.uint8), jax.ShapeDtypeStruct((BATCH,), jnp.int32)
  for devices, own in ((1, True), (8, False)):
    setting = programs.prepare(make_config('dense'), jax.devices()[:devices])
    program = programs.make_step(setting).trace(setting.shapes, 0, image, label).jaxpr
    assert ('scan[' in str(program)) == own

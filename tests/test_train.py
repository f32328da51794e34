"""Training: against NumPy in float64, the same by every road, the right batches, one compilation."""
from types import SimpleNamespace

import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np
import optax
from hypothesis import given
from hypothesis import strategies as st

import powerprop
from experiments import train
from experiments.models import BIASES, lenet_300_100
from experiments.optimizers import UPDATES
from powerprop.distributions import uniform

RATE = 0.1


def make_group(alpha, update='target_propagation', biases='plain', chain=optax.sgd):
  reparam = powerprop.powerpropagation(alpha, BIASES[biases])
  return train.Group({'alpha': alpha}, reparam, lambda rate, key, first: UPDATES[update](chain(rate), reparam))


def make_nets(seeds, rates=RATE):
  return train.Nets(np.array(seeds, np.int32), np.broadcast_to(np.float32(rates), len(seeds)), np.zeros(len(seeds), np.float32))


def mesh_of(devices):
  return jax.make_mesh((devices,), (train.NETS,), axis_types=(jax.sharding.AxisType.Auto,),
                       devices=jax.devices()[:devices])


def as_net(forward):
  return hk.transform_with_state(forward)


LENET = as_net(lenet_300_100(10, 0.0).forward)
LAYERS = {'mlp/~/linear_0': (36, 300), 'mlp/~/linear_1': (300, 100), 'mlp/~/linear_2': (100, 10)}


def make_theta0(seeds, layers=LAYERS):
  """Weights by NumPy, float32 [K, ...]: those of a seed are always the same."""
  def one(seed, i, shape, sd):
    return np.float32(np.random.default_rng([seed, i]).normal(0, sd, shape))
  return {name: {'w': np.stack([one(s, 2 * i, shape, shape[0] ** -0.5) for s in seeds]),
                 'b': np.stack([one(s, 2 * i + 1, shape[1:], 0.05) for s in seeds])}
          for i, (name, shape) in enumerate(layers.items())}


def make_images(count=96, side=6, classes=10, seed=0):
  rng = np.random.default_rng(seed)
  return train.Batches(rng.integers(0, 256, (count, side, side, 1), np.uint8), rng.integers(0, classes, count, np.int32))


class Run:
  """Networks `nets` in each of `groups` on `devices` devices."""

  def __init__(self, groups, nets, data, net=LENET, theta0=None, batch_size=12, devices=1, batched=None):
    self.mesh = mesh_of(devices)
    self.slots = train.deal(nets, len(groups), devices)
    self.data = train.replicate(data, self.mesh)
    self.theta0 = make_theta0(nets.seed) if theta0 is None else theta0
    init = train.make_init(groups, self.slots, net, batch_size, self.mesh)
    self.init = lambda theta0: init(theta0, {}, self.data)
    self.states = self.init(self.theta0)
    self.program = train.make_epoch(groups, net, batch_size, self.mesh, batched=batched)

  def steps(self, epoch, first, last):
    """Trains; returns the losses of each group, [K]."""
    self.states, tallies = self.program(self.states, [s.nets for s in self.slots], [s.number for s in self.slots],
                                       self.data, epoch, first, last)
    return train.gather([np.asarray(tally.loss) for tally in tallies], self.slots)

  def phi(self):
    """φ of each group by network, leaves [K, ...]."""
    return train.gather(jax.tree.map(np.asarray, [state.phi for state in self.states]), self.slots)


# ---- golden: an implementation of its own in float64 ---------------------------------------------------------------


class Numpy:
  """A network of linear layers with ReLU between, softmax cross-entropy, SGD on φ; by hand, in float64."""

  def __init__(self, theta0, layers, alpha, biases_too, rate):
    self.alpha, self.layers, self.biases_too, self.rate = alpha, layers, biases_too, rate
    self.phi = {(layer, leaf): self.root(np.asarray(theta0[layer][leaf], np.float64)) if leaf == 'w' or biases_too
                else np.asarray(theta0[layer][leaf], np.float64) for layer in layers for leaf in 'wb'}

  def root(self, x):
    return np.sign(x) * np.abs(x) ** (1 / self.alpha)

  def powered(self, leaf):
    return leaf == 'w' or self.biases_too

  def step(self, images, labels):
    theta = {key: np.sign(x) * np.abs(x) ** self.alpha if self.powered(key[1]) else x for key, x in self.phi.items()}
    inputs, x = [], images.reshape(len(images), -1) / 255
    for i, layer in enumerate(self.layers):
      inputs.append(x)
      x = x @ theta[layer, 'w'] + theta[layer, 'b']
      if i + 1 < len(self.layers):
        x = np.maximum(x, 0)
    log_p = x - x.max(1, keepdims=True)
    log_p = log_p - np.log(np.exp(log_p).sum(1, keepdims=True))
    rows = np.arange(len(labels))
    delta = np.exp(log_p)
    delta[rows, labels] -= 1
    delta /= len(labels)
    for layer, x_in in reversed(list(zip(self.layers, inputs, strict=True))):
      grads = {(layer, 'w'): x_in.T @ delta, (layer, 'b'): delta.sum(0)}
      delta = (delta @ theta[layer, 'w'].T) * (x_in > 0)
      for key, grad in grads.items():
        slope = self.alpha * np.abs(self.phi[key]) ** (self.alpha - 1) if self.powered(key[1]) else 1
        self.phi[key] = self.phi[key] - self.rate * grad * slope
    return -log_p[rows, labels].mean()


def batch(data, seed, epoch, t, size):
  """Batch t of an epoch: the t-th slice of a permutation whose key is made of seed, 1 and the epoch."""
  key = jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), 1), epoch)
  pick = np.asarray(jax.random.permutation(key, len(data.labels)))[t * size:(t + 1) * size]
  return data.images[pick], data.labels[pick]


def test_a_few_steps_as_in_numpy():
  """LeNet-300-100, two epochs of three steps, two networks. A failure is a change of the step itself: weights and batches are
  drawn here, so no change of theirs needs new numbers."""
  settings = [(1, 'plain'), (2, 'plain'), (1.375, 'plain'), (2, 'reparameterised')]
  seeds, rates, data = (3, 11), (0.1, 0.03), make_images(count=40)
  run = Run([make_group(a, biases=b) for a, b in settings], make_nets(seeds, rates), data)
  wanted = [[Numpy(jax.tree.map(lambda x, k=k: x[k], run.theta0), list(LAYERS), a, b == 'reparameterised', rates[k])
             for k in range(2)] for a, b in settings]
  for epoch in range(2):
    losses = run.steps(epoch, 0, 3)
    for g, k in np.ndindex(len(settings), 2):
      mean = np.mean([wanted[g][k].step(*batch(data, seeds[k], epoch, t, 12)) for t in range(3)])
      np.testing.assert_allclose(losses[g][k], mean, rtol=2e-6)
  for g, phi in enumerate(run.phi()):
    for layer, leaves in phi.items():
      for leaf, found in leaves.items():
        for k in range(2):
          # Six steps in float32 on values of the order of 1, whose ulp is 1.2e-7.
          np.testing.assert_allclose(found[k], wanted[g][k].phi[layer, leaf], rtol=0, atol=2e-6)
    moved = phi['mlp/~/linear_2']['w'] - np.sign(x := run.theta0['mlp/~/linear_2']['w']) * np.abs(x) ** (1 / settings[g][0])
    assert np.abs(moved).max(axis=(1, 2)).min() > 1e-3   # a hundred times what would be let pass


def test_initial_weights():
  """Truncated normal of standard deviation 1/sqrt(fan-in), biases 0; they depend on the seed alone; Ψ(Ψ⁻¹(θ0)) = θ0."""
  make = train.make_weights(LENET, (28, 28, 1), mesh_of(8))
  theta0, net_state = jax.tree.map(np.asarray, make(np.array([0, 5], np.int32)))
  assert not net_state
  for name, fan_in in (('mlp/~/linear_0', 784), ('mlp/~/linear_1', 300), ('mlp/~/linear_2', 100)):
    w = theta0[name]['w'].astype(np.float64)
    assert np.abs(w).max() <= 2 / np.sqrt(fan_in) * (1 + 1e-6)
    # A normal truncated at two deviations has a standard deviation of 0.8796 of the whole one; 5 sd of the estimate.
    assert abs(w.std() * np.sqrt(fan_in) - 0.8796) < 5 * 0.8796 / np.sqrt(2 * w.size)
    assert np.abs(w[0] - w[1]).max() > 0.5 / np.sqrt(fan_in) and not theta0[name]['b'].any()
  jax.tree.map(lambda x, y: np.testing.assert_array_equal(x, y[::-1]), make(np.array([5, 0], np.int32))[0], theta0)
  groups = [make_group(1), make_group(3.0)]
  slots = train.deal(make_nets([0, 5]), 2, 8)
  plain, cubed = train.gather(train.make_init(groups, slots, LENET, 12, mesh_of(8))(theta0, {}, make_images()), slots)
  jax.tree.map(np.testing.assert_array_equal, plain.phi, theta0)
  for name in LAYERS:
    np.testing.assert_allclose(np.asarray(cubed.phi[name]['w'], np.float64) ** 3, theta0[name]['w'], rtol=1e-6, atol=1e-30)


def test_live_weights_may_start_with_the_norm_of_their_layer():
  """Static masks of a fifth: the network begins with those weights of θ0 that are live, each layer as long as it was."""
  reparam = powerprop.powerpropagation(2.0)

  def optimizer(rate, key, first):
    inner = powerprop.target_propagation(optax.sgd(rate), reparam)
    return powerprop.sparsify(inner, powerprop.updaters.static(0.8, uniform), reparam, key)
  plain = train.Group({'alpha': 2.0}, reparam, optimizer, True)
  nets, data = make_nets([3]), make_images()
  (before,), (after,) = (Run([plain._replace(rescale=on)], nets, data).states for on in (False, True))
  for name in LAYERS:
    masks = [np.asarray(state.opt_state.masks.forward[name]['w'][0]) for state in (before, after)]
    theta = [np.sign(phi) * phi**2 for phi in (np.asarray(state.phi[name]['w'][0], np.float64) for state in (before, after))]
    np.testing.assert_array_equal(*masks)
    assert masks[0].sum() == masks[0].size // 5
    factor = np.sqrt((theta[0]**2).sum() / (theta[0][masks[0]]**2).sum())
    np.testing.assert_allclose(theta[1], factor * theta[0], rtol=1e-5)


def test_smoothed_labels():
  """Cross-entropy of labels of which a tenth is spread over all classes, in float64."""
  net = as_net(lambda x, is_training: hk.Linear(3, w_init=hk.initializers.RandomNormal(2.0))(hk.Flatten()(x)))
  images, labels = np.random.default_rng(0).random((5, 2, 2, 1), np.float32), np.array([0, 1, 2, 2, 0])
  theta, state = net.init(jax.random.key(0), images, True)
  loss, _ = train.make_loss(net, 0.1)(theta, state, images, labels)
  logits = images.reshape(5, 4).astype(np.float64) @ np.asarray(theta['linear']['w'], np.float64)
  log_p = logits - np.log(np.exp(logits).sum(1, keepdims=True))
  wanted = -((0.9 * np.eye(3)[labels] + 0.1 / 3) * log_p).sum(1).mean()
  np.testing.assert_allclose(loss, wanted, rtol=1e-5)


# ---- batches -------------------------------------------------------------------------------------------------------

ONE_HOT = 30   # images of one pixel each: the rows of a linear layer that move tell which images were used


def visited(groups, seeds, slices, devices=1):
  """For each (epoch, first, last) of `slices`: for each group and network the set of images used."""
  data = train.Batches((255 * np.eye(ONE_HOT)).astype(np.uint8).reshape(ONE_HOT, ONE_HOT, 1, 1),
                       (np.arange(ONE_HOT) % 3).astype(np.int32))
  net = as_net(lambda x, is_training: hk.Linear(3)(hk.Flatten()(x)))
  theta0 = make_theta0(seeds, {'linear': (ONE_HOT, 3)})
  run = Run(groups, make_nets(seeds), data, net, theta0, batch_size=7, devices=devices)
  out = []
  for bounds in slices:
    before = run.phi()
    run.steps(*bounds)
    moved = [np.any(a['linear']['w'] != b['linear']['w'], axis=2) for a, b in zip(before, run.phi(), strict=True)]
    out.append([[set(np.flatnonzero(net_moved)) for net_moved in group] for group in moved])
  return out


def test_batches_are_slices_of_a_permutation():
  seeds = [0, 1, 7]
  slices = [(epoch, t, t + 1) for epoch in (0, 1) for t in range(4)]   # 4 batches of 7 out of 30, 2 left out
  found = visited([make_group(1), make_group(2.0), make_group(1.375)], seeds, slices, devices=2)
  for (epoch, t, _), groups in zip(slices, found, strict=True):
    for k, seed in enumerate(seeds):
      images, _ = batch(train.Batches(np.arange(ONE_HOT), np.arange(ONE_HOT)), seed, epoch, t, 7)
      for group in groups:   # the same ones for every α
        assert group[k] == set(images.tolist())
  for epoch in (0, 1):
    parts = [groups[0] for (e, _, _), groups in zip(slices, found, strict=True) if e == epoch]
    for k in range(len(seeds)):
      assert len(set().union(*(part[k] for part in parts))) == 28   # each image at most once
  batches = [tuple(sorted(found[i][0][k])) for i in (0, 4) for k in range(len(seeds))]
  assert len(set(batches)) == len(batches)   # seeds and epochs differ


# ---- by every road the same ----------------------------------------------------------------------------------------


def test_the_same_network_by_every_road():
  """After 100 steps: alone or among five, one after another or batched with repetitions, on one device, two or eight."""
  # Adam's first steps are of the size of the rate whatever the gradient is: a small one, or rounding decides of signs.
  groups = [make_group(2.0), make_group(1.375, 'backpropagation', chain=lambda rate: optax.adam(1e-3 * rate))]
  data, seeds = make_images(count=244, seed=1), [0, 1, 2, 3, 4]

  def trained(seeds, **how):
    run = Run(groups, make_nets(seeds), data, **how)
    losses = [np.stack(run.steps(epoch, 0, 20)) for epoch in range(5)]
    return run.phi(), np.stack(losses)

  phi, losses = trained(seeds)
  assert np.all(losses[-1] < losses[0])
  everyone, fourth = slice(None), slice(3, 4)
  for how, some in [({'batched': True, 'devices': 2}, everyone), ({'devices': 8}, everyone), ({}, fourth)]:
    other, their_losses = trained(seeds[some], **how)
    # Sums in another order differ in the last bit, and training amplifies that: to 2e-7 in so few steps. After 200 one unit may
    # lie on the other side of its ReLU for one image, as on one kind of CPU under JAX 0.12, and differs by 4e-5.
    jax.tree.map(lambda x, y, some=some: np.testing.assert_allclose(y, x[some], rtol=0, atol=1e-6), phi, other)
    np.testing.assert_allclose(their_losses, losses[:, :, some], rtol=0, atol=1e-5)


@given(groups=st.integers(1, 7), k=st.integers(1, 9), devices=st.integers(1, 12))
def test_deal(groups, k, devices):
  nets = train.Nets(np.arange(100, 100 + k, dtype=np.int32), *np.linspace([0.1, 2], [1, 3], k, dtype=np.float32, axis=1))
  slots = train.deal(nets, groups, devices)
  assert len(slots) == groups
  total = np.zeros(devices, int)
  for slot in slots:
    places = len(slot.source) // devices
    assert len(slot.source) == places * devices and places == -(-k // devices)
    # Every network has a place of its own, which holds it.
    assert len(set(slot.place.tolist())) == k
    np.testing.assert_array_equal(slot.source[slot.place], np.arange(k))
    np.testing.assert_array_equal(slot.nets.seed[slot.place], nets.seed)
    np.testing.assert_array_equal(slot.nets.learning_rate, nets.learning_rate[slot.source])
    np.testing.assert_array_equal(slot.nets.penalty, nets.penalty[slot.source])
    # Those of a device come first on it, `number` of them.
    device, rank = np.divmod(slot.place, places)
    for d in range(devices):
      assert sorted(rank[device == d]) == list(range(slot.number[d]))
    assert slot.number.dtype == np.int32 and slot.number.sum() == k
    total += slot.number
  assert total.sum() == groups * k and total.max() - total.min() <= 1   # over the sweep nobody has more than his share


@given(k=st.integers(1, 9), devices=st.integers(1, 12))
def test_gather_undoes_scatter(k, devices):
  slots = train.deal(make_nets(range(k)), 2, devices)
  trees = [{'a': np.arange(k * 3).reshape(k, 3), 'b': None}, {'a': -np.arange(k)}]
  placed = train.scatter(trees, slots)
  assert placed[0]['a'].shape == (len(slots[0].source), 3)
  jax.tree.map(np.testing.assert_array_equal, train.gather(placed, slots), trees)


# ---- one program ---------------------------------------------------------------------------------------------------


def test_one_program_in_place_and_in_parts():
  """Whatever epoch and steps: compiled once, states donated and kept where they are trained, and bit-identical when taken in
  parts. A device without a network of its own skips its repetition, whose place then holds zeros."""
  run = Run([make_group(1.375)], make_nets([0, 1, 2]), make_images(), devices=8)
  run.steps(0, 0, 8)
  run.steps(1, 0, 8)
  whole = run.phi()
  run.states = run.init(run.theta0)
  for bounds in ((0, 0, 3), (0, 3, 8), (1, 0, 1), (1, 1, 8)):
    before = jax.tree.leaves(run.states)
    run.steps(*bounds)
    assert all(x.is_deleted() for x in before)   # there is never a second copy of the networks
  jax.tree.map(np.testing.assert_array_equal, whole, run.phi())
  assert run.program._cache_size() == 1
  for x in jax.tree.leaves(run.states):
    assert x.sharding.is_equivalent_to(train.by_net(run.mesh), x.ndim)
    assert {shard.data.shape[0] for shard in x.addressable_shards} == {1}
    assert np.any(np.asarray(x)[:3]) and not np.any(np.asarray(x)[3:])


def test_who_trains_side_by_side():
  """Small dense layers on a GPU; never on a CPU, and no convolutions."""
  one_of = {place: SimpleNamespace(devices=np.array([SimpleNamespace(platform=place)])) for place in ('cpu', 'gpu', 'tpu')}
  dense, convolution = {'w': jnp.zeros((5, 3, 4)), 'b': jnp.zeros((5, 4))}, {'w': jnp.zeros((5, 3, 3, 1, 2))}
  found = {(place, name): train.side_by_side(params, one_of[place]) for place in one_of
           for name, params in (('dense', dense), ('both', {'a': dense, 'b': convolution}))}
  assert {key for key, yes in found.items() if yes} == {('gpu', 'dense'), ('tpu', 'dense')}

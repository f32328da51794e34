"""Accuracies on photographs against loops in NumPy: of which split, of which weights, with which averages."""
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from made_photographs import write_folders
from tiny_photographs import network

from configs import imagenette
from experiments import photographs, programs, streamed_evaluate, train
from experiments.data import images
from experiments.models import MODELS

for _package in ('grain', 'simplejpeg', 'cv2'):
  pytest.importorskip(_package)
pytestmark = [pytest.mark.usefixtures('compiled_quickly'), pytest.mark.filterwarnings('ignore:.*is no JPEG in grey')]


@pytest.fixture(scope='module')
def opened(tmp_path_factory):
  """Setting and photographs of 3 classes, of 8 training images each every third held out; six classes in the network, so that the
  five likeliest are not all."""
  tree = write_folders(tmp_path_factory.mktemp('tree'), train=8)
  config = imagenette.get_config('dense')
  with config.unlocked():
    config.update_from_flattened_dict({
        'model': 'tiny_photographs', 'data_dir': str(tree), 'batch_size': 8, 'stream.image_size': 16, 'stream.classes': 3,
        'stream.held_out': 3, 'prune.densities': (0.5, 0.1), 'prune.figure_density': 0.5, 'prune.sampled_weights': 10,
        'prune.scopes': ('layer', 'layer recalibrated'), 'prune.recalibration_batches': 3})
  with pytest.MonkeyPatch.context() as patch:
    patch.setitem(MODELS, 'tiny_photographs', lambda classes, bias_stddev: network(6, bias_stddev))
    setting = programs.prepare(config)
  return setting, photographs.open_images(config)


@pytest.fixture(scope='module')
def state(opened):
  """As after training: weights in another order of magnitudes than at first, averages of some batches."""
  setting, loads = opened
  theta, net_state = jax.jit(functools.partial(programs.first_weights, setting.net, (16, 16, 3)))(5)
  batch = images.stack([loads.load.evaluate(i) for i in range(24)])
  for _ in range(20):
    _, net_state = setting.net.apply(theta, net_state, None, batch.images / np.float32(255), True)
  return train.TrainState(theta, None, net_state)


def hits(setting, load, indices, theta, net_state):
  """(right at first, among the five likeliest) of images one by one."""
  batch = images.stack([load.evaluate(int(i)) for i in indices])
  logits = np.asarray(setting.net.apply(theta, net_state, None, batch.images / np.float32(255), False)[0])
  order = np.argsort(-logits, 1, kind='stable')
  return int((order[:, 0] == batch.labels).sum()), int((order[:, :5] == batch.labels[:, None]).any(1).sum())


def test_training_images_stand_in_for_training_images_alone(opened):
  _, loads = opened
  assert loads.load.among.tolist() == loads.train.tolist() == [i for i in range(24) if i % 3 != 2]
  assert loads.validation.tolist() == list(range(2, 24, 3)) and loads.test_load.among is None


def test_scores_are_of_the_images_held_out(opened, state):
  """Where there are none, of the test split; the five likeliest are more than the first."""
  setting, loads = opened
  splits = ((loads, loads.load, loads.validation), (loads._replace(validation=loads.validation[:0]), loads.test_load, loads.test))
  found = []
  for some, load, indices in splits:
    scores = streamed_evaluate.Evaluator(setting, some).scores(state)
    first, fifth = hits(setting, load, indices, state.phi, state.net_state)
    assert (scores['accuracy'], scores['top_five']) == (first / len(indices), fifth / len(indices))
    assert first < fifth
    found.append(scores)
  assert found[0]['loss'] != pytest.approx(found[1]['loss'], rel=1e-3)


def test_weights_are_pruned_by_what_training_made_of_them(opened, state, monkeypatch):
  """Those that are evaluated are the largest after training, layer by layer, and not those that were the largest before it."""
  setting, loads = opened
  seen = []
  def see(self, part, theta, net_state, on=streamed_evaluate.Evaluator.on):
    seen.append((part, jax.tree.map(np.asarray, theta), net_state))
    return on(self, part, theta, net_state)
  monkeypatch.setattr(streamed_evaluate.Evaluator, 'on', see)
  found = streamed_evaluate.final_evaluation(setting, loads, state)
  assert [part for part, *_ in seen] == ['validation', 'test'] * 4 and found['images'] == {'validation': 8, 'test': 12}
  for place, density in ((0, 0.5), (2, 0.1)):   # the first scope
    for name in ('first', 'second'):
      w, pruned = np.asarray(state.phi[name]['w']), seen[place][1][name]['w']
      kept = np.sort(np.argsort(np.abs(w).ravel())[::-1][:(pruned != 0).sum()])
      np.testing.assert_array_equal(np.flatnonzero(pruned), kept)
      np.testing.assert_array_equal(pruned.ravel()[kept], w.ravel()[kept])
      assert (pruned != 0).sum() == int(density * w.size)
  for place in range(4):   # without and with averages made anew
    fresh = seen[2 * place][2]
    same = jax.tree.map(lambda a, b: np.array_equal(a, b), fresh, state.net_state)
    assert all(jax.tree.leaves(same)) == (place < 2)
  by_hand = [hits(setting, loads.test_load, loads.test, theta, net_state)[0] for part, theta, net_state in seen if part == 'test']
  assert found['evaluation'].test.ravel().tolist() == by_hand


def test_averages_are_made_anew_from_training_batches(opened, state):
  setting, loads = opened
  found = streamed_evaluate.make_recalibrate(setting, loads)(state.phi, state.net_state)
  stream, wanted = images.train_batches(loads.load, loads.train, 8, 0), state.net_state
  for _ in range(3):
    _, wanted = setting.net.apply(state.phi, wanted, None, next(stream).images / np.float32(255), True)
  jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-5), found, wanted)
  assert max(float(jnp.abs(a - b).max()) for a, b in zip(
      jax.tree.leaves(found), jax.tree.leaves(state.net_state), strict=True)) > 1e-2

"""Sequences of tasks: which images, labels and pixels each has, by hand."""
import jax.numpy as jnp
import ml_collections
import numpy as np
import pytest

from experiments.data import Dataset, tasks
from experiments.errors import UserError


def made(classes=6, side=4, channels=1, counts=(30, 12), seed=0, name='Made'):
  rng = np.random.default_rng(seed)
  arrays = []
  for count in counts:
    arrays += [rng.integers(0, 256, (count, side, side, channels), np.uint8), np.arange(count, dtype=np.int32) % classes]
  return Dataset(*arrays, classes, 'memory', name)


def config(**change):
  return ml_collections.ConfigDict({
    'train_images': 24, 'batch_size': 2,
    'continual': {'tasks': 3, 'sequence_seed': 0, 'degrees': 180.0} | change})


def of(sequence, part, task):
  """Images and labels of a task, all that count."""
  p = sequence.parts[part]
  count = int(p.counts[task % len(p.counts)])
  images, labels = tasks.take(p._replace(images=jnp.array(p.images), labels=jnp.array(p.labels), rows=jnp.array(p.rows)),
                              jnp.array(sequence.pixels), task, jnp.arange(count))
  return np.array(images), np.array(labels)


def test_permuted_tasks_have_all_images_with_pixels_in_another_order():
  data = made()
  found = tasks.permuted([data], config())
  assert found.names == ('permutation 0', 'permutation 1', 'permutation 2') and found.classes == 6 and not found.apart
  for task in range(3):
    images, labels = of(found, 'train', task)
    order = found.pixels[task]
    assert sorted(order) == list(range(16))
    np.testing.assert_array_equal(images.reshape(24, 16), data.train_images[:24].reshape(24, 16)[:, order])
    np.testing.assert_array_equal(labels, data.train_labels[:24])
  assert found.pixels[0].tolist() == list(range(16)) and len({tuple(order) for order in found.pixels}) == 3
  np.testing.assert_array_equal(tasks.permuted([data], config()).pixels, found.pixels)
  assert (tasks.permuted([data], config(sequence_seed=1)).pixels != found.pixels).any()
  assert [len(of(found, part, 1)[1]) for part in ('train', 'validation', 'test')] == [24, 6, 12]


def test_rotations():
  """A quarter turn is NumPy's, for odd and even sides; what comes from outside is black; a turn keeps the middle."""
  for side in (4, 5):
    image = np.arange(1, side * side + 1, dtype=np.uint8).reshape(1, side, side, 1)
    for quarter in range(4):
      order = jnp.array(tasks.rotation(90 * quarter, side, side))
      np.testing.assert_array_equal(tasks.arrange(jnp.array(image), order)[0, ..., 0], np.rot90(image[0, ..., 0], quarter))
  turned = np.array(tasks.arrange(jnp.full((1, 9, 9, 1), 7, jnp.uint8), jnp.array(tasks.rotation(45, 9, 9))))[0, ..., 0]
  assert turned[4, 4] == 7 and turned[0, 0] == turned[8, 8] == 0 and (turned[4] == 7).all()
  assert tasks.rotated([made()], config()).names == ('0°', '60°', '120°')


def test_split_tasks_have_classes_of_their_own():
  data = made(counts=(32, 13))   # classes 0 and 1 have an image more
  found = tasks.split([data], config())
  assert found.names == ('0 to 1', '2 to 3', '4 to 5') and found.classes == 2 and found.apart
  for task in range(3):
    for part, all_images, all_labels in (('train', data.train_images[:24], data.train_labels[:24]),
                                         ('validation', data.train_images[24:], data.train_labels[24:]),
                                         ('test', data.test_images, data.test_labels)):
      images, labels = of(found, part, task)
      own = (all_labels == 2 * task) | (all_labels == 2 * task + 1)
      np.testing.assert_array_equal(images, all_images[own])
      np.testing.assert_array_equal(labels, all_labels[own] - 2 * task)
  assert found.parts['test'].counts.tolist() == [5, 4, 4]
  assert found.parts['test'].rows.shape == (3, 5)   # alike for all tasks: the shorter ones begin again
  assert (found.parts['test'].rows[1, 4] == found.parts['test'].rows[1, 0])


def test_mixed_sets_take_the_form_of_the_first():
  grey, colour = made(name='Grey'), made(side=6, channels=3, seed=1, name='Colour')
  found = tasks.mixed([grey, colour], config(tasks=2))
  assert found.names == ('Grey', 'Colour') and found.apart and found.classes == 6
  images, labels = of(found, 'test', 1)
  luma = colour.test_images[:, 1:5, 1:5].astype(np.float64) @ [0.299, 0.587, 0.114]
  assert np.abs(images[..., 0] - luma).max() <= 0.5001 and images.shape == (12, 4, 4, 1)
  np.testing.assert_array_equal(labels, colour.test_labels)
  np.testing.assert_array_equal(of(found, 'validation', 0)[0], grey.train_images[24:])


def test_each_image_of_a_task_of_its_own():
  found = tasks.permuted([made()], config())
  part = found.parts['test']
  part = part._replace(images=jnp.array(part.images), labels=jnp.array(part.labels), rows=jnp.array(part.rows))
  own, positions = jnp.array([2, 0, 1, 2]), jnp.array([3, 3, 11, 0])
  images, labels = tasks.take_each(part, jnp.array(found.pixels), own, positions)
  for i in range(4):
    one, label = tasks.take(part, jnp.array(found.pixels), own[i], positions[i:i + 1])
    np.testing.assert_array_equal(images[i], one[0])
    assert labels[i] == label[0]


@pytest.mark.parametrize('make, change, message', [
  (lambda c: tasks.split([made()], c), {'tasks': 4}, 'config.continual.tasks must share out the 6 classes of Made evenly'),
  (lambda c: tasks.split([made()], c), {'tasks': 6}, 'at least two to a task, got 6'),
  (lambda c: tasks.mixed([made(), made(3)], c), {}, 'config.continual.datasets must all have 6 classes'),
  (lambda c: tasks.mixed([made(side=6), made()], c), {}, r'smallest images, .*\[4, 4, 1\] cannot become \[6, 6, 1\]')])
def test_sequences_that_cannot_be_made(make, change, message):
  with pytest.raises(UserError, match=message):
    make(config(**change))


def test_a_batch_that_a_task_cannot_fill():
  with pytest.raises(UserError, match=r'config\.batch_size must not exceed the 8 training images of a task, got 9'):
    tasks.split([made()], ml_collections.ConfigDict(config().to_dict() | {'batch_size': 9}))

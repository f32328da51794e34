"""experiments.augment against plain NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments import augment
from experiments.augment import AUGMENTATIONS, crop_and_flip, draw


def noise(count, height, width, channels=3, seed=0):
  """Images in which no pixel is 0, so that padding can be told from them."""
  return np.random.default_rng(seed).integers(1, 256, (count, height, width, channels), np.uint8)


def changed(image, row, column, flip, padding):
  """One image cropped and flipped, pixel by pixel."""
  height, width, _ = image.shape
  out = np.zeros_like(image)
  for i in range(height):
    for j in range(width):
      y, x = i + row - padding, (width - 1 - j if flip else j) + column - padding
      if 0 <= y < height and 0 <= x < width:
        out[i, j] = image[y, x]
  return out


@pytest.mark.parametrize('shape', [(8, 8, 3), (6, 9, 1)])
@pytest.mark.parametrize('padding', [0, 1, 4])
def test_same_as_numpy_with_the_same_draws(shape, padding):
  images = noise(40, *shape)
  offsets, flips = map(np.asarray, draw(jax.random.key(3), 40, padding))
  found = crop_and_flip(jax.random.key(3), jnp.asarray(images), padding)
  expected = [changed(image, row, column, flip, padding)
              for image, (row, column), flip in zip(images, offsets, flips, strict=True)]
  assert found.dtype == jnp.uint8
  np.testing.assert_array_equal(found, expected)


def test_every_crop_and_flip_occurs_and_none_else():
  image = noise(1, 8, 8)[0]
  table = {changed(image, row, column, flip, 2).tobytes(): (row, column, flip)
           for row in range(5) for column in range(5) for flip in (False, True)}
  assert len(table) == 50
  found = crop_and_flip(jax.random.key(0), jnp.tile(image, (5000, 1, 1, 1)), 2)
  counts = dict.fromkeys(table.values(), 0)
  for one in np.asarray(found):
    counts[table[one.tobytes()]] += 1
  # 100 expected of each; the sum of squared deviations over 100 has mean 49 and standard deviation sqrt(2·49) = 9.9.
  assert sum((n - 100) ** 2 / 100 for n in counts.values()) < 49 + 4 * 9.9


def test_default_padding_is_four():
  offsets, flips = draw(jax.random.key(1), 2000, 4)
  assert np.unique(offsets[:, 0]).tolist() == np.unique(offsets[:, 1]).tolist() == list(range(9))
  assert abs(float(flips.mean()) - 0.5) < 4 * 0.5 / 2000**0.5
  images = noise(50, 12, 12)
  np.testing.assert_array_equal(crop_and_flip(jax.random.key(1), images), crop_and_flip(jax.random.key(1), images, 4))


def test_no_padding_leaves_flips_only():
  images = noise(64, 4, 4)
  found = np.asarray(crop_and_flip(jax.random.key(2), jnp.asarray(images), 0))
  flipped = [np.array_equal(a, b[:, ::-1]) for a, b in zip(found, images, strict=True)]
  same = [np.array_equal(a, b) for a, b in zip(found, images, strict=True)]
  assert all(np.logical_xor(flipped, same)) and 16 < sum(flipped) < 48


@pytest.mark.parametrize('name', list(AUGMENTATIONS))
def test_registered_row_is_a_function_of_its_key(name):
  images = jnp.asarray(noise(32, 32, 32))
  keys = jax.random.split(jax.random.key(0), 2)
  one, other = (np.asarray(AUGMENTATIONS[name](key, images)) for key in keys)
  np.testing.assert_array_equal(one, AUGMENTATIONS[name](keys[0], images))
  np.testing.assert_array_equal(one, jax.jit(AUGMENTATIONS[name])(keys[0], images))
  assert one.dtype == np.uint8 and one.shape == images.shape
  assert np.array_equal(one, other) == (name == 'none')
  # Several networks in one program: batched keys on one batch.
  np.testing.assert_array_equal(jax.vmap(AUGMENTATIONS[name], in_axes=(0, None))(keys, images), [one, other])


def test_none_changes_nothing():
  images = jnp.asarray(noise(4, 8, 8))
  np.testing.assert_array_equal(augment.none(jax.random.key(0), images), images)


def test_mistakes():
  with pytest.raises(ValueError, match=r'padding must be at least 0 pixels, got -1\.'):
    crop_and_flip(jax.random.key(0), jnp.zeros((1, 8, 8, 3)), -1)
  with pytest.raises(ValueError, match=r'takes images \[B, H, W, C\], got the shape \[8, 8, 3\]'):
    crop_and_flip(jax.random.key(0), jnp.zeros((8, 8, 3)))

"""Sequences of tasks, made of the data sets that there are. A task is rows of images that all tasks share, and an order of their
pixels: nothing is copied, every task has arrays of the same shapes, and one compiled program serves them all.

  permuted   all images, their pixels in another fixed order in each task, but in the first
  rotated    all images, turned by an angle of its own in each task, 0 in the first
  split      the images of some classes, other ones in each task
  mixed      a data set in each task
"""
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np

from experiments import data as datasets
from experiments.data import Dataset
from experiments.errors import UserError


class Part(NamedTuple):
  """The images of one kind, for training, validation or testing, of all T tasks. Arrays of NumPy or JAX."""
  images: Any   # uint8 [N, H, W, C], of all tasks together
  labels: Any   # int32 [N]: class within the task
  rows: Any     # int32 [T, M], or [1, M] where all tasks have the same: which images are a task's; filled up by repetition
  counts: Any   # int32 [T] or [1]: how many of the rows are no repetitions


class Tasks(NamedTuple):
  names: tuple[str, ...]   # of the T tasks, in their order
  classes: int             # of each task
  apart: bool              # are the classes of a task other ones than those of the tasks before?
  parts: dict[str, Part]   # train, validation, test
  pixels: Any              # int32 [T, H·W], or [1, H·W]: which pixel is shown at each place; H·W: none, which is black
  described: str           # where the images come from, as a line for a reader


def take(part: Part, pixels: Any, task: Any, positions: Any) -> tuple[jax.Array, jax.Array]:
  """Images uint8 [B, H, W, C] and labels [B] of one task, by positions [B] among its rows. `task` may be traced."""
  rows = part.rows[task % len(part.rows), positions]   # where all have the same rows there is one line of them
  return arrange(part.images[rows], pixels[task % len(pixels)]), part.labels[rows]


def take_each(part: Part, pixels: Any, tasks: Any, positions: Any) -> tuple[jax.Array, jax.Array]:
  """The same with a task for each image: [B]."""
  rows = part.rows[tasks % len(part.rows), positions]
  images = jax.vmap(lambda image, order: arrange(image[None], order)[0])(part.images[rows], pixels[tasks % len(pixels)])
  return images, part.labels[rows]


def arrange(images: jax.Array, order: jax.Array) -> jax.Array:
  """Images [B, H, W, C] with pixel order[i] at place i, and black where that is H·W."""
  flat = images.reshape(len(images), -1, images.shape[-1])
  return jnp.take(flat, order, axis=1, mode='fill', fill_value=0).reshape(images.shape)


# ---- sequences ------------------------------------------------------------------------------------------------------


def load(config: ml_collections.ConfigDict) -> Tasks:
  """The sequence that `config.continual.sequence` names, of real data. Raises UserError for one that cannot be made of them."""
  wanted = config.continual
  names = wanted.datasets if wanted.sequence == 'mixed' else (config.dataset,)
  sets = [datasets.load(name, config.data_dir) for name in names]
  return SEQUENCES[wanted.sequence](sets, config)


def permuted(sets: Sequence[Dataset], config: ml_collections.ConfigDict) -> Tasks:
  """Source: Goodfellow et al. 2014 (arXiv:1312.6211); Kirkpatrick et al. 2017 (arXiv:1612.00796)."""
  rng, size = np.random.default_rng(config.continual.sequence_seed), _pixels(sets[0])
  orders = [np.arange(size), *(rng.permutation(size) for _ in range(config.continual.tasks - 1))]
  return _of_all(sets[0], config, [f'permutation {t}' for t in range(len(orders))], np.stack(orders))


def rotated(sets: Sequence[Dataset], config: ml_collections.ConfigDict) -> Tasks:
  """Angles evenly spaced over `continual.degrees`, the nearest pixel taken. Source: Lopez-Paz and Ranzato 2017
  (arXiv:1706.08840), whose code turns images so; their angles are drawn at random."""
  angles = [config.continual.degrees * t / config.continual.tasks for t in range(config.continual.tasks)]
  height, width = sets[0].train_images.shape[1:3]
  return _of_all(sets[0], config, [f'{angle:g}°' for angle in angles], np.stack([rotation(a, height, width) for a in angles]))


def rotation(degrees: float, height: int, width: int) -> np.ndarray:
  """The order of pixels int32 [H·W] that turns an image counterclockwise about its middle; H·W where nothing was."""
  y, x = np.mgrid[:height, :width].astype(np.float64)
  y, x = y - (height - 1) / 2, x - (width - 1) / 2
  c, s = np.cos(np.radians(degrees)), np.sin(np.radians(degrees))
  # The pixel at (x, y), y downwards, comes from that place turned back; the rounding is that of 90° to the last digit.
  from_x = np.rint(np.round(c * x - s * y + (width - 1) / 2, 9)).astype(np.int32)
  from_y = np.rint(np.round(s * x + c * y + (height - 1) / 2, 9)).astype(np.int32)
  inside = (from_x >= 0) & (from_x < width) & (from_y >= 0) & (from_y < height)
  return np.where(inside, from_y * width + from_x, height * width).reshape(-1)


def split(sets: Sequence[Dataset], config: ml_collections.ConfigDict) -> Tasks:
  """The classes in their order, as many in each task. Source: Zenke et al. 2017 (arXiv:1703.04200)."""
  classes, tasks = sets[0].classes, config.continual.tasks
  if classes % tasks or tasks == classes:
    raise UserError(f'config.continual.tasks must share out the {classes} classes of {sets[0].name} evenly, at least two to a '
                    f'task, got {tasks}.')
  own = classes // tasks
  names = [f'{own * t} to {own * (t + 1) - 1}' for t in range(tasks)]
  return _apart(sets[0], own, names, _cut(sets[0], config.train_images), config.batch_size, datasets.describe(sets[0]))


def mixed(sets: Sequence[Dataset], config: ml_collections.ConfigDict) -> Tasks:
  """Images are cut or made grey to the form of the first set's: the middle of larger ones, the luma of colours."""
  first, classes = sets[0], sets[0].classes
  if strange := [one.name for one in sets if one.classes != classes]:
    raise UserError(f'config.continual.datasets must all have {classes} classes, as {first.name} has; {strange[0]} has others.')
  shape = first.train_images.shape[1:]
  cuts = [_cut(one._replace(train_images=alike(one.train_images, shape), test_images=alike(one.test_images, shape)),
               min(config.train_images, round(len(one.train_images) * 11 / 12))) for one in sets]   # 55,000 of MNIST's 60,000
  joined = {name: (np.concatenate([cut[name][0] for cut in cuts]),
                   np.concatenate([cut[name][1] + t * classes for t, cut in enumerate(cuts)])) for name in cuts[0]}
  return _apart(first, classes, [one.name for one in sets], joined, config.batch_size,
                '; '.join(datasets.describe(one) for one in sets))


def alike(images: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
  """uint8 [N, H, W, C] → the middle of it, [N, *shape]; three colours become their luma where one channel is wanted (the weights
  of ITU-R BT.601). Raises UserError for images that are smaller, or of other channels."""
  (height, width), channels = images.shape[1:3], images.shape[3]
  if height < shape[0] or width < shape[1] or (channels, shape[2]) not in ((1, 1), (3, 3), (3, 1)):
    raise UserError(f'config.continual.datasets must begin with the set of the smallest images, all grey or all in colour but '
                    f'for sets that are made grey; {list(images.shape[1:])} cannot become {list(shape)}.')
  top, left = (height - shape[0]) // 2, (width - shape[1]) // 2
  images = images[:, top:top + shape[0], left:left + shape[1]]
  if channels == shape[2]:
    return images
  return np.rint(images @ np.array([0.299, 0.587, 0.114], np.float32)).astype(np.uint8)[..., None]


def _pixels(data: Dataset) -> int:
  return int(np.prod(data.train_images.shape[1:3]))


def _cut(data: Dataset, train_images: int) -> dict[str, tuple[np.ndarray, np.ndarray]]:
  """The first `train_images` for training, the rest of the training set for validation, the whole test set."""
  if not 0 < train_images < len(data.train_images):
    raise UserError(f'config.train_images must leave some of the {len(data.train_images):,} images for validation, got '
                    f'{train_images}.')
  return {'train': (data.train_images[:train_images], data.train_labels[:train_images]),
          'validation': (data.train_images[train_images:], data.train_labels[train_images:]),
          'test': (data.test_images, data.test_labels)}


def _of_all(data: Dataset, config: ml_collections.ConfigDict, names: Sequence[str], orders: np.ndarray) -> Tasks:
  """Tasks of the same images and classes."""
  parts = {name: Part(images, labels, np.arange(len(labels), dtype=np.int32)[None], np.array([len(labels)], np.int32))
           for name, (images, labels) in _cut(data, config.train_images).items()}
  _check_batch(parts['train'], config.batch_size)
  return Tasks(tuple(names), data.classes, False, parts, orders.astype(np.int32), datasets.describe(data))


def _apart(data: Dataset, classes: int, names: Sequence[str], cut: dict[str, tuple[np.ndarray, np.ndarray]], batch_size: int,
           described: str) -> Tasks:
  """Tasks of other classes: those of task t are t · classes and the next."""
  parts = {}
  for name, (images, labels) in cut.items():
    found = [np.flatnonzero(labels // classes == t) for t in range(len(names))]
    if empty := [names[t] for t, rows in enumerate(found) if not len(rows)]:
      raise UserError(f'task {empty[0]} has no images for {name}; config.train_images leaves none.')
    length = max(map(len, found))
    rows = np.stack([np.resize(r, length) for r in found]).astype(np.int32)
    parts[name] = Part(images, (labels % classes).astype(np.int32), rows, np.array([len(r) for r in found], np.int32))
  _check_batch(parts['train'], batch_size)
  return Tasks(tuple(names), classes, True, parts, np.arange(_pixels(data), dtype=np.int32)[None], described)


def _check_batch(part: Part, batch_size: int) -> None:
  if part.rows.shape[1] < batch_size:
    raise UserError(f'config.batch_size must not exceed the {part.rows.shape[1]:,} training images of a task, got {batch_size}.')


SEQUENCES: dict[str, Callable[[Sequence[Dataset], ml_collections.ConfigDict], Tasks]] = {
    'permuted': permuted, 'rotated': rotated, 'split': split, 'mixed': mixed}

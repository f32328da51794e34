"""The photographs of a run: opened by its config, shared between hosts, and the odd ones among them counted and named."""
import importlib.util
import pathlib
import warnings
from typing import NamedTuple

import jax
import ml_collections
import numpy as np

from experiments.data import images
from experiments.data.files import environment_root
from experiments.errors import UserError
from experiments.progress import say

READERS = ('grain', 'simplejpeg', 'cv2')   # of the extra 'imagenet'
NAMED = 4   # at most so many classes are named in an error


class Loads(NamedTuple):
  """What is read: the images of the training split, and which of them are for training and for validation; those of the test."""
  load: images.Load
  train: np.ndarray
  validation: np.ndarray
  test_load: images.Load
  test: np.ndarray


def open_images(config: ml_collections.ConfigDict) -> Loads:
  """Raises DataError where there are none; UserError for another number of classes, or classes that differ between the splits."""
  if missing := [name for name in READERS if importlib.util.find_spec(name) is None]:
    raise UserError(f"reading photographs takes {', '.join(missing)}: pip install -e '.[imagenet]'.")
  stream, around = config.stream, None if config.data_dir else environment_root()
  if not (config.data_dir or around):
    raise UserError(f'photographs are needed: --config.data_dir=DIRECTORY, or the folder {config.dataset} in $POWERPROP_DATA.')
  root = around / config.dataset if around else pathlib.Path(config.data_dir)
  loads: list[images.Load] = []
  for split in ('train', 'validation'):
    source = images.open_source(root, split)
    if source.classes != stream.classes:
      raise UserError(f'config.stream.classes is {stream.classes}, and there are {source.described}.')
    loads.append(images.Load(source, stream.image_size, stream.on_damage))
    say(f'{split}: {source.described}')
  if differ := sorted(set(loads[0].source.names) ^ set(loads[1].source.names)):   # they are numbered in the order of their names
    raise UserError(f'{root}: training and validation must have classes of the same names; only one of them has '
                    f'{", ".join(differ[:NAMED])}{" and others" if len(differ) > NAMED else ""}.')
  train_on, validate_on = images.divide(len(loads[0].source), stream.held_out)
  if len(train_on) < config.batch_size:
    raise UserError(f'config.batch_size must be at most the {len(train_on):,} images for training, got {config.batch_size}.')
  tested = np.arange(len(loads[1].source), dtype=np.int32)
  return Loads(loads[0]._replace(among=train_on), train_on, validate_on, loads[1], tested)


def hosts() -> dict[str, int]:
  return {'host': jax.process_index(), 'hosts': jax.process_count()}


class Odd:
  """Counts images that were not read as they should be, and names each once."""

  def __init__(self, load: images.Load):
    self._load, self._named, self.counts = load, set[int](), {images.CONVERTED: 0, images.REPLACED: 0}

  def see(self, batch: images.Batch) -> None:
    for index, odd in zip(batch.index[batch.odd > 0].tolist(), batch.odd[batch.odd > 0].tolist(), strict=True):
      self.counts[odd] += 1
      if index not in self._named:
        self._named.add(index)
        told = 'is no JPEG in grey or YCbCr, and read by Pillow' if odd == images.CONVERTED else 'cannot be read, and left out'
        warnings.warn(f'{self._load.source.name(index)} {told}.', stacklevel=2)

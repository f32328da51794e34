"""Photographs read in a second by one core: decoded, cropped at random, resized to 224; by Pillow as users write it, by ours, and
by tf.data where TensorFlow happens to be installed, which nothing here needs.
"""
import importlib.util
import io
import statistics
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from benchmarks.paired import Row, per, ratio, row, take_turns
from experiments.data import jpeg

SIZE, HEIGHT, WIDTH = 224, 375, 500


def by_pillow(data: bytes, box: jpeg.Box, size: int = SIZE) -> np.ndarray:
  """What `jpeg.decode` has to beat."""
  from PIL import Image
  with Image.open(io.BytesIO(data)) as image:
    whole = image.convert('RGB')
  corners = box.left, box.top, box.left + box.width, box.top + box.height
  return np.asarray(whole.resize((size, size), Image.Resampling.BILINEAR, box=corners))


def by_ours(data: bytes, box: jpeg.Box, size: int = SIZE) -> np.ndarray:
  return jpeg.decode(data, lambda height, width: box, size)


def by_tensorflow(files: Sequence[bytes], boxes: Sequence[jpeg.Box], size: int = SIZE) -> Callable[[], list[np.ndarray]]:
  """A pass of tf.data over all files on one thread, by the operation that decodes no more rows than the crop has."""
  import tensorflow as tf

  def read(data: Any, box: Any) -> Any:
    crop = tf.image.decode_and_crop_jpeg(data, box, channels=3, dct_method='INTEGER_FAST')
    return tf.cast(tf.image.resize(crop, (size, size)), tf.uint8)
  options = tf.data.Options()
  options.threading.private_threadpool_size = options.threading.max_intra_op_parallelism = 1
  given = tf.data.Dataset.from_tensor_slices((list(files), np.array(boxes, np.int32))).with_options(options)
  read_set = given.map(read, num_parallel_calls=1)
  return lambda: list(read_set.as_numpy_iterator())


def make(count: int, seed: int = 0) -> list[bytes]:
  """JPEGs of quality 90 with the frequencies of photographs: noise whose amplitude falls as 1 / f, some 110 kB each."""
  from PIL import Image
  rng, out = np.random.default_rng(seed), []
  falling = 1 / np.maximum(np.hypot(np.fft.fftfreq(HEIGHT)[:, None], np.fft.rfftfreq(WIDTH)[None]), 1 / WIDTH)
  for _ in range(count):
    planes = [np.fft.irfft2(np.fft.rfft2(rng.normal(size=(HEIGHT, WIDTH))) * falling, (HEIGHT, WIDTH)) for _ in range(3)]
    shared = [planes[0] + 0.3 * plane for plane in planes]   # colours go together, as they do
    pixels = np.stack([128 + 45 * plane / plane.std() for plane in shared], 2).clip(0, 255).astype(np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, 'JPEG', quality=90)
    out.append(buffer.getvalue())
  return out


def run(quick: bool) -> list[Row]:
  files = make(20 if quick else 60)
  boxes = [jpeg.random_box(np.random.default_rng(i), HEIGHT, WIDTH) for i in range(len(files))]

  def each(read):
    return lambda: [read(data, box) for data, box in zip(files, boxes, strict=True)]
  ways: dict[str, Callable[[], Any]] = {'Pillow': each(by_pillow), 'ours': each(by_ours)}
  if importlib.util.find_spec('tensorflow') is not None:
    ways['tf.data'] = by_tensorflow(files, boxes)
  times = {name: per(found, len(files)) for name, found in take_turns(ways, 5 if quick else 15).items()}
  rows = [row(f'{name}: 500×375 JPEGs of {sum(map(len, files)) / len(files) / 1e3:.0f} kB, on one core',
              1 / statistics.median(found.cpu), 'images/s') for name, found in times.items()]
  targets = {'Pillow': 1.4, 'tf.data': 1.0}
  return rows + [ratio(f'{name} / ours, time of an image', times[name], times['ours'], targets[name], least=True)
                 for name in times if name != 'ours']

"""Sets that tensorflow-datasets prepared, or prepares in a process of its own: their arrays, without TensorFlow in this one."""

import hashlib
import importlib.util
import io
import os
import pathlib
import re
import subprocess
import sys
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
from absl import logging

from experiments.errors import DataError

PROBE_SECONDS = 6.0  # one request; without a network tensorflow-datasets itself would try for 204 s
PREPARE_SECONDS = 900.0  # 30 MB at 50 kB/s take 600 s, writing the records 20 s; the 170 MB of CIFAR-10 want 200 kB/s


def read_tfds(name: str, origin: str, shapes: Mapping[str, tuple[int, ...]]) -> tuple[pathlib.Path, list[np.ndarray]] | str:
  """Images and labels from tensorflow-datasets: where they are prepared, or else prepared now if TensorFlow is installed.

  Looks at files first. TensorFlow is never loaded into this process: it would take the accelerator's memory.

  Args:
    name: the set's name in tensorflow-datasets.
    origin: address of a file that preparing it would download.
    shapes: split → shape of its images, [N, H, W] where they are grey and [N, H, W, 3] where they have colours.
  Returns: the folder of the prepared set and for each split uint8 images of that shape and labels [N], in the official
    order; or the reason why there are none.
  Raises: DataError that names folder and split, where what is prepared cannot be read.
  """
  root = pathlib.Path(os.environ.get('TFDS_DATA_DIR') or '~/tensorflow_datasets').expanduser()
  folder = newest_prepared(root / name)
  if folder is None:
    reason = _prepare(name, origin, root)
    folder = newest_prepared(root / name)
    if folder is None:
      return f'tensorflow-datasets has not prepared it in {root} and {reason}'
  if importlib.util.find_spec('array_record') is None and any(folder.glob('*.array_record-*')):
    return f'reading {folder} takes the package array_record'
  try:
    import tensorflow_datasets as tfds
  except Exception as error:  # an ImportError, or whatever a protobuf of another version raises
    return f'reading {folder} takes tensorflow-datasets, which cannot be imported ({_line(str(error))})'
  arrays: list[np.ndarray] = []
  for split, shape in shapes.items():
    try:
      arrays += _read_split(tfds.builder_from_directory(folder), split, shape)
    except Exception as error:  # damaged files make its readers raise errors of many types
      reason = f'{type(error).__name__}: {_line(str(error))}'
      raise DataError(f'{folder}: split {split} cannot be read ({reason})') from error
  return folder, arrays


def newest_prepared(folder: pathlib.Path) -> pathlib.Path | None:
  """The folder of the newest version that tensorflow-datasets prepared, or None."""
  found = [path.parent for path in folder.glob('*/dataset_info.json')]
  found = [path for path in found if re.fullmatch(r'\d+\.\d+\.\d+', path.name)]
  return max(found, key=lambda path: tuple(map(int, path.name.split('.'))), default=None)


_PROBE = """import sys, urllib.request
urllib.request.urlopen(urllib.request.Request(sys.argv[1], method='HEAD')).close()"""
_PREPARE = """import sys, tensorflow_datasets as tfds
config = tfds.download.DownloadConfig(try_download_gcs=False)
tfds.builder(sys.argv[1], data_dir=sys.argv[2]).download_and_prepare(download_config=config)"""


def _prepare(name: str, origin: str, root: pathlib.Path) -> str:
  """Downloads and prepares the set in a process of its own; the reason why not, or ''."""
  for module in ('tensorflow', 'tensorflow_datasets'):
    if importlib.util.find_spec(module) is None:
      return f'{module} is not installed to prepare it'
  if failure := _python(_PROBE, [origin], PROBE_SECONDS):
    return f'cannot download it ({failure})'
  logging.info('Preparing %s by tensorflow-datasets in %s', name, root)
  failure = _python(_PREPARE, [name, str(root)], PREPARE_SECONDS)
  return failure and f'failed to ({failure})'


def _python(code: str, arguments: list[str], seconds: float) -> str:
  """Runs code in a new Python without accelerators; '' when it went well, else its last line of errors."""
  environment = {**os.environ, 'CUDA_VISIBLE_DEVICES': '', 'TF_CPP_MIN_LOG_LEVEL': '3'}
  try:
    done = subprocess.run([sys.executable, '-c', code, *arguments], env=environment, timeout=seconds,
                          stdin=subprocess.DEVNULL, capture_output=True, text=True, errors='replace')
  except subprocess.TimeoutExpired:
    return f'no answer within {seconds:g} s'
  return (_line(done.stderr) or f'exit status {done.returncode}') if done.returncode else ''


def _line(text: str) -> str:
  """The last line of a message, cut to what fits into one."""
  return (text.strip().splitlines() or [''])[-1][:200]


def _read_split(builder: Any, split: str, shape: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray]:
  """Images and labels of a prepared split, back in the official order.

  tensorflow-datasets writes the examples sorted by the MD5 of the split's name and the example's number in
  the official file, so the shuffle can be undone; that it was, the checksum shows.
  Source: tensorflow_datasets 4.9.10, core/hashing.py and core/shuffle.py.
  """
  from PIL import Image
  examples = builder.info.splits[split].num_examples
  if examples != shape[0]:
    raise ValueError(f'{examples:,} examples instead of {shape[0]:,}')
  keys = [hashlib.md5(f'{split}{i}'.encode(), usedforsecurity=False).digest() for i in range(shape[0])]
  order = sorted(range(shape[0]), key=keys.__getitem__)
  mode, size = 'L' if len(shape) == 3 else 'RGB', shape[2:0:-1]
  images, labels = np.empty(shape, np.uint8), np.empty(shape[0], np.uint8)
  for position, example in zip(order, _examples(builder, split), strict=True):
    image = Image.open(io.BytesIO(example['image']))
    if image.mode != mode or image.size != size:
      raise ValueError(f'an image of {image.size} pixels in mode {image.mode} instead of {size} in {mode}')
    images[position], labels[position] = np.asarray(image), example['label']
  return images, labels


def _examples(builder: Any, split: str) -> Iterator[dict[str, Any]]:
  """The examples of a split in the order of its files, images still encoded. Needs no TensorFlow."""
  import tensorflow_datasets as tfds
  decoders = {'image': tfds.decode.SkipDecoding()}
  if builder.info.file_format is not tfds.core.FileFormat.TFRECORD:
    source = builder.as_data_source(split, decoders=decoders)
    for start in range(0, len(source), 1000):  # one by one takes twice the time
      yield from source.__getitems__(range(start, min(start + 1000, len(source))))
    return
  for path in builder.info.splits[split].filepaths:
    data = pathlib.Path(path).read_bytes()
    start = 0
    while start < len(data):  # uint64 length, its CRC, the example, its CRC: the set's checksum serves
      end = start + 12 + int.from_bytes(data[start:start + 8], 'little')
      yield builder.info.features.deserialize_example_np(data[start + 12:end], decoders=decoders)
      start = end + 4

"""Photographs by number, from a tree of folders or from what tensorflow-datasets has prepared, and endless batches of them.

A batch is a function of the seed and its number alone: not of the hosts that share it, the processes that decode, or where a run
was stopped. So the state of the stream that a checkpoint has to hold is the number of the step.
"""
import functools
import multiprocessing
import os
import pathlib
import signal
import threading
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np
from absl import flags

from experiments.data import jpeg, tfds
from experiments.errors import DataError, UserError

SUFFIXES = ('.jpeg', '.jpg', '.png', '.webp')   # what a tree of folders is searched for, in any case
CONVERTED, REPLACED = 1, 2   # in `odd`: read by Pillow; cannot be read, and another image stands there
ON_DAMAGE = ('fail', 'skip')


class Source(Protocol):
  """Encoded images with labels, by number."""
  classes: int
  names: list[str]       # of the classes
  described: str   # where they came from, as a phrase

  def __len__(self) -> int: ...
  def __getitem__(self, index: int) -> tuple[bytes, int]: ...
  def name(self, index: int) -> str:
    """What tells the image from others, for messages."""


class Batch(NamedTuple):
  """Arrays of NumPy or JAX; [...] is [B], or nothing for a single image."""
  images: Any   # uint8 [..., S, S, 3]
  labels: Any   # int32 [...]; −1: no image, where a last batch is filled up
  index: Any    # int32 [...]: which image of the source
  odd: Any      # uint8 [...]: 0, CONVERTED or REPLACED


# ---- sources ------------------------------------------------------------------------------------------------------


class Folders:
  """A tree root/class/image: classes are numbered in the order of their names.

  Raises: DataError for a folder without classes, or a class without images.
  """

  def __init__(self, root: pathlib.Path):
    self.root = root
    try:
      self.names = sorted(entry.name for entry in os.scandir(root) if entry.is_dir() and not entry.name.startswith('.'))
    except OSError as error:
      raise DataError(f'{root}: cannot be read ({error.strerror})') from None
    if not self.names:
      raise DataError(f'{root}: holds no folders of classes')
    self.classes = len(self.names)
    files = []
    for name in self.names:
      found = sorted(entry.name for entry in os.scandir(root / name) if entry.name.lower().endswith(SUFFIXES))
      if not found:
        raise DataError(f'{root / name}: holds no images ({", ".join(SUFFIXES)})')
      files.append(found)
    self.files = np.array([name for found in files for name in found])   # one array: a million strings take ten times its room
    self.labels = np.repeat(np.arange(self.classes, dtype=np.int32), [len(found) for found in files])
    self.described = f'{len(self):,} images of {self.classes} classes in the folder {root.name}'

  def __len__(self) -> int:
    return len(self.labels)

  def __getitem__(self, index: int) -> tuple[bytes, int]:
    path = self.path(index)
    try:
      return path.read_bytes(), int(self.labels[index])
    except OSError as error:
      raise DataError(f'{path}: cannot be read ({error.strerror})') from None

  def path(self, index: int) -> pathlib.Path:
    return self.root / self.names[self.labels[index]] / str(self.files[index])

  def name(self, index: int) -> str:
    return f'{self.names[self.labels[index]]}/{self.files[index]}'


class Prepared:
  """A split that tensorflow-datasets has prepared, as ArrayRecord or TFRecord, images as they are encoded. Needs no TensorFlow.

  Args:
    folder: the one with dataset_info.json.
    split: its name there.
  Raises: DataError for what is no such folder, a split that it lacks, or a set without 'image' and 'label'.
  """

  def __init__(self, folder: pathlib.Path, split: str):
    self.folder, self.split = folder, split
    splits, features = self._builder.info.splits, self._builder.info.features
    if split not in splits:
      raise DataError(f'{folder}: has the splits {sorted(splits)}, not {split!r}')
    if not {'image', 'label'} <= features.keys():
      raise DataError(f"{folder}: its examples have {sorted(features)}, and not 'image' and 'label'")
    self.classes, self.names = features['label'].num_classes, list(features['label'].names)
    self._frames = [frames(pathlib.Path(path)) for path in self._files] if self._is_tfrecord else []
    self._starts = np.cumsum([0, *map(len, self._frames)])
    self._count = splits[split].num_examples
    if self._frames and self._starts[-1] != self._count:
      raise DataError(f'{folder}: split {split} has {self._starts[-1]:,} records instead of {self._count:,}')
    self.described = f'{self._count:,} images of {self.classes} classes that tensorflow-datasets prepared as {folder.parent.name}'

  def __len__(self) -> int:
    return self._count

  def __getstate__(self) -> dict[str, Any]:   # readers are opened anew in each process
    return {key: value for key, value in vars(self).items() if key not in ('_builder', '_records')}

  def __getitem__(self, index: int) -> tuple[bytes, int]:
    example = self._example(index)
    return bytes(example['image']), int(example['label'])

  def name(self, index: int) -> str:
    name = self._example(index).get('file_name')
    return name.decode() if isinstance(name, bytes) else str(name or f'image {index} of split {self.split}')

  @functools.cached_property
  def _builder(self) -> Any:
    try:
      import tensorflow_datasets as tfds
      return tfds.builder_from_directory(self.folder)
    except Exception as error:   # an ImportError, or what its parsers raise
      raise DataError(f'{self.folder}: cannot be opened ({str(error).strip().splitlines()[-1][:200]})') from None

  @property
  def _is_tfrecord(self) -> bool:
    return self._builder.info.file_format.value == 'tfrecord'

  @property
  def _files(self) -> list[str]:
    return self._builder.info.splits[self.split].filepaths

  @functools.cached_property
  def _records(self) -> Any:
    import tensorflow_datasets as tfds
    return self._builder.as_data_source(self.split, decoders={'image': tfds.decode.SkipDecoding()})

  def _example(self, index: int) -> dict[str, Any]:
    try:
      if not self._frames:
        return self._records[index]
      import tensorflow_datasets as tfds
      shard = int(np.searchsorted(self._starts, index, 'right')) - 1
      start, length = self._frames[shard][index - self._starts[shard]]
      with open(self._files[shard], 'rb') as file:
        file.seek(start)
        return self._builder.info.features.deserialize_example_np(
            file.read(length), decoders={'image': tfds.decode.SkipDecoding()})
    except Exception as error:   # damaged files make the readers raise errors of many types
      reason = (str(error).strip().splitlines() or [type(error).__name__])[-1][:200]
      raise DataError(f'{self.folder}: example {index} of split {self.split} cannot be read ({reason})') from None


def frames(path: pathlib.Path) -> np.ndarray:
  """Where the records of a TFRecord file lie: int64 [N, 2], start and length. Reads 12 bytes of each.

  Raises: DataError for a file that ends within a record.
  """
  found, end = [], path.stat().st_size
  with path.open('rb') as file:
    at = 0
    while at < end:   # uint64 length, its CRC, the record, its CRC
      file.seek(at)
      length = int.from_bytes(file.read(12)[:8], 'little')
      found.append((at + 12, length))
      at += length + 16
  if at != end:
    raise DataError(f'{path}: ends within record {len(found) - 1}')
  return np.array(found, np.int64).reshape(-1, 2)


SPLITS = {'train': ('train',), 'validation': ('val', 'validation')}   # names of folders


def open_source(root: pathlib.Path, split: str) -> Source:
  """The images of a split under `root`: folders train/CLASS/IMAGE and val/CLASS/IMAGE (or validation/), or what
  tensorflow-datasets has prepared there, at most two folders deep (NAME/VERSION/dataset_info.json), its newest version.

  Raises: DataError for what is no directory, where there is neither, or more than one prepared set.
  """
  if not root.is_dir():
    raise DataError(f'{root}: is no directory')
  if (root / 'dataset_info.json').is_file():
    return Prepared(root, split)
  sets = {folder: newest for folder in (root, *sorted(root.glob('*/'))) if (newest := tfds.newest_prepared(folder))}
  if len(sets) > 1:
    raise DataError(f'{root}: holds several prepared sets; config.data_dir must name one of {", ".join(map(str, sets))}')
  for folder in sets.values():
    return Prepared(folder, split)
  for name in SPLITS[split]:
    if (root / name).is_dir():
      return Folders(root / name)
  archives = '; archives are for python -m experiments.data.prepare' * any(root.glob('ILSVRC2012_img_*.tar'))
  raise DataError(f'{root}: holds neither folders of images ({SPLITS[split][0]}/CLASS/IMAGE) nor a set that tensorflow-datasets '
                  f'has prepared (dataset_info.json){archives}')


# ---- batches ------------------------------------------------------------------------------------------------------


class Load(NamedTuple):
  """A number of an image, and a generator for its crop → the image with its label. Handed to processes that decode.

  What libjpeg-turbo cannot read is read by Pillow, and marked; what Pillow cannot read either is an error, or, by `on_damage`, in
  training the next image of `among` that can be read stands in its place, and in evaluation it has no label.
  """
  source: Source
  size: int
  on_damage: str
  among: np.ndarray | None = None   # ascending: images that may stand in for others; None: all

  def train(self, index: int, rng: np.random.Generator) -> Batch:
    places = np.arange(len(self.source)) if self.among is None else self.among
    first = int(np.searchsorted(places, index))
    candidates = (int(places[(first + i) % len(places)]) for i in range(len(places)))
    batch = self._load(index, candidates, functools.partial(jpeg.random_box, rng))
    return batch._replace(images=batch.images[:, ::-1]) if rng.random() < 0.5 else batch

  def evaluate(self, index: int) -> Batch:
    nothing = Batch(np.zeros((self.size, self.size, 3), np.uint8), np.int32(-1), np.int32(index), np.uint8(0))
    return nothing if index < 0 else self._load(index, [index], jpeg.centre_box, nothing._replace(odd=np.uint8(REPLACED)))

  def _load(self, index: int, candidates: Iterable[int], choose: jpeg.Choose, otherwise: Batch | None = None) -> Batch:
    odd = 0
    for at in candidates:
      data, label = self.source[at]
      if not 0 <= label < self.source.classes:
        raise DataError(f'{self.source.name(at)} has the label {label}; there are {self.source.classes} classes')
      try:
        try:
          image = jpeg.decode(data, choose, self.size)
        except ValueError:
          image, odd = jpeg.decode_any(data, choose, self.size), odd or CONVERTED
        return Batch(image, np.int32(label), np.int32(index), np.uint8(odd))
      except ValueError as error:
        if self.on_damage == 'fail':
          raise DataError(f'{self.source.name(at)} cannot be read ({error}); the same command with '
                          '--config.stream.on_damage=skip goes on without it') from None
        odd = REPLACED
    if otherwise is not None:
      return otherwise
    raise DataError(f'none of the {self.source.described} can be read')


def stack(items: Sequence[Batch]) -> Batch:
  return Batch(*map(np.stack, zip(*items, strict=True)))


def train_batches(load: Load, indices: np.ndarray, batch_size: int, seed: int, start: int = 0, host: int = 0, hosts: int = 1,
                  workers: int = 0) -> Iterator[Batch]:
  """Batches number `start`, start + 1, ... without end: this host's part of each, random crops and flips.

  Every epoch is a new permutation of all images; the last batch of one goes on with the first images of the next.

  Args:
    load: reads the images.
    indices: int [N], which of them.
    batch_size: of all hosts together.
    seed: of order, crops and flips.
    host, hosts: number of this host, and of all. Together they see the same images, whatever their number.
    workers: processes that decode; 0: threads of this one.
  Raises: UserError for a batch that hosts cannot share evenly; while iterating, DataError as `Load` does.
  """
  import grain
  endless = grain.MapDataset.source(indices).seed(seed).shuffle().repeat().random_map(load.train)
  return _iterate(endless, batch_size, start, host, hosts, workers)


def evaluation_batches(load: Load, indices: np.ndarray, batch_size: int, host: int = 0, hosts: int = 1,
                       workers: int = 0) -> Iterator[Batch]:
  """This host's part of each batch of the images once, in order, their centres; the last one is filled up with label −1."""
  import grain
  padded = np.concatenate([indices, np.full(-len(indices) % batch_size, -1, indices.dtype)])
  return _iterate(grain.MapDataset.source(padded).map(load.evaluate), batch_size, 0, host, hosts, workers)


def _iterate(images: Any, batch_size: int, start: int, host: int, hosts: int, workers: int) -> Iterator[Batch]:
  import grain
  if batch_size % hosts:
    raise UserError(f'config.batch_size must be a multiple of the {hosts} hosts, got {batch_size}.')
  # Slices come last: what an image gets at random depends on its place in the whole, so on no other number.
  batches = images[host::hosts].batch(batch_size // hosts, batch_fn=stack)[start:]
  if not workers:
    cores = len(os.sched_getaffinity(0))
    return iter(batches.to_iter_dataset(grain.ReadOptions(num_threads=cores, prefetch_buffer_size=2 * cores)))
  if not flags.FLAGS.is_parsed():   # Grain's worker processes read flags of absl; experiments.main has parsed them
    flags.FLAGS.mark_as_parsed()
  one = batches.to_iter_dataset(grain.ReadOptions(num_threads=1, prefetch_buffer_size=1))
  options = grain.MultiprocessingOptions(num_workers=workers, per_worker_buffer_size=2)
  return iter(one.mp_prefetch(options, worker_init_fn=_follow_the_main_process))


def _follow_the_main_process(*_: int) -> None:
  """In a worker: ends when the main process does, however that ends, and at no signal. Schedulers and terminals send signals to
  all processes, and the main one, which goes on to a checkpoint, still wants batches."""
  for number in (signal.SIGINT, signal.SIGTERM):
    signal.signal(number, signal.SIG_IGN)

  def wait() -> None:
    if (main := multiprocessing.parent_process()) is not None:
      main.join()
      os._exit(1)
  threading.Thread(target=wait, daemon=True).start()


def divide(count: int, held_out: int) -> tuple[np.ndarray, np.ndarray]:
  """Numbers of images for training, and every `held_out`-th one, kept from it to choose settings by; 0: none."""
  numbers = np.arange(count, dtype=np.int32)
  kept = numbers % held_out == held_out - 1 if held_out else np.zeros(count, bool)
  return numbers[~kept], numbers[kept]

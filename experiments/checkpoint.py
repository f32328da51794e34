"""Everything that a run needs to go on, saved and restored together, by Orbax."""
import concurrent.futures
import hashlib
import json
import logging
import pathlib
import warnings
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils

from experiments import commands
from experiments.errors import UserError
from experiments.workdir import write_atomic
from powerprop import masks

DIGESTS = 'sha256.json'   # in the folder of a checkpoint: its files and their checksums


def pack(tree: Any) -> Any:
  """Masks, bool [K, ...], as one bit a weight, uint8 [K, bytes]; other leaves as they are."""
  return jax.tree.map(lambda x: jax.vmap(masks.pack)(x) if _is_mask(x) else x, tree)


def unpack(tree: Any, like: Any) -> Any:
  """What `pack` was given, whose shapes and dtypes are those of `like`."""
  def leaf(x: Any, wanted: Any) -> Any:
    if not _is_mask(wanted):
      return x
    one = jax.ShapeDtypeStruct(wanted.shape[1:], bool)
    return jax.vmap(lambda bits: masks.unpack(bits, one))(x)
  return jax.tree.map(leaf, tree, like)


def _is_mask(x: Any) -> bool:
  return x.dtype == bool and len(x.shape) > 1


class Checkpoints:
  """Numbered checkpoints of one tree in a directory; each appears whole or not at all.

  `background`: `save` returns once the tree is in the host's memory; the next `save`, or `close`, waits for the files. A signal
  to end that comes within a call is raised at its end.
  """

  def __init__(self, directory: pathlib.Path, kept: int, background: bool = False):
    logging.getLogger('absl').setLevel(logging.WARNING)   # Orbax reports every file at level INFO
    # What a killed run had begun to save is cleaned up: the directory is this run's alone.
    options = ocp.CheckpointManagerOptions(max_to_keep=kept, create=True, cleanup_tmp_directories=True,
                                           enable_async_checkpointing=background)
    self._directory, self._background = directory, background
    self._manager = ocp.CheckpointManager(directory.absolute(), options=options)
    # Of its own, so that a checkpoint has its checksums as soon as it is there, and training does not wait for them.
    self._signer = concurrent.futures.ThreadPoolExecutor(1)
    self._signed: concurrent.futures.Future[None] | None = None

  @commands.held()
  def save(self, step: int, tree: Any) -> None:
    self._wait()
    self._manager.save(step, args=ocp.args.StandardSave(tree))
    self._signed = self._signer.submit(self._sign, step)
    if not self._background:
      self._wait()

  def _wait(self) -> None:
    """Until what was saved last is there with its checksums. Raises what its saving raised."""
    if self._signed is not None:
      self._signed.result()

  def _sign(self, step: int) -> None:
    """Adds checksums. Orbax finds a file that is missing or short, but reads other bytes without a word. A run killed before this
    leaves a checkpoint without checksums, which is whole all the same."""
    self._manager.wait_until_finished()
    folder = self._directory / str(step)
    if jax.process_index() == 0 and folder.is_dir():
      write_atomic(folder / DIGESTS, json.dumps(_digests(folder), indent=2) + '\n')

  @commands.held()
  def restore(self, like: Any) -> tuple[int, Any] | None:
    """Newest checkpoint that can be read, with the structure, shapes, dtypes and shardings of `like`; None if there is none.

    One that cannot be read is named in a warning, and set aside as STEP.damaged once an older one has been read: the run comes by
    that step again. Several hosts take the same one: the first looks at checksums, and where one host fails, all do.
    Raises: UserError when there are some and none can be read: starting over in silence would lose a run.
    """
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), like)
    steps = sorted(self._manager.all_steps(), reverse=True)
    if jax.process_count() > 1:
      newest = multihost_utils.process_allgather(np.int32(max(steps, default=-1))).tolist()
      if len(set(newest)) > 1:
        raise UserError(f'the hosts find different checkpoints in {self._directory}, the newest of steps {newest} (-1: none); '
                        'all must see the same directory.')
    for i, step in enumerate(steps):
      folder = self._directory / str(step)
      tree, reason = _attempt(_verify, folder)
      if not reason:   # all hosts have to take part in this
        tree, reason = _attempt(self._manager.restore, step, args=ocp.args.StandardRestore(shapes))
      if not reason:
        for damaged in steps[:i]:
          self._set_aside(damaged)   # else Orbax would save nothing before that step, nor at it
        return step, tree
      warnings.warn(f'checkpoint {folder} cannot be read ({reason}).', stacklevel=2)
    if steps:
      raise UserError(f'no checkpoint in {self._directory} can be read (tried {steps}); delete it to start over.')
    return None

  def _set_aside(self, step: int) -> None:
    """Under another name, for the user to look at: it may have been the machine that failed, and not the files."""
    folder = self._directory / str(step)
    if jax.process_index() == 0:
      names = (f'{step}.damaged', *(f'{step}.damaged_{n}' for n in range(2, 1000)))
      folder.rename(next(path for name in names if not (path := self._directory / name).exists()))
      folder.mkdir()   # for `delete`, by which all hosts forget the step together
    self._manager.delete(step)

  def drop_after(self, step: int) -> None:
    """Deletes checkpoints of later steps, which a run that goes on from `step` makes anew: Orbax saves none before its newest."""
    for later in [s for s in self._manager.all_steps() if s > step]:
      self._manager.delete(later)

  def __enter__(self) -> 'Checkpoints':
    return self

  def __exit__(self, kind: type[BaseException] | None, *_: Any) -> None:
    """Closes, after an error too: a process that ends meanwhile would lose what is being saved. Of several processes others may
    have gone by then, and none waits for them."""
    if kind is None or jax.process_count() == 1:
      self.close()

  @commands.held()
  def close(self) -> None:
    self._wait()
    self._signer.shutdown()
    self._manager.close()


def _attempt(action: Callable[..., Any], *args: Any, **more: Any) -> tuple[Any, str]:
  """What the action gives, and the reason why it failed, '' if it did not. Where one host fails, all do."""
  found, reason = None, ''
  try:
    found = action(*args, **more)
  except Exception as error:   # Orbax passes on whatever its storage layers raise
    reason = str(error).strip().splitlines()[0][:200] if str(error).strip() else type(error).__name__
  if jax.process_count() > 1 and multihost_utils.process_allgather(np.bool_(reason)).any():
    reason = reason or 'on another host'
  return found, reason


def _digests(folder: pathlib.Path) -> dict[str, str]:
  files = sorted(path for path in folder.rglob('*') if path.is_file() and path.name != DIGESTS)
  return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def _verify(folder: pathlib.Path) -> None:
  """Raises ValueError naming a file of a checkpoint that is not as it was saved. The first host looks for all."""
  if jax.process_index() > 0:
    return
  path = folder / DIGESTS
  wanted, found = json.loads(path.read_bytes()) if path.exists() else {}, _digests(folder)
  for name, digest in wanted.items():
    if found.get(name) != digest:
      raise ValueError(f'{name} is {"damaged" if name in found else "missing"}')

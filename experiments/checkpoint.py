"""Everything that a run needs to go on, saved and restored together, by Orbax."""
import logging
import pathlib
from typing import Any

import jax
import orbax.checkpoint as ocp

from experiments.errors import UserError


class Checkpoints:
  """Numbered checkpoints of one tree in a directory; each appears whole or not at all."""

  def __init__(self, directory: pathlib.Path, kept: int):
    logging.getLogger('absl').setLevel(logging.WARNING)   # Orbax reports every file at level INFO
    options = ocp.CheckpointManagerOptions(max_to_keep=kept, create=True, enable_async_checkpointing=False)
    self._directory = directory
    self._manager = ocp.CheckpointManager(directory.absolute(), options=options)

  def save(self, step: int, tree: Any) -> None:
    if step not in self._manager.all_steps():
      self._manager.save(step, args=ocp.args.StandardSave(tree))

  def restore(self, like: Any) -> tuple[int, Any] | None:
    """Newest checkpoint that can be read, with the structure, shapes, dtypes and shardings of `like`; None if there is none.

    Raises: UserError when there are some and none can be read: starting over in silence would lose a run.
    """
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), like)
    steps = sorted(self._manager.all_steps(), reverse=True)
    for step in steps:
      try:
        return step, self._manager.restore(step, args=ocp.args.StandardRestore(shapes))
      except Exception as error:  # Orbax passes on whatever its storage layers raise
        reason = str(error).strip().splitlines()[0][:200] if str(error).strip() else type(error).__name__
        logging.warning('checkpoint %s cannot be read (%s).', self._directory / str(step), reason)
    if steps:
      raise UserError(f'no checkpoint in {self._directory} can be read (tried {steps}); delete it to start over.')
    return None

  def close(self) -> None:
    self._manager.close()

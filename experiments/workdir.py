"""A run's directory: one run at a time, one config for ever, files written whole or not at all, metrics line by line."""
import contextlib
import csv
import fcntl
import importlib.metadata
import io
import json
import os
import pathlib
import platform
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import ml_collections
import numpy as np

from experiments.errors import UserError

# Keys that change no number: a run may go on with other values. Data are held to their checksums wherever they lie; what to do
# with a damaged photograph makes a difference only where the run would else have ended, and is counted.
STREAM = ('on_damage', 'workers', 'shards', 'log_steps', 'checkpoint_steps', 'evaluate_steps', 'profile_steps', 'peak_flops')
WITHOUT_EFFECT = ('title', 'data_dir', 'checkpoint_epochs', 'checkpoints_kept', 'report', *(f'stream.{key}' for key in STREAM))

PACKAGES = ('jax', 'jaxlib', 'dm-haiku', 'optax', 'numpy', 'ml_collections', 'orbax-checkpoint', 'matplotlib')


def write_atomic(path: pathlib.Path, content: bytes | str) -> None:
  """Writes a file beside its place and moves it there, so that a reader, or a kill, never meets half of it."""
  data = content.encode() if isinstance(content, str) else content
  path.parent.mkdir(parents=True, exist_ok=True)
  handle, name = tempfile.mkstemp(dir=path.parent, prefix=f'.{path.name}.')
  try:
    with os.fdopen(handle, 'wb') as f:
      f.write(data)
      f.flush()
      os.fsync(f.fileno())
    os.chmod(name, 0o644)   # mkstemp makes it the owner's alone
    os.replace(name, path)
  except BaseException:
    pathlib.Path(name).unlink(missing_ok=True)
    raise


def write_csv(path: pathlib.Path, rows: Sequence[Mapping[str, Any]]) -> None:
  """Rows of equal keys as CSV; floats in the shortest form that reads back alike."""
  buffer = io.StringIO()
  writer = csv.DictWriter(buffer, list(rows[0]), lineterminator='\n')
  writer.writeheader()
  writer.writerows(rows)
  write_atomic(path, buffer.getvalue())


def write_npz(path: pathlib.Path, **arrays: Any) -> None:
  buffer = io.BytesIO()
  np.savez_compressed(buffer, allow_pickle=False, **arrays)
  write_atomic(path, buffer.getvalue())


@contextlib.contextmanager
def locked(workdir: pathlib.Path) -> Iterator[None]:
  """The directory, made if need be, for this run alone. The lock is the kernel's and goes with the process, however it ends.
  A run that fails before it has written anything leaves no directory behind.

  Raises: UserError when another run holds it, or when it cannot be written.
  """
  try:
    workdir.mkdir(parents=True, exist_ok=True)
    lock = open(workdir / 'lock', 'w')   # noqa: SIM115 held for the whole run
  except OSError as error:
    raise UserError(f'--workdir={workdir} cannot be used: {error.strerror}.') from None
  with lock:
    try:
      fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
      raise UserError(f'--workdir={workdir} is in use by another run; wait for it, or choose another directory.') from None
    try:
      yield
    finally:
      if [path.name for path in workdir.iterdir()] == ['lock']:
        (workdir / 'lock').unlink()
        workdir.rmdir()


def bind(workdir: pathlib.Path, config: ml_collections.ConfigDict) -> None:
  """Makes the directory this config's for good: writes config.json, or compares with the one that is there.

  Raises: UserError naming the first key that differs, those that change no result aside.
  """
  check(workdir, config)
  write_atomic(workdir / 'config.json', config_json(config))


def check(workdir: pathlib.Path, config: ml_collections.ConfigDict, unless: ml_collections.ConfigDict | None = None) -> None:
  """Raises UserError where the directory is bound to another config than this.

  `unless`: a key that is lacking there, as the run is older than the key, is no difference where `config` has its value of this.
  """
  path = workdir / 'config.json'
  if not path.exists():
    return
  try:
    old = json.loads(path.read_bytes())
    if not isinstance(old, dict):
      raise ValueError('not an object')
  except ValueError as error:
    raise UserError(f'{path} is damaged ({error}); it tells which config the directory belongs to.') from None
  theirs, ours = flat(old), flat(json.loads(config_json(config)))
  if 'stream.compute' in theirs:   # as the key was called while it held for the protocol 'streamed' alone
    before = theirs.pop('stream.compute')
    theirs['compute'] = before if theirs.get('protocol') == 'streamed' else 'float32'
  default = flat(json.loads(config_json(unless))) if unless is not None else {}
  for key in sorted((theirs.keys() | ours.keys()) - set(WITHOUT_EFFECT)):
    if theirs.get(key, default.get(key)) != ours.get(key):
      raise UserError(f'--workdir={workdir} belongs to another config: config.{key} is {theirs.get(key)} there and '
                      f'{ours.get(key)} here; choose another directory, or delete that one.')


def flat(tree: Mapping[str, Any], prefix: str = '') -> dict[str, Any]:
  """The values of a config as it was read from JSON, by their dotted keys."""
  found: dict[str, Any] = {}
  for key, value in tree.items():
    found.update(flat(value, f'{prefix}{key}.') if isinstance(value, dict) else {prefix + key: value})
  return found


def config_json(config: ml_collections.ConfigDict) -> str:
  return json.dumps(config.to_dict(), indent=2) + '\n'


def provenance() -> dict[str, Any]:
  """What a reader needs to make a result again: command, commit, versions, kind of device."""
  def git(*args: str) -> str | None:
    try:
      root = pathlib.Path(__file__).parent
      done = subprocess.run(['git', *args], cwd=root, capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
      return None
    return done.stdout.strip() if done.returncode == 0 else None

  # What a run writes to results/ is no change of what it was made with.
  status = git('status', '--porcelain', '--untracked-files=no', '--', ':/', ':(top,exclude)results')
  devices = jax.devices()
  if devices[0].platform == 'cpu':
    machine = f'{os.cpu_count()}-core {platform.machine().replace("_", "-")}'
  else:
    machine = f'{len(devices)} x {devices[0].device_kind}'
  return {
      'command': 'python -m experiments.main ' + shlex.join(sys.argv[1:]),
      'commit': git('rev-parse', 'HEAD'),
      'dirty': bool(status),
      'versions': {'python': platform.python_version()} | {p: importlib.metadata.version(p) for p in PACKAGES},
      'devices': machine,
  }


class Metrics:
  """metrics.jsonl, and TensorBoard event files where tensorboardX is installed. A line a record, with its step.

  A run that goes on from a checkpoint drops what was written after it, a torn last line included.
  """

  def __init__(self, workdir: pathlib.Path, step: int):
    path = workdir / 'metrics.jsonl'
    kept = []
    for line in path.read_text().splitlines() if path.exists() else []:
      with contextlib.suppress(ValueError, KeyError, TypeError):
        if (record := json.loads(line))['step'] <= step:
          kept.append(record)
    write_atomic(path, ''.join(json.dumps(record) + '\n' for record in kept))
    self.last: dict[str, Any] = kept[-1] if kept else {}
    self._file = path.open('a')
    self._events = _event_writer(workdir, step)

  def write(self, step: int, record: Mapping[str, Any], scalars: Mapping[str, float]) -> None:
    """`record` goes to the JSONL file, `scalars` to TensorBoard."""
    self._file.write(json.dumps({'step': step, **record}) + '\n')
    self._file.flush()
    if self._events is not None:
      for name, value in scalars.items():
        self._events.add_scalar(name, value, step)

  def close(self) -> None:
    self._file.close()
    if self._events is not None:
      self._events.close()


def _event_writer(workdir: pathlib.Path, step: int) -> Any:
  try:
    from tensorboardX import SummaryWriter  # an optional extra
  except ImportError:
    return None
  return SummaryWriter(str(workdir / 'tensorboard'), purge_step=step + 1, flush_secs=1)   # whoever is killed closes nothing

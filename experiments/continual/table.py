"""Lays several runs of the protocol 'continual' side by side: one table, and the figures of a report with all methods in them.

  python -m experiments.continual.table --out=DIRECTORY WORKDIR [WORKDIR ...]

Writes table.md and figures/ to --out and prints the table. Methods have the learning rate and strength of their runs; where two
runs have the same method, all are shown with the last two parts of their workdirs.
"""
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from absl import flags

from experiments import figures
from experiments.commands import run
from experiments.continual import results
from experiments.differences import note
from experiments.errors import UserError
from experiments.results import NET, Row, read_config, read_results
from experiments.workdir import write_atomic

FLAGS = flags.FlagValues()   # of this command alone
OUT = flags.DEFINE_string('out', None, 'Required. Directory for the table and the figures.', flag_values=FLAGS)
ALIKE = ('dataset', 'steps', 'batch_size')   # what runs must share to be compared, and all that says what the tasks are
TASKS = ('sequence', 'tasks', 'scenario', 'datasets', 'sequence_seed', 'degrees')


def main(argv: list[str]) -> None:
  if not OUT.value or len(argv) < 2:
    raise UserError('--out and a workdir are needed; see --help.')
  for path in write(Path(OUT.value), [Path(name) for name in argv[1:]]):
    print(f'wrote {path}')
  print((Path(OUT.value) / 'table.md').read_text(), end='')


def write(out: Path, workdirs: Sequence[Path]) -> list[Path]:
  """Returns: the paths, table.md last. Raises: UserError for runs of different tasks, and for a workdir named twice."""
  if len({workdir.resolve() for workdir in workdirs}) < len(workdirs):
    raise UserError(f'a workdir is named twice: {" ".join(map(str, workdirs))}.')
  configs = [read_config(workdir) for workdir in workdirs]
  for workdir, config in zip(workdirs, configs, strict=True):
    if config.get('protocol') != 'continual':
      raise UserError(f"{workdir} is no run of the protocol 'continual'.")
    for theirs, ours, keys in ((config, configs[0], ALIKE), (config['continual'], configs[0]['continual'], TASKS)):
      for key in keys:
        if theirs[key] != ours[key]:
          raise UserError(f'{workdir} has other tasks than {workdirs[0]}: {key} is {theirs[key]!r} and {ours[key]!r}.')
  nets = [tuple(row[axis] for axis in NET) for row in gather(workdirs, read_results)]
  names = ['/'.join(workdir.resolve().parts[-2:]) for workdir in workdirs]   # the last part alone may be the name of a method
  told = () if len(set(nets)) == len(nets) else names if len(set(names)) == len(names) else [str(w) for w in workdirs]
  rows, matrix, capacity, overlap = (gather(workdirs, read, told) for read in (
      read_results, results.read_matrix, results.read_capacity, results.read_mask_overlap))
  shown = results.figures_of(matrix, capacity, overlap, f'{configs[0]["continual"]["tasks"]} tasks.')
  paths = [path for one in shown for path in figures.save(one.figure, out / 'figures' / one.stem)]
  differences = note(workdirs, configs)
  write_atomic(out / 'table.md', results.text(rows, matrix, capacity) + (f'\n{differences}\n' if differences else ''))
  return [*paths, out / 'table.md']


def gather(workdirs: Sequence[Path], read: Callable[[Path], list[Row]], names: Sequence[str] = ()) -> list[Row]:
  """The rows of all runs, with their names if any; methods have rates and strengths of their own, which tell no groups apart."""
  same: dict[str, Any] = {'learning_rate': 0.0, 'penalty': 0.0}
  return [row | same | ({'run': names[i]} if names else {}) for i, workdir in enumerate(workdirs) for row in read(workdir)]


if __name__ == '__main__':
  run(main, __doc__ or '', FLAGS)

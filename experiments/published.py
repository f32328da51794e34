"""Finished cells of configs/imagenet.py beside what has been published for them. Trains nothing."""
from collections.abc import Mapping, Sequence
from typing import Any

from configs import imagenet, sweeps
from experiments.errors import UserError
from experiments.results import Run, Table, percent, share, summarise
from experiments.workdir import WITHOUT_EFFECT

# What may differ from the config of a cell without making it another one.
OWN = {*WITHOUT_EFFECT, 'sweep.seed'} - {'stream.on_damage'}
TESTED = 50_000          # validation images of ImageNet, which all published accuracies are of
DENSE = ('layer', 1.0)   # scope and density of a row that nothing has been pruned for


def cell_of(run: Run) -> str | None:
  """The name of the cell that a run is; None for runs of other configs."""
  name = run.config['name'].removeprefix('imagenet_')
  return name if run.config['name'] == f'imagenet_{name}' and name in imagenet.CELLS else None


def published_table(runs: Sequence[Run]) -> Table | None:
  """A line for each cell among `runs` and each setting of it, other seeds together: top-1 accuracy on the validation images of
  ImageNet, ours and as published, in %, and with what settings ours differs. None where there are none.

  Raises: UserError where two runs of one line have the same seed.
  """
  found: dict[str, dict[tuple[str, ...], list[Run]]] = {}
  for run in runs:
    if (cell := cell_of(run)) is not None:
      found.setdefault(cell, {}).setdefault((*differences(cell, run.config), *other_images(run)), []).append(run)
  lines = [_line(cell, otherwise, found[cell][otherwise])   # in the order of the cells
           for cell in imagenet.CELLS if cell in found for otherwise in sorted(found[cell])]
  header = ['cell', 'n', 'kept', 'training (% of dense)', 'accuracy (%)', 'published (%)', 'difference', 'source',
            'set otherwise']
  return Table(header, lines) if lines else None


def _line(cell: str, otherwise: Sequence[str], runs: Sequence[Run]) -> list[str]:
  of_seed: dict[Any, Run] = {}
  for run in runs:
    (seed,) = run.config['sweep']['seed']
    if seed in of_seed:
      raise UserError(f'{of_seed[seed].workdir} and {run.workdir} are both {cell} with seed {seed}; each seed may come once.')
    of_seed[seed] = run
  rows = [row for run in runs for row in run.results if not cell.startswith('dense') or (row['scope'], row['density']) == DENSE]
  accuracy = summarise(row['test_accuracy'] for row in rows)
  kept = summarise(row['kept'] / row['weights'] for row in rows)
  known, (_, sparsity, _, times) = sweeps.CELLS[cell], imagenet.CELLS[cell]
  there = abs(kept.mean / (1 - sparsity / 100) - 1) < 0.1   # STR reaches what its penalty makes of it
  beside = ['–', '–', 'none known'] if known is None else [
      f'{known.accuracy:g}', f'{100 * accuracy.mean - known.accuracy:+z.2f}' if accuracy.n and there else '–', known.source]
  # In runs the unit is dense training of the same length; here one of length 1, as papers have it.
  cost = summarise(times * row['training_operations'] for run in runs for row in run.statistics)
  return [cell, str(accuracy.n), share(kept.mean), percent(cost, decimals=1), percent(accuracy), *beside,
          ', '.join(otherwise) or 'nothing']


def differences(cell: str, config: Mapping[str, Any]) -> list[str]:
  """KEY=VALUE for each key in which a run is not the cell that its name says."""
  asked, given = _flat(imagenet.get_config(cell).to_dict()), _flat(config)
  return [f'{key}={given.get(key)!r}' for key in sorted(asked.keys() | given.keys())
          if key not in OWN and asked.get(key) != given.get(key)]


def other_images(run: Run) -> list[str]:
  """Of how many test images the accuracy is, where they are not ImageNet's."""
  count = run.record.get('evaluated_images', {}).get('test', TESTED)
  return [] if count == TESTED else [f'{count:,} test images instead of {TESTED:,}']


def _flat(tree: Mapping[str, Any], prefix: str = '') -> dict[str, Any]:
  """Values by dotted keys, tuples as the lists that they become in a file."""
  found: dict[str, Any] = {}
  for key, value in tree.items():
    if isinstance(value, Mapping):
      found |= _flat(value, f'{prefix}{key}.')
    else:
      found[prefix + key] = list(value) if isinstance(value, tuple) else value
  return found

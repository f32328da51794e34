"""In what the configs of runs that stand in one table differ, so that nobody takes unlike things for like."""
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from experiments.workdir import WITHOUT_EFFECT, flat

# Keys that tell the lines or columns of such a table apart, are chosen for each algorithm, or leave its numbers alone.
BY_DESIGN = frozenset({'name', 'protocol', 'sweep.algorithm', 'sweep.alpha', 'sweep.sparsity', 'sweep.penalty',
                       'sweep.learning_rate', 'alpha_rates', 'prune.densities', 'prune.figure_density', 'prune.sampled_weights',
                       'lottery.rounds', 'lottery.prune_share', 'lottery.rewind_steps', *WITHOUT_EFFECT})
NAMED = 3   # at most so many runs are named of a value that most have


def note(workdirs: Sequence[Path], configs: Sequence[Mapping[str, Any]]) -> str:
  """'note: runs differ in steps: 1,500 (gradual), 300 (rigl).', or '' where they do not.

  A key that the config of an older run lacks is compared among the others.
  """
  names = [workdir.resolve().name for workdir in workdirs]
  names = names if len(set(names)) == len(names) else [str(workdir) for workdir in workdirs]
  values = [{key: _text(value) for key, value in flat(config).items() if key not in BY_DESIGN} for config in configs]
  told = []
  for key in dict.fromkeys(key for one in values for key in one):
    runs: dict[str, list[str]] = {}
    for name, one in zip(names, values, strict=True):
      if key in one:
        runs.setdefault(one[key], []).append(name)
    if len(runs) > 1:
      most = max(runs, key=lambda value: len(runs[value]))
      told.append(f'{key}: ' + ', '.join(f'{value} ({_names(some, value == most)})' for value, some in runs.items()))
  return f'note: runs differ in {"; ".join(told)}.' if told else ''


def _names(runs: Sequence[str], most: bool) -> str:
  return f'the other {len(runs)}' if most and len(runs) > NAMED else ', '.join(runs)


def _text(value: Any) -> str:
  """As it is read in a sentence: thousands apart, the values of a sweep with blanks between."""
  if isinstance(value, list | tuple):
    return ' '.join(map(_text, value)) or 'nothing'
  if isinstance(value, bool) or not isinstance(value, int | float):
    return str(value) or "''"
  return f'{value:,}' if isinstance(value, int) else f'{value:g}'

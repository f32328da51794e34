"""What a run left in its workdir as numbers: its files read and checked, networks grouped, means and tables. Draws nothing."""
import csv
import io
import json
import zipfile
import zlib
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from experiments.errors import UserError

Row = dict[str, Any]

# What tells groups of networks apart; within a group the seed alone differs. 'run': among several workdirs.
TRAINED = 'trained'   # the scope of masks that training has made
AXES = ('algorithm', 'alpha', 'optimizer', 'update', 'biases', 'scope', 'learning_rate', 'penalty', 'run')
NET = ('alpha', 'seed', 'learning_rate', 'optimizer', 'update', 'biases', 'algorithm', 'sparsity', 'penalty')
TEXT = ('optimizer', 'update', 'biases', 'algorithm', 'scope')
LATER = {'algorithm': 'dense', 'sparsity': 0.0, 'penalty': 0.0}   # columns that older runs lack, and what they would say
SHARES = ('density', 'validation_accuracy', 'test_accuracy', 'overlap', 'sign_flips', 'survivor_sign_flips',
          'survivors_from_smaller_half', 'forward_operations', 'task_accuracy', 'class_accuracy', 'inferred_accuracy',
          'learned', 'worst_task',
          'tasks_found', 'tasks_found_by_gradient', 'used', 'new', 'total')
PERCENT = (*SHARES, 'training_operations')   # the latter may be several times that of a dense network
NAMES = {'alpha': 'α', 'optimizer': 'optimiser', 'sgd': 'SGD', 'adam': 'Adam', 'adamw': 'AdamW',
         'learning_rate': 'learning rate', 'target_propagation': 'target propagation', 'layer': 'layer-wise',
         'sign_flips': 'sign flips (%)', 'survivor_sign_flips': 'sign flips of survivors (%)',
         'survivors_from_smaller_half': 'survivors from the smaller half (%)', 'kurtosis': 'excess kurtosis',
         'forward_operations': 'operations of a forward pass (% of dense)',
         'training_operations': 'operations of training (% of dense)',
         'fine_tune': 'fine-tuning', 'separate': 'separate networks', 'joint': 'joint training', 'ewc': 'EWC',
         'ewc_online': 'online EWC', 'synaptic_intelligence': 'Synaptic Intelligence', 'a_gem': 'A-GEM', 'packnet': 'PackNet',
         'efficient_packnet': 'EfficientPackNet', 'learned': 'accuracy when learned (%)', 'worst_task': 'worst task (%)',
         'tasks_found': 'tasks found (%)', 'tasks_found_by_gradient': 'tasks found by gradient (%)',
         'bytes_per_task': 'bytes kept a task', 'network_bytes': 'bytes of the network',
         'mnist': 'MNIST', 'fashion_mnist': 'Fashion-MNIST', 'cifar10': 'CIFAR-10', 'imagenet': 'ImageNet',
         'imagenette': 'ten classes of photographs'}
AFTER_TASKS = {'test_accuracy': 'accuracy (%)', 'forgetting': 'forgetting', 'backward_transfer': 'backward',
               'forward_transfer': 'forward', 'task_accuracy': 'task told (%)', 'class_accuracy': 'of all classes (%)',
               'inferred_accuracy': 'task inferred (%)', 'density': 'weights used, of each network (%)'}
DENSITIES = (1.0, 0.3, 0.1, 0.05, 0.02)   # of a table that fits a terminal
CONFIG = {'name': str, 'dataset': str, 'steps': int, 'batch_size': int, 'report': list, 'sweep': dict, 'prune': dict}
RECORD = {'command': str, 'commit': (str, type(None)), 'dirty': bool, 'versions': dict, 'devices': str,
          'data': str, 'seconds': dict, 'finished': str}


class Run(NamedTuple):
  """What a workdir says. `record` is run.json; the rows of CSV files have numbers where numbers belong."""
  workdir: Path
  config: dict[str, Any]
  record: dict[str, Any]
  results: list[Row]
  statistics: list[Row]


class Summary(NamedTuple):
  """Of the finite values: mean, standard deviation with n − 1 (NaN for n < 2), and how many they are."""
  mean: float
  sd: float
  n: int


class Table(NamedTuple):
  header: list[str]
  rows: list[list[str]]


# Reading

def read_run(workdir: Path) -> Run:
  """Raises: UserError, naming the file, where one is missing, damaged or lacks a key or a column."""
  config = read_config(workdir)
  statistics = read_csv(workdir / 'statistics.csv', NET)
  return Run(workdir, config, _json(workdir / 'run.json', RECORD), read_results(workdir), statistics)


def read_config(workdir: Path) -> dict[str, Any]:
  """config.json, as main saved it."""
  return _json(workdir / 'config.json', CONFIG)


def read_results(workdir: Path) -> list[Row]:
  """results.csv: a row for each network, scope and density; accuracies are shares or NaN."""
  path = workdir / 'results.csv'
  rows = read_csv(path, (*NET, 'scope', 'density', 'kept', 'weights', 'validation_accuracy', 'test_accuracy'))
  for line, row in enumerate(rows, 2):
    if not 0 <= row['kept'] <= row['weights']:
      raise UserError(f'{path}, line {line}: kept is {row["kept"]:g} of {row["weights"]:g} weights.')
  return rows


def read_overlap(workdir: Path) -> list[Row]:
  """overlap.csv: a row for each network, scope and density."""
  return read_csv(workdir / 'overlap.csv', (*NET, 'scope', 'density', 'overlap'))


def read_weights(workdir: Path) -> tuple[float, dict[float, tuple[np.ndarray, np.ndarray, np.ndarray]]]:
  """weights.npz: density of the masks, and α → (initial, final, kept) of the sampled weights, [N] each."""
  path = workdir / 'weights.npz'
  try:
    with np.load(io.BytesIO(_bytes(path)), allow_pickle=False) as file:
      sampled = {float(alpha): (file[f'initial_{g}'], file[f'final_{g}'], file[f'kept_{g}'].astype(bool))
                 for g, alpha in enumerate(file['alpha'])}
      density = float(file['density'])
  except (OSError, ValueError, KeyError, EOFError, TypeError, zipfile.BadZipFile, zlib.error) as error:
    raise UserError(f'{path} is damaged: {error}.') from None
  if not sampled or any(len({array.shape for array in arrays}) > 1 for arrays in sampled.values()):
    raise UserError(f'{path} is damaged: each alpha needs as many initial values as final ones and masks.')
  return density, sampled


def _json(path: Path, types: Mapping[str, Any]) -> dict[str, Any]:
  try:
    content = json.loads(_bytes(path))
  except ValueError as error:
    raise UserError(f'{path} is damaged: {error}.') from None
  for key, kind in types.items():
    if not isinstance(content, dict) or key not in content:
      raise UserError(f'{path} lacks {key}.')
    if not isinstance(content[key], kind):
      raise UserError(f'{path}: {key} is {content[key]!r}, which is of the wrong type.')
  return content


def read_csv(path: Path, columns: Sequence[str], told_by: Sequence[str] = ('scope', 'density')) -> list[Row]:
  """The rows of a file with at least `columns`, all but those of TEXT numbers. `told_by`: what tells apart those of a network."""
  try:
    lines = list(csv.reader(io.StringIO(_bytes(path).decode(), newline=''), strict=True))
  except (csv.Error, UnicodeDecodeError) as error:
    raise UserError(f'{path} is damaged: {error}.') from None
  header = lines[0] if lines else []
  if missing := [column for column in columns if column not in header and column not in LATER]:
    raise UserError(f'{path} lacks the column{"s" if len(missing) > 1 else ""} {", ".join(missing)}.')
  if len(lines) < 2:
    raise UserError(f'{path} holds no rows.')
  rows: list[Row] = []
  seen = set()
  for number, values in enumerate(lines[1:], 2):
    where = f'{path}, line {number}'
    if len(values) != len(header):
      raise UserError(f'{where}: {len(values)} values where the header has {len(header)}.')
    row: Row = {column: text if column in TEXT else _number(column, text, where)
                for column, text in zip(header, values, strict=True)}
    row = LATER | row
    what = tuple(row.get(axis) for axis in (*NET, *told_by))
    if what in seen:
      raise UserError(f'{where} repeats the network, {" and ".join(told_by)} of an earlier line.')
    seen.add(what)
    rows.append(row)
  return rows


def _number(column: str, text: str, where: str) -> float:
  try:
    value = float(text)
  except ValueError:
    raise UserError(f'{where}: {column} is {text!r}, which is no number.') from None
  if not np.isfinite(value) and (column in NET or column == 'density'):
    raise UserError(f'{where}: {column} is {text}, which tells no network.')
  if column in SHARES and not (0 <= value <= 1 or np.isnan(value)):
    raise UserError(f'{where}: {column} is {text}; it is a share, 0 to 1.')
  return value


def _bytes(path: Path) -> bytes:
  try:
    return path.read_bytes()
  except FileNotFoundError:
    raise UserError(f'{path} is missing; a run leaves it there at its end, and one that was stopped goes on by the '
                    'same command.') from None
  except OSError as error:
    raise UserError(f'{path} cannot be read: {error.strerror}.') from None


# Numbers

def summarise(values: Iterable[float]) -> Summary:
  finite = np.array([value for value in values if np.isfinite(value)], np.float64)
  return Summary(float(finite.mean()) if finite.size else np.nan,
                 float(finite.std(ddof=1)) if finite.size > 1 else np.nan, finite.size)


def groups(rows: Sequence[Row], axes: Sequence[str]) -> dict[tuple[Any, ...], list[Row]]:
  """Rows by their values on `axes`: numbers ascending, words in the order in which they are met."""
  ranks = []
  for axis in axes:
    values = list(dict.fromkeys(row[axis] for row in rows))
    values = values if isinstance(values[0], str) else sorted(values)
    ranks.append({value: i for i, value in enumerate(values)})
  found: dict[tuple[Any, ...], list[Row]] = {}
  for row in rows:
    found.setdefault(tuple(row[axis] for axis in axes), []).append(row)
  order = sorted(found, key=lambda key: [rank[value] for rank, value in zip(ranks, key, strict=True)])
  return {key: found[key] for key in order}


def varying(rows: Sequence[Row], but: Sequence[str] = ()) -> list[str]:
  """The axes on which rows differ, other than `but`; 'alpha' where there are none: a group needs a name."""
  axes = [axis for axis in AXES if axis not in but and len({row.get(axis) for row in rows}) > 1]
  return axes or ['alpha']


def reaches(rows: Sequence[Row]) -> bool:
  """Has a penalty made the networks sparse, each with a density of its own?"""
  return len({row.get('penalty') for row in rows}) > 1 and all(row['scope'] == TRAINED for row in rows)


def validation_score(members: Iterable[Row]) -> float:
  """Mean validation accuracy; −∞ where a network has none."""
  mean = float(np.mean([row['validation_accuracy'] for row in members]))
  return mean if np.isfinite(mean) else -np.inf


def best_settings(rows: Sequence[Row], tuned: Sequence[str] = ('learning_rate',)) -> list[Row]:
  """Of each group the rows at the values of `tuned` with the best validation accuracy, mean over densities and seeds.

  A value at which a network has no finite accuracy is taken only if all are so; of equals, the smallest.
  """
  chosen: list[Row] = []
  for members in groups(rows, varying(rows, tuned)).values():
    chosen.extend(max(groups(members, tuned).values(), key=validation_score))   # the first of equals
  return chosen


def nearest(rows: Sequence[Row], density: float) -> float:
  """The density of the rows that is nearest to the wanted one."""
  return min((row['density'] for row in rows), key=lambda found: (abs(found - density), found))


# Tables

def table(rows: Sequence[Row], densities: Sequence[float] = DENSITIES) -> str:
  """Test accuracy (%), mean ± sd over the n networks of each group, as text that is Markdown as well.

  Args:
    rows: as `read_results` gives them; those of several runs carry a 'run' each.
    densities: shares of weights kept, of which the nearest that the rows have are shown.
  """
  what = ('after all tasks, their mean' if all('forgetting' in row for row in rows) else 'by weights kept')
  lost = diverged(rows)
  return (f'Test accuracy (%) {what}, mean ± sd over n networks:\n\n' + markdown(accuracy_table(rows, densities))
          + (f'\n\n{lost}' if lost else ''))


def diverged(rows: Sequence[Row]) -> str:
  """Which groups have networks without an accuracy after several tasks; '' where none has."""
  if not all('forgetting' in row for row in rows):
    return ''
  axes, told = varying(rows), []
  for key, members in groups(rows, axes).items():
    if lost := sum(not np.isfinite(row['test_accuracy']) for row in members):
      told.append(f'{label_of(axes, key)}: {lost} of {len(members)}')
  return f'Diverged, and in no mean: {"; ".join(told)}.' if told else ''


def markdown(found: Table) -> str:
  """The table as Markdown, its columns aligned."""
  lines = [[cell.replace('|', r'\|') for cell in line] for line in (found.header, *found.rows)]
  widths = [max(len(line[i]) for line in lines) for i in range(len(found.header))]
  lines.insert(1, ['-' * width for width in widths])
  padded = [[cell.ljust(width) for cell, width in zip(line, widths, strict=True)] for line in lines]
  return '\n'.join(f'| {" | ".join(line)} |' for line in padded)


def accuracy_table(rows: Sequence[Row], densities: Sequence[float], always: Sequence[str] = ()) -> Table:
  """A line for each group; columns for axes that vary and those of `always`, n, and the nearest densities; where a penalty has
  made the networks sparse, the density that they reached; after several tasks, what is left of them, and of which method."""
  after_tasks = all('forgetting' in row for row in rows)
  axes = [axis for axis in AXES if axis in varying(rows) or axis in always or (axis == 'algorithm' and after_tasks)]
  members_of = groups(rows, axes)
  if after_tasks:
    known = [name for name in AFTER_TASKS if any(np.isfinite(row.get(name, np.nan)) for row in rows)]
    lines = []
    for key, members in members_of.items():
      learned = [row for row in members if np.isfinite(row['test_accuracy'])]   # what a diverged one uses is no result
      found = [summarise(row.get(name, np.nan) for row in learned) for name in known]
      lines.append([*map(word, key), str(summarise(row['test_accuracy'] for row in members).n), *map(percent, found)])
    return Table([*map(word, axes), 'n', *(AFTER_TASKS[name] for name in known)], lines)
  if reaches(rows):
    reached = []
    for key, members in members_of.items():
      kept, accuracy = (summarise(row[name] for row in members) for name in ('density', 'test_accuracy'))
      reached.append([*map(word, key), str(accuracy.n), percent(kept), percent(accuracy)])
    return Table([*map(word, axes), 'n', 'kept (%)', 'accuracy (%)'], reached)
  # Runs may have densities of their own: what is nearest is asked of each group.
  shown = [{nearest(members, density) for density in densities} for members in members_of.values()]
  columns = together(shown)
  lines = []
  for (key, members), own in zip(members_of.items(), shown, strict=True):
    found = [summarise(row['test_accuracy'] for row in members if row['density'] in own & column) for column in columns]
    lines.append([*map(word, key), span(one.n for column, one in zip(columns, found, strict=True) if own & column),
                  *map(percent, found)])
  return Table([*map(word, axes), 'n', *(share(min(c)) if min(c) == max(c) else f'{share(min(c))} to {share(max(c))}'
                                         for c in columns)], lines)


def together(shown: Sequence[set[float]]) -> list[set[float]]:
  """Columns for the densities of several groups, in descending order: those a fifth apart at most share one, unless they are of
  one group."""
  columns: list[set[float]] = []
  for density in sorted(set().union(*shown), reverse=True):
    fits = bool(columns) and density >= max(columns[-1]) / 1.2
    if fits and not any(density in own and own & columns[-1] for own in shown):
      columns[-1].add(density)
    else:
      columns.append({density})
  return columns


def statistics_table(rows: Sequence[Row]) -> Table:
  """A line for each group; a column for each statistic of its networks, mean ± sd, shares in per cent."""
  axes = varying(rows)
  names = [name for name in rows[0] if name not in NET and any(np.isfinite(row[name]) for row in rows)]
  lines = []
  for key, members in groups(rows, axes).items():
    found = [summarise((100 if name in PERCENT else 1) * row[name] for row in members) for name in names]
    lines.append([*map(word, key), span(one.n for one in found), *map(_rounded, found)])
  return Table([*map(word, axes), 'n', *map(word, names)], lines)


def percent(summary: Summary, sign: str = '', decimals: int = 2) -> str:
  """Shares in %, as `mean_sd` writes them."""
  return mean_sd(Summary(100 * summary.mean, 100 * summary.sd, summary.n), decimals, sign)


def _rounded(summary: Summary) -> str:
  """Two digits of the standard deviation, or four of the mean where there is none."""
  sd, mean = (x if np.isfinite(x) else 0.0 for x in (summary.sd, summary.mean))
  if sd > 1e-12 * abs(mean):   # the deviation of equal values is not 0 but a rounding error
    last = np.floor(np.log10(sd)) - 1
  else:
    last = np.floor(np.log10(abs(mean))) - 3 if mean else 0
  return mean_sd(summary, int(np.clip(-last, 0, 8)))


def mean_sd(summary: Summary, decimals: int, sign: str = '') -> str:
  """`sign`: '+' to have one before positive means too."""
  spread = f' ± {summary.sd:,.{decimals}f}' if summary.n > 1 else ''
  return f'{summary.mean:{sign},.{decimals}f}{spread}' if summary.n else '–'


def share(density: float) -> str:
  return f'{100 * density:.3g} %'


def span(counts: Iterable[int]) -> str:
  found = sorted(set(counts))
  return f'{found[0]}' if len(found) == 1 else f'{found[0]} to {found[-1]}'


def label_of(axes: Sequence[str], key: Sequence[Any]) -> str:
  """A group's name in legends."""
  frames = {'alpha': 'α = {}', 'learning_rate': 'learning rate {}', 'biases': '{} biases', 'penalty': 'penalty {}'}
  return ', '.join(frames.get(axis, '{}').format(word(value)) for axis, value in zip(axes, key, strict=True))


def word(value: Any) -> str:
  return NAMES.get(value, value) if isinstance(value, str) else f'{value:g}'

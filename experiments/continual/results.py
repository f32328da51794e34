"""The files of a run of the protocol 'continual', read and checked, and the figures and tables of its report."""
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from experiments.continual import figures, measures
from experiments.figures import Curve
from experiments.page import Shown
from experiments.results import (
  NET,
  Row,
  Run,
  Table,
  groups,
  label_of,
  markdown,
  percent,
  read_csv,
  span,
  summarise,
  table,
  varying,
  word,
)

BANDS = 5   # of tasks, in the table by when they were learned


def read_matrix(workdir: Path) -> list[Row]:
  """matrix.csv: a row for each network, number of tasks learned, and task."""
  return read_csv(workdir / 'matrix.csv', (*NET, 'after', 'task', 'test_accuracy', 'class_accuracy'), ('after', 'task'))


def read_capacity(workdir: Path) -> list[Row]:
  """capacity.csv: a row for each network that keeps masks, and task; none where there is no such network."""
  path = workdir / 'capacity.csv'
  return read_csv(path, (*NET, 'task', 'used', 'new', 'total'), ('task',)) if path.exists() else []


def read_mask_overlap(workdir: Path) -> list[Row]:
  """mask_overlap.csv: a row for each such network and pair of tasks."""
  path = workdir / 'mask_overlap.csv'
  return read_csv(path, (*NET, 'task', 'other', 'overlap'), ('task', 'other')) if path.exists() else []


def matrix_of(rows: Sequence[Row], line: str, column: str, value: str, first: int = 0) -> np.ndarray:
  """The values of one network as a matrix, lines from `first` on; NaN where there is no row."""
  size = int(max(row[column] for row in rows))
  matrix = np.full((size + 1 - first, size), np.nan)
  for row in rows:
    matrix[int(row[line]) - first, int(row[column]) - 1] = row[value]
  return matrix


def text(results: Sequence[Row], rows: Sequence[Row], capacity: Sequence[Row]) -> str:
  """table.md: accuracies after all tasks, of all of them and by when they were learned."""
  return (f'{table(results)}\n\nTest accuracy (%) after all tasks, by when a task was learned, and tasks whose mask reached γ of '
          f'the accuracy of all weights:\n\n{markdown(by_position(rows, capacity))}\n')


def by_position(rows: Sequence[Row], capacity: Sequence[Row]) -> Table:
  """Accuracy after the last task of the first tasks, those after them, ..., in at most BANDS columns, mean ± sd over networks;
  and where masks were searched for, how many of them reached γ. Networks that diverged are in none."""
  axes, last = told_apart(rows), max(row['after'] for row in rows)
  lost = {_net(row) for row in rows if not np.isfinite(row['test_accuracy'])}
  width = -int(-last // BANDS)
  bands = [range(first, min(first + width, int(last) + 1)) for first in range(1, int(last) + 1, width)]
  searched = [row for row in capacity if np.isfinite(row.get('dense_accuracy', np.nan)) and _net(row) not in lost]
  lines = []
  for key, members in groups(rows, axes).items():
    nets = [own for own in groups([row for row in members if row['after'] == last], NET).values() if _net(own[0]) not in lost]
    means = [summarise(np.mean([row['test_accuracy'] for row in own if row['task'] in band]) for own in nets) for band in bands]
    masks = [row['met'] for row in searched if tuple(row[axis] for axis in axes) == key]
    lines.append([*map(word, key), str(len(nets)), *map(percent, means),
                  *([f'{sum(masks):.0f} of {len(masks)}' if masks else '–'] if searched else [])])
  heads = [f'task {band[0]}' if len(band) == 1 else f'tasks {band[0]} to {band[-1]}' for band in bands]
  return Table([*map(word, axes), 'n', *heads, *(['γ reached'] if searched else [])], lines)


def shown(run: Run) -> Iterator[Shown]:
  """The figures of one run."""
  wanted = run.config['continual']
  setting = (f'{wanted["tasks"]} tasks of {run.config["steps"]:,} steps each at batch size {run.config["batch_size"]}, the '
             f'sequence ‘{wanted["sequence"]}’, outputs ‘{wanted["scenario"]}’.')
  return figures_of(read_matrix(run.workdir), read_capacity(run.workdir), read_mask_overlap(run.workdir), setting)


def figures_of(rows: Sequence[Row], capacity: Sequence[Row], overlap: Sequence[Row], setting: str) -> Iterator[Shown]:
  """Accuracy against tasks; capacity against tasks; matrices of accuracies; overlaps of masks."""
  axes = told_apart(rows)
  lost = {_net(row) for row in rows if not np.isfinite(row['test_accuracy'])}
  capacity, overlap = ([row for row in some if _net(row) not in lost] for some in (capacity, overlap))
  nets = {key: [matrix_of(own, 'after', 'task', 'test_accuracy') for own in groups(some, NET).values()]
          for key, some in groups(rows, axes).items()}
  tasks = np.arange(1, next(iter(nets.values()))[0].shape[1] + 1)
  curves = [_curve(label_of(axes, key), tasks, [measures.averages(one) for one in some]) for key, some in nets.items()]
  known = [sum(_net(own[0]) not in lost for own in groups(some, NET).values()) for some in groups(rows, axes).values()]
  gone = [curve.label for curve, n in zip(curves, known, strict=True) if not n]
  curves = [curve for curve in curves if curve.label not in gone] or curves
  counts = span([n for n in known if n] or [0])
  note = f'mean ± sd, n = {counts}' if max(known) > 1 else 'one network each'
  spread = (f'Lines: means, bands: ± one standard deviation (n − 1), over n = {counts} networks that differ in their seed.'
            if max(known) > 1 else 'One network each: its spread is unknown.')
  spread += f' Networks that diverged, left out: {len(lost)}.' if lost else ''
  yield Shown('tasks', 'Accuracy against the number of tasks',
              f'Test accuracy, mean over the tasks learned so far; {setting} Where methods are far apart the axis is stretched '
              f'towards 100. {spread}',
              figures.tasks_figure(curves, 'Mean test accuracy (%)', '\n'.join([note, *(f'{name}: diverged' for name in gone)])),
              by_position(rows, capacity))

  if capacity:
    packed = groups(capacity, axes)
    lines = [_curve(label_of(axes, key), tasks, [np.array([row['total'] for row in own]) for own in groups(some, NET).values()])
             for key, some in packed.items()]
    yield Shown('capacity', 'Capacity against the number of tasks',
                f'Share of the weights that belong to the mask of any task so far. {spread}',
                figures.tasks_figure(lines, 'Weights used (%)', note, whole=True))

  # What was measured of tasks that were not begun is for transfer alone, and would take most of the scale of colours.
  begun = np.tri(len(tasks), dtype=bool)
  lower = {label_of(axes, key): [np.where(begun, one[1:], np.nan) for one in some] for key, some in nets.items()}
  yield Shown('matrix', 'Accuracy after each task on each task',
              'Test accuracy, mean over networks. A column is a task, from bottom to top as more are learned: what is forgotten '
              'grows darker upwards. White: not begun, or not tested.',
              figures.maps_figure(figures.mean_maps(lower), 'Tested on task', 'After task', 'Test accuracy (%)'))

  if overlap:
    found = {label_of(axes, key): [matrix_of(own, 'task', 'other', 'overlap', 1) for own in groups(some, NET).values()]
             for key, some in groups(overlap, axes).items()}
    yield Shown('mask_overlap', 'Overlap of the masks of two tasks',
                'Of the weights that either task uses, the share that both use (intersection over union), mean over networks.',
                figures.maps_figure(figures.mean_maps(found), 'Task', 'Task', 'Overlap (%)', low=0.0))


def _net(row: Row) -> tuple[Any, ...]:
  return tuple(row.get(axis) for axis in (*NET, 'run'))


def told_apart(rows: Sequence[Row]) -> list[str]:
  """The method, and the axes that tell groups apart, less rates and strengths that each group has one of."""
  axes = list(dict.fromkeys(['algorithm', *varying(rows)]))
  for axis in ('learning_rate', 'penalty'):
    others = [one for one in axes if one != axis]
    if others and len(groups(rows, others)) == len(groups(rows, axes)):
      axes = others
  return axes


def _curve(label: str, x: np.ndarray, values: Sequence[np.ndarray]) -> Curve:
  """Mean and sd, in per cent, of those networks that know a value."""
  sums = [summarise(column) for column in 100 * np.stack(values, axis=1)]
  known = np.array([one.n > 0 for one in sums])
  return Curve(label, x[known], np.array([one.mean for one in sums])[known], np.array([one.sd for one in sums])[known])

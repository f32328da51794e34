"""Runs of sparse training side by side: one table, one figure. Trains nothing.

  python -m experiments.sparse_table --out=results/mnist_sparse runs/mnist_sparse/*

Reads what each run left in its workdir and writes to --out: table.md, cells.csv (a row for each algorithm, power and density)
and figures/algorithms.png and .svg. Runs that differ in seeds or sparsity alone go together; where networks were pruned in
several ways, each has a row of its own. Runs that only chose a learning rate, named *_tuning, and directories without a finished
run are left out, and named.
"""
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from absl import flags

from experiments import figures
from experiments.algorithms import OWN_PARAMETERS
from experiments.commands import run
from experiments.differences import note
from experiments.errors import UserError
from experiments.results import (
  NET,
  TRAINED,
  Row,
  Run,
  Summary,
  Table,
  best_settings,
  groups,
  markdown,
  percent,
  read_config,
  read_run,
  share,
  summarise,
  validation_score,
  word,
)
from experiments.workdir import WITHOUT_EFFECT, flat, write_atomic, write_csv

FLAGS = flags.FlagValues()   # of this command alone
OUT = flags.DEFINE_string('out', None, 'Required. Directory for table.md, cells.csv and figures/; made if it is not there.',
                          flag_values=FLAGS)

TITLES = {
    'dense': 'dense, pruned afterwards', 'static': 'static random', 'snip': 'SNIP', 'grasp': 'GraSP', 'synflow': 'SynFlow',
    'set': 'SET', 'dsr': 'DSR', 'snfs': 'SNFS', 'rigl': 'RigL', 'top_kast': 'Top-KAST', 'granet': 'GraNet', 'ac_dc': 'AC/DC',
    'straight_through': 'straight-through', 'gradual': 'gradual', 'gradual_returns': 'gradual, with return',
    'one_shot': 'one-shot',
    'soft_threshold': 'STR', 'hard_concrete': 'L0', 'square_difference': 'v⊙v − u⊙u',
    'lottery': 'lottery ticket'}

# In what runs may differ whose networks stand in one row.
TOGETHER = frozenset({'name', 'sweep.seed', 'sweep.sparsity', *WITHOUT_EFFECT})


class Cell(NamedTuple):
  """One algorithm at one power and density."""
  accuracy: Summary                # share
  by_seed: dict[int, float]
  training_operations: Summary     # share of those of dense training
  rates: list[float]
  reached: float | None = None     # mean density, where it cannot be asked for


def main(argv: list[str]) -> None:
  if not OUT.value or len(argv) < 2:
    raise UserError('--out and at least one workdir are needed, as in `python -m experiments.sparse_table --out=DIR runs/*`.')
  finished = [path for path in map(Path, argv[1:]) if not path.name.endswith('_tuning') and (path / 'run.json').exists()]
  for left_out in sorted(set(argv[1:]) - set(map(str, finished))):
    print(f'left out: {left_out}')
  if not finished:
    raise UserError('none of these directories holds a finished run.')
  cells = read_cells(finished)
  out = Path(OUT.value)
  told = text(cells) + differences(finished)
  write_atomic(out / 'table.md', told)
  write_csv(out / 'cells.csv', rows_of(cells))
  paths = [out / 'table.md', out / 'cells.csv', *figures.save(figure(cells), out / 'figures' / 'algorithms')]
  for path in paths:
    print(f'wrote {path}')
  print(told)


def differences(workdirs: Sequence[Path]) -> str:
  """A paragraph on settings that the runs do not share, or nothing."""
  told = note(workdirs, [read_config(workdir) for workdir in workdirs])
  return f'\n{told}\n' if told else ''


def read_cells(workdirs: Sequence[Path]) -> dict[tuple[str, float, float], Cell]:
  """(row, α, density) → what its networks reached, at the learning rate and penalty of best validation accuracy. A row is an
  algorithm, or 'ALGORITHM SCOPE' where its networks were pruned in several ways.

  Raises: UserError where two runs of one algorithm and power differ in more than TOGETHER, or have a network twice.
  """
  runs_of: dict[tuple[str, float], list[Run]] = {}
  for workdir in workdirs:
    run = read_run(workdir)
    for (algorithm, alpha), rows in groups(run.results, ['algorithm', 'alpha']).items():
      runs_of.setdefault((algorithm, alpha), []).append(run._replace(results=rows))
  scopes: dict[str, set[str]] = {}
  for (algorithm, _), runs in runs_of.items():
    refuse_unlike(algorithm, runs)
    scopes.setdefault(algorithm, set()).update(row['scope'] for run in runs for row in run.results)
  found: dict[tuple[str, float, float], Cell] = {}
  for (algorithm, alpha), runs in runs_of.items():
    spent = {net_of(row): row['training_operations'] for run in runs for row in run.statistics}
    for (scope,), rows in groups([row for run in runs for row in run.results], ['scope']).items():
      name = algorithm if len(scopes[algorithm]) == 1 else f'{algorithm} {scope}'
      if (algorithm in OWN_PARAMETERS or algorithm == 'lottery') and scope == TRAINED:
        by_density = nearest(rows, runs[0].config['prune']['densities'])
      else:
        tuned = [axis for axis in ('learning_rate', 'penalty') if len(groups(rows, [axis])) > 1]
        best = best_settings(rows, tuned) if tuned else rows
        by_density = groups([row | {'density': nominal(row)} for row in best], ['density'])
      for (density,), some in by_density.items():
        accuracies = {int(row['seed']): row['test_accuracy'] for row in some}
        if len(accuracies) < len(some):
          twice = next(seed for seed in accuracies if sum(row['seed'] == seed for row in some) > 1)
          raise UserError(f'{", ".join(str(run.workdir) for run in runs)}: {title(name)} at α = {alpha:g} and density '
                          f'{density:g} has networks of seed {twice} more than once; each seed may come once.')
        reached = None if nominal(some[0]) == density else float(np.mean([row['kept'] / row['weights'] for row in some]))
        cost, rates = summarise(spent[net_of(row)] for row in some), sorted({row['learning_rate'] for row in some})
        found[name, alpha, density] = Cell(summarise(accuracies.values()), accuracies, cost, rates, reached)
  return found


def refuse_unlike(algorithm: str, runs: Sequence[Run]) -> None:
  """Raises UserError where runs of one algorithm and power differ in more than TOGETHER. What an older run's config lacks is no
  difference."""
  first = flat(runs[0].config)
  for other in runs[1:]:
    for key, value in flat(other.config).items():
      if key not in TOGETHER and first.get(key, value) != value:
        raise UserError(f'{runs[0].workdir} and {other.workdir} both have networks of {algorithm} at α = '
                        f'{other.results[0]["alpha"]:g}, and differ in {key}: {first[key]} and {value}; they may differ in seeds '
                        'and sparsity alone.')


def nominal(row: Row) -> float:
  """The density that was asked for; what training reached may differ from it by the rounding to whole weights."""
  return row['density'] if row['scope'] != TRAINED else round(1 - row['sparsity'], 9)


def nearest(rows: Sequence[Row], densities: Sequence[float]) -> dict[tuple[float], list[Row]]:
  """For each density the networks of the learning rate and penalty, or round, that come near to it: of each rate the nearest by
  ratio of mean densities, of those within a tenth of it the best on validation images; where none is, the nearest of all. What
  leaves nothing is out of the question, and what diverged, unless all has."""
  def density(some: Sequence[Row]) -> float:
    return float(np.mean([row['kept'] / row['weights'] for row in some]))

  def distance(some: Sequence[Row], wanted: float) -> float:
    return abs(float(np.log(density(some) / wanted)))

  def best(wanted: float) -> list[Row]:
    of_rates = [[some for some in groups(members, ['penalty', 'sparsity']).values() if density(some) > 0]
                for members in groups(rows, ['learning_rate']).values()]
    near = [min(choices, key=lambda some: distance(some, wanted)) for choices in of_rates if choices]
    near = [some for some in near if np.isfinite(validation_score(some))] or near
    # Among unequal densities accuracy would only choose the denser.
    if within := [some for some in near if alike(density(some), wanted)]:
      return max(within, key=validation_score)
    return min(near, key=lambda some: distance(some, wanted))
  return {(wanted,): best(wanted) for wanted in densities if any(row['kept'] for row in rows)}


def alike(density: float, other: float) -> bool:
  """Are two densities within a tenth of each other?"""
  return max(density, other) <= 1.1 * min(density, other)


def net_of(row: Row) -> tuple[Any, ...]:
  return tuple(row[name] for name in NET)


def title(row: str) -> str:
  algorithm, _, scope = row.partition(' ')
  return TITLES.get(algorithm, algorithm) + (f', {word(scope)}' if scope else '')


def axes(cells: dict[tuple[str, float, float], Cell]) -> tuple[list[str], list[float], list[float]]:
  """Algorithms in the order of their titles, powers ascending, densities descending."""
  names = dict.fromkeys(key[0] for key in cells)
  order = [name for algorithm in TITLES for name in names if name.partition(' ')[0] == algorithm]
  return order, sorted({key[1] for key in cells}), sorted({key[2] for key in cells}, reverse=True)


def gains(cells: dict[tuple[str, float, float], Cell], algorithm: str, density: float) -> Summary:
  """Accuracy at the largest power minus that at the smallest, pairs of one seed; nothing where one is missing, or where they
  have reached densities that are more than a tenth apart."""
  _, powers, _ = axes(cells)
  first, last = (cells.get((algorithm, alpha, density)) for alpha in (powers[0], powers[-1]))
  if first and last and not alike(*(density if cell.reached is None else cell.reached for cell in (first, last))):
    return summarise([])
  pairs = set(first.by_seed) & set(last.by_seed) if first and last else set()
  return summarise(last.by_seed[seed] - first.by_seed[seed] for seed in sorted(pairs)) if first and last else summarise([])


def table(cells: dict[tuple[str, float, float], Cell]) -> Table:
  """Three lines for each algorithm: both powers, and what the larger one gains."""
  names, powers, densities = axes(cells)
  lines = []
  for name in names:
    for alpha in powers:
      row = [cells.get((name, alpha, density)) for density in densities]
      known = [cell for cell in row if cell]
      if not known:
        continue
      cost = sorted({f'{100 * cell.training_operations.mean:.0f}': cell.training_operations.mean for cell in known}.items(),
                    key=lambda pair: pair[1])
      rates = sorted({rate for cell in known for rate in cell.rates})
      lines.append([title(name), f'{alpha:g}', ' '.join(f'{rate:g}' for rate in rates),
                    ' to '.join(dict.fromkeys((cost[0][0], cost[-1][0]))),
                    *(percent(cell.accuracy) + reached(cell) if cell else '' for cell in row)])
    if len(powers) > 1:
      gained = [percent(gains(cells, name, density), '+') for density in densities]
      lines.append([title(name), 'gain', '', '', *gained])
  return Table(['algorithm', 'α', 'learning rate', 'training (% of dense)', *map(share, densities)], lines)


def text(cells: dict[tuple[str, float, float], Cell]) -> str:
  powers = axes(cells)[1]
  gain = (f' Gain: α = {powers[-1]:g} minus α = {powers[0]:g}, in points, over pairs of one seed.' if len(powers) > 1 else '')
  return f'Test accuracy (%) by weights kept, {spread(cells)}.{gain}\n\n{markdown(table(cells))}\n'


def spread(cells: dict[tuple[str, float, float], Cell]) -> str:
  """What the numbers are: 'mean ± sd, n = 3'; a single network has no spread."""
  n = networks(cells)
  return 'one network each' if n == '1' else f'mean ± sd, n = {n}'


def networks(cells: dict[tuple[str, float, float], Cell]) -> str:
  """How many a mean is over: '3', or '2 to 3'."""
  counts = sorted({cell.accuracy.n for cell in cells.values()})
  return ' to '.join(str(n) for n in dict.fromkeys((counts[0], counts[-1])))


def reached(cell: Cell) -> str:
  return '' if cell.reached is None else f' (at {share(cell.reached)})'


def rows_of(cells: dict[tuple[str, float, float], Cell]) -> list[Row]:
  return [{'algorithm': name, 'alpha': alpha, 'density': density, 'n': cell.accuracy.n, 'test_accuracy': cell.accuracy.mean,
           'sd': cell.accuracy.sd, 'training_operations': cell.training_operations.mean,
           'learning_rates': ' '.join(f'{rate:g}' for rate in cell.rates),
           'reached': '' if cell.reached is None else cell.reached}
          for (name, alpha, density), cell in cells.items()]


def figure(cells: dict[tuple[str, float, float], Cell]) -> Any:
  """Errors: a dot for each algorithm and power, at two densities; hollow where the networks have reached another one."""
  names, powers, _ = axes(cells)

  def dots(density: float, alpha: float) -> figures.Dots:
    found = [cells.get((name, alpha, density)) for name in names]
    nothing = summarise([])
    sums = [cell.accuracy if cell else nothing for cell in found]
    hollow = [bool(cell and cell.reached is not None and not alike(cell.reached, density)) for cell in found]
    return figures.Dots(100 * np.array([one.mean for one in sums]), 100 * np.array([one.sd for one in sums]), np.array(hollow))
  panels = [(f'{share(density)} kept', {f'α = {alpha:g}': dots(density, alpha) for alpha in powers}) for density in shown(cells)]
  hollow = any(one.hollow.any() for _, found in panels for one in found.values())
  note = spread(cells) + ('\nhollow: another density, see the table' if hollow else '')
  return figures.dots_figure([title(name) for name in names], panels, note)


def shown(cells: dict[tuple[str, float, float], Cell]) -> list[float]:
  """Two of the densities that all algorithms have, or else of those that most have: where there are more, the second, as little
  happens at the first, and the last."""
  algorithms = {density: {name for name, _, at in cells if at == density} for density in axes(cells)[2]}
  most = max(map(len, algorithms.values()))
  common = [density for density, names in algorithms.items() if len(names) == most]
  return common if len(common) <= 2 else [common[1], common[-1]]


if __name__ == '__main__':
  run(main, __doc__ or '', FLAGS)

"""Figures, tables and one HTML page from the files that a run left in its workdir. Trains nothing.

  python -m experiments.report WORKDIR [WORKDIR ...]

Writes figures/*.png and *.svg, table.md and report.html to each WORKDIR and prints the table; with several,
one table of them all, and finished cells of configs/imagenet.py beside the published accuracies. A run does this by itself at
its end; the command draws it again, or compares runs.
"""
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np
from absl import flags

from experiments import commands, figures
from experiments.continual import results as continual
from experiments.errors import UserError
from experiments.figures import Curve, Panel
from experiments.page import Shown, page
from experiments.published import published_table
from experiments.results import (
  NET,
  TRAINED,
  Row,
  Run,
  accuracy_table,
  best_settings,
  groups,
  label_of,
  markdown,
  nearest,
  reaches,
  read_config,
  read_overlap,
  read_results,
  read_run,
  read_weights,
  share,
  span,
  summarise,
  table,
  varying,
  word,
)
from experiments.workdir import write_atomic


def main(argv: list[str]) -> None:
  if len(argv) < 2:
    raise UserError('a workdir is needed, as in `python -m experiments.report runs/figure1`; see --help.')
  workdirs = [Path(name) for name in argv[1:]]
  for workdir in workdirs:
    if not workdir.is_dir():
      raise UserError(f'{workdir} is no directory; a run makes one, named by its --workdir.')
  ended = [workdir for workdir in workdirs if (workdir / 'run.json').exists()]
  if 0 < len(ended) < len(workdirs):   # the cells of a table end one after another
    for workdir in workdirs:
      if workdir not in ended:
        print(f'{workdir} has not ended, and is left out.')
    workdirs = ended
  names = [read_config(workdir)['name'] for workdir in workdirs]
  if len({workdir.resolve() for workdir in workdirs}) < len(workdirs):
    raise UserError(f'a workdir is named twice: {" ".join(argv[1:])}.')
  base = names
  for told in ([workdir.resolve().name for workdir in workdirs], [str(workdir) for workdir in workdirs]):
    if len(set(names)) < len(names):
      names = [f'{name} ({which})' for name, which in zip(base, told, strict=True)]
  rows = []
  for name, workdir in zip(names, workdirs, strict=True):
    for path in write_report(workdir):
      print(f'wrote {path}')
    rows += [{**row, 'run': name} for row in read_results(workdir)]
  print(table(rows))
  if (beside := published_table([read_run(workdir) for workdir in workdirs])) is not None:
    print(f'\nBeside published accuracies:\n\n{markdown(beside)}')


def write_report(workdir: Path) -> list[Path]:
  """Writes the figures that the config asks for, table.md and report.html, each file whole or not at all.

  Returns: the paths, report.html last.
  Raises: UserError, naming the file, where one is missing, damaged or lacks a column.
  """
  run = read_run(workdir)
  for kind in run.config['report']:
    if kind not in KINDS:
      raise UserError(f'{workdir / "config.json"}: report has {kind!r}; known are {sorted(KINDS)}.')
  shown = [one for kind in run.config['report'] for one in KINDS[kind](run)]
  paths = [path for one in shown for path in figures.save(one.figure, workdir / 'figures' / one.stem)]
  text = table(run.results) + '\n'
  if run.config.get('protocol') == 'continual':
    text = continual.text(run.results, continual.read_matrix(workdir), continual.read_capacity(workdir))
  for name, content in (('table.md', text), ('report.html', page(run, shown))):
    write_atomic(workdir / name, content)
    paths.append(workdir / name)
  return paths


# Figures

def curves(rows: Sequence[Row], axes: Sequence[str], column: str, x: str = 'density',
           scale: Callable[[float], float] = lambda density: 100 * density) -> list[Curve]:
  """A curve for each group: mean and sd of `column`, in per cent, over `scale` of `x`, of the networks that did not diverge."""
  found = []
  for key, members in groups(rows, axes).items():
    points = groups(members, [x])
    sums = [summarise(row[column] for row in some) for some in points.values()]
    bad = [not all(np.isfinite(row[column]) for row in some) for some in points.values()]
    found.append(Curve(label_of(axes, key), np.array([scale(at) for at, in points]), 100 * np.array([one.mean for one in sums]),
                       100 * np.array([one.sd for one in sums]), np.array(bad)))
  return found


def _figure1(run: Run) -> Iterator[Shown]:
  axes = varying(run.results)
  lines = curves(run.results, axes, 'test_accuracy')
  yield Shown('figure_1a', 'Figure 1a. Accuracy against sparsity',
              f'Test accuracy against the share of weights kept, {_setting(run)} The lower panel enlarges '
              f'the upper end of the same curves. {_spread(run.results, "test_accuracy")}',
              figures.accuracy_figure(lines, axes == ['alpha'], _note(run.results, 'test_accuracy')))

  overlap = read_overlap(run.workdir)
  axes = varying(overlap)
  lines = curves(overlap, axes, 'overlap', scale=lambda density: 100 - 100 * density)
  yield Shown('figure_1b', 'Figure 1b. Agreement of the masks before and after training',
              'Share of the weights that magnitude pruning treats alike at initialisation and after '
              'training, keeping them in both or pruning them in both. Dashed: the agreement of two '
              f'independent random masks, p² + (1 − p)² for a share p kept. {_spread(overlap, "overlap")}',
              figures.overlap_figure(lines, axes == ['alpha'], _note(overlap, 'overlap')))

  if not (run.workdir / 'weights.npz').exists():
    return   # a run's numbers are kept without its weights
  density, sampled = read_weights(run.workdir)
  alphas = sorted({row['alpha'] for row in run.results} | set(sampled))
  styles = figures.line_styles([f'{alpha:g}' for alpha in alphas], ordered=True)   # the colours of figure 1a
  for letter, alpha in zip('cd', _shown_alphas(sampled), strict=False):
    initial, final, kept = sampled[alpha]
    yield Shown(f'figure_1{letter}', f'Figure 1{letter}. Weights before and after training, α = {alpha:g}',
                f'{initial.size:,} weights drawn at random from one network, the same ones with the same '
                'initial values for every α; of all layers, each pruned by magnitude after training so that '
                f'{share(density)} are kept: a threshold for each layer. Above: kernel density estimates of '
                'the initial values of the survivors (filled) and of all (grey), each of area 1. Right: of the '
                'final values of the survivors. Dotted: weights that training left alone. The vertical axis follows the data: '
                'it differs between figures 1c and 1d.',
                figures.weights_figure(initial, final, kept, styles[f'{alpha:g}']['color'], f'α = {alpha:g}'))


def _shown_alphas(alphas: Iterable[float]) -> list[float]:
  """The paper shows 1 and 4: the smallest, and the largest of the others that is not above 4, if any."""
  first, *others = sorted(alphas)
  return [first, *[alpha for alpha in others if alpha <= 4][-1:]]


def _reached(run: Run) -> Iterator[Shown]:
  """Accuracy against the density that each penalty has reached, a panel for each power, a line for each learning rate."""
  axes = varying(run.results, ['penalty'])
  rows = []
  for members in groups(run.results, [*axes, 'penalty']).values():
    density = float(np.mean([row['density'] for row in members]))
    rows += [row | {'density': density} for row in members if density > 0]   # the axis of densities is logarithmic
  others = [axis for axis in axes if axis != 'alpha'] or axes
  by_alpha = groups(rows, ['alpha'])
  panels = [Panel(label_of(['alpha'], key), curves(some, others, 'test_accuracy')) for key, some in by_alpha.items()]
  yield Shown('compare', 'Comparison',
              f'Test accuracy against the mean share of weights kept, a point for each penalty, {_setting(run)} '
              f'{_spread(rows, "test_accuracy")}',
              figures.panels_figure(panels, False, _note(rows, 'test_accuracy'), 'kept'), accuracy_table(run.results, ()))


def _compare(run: Run) -> Iterator[Shown]:
  if reaches(run.results):
    yield from _reached(run)
    return
  rows = best_settings(run.results)
  axes = varying(rows, ['learning_rate'])
  rates = [f'{rate:g}' for rate, in groups(run.results, ['learning_rate'])]

  def lines(some: Sequence[Row], axes: Sequence[str]) -> list[Curve]:
    own = [f'{members[0]["learning_rate"]:g}' if len(rates) > 1 else '' for members in groups(some, axes).values()]
    return [curve._replace(rate=rate) for curve, rate in zip(curves(some, axes, 'test_accuracy'), own, strict=True)]

  if 'alpha' in axes and len(axes) > 1:
    # What is to be compared shares a panel: by scope the powers, else at each power what varies beside it.
    apart = 'scope' if axes == ['alpha', 'scope'] else 'alpha'
    axes.remove(apart)
    panels = [Panel(label_of([apart], key), lines(some, axes)) for key, some in groups(rows, [apart]).items()]
  else:
    panels = [Panel('', lines(rows, axes))]
  rule = (f'Of the learning rates {", ".join(rates)} each group has the one with the best validation '
          'accuracy, mean over all densities and seeds; the test images had no part in the choice. '
          if len(rates) > 1 else '')
  yield Shown('compare', 'Comparison',
              f'Test accuracy against the share of weights kept, {_setting(run)} {rule}'
              f'{_spread(rows, "test_accuracy")}',
              figures.panels_figure(panels, axes == ['alpha'], _note(rows, 'test_accuracy'), 'kept'),
              accuracy_table(rows, (1.0, 0.1, 0.05, 0.02), always=['learning_rate']))


def _learning_rate(run: Run) -> Iterator[Shown]:
  """A row of panels, dense and pruned; a row for each α where something else varies as well."""
  axes = varying(run.results, ['learning_rate'])
  rows_of = {'': run.results}
  if 'alpha' in axes and len(axes) > 1:
    axes.remove('alpha')
    rows_of = {label_of(['alpha'], key) + ', ': rows for key, rows in groups(run.results, ['alpha']).items()}
  densities = list(dict.fromkeys(nearest(run.results, wanted) for wanted in (1.0, 0.1)))
  panels = []
  for which, members in rows_of.items():
    for density in densities:
      rows = [row for row in members if row['density'] == density]
      lines = curves(rows, axes, 'test_accuracy', 'learning_rate', float)
      panels.append(Panel(f'{which}{share(density)} kept', lines, enlarged=density == 1 and len(densities) > 1))
  note = _note(run.results, 'test_accuracy')
  lost = any(not np.isfinite(row['test_accuracy']) for row in run.results)
  cross = ('A cross at the lower edge, in the colour of a line: a rate at which networks diverged; the line is the mean of '
           'the others, if there are any. ' if lost else '')
  enlarged = ', dense (only the upper four points) and pruned,' if any(panel.enlarged for panel in panels) else ','
  yield Shown('learning_rate', 'Sensitivity to the learning rate',
              f'Test accuracy against the learning rate{enlarged} {_setting(run)} {cross}'
              f'{_spread(run.results, "test_accuracy")}',
              figures.panels_figure(panels, axes == ['alpha'], note, 'learning rate'))


def _setting(run: Run) -> str:
  scopes = [scope for scope, in groups(run.results, ['scope'])]
  factor = run.config.get('prune', {}).get('output_factor', 1)
  pruned = [word(scope) for scope in scopes if scope != TRAINED]
  ways = ['as training has left them'] * (TRAINED in scopes)   # masks of its own
  ways += [f'pruned in one shot, {" or ".join(pruned)}, by magnitude and without fine-tuning'] * bool(pruned)
  text = (f'on {word(run.config["dataset"])} after {run.config["steps"]:,} steps at batch size '
          f'{run.config["batch_size"]}, {" or ".join(ways)}.')
  if factor != 1:
    text += (f' The share is that of the hidden layers; the output layer keeps {factor:g} times as much, '
             'at most all.')
    text += ' Global pruning keeps the same total.' if 'global' in scopes else ''
  return text


def _note(rows: Sequence[Row], column: str) -> str:
  counts = _counts(rows, column)
  return f'mean ± sd, n = {span(counts)}' if max(counts) > 1 else 'one network each'


def _spread(rows: Sequence[Row], column: str) -> str:
  counts = _counts(rows, column)
  text = (f'Lines: means, bands: ± one standard deviation (n − 1), over n = {span(counts)} networks that '
          'differ in their seed.' if max(counts) > 1 else 'One network each: its spread is unknown.')
  bad = {tuple(row[axis] for axis in NET) for row in rows if not np.isfinite(row[column])}
  return text + (f' Networks that diverged, left out of the means: {len(bad)}.' if bad else '')


def _counts(rows: Sequence[Row], column: str) -> list[int]:
  cells = groups(rows, [*varying(rows), 'density']).values()
  return [summarise(row[column] for row in cell).n for cell in cells]


KINDS: dict[str, Callable[[Run], Iterator[Shown]]] = {
    'figure1': _figure1,
    'compare': _compare,
    'learning_rate': _learning_rate,
    'continual': continual.shown,
}


if __name__ == '__main__':
  commands.run(main, __doc__ or '', flags.FlagValues())

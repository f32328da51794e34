"""Figures, tables and one HTML page from the files that a run left in its workdir. Trains nothing.

  python -m experiments.report WORKDIR [WORKDIR ...]

Writes figures/*.png and *.svg, table.md and report.html to each WORKDIR and prints the table; with several,
one table of them all. A run does this by itself at its end; the command draws it again, or compares runs.
"""
import base64
import html
import json
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from string import Template
from typing import Any, NamedTuple

import numpy as np
from absl import app, flags
from matplotlib.figure import Figure

from experiments import figures
from experiments.errors import UserError
from experiments.figures import Curve, Panel
from experiments.results import (
  NET,
  Row,
  Run,
  Table,
  accuracy_table,
  best_settings,
  groups,
  nearest,
  reaches,
  read_config,
  read_overlap,
  read_results,
  read_run,
  read_weights,
  share,
  span,
  statistics_table,
  summarise,
  table,
  varying,
  word,
)
from experiments.workdir import write_atomic

FULL_STEPS = 50_000   # of the authors' notebook, which draws the paper's figure 1a


class Shown(NamedTuple):
  """A figure of the report, and the table that belongs to it, if any."""
  stem: str
  title: str
  caption: str
  figure: Figure
  table: Table | None = None


def main(argv: list[str]) -> None:
  if len(argv) < 2:
    raise UserError('a workdir is needed, as in `python -m experiments.report runs/figure1`; see --help.')
  workdirs = [Path(name) for name in argv[1:]]
  for workdir in workdirs:
    if not workdir.is_dir():
      raise UserError(f'{workdir} is no directory; a run makes one, named by its --workdir.')
  names = [read_config(workdir)['name'] for workdir in workdirs]
  if len({workdir.resolve() for workdir in workdirs}) < len(workdirs):
    raise UserError(f'a workdir is named twice: {" ".join(argv[1:])}.')
  base = names
  for told in ([workdir.resolve().name for workdir in workdirs], argv[1:]):
    if len(set(names)) < len(names):
      names = [f'{name} ({which})' for name, which in zip(base, told, strict=True)]
  rows = []
  for name, workdir in zip(names, workdirs, strict=True):
    for path in write_report(workdir):
      print(f'wrote {path}')
    rows += [{**row, 'run': name} for row in read_results(workdir)]
  print(table(rows))


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
  for name, content in (('table.md', table(run.results) + '\n'), ('report.html', page(run, shown))):
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
    found.append(Curve(_label(axes, key), np.array([scale(at) for at, in points]), 100 * np.array([one.mean for one in sums]),
                       100 * np.array([one.sd for one in sums]), np.array(bad)))
  return found


def _label(axes: Sequence[str], key: Sequence[Any]) -> str:
  frames = {'alpha': 'α = {}', 'learning_rate': 'learning rate {}', 'biases': '{} biases', 'penalty': 'penalty {}'}
  return ', '.join(frames.get(axis, '{}').format(word(value)) for axis, value in zip(axes, key, strict=True))


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
  panels = [Panel(_label(['alpha'], key), curves(some, others, 'test_accuracy')) for key, some in groups(rows, ['alpha']).items()]
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
    panels = [Panel(_label([apart], key), lines(some, axes)) for key, some in groups(rows, [apart]).items()]
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
    rows_of = {_label(['alpha'], key) + ', ': rows for key, rows in groups(run.results, ['alpha']).items()}
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
  text = (f'on {word(run.config["dataset"])} after {run.config["steps"]:,} steps at batch size '
          f'{run.config["batch_size"]} and one-shot {" or ".join(map(word, scopes))} pruning by magnitude, '
          'without fine-tuning.')
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


# The page

def page(run: Run, shown: Sequence[Shown]) -> str:
  """report.html: figures, tables, config and origin in one file that needs no other, and no network.

  The figures are read from the SVG files that `figures.save` has written.
  """
  config, record = run.config, run.record
  nets = len(groups(run.results, NET))
  origin = {'Command': record['command'],
            'Commit': (record['commit'] or 'none: not run in a git clone')
            + (', with uncommitted changes' if record['dirty'] else ''),
            'Data': record['data'], 'Devices': record['devices'],
            'Time': ', '.join(f'{name} {_clock(seconds)}' for name, seconds in record['seconds'].items()),
            'Finished': record['finished'],
            'Versions': ', '.join(f'{name} {version}' for name, version in record['versions'].items())}
  summary = (f'{nets} network{"s" if nets > 1 else ""} on {word(config["dataset"])}, '
             f'{config["steps"]:,} steps each at batch size {config["batch_size"]}.')
  return PAGE.substitute(
      title=_text(_title(config)), summary=_text(summary), short=_short(config),
      density=share(config['prune'].get('figure_density', 0.1)),
      figures='\n'.join(_html_figure(run.workdir, one) for one in shown),
      accuracy=_html_table(accuracy_table(run.results, (1.0, 0.5, 0.3, 0.2, 0.1, 0.05, 0.02, 0.01))),
      statistics=_html_table(statistics_table(run.statistics)),
      origin=_html_pairs(origin.items()), config=_html_pairs(_flat(config)))


def _title(config: Mapping[str, Any]) -> str:
  short = ' (short run)' if config['steps'] < FULL_STEPS else ''
  return f'{config.get("title") or config["name"]} on {word(config["dataset"])}{short}'


def _short(config: Mapping[str, Any]) -> str:
  """A warning where the networks were trained for less than the paper's protocol has."""
  if config['steps'] >= FULL_STEPS:
    return ''
  more = ' <code>make figure1 FULL=1</code> runs that.' if config['name'] == 'mnist_lenet' else ''
  return (f'<p class="short"><strong>A short run:</strong> {config["steps"]:,} steps, where the protocol of '
          f'the paper’s figure 1 has {FULL_STEPS:,}; expect other numbers from the full one.{more}</p>')


def _html_figure(workdir: Path, one: Shown) -> str:
  # As an image an SVG has its ids to itself; inline, the clip paths of one figure would cut another.
  data = base64.b64encode((workdir / 'figures' / f'{one.stem}.svg').read_bytes()).decode()
  return (f'<section><figure><img alt="{_text(one.title)}" src="data:image/svg+xml;base64,{data}">'
          f'<figcaption><strong>{_text(one.title)}.</strong> {_text(one.caption)}</figcaption></figure>'
          f'{_html_table(one.table) if one.table else ""}</section>')


def _html_table(found: Table) -> str:
  head = ''.join(f'<th>{_text(cell)}</th>' for cell in found.header)
  body = ''.join(f'<tr>{"".join(f"<td>{_text(cell)}</td>" for cell in row)}</tr>' for row in found.rows)
  return f'<div class="wide"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def _html_pairs(pairs: Iterable[tuple[str, Any]]) -> str:
  rows = ''.join(f'<tr><th>{_text(name)}</th><td>{_text(value)}</td></tr>' for name, value in pairs)
  return f'<div class="wide"><table class="pairs"><tbody>{rows}</tbody></table></div>'


def _text(value: Any) -> str:
  """As HTML; of an absolute path only the last part: where the owner keeps files is not for readers."""
  path = r'(?<![^\s=:"\'(\[,])/(?:[^/\s"\',;)\]]+/)*(?=[^/\s])'
  return html.escape(re.sub(path, '…/', str(value)))


def _flat(tree: Mapping[str, Any], prefix: str = '') -> Iterator[tuple[str, str]]:
  for key, value in tree.items():
    if isinstance(value, dict):
      yield from _flat(value, f'{prefix}{key}.')
    else:
      yield prefix + key, json.dumps(value, ensure_ascii=False)


def _clock(seconds: float) -> str:
  minutes, rest = divmod(round(seconds), 60)
  return f'{minutes} min {rest} s' if minutes else f'{seconds:.1f} s'


PAGE = Template("""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>$title</title>
<style>
:root { color-scheme: light dark; }
body { font: 16px/1.5 system-ui, sans-serif; max-width: 68rem; margin: 0 auto; padding: 1rem; }
h1, h2 { line-height: 1.2; }
.figures { display: grid; gap: 1.5rem;
           grid-template-columns: repeat(auto-fit, minmax(min(100%, 25rem), 1fr)); }
section { min-width: 0; max-width: 34rem; }
figure { margin: 0; }
img { display: block; width: 100%; box-sizing: border-box; background: #fff; padding: .5rem; }
figcaption { font-size: .875rem; margin: .5rem 0; }
.wide { overflow-x: auto; margin: .5rem 0 1.5rem; }
table { border-collapse: collapse; font-size: .875rem; font-variant-numeric: tabular-nums; }
th, td { text-align: left; vertical-align: top; white-space: nowrap; padding: .2rem .9rem .2rem 0;
         border-bottom: 1px solid #8886; }
.pairs td { white-space: normal; overflow-wrap: anywhere; }
.short { border-left: .3rem solid #d55e00; padding-left: .7rem; }
</style>
</head>
<body>
<h1>$title</h1>
<p>$summary</p>
$short
<div class="figures">
$figures
</div>
<h2>Test accuracy (%)</h2>
<p>By weights kept; mean ± standard deviation over n networks that differ in their seed.</p>
$accuracy
<h2>Statistics of the weights</h2>
<p>Mean ± standard deviation over n networks. Sign flips: weights whose sign differs from that at initialisation, among all
and among the survivors of layer-wise pruning at $density kept. From the smaller half: survivors whose initial magnitude was among
the smaller half of their layer. Excess kurtosis: 0 for normally distributed weights, larger for heavier tails.</p>
$statistics
<h2>Origin</h2>
$origin
<details><summary>Config</summary>
$config
</details>
</body>
</html>
""")

KINDS: dict[str, Callable[[Run], Iterator[Shown]]] = {
    'figure1': _figure1,
    'compare': _compare,
    'learning_rate': _learning_rate,
}


def _guarded(argv: list[str]) -> None:
  try:
    main(argv)
  except UserError as error:
    print(f'error: {error}', file=sys.stderr)
    sys.exit(2)


def _parse(argv: list[str]) -> list[str]:
  app.define_help_flags()
  try:
    return flags.FLAGS(argv)
  except flags.Error as error:
    print(f'error: {error}', file=sys.stderr)
    sys.exit(2)
  except SystemExit:   # absl's, after it has printed the help that was asked for, with 1
    sys.exit(0)


if __name__ == '__main__':
  app.run(_guarded, flags_parser=_parse)

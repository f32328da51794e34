"""Figures, tables and one HTML page from the files that a run left in its workdir. Trains nothing.

  python -m experiments.report WORKDIR [WORKDIR ...]

Writes figures/*.png and *.svg, table.md and report.html to each WORKDIR and prints the table; with several,
one table of them all. A run does this by itself at its end; the command draws it again, or compares runs.
"""
import base64
import csv
import html
import io
import json
import re
import sys
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from string import Template
from typing import Any, NamedTuple

import numpy as np
from absl import app
from matplotlib.figure import Figure

from experiments import figures
from experiments.errors import UserError
from experiments.figures import Curve, Panel
from experiments.workdir import write_atomic

Row = dict[str, Any]

# What tells groups of networks apart; within a group the seed alone differs. 'run': among several workdirs.
AXES = ('alpha', 'optimizer', 'update', 'biases', 'scope', 'learning_rate', 'run')
NET = ('alpha', 'seed', 'learning_rate', 'optimizer', 'update', 'biases')
TEXT = ('optimizer', 'update', 'biases', 'scope')
SHARES = ('density', 'validation_accuracy', 'test_accuracy', 'overlap')
NAMES = {'alpha': 'α', 'optimizer': 'optimiser', 'sgd': 'SGD', 'adam': 'Adam', 'adamw': 'AdamW',
         'learning_rate': 'learning rate', 'target_propagation': 'target propagation', 'layer': 'layer-wise',
         'sign_flips': 'sign flips (share)', 'kurtosis': 'excess kurtosis',
         'mnist': 'MNIST', 'fashion_mnist': 'Fashion-MNIST'}
DENSITIES = (1.0, 0.3, 0.1, 0.05, 0.02)   # of a table that fits a terminal
FULL_STEPS = 50_000   # of the authors' notebook, which draws the paper's figure 1a
CONFIG = {'name': str, 'dataset': str, 'steps': int, 'batch_size': int, 'report': list, 'sweep': dict}
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
  names = [_json(workdir / 'config.json', CONFIG)['name'] for workdir in workdirs]
  if len(set(names)) < len(names):
    names = [f'{name} ({workdir.resolve().name})' for name, workdir in zip(names, workdirs, strict=True)]
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
  shown = [one for kind in run.config['report'] for one in KINDS[kind](run)]
  paths = [path for one in shown for path in figures.save(one.figure, workdir / 'figures' / one.stem)]
  for name, content in (('table.md', table(run.results) + '\n'), ('report.html', page(run, shown))):
    write_atomic(workdir / name, content)
    paths.append(workdir / name)
  return paths


def table(rows: Sequence[Row], densities: Sequence[float] = DENSITIES) -> str:
  """Test accuracy (%), mean ± sd over the n networks of each group, as text that is Markdown as well.

  Args:
    rows: as `read_results` gives them; those of several runs carry a 'run' each.
    densities: shares of weights kept, of which the nearest that the rows have are shown.
  """
  header, cells = accuracy_table(rows, densities)
  lines = [[cell.replace('|', r'\|') for cell in line] for line in (header, *cells)]
  widths = [max(len(line[i]) for line in lines) for i in range(len(header))]
  lines.insert(1, ['-' * width for width in widths])
  padded = [[cell.ljust(width) for cell, width in zip(line, widths, strict=True)] for line in lines]
  return '\n'.join(['Test accuracy (%) by weights kept, mean ± sd over n networks:', '',
                    *(f'| {" | ".join(line)} |' for line in padded)])


# Reading

def read_run(workdir: Path) -> Run:
  """Raises: UserError, naming the file, where one is missing, damaged or lacks a key or a column."""
  config = _json(workdir / 'config.json', CONFIG)
  for kind in config['report']:
    if kind not in KINDS:
      raise UserError(f'{workdir / "config.json"}: report has {kind!r}; known are {sorted(KINDS)}.')
  statistics = _csv(workdir / 'statistics.csv', NET)
  return Run(workdir, config, _json(workdir / 'run.json', RECORD), read_results(workdir), statistics)


def read_results(workdir: Path) -> list[Row]:
  """results.csv: a row for each network, scope and density; accuracies are shares or NaN."""
  path = workdir / 'results.csv'
  rows = _csv(path, (*NET, 'scope', 'density', 'kept', 'weights', 'validation_accuracy', 'test_accuracy'))
  for line, row in enumerate(rows, 2):
    if not 0 <= row['kept'] <= row['weights']:
      raise UserError(f'{path}, line {line}: kept is {row["kept"]:g} of {row["weights"]:g} weights.')
  return rows


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


def _csv(path: Path, columns: Sequence[str]) -> list[Row]:
  """The rows of a file with at least `columns`; all but those of TEXT are numbers."""
  try:
    lines = list(csv.reader(io.StringIO(_bytes(path).decode(), newline=''), strict=True))
  except (csv.Error, UnicodeDecodeError) as error:
    raise UserError(f'{path} is damaged: {error}.') from None
  header = lines[0] if lines else []
  if missing := [column for column in columns if column not in header]:
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
    what = tuple(row.get(axis) for axis in (*NET, 'scope', 'density'))
    if what in seen:
      raise UserError(f'{where} repeats the network, scope and density of an earlier line.')
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
    raise UserError(f'{path} is missing; a run that has ended leaves it there.') from None
  except OSError as error:
    raise UserError(f'{path} cannot be read: {error.strerror}.') from None


def _weights(path: Path) -> tuple[float, dict[float, tuple[np.ndarray, np.ndarray, np.ndarray]]]:
  """Density of the masks, and α → (initial, final, kept) of the sampled weights, [N] each."""
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


def best_learning_rates(rows: Sequence[Row]) -> list[Row]:
  """Of each group the rows at the learning rate of best validation accuracy, mean over densities and seeds.

  A rate at which a network has no finite accuracy is taken only if all rates are so; of equals, the smallest.
  """
  def score(members: Iterable[Row]) -> float:
    mean = float(np.mean([row['validation_accuracy'] for row in members]))
    return mean if np.isfinite(mean) else -np.inf
  chosen: list[Row] = []
  for members in groups(rows, varying(rows, ['learning_rate'])).values():
    chosen.extend(max(groups(members, ['learning_rate']).values(), key=score))   # the first of equals
  return chosen


def nearest(rows: Sequence[Row], density: float) -> float:
  """The density of the rows that is nearest to the wanted one."""
  return min((row['density'] for row in rows), key=lambda found: (abs(found - density), found))


def accuracy_table(rows: Sequence[Row], densities: Sequence[float], always: Sequence[str] = ()) -> Table:
  """A line for each group; columns for axes that vary and those of `always`, n, and the nearest densities."""
  axes = [axis for axis in AXES if axis in varying(rows) or axis in always]
  columns = list(dict.fromkeys(nearest(rows, density) for density in densities))
  lines = []
  for key, members in groups(rows, axes).items():
    found = [summarise(row['test_accuracy'] for row in members if row['density'] == at) for at in columns]
    lines.append([*map(_word, key), _span(one.n for one in found), *map(_percent, found)])
  return Table([*map(_word, axes), 'n', *map(_share, columns)], lines)


def statistics_table(rows: Sequence[Row]) -> Table:
  """A line for each group; a column for each statistic of its networks, mean ± sd."""
  axes, names = varying(rows), [name for name in rows[0] if name not in NET]
  lines = []
  for key, members in groups(rows, axes).items():
    found = [summarise(row[name] for row in members) for name in names]
    lines.append([*map(_word, key), _span(one.n for one in found), *map(_rounded, found)])
  return Table([*map(_word, axes), 'n', *(_word(name).replace('_', ' ') for name in names)], lines)


def curves(rows: Sequence[Row], axes: Sequence[str], column: str, x: str = 'density',
           scale: Callable[[float], float] = lambda density: 100 * density) -> list[Curve]:
  """A curve for each group: mean and sd of `column`, in per cent, over `scale` of `x`."""
  found = []
  for key, members in groups(rows, axes).items():
    points = groups(members, [x])
    sums = [summarise(row[column] for row in some) for some in points.values()]
    found.append(Curve(_label(axes, key), np.array([scale(at) for at, in points]),
                       100 * np.array([one.mean for one in sums]), 100 * np.array([one.sd for one in sums])))
  return found


def _percent(summary: Summary) -> str:
  return _mean_sd(Summary(100 * summary.mean, 100 * summary.sd, summary.n), 2)


def _rounded(summary: Summary) -> str:
  """Two digits of the standard deviation, or four of the mean where there is none."""
  sd, mean = (x if np.isfinite(x) else 0.0 for x in (summary.sd, summary.mean))
  if sd > 1e-12 * abs(mean):   # the deviation of equal values is not 0 but a rounding error
    last = np.floor(np.log10(sd)) - 1
  else:
    last = np.floor(np.log10(abs(mean))) - 3 if mean else 0
  return _mean_sd(summary, int(np.clip(-last, 0, 8)))


def _mean_sd(summary: Summary, decimals: int) -> str:
  spread = f' ± {summary.sd:,.{decimals}f}' if summary.n > 1 else ''
  return f'{summary.mean:,.{decimals}f}{spread}' if summary.n else '–'


def _share(density: float) -> str:
  return f'{100 * density:.3g} %'


def _span(counts: Iterable[int]) -> str:
  found = sorted(set(counts))
  return f'{found[0]}' if len(found) == 1 else f'{found[0]} to {found[-1]}'


def _word(value: Any) -> str:
  return NAMES.get(value, value) if isinstance(value, str) else f'{value:g}'


def _label(axes: Sequence[str], key: Sequence[Any]) -> str:
  frames = {'alpha': 'α = {}', 'learning_rate': 'learning rate {}', 'biases': '{} biases'}
  return ', '.join(frames.get(axis, '{}').format(_word(value)) for axis, value in zip(axes, key, strict=True))


# Figures

def _figure1(run: Run) -> Iterator[Shown]:
  axes = varying(run.results)
  lines = curves(run.results, axes, 'test_accuracy')
  yield Shown('figure_1a', 'Figure 1a. Accuracy against sparsity',
              f'Test accuracy against the share of weights kept, {_setting(run)} The lower panel enlarges '
              f'the upper end of the same curves. {_spread(run.results, "test_accuracy")}',
              figures.accuracy_figure(lines, axes == ['alpha'], _note(run.results, 'test_accuracy')))

  overlap = _csv(run.workdir / 'overlap.csv', (*NET, 'scope', 'density', 'overlap'))
  axes = varying(overlap)
  lines = curves(overlap, axes, 'overlap', scale=lambda density: 100 - 100 * density)
  yield Shown('figure_1b', 'Figure 1b. Agreement of the masks before and after training',
              'Share of the weights that magnitude pruning treats alike at initialisation and after '
              'training, keeping them in both or pruning them in both. Dashed: the agreement of two '
              f'independent random masks, p² + (1 − p)² for a share p kept. {_spread(overlap, "overlap")}',
              figures.overlap_figure(lines, axes == ['alpha'], _note(overlap, 'overlap')))

  density, sampled = _weights(run.workdir / 'weights.npz')
  alphas = sorted({row['alpha'] for row in run.results} | set(sampled))
  styles = figures.line_styles([f'{alpha:g}' for alpha in alphas], ordered=True)   # the colours of figure 1a
  for letter, alpha in zip('cd', _shown_alphas(sampled), strict=False):
    initial, final, kept = sampled[alpha]
    yield Shown(f'figure_1{letter}', f'Figure 1{letter}. Weights before and after training, α = {alpha:g}',
                f'{initial.size:,} weights drawn at random from one network, the same ones with the same '
                'initial values for every α; pruned by magnitude after training so that '
                f'{_share(density)} are kept. Above: kernel density estimates of the initial values of the '
                'survivors (filled) and of all (grey), each of area 1. Right: of the final values of the '
                'survivors. Dotted: weights that training left alone. The vertical axis follows the data: '
                'it differs between figures 1c and 1d.',
                figures.weights_figure(initial, final, kept, styles[f'{alpha:g}']['color'], f'α = {alpha:g}'))


def _shown_alphas(alphas: Iterable[float]) -> list[float]:
  """The paper shows 1 and 4: the smallest, and the largest of the others that is not above 4, if any."""
  first, *others = sorted(alphas)
  return [first, *[alpha for alpha in others if alpha <= 4][-1:]]


def _compare(run: Run) -> Iterator[Shown]:
  rows = best_learning_rates(run.results)
  axes = varying(rows, ['learning_rate'])
  if 'alpha' in axes and len(axes) > 1:
    axes.remove('alpha')
    panels = [Panel(_label(['alpha'], key), curves(some, axes, 'test_accuracy'))
              for key, some in groups(rows, ['alpha']).items()]
  else:
    panels = [Panel('', curves(rows, axes, 'test_accuracy'))]
  rates = [f'{rate:g}' for rate, in groups(run.results, ['learning_rate'])]
  rule = (f'Of the learning rates {", ".join(rates)} each group has the one with the best validation '
          'accuracy, mean over all densities and seeds; the test images had no part in the choice. '
          if len(rates) > 1 else '')
  yield Shown('compare', 'Comparison',
              f'Test accuracy against the share of weights kept, {_setting(run)} {rule}'
              f'{_spread(rows, "test_accuracy")}',
              figures.panels_figure(panels, axes == ['alpha'], _note(rows, 'test_accuracy'), 'kept'),
              accuracy_table(rows, (1.0, 0.1, 0.05, 0.02), always=['learning_rate']))


def _learning_rate(run: Run) -> Iterator[Shown]:
  axes = varying(run.results, ['learning_rate'])
  panels = []
  for density in dict.fromkeys(nearest(run.results, wanted) for wanted in (1.0, 0.1)):
    rows = [row for row in run.results if row['density'] == density]
    lines = curves(rows, axes, 'test_accuracy', 'learning_rate', float)
    panels.append(Panel(f'{_share(density)} kept', lines))
  note = _note(run.results, 'test_accuracy')
  yield Shown('learning_rate', 'Sensitivity to the learning rate',
              f'Test accuracy against the learning rate, dense and pruned, {_setting(run)} '
              f'{_spread(run.results, "test_accuracy")}',
              figures.panels_figure(panels, axes == ['alpha'], note, 'learning rate'))


def _setting(run: Run) -> str:
  scopes = [scope for scope, in groups(run.results, ['scope'])]
  factor = run.config.get('prune', {}).get('output_factor', 1)
  text = (f'on {_word(run.config["dataset"])} after {run.config["steps"]:,} steps at batch size '
          f'{run.config["batch_size"]} and one-shot {" or ".join(map(_word, scopes))} pruning by magnitude, '
          'without fine-tuning.')
  if factor != 1:
    text += (f' The share is that of the hidden layers; the output layer keeps {factor:g} times as much, '
             'at most all.')
    text += ' Global pruning keeps the same total.' if 'global' in scopes else ''
  return text


def _note(rows: Sequence[Row], column: str) -> str:
  counts = _counts(rows, column)
  return f'mean ± sd, n = {_span(counts)}' if max(counts) > 1 else 'one network each'


def _spread(rows: Sequence[Row], column: str) -> str:
  counts = _counts(rows, column)
  text = (f'Lines: means, bands: ± one standard deviation (n − 1), over n = {_span(counts)} networks that '
          'differ in their seed.' if max(counts) > 1 else 'One network each: its spread is unknown.')
  bad = {tuple(row[axis] for axis in NET) for row in rows if not np.isfinite(row[column])}
  return text + (f' Networks without a finite value, left out of the means: {len(bad)}.' if bad else '')


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
  summary = (f'{nets} network{"s" if nets > 1 else ""} on {_word(config["dataset"])}, '
             f'{config["steps"]:,} steps each at batch size {config["batch_size"]}.')
  return PAGE.substitute(
      name=_text(config['name']), summary=_text(summary), short=_short(config),
      figures='\n'.join(_html_figure(run.workdir, one) for one in shown),
      accuracy=_html_table(accuracy_table(run.results, (1.0, 0.5, 0.3, 0.2, 0.1, 0.05, 0.02, 0.01))),
      statistics=_html_table(statistics_table(run.statistics)),
      origin=_html_pairs(origin.items()), config=_html_pairs(_flat(config)))


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
<title>$name</title>
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
<h1>$name</h1>
<p>$summary</p>
$short
<div class="figures">
$figures
</div>
<h2>Test accuracy (%)</h2>
<p>By weights kept; mean ± standard deviation over n networks that differ in their seed.</p>
$accuracy
<h2>Statistics of the weights</h2>
<p>Mean ± standard deviation over n networks.</p>
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


if __name__ == '__main__':
  app.run(_guarded)

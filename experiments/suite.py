"""Runs every algorithm of a config, one after another, and lays them side by side. What has run already is not run again.

  python -m experiments.suite --config=configs/mnist_sparse.py --workdir=runs/mnist_sparse

Each algorithm is a run of experiments.main in a process and a workdir of its own, so a suite that was stopped goes on by the same
command. --tuning runs those that choose learning rates, --only=gradual,rigl but some of the algorithms. Everything after -- is
handed on to each run, as in `-- --config.steps=100`. What is there of other settings is refused.
"""
import importlib.util
import pathlib
import sys
from collections.abc import Sequence
from typing import Any

from absl import flags
from ml_collections import config_flags

from experiments.commands import child, run
from experiments.errors import UserError
from experiments.results import read_config
from experiments.workdir import check

FLAGS = flags.FlagValues()   # of this command alone
CONFIG = flags.DEFINE_string('config', None, 'Required. File of a config that names its ALGORITHMS, as configs/mnist_sparse.py.',
                             flag_values=FLAGS)
WORKDIR = flags.DEFINE_string('workdir', None, 'Required. Directory of the workdirs; the table goes to table/ in it.',
                              flag_values=FLAGS)
TUNING = flags.DEFINE_bool('tuning', False, 'Run the choice of learning rates instead; draw no table.',
                           flag_values=FLAGS)
ONLY = flags.DEFINE_list('only', [], 'Some of the ALGORITHMS, with commas between; without it all of them.', flag_values=FLAGS)


def main(argv: list[str]) -> None:
  if not CONFIG.value or not WORKDIR.value:
    raise UserError('--config and --workdir are needed; see --help.')
  workdir, suffix = pathlib.Path(WORKDIR.value), '_tuning' if TUNING.value else ''
  names = chosen(algorithms(CONFIG.value), ONLY.value)
  places = {name: workdir / f'{name}{suffix}' for name in names}
  ended = [name for name in names if (places[name] / 'run.json').exists()]
  for name in ended:   # before hours of the others
    given, plain = (config_of(f'{CONFIG.value}:{name}{suffix}', more) for more in (argv[1:], []))
    check(places[name], given, unless=plain)
    print(f'already there: {name}{suffix}', flush=True)
  for i, name in enumerate(names):
    if name in ended:
      continue
    print(f'{i + 1}/{len(names)}: {name}{suffix}', flush=True)
    command = [sys.executable, '-m', 'experiments.main', f'--config={CONFIG.value}:{name}{suffix}', f'--workdir={places[name]}',
               *argv[1:]]
    if (code := child(command)) != 0:
      after = 'what is wrong is told above.' if code == 2 else 'the same command goes on with it.'
      raise UserError(f'{name}{suffix} ended with exit status {code}; {after}')
  if not TUNING.value:
    continual = read_config(places[names[0]]).get('protocol') == 'continual'
    side_by_side = 'experiments.continual.table' if continual else 'experiments.sparse_table'
    sys.exit(child([sys.executable, '-m', side_by_side, f'--out={workdir / "table"}', *map(str, places.values())]))


def config_of(file: str, overrides: Sequence[str]) -> Any:
  """The config that experiments.main would run with these flags. Raises: UserError where they give none."""
  values, argv = flags.FlagValues(), ['suite', f'--config={file}', *overrides]
  config_flags.DEFINE_config_file('config', flag_values=values, lock_config=True, sys_argv=argv)
  try:
    values(argv, known_only=True)   # experiments.main has flags besides, which it checks itself
    return values.config
  except (flags.Error, KeyError, AttributeError, ValueError, TypeError) as error:
    raise UserError(f'{" ".join(argv[1:])} gives no config: {str(error).strip().splitlines()[0]}') from None


def algorithms(path: str) -> tuple[str, ...]:
  """The ALGORITHMS of a config's file. Raises: UserError where it has none."""
  file, _, variant = path.partition(':')
  if variant and not pathlib.Path(path).is_file():
    raise UserError(f'--config={path} names a variant, and a suite runs one for each of the ALGORITHMS: say --config={file}, and '
                    f'--only={variant} to run but that.')
  if not pathlib.Path(path).is_file():
    raise UserError(f'--config={path} is no file.')
  spec = importlib.util.spec_from_file_location('suite_config', path)
  module = importlib.util.module_from_spec(spec)   # type: ignore[arg-type]
  spec.loader.exec_module(module)   # type: ignore[union-attr]
  if not hasattr(module, 'ALGORITHMS'):
    raise UserError(f'--config={path} names no ALGORITHMS; a suite is made of one run for each.')
  return tuple(module.ALGORITHMS)


def chosen(known: Sequence[str], only: Sequence[str]) -> tuple[str, ...]:
  """Those of `known` that are asked for, in its order; all where none is. Raises: UserError for others."""
  for name in only:
    if name not in known:
      raise UserError(f'--only: {name!r} is none of the ALGORITHMS of {CONFIG.value}; these are {", ".join(known)}.')
  return tuple(name for name in known if name in only or not only)


def hint(flag: str) -> str:
  return f'; flags of the runs go after --, as in `... -- --{flag}=VALUE`.' if flag.startswith('config.') else ''


if __name__ == '__main__':
  run(main, __doc__ or '', FLAGS, hint)

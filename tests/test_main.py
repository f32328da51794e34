"""The command: one line for each mistake, and a run that is killed, interrupted and goes on with the same numbers."""
import json
import os
import pathlib
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time

import numpy as np
import pytest
import tiny
from absl import flags
from absl.testing import flagsaver

from experiments import commands, main
from experiments import data as datasets
from experiments import workdir as workdirs
from experiments.errors import DataError
from experiments.models import MODELS

ROOT = pathlib.Path(__file__).parents[1]
pytestmark = pytest.mark.filterwarnings('ignore:the load_module:DeprecationWarning')   # how ml_collections reads a config


@pytest.fixture
def command(monkeypatch, tmp_path, capsys):
  """(arguments) → exit status, stdout, stderr of the command, in this process; 'WORKDIR' stands for its directory."""
  monkeypatch.chdir(ROOT)
  monkeypatch.delenv('POWERPROP_DATA', raising=False)
  monkeypatch.setitem(datasets.DATASETS, 'tiny', tiny.load)
  monkeypatch.setitem(MODELS, 'tiny', tiny.mlp)

  def call(*arguments):
    monkeypatch.setattr(sys, 'argv', ['main', *(x.replace('WORKDIR', str(tmp_path / 'run')) for x in arguments)])
    capsys.readouterr()
    with flagsaver.flagsaver():
      try:
        main.guarded(main.parse(list(sys.argv)))
        status = 0
      except SystemExit as stop:
        status = stop.code
      finally:
        flags.FLAGS.unparse_flags()
    return status, *capsys.readouterr()
  return call


GOOD = ['--config=configs/mnist_lenet.py:quick', '--workdir=WORKDIR']

# A flag added to these, and what the one line must say. Values that the config's types let pass are in test_supervised.py.
WRONG_FLAGS = {
  '--config.stepz=3': 'the config has no key \'stepz\'. Did you mean "steps" instead of "stepz"?',
  '--config.sweep.alfa=3': "the config has no key 'alfa'",
  '--config.steps=abc': "flag --config.steps=abc: invalid literal for int() with base 10: 'abc'",
  '--config.steps=2.5': "flag --config.steps=2.5: invalid literal for int() with base 10: '2.5'",
  '--config.momentum=x': "flag --config.momentum=x: could not convert string to float: 'x'",
  '--config.sweep.alpha=(1.0,': 'flag --config.sweep.alpha=(1.0,: Error while parsing string: (1.0, as tuple',
  '--config.sweep=3': "flag --config.sweep=3: Failed to parse '3' as a ConfigDict",
  '--config.sweep.alpha=(0.5,)': 'config.sweep.alpha must be a tuple of numbers of at least 1, got (0.5,).',
  '--config.sweep.optimizer=sdg': 'config.sweep.optimizer must be a tuple of some of '
                                  "['adam', 'adamw', 'momentum', 'momentum_decay', 'sgd'], got ",
  '--config.protocol=x': "config.protocol must be one of ['continual', 'lottery', 'streamed', 'supervised'], got 'x'.",
  '--dry_run': "--dry_run is for the protocol 'streamed', and config.protocol is 'supervised'.",
  '--config.dataset=imagenet': "unknown data set 'imagenet'; known: cifar10, cifar100, fashion_mnist, mnist",
  '--config.data_dir=/nowhere': 'data_dir /nowhere is not a directory',
  '--confg.steps=3': "Unknown command line flag 'confg.steps'",
  'steps=3': "unknown argument 'steps=3'; flags are given as --name=value.",
  '--config': "--config=: '' is no Python file; there are configs/cifar_batch_norm.py, ",
  '--config=': "--config=: '' is no Python file; there are configs/cifar_batch_norm.py, ",
  '--config=configs': "--config=configs: 'configs' is no Python file; there are configs/",
  '--config=configs/nothing.py': "--config=configs/nothing.py: 'configs/nothing.py' is no Python file; there are configs/",
  '--config=configs/mnist_lenet.py:slow': "--config=configs/mnist_lenet.py:slow gives no config: mnist_lenet has the "
                                          "variants 'full' and 'quick', not 'slow'.",
  '--config=configs/mnist_scope.py:slow': '--config=configs/mnist_scope.py:slow: configs/mnist_scope.py has no variants.',
  '--workdir=': '--workdir is needed; see --help.',
  f'--workdir={__file__}': f'--workdir={__file__} cannot be used: File exists.',
  f'--workdir={__file__}/run': f'--workdir={__file__}/run cannot be used: Not a directory.',
  '--processes=2': '--coordinator, --processes and --process go together.',
  '--processes=0': 'flag --processes=0: 0 is not a positive integer',
  '--coordinator=host --processes=2 --process=0': "--coordinator must be HOST:PORT, got 'host'.",
  '--coordinator=host:99999 --processes=2 --process=0': "--coordinator must be HOST:PORT, got 'host:99999'.",
  '--coordinator=host:1234 --processes=2 --process=2': '--process must be below --processes=2, got 2.',
}


@pytest.mark.parametrize('wrong, message', WRONG_FLAGS.items(), ids=[name.replace(__file__, 'FILE') for name in WRONG_FLAGS])
def test_a_mistake_gives_one_line(command, tmp_path, wrong, message):
  status, out, err = command(*GOOD, *wrong.split(' '))
  assert status == 2 and out == ''
  assert err.startswith(f'error: {message}') and err.count('\n') == 1 and err.endswith('\n')
  assert not (tmp_path / 'run' / 'config.json').exists()   # the directory is not bound to a config that was wrong


@pytest.mark.parametrize('missing', [0, 1])
def test_config_and_workdir_are_needed(command, missing):
  name = ('--config', '--workdir')[missing]
  assert command(GOOD[1 - missing]) == (2, '', f'error: {name} is needed; see --help.\n')


@pytest.mark.parametrize('source, message', [
  ('steps = 3', "AttributeError: module 'config_to_check' has no attribute 'get_config'"),
  ('import nothing_of_that_name', "ModuleNotFoundError: No module named 'nothing_of_that_name'"),
  ('def get_config(:', 'SyntaxError: invalid syntax'),
  ('def get_config():\n  raise KeyError("a\\nb")', 'KeyError: '),
])
def test_a_config_file_of_ones_own_that_fails(command, tmp_path, source, message):
  (tmp_path / 'mine.py').write_text(source)
  status, _, err = command(f'--config={tmp_path}/mine.py', '--workdir=WORKDIR')
  assert status == 2 and err.startswith(f'error: --config={tmp_path}/mine.py gives no config: {message}') and err.count('\n') == 1


TINY = ['--config=configs/base.py', '--workdir=WORKDIR', '--config.dataset=tiny', '--config.model=tiny',
        '--config.train_images=360', '--config.batch_size=20', '--config.steps=20', '--config.sweep.alpha=(2.0,)',
        '--config.sweep.seed=(0,)', '--config.prune.densities=(0.5,)', '--config.report=()']


def test_mistakes_and_then_a_run(command, tmp_path):
  """A wrong command leaves a directory free for the right one; that one binds it."""
  good = [*TINY, f'--config.data_dir={tiny.write(tmp_path / "data")}']
  (tmp_path / 'empty').mkdir()
  for wrong, message in (('--config.train_images=480', 'config.train_images must leave some of the 480 images for validation'),
                         (f'--config.data_dir={tmp_path / "empty"}', 'Tiny not found: '),
                         ("--config.sweep.update=('x',)", 'config.sweep.update must be ')):
    status, _, err = command(*good, wrong)
    assert status == 2 and err.startswith(f'error: {message}') and err.count('\n') == 1
    assert not (tmp_path / 'run').exists()
  with workdirs.locked(tmp_path / 'run'):
    told = command(*good)
  assert told == (2, '', f'error: --workdir={tmp_path}/run is in use by another run; wait for it, or choose another directory.\n')

  status, out, err = command(*good)
  assert (status, err) == (0, '') and out.startswith('Tiny: 480 train and 150 test images from official IDX files')
  assert '\n1 network of 20 steps in 1 group on 8 cpu devices.\n' in out
  assert json.loads((tmp_path / 'run' / 'config.json').read_text())['steps'] == 20
  results = (tmp_path / 'run' / 'results.csv').read_bytes()

  status, _, err = command(*good, '--config.steps=21')
  assert (status, err) == (2, f'error: --workdir={tmp_path}/run belongs to another config: config.steps is 20 there and 21 here; '
                              'choose another directory, or delete that one.\n')
  moved = shutil.move(tmp_path / 'data', tmp_path / 'moved')
  status, out, _ = command(*good, f'--config.data_dir={moved}', '--config.checkpoint_epochs=1')   # keys without effect
  assert status == 0 and 'which has ended' in out
  assert (tmp_path / 'run' / 'results.csv').read_bytes() == results


# ---- the command as a process of its own ---------------------------------------------------------------------------


@pytest.fixture
def start():
  """(arguments, cache) → the command as a process, with as many devices as it finds for itself; killed when the test ends."""
  started = []
  if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:   # as under nohup or `&` in a script; a child would ignore it, too
    signal.signal(signal.SIGINT, signal.default_int_handler)

  def call(arguments, cache=None):
    environment = {name: value for name, value in os.environ.items() if name != 'XLA_FLAGS'}
    if cache is not None:   # the same programs are compiled again and again below
      environment |= {'JAX_COMPILATION_CACHE_DIR': str(cache), 'JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS': '0'}
    started.append(subprocess.Popen([sys.executable, '-m', 'experiments.main', *arguments], cwd=ROOT, env=environment,
                                    stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True))
    return started[-1]

  yield call
  for process in started:
    if process.poll() is None:
      process.kill()
      process.communicate()


def test_help_and_a_mistake_in_a_process(start):
  helped, mistaken = start(['--help']), start([*GOOD, '--config.stepz=3'])
  alone = start([*GOOD, '--distributed'])
  out, err = helped.communicate(timeout=120)
  assert helped.returncode == 0
  assert 'Runs one experiment' in out and '--workdir' in out and '--coordinator' in out and err == ''
  out, err = mistaken.communicate(timeout=120)
  assert mistaken.returncode == 2 and out == '' and err.startswith('error: ') and err.count('\n') == 1
  out, err = alone.communicate(timeout=120)
  assert alone.returncode == 2 and err == ('error: --distributed finds no Slurm job or TPU pod here; --coordinator, --processes '
                                           'and --process join hosts without one.\n')


@pytest.mark.parametrize('number', [signal.SIGINT, signal.SIGTERM])
def test_a_process_that_waits_for_others_says_so_and_can_be_ended(start, number):
  with socket.socket() as free:
    free.bind(('localhost', 0))
    port = free.getsockname()[1]
  process = start([*GOOD, f'--coordinator=localhost:{port}', '--processes=2', '--process=0'])
  assert process.stdout.readline() == f'process 0 of 2 waits for the others at localhost:{port}.\n'
  time.sleep(2)   # it is in JAX by now
  process.send_signal(number)
  process.communicate(timeout=20)
  assert process.returncode == -number


def wait_for(condition, process, seconds=240):
  end = time.monotonic() + seconds
  while not condition():
    assert process.poll() is None, process.communicate()
    assert time.monotonic() < end
    time.sleep(0.005)


@pytest.mark.parametrize('made, told', [
  ([], ' before its first checkpoint; the same command begins anew'), (['checkpoints'], ' before its first checkpoint; the same'),
  (['checkpoints/5.orbax-checkpoint-tmp'], ' before its first checkpoint'), (['checkpoints/5'], '; the same command goes on'),
  (['rewind/checkpoints', 'round_3/checkpoints/9000'], '; the same command goes on from the last checkpoint')])
def test_what_a_stopped_run_comes_to(tmp_path, made, told):
  for name in made:
    (tmp_path / name).mkdir(parents=True)
  assert main.stopped(tmp_path).startswith(f'stopped{told}')


@pytest.mark.parametrize('number, status', [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_stopped_before_the_first_checkpoint(start, tmp_path, number, status):
  if not has_mnist():
    pytest.skip('no MNIST here: the extra [mnist], or POWERPROP_DATA')
  run = start(['--config=configs/mnist_lenet.py:quick', '--config.checkpoint_epochs=1000', '--config.steps=1_000_000',
               '--config.sweep.alpha=(2.0,)', '--config.sweep.seed=(0,)', f'--workdir={tmp_path / "run"}'])
  wait_for((tmp_path / 'run' / 'metrics.jsonl').exists, run)
  run.send_signal(number)
  _, err = run.communicate(timeout=120)
  assert (run.returncode, err) == (status, '\nstopped before its first checkpoint; the same command begins anew.\n')


def has_mnist():
  try:
    datasets.load('mnist')
  except DataError:
    return False
  return True


def records(workdir):
  lines = (workdir / 'metrics.jsonl').read_text().splitlines()
  return [{key: value for key, value in json.loads(line).items() if key != 'seconds'} for line in lines]


COMPILES = """
import hashlib
from absl import flags
from experiments import commands, main
def main_(argv):
  print('begun', flush=True)
  commands.heeding(lambda: hashlib.pbkdf2_hmac('sha256', b'', b'', 10**9))
main.main = main_
flags.FLAGS.mark_as_parsed()
main.process([])
"""


@pytest.mark.parametrize('number', [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_what_python_would_wait_for(number):
  """A routine in C that heeds no signals, as XLA's compiler: for minutes, if it is left alone."""
  pipe = subprocess.PIPE
  process = subprocess.Popen([sys.executable, '-c', COMPILES], cwd=ROOT, stdout=pipe, stderr=pipe, text=True)
  try:
    assert process.stdout.readline() == 'begun\n'
    time.sleep(0.5)
    process.send_signal(number)
    _, err = process.communicate(timeout=30)
  finally:
    process.kill()
  assert process.returncode == 128 + number and 'stopped before its first checkpoint' in err and 'Traceback' not in err, err


def test_what_a_thread_finds_wrong_is_raised():
  with pytest.raises(ZeroDivisionError):
    commands.heeding(lambda: 1 // 0)
  assert commands.heeding(lambda: 3) == 3


def test_what_a_signal_leaves_undone_keeps_no_process():
  assert commands.heeding(lambda: threading.current_thread().daemon)


ENDS = """
import threading, time
from absl import flags
from experiments import commands, main
def main_(argv):
  threading.Thread(target=time.sleep, args=(600,)).start()
  print('told')
  raise commands.Stopped(143)
main.main = main_
flags.FLAGS.mark_as_parsed()
main.process([])
"""


def test_a_run_that_is_stopped_ends_whatever_its_threads_do():
  """What it has told before is not lost."""
  done = subprocess.run([sys.executable, '-c', ENDS], cwd=ROOT, capture_output=True, text=True, timeout=60, check=False)
  assert (done.returncode, done.stdout, done.stderr) == (143, 'told\n', '')


def test_killed_interrupted_and_gone_on_with(start, tmp_path):
  """Two networks of LeNet-300-100 on real MNIST, SIGKILL after the first checkpoint, SIGINT after another one, then to the end:
  every number as of a run that nobody stopped."""
  if not has_mnist():
    pytest.skip('no MNIST here: the extra [mnist], or POWERPROP_DATA')
  arguments = ['--config=configs/mnist_lenet.py:quick', '--config.sweep.alpha=(1.0, 2.0)', '--config.sweep.seed=(3,)',
               '--config.train_images=24_000', '--config.steps=2_100', '--config.prune.densities=(0.1, 1.0)',
               '--config.report=()', '--config.checkpoint_epochs=1']

  def run(workdir):
    return start([*arguments, f'--workdir={workdir}'], cache=tmp_path / 'cache')

  def checkpoints():
    folder = tmp_path / 'stopped' / 'checkpoints'
    return {int(path.name) for path in folder.glob('*') if path.name.isdecimal()}

  whole = run(tmp_path / 'whole')
  out, err = whole.communicate(timeout=300)
  assert whole.returncode == 0 and err == '', err
  assert '2 networks of 2,100 steps in 2 groups on' in out and 'goes on' not in out

  killed = run(tmp_path / 'stopped')
  wait_for(checkpoints, killed)
  killed.send_signal(signal.SIGKILL)
  killed.communicate()
  first = max(checkpoints())
  assert first < 2_100 and not (tmp_path / 'stopped' / 'results.csv').exists()

  interrupted = run(tmp_path / 'stopped')
  wait_for(lambda: max(checkpoints()) > first, interrupted)
  interrupted.send_signal(signal.SIGINT)
  out, err = interrupted.communicate(timeout=120)
  assert interrupted.returncode == 130 and err == '\nstopped; the same command goes on from the last checkpoint.\n', err
  assert f'goes on from step {first:,}.' in out
  second = max(checkpoints())
  assert second < 2_100 and not (tmp_path / 'stopped' / 'results.csv').exists()

  last = run(tmp_path / 'stopped')
  out, err = last.communicate(timeout=300)
  assert last.returncode == 0 and err == '' and f'goes on from step {second:,}.' in out
  for name in ('results.csv', 'overlap.csv', 'statistics.csv', 'weights.npz', 'config.json'):
    assert (tmp_path / 'stopped' / name).read_bytes() == (tmp_path / 'whole' / name).read_bytes(), name
  assert records(tmp_path / 'stopped') == records(tmp_path / 'whole')
  assert [record['step'] for record in records(tmp_path / 'whole')] == [400, 800, 1200, 1600, 2000, 2100]
  seconds = [json.loads(line)['seconds'] for line in (tmp_path / 'stopped' / 'metrics.jsonl').read_text().splitlines()]
  assert np.all(np.diff(seconds) > 0)   # they count on over the stops

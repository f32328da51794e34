"""The suite: every algorithm of a config in a process of its own, none twice, and a table at the end."""
import json
import os
import pathlib
import signal
import subprocess
import sys

import pytest

from experiments import suite
from experiments.errors import UserError

ROOT = pathlib.Path(__file__).parents[1]
pytestmark = pytest.mark.filterwarnings('ignore:the load_module:DeprecationWarning')   # how ml_collections reads a config
CONFIG = """
from configs import base

ALGORITHMS = ('static', 'gradual')


def get_config(variant):
  config = base.get_config()
  config.steps, config.train_images, config.batch_size = 2, 59_990, 20
  config.sweep.alpha, config.sweep.seed, config.sweep.sparsity = (1.0, 2.0), (0,), (0.9,)
  config.sweep.algorithm = (variant,)
  return config
"""


def run(*flags):
  return subprocess.run([sys.executable, '-m', 'experiments.suite', *flags], cwd=ROOT, capture_output=True, text=True)


def test_a_suite(tmp_path):
  config = tmp_path / 'small.py'
  config.write_text(CONFIG)
  flags = [f'--config={config}', f'--workdir={tmp_path / "runs"}', '--', '--config.prune.densities=(0.5,)', '--config.report=()']
  first = run(*flags)
  assert first.returncode == 0, first.stderr
  assert '1/2: static' in first.stdout and '2/2: gradual' in first.stdout
  table = (tmp_path / 'runs' / 'table' / 'table.md').read_text()
  assert [line.split('|')[1].strip() for line in table.splitlines()[4:]] == ['static random'] * 3 + ['gradual'] * 3
  before = (tmp_path / 'runs' / 'static' / 'run.json').read_bytes()
  second = run(*flags)
  assert second.returncode == 0 and '1/2' not in second.stdout and table in second.stdout
  assert second.stdout.startswith('already there: static\nalready there: gradual\n')
  assert (tmp_path / 'runs' / 'static' / 'run.json').read_bytes() == before


@pytest.fixture
def call(tmp_path, monkeypatch):
  """(flags of the suite, flags after --) → main of it, in this process, on tmp_path."""
  (tmp_path / 'small.py').write_text(CONFIG)

  def main(own=(), handed_on=()):
    values = {'CONFIG': str(tmp_path / 'small.py'), 'WORKDIR': str(tmp_path), 'TUNING': False, 'ONLY': [], **dict(own)}
    for name, value in values.items():
      monkeypatch.setattr(suite, name, type('Flag', (), {'value': value}))
    suite.main(['suite', *handed_on])
  return main


def ended(tmp_path, name, lacking=(), **change):
  """A run of the small config as far as a suite looks at it."""
  config = suite.config_of(f'{tmp_path}/small.py:{name}', []).to_dict() | change
  (tmp_path / name).mkdir()
  (tmp_path / name / 'config.json').write_text(json.dumps({key: value for key, value in config.items() if key not in lacking}))
  (tmp_path / name / 'run.json').write_text('{}')


@pytest.mark.parametrize('handed_on, key, values', [
  (['--config.steps=3'], 'steps', '2 there and 3'),
  (['--config.sweep.alpha=(1.0,)'], 'sweep.alpha', r'\[1.0, 2.0\] there and \[1.0\]')])
def test_what_is_there_of_other_settings_is_refused(call, tmp_path, handed_on, key, values):
  ended(tmp_path, 'gradual')   # the second; the first is not trained before that
  with pytest.raises(UserError, match=f'--workdir={tmp_path}/gradual belongs to another config: config.{key} is {values} here'):
    call(handed_on=handed_on)
  assert not (tmp_path / 'static').exists()


def test_an_older_run_lacks_keys_that_came_later(call, tmp_path, capsys):
  """It is of the same settings as long as these keys have the values that the config gives them."""
  for name in ('static_tuning', 'gradual_tuning'):
    ended(tmp_path, name, lacking=['label_smoothing'], data_dir='elsewhere')
  with pytest.raises(UserError, match=r'label_smoothing is None there and 0\.1 here'):
    call({'TUNING': True}, ['--config.label_smoothing=0.1'])
  capsys.readouterr()
  call({'TUNING': True}, ['--config.label_smoothing=0.0', '--distributed'])
  assert capsys.readouterr().out == 'already there: static_tuning\nalready there: gradual_tuning\n'


def test_only_some(call, tmp_path, capsys):
  for name in ('static_tuning', 'gradual_tuning'):
    ended(tmp_path, name)
  call({'TUNING': True, 'ONLY': ['gradual']})
  assert capsys.readouterr().out == 'already there: gradual_tuning\n'
  with pytest.raises(UserError, match=r"--only: 'rigle' is none of the ALGORITHMS of \S+/small.py; these are static, gradual\.$"):
    call({'ONLY': ['gradual', 'rigle']})


def test_a_run_that_fails_is_named(tmp_path):
  config = tmp_path / 'small.py'
  config.write_text(CONFIG.replace("'static', 'gradual'", "'gradul',"))
  done = run(f'--config={config}', f'--workdir={tmp_path / "runs"}')
  assert done.returncode == 2
  assert done.stderr.splitlines()[-1] == 'error: gradul ended with exit status 2; what is wrong is told above.'


CHILD = """
import pathlib, signal, sys, time

def stop(number, frame):
  time.sleep(0.3)   # as a run that puts its things in order
  pathlib.Path(sys.argv[1]).write_text(str(number))
  sys.exit(3)
signal.signal(signal.SIGTERM, stop)
signal.signal(signal.SIGINT, stop)
print('ready', flush=True)
time.sleep(60)
"""
PARENT = """
import sys
from absl import flags
from experiments import commands
commands.run(lambda argv: sys.exit(commands.child([sys.executable, *argv[1:]])), '', flags.FlagValues())
"""


@pytest.mark.parametrize('number, status', [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_is_handed_on_and_its_child_waited_for(tmp_path, number, status):
  if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:   # as under nohup; both would ignore it, too
    signal.signal(signal.SIGINT, signal.default_int_handler)
  (tmp_path / 'child.py').write_text(CHILD)
  (tmp_path / 'parent.py').write_text(PARENT)
  process = subprocess.Popen([sys.executable, tmp_path / 'parent.py', tmp_path / 'child.py', tmp_path / 'told'], text=True,
                             env={**os.environ, 'PYTHONPATH': str(ROOT)}, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
  assert process.stdout.readline() == 'ready\n'
  process.send_signal(number)
  _, err = process.communicate(timeout=60)
  assert (process.returncode, err) == (status, '\nstopped; the same command goes on.\n')
  assert (tmp_path / 'told').read_text() == str(int(number))


def test_mistakes(tmp_path):
  empty = tmp_path / 'empty.py'
  empty.write_text('')
  with pytest.raises(UserError, match=r'names no ALGORITHMS'):
    suite.algorithms(str(empty))
  with pytest.raises(UserError, match=r'missing.py is no file'):
    suite.algorithms(str(tmp_path / 'missing.py'))
  with pytest.raises(UserError, match=r'empty.py:rigl names a variant, .*: say --config=\S+/empty.py, and --only=rigl to'):
    suite.algorithms(f'{empty}:rigl')
  done = run()
  assert done.returncode == 2 and done.stderr.splitlines()[-1] == 'error: --config and --workdir are needed; see --help.'


def test_help_says_what_it_does_and_its_flags():
  done = run('--help')
  assert done.returncode == 0 and done.stdout.startswith('Runs every algorithm of a config')
  assert '--workdir: Required' in done.stdout
  done = run('--config.steps=100')
  assert done.returncode == 2 and done.stderr == (
    "error: Unknown command line flag 'config.steps'; flags of the runs go after --, as in `... -- --config.steps=VALUE`.\n")
  done = run('--wrokdir=x')
  assert done.returncode == 2 and done.stderr == "error: Unknown command line flag 'wrokdir'. Did you mean: workdir ?\n"

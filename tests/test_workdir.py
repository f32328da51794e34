"""A run's directory: whole files, one run at a time, one config for ever, metrics that survive a kill."""
import csv
import functools
import json
import math
import os
import re
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from configs import base
from experiments import workdir as workdirs
from experiments.errors import UserError

# ---- files ---------------------------------------------------------------------------------------------------------


def names(folder):
  return sorted(path.name for path in folder.iterdir())


def test_write_atomic_replaces_and_leaves_nothing_beside(tmp_path):
  path = tmp_path / 'new' / 'file.txt'
  workdirs.write_atomic(path, 'é')
  assert path.read_bytes() == b'\xc3\xa9' and path.stat().st_mode & 0o777 == 0o644
  os.link(path, tmp_path / 'reader')   # as one that opened the first file before the second was written
  workdirs.write_atomic(path, b'second')
  assert path.read_bytes() == b'second' and names(path.parent) == ['file.txt']
  assert (tmp_path / 'reader').read_bytes() == b'\xc3\xa9'   # another file was moved into its place; this one was never touched


def test_a_failed_write_leaves_the_old_file(tmp_path):
  path = tmp_path / 'file.txt'
  path.write_text('old')
  with pytest.raises(TypeError):
    workdirs.write_atomic(path, 3)   # fails after the file beside it was opened
  (tmp_path / 'folder').mkdir()
  with pytest.raises(OSError):
    workdirs.write_atomic(tmp_path / 'folder', 'cannot replace a directory')
  assert path.read_text() == 'old' and names(tmp_path) == ['file.txt', 'folder']


@given(st.lists(st.floats(allow_nan=False), min_size=1, max_size=5))
def test_csv_keeps_every_bit(tmp_path_factory, values):
  path = tmp_path_factory.mktemp('csv') / 'a.csv'
  workdirs.write_csv(path, [{'name': 'a, "b"', 'x': x} for x in values])
  rows = list(csv.DictReader(path.read_text().splitlines()))
  assert [float(row['x']) for row in rows] == values and {row['name'] for row in rows} == {'a, "b"'}
  assert b'\r' not in path.read_bytes()


def test_npz(tmp_path):
  workdirs.write_npz(tmp_path / 'a.npz', x=np.arange(3, dtype=np.float32), y=np.float64(0.1))
  with np.load(tmp_path / 'a.npz', allow_pickle=False) as found:
    assert found['x'].tolist() == [0, 1, 2] and found['x'].dtype == np.float32 and found['y'] == 0.1


# ---- one run at a time ---------------------------------------------------------------------------------------------

HOLD = """import pathlib, sys, time
from experiments import workdir
with workdir.locked(pathlib.Path(sys.argv[1])):
  print('held', flush=True)
  time.sleep(600)"""


def test_a_second_run_is_refused_until_the_first_ends_however_it_ends(tmp_path):
  folder = tmp_path / 'runs' / 'a'
  with subprocess.Popen([sys.executable, '-c', HOLD, str(folder)], stdout=subprocess.PIPE, text=True) as first:
    try:
      assert first.stdout.readline() == 'held\n'
      refusal = rf'^--workdir={re.escape(str(folder))} is in use by another run'
      with pytest.raises(UserError, match=refusal), workdirs.locked(folder):
        pass
    finally:
      first.send_signal(signal.SIGKILL)
  for _ in range(2):
    with workdirs.locked(folder):
      pass


def test_a_directory_that_cannot_be_used(tmp_path):
  (tmp_path / 'file').write_text('')
  for path in (tmp_path / 'file', tmp_path / 'file' / 'below'):
    with pytest.raises(UserError, match=f'^--workdir={path} cannot be used: '), workdirs.locked(path):
      pass
  with workdirs.locked(tmp_path / 'a'), pytest.raises(ZeroDivisionError), workdirs.locked(tmp_path / 'b'):
    _ = 1 / 0   # an error inside is the run's own
  with workdirs.locked(tmp_path / 'b'):
    pass


# ---- one config for ever -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(('protocol', 'compute'), [('supervised', 'float32'), ('streamed', 'bfloat16')])
def test_a_run_from_before_a_key_had_another_name_and_reach(tmp_path, protocol, compute):
  """config.stream.compute, of any value where it had no effect, is config.compute now."""
  config = base.get_config()
  config.protocol, config.compute = protocol, compute
  old = config.to_dict()
  del old['compute']
  old['stream']['compute'] = 'bfloat16'
  (tmp_path / 'config.json').write_text(json.dumps(old))
  workdirs.check(tmp_path, config)
  config.compute = {'float32': 'bfloat16', 'bfloat16': 'float32'}[compute]
  with pytest.raises(UserError, match=f'config.compute is {compute} there and {config.compute} here'):
    workdirs.check(tmp_path, config)


def test_bind(tmp_path):
  config = base.get_config()
  workdirs.bind(tmp_path, config)
  workdirs.bind(tmp_path, base.get_config())
  kept = json.loads((tmp_path / 'config.json').read_text())
  assert kept['steps'] == 50_000 and kept['sweep']['alpha'] == [1, 2, 3, 4, 5]

  config.sweep.alpha = (1.0, 2.0)
  with pytest.raises(UserError) as error:
    workdirs.bind(tmp_path, config)
  assert str(error.value) == (
    f'--workdir={tmp_path} belongs to another config: config.sweep.alpha is [1.0, 2.0, 3.0, 4.0, 5.0] there and [1.0, 2.0] here; '
    'choose another directory, or delete that one.')
  assert json.loads((tmp_path / 'config.json').read_text()) == kept


def every_key(tree, prefix=''):
  for key, value in tree.items():
    yield from every_key(value, f'{prefix}{key}.') if hasattr(value, 'items') else [(prefix + key, value)]


@pytest.mark.parametrize('key, value', list(every_key(base.get_config())))
def test_every_key_binds_but_those_that_change_no_number(tmp_path, key, value):
  other = {str: 'other', int: 7, float: 0.7, tuple: (0.7,), bool: not value}[type(value)]
  config = base.get_config()
  workdirs.bind(tmp_path, config)
  config.update_from_flattened_dict({key: other})
  if key in ('title', 'data_dir', 'report', 'checkpoint_epochs', 'checkpoints_kept', 'stream.on_damage', 'stream.workers',
             'stream.shards', 'stream.log_steps', 'stream.checkpoint_steps', 'stream.evaluate_steps', 'stream.profile_steps',
             'stream.peak_flops'):
    workdirs.bind(tmp_path, config)
    kept = functools.reduce(lambda tree, name: tree[name], key.split('.'), json.loads((tmp_path / 'config.json').read_text()))
    assert kept == (list(other) if isinstance(other, tuple) else other)
  else:
    with pytest.raises(UserError, match=re.escape(f'config.{key} is ')):
      workdirs.bind(tmp_path, config)


@pytest.mark.parametrize('content', ['', '{', '[1]', 'null', '\x00' * 40])
def test_a_damaged_config(tmp_path, content):
  (tmp_path / 'config.json').write_text(content)
  with pytest.raises(UserError, match=r'config\.json is damaged .*; it tells which config') as error:
    workdirs.bind(tmp_path, base.get_config())
  assert '\n' not in str(error.value)
  assert (tmp_path / 'config.json').read_text() == content


def test_a_config_of_another_version_with_other_keys(tmp_path):
  old = json.loads(workdirs.config_json(base.get_config()))
  old['prune']['gone'] = 1
  (tmp_path / 'config.json').write_text(json.dumps(old))
  with pytest.raises(UserError, match=r'config.prune.gone is 1 there and None here'):
    workdirs.bind(tmp_path, base.get_config())


# ---- where a result comes from -------------------------------------------------------------------------------------


def test_provenance(monkeypatch):
  monkeypatch.setattr(sys, 'argv', ['x', '--workdir=a b'])
  found = workdirs.provenance()
  assert found['command'] == "python -m experiments.main '--workdir=a b'"
  assert found['devices'].startswith(f'{os.cpu_count()}-core ')   # the machine's, not the eight devices of these tests
  assert found['versions']['python'] == '.'.join(map(str, sys.version_info[:3]))
  assert set(workdirs.PACKAGES) < set(found['versions'])
  assert found['commit'] is None or re.fullmatch('[0-9a-f]{40}', found['commit'])
  json.dumps(found)


def test_provenance_without_git(monkeypatch, tmp_path):
  monkeypatch.setenv('PATH', str(tmp_path))
  found = workdirs.provenance()
  assert found['commit'] is None and found['dirty'] is False


def test_changes_of_the_code_are_said_and_those_of_results_are_not(monkeypatch, tmp_path):
  for name in ('experiments/workdir.py', 'results/a.csv'):
    (tmp_path / name).parent.mkdir()
    (tmp_path / name).write_text('old')
  git = ['git', '-c', 'user.name=a', '-c', 'user.email=a@b', '-C', str(tmp_path)]
  for command in (['init', '-q'], ['add', '.'], ['commit', '-qm', 'first']):
    subprocess.run([*git, *command], check=True)
  monkeypatch.setattr(workdirs, '__file__', str(tmp_path / 'experiments' / 'workdir.py'))
  (tmp_path / 'results' / 'a.csv').write_text('new')
  assert workdirs.provenance()['dirty'] is False
  (tmp_path / 'experiments' / 'workdir.py').write_text('new')
  assert workdirs.provenance()['dirty'] is True


# ---- metrics -------------------------------------------------------------------------------------------------------


def read_lines(folder):
  return [json.loads(line) for line in (folder / 'metrics.jsonl').read_text().splitlines()]


def test_metrics_go_on_after_a_kill(tmp_path):
  """Of what was written, records up to the checkpoint stay, later ones and a torn line go."""
  first = workdirs.Metrics(tmp_path, 0)
  assert first.last == {}
  for step in (10, 20, 30):
    first.write(step, {'seconds': step / 3, 'train_loss': {'alpha=1': [0.1, 1e-17]}}, {'train_loss/alpha_1': 0.05})
  lines = (tmp_path / 'metrics.jsonl').read_bytes().splitlines(keepends=True)   # there before it is closed: a kill loses none
  assert len(lines) == 3
  first.close()
  with (tmp_path / 'metrics.jsonl').open('ab') as file:
    file.write(lines[2][:25])

  second = workdirs.Metrics(tmp_path, 20)
  assert (tmp_path / 'metrics.jsonl').read_bytes() == b''.join(lines[:2])   # bit-identical
  assert second.last == {'step': 20, 'seconds': 20 / 3, 'train_loss': {'alpha=1': [0.1, 1e-17]}}
  second.write(30, {'seconds': 11.0}, {})
  second.close()
  assert [record['step'] for record in read_lines(tmp_path)] == [10, 20, 30]
  workdirs.Metrics(tmp_path, 0).close()
  assert read_lines(tmp_path) == []


@pytest.mark.parametrize('line', ['', '{', '[]', '3', 'null', '{"seconds": 1}', '{"step": "a"}', '{"step": null}', '\x00\x00'])
def test_lines_that_are_no_records_are_dropped(tmp_path, line):
  (tmp_path / 'metrics.jsonl').write_text(f'{{"step": 1}}\n{line}\n{{"step": 2}}\n')
  workdirs.Metrics(tmp_path, 2).close()
  assert read_lines(tmp_path) == [{'step': 1}, {'step': 2}]


def test_tensorboard_event_files(tmp_path):
  """Scalars as they are, and those after the checkpoint marked as void, so that curves do not run twice."""
  pytest.importorskip('tensorboardX')
  events = []
  for step in (0, 20):
    metrics = workdirs.Metrics(tmp_path, step)
    metrics.write(step + 10, {}, {'train_loss/alpha_1': 0.25 + step})
    metrics.write(step + 20, {}, {'train_loss/alpha_1': 0.5 + step})
    metrics.close()
    (path,) = (tmp_path / 'tensorboard').iterdir()   # its name is made of the second
    events += read_events(path)
    path.unlink()
  scalars = [(e.step, v.tag, v.simple_value) for e in events for v in e.summary.value]
  assert scalars == [(10, 'train_loss/alpha_1', 0.25), (20, 'train_loss/alpha_1', 0.5),
                     (30, 'train_loss/alpha_1', 20.25), (40, 'train_loss/alpha_1', 20.5)]
  starts = [e.step for e in events if e.session_log.status]
  assert starts == [1, 21]   # purge from here on


def test_tensorboard_hears_of_it_before_the_end(tmp_path):
  """A process that is killed closes nothing."""
  pytest.importorskip('tensorboardX')
  metrics = workdirs.Metrics(tmp_path, 0)
  for step in (10, 20):
    metrics.write(step, {}, {'train_loss': 0.5})
  (path,) = (tmp_path / 'tensorboard').iterdir()
  late = time.monotonic() + 60
  while [e.step for e in read_events(path) if e.summary.value] != [10, 20]:
    assert time.monotonic() < late
    time.sleep(0.1)
  metrics.close()


def read_events(path):
  """Records of an event file: uint64 length, its CRC, the event, its CRC."""
  from tensorboardX.proto.event_pb2 import Event
  data, start = path.read_bytes(), 0
  while start < len(data):
    end = start + 12 + int.from_bytes(data[start:start + 8], 'little')
    yield Event.FromString(data[start + 12:end])
    start = end + 4


def test_metrics_without_tensorboard(tmp_path, monkeypatch):
  monkeypatch.setitem(sys.modules, 'tensorboardX', None)   # as if it were not installed
  metrics = workdirs.Metrics(tmp_path, 0)
  metrics.write(10, {'train_loss': None}, {'train_loss/alpha_1': math.nan})
  metrics.close()
  assert names(tmp_path) == ['metrics.jsonl'] and read_lines(tmp_path) == [{'step': 10, 'train_loss': None}]


def test_a_run_that_fails_at_once_leaves_nothing(tmp_path):
  with pytest.raises(UserError, match='no such thing'), workdirs.locked(tmp_path / 'run'):
    raise UserError('no such thing')
  assert not (tmp_path / 'run').exists()
  with pytest.raises(UserError, match='later'), workdirs.locked(tmp_path / 'run'):
    (tmp_path / 'run' / 'config.json').write_text('{}')
    raise UserError('later')
  assert {path.name for path in (tmp_path / 'run').iterdir()} == {'config.json', 'lock'}

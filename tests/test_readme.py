"""README says what runs: its Python blocks are run, its commands parse, its links lead somewhere."""
import re
import shlex
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

import powerprop

ROOT = Path(__file__).resolve().parent.parent
TEXT = (ROOT / 'README.md').read_text()
BLOCKS = re.findall(r'^```(\w+)\n(.*?)^```', TEXT, re.M | re.S)
COMMANDS = [line.partition('#')[0].strip() for kind, block in BLOCKS if kind == 'sh'
            for line in block.replace('\\\n', ' ').splitlines()]


def test_the_script_of_ones_own(capsys, tmp_path):
  scripts = [block for kind, block in BLOCKS if kind == 'python']
  assert len(scripts) == 7
  scope: dict = {}
  exec(compile(scripts[0], 'README.md', 'exec'), scope)
  kept = {name: int((leaf['w'] != 0).sum()) for name, leaf in scope['pruned'].items()}
  assert kept == {'conv2_d': 144 // 5, 'conv2_d_1': 4608 // 5, 'linear': 64 // 5}
  assert scope['accuracy'] > 0.9 and scope['loss'] < 0.2
  assert f'with {144 // 5 + 4608 // 5 + 64 // 5} weights' in capsys.readouterr().out

  exec(compile(scripts[1], 'README.md', 'exec'), scope)   # sparse training goes on from there
  told = re.findall(r'(\S+): accuracy (\d\.\d\d) with (\d+) weights', capsys.readouterr().out)
  total = round(0.2 * (144 + 4608 + 64))
  assert [(name, int(kept)) for name, _, kept in told] == [('RigL', total), ('Top-KAST', total), ('gradual', total)]
  assert min(float(accuracy) for _, accuracy, _ in told) > 0.9

  exec(compile(scripts[2], 'README.md', 'exec'), scope)
  told = capsys.readouterr().out
  # All layers at a fifth, but for rounding: so is a forward pass.
  assert 'takes 20 % of the dense operations' in told and 0 < int(re.search(r'STR: (\d+) weights are left', told)[1]) < 0.8 * 4816

  theta = powerprop.masked(scope['opt_state'], scope['reparam'].weights(scope['phi']))   # they belong to each other
  assert sum(int((leaf['w'] != 0).sum()) for leaf in theta.values()) == total
  exec(compile(scripts[3].replace('/tmp/my_run', str(tmp_path)), 'README.md', 'exec'), scope)   # its state, saved
  assert jax.tree.structure(scope['saved']['opt_state']) == jax.tree.structure(scope['opt_state'])
  jax.tree.map(np.testing.assert_array_equal, scope['saved'], {name: scope[name] for name in ('phi', 'opt_state')})


def test_three_tasks_of_ones_own(capsys):
  scripts, scope = [block for kind, block in BLOCKS if kind == 'python'], {}
  exec(compile(scripts[4], 'README.md', 'exec'), scope)
  told = capsys.readouterr().out
  found = re.findall(r'task (\d): accuracy (\d\.\d\d), unchanged: (\w+)', told)
  assert [(task, same) for task, _, same in found] == [('0', 'True'), ('1', 'True'), ('2', 'True')]
  assert min(float(accuracy) for _, accuracy, _ in found) > 0.85
  used = int(re.search(r'(\d+) % of the weights are in use', told)[1])
  assert 0 < used < 100

  exec(compile(scripts[5], 'README.md', 'exec'), scope)
  assert 0 < int(re.search(r'(\d+) % of the weights are in use without task 2', capsys.readouterr().out)[1]) < used
  assert set(np.unique(scope['guess']).tolist()) <= {0, 1, 2} and (scope['alone']['mlp/~/linear_0']['w'] == 0).any()

  exec(compile(scripts[6], 'README.md', 'exec'), scope)   # the same tasks, with BatchNorm
  assert 'unchanged with BatchNorm: True' in capsys.readouterr().out
  accuracies = [np.mean(np.argmax(scope['learned'][t], 1) == task(scope['held_out'])) for t, task in enumerate(scope['tasks'])]
  assert min(accuracies) > 0.8, accuracies


@pytest.mark.parametrize('command', [c for c in COMMANDS if c.startswith('make ')])
def test_make_targets_exist(command):
  words = [*shlex.split(command), '--dry-run', f'PYTHON={sys.executable}']
  done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True)
  assert done.returncode == 0, done.stderr


@pytest.mark.parametrize('command', [c for c in COMMANDS if 'experiments.main' in c])
def test_configs_and_keys_exist(command):
  words = shlex.split(command)
  flags = words[words.index('experiments.main') + 1:]
  script = 'import sys; from experiments import main; main.parse(sys.argv); print(main.CONFIG.value.name)'
  done = subprocess.run([sys.executable, '-c', script, *flags], cwd=ROOT, capture_output=True, text=True)
  assert done.stdout.startswith(re.search(r'configs/(\w+)\.py', command)[1]), done.stderr


def test_every_config_is_listed_and_every_link_leads_somewhere():
  links = re.findall(r'\]\(([^)#]+)\)', TEXT)
  assert [link for link in links if '://' not in link and not (ROOT / link).exists()] == []
  for path in (ROOT / 'configs').glob('*.py'):
    if path.stem != '__init__':
      assert f'configs/{path.name}' in TEXT


def test_every_public_name_is_in_the_readme():
  import powerprop
  mentioned = set(re.findall(r'\w+', TEXT))
  # To build one's own with.
  rest = {'Reparam', 'is_weight', 'leaf_name', 'make_reparam', 'ProtectState', 'SparsifyState', 'SparsityUpdater'}
  assert [name for name in powerprop.__all__ if name not in mentioned | rest] == []

"""What a user installs and types first: dependencies, wheel, versions, Makefile."""

import ast
import importlib.metadata
import os
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PROJECT = tomllib.loads((ROOT / 'pyproject.toml').read_text())['project']
OURS = ('powerprop', 'experiments', 'configs', 'benchmarks', 'tests')


def _canonical(requirement: str) -> str:
  """The name in 'ml_collections>=1.0' as registries compare names: 'ml-collections'."""
  name = re.match(r'[\w.-]+', requirement)
  assert name
  return re.sub(r'[-_.]+', '-', name[0]).lower()


def _imports(file: Path) -> set[tuple[str, bool]]:
  """(first part of a module's name, whether the import runs as soon as the file is imported) over a file."""
  tree = ast.parse(file.read_text())
  inside = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)]
  late = {id(node) for function in inside for node in ast.walk(function)}
  found = set()
  for node in ast.walk(tree):
    if isinstance(node, ast.Import):
      modules = [alias.name for alias in node.names]
    elif isinstance(node, ast.ImportFrom) and node.level == 0:
      modules = [node.module or '']
    else:
      continue
    found |= {(module.partition('.')[0], id(node) not in late) for module in modules}
  return found


@pytest.mark.parametrize('folder', OURS)
def test_every_import_is_a_declared_dependency(folder):
  core = {_canonical(requirement) for requirement in PROJECT['dependencies']}
  extras = {_canonical(one) for extra in PROJECT['optional-dependencies'].values() for one in extra}
  packages = importlib.metadata.packages_distributions()
  for file in (ROOT / folder).rglob('*.py'):
    for module, at_once in _imports(file):
      if module in sys.stdlib_module_names or module in OURS or (file.parent / f'{module}.py').exists():
        continue
      if (folder, module, at_once) == ('benchmarks', 'tensorflow', False):   # measured against where it happens to be installed
        continue
      carriers = {_canonical(name) for name in packages.get(module, [module])}
      # Code for users must start without any extra; what it imports later, and tests, may need one.
      allowed = core if at_once and folder != 'tests' else core | extras
      assert carriers & allowed, f'{file.relative_to(ROOT)}: {module} is not declared in pyproject.toml'


def test_import_leaves_tensorflow_alone(tmp_path):
  for name in ('tensorflow', 'tensorflow_datasets'):  # SystemExit, which no `except ImportError` swallows
    (tmp_path / f'{name}.py').write_text(f'raise SystemExit("{name} was imported")')
  modules = sorted('.'.join(file.relative_to(ROOT).with_suffix('').parts)
                   for folder in ('powerprop', 'experiments') for file in (ROOT / folder).rglob('*.py')
                   if file.stem != '__main__')
  assert 'experiments.main' in modules
  code = f'import importlib; [importlib.import_module(name) for name in {modules}]'
  path = os.pathsep.join([str(tmp_path), str(ROOT)])
  result = subprocess.run([sys.executable, '-c', code], env=os.environ | {'PYTHONPATH': path}, cwd=tmp_path,
                          capture_output=True, text=True, check=False)
  assert result.returncode == 0, result.stderr


def test_wheel_holds_the_library_alone(tmp_path):
  pytest.importorskip('setuptools', '77', reason='the build back end that the extra `test` installs')
  for name in ('pyproject.toml', 'setup.py', 'README.md', 'LICENSE'):
    shutil.copy(ROOT / name, tmp_path)
  for folder in ('powerprop', 'experiments', 'configs'):
    shutil.copytree(ROOT / folder, tmp_path / folder, ignore=shutil.ignore_patterns('__pycache__'))
  subprocess.run([sys.executable, '-m', 'pip', 'wheel', '--quiet', '--no-deps', '--no-build-isolation', '.'],
                 cwd=tmp_path, check=True, capture_output=True)
  (wheel,) = tmp_path.glob('*.whl')
  files = {name for name in zipfile.ZipFile(wheel).namelist() if '.dist-info/' not in name}
  expected = {str(file.relative_to(ROOT)) for file in (ROOT / 'powerprop').rglob('*.py')}
  assert files == expected | {'powerprop/py.typed'}


def test_versions_agree():
  version = PROJECT['version']
  assert re.search(r'^version: (.*)$', (ROOT / 'CITATION.cff').read_text(), re.M)[1] == version
  assert re.search(r'^## (\S+)', (ROOT / 'CHANGELOG.md').read_text(), re.M)[1] == version


def _make(*arguments: str) -> subprocess.CompletedProcess[str]:
  if shutil.which('make') is None:
    pytest.skip('make is not installed')
  # A `make test` that runs this test hands its own variables on.
  theirs = ('MAKEFLAGS', 'MAKEOVERRIDES', 'MAKELEVEL', 'PYTHON', 'FULL', 'OLDEST', 'ARGS', 'JOBS', 'WORKDIR')
  clean = {key: value for key, value in os.environ.items() if key not in theirs}
  return subprocess.run(['make', '--no-print-directory', *arguments], cwd=ROOT, env=clean,
                        capture_output=True, text=True, check=False)


@pytest.mark.parametrize(('settings', 'expected'), [
  ([], '--config=configs/mnist_lenet.py:quick --workdir=runs/figure1'),
  (['FULL=1'], '--config=configs/mnist_lenet.py --workdir=runs/figure1-full'),
  (['WORKDIR=/x', 'ARGS=--x=1'], '--config=configs/mnist_lenet.py:quick --workdir=/x --x=1'),
])
def test_figure1_runs_the_sweep(settings, expected):
  line = _make('-n', 'figure1', f'PYTHON={sys.executable}', *settings).stdout.splitlines()[-1]
  assert line.partition(' -m experiments.main ')[2].strip() == expected
  assert (ROOT / 'configs/mnist_lenet.py').is_file()


def test_help_names_every_target():
  shown = _make().stdout
  for target in re.search(r'^\.PHONY: (.*)$', (ROOT / 'Makefile').read_text(), re.M)[1].split():
    assert f'make {target} ' in shown


def test_unfit_python_gets_one_line(tmp_path):
  old = tmp_path / 'python3.9'  # answers as that version would
  old.write_text('#!/bin/sh\ncase "$2" in *executable*) echo "$0";; *) echo 3.9;; esac\n')
  old.chmod(0o755)
  for python, words in ((old, 'is Python 3.9; 3.11 or newer is needed'), ('python3.0', 'was not found')):
    result = _make('test', f'PYTHON={python}')
    assert result.returncode != 0
    assert len(result.stderr.splitlines()) == 1
    assert f'{python} {words}' in result.stderr

"""What runs in one table do not share: one sentence, and none for what differs by design."""
import json
import pathlib
import re

import pytest

from experiments.differences import note

RESULTS = pathlib.Path(__file__).parents[1] / 'results'


def note_of(*configs, names='abcdefghij'):
  return note([pathlib.Path('runs') / name for name, _ in zip(names, configs, strict=False)], configs)


def test_settings_and_who_has_them():
  assert note([pathlib.Path('runs/gradual'), pathlib.Path('runs/rigl')], [
    {'steps': 1500, 'weight_decay': 1e-4, 'sweep': {'seed': [0, 1]}, 'augment': 'none'},
    {'steps': 300, 'weight_decay': 5e-4, 'sweep': {'seed': [0]}, 'augment': 'none'}]) == (
      'note: runs differ in steps: 1,500 (gradual), 300 (rigl); weight_decay: 0.0001 (gradual), 0.0005 (rigl); '
      'sweep.seed: 0 1 (gradual), 0 (rigl).')


@pytest.mark.parametrize('key, values', [
  ('batch_size', (60, 20)), ('dataset', ('mnist', 'fashion_mnist')), ('model', ('a', 'b')), ('schedule', ('constant', 'cosine')),
  ('steps', (1, 2)), ('sweep.seed', ([0], [1])), ('sweep.optimizer', (['sgd'], ['adam'])), ('weight_decay', (0.0, 0.1)),
  ('sparse.every_steps', (100, 10)), ('sparse.rescale', (False, True)), ('prune.output_factor', (1.0, 2.0))])
def test_what_must_be_seen(key, values):
  outer, _, inner = key.rpartition('.')
  configs = [{outer: {inner: value}} if outer else {key: value} for value in values]
  assert note_of(*configs).startswith(f'note: runs differ in {key}: ')


def test_nothing_of_what_differs_by_design_or_came_later():
  assert note_of({'name': 'x', 'title': 'X', 'report': [], 'alpha_rates': [0.1],
                  'sweep': {'algorithm': ['set'], 'penalty': [0.0]}},
                 {'name': 'y', 'title': 'Y', 'report': ['compare'], 'alpha_rates': [], 'sweep': {'algorithm': ['rigl']},
                  'label_smoothing': 0.0}) == ''


def test_many_of_one_value_are_counted_and_runs_of_one_name_told_by_their_path():
  assert note_of(*[{'steps': 9000}] * 5, {'steps': 300}) == 'note: runs differ in steps: 9,000 (the other 5), 300 (f).'
  assert note([pathlib.Path('one/set'), pathlib.Path('two/set')], [{'steps': 1}, {'steps': 2}]) == (
    'note: runs differ in steps: 1 (one/set), 2 (two/set).')


@pytest.mark.parametrize('folders, told', [
  (('mnist_sparse', 'mnist_penalty/soft_threshold'), 'sparse.entry'),   # of no effect on the older
  (('split_mnist',), 'sparse.entry'),   # in it too; the older lack continual.estimate
  (('permuted_mnist',), None)])
def test_committed_tables_are_of_like_runs(folders, told):
  found = [path.parent for folder in folders for path in sorted((RESULTS / folder).rglob('config.json'))
           if not path.parent.name.endswith(('_tuning', '_left', '_zero'))]   # no lines of the table
  said = note(found, [json.loads((path / 'config.json').read_text()) for path in found])
  assert len(found) >= 9
  assert re.findall(r'([a-z_.]+): \S+ \(', said.removeprefix('note: runs differ in ')) == ([told] if told else [])

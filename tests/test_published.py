"""Cells of the ImageNet table beside what has been published, on numbers typed by hand."""
import csv
import json

import pytest
from made_runs import make_workdir, row, write_csv

from configs import imagenet
from experiments import report
from experiments.errors import UserError
from experiments.published import cell_of, differences, published_table
from experiments.results import read_run


def finished(path, cell, accuracy, kept=200, operations=0.25, **change):
  """A run of `cell` as its config says, but for `change`; masks keep `kept` of 1,000 weights."""
  config = imagenet.get_config(cell)
  with config.unlocked():
    config.update_from_flattened_dict(change)
  (algorithm,), (seed,) = config.sweep.algorithm, config.sweep.seed
  some = [row(accuracy, seed=seed, scope='trained', density=kept / 1000)] if algorithm != 'dense' else [
      row(accuracy - 0.1 * (1 - density), seed=seed, scope=scope, density=density)
      for scope in ('layer', 'global') for density in (0.1, 1.0)]
  make_workdir(path, some)
  (path / 'config.json').write_text(json.dumps(config.to_dict()))
  with (path / 'statistics.csv').open() as file:
    statistics = [one | {'training_operations': operations} for one in csv.DictReader(file)]
  write_csv(path / 'statistics.csv', statistics)
  return read_run(path)


def test_ours_beside_theirs(tmp_path):
  runs = [finished(tmp_path / 'a', 'rigl_erk_80', 0.742), finished(tmp_path / 'b', 'rigl_erk_80', 0.748, **{'sweep.seed': (1,)}),
          finished(tmp_path / 'c', 'dense', 0.77, operations=1.0),
          finished(tmp_path / 'd', 'rigl_erk_80_powerprop', 0.7, kept=201, steps=100, **{'stream.workers': 3})]
  header, rows = published_table(runs)
  assert header[:2] == ['cell', 'n'] and len({len(line) for line in (header, *rows)}) == 1
  # 0.745 ± 0.0042 beside 75.1, 0.77 beside 76.8: typed from the papers.
  assert rows == [
      ['dense', '1', '100 %', '100.0', '77.00', '76.8', '+0.20', 'Evci et al. 2020 (RigL)', 'nothing'],
      ['rigl_erk_80', '2', '20 %', '25.0 ± 0.0', '74.50 ± 0.42', '75.1', '-0.60', 'Evci et al. 2020 (RigL)', 'nothing'],
      ['rigl_erk_80_powerprop', '1', '20.1 %', '25.0', '70.00', '–', '–', 'none known', 'steps=100']]


def test_runs_of_other_settings_have_lines_of_their_own_and_each_seed_comes_once(tmp_path):
  runs = [finished(tmp_path / 'real', 'rigl_erk_80', 0.75), finished(tmp_path / 'trial', 'rigl_erk_80', 0.01, steps=100)]
  assert [(line[1], line[4], line[-1]) for line in published_table(runs).rows] == [('1', '75.00', 'nothing'),
                                                                                  ('1', '1.00', 'steps=100')]
  again = finished(tmp_path / 'again', 'rigl_erk_80', 0.75, **{'stream.shards': 2})
  with pytest.raises(UserError, match=r'real and .*again are both rigl_erk_80 with seed 0; each seed may come once'):
    published_table([*runs, again])


def test_nothing_is_compared_at_another_sparsity_and_costs_are_of_the_usual_length(tmp_path):
  runs = [finished(tmp_path / 'a', 'str_80', 0.7, kept=170), finished(tmp_path / 'b', 'str_95', 0.7, kept=57),
          finished(tmp_path / 'c', 'rigl_erk_90_5x', 0.76, kept=100, operations=0.24)]
  rows = {line[0]: line for line in published_table(runs).rows}
  assert [rows[cell][6] for cell in ('str_80', 'str_95', 'rigl_erk_90_5x')] == ['–', '–', '-0.40']
  assert rows['rigl_erk_90_5x'][3] == '120.0'   # five times as many steps
  assert published_table([finished(tmp_path / 'd', 'str_95', 0.7, kept=48)]).rows[0][6] == '-0.23'


def test_only_cells_are_in_it(tmp_path):
  other = make_workdir(tmp_path / 'mnist', [row(0.9)])
  assert cell_of(read_run(other)) is None and published_table([read_run(other)]) is None
  assert cell_of(finished(tmp_path / 'cell', 'str_95', 0.7)) == 'str_95'
  config = imagenet.get_config('str_95').to_dict() | {'name': 'imagenet_no_such_cell'}
  (tmp_path / 'cell' / 'config.json').write_text(json.dumps(config))
  assert cell_of(read_run(tmp_path / 'cell')) is None


@pytest.mark.parametrize(('change', 'said'), [
    ({}, []), ({'data_dir': 'x', 'stream.shards': 4}, []), ({'label_smoothing': 0.0}, ['label_smoothing=0.0']),
    ({'sparse.dense': ('a/w',), 'batch_size': 8}, ['batch_size=8', "sparse.dense=['a/w']"])])
def test_what_is_set_otherwise_is_said(tmp_path, change, said):
  assert differences('rigl_erk_90', finished(tmp_path / 'run', 'rigl_erk_90', 0.7, **change).config) == said


def test_another_number_of_test_images_is_said(tmp_path):
  run = finished(tmp_path / 'run', 'rigl_erk_90', 0.7, label_smoothing=0.0)
  for counted, said in (({'test': 50_000, 'validation': 0}, ''), ({'test': 3_925}, ', 3,925 test images instead of 50,000')):
    counted_run = run._replace(record=run.record | {'evaluated_images': counted})
    assert published_table([counted_run]).rows[0][-1] == f'label_smoothing=0.0{said}'


def test_reports_show_it(tmp_path, capsys):
  finished(tmp_path / 'a', 'ac_dc_98', 0.6848, kept=20)
  other = make_workdir(tmp_path / 'other', [row(0.9)])
  report.main(['report', str(tmp_path / 'a'), str(other)])
  printed = capsys.readouterr().out
  assert 'Beside published accuracies' in printed and '| 68.48        | 68.48         | +0.00' in printed
  assert '<h2>Beside published accuracies</h2>' in (tmp_path / 'a' / 'report.html').read_text()
  assert 'Beside published' not in (other / 'report.html').read_text()

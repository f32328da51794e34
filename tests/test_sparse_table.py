"""Tables of sparse training: numbers by hand from made-up runs."""
import csv
import json
import math

import made_runs
import pytest

from experiments import sparse_table
from experiments.errors import UserError
from experiments.results import read_run


def made(path, rows, cost=0.25):
  """A workdir with rows of sparse training; `cost`: operations of training as a share of dense."""
  made_runs.make_workdir(path, rows)
  nets = {tuple(row.get(axis, 0.0) for axis in NET): row for row in rows}.values()
  made_runs.write_csv(path / 'statistics.csv', [{axis: row.get(axis, 0.0) for axis in NET} | {
    'kurtosis': 1.0, 'forward_operations': 1 - row['sparsity'], 'training_operations': cost} for row in nets])
  return path


NET = (*made_runs.AXES, 'algorithm', 'sparsity', 'penalty')


def row(test, algorithm, sparsity, **rest):
  density = round(1 - sparsity, 9)
  return made_runs.row(test, density=density + 1e-5, scope='trained', **rest) | {'algorithm': algorithm, 'sparsity': sparsity}


@pytest.fixture
def runs(tmp_path):
  rigl = [row(0.9 + 0.01 * seed + 0.03 * (alpha - 1) - (0.2 if sparsity == 0.98 else 0), 'rigl', sparsity, alpha=alpha, seed=seed)
          for alpha in (1.0, 2.0) for seed in (0, 1) for sparsity in (0.9, 0.98)]
  dense = [made_runs.row(0.8, alpha=alpha, seed=seed, density=density) | {'algorithm': 'dense', 'sparsity': 0.0}
           for alpha in (1.0, 2.0) for seed in (0, 1) for density in (0.1, 0.02)]
  return [made(tmp_path / 'rigl', rigl), made(tmp_path / 'dense', dense, 1.0)]


def test_table_by_hand(runs):
  cells = sparse_table.read_cells(runs)
  table = sparse_table.table(cells)
  assert table.header == ['algorithm', 'α', 'learning rate', 'training (% of dense)', '10 %', '2 %']
  assert table.rows == [   # dense comes first in the registry
    ['dense, pruned afterwards', '1', '0.1', '100', '80.00 ± 0.00', '80.00 ± 0.00'],
    ['dense, pruned afterwards', '2', '0.1', '100', '80.00 ± 0.00', '80.00 ± 0.00'],
    ['dense, pruned afterwards', 'gain', '', '', '+0.00 ± 0.00', '+0.00 ± 0.00'],
    ['RigL', '1', '0.1', '25', '90.50 ± 0.71', '70.50 ± 0.71'],
    ['RigL', '2', '0.1', '25', '93.50 ± 0.71', '73.50 ± 0.71'],
    ['RigL', 'gain', '', '', '+3.00 ± 0.00', '+3.00 ± 0.00']]
  assert 'mean ± sd, n = 2. Gain: α = 2 minus α = 1, in points, over pairs of one seed.' in sparse_table.text(cells)


def test_a_lottery_shows_the_nearest_round(tmp_path):
  rows = [row(test, 'lottery', sparsity) for sparsity, test in ((0.1, 0.95), (0.2, 0.94), (0.36, 0.9))]
  cells = sparse_table.read_cells([with_densities(made(tmp_path / 'tickets', rows), [0.62])])
  assert [line[0::4] for line in sparse_table.table(cells).rows] == [['lottery ticket', '90.00 (at 64 %)']]


def test_gain_is_of_pairs(tmp_path):
  """Only seeds that both powers have; their spread is that of the differences."""
  some = [row(a, 'set', 0.9, alpha=1.0, seed=s) for s, a in enumerate((0.5, 0.6, 0.7))]
  others = [row(a, 'set', 0.9, alpha=2.0, seed=s) for s, a in ((1, 0.62), (2, 0.76), (3, 0.99))]
  gain = sparse_table.gains(sparse_table.read_cells([made(tmp_path / 'set', some + others)]), 'set', 0.1)
  assert gain.n == 2 and gain.mean == pytest.approx(0.04) and gain.sd == pytest.approx(0.02 * math.sqrt(2))


def test_a_network_that_diverged_is_left_out(tmp_path):
  rows = [row(made_runs.NAN if s == 0 else 0.5, 'set', 0.9, alpha=a, seed=s) for a in (1.0, 2.0) for s in (0, 1)]
  cells = sparse_table.read_cells([made(tmp_path / 'set', rows)])
  assert [cell.accuracy.n for cell in cells.values()] == [1, 1] and sparse_table.gains(cells, 'set', 0.1).n == 1


def test_the_best_rate_is_chosen_by_validation(tmp_path):
  rows = [row(test, 'set', 0.9, rate=rate, validation=validation)
          for rate, test, validation in ((0.1, 0.9, 0.5), (0.2, 0.6, 0.8), (0.3, 0.7, 0.7))]
  (cell,) = sparse_table.read_cells([made(tmp_path / 'set', rows)]).values()
  assert cell.rates == [0.2] and cell.accuracy.mean == 0.6


def test_what_cannot_be_told_a_density_shows_the_nearest(tmp_path):
  """STR: of three penalties, the one whose mean density is nearest by ratio, and that density."""
  rows = [made_runs.row(test, density=density, scope='trained', seed=seed)
          | {'algorithm': 'soft_threshold', 'sparsity': 0.0, 'penalty': penalty}
          for penalty, test, densities in ((1e-4, 0.9, (0.5, 0.3)), (1e-3, 0.8, (0.14, 0.1)), (1e-2, 0.7, (0.0, 0.0)))
          for seed, density in enumerate(densities)]
  path = made(tmp_path / 'str', rows)
  config = json.loads((path / 'config.json').read_text())
  (path / 'config.json').write_text(json.dumps(config | {'prune': config['prune'] | {'densities': [0.3, 0.02]}}))
  cells = sparse_table.read_cells([path])
  assert {key[2]: (cell.accuracy.mean, cell.reached) for key, cell in cells.items()} == {
    0.3: (pytest.approx(0.9), pytest.approx(0.4)), 0.02: (pytest.approx(0.8), pytest.approx(0.12))}
  assert sparse_table.table(cells).rows == [['STR', '1', '0.1', '25', '90.00 ± 0.00 (at 40 %)', '80.00 ± 0.00 (at 12 %)']]


def own(test, validation, density, algorithm, penalty, rate, scope='trained'):
  return made_runs.row(test, density=density, scope=scope, rate=rate, validation=validation) | {
    'algorithm': algorithm, 'sparsity': 0.0, 'penalty': penalty}


def with_densities(path, densities):
  config = json.loads((path / 'config.json').read_text())
  (path / 'config.json').write_text(json.dumps(config | {'prune': config['prune'] | {'densities': densities}}))
  return path


def test_the_rate_of_a_knob_is_chosen_at_each_density(tmp_path):
  """Of each rate the nearest penalty, and of those within a tenth the better on validation: neither the rate that is better over
  all penalties, nor a denser network."""
  rows = [own(0.99, 0.99, 0.9, 'soft_threshold', 1e-4, 0.1), own(0.70, 0.75, 0.1, 'soft_threshold', 1e-2, 0.1),
          own(0.80, 0.82, 0.2, 'soft_threshold', 1e-4, 0.3), own(0.78, 0.80, 0.11, 'soft_threshold', 1e-3, 0.3),
          own(0.79, 0.81, 0.112, 'soft_threshold', 1e-3, 0.4), own(0.77, made_runs.NAN, 0.1, 'soft_threshold', 1e-3, 0.5),
          own(0.9, 0.99, 0.0, 'soft_threshold', 1e-2, 0.7)]
  cells = sparse_table.read_cells([with_densities(made(tmp_path / 'str', rows), [0.9, 0.1])])
  assert {key[2]: (cell.accuracy.mean, cell.reached, cell.rates) for key, cell in cells.items()} == {
    0.9: (0.99, 0.9, [0.1]), 0.1: (0.78, 0.11, [0.3])}


def test_where_nothing_is_near_the_nearest_is_shown_however_good_a_denser_one_is(tmp_path):
  rows = [own(0.9, 0.9, 0.3, 'soft_threshold', 1e-3, 0.1), own(0.6, 0.6, 0.13, 'soft_threshold', 1e-3, 0.3),
          own(0.95, made_runs.NAN, 0.12, 'soft_threshold', 1e-3, 0.5)]
  cells = sparse_table.read_cells([with_densities(made(tmp_path / 'str', rows), [0.1])])
  assert [(cell.accuracy.mean, cell.reached) for cell in cells.values()] == [(0.6, 0.13)]


def test_dots_of_another_density_are_hollow(tmp_path):
  rows = [own(0.9, 0.9, 0.105, 'soft_threshold', 1e-3, 0.1), own(0.8, 0.8, 0.2, 'soft_threshold', 1e-3, 0.1) | {'alpha': 2.0}]
  cells = sparse_table.read_cells([with_densities(made(tmp_path / 'str', rows), [0.1])])
  figure = sparse_table.figure(cells)
  (ax,) = figure.axes
  lines = [line for line in ax.get_lines() if line.get_marker() in ('o', 's')]
  assert {round(float(line.get_xdata()[0])): line.get_markerfacecolor() for line in lines} == {10: '#0072B2', 20: 'white'}
  assert figure.legends[0].get_title().get_text() == 'one network each\nhollow: another density, see the table'
  del cells['soft_threshold', 2.0, 0.1]
  assert sparse_table.figure(cells).legends[0].get_title().get_text() == 'one network each'


@pytest.mark.parametrize('densities, expected', [
  ({'set': (0.2, 0.1, 0.05, 0.02), 'rigl': (0.2, 0.1, 0.05, 0.02)}, [0.1, 0.02]),
  ({'set': (0.2, 0.1, 0.02), 'rigl': (0.1, 0.05)}, [0.1]),   # what all have
  ({'set': (0.2, 0.1), 'rigl': (0.1, 0.05), 'snip': (0.05, 0.02)}, [0.1, 0.05]),   # else what most have
  ({'set': (0.3,)}, [0.3])])
def test_panels_are_of_densities_that_the_algorithms_share(densities, expected):
  cells = {(name, 1.0, density): None for name, some in densities.items() for density in some}
  assert sparse_table.shown(cells) == expected


@pytest.mark.parametrize('other, told', [(0.105, True), (0.112, False)])
def test_gain_only_where_both_are_as_sparse(tmp_path, other, told):
  rows = [own(0.9, 0.9, 0.1, 'soft_threshold', 1e-3, 0.1), own(0.8, 0.8, other, 'soft_threshold', 1e-3, 0.1) | {'alpha': 2.0}]
  gain = sparse_table.gains(sparse_table.read_cells([with_densities(made(tmp_path / 'str', rows), [0.1])]), 'soft_threshold', 0.1)
  assert gain.n == told and (not told or gain.mean == pytest.approx(-0.1))


def test_nearest_is_by_ratio_of_mean_densities(tmp_path):
  """0.05 is nearer to 0.02 than 0.001 is; the mean of 0.1 and 0.9 is further from 0.1 than 0.3 is."""
  rows = [own(0.5, 0.5, 0.001, 'soft_threshold', 1e-2, 0.1), own(0.6, 0.6, 0.05, 'soft_threshold', 1e-3, 0.1),
          *(own(0.7, 0.7, density, 'soft_threshold', 1e-4, 0.1) | {'seed': seed} for seed, density in enumerate((0.1, 0.9))),
          *(own(0.8, 0.8, 0.3, 'soft_threshold', 2e-4, 0.1) | {'seed': seed} for seed in (0, 1))]
  cells = sparse_table.read_cells([with_densities(made(tmp_path / 'str', rows), [0.02, 0.2])])
  assert {key[2]: cell.accuracy.mean for key, cell in cells.items()} == {0.02: 0.6, 0.2: 0.8}


def test_a_penalty_of_networks_that_are_pruned_afterwards_is_chosen_by_validation(tmp_path):
  """One penalty and rate for all densities; networks of the others are no seeds of this one."""
  rows = [own(test, validation, density, 'square_difference', penalty, rate, 'layer')
          for penalty, rate, values in ((0.0, 0.1, ((0.9, 0.9), (0.3, 0.3))), (1e-3, 0.1, ((0.8, 0.85), (0.7, 0.75))),
                                        (1e-2, 0.2, ((0.6, 0.6), (0.6, 0.6))))
          for density, (test, validation) in zip((0.1, 0.02), values, strict=True)]
  cells = sparse_table.read_cells([made(tmp_path / 'vu', rows)])
  assert {key[2]: (cell.accuracy.mean, cell.accuracy.n) for key, cell in cells.items()} == {0.1: (0.8, 1), 0.02: (0.7, 1)}


def test_files_and_what_is_left_out(runs, tmp_path, monkeypatch, capsys):
  (tmp_path / 'snip_tuning').mkdir()
  (tmp_path / 'unfinished').mkdir()
  out = tmp_path / 'out'
  monkeypatch.setattr(sparse_table, 'OUT', type('Flag', (), {'value': str(out)}))
  sparse_table.main(['sparse_table', *map(str, runs), str(tmp_path / 'snip_tuning'), str(tmp_path / 'unfinished')])
  told = capsys.readouterr().out
  assert told.startswith(f'left out: {tmp_path / "snip_tuning"}\nleft out: {tmp_path / "unfinished"}\n')
  assert (out / 'table.md').read_text() in told
  rows = list(csv.DictReader((out / 'cells.csv').read_text().splitlines()))
  assert len(rows) == 8 and rows[0] | {'algorithm': 'rigl', 'alpha': '1.0', 'density': '0.02', 'n': '2'} == rows[0]
  assert (out / 'figures' / 'algorithms.png').stat().st_size > 5000


def test_runs_of_other_settings_are_told_below_the_table(runs, tmp_path, monkeypatch, capsys):
  config = json.loads((runs[0] / 'config.json').read_text())
  (runs[0] / 'config.json').write_text(json.dumps(config | {'steps': 300}))
  monkeypatch.setattr(sparse_table, 'OUT', type('Flag', (), {'value': str(tmp_path / 'out')}))
  sparse_table.main(['sparse_table', *map(str, runs)])
  last = (tmp_path / 'out' / 'table.md').read_text().splitlines()[-2:]
  assert last == ['', 'note: runs differ in steps: 300 (rigl), 50,000 (dense).'] and last[1] in capsys.readouterr().out


def test_mistakes(runs, tmp_path, monkeypatch):
  monkeypatch.setattr(sparse_table, 'OUT', type('Flag', (), {'value': str(tmp_path / 'out')}))
  with pytest.raises(UserError, match='--out and at least one workdir'):
    sparse_table.main(['sparse_table'])
  with pytest.raises(UserError, match='none of these directories holds a finished run'):
    sparse_table.main(['sparse_table', str(tmp_path)])
  with pytest.raises(UserError, match=r'dense, pruned afterwards at α = 1 and density 0.02 has networks of seed 0 more'):
    sparse_table.read_cells([*runs, runs[1]])


def changed(path, **change):
  config = json.loads((path / 'config.json').read_text())
  (path / 'config.json').write_text(json.dumps(config | change))
  return path


def test_runs_of_other_seeds_and_sparsities_go_together(tmp_path):
  """As streamed runs are, of one network each; those of other settings are refused."""
  paths = [changed(made(tmp_path / f'{seed} {sparsity}', [row(test, 'rigl', sparsity, seed=seed)]), name=f'rigl_{sparsity}',
                   sweep={'alpha': [1.0], 'seed': [seed], 'sparsity': [sparsity]})
           for seed, sparsity, test in ((0, 0.9, 0.7), (1, 0.9, 0.8), (0, 0.98, 0.6))]
  (ten, two) = sparse_table.table(sparse_table.read_cells(paths)).rows[0][-2:]
  assert (ten, two) == ('75.00 ± 7.07', '60.00')
  changed(paths[1], steps=300)
  with pytest.raises(UserError, match=r'0 0.9 and .*1 0.9 both have networks of rigl at α = 1, and differ in steps: 50000 and'):
    sparse_table.read_cells(paths)


def test_ways_of_pruning_have_rows_of_their_own(tmp_path):
  rows = [made_runs.row(test, scope=scope, density=0.1) | {'algorithm': 'dense', 'sparsity': 0.0}
          for scope, test in (('layer', 0.5), ('layer recalibrated', 0.6), ('global', 0.7))]
  cells = sparse_table.read_cells([made(tmp_path / 'dense', rows)])
  assert [(line[0], line[-1]) for line in sparse_table.table(cells).rows] == [
    ('dense, pruned afterwards, layer-wise', '50.00'), ('dense, pruned afterwards, layer recalibrated', '60.00'),
    ('dense, pruned afterwards, global', '70.00')]
  assert len(sparse_table.figure(cells).axes[0].get_yticklabels()) == 3


def test_runs_of_before_sparse_training_are_dense(tmp_path):
  run = read_run(made_runs.make_workdir(tmp_path / 'old', made_runs.sweep(seeds=1)))
  assert {(row['algorithm'], row['sparsity']) for row in run.results} == {('dense', 0.0)}

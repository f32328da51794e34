"""Numbers from the files of a run: means, groups and tables by hand, and damaged files named."""

import numpy as np
import pytest
from made_runs import AXES, GRID, NAN, make_workdir, row

from experiments import report, results
from experiments.errors import UserError

# Numbers

@pytest.mark.parametrize(('values', 'mean', 'sd', 'n'), [
  ([0.90, 0.92, 0.97], 0.93, 0.0360555, 3),  # sqrt((0.03² + 0.01² + 0.04²) / 2)
  ([2.0, 4.0], 3.0, 1.4142136, 2),
  ([2.0, float('nan'), 4.0, float('inf')], 3.0, 1.4142136, 2),
  ([5.0], 5.0, float('nan'), 1),
  ([float('nan')], float('nan'), float('nan'), 0),
])
def test_summary_by_hand(values, mean, sd, n):
  found = results.summarise(values)
  assert found.n == n
  np.testing.assert_allclose([found.mean, found.sd], [mean, sd], rtol=1e-6)  # of seven typed digits


def test_table_by_hand():
  rows = [row(0.90, seed=0), row(0.92, seed=1), row(0.97, seed=2),
          row(0.5, seed=0, density=0.1), row(0.7, seed=1, density=0.1), row(float('nan'), seed=2, density=0.1),
          row(0.98765, alpha=2.5), row(float('nan'), alpha=2.5, density=0.1)]
  assert results.table(rows[::-1], densities=(1.0, 0.12)).splitlines() == [
    'Test accuracy (%) by weights kept, mean ± sd over n networks:',
    '',
    '| α   | n      | 100 %        | 10 %          |',
    '| --- | ------ | ------------ | ------------- |',
    '| 1   | 2 to 3 | 93.00 ± 3.61 | 60.00 ± 14.14 |',
    '| 2.5 | 0 to 1 | 98.77        | –             |',
  ]


def test_table_names_what_varies_and_nothing_else():
  rows = [row(0.5 + 0.1 * i, optimizer=optimizer, rate=rate, scope=scope)
          for i, (optimizer, rate, scope) in enumerate([('sgd', 0.1, 'layer'), ('adam', 0.001, 'layer'),
                                                        ('adam', 0.001, 'global')])]
  header, *lines = [[cell.strip() for cell in line.strip('|').split('|')]
                    for line in results.table(rows).splitlines()[2:] if '---' not in line]
  assert header == ['optimiser', 'scope', 'learning rate', 'n', '100 %']
  assert lines == [['SGD', 'layer-wise', '0.1', '1', '50.00'], ['Adam', 'layer-wise', '0.001', '1', '60.00'],
                   ['Adam', 'global', '0.001', '1', '70.00']]


def test_table_of_a_penalty_tells_what_was_reached():
  rows = [row(test, seed=seed, density=density, scope='trained') | {'penalty': penalty}
          for penalty, values in ((1e-4, ((0.9, 0.5), (0.92, 0.4))), (1e-3, ((0.8, 0.1), (float('nan'), 0.2))))
          for seed, (test, density) in enumerate(values)]
  found = results.accuracy_table(rows, (1.0, 0.1))
  assert found.header == ['penalty', 'n', 'kept (%)', 'accuracy (%)']
  assert found.rows == [['0.0001', '2', '45.00 ± 7.07', '91.00 ± 1.41'], ['0.001', '1', '15.00 ± 7.07', '80.00']]


@pytest.mark.parametrize(('wanted', 'found'), [(1.0, 1.0), (0.05, 0.0546), (0.02, 0.0207), (0.1, 0.0886)])
def test_nearest_density_on_the_grid_of_the_paper(wanted, found):
  assert results.nearest([{'density': p} for p in GRID], wanted) == pytest.approx(found, abs=5e-5)


@pytest.mark.parametrize(('shown', 'columns'), [
  ([{1.0, 0.1}, {1.0, 0.1}], [{1.0}, {0.1}]),
  ([{1.0, 0.1}, {1.0, 0.09}], [{1.0}, {0.1, 0.09}]),           # a run of slightly other densities
  ([{1.0, 0.5, 0.1}, {0.1}], [{1.0}, {0.5}, {0.1}]),            # a sparse one has a single density
  ([{0.11, 0.1}, {0.105}], [{0.11, 0.105}, {0.1}]),             # two of one group never share a column
  ([{0.1}, {0.08}], [{0.1}, {0.08}]),
])
def test_densities_that_share_a_column(shown, columns):
  assert results.together(shown) == columns


def test_a_cell_is_empty_where_a_run_has_nothing_near(tmp_path):
  rows = [row(0.9) | {'run': 'dense'}, row(0.7, density=0.1) | {'run': 'dense'}, row(0.8, density=0.1) | {'run': 'sparse'}]
  table = results.accuracy_table(rows, (1.0, 0.5, 0.1))
  assert table == (['run', 'n', '100 %', '10 %'], [['dense', '1', '90.00', '70.00'], ['sparse', '1', '–', '80.00']])


def chosen(table):
  """`table`: (alpha, rate) → validation accuracies, one for each seed and density. Test accuracies are the reverse."""
  rows = [row(1 - v, alpha=alpha, rate=rate, seed=i // 2, density=(1.0, 0.1)[i % 2], validation=v)
          for (alpha, rate), values in table.items() for i, v in enumerate(values)]
  return [(alpha, rate) for alpha, rate in results.groups(results.best_settings(rows), ['alpha', 'learning_rate'])]


@pytest.mark.parametrize(('table', 'expected'), [
  # means 0.575 and 0.600: better overall though not when dense
  ({(1.0, 0.1): [0.9, 0.2, 1.0, 0.2], (1.0, 0.3): [0.8, 0.4, 0.8, 0.4]}, [(1.0, 0.3)]),
  # each group has its own
  ({(1.0, 0.1): [0.9, 0.5], (1.0, 0.3): [0.8, 0.5], (2.0, 0.1): [0.7, 0.5], (2.0, 0.3): [0.9, 0.4]},
   [(1.0, 0.1), (2.0, 0.3)]),
  # of equals the smallest, in whatever order they are met
  ({(1.0, 0.3): [0.75, 0.5], (1.0, 0.1): [0.5, 0.75]}, [(1.0, 0.1)]),
  # a rate at which one seed has no accuracy is not chosen, though the other is best
  ({(1.0, 0.1): [0.4, 0.4, 0.4, 0.4], (1.0, 0.3): [0.9, 0.9, NAN, NAN]}, [(1.0, 0.1)]),
  ({(1.0, 0.3): [NAN, 0.9], (1.0, 0.1): [NAN, NAN]}, [(1.0, 0.1)]),
])
def test_learning_rate_is_that_of_the_best_validation_accuracy(table, expected):
  assert chosen(table) == expected


@pytest.mark.parametrize(('values', 'text'), [
  ([6084.0, 5012.0], '5,548 ± 758'), ([0.0592, 0.0594], '0.05930 ± 0.00014'), ([0.0], '0'), ([3.0, 3.0], '3.000 ± 0.000'),
  ([0.1, 0.1, 0.1], '0.1000 ± 0.0000'),  # whose deviation is not 0 but a rounding error
  ([12345.6], '12,346'), ([NAN], '–'), ([1e-12, 2e-12], '0.00000000 ± 0.00000000')])
def test_statistics_are_rounded_to_their_spread(values, text):
  assert results._rounded(results.summarise(values)) == text


# Mistakes

def edit(path, old, new):
  text = path.read_text()
  assert old in text
  path.write_text(text.replace(old, new, 1))


def edit_npz(path, **arrays):
  with np.load(path) as file:
    kept = dict(file)
  np.savez(path, **kept | arrays)


DAMAGE = {
  'no results.csv': (lambda d: (d / 'results.csv').unlink(), 'results.csv is missing'),
  'no config.json': (lambda d: (d / 'config.json').unlink(), 'config.json is missing'),
  'no run.json': (lambda d: (d / 'run.json').unlink(), 'run.json is missing'),
  'no statistics.csv': (lambda d: (d / 'statistics.csv').unlink(), 'statistics.csv is missing'),
  'no overlap.csv': (lambda d: (d / 'overlap.csv').unlink(), 'overlap.csv is missing'),
  'a folder': (lambda d: ((d / 'run.json').unlink(), (d / 'run.json').mkdir()), 'run.json cannot be read'),
  'no column': (lambda d: edit(d / 'results.csv', 'test_accuracy', 'accuracy'),
                'results.csv lacks the column test_accuracy'),
  'no columns': (lambda d: edit(d / 'overlap.csv', 'alpha,seed', 'a,s'), 'overlap.csv lacks the columns alpha, seed'),
  'empty': (lambda d: (d / 'results.csv').write_text(''), 'results.csv lacks the columns'),
  'header only': (lambda d: (d / 'statistics.csv').write_text(','.join(AXES) + '\n'), 'statistics.csv holds no rows'),
  'no number': (lambda d: edit(d / 'results.csv', '1.0,0,0.1', '1.0,zero,0.1'),
                "results.csv, line 2: seed is 'zero', which is no number"),
  'no alpha': (lambda d: edit(d / 'results.csv', '1.0,0,0.1', 'nan,0,0.1'), 'line 2: alpha is nan'),
  'per cent': (lambda d: edit(d / 'results.csv', ',0.9\n', ',90.0\n'), 'line 2: test_accuracy is 90.0; it is a share'),
  'too many kept': (lambda d: edit(d / 'results.csv', ',1000,1000,', ',1001,1000,'), 'line 2: kept is 1001 of 1000'),
  'cut off': (lambda d: edit(d / 'results.csv', ',0.8,0.8\n', ',0.8'), 'line 3: 11 values where the header has 12'),
  'twice': (lambda d: (d / 'results.csv').write_text((d / 'results.csv').read_text() + (d / 'results.csv').read_text()
                                                    .splitlines()[1]), 'line 4 repeats'),
  'no text': (lambda d: (d / 'results.csv').write_bytes(b'\xff\xfe\x00'), 'results.csv is damaged'),
  'open quote': (lambda d: edit(d / 'results.csv', 'layer', '"layer'), 'results.csv is damaged'),
  'half a json': (lambda d: (d / 'config.json').write_text('{"name": '), 'config.json is damaged'),
  'a list': (lambda d: (d / 'config.json').write_text('[]'), 'config.json lacks name'),
  'no key': (lambda d: edit(d / 'run.json', '"commit"', '"comet"'), 'run.json lacks commit'),
  'wrong type': (lambda d: edit(d / 'config.json', '50000', '"many"'), "config.json: steps is 'many'"),
  'unknown kind': (lambda d: edit(d / 'config.json', 'figure1', 'figure7'), "config.json: report has 'figure7'"),
  'half an npz': (lambda d: (d / 'weights.npz').write_bytes((d / 'weights.npz').read_bytes()[:5000]),
                  'weights.npz is damaged'),
  'no npz': (lambda d: (d / 'weights.npz').write_bytes(b''), 'weights.npz is damaged'),
  'pickles': (lambda d: edit_npz(d / 'weights.npz', initial_0=np.array([{}], object)), 'weights.npz is damaged'),
  'no array': (lambda d: edit_npz(d / 'weights.npz', alpha=np.array([1.0, 2.0])), 'weights.npz is damaged'),
  'no weights': (lambda d: edit_npz(d / 'weights.npz', alpha=np.array([])), 'weights.npz is damaged'),
  'wrong length': (lambda d: edit_npz(d / 'weights.npz', kept_0=np.ones(3, bool)), 'weights.npz is damaged'),
}


@pytest.mark.parametrize('name', DAMAGE)
def test_damage_is_named_in_one_line(tmp_path, name):
  damage, message = DAMAGE[name]
  workdir = make_workdir(tmp_path / 'run', [row(0.9), row(0.8, density=0.1)])
  damage(workdir)
  with pytest.raises(UserError) as error:
    report.write_report(workdir)
  assert message in str(error.value) and '\n' not in str(error.value)
  assert not (workdir / 'report.html').exists()

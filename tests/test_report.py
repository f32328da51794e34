"""Reports from synthetic files: their numbers are made by formulas or typed by hand, and are results of nothing."""

import csv
import hashlib
import html.parser
import json
import os
import pathlib
import subprocess
import sys
import xml.etree.ElementTree as ElementTree

import numpy as np
import pytest

from experiments import report
from experiments.errors import UserError

AXES = ('alpha', 'seed', 'learning_rate', 'optimizer', 'update', 'biases')
GRID = [float(p) for p in np.geomspace(0.01, 1, 20)]
ROOT = pathlib.Path(report.__file__).parents[1]


def row(test, *, alpha=1.0, seed=0, rate=0.1, optimizer='sgd', scope='layer', density=1.0, validation=None):
  return {'alpha': alpha, 'seed': seed, 'learning_rate': rate, 'optimizer': optimizer,
          'update': 'target_propagation', 'biases': 'plain', 'scope': scope, 'density': density,
          'kept': round(1000 * density), 'weights': 1000,
          'validation_accuracy': test if validation is None else validation, 'test_accuracy': test}


def write_csv(path, rows):
  with path.open('w', newline='', encoding='utf-8') as file:
    writer = csv.DictWriter(file, list(rows[0]), lineterminator='\n')
    writer.writeheader()
    writer.writerows(rows)


def make_workdir(path, rows, kinds=('figure1',), **config):
  """The files that a run leaves, for the networks of `rows`."""
  path.mkdir(parents=True)
  write_csv(path / 'results.csv', rows)
  write_csv(path / 'overlap.csv', [{**{key: r[key] for key in (*AXES, 'scope', 'density')},
                                    'overlap': 1 - r['density'] * (1 - r['density']) / r['alpha']} for r in rows])
  nets = {tuple(r[axis] for axis in AXES): r for r in rows}.values()
  write_csv(path / 'statistics.csv', [{**{axis: r[axis] for axis in AXES}, 'sign_flips': 0.1 / r['alpha'],
                                       'kurtosis': 100 * r['alpha'] + r['seed']} for r in nets])
  alphas = sorted({r['alpha'] for r in rows})
  initial = (0.05 * np.sin(np.arange(10_000))).astype(np.float32)
  arrays = {}
  for g, alpha in enumerate(alphas):
    final = initial * (1 + 100 * alpha * initial ** 2)
    arrays |= {f'initial_{g}': initial, f'final_{g}': final, f'kept_{g}': np.abs(final) > 0.049}
  np.savez_compressed(path / 'weights.npz', alpha=np.array(alphas), density=0.1, **arrays)
  default = {'name': 'mnist_lenet', 'dataset': 'mnist', 'steps': 50_000, 'batch_size': 60, 'report': list(kinds),
             'sweep': {'alpha': alphas, 'seed': [0]}, 'prune': {'output_factor': 2.0}}
  (path / 'config.json').write_text(json.dumps(default | config))
  (path / 'run.json').write_text(json.dumps({
    'command': f'python -m experiments.main --workdir={path}', 'commit': 'abc123', 'dirty': True,
    'versions': {'python': '3.11.7', 'jax': '0.10.2'}, 'devices': '1 x cpu (2 cores)',
    'data': f'MNIST: 60,000 train and 10,000 test images from {path.parent}/mnist, checksums good',
    'seconds': {'training': 119.7, 'evaluation': 4.25}, 'finished': '2025-01-01T00:00:00+00:00'}))
  return path


def sweep(alphas=(1.0, 2.0, 3.0, 4.0, 5.0), seeds=3, **fixed):
  return [row(0.98 - 0.5 / (1 + 40 * p * alpha) + 0.002 * seed, alpha=alpha, seed=seed, density=p, **fixed)
          for alpha in alphas for seed in range(seeds) for p in GRID]


@pytest.fixture(scope='module')
def figure1(tmp_path_factory):
  workdir = make_workdir(tmp_path_factory.mktemp('runs') / 'figure1', sweep())
  before = {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in workdir.iterdir()}
  return workdir, before, report.write_report(workdir)


# Numbers

@pytest.mark.parametrize(('values', 'mean', 'sd', 'n'), [
  ([0.90, 0.92, 0.97], 0.93, 0.0360555, 3),  # sqrt((0.03² + 0.01² + 0.04²) / 2)
  ([2.0, 4.0], 3.0, 1.4142136, 2),
  ([2.0, float('nan'), 4.0, float('inf')], 3.0, 1.4142136, 2),
  ([5.0], 5.0, float('nan'), 1),
  ([float('nan')], float('nan'), float('nan'), 0),
])
def test_summary_by_hand(values, mean, sd, n):
  found = report.summarise(values)
  assert found.n == n
  np.testing.assert_allclose([found.mean, found.sd], [mean, sd], rtol=1e-6)  # of seven typed digits


def test_table_by_hand():
  rows = [row(0.90, seed=0), row(0.92, seed=1), row(0.97, seed=2),
          row(0.5, seed=0, density=0.1), row(0.7, seed=1, density=0.1), row(float('nan'), seed=2, density=0.1),
          row(0.98765, alpha=2.5), row(float('nan'), alpha=2.5, density=0.1)]
  assert report.table(rows[::-1], densities=(1.0, 0.12)).splitlines() == [
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
                    for line in report.table(rows).splitlines()[2:] if '---' not in line]
  assert header == ['optimiser', 'scope', 'learning rate', 'n', '100 %']
  assert lines == [['SGD', 'layer-wise', '0.1', '1', '50.00'], ['Adam', 'layer-wise', '0.001', '1', '60.00'],
                   ['Adam', 'global', '0.001', '1', '70.00']]


@pytest.mark.parametrize(('wanted', 'found'), [(1.0, 1.0), (0.05, 0.0546), (0.02, 0.0207), (0.1, 0.0886)])
def test_nearest_density_on_the_grid_of_the_paper(wanted, found):
  assert report.nearest([{'density': p} for p in GRID], wanted) == pytest.approx(found, abs=5e-5)


def chosen(table):
  """`table`: (alpha, rate) → validation accuracies, one for each seed and density. Test accuracies are the reverse."""
  rows = [row(1 - v, alpha=alpha, rate=rate, seed=i // 2, density=(1.0, 0.1)[i % 2], validation=v)
          for (alpha, rate), values in table.items() for i, v in enumerate(values)]
  return [(alpha, rate) for alpha, rate in report.groups(report.best_learning_rates(rows), ['alpha', 'learning_rate'])]


NAN = float('nan')


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


def test_curves_by_hand():
  rows = [row(0.90, density=1.0), row(0.94, seed=1, density=1.0), row(0.2, density=0.25), row(0.2, alpha=2.0)]
  first, second = report.curves(rows, ['alpha'], 'test_accuracy')
  assert (first.label, second.label) == ('α = 1', 'α = 2')
  np.testing.assert_allclose(first.x, [25, 100])
  np.testing.assert_allclose(first.mean, [20, 92])
  np.testing.assert_allclose(first.sd, [np.nan, 2.8284271], rtol=1e-6)  # of eight typed digits


@pytest.mark.parametrize(('alphas', 'shown'), [
  ((1, 2, 3, 4, 5), [1, 4]), ((1, 2, 3), [1, 3]), ((1, 4.5), [1]), ((2,), [2]), ((1.375, 1, 5), [1, 1.375])])
def test_weights_are_shown_for_the_baseline_and_four_or_the_next_below(alphas, shown):
  assert report._shown_alphas(alphas) == shown


@pytest.mark.parametrize(('values', 'text'), [
  ([6084.0, 5012.0], '5,548 ± 758'), ([0.0592, 0.0594], '0.05930 ± 0.00014'), ([0.0], '0'), ([3.0, 3.0], '3.000 ± 0.000'),
  ([0.1, 0.1, 0.1], '0.1000 ± 0.0000'),  # whose deviation is not 0 but a rounding error
  ([12345.6], '12,346'), ([NAN], '–'), ([1e-12, 2e-12], '0.00000000 ± 0.00000000')])
def test_statistics_are_rounded_to_their_spread(values, text):
  assert report._rounded(report.summarise(values)) == text


def test_figure_1b_shows_the_agreement_over_what_is_pruned(figure1):
  shown = {one.stem: one.figure for one in report._figure1(report.read_run(figure1[0]))}
  _, first, *_ = shown['figure_1b'].axes[0].get_lines()  # the line of chance comes first
  density = np.array(GRID)
  np.testing.assert_allclose(first.get_xdata(), 100 * (1 - density), atol=1e-12)
  np.testing.assert_allclose(first.get_ydata(), 100 * (1 - density * (1 - density)))


# What is written

def test_every_file_is_there_and_no_other(figure1):
  workdir, before, paths = figure1
  stems = ('figure_1a', 'figure_1b', 'figure_1c', 'figure_1d')
  expected = [workdir / 'figures' / f'{stem}.{kind}' for stem in stems for kind in ('png', 'svg')]
  assert paths == [*expected, workdir / 'table.md', workdir / 'report.html']
  found = {path for path in workdir.rglob('*') if path.is_file()}
  assert found == {*paths, *(workdir / name for name in before)}
  for path in paths:
    if path.suffix == '.svg':
      ElementTree.parse(path)


def test_a_second_report_changes_nothing(figure1):
  workdir, before, paths = figure1
  first = {path: path.read_bytes() for path in paths}
  assert report.write_report(workdir) == paths
  assert {path: path.read_bytes() for path in paths} == first
  assert {name: hashlib.sha256((workdir / name).read_bytes()).hexdigest() for name in before} == before


def test_nothing_tells_where_the_workdir_lies(figure1):
  workdir, _, paths = figure1
  for path in paths:
    assert str(workdir.parent).encode() not in path.read_bytes(), path.name


class Page(html.parser.HTMLParser):
  def __init__(self, text):
    super().__init__()
    self.tags, self.words, self.attributes = [], [], []
    self.feed(text)
    self.text = ' '.join(' '.join(self.words).split())

  def handle_starttag(self, tag, attrs):
    self.tags.append(tag)
    self.attributes += attrs

  def handle_data(self, data):
    self.words.append(data)


def test_page_holds_figures_tables_and_origin(figure1):
  workdir, _, _ = figure1
  page = Page((workdir / 'report.html').read_text())
  assert page.tags.count('img') == 4 and 'script' not in page.tags and 'link' not in page.tags
  assert all(value.startswith('data:image/svg+xml;base64,') for name, value in page.attributes if name == 'src')
  assert not any(name == 'href' or name.startswith('on') for name, _ in page.attributes)
  assert all(dict(page.attributes).get(name) for name in ('alt', 'lang'))
  for expected in ('15 networks on MNIST, 50,000 steps each at batch size 60.', 'over n = 3 networks',
                   'Commit abc123, with uncommitted changes', 'training 2 min 0 s, evaluation 4.2 s',
                   'python 3.11.7, jax 0.10.2', '60,000 train and 10,000 test images from …/mnist, checksums good',
                   '--workdir=…/figure1', '1 x cpu (2 cores)', 'sweep.alpha [1.0, 2.0, 3.0, 4.0, 5.0]',
                   'output layer keeps 2 times as much', '10,000 weights', 'one-shot layer-wise pruning',
                   '1 3 0.1000 ± 0.0000 101.0 ± 1.0',  # statistics: sign flips 0.1, kurtosis 100, 101 and 102
                   '1 3 96.98 ± 0.20'):  # 0.98 − 0.5 / 41 and 0.002 more for each seed
    assert expected in page.text, expected


@pytest.mark.parametrize(('config', 'said', 'not_said'), [
  ({'steps': 50_000}, (), ('short run', 'FULL=1')),
  ({'steps': 49_999}, ('short run', '49,999 steps', '50,000', 'make figure1 FULL=1'), ()),
  ({'steps': 3_000, 'name': 'ablation'}, ('short run', '3,000 steps'), ('FULL=1',)),
])
def test_a_short_run_is_called_one(tmp_path, config, said, not_said):
  workdir = make_workdir(tmp_path / 'run', [row(0.9), row(0.8, density=0.1)], kinds=['compare'], **config)
  report.write_report(workdir)
  text = Page((workdir / 'report.html').read_text()).text
  assert all(words in text for words in said) and not any(words in text for words in not_said)


def test_hostile_values_are_text(tmp_path):
  bad = '<script>alert("1")</script>&amp;${name}'
  rows = [row(0.9, optimizer=bad), row(0.9, optimizer='sgd')]
  workdir = make_workdir(tmp_path / 'run', rows, kinds=['compare'], name=bad, dataset=bad, extra={bad: [bad]})
  report.write_report(workdir)
  page = Page((workdir / 'report.html').read_text())
  assert 'script' not in page.tags and page.text.count(bad) >= 5
  ElementTree.parse(workdir / 'figures' / 'compare.svg')


@pytest.mark.parametrize(('text', 'shown'), [
  ('--workdir=/home/me/runs/figure1', '--workdir=…/figure1'), ('/data', '…/data'), ('"/a/b", \'/c/d\'', '"…/b", \'…/d\''),
  ('from /srv/data/mnist, checksums', 'from …/mnist, checksums'), ('and/or 1 / 2 runs/a', 'and/or 1 / 2 runs/a'),
  ('https://example.org/a/b', 'https://example.org/a/b'), ('(/a/b)', '(…/b)'), ('/a/b/', '…/b/')])
def test_of_an_absolute_path_the_last_part_is_shown(text, shown):
  assert html.unescape(report._text(text)) == shown


def test_one_seed_has_no_spread(tmp_path):
  workdir = make_workdir(tmp_path / 'run', sweep(alphas=(1.0, 2.0), seeds=1), kinds=['compare'])
  report.write_report(workdir)
  rows = report.table(report.read_results(workdir)).splitlines()[4:]
  assert len(rows) == 2 and not any('±' in line for line in rows)
  text = Page((workdir / 'report.html').read_text()).text
  assert 'One network each: its spread is unknown.' in text and 'bands' not in text


def test_networks_without_accuracy_are_counted_out(tmp_path):
  rows = [r | {'test_accuracy': NAN} if (r['alpha'], r['seed']) == (2.0, 1) else r for r in sweep((1.0, 2.0))]
  workdir = make_workdir(tmp_path / 'run', rows, kinds=['compare'])
  report.write_report(workdir)
  text = Page((workdir / 'report.html').read_text()).text
  assert 'n = 2 to 3 networks' in text and 'left out of the means: 1.' in text
  assert '| 2 | 2 |' in report.table(report.read_results(workdir))


def test_comparison_shows_the_chosen_rates_by_alpha(tmp_path):
  rows = [r for optimizer, rates in (('sgd', (0.1, 0.3)), ('adam', (0.001, 0.003))) for rate in rates
          for r in sweep((2.0, 3.0, 4.0), optimizer=optimizer, rate=rate)]
  for r in rows:  # the smaller rate is better on validation images, the larger on test images
    r['validation_accuracy'] -= r['learning_rate'] / 10
    r['test_accuracy'] += r['learning_rate'] / 100
  workdir = make_workdir(tmp_path / 'run', rows, kinds=['compare'], name='ablation')
  shown, = report._compare(report.read_run(workdir))
  assert shown.table.header == ['α', 'optimiser', 'learning rate', 'n', '100 %', '8.86 %', '5.46 %', '2.07 %']
  assert [line[:4] for line in shown.table.rows] == [
    [alpha, name, rate, '3'] for alpha in '234' for name, rate in (('SGD', '0.1'), ('Adam', '0.001'))]
  assert 'Of the learning rates 0.001, 0.003, 0.1, 0.3 each group has the one' in shown.caption
  panels = [ax for ax in shown.figure.axes if ax.get_lines()]
  assert [ax.get_title() for ax in panels] == ['α = 2', 'α = 3', 'α = 4']
  assert [text.get_text() for text in shown.figure.legends[0].get_texts()] == ['SGD', 'Adam']
  # 98 − 50 / (1 + 40 · 2) % and 0.2 more for each seed; the rate 0.1 adds 0.1
  assert panels[0].get_lines()[0].get_ydata()[-1] == pytest.approx(98 - 50 / 81 + 0.2 + 0.1)


def test_sensitivity_shows_dense_and_a_tenth(tmp_path):
  rows = [r for rate in (0.03, 0.1, 0.3) for r in sweep((1.0, 2.0), rate=rate)]
  shown, = report._learning_rate(report.read_run(make_workdir(tmp_path / 'run', rows, kinds=['learning_rate'])))
  dense, pruned = shown.figure.axes
  assert (dense.get_title(), pruned.get_title()) == ('100 % kept', '8.86 % kept')
  np.testing.assert_allclose(dense.get_lines()[0].get_xdata(), [0.03, 0.1, 0.3])
  np.testing.assert_allclose(dense.get_lines()[1].get_ydata(), 98 - 50 / 81 + 0.2)


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
  'no weights.npz': (lambda d: (d / 'weights.npz').unlink(), 'weights.npz is missing'),
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


# The command

def command(*args):
  environment = {**os.environ, 'JAX_PLATFORMS': 'cpu'}
  return subprocess.run([sys.executable, '-m', 'experiments.report', *map(str, args)], cwd=ROOT, env=environment,
                        capture_output=True, text=True, timeout=120)


def test_command_writes_reports_and_one_table_of_all(tmp_path):
  for name, accuracy in (('a', 0.9), ('b', 0.8)):
    make_workdir(tmp_path / name, [row(accuracy), row(accuracy / 2, density=0.1)], kinds=['compare'])
  done = command(tmp_path / 'a', tmp_path / 'b')
  assert (done.returncode, done.stderr) == (0, '')
  assert all((tmp_path / name / 'report.html').exists() for name in 'ab')
  assert done.stdout.splitlines()[-4:] == [
    '| run             | n | 100 % | 10 %  |',
    '| --------------- | - | ----- | ----- |',
    '| mnist_lenet (a) | 1 | 90.00 | 45.00 |',
    '| mnist_lenet (b) | 1 | 80.00 | 40.00 |']


def test_command_explains_itself():
  done = command('--help')
  assert 'python -m experiments.report WORKDIR' in done.stdout and 'Traceback' not in done.stderr


@pytest.mark.parametrize(('args', 'message'), [
  ([], 'a workdir is needed'), (['no/such/run'], 'no/such/run/config.json is missing')])
def test_command_names_a_mistake_in_one_line(args, message, capsys):
  with pytest.raises(SystemExit) as stop:
    report._guarded(['report', *args])
  written = capsys.readouterr()
  assert stop.value.code == 2 and written.out == ''
  assert written.err.startswith('error: ') and message in written.err and written.err.count('\n') == 1

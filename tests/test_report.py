"""Reports from made-up runs: what their figures and pages show, what is written, the command."""

import hashlib
import html.parser
import os
import pathlib
import subprocess
import sys
import xml.etree.ElementTree as ElementTree

import numpy as np
import pytest
from made_runs import GRID, NAN, make_workdir, row, sweep

from experiments import page, report, results
from experiments.errors import UserError

ROOT = pathlib.Path(report.__file__).parents[1]


@pytest.fixture(scope='module')
def figure1(tmp_path_factory):
  workdir = make_workdir(tmp_path_factory.mktemp('runs') / 'figure1', sweep())
  before = {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in workdir.iterdir()}
  return workdir, before, report.write_report(workdir)


# Numbers

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


def test_figure_1b_shows_the_agreement_over_what_is_pruned(figure1):
  shown = {one.stem: one.figure for one in report._figure1(results.read_run(figure1[0]))}
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
  for expected in ('15 networks (lenet_300_100) on MNIST, 50,000 steps each at batch size 60.', 'over n = 3 networks',
                   'Commit abc123, with uncommitted changes', 'training 2 min 0 s, evaluation 4.2 s',
                   'python 3.11.7, jax 0.10.2', '60,000 train and 10,000 test images from …/mnist, checksums good',
                   '--workdir=…/figure1', '1 x cpu (2 cores)', 'sweep.alpha [1.0, 2.0, 3.0, 4.0, 5.0]',
                   'output layer keeps 2 times as much', '10,000 weights', 'pruned in one shot, layer-wise, by magnitude',
                   '1 3 10.00 ± 0.00 101.0 ± 1.0',  # statistics: 10 % sign flips, kurtosis 100, 101 and 102
                   '1 3 96.98 ± 0.20'):  # 0.98 − 0.5 / 41 and 0.002 more for each seed
    assert expected in page.text, expected


@pytest.mark.parametrize(('scopes', 'said'), [
  (['layer', 'global'], 'batch size 60, pruned in one shot, layer-wise or global, by magnitude and without fine-tuning.'),
  (['trained'], 'batch size 60, as training has left them.'),
  (['trained', 'layer'], 'as training has left them or pruned in one shot, layer-wise, by magnitude and')])
def test_captions_tell_how_networks_became_sparse(tmp_path, scopes, said):
  run = results.read_run(make_workdir(tmp_path / 'run', [row(0.9, scope=scope) for scope in scopes], kinds=['compare']))
  assert said in next(report._compare(run)).caption


@pytest.mark.parametrize(('config', 'said', 'not_said'), [
  ({'steps': 50_000}, (), ('short run', 'FULL=1')),
  ({'steps': 49_999}, ('short run', '49,999 steps', '50,000', 'make figure1 FULL=1'), ()),
  ({'steps': 3_000, 'name': 'ablation'}, ('short run', '3,000 steps'), ('FULL=1',)),
  ({'steps': 3_000, 'model': 'resnet_50', 'protocol': 'streamed'}, (), ('short run',)),
  ({'steps': 3_000, 'model': 'lenet_300_100', 'sweep': {'algorithm': ['rigl']}}, (), ('short run',)),
])
def test_a_short_run_is_called_one(tmp_path, config, said, not_said):
  workdir = make_workdir(tmp_path / 'run', [row(0.9), row(0.8, density=0.1)], kinds=['compare'], **config)
  report.write_report(workdir)
  text = Page((workdir / 'report.html').read_text()).text
  assert all(words in text for words in said) and not any(words in text for words in not_said)


@pytest.mark.parametrize(('config', 'title'), [
  ({'title': 'Figure 1: accuracy against sparsity'}, 'Figure 1: accuracy against sparsity on MNIST'),
  ({'dataset': 'fashion_mnist', 'steps': 100}, 'mnist_lenet on Fashion-MNIST (short run)')])
def test_title_in_words(tmp_path, config, title):
  workdir = make_workdir(tmp_path / 'run', [row(0.9)], kinds=['compare'], **config)
  report.write_report(workdir)
  page = (workdir / 'report.html').read_text()
  assert f'<title>{title}</title>' in page and f'<h1>{title}</h1>' in page


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
  assert html.unescape(page._text(text)) == shown


def test_one_seed_has_no_spread(tmp_path):
  workdir = make_workdir(tmp_path / 'run', sweep(alphas=(1.0, 2.0), seeds=1), kinds=['compare'])
  report.write_report(workdir)
  rows = results.table(results.read_results(workdir)).splitlines()[4:]
  assert len(rows) == 2 and not any('±' in line for line in rows)
  text = Page((workdir / 'report.html').read_text()).text
  assert 'One network each: its spread is unknown.' in text and 'bands' not in text


def test_networks_without_accuracy_are_counted_out(tmp_path):
  rows = [r | {'test_accuracy': NAN} if (r['alpha'], r['seed']) == (2.0, 1) else r for r in sweep((1.0, 2.0))]
  workdir = make_workdir(tmp_path / 'run', rows, kinds=['compare'])
  report.write_report(workdir)
  text = Page((workdir / 'report.html').read_text()).text
  assert 'n = 2 to 3 networks' in text and 'left out of the means: 1.' in text
  assert '| 2 | 2 |' in results.table(results.read_results(workdir))


def test_comparison_shows_the_chosen_rates_by_alpha(tmp_path):
  rows = [r for optimizer, rates in (('sgd', (0.1, 0.3)), ('adam', (0.001, 0.003))) for rate in rates
          for r in sweep((2.0, 3.0, 4.0), optimizer=optimizer, rate=rate)]
  for r in rows:  # the smaller rate is better on validation images, the larger on test images
    r['validation_accuracy'] -= r['learning_rate'] / 10
    r['test_accuracy'] += r['learning_rate'] / 100
  workdir = make_workdir(tmp_path / 'run', rows, kinds=['compare'], name='ablation')
  shown, = report._compare(results.read_run(workdir))
  assert shown.table.header == ['α', 'optimiser', 'learning rate', 'n', '100 %', '8.86 %', '5.46 %', '2.07 %']
  assert [line[:4] for line in shown.table.rows] == [
    [alpha, name, rate, '3'] for alpha in '234' for name, rate in (('SGD', '0.1'), ('Adam', '0.001'))]
  assert 'Of the learning rates 0.001, 0.003, 0.1, 0.3 each group has the one' in shown.caption
  panels = [ax for ax in shown.figure.axes if ax.get_lines()]
  assert [ax.get_title() for ax in panels] == ['α = 2', 'α = 3', 'α = 4']
  assert [text.get_text() for text in shown.figure.legends[0].get_texts()] == ['SGD', 'Adam']
  assert [[text.get_text() for text in ax.get_legend().get_texts()] for ax in panels] == 3 * [['0.1', '0.001']]
  # 98 − 50 / (1 + 40 · 2) % and 0.2 more for each seed; the rate 0.1 adds 0.1
  assert panels[0].get_lines()[0].get_ydata()[-1] == pytest.approx(98 - 50 / 81 + 0.2 + 0.1)


def test_sensitivity_shows_dense_and_a_tenth(tmp_path):
  rows = [r for rate in (0.03, 0.1, 0.3) for r in sweep((1.0, 2.0), rate=rate)]
  shown, = report._learning_rate(results.read_run(make_workdir(tmp_path / 'run', rows, kinds=['learning_rate'])))
  dense, pruned = shown.figure.axes
  assert (dense.get_title(), pruned.get_title()) == ('100 % kept', '8.86 % kept')
  np.testing.assert_allclose(dense.get_lines()[0].get_xdata(), [0.03, 0.1, 0.3])
  np.testing.assert_allclose(dense.get_lines()[1].get_ydata(), 98 - 50 / 81 + 0.2)
  assert 'diverged' not in shown.caption and len(dense.get_lines()) == 2


def test_networks_that_diverged_are_crossed_out_of_the_sensitivity(tmp_path):
  rows = [r | {'update': update} for update in ('target_propagation', 'backpropagation') for rate in (0.1, 0.3)
          for r in sweep((2.0, 3.0), rate=rate)]
  for r in rows:
    if (r['alpha'], r['seed'], r['learning_rate'], r['update']) == (3.0, 1, 0.3, 'target_propagation'):
      r['validation_accuracy'] = r['test_accuracy'] = NAN
  run = results.read_run(make_workdir(tmp_path / 'run', rows, kinds=['learning_rate']))
  shown, = report._learning_rate(run)
  assert 'A cross at the lower edge' in shown.caption and 'diverged, left out of the means: 1.' in shown.caption
  chosen = {(r['alpha'], r['update']): r['learning_rate'] for r in results.best_settings(run.results)}
  assert chosen.pop((3.0, 'target_propagation')) == 0.1   # never one at which a network diverged, good as the others may be
  assert [ax.get_title() for ax in shown.figure.axes] == [
    'α = 2, 100 % kept', 'α = 2, 8.86 % kept', 'α = 3, 100 % kept', 'α = 3, 8.86 % kept']
  crosses = [[line.get_xdata().tolist() for line in ax.get_lines() if line.get_marker() == 'x'] for ax in shown.figure.axes]
  assert crosses == [[], [], [[0.3]], [[0.3]]]


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


def test_runs_of_one_name_and_of_other_densities_stay_apart(tmp_path):
  for folder, density in (('a/run', 0.1), ('b/run', 0.09)):
    make_workdir(tmp_path / folder, [row(0.9), row(density, density=density)], kinds=['compare'])
  done = command(tmp_path / 'a/run', tmp_path / 'b/run')
  lines = [[cell.strip() for cell in line.split('|')[1:-1]] for line in done.stdout.splitlines()[-4:]]
  assert lines[0] == ['run', 'n', '100 %', '9 % to 10 %'] and [line[1:] for line in lines[2:]] == [
    ['1', '90.00', '10.00'], ['1', '90.00', '9.00']]
  assert lines[2][0].endswith('a/run)') and lines[3][0].endswith('b/run)')
  twice = command(tmp_path / 'a/run', tmp_path / 'a' / '..' / 'a/run')
  assert twice.returncode == 2 and twice.stderr.startswith('error: a workdir is named twice: ') and twice.stderr.count('\n') == 1


def test_scopes_are_compared_with_all_powers_in_one_panel(tmp_path):
  rows = sweep((1.0, 2.0), scope='layer') + sweep((1.0, 2.0), scope='global')
  shown, = report._compare(results.read_run(make_workdir(tmp_path / 'run', rows, kinds=['compare'])))
  assert [ax.get_title() for ax in shown.figure.axes] == ['layer-wise', 'global']
  assert [text.get_text() for text in shown.figure.legends[0].get_texts()] == ['α = 1', 'α = 2']


def test_a_penalty_is_drawn_at_the_density_that_it_reached(tmp_path):
  """A point for each penalty at the mean over seeds; one that leaves nothing has no place on a logarithmic axis."""
  rows = [row(accuracy, alpha=alpha, seed=seed, rate=rate, density=density, scope='trained') | {'penalty': penalty}
          for alpha in (1.0, 2.0) for rate in (0.1, 0.2)
          for penalty, values in ((1e-4, ((0.9, 0.5), (0.92, 0.3))), (1e-3, ((0.8, 0.1), (0.7, 0.1))), (1e-2, ((0.1, 0.0),) * 2))
          for seed, (accuracy, density) in enumerate(values)]
  shown, = report._compare(results.read_run(make_workdir(tmp_path / 'run', rows, kinds=['compare'])))
  assert [ax.get_title() for ax in shown.figure.axes] == ['α = 1', 'α = 2']
  assert [text.get_text() for text in shown.figure.legends[0].get_texts()] == ['learning rate 0.1', 'learning rate 0.2']
  for line in shown.figure.axes[0].get_lines():
    points = sorted(zip(line.get_xdata(), line.get_ydata(), strict=True))
    np.testing.assert_allclose(points, [(10, 75), (40, 91)])
  low, high = shown.figure.axes[0].get_ylim()   # 75 ± 7.07 and 91 ± 1.41, and a little room
  assert 66 < low < 67.93 and 92.41 < high < 94


def test_a_comparison_leaves_out_what_has_not_ended(tmp_path, capsys):
  first, second = (make_workdir(tmp_path / name, sweep(), name=name) for name in ('first', 'second'))
  (tmp_path / 'begun').mkdir()
  report.main(['report', str(tmp_path / 'begun'), str(first), str(second)])
  out = capsys.readouterr().out
  assert f"{tmp_path / 'begun'} has not ended, and is left out." in out and '| first ' in out and '| second ' in out
  with pytest.raises(UserError, match=r'begun/config\.json is missing'):   # alone it is no run
    report.main(['report', str(tmp_path / 'begun')])


def test_figures_of_weights_are_left_out_where_a_run_came_without_them(tmp_path):
  workdir = make_workdir(tmp_path / 'run', sweep((1.0, 2.0)))
  (workdir / 'weights.npz').unlink()
  assert {path.name for path in report.write_report(workdir)} == {
    'figure_1a.png', 'figure_1a.svg', 'figure_1b.png', 'figure_1b.svg', 'table.md', 'report.html'}


def test_command_explains_itself():
  done = command('--help')
  assert done.returncode == 0
  assert 'python -m experiments.report WORKDIR' in done.stdout and 'Traceback' not in done.stderr


@pytest.mark.parametrize(('args', 'message'), [
  ([], 'a workdir is needed'), (['no/such/run'], 'no/such/run is no directory'),
                                             (['tests'], 'tests/config.json is missing')])
def test_command_names_a_mistake_in_one_line(args, message):
  done = command(*args)
  assert done.returncode == 2 and done.stdout == ''
  assert done.stderr.startswith('error: ') and message in done.stderr and done.stderr.count('\n') == 1

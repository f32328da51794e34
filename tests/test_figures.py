"""Drawing, checked on what a Figure holds and on the written bytes. All curves here are made by formulas."""

import itertools
import xml.etree.ElementTree as ElementTree

import matplotlib
import matplotlib.colors
import numpy as np
import pytest
import scipy.stats

from experiments import figures
from experiments.continual.figures import Map, maps_figure, tasks_figure
from experiments.figures import Curve, Panel

KEPT = 100 * np.geomspace(0.01, 1, 20)


def falling(label, knee, sd=2.0):
  """Accuracy that falls once fewer than `knee` per cent are kept."""
  return Curve(label, KEPT, 98 - 70 / (1 + (KEPT / knee) ** 2), np.full(20, sd))


FIVE = [falling(f'α = {alpha}', 6 / alpha) for alpha in range(1, 6)]
LONG = [falling(f'Adam, target propagation, reparameterised biases {i}', i) for i in range(1, 5)]


def weights(n=2000):
  initial = 0.05 * np.sin(np.arange(n)).astype(np.float32)
  final = initial * (1 + 200 * initial ** 2)
  return initial, final, np.abs(final) > np.quantile(np.abs(final), 0.9)


def drawn():
  by_alpha = [Panel(f'α = {alpha}', LONG) for alpha in (1, 2, 3, 4)]
  rates = [Panel('dense', FIVE), Panel('pruned', FIVE)]
  return {
    'accuracy': figures.accuracy_figure(FIVE, True, 'mean ± sd, n = 5'),
    'overlap': figures.overlap_figure(FIVE, True, 'mean ± sd, n = 5'),
    'one panel': figures.panels_figure([Panel('', FIVE)], True, 'n = 5', 'kept'),
    'three panels': figures.panels_figure(by_alpha[1:], False, 'n = 3', 'kept'),
    'four panels': figures.panels_figure(by_alpha, False, 'n = 3', 'kept'),
    'learning rate': figures.panels_figure(rates, True, '', 'learning rate'),
    'weights': figures.weights_figure(*weights(10_000), '#0072B2', 'α = 4'),
  }


@pytest.fixture(scope='module')
def all_figures():
  return drawn()


@pytest.mark.parametrize('samples', [
  np.array([-1.0, 1.0]), np.array([0.0, 0.0, 0.0, 3.0]), np.linspace(-2, 5, 37) ** 3,
  np.array([1.0, 2.0, 4.0, np.nan, np.inf]), np.array([1.5, 2.5], np.float32)])
def test_kde_is_that_of_scipy_at_silvermans_width(samples):
  finite = samples[np.isfinite(samples)].astype(np.float64)
  sd = np.std(finite, ddof=1)
  quartiles = np.subtract(*np.percentile(finite, [75, 25])) / 1.34
  width = 0.9 * (min(sd, quartiles) if quartiles > 0 else sd) * len(finite) ** -0.2
  grid = np.linspace(finite.min() - 1, finite.max() + 1, 50)
  # scipy's factor is in units of the standard deviation. 1e-9: two sums of the same float64 terms.
  expected = scipy.stats.gaussian_kde(finite, bw_method=width / sd)(grid)
  np.testing.assert_allclose(figures.gaussian_kde(samples, grid), expected, rtol=1e-9)


def test_kde_integrates_to_one():
  grid = np.linspace(-12, 12, 4001)
  density = figures.gaussian_kde(np.array([-3.0, -2.5, 0.0, 1.0, 4.0]), grid)
  assert np.sum(density) * (grid[1] - grid[0]) == pytest.approx(1, abs=1e-6)  # the tails beyond ±12 hold less


@pytest.mark.parametrize('samples', [np.array([]), np.array([2.0]), np.full(5, 2.0), np.array([np.nan, 1.0])])
def test_kde_of_fewer_than_two_values_is_undefined(samples):
  assert np.isnan(figures.gaussian_kde(samples, np.arange(3.0))).all()


def test_accuracy_shows_every_curve_and_its_band_in_both_panels():
  figure = figures.accuracy_figure(FIVE[:2], True, 'n = 5')
  whole, detail = figure.axes
  best = min(curve.x[curve.mean >= detail.get_ylim()[0]].min() for curve in FIVE[:2])
  for ax, end in ((whole, 1), (detail, best)):   # sparser to the right, as far as there is something to be seen
    assert ax.get_xscale() == 'log' and ax.get_xlim()[0] > 100 and 0.85 * end < ax.get_xlim()[1] < end
    for line, curve in zip(ax.get_lines(), FIVE, strict=False):
      np.testing.assert_array_equal(line.get_xydata(), np.column_stack([curve.x, curve.mean]))
    band = ax.collections[0].get_paths()[0].vertices
    assert band[:, 1].max() == pytest.approx(FIVE[0].mean.max() + 2)
    assert band[:, 1].min() == pytest.approx(FIVE[0].mean.min() - 2)
  assert whole.get_ylim()[0] < FIVE[0].mean.min() - 2
  assert detail.get_ylim()[0] > 90 and detail.get_title() == 'enlarged'


def test_chance_is_half_at_half_and_sure_at_the_ends():
  figure = figures.overlap_figure(FIVE[:1], True, '')
  chance = figure.axes[0].get_lines()[0].get_xydata()
  expected = [[0, 100], [25, 62.5], [50, 50], [75, 62.5], [100, 100]]
  np.testing.assert_allclose(chance[[0, 50, 100, 150, 200]], expected)


def test_no_band_where_the_spread_is_unknown():
  alone = FIVE[0]._replace(sd=np.full(20, np.nan))
  figure = figures.accuracy_figure([alone], True, '')
  assert all(len(band.get_paths()) == 0 for ax in figure.axes for band in ax.collections)
  np.testing.assert_array_equal(figure.axes[0].get_lines()[0].get_ydata(), alone.mean)


def test_a_spread_whose_neighbours_have_none_is_a_bar():
  nan = np.nan
  curve = Curve('α = 1', np.array([1.0, 2.0, 4.0, 5.0, 8.0, 10.0]), np.full(6, 90.0), np.array([2.0, nan, 1.0, 1.0, nan, nan]))
  for ax in figures.accuracy_figure([curve], True, '').axes:
    _, bars = ax.collections
    assert [bar.vertices.tolist() for bar in bars.get_paths()] == [[[1.0, 88.0], [1.0, 92.0]]]


def test_undefined_means_are_drawn_around():
  holed = FIVE[0]._replace(mean=np.where(np.arange(20) < 4, np.nan, FIVE[0].mean))
  empty = FIVE[1]._replace(mean=np.full(20, np.nan), sd=np.full(20, np.nan))
  for figure in (figures.accuracy_figure([holed, empty], True, ''),
                 figures.accuracy_figure([empty], True, ''),
                 figures.overlap_figure([empty], True, ''),
                 figures.panels_figure([Panel('', [empty])], True, '', 'learning rate')):
    figure.draw_without_rendering()
    assert np.isfinite([ax.get_ylim() for ax in figure.axes]).all()


@pytest.mark.parametrize('kept', [0, 1, 2000])
def test_weights_of_any_number_of_survivors_can_be_drawn(kept):
  initial, final, _ = weights()
  initial[3], final[5] = np.nan, np.inf  # a network that diverged
  figures.weights_figure(initial, final, np.arange(2000) < kept, '#0072B2', '').draw_without_rendering()


def test_weights_are_split_into_survivors_and_pruned():
  initial, final, kept = weights()
  ax = figures.weights_figure(initial, final, kept, '#0072B2', 'α = 4').axes[0]
  pruned, survivors = ax.collections
  np.testing.assert_array_equal(survivors.get_offsets(), np.column_stack([initial[kept], final[kept]]))
  np.testing.assert_array_equal(pruned.get_offsets(), np.column_stack([initial[~kept], final[~kept]]))
  for low, high, values in ((*ax.get_xlim(), initial), (*ax.get_ylim(), final)):
    assert low < values.min() and values.max() < high  # no weight lies outside
  assert matplotlib.colors.to_hex(survivors.get_facecolor()[0]).upper() == '#0072B2'


def test_an_unknown_axis_is_refused():
  with pytest.raises(ValueError, match=r"'epochs'.*'learning rate'"):
    figures.panels_figure([Panel('', FIVE)], True, '', 'epochs')


@pytest.mark.parametrize('ordered', [True, False])
def test_seven_lines_differ_in_colour_dash_and_marker(ordered):
  styles = figures.line_styles([str(i) for i in range(7)], ordered).values()
  for key in ('color', 'linestyle', 'marker'):
    assert len({str(style[key]) for style in styles}) == 7


def test_ordered_lines_grow_lighter():
  colours = [style['color'] for style in figures.line_styles('abcde', True).values()]
  luminance = [np.dot(matplotlib.colors.to_rgb(colour), [0.2126, 0.7152, 0.0722]) for colour in colours]
  assert (np.diff(luminance) > 0.05).all()  # each step can be seen in grey
  assert luminance[-1] < 0.75  # and the palest one on white


def test_figures_are_readable_at_column_width(all_figures):
  for name, figure in all_figures.items():
    figure.draw_without_rendering()
    assert figure.get_figwidth() == pytest.approx(3.4), name
    texts = figure.findobj(lambda artist: isinstance(artist, matplotlib.text.Text) and artist.get_visible())
    assert min(text.get_fontsize() for text in texts if text.get_text()) >= 7, name
    legend = figure.legends[0].get_window_extent()
    assert legend.x0 >= figure.bbox.x0 and legend.x1 <= figure.bbox.x1, f'{name}: its legend is cut off'
    assert not any(legend.overlaps(ax.get_window_extent()) for ax in figure.axes if ax.axison), name


def test_the_legend_reads_from_left_to_right():
  figure = figures.overlap_figure(FIVE, True, '')
  figure.draw_without_rendering()
  legend = figure.legends[0]
  boxes = {text.get_text(): text.get_window_extent() for text in legend.get_texts()}
  order = sorted(boxes, key=lambda label: (-round(boxes[label].y0), boxes[label].x0))
  assert order == ['α = 1', 'α = 2', 'α = 3', 'α = 4', 'α = 5', 'chance']


def test_a_tall_legend_takes_no_room_from_the_panels(all_figures):
  figure = all_figures['three panels']
  figure.draw_without_rendering()
  assert min(ax.get_window_extent().height for ax in figure.axes) > 0.9 * figure.dpi  # inches


def test_a_panel_above_an_empty_place_carries_its_numbers():
  figure = figures.panels_figure([Panel(f'α = {i}', FIVE[:2]) for i in (2, 3, 4)], False, '', 'kept')
  figure.draw_without_rendering()
  labels = [ax.get_xticklabels() for ax in figure.axes]
  labelled = [any(label.get_visible() and label.get_text() for label in some) for some in labels]
  assert labelled[:3] == [True, True, True]   # one panel with numbers and its neighbour without would look like a mistake


def test_no_band_leaves_the_range_of_an_accuracy():
  wide = falling('α = 1', 6, sd=90.0)
  for figure in (figures.accuracy_figure([wide], True, ''), figures.panels_figure([Panel('', [wide])], True, '', 'kept')):
    for ax in figure.axes:
      band = ax.collections[0].get_paths()[0].vertices
      assert band[:, 1].min() == 0 and band[:, 1].max() == 100


def test_bands_lie_within_the_whole_panel():
  deep = falling('α = 1', 6, sd=15.0)
  for figure in (figures.accuracy_figure([deep], True, ''), figures.panels_figure([Panel('', [deep])], True, '', 'kept')):
    assert 0 < figure.axes[0].get_ylim()[0] < (deep.mean - 15).min()


def rates_of(*accuracies, **more):
  return Curve('SGD', np.array([0.1, 0.3, 1.0]), np.array(accuracies), np.zeros(3), **more)


@pytest.mark.parametrize(('mean', 'limits'), [(52.55, (51.55, 53.55)), (0.0, (-1, 1)), (100.0, (99, 101))])
def test_a_single_dot_lies_in_the_middle_of_two_points(mean, limits):
  one = Curve('α = 2', np.array([10.0]), np.array([mean]), np.array([np.nan]))
  ax, = figures.panels_figure([Panel('', [one])], True, '', 'kept').axes
  assert ax.get_ylim() == pytest.approx(limits)


def test_learning_rates_are_the_ticks_and_what_diverged_is_crossed_out():
  good, bad = rates_of(97.0, 98.0, 96.5), rates_of(97.0, 60.0, 9.8, diverged=np.array([False, True, True]))
  figure = figures.panels_figure([Panel('dense', [good], enlarged=True), Panel('pruned', [bad])], False, '', 'learning rate')
  figure.draw_without_rendering()
  dense, pruned = figure.axes
  assert [label.get_text() for label in pruned.get_xticklabels()] == ['0.1', '0.3', '1']
  crosses = pruned.get_lines()[1]
  assert crosses.get_marker() == 'x' and crosses.get_xdata().tolist() == [0.3, 1.0]
  assert crosses.get_color() == pruned.get_lines()[0].get_color()
  height = pruned.transAxes.inverted().transform(crosses.get_transform().transform(crosses.get_xydata()))[:, 1]
  assert ((height > 0) & (height < 0.1)).all()   # at the lower edge, whatever the limits are
  assert len(dense.get_lines()) == 1 and dense.get_ylim() == pytest.approx((94, 98.4)) and pruned.get_ylim()[0] < 9.8
  assert [text.get_text() for text in figure.legends[0].get_texts()] == ['SGD', 'diverged']
  calm = figures.panels_figure([Panel('', [good])], False, '', 'learning rate')
  assert [text.get_text() for text in calm.legends[0].get_texts()] == ['SGD']


def test_a_rate_of_its_own_is_told_beside_the_curve():
  panels = [Panel('', [curve._replace(rate=rate) for curve, rate in zip(FIVE, ('0.1', '0.3', '0.6'), strict=False)])]
  inside = figures.panels_figure(panels, True, '', 'kept').axes[0].get_legend()
  assert [text.get_text() for text in inside.get_texts()] == ['0.1', '0.3', '0.6']
  lines = [(line.get_color(), line.get_marker()) for line in inside.get_lines()]
  styles = figures.line_styles([curve.label for curve in FIVE[:3]], True).values()
  assert lines == [(style['color'], style['marker']) for style in styles]


def test_saved_files_are_the_same_each_time_whatever_the_users_settings(tmp_path):
  def save():
    new = drawn()
    return {path.name: path.read_bytes() for name in ('accuracy', 'three panels', 'weights')
            for path in figures.save(new[name], tmp_path / name)}
  first = save()
  with matplotlib.rc_context({'font.size': 20, 'lines.linewidth': 9, 'axes.facecolor': 'red'}):
    assert save() == first
  assert sorted(path.name for path in tmp_path.iterdir()) == sorted(first)


def test_svg_is_xml_without_dates_and_png_has_200_dots_an_inch(tmp_path, all_figures):
  for name, figure in all_figures.items():
    png, svg = figures.save(figure, tmp_path / 'figures' / name)
    assert ElementTree.parse(svg).getroot().tag == '{http://www.w3.org/2000/svg}svg'
    assert b'date' not in svg.read_bytes() and str(tmp_path).encode() not in svg.read_bytes()
    assert png.read_bytes()[:8] == b'\x89PNG\r\n\x1a\n'
    assert int.from_bytes(png.read_bytes()[16:20], 'big') == 680  # 3.4 in
    assert svg.stat().st_size < 400_000, f'{name}: too large to commit'


def dots(mean, sd=0.0, hollow=()):
  return figures.Dots(np.array(mean), np.broadcast_to(sd, len(mean)), np.isin(np.arange(len(mean)), hollow))


def test_dots_of_algorithms():
  """Names from top to bottom, a dot at each error, what is missing left out, all of the bars within logarithmic axes."""
  nan = float('nan')
  two = {'α = 1': dots([97.0, 90.0], [0.5, nan]), 'α = 2': dots([96.0, nan], [0.25, nan])}
  figure = figures.dots_figure(['RigL', 'SET'], [('10 % kept', two), ('2 % kept', two)], 'mean ± sd, n = 3')
  left, right = figure.axes
  assert [label.get_text() for label in left.get_yticklabels()] == ['RigL', 'SET'] and left.get_yticks().tolist() == [1, 0]
  assert (left.get_title(), right.get_title()) == ('10 % kept', '2 % kept')
  for ax in (left, right):
    drawn = {round(float(x), 3) for line in ax.get_lines() for x in line.get_xdata() if np.isfinite(x)}
    assert {3.0, 10.0, 4.0} <= drawn
    assert 2 <= ax.get_xlim()[0] <= 2.5 and 10 < ax.get_xlim()[1] <= 11.5 and ax.get_xscale() == 'log'


def test_hollow_dots():
  figure = figures.dots_figure(['RigL', 'STR'], [('', {'α = 1': dots([97.0, 90.0], hollow=[1])})], '')
  faces = {float(line.get_xdata()[0]): line.get_markerfacecolor() for line in figure.axes[0].get_lines() if len(line.get_xdata())}
  assert faces == {3.0: '#0072B2', 10.0: 'white'}


@pytest.mark.parametrize('means', [[[97.0, np.nan], [96.0, np.nan]], [[np.nan, np.nan], [np.nan, 50.0]], [[np.nan] * 2] * 2])
def test_names_and_panels_without_a_dot_can_be_drawn(tmp_path, means):
  panels = [(title, {label: dots(mean) for label, mean in zip(('α = 1', 'α = 2'), means, strict=True)}) for title in 'ab']
  figures.save(figures.dots_figure(['RigL', 'SET'], panels, ''), tmp_path / 'dots')   # warnings are errors


@pytest.mark.parametrize('count', [1, 2, 20])
@pytest.mark.parametrize('note', ['mean ± sd, n = 3', 'mean ± sd, n = 3\nhollow: another density, see the table'])
def test_dots_have_the_same_room_however_few_or_many_they_are(tmp_path, count, note):
  means = np.linspace(90, 97, count)
  panels = [(title, {label: dots(means, 0.1) for label in ('α = 1', 'α = 2')}) for title in ('10 % kept', '2 % kept')]
  figure = figures.dots_figure([f'algorithm {i}' for i in range(count)], panels, note)
  figures.save(figure, tmp_path / 'dots')   # lays it out; warnings are errors
  for ax in figure.axes:
    box = ax.get_window_extent().transformed(figure.dpi_scale_trans.inverted())
    assert box.height / count == pytest.approx(0.17, abs=0.01 / count) and box.width > 0.6
    assert ax.get_ylim() == (-0.5, count - 0.5)


def labels_apart(figure):
  """Of each panel, whether there are 0.03 in, half a digit, between any two labels of its x axis."""
  figure.draw_without_rendering()
  found = []
  for ax in figure.axes:
    boxes = sorted((label.get_window_extent() for label in ax.get_xticklabels() if label.get_text()), key=lambda box: box.x0)
    found.append(all(a.x1 + 0.03 * figure.dpi < b.x0 for a, b in itertools.pairwise(boxes)))
  return found


@pytest.mark.parametrize('low, high', [(1.6, 9.0), (1.0, 70.0), (2.0, 4.0), (2.1, 2.2), (3.0, 3.0), (0.3, 90.0), (20.0, 95.0)])
def test_errors_have_two_to_four_ticks_that_do_not_touch(low, high):
  panels = [(title, {'α = 1': dots([100 - low, 100 - high])}) for title in ('10 % kept', '2 % kept')]
  figure = figures.dots_figure(['dense, pruned afterwards', 'RigL'], panels, '')
  assert all(labels_apart(figure))
  for ax in figure.axes:
    ticks = ax.get_xticks()
    assert 2 <= len(ticks) <= 4 and ax.get_xlim()[0] <= min(ticks) and max(ticks) <= ax.get_xlim()[1]


@pytest.mark.parametrize('panels', [1, 2])
@pytest.mark.parametrize('least', [0.02, 0.03, 0.2, 1.0])
def test_shares_kept_have_ticks_that_do_not_touch(panels, least):
  curve = FIVE[0]._replace(x=np.geomspace(least, 100, 20))
  figure = figures.panels_figure([Panel(f'α = {i}', [curve]) for i in range(panels)], False, '', 'kept')
  assert all(labels_apart(figure)) and len(figure.axes[0].get_xticks()) >= 3


def test_a_map_of_networks_that_diverged_says_so():
  known, lost = np.array([[90.0, np.nan], [80.0, 95.0]]), np.full((2, 2), np.nan)
  figure = maps_figure([Map('EWC, α = 1', known), Map('Synaptic Intelligence, α = 1', lost)], 'Task', 'Tasks learned', 'Accuracy')
  first, second = ([text.get_text() for text in ax.texts] for ax in figure.axes[:2])
  assert first == ['90.0', '80.0', '95.0'] and second == ['diverged']
  assert figure.axes[1].get_title().splitlines() == ['Synaptic Intelligence,', 'α\u00a0=\u00a01']


@pytest.mark.parametrize('least, begin', [(89.5, 80.2), (60.0, 60.0)])
def test_a_scale_of_colours_spans_ten_points(least, begin):
  """Half a point forgotten is not as dark as a collapse."""
  figure = maps_figure([Map('EWC', np.array([[90.2, np.nan], [least, 90.1]]))], 'Task', 'Tasks learned', 'Accuracy')
  (image,) = figure.axes[0].get_images()
  assert image.get_clim() == pytest.approx((begin, 90.2))


@pytest.mark.parametrize('tasks, maps, columns', [(5, 14, 2), (10, 6, 2), (10, 14, 3)])
def test_maps_of_many_methods_stand_three_abreast_where_they_have_no_numbers(tasks, maps, columns):
  figure = maps_figure([Map(f'method {i}', np.full((tasks, tasks), 90.0)) for i in range(maps)], 'Task', 'Tasks learned', '%')
  assert figure.axes[0].get_gridspec().ncols == columns


@pytest.mark.parametrize('end, ticks', [(61.7, [70, 80, 90, 95, 98]), (82.9, [85, 90, 95, 98]), (95.0, None)])
def test_an_axis_on_which_methods_are_far_apart_is_stretched_towards_a_hundred(end, ticks):
  x = np.arange(1, 11)
  curves = [Curve('fine-tuning', x, np.linspace(97, end, 10), np.zeros(10)), Curve('joint', x, np.full(10, 98.2), np.zeros(10))]
  ax = tasks_figure(curves, 'Mean test accuracy (%)', 'n = 1').axes[0]
  heights = ax.transData.transform([(1, y) for y in (90.0, 95.0, 98.0)])[:, 1]
  if ticks is None:
    assert ax.get_yscale() == 'linear' and np.diff(heights)[0] * 3 == pytest.approx(np.diff(heights)[1] * 5)
  else:
    assert ax.get_yticks().tolist() == ticks
    np.testing.assert_allclose(np.diff(heights)[0] / np.diff(heights)[1], np.log(11 / 6) / np.log(6 / 3))
    assert ax.get_ylim()[0] < end and ax.get_ylim()[1] > 98.2

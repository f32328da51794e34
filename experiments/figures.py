"""The figures of a report, drawn from plain arrays: nothing is read, averaged or trained here.

Each function gives a matplotlib Figure one text column wide (3.4 in), its text at 7 to 8 points. Lines differ
in colour, dash and marker, so that they can be told apart in grey and by colour-blind readers; legends stand
outside the axes. The same arrays give the same bytes: no dates, a fixed salt for the ids in an SVG, and the
defaults of matplotlib whatever those of the user are.
"""

import io
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib
import matplotlib.style
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FixedLocator, FormatStrFormatter, FuncFormatter, MaxNLocator, NullLocator

from experiments.workdir import write_atomic

WIDTH = 3.4  # inches: one column of the usual two-column papers
STYLE: Any = ['default', {
  'font.size': 8, 'axes.labelsize': 8, 'axes.titlesize': 8, 'xtick.labelsize': 7, 'ytick.labelsize': 7,
  'legend.fontsize': 7, 'legend.title_fontsize': 7, 'legend.frameon': False, 'legend.handlelength': 2.0,
  'legend.columnspacing': 1.2, 'legend.handletextpad': 0.5, 'legend.borderaxespad': 0.2,
  'axes.linewidth': 0.6, 'axes.spines.top': False, 'axes.spines.right': False, 'axes.grid': True,
  'grid.linewidth': 0.4, 'grid.color': '0.88', 'axes.axisbelow': True,
  'lines.linewidth': 1.1, 'lines.markersize': 2.8,
  'xtick.major.width': 0.6, 'ytick.major.width': 0.6, 'xtick.major.size': 2.5, 'ytick.major.size': 2.5,
  'svg.hashsalt': 'powerprop', 'figure.dpi': 200, 'savefig.dpi': 200,
}]
_DASHES = ('-', '--', '-.', ':', (0, (5, 1, 1, 1, 1, 1)), (0, (1, 1)), (0, (8, 2)))
_MARKERS = ('o', 's', '^', 'D', 'v', 'P', 'X')
# Okabe and Ito's colours for the colour-blind, those that are dark enough for a line on white first.
_UNORDERED = ('#0072B2', '#D55E00', '#009E73', '#CC79A7', '#000000', '#E69F00', '#56B4E9')
_CHANCE: dict[str, Any] = {'color': '0.35', 'linestyle': '--', 'linewidth': 0.9}
_IDENTITY: dict[str, Any] = {'color': '0.3', 'linestyle': ':', 'linewidth': 0.8}
_ALL: dict[str, Any] = {'color': '0.5', 'linewidth': 0.9}
_DIVERGED: dict[str, Any] = {'linestyle': '', 'marker': 'x', 'markersize': 4, 'markeredgewidth': 1.1}
_PRUNED = '0.72'
_ROW = 0.17   # inches from one name to the next below it: 7 points, and as much between them

Styles = Mapping[str, Mapping[str, Any]]


class Dots(NamedTuple):
  """Of N names: [N] arrays, NaN where there is nothing."""
  mean: np.ndarray
  sd: np.ndarray
  hollow: np.ndarray   # bool: drawn so


class Curve(NamedTuple):
  """A line with its spread: [K] arrays, already in the units of the axes."""
  label: str
  x: np.ndarray
  mean: np.ndarray  # NaN: the line is interrupted there
  sd: np.ndarray  # NaN: no band there
  diverged: np.ndarray | None = None  # bool: at these x networks have diverged, which the mean leaves out
  rate: str = ''  # learning rate, where a curve has one of its own


class Panel(NamedTuple):
  """Curves that share axes. One label means one line style in every panel of a figure."""
  title: str
  curves: Sequence[Curve]
  enlarged: bool = False  # shows the upper few per cent only


def gaussian_kde(samples: np.ndarray, grid: np.ndarray) -> np.ndarray:
  """Density estimate p(x) = Σ_i N(x; s_i, h²) / n with h = 0.9 min(sd, IQR / 1.34) n^(−1/5).

  Args:
    samples: [N] floating; values that are not finite are left out.
    grid: [G] points at which the density is wanted.
  Returns: [G] float64, per unit of `grid`; all NaN where fewer than two different values are left.
  Source: Silverman 1986, Density Estimation for Statistics and Data Analysis, eq. (3.31).
  """
  samples = np.asarray(samples, np.float64)
  samples = samples[np.isfinite(samples)]
  if samples.size < 2 or np.ptp(samples) == 0:
    return np.full(len(grid), np.nan)
  low, high = np.percentile(samples, [25, 75])
  sd = samples.std(ddof=1)
  spread = min(sd, (high - low) / 1.34) or sd  # where most samples are tied the quartiles coincide
  width = 0.9 * spread * samples.size ** -0.2
  scaled = (np.asarray(grid, np.float64)[:, None] - samples) / width
  return np.exp(-0.5 * scaled ** 2).mean(axis=1) / (width * np.sqrt(2 * np.pi))


def line_styles(labels: Sequence[str], ordered: bool) -> dict[str, dict[str, Any]]:
  """Label → colour, dash and marker, no two labels alike. `ordered`: colours run from dark to light, for ordered values as α."""
  # The last tenths of viridis are too pale for a line on white.
  ramp = [to_hex(colour) for colour in matplotlib.colormaps['viridis'](np.linspace(0, 0.82, len(labels)))]
  colours = ramp if ordered else _UNORDERED
  return {label: {'color': colours[i % len(colours)], 'linestyle': _DASHES[(i + i // len(_DASHES)) % len(_DASHES)],
                  'marker': _MARKERS[(i + 2 * (i // len(_MARKERS))) % len(_MARKERS)]} for i, label in enumerate(labels)}


@matplotlib.style.context(STYLE)
def accuracy_figure(curves: Sequence[Curve], ordered: bool, note: str) -> Figure:
  """Test accuracy (%) against weights kept (%), sparser to the right, and its upper end enlarged."""
  figure = Figure(figsize=(WIDTH, 4.1), layout='constrained')
  whole, detail = figure.subplots(2, 1, height_ratios=[1.15, 1])
  styles = line_styles([curve.label for curve in curves], ordered)
  for ax in (whole, detail):
    _draw(ax, curves, styles)
    ax.set_ylabel('Test accuracy (%)')
  _kept_axis(whole, curves, (100, 50, 20, 10, 5, 2, 1))
  whole.set_ylim(*_whole_limits(curves))
  low, high = _detail_limits(curves)
  detail.set_ylim(low, high)
  inside = [c._replace(x=c.x[c.mean >= low]) for c in curves if (c.mean >= low).any()]
  _kept_axis(detail, inside or curves, (100, 70, 50, 30, 20, 10, 5, 2, 1))
  detail.set_title('enlarged', pad=2)
  detail.set_xlabel('Weights kept (%), sparser →')
  legend(figure, styles, note)
  return figure


@matplotlib.style.context(STYLE)
def overlap_figure(curves: Sequence[Curve], ordered: bool, note: str) -> Figure:
  """Weights on which two masks agree (%) against weights pruned (%), with the chance line p² + (1 − p)²."""
  figure = Figure(figsize=(WIDTH, 2.7), layout='constrained')
  ax = figure.subplots()
  styles = line_styles([curve.label for curve in curves], ordered)
  pruned = np.linspace(0, 1, 201)
  ax.plot(100 * pruned, 100 * (pruned ** 2 + (1 - pruned) ** 2), **_CHANCE)
  _draw(ax, curves, styles)
  ax.set(xlim=(-2, 102), ylim=(None, 101.5), xlabel='Weights pruned (%)', ylabel='Agreement of the masks (%)')
  legend(figure, {**styles, 'chance': _CHANCE}, note)
  return figure


@matplotlib.style.context(STYLE)
def panels_figure(panels: Sequence[Panel], ordered: bool, note: str, x_axis: str) -> Figure:
  """Test accuracy (%) in panels, two abreast. All share their x axis; the y axis too, but for enlarged panels.

  Args:
    panels: at least one; those of one column all enlarged, or none of them.
    ordered: colours run from dark to light.
    note: title of the legend.
    x_axis: 'kept' (%) or 'learning rate', both on a log scale; the ticks of the latter are the rates that were used.
  """
  if x_axis not in ('kept', 'learning rate'):
    raise ValueError(f"x_axis is {x_axis!r}; it may be 'kept' or 'learning rate'")
  columns = min(len(panels), 2)
  rows = -(-len(panels) // columns)
  enlarged = any(panel.enlarged for panel in panels)
  figure = Figure(figsize=(WIDTH, 2.7 if columns == 1 else 0.9 + 1.4 * rows), layout='constrained')
  axes = figure.subplots(rows, columns, sharex=True, sharey='col' if enlarged else 'all', squeeze=False)
  curves = [curve for panel in panels for curve in panel.curves]
  styles = line_styles(list(dict.fromkeys(curve.label for curve in curves)), ordered)
  for ax, panel in zip(axes.flat, panels, strict=False):
    _draw(ax, panel.curves, styles)
    ax.set_title(panel.title)
    same = [curve for other in panels if other.enlarged == panel.enlarged for curve in other.curves]
    ax.set_ylim(*(_upper_limits(same) if panel.enlarged else _whole_limits(same)))
    if any(curve.rate for curve in panel.curves):
      handles = [Line2D([], [], **{**styles[curve.label], 'label': curve.rate}) for curve in panel.curves]
      ax.legend(handles=handles, loc='best', title='learning rate', handlelength=1.8, labelspacing=0.15)
  for ax in axes.flat[len(panels):]:
    ax.set_axis_off()
  if axes.size > len(panels):
    for ax in axes.flat:  # nothing stands below one panel that could carry its numbers: all have their own
      ax.tick_params(labelbottom=True)
  first = axes[0, 0]
  if x_axis == 'kept':
    _kept_axis(first, curves, (100, 50, 20, 10, 5, 2, 1) if columns == 1 else (100, 30, 10, 3, 1), 2.7 / columns - 0.1)
    figure.supxlabel('Weights kept (%), sparser →', fontsize=8)
  else:
    rates = np.unique(np.concatenate([curve.x for curve in curves]))
    first.set_xscale('log')
    first.set_xlim(rates[0] / 1.25, rates[-1] * 1.25)
    first.xaxis.set_major_locator(FixedLocator(rates.tolist()))
    first.xaxis.set_minor_locator(NullLocator())
    first.xaxis.set_major_formatter(FormatStrFormatter('%g'))
    for ax in axes.flat:
      ax.tick_params(axis='x', rotation=90 if len(rates) > 3 else 0)
    figure.supxlabel('Learning rate', fontsize=8)
  figure.supylabel('Test accuracy (%)', fontsize=8)
  if any(curve.diverged is not None and curve.diverged.any() for curve in curves):
    styles = {**styles, 'diverged': {'color': '0.3', **_DIVERGED}}
  legend(figure, styles, note)
  return figure


@matplotlib.style.context(STYLE)
def dots_figure(names: Sequence[str], panels: Sequence[tuple[str, Mapping[str, Dots]]], note: str) -> Figure:
  """Error (%), 100 − accuracy, of each of `names`, a line each, in panels side by side: a dot for each label, and a bar of one sd
  either way. The axis is logarithmic, so that what fails altogether does not squeeze the others together.

  Args:
    names: N of them, from top to bottom.
    panels: title, and dots of accuracies in % by label.
    note: title of the legend.
  """
  figure = Figure(figsize=(WIDTH, 1.3 + _ROW * len(names)), layout='constrained')
  axes = figure.subplots(1, len(panels), sharey=True, squeeze=False)[0]
  styles = line_styles([label for label in panels[0][1]], ordered=False)
  for ax, (title, groups) in zip(axes, panels, strict=True):
    _draw_dots(ax, groups, styles)
    ax.set_title(title)
  axes[0].set_yticks(np.arange(len(names))[::-1], names)
  axes[0].set_ylim(-0.5, len(names) - 0.5)   # half a row on either side: no dot is cut off
  figure.supxlabel('Test error (%)', fontsize=8)
  legend(figure, {label: {**style, 'linestyle': ''} for label, style in styles.items()}, note)
  # Legend, titles and labels have taken what they need: a row is as high in every figure.
  figure.draw_without_rendering()
  figure.set_figheight(figure.get_figheight() + _ROW * len(names) - axes[0].get_window_extent().height / figure.dpi)
  return figure


def _draw_dots(ax: Axes, groups: Mapping[str, Dots], styles: Styles) -> None:
  places = np.arange(len(next(iter(groups.values())).mean))[::-1]
  errors, sds = (np.stack(x) for x in zip(*((100 - dots.mean, np.nan_to_num(dots.sd)) for dots in groups.values()), strict=True))
  known = np.isfinite(errors)
  ax.hlines(places, np.where(known, errors, np.inf).min(axis=0), np.where(known, errors, -np.inf).max(axis=0),
            color='0.75', linewidth=0.8)
  for row, (offset, (label, dots)) in enumerate(zip(np.linspace(0.13, -0.13, len(groups)), groups.items(), strict=True)):
    bars = np.stack([np.minimum(sds[row], 0.9 * errors[row]), sds[row]])   # a logarithm has no 0
    for which, face in ((~dots.hollow, styles[label]['color']), (dots.hollow, 'white')):
      if (which & known[row]).any():
        ax.errorbar(errors[row, which], places[which] + offset, xerr=bars[:, which],
                    **{**styles[label], 'linestyle': '', 'elinewidth': 0.8, 'markerfacecolor': face, 'markeredgewidth': 0.7})
  ax.set_xscale('log')
  low, high = 1.0, 100.0
  if known.any():
    low = 0.95 * max((errors - sds)[known].min(), 0.5 * errors[known].min())
    high = min(1.1 * (errors + sds)[known].max(), 103)   # no error is above 100
  ax.set_xlim(low, high)
  ax.xaxis.set_major_locator(FixedLocator(_log_ticks(low, high, 0.9)))
  ax.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f'{x:g}'))
  ax.xaxis.set_minor_locator(NullLocator())


def _log_ticks(low: float, high: float, inches: float, most: int = 4) -> list[float]:
  """Round numbers from `low` to `high`, at most so many, whose labels do not touch on a logarithmic axis of that width."""
  tens = 10.0 ** np.arange(np.floor(np.log10(low)), np.ceil(np.log10(high)) + 1)
  series: list[Any] = [np.unique(np.outer(tens, steps)) for steps in ((1, 2, 5), (1, 3), (1,))]
  series.append(MaxNLocator(most, steps=[1, 2, 2.5, 5, 10]).tick_values(low, high))
  inside = [[float(f'{x:.6g}') for x in ticks if low <= x <= high] for ticks in series]
  return max((ticks for ticks in inside if len(ticks) <= most and _apart(ticks, low, high, inches)), key=len, default=[])


def _apart(ticks: Sequence[float], low: float, high: float, inches: float) -> bool:
  """Do the labels of these ticks leave gaps between them on a logarithmic axis of so many inches?"""
  places = np.log(sorted(ticks)) / abs(np.log(high / low)) * inches
  widths = np.array([0.06 * len(f'{tick:g}') for tick in sorted(ticks)])   # inches of a digit of 7 points
  return bool((np.diff(places) > (widths[1:] + widths[:-1]) / 2 + 0.05).all())


@matplotlib.style.context(STYLE)
def weights_figure(
    initial: np.ndarray, final: np.ndarray, kept: np.ndarray, colour: str, note: str) -> Figure:
  """Initial value of weights against their final value; on the margins densities of the survivors' values.

  Args:
    initial, final: [N] floating.
    kept: [N] bool: survives pruning.
    colour: of the survivors; pruned weights are grey.
    note: title of the legend.
  """
  figure = Figure(figsize=(WIDTH, 3.3), layout='constrained')
  figure.get_layout_engine().set(w_pad=0.02, h_pad=0.01, wspace=0.02, hspace=0.02)  # type: ignore[union-attr, call-arg]
  grid = figure.add_gridspec(2, 2, width_ratios=[5, 1], height_ratios=[1, 4])
  ax = figure.add_subplot(grid[1, 0])
  top, side = figure.add_subplot(grid[0, 0], sharex=ax), figure.add_subplot(grid[1, 1], sharey=ax)
  x_limits, y_limits = _padded_range(initial), _padded_range(final)
  for chosen, shade in ((~kept, _PRUNED), (kept, colour)):
    # Ten thousand points as vectors would make the SVG a megabyte.
    ax.scatter(initial[chosen], final[chosen], s=2.5, color=shade, alpha=0.5, linewidths=0, rasterized=True)
  for line in (ax.axhline(0), ax.axvline(0)):
    line.set(color='0.5', linewidth=0.5, zorder=0.9)
  ax.plot(x_limits, x_limits, **_IDENTITY)
  ax.set(xlim=x_limits, ylim=y_limits, xlabel='Initial value', ylabel='Final value')
  ax.xaxis.set_major_locator(MaxNLocator(5))
  x, y = np.linspace(*x_limits, 400), np.linspace(*y_limits, 400)
  before, after = gaussian_kde(initial[kept], x), gaussian_kde(final[kept], y)
  top.plot(x, gaussian_kde(initial, x), **_ALL)
  top.plot(x, before, color=colour)
  top.fill_between(x, before, color=colour, alpha=0.45, linewidth=0)
  side.plot(after, y, color=colour)
  side.fill_betweenx(y, after, color=colour, alpha=0.45, linewidth=0)
  top.set_ylim(0, None)
  side.set_xlim(0, None)
  for margin, scale in ((top, 'left'), (side, 'bottom')):
    margin.tick_params(labelbottom=False, labelleft=False, length=0)
    margin.grid(False)
    margin.spines[scale].set_visible(False)  # densities per unit: their heights mean nothing to the reader
  dot = {'linestyle': '', 'marker': 'o', 'markersize': 3.5}
  legend(figure, {f'survives ({kept.sum():,})': {'color': colour, **dot},
                  f'pruned ({(~kept).sum():,})': {'color': _PRUNED, **dot},
                  'all initial values': _ALL, 'unchanged': _IDENTITY}, note)
  return figure


@matplotlib.style.context(STYLE)
def save(figure: Figure, stem: Path) -> list[Path]:
  """Writes stem.png (200 dpi) and stem.svg. Returns: both paths."""
  paths: list[Path] = []
  for kind, metadata in (('png', {'Software': None}), ('svg', {'Date': None, 'Creator': None})):
    buffer = io.BytesIO()
    figure.savefig(buffer, format=kind, metadata=metadata)
    paths.append(stem.with_name(f'{stem.name}.{kind}'))
    write_atomic(paths[-1], buffer.getvalue())
  return paths


def _draw(ax: Axes, curves: Sequence[Curve], styles: Styles) -> None:
  for curve in curves:
    style = styles[curve.label]
    low, high = np.clip([curve.mean - curve.sd, curve.mean + curve.sd], 0, 100)  # no accuracy lies outside
    ax.fill_between(curve.x, low, high, color=style['color'], alpha=0.2, linewidth=0)
    known = np.isfinite(curve.sd)
    alone = known & ~np.append(known[1:], False) & ~np.append(False, known[:-1])   # a band takes two neighbours
    if alone.any():
      ax.vlines(curve.x[alone], low[alone], high[alone], color=style['color'], alpha=0.4, linewidth=2.5)
    ax.plot(curve.x, curve.mean, **style)
  for row, curve in enumerate(curves):
    if curve.diverged is not None and curve.diverged.any():
      x = curve.x[curve.diverged]   # in rows at the lower edge, whatever the limits are
      ax.plot(x, np.full(len(x), 0.035 + 0.06 * row), transform=ax.get_xaxis_transform(), clip_on=False,
              color=styles[curve.label]['color'], zorder=3, **_DIVERGED)


def _kept_axis(ax: Axes, curves: Sequence[Curve], ticks: Sequence[float], inches: float = 2.6) -> None:
  """`inches`: the width of the axis, which all of the ticks need not have room in."""
  x = np.concatenate([curve.x for curve in curves])
  left, right = x.max() * 1.12, x.min() / 1.12
  ax.set_xscale('log')
  ax.set_xlim(left, right)
  finer = [tick / 100 for tick in ticks]  # for networks pruned below 1 %
  choices = [[tick for tick in (*some, *few) if right <= tick <= left]
             for some, few in ((ticks, finer[1:]), ((100, 10, 1), (0.1, 0.01)), ((100, 1), (0.01,)))]
  ax.xaxis.set_major_locator(FixedLocator(next((some for some in choices if _apart(some, left, right, inches)), choices[-1])))
  ax.xaxis.set_minor_locator(NullLocator())
  ax.xaxis.set_major_formatter(FormatStrFormatter('%g'))


def _whole_limits(curves: Sequence[Curve]) -> tuple[float, float]:
  """All means and deviations, with a little room; two points at least, so that hundredths do not fill the axis."""
  low = min(float(np.nanmin(np.append(curve.mean - np.nan_to_num(curve.sd), 100))) for curve in curves)
  high = max(float(np.nanmax(np.append(curve.mean + np.nan_to_num(curve.sd), 0))) for curve in curves)
  room = max(0.04 * (high - low) + 0.05, 1 - (high - low) / 2)
  return max(low - room, -1), min(high + room, 101.5)   # a dot at 0 does not lie on the axis


def _detail_limits(curves: Sequence[Curve]) -> tuple[float, float]:
  """From 1.5 points below the worst dense network to just above the best of all, where curves may cross."""
  dense = np.array([curve.mean[np.argmax(curve.x)] for curve in curves])
  upper = np.concatenate([curve.mean + np.nan_to_num(curve.sd) for curve in curves])
  if not np.isfinite(dense).any():
    return 0, 100
  return max(float(np.nanmin(dense)) - 1.5, 0), min(float(np.nanmax(upper)) + 0.15, 100)


def _upper_limits(curves: Sequence[Curve]) -> tuple[float, float]:
  """The four points below the best mean: a curve that fails leaves the panel."""
  best = float(np.max([np.nanmax(np.append(curve.mean, 0)) for curve in curves]))
  return max(best - 4, 0), min(best + 0.4, 100)


def _padded_range(values: np.ndarray) -> tuple[float, float]:
  """The range of 0 and the finite values, 4 % wider on either side; never empty."""
  finite = np.append(values[np.isfinite(values)], 0).astype(float)
  pad = 0.04 * float(np.ptp(finite)) or 1.0
  return float(finite.min()) - pad, float(finite.max()) + pad


def legend(figure: Figure, styles: Styles, note: str) -> None:
  """Above the axes, `note` as its title, read row by row, in as few rows as the width of the figure holds."""
  entries = list(styles.items())
  for rows in range(1, len(entries) + 1):
    columns = -(-len(entries) // rows)
    # matplotlib fills column by column: this order reads from left to right.
    order = [entry for column in range(columns) for entry in entries[column::columns]]
    handles = [Line2D([], [], **style) for _, style in order]
    labels = [textwrap.fill(label, 44) for label, _ in order]
    made = figure.legend(handles, labels, loc='outside upper center', ncols=columns, title=note or None)
    made.get_title().set_multialignment('center')
    box = made.get_window_extent()
    if columns == 1 or box.width <= 0.98 * figure.bbox.width:
      # Beyond a title and two rows it makes the figure taller, rather than the axes lower.
      figure.set_figheight(figure.get_figheight() + max(box.height / figure.dpi - 0.5, 0))
      return
    made.remove()

"""The figures of continual learning, drawn from plain arrays; styles, sizes and legends are those of experiments.figures."""
import textwrap
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import matplotlib.style
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, NullLocator

from experiments.figures import STYLE, WIDTH, Curve, legend, line_styles

MAPS_ABREAST = 2
ABREAST_OF_MANY = 3
LEAST_SPAN = 10.0     # points that a scale of colours spans at least: a tenth of a point is not to look like a collapse
STRETCHED = 15.0      # points from which on an axis is stretched towards 100, where most methods are
TICKS, FINE_TICKS = (*range(0, 91, 10), 95, 98, 99, 100), (*range(0, 96, 5), 98, 99, 100)


class Map(NamedTuple):
  """A matrix [N, M] in per cent, NaN where nothing is known; lines from the bottom up."""
  title: str
  values: np.ndarray


@matplotlib.style.context(STYLE)
def tasks_figure(curves: Sequence[Curve], y_label: str, note: str, whole: bool = False) -> Figure:
  """Something in per cent against the number of tasks learned. An axis that does not begin at 0 and has more than STRETCHED
  points to show is logarithmic in the distance to 101.

  Args:
    curves: x are numbers of tasks.
    whole: the vertical axis begins at 0.
    note: title of the legend.
  """
  figure = Figure(figsize=(WIDTH, 2.7), layout='constrained')
  ax = figure.subplots()
  styles = line_styles([curve.label for curve in curves], ordered=False)
  many = max(len(curve.x) for curve in curves) > 30   # markers would hide the line
  for curve in curves:
    style = {**styles[curve.label], **({'marker': ''} if many else {})}
    low, high = np.clip([curve.mean - curve.sd, curve.mean + curve.sd], 0, 100)
    ax.fill_between(curve.x, low, high, color=style['color'], alpha=0.2, linewidth=0)
    ax.plot(curve.x, curve.mean, **style)
  values = np.concatenate([np.concatenate([c.mean - np.nan_to_num(c.sd), c.mean + np.nan_to_num(c.sd)]) for c in curves])
  if not values.size:
    ax.set(xlim=(0, 1), xticks=[])
    ax.text(0.5, 0.5, 'all networks diverged', ha='center', va='center', color='0.3', transform=ax.transAxes)
  low, high = (float(f(values)) if values.size else end for f, end in ((np.min, 0.0), (np.max, 100.0)))
  low = 0.0 if whole else low
  room = 0.04 * (high - low) + 0.1   # for half a marker
  if not whole and high - low > STRETCHED:
    ax.set_yscale('function', functions=(lambda y: -np.log(np.maximum(101 - y, 1e-3)), lambda z: 101 - np.exp(-z)))
    low, high, room = low - 1, min(high + room / 4, 100.2), 0.0
    shown = [[tick for tick in ticks if low <= tick <= high] for ticks in (TICKS, FINE_TICKS)]
    ax.set_yticks(shown[0] if len(shown[0]) > 3 else shown[1])
    ax.yaxis.set_minor_locator(NullLocator())
  ax.set(xlabel='Tasks learned', ylabel=y_label, ylim=(low if whole else max(low - room, 0), high + room))
  ax.xaxis.set_major_locator(MaxNLocator(integer=True))
  legend(figure, {label: {**style, **({'marker': ''} if many else {})} for label, style in styles.items()}, note)
  return figure


@matplotlib.style.context(STYLE)
def maps_figure(maps: Sequence[Map], x_label: str, y_label: str, scale_label: str, low: float | None = None) -> Figure:
  """Matrices as heat maps on one scale of colours, two abreast or three; numbers in the cells where there is room for them. One
  without a value is of networks that diverged.

  Args:
    low: where the scale begins; None: at the smallest value of all, or LEAST_SPAN below the largest.
  """
  many = len(maps) > 3 * MAPS_ABREAST and maps[0].values.shape[1] > 5   # and no numbers in the cells
  columns = min(len(maps), ABREAST_OF_MANY if many else MAPS_ABREAST)
  rows = -(-len(maps) // columns)
  side = WIDTH / columns
  figure = Figure(figsize=(WIDTH, rows * side * (0.8 if columns == 1 else 0.95) + 0.5), layout='constrained')
  axes = figure.subplots(rows, columns, squeeze=False, sharex=True, sharey=True)
  every = np.concatenate([np.ravel(one.values) for one in maps])
  every = every[np.isfinite(every)]
  end = float(every.max()) if every.size else 100.0
  begin = max(0.0, min(float(every.min()), end - LEAST_SPAN)) if low is None and every.size else low or 0.0
  end = max(end, begin + 1e-9)
  for ax, one in zip(axes.flat, maps, strict=False):
    ax.grid(False)
    image = ax.imshow(one.values, origin='lower', vmin=begin, vmax=end, cmap='viridis', aspect='auto',
                      extent=(0.5, one.values.shape[1] + 0.5, 0.5, one.values.shape[0] + 0.5))
    title = one.title.replace(' = ', '\u00a0=\u00a0')   # does not break there
    ax.set_title(textwrap.fill(title, {1: 44, 2: 25}.get(columns, 17), break_long_words=False), fontsize=7)
    ax.xaxis.set_major_locator(MaxNLocator(5 if columns > 1 else 10, integer=True))
    ax.yaxis.set_major_locator(MaxNLocator(5 if columns > 1 else 10, integer=True))
    if not np.isfinite(one.values).any():
      ax.text(0.5, 0.5, 'diverged', ha='center', va='center', fontsize=7, color='0.3', transform=ax.transAxes)
    if one.values.shape[1] * columns <= 12:
      _numbers(ax, one.values, begin, end, 1 if one.values.shape[1] * columns <= 10 else 0)
  for ax in axes.flat[len(maps):]:
    ax.set_axis_off()
  if axes.size > len(maps) and rows > 1:
    axes[-2, -1].tick_params(labelbottom=True)
  figure.supxlabel(x_label, fontsize=8)
  figure.supylabel(y_label, fontsize=8)
  place = {'location': 'top', 'shrink': 0.7, 'fraction': 0.1 / rows, 'aspect': 40} if rows > 2 else {'fraction': 0.05}
  bar = figure.colorbar(image, ax=axes, label=scale_label, pad=0.02, **place)
  bar.outline.set_linewidth(0.6)
  return figure


def _numbers(ax: Axes, values: np.ndarray, low: float, high: float, decimals: int) -> None:
  for (row, column), value in np.ndenumerate(values):
    if np.isfinite(value):
      bright = value > low + 0.6 * (high - low)
      text = f'{value:.{decimals}f}' if value < 99.95 else '100'   # which would be wider than the others
      ax.text(column + 1, row + 1, text, ha='center', va='center', fontsize=6,
              color='black' if bright else 'white')


def mean_maps(found: Mapping[str, Sequence[np.ndarray]]) -> list[Map]:
  """Title → matrices of several networks, shares → the mean of those that know a cell, in per cent."""
  maps = []
  for title, matrices in found.items():
    stack = 100 * np.stack(matrices)
    known = np.isfinite(stack).sum(0)
    maps.append(Map(title, np.where(known > 0, np.nansum(stack, 0) / np.maximum(known, 1), np.nan)))
  return maps

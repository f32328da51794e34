"""Times of functions that take turns in one process, so that what else the machine does falls on all of them alike."""
import math
import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

Row = dict[str, Any]


class Times(NamedTuple):
  """Seconds for a call, one number for each round."""
  wall: list[float]
  cpu: list[float]     # of all threads of this process


def take_turns(functions: Mapping[str, Callable[[], Any]], rounds: int, seconds: float = 0.0) -> dict[str, Times]:
  """Times of each function, which must wait for what it computes.

  Each is called once before, to compile. Then, `rounds` times, all of them have a turn in alternating order; a turn is as many
  calls as take about `seconds`, at least one.
  """
  calls = {}
  for name, function in functions.items():
    function()
    calls[name] = math.ceil(seconds / _time(function, 1)[0]) if seconds else 1
  times: dict[str, Times] = {name: Times([], []) for name in functions}
  for number in range(rounds):
    for name in list(functions)[::1 if number % 2 else -1]:
      wall, cpu = _time(functions[name], calls[name])
      times[name].wall.append(wall)
      times[name].cpu.append(cpu)
  return times


def _time(function: Callable[[], Any], calls: int) -> tuple[float, float]:
  wall, cpu = time.perf_counter(), time.process_time()
  for _ in range(calls):
    function()
  return (time.perf_counter() - wall) / calls, (time.process_time() - cpu) / calls


def per(times: Times, count: float) -> Times:
  """Times of one of the `count` equal things that a call does."""
  return Times(*([t / count for t in column] for column in times))


def row(name: str, value: float, unit: str, target: float | None = None, **more: Any) -> Row:
  """A line of the table. `target`: the largest value allowed, or the smallest where `more` has least=True; None: none is set."""
  return {'name': name, 'value': value, 'unit': unit, 'target': target, **more}


def ratio(name: str, times: Times, base: Times, target: float | None = None, **more: Any) -> Row:
  """The median of times / base over the rounds, its range, and the median of the same in CPU time, which tells more where other
  programs run on the same cores."""
  wall, cpu = ([a / b for a, b in zip(x, y, strict=True)] for x, y in zip(times, base, strict=True))
  return row(name, statistics.median(wall), '×', target, low=min(wall), high=max(wall), cpu=statistics.median(cpu), **more)

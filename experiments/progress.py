"""What a run tells on the terminal: lines of the first host, and how far training is."""
import sys
import time

import jax
import numpy as np


def say(text: str) -> None:
  if jax.process_index() == 0:
    print(text, flush=True)


def plural(n: int, noun: str) -> str:
  return f'{n} {noun}' if n == 1 else f'{n} {noun}s'


class Progress:
  """One line that says how far training is, how fast, and how long it will take; a line each 10 s where it is no terminal.

  The rate leaves out the first part, in which programs are compiled.
  """

  def __init__(self, steps: int, done: int, nets: int, before: float):
    self._steps, self._done, self._nets, self._before = steps, done, nets, before
    self._start = self._shown = time.monotonic()
    self._first: tuple[int, float] | None = None   # step and time from which on the rate is taken
    self._begun = False

  @property
  def seconds(self) -> float:
    return self._before + time.monotonic() - self._start

  def begin(self, step: int) -> None:
    """The rate is of the steps after this one, where something else has been waited for until now."""
    self._first, self._begun = (step, time.monotonic()), True

  def show(self, step: int, losses: np.ndarray) -> None:
    now = time.monotonic()
    first = self._first = self._first or (step, now)
    if self._begun and step == first[0] < self._steps:   # there is no rate yet
      return
    terminal = sys.stdout.isatty()
    if not terminal and now - self._shown < 10 and step < self._steps:
      return
    self._shown = now
    since, begun = first if step > first[0] else (self._done, self._start)
    each = (now - begun) / max(1, step - since)
    finite = losses[np.isfinite(losses)]
    loss = np.mean(finite) if finite.size else np.nan
    text = (f'step {step:,}/{self._steps:,} | {1e3 * each / self._nets:.2f} ms a step and network | '
            f'loss {loss:.4f} | {clock(each * (self._steps - step))} left')
    if jax.process_index() == 0:
      print(f'\r\x1b[K{text}' if terminal else text, end='' if terminal else '\n', flush=True)

  def end(self) -> None:
    if sys.stdout.isatty() and jax.process_index() == 0:
      print()


def clock(seconds: float) -> str:
  minutes, rest = divmod(round(seconds), 60)
  hours, minutes = divmod(minutes, 60)
  return f'{hours} h {minutes:02d} min' if hours else f'{minutes} min {rest:02d} s'

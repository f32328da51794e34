"""From the number of optimiser updates to how sparse a network is, or how much of it is exchanged. Steps count applied updates.

`n` is the number of updates applied so far, the current one included: an int32 scalar, traced or not.
"""
import numbers

import jax
import jax.numpy as jnp

Step = int | jax.Array


def due(n: Step, start_step: int, end_step: int, every_steps: int) -> jax.Array:
  """Is n one of start, start + every, start + 2 every, ..., end? The end is always one, also off that grid.

  Returns: bool scalar.
  """
  n = jnp.asarray(n)
  on_grid = (n >= start_step) & (n < end_step) & ((n - start_step) % every_steps == 0)
  return on_grid | (n == end_step)


def cubic(n: Step, start_step: int, end_step: int) -> jax.Array:
  """Share of the way from dense to sparse: 1 − (1 − (n − start) / (end − start))³; 0 before the start, exactly 1 from the end on.

  Returns: float32 scalar.
  Source: Zhu & Gupta 2017 (arXiv:1710.01878), eq. (1).
  """
  span = max(end_step - start_step, 1)
  left = jnp.clip((end_step - jnp.asarray(n)).astype(jnp.float32) / span, 0, 1)
  return 1 - left ** 3


def cosine(n: Step, end_step: int, initial: float) -> jax.Array:
  """Drop fraction (initial / 2)(1 + cos(π n / end)), 0 from the end on.

  Returns: float32 scalar.
  Source: Evci et al. 2020 (RigL, arXiv:1911.11134), section 3.
  """
  way = jnp.clip(jnp.asarray(n).astype(jnp.float32) / end_step, 0, 1)
  return initial / 2 * (1 + jnp.cos(jnp.pi * way))


def is_integer(value: object) -> bool:
  """Of Python or of NumPy, and no bool."""
  return isinstance(value, numbers.Integral) and not isinstance(value, bool)


def check_exchanges(end_step: int, every_steps: int) -> None:
  """Raises ValueError unless there is an exchange, at `every_steps`, before the masks settle."""
  check_steps(0, end_step, every_steps)
  if every_steps >= end_step:
    raise ValueError(f'nothing would ever be exchanged: the first exchange is at every_steps={every_steps}, and from '
                     f'end_step={end_step} on masks stay.')


def check_steps(start_step: int, end_step: int, every_steps: int) -> None:
  """Raises ValueError unless the schedule has at least one update, its end, which does not come before its start."""
  for name, value, least in (('start_step', start_step, 0), ('end_step', end_step, 1), ('every_steps', every_steps, 1)):
    if not is_integer(value) or value < least:
      raise ValueError(f'{name} must be an integer of at least {least}, got {value!r}.')
  if start_step > end_step:
    raise ValueError(f'a schedule must not end before it starts: start_step={start_step}, end_step={end_step}.')

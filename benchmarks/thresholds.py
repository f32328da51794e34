"""Times of the exact k-th largest magnitude: `python -m benchmarks.thresholds [--quick]`.

Against bisection and a sort at 25.5 M float32, the weights of a ResNet-50, and over n from 1e5 to 1e8.
Candidates take turns in one process, so that what else the machine does falls on all of them alike.
"""
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from powerprop.masks import top_k
from powerprop.thresholds import kth_largest

RESNET50 = 25_500_000


def bisection(x: jax.Array, k: jax.Array) -> jax.Array:
  """The k-th largest |x| a bit at a time: what `kth_largest` has to beat."""
  bits = lax.bitcast_convert_type(jnp.abs(x), jnp.int32)

  def narrow(i: Any, low: jax.Array) -> jax.Array:
    middle = low | (jnp.int32(1) << (30 - i))
    return jnp.where(jnp.sum(bits >= middle) >= k, middle, low)

  return lax.bitcast_convert_type(lax.fori_loop(0, 31, narrow, jnp.int32(0)), jnp.float32)


def by_sort(x: jax.Array, k: jax.Array) -> jax.Array:
  return jnp.sort(jnp.abs(x))[x.size - k]


def run(quick: bool) -> list[dict[str, Any]]:
  """Rows of name, value, unit and target, None where there is none. quick leaves out 1e8 and repeats less."""
  repeats = 5 if quick else 15
  x = jax.random.normal(jax.random.key(0), (RESNET50,))
  k = jnp.int32(RESNET50 // 10)
  seconds = medians({'kth_largest': kth_largest, 'top_k': top_k, 'bisection': bisection}, x, k, repeats)
  seconds |= medians({'jnp.sort': by_sort}, x, k, 1 if quick else 3)
  rows = [row(f'{name}, 25.5 M float32', value, 's', 0.225 if name == 'kth_largest' else None)
          for name, value in seconds.items()]
  rows += [row(f'{name} / kth_largest', seconds[name] / seconds['kth_largest'], '×')
           for name in ('bisection', 'jnp.sort')]
  for n in (10 ** 5, 10 ** 6, 10 ** 7) if quick else (10 ** 5, 10 ** 6, 10 ** 7, 10 ** 8):
    x = jax.random.normal(jax.random.key(1), (n,))
    found = medians({'kth_largest': kth_largest}, x, jnp.int32(n // 10), repeats)
    rows.append(row(f'kth_largest, n = {n:.0e}', found['kth_largest'] / n * 1e9, 'ns per entry'))
  return rows


def row(name: str, value: float, unit: str, target: float | None = None) -> dict[str, Any]:
  return {'name': name, 'value': value, 'unit': unit, 'target': target}


def medians(functions: dict[str, Callable[..., jax.Array]], x: jax.Array, k: jax.Array,
            repeats: int) -> dict[str, float]:
  """Median seconds of every function, which take turns; compilation and first call are left out."""
  programs = {name: jax.jit(f).lower(x, k).compile() for name, f in functions.items()}
  times: dict[str, list[float]] = {name: [] for name in programs}
  for turn in range(repeats + 1):
    for name, program in programs.items():
      start = time.perf_counter()
      jax.block_until_ready(program(x, k))
      if turn:
        times[name].append(time.perf_counter() - start)
  return {name: statistics.median(found) for name, found in times.items()}


def main() -> None:
  for found in run('--quick' in sys.argv):
    target = '' if found['target'] is None else f'  (at most {found["target"]:g})'
    print(f'{found["name"]:36} {found["value"]:10.4g} {found["unit"]}{target}')


if __name__ == '__main__':
  main()

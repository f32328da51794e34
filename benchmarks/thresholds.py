"""Times of the exact k-th largest magnitude: bisection and a sort at 25.5 M float32, the weights of a ResNet-50,
and over n from 1e5 to 1e8."""
import statistics
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from benchmarks.paired import Row, Times, ratio, row, take_turns
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


def run(quick: bool) -> list[Row]:
  """quick leaves out the sort and 1e8, and repeats less."""
  rounds = 5 if quick else 15
  x, k = jax.random.normal(jax.random.key(0), (RESNET50,)), jnp.int32(RESNET50 // 10)
  times = measure({'kth_largest': kth_largest, 'top_k': top_k, 'bisection': bisection}, x, k, rounds)
  rows = [seconds(name, found, 0.225 if name == 'kth_largest' else None) for name, found in times.items()]
  rows.append(ratio('bisection / kth_largest', times['bisection'], times['kth_largest']))
  if not quick:
    slow = measure({'jnp.sort': by_sort, 'kth_largest': kth_largest}, x, k, 3)
    rows += [seconds('jnp.sort', slow['jnp.sort']), ratio('jnp.sort / kth_largest', slow['jnp.sort'], slow['kth_largest'])]
  for n in (10 ** 5, 10 ** 6, 10 ** 7) if quick else (10 ** 5, 10 ** 6, 10 ** 7, 10 ** 8):
    x = jax.random.normal(jax.random.key(1), (n,))
    found = measure({'kth_largest': kth_largest}, x, jnp.int32(n // 10), rounds)['kth_largest']
    rows.append(row(f'kth_largest, n = {n:.0e}', statistics.median(found.wall) / n * 1e9, 'ns per entry'))
  return rows


def seconds(name: str, times: Times, target: float | None = None) -> Row:
  return row(f'{name}, 25.5 M float32', statistics.median(times.wall), 's', target, low=min(times.wall), high=max(times.wall))


def measure(functions: Mapping[str, Callable[..., jax.Array]], x: jax.Array, k: jax.Array, rounds: int) -> dict[str, Times]:
  """Times of the compiled functions of (x, k)."""
  def waits(f: Callable[..., jax.Array]) -> Callable[[], Any]:
    jitted = jax.jit(f)
    return lambda: jax.block_until_ready(jitted(x, k))
  return take_turns({name: waits(f) for name, f in functions.items()}, rounds)

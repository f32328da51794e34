"""Both gradients of a convolution inside a compiled loop on CPUs: ours against JAX's own rule, and against convolutions alone.

The layers of the 16-32-64 network, and one of the first of a ResNet-20, at batch 125.
"""
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from benchmarks.paired import Row, ratio, row, take_turns
from experiments.convolution import NHWC, conv

BATCH = 125
LAYERS = ((32, 3, 16, 1), (32, 16, 32, 2), (16, 32, 64, 2), (32, 16, 16, 1))   # side of the images, channels, kinds, stride
Gradients = Callable[[jax.Array, jax.Array, jax.Array, int], tuple[jax.Array, jax.Array]]   # images, kernel, gradient, stride


def ours(x: jax.Array, w: jax.Array, g: jax.Array, stride: int) -> tuple[jax.Array, jax.Array]:
  return jax.vjp(lambda x, w: conv(x, w, (stride, stride), 'SAME'), x, w)[1](g)


def by_jax(x: jax.Array, w: jax.Array, g: jax.Array, stride: int) -> tuple[jax.Array, jax.Array]:
  return jax.vjp(lambda x, w: lax.conv_general_dilated(x, w, (stride, stride), 'SAME', dimension_numbers=NHWC), x, w)[1](g)


def by_convolutions(x: jax.Array, w: jax.Array, g: jax.Array, stride: int) -> tuple[jax.Array, jax.Array]:
  """JAX's rule with images and kernels in the order that XLA's fast routine takes: a kernel as large as an image, and zeros
  between the gradients of a stride."""
  pads = lax.padtype_to_pads(x.shape[1:3], w.shape[:2], (stride, stride), 'SAME')
  around_g, around_x = [], []
  for size, kernel, out, (low, _) in zip(x.shape[1:3], w.shape[:2], g.shape[1:3], pads, strict=True):
    spread = (out - 1) * stride + 1
    around_g.append((kernel - 1 - low, size - spread + low))
    around_x.append((low, kernel - 1 + spread - size - low))
  dx = lax.conv_general_dilated(g, jnp.flip(w, (0, 1)).swapaxes(2, 3), (1, 1), around_g, (stride, stride), dimension_numbers=NHWC)
  dw = lax.conv_general_dilated(x.transpose(3, 1, 2, 0), g.transpose(1, 2, 0, 3), (1, 1), around_x, None, (stride, stride), NHWC)
  return dx, dw.transpose(1, 2, 0, 3)


def arrays(layer: tuple[int, int, int, int], batch: int) -> tuple[jax.Array, jax.Array, jax.Array]:
  """Images, kernel and gradient of a layer."""
  side, channels, kinds, stride = layer
  shapes = (batch, side, side, channels), (3, 3, channels, kinds), (batch, side // stride, side // stride, kinds)
  x, w, g = (jax.random.normal(jax.random.key(i), shape) for i, shape in enumerate(shapes))
  return x, w, g


def looped(gradients: Gradients, layer: tuple[int, int, int, int], steps: int) -> Callable[[], Any]:
  """`steps` times both gradients in one compiled loop, each from what the one before has left."""
  x, w, g = arrays(layer, BATCH)

  @jax.jit
  def loop(x: jax.Array, w: jax.Array) -> Any:
    def one(i: Any, carry: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
      return jax.tree.map(lambda a, b: a - 1e-6 * b, carry, gradients(*carry, g, layer[3]))
    return lax.fori_loop(0, steps, one, (x, w))
  return lambda: jax.block_until_ready(loop(x, w))


def run(quick: bool) -> list[Row]:
  """quick leaves out JAX's own rule, and repeats less."""
  rows, steps = [], 2 if quick else 5
  for layer in LAYERS:
    name = '{0}×{0}, {1} → {2} channels, stride {3}'.format(*layer)
    times = take_turns({'ours': looped(ours, layer, steps), 'convolutions': looped(by_convolutions, layer, steps)},
                       3 if quick else 7)
    rows += [row(f'gradients of a convolution, {name}', 1e3 * min(times['ours'].cpu) / steps, 'ms of CPU'),
             ratio('convolutions alone / that', times['convolutions'], times['ours'])]
    if not quick:
      slow = take_turns({'ours': looped(ours, layer, 1), 'jax': looped(by_jax, layer, 1)}, 3)
      rows.append(ratio("JAX's own rule / that", slow['jax'], slow['ours']))
  return rows

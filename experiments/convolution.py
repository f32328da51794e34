"""Convolutions that train fast inside compiled loops on CPUs too."""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import haiku as hk
import jax
import jax.numpy as jnp
from jax import lax

Pads = tuple[tuple[int, int], ...]   # before and after rows, and columns
NHWC = ('NHWC', 'HWIO', 'NHWC')      # images, kernel, result: the one order of axes that XLA's fast routine on CPUs takes


def conv(x: jax.Array, w: jax.Array, stride: Sequence[int], padding: str, precision: lax.Precision | None = None) -> jax.Array:
  """lax's convolution, with gradients that are fast inside loops on CPUs.

    ∂L/∂x = the gradient convolved with the kernel turned by 180°, where each pixel within a stride takes its own taps
    ∂L/∂w = Σ over images of (the pixels under each tap)ᵀ · the gradient

  JAX's own rule has convolutions with other orders of axes. XLA brings those into order where a program begins, and not inside
  its loops, where they take 20 to 50 times as long on CPUs (github.com/jax-ml/jax/issues/12868). In order, ∂L/∂w still has a
  kernel as large as an image, which XLA's routine is slow at: products of matrices, few images at a time so that they stay in the
  cache, take down to half of the time (`python -m benchmarks --only=convolutions`). Strides cost no products with zeros. As with
  every custom gradient, forward mode works on the gradient and not on the function.

  Args:
    x: [B, H, W, C].
    w: [h, w, C, D].
    stride: of rows and columns.
    padding: 'SAME' or 'VALID'.
    precision: of the products.
  Returns: [B, H', W', D].
  """
  pads = tuple(lax.padtype_to_pads(x.shape[1:3], w.shape[:2], stride, padding))
  if any(size + low + high < kernel for size, (low, high), kernel in zip(x.shape[1:3], pads, w.shape, strict=False)):
    return lax.conv_general_dilated(x, w, stride, padding, dimension_numbers=NHWC, precision=precision)   # nothing comes out
  return _conv(x, w, tuple(stride), pads, precision)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3, 4))
def _conv(x: jax.Array, w: jax.Array, stride: tuple[int, ...], pads: Pads, precision: lax.Precision | None) -> jax.Array:
  return _plain(x, w, stride, pads, precision)


def _forward(x: jax.Array, w: jax.Array, stride: tuple[int, ...], pads: Pads,
             precision: lax.Precision | None) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
  # Not _conv itself: products with a Hessian differentiate this once more, in forward mode.
  return _plain(x, w, stride, pads, precision), (x, w)


def _plain(x: jax.Array, w: jax.Array, stride: tuple[int, ...], pads: Sequence[tuple[int, int]],
           precision: lax.Precision | None) -> jax.Array:
  """lax's convolution; of images smaller than the kernel, where XLA's takes 3 to 80 times as long, a product of matrices."""
  if all(size >= kernel for size, kernel in zip(x.shape[1:3], w.shape[:2], strict=True)):
    return lax.conv_general_dilated(x, w, stride, pads, dimension_numbers=NHWC, precision=precision)
  padded = lax.pad(x, jnp.zeros((), x.dtype), ((0, 0, 0), *((low, high, 0) for low, high in pads), (0, 0, 0)))
  shape = [(size - kernel) // step + 1 for size, kernel, step in zip(padded.shape[1:3], w.shape[:2], stride, strict=True)]
  under = jnp.concatenate([pixels for r in range(w.shape[0]) for pixels in _under(padded, r, w.shape[1], shape, stride)], -1)
  return jnp.dot(under.reshape(-1, under.shape[-1]), w.reshape(-1, w.shape[-1]), precision=precision).reshape(
      len(x), *shape, w.shape[-1])


def _under(padded: jax.Array, row: int, width: int, shape: Sequence[int], stride: Sequence[int]) -> list[jax.Array]:
  """The pixels under each tap in a row of the kernel, for results of this shape."""
  rows = padded[:, row:row + (shape[0] - 1) * stride[0] + 1:stride[0]]
  return [rows[:, :, c:c + (shape[1] - 1) * stride[1] + 1:stride[1]] for c in range(width)]


def _backward(stride: tuple[int, ...], pads: Pads, precision: lax.Precision | None, saved: tuple[jax.Array, jax.Array],
              g: jax.Array) -> tuple[jax.Array, jax.Array]:
  x, w = saved
  return _gradient_of_images(x, w, g, stride, pads, precision), _gradient_of_kernel(x, w, g, stride, pads, precision)


def _gradient_of_images(x: jax.Array, w: jax.Array, g: jax.Array, stride: tuple[int, ...], pads: Pads,
                        precision: lax.Precision | None) -> jax.Array:
  """Pixel stride·b + p of x met tap i in the result b - m, where i - low = stride·m + p: one result for each b, with all p."""
  around_g, around_w, around_dx, split = [], [], [], []
  for size, kernel, out, step, (low, _) in zip(x.shape[1:3], w.shape[:2], g.shape[1:3], stride, pads, strict=True):
    first, last = -low // step, (kernel - 1 - low) // step   # of m
    taps = last - first + 1
    zeros = (-low - step * first, step * taps - kernel + low + step * first)   # taps that there are not: no products with them
    around_w.append(zeros if taps > 1 else (0, 0))
    around_dx.append(zeros if taps == 1 else (0, 0))
    around_g.append((last, -(-size // step) - out - first))
    split += [taps, step if taps > 1 else kernel]
  (rows, down, columns, across), channels = split, w.shape[2:]
  turned = jnp.flip(jnp.pad(w, (*around_w, (0, 0), (0, 0))).reshape(*split, *channels), (0, 2)).transpose(0, 2, 5, 1, 3, 4)
  dx = _plain(g, turned.reshape(rows, columns, channels[1], down * across * channels[0]), (1, 1), around_g, precision)
  high, wide = dx.shape[1:3]
  dx = jnp.pad(dx.reshape(-1, high, wide, down, across, channels[0]), ((0, 0), (0, 0), (0, 0), *around_dx, (0, 0)))
  dx = dx.transpose(0, 1, 3, 2, 4, 5)
  return dx.reshape(-1, high * stride[0], wide * stride[1], channels[0])[:, :x.shape[1], :x.shape[2]]


def _gradient_of_kernel(x: jax.Array, w: jax.Array, g: jax.Array, stride: tuple[int, ...], pads: Pads,
                        precision: lax.Precision | None) -> jax.Array:
  """Every so-manyth image together, not neighbours, so that a batch that is spread over devices stays where it is."""
  padded = jnp.pad(x, ((0, 0), *pads, (0, 0)))
  height, width, channels, kinds = w.shape
  together = math.gcd(len(x), 8)

  def add(i: jax.Array, total: jax.Array) -> jax.Array:
    images, there = (lax.dynamic_index_in_dim(a.reshape(together, -1, *a.shape[1:]), i, 1, keepdims=False) for a in (padded, g))
    there = there.reshape(-1, kinds)
    taps = []
    for r in range(height):
      under = _under(images, r, width, g.shape[1:3], stride)
      taps.append(jnp.dot(jnp.concatenate(under, -1).reshape(-1, width * channels).T, there, precision=precision,
                          preferred_element_type=total.dtype))
    return total + jnp.stack(taps).reshape(total.shape)

  total = jnp.zeros(w.shape, jnp.promote_types(w.dtype, jnp.float32))
  return lax.fori_loop(0, len(x) // together, add, total).astype(w.dtype)


_conv.defvjp(_forward, _backward)


def on_cpus(call: Callable[..., jax.Array], args: tuple[jax.Array, ...], kwargs: dict[str, Any], context: Any) -> jax.Array:
  """For `hk.intercept_methods`: every hk.Conv2D on CPUs by `conv`, with the same parameters and results, up to rounding.

  Elsewhere, and what `conv` cannot do (dilation, groups, masks, channels first, other paddings), is left to Haiku; so are classes
  derived from it, whose own methods would be passed over.
  """
  layer = context.module
  if type(layer) is not hk.Conv2D or context.method_name != '__call__' or jax.default_backend() != 'cpu':
    return call(*args, **kwargs)
  if len(args) != 1 or not isinstance(args[0], jax.Array) or not kwargs.keys() <= {'precision'}:
    return call(*args, **kwargs)
  plain = (layer.padding in ('SAME', 'VALID') and layer.channel_index == -1 and layer.mask is None
           and layer.feature_group_count == 1 and layer.kernel_dilation == (1, 1))
  if not plain or args[0].ndim != 4:
    return call(*args, **kwargs)
  (x,), shape = args, (*layer.kernel_shape, args[0].shape[-1], layer.output_channels)
  init = layer.w_init or hk.initializers.TruncatedNormal(1 / math.sqrt(math.prod(shape[:-1])))   # Haiku's own
  out = conv(x, hk.get_parameter('w', shape, x.dtype, init=init), layer.stride, layer.padding, **kwargs)
  if layer.with_bias:
    out += jnp.broadcast_to(hk.get_parameter('b', shape[-1:], x.dtype, init=layer.b_init), out.shape)
  return out

"""Convolutions that train fast inside compiled loops on CPUs too."""

import functools
import math
from collections.abc import Sequence

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
  return _conv(x, w, tuple(stride), pads, precision)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3, 4))
def _conv(x: jax.Array, w: jax.Array, stride: tuple[int, ...], pads: Pads, precision: lax.Precision | None) -> jax.Array:
  return lax.conv_general_dilated(x, w, stride, pads, dimension_numbers=NHWC, precision=precision)


def _forward(x: jax.Array, w: jax.Array, stride: tuple[int, ...], pads: Pads,
             precision: lax.Precision | None) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
  # Not _conv itself: products with a Hessian differentiate this once more, in forward mode.
  return lax.conv_general_dilated(x, w, stride, pads, dimension_numbers=NHWC, precision=precision), (x, w)


def _backward(stride: tuple[int, ...], pads: Pads, precision: lax.Precision | None, saved: tuple[jax.Array, jax.Array],
              g: jax.Array) -> tuple[jax.Array, jax.Array]:
  x, w = saved
  return _gradient_of_images(x, w, g, stride, pads, precision), _gradient_of_kernel(x, w, g, stride, pads, precision)


def _gradient_of_images(x: jax.Array, w: jax.Array, g: jax.Array, stride: tuple[int, ...], pads: Pads,
                        precision: lax.Precision | None) -> jax.Array:
  """Pixel stride·b + p of x met tap i in the result b - m, where i - low = stride·m + p: one result for each b, with all p."""
  around_g, around_w, split = [], [], []
  for size, kernel, out, step, (low, _) in zip(x.shape[1:3], w.shape[:2], g.shape[1:3], stride, pads, strict=True):
    first, last = -low // step, (kernel - 1 - low) // step   # of m
    taps = last - first + 1
    around_w.append((-low - step * first, step * taps - kernel + low + step * first))
    around_g.append((last, -(-size // step) - out - first))
    split += [taps, step]
  (rows, down, columns, across), channels = split, w.shape[2:]
  turned = jnp.flip(jnp.pad(w, (*around_w, (0, 0), (0, 0))).reshape(*split, *channels), (0, 2)).transpose(0, 2, 5, 1, 3, 4)
  dx = lax.conv_general_dilated(g, turned.reshape(rows, columns, channels[1], down * across * channels[0]), (1, 1), around_g,
                                dimension_numbers=NHWC, precision=precision)
  high, wide = dx.shape[1:3]
  dx = dx.reshape(-1, high, wide, down, across, channels[0]).transpose(0, 1, 3, 2, 4, 5)
  return dx.reshape(-1, high * down, wide * across, channels[0])[:, :x.shape[1], :x.shape[2]]


def _gradient_of_kernel(x: jax.Array, w: jax.Array, g: jax.Array, stride: tuple[int, ...], pads: Pads,
                        precision: lax.Precision | None) -> jax.Array:
  """Every so-manyth image together, not neighbours, so that a batch that is spread over devices stays where it is."""
  padded = jnp.pad(x, ((0, 0), *pads, (0, 0)))
  (height, width, channels, kinds), (rows, columns) = w.shape, g.shape[1:3]
  together = math.gcd(len(x), 8)

  def add(i: jax.Array, total: jax.Array) -> jax.Array:
    images, there = (lax.dynamic_index_in_dim(a.reshape(together, -1, *a.shape[1:]), i, 1, keepdims=False) for a in (padded, g))
    there = there.reshape(-1, kinds)
    taps = []
    for r in range(height):
      under = [images[:, r:r + (rows - 1) * stride[0] + 1:stride[0], c:c + (columns - 1) * stride[1] + 1:stride[1]]
               for c in range(width)]
      taps.append(jnp.dot(jnp.concatenate(under, -1).reshape(-1, width * channels).T, there, precision=precision,
                          preferred_element_type=total.dtype))
    return total + jnp.stack(taps).reshape(total.shape)

  total = jnp.zeros(w.shape, jnp.promote_types(w.dtype, jnp.float32))
  return lax.fori_loop(0, len(x) // together, add, total).astype(w.dtype)


_conv.defvjp(_forward, _backward)


class Conv2D(hk.Conv2D):
  """hk.Conv2D with the same parameters and results, up to rounding: by `conv` on CPUs, as Haiku's elsewhere.

  Images [B, H, W, C]; padding is 'SAME' or 'VALID'. Of Haiku's options it has those that are the same on both roads.
  """

  def __init__(self, output_channels: int, kernel_shape: int | Sequence[int], stride: int | Sequence[int] = 1,
               padding: str = 'SAME', with_bias: bool = True, *, w_init: hk.initializers.Initializer,
               b_init: hk.initializers.Initializer | None = None, name: str | None = None):
    if padding not in ('SAME', 'VALID'):
      raise ValueError(f"padding must be 'SAME' or 'VALID', got {padding!r}.")
    super().__init__(output_channels, kernel_shape, stride, padding=padding, with_bias=with_bias, w_init=w_init, b_init=b_init,
                     name=name)

  def __call__(self, inputs: jax.Array, *, precision: lax.Precision | None = None) -> jax.Array:
    if jax.default_backend() != 'cpu':
      return super().__call__(inputs, precision=precision)
    shape = (*self.kernel_shape, inputs.shape[-1], self.output_channels)
    w = hk.get_parameter('w', shape, inputs.dtype, init=self.w_init)
    out = conv(inputs, w, self.stride, self.padding, precision)
    if self.with_bias:
      out += jnp.broadcast_to(hk.get_parameter('b', (self.output_channels,), inputs.dtype, init=self.b_init), out.shape)
    return out

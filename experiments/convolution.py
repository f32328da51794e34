"""Convolutions that train fast inside compiled loops on CPUs too."""

import functools
from collections.abc import Sequence

import haiku as hk
import jax
import jax.numpy as jnp
from jax import lax

Pads = tuple[tuple[int, int], ...]   # before and after rows, and columns
NHWC = ('NHWC', 'HWIO', 'NHWC')      # images, kernel, result: the one order of axes that XLA's fast routine on CPUs takes


def conv(x: jax.Array, w: jax.Array, stride: Sequence[int], padding: str, precision: lax.Precision | None = None) -> jax.Array:
  """lax's convolution, with gradients that are convolutions of images [B, H, W, C] and kernels [h, w, C, D] themselves.

    ∂L/∂x = the gradient, spread out by the stride, convolved with the kernel turned by 180°
    ∂L/∂w = x with channels for batch, convolved with the gradient, spread out by the stride, as kernel

  JAX's own rule has the same products in other orders of axes. XLA brings those into order where a program begins, and not inside
  its loops, where they take 20 to 50 times as long on CPUs (github.com/jax-ml/jax/issues/12868). Here they are in order. As with
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
  around_g, around_x = [], []
  for size, kernel, out, step, (low, _) in zip(x.shape[1:3], w.shape[:2], g.shape[1:3], stride, pads, strict=True):
    spread = (out - 1) * step + 1
    around_g.append((kernel - 1 - low, size - spread + low))
    around_x.append((low, kernel - 1 + spread - size - low))
  turned = jnp.flip(w, (0, 1)).swapaxes(2, 3)
  dx = lax.conv_general_dilated(g, turned, (1, 1), around_g, stride, dimension_numbers=NHWC, precision=precision)
  dw = lax.conv_general_dilated(x.transpose(3, 1, 2, 0), g.transpose(1, 2, 0, 3), (1, 1), around_x, rhs_dilation=stride,
                                dimension_numbers=NHWC, precision=precision)
  return dx, dw.transpose(1, 2, 0, 3)


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

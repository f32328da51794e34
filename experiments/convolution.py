"""Convolutions that are fast inside compiled loops on CPUs too."""

from collections.abc import Sequence

import haiku as hk
import jax
import jax.numpy as jnp
from jax import lax


def conv_by_product(x: jax.Array, w: jax.Array, stride: Sequence[int], padding: str,
                    precision: lax.Precision | None = None) -> jax.Array:
  """Convolution as one matrix product: the shifted images side by side as channels, times the kernel.

  XLA's own convolution is 20 to 50 times slower inside a `lax` loop than outside on CPUs (github.com/jax-ml/jax/issues/12868);
  products are not. The price is memory: kernel height times kernel width the input.

  Args:
    x: [B, H, W, C].
    w: [h, w, C, D].
    stride: of rows and columns.
    padding: 'SAME' or 'VALID'.
    precision: of the product.
  Returns: [B, H', W', D].
  """
  pads = lax.padtype_to_pads(x.shape[1:3], w.shape[:2], stride, padding)
  x = jnp.pad(x, ((0, 0), *pads, (0, 0)))
  # The last shift that is used along an axis begins at size − kernel, rounded down to a multiple of the stride.
  ends = [size - kernel + 1 for size, kernel in zip(x.shape[1:3], w.shape[:2], strict=True)]
  shifted = [x[:, i:i + ends[0]:stride[0], j:j + ends[1]:stride[1]] for i in range(w.shape[0]) for j in range(w.shape[1])]
  return jnp.matmul(jnp.concatenate(shifted, axis=-1), w.reshape(-1, w.shape[-1]), precision=precision)


class Conv2D(hk.Conv2D):
  """hk.Conv2D with the same parameters and results, up to rounding: by one matrix product on CPUs, as Haiku's elsewhere.

  Takes stride, padding 'SAME' or 'VALID', bias and initialisers; no dilation, groups or masks. `w_init` must be given.
  """

  def __call__(self, inputs: jax.Array, *, precision: lax.Precision | None = None) -> jax.Array:
    if jax.default_backend() != 'cpu':
      return super().__call__(inputs, precision=precision)
    shape = (*self.kernel_shape, inputs.shape[-1], self.output_channels)
    w = hk.get_parameter('w', shape, inputs.dtype, init=self.w_init)
    out = conv_by_product(inputs, w, self.stride, self.padding, precision)
    if self.with_bias:
      out += jnp.broadcast_to(hk.get_parameter('b', (self.output_channels,), inputs.dtype, init=self.b_init), out.shape)
    return out

"""Haiku forward functions, images → logits."""
from collections.abc import Callable
from typing import Any, NamedTuple

import haiku as hk
import jax
import jax.numpy as jnp

from powerprop.reparam import Where, is_weight


class Model(NamedTuple):
  forward: Callable[[jax.Array], jax.Array]   # images [B, H, W, C] in [0, 1] → logits [B, classes]
  output_layer: str                            # name of the output layer's weights


def lenet_300_100(classes: int, bias_stddev: float) -> Model:
  """LeNet-300-100: 784-300-100-`classes` with ReLU for 28×28 images.

  Weights are drawn from a normal distribution with standard deviation 1/sqrt(fan-in), truncated at two of them (Haiku's own
  default); biases likewise with `bias_stddev`, or zero where that is 0.
  Source: LeCun et al. 1998; the initialisation is that of the paper's released notebook.
  """
  b_init = hk.initializers.TruncatedNormal(bias_stddev) if bias_stddev else jnp.zeros

  def forward(images: jax.Array, is_training: bool) -> jax.Array:
    return hk.nets.MLP([300, 100, classes], b_init=b_init)(hk.Flatten()(images))

  return Model(forward, 'mlp/~/linear_2/w')


def is_weight_or_bias(name: str, leaf: Any) -> bool:
  return is_weight(name, leaf) or name.endswith('/b')


MODELS: dict[str, Callable[[int, float], Model]] = {
    'lenet_300_100': lenet_300_100,
}

# What α acts on, next to the weights.
BIASES: dict[str, Where] = {
    'plain': is_weight,
    'reparameterised': is_weight_or_bias,
}

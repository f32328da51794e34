"""Names in a config → optax chains."""
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import optax

import powerprop
from powerprop.reparam import is_weight, leaf_name

Builder = Callable[[Any, ml_collections.ConfigDict], optax.GradientTransformation]

# (learning rate, config) → chain. The rate may be traced: networks that differ in it alone are trained as one group.
OPTIMIZERS: dict[str, Builder] = {
    'sgd': lambda rate, config: optax.sgd(scheduled(rate, config)),
    'momentum': lambda rate, config: optax.sgd(scheduled(rate, config), momentum=config.momentum),
    'momentum_decay': lambda rate, config: optax.chain(
        optax.add_decayed_weights(config.weight_decay, mask=weights_alone),
        optax.sgd(scheduled(rate, config), momentum=config.momentum)),
    'adam': lambda rate, config: optax.adam(scheduled(rate, config)),
    'adamw': lambda rate, config: optax.adamw(scheduled(rate, config), weight_decay=config.weight_decay),
}

# Steps of the whole training → (step → share of the learning rate); None: all of it, throughout.
SCHEDULES: dict[str, Callable[[int], optax.Schedule] | None] = {
    'constant': None,
    'steps': lambda steps: tenfold_steps(steps),
    'cosine': lambda steps: optax.warmup_cosine_decay_schedule(0.0, 1.0, max(1, steps // 20), steps),
}


def tenfold_steps(steps: int) -> optax.Schedule:
  """Linear warm-up over a twentieth of the training, a tenth of the rate from 30, 70 and 90 % of it on each time.

  Source: the recipe for ResNet-50 on ImageNet of RigL's authors (Evci et al. 2020, arXiv:1911.11134): 5, and 30, 70 and 90 of
  some 100 epochs.
  """
  falls = optax.piecewise_constant_schedule(1.0, {round(share * steps): 0.1 for share in (0.3, 0.7, 0.9)})
  warm_up = max(1, steps // 20)
  return lambda step: falls(step) * jnp.minimum(1.0, step / warm_up)


def scheduled(rate: Any, config: ml_collections.ConfigDict) -> Any:
  """The rate, or its schedule: a function of the step."""
  make = SCHEDULES[config.schedule]
  if make is None:
    return rate
  share = make(config.steps)
  return lambda step: rate * share(step)


def phi_decay(rate: Any, config: ml_collections.ConfigDict) -> optax.GradientTransformation:
  """u ← u − rate · phi_decay · φ: decay of the stored weights on its own, without momentum. It is the gradient of
  ½ · phi_decay · Σ φ², which is a penalty on |θ|^(2/α)."""
  step_size = scheduled(rate, config)
  share = (lambda step: -config.phi_decay * step_size(step)) if callable(step_size) else -config.phi_decay * step_size
  return optax.add_decayed_weights(share, mask=weights_alone)


def weights_alone(params: Any) -> Any:
  """True for weights: biases and BatchNorm's parameters do not decay."""
  return jax.tree_util.tree_map_with_path(lambda path, x: is_weight(leaf_name(path), x), params)


UPDATES = {
    'target_propagation': powerprop.target_propagation,
    'backpropagation': powerprop.backpropagation,
}

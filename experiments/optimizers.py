"""Names in a config → optax chains."""
from collections.abc import Callable
from typing import Any

import jax
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
    'cosine': lambda steps: optax.warmup_cosine_decay_schedule(0.0, 1.0, max(1, steps // 20), steps),
}


def scheduled(rate: Any, config: ml_collections.ConfigDict) -> Any:
  """The rate, or its schedule: a function of the step."""
  make = SCHEDULES[config.schedule]
  if make is None:
    return rate
  share = make(config.steps)
  return lambda step: rate * share(step)


def weights_alone(params: Any) -> Any:
  """True for weights: biases and BatchNorm's parameters do not decay."""
  return jax.tree_util.tree_map_with_path(lambda path, x: is_weight(leaf_name(path), x), params)


UPDATES = {
    'target_propagation': powerprop.target_propagation,
    'backpropagation': powerprop.backpropagation,
}

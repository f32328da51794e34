"""Names in a config → optax chains."""
from collections.abc import Callable
from typing import Any

import ml_collections
import optax

import powerprop

Builder = Callable[[Any, ml_collections.ConfigDict], optax.GradientTransformation]

# (learning rate, config) → chain. The rate may be traced: networks that differ in it alone are trained as one group.
OPTIMIZERS: dict[str, Builder] = {
    'sgd': lambda rate, config: optax.sgd(rate),
    'momentum': lambda rate, config: optax.sgd(rate, momentum=config.momentum),
    'adam': lambda rate, config: optax.adam(rate),
    'adamw': lambda rate, config: optax.adamw(rate, weight_decay=config.weight_decay),
}

UPDATES = {
    'target_propagation': powerprop.target_propagation,
    'backpropagation': powerprop.backpropagation,
}

"""Names in a config → what makes networks sparse while they train."""
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections

from experiments.train import OwnParameters
from powerprop import distributions, updaters
from powerprop.distributions import Distribution
from powerprop.parameterisations import Parameterisation, hard_concrete, soft_threshold, square_difference
from powerprop.reparam import Tree, leaf_name
from powerprop.sparse import SparsityUpdater

DISTRIBUTIONS: dict[str, Distribution] = {
    'uniform': distributions.uniform, 'erk': distributions.erk, 'global': distributions.globally}


def layers(config: ml_collections.ConfigDict) -> dict[str, Any]:
  """What every updater takes: which layers are made sparse, and how a sparsity is shared out among them."""
  return {'distribution': DISTRIBUTIONS[config.sparse.distribution], 'dense': config.sparse.dense}


def step_at(share: float, config: ml_collections.ConfigDict) -> int:
  """The update at a share of the training: the last one at 1."""
  return max(1, round(share * config.steps))


def exchange(config: ml_collections.ConfigDict) -> dict[str, Any]:
  """What updaters that exchange weights take."""
  return layers(config) | {'end_step': step_at(config.sparse.end_share, config), 'every_steps': config.sparse.every_steps,
                           'drop_fraction': config.sparse.drop_fraction}


def gradual(sparsity: float, config: ml_collections.ConfigDict, **more: Any) -> SparsityUpdater:
  start, end = (step_at(share, config) for share in (config.sparse.start_share, config.sparse.end_share))
  return updaters.gradual(sparsity, start, end, config.sparse.every_steps, **layers(config), **more)


def top_kast(sparsity: float, config: ml_collections.ConfigDict) -> SparsityUpdater:
  wide = max(0.0, 1 - config.sparse.backward_factor * (1 - sparsity))
  return updaters.top_kast(sparsity, wide, config.sparse.every_steps, step_at(config.sparse.end_share, config),
                           config.sparse.decay, **layers(config))


def granet(sparsity: float, config: ml_collections.ConfigDict) -> SparsityUpdater:
  start, end = (step_at(share, config) for share in (config.sparse.start_share, config.sparse.end_share))
  return updaters.granet(sparsity, start, end, config.sparse.every_steps, min(config.sparse.initial_sparsity, sparsity),
                         config.sparse.drop_fraction, **layers(config))


def ac_dc(sparsity: float, config: ml_collections.ConfigDict) -> SparsityUpdater:
  phase = step_at(config.sparse.phase_share, config)
  return updaters.ac_dc(sparsity, phase, phase, phase, step_at(config.sparse.end_share, config), **layers(config))


# (sparsity, config) → updater; None: no masks in training.
ALGORITHMS: dict[str, Callable[[float, ml_collections.ConfigDict], SparsityUpdater] | None] = {
    'dense': None,
    'static': lambda sparsity, config: updaters.static(sparsity, **layers(config)),
    'snip': lambda sparsity, config: updaters.given(None),
    'grasp': lambda sparsity, config: updaters.given(None),
    'synflow': lambda sparsity, config: updaters.given(None),
    'set': lambda sparsity, config: updaters.set_(sparsity, **exchange(config)),
    'dsr': lambda sparsity, config: updaters.dsr(sparsity, **exchange(config)),
    'snfs': lambda sparsity, config: updaters.snfs(sparsity, **exchange(config)),
    'rigl': lambda sparsity, config: updaters.rigl(sparsity, **exchange(config)),
    'top_kast': top_kast,
    'granet': granet,
    'ac_dc': ac_dc,
    'straight_through': lambda sparsity, config: updaters.straight_through(
        sparsity, every_steps=config.sparse.every_steps, **layers(config)),
    'gradual': gradual,
    'gradual_returns': lambda sparsity, config: gradual(sparsity, config, returns=True),
    'one_shot': lambda sparsity, config: updaters.one_shot(sparsity, step_at(config.sparse.end_share, config), **layers(config)),
    'soft_threshold': None,
    'hard_concrete': None,
    'square_difference': None,
}

def half_squares(params: Tree) -> jax.Array:
  """½ Σ x² over weights and thresholds: biases and normalisation are left out."""
  leaves = jax.tree_util.tree_leaves_with_path(params)
  chosen = [x for path, x in leaves if leaf_name(path).rpartition('/')[2] in ('w', 'w_threshold', 'w_v', 'w_u')]
  return 0.5 * sum((jnp.sum(jnp.square(x)) for x in chosen), start=jnp.float32(0))


def own_parameters(method: Parameterisation, regulariser: Callable[[Tree], jax.Array], zeros: bool) -> OwnParameters:
  return OwnParameters(method.expand, method.fold, regulariser, zeros)


# Networks with parameters of their own. They cannot be told a sparsity: `sweep.penalty` is their knob.
OWN_PARAMETERS: dict[str, Callable[[], OwnParameters]] = {
    'soft_threshold': lambda: own_parameters(soft_threshold(), half_squares, True),
    'hard_concrete': lambda: own_parameters(gates := hard_concrete(), gates.penalty, True),
    'square_difference': lambda: own_parameters(square_difference(), half_squares, False),
}

# (sparsity, config) → (loss of θ and a batch, network, θ, batches) → masks: for those that score weights before training, over
# all layers together, as their papers do.
FIRST_MASKS: dict[str, Callable[..., Callable[..., Tree]]] = {
    'snip': lambda sparsity, config: lambda loss, network, theta, batches: updaters.snip_masks(
        loss, theta, batches, sparsity, dense=config.sparse.dense),
    'grasp': lambda sparsity, config: lambda loss, network, theta, batches: updaters.grasp_masks(
        loss, theta, batches, sparsity, dense=config.sparse.dense),
    'synflow': lambda sparsity, config: lambda loss, network, theta, batches: updaters.synflow_masks(
        network, theta, (1, *jax.tree.leaves(batches)[0].shape[2:]), sparsity, dense=config.sparse.dense),
}

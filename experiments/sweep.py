"""What a config asks for: whether it makes sense, and the groups and networks of its sweep."""
import functools
import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import haiku as hk
import jax
import ml_collections
import numpy as np
import optax

import powerprop
from experiments import evaluate, report, train
from experiments.algorithms import ALGORITHMS, DISTRIBUTIONS, FIRST_MASKS, OWN_PARAMETERS
from experiments.augment import AUGMENTATIONS
from experiments.continual.methods import METHODS
from experiments.errors import UserError
from experiments.models import BIASES, COMPUTE, MODELS
from experiments.optimizers import OPTIMIZERS, SCHEDULES, UPDATES, phi_decay
from experiments.results import TRAINED

UNUSED_RATE = (0.1,)   # sweep.learning_rate of configs/base.py, which alpha_rates overrule

STATIC_AXES: dict[str, Mapping[str, Any]] = {
    'optimizer': OPTIMIZERS, 'update': UPDATES, 'biases': BIASES, 'algorithm': ALGORITHMS}


def check(config: ml_collections.ConfigDict) -> None:
  """Raises UserError naming the first key whose value cannot be used."""
  def value_of(key: str) -> Any:
    return functools.reduce(lambda part, name: part[name], key.split('.'), config)

  def need(ok: bool, key: str, allowed: str) -> None:
    if not ok:
      raise UserError(f'config.{key} must be {allowed}, got {value_of(key)!r}.')

  def is_number(x: Any) -> bool:
    return type(x) in (int, float)

  need(config.model in MODELS, 'model', f'one of {sorted(MODELS)}')
  need(config.compute in COMPUTE, 'compute', f'one of {sorted(COMPUTE)}')
  for axis, values in config.sweep.items():
    need(isinstance(values, tuple) and len(values) > 0, f'sweep.{axis}', 'a tuple of at least one value, as "(1.0, 2.0)"')
    need(not any(v in values[:i] for i, v in enumerate(values)), f'sweep.{axis}', 'a tuple without repetitions')
  for axis, rows in (STATIC_AXES | {'algorithm': algorithms(config)}).items():
    need(all(v in list(rows) for v in config.sweep[axis]), f'sweep.{axis}', f'a tuple of some of {sorted(rows)}')
  for key, rows in (('augment', AUGMENTATIONS), ('schedule', SCHEDULES), ('sparse.distribution', DISTRIBUTIONS)):
    need(value_of(key) in list(rows), key, f'one of {sorted(rows)}')
  need(all(is_number(s) and 0 <= s < 1 for s in config.sweep.sparsity), 'sweep.sparsity', 'a tuple of shares in [0, 1)')
  need(all(is_number(p) and 0 <= p < float('inf') for p in config.sweep.penalty), 'sweep.penalty',
       'a tuple of numbers of at least 0')
  for key in ('sparse.start_share', 'sparse.end_share', 'sparse.drop_fraction', 'sparse.phase_share'):
    need(0 < value_of(key) <= 1, key, 'a share in (0, 1]')
  need(0 <= config.sparse.initial_sparsity < 1, 'sparse.initial_sparsity', 'a share in [0, 1)')
  need(config.sparse.start_share <= config.sparse.end_share, 'sparse.end_share', 'at least sparse.start_share')
  need(type(config.sparse.rescale) is bool, 'sparse.rescale', 'True or False')
  need(config.sparse.entry >= 0, 'sparse.entry', 'at least 0')
  need(config.sparse.decay >= 0, 'sparse.decay', 'at least 0')
  need(config.sparse.backward_factor >= 1, 'sparse.backward_factor', 'at least 1')
  need(all(type(name) is str for name in config.sparse.dense), 'sparse.dense', "a tuple of patterns, as \"('conv2_d/w',)\"")
  need(all(is_number(a) and 1 <= a < float('inf') for a in config.sweep.alpha), 'sweep.alpha',
       'a tuple of numbers of at least 1')
  need(all(type(s) is int and 0 <= s < 2**31 for s in config.sweep.seed), 'sweep.seed', 'a tuple of integers in [0, 2**31)')
  need(all(is_number(r) and 0 < r < float('inf') for r in config.sweep.learning_rate), 'sweep.learning_rate',
       'a tuple of positive numbers')
  need(config.alpha_rates == () or (len(config.alpha_rates) == len(config.sweep.alpha)
                                    and all(is_number(r) and 0 < r < float('inf') for r in config.alpha_rates)), 'alpha_rates',
       f'(), or a positive number for each of sweep.alpha, here {config.sweep.alpha}')
  need(config.alpha_rates == () or config.sweep.learning_rate == UNUSED_RATE, 'sweep.learning_rate',
       f'left at {UNUSED_RATE} where config.alpha_rates, here {config.alpha_rates}, has the rates')
  for key in ('steps', 'batch_size', 'train_images', 'checkpoint_epochs', 'checkpoints_kept', 'prune.sampled_weights',
              'prune.recalibration_batches', 'sparse.every_steps'):
    need(value_of(key) > 0, key, 'positive')
  need(config.bias_stddev >= 0, 'bias_stddev', 'at least 0')
  need(config.phi_decay >= 0, 'phi_decay', 'at least 0')
  need(0 <= config.clip_norm < float('inf'), 'clip_norm', 'at least 0')
  need(0 <= config.label_smoothing < 1, 'label_smoothing', 'a share in [0, 1)')
  densities, scopes = config.prune.densities, config.prune.scopes
  need(len(densities) > 0 and all(is_number(p) and 0 < p <= 1 for p in densities) and len(set(densities)) == len(densities),
       'prune.densities', 'a tuple of different shares in (0, 1]')
  need(0 < config.prune.figure_density <= 1, 'prune.figure_density', 'a share in (0, 1]')
  need(config.prune.output_factor > 0, 'prune.output_factor', 'positive')
  need(len(scopes) > 0 and all(s in evaluate.SCOPES for s in scopes) and len(set(scopes)) == len(scopes), 'prune.scopes',
       f'a tuple of some of {list(evaluate.SCOPES)}')
  need(all(kind in list(report.KINDS) for kind in config.report), 'report', f'a tuple of some of {sorted(report.KINDS)}')


def algorithms(config: ml_collections.ConfigDict) -> Mapping[str, Any]:
  """What `sweep.algorithm` may name."""
  return METHODS if config.protocol == 'continual' else ALGORITHMS


def check_sparsities(groups: Sequence[train.Group], net: hk.TransformedWithState, image_shape: tuple[int, ...]) -> None:
  """Raises UserError for a sparsity, or layers to leave dense, that do not fit the network. Works on shapes alone."""
  theta, _ = jax.eval_shape(lambda key: net.init(key, np.zeros((1, *image_shape), np.float32), True), jax.random.key(0))
  for group in groups:
    if group.sparse and not group.first_masks:
      try:
        jax.eval_shape(lambda phi, g=group: g.optimizer(0.1, jax.random.key(0), None).init(phi), theta)
      except ValueError as error:
        raise UserError(f'{group.axes["algorithm"]}: {error}') from None


def make_groups(config: ml_collections.ConfigDict) -> list[train.Group]:
  """One group for each combination of the axes that change the program; a single one for dense training."""
  axes = ('alpha', *STATIC_AXES, 'sparsity')
  combinations = [dict(zip(axes, values, strict=True)) for values in itertools.product(*(config.sweep[axis] for axis in axes))]
  for one in combinations:
    one['sparsity'] = one['sparsity'] if ALGORITHMS.get(one['algorithm']) else 0.0
  return [make_group(config, one) for i, one in enumerate(combinations) if one not in combinations[:i]]


def make_group(config: ml_collections.ConfigDict, axes: dict[str, Any]) -> train.Group:
  where = is_factor if axes['algorithm'] == 'square_difference' else BIASES[axes['biases']]
  reparam = powerprop.powerpropagation(axes['alpha'], where)

  def dense(rate):
    rate = rate_of(config, axes) or rate
    chain = OPTIMIZERS[axes['optimizer']](rate, config)
    if config.clip_norm:
      chain = optax.chain(optax.clip_by_global_norm(config.clip_norm), chain)
    chain = UPDATES[axes['update']](chain, reparam)
    return optax.chain(chain, phi_decay(rate, config)) if config.phi_decay else chain

  if config.protocol == 'continual':
    wrap = METHODS[axes['algorithm']].wrap
    return train.Group(axes, reparam, lambda rate, key, first: wrap(dense(rate)))
  make, own_parameters = ALGORITHMS[axes['algorithm']], OWN_PARAMETERS.get(axes['algorithm'])
  if make is None:
    own = own_parameters and own_parameters()
    return train.Group(axes, reparam, lambda rate, key, first: dense(rate), own=own)
  weights = reparam._replace(where=powerprop.powerpropagation(axes['alpha']).where)   # biases are never masked
  try:
    updater = make(axes['sparsity'], config)
  except ValueError as error:
    raise UserError(f'{axes["algorithm"]}: {error} Here config.steps={config.steps}, config.sparse.every_steps='
                    f'{config.sparse.every_steps}, config.sparse.end_share={config.sparse.end_share:g}.') from None
  scored = FIRST_MASKS.get(axes['algorithm'])

  def sparse(rate, key, first):
    rule = powerprop.updaters.given(first) if scored else updater
    return powerprop.sparsify(dense(rate), rule, weights, key, config.sparse.entry)
  return train.Group(axes, reparam, sparse, True, updater.due, updater.dense_gradient,
                     scored and scored(axes['sparsity'], config), config.sparse.rescale)


def is_factor(name: str, leaf: Any) -> bool:
  """v and u of v⊙v − u⊙u."""
  return name.endswith(('/w_v', '/w_u'))


def rate_of(config: ml_collections.ConfigDict, axes: Mapping[str, Any]) -> float | None:
  """The learning rate of the group's power, where powers have rates of their own."""
  return config.alpha_rates[config.sweep.alpha.index(axes['alpha'])] if config.alpha_rates else None


def make_nets(config: ml_collections.ConfigDict) -> train.Nets:
  sweep = config.sweep
  columns = zip(*itertools.product(sweep.seed, sweep.learning_rate, sweep.penalty), strict=True)
  return train.Nets(*(np.array(column, dtype) for column, dtype in zip(columns, (np.int32, np.float32, np.float32), strict=True)))


def group_name(group: train.Group, config: ml_collections.ConfigDict) -> str:
  """What tells the group from the others of its sweep: 'alpha=2', 'alpha=2 update=backpropagation'."""
  told = [f'{axis}={value}' for axis, value in group.axes.items() if axis != 'alpha' and len(config.sweep[axis]) > 1]
  return ' '.join([f'alpha={group.axes["alpha"]:g}', *told])


def scopes_of(group: train.Group, config: ml_collections.ConfigDict) -> tuple[str, ...]:
  """How the networks of a group are pruned after training; those that are sparse already are not."""
  return (TRAINED,) if group.sparse or (group.own and group.own.zeros) else tuple(config.prune.scopes)

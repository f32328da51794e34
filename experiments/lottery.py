"""Protocol: lottery tickets by iterative magnitude pruning. Train, prune, rewind what is left, and train again.

  round 0: dense;   round r: of the weights that round r − 1 kept, drop the share p of smallest |θ| in each layer (the output
  layer p / 2), set the others back to their values after `lottery.rewind_steps` steps, and train from there with these masks

Every round sees the same batches from that step on. A round is a directory of its own in the workdir, so that a run which was
stopped goes on in the round that it was in. Source: Frankle & Carbin 2019 (arXiv:1803.03635); rewinding to a later step: Frankle
et al. 2020 (arXiv:1912.05671).
"""
import functools
import pathlib
import time
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
from jax.sharding import Mesh

import powerprop
from experiments import run_files, supervised, sweep, train
from experiments import workdir as workdirs
from experiments.errors import UserError
from experiments.progress import say
from powerprop.reparam import Tree, leaf_name


def run(config: ml_collections.ConfigDict, workdir: pathlib.Path) -> None:
  """Trains all rounds, or goes on with them, evaluates and reports. Raises UserError for a config that makes no sense."""
  check(config)
  origin = workdirs.provenance()
  started = time.monotonic()
  setting = supervised.prepare(config, make_groups, workdir)
  if setting is None:
    return
  first, spent, seconds = supervised.fit(setting, config.lottery.rewind_steps, made(workdir / 'rewind'))
  every: list[train.Group] = []
  shares: list[dict[str, list[float]]] = []
  outcomes: list[dict[str, Any]] = []
  masks = [state.opt_state.masks for state in first]
  for number in range(config.lottery.rounds + 1):
    say(f'round {number} of {config.lottery.rounds}')
    begin = [rewound(state, mask, setting.mesh) for state, mask in zip(first, masks, strict=True)]
    place = made(workdir / f'round_{number}')
    states, more, took = supervised.fit(setting, config.steps, place, (config.lottery.rewind_steps, begin))
    spent, seconds = spent + more, seconds + took
    now = [group._replace(axes=group.axes | {'sparsity': share_removed(state, slot)})
           for group, state, slot in zip(setting.groups, states, setting.slots, strict=True)]
    outcome = supervised.evaluate_groups(setting, now, states)
    every, outcomes = every + now, outcomes + outcome
    shares += run_files.shares_of_dense(config.steps, setting.costs, spent, outcome)
    masks = pruned(setting, states)
  supervised.conclude(setting, workdir, origin, every, outcomes, shares,
                      {'training': seconds, 'all': time.monotonic() - started})


def made(folder: pathlib.Path) -> pathlib.Path:
  folder.mkdir(parents=True, exist_ok=True)
  return folder


def check(config: ml_collections.ConfigDict) -> None:
  """Raises UserError naming the first key whose value cannot be used."""
  sweep.check(config)
  lottery = config.lottery
  for key, ok, allowed in (('rounds', lottery.rounds >= 1, 'at least 1'),
                           ('prune_share', 0 < lottery.prune_share < 1, 'a share in (0, 1)'),
                           ('rewind_steps', 0 <= lottery.rewind_steps < config.steps,
                            f'at least 0 and below steps={config.steps}')):
    if not ok:
      raise UserError(f'config.lottery.{key} must be {allowed}, got {lottery[key]!r}.')
  if config.sweep.algorithm != ('dense',):
    raise UserError(f"config.sweep.algorithm must be ('dense',) for the protocol 'lottery', got {config.sweep.algorithm!r}.")


def make_groups(config: ml_collections.ConfigDict) -> list[train.Group]:
  """Groups whose masks keep everything, until they are given others."""
  found = []
  for group in sweep.make_groups(config):
    full = sweep.make_group(config, group.axes | {'algorithm': 'static', 'sparsity': 0.0})
    found.append(full._replace(axes=group.axes | {'algorithm': 'lottery'}))
  return found


def rewound(state: train.TrainState, masks: powerprop.Masks, mesh: Mesh) -> train.TrainState:
  """`state` with these masks: the first update brings the weights that they remove to 0."""
  change = jax.jit(jax.vmap(powerprop.with_masks), out_shardings=train.by_net(mesh))
  return state._replace(opt_state=change(state.opt_state, masks))


def pruned(setting: supervised.Setting, states: Sequence[train.TrainState]) -> list[powerprop.Masks]:
  """The masks of the next round."""
  def counts(masks: Tree) -> Tree:
    def left(path: Any, m: jax.Array) -> jax.Array:
      share = setting.config.lottery.prune_share * (0.5 if leaf_name(path) == setting.model.output_layer else 1)
      live = jnp.sum(m, dtype=jnp.int32)
      return jnp.maximum(live - jnp.round(share * live).astype(jnp.int32), 1)
    return jax.tree_util.tree_map_with_path(left, masks)

  def one(group: train.Group, state: train.TrainState) -> powerprop.Masks:
    live, theta = state.opt_state.masks.forward, train.final_weights(group, state.phi)
    chosen = jax.tree.map(lambda m, x: None if m is None else x, live, theta, is_leaf=lambda m: m is None)
    return powerprop.Masks(powerprop.masks.layerwise(chosen, counts(live), live))

  def every(group: train.Group, states: train.TrainState) -> powerprop.Masks:
    return jax.lax.map(lambda state: one(group, state), states)   # a threshold is searched for in a branch
  return [jax.jit(functools.partial(every, group), out_shardings=train.by_net(setting.mesh))(state)
          for group, state in zip(setting.groups, states, strict=True)]


def share_removed(state: train.TrainState, slot: train.Slots) -> float:
  """Share of the weights that the masks remove: all networks of a round are alike."""
  (kept,) = train.gather([supervised.to_host(state.opt_state.kept.forward)], [slot])
  total = sum(m.size // len(slot.source) for m in jax.tree.leaves(state.opt_state.masks.forward))
  return round(1 - sum(int(k[0]) for k in jax.tree.leaves(kept)) / total, 9)

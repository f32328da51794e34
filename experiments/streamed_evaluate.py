"""Accuracies of one network on photographs: while it trains, and pruned in every way when it has. Never trains."""
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments import evaluate, sweep, train
from experiments.data import images
from experiments.photographs import Loads, Odd, hosts
from experiments.programs import Hits, Setting, everywhere, make_score, make_weights, to_devices
from experiments.progress import say
from experiments.results import TRAINED
from powerprop import masks
from powerprop.reparam import Tree


class Evaluator:
  """Accuracies of weights on whole splits."""

  def __init__(self, setting: Setting, loads: Loads):
    self._setting, self._loads, self._score = setting, loads, make_score(setting)
    self._final = jax.jit(lambda state: final_weights(setting.group, state))
    self._odd = {'validation': Odd(loads.load), 'test': Odd(loads.test_load)}

  def scores(self, state: train.TrainState) -> dict[str, float]:
    """On the images held out from training, or on the test split where there are none."""
    part = 'validation' if len(self._loads.validation) else 'test'
    hits = self.on(part, self._final(state), state.net_state)
    n = int(hits.images) or float('nan')
    return {'accuracy': int(hits.first) / n, 'top_five': int(hits.fifth) / n, 'loss': float(hits.loss) / n}

  def on(self, part: str, theta: Tree, net_state: Tree) -> Hits:
    loads, config, total = self._loads, self._setting.config, None
    load, indices = (loads.load, loads.validation) if part == 'validation' else (loads.test_load, loads.test)
    batches = images.evaluation_batches(load, indices, config.batch_size, **hosts(), workers=config.stream.workers)
    for on_host, batch in to_devices(batches, self._setting.mesh):
      self._odd[part].see(on_host)
      hits = self._score(theta, net_state, batch.images, batch.labels)
      total = hits if total is None else jax.tree.map(jnp.add, total, hits)
    return Hits(*(np.zeros(()) for _ in Hits._fields)) if total is None else jax.tree.map(np.asarray, total)


def final_weights(group: train.Group, state: train.TrainState) -> Tree:
  """θ as the network sees it."""
  theta, trained = train.final_weights(group, state.phi), train.final_masks(group, state)
  return theta if trained is None else masks.apply(trained, theta)


def final_evaluation(setting: Setting, loads: Loads, state: train.TrainState) -> dict[str, Any]:
  """What `run_files.workdir_files` wants of a group: hits at the sparsity that was trained, or at all densities; and of how many
  images: those that cannot be read are left out."""
  config, group, mesh = setting.config, setting.group, setting.mesh
  scopes, prune = sweep.scopes_of(group, config), config.prune
  whole = everywhere(mesh)
  before = make_weights(setting)()
  after, trained = jax.jit(lambda s: (train.final_weights(group, s.phi), train.final_masks(group, s)), out_shardings=whole)(state)
  counts = evaluate.layer_counts(before, prune.densities, setting.model.output_layer, prune.output_factor)
  (figure,) = evaluate.layer_counts(before, [prune.figure_density], setting.model.output_layer, prune.output_factor)
  select = jax.jit(evaluate.select, static_argnums=2, out_shardings=whole)
  survivors = select(after, figure, 'layer') if trained is None else trained
  overlap = jax.jit(masks.overlap)
  evaluator, recalibrate, images_of = Evaluator(setting, loads), make_recalibrate(setting, loads), dict[str, int]()

  def measure(scope, mask, start):
    pruned = masks.apply(mask, after)
    net_state = recalibrate(pruned, state.net_state) if scope.endswith('recalibrated') else state.net_state
    hits = {part: evaluator.on(part, pruned, net_state) for part in ('validation', 'test')}
    images_of.update({part: int(found.images) for part, found in hits.items()})
    kept = sum(int(jnp.sum(m)) for m in jax.tree.leaves(mask))
    say(f'evaluated {scope}: {kept:,} weights kept')
    return kept, float(overlap(start, mask)), int(hits['validation'].first), int(hits['test'].first)

  if scopes == (TRAINED,):
    table = [[measure(TRAINED, trained, select(before, jax.jit(masks.counts)(trained), 'layer'))]]
  else:
    table = [[measure(scope, select(after, k, scope), select(before, k, scope)) for k in counts] for scope in scopes]
  kept, overlaps, validation, test = (np.array([[[cell[i] for cell in row] for row in table]]) for i in range(4))
  say('statistics of the weights; then the report.')
  statistics = jax.tree.map(np.asarray, jax.jit(evaluate.weight_statistics)(before, after, survivors))
  finite = np.array([all(bool(jnp.all(jnp.isfinite(x))) for x in jax.tree.leaves(after))])
  found = evaluate.Evaluation(kept, overlaps, validation, test, finite, {k: v[None] for k, v in statistics.items()})
  return {'evaluation': found, 'sample': evaluate.sample_weights(before, after, survivors, prune.sampled_weights),
          'kept': {} if trained is None else jax.tree.map(lambda n: np.asarray(n)[None], jax.jit(masks.counts)(trained)),
          'weights': sum(x.size for x in jax.tree.leaves(survivors)), 'images': images_of}


def make_recalibrate(setting: Setting, loads: Loads) -> Callable[[Tree, Tree], Tree]:
  """(θ, network state) → the state after `prune.recalibration_batches` training batches: averages of these weights."""
  config = setting.config
  one = jax.jit(lambda theta, net_state, x: setting.net.apply(theta, net_state, None, train.pixels(x), True)[1])

  def recalibrate(theta: Tree, net_state: Tree) -> Tree:
    batches = images.train_batches(loads.load, loads.train, config.batch_size, 0, **hosts())
    for _, (_, batch) in zip(range(config.prune.recalibration_batches), to_devices(batches, setting.mesh), strict=False):
      net_state = one(theta, net_state, batch.images)
    return net_state
  return recalibrate

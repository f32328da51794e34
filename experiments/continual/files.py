"""What a run of the protocol leaves: results.csv, statistics.csv, matrix.csv, and of networks with masks capacity.csv and
mask_overlap.csv."""
import pathlib
from collections.abc import Sequence
from typing import Any

import jax
import ml_collections
import numpy as np

from experiments import train
from experiments import workdir as workdirs
from experiments.continual import measures, packing
from experiments.continual.problem import Problem, State
from experiments.data import tasks as sequences
from experiments.results import TRAINED
from experiments.sweep import STATIC_AXES, rate_of
from powerprop import flops, task_masks
from powerprop.reparam import Tree, is_weight, leaf_name


def write(config: ml_collections.ConfigDict, tasks: sequences.Tasks, problems: Sequence[Problem], nets: train.Nets,
          states: Sequence[State], workdir: pathlib.Path) -> None:
  """`states`: on the host, [K, ...] of each group."""
  results, statistics, matrix, capacity, overlap = [], [], [], [], []
  image = int(np.prod(tasks.parts['train'].images.shape[1:]))
  for problem, state in zip(problems, states, strict=True):
    p = problem._replace(parts=tasks.parts, pixels=tasks.pixels)
    for k, (seed, rate, penalty) in enumerate(zip(nets.seed.tolist(), nets.learning_rate, nets.penalty, strict=True)):
      own = rate_of(config, p.group.axes)
      axes = {'alpha': float(p.group.axes['alpha']), 'seed': seed, 'learning_rate': float(str(own or rate)),
              **{axis: p.group.axes[axis] for axis in (*STATIC_AXES, 'sparsity')}, 'penalty': float(str(penalty))}
      one = jax.tree.map(lambda x, k=k: x[k], state)
      told, among_all, validation, inferred, found, by_gradient = accuracies(p, one)
      test = p.heads.headline((told, among_all))
      weights = sum(x.size for path, x in jax.tree_util.tree_leaves_with_path(one.trained.phi) if is_weight(leaf_name(path), x))
      kept, operations = weights, p.method.gradients
      if p.method.packs:
        of_tasks, of_pairs, (kept, weights) = packs(p, one, tasks)
        operations = float(np.mean([row['training_operations'] for row in of_tasks]))
        capacity += [axes | row for row in of_tasks]
        overlap += [axes | row for row in of_pairs]
      matrix += [axes | {'after': t, 'task': j + 1, 'test_accuracy': test[t, j], 'class_accuracy': among_all[t, j]}
                 for (t, j), hits in np.ndenumerate(one.record.told) if hits >= 0]
      results.append(axes | {
          'scope': TRAINED, 'density': kept / weights, 'kept': kept, 'weights': weights,
          'validation_accuracy': float(validation.mean()), 'test_accuracy': float(test[-1].mean()),
          'task_accuracy': float(told[-1].mean()) if p.heads.scenario == 'class' else float('nan'),   # else it is the same
          'class_accuracy': float(among_all[-1].mean()), 'inferred_accuracy': float(inferred.mean()),
          'forgetting': measures.forgetting(test), 'backward_transfer': measures.backward_transfer(test),
          'forward_transfer': measures.forward_transfer(test)})
      statistics.append(axes | {
          'learned': float(np.diagonal(test[1:]).mean()), 'worst_task': float(test[-1].min()),
          'tasks_found': float(found.mean()), 'tasks_found_by_gradient': float(by_gradient.mean()),
          'training_operations': operations,
          'bytes_per_task': p.method.bytes_kept(p, one, image) / len(tasks.names),
          'network_bytes': sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(one.trained.phi))})
  for name, rows in (('results', results), ('statistics', statistics), ('matrix', matrix), ('capacity', capacity),
                     ('mask_overlap', overlap)):
    if rows:
      workdirs.write_csv(workdir / f'{name}.csv', rows)


def accuracies(p: Problem, s: State) -> tuple[np.ndarray, ...]:
  """Shares of the test images [T + 1, T], with the outputs of their own task and of all tasks; of the validation images [T]; of
  some test images with the task inferred, and of those whose task was found [T]; and was it found by a gradient? [T] NaN where it
  was not looked at, and for networks of NaN, whose hits pass for a tenth."""
  told, among_all = (share(x, p.parts['test']) for x in (s.record.told, s.record.among_all))
  if p.method.separate or p.heads.scenario == 'domain':   # which network or mask to take would have to be told; or it is the same
    among_all = np.full_like(among_all, np.nan)
  found = (told, among_all, share(s.record.validation, p.parts['validation']), inferred_share(p, s.record.inferred),
           inferred_share(p, s.record.found), np.where(s.record.by_gradient >= 0, s.record.by_gradient, np.nan))
  finite = all(np.isfinite(x).all() for x in jax.tree.leaves(s.trained.phi))
  return found if finite else tuple(np.full_like(x, np.nan) for x in found)


def share(hits: np.ndarray, part: sequences.Part) -> np.ndarray:
  """Of the images of each task (the last axis); NaN for −1."""
  return np.where(hits >= 0, hits / np.asarray(part.counts), np.nan)


def inferred_share(p: Problem, hits: np.ndarray) -> np.ndarray:
  """Of those test images of each task whose task was inferred."""
  return np.where(hits >= 0, hits / np.minimum(p.parts['test'].counts, p.config.continual.inferred_images), np.nan)


def packs(p: Problem, s: State, tasks: sequences.Tasks) -> tuple[list[dict[str, Any]], list[dict[str, Any]], tuple[int, int]]:
  """Lines for each task, lines for each pair of tasks, and weights in any mask and in all."""
  tree = packing.body(p, s.trained.phi, s.trained.net_state)
  found = task_masks.capacity(s.memory.tasks, tree)
  bits = np.concatenate([np.unpackbits(np.asarray(x), axis=1, count=int(np.prod(like.shape)))
                         for x, like in zip(jax.tree.leaves(s.memory.tasks.bits),
                                            jax.tree.leaves(task_masks.shared(s.memory.tasks, tree)), strict=True)], axis=1)
  used, new, reused = (np.asarray(x, np.float64) for x in (found.used, found.new, found.reused))
  operations = training_operations(p, s, tree)
  total = [int(bits[:t + 1].any(0).sum()) for t in range(len(tasks.names))]
  size = bits.shape[1]
  rows = [{'task': t + 1, 'used': used[t], 'new': new[t], 'reused': reused[t], 'total': total[t] / size,
           'left': size - total[t], 'more': (size - total[t]) * (t + 1) / total[t] if total[t] else float('inf'),
           'dense_accuracy': float(s.memory.dense[t]), 'mask_accuracy': float(s.memory.score[t]), 'met': int(s.memory.met[t]),
           'training_operations': operations[t]}
          for t in range(len(tasks.names))]
  shared = measures.intersection_over_union(bits.astype(bool))
  pairs = [{'task': i + 1, 'other': j + 1, 'overlap': float(x)} for (i, j), x in np.ndenumerate(shared)]
  return rows, pairs, (total[-1], size)


def training_operations(p: Problem, s: State, tree: Tree) -> list[float]:
  """What training on each task took of the operations of plain training [T]: until its mask is chosen the gradient of weights
  that are free, then forward the mask, and backward what of it is free. PackNet's rounds before the last are counted as the last
  is; searching is not."""
  batch = jax.ShapeDtypeStruct((p.config.batch_size, *p.parts['train'].images.shape[1:]), np.float32)
  costs = flops.count(lambda phi, state, x: p.net.apply(phi, state, None, x, True)[0], s.trained.phi, s.trained.net_state, batch)
  share = round(p.config.continual.retrain_share * p.config.steps) / p.config.steps
  masks = [{leaf_name(path): np.asarray(m) for path, m in jax.tree_util.tree_leaves_with_path(
      task_masks.task_mask(s.memory.tasks, t, tree))} for t in range(p.heads.tasks)]
  free = {name: np.ones_like(m) for name, m in masks[0].items()}

  def densities(some: dict[str, np.ndarray]) -> dict[str, float]:
    return flops.densities(costs, {name: int(m.sum()) for name, m in some.items()})
  found = []
  for mask in masks:
    before = flops.training_step(costs, {}, densities(free))
    under = flops.training_step(costs, densities(mask), densities({name: m & free[name] for name, m in mask.items()}))
    found.append(((1 - share) * before + share * under) / flops.training_step(costs))
    free = {name: free[name] & ~m for name, m in mask.items()}
  return found

"""What a run that has ended leaves in its workdir, whatever its protocol."""
import itertools
import json
import pathlib
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from typing import Any

import jax
import ml_collections
import numpy as np
from jax.experimental import multihost_utils

from experiments import report, train
from experiments import workdir as workdirs
from experiments.progress import say
from experiments.results import TRAINED
from experiments.sweep import STATIC_AXES, rate_of, scopes_of
from powerprop import flops


def has_ended(workdir: pathlib.Path, config: ml_collections.ConfigDict) -> bool:
  """Binds the workdir to the config; where it holds that run, ended, its report is drawn again. What the first host finds holds
  for all. Raises UserError where it holds another run."""
  first = jax.process_index() == 0
  if first:
    workdirs.bind(workdir, config)
  ended = (workdir / 'run.json').exists()   # written when all the numbers are
  if jax.process_count() > 1:
    ended = bool(multihost_utils.broadcast_one_to_all(np.int32(ended)))
  if ended and first:
    say(f'{workdir} holds this run, which has ended; its report is drawn again.')
    finish(workdir)
  return ended


def shares_of_dense(steps: int, costs: flops.Costs, spent: np.ndarray,
                    outcome: Sequence[dict[str, Any]]) -> list[dict[str, list[float]]]:
  """What a forward pass, and the training, of each network take of the operations of a dense one: [K] for each group."""
  forward, training = flops.forward(costs), steps * flops.training_step(costs)

  def share(kept, k):
    return flops.forward(costs, flops.densities(costs, jax.tree.map(lambda n: int(n[k]), kept)) if kept else {}) / forward
  return [{'forward_operations': [share(found['kept'], k) for k in range(len(one))],
           'training_operations': [round(x / training, 9) for x in one.tolist()]}
          for one, found in zip(spent, outcome, strict=True)]


def workdir_files(config: ml_collections.ConfigDict, nets: train.Nets, sizes: Mapping[str, float], workdir: pathlib.Path,
                  groups: Sequence[train.Group], outcome: Sequence[dict[str, Any]],
                  shares_of_dense: Sequence[dict[str, list[float]]]) -> None:
  """results.csv, overlap.csv, statistics.csv and weights.npz: everything that the report is made of. `sizes`: numbers of images
  for 'validation' and 'test'."""
  results, overlap, statistics = [], [], []
  for group, found, cost in zip(groups, outcome, shares_of_dense, strict=True):
    e = found['evaluation']
    for k, (seed, rate, penalty) in enumerate(zip(nets.seed.tolist(), nets.learning_rate, nets.penalty, strict=True)):
      own = rate_of(config, group.axes)
      axes = {'alpha': float(group.axes['alpha']), 'seed': seed, 'learning_rate': float(str(own or rate)),
              **{axis: group.axes[axis] for axis in (*STATIC_AXES, 'sparsity')}, 'penalty': float(str(penalty))}
      statistics.append(axes | {name: float(v[k]) for name, v in e.statistics.items()}
                        | {name: v[k] for name, v in cost.items()})
      scopes = scopes_of(group, config)
      densities = [float(e.kept[k, 0, 0]) / found['weights']] if scopes == (TRAINED,) else config.prune.densities
      for (s, scope), (d, density) in itertools.product(enumerate(scopes), enumerate(densities)):
        row = axes | {'scope': scope, 'density': density}
        # A network of NaN puts all images into one class; its tenth of hits would pass for an accuracy.
        shares = {'validation_accuracy': int(e.validation[k, s, d]) / sizes['validation'],
                  'test_accuracy': int(e.test[k, s, d]) / sizes['test'], 'overlap': float(str(e.overlap[k, s, d]))}
        shares = shares if e.finite[k] else dict.fromkeys(shares, float('nan'))
        overlap.append(row | {'overlap': shares.pop('overlap')})
        results.append(row | {'kept': int(e.kept[k, s, d]), 'weights': found['weights']} | shares)
  for name, rows in (('results', results), ('overlap', overlap), ('statistics', statistics)):
    workdirs.write_csv(workdir / f'{name}.csv', rows)
  # The notebook has one group for each α; of several settings the first is shown.
  shown = {group.axes['alpha']: found['sample'] for group, found in reversed(list(zip(groups, outcome, strict=True)))}
  arrays = {f'{name}_{i}': x for i, alpha in enumerate(sorted(shown)) for name, x in shown[alpha].items()}
  workdirs.write_npz(workdir / 'weights.npz', alpha=np.array(sorted(shown), np.float64),
                     density=np.float64(config.prune.figure_density), **arrays)


def write_run(workdir: pathlib.Path, origin: dict[str, Any], seconds: dict[str, float]) -> None:
  record = origin | {'seconds': {k: round(v, 1) for k, v in seconds.items()},
                     'finished': datetime.now(UTC).isoformat(timespec='seconds')}
  workdirs.write_atomic(workdir / 'run.json', json.dumps(record, indent=2) + '\n')


def finish(workdir: pathlib.Path) -> None:
  for path in report.write_report(workdir):
    say(f'wrote {path}')
  say((workdir / 'table.md').read_text().rstrip())

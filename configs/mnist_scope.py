"""Pruning layer by layer, as figure 1 does, against one threshold for all layers together, with the same number of weights kept.

  python -m experiments.main --config=configs/mnist_scope.py --workdir=runs/mnist_scope

15 networks, 5 α × 3 seeds, 15,000 steps; both scopes prune the same networks.
Results are in RESULTS.md, times in run.json beside them.
"""
from configs import base


def get_config():
  config = base.get_config()
  config.name = 'mnist_scope'
  config.title = 'Pruning by layer against globally'
  config.steps = 15_000
  config.sweep.seed = (0, 1, 2)
  config.prune.scopes = ('layer', 'global')
  config.report = ('compare',)
  return config

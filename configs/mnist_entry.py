"""What is the place of re-entry worth? Weights that RigL grows, started at 0 to 0.3 times the mean live weight; α = 2.

RigL as in mnist_sparse.py, at the rate chosen there. At 0 a weight never moves when α > 1: it is live in name only.

  python -m experiments.main --config=configs/mnist_entry.py:zero --workdir=runs/mnist_entry/zero
  python -m experiments.main --config=configs/mnist_entry.py:hundredth --workdir=runs/mnist_entry/hundredth
  python -m experiments.main --config=configs/mnist_entry.py:tenth --workdir=runs/mnist_entry/tenth
  python -m experiments.main --config=configs/mnist_entry.py:third --workdir=runs/mnist_entry/third

12 networks each: four sparsities × 3 seeds. Results are in RESULTS.md, times in run.json beside them.
"""
from configs import base, mnist_sparse

ENTRIES = {'zero': 0.0, 'hundredth': 0.01, 'tenth': 0.1, 'third': 0.3}


def get_config(variant: str = 'third'):
  """`variant`: one of ENTRIES, where weights start."""
  if variant not in ENTRIES:
    raise base.unknown('mnist_entry', variant, tuple(ENTRIES))
  config = mnist_sparse.get_config('rigl')
  config.name = f'mnist_entry_{variant}'
  config.title = 'Where weights that are grown start'
  config.sweep.alpha, config.alpha_rates = (2.0,), mnist_sparse.RATES['rigl'][1:]
  config.sparse.entry = ENTRIES[variant]
  return config

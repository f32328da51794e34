"""What is the place of re-entry worth? Weights that RigL grows, started at 0, half, or all of the smallest live weight; α = 2.

RigL as in mnist_sparse.py, at the rate chosen there. At 0 a weight never moves when α > 1: it is live in name only.

  python -m experiments.main --config=configs/mnist_entry.py:zero --workdir=runs/mnist_entry/zero
  python -m experiments.main --config=configs/mnist_entry.py:half --workdir=runs/mnist_entry/half
  python -m experiments.main --config=configs/mnist_entry.py:whole --workdir=runs/mnist_entry/whole

12 networks each: four sparsities × 3 seeds. Results are in RESULTS.md, times in run.json beside them.
"""
from configs import mnist_sparse

ENTRIES = {'zero': 0.0, 'half': 0.5, 'whole': 1.0}


def get_config(variant: str = 'half'):
  """`variant`: 'zero', 'half' or 'whole', where weights start."""
  if variant not in ENTRIES:
    raise ValueError(f"mnist_entry has the variants 'zero', 'half' and 'whole', not {variant!r}.")
  config = mnist_sparse.get_config('rigl')
  config.name = f'mnist_entry_{variant}'
  config.title = 'Where weights that are grown start'
  config.sweep.alpha, config.alpha_rates = (2.0,), mnist_sparse.RATES['rigl'][1:]
  config.sparse.entry = ENTRIES[variant]
  return config

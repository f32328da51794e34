"""A part of the table of sparse training for a convolutional network: LeNet-5 on MNIST, gradual pruning and RigL, 90 and 98 %.

As in mnist_sparse.py, with 4,500 steps. The learning rate of each algorithm and α is chosen on the validation images at 95 %,
from the same grid for both powers, with a seed of its own: RATES holds what was chosen.

  python -m experiments.main --config=configs/mnist_lenet5.py:gradual --workdir=runs/mnist_lenet5/gradual
  python -m experiments.main --config=configs/mnist_lenet5.py:gradual_tuning --workdir=runs/mnist_lenet5/gradual_tuning

12 networks, and 8 networks for the choice of the rate; so for each of ALGORITHMS. Results are in RESULTS.md, times in run.json
beside them.
"""
from configs import base, mnist_sparse

ALGORITHMS = ('gradual', 'rigl')
RATES = {'gradual': (0.05, 0.1), 'rigl': (0.1, 0.1)}   # of ALPHAS in mnist_sparse.py; 0.05 is the smallest of the grid


def get_config(variant: str = 'gradual'):
  """`variant`: an algorithm, or an algorithm and '_tuning'."""
  algorithm, tuning = base.algorithm_of('mnist_lenet5', variant, ALGORITHMS)
  config = mnist_sparse.settings(base.get_config())
  config.name, config.title = f'mnist_lenet5_{variant}', 'Sparse training of LeNet-5'
  config.model, config.steps = 'lenet_5', 4_500
  config.sweep.algorithm = (algorithm,)
  config.prune.densities = (0.05,) if tuning else (0.1, 0.02)
  if tuning:
    config.sweep.seed, config.sweep.learning_rate, config.sweep.sparsity = (3,), mnist_sparse.GRID, (0.95,)
  else:
    config.sweep.seed, config.alpha_rates, config.sweep.sparsity = (0, 1, 2), RATES[algorithm], (0.9, 0.98)
  return config

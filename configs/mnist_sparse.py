"""Table 1 in small: one algorithm at four sparsities, with and without Powerpropagation; LeNet-300-100 on MNIST.

Our protocol: 9,000 steps of SGD with momentum 0.9 under a cosine with warm-up, batch 60. Every algorithm has the same budget of
weights, shared out by ERK (SNIP, GraSP and SynFlow: by their scores); masks change every 100 steps and settle after three
quarters of the training. The learning rate of each algorithm and α is chosen on the validation images, from the same grid for
both powers, with a seed of its own, as the mean over two of the sparsities: RATES holds what was chosen.

  python -m experiments.main --config=configs/mnist_sparse.py:gradual --workdir=runs/mnist_sparse/gradual
  python -m experiments.main --config=configs/mnist_sparse.py:gradual_tuning --workdir=runs/mnist_sparse/gradual_tuning

24 networks, and 16 networks for the choice of the rate; so for each of ALGORITHMS. Dense networks, pruned after training, have no
sparsity of their own: 6 networks, and 8 networks. `make table1` runs what is missing and lays all side by side. Results are in
RESULTS.md, times in run.json beside them.
"""
from configs import base

ALGORITHMS = ('dense', 'one_shot', 'gradual', 'gradual_returns', 'straight_through', 'ac_dc', 'granet', 'top_kast', 'rigl',
              'snfs', 'dsr', 'set', 'synflow', 'grasp', 'snip', 'static')
ALPHAS = (1.0, 2.0)
GRID = (0.05, 0.1, 0.2, 0.3)
RATES = {   # of ALPHAS
    'dense': (0.2, 0.1),
    'one_shot': (0.1, 0.1),
    'gradual': (0.05, 0.2),
    'gradual_returns': (0.1, 0.2),
    'straight_through': (0.05, 0.05),
    'ac_dc': (0.1, 0.1),
    'granet': (0.1, 0.1),
    'top_kast': (0.2, 0.1),
    'rigl': (0.1, 0.1),
    'snfs': (0.1, 0.1),
    'dsr': (0.2, 0.1),
    'set': (0.2, 0.1),
    'synflow': (0.1, 0.1),
    'grasp': (0.1, 0.1),
    'snip': (0.1, 0.1),
    'static': (0.2, 0.1),
}


def get_config(variant: str = 'gradual'):
  """`variant`: an algorithm, or an algorithm and '_tuning'."""
  algorithm, tuning = base.algorithm_of('mnist_sparse', variant, ALGORITHMS)
  config = settings(base.get_config())
  config.name = f'mnist_sparse_{variant}'
  config.title = 'Sparse training'
  config.sweep.algorithm = (algorithm,)
  if tuning:
    config.sweep.seed, config.sweep.learning_rate, config.sweep.sparsity = (3,), GRID, (0.9, 0.98)
  else:
    config.sweep.seed, config.alpha_rates, config.sweep.sparsity = (0, 1, 2), RATES[algorithm], (0.8, 0.9, 0.95, 0.98)
  config.sweep.sparsity = (0.0,) if algorithm == 'dense' else config.sweep.sparsity
  config.prune.densities = (0.1, 0.02) if tuning else config.prune.densities
  return config


def settings(config):
  """What all runs of sparse training on MNIST share."""
  config.steps, config.schedule = 9_000, 'cosine'
  config.sweep.alpha, config.sweep.optimizer = ALPHAS, ('momentum',)
  config.prune.densities, config.prune.output_factor = (0.2, 0.1, 0.05, 0.02), 1.0
  config.report = ('compare',)
  return config

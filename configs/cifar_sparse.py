"""Sparse training on CIFAR-10: one algorithm at 90 and 98 %, with and without Powerpropagation; a 16-32-64 convolutional network.

Our protocol: 15 epochs (5,400 steps at batch 125) of SGD with momentum 0.9 and decay 5e-4 of the weights that the network sees,
under a cosine with warm-up, with crops and flips; 45,000 images for training, 5,000 for validation. ERK, masks change every 100
steps and settle after three quarters. The learning rate of each algorithm and α is chosen on the validation images at 95 %, in 5
epochs, from the same grid for both powers, with a seed of its own: RATES holds what was chosen.

  python -m experiments.main --config=configs/cifar_sparse.py:gradual --workdir=runs/cifar_sparse/gradual
  python -m experiments.main --config=configs/cifar_sparse.py:gradual_tuning --workdir=runs/cifar_sparse/gradual_tuning

12 networks, and 10 networks for the choice of the rate; so for each of ALGORITHMS. Dense networks, pruned after training, have
no sparsity of their own: 6 networks, and 10 networks. `python -m experiments.suite --config=... --workdir=runs/cifar_sparse` runs
all that is missing. Results are in RESULTS.md, times in run.json beside them.
"""
from configs import base

ALGORITHMS = ('dense', 'gradual', 'top_kast', 'rigl', 'static')
ALPHAS = (1.0, 2.0)
GRID = (0.02, 0.05, 0.1, 0.2, 0.4)
RATES = {   # of ALPHAS
    'dense': (0.05, 0.2),   # as cifar_figure2.py chose them
    'gradual': (0.05, 0.05),
    'top_kast': (0.1, 0.2),
    'rigl': (0.02, 0.1),
    'static': (0.1, 0.05),
}


def get_config(variant: str = 'gradual'):
  """`variant`: an algorithm, or an algorithm and '_tuning'."""
  algorithm, tuning = base.algorithm_of('cifar_sparse', variant, ALGORITHMS)
  config = settings(base.get_config())
  config.name = f'cifar_sparse_{variant}'
  config.title = 'Sparse training'
  config.sweep.alpha = ALPHAS
  config.sweep.algorithm = (algorithm,)
  if tuning:
    config.steps = 5 * 360
    config.sweep.seed, config.sweep.learning_rate, config.sweep.sparsity = (3,), GRID, (0.95,)
  else:
    config.sweep.seed, config.alpha_rates, config.sweep.sparsity = (0, 1, 2), RATES[algorithm], (0.9, 0.98)
  config.sweep.sparsity = (0.0,) if algorithm == 'dense' else config.sweep.sparsity
  config.prune.densities = (0.05,) if tuning else (0.1, 0.02)
  config.report = ('compare',)
  return config


def settings(config):
  """What all runs on CIFAR-10 share."""
  config.dataset, config.model, config.train_images = 'cifar10', 'conv_16_32_64', 45_000
  config.batch_size, config.steps = 125, 15 * 360
  config.augment, config.schedule = 'crop_and_flip', 'cosine'
  config.sweep.optimizer, config.weight_decay = ('momentum_decay',), 5e-4
  config.prune.output_factor = 1.0
  return config

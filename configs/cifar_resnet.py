"""Sparse training of a ResNet-18 on CIFAR-10, for a GPU: one algorithm at 90 and 98 %, with and without Powerpropagation.

11.2 million weights, BatchNorm, convolutions in bfloat16. The protocol of cifar_sparse.py otherwise; the learning rate of each
algorithm and α is chosen at 95 % in 3 epochs: RATES holds what was chosen.

  python -m experiments.main --config=configs/cifar_resnet.py:gradual --workdir=runs/cifar_resnet/gradual
  python -m experiments.main --config=configs/cifar_resnet.py:gradual_tuning --workdir=runs/cifar_resnet/gradual_tuning

12 networks, and 8 networks for the choice of the rate; so for each of ALGORITHMS. Results are in RESULTS.md, times in run.json
beside them.
"""
from configs import base, cifar_sparse

ALGORITHMS = ('gradual', 'rigl', 'top_kast', 'static')
GRID = (0.03, 0.1, 0.3, 1.0)
# Of cifar_sparse.ALPHAS. Static masks have not been tuned: they have the rates of gradual pruning and RigL.
RATES = dict.fromkeys(ALGORITHMS, (0.1, 1.0)) | {'top_kast': (1.0, 1.0)}


def get_config(variant: str = 'gradual'):
  """`variant`: an algorithm, or an algorithm and '_tuning'."""
  algorithm, tuning = base.algorithm_of('cifar_resnet', variant, ALGORITHMS)
  config = cifar_sparse.settings(base.get_config())
  config.name = f'cifar_resnet_{variant}'
  config.title = 'Sparse training of a ResNet-18'
  config.model, config.compute = 'resnet_18', 'bfloat16'
  config.sweep.alpha = cifar_sparse.ALPHAS
  config.sweep.algorithm = (algorithm,)
  if tuning:
    config.steps = 3 * 360
    config.sweep.seed, config.sweep.learning_rate, config.sweep.sparsity = (3,), GRID, (0.95,)
  else:
    config.sweep.seed, config.alpha_rates, config.sweep.sparsity = (0, 1, 2), RATES[algorithm], (0.9, 0.98)
  config.prune.densities = (0.05,) if tuning else (0.1, 0.02)
  config.report = ('compare',)
  return config

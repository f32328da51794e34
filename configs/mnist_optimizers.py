"""Does it matter in which order optimiser and slope come? Adam inside target propagation against the naive order, and SGD.

  python -m experiments.main --config=configs/mnist_optimizers.py:adam --workdir=runs/mnist_optimizers_adam
  python -m experiments.main --config=configs/mnist_optimizers.py:sgd --workdir=runs/mnist_optimizers_sgd

Adam: 90 networks, α ∈ {2, 3, 4} × two orders × five learning rates × 3 seeds, 15,000 steps. SGD, for which the orders are
one: 45 networks. Each line of the report is at the rate with the best mean validation accuracy over all densities, the same
rule and the same grid for both orders. Times and results are in RESULTS.md.
"""
from configs import base


def get_config(variant: str = 'adam'):
  """`variant`: 'adam' or 'sgd'."""
  config = base.get_config()
  config.steps = 15_000
  config.sweep.alpha = (2.0, 3.0, 4.0)
  config.sweep.seed = (0, 1, 2)
  config.report = ('compare', 'learning_rate')
  if variant == 'adam':
    config.sweep.optimizer = ('adam',)
    config.sweep.update = ('target_propagation', 'backpropagation')
    config.sweep.learning_rate = (3e-4, 1e-3, 3e-3, 1e-2, 3e-2)
  elif variant == 'sgd':
    config.sweep.learning_rate = (0.03, 0.1, 0.3, 0.6, 1.0)
  else:
    raise ValueError(f"mnist_optimizers has the variants 'adam' and 'sgd', not {variant!r}.")
  config.name = f'mnist_optimizers_{variant}'
  return config

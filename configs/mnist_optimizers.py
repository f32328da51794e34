"""Does it matter in which order optimiser and slope come? Adam inside target propagation against the naive order.

  python -m experiments.main --config=configs/mnist_optimizers.py --workdir=runs/mnist_optimizers

126 networks: α ∈ {2, 3, 4} × two orders × seven learning rates × 3 seeds, 15,000 steps. Each line of the report is at the rate
with the best mean validation accuracy over all densities: the same rule and the same grid for both orders. SGD, for which the
orders are one, has the same α, seeds and steps in mnist_learning_rates.py; `python -m experiments.report DIR DIR` lays the two
side by side. Results are in RESULTS.md, times in run.json beside them.
"""
from configs import base


def get_config():
  config = base.get_config()
  config.name = 'mnist_optimizers'
  config.title = 'Adam: target propagation against the naive order'
  config.steps = 15_000
  config.sweep.alpha = (2.0, 3.0, 4.0)
  config.sweep.seed = (0, 1, 2)
  config.sweep.optimizer = ('adam',)
  config.sweep.update = ('target_propagation', 'backpropagation')
  config.sweep.learning_rate = (3e-4, 5e-4, 7e-4, 1e-3, 2e-3, 3e-3, 1e-2)
  config.report = ('compare', 'learning_rate')
  return config

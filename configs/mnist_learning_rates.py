"""How sensitive is each power α to the learning rate? SGD at five rates, all else as in mnist_lenet.py, 15,000 steps.

  python -m experiments.main --config=configs/mnist_learning_rates.py --workdir=runs/mnist_learning_rates

75 networks: 5 α × 5 rates × 3 seeds. At initialisation the step of a network with α > 1 is several times smaller than that of
α = 1 at the same rate, so a comparison at one rate alone may punish either.
Results are in RESULTS.md, times in run.json beside them.
"""
from configs import base


def get_config():
  config = base.get_config()
  config.name = 'mnist_learning_rates'
  config.title = 'Learning rates'
  config.steps = 15_000
  config.sweep.seed = (0, 1, 2)
  config.sweep.learning_rate = (0.03, 0.1, 0.3, 0.6, 1.0)
  config.report = ('learning_rate', 'compare')
  return config

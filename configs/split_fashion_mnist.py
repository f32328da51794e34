"""Split Fashion-MNIST: five tasks of two kinds of clothes each; all else as in split_mnist.py.

  python -m experiments.main --config=configs/split_fashion_mnist.py:packnet --workdir=runs/split_fashion/packnet
  python -m experiments.main --config=configs/split_fashion_mnist.py:packnet_tuning --workdir=runs/split_fashion/packnet_tuning

9 networks with masks (3 seeds × α ∈ {1, 2, 3}), 3 networks without; to choose rates 12 networks where powers or strengths are
chosen as well, else 4 networks; so for each of ALGORITHMS, and by `python -m experiments.suite` for all.
"""
from configs import base, permuted_mnist

ALGORITHMS = permuted_mnist.ALGORITHMS


def get_config(variant: str = 'packnet'):
  """`variant`: a method, or a method and '_tuning'."""
  algorithm, tuning = base.algorithm_of('split_fashion_mnist', variant, ALGORITHMS)
  config = permuted_mnist.settings(base.get_config())
  config.dataset = 'fashion_mnist'
  config.continual.sequence, config.continual.tasks, config.continual.scenario = 'split', 5, 'task'
  config.steps, config.sweep.seed = 370, (0, 1, 2)
  config = permuted_mnist.method(config, algorithm, tuning)
  config.name = f'split_fashion_mnist_{variant}'
  config.title = 'Two classes after two'
  return config

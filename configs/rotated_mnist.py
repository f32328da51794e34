"""Rotated MNIST: ten tasks, the images turned by 0° to 162°; network and methods as in permuted_mnist.py.

  python -m experiments.main --config=configs/rotated_mnist.py:packnet --workdir=runs/rotated_mnist/packnet
  python -m experiments.main --config=configs/rotated_mnist.py:packnet_tuning --workdir=runs/rotated_mnist/packnet_tuning

9 networks with masks (3 seeds × α ∈ {1, 2, 3}), 3 networks without; to choose rates 12 networks where powers or strengths are
chosen as well, else 4 networks; so for each of ALGORITHMS, and by `python -m experiments.suite` for all.
"""
from configs import base, permuted_mnist

ALGORITHMS = permuted_mnist.ALGORITHMS


def get_config(variant: str = 'packnet'):
  """`variant`: a method, or a method and '_tuning'."""
  algorithm, tuning = base.algorithm_of('rotated_mnist', variant, ALGORITHMS)
  config = permuted_mnist.settings(base.get_config())
  config.continual.sequence = 'rotated'
  config.sweep.seed = (0, 1, 2)
  config = permuted_mnist.method(config, algorithm, tuning)
  config.name = f'rotated_mnist_{variant}'
  config.title = 'Rotated images'
  return config

"""MNIST, Fashion-MNIST and CIFAR-10 one after another, each with ten outputs of its own; methods as in permuted_mnist.py.

The middle 28×28 pixels of the photographs, in grey. A 784-100-100 network, 5 epochs for each task.

  python -m experiments.main --config=configs/mixed_images.py:packnet --workdir=runs/mixed_images/packnet
  python -m experiments.main --config=configs/mixed_images.py:packnet_tuning --workdir=runs/mixed_images/packnet_tuning

9 networks with masks (3 seeds × α ∈ {1, 2, 3}), 3 networks without; to choose rates 12 networks where powers or strengths are
chosen as well, else 4 networks; so for each of ALGORITHMS, and by `python -m experiments.suite` for all.
"""
from configs import base, permuted_mnist

ALGORITHMS = permuted_mnist.ALGORITHMS


def get_config(variant: str = 'packnet'):
  """`variant`: a method, or a method and '_tuning'."""
  algorithm, tuning = base.algorithm_of('mixed_images', variant, ALGORITHMS)
  config = permuted_mnist.settings(base.get_config())
  config.continual.sequence, config.continual.tasks, config.continual.scenario = 'mixed', 3, 'task'
  config.sweep.seed = (0, 1, 2)
  config = permuted_mnist.method(config, algorithm, tuning)
  config.name = f'mixed_images_{variant}'
  config.title = 'Digits, clothes, photographs'
  return config

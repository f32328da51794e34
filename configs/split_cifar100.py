"""Split CIFAR-100: ten tasks of ten classes each, each with outputs of its own; a small AlexNet without BatchNorm, for a GPU.

Not run by us: the data set was not at hand. 20 epochs (720 steps at batch 125) for each task with crops and flips, 45,000 images
for training, 5,000 for validation; methods as in permuted_mnist.py.

  python -m experiments.main --config=configs/split_cifar100.py:packnet --workdir=runs/split_cifar100/packnet
  python -m experiments.main --config=configs/split_cifar100.py:packnet_tuning --workdir=runs/split_cifar100/packnet_tuning

9 networks with masks (3 seeds × α ∈ {1, 2, 3}), 3 networks without; to choose rates 12 networks where powers or strengths are
chosen as well, else 4 networks; so for each of ALGORITHMS, and by `python -m experiments.suite` for all.
"""
from configs import base, permuted_mnist

ALGORITHMS = permuted_mnist.ALGORITHMS


def get_config(variant: str = 'packnet'):
  """`variant`: a method, or a method and '_tuning'."""
  algorithm, tuning = base.algorithm_of('split_cifar100', variant, ALGORITHMS)
  config = permuted_mnist.settings(base.get_config())
  config.dataset, config.model, config.train_images = 'cifar100', 'alexnet_small', 45_000
  config.batch_size, config.steps, config.augment = 125, 720, 'crop_and_flip'
  config.continual.sequence, config.continual.tasks, config.continual.scenario = 'split', 10, 'task'
  config.sweep.seed = (0, 1, 2)
  config = permuted_mnist.method(config, algorithm, tuning)
  config.name = f'split_cifar100_{variant}'
  config.title = 'Ten classes after ten'
  return config

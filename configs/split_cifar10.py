"""Split CIFAR-10: five tasks of two classes each, each with outputs of its own; a 16-32-64 convolutional network.

Our protocol: 5 epochs (360 steps at batch 125) for each task with crops and flips, 45,000 images for training, 5,000 for
validation; methods as in permuted_mnist.py. The RATES here are what METHOD_tuning chose on the validation images, with a seed of
its own, from the grid there; the other methods, which were not run, have those of permuted_mnist.py. Results are in RESULTS.md,
times in run.json beside them.

  python -m experiments.main --config=configs/split_cifar10.py:packnet --workdir=runs/split_cifar10/packnet
  python -m experiments.main --config=configs/split_cifar10.py:packnet_tuning --workdir=runs/split_cifar10/packnet_tuning

6 networks with masks (3 seeds × α ∈ {1, 2}), 3 networks without; to choose rates 8 networks where there are powers, 12 networks
where strengths are chosen as well, else 4 networks; so for each of ALGORITHMS, and by `python -m experiments.suite` for all.
"""
from configs import base, permuted_mnist

ALGORITHMS = permuted_mnist.ALGORITHMS
RATES = permuted_mnist.RATES | {   # of α = 1, or of 1 and 2
  'fine_tune': (0.03,), 'separate': (0.03,), 'packnet': (0.03, 0.2), 'efficient_packnet': (0.03, 0.2)}


def get_config(variant: str = 'packnet'):
  """`variant`: a method, or a method and '_tuning'."""
  algorithm, tuning = base.algorithm_of('split_cifar10', variant, ALGORITHMS)
  config = permuted_mnist.settings(base.get_config())
  config.dataset, config.model, config.train_images = 'cifar10', 'conv_16_32_64', 45_000
  config.batch_size, config.steps, config.augment = 125, 360, 'crop_and_flip'
  config.continual.sequence, config.continual.tasks, config.continual.scenario = 'split', 5, 'task'
  config.sweep.seed = (0, 1, 2)
  config = permuted_mnist.method(config, algorithm, tuning, RATES)
  config.sweep.alpha = tuple(alpha for alpha in config.sweep.alpha if alpha <= 2)
  config.name = f'split_cifar10_{variant}'
  config.title = 'Two classes after two'
  return config

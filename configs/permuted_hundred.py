"""Permuted MNIST with a hundred tasks: PackNet, which is told of the hundred, against EfficientPackNet, which is not.

Our protocol: a 784-500-500-10 network (647,000 weights) with outputs shared by all tasks, half an epoch (458 steps at batch 60)
for each task, of which the last fifth under its mask, gradients clipped at length 1, all else as in permuted_mnist.py, where the
network is full after some ten tasks. EfficientPackNet may take at most 8 % of the weights for a task: with half of them, as
there, the network was full long before the hundredth. Without clipping its α = 2 diverged on one of the first twenty tasks at
every rate but the lowest. RATES are what METHOD_tuning chose on the validation images of all hundred tasks, with a seed of its
own, from GRID.

  python -m experiments.main --config=configs/permuted_hundred.py:packnet --workdir=runs/permuted_hundred/packnet
  python -m experiments.main --config=configs/permuted_hundred.py:packnet_tuning --workdir=runs/permuted_hundred/packnet_tuning

6 networks (3 seeds × α ∈ {1, 2}), to choose rates 8 networks; so for each of ALGORITHMS, and by `python -m experiments.suite` for
all. Times are in run.json beside the results.
"""
from configs import base, permuted_mnist

ALGORITHMS = permuted_mnist.PACKS
GRID = (0.05, 0.1, 0.2, 0.4)
RATES = {'packnet': (0.1, 0.2), 'efficient_packnet': (0.2, 0.4)}   # of α = 1 and 2


def get_config(variant: str = 'packnet'):
  """`variant`: a method, or a method and '_tuning'."""
  algorithm, tuning = base.algorithm_of('permuted_hundred', variant, ALGORITHMS)
  config = permuted_mnist.method(permuted_mnist.settings(base.get_config()), algorithm, tuning, RATES)
  config.name = f'permuted_hundred_{variant}'
  config.title = 'A hundred permutations'
  config.model, config.steps, config.sweep.alpha = 'mlp_500_500', 458, (1.0, 2.0)
  config.continual.tasks, config.continual.densities = 100, (0.01, 0.02, 0.03, 0.05, 0.08)
  config.clip_norm, config.continual.matrix_every, config.continual.inferred_images = 1.0, 20, 100
  if tuning:
    config.sweep.learning_rate = GRID
  else:
    config.sweep.seed = (0, 1, 2)
  return config

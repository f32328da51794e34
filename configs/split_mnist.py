"""Split MNIST: five tasks of two digits each, each with outputs of its own; network and methods as in permuted_mnist.py.

2 epochs (370 steps) for each task. With --config.continual.scenario=class the outputs of all tasks so far compete.

  python -m experiments.main --config=configs/split_mnist.py:packnet --workdir=runs/split_mnist/packnet
  python -m experiments.main --config=configs/split_mnist.py:packnet_tuning --workdir=runs/split_mnist/packnet_tuning

RATES and STRENGTHS are what METHOD_tuning chose on the validation images, with a seed of its own, from GRID and STRENGTH_GRID of
permuted_mnist.py, alike for all methods. Results are in RESULTS.md, times in run.json beside them.

9 networks with masks (3 seeds × α ∈ {1, 2, 3}), 3 networks without; to choose rates 12 networks where powers or strengths are
chosen as well, else 4 networks; so for each of ALGORITHMS, and by `python -m experiments.suite` for all.
"""
from configs import base, permuted_mnist

ALGORITHMS = permuted_mnist.ALGORITHMS
RATES = {'fine_tune': (0.01,), 'separate': (0.1,), 'joint': (0.1,), 'ewc': (0.1,), 'ewc_online': (0.1,),
         'synaptic_intelligence': (0.2,), 'replay': (0.1,), 'a_gem': (0.03,), 'packnet': (0.2, 0.1, 0.03),
         'efficient_packnet': (0.2, 0.1, 0.03)}   # of α = 1, or of 1, 2 and 3
STRENGTHS = {'ewc': 300.0, 'ewc_online': 300.0, 'synaptic_intelligence': 0.1}


def get_config(variant: str = 'packnet'):
  """`variant`: a method, or a method and '_tuning'."""
  algorithm, tuning = base.algorithm_of('split_mnist', variant, ALGORITHMS)
  config = permuted_mnist.settings(base.get_config())
  config.continual.sequence, config.continual.tasks, config.continual.scenario = 'split', 5, 'task'
  config.steps, config.sweep.seed = 370, (0, 1, 2)
  config = permuted_mnist.method(config, algorithm, tuning, RATES, STRENGTHS)
  config.name = f'split_mnist_{variant}'
  config.title = 'Two classes after two'
  return config

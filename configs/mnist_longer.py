"""Does training longer help sparse networks, and Powerpropagation? Gradual pruning and RigL for 1, 2 and 5 times 9,000 steps.

As in mnist_sparse.py, at 5 and 2 % kept and at the rates chosen there; schedules of masks and learning rates stretch with the
training.

  python -m experiments.main --config=configs/mnist_longer.py:gradual_1x --workdir=runs/mnist_longer/gradual_1x
  python -m experiments.main --config=configs/mnist_longer.py:gradual_2x --workdir=runs/mnist_longer/gradual_2x
  python -m experiments.main --config=configs/mnist_longer.py:gradual_5x --workdir=runs/mnist_longer/gradual_5x
  python -m experiments.main --config=configs/mnist_longer.py:rigl_1x --workdir=runs/mnist_longer/rigl_1x
  python -m experiments.main --config=configs/mnist_longer.py:rigl_2x --workdir=runs/mnist_longer/rigl_2x
  python -m experiments.main --config=configs/mnist_longer.py:rigl_5x --workdir=runs/mnist_longer/rigl_5x

12 networks each: α ∈ {1, 2} × two sparsities × 3 seeds. Results are in RESULTS.md, times in run.json beside them.
"""
from configs import base, mnist_sparse

VARIANTS = {f'{algorithm}_{times}x': (algorithm, times) for algorithm in ('gradual', 'rigl') for times in (1, 2, 5)}


def get_config(variant: str = 'gradual_2x'):
  """`variant`: algorithm and how many times as long, as 'rigl_5x'."""
  if variant not in VARIANTS:
    raise base.unknown('mnist_longer', variant, tuple(VARIANTS))
  algorithm, times = VARIANTS[variant]
  config = mnist_sparse.get_config(algorithm)
  config.name = f'mnist_longer_{variant}'
  config.title = 'Training longer'
  config.steps = times * 9_000
  config.sweep.sparsity, config.prune.densities = (0.95, 0.98), (0.05, 0.02)
  return config

"""Table 1 in small: one algorithm at four sparsities, with and without Powerpropagation; LeNet-300-100 on MNIST.
"""
from configs import base

ALGORITHMS = ('static', 'set', 'rigl', 'top_kast', 'one_shot', 'gradual', 'gradual_returns', 'straight_through')


def get_config(variant: str = 'gradual'):
  """`variant`: the algorithm."""
  if variant not in ALGORITHMS:
    raise ValueError(f'mnist_sparse has the variants {", ".join(map(repr, ALGORITHMS))}, not {variant!r}.')
  config = base.get_config()
  config.name = f'mnist_sparse_{variant}'
  config.title = 'Sparse training'
  config.steps = 9_000
  config.schedule = 'cosine'
  config.sweep.alpha = (1.0, 2.0)
  config.sweep.seed = (0, 1, 2)
  config.sweep.optimizer = ('momentum',)
  config.sweep.learning_rate = (0.01, 0.03, 0.1)
  config.sweep.algorithm = (variant,)
  config.sweep.sparsity = (0.8, 0.9, 0.95, 0.98)
  config.prune.densities = (0.2, 0.1, 0.05, 0.02)
  config.report = ('compare',)
  return config

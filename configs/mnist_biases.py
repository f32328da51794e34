"""Reparameterised biases against plain ones. The paper reparameterises weights only and expects trouble with biases.

  python -m experiments.main --config=configs/mnist_biases.py:normal --workdir=runs/mnist_biases_normal
  python -m experiments.main --config=configs/mnist_biases.py:zeros --workdir=runs/mnist_biases_zeros

12 networks each, α ∈ {2, 4} × two kinds of biases × 3 seeds, 15,000 steps. Biases begin at random values with standard
deviation 0.05, the same for both kinds, or at 0, where a reparameterised one stays for ever: 0 is a critical point for α > 1.
Results are in RESULTS.md, times in run.json beside them.
"""
from configs import base


def get_config(variant: str = 'normal'):
  """`variant`: 'normal' or 'zeros', how biases begin."""
  if variant not in ('normal', 'zeros'):
    raise ValueError(f"mnist_biases has the variants 'normal' and 'zeros', not {variant!r}.")
  config = base.get_config()
  config.name = f'mnist_biases_{variant}'
  config.title = 'Reparameterised biases'
  config.steps = 15_000
  config.sweep.alpha = (2.0, 4.0)
  config.sweep.seed = (0, 1, 2)
  config.sweep.biases = ('plain', 'reparameterised')
  config.bias_stddev = 0.05 if variant == 'normal' else 0.0
  config.report = ('compare',)
  return config

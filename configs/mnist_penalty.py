"""Networks with parameters of their own on MNIST: STR, L0 gates and v⊙v − u⊙u. A penalty is their knob, not a sparsity.

LeNet-300-100 and training as in mnist_sparse.py, at twelve penalties (four for v⊙v − u⊙u, which is pruned in one shot
afterwards) and two learning rates. For each density the table takes of each rate the penalty that comes nearest to it, of these
the better one on the validation images, and says what it reached. With α = 2 Powerpropagation acts on w, or on v and u. Gates
are trained by Adam: under SGD with momentum all of them move together, and close at once.

  python -m experiments.main --config=configs/mnist_penalty.py:soft_threshold --workdir=runs/mnist_penalty/soft_threshold
  python -m experiments.main --config=configs/mnist_penalty.py:hard_concrete --workdir=runs/mnist_penalty/hard_concrete
  python -m experiments.main --config=configs/mnist_penalty.py:square_difference --workdir=runs/mnist_penalty/square_difference

144 networks, 144 networks and 48 networks: for a GPU, which trains those of one α side by side. Results are in RESULTS.md, times
in run.json beside them.
"""
import numpy as np

from configs import base, mnist_sparse

PENALTIES = {
    'soft_threshold': tuple(float(x) for x in np.geomspace(3e-4, 1e-1, 12)),
    'hard_concrete': tuple(float(x) for x in np.geomspace(1e-6, 1e-3, 12)),
    'square_difference': (0.0, 1e-5, 1e-4, 1e-3)}


def get_config(variant: str = 'soft_threshold'):
  """`variant`: 'soft_threshold', 'hard_concrete' or 'square_difference'."""
  if variant not in PENALTIES:
    raise base.unknown('mnist_penalty', variant, tuple(PENALTIES))
  config = mnist_sparse.settings(base.get_config())
  config.name = f'mnist_penalty_{variant}'
  config.title = 'Parameters of their own'
  gates = variant == 'hard_concrete'
  config.sweep.optimizer = ('adam',) if gates else config.sweep.optimizer
  config.sweep.seed, config.sweep.learning_rate = (0, 1, 2), (0.001, 0.003) if gates else (0.05, 0.2)
  config.sweep.algorithm, config.sweep.penalty = (variant,), PENALTIES[variant]
  return config

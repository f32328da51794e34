"""Figure 2 of the paper in small: accuracy against sparsity on CIFAR-10 for four powers, pruned in one shot after training.

The paper has a reduced AlexNet; its protocol and powers are not known to us. Ours: a 16-32-64 convolutional network, trained as
in cifar_sparse.py, which also says how the learning rate of each α is chosen; the same share of every layer, and one threshold
for all.

  python -m experiments.main --config=configs/cifar_figure2.py --workdir=runs/cifar_figure2
  python -m experiments.main --config=configs/cifar_figure2.py:tuning --workdir=runs/cifar_figure2_tuning

8 networks, and 20 networks for the choice of the rate. Results are in RESULTS.md, times in run.json beside them.
"""
from configs import base, cifar_sparse

ALPHAS = (1.0, 1.375, 2.0, 3.0)
RATES = (0.05, 0.1, 0.2, 0.1)   # of ALPHAS


def get_config(variant: str = 'full'):
  """`variant`: 'full', or 'tuning', the choice of learning rates."""
  if variant not in ('full', 'tuning'):
    raise ValueError(f"cifar_figure2 has the variants 'full' and 'tuning', not {variant!r}.")
  config = cifar_sparse.settings(base.get_config())
  config.name = 'cifar_figure2'
  config.title = 'Figure 2: accuracy against sparsity'
  config.sweep.alpha = ALPHAS
  if variant == 'tuning':
    config.name, config.steps = 'cifar_figure2_tuning', 5 * 360
    config.sweep.seed, config.sweep.learning_rate = (3,), cifar_sparse.GRID
  else:
    config.sweep.seed, config.alpha_rates = (0, 1), RATES
  config.prune.scopes = ('layer', 'global')
  config.report = ('compare',)
  return config

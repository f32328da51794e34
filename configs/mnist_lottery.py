"""Lottery tickets on MNIST, with and without Powerpropagation: rounds of training, pruning a fifth, and rewinding.

LeNet-300-100 as in mnist_sparse.py, in 17 rounds after the dense one, which leave 2.4 % of the weights; what is left goes back to
its initialisation, or to its values after 500 steps. The output layer loses a tenth in each round.

  python -m experiments.main --config=configs/mnist_lottery.py:initialisation --workdir=runs/mnist_lottery/initialisation
  python -m experiments.main --config=configs/mnist_lottery.py:late --workdir=runs/mnist_lottery/late

6 networks in each round: α ∈ {1, 2} × 3 seeds, at the rates that mnist_sparse.py chose for dense networks. Results are in
RESULTS.md, times in run.json beside them.
"""
from configs import base, mnist_sparse


def get_config(variant: str = 'initialisation'):
  """`variant`: 'initialisation' or 'late', what weights are rewound to."""
  if variant not in ('initialisation', 'late'):
    raise ValueError(f"mnist_lottery has the variants 'initialisation' and 'late', not {variant!r}.")
  config = mnist_sparse.settings(base.get_config())
  config.protocol = 'lottery'
  config.name = f'mnist_lottery_{variant}'
  config.title = 'Lottery tickets'
  config.sweep.seed = (0, 1, 2)
  config.alpha_rates = mnist_sparse.RATES['dense']
  config.lottery.rewind_steps = 500 if variant == 'late' else 0
  return config

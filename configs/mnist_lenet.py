"""Figure 1 of the paper: LeNet-300-100 on MNIST, pruned in one shot after training, for five powers α.

The protocol of the authors' released notebook: weights truncated normal with standard deviation 1/sqrt(fan-in), biases zero,
never pruned and never reparameterised; SGD at 0.1, batch 60, 50,000 steps; train on the first 55,000 images; keep
int(p n) weights of each hidden layer, p = geomspace(0.01, 1, 20), and min(1, 2p) of the output layer.

  python -m experiments.main --config=configs/mnist_lenet.py --workdir=runs/mnist_lenet          25 networks, 50,000 steps
  python -m experiments.main --config=configs/mnist_lenet.py:quick --workdir=runs/figure1        25 networks, 15,000 steps

Results are in RESULTS.md, times in run.json beside them.
"""
from configs import base


def get_config(variant: str = 'full'):
  """`variant`: 'full', the protocol to the letter, or 'quick', fewer steps."""
  if variant not in ('full', 'quick'):
    raise ValueError(f"mnist_lenet has the variants 'full' and 'quick', not {variant!r}.")
  config = base.get_config()
  config.name = 'mnist_lenet'
  config.title = 'Figure 1: accuracy against sparsity'
  if variant == 'quick':
    config.steps = 15_000
  return config

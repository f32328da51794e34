"""The sweep of figure 1 on Fashion-MNIST: everything else as in mnist_lenet.py, learning rate included.

  python -m experiments.main --config=configs/fashion_mnist_lenet.py --workdir=runs/fashion_mnist_lenet

The paper has no such figure; its protocol is ours. 25 networks of 50,000 steps; results are in RESULTS.md. The data
set's four official files must be in $POWERPROP_DATA/fashion_mnist, or prepared by tensorflow-datasets.
"""
from configs import mnist_lenet


def get_config(variant: str = 'full'):
  """`variant`: 'full' or 'quick', as for mnist_lenet."""
  config = mnist_lenet.get_config(variant)
  config.name = 'fashion_mnist_lenet'
  config.dataset = 'fashion_mnist'
  return config

"""Powerpropagation and BatchNorm: learning rates, and BatchNorm's averages made anew after pruning; ResNet-20 on CIFAR-10.

Dense networks, pruned in one shot after training, trained as in cifar_sparse.py at four rates; each evaluated with the averages
that training left and with those of 50 batches through the pruned network.

  python -m experiments.main --config=configs/cifar_batch_norm.py --workdir=runs/cifar_batch_norm

8 networks: two powers × four rates, one seed; for a GPU. RESULTS.md has two of them after 2 epochs, times in run.json beside it.
"""
from configs import base, cifar_resnet, cifar_sparse


def get_config():
  config = cifar_sparse.settings(base.get_config())
  config.name = 'cifar_batch_norm'
  config.title = 'BatchNorm, learning rates and recalibration'
  config.model = 'resnet_20'
  config.sweep.alpha, config.sweep.seed, config.sweep.learning_rate = cifar_sparse.ALPHAS, (0,), cifar_resnet.GRID
  config.prune.scopes = ('layer', 'layer recalibrated', 'global', 'global recalibrated')
  config.report = ('learning_rate', 'compare')
  return config

"""A small convolutional network with BatchNorm, and experiments.main with it among the known ones.

  python -m tests.tiny_photographs --config=... --workdir=... --config.model=tiny_photographs
"""
import runpy

import haiku as hk
import jax

from experiments.models import MODELS, Model


def network(classes, bias_stddev):
  """A row of MODELS: two convolutions with BatchNorm, the mean over pixels, `classes`."""
  def forward(images, is_training):
    x = hk.Conv2D(8, 3, 2, with_bias=False, name='first')(images)
    x = jax.nn.relu(hk.BatchNorm(True, True, 0.9, name='norm_0')(x, is_training))
    x = hk.Conv2D(16, 3, 2, with_bias=False, name='second')(x)
    x = jax.nn.relu(hk.BatchNorm(True, True, 0.9, name='norm_1')(x, is_training))
    return hk.Linear(classes, name='output')(x.mean((1, 2)))
  return Model(forward, 'output/w', 'first/w', batch_norm=True)


if __name__ == '__main__':
  MODELS['tiny_photographs'] = network
  runpy.run_module('experiments.main', run_name='__main__', alter_sys=True)

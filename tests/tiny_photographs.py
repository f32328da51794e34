"""A small convolutional network with BatchNorm, and experiments.main with it among the known ones; each process of a run leaves
the masks that it holds at the end, in WORKDIR/masks_PROCESS.npz. Of several that are asked to stop, each is later than the one
before.

  python -m tests.tiny_photographs --config=... --workdir=... --config.model=tiny_photographs
"""
import runpy
import time

import haiku as hk
import jax
import numpy as np

from experiments import streamed
from experiments.models import MODELS, Model
from powerprop.reparam import leaf_name


def network(classes, bias_stddev):
  """A row of MODELS: two convolutions with BatchNorm, the mean over pixels, `classes`."""
  def forward(images, is_training):
    x = hk.Conv2D(8, 3, 2, with_bias=False, name='first')(images)
    x = jax.nn.relu(hk.BatchNorm(True, True, 0.9, name='norm_0')(x, is_training))
    x = hk.Conv2D(16, 3, 2, with_bias=False, name='second')(x)
    x = jax.nn.relu(hk.BatchNorm(True, True, 0.9, name='norm_1')(x, is_training))
    return hk.Linear(classes, name='output')(x.mean((1, 2)))
  return Model(forward, 'output/w', 'first/w', batch_norm=True)


def fit_and_leave_masks(setting, loads, workdir, fit=streamed.fit):
  state, *rest = fit(setting, loads, workdir)
  masks = jax.tree_util.tree_leaves_with_path(state.opt_state.masks.forward)
  arrays = {leaf_name(path).replace('/', ' '): np.asarray(mask) for path, mask in masks}
  np.savez(workdir / f'masks_{jax.process_index()}.npz', **arrays)
  return state, *rest


def say_later(text, say=streamed.say):
  if text.startswith('stopped'):
    time.sleep(jax.process_index())
  say(text)


if __name__ == '__main__':
  streamed.say = say_later
  streamed.fit = fit_and_leave_masks
  MODELS['tiny_photographs'] = network
  runpy.run_module('experiments.main', run_name='__main__', alter_sys=True)

"""Algorithms that make a network sparse while it trains, each a `SparsityUpdater` for `powerprop.sparsify`.

A row is chosen by drop score, grow score, distribution, schedule and scope:

  static            none; random at the start                      fixed
  given             none; from outside, as by `at_start`           fixed
  one_shot          drop |θ| once                                  dense to sparse
  gradual           drop |θ| by a cubic schedule                   dense to sparse
  straight_through  the largest |θ| at each step, all move         dense to sparse
  granet            drop |θ| by a cubic schedule, grow |∂L/∂θ|     from an initial sparsity
  ac_dc             the largest |θ|, and all again, in turn        dense to sparse
  set               drop |θ|, grow at random                       sparse to sparse
  rigl              drop |θ|, grow |∂L/∂θ|                         sparse to sparse
  top_kast          the largest |θ|; a larger set moves            sparse to sparse
  snfs              drop |θ|, grow |mean of ∂L/∂θ|                 sparse to sparse; counts of layers move with the mean
  dsr               drop |θ| over all layers, grow at random       sparse to sparse; counts of layers move with what is kept

SNIP, GraSP and SynFlow choose a mask before training: `snip_masks`, `grasp_masks` and `synflow_masks` make it, `given` keeps it.
"""
from collections.abc import Callable

from powerprop.sparse import SparsityUpdater
from powerprop.updaters.at_start import grasp_masks, snip_masks, synflow_masks
from powerprop.updaters.dense_to_sparse import ac_dc, gradual, granet, one_shot, straight_through
from powerprop.updaters.fixed import given, static
from powerprop.updaters.redistributing import dsr, snfs
from powerprop.updaters.sparse_to_sparse import rigl, set_, top_kast

UPDATERS: dict[str, Callable[..., SparsityUpdater]] = {
    'static': static,
    'given': given,
    'one_shot': one_shot,
    'gradual': gradual,
    'straight_through': straight_through,
    'granet': granet,
    'ac_dc': ac_dc,
    'set': set_,
    'rigl': rigl,
    'top_kast': top_kast,
    'snfs': snfs,
    'dsr': dsr,
}

__all__ = ['UPDATERS', 'ac_dc', 'dsr', 'given', 'gradual', 'granet', 'grasp_masks', 'one_shot', 'rigl', 'set_', 'snfs',
           'snip_masks', 'static', 'straight_through', 'synflow_masks', 'top_kast']

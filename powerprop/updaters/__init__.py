"""Algorithms that make a network sparse while it trains, each a `SparsityUpdater` for `powerprop.sparsify`.

A row is drop score × grow score × distribution × schedule × scope. The distribution is a default and may be any of
`powerprop.distributions`; but for SNFS and DSR the scope is each layer, or all together where the distribution is `globally`.

  rule              drop            grow               distribution  schedule                       scope
  static            –               random, once       ERK           fixed                          by layer
  given             –               by the mask        of the mask   fixed                          of the mask
  one_shot          |θ|             –                  uniform       one step                       by layer
  gradual           |θ|             –                  uniform       cubic                          by layer
  straight_through  |θ|             |θ|, all move      uniform       constant                       by layer
  granet            |θ|             |∂L/∂θ|            ERK           cubic, exchanges by a cosine   by layer
  ac_dc             |θ|             all                globally      phases                         together
  set               |θ|             random             ERK           every ΔT, by a cosine          by layer
  rigl              |θ|             |∂L/∂θ|            ERK           every ΔT, by a cosine          by layer
  top_kast          |θ|             |θ| in a larger    uniform       every n                        by layer
                                    set, which moves
  snfs              |θ|             |mean of ∂L/∂θ|    uniform       every ΔT, by a cosine          counts move with the mean
  dsr               |θ|             random             uniform       every ΔT, by a cosine          drops together, counts move

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

"""Algorithms that make a network sparse while it trains, each a `SparsityUpdater` for `powerprop.sparsify`.

A row is chosen by drop score, grow score, distribution, schedule and scope:

  static            none; random at the start                 fixed
  given             none; from outside                        fixed
  one_shot          drop |θ| once                             dense to sparse
  gradual           drop |θ| by a cubic schedule              dense to sparse
  straight_through  the largest |θ| at each step, all move    dense to sparse
  set               drop |θ|, grow at random                  sparse to sparse
  rigl              drop |θ|, grow |∂L/∂θ|                    sparse to sparse
  top_kast          the largest |θ|; a larger set moves       sparse to sparse
"""
from collections.abc import Callable

from powerprop.sparse import SparsityUpdater
from powerprop.updaters.dense_to_sparse import gradual, one_shot, straight_through
from powerprop.updaters.fixed import given, static
from powerprop.updaters.sparse_to_sparse import rigl, set_, top_kast

UPDATERS: dict[str, Callable[..., SparsityUpdater]] = {
    'static': static,
    'given': given,
    'one_shot': one_shot,
    'gradual': gradual,
    'straight_through': straight_through,
    'set': set_,
    'rigl': rigl,
    'top_kast': top_kast,
}

__all__ = ['UPDATERS', 'given', 'gradual', 'one_shot', 'rigl', 'set_', 'static', 'straight_through', 'top_kast']

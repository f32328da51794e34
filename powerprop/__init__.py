"""Powerpropagation for JAX: sparse networks by the reparameterisation θ = φ|φ|^(α−1)."""
from powerprop import (
    distributions,
    flops,
    frozen,
    masks,
    packnet,
    parameterisations,
    protection,
    statistics,
    task_inference,
    task_masks,
    thresholds,
    updaters,
)
from powerprop.modules import reparameterise
from powerprop.protection import ProtectState, protect, with_free
from powerprop.reparam import (
    Reparam,
    change_alpha,
    is_weight,
    keep_zeros,
    leaf_name,
    make_reparam,
    powerpropagation,
    psi,
    psi_inverse,
    psi_slope,
)
from powerprop.sparse import Masks, SparsifyState, SparsityUpdater, masked, rescaled, sparsify, with_masks
from powerprop.transforms import backpropagation, target_propagation

__version__ = '0.1.0'

__all__ = [
    'Masks', 'ProtectState', 'Reparam', 'SparsifyState', 'SparsityUpdater', 'backpropagation', 'change_alpha',
    'distributions', 'flops', 'frozen', 'is_weight', 'keep_zeros', 'leaf_name', 'make_reparam', 'masked', 'masks', 'packnet',
    'parameterisations', 'powerpropagation', 'protect', 'protection', 'psi', 'psi_inverse', 'psi_slope', 'reparameterise',
    'rescaled', 'sparsify', 'statistics', 'target_propagation', 'task_inference', 'task_masks', 'thresholds', 'updaters',
    'with_free', 'with_masks',
]

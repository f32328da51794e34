"""Powerpropagation for JAX: sparse networks by the reparameterisation θ = φ|φ|^(α−1)."""
from powerprop import masks, statistics, thresholds
from powerprop.modules import reparameterise
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
from powerprop.transforms import backpropagation, target_propagation

__version__ = '0.1.0'

__all__ = [
    'Reparam', 'backpropagation', 'change_alpha', 'is_weight', 'keep_zeros', 'leaf_name', 'make_reparam', 'masks',
    'powerpropagation', 'psi', 'psi_inverse', 'psi_slope', 'reparameterise', 'statistics', 'target_propagation', 'thresholds',
]

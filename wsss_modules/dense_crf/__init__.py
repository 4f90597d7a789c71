"""Fully connected Gaussian CRF by mean field on a permutohedral lattice, in plain torch."""

from wsss_modules.dense_crf._lattice import PermutohedralLattice
from wsss_modules.dense_crf._mean_field import (
    DEEPLAB_CRF,
    IRN_CRF,
    PSA_CRF,
    CRFKernels,
    CRFParameters,
    DenseCRF,
    crf_kernels,
    dense_crf,
    mean_field,
    unary_from_mask,
    unary_from_scores,
)

__all__ = [
    "DEEPLAB_CRF",
    "IRN_CRF",
    "PSA_CRF",
    "CRFKernels",
    "CRFParameters",
    "DenseCRF",
    "PermutohedralLattice",
    "crf_kernels",
    "dense_crf",
    "mean_field",
    "unary_from_mask",
    "unary_from_scores",
]

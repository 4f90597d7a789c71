"""Fully connected Gaussian CRF by mean field, on a permutohedral lattice or by exact sums over all pairs."""

from wsss_modules.dense_crf._exact import ExactGaussian
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
    "ExactGaussian",
    "PermutohedralLattice",
    "crf_kernels",
    "dense_crf",
    "mean_field",
    "unary_from_mask",
    "unary_from_scores",
]

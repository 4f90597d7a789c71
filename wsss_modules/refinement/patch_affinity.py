"""Refinement of class maps by the attention between patches (MCTformer).

Axes: B images, K foreground classes, L blocks, N patches on a grid of h by w.
"""

from __future__ import annotations

import torch
from torch import Tensor

from wsss_modules._checks import check_floating, check_ndim, check_shape
from wsss_modules._precision import at_least_float32

__all__ = ["refine_with_patch_affinity"]


def refine_with_patch_affinity(cam: Tensor, patch_attention: Tensor) -> Tensor:
    r"""Let every patch gather the class activations of the patches that it attends to.

    .. math:: \hat a_{k,i} = \sum_j M_{ij} \, a_{k,j}, \qquad M = \sum_l A_l

    Nothing is learnt, and nothing is normalised: rows of :math:`A_l` sum to less than 1, for the attention that goes to
    the class tokens is left out. Normalise the maps afterwards. Once, on the grid, before any up-sampling.

    Args:
        cam: (B, K, h, w), at least 0, usually. Leave absent classes out: the result does not change for the others.
        patch_attention: (B, N, N) attention between patches summed over blocks, queries in rows, see `AttentionSums`;
            or (L, B, N, N) for the blocks one by one.

    Returns:
        (B, K, h, w), in the dtype of ``cam``.

    Raises:
        TypeError: an argument is not floating point.
        ValueError: shapes don't match.

    Paper:
        Xu et al., Multi-class Token Transformer for Weakly Supervised Semantic Segmentation, CVPR 2022,
        arXiv:2203.02891, section 3.4.

    Differences:
        The average over blocks of the paper is the sum of the released code up to a factor.

    Notes:
        One matrix product for all classes. Half precision is summed in float32. Compiles with ``fullgraph=True``.

    Example:
        >>> cam = torch.tensor([[[[1.0, 0.0]]]])
        >>> refine_with_patch_affinity(cam, torch.tensor([[[0.6, 0.2], [0.5, 0.3]]]))
        tensor([[[[0.6000, 0.5000]]]])
    """
    check_ndim("cam", cam, 4, "(B, K, h, w)")
    check_floating("cam", cam)
    check_floating("patch_attention", patch_attention)
    patches = cam.shape[2] * cam.shape[3]
    wanted = (len(cam), patches, patches)
    if patch_attention.ndim == 4:
        check_shape("patch_attention", patch_attention, (None, *wanted), "(L, B, N, N), to match cam")
        patch_attention = patch_attention.sum(0, dtype=at_least_float32(patch_attention[:0]).dtype)
    check_shape("patch_attention", patch_attention, wanted, "(B, N, N), to match cam")
    with torch.autocast(cam.device.type, enabled=False):
        dtype = torch.promote_types(torch.promote_types(cam.dtype, patch_attention.dtype), torch.float32)
        gathered = cam.flatten(2).to(dtype) @ patch_attention.to(dtype).mT  # (B, K, N)
    return gathered.unflatten(2, cam.shape[2:]).to(cam.dtype)

"""Label maps from class scores and a saliency map.

Axes: B images, K foreground classes of the image at hand, H W pixels.
"""

from __future__ import annotations

import torch
from torch import Tensor

from wsss_modules._checks import check_floating, check_integer, check_ndim, check_shape

__all__ = ["fuse_saliency_labels"]


def fuse_saliency_labels(
    scores: Tensor,
    saliency: Tensor,
    *,
    keys: Tensor | None = None,
    conflict: float = 0.9,
    attention: float = 0.8,
    salient: float = 32 / 255,
    min_foreground: float = 0.01,
    ignore_index: int = 255,
) -> Tensor:
    """Label objects by their class scores and background by the lack of saliency; ignore where the two disagree (RCA).

    The background score is ``1 - saliency``, and the highest score wins. A pixel is ignored if more than one score is
    above ``conflict``; or if background wins although the pixel is salient, or some class scores above ``attention``.
    An image of which less than ``min_foreground`` is labelled with a class is ignored as a whole.

    Args:
        scores: (B, 1+K, H, W) float in [0, 1], background first, usually after a dense CRF. The background channel is
            not read: saliency takes its place. K may be 0.
        saliency: (B, 1, H, W) float foreground probability in [0, 1].
        keys: (K,) int64 class of each map, 1..K as in a mask; default: map k is class k.
        conflict: A score above this is a claim; two claims cancel out.
        attention: A class score above this makes a pixel foreground, whatever the saliency says.
        salient: Saliency from which a pixel can't be background.
        min_foreground: Least share of the image.
        ignore_index: Value of ignored pixels.

    Returns:
        mask (B, H, W) int64: 0 background, a class, or ``ignore_index``. The first of several equal scores wins.

    Raises:
        TypeError: ``scores`` or ``saliency`` is not floating point, or ``keys`` does not hold integers.
        ValueError: a wrong shape.

    Paper:
        Zhou, Zhang, Zhao and Li, Regional Semantic Contrast and Aggregation for Weakly Supervised Semantic
        Segmentation, CVPR 2022, arXiv:2203.09653.

    Notes:
        Masks of this function rest on image labels and on saliency, which is supervision of its own. Works in
        ``torch.compile(fullgraph=True)``.

    Example:
        >>> scores = torch.tensor([[0.0, 0.0, 0.0, 0.0], [0.7, 0.3, 0.95, 0.2]])[None, :, None]
        >>> saliency = torch.tensor([0.8, 0.1, 0.02, 0.4])[None, None, None]
        >>> fuse_saliency_labels(scores, saliency, keys=torch.tensor([7]))  # class, background, two claims, salient
        tensor([[[  7,   0, 255, 255]]])
    """
    check_ndim("scores", scores, 4, "(B, 1+K, H, W)")
    check_floating("scores", scores)
    if scores.shape[1] == 0:
        raise ValueError("scores: expected the background at channel 0, got no channel")
    check_shape("saliency", saliency, (scores.shape[0], 1, *scores.shape[2:]), "to match scores")
    check_floating("saliency", saliency)
    if keys is not None:
        check_shape("keys", keys, (scores.shape[1] - 1,), "to match scores")
        check_integer("keys", keys)
    both = torch.cat([1 - saliency.to(scores.dtype), scores[:, 1:]], 1)
    label = both.argmax(1)
    foreground = (saliency >= salient)[:, 0] | (scores[:, 1:] > attention).any(1)
    doubtful = ((both > conflict).sum(1) > 1) | (foreground & (label == 0))
    classes = label if keys is None else torch.cat([keys.new_zeros(1), keys])[label]
    mask = torch.where(doubtful, ignore_index, classes)
    labelled = ((label > 0) & ~doubtful).flatten(1).double().mean(1)  # double: 1 % exactly is enough
    return torch.where((labelled < min_foreground)[:, None, None], ignore_index, mask)

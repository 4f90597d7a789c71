"""A classifier of pixels by cosine similarity, as BANA's segmentation network ends.

Axes: B images, D feature channels, C classes with the background first, h w cells, H W pixels.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from wsss_modules._checks import check_floating, check_integer, check_ndim, check_shape
from wsss_modules._precision import at_least_float32

__all__ = ["CosineClassifier", "cosine_logits", "label_confidence"]


def cosine_logits(
    features: Tensor, weight: Tensor, size: tuple[int, int] | None = None, *, eps: float = 1e-12
) -> Tensor:
    r"""Cosine of each pixel's feature and each class's weight.

    .. math:: l_c = \frac{f \cdot w_c}{\max(|f|, \epsilon) \max(|w_c|, \epsilon)}

    Args:
        features: (B, D, h, w) floating point.
        weight: (C, D), or (C, D, 1, 1) as a convolution stores it.
        size: (H, W) to which the cosines are resized, bilinear with aligned corners; None leaves them.
        eps: shortest length.

    Returns:
        (B, C, h, w) or (B, C, H, W) in [-1, 1], in the dtype of ``features``. Not logits yet: multiply them by a
        temperature, 20 in BANA, before a softmax.

    Raises:
        TypeError: either is not floating point.
        ValueError: shapes don't match.

    Paper:
        Oh, Kim and Ham, Background-Aware Pooling and Noise-Aware Loss for Weakly-Supervised Semantic Segmentation, CVPR
        2021, arXiv:2104.00905, section 3.3.

    Notes:
        Half precision is computed in float32. Compiles with ``fullgraph=True``. The slope of a feature of zeros is
        1 / eps, as released: 1e12.

    Example:
        >>> features = torch.tensor([3.0, 4.0]).view(1, 2, 1, 1)
        >>> cosine_logits(features, torch.tensor([[2.0, 0.0], [0.0, -1.0]])).flatten()
        tensor([ 0.6000, -0.8000])
    """
    check_ndim("features", features, 4, "(B, D, h, w)")
    check_floating("features", features)
    check_floating("weight", weight)
    rows = weight.flatten(1)
    if weight.ndim not in (2, 4) or rows.shape[1] != features.shape[1]:
        raise ValueError(
            f"weight: expected shape (*, {features.shape[1]}) or (*, {features.shape[1]}, 1, 1) to match features, "
            f"got {tuple(weight.shape)}"
        )
    x = at_least_float32(features)
    with torch.autocast(features.device.type, enabled=False):
        x, rows = F.normalize(x, dim=1, eps=eps), F.normalize(rows.to(x.dtype), dim=1, eps=eps)
        cosine = torch.einsum("bdhw,cd->bchw", x, rows)
        if size is not None:
            cosine = F.interpolate(cosine, size, mode="bilinear", align_corners=True)
        return cosine.to(features.dtype)


def label_confidence(cosine: Tensor, label: Tensor, *, gamma: float = 7.0, ignore_index: int = 255) -> Tensor:
    r"""How near each pixel's feature is to the class of its label, beside the nearest class.

    .. math:: \sigma = \Big( \frac{1 + l_y}{\max_c (1 + l_c)} \Big)^\gamma

    Args:
        cosine: l, (B, C, H, W) floating point in [-1, 1].
        label: y, (B, H, W) integers 0..C-1, or ``ignore_index``.
        gamma: exponent, at least 0.
        ignore_index: value of pixels without a label.

    Returns:
        (B, H, W) in [0, 1], in the dtype of ``cosine``; 0 without a label, and where the feature is opposite to every
        class (1 there if ``gamma`` is 0). It has a gradient, through both parts of the quotient.

    Raises:
        TypeError: ``cosine`` is not floating point, ``label`` not of integers.
        ValueError: shapes don't match, or a negative ``gamma``.

    Paper:
        Oh, Kim and Ham, CVPR 2021, arXiv:2104.00905, section 3.3.

    Notes:
        Compiles with ``fullgraph=True``. Of several nearest classes the first receives the gradient.

    Example:
        >>> cosine = torch.tensor([0.5, 0.2]).view(1, 2, 1, 1).expand(1, 2, 1, 3)
        >>> label_confidence(cosine, torch.tensor([[[0, 1, 255]]]), gamma=1.0)
        tensor([[[1.0000, 0.8000, 0.0000]]])
    """
    check_ndim("cosine", cosine, 4, "(B, C, H, W)")
    check_floating("cosine", cosine)
    check_shape("label", label, (len(cosine), *cosine.shape[2:]), "to match cosine")
    check_integer("label", label, "did you pass scores?")
    if gamma < 0:
        raise ValueError(f"gamma: expected at least 0, got {gamma}")
    distance = (1 + at_least_float32(cosine)).clamp(min=0)  # rounding may step below -1
    nearest = distance.max(1).values
    known = label != ignore_index
    own = distance.gather(1, torch.where(known, label, 0).long()[:, None])[:, 0]
    possible = known & (nearest > 0)
    ratio = torch.where(possible, own, 0.0) / torch.where(possible, nearest, 1.0)
    positive = ratio > 0  # at 0 the slope of a power below 1 is infinite
    sigma = torch.where(positive, torch.where(positive, ratio, 1.0) ** gamma, 0.0**gamma)
    return torch.where(known, sigma, 0.0).to(cosine.dtype)


class CosineClassifier(nn.Module):
    """Classify pixels by cosine similarity; see :func:`cosine_logits`.

    Args:
        in_channels: D, channels of the features.
        num_classes: C, the background included.
        eps: shortest length.

    Example:
        >>> _ = torch.manual_seed(0)
        >>> CosineClassifier(8, 3)(torch.rand(2, 8, 5, 5), (17, 17)).shape
        torch.Size([2, 3, 17, 17])
    """

    def __init__(self, in_channels: int, num_classes: int, *, eps: float = 1e-12) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(num_classes, in_channels))
        nn.init.normal_(self.weight, std=0.01)
        self.eps = eps

    def forward(self, features: Tensor, size: tuple[int, int] | None = None) -> Tensor:
        """(B, D, h, w) features -> (B, C, h, w) cosines, or (B, C, H, W) at ``size``."""
        return cosine_logits(features, self.weight, size, eps=self.eps)

    def extra_repr(self) -> str:
        """Show the sizes."""
        return f"{self.weight.shape[1]}, {self.weight.shape[0]}, eps={self.eps}"

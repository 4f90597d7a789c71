"""Class-masked pooling: one feature vector for each class of an image (ReCAM).

Axes: B images, K foreground classes, D feature channels, H W pixels, N = H*W, M (image, present class) pairs.
"""

from __future__ import annotations

from typing import Literal, NamedTuple, overload

import torch
from torch import Tensor

from wsss_modules._checks import check_floating, check_ndim, check_shape

__all__ = ["PresentFeatures", "class_masked_pooling"]


class PresentFeatures(NamedTuple):
    """Feature vectors of the classes that are present, those of all images one after the other (M pairs).

    Attributes:
        features: (M, D) one vector for each present class of each image.
        keys: (M,) int64 class of each vector, 1..K as in a mask.
        image: (M,) int64 index of each vector's image in the batch, ascending.
    """

    features: Tensor
    keys: Tensor
    image: Tensor


@overload
def class_masked_pooling(
    features: Tensor, cam: Tensor, labels: None = None, *, pool: Literal["mean", "mass"] = "mean", eps: float = 1e-5
) -> Tensor: ...


@overload
def class_masked_pooling(
    features: Tensor, cam: Tensor, labels: Tensor, *, pool: Literal["mean", "mass"] = "mean", eps: float = 1e-5
) -> PresentFeatures: ...


def class_masked_pooling(
    features: Tensor,
    cam: Tensor,
    labels: Tensor | None = None,
    *,
    pool: Literal["mean", "mass"] = "mean",
    eps: float = 1e-5,
) -> Tensor | PresentFeatures:
    r"""Pool the features once for each class, with the map of the class as a soft mask.

    .. math:: z_{bk} = \frac{1}{HW} \sum_{hw} a_{bk,hw} \, x_{b,hw}

    or, with ``pool="mass"``, divided by :math:`\sum_{hw} a_{bk,hw} + \epsilon` in place of HW.

    The mean is the published choice, and the mass of the mask matters to it: an object that covers a hundredth of the
    image gives a vector a hundred times shorter than the same object filling it. A linear classifier without bias then
    sees logits near 0, and softmax answers almost 1/K to every class: the small object stays costly but teaches the
    classifier little, whose gradient is proportional to ``z``. It is also what rewards a larger map: each further
    pixel that looks like the class makes ``z`` longer and the class surer. The weighted average of ``"mass"`` has the
    same length for objects of all sizes and no such reward.

    Args:
        features: (B, D, H, W) floating point.
        cam: (B, K, H, W) masks, usually `normalize_cam`'s, in [0, 1]; at least 0 for ``pool="mass"``.
        labels: (B, K) multi-hot. If given, only the classes with a label above 0 are pooled.
        pool: "mean" over all pixels, or "mass": the average weighted by the mask.
        eps: Added to the mass; a mask of zeros gives zeros.

    Returns:
        Without ``labels`` the vectors of all classes, (B, K, D); with them those of the M present pairs, as
        `PresentFeatures`. In the dtype of ``features``.

    Raises:
        TypeError: ``features`` or ``cam`` is not floating point.
        ValueError: shapes don't match, or an unknown ``pool``.

    Paper:
        Chen et al., Class Re-Activation Maps for Weakly-Supervised Semantic Segmentation, CVPR 2022, arXiv:2203.00962.

    Differences:
        The released code multiplies features and masks into a (B, K, D, H, W) tensor, 2.7 GB for 16 images of VOC, and
        pools all K classes though it uses the present ones. ``pool="mass"`` is not in it.

    Notes:
        A matrix product over the pixels: no more memory than the inputs and the result. Half precision is summed in
        float32. With ``labels`` M depends on the data, which breaks the graph of ``torch.compile`` and waits for the
        device; without them it compiles with ``fullgraph=True``.

    Example:
        >>> features = torch.tensor([[[[2.0, 4.0]], [[1.0, 0.0]]]])
        >>> cam = torch.tensor([[[[1.0, 0.5]], [[0.0, 1.0]]]])
        >>> class_masked_pooling(features, cam)
        tensor([[[2.0000, 0.5000],
                 [2.0000, 0.0000]]])
        >>> class_masked_pooling(features, cam, torch.tensor([[0, 1]])).features
        tensor([[2., 0.]])
    """
    check_ndim("features", features, 4, "(B, D, H, W)")
    batch, _, height, width = features.shape
    check_shape("cam", cam, (batch, None, height, width), "to match features")
    check_floating("features", features)
    check_floating("cam", cam)
    if pool not in ("mean", "mass"):
        raise ValueError(f'pool: expected "mean" or "mass", got {pool!r}')
    if labels is None:
        return _pool(features, cam, pool, eps)
    check_shape("labels", labels, cam.shape[:2], "to match cam")
    present = labels > 0
    image, index = present.nonzero(as_tuple=True)
    # rows side by side in each image, so that the product reads the features in place instead of once for each row
    row = present.cumsum(1)[image, index] - 1
    most = int(row.max()) + 1 if len(row) else 0
    masks = cam.new_zeros(batch, most, height, width).index_put((image, row), cam[image, index])
    return PresentFeatures(_pool(features, masks, pool, eps)[image, row], index + 1, image)


def _pool(features: Tensor, masks: Tensor, pool: str, eps: float) -> Tensor:
    """Masks (B, C, H, W) on features (B, D, H, W) to (B, C, D)."""
    dtype = torch.promote_types(torch.promote_types(features.dtype, masks.dtype), torch.float32)
    with torch.autocast(features.device.type, enabled=False):
        x, a = (tensor.to(dtype).flatten(2) for tensor in (features, masks))  # (B, D, N), (B, C, N)
        size = max(1, x.shape[2]) if pool == "mean" else a.sum(2, keepdim=True) + eps
        return (a @ x.mT / size).to(features.dtype)

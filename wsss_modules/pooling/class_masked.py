"""Class-masked pooling: one feature vector for each class of an image (ReCAM).

Axes: B images, K foreground classes, D feature channels, H W pixels, N = H*W, M (image, present class) pairs.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from torch import Tensor

from wsss_modules._checks import check_floating, check_ndim, check_shape

__all__ = ["PresentFeatures", "class_masked_pooling", "pool_present_classes"]


def class_masked_pooling(
    features: Tensor, cam: Tensor, *, pool: Literal["mean", "mass"] = "mean", eps: float = 1e-5
) -> Tensor:
    r"""Pool the features once for each class, with the map of the class as a soft mask.

    .. math:: z_{bk} = \frac{1}{HW} \sum_{hw} a_{bk,hw} \, x_{b,hw}

    or, with ``pool="mass"``, divided by :math:`\sum_{hw} a_{bk,hw} + \epsilon` in place of HW.

    The published choice is the plain mean over all pixels, the pooling that the first classifier's logits come from;
    it is not divided by the mass of the mask. So the vector of an object is as much shorter as the object is smaller: a
    hundredth of the image, a hundredth of the length. A linear classifier without bias then gives logits near 0 and
    softmax almost 1/K to every class. The small object stays costly, yet teaches the classifier little, whose
    gradient is proportional to z. The same length rewards a larger map: each further pixel that looks like the class
    makes the class surer. The weighted average of ``"mass"`` is as long for small objects as for large ones, and has
    no such reward.

    Args:
        features: (B, D, H, W) floating point.
        cam: (B, K, H, W) floating-point masks, usually `normalize_cam`'s, in [0, 1]; at least 0 for ``pool="mass"``.
        pool: "mean" over all pixels, or "mass": the average weighted by the mask.
        eps: Added to the mass; a mask of zeros gives zeros.

    Returns:
        (B, K, D), in the dtype of ``features``.

    Raises:
        TypeError: ``features`` or ``cam`` is not floating point.
        ValueError: shapes don't match, or an unknown ``pool``.

    Paper:
        Chen et al., Class Re-Activation Maps for Weakly-Supervised Semantic Segmentation, CVPR 2022, arXiv:2203.00962.

    Differences:
        The released code multiplies features and masks into a (B, K, D, H, W) tensor, 2.7 GB for 16 images of VOC.
        ``pool="mass"`` is not in it.

    Notes:
        One matrix product over the pixels, with no more memory than inputs and result. Half precision is summed in
        float32. Compiles with ``fullgraph=True``. `pool_present_classes` leaves the absent classes out.

    Example:
        >>> features = torch.tensor([[[[2.0, 4.0]], [[1.0, 0.0]]]])
        >>> cam = torch.tensor([[[[1.0, 0.5]], [[0.0, 1.0]]]])
        >>> class_masked_pooling(features, cam)
        tensor([[[2.0000, 0.5000],
                 [2.0000, 0.0000]]])
    """
    _check(features, cam, pool)
    dtype = torch.promote_types(torch.promote_types(features.dtype, cam.dtype), torch.float32)
    with torch.autocast(features.device.type, enabled=False):
        x, a = (tensor.to(dtype).flatten(2) for tensor in (features, cam))  # (B, D, N), (B, K, N)
        mass = a.sum(2, keepdim=True) + eps
        size = max(1, x.shape[2]) if pool == "mean" else mass.clamp(min=torch.finfo(dtype).tiny)
        return (a @ x.mT / size).to(features.dtype)


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


def pool_present_classes(
    features: Tensor, cam: Tensor, labels: Tensor, *, pool: Literal["mean", "mass"] = "mean", eps: float = 1e-5
) -> PresentFeatures:
    """Pool the features as `class_masked_pooling` does, under the masks of the present classes only.

    Args:
        features: (B, D, H, W) floating point.
        cam: (B, K, H, W) masks.
        labels: (B, K) multi-hot; present means greater than 0.
        pool: "mean" or "mass".
        eps: Added to the mass.

    Returns:
        `PresentFeatures` of the M present pairs: the rows ``[image, keys - 1]`` of `class_masked_pooling`.

    Raises:
        TypeError: ``features`` or ``cam`` is not floating point.
        ValueError: shapes don't match, or an unknown ``pool``.

    Paper:
        Chen et al., Class Re-Activation Maps for Weakly-Supervised Semantic Segmentation, CVPR 2022, arXiv:2203.00962.

    Notes:
        On VOC an image has 1.5 of 20 classes, on COCO 3 of 80. M depends on the data, so this breaks the graph of
        ``torch.compile`` and waits for the device.

    Example:
        >>> labels = torch.tensor([[1, 0, 1], [0, 1, 0]])
        >>> pooled = pool_present_classes(torch.rand(2, 8, 5, 5), torch.rand(2, 3, 5, 5), labels)
        >>> pooled.features.shape, pooled.keys, pooled.image
        (torch.Size([3, 8]), tensor([1, 3, 2]), tensor([0, 0, 1]))
    """
    _check(features, cam, pool)
    check_shape("labels", labels, cam.shape[:2], "to match cam")
    present = labels > 0
    image, index = present.nonzero(as_tuple=True)
    # the masks of each image side by side, so that the product reads its features in place, not once for each mask
    row = present.cumsum(1)[image, index] - 1
    most = int(row.max()) + 1 if len(row) else 0
    masks = cam.new_zeros(len(cam), most, *cam.shape[2:]).index_put((image, row), cam[image, index])
    return PresentFeatures(class_masked_pooling(features, masks, pool=pool, eps=eps)[image, row], index + 1, image)


def _check(features: Tensor, cam: Tensor, pool: str) -> None:
    check_ndim("features", features, 4, "(B, D, H, W)")
    check_shape("cam", cam, (len(features), None, *features.shape[2:]), "to match features")
    check_floating("features", features)
    check_floating("cam", cam)
    if pool not in ("mean", "mass"):
        raise ValueError(f'pool: expected "mean" or "mass", got {pool!r}')

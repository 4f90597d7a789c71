"""Class re-activation (ReCAM): a second classifier on class-masked features, and the maps of both classifiers.

Axes: B images, K foreground classes, D feature channels, H W pixels, M (image, present class) pairs of a batch.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from wsss_modules._checks import check_floating, check_ndim, check_shape
from wsss_modules.cam import CAMHead, normalize_cam
from wsss_modules.pooling import class_masked_pooling, pool_present_classes

__all__ = ["ReCAMHead", "ReCAMOutput", "reactivated_cam"]

Mode = Literal["product", "sum", "recam", "cam"]


def reactivated_cam(
    features: Tensor,
    weight: Tensor,
    recam_weight: Tensor,
    *,
    mode: Mode = "product",
    clamp_negative: bool = False,
    signed: bool = False,
) -> Tensor:
    r"""Class activation maps from the weights of both classifiers of ReCAM.

    .. math:: a_k = \mathrm{relu}(v_k \cdot x), \qquad v = w \odot w' \quad \text{for mode="product"}

    with w the weights of the first, multi-label classifier and w' those of the second, softmax one. The product is
    positive where both agree, also against a class: what both weigh negatively, such as the look of a class that often
    comes along, counts as evidence for this one unless ``clamp_negative`` leaves it out.

    Args:
        features: (B, D, H, W) floating point.
        weight: w, (K, D), or (K, D, 1, 1) as a convolution stores it.
        recam_weight: w', likewise.
        mode: "product" w * w'; "sum" w + w'; "recam" w' alone; "cam" w alone.
        clamp_negative: With "product", leave out the channels that both classifiers weigh negatively.
        signed: Without the ReLU.

    Returns:
        (B, K, H, W), at least 0 unless ``signed``, in the dtype of ``features``. Not normalised, and with "product" of
        another magnitude than a CAM: see `normalize_cam`. Merge mirror images with `merge_flip` and scales with
        `multi_scale_cam`.

    Raises:
        TypeError: a tensor is not floating point.
        ValueError: shapes don't match, an unknown ``mode``, or ``clamp_negative`` without "product".

    Paper:
        Chen et al., Class Re-Activation Maps for Weakly-Supervised Semantic Segmentation, CVPR 2022, arXiv:2203.00962.

    Differences:
        The released code reads VOC with "product" and COCO with "cam": there the second classifier is never loaded
        for extraction, and what it does for the maps it does through the backbone in training. "sum" and
        ``clamp_negative`` are not in the released code.

    Notes:
        Half precision is computed in float32. Compiles with ``fullgraph=True``.

    Example:
        >>> features = torch.tensor([1.0, 2.0]).view(1, 2, 1, 1)
        >>> weight, recam_weight = torch.tensor([[0.5, -1.0]]), torch.tensor([[2.0, -0.5]])
        >>> [reactivated_cam(features, weight, recam_weight, mode=m).item() for m in ("cam", "recam", "product")]
        [0.0, 1.0, 2.0]
        >>> reactivated_cam(features, weight, recam_weight, clamp_negative=True).item()
        1.0
    """
    check_ndim("features", features, 4, "(B, D, H, W)")
    w, w2 = (_matrix(*pair) for pair in (("weight", weight), ("recam_weight", recam_weight)))
    check_shape("weight", w, (None, features.shape[1]), "to match features")
    check_shape("recam_weight", w2, w.shape, "to match weight")
    for name, tensor in (("features", features), ("weight", weight), ("recam_weight", recam_weight)):
        check_floating(name, tensor)
    if clamp_negative and mode != "product":
        raise ValueError(f'clamp_negative: expected mode="product", got mode={mode!r}')
    dtype = torch.promote_types(features.dtype, torch.float32)
    with torch.autocast(features.device.type, enabled=False):
        v = _readout(w.to(dtype), w2.to(dtype), mode, clamp_negative)
        maps = F.conv2d(features.to(dtype), v[:, :, None, None])
        return (maps if signed else F.relu(maps)).to(features.dtype)


class ReCAMOutput(NamedTuple):
    """What `ReCAMHead` returns; the arguments of :class:`wsss_losses.ReCAMLoss` but for the labels.

    Attributes:
        logits: (B, K) class scores of the image by the first classifier.
        cam: (B, K, H, W) its class activation maps divided by their maxima, the masks of the pooling.
        class_features: (B, K, D) features under each mask; (M, D), those of the present classes, if labels were given.
        recam_weight: (K, D) the second classifier.
    """

    logits: Tensor
    cam: Tensor
    class_features: Tensor
    recam_weight: Tensor


class ReCAMHead(nn.Module):
    """Two classifiers without bias over one feature map: one for the image, one for what each class is seen in.

    The first gives logits and class activation maps, see `CAMHead`. Each map, divided by its maximum, is the mask
    under which the features are pooled to one vector per class, see `class_masked_pooling`; the second classifier,
    which `wsss_losses.sce_reactivation_loss` trains, has to tell from that vector which single class it belongs to.
    Two classes that answer to the same pixels get the same vector, and one of them a loss.

    Args:
        in_channels: D, channels of the features.
        num_classes: K, foreground classes.
        detach_cam: Stop gradients at the masks, so that the second classifier trains only the features. By default
            they also reach the first classifier, and go through the maximum that the maps are divided by.
        pool: "mean" or "mass", see `class_masked_pooling`.
        eps: Added to the maximum of each map (and to the mass of the masks).

    Shapes:
        features (B, D, H, W), labels (B, K) multi-hot or None -> `ReCAMOutput`.

    Raises:
        ValueError: an unknown ``pool``, or features without D channels.

    Paper:
        Chen et al., Class Re-Activation Maps for Weakly-Supervised Semantic Segmentation, CVPR 2022, arXiv:2203.00962.

    Differences:
        ``detach_cam`` and "mass" are not in the released code, which has nothing detached and K = 20, D = 2048 built
        in. A class whose map is zero everywhere gives zeros, and its first classifier no gradient. Where several pixels
        share the maximum of a map, its gradient is parted among them; in the released code one of them has it all.

    Notes:
        ``cam_head`` has the keys of a plain `CAMHead`, whose weights it takes with ``load_state_dict``; the second
        classifier, stored as a 1 x 1 convolution in the released code, starts from torch's default. The released
        optimiser gives it ten times the learning rate of the rest. Compiles with ``fullgraph=True`` if ``labels`` are
        not given. Under DDP use what the forward pass returns, the weights included.

    Example:
        >>> head = ReCAMHead(16, num_classes=20)
        >>> out = head(torch.rand(2, 16, 5, 7))
        >>> out.logits.shape, out.cam.shape, out.class_features.shape
        (torch.Size([2, 20]), torch.Size([2, 20, 5, 7]), torch.Size([2, 20, 16]))
        >>> head.reactivated_cam(torch.rand(2, 16, 9, 9)).shape
        torch.Size([2, 20, 9, 9])
    """

    def __init__(
        self,
        in_channels: int,
        num_classes: int,
        *,
        detach_cam: bool = False,
        pool: Literal["mean", "mass"] = "mean",
        eps: float = 1e-5,
    ) -> None:
        super().__init__()
        if pool not in ("mean", "mass"):
            raise ValueError(f'pool: expected "mean" or "mass", got {pool!r}')
        self.detach_cam, self.pool, self.eps = detach_cam, pool, eps
        self.cam_head = CAMHead(in_channels, num_classes)
        self.recam_classifier = nn.Linear(in_channels, num_classes, bias=False)

    def forward(self, features: Tensor, labels: Tensor | None = None) -> ReCAMOutput:
        """Classify, map and pool, see the class. With ``labels`` only the present classes are pooled."""
        logits, cam = self.cam_head(features)
        cam = normalize_cam(cam, self.eps)
        masks = cam.detach() if self.detach_cam else cam
        if labels is None:
            pooled = class_masked_pooling(features, masks, pool=self.pool, eps=self.eps)
        else:
            pooled = pool_present_classes(features, masks, labels, pool=self.pool, eps=self.eps).features
        return ReCAMOutput(logits, cam, pooled, self.recam_classifier.weight)

    def reactivated_cam(self, features: Tensor, *, mode: Mode = "product", clamp_negative: bool = False) -> Tensor:
        """Maps (B, K, H, W) by the weights of both classifiers, see `wsss_modules.reactivated_cam`."""
        weights = self.cam_head.classifier.weight, self.recam_classifier.weight
        return reactivated_cam(features, *weights, mode=mode, clamp_negative=clamp_negative)

    def extra_repr(self) -> str:
        """Show the options."""
        return f"detach_cam={self.detach_cam}, pool={self.pool!r}, eps={self.eps}"


def _readout(w: Tensor, w2: Tensor, mode: str, clamp_negative: bool) -> Tensor:
    if mode == "product":
        product = w * w2
        return torch.where((w < 0) & (w2 < 0), 0.0, product) if clamp_negative else product
    if mode == "sum":
        return w + w2
    if mode == "recam":
        return w2
    if mode == "cam":
        return w
    raise ValueError(f'mode: expected "product", "sum", "recam" or "cam", got {mode!r}')


def _matrix(name: str, weight: Tensor) -> Tensor:
    """A classifier's weights as (K, D)."""
    if weight.ndim == 4:
        check_shape(name, weight, (None, None, 1, 1), "as a 1 x 1 convolution")
        return weight.flatten(1)
    check_ndim(name, weight, 2, "(K, D) or (K, D, 1, 1)")
    return weight

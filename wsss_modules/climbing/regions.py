"""Where a class is seen in an image while it climbs: Grad-CAM, its closed form for a 1 x 1 head, and the high entries.

Axes: M climbers, each an image under one of its classes; V = 2 views, an image and its mirror image; K foreground
classes, D feature channels, H W pixels, h w cells.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from wsss_modules._checks import check_floating, check_integer, check_ndim, check_shape
from wsss_modules._precision import at_least_float32
from wsss_modules.climbing.step import Scope

__all__ = ["ClassRegions", "GradCAM", "discriminative_mask", "linear_head_regions", "positive_count_weight"]


def discriminative_mask(cam: Tensor, threshold: float = 0.5) -> Tensor:
    r"""Mark the entries of each map that are high already.

    .. math:: m = 1 \ \text{where}\ a > \tau \max_{hw} a

    Args:
        cam: a, (..., H, W) floating point, at least 0.
        threshold: tau, in [0, 1].

    Returns:
        (..., H, W), 0 or 1 in the dtype of ``cam``, without a gradient; 0 for a map of zeros.

    Raises:
        TypeError: ``cam`` is not floating point.
        ValueError: ``cam`` has fewer than two axes, or a ``threshold`` outside [0, 1].

    Paper:
        Lee, Kim and Yoon, CVPR 2021, arXiv:2103.08896, section 3.3.

    Differences:
        The released code divides a map of zeros by its maximum; the result is the same.

    Example:
        >>> discriminative_mask(torch.tensor([[0.0, 1.0], [2.0, 1.5]]))
        tensor([[0., 0.],
                [1., 1.]])
    """
    check_floating("cam", cam)
    if cam.ndim < 2:
        raise ValueError(f"cam: expected shape (..., H, W), got {tuple(cam.shape)}")
    _check_threshold(threshold)
    values = at_least_float32(cam.detach())
    return (values > threshold * values.amax((-2, -1), keepdim=True)).to(cam.dtype)


def positive_count_weight(gradient: Tensor, *, scope: Scope = "batch", eps: float = 1e-12) -> Tensor:
    r"""Weights of the channels in AdvCAM's Grad-CAM: their gradient, per positive entry of the whole tensor.

    .. math:: \alpha_{nk} = \frac{\sum_{hw} g_{nkhw}}{\#\{g > 0\} + \epsilon}

    Args:
        gradient: g, of a class score with respect to the features, (B, ..., C, H, W) floating point.
        scope: Count over the whole "batch", or over each "image", that is each entry along the first axis.
        eps: Added to the count.

    Returns:
        (B, ..., C, 1, 1), in float32 for half precision: without any positive entry the weights are very large.

    Raises:
        TypeError: ``gradient`` is not floating point.
        ValueError: ``gradient`` has fewer than three axes, or an unknown ``scope``.

    Paper:
        In the released code of Lee, Kim and Yoon, CVPR 2021, arXiv:2103.08896.

    Differences:
        Grad-CAM (Selvaraju et al., ICCV 2017) takes the mean over the cells of each channel by itself.

    Example:
        >>> positive_count_weight(torch.tensor([[[[1.0, 2.0]], [[-4.0, 3.0]]]])).flatten()
        tensor([ 1.0000, -0.3333])
    """
    check_floating("gradient", gradient)
    if gradient.ndim < 3:
        raise ValueError(f"gradient: expected shape (B, ..., C, H, W), got {tuple(gradient.shape)}")
    if scope not in ("batch", "image"):
        raise ValueError(f'scope: expected "batch" or "image", got {scope!r}')
    values = at_least_float32(gradient)
    axes = tuple(range(scope == "image", gradient.ndim))
    count = (values > 0).sum(axes, keepdim=True).to(values.dtype)
    return values.sum((-2, -1), keepdim=True) / (count + eps)


class ClassRegions(NamedTuple):
    """What AdvCAM looks at in one forward pass.

    Attributes:
        scores: (M, V, K, h, w) class scores of each cell; only their positive part counts.
        region: (M, V, h, w) map of each climber's class, at least 0.
    """

    scores: Tensor
    region: Tensor


def linear_head_regions(scores: Tensor, index: Tensor, weight: Tensor | None = None, *, eps: float = 1e-12) -> Tensor:
    r"""Class maps of AdvCAM in closed form, where a 1 x 1 convolution without bias makes the class scores.

    .. math:: r_v = \mathrm{relu}(z_{vc}) \, \frac{P_v}{K_c \sum_u P_u + \epsilon}, \qquad
        P_v = \#\{hw : z_{vchw} > 0\}, \quad K_c = \#\{k : w_{ck} > 0\}

    the Grad-CAM of :math:`\sum_{vhw} \mathrm{relu}(z_{vc})` with the weights of `positive_count_weight`, without the
    backward pass that they take: at each cell with a positive score the gradient is the class's row of the head.

    Args:
        scores: z, (M, V, K, h, w) floating point, before or after ReLU.
        index: c, (M,) int64, the channel 0..K-1 of each climber's class.
        weight: w, (K, D), or (K, D, 1, 1) as a convolution stores it. None: the plain class activation map
            :math:`\mathrm{relu}(z_{vc})`.
        eps: Keeps the quotient finite.

    Returns:
        r, (M, V, h, w), at least 0, in at least float32. Gradients flow through z, not through the counts.

    Raises:
        TypeError: ``scores`` is not floating point, or ``index`` not integer.
        ValueError: shapes don't match.

    Paper:
        In the released code of Lee, Kim and Yoon, CVPR 2021, arXiv:2103.08896.

    Example:
        >>> scores = torch.tensor([3.0, -1.0, 1.0, 2.0]).view(1, 2, 1, 1, 2)
        >>> linear_head_regions(scores, torch.tensor([0]), torch.tensor([[1.0, 1.0, -1.0]])).flatten()
        tensor([0.5000, 0.0000, 0.3333, 0.6667])
    """
    check_ndim("scores", scores, 5, "(M, V, K, h, w)")
    check_floating("scores", scores)
    check_shape("index", index, scores.shape[:1], "to match scores")
    check_integer("index", index)
    own = F.relu(at_least_float32(scores[torch.arange(len(index), device=index.device), :, index]))  # (M, V, h, w)
    if weight is None:
        return own
    if weight.ndim == 4:
        check_shape("weight", weight, (scores.shape[2], None, 1, 1), "to match scores")
        weight = weight.flatten(1)
    check_shape("weight", weight, (scores.shape[2], None), "to match scores")
    cells = (own > 0).sum((2, 3), keepdim=True).to(own.dtype)  # P
    channels = (weight.detach() > 0).sum(1).to(own.dtype)[index, None, None, None]  # K_c
    return own * (cells / (channels * cells.sum(1, keepdim=True) + eps))


class GradCAM(nn.Module):
    r"""Class maps of any network by Grad-CAM: features weighted by the gradient of a class's score.

    .. math:: r_v = \mathrm{relu}\Big(\sum_k \alpha_{vk} f_{vk}\Big), \qquad
        \alpha = \mathrm{weight}\Big(\partial \sum_{vhw} \mathrm{relu}(z_{vc}) / \partial f\Big)

    The weights are constants; the features keep their graph. Their gradient takes a backward pass through the head
    alone, not through the backbone.

    Args:
        backbone: From images (N, 3, H, W) to features f (N, D, h, w).
        head: From features to class scores z (N, K, h', w') of each cell; any function of them.
        weighting: "positive_count", see `positive_count_weight`, or "mean" over the cells.

    Shapes:
        pairs (M, V, 3, H, W) and index (M,), the channel of each one's class -> `ClassRegions`.

    Raises:
        ValueError: an unknown ``weighting``, a wrong shape, or scores that don't depend on the features.

    Paper:
        Selvaraju et al., Grad-CAM: Visual Explanations from Deep Networks via Gradient-based Localization, ICCV 2017,
        arXiv:1610.02391, with "mean"; as in the released code of Lee, Kim and Yoon, CVPR 2021, with "positive_count".

    Notes:
        Takes the network in the mode that it is in. For a 1 x 1 head `linear_head_regions` gives the same without
        another pass.

    Example:
        >>> backbone, head = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU()), nn.Sequential(nn.Conv2d(8, 5, 3), nn.Tanh())
        >>> scores, region = GradCAM(backbone, head)(torch.rand(2, 2, 3, 9, 9), torch.tensor([4, 0]))
        >>> scores.shape, region.shape
        (torch.Size([2, 2, 5, 5, 5]), torch.Size([2, 2, 7, 7]))
    """

    def __init__(
        self,
        backbone: Callable[[Tensor], Tensor],
        head: Callable[[Tensor], Tensor],
        *,
        weighting: Literal["positive_count", "mean"] = "positive_count",
    ) -> None:
        super().__init__()
        if weighting not in ("positive_count", "mean"):
            raise ValueError(f'weighting: expected "positive_count" or "mean", got {weighting!r}')
        self.backbone, self.head, self.weighting = backbone, head, weighting

    def forward(self, pairs: Tensor, index: Tensor) -> ClassRegions:
        """Scores of all classes and the map of one class for each pair of images."""
        check_ndim("pairs", pairs, 5, "(M, V, 3, H, W)")
        check_shape("index", index, pairs.shape[:1], "to match pairs")
        check_integer("index", index)
        count = pairs.shape[:2]
        features = self.backbone(pairs.flatten(0, 1))
        check_ndim("backbone(images)", features, 4, "(N, D, h, w)")
        with torch.enable_grad():
            through_head = features if features.requires_grad else features.detach().requires_grad_()
            scores = self.head(through_head)
            check_ndim("head(features)", scores, 4, "(N, K, h, w)")
            rows = index.repeat_interleave(count[1])
            own = F.relu(scores[torch.arange(len(rows), device=rows.device), rows])
            if not own.requires_grad:
                raise ValueError("head: expected scores with a gradient to the features; does it detach them?")
            gradient = torch.autograd.grad(own.sum(), through_head, retain_graph=True)[0]
        scores = scores.unflatten(0, count) if torch.is_grad_enabled() else scores.detach().unflatten(0, count)
        gradient, features = gradient.unflatten(0, count), features.unflatten(0, count)
        if self.weighting == "mean":
            weight = at_least_float32(gradient).mean((-2, -1), keepdim=True)
        else:
            weight = positive_count_weight(gradient, scope="image")
        return ClassRegions(scores, F.relu((weight * at_least_float32(features)).sum(2)))

    def extra_repr(self) -> str:
        """Show the options."""
        return f"weighting={self.weighting!r}"


def _check_threshold(threshold: float) -> None:
    if not 0 <= threshold <= 1:
        raise ValueError(f"threshold: expected a number in [0, 1], got {threshold}")

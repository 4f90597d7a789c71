"""SEAM's head, which PPC extends: class maps, the same refined by pixel correlation, and projected features.

Axes: B images, K foreground classes, D feature channels, P projected channels, h w cells.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from wsss_modules._checks import check_floating, check_ndim
from wsss_modules._precision import at_least_float32
from wsss_modules.refinement._sides import check_sides, on_grid_of, side_layers
from wsss_modules.refinement.pixel_correlation import PixelCorrelationModule


def keep_strongest(maps: Tensor) -> Tensor:
    """Keep the largest value of each pixel and set those of the other channels to 0.

    Args:
        maps: (B, C, H, W). Equal largest values all stay. C may be 0.

    Returns:
        (B, C, H, W).

    Raises:
        ValueError: a wrong shape.

    Example:
        >>> keep_strongest(torch.tensor([[[[0.5, 0.2]], [[0.5, 0.3]], [[0.4, 0.1]]]])).squeeze()
        tensor([[0.5000, 0.0000],
                [0.5000, 0.3000],
                [0.0000, 0.0000]])
    """
    check_ndim("maps", maps, 4, "(B, C, H, W)")
    if maps.shape[1] == 0:
        return maps
    return torch.where(maps < maps.amax(1, keepdim=True), 0.0, maps)


def one_hot_scores(cam: Tensor, eps: float = 1e-5) -> Tensor:
    r"""Normalised maps with a background, of which each pixel keeps its strongest class: what SEAM refines.

    .. math::
        d_k = \frac{r(r(a_k) - \epsilon)}{\max_{hw} r(a_k) + \epsilon}, \qquad d_0 = 1 - \max_k d_k

    with r = ReLU; then every :math:`d_k < \max_j d_j` of a pixel becomes 0.

    Args:
        cam: (B, K, H, W) floating point, signed.
        eps: Subtracted above and added below.

    Returns:
        scores (B, 1 + K, H, W) in [0, 1], background first, without gradient, in the dtype of ``cam``.

    Raises:
        TypeError: ``cam`` is not floating point.
        ValueError: a wrong shape.

    Paper:
        Wang et al., Self-supervised Equivariant Attention Mechanism for Weakly Supervised Semantic Segmentation, CVPR
        2020, arXiv:2004.04581; as in PPC, Du, Fu, Liu and Wang, CVPR 2022, arXiv:2110.07110.

    Notes:
        Image labels play no part: absent classes, each stretched by its own maximum, compete with the present ones and
        lower the background. Half precision is normalised in float32.

    Example:
        >>> one_hot_scores(torch.tensor([[[[4.0, 1.0]], [[1.0, 2.0]]]]), eps=0).squeeze()
        tensor([[0., 0.],
                [1., 0.],
                [0., 1.]])
    """
    check_ndim("cam", cam, 4, "(B, K, H, W)")
    check_floating("cam", cam)
    values = F.relu(at_least_float32(cam.detach()))
    if values.shape[1] == 0:
        return cam.new_ones(cam.shape[0], 1, *cam.shape[2:])
    d = F.relu(values - eps) / (values.amax((2, 3), keepdim=True) + eps).clamp(min=torch.finfo(values.dtype).tiny)
    return torch.cat([1 - d.amax(1, keepdim=True), keep_strongest(d)], 1).to(cam.dtype)


class SEAMOutput(NamedTuple):
    """What `SEAMHead` returns, all on the grid of the features.

    Attributes:
        scores: (B, 1 + K, h, w) signed class maps, background first.
        refined: (B, 1 + K, h, w) one-hot maps in [0, 1] after pixel correlation.
        projected: (B, P, h, w) features to contrast, at least 0; None if there is no projection.
    """

    scores: Tensor
    refined: Tensor
    projected: Tensor | None


class SEAMHead(nn.Module):
    """Class maps of the last features, the same refined by pixel correlation, and projected features (SEAM, PPC).

    The keys of the pixel correlation are made of two earlier maps of the backbone and the image itself, all of them
    without gradient. What is refined has no gradient either, so that the refined maps teach three 1 x 1 convolutions
    and nothing else.

    Args:
        in_channels: D, channels of the last features.
        num_classes: K, foreground classes.
        side_channels: Channels of the two earlier maps.
        side_widths: Channels that they are reduced to.
        embed: Channels of the keys.
        proj_dim: P, channels of the projection; None for a head without one (SEAM).
        dropout: Probability with which a channel of the last features is dropped in training.
        eps: see `pixel_correlation` and `one_hot_scores`.
        chunk: see `pixel_correlation`.

    Shapes:
        features (B, D, h, w), low (B, C1, ., .), high (B, C2, ., .), images (B, 3, H, W) -> `SEAMOutput`. Other inputs
        than the features are resized to their grid, bilinearly with aligned corners.

    Raises:
        ValueError: inputs without the channels that were announced.

    Paper:
        Wang et al., CVPR 2020, arXiv:2004.04581; Du, Fu, Liu and Wang, Weakly Supervised Semantic Segmentation by
        Pixel-to-Prototype Contrast, CVPR 2022, arXiv:2110.07110.

    Differences:
        The released SEAM-based PPC drops features with probability .5, the EPS-based one none. The classifier has an
        output for the background as released: in the SEAM-based one nothing reads it, in the EPS-based one the saliency
        loss trains it.

    Notes:
        The image classifier is the spatial mean of the class channels, in the released code after up-sampling to the
        size of the image. Compiles with ``fullgraph=True``.

    Example:
        >>> _ = torch.manual_seed(0)
        >>> head = SEAMHead(16, num_classes=20, side_channels=(8, 12), proj_dim=32)
        >>> features, low, high = torch.rand(2, 16, 7, 6), torch.rand(2, 8, 14, 12), torch.rand(2, 12, 7, 6)
        >>> out = head(features, low, high, torch.rand(2, 3, 56, 48))
        >>> out.scores.shape, out.refined.shape, out.projected.shape
        (torch.Size([2, 21, 7, 6]), torch.Size([2, 21, 7, 6]), torch.Size([2, 32, 7, 6]))
    """

    def __init__(
        self,
        in_channels: int,
        num_classes: int,
        *,
        side_channels: tuple[int, int] = (512, 1024),
        side_widths: tuple[int, int] = (64, 128),
        embed: int = 192,
        proj_dim: int | None = 128,
        dropout: float = 0.5,
        eps: float = 1e-5,
        chunk: int = 256,
    ) -> None:
        super().__init__()
        self.eps = eps
        self.dropout = nn.Dropout2d(dropout)
        self.classifier = nn.Conv2d(in_channels, 1 + num_classes, 1, bias=False)
        nn.init.xavier_uniform_(self.classifier.weight)
        self.low, self.high = side_layers(side_channels, side_widths)
        self.correlation = PixelCorrelationModule(3 + sum(side_widths), embed, eps=eps, chunk=chunk)
        self.projection: nn.Conv2d | None = None
        if proj_dim is not None:
            self.projection = nn.Conv2d(in_channels, proj_dim, 1, bias=False)
            nn.init.xavier_uniform_(self.projection.weight)

    def forward(self, features: Tensor, low: Tensor, high: Tensor, images: Tensor) -> SEAMOutput:
        """Map the classes, refine the maps and project the features, see the class."""
        check_sides(features, low, high, images, (self.classifier, self.low, self.high))
        dropped = self.dropout(features)
        scores = self.classifier(dropped)
        sides = F.relu(self.low(low.detach())), F.relu(self.high(high.detach()))
        keys = on_grid_of(features, (images, *sides))
        refined = self.correlation(one_hot_scores(scores[:, 1:], self.eps), keys)
        projected = None if self.projection is None else F.relu(self.projection(dropped))
        return SEAMOutput(scores, refined, projected)

    @staticmethod
    def released_key(name: str) -> str:
        """The key in our ``state_dict`` of a parameter of the released heads, such as ``f8_3.weight``."""
        module, _, leaf = name.partition(".")
        places = {"fc8": "classifier", "fc_proj": "projection", "proj_fc": "projection"}
        places |= {"f8_3": "low", "f8_4": "high", "f9": "correlation.embed"}
        return f"{places[module]}.{leaf}"

    def extra_repr(self) -> str:
        """Show the options."""
        return f"eps={self.eps}"

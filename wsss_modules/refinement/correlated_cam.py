"""A class-map head that adds to each score the mean over the pixels that look alike (L2G).

Axes: B images, K foreground classes, D feature channels, h w cells.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from wsss_modules.refinement._sides import check_sides, on_grid_of, side_layers
from wsss_modules.refinement.pixel_correlation import PixelCorrelationModule


class PixelCorrelationCAMOutput(NamedTuple):
    """What `PixelCorrelationCAMHead` returns.

    Attributes:
        logits: (B, K) class scores of the image.
        scores: (B, 1 + K, h, w) signed maps, background first.
    """

    logits: Tensor
    scores: Tensor


class PixelCorrelationCAMHead(nn.Module):
    r"""Class maps with a background, each the sum of what a pixel says and what the pixels that look like it say.

    .. math:: scores = u + P(u), \qquad u = w \cdot x, \qquad logits_k = \operatorname{mean}_{hw} scores_k

    with P the `pixel_correlation` under keys made of two earlier maps of the backbone and the image, all of them
    without gradient.

    Args:
        in_channels: D, channels of the last features.
        num_classes: K, foreground classes.
        side_channels: Channels of the two earlier maps.
        side_widths: Channels that they are reduced to.
        embed: Channels of the keys.
        eps: see `pixel_correlation`.
        chunk: see `pixel_correlation`.

    Shapes:
        features (B, D, h, w), low (B, C1, ., .), high (B, C2, ., .), images (B, 3, H, W) ->
        `PixelCorrelationCAMOutput`. Other inputs than the features are resized to their grid, bilinearly with aligned
        corners.

    Raises:
        ValueError: inputs without the channels that were announced.

    Paper:
        Jiang, Yang, Hou and Wei, L2G: A Simple Local-to-Global Knowledge Transfer Framework for Weakly Supervised
        Semantic Segmentation, CVPR 2022, arXiv:2204.03206; the correlation from Wang et al., SEAM, CVPR 2020,
        arXiv:2004.04581.

    Differences:
        The released code has the background last, and propagates the features, D channels of them, before it classifies
        them. Both steps are linear and act on other axes, so that here 1 + K maps are propagated: at D = 4096 and K =
        20 that is 195 times fewer products, and the same values. Its side maps have no ReLU, unlike SEAM's, and the
        maps no one-hot selection.

    Notes:
        No image label teaches the background; see :func:`wsss_modules.local_attention_target`. Weights start Xavier
        uniform, with a gain of 4 for the keys, and Kaiming normal for the sides. Compiles with ``fullgraph=True``.

    Example:
        >>> import torch
        >>> _ = torch.manual_seed(0)
        >>> head = PixelCorrelationCAMHead(16, num_classes=20, side_channels=(8, 12))
        >>> features, low, high = torch.rand(2, 16, 7, 6), torch.rand(2, 8, 14, 12), torch.rand(2, 12, 7, 6)
        >>> out = head(features, low, high, torch.rand(2, 3, 56, 48))
        >>> out.logits.shape, out.scores.shape
        (torch.Size([2, 20]), torch.Size([2, 21, 7, 6]))
    """

    def __init__(
        self,
        in_channels: int,
        num_classes: int,
        *,
        side_channels: tuple[int, int] = (512, 1024),
        side_widths: tuple[int, int] = (64, 128),
        embed: int = 192,
        eps: float = 1e-5,
        chunk: int = 256,
    ) -> None:
        super().__init__()
        self.classifier = nn.Conv2d(in_channels, 1 + num_classes, 1, bias=False)
        nn.init.xavier_uniform_(self.classifier.weight)
        self.low, self.high = side_layers(side_channels, side_widths)
        self.correlation = PixelCorrelationModule(3 + sum(side_widths), embed, eps=eps, chunk=chunk)

    def forward(self, features: Tensor, low: Tensor, high: Tensor, images: Tensor) -> PixelCorrelationCAMOutput:
        """Classify the pixels, let those that look alike vote, and average, see the class."""
        check_sides(features, low, high, images, (self.classifier, self.low, self.high))
        # a product: at 4096 channels the layer and its gradients take 1.4 times as long on a CPU
        own = torch.einsum("kd,bdhw->bkhw", self.classifier.weight.flatten(1), features)
        keys = on_grid_of(features, (images, self.low(low.detach()), self.high(high.detach())))
        scores = own + self.correlation(own, keys)
        return PixelCorrelationCAMOutput(scores[:, 1:].mean((2, 3)), scores)

    @staticmethod
    def released_key(name: str) -> str:
        """The key in our ``state_dict`` of a parameter of the released network, such as ``f8_3.weight``.

        The rows of ``fc8.weight`` must be rolled by one besides: the background is the last there.
        """
        module, _, leaf = name.partition(".")
        places = {"fc8": "classifier", "f8_3": "low", "f8_4": "high", "f9": "correlation.embed"}
        return f"{places[module]}.{leaf}"

"""A CAM head with a background channel of its own (EPS).

Axes: B images, K foreground classes, D feature channels, H W cells.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor, nn

from wsss_modules._checks import check_shape


class BackgroundAwareCAMOutput(NamedTuple):
    """What `BackgroundAwareCAMHead` returns.

    Attributes:
        logits: (B, K) class scores of the image.
        scores: (B, 1 + K, H, W) signed maps, background first. Their softmax over channels are the maps to use.
    """

    logits: Tensor
    scores: Tensor


class BackgroundAwareCAMHead(nn.Module):
    """Image classifier whose pixels also have a score for the background.

    The image score of a class is the spatial mean of its map. The background has no image label: what teaches it is a
    loss on the softmax over all 1 + K maps, such as `wsss_losses.SaliencyGuidedMapLoss`.

    Args:
        in_channels: D, channels of the features.
        num_classes: K, foreground classes.

    Shapes:
        features (B, D, H, W) -> `BackgroundAwareCAMOutput`.

    Raises:
        ValueError: features without D channels.

    Paper:
        Lee, Lee, Lee and Shim, Railroad is not a Train: Saliency as Pseudo-pixel Supervision for Weakly Supervised
        Semantic Segmentation, CVPR 2021, arXiv:2105.08965.

    Differences:
        The released code has the background last.

    Notes:
        No bias and no dropout; weights start Xavier uniform. Compiles with ``fullgraph=True``.

    Example:
        >>> import torch
        >>> out = BackgroundAwareCAMHead(16, num_classes=20)(torch.rand(2, 16, 5, 7))
        >>> out.logits.shape, out.scores.shape
        (torch.Size([2, 20]), torch.Size([2, 21, 5, 7]))
    """

    def __init__(self, in_channels: int, num_classes: int) -> None:
        super().__init__()
        self.classifier = nn.Conv2d(in_channels, 1 + num_classes, 1, bias=False)
        nn.init.xavier_uniform_(self.classifier.weight)

    def forward(self, features: Tensor) -> BackgroundAwareCAMOutput:
        """Classify the images and map classes and background, see the class."""
        check_shape("features", features, (None, self.classifier.in_channels, None, None), "for this head")
        scores = self.classifier(features)
        return BackgroundAwareCAMOutput(scores[:, 1:].mean((2, 3)), scores)

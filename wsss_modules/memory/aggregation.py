"""Every pixel reads prototypes of the whole data set and is coded anew (RCA).

Axes: B images, D feature channels, H W cells, K foreground classes, M prototypes a class, P = K M.
"""

from __future__ import annotations

from typing import Literal

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F

from wsss_modules._checks import check_floating, check_ndim, check_shape


class SemanticAggregation(nn.Module):
    r"""Add to each pixel what it reads off the prototypes of all classes.

    .. math::
        y = W_x x + W_r (W_a\, read + b_a) + b, \qquad read = V^\top \sigma(c\, K\, (W_q x + b_q))

    with keys :math:`K` and values :math:`V` (P, D), linear in the prototypes, :math:`c` a ``scale`` and :math:`\sigma`
    the identity or, with ``softmax``, the softmax over all P prototypes.

    Args:
        channels: D, channels in and out.
        prototypes: M, prototypes a class.
        scale: c: ``"released"`` is K / M, ``"mean"`` is 1 / (K M), a mean over the prototypes; or a number.
        softmax: Attend with a softmax over the prototypes.

    Raises:
        ValueError: a size below 1 or an unknown ``scale``.

    Paper:
        Zhou, Zhang, Zhao and Li, Regional Semantic Contrast and Aggregation for Weakly Supervised Semantic
        Segmentation, CVPR 2022, arXiv:2203.09653.

    Differences:
        The released code writes ``similarity / M * K``, which multiplies by K / M = 2 on VOC where a division by the
        number of prototypes may have been meant, and has no softmax. It is the default.

    Notes:
        Without a softmax the read-out is linear in the pixel, so the layer folds into one 1 x 1 convolution, made
        anew from the prototypes at each call: D^2 products a pixel instead of 4 D^2 + 2 P D, and no (P, H, W)
        similarities to keep. With a softmax the layers on either side of it fold: D^2 + 2 P D. Weights are folded in
        float32 at least, also under autocast. Works in ``torch.compile(fullgraph=True)``.

    Example:
        >>> _ = torch.manual_seed(0)
        >>> aggregate = SemanticAggregation(8, prototypes=2)
        >>> aggregate(torch.rand(2, 8, 5, 6), torch.randn(3, 2, 8)).shape
        torch.Size([2, 8, 5, 6])
    """

    def __init__(
        self,
        channels: int,
        prototypes: int = 10,
        *,
        scale: Literal["released", "mean"] | float = "released",
        softmax: bool = False,
    ) -> None:
        super().__init__()
        for name, size in (("channels", channels), ("prototypes", prototypes)):
            if size < 1:
                raise ValueError(f"{name}: expected at least 1, got {size}")
        if isinstance(scale, str) and scale not in ("released", "mean"):
            raise ValueError(f'scale: expected "released", "mean" or a number, got {scale!r}')
        self.prototypes, self.scale, self.softmax = prototypes, scale, softmax
        self.query = nn.Conv2d(channels, channels, 1)
        self.key = nn.Linear(channels, channels)
        self.value = nn.Linear(channels, channels)
        self.aggregate = nn.Conv2d(channels, channels, 1)
        self.project = nn.Conv2d(2 * channels, channels, 1)

    def forward(self, features: Tensor, prototypes: Tensor) -> Tensor:
        """Code every pixel anew.

        Args:
            features: (B, D, H, W) float.
            prototypes: (K, M, D) float, see :func:`kmeans_prototypes`; taken as constants.

        Returns:
            (B, D, H, W).

        Raises:
            TypeError: ``features`` is not floating point.
            ValueError: a wrong shape.
        """
        channels = self.key.in_features
        check_ndim("features", features, 4, "(B, D, H, W)")
        check_floating("features", features)
        check_shape("features", features, (None, channels, None, None), "for this layer")
        check_shape("prototypes", prototypes, (None, self.prototypes, channels), "for this layer")
        own, similar, offset, back, bias = self._folded(rearrange(prototypes.detach(), "k m d -> (k m) d"))
        if self.softmax:
            attention = _at_each_pixel(features, similar, offset).softmax(1)
            return _at_each_pixel(features, own, bias) + _at_each_pixel(attention, back)
        with torch.autocast(features.device.type, enabled=False):
            own, bias = own + back @ similar, bias + back @ offset
        return _at_each_pixel(features, own, bias)

    def _folded(self, rows: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """The layer ``own x + back sigma(similar x + offset) + bias`` from prototypes (P, D)."""
        dtype = torch.promote_types(self.key.weight.dtype, torch.float32)
        rows = rows.to(dtype)
        with torch.autocast(rows.device.type, enabled=False):
            key, value = (F.linear(rows, *_weights(layer, dtype)) for layer in (self.key, self.value))  # (P, D)
            (wa, ba), (wq, bq) = _weights(self.aggregate, dtype), _weights(self.query, dtype)
            weight, bias = _weights(self.project, dtype)
            own, read = weight.chunk(2, dim=1)
            key = self._factor(len(rows)) * key
            return own, key @ wq, key @ bq, read @ (wa @ value.mT), bias + read @ ba

    def _factor(self, rows: int) -> float:
        if self.scale == "released":
            return rows / self.prototypes**2
        return 1 / rows if self.scale == "mean" else float(self.scale)

    @staticmethod
    def released_key(name: str) -> str:
        """The key in our ``state_dict`` of a parameter of the released layer, such as ``Q.weight``."""
        module, _, leaf = name.partition(".")
        places = {"Q": "query", "K": "key", "V": "value", "aggre": "aggregate", "concat_project": "project"}
        return f"{places[module]}.{leaf}"

    def extra_repr(self) -> str:
        """Show the options."""
        return f"prototypes={self.prototypes}, scale={self.scale!r}, softmax={self.softmax}"


def _at_each_pixel(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """``weight`` (out, in) as a 1 x 1 convolution, in the precision of ``x``."""
    return F.conv2d(x, weight[:, :, None, None].to(x.dtype), None if bias is None else bias.to(x.dtype))


def _weights(layer: nn.Conv2d | nn.Linear, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Weight (out, in) and bias (out,) of a layer that is linear at each pixel."""
    return layer.weight.flatten(1).to(dtype), layer.get_parameter("bias").to(dtype)

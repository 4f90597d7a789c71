"""Class masks that the network puts out itself, and features seen through them (EDAM).

Axes: B = G n images in G groups of n, K foreground classes, S of them sampled, C feature channels, d channels of
tokens, H W cells.
"""

from __future__ import annotations

from typing import Literal

from torch import Tensor, nn

from wsss_modules._checks import check_floating, check_integer, check_ndim, check_shape
from wsss_modules._precision import at_least_float32

__all__ = ["DiscriminativeActivationLayer", "class_specific_features", "discriminative_activation"]

Normalization = Literal["l2_abs", "softmax", "sigmoid"]
_NORMALIZATIONS = ("l2_abs", "softmax", "sigmoid")


def discriminative_activation(
    class_maps: Tensor, *, normalization: Normalization = "l2_abs", eps: float = 1e-12
) -> Tensor:
    r"""Let background and classes share each cell.

    .. math:: s_c = \left| \frac{m_c}{\max(\|m\|_2, \epsilon)} \right|

    with the length over the 1 + K channels of the cell, or with a softmax over them, or a sigmoid of each.

    Args:
        class_maps: m, (B, 1+K, H, W) floating point, signed, background first.
        normalization: "l2_abs" as released: squares sum to 1, and the sign of a map is lost; "softmax"; "sigmoid".
        eps: Least length; a cell of zeros stays zero.

    Returns:
        scores (B, 1+K, H, W) in [0, 1], in the dtype of ``class_maps``.

    Raises:
        TypeError: ``class_maps`` is not floating point.
        ValueError: a wrong shape or an unknown ``normalization``.

    Paper:
        Wu, Huang, Gao, Wei, Wei, Zhang and Shen, Embedded Discriminative Attention Mechanism for Weakly Supervised
        Semantic Segmentation, CVPR 2021.

    Differences:
        The paper speaks of normalised class-specific masks, often read as a softmax; the released code has none.

    Notes:
        Computed in float32 for half precision. The gradient of the absolute value at 0 is 0. Compiles with
        ``fullgraph=True``.

    Example:
        >>> import torch
        >>> discriminative_activation(torch.tensor([3.0, -4.0]).view(1, 2, 1, 1)).flatten()
        tensor([0.6000, 0.8000])
    """
    check_ndim("class_maps", class_maps, 4, "(B, 1+K, H, W)")
    check_floating("class_maps", class_maps)
    _check_normalization(normalization)
    maps = at_least_float32(class_maps)
    if normalization == "softmax":
        scores = maps.softmax(1)
    elif normalization == "sigmoid":
        scores = maps.sigmoid()
    else:
        scores = (maps / maps.norm(dim=1, keepdim=True).clamp(min=eps)).abs()
    return scores.to(class_maps.dtype)


class DiscriminativeActivationLayer(nn.Module):
    """A 3 x 3 convolution whose normalised output are the masks of background and classes.

    The masks *are* the localisation maps: they come out of the network and are trained through what is read under
    them, where a CAM is read off the weights of a classifier afterwards.

    Args:
        in_channels: C, channels of the features.
        num_classes: K, foreground classes.
        normalization: See `discriminative_activation`.

    Shapes:
        features (B, C, H, W), signed or not -> scores (B, 1+K, H, W) in [0, 1], background first.

    Raises:
        ValueError: an unknown ``normalization``, or features without C channels.

    Paper:
        Wu et al., Embedded Discriminative Attention Mechanism for Weakly Supervised Semantic Segmentation, CVPR 2021.

    Differences:
        The released layer has the background last. It only absorbs mass: it is never classified nor read.

    Notes:
        Starts from torch's default, without bias. Compiles with ``fullgraph=True``.

    Example:
        >>> import torch
        >>> scores = DiscriminativeActivationLayer(16, num_classes=20)(torch.randn(2, 16, 5, 7))
        >>> scores.shape, bool(torch.allclose(scores.square().sum(1), torch.ones(2, 5, 7)))
        (torch.Size([2, 21, 5, 7]), True)
    """

    def __init__(self, in_channels: int, num_classes: int, *, normalization: Normalization = "l2_abs") -> None:
        super().__init__()
        _check_normalization(normalization)
        self.normalization: Normalization = normalization
        self.conv = nn.Conv2d(in_channels, 1 + num_classes, 3, padding=1, bias=False)

    def forward(self, features: Tensor) -> Tensor:
        """Features -> masks of background and classes, see the class."""
        check_shape("features", features, (None, self.conv.in_channels, None, None), "for this layer")
        return discriminative_activation(self.conv(features), normalization=self.normalization)

    def extra_repr(self) -> str:
        """Show the options."""
        return f"normalization={self.normalization!r}"


def class_specific_features(features: Tensor, scores: Tensor, keys: Tensor) -> Tensor:
    """Look at the features through the mask of each sampled class: ``features * scores[:, key]``.

    Args:
        features: (B, d, H, W) floating point, already projected to the d channels of the tokens. A projection without
            bias may as well come after: both are linear, and the mask is one number a cell.
        scores: (B, 1+K, H, W) floating point, background first, see `DiscriminativeActivationLayer`.
        keys: (S,) int64 classes 1..K, the same for all images, or (G, S): one row for each group of B / G images.

    Returns:
        (B, S, d, H, W), in the dtype of ``features``.

    Raises:
        TypeError: a tensor of the wrong kind.
        ValueError: a wrong shape, or a batch that is no multiple of G.

    Paper:
        Wu et al., CVPR 2021.

    Example:
        >>> import torch
        >>> features = torch.tensor([[[[2.0, 4.0]]]])
        >>> scores = torch.tensor([[[[0.0, 0.0]], [[1.0, 0.5]], [[0.0, 0.25]]]])
        >>> class_specific_features(features, scores, torch.tensor([2, 1]))[0, :, 0, 0]
        tensor([[0., 1.],
                [2., 2.]])
    """
    check_ndim("features", features, 4, "(B, d, H, W)")
    check_floating("features", features)
    check_shape("scores", scores, (len(features), None, *features.shape[2:]), "to match features")
    check_floating("scores", scores)
    rows = keys_of_images(keys, len(features))[:, :, None, None]  # (B, S, 1, 1)
    masks = scores.gather(1, rows.expand(-1, -1, *scores.shape[2:]))
    return (features[:, None] * masks[:, :, None]).to(features.dtype)


def keys_of_images(keys: Tensor, batch: int) -> Tensor:
    """Keys (S,) or (G, S) as one row an image: (B, S)."""
    check_integer("keys", keys, "expected classes 1..K")
    if keys.ndim not in (1, 2):
        raise ValueError(f"keys: expected shape (S,) or (G, S), got {tuple(keys.shape)}")
    groups = keys if keys.ndim == 2 else keys[None]
    if len(groups) == 0 or batch % len(groups):
        raise ValueError(f"keys: expected a number of groups that divides the batch of {batch}, got {len(groups)}")
    return groups.repeat_interleave(batch // len(groups), 0)


def _check_normalization(normalization: str) -> None:
    if normalization not in _NORMALIZATIONS:
        raise ValueError(f'normalization: expected "l2_abs", "softmax" or "sigmoid", got {normalization!r}')

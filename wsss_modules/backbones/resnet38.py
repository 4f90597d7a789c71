"""ResNet-38d, a wide residual network that timm lacks.

Axes: B images, C channels, H W pixels, h w cells of stride 8.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from torch import Tensor, nn
from torch.nn import functional as F

from wsss_modules._checks import check_shape

__all__ = ["ResNet38", "ResNet38Features"]


class ResNet38Features(NamedTuple):
    """What `ResNet38` returns, all at stride 8 (channels before ``width_div``).

    Attributes:
        conv4: (B, 512, h, w), after the fourth stage.
        conv5: (B, 1024, h, w), after the fifth stage.
        conv6: (B, 4096, h, w), the last features.
    """

    conv4: Tensor
    conv5: Tensor
    conv6: Tensor


class ResNet38(nn.Module):
    """ResNet-38d: a wide pre-activation residual network with dilated last stages and output stride 8.

    Parameters are named as in the released code, so that ``load_released_state_dict`` needs no table.

    Args:
        width_div: Divide every channel count by this, for small machines and tests.
        dropout: Probabilities with which channels are dropped in the last two blocks, in training.
        frozen_batch_norm: Keep all batch norms on their stored statistics and their affine parameters fixed, also after
            ``train()``, as all released systems do. Switch off to train from scratch.
        frozen: Names of further submodules that are not trained: ("conv1a",) for PSA's classifier, ("conv1a", "b2",
            "b2_1", "b2_2") for its affinity network.
        final_relu: Whether the last features are activated. EDAM's release takes them signed, past the last batch norm.

    Shapes:
        image (B, 3, H, W) -> `ResNet38Features` of ceil(H / 8) by ceil(W / 8) cells.

    Raises:
        ValueError: a ``width_div`` that leaves no channel, an unknown name in ``frozen``, or an image of a wrong shape.

    Paper:
        Wu, Shen and van den Hengel, Wider or Deeper: Revisiting the ResNet Model for Visual Recognition, 2016,
        arXiv:1611.10080; the variant of Ahn and Kwak, CVPR 2018, arXiv:1803.10464.

    Notes:
        Compiles with ``fullgraph=True``. Images are RGB, normalised with the ImageNet mean and deviation.

    Example:
        >>> import torch
        >>> net = ResNet38(width_div=32).eval()
        >>> [tuple(x.shape) for x in net(torch.rand(1, 3, 33, 40))]
        [(1, 16, 5, 5), (1, 32, 5, 5), (1, 128, 5, 5)]
    """

    strides = (8, 8, 8)

    def __init__(
        self,
        width_div: int = 1,
        *,
        dropout: tuple[float, float] = (0.3, 0.5),
        frozen_batch_norm: bool = True,
        frozen: Sequence[str] = ("conv1a",),
        final_relu: bool = True,
    ) -> None:
        super().__init__()
        if not 1 <= width_div <= 64:
            raise ValueError(f"width_div: expected 1 to 64, the narrowest layer, got {width_div}")

        def plain(inside: int, middle: int, out: int, stride: int = 1, dilation: tuple[int, int] = (1, 1)) -> _Plain:
            return _Plain(inside // width_div, middle // width_div, out // width_div, stride, dilation)

        self.conv1a = nn.Conv2d(3, 64 // width_div, 3, padding=1, bias=False)
        self.b2 = plain(64, 128, 128, stride=2)
        self.b2_1 = plain(128, 128, 128)
        self.b2_2 = plain(128, 128, 128)
        self.b3 = plain(128, 256, 256, stride=2)
        self.b3_1 = plain(256, 256, 256)
        self.b3_2 = plain(256, 256, 256)
        self.b4 = plain(256, 512, 512, stride=2)
        self.b4_1 = plain(512, 512, 512)
        self.b4_2 = plain(512, 512, 512)
        self.b4_3 = plain(512, 512, 512)
        self.b4_4 = plain(512, 512, 512)
        self.b4_5 = plain(512, 512, 512)
        self.b5 = plain(512, 512, 1024, dilation=(1, 2))
        self.b5_1 = plain(1024, 512, 1024, dilation=(2, 2))
        self.b5_2 = plain(1024, 512, 1024, dilation=(2, 2))
        self.b6 = _Bottleneck(1024 // width_div, 2048 // width_div, 4, dropout[0])
        self.b7 = _Bottleneck(2048 // width_div, 4096 // width_div, 4, dropout[1])
        self.bn7 = nn.BatchNorm2d(4096 // width_div)
        self.channels = (512 // width_div, 1024 // width_div, 4096 // width_div)
        self.frozen_batch_norm, self.final_relu = frozen_batch_norm, final_relu
        children = dict(self.named_children())
        for name in frozen:
            if name not in children:
                raise ValueError(f"frozen: expected names out of {sorted(children)}, got {name!r}")
            children[name].requires_grad_(False)
        if frozen_batch_norm:
            for norm in self._batch_norms():
                norm.requires_grad_(False)
        self.train()

    def forward(self, image: Tensor) -> ResNet38Features:
        """Extract the features, see the class."""
        check_shape("image", image, (None, 3, None, None), "(B, 3, H, W)")
        x = self.conv1a(image)
        for block in (self.b2, self.b2_1, self.b2_2, self.b3, self.b3_1, self.b3_2):
            x, _ = block(x)
        for block in (self.b4, self.b4_1, self.b4_2, self.b4_3, self.b4_4, self.b4_5):
            x, _ = block(x)
        x, conv4 = self.b5(x)
        x, _ = self.b5_1(x)
        x, _ = self.b5_2(x)
        x, conv5 = self.b6(x)
        x, _ = self.b7(x)
        return ResNet38Features(conv4, conv5, _activate(self.bn7, x) if self.final_relu else self.bn7(x))

    def train(self, mode: bool = True) -> ResNet38:
        """Switch to training or evaluation; frozen batch norms stay in evaluation."""
        super().train(mode)
        if self.frozen_batch_norm:
            for norm in self._batch_norms():
                norm.eval()
        return self

    def load_released_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Load a released checkpoint of PSA or of a system built on it; heads in it are left out.

        Args:
            state: The released ``state_dict``, with or without a ``module.`` prefix.

        Raises:
            RuntimeError: a parameter is missing or has a wrong shape.
        """
        own = self.state_dict()
        named = {key.removeprefix("module."): value for key, value in state.items()}
        kept = {key: value for key, value in named.items() if key in own}
        counters = {key: value for key, value in own.items() if key.endswith("num_batches_tracked")}
        self.load_state_dict({**counters, **kept})

    def _batch_norms(self) -> list[nn.BatchNorm2d]:
        return [module for module in self.modules() if isinstance(module, nn.BatchNorm2d)]


class _Plain(nn.Module):
    """Two 3x3 convolutions; returns the sum and the activated input."""

    def __init__(self, inside: int, middle: int, out: int, stride: int, dilation: tuple[int, int]) -> None:
        super().__init__()
        first, second = dilation
        self.bn_branch2a = nn.BatchNorm2d(inside)
        self.conv_branch2a = nn.Conv2d(inside, middle, 3, stride, first, first, bias=False)
        self.bn_branch2b1 = nn.BatchNorm2d(middle)
        self.conv_branch2b1 = nn.Conv2d(middle, out, 3, 1, second, second, bias=False)
        same = inside == out and stride == 1
        self.conv_branch1 = None if same else nn.Conv2d(inside, out, 1, stride, bias=False)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        active = _activate(self.bn_branch2a, x)
        shortcut = x if self.conv_branch1 is None else self.conv_branch1(active)
        branch = _activate(self.bn_branch2b1, self.conv_branch2a(active))
        return shortcut + self.conv_branch2b1(branch), active


class _Bottleneck(nn.Module):
    """1x1, dilated 3x3, 1x1 with dropped channels in between; returns the sum and the activated input."""

    def __init__(self, inside: int, out: int, dilation: int, dropout: float) -> None:
        super().__init__()
        self.bn_branch2a = nn.BatchNorm2d(inside)
        self.conv_branch2a = nn.Conv2d(inside, out // 4, 1, bias=False)
        self.bn_branch2b1 = nn.BatchNorm2d(out // 4)
        self.conv_branch2b1 = nn.Conv2d(out // 4, out // 2, 3, 1, dilation, dilation, bias=False)
        self.bn_branch2b2 = nn.BatchNorm2d(out // 2)
        self.conv_branch2b2 = nn.Conv2d(out // 2, out, 1, bias=False)
        self.conv_branch1 = nn.Conv2d(inside, out, 1, bias=False)
        self.dropout = nn.Dropout2d(dropout)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        active = _activate(self.bn_branch2a, x)
        branch = self.dropout(_activate(self.bn_branch2b1, self.conv_branch2a(active)))
        branch = self.dropout(_activate(self.bn_branch2b2, self.conv_branch2b1(branch)))
        return self.conv_branch1(active) + self.conv_branch2b2(branch), active


def _activate(norm: nn.Module, x: Tensor) -> Tensor:
    return F.relu(norm(x), inplace=True)

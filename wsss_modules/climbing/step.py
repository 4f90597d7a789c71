"""The step of an image along a gradient that AdvCAM and W-OoD share.

Axes: B images or pairs of an image and its mirror image, H W pixels.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from wsss_modules._checks import check_floating, check_shape
from wsss_modules._distributed import max_over_processes
from wsss_modules._precision import at_least_float32

__all__ = ["anti_adversarial_step"]

Scope = Literal["batch", "image"]
Clamp = Literal["scope", "channel", "none"]


def anti_adversarial_step(
    images: Tensor,
    gradient: Tensor,
    step_size: float = 0.08,
    *,
    scope: Scope = "batch",
    clamp: Clamp = "scope",
    normalize_grad: bool = True,
    eps: float = 1e-12,
    sync: bool = False,
) -> Tensor:
    r"""Move images one step up a gradient, and keep them within the range of their pixels.

    .. math:: x' = \mathrm{clamp}(x + \xi \, g / (\max |g| + \epsilon), \ \min x, \ \max x)

    The entry with the largest gradient moves by :math:`\xi`, most others by far less. As the range is that of the
    images given, it can only shrink over several steps.

    Args:
        images: x, (B, ..., C, H, W) floating point, normalised as the network wants them.
        gradient: g, of the same shape.
        step_size: xi, at least 0, in units of the normalised pixels.
        scope: Over what the maximum of the gradient and the range of the pixels are taken: the whole "batch", so that
            the step of an image depends on the others, or each "image", that is each entry along the first axis: for
            (B, 2, 3, H, W) each pair.
        clamp: Range of the "scope" over all channels, or of each "channel" of the scope by itself, or "none".
        normalize_grad: Divide the gradient by its largest magnitude. Otherwise a step is xi times the gradient.
        eps: Keeps the quotient finite where there is no gradient; such images stay as they are.
        sync: With "batch", take maximum and range over all processes of a distributed run.

    Returns:
        x', of the shape and dtype of ``images``, detached.

    Raises:
        TypeError: ``images`` or ``gradient`` is not floating point.
        ValueError: shapes differ or have fewer than three axes, a negative ``step_size``, or an unknown option.

    Paper:
        Lee, Kim and Yoon, Anti-Adversarially Manipulated Attributions for Weakly and Semi-Supervised Semantic
        Segmentation, CVPR 2021, arXiv:2103.08896.

    Differences:
        The paper adds a small multiple of the gradient itself (``normalize_grad=False, clamp="none"``). The released
        code divides by the largest magnitude over the pair of an image and its mirror image, and clamps to the range
        over all channels, which a channel may leave its own by.

    Example:
        >>> images = torch.tensor([0.0, 0.5, 1.0]).view(1, 3, 1, 1)
        >>> gradient = torch.tensor([-1.0, 2.0, 4.0]).view(1, 3, 1, 1)
        >>> anti_adversarial_step(images, gradient, 0.1).flatten()
        tensor([0.0000, 0.5500, 1.0000])
    """
    check_floating("images", images)
    check_floating("gradient", gradient)
    if images.ndim < 3:
        raise ValueError(f"images: expected shape (B, ..., C, H, W), got {tuple(images.shape)}")
    check_shape("gradient", gradient, images.shape, "to match images")
    if step_size < 0:
        raise ValueError(f"step_size: expected at least 0, got {step_size}")
    if scope not in ("batch", "image"):
        raise ValueError(f'scope: expected "batch" or "image", got {scope!r}')
    if clamp not in ("scope", "channel", "none"):
        raise ValueError(f'clamp: expected "scope", "channel" or "none", got {clamp!r}')
    if images.numel() == 0:
        return images.detach().clone()
    together, sync = tuple(range(scope == "image", images.ndim)), sync and scope == "batch"
    of_a_channel = tuple(axis for axis in together if axis != images.ndim - 3)
    x, g = at_least_float32(images.detach()), at_least_float32(gradient.detach())
    if normalize_grad:
        g = g / (max_over_processes(g.abs().amax(together, keepdim=True), sync) + eps)
    moved = x + step_size * g
    if clamp != "none":
        axes = of_a_channel if clamp == "channel" else together
        extremes = torch.stack([value.amax(axes, keepdim=True) for value in (x, -x)])
        highest, minus_lowest = max_over_processes(extremes, sync).unbind()
        moved = moved.clamp(-minus_lowest, highest)
    return moved.to(images.dtype)

"""The step of W-OoD: images moved along the gradient of their strongest class.

Axes: B images, K foreground classes, H W pixels.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

from wsss_modules._checks import check_floating, check_ndim, check_shape
from wsss_modules.climbing.step import anti_adversarial_step

__all__ = ["gradient_climb", "top_logit_gradient"]


def top_logit_gradient(model: Callable[[Tensor], Tensor], images: Tensor) -> Tensor:
    r"""Gradient with respect to the images of the score of each image's strongest class.

    .. math:: g = \partial / \partial x \sum_b \max_k f_k(x_b)

    Args:
        model: From images to logits (B, K); a module or any function. Called once, in the mode that it is in.
        images: (B, 3, H, W) floating point.

    Returns:
        (B, 3, H, W), detached, in the dtype of ``images``.

    Raises:
        TypeError: ``images`` is not floating point.
        ValueError: ``images`` or the logits have a wrong shape, or the logits don't depend on the images.

    Notes:
        Works inside ``torch.no_grad()``. Only the gradient of the images is computed: that of the weights is neither
        formed nor touched, whether they are frozen or not. Give the module itself, not its ``DistributedDataParallel``
        wrapper. In float16 small gradients round to 0: run it outside autocast.

    Example:
        >>> weight = torch.tensor([[1.0, 0.0, 0.0], [0.0, 0.0, 2.0]])
        >>> top_logit_gradient(lambda x: x.mean((2, 3)) @ weight.T, torch.ones(1, 3, 1, 1)).flatten()
        tensor([0., 0., 2.])
    """
    check_ndim("images", images, 4, "(B, 3, H, W)")
    check_floating("images", images)
    with torch.enable_grad():
        x = images.detach().requires_grad_()
        logits = model(x)
        check_shape("model(images)", logits, (len(images), None), "as logits")
        if not logits.requires_grad:
            raise ValueError("model: expected logits with a gradient to the images; does it detach or use no_grad?")
        return torch.autograd.grad(logits.amax(1).sum(), x)[0]


def gradient_climb(
    model: Callable[[Tensor], Tensor],
    images: Tensor,
    step: float = 0.07,
    *,
    scope: Literal["batch", "image"] = "batch",
    eps: float = 1e-12,
    sync: bool = False,
) -> Tensor:
    r"""Move images one step in the direction that raises their strongest class.

    .. math:: x' = \mathrm{clamp}(x + s \, g / (\max |g| + \epsilon), \ \min x, \ \max x)

    with g of `top_logit_gradient`; see `anti_adversarial_step`.

    Args:
        model: From images to logits (B, K); see `top_logit_gradient`.
        images: (B, 3, H, W) floating point, normalised as the model wants them.
        step: s, at least 0, in units of the normalised pixels.
        scope: Over what the maximum of the gradient and the range of the pixels are taken: the whole "batch", so that
            the step of an image depends on the others, or each "image".
        eps: Keeps the quotient finite where there is no gradient; such images stay as they are.
        sync: With "batch", take maximum and range over all processes of a distributed run.

    Returns:
        (B, 3, H, W), detached, in the dtype of ``images``, at most s away from them and within their range.

    Raises:
        TypeError: ``images`` is not floating point.
        ValueError: a wrong shape, a negative ``step``, or an unknown ``scope``.

    Paper:
        In the released code of Lee, Oh, Yun, Choe, Kim and Yoon, Weakly Supervised Semantic Segmentation using
        Out-of-Distribution Data, CVPR 2022, arXiv:2203.03860.

    Differences:
        "batch" is the released arithmetic, which also fills the gradients of the weights and clears them again.

    Notes:
        One pass forward and one back to the pixels. `top_logit_gradient` says more. No graph of ``torch.compile``
        spans the step, since it holds a backward pass of its own.

    Example:
        >>> images = torch.tensor([0.0, 0.5, 1.0]).view(1, 3, 1, 1)
        >>> gradient_climb(lambda x: x.mean((2, 3)) @ torch.tensor([[1.0], [4.0], [4.0]]), images, step=0.1).flatten()
        tensor([0.0250, 0.6000, 1.0000])
    """
    if step < 0:
        raise ValueError(f"step: expected at least 0, got {step}")
    if scope not in ("batch", "image"):
        raise ValueError(f'scope: expected "batch" or "image", got {scope!r}')
    gradient = top_logit_gradient(model, images)
    return anti_adversarial_step(images, gradient, step, scope=scope, eps=eps, sync=sync)

"""Regression of accumulated attention maps by a classifier's own maps (NSROM, after OAA).

Axes: B images, K foreground classes, H W cells.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from wsss_modules._checks import check_floating, check_ndim, check_shape
from wsss_modules._distributed import sum_over_processes
from wsss_modules._precision import at_least_float32


def attention_regression_loss(
    logits: Tensor, target: Tensor, *, saturate: bool = False, eps: float = 1e-8, sync: bool = False
) -> Tensor:
    r"""Raise a class map where attention has been seen, in proportion to it, and lower it everywhere else.

    .. math::
        L = \operatorname{mean}_{t > 0}\, t \log(1 + e^{-x}) + \operatorname{mean}_{t = 0} \log(1 + e^x)

    over all cells and classes of the batch; a set without a cell drops its term.

    Args:
        logits: x, (B, K, H, W) floating-point class maps.
        target: t, (B, K, H, W) in [0, 1], zero for absent classes; see
            :class:`wsss_modules.OnlineAttentionAccumulator`.
        saturate: compute the second cost as the released code does, as
            :math:`-\log(e^{-\max(x, 0)} + \epsilon) + \log(1 + e^{-|x|})`.
        eps: only with ``saturate``.
        sync: count and sum over the processes of a distributed run.

    Returns:
        A scalar in the dtype of ``logits``.

    Raises:
        TypeError: ``logits`` is not floating point.
        ValueError: shapes differ.

    Paper:
        Jiang et al., "Integral Object Mining via Online Attention Accumulation", ICCV 2019; as in Yao et al.,
        "Non-Salient Region Object Mining for Weakly Supervised Semantic Segmentation", CVPR 2021, arXiv:2103.14581.

    Differences:
        The released second cost stops at 18.4, with no gradient beyond x of about 18, and its first one is infinite
        below x = -88.7 in float32, with a gradient of NaN. Here both are the softplus, which has neither limit;
        ``saturate=True`` brings back the former. There is no term (1 - t) for cells with weak attention, as there.

    Notes:
        Both means are over the batch, so that the terms of an image depend on the others. Under DDP, ``sync=True``
        gives value and (after DDP's averaging) gradient of one process with the whole batch. Computed in float32 for
        half precision. Compiles with ``fullgraph=True``.

    Example:
        >>> import torch
        >>> from wsss_losses import attention_regression_loss
        >>> logits, target = torch.tensor([[[[2.0, -2.0]]]]), torch.tensor([[[[0.5, 0.0]]]])
        >>> attention_regression_loss(logits, target)  # 0.5 * 0.1269 + 0.1269
        tensor(0.1904)
    """
    check_ndim("logits", logits, 4, "(B, K, H, W)")
    check_floating("logits", logits)
    check_shape("target", target, logits.shape, "to match logits")
    with torch.autocast(logits.device.type, enabled=False):
        x = at_least_float32(logits)
        t = target.to(x.dtype)
        seen = t > 0
        # not F.softplus, which takes a line for the curve from 20 on: in double precision that shows in the gradient
        raised = torch.where(seen, -t * F.logsigmoid(x), 0.0).sum()
        lowered = torch.where(seen, 0.0, _saturating(x, eps) if saturate else -F.logsigmoid(-x)).sum()
        count = seen.sum().to(x.dtype)
        sums = torch.stack([raised, lowered, count, x.numel() - count])
        sums = sum_over_processes(sums, sync)
        return (sums[:2] / sums[2:].detach().clamp(min=1)).sum().to(logits.dtype)


def _saturating(x: Tensor, eps: float) -> Tensor:
    """softplus(x) up to x of about -log(eps), where it stops."""
    return torch.log1p(torch.exp(-x.abs())) - torch.log(torch.exp(-x.clamp(min=0)) + eps)


class AttentionRegressionLoss(nn.Module):
    """Regression of accumulated attention maps; see :func:`attention_regression_loss`.

    Args:
        saturate: as released, without a gradient for large logits.
        eps: only with ``saturate``.
        sync: take part in a distributed run.

    Example:
        >>> import torch
        >>> from wsss_losses import AttentionRegressionLoss
        >>> _ = torch.manual_seed(0)
        >>> logits = torch.randn(2, 3, 4, 4, requires_grad=True)
        >>> AttentionRegressionLoss()(logits, torch.rand(2, 3, 4, 4).clamp(min=0.5) - 0.5).backward()
    """

    def __init__(self, *, saturate: bool = False, eps: float = 1e-8, sync: bool = False) -> None:
        super().__init__()
        self.saturate, self.eps, self.sync = saturate, eps, sync

    def forward(self, logits: Tensor, target: Tensor) -> Tensor:
        """Class maps and accumulated maps (B, K, H, W) -> loss."""
        return attention_regression_loss(logits, target, saturate=self.saturate, eps=self.eps, sync=self.sync)

    def extra_repr(self) -> str:
        """Show the options."""
        return f"saturate={self.saturate}, eps={self.eps}, sync={self.sync}"

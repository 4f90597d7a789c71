"""One step of a random walk over the affinity of all pairs of cells within a window (AFA).

Axes: B images, C maps, K foreground classes, h w cells, N = h w.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from wsss_modules._checks import check_floating, check_ndim, check_shape
from wsss_modules.affinity import LocalAffinity, window_offsets
from wsss_modules.online_labels import present_softmax

__all__ = ["AffinityRandomWalk", "affinity_random_walk"]


def affinity_random_walk(
    x: Tensor, affinity: Tensor, *, radius: int = 8, power: float = 2.0, eps: float = 1e-4
) -> Tensor:
    r"""Move maps one step along affinities within a square window.

    .. math:: y_j = \sum_i T_{ij} x_i, \qquad T_{ij} = \frac{P_{ij}^\beta}{\sum_i P_{ij}^\beta + \epsilon}

    over the cells i in the window of j, j itself included.

    Args:
        x: (B, C, h, w) floating point, any range; each map walks alone.
        affinity: P, (B, N, N) floating point in [0, 1], symmetric, see :class:`AttentionAffinityHead`. Only its upper
            triangle within the window is read.
        radius: reach of the window in cells along each axis, at least 0.
        power: beta, above 0.
        eps: added to the sums, so that a cell that is like no other loses strength: 1e-4 for plain maps; 0.1 where the
            background walks along, which all maps of a cell lose alike.

    Returns:
        (B, C, h, w), in the dtype of ``x``.

    Raises:
        TypeError: ``x`` or ``affinity`` is not floating point.
        ValueError: shapes don't match, or an option is out of range.

    Paper:
        Ru et al., "Learning Affinity from Attention: End-to-End Weakly-Supervised Semantic Segmentation with
        Transformers", CVPR 2022, arXiv:2203.02664, section 3.3.

    Differences:
        The released code writes the window into the affinity it is given, which is left alone here.

    Notes:
        A :class:`LocalAffinity` of the window and its diagonal, which is not 1, take the place of three N x N matrices
        of the released code. Differentiable in both; computed in float32 for half precision. Compiles with
        ``fullgraph=True``.

    Example:
        >>> import torch
        >>> from wsss_modules import affinity_random_walk
        >>> affinity = torch.tensor([[[1.0, 1.0, 0.0], [1.0, 1.0, 0.0], [0.0, 0.0, 1.0]]])
        >>> affinity_random_walk(torch.tensor([[[[1.0, 0.0, 1.0]]]]), affinity, eps=0)
        tensor([[[[0.5000, 0.5000, 1.0000]]]])
    """
    check_ndim("x", x, 4, "(B, C, h, w)")
    check_floating("x", x)
    check_floating("affinity", affinity)
    size = (x.shape[2], x.shape[3])
    n_cells = size[0] * size[1]
    check_shape("affinity", affinity, (len(x), n_cells, n_cells), f"(B, N, N) for a grid of {size[0]} x {size[1]}")
    _check_options(radius, power, eps)
    dtype = torch.promote_types(torch.promote_types(x.dtype, affinity.dtype), torch.float32)
    with torch.autocast(x.device.type, enabled=False):
        near = LocalAffinity.from_dense(affinity, size, offsets=window_offsets(radius)).to(dtype).power(power)
        itself = affinity.diagonal(dim1=1, dim2=2).to(dtype).pow(power).view(-1, 1, *size)
        maps = x.to(dtype)
        both = torch.cat([maps, torch.ones_like(itself)], 1)  # the sums of weights walk along
        moved = near.matvec(both) + (itself - 1) * both  # LocalAffinity has a diagonal of ones
        return (moved[:, :-1] / (moved[:, -1:] + eps)).to(x.dtype)


class AffinityRandomWalk(nn.Module):
    """AFA's walk: background and present classes compete by a softmax and move one step along the affinity.

    See :func:`present_softmax` and :func:`affinity_random_walk`.

    Args:
        radius: reach of the window in cells along each axis.
        power: exponent of the affinities.
        eps: added to the sums of weights.
        backgrounds: constant background scores; each gives scores of its own. Default: the low and the high one.

    Raises:
        ValueError: an option is out of range, or no background.

    Paper:
        Ru et al., CVPR 2022, arXiv:2203.02664, section 3.3.

    Notes:
        All backgrounds walk together, so that the affinity is read once.

    Example:
        >>> import torch
        >>> from wsss_modules import AffinityRandomWalk
        >>> walk = AffinityRandomWalk(radius=2, backgrounds=(0.35, 0.55))
        >>> low, high = walk(torch.rand(1, 3, 4, 5), torch.full((1, 20, 20), 0.5), torch.tensor([[1, 0, 1]]))
        >>> low.shape, bool(low[:, 2].any())  # class 2 is absent
        (torch.Size([1, 4, 4, 5]), False)
    """

    def __init__(
        self,
        radius: int = 8,
        *,
        power: float = 2.0,
        eps: float = 0.1,
        backgrounds: tuple[float, ...] = (0.35, 0.55),
    ) -> None:
        super().__init__()
        _check_options(radius, power, eps)
        if not backgrounds:
            raise ValueError("backgrounds: expected at least one score, got none")
        self.radius, self.power, self.eps, self.backgrounds = radius, power, eps, tuple(backgrounds)

    def forward(self, cam: Tensor, affinity: Tensor, labels: Tensor) -> tuple[Tensor, ...]:
        """CAMs (B, K, h, w), affinity (B, N, N) and labels (B, K) -> scores (B, 1 + K, h, w) for each background."""
        scores = torch.cat([present_softmax(cam, labels, background) for background in self.backgrounds], 1)
        walked = affinity_random_walk(scores, affinity, radius=self.radius, power=self.power, eps=self.eps)
        return walked.chunk(len(self.backgrounds), dim=1)

    def extra_repr(self) -> str:
        """Show the options."""
        return f"radius={self.radius}, power={self.power}, eps={self.eps}, backgrounds={self.backgrounds}"


def _check_options(radius: int, power: float, eps: float) -> None:
    if radius < 0:
        raise ValueError(f"radius: expected at least 0, got {radius}")
    if not power > 0:
        raise ValueError(f"power: expected a number above 0, got {power}")
    if eps < 0:
        raise ValueError(f"eps: expected at least 0, got {eps}")

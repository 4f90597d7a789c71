"""A random walk, of one step as published, over the affinity of all pairs of cells within a window (AFA).

Axes: B images, C maps, K foreground classes, h w cells, N = h w.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from wsss_modules._checks import check_floating, check_ndim, check_shape
from wsss_modules.affinity import LocalAffinity, local_window_mask, window_offsets
from wsss_modules.online_labels import present_softmax

__all__ = ["AffinityRandomWalk", "affinity_random_walk"]


def affinity_random_walk(
    x: Tensor,
    affinity: Tensor,
    *,
    radius: int | None = 8,
    power: float = 2.0,
    eps: float = 1e-4,
    n_steps: int = 1,
) -> Tensor:
    r"""Move maps along affinities within a square window, by one step unless more are asked for.

    .. math:: y_j = \sum_i T_{ij} x_i, \qquad T_{ij} = \frac{P_{ij}^\beta}{\sum_i P_{ij}^\beta + \epsilon}

    over the cells i in the window of j, j itself included.

    Args:
        x: (B, C, h, w) floating point, any range; each map walks alone.
        affinity: P, (B, N, N) floating point in [0, 1], symmetric, see :class:`AttentionAffinityHead`. Only its upper
            triangle within the window is read.
        radius: reach of the window in cells along each axis, at least 0; None for all pairs.
        power: beta, above 0.
        eps: added to the sums, so that a cell that is like no other loses strength: 1e-4 for plain maps; 0.1 where the
            background walks along, which all maps of a cell lose alike. 0 / 0 is 0.
        n_steps: steps, at least 1. The released code can square its matrix, and does so 0 times.

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
        The released code makes three N x N matrices. Here a :class:`LocalAffinity` of the window takes their place on a
        GPU, and on a CPU the blocks of the matrix that hold the windows of a row of cells: they have more entries than
        the windows, but lie together. Differentiable in both; computed in float32 for half precision. Compiles with
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
    _check_options(radius, power, eps, n_steps)
    reach = max(size) if radius is None else radius
    dtype = torch.promote_types(torch.promote_types(x.dtype, affinity.dtype), torch.float32)
    with torch.autocast(x.device.type, enabled=False):
        itself = affinity.diagonal(dim1=1, dim2=2).to(dtype).pow(power).view(-1, 1, *size)
        to_others = _moved_by_rows if x.device.type == "cpu" else _moved_by_offsets

        def moved(maps: Tensor) -> Tensor:
            return itself * maps + to_others(maps, affinity, reach, power)

        first = moved(torch.cat([x.to(dtype), torch.ones_like(itself)], 1))  # the sums of weights walk along
        total = first[:, -1:] + eps
        total = torch.where(total > 0, total, 1.0)  # without eps, a cell that is like none, not even itself, gets 0
        maps = first[:, :-1] / total
        for _ in range(n_steps - 1):
            maps = moved(maps) / total
        return maps.to(x.dtype)


class AffinityRandomWalk(nn.Module):
    """AFA's walk: background and present classes compete by a softmax and move along the affinity.

    See :func:`present_softmax` and :func:`affinity_random_walk`.

    Args:
        radius: reach of the window in cells along each axis; None for all pairs.
        power: exponent of the affinities.
        eps: added to the sums of weights.
        n_steps: steps of the walk.
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
        radius: int | None = 8,
        *,
        power: float = 2.0,
        eps: float = 0.1,
        n_steps: int = 1,
        backgrounds: tuple[float, ...] = (0.35, 0.55),
    ) -> None:
        super().__init__()
        _check_options(radius, power, eps, n_steps)
        if not backgrounds:
            raise ValueError("backgrounds: expected at least one score, got none")
        self.radius, self.power, self.eps, self.n_steps = radius, power, eps, n_steps
        self.backgrounds = tuple(backgrounds)

    def forward(self, cam: Tensor, affinity: Tensor, labels: Tensor) -> tuple[Tensor, ...]:
        """CAMs (B, K, h, w), affinity (B, N, N) and labels (B, K) -> scores (B, 1 + K, h, w) for each background."""
        scores = torch.cat([present_softmax(cam, labels, background) for background in self.backgrounds], 1)
        options = {"power": self.power, "eps": self.eps}
        walked = affinity_random_walk(scores, affinity, radius=self.radius, n_steps=self.n_steps, **options)
        return walked.chunk(len(self.backgrounds), dim=1)

    def extra_repr(self) -> str:
        """Show the options."""
        return (
            f"radius={self.radius}, power={self.power}, eps={self.eps}, n_steps={self.n_steps}, "
            f"backgrounds={self.backgrounds}"
        )


def _moved_by_offsets(x: Tensor, affinity: Tensor, radius: int, power: float) -> Tensor:
    """What cells get from the others in their windows, (B, C, h, w), by a product with a `LocalAffinity`."""
    size = (x.shape[2], x.shape[3])
    near = LocalAffinity.from_dense(affinity, size, offsets=window_offsets(radius)).to(x.dtype).power(power)
    return near.matvec(x) - x  # it has a diagonal of ones


def _moved_by_rows(x: Tensor, affinity: Tensor, radius: int, power: float) -> Tensor:
    """The same by two products for each row of cells, with those in the rows of its windows below."""
    height, width = x.shape[2:]
    cells = x.flatten(2)
    total = torch.zeros_like(cells)
    near = local_window_mask((1, width), radius, device=x.device)  # (w, w)
    later = torch.cat([near.triu(1), near.repeat(1, min(radius, height))], 1)  # in its own row only those to the right
    # taken apart at once: the gradient of a slice would be as large as the matrix for each row
    for row, pairs in enumerate(affinity.unflatten(1, (height, width)).unbind(1)):
        own, below = ((row * width, rows * width) for rows in (1, min(height - row, radius + 1)))  # starts and lengths
        block = pairs.narrow(2, *below).to(x.dtype)  # (B, w, rows w)
        read = later[:, : block.shape[2]]
        read = read if power >= 1 else read & (block > 0)  # the slope of smaller powers at 0 is infinite
        weight = torch.where(read, block, 0.0).pow(power)
        total.narrow(2, *below).add_(cells.narrow(2, *own) @ weight)
        total.narrow(2, *own).add_(cells.narrow(2, *below) @ weight.mT)
    return total.view(x.shape)


def _check_options(radius: int | None, power: float, eps: float, n_steps: int) -> None:
    if radius is not None and radius < 0:
        raise ValueError(f"radius: expected at least 0 or None, got {radius}")
    if n_steps < 1:
        raise ValueError(f"n_steps: expected at least 1, got {n_steps}")
    if not power > 0:
        raise ValueError(f"power: expected a number above 0, got {power}")
    if eps < 0:
        raise ValueError(f"eps: expected at least 0, got {eps}")

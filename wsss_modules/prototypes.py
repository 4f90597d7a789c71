"""Prototypes of features: k-means.

Axes: G independent sets, N samples, C channels, k clusters.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from wsss_modules._checks import check_floating, check_shape

__all__ = ["Clusters", "kmeans"]

# Elements of the (G, rows, k) table of distances that `kmeans` holds at a time.
_TABLE = 2**22


class Clusters(NamedTuple):
    """What `kmeans` returns.

    Attributes:
        labels: (N,) or (G, N) int64, 0..k-1; -1 for samples that are not valid.
        centres: (k, C) or (G, k, C), in the dtype of the samples.
    """

    labels: Tensor
    centres: Tensor


@torch.no_grad()
def kmeans(
    x: Tensor,
    k: int,
    iters: int = 10,
    *,
    metric: Literal["euclidean", "cosine"] = "euclidean",
    init: Literal["first", "kmeans++"] | Tensor = "first",
    valid: Tensor | None = None,
    generator: torch.Generator | None = None,
) -> Clusters:
    r"""Lloyd's k-means of one set of samples, or of several sets at once.

    Each round assigns every sample to its nearest centre and moves every centre to the mean of its samples:

    .. math:: \ell_n = \arg\min_q \|x_n - \mu_q\|^2, \qquad \mu_q = \mathrm{mean}\{x_n : \ell_n = q\}

    With the cosine metric centres have length 1, :math:`\ell_n = \arg\max_q x_n \cdot \mu_q`, and the new centre is the
    sum of its samples divided by its length.

    Args:
        x: (N, C) samples, or (G, N, C) for G independent clusterings. N is at least 1.
        k: Number of clusters, at least 1; it may exceed the number of samples.
        iters: Number of rounds, at least 1. All are made: an early stop would have to wait for the device.
        metric: "euclidean" or "cosine".
        init: Where centres start: at the "first" k valid samples (over again from the first where there are fewer); by
            "kmeans++", drawn with a probability proportional to the squared distance to the centres drawn before; or
            at given centres, (k, C) or (G, k, C). The cosine metric divides them by their length.
        valid: (N,) or (G, N) bool. Samples that are not valid take no part, whatever they hold. A set without a valid
            sample has its centres at zero, or where they were given.
        generator: For "kmeans++", on the device of ``x``.

    Returns:
        `Clusters` with the labels of the last assignment and the centres moved once more after it. They belong
        together (centres are the means of their labels) but, unless the rounds have converged, a sample may lie nearer
        to another of the moved centres.

    Raises:
        TypeError: ``x`` is not floating point.
        ValueError: a wrong shape, number or name.

    Paper:
        Lloyd, Least squares quantization in PCM, IEEE Transactions on Information Theory 1982; Arthur and
        Vassilvitskii, k-means++: The Advantages of Careful Seeding, SODA 2007. With ``init="first"`` and ten rounds as
        in the released code of Lee et al., Weakly Supervised Semantic Segmentation using Out-of-Distribution Data,
        CVPR 2022, arXiv:2203.03860.

    Differences:
        A cluster that loses all samples keeps its centre; the released code divides 0 by 0 there, and the centre stays
        NaN. So do duplicates and more clusters than samples give finite centres.

    Notes:
        One product of samples and centres and one of labels and samples a round, over as many samples at a time as keep
        the table of distances below 16 MB; samples are moved to their mean first, so that the expanded square loses no
        digits far from the origin. No gradient, no host synchronisation. Half precision is clustered in float32.

    Example:
        >>> x = torch.tensor([[0.0, 0.0], [9.0, 9.0], [0.0, 1.0], [9.0, 8.0]])
        >>> kmeans(x, 2)
        Clusters(labels=tensor([0, 1, 0, 1]), centres=tensor([[0.0000, 0.5000],
                [9.0000, 8.5000]]))
    """
    check_floating("x", x)
    if x.ndim not in (2, 3) or x.shape[-2] == 0:
        raise ValueError(f"x: expected shape (N, C) or (G, N, C) with at least one sample, got {tuple(x.shape)}")
    if k < 1 or iters < 1:
        raise ValueError(f"k, iters: expected at least 1, got {k} and {iters}")
    if metric not in ("euclidean", "cosine"):
        raise ValueError(f'metric: expected "euclidean" or "cosine", got {metric!r}')
    if isinstance(init, Tensor):
        check_shape("init", init, (*x.shape[:-2], k, x.shape[-1]), "for k centres of x")
    elif init not in ("first", "kmeans++"):
        raise ValueError(f'init: expected "first", "kmeans++" or a tensor of centres, got {init!r}')
    if valid is None:
        valid = x.new_ones(x.shape[:-1], dtype=torch.bool)
    check_shape("valid", valid, x.shape[:-1], "to match x")

    spherical = metric == "cosine"
    sets, keep = x.reshape(-1, *x.shape[-2:]), valid.reshape(-1, x.shape[-2]).bool()
    with torch.autocast(x.device.type, enabled=False):
        samples = sets.to(torch.promote_types(x.dtype, torch.float32)).masked_fill(~keep[:, :, None], 0)  # (G, N, C)
        origin = torch.zeros_like(samples[:, :1])
        if not spherical:
            origin = samples.sum(1, keepdim=True) / keep.sum(1).clamp(min=1)[:, None, None]
            samples = torch.where(keep[:, :, None], samples - origin, 0)
        if isinstance(init, Tensor):
            centres = init.reshape(-1, *init.shape[-2:]).to(samples) - origin
        elif init == "first":
            centres = _first(samples, keep, k)
        else:
            centres = _spread(samples, keep, k, spherical, generator)
        centres = F.normalize(centres, dim=-1) if spherical else centres
        labels = keep.new_empty(keep.shape, dtype=torch.int64)
        for _ in range(iters):
            sums, counts = torch.zeros_like(centres), torch.zeros_like(centres[:, :, 0])
            for rows in _chunks(samples.shape, k):
                labels[:, rows] = _nearest(samples[:, rows], centres, spherical)
                members = F.one_hot(labels[:, rows], k).to(samples.dtype) * keep[:, rows, None]  # (G, rows, k)
                sums += members.mT @ samples[:, rows]
                counts += members.sum(1)
            if spherical:
                length = sums.norm(dim=-1, keepdim=True)
                centres = torch.where(length > 0, sums / torch.where(length > 0, length, 1), centres)
            else:
                centres = torch.where(counts[:, :, None] > 0, sums / counts[:, :, None].clamp(min=1), centres)
    labels = labels.masked_fill(~keep, -1)
    return Clusters(labels.reshape(x.shape[:-1]), (centres + origin).to(x.dtype).reshape(*x.shape[:-2], k, -1))


def _first(samples: Tensor, keep: Tensor, k: int) -> Tensor:
    """The first k valid samples of each set, from the start again where there are fewer: (G, k, C)."""
    order = (~keep).byte().argsort(dim=1, stable=True)  # valid ones first
    place = torch.arange(k, device=samples.device) % keep.sum(1, keepdim=True).clamp(min=1)
    return _take(samples, order.gather(1, place))


def _spread(samples: Tensor, keep: Tensor, k: int, spherical: bool, generator: torch.Generator | None) -> Tensor:
    """The k-means++ draw: (G, k, C)."""
    points = F.normalize(samples, dim=-1) if spherical else samples
    anything = torch.where(keep.any(1, keepdim=True), keep, True).to(samples.dtype)
    weight, chosen = anything, []
    nearest = torch.full_like(anything, torch.inf)
    for _ in range(k):
        chosen.append(torch.multinomial(weight, 1, generator=generator))  # (G, 1)
        nearest = torch.minimum(nearest, (points - _take(points, chosen[-1])).square().sum(-1))
        weight = torch.where(keep, nearest, 0)
        weight = torch.where(weight.sum(1, keepdim=True) > 0, weight, anything)  # all samples are centres already
    return _take(samples, torch.cat(chosen, 1))


def _nearest(samples: Tensor, centres: Tensor, spherical: bool) -> Tensor:
    """Index of the nearest centre, the first of several: (G, n)."""
    product = samples @ centres.mT  # (G, n, k)
    return product.argmax(-1) if spherical else (centres.square().sum(-1)[:, None] - 2 * product).argmin(-1)


def _take(samples: Tensor, index: Tensor) -> Tensor:
    return samples.gather(1, index[:, :, None].expand(-1, -1, samples.shape[-1]))


def _chunks(shape: torch.Size, k: int) -> Iterator[slice]:
    """Slices of the N samples, each with at most `_TABLE` distances."""
    rows = max(1, _TABLE // (max(1, shape[0]) * k))
    return (slice(start, start + rows) for start in range(0, shape[1], rows))

"""Prototypes of features: k-means, and banks of class and cluster centres.

Axes: G independent sets, N samples, B images, C channels, K foreground classes, Q or k clusters.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from wsss_modules._checks import check_floating, check_ndim, check_shape
from wsss_modules._distributed import gather_over_processes
from wsss_modules._precision import at_least_float32

__all__ = [
    "ClassCentres",
    "ClosestPairs",
    "Clusters",
    "FeatureCentreBank",
    "centre_distances",
    "class_feature_centres",
    "closest_pairs",
    "kmeans",
]

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
        NaN. Duplicates and more clusters than samples give finite centres too.

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


class ClassCentres(NamedTuple):
    """What `class_feature_centres` returns.

    Attributes:
        centres: (K, C) mean features; zeros for a class that no image has.
        valid: (K,) bool, whether any image has the class.
    """

    centres: Tensor
    valid: Tensor


@torch.no_grad()
def class_feature_centres(features: Tensor, labels: Tensor) -> ClassCentres:
    r"""Mean feature of the images that have a class; an image with several classes counts in each.

    .. math:: \mu_k = \sum_n y_{nk} z_n / \sum_n y_{nk}

    Args:
        features: (N, C) one feature per image, finite.
        labels: (N, K) multi-hot; present means greater than 0.

    Returns:
        `ClassCentres` in the dtype of ``features``.

    Raises:
        TypeError: ``features`` is not floating point.
        ValueError: a wrong shape.

    Paper:
        Lee, Oh, Yun, Choe, Kim and Yoon, Weakly Supervised Semantic Segmentation using Out-of-Distribution Data, CVPR
        2022, arXiv:2203.03860.

    Differences:
        The released code marks a class that no image has by a row of zeros, and fails if it is the first class.

    Notes:
        One matrix product. No gradient. Half precision is averaged in float32.

    Example:
        >>> features = torch.tensor([[1.0, 1.0], [3.0, 5.0]])
        >>> class_feature_centres(features, torch.tensor([[1, 0, 1], [1, 0, 0]]))
        ClassCentres(centres=tensor([[2., 3.],
                [0., 0.],
                [1., 1.]]), valid=tensor([ True, False,  True]))
    """
    check_ndim("features", features, 2, "(N, C)")
    check_floating("features", features)
    check_shape("labels", labels, (len(features), None), "to match features")
    values = at_least_float32(features)
    present = (labels > 0).to(values.dtype)
    counts = present.sum(0)
    with torch.autocast(features.device.type, enabled=False):
        centres = present.mT @ values / counts.clamp(min=1)[:, None]
    return ClassCentres(centres.to(features.dtype), counts > 0)


def centre_distances(features: Tensor, centres: Tensor, valid: Tensor | None = None) -> Tensor:
    r"""Euclidean distance of each feature to each centre, :math:`\|z_b - \mu_q\|_2`.

    Args:
        features: (B, C) floating point.
        centres: (Q, C) floating point.
        valid: (Q,) bool. The distance to a centre that is not valid is 0, whatever it holds, and has no gradient.

    Returns:
        (B, Q), at least 0, in the dtype of ``features``. The gradient at distance 0 is 0.

    Raises:
        TypeError: ``features`` or ``centres`` is not floating point.
        ValueError: a wrong shape.

    Paper:
        Lee et al., CVPR 2022, arXiv:2203.03860.

    Notes:
        Differences are taken directly, not through the expanded square, whose digits cancel where distances are small
        beside the features; they are summed as they arise, so that memory stays at (B, Q). Half precision is computed
        in float32. No host synchronisation; compiles with ``fullgraph=True``. No second derivative.

    Example:
        >>> centre_distances(torch.tensor([[0.0, 0.0], [3.0, 4.0]]), torch.tensor([[0.0, 0.0], [3.0, 0.0]]))
        tensor([[0., 3.],
                [5., 4.]])
    """
    check_ndim("features", features, 2, "(B, C)")
    check_floating("features", features)
    check_shape("centres", centres, (None, features.shape[1]), "to match features")
    check_floating("centres", centres)
    dtype = torch.promote_types(features.dtype, torch.float32)
    if valid is not None:
        check_shape("valid", valid, centres.shape[:1], "to match centres")
        valid = valid.bool()
        centres = torch.where(valid[:, None], centres, 0)
    distances = torch.cdist(features.to(dtype), centres.to(dtype), compute_mode="donot_use_mm_for_euclid_dist")
    if valid is not None:
        distances = torch.where(valid, distances, 0)
    return distances.to(features.dtype)


class ClosestPairs(NamedTuple):
    """What `closest_pairs` returns.

    Attributes:
        selected: (B, Q) bool.
        threshold: () or, per image, (B, 1): pairs below it are selected; infinite where all are.
    """

    selected: Tensor
    threshold: Tensor


@torch.no_grad()
def closest_pairs(
    distances: Tensor,
    fraction: float = 0.2,
    *,
    valid: Tensor | None = None,
    scope: Literal["batch", "image"] = "batch",
    sync: bool = False,
) -> ClosestPairs:
    r"""Select the closest of all pairs of an image and a cluster.

    Of the n pairs that are valid and not at distance 0, the int(n (1 - fraction)) farthest are set aside; the smallest
    of their distances is the threshold t, and all valid pairs with :math:`d < t` are selected.

    Args:
        distances: (B, Q) at least 0, e.g. of `centre_distances`.
        fraction: Share of the pairs to select, in [0, 1]: 0 selects none, 1 all.
        valid: (Q,) bool. Pairs with a centre that is not valid are neither counted nor selected.
        scope: "batch" pools the pairs of all images, so that an image near many clusters may have more than its share
            and another none; "image" takes the share of each image on its own.
        sync: With "batch", pool the images of all processes of a distributed run, each of which has B.

    Returns:
        `ClosestPairs`, with n - int(n (1 - fraction)) pairs unless distances are equal at the threshold or 0.

    Raises:
        TypeError: ``distances`` is not floating point.
        ValueError: a wrong shape, a ``fraction`` outside [0, 1], or an unknown ``scope``.

    Paper:
        Lee et al., CVPR 2022, arXiv:2203.03860.

    Differences:
        The released code pools the batch, the default here. It fails where int(n (1 - fraction)) is 0 and selects the
        pairs of missing centres, which have distance 0 there and so no effect.

    Notes:
        A sort of the B Q distances on their device and no host synchronisation. No gradient. Compiles with
        ``fullgraph=True``.

    Example:
        >>> closest_pairs(torch.tensor([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]]), 0.5)
        ClosestPairs(selected=tensor([[ True,  True,  True],
                [False, False, False]]), threshold=tensor(4.))
        >>> closest_pairs(torch.tensor([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]]), 0.5, scope="image").threshold
        tensor([[3.],
                [6.]])
    """
    check_ndim("distances", distances, 2, "(B, Q)")
    check_floating("distances", distances)
    if not 0 <= fraction <= 1:
        raise ValueError(f"fraction: expected a number in [0, 1], got {fraction}")
    if scope not in ("batch", "image"):
        raise ValueError(f'scope: expected "batch" or "image", got {scope!r}')
    if valid is None:
        valid = distances.new_ones(distances.shape[1], dtype=torch.bool)
    check_shape("valid", valid, distances.shape[1:], "to match distances")
    valid = valid.bool()
    pool = torch.where(valid & (distances > 0), distances, -torch.inf)
    if scope == "batch":
        pool = gather_over_processes(pool.detach(), sync).reshape(1, -1)
    counted = (pool > 0).sum(1, keepdim=True)
    apart = (counted.double() * (1 - fraction)).long()  # in float64, as int(n * (1 - fraction)) is
    if pool.shape[1] == 0:
        threshold = pool.new_full(apart.shape, torch.inf)
    else:
        smallest_apart = pool.sort(1, descending=True).values.gather(1, (apart - 1).clamp(min=0))
        threshold = torch.where(apart > 0, smallest_apart, torch.inf)
    return ClosestPairs((distances < threshold) & valid, threshold.reshape(()) if scope == "batch" else threshold)


class FeatureCentreBank(nn.Module):
    """Centres of the classes and of clusters of out-of-distribution (OoD) images, kept with a model's weights.

    Empty until `fit`: no centre is valid, so that `wsss_losses.ood_metric_loss` is 0. All are buffers: they move with
    the module, take no gradient and are in its ``state_dict``.

    Args:
        num_classes: K, foreground classes.
        num_clusters: Q, 50 in the released code.
        dim: C, channels of the pooled features.

    Attributes:
        class_centres: (K, C).
        class_valid: (K,) bool.
        ood_centres: (Q, C).
        ood_valid: (Q,) bool.

    Raises:
        ValueError: a number below 1.

    Paper:
        Lee et al., CVPR 2022, arXiv:2203.03860.

    Differences:
        The released code computes the centres once, before the training; call `fit` again to refresh them.

    Example:
        >>> _ = torch.manual_seed(0)
        >>> bank = FeatureCentreBank(num_classes=3, num_clusters=4, dim=8)
        >>> labels = torch.tensor([[1, 1, 0], [0, 1, 0]])
        >>> bank.fit(torch.rand(2, 8), labels, torch.rand(10, 8)).class_valid
        tensor([ True,  True, False])
    """

    class_centres: Tensor
    class_valid: Tensor
    ood_centres: Tensor
    ood_valid: Tensor

    def __init__(self, num_classes: int, num_clusters: int, dim: int) -> None:
        super().__init__()
        if min(num_classes, num_clusters, dim) < 1:
            raise ValueError(
                f"num_classes, num_clusters, dim: expected at least 1, got {num_classes}, {num_clusters} and {dim}"
            )
        self.register_buffer("class_centres", torch.zeros(num_classes, dim))
        self.register_buffer("class_valid", torch.zeros(num_classes, dtype=torch.bool))
        self.register_buffer("ood_centres", torch.zeros(num_clusters, dim))
        self.register_buffer("ood_valid", torch.zeros(num_clusters, dtype=torch.bool))

    @torch.no_grad()
    def fit(
        self,
        features: Tensor,
        labels: Tensor,
        ood_features: Tensor,
        *,
        iters: int = 10,
        init: Literal["first", "kmeans++"] | Tensor = "first",
        generator: torch.Generator | None = None,
    ) -> FeatureCentreBank:
        """Compute all centres anew: class means of the images, k-means of the OoD images.

        Args:
            features: (N, C) pooled features of images with labels.
            labels: (N, K) multi-hot.
            ood_features: (M, C) pooled features of OoD images. With fewer than Q some centres are equal.
            iters: rounds of `kmeans`.
            init: see `kmeans`.
            generator: see `kmeans`.

        Returns:
            Itself.

        Raises:
            ValueError: a wrong shape.

        Notes:
            In a distributed run every process must be given the features of all of them, in the same order.
        """
        check_shape("features", features, (None, self.class_centres.shape[1]), "for this bank")
        check_shape("labels", labels, (len(features), len(self.class_centres)), "for this bank")
        check_shape("ood_features", ood_features, (None, self.ood_centres.shape[1]), "for this bank")
        centres, valid = class_feature_centres(features, labels)
        clusters = kmeans(ood_features, len(self.ood_centres), iters, init=init, generator=generator)
        self.class_centres.copy_(centres)
        self.class_valid.copy_(valid)
        self.ood_centres.copy_(clusters.centres)
        self.ood_valid.fill_(True)
        return self

    def extra_repr(self) -> str:
        """Show the sizes."""
        (classes, dim), clusters = self.class_centres.shape, len(self.ood_centres)
        return f"num_classes={classes}, num_clusters={clusters}, dim={dim}"


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
        race = torch.empty_like(weight).exponential_(generator=generator).clamp(min=torch.finfo(weight.dtype).tiny)
        chosen.append((weight / race).argmax(1, keepdim=True))  # multinomial, which would wait for the device; (G, 1)
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

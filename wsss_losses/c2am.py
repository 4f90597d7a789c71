"""C2AM's contrast of two regions over a batch, without labels.

Axis letters: N M images, D features, k ranks that are kept.
"""

from __future__ import annotations

import math
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

from wsss_losses._reduction import Reduction, check_reduction, reduce
from wsss_modules import pairwise_cosine_similarity
from wsss_modules._checks import check_floating, check_ndim, check_shape
from wsss_modules._distributed import gather_over_processes

Normalize = Literal["n2", "pairs", "weights"]

LEAST, LARGEST = 0.0005, 0.9995  # clamp of the similarities


class C2AMTerms(NamedTuple):
    """Scalars: ``total = push + pull_weight * (pull_fg + pull_bg)``, and its terms."""

    total: Tensor
    pull_fg: Tensor
    push: Tensor
    pull_bg: Tensor


def sim_min_loss(bg: Tensor, fg: Tensor, *, reduction: Reduction = "mean", sync: bool = False) -> Tensor:
    r"""Push the background of every image away from the foreground of every image.

    .. math:: L = -\frac{1}{NM} \sum_{ij} \log (1 - s(bg_i, fg_j))

    with the cosine similarity s of :func:`wsss_modules.pairwise_cosine_similarity`, clamped to [0.0005, 0.9995].

    Args:
        bg: (N, D) float, features of one region, one row an image.
        fg: (M, D) float, features of the other. The two may be exchanged; pairs of the same image count like others.
        reduction: ``"mean"`` over all pairs, ``"sum"``, or ``"none"``: (N,), the sum over the pairs of each row of
            ``bg``.
        sync: compare the rows of all processes of a distributed run.

    Returns:
        Scalar, or (N,), at least 0, in the dtype of ``bg``. 0 for an empty batch.

    Raises:
        TypeError: if features are not floating point.
        ValueError: if they are not rows of the same length, or ``reduction`` is unknown.

    Paper:
        Xie, Xiang, Chen, Hou, Zhao and Shen, "C2AM: Contrastive Learning of Class-Agnostic Activation Map for Weakly
        Supervised Object Localization and Semantic Segmentation", CVPR 2022, arXiv:2203.13505.

    Notes:
        A pair whose similarity the clamp cuts off has no gradient: features should be at least 0 (after a ReLU), so
        that few are below. With ``sync`` each process must bring equally many rows. Computed in float32 for half
        precision. Works in ``torch.compile(fullgraph=True)`` without ``sync``.

    Example:
        >>> import torch
        >>> from wsss_losses import sim_min_loss
        >>> sim_min_loss(torch.tensor([[1.0, 0.0]]), torch.tensor([[3.0, 4.0]]))  # -log(1 - 0.6)
        tensor(0.9163)
    """
    _check_rows("bg", bg)
    check_shape("fg", fg, (None, bg.shape[1]), "to match bg")
    check_floating("fg", fg)
    check_reduction(reduction)
    similarity = pairwise_cosine_similarity(
        gather_over_processes(bg, sync), gather_over_processes(fg, sync), clamp=(LEAST, LARGEST)
    )
    rows = -torch.log(1 - similarity).sum(1)
    return reduce(rows, reduction, similarity.numel()).to(bg.dtype)


class SimMinLoss(nn.Module):
    """Push foregrounds away from backgrounds; see :func:`sim_min_loss`.

    Args:
        reduction: ``"mean"``, ``"sum"`` or ``"none"``.
        sync: compare the rows of all processes of a distributed run.

    Example:
        >>> import torch
        >>> from wsss_losses import SimMinLoss
        >>> _ = torch.manual_seed(0)
        >>> bg, fg = torch.rand(2, 8, 16, requires_grad=True)
        >>> SimMinLoss()(bg, fg).backward()
    """

    def __init__(self, *, reduction: Reduction = "mean", sync: bool = False) -> None:
        super().__init__()
        check_reduction(reduction)
        self.reduction: Reduction = reduction
        self.sync = sync

    def forward(self, bg: Tensor, fg: Tensor) -> Tensor:
        """(N, D) and (M, D) features -> scalar or (N,)."""
        return sim_min_loss(bg, fg, reduction=self.reduction, sync=self.sync)

    def extra_repr(self) -> str:
        """Show the options."""
        return f"reduction={self.reduction!r}, sync={self.sync}"


def sim_max_loss(
    features: Tensor,
    *,
    alpha: float = 0.25,
    reduction: Reduction = "mean",
    normalize: Normalize = "n2",
    topk: int | None = None,
    min_weight: float = 1e-7,
    sync: bool = False,
) -> Tensor:
    r"""Pull the same region of different images together, the more the more alike they are.

    .. math:: L = -\frac{1}{N^2} \sum_i \sum_r e^{-\alpha (r - 1)} \log s_{i(r)}

    where :math:`s_{i(r)}` is the r-th largest of the similarities of row i with all rows, clamped as in
    :func:`sim_min_loss`. Rank 0 is the row itself: with :math:`s = 0.9995` it adds a constant and no gradient. The
    nearest other row has weight 1, the r-th nearest :math:`e^{-\alpha (r - 1)}`. No gradient passes through the ranks;
    the loss is continuous all the same, since two rows that exchange ranks are equally similar at that moment.

    Args:
        features: (N, D) float, one row an image, at least 0 as after a ReLU (see :func:`sim_min_loss`).
        alpha: at least 0; 0 weighs all pairs alike. It acts together with the batch size, see Notes.
        reduction: ``"mean"``, ``"sum"``, or ``"none"``: (N,), the weighted sum of each row.
        normalize: what the mean divides by. ``"n2"`` (released): N², the rows themselves included. ``"pairs"``:
            N (N - 1), without them. ``"weights"``: the sum of the weights, without them; the value is then a weighted
            mean of :math:`-\log s` and does not shrink as the batch grows.
        topk: pull no more than this number of neighbours of each row; default: no limit.
        min_weight: leave out ranks of lower weight. At 1e-7, which float32 does not feel beside weights of 1, an alpha
            of 0.25 keeps 65 neighbours: a top-k takes the place of a sort. 0 keeps all.
        sync: compare the rows of all processes of a distributed run.

    Returns:
        Scalar, or (N,), at least 0, in the dtype of ``features``. 0 for an empty batch.

    Raises:
        TypeError: if ``features`` is not floating point.
        ValueError: if it is not (N, D), or an option is out of range.

    Paper:
        Xie et al., CVPR 2022, arXiv:2203.13505.

    Differences:
        The released code ranks by sorting the indices of a sort and multiplies an N x N matrix of weights; here the
        sorted similarities meet the weights directly, which is the same. It builds the weights in float32 for float64
        features, too, gives nan for an empty batch, and leaves out no rank (``min_weight=0``). It divides by N² with
        the rows themselves in the sum; ``"pairs"`` is the mean over pairs of different images.

    Notes:
        *What the rank weights ignore.* A pair of low similarity has a low rank and so no say, even if both show the
        same class: with alpha 0.25 the 10th neighbour weighs 0.105, the 19th 0.011, the 40th 6e-5, and the slope 1/s
        of the logarithm can't make up for it. A row pulls its nearest 1 / (1 - exp(-alpha)) = 4.5 neighbours, so to
        speak; 90 % of its weight lies on the first 10. Mostly this is right: the batch holds many classes, and a pair
        that is far apart is more likely of two. Nor can the loss be escaped by pushing all apart: weights depend on
        ranks, so there is always a nearest neighbour of weight 1. It is wrong where one class forms two islands that
        each have more members *in the batch* than that neighbourhood: every row finds its neighbours at home, and the
        islands never meet. With few members per batch (small batches, or a smaller alpha) they do. So alpha and the
        batch size belong together: 0.25 fits the about 10 images of a class in 128 of VOC; in a batch of 16 there are
        two or three, and the same alpha pulls across classes. ``alpha`` may change from step to step.

        *What the batch size does to the balance.* The mean over N² pairs has weights that sum to 4.5 N only, while
        :func:`sim_min_loss` weighs all N² by 1. Against the push, a pull thus counts 0.28 at N = 16, 0.14 at 32,
        0.071 at 64, 0.035 at 128, 0.018 at 256: another batch size is another objective.
        ``C2AMLoss(normalize="weights", pull_weight=0.035)`` keeps the balance of 128 at any size.

        Time O(N² D + N²), and O(N k) saved besides the N x N similarities. Equal similarities may exchange their
        gradients, never change the value. With ``sync`` each process must bring equally many rows. Computed in float32
        for half precision. Works in ``torch.compile(fullgraph=True)`` without ``sync``.

    Example:
        >>> import torch
        >>> from wsss_losses import sim_max_loss
        >>> features = torch.tensor([[1.0, 0.0], [0.6, 0.8], [0.0, 1.0]])
        >>> sim_max_loss(features, normalize="weights")  # similarities 0.6, 0.8 and 0 (clamped)
        tensor(2.4725)
    """
    _check_rows("features", features)
    _check_pull(alpha, normalize, topk, min_weight)
    check_reduction(reduction)
    similarity = pairwise_cosine_similarity(gather_over_processes(features, sync), clamp=None)  # (N, N)
    count = similarity.shape[0]
    kept = _kept_ranks(count, alpha, topk, min_weight)
    nearest = similarity.topk(kept, dim=1).values  # (N, k), descending; faster than a sort even where all are kept
    ranks = torch.arange(kept, device=features.device, dtype=similarity.dtype)
    weights = torch.exp(-alpha * (ranks - 1))  # (k,)
    cost = torch.log(nearest.clamp(LEAST, LARGEST)) * -weights  # (N, k)
    if normalize == "n2":
        return reduce(cost.sum(1), reduction, count * count).to(features.dtype)
    rows = cost[:, 1:].sum(1)  # rank 0 is the row itself, or one as similar to it, which comes to the same
    if normalize == "pairs" or reduction != "mean":
        return reduce(rows, reduction, count * (count - 1)).to(features.dtype)
    return (rows.sum() / (count * weights[1:].sum()).clamp(min=torch.finfo(rows.dtype).tiny)).to(features.dtype)


class SimMaxLoss(nn.Module):
    """Pull the same region of different images together; see :func:`sim_max_loss`.

    Args:
        alpha: decay of the weights with the rank; an attribute that may be changed between steps.
        reduction: ``"mean"``, ``"sum"`` or ``"none"``.
        normalize: ``"n2"``, ``"pairs"`` or ``"weights"``.
        topk: pull no more than this number of neighbours of each row.
        min_weight: leave out ranks of lower weight.
        sync: compare the rows of all processes of a distributed run.

    Example:
        >>> import torch
        >>> from wsss_losses import SimMaxLoss
        >>> _ = torch.manual_seed(0)
        >>> features = torch.rand(8, 16, requires_grad=True)
        >>> SimMaxLoss(alpha=0.1)(features).backward()
    """

    def __init__(
        self,
        *,
        alpha: float = 0.25,
        reduction: Reduction = "mean",
        normalize: Normalize = "n2",
        topk: int | None = None,
        min_weight: float = 1e-7,
        sync: bool = False,
    ) -> None:
        super().__init__()
        _check_pull(alpha, normalize, topk, min_weight)
        check_reduction(reduction)
        self.alpha, self.topk, self.min_weight, self.sync = alpha, topk, min_weight, sync
        self.reduction: Reduction = reduction
        self.normalize: Normalize = normalize

    def forward(self, features: Tensor) -> Tensor:
        """(N, D) features -> scalar or (N,)."""
        return sim_max_loss(
            features,
            alpha=self.alpha,
            reduction=self.reduction,
            normalize=self.normalize,
            topk=self.topk,
            min_weight=self.min_weight,
            sync=self.sync,
        )

    def extra_repr(self) -> str:
        """Show the options."""
        return (
            f"alpha={self.alpha}, reduction={self.reduction!r}, normalize={self.normalize!r}, topk={self.topk}, "
            f"min_weight={self.min_weight}, sync={self.sync}"
        )


def c2am_loss(
    fg: Tensor,
    bg: Tensor,
    *,
    alpha: float = 0.25,
    normalize: Normalize = "n2",
    pull_weight: float = 1.0,
    topk: int | None = None,
    min_weight: float = 1e-7,
    sync: bool = False,
) -> C2AMTerms:
    r"""C2AM's objective: foregrounds together, backgrounds together, the two apart.

    ``total = pull_weight (sim_max(fg) + sim_max(bg)) + sim_min(bg, fg)``, see :func:`sim_max_loss` and
    :func:`sim_min_loss`. It is symmetric: which region becomes the foreground is left to chance and told afterwards by
    :func:`wsss_modules.activation_polarity`.

    Args:
        fg: (N, D) float, features of one region of each image, at least 0; see :class:`wsss_modules.Disentangler`.
        bg: (N, D) float, features of the other.
        alpha: decay of the pull with the rank of a neighbour.
        normalize: ``"n2"`` (released), ``"pairs"`` or ``"weights"``.
        pull_weight: weight of the two pulls, at least 0. With ``normalize="weights"``, 0.035 gives the balance that the
            released objective has at its batch of 128, for any batch; 1 with ``"n2"`` is the released objective.
        topk: pull no more than this number of neighbours of each row.
        min_weight: leave out ranks of lower weight.
        sync: compare the images of all processes of a distributed run.

    Returns:
        The total and its three terms, scalars, in the dtype of ``fg``.

    Raises:
        TypeError: if features are not floating point.
        ValueError: if shapes differ, or an option is out of range.

    Paper:
        Xie et al., CVPR 2022, arXiv:2203.13505.

    Notes:
        The batch is what is contrasted, so its size changes the objective: see the notes of :func:`sim_max_loss`. Under
        DDP without ``sync`` the batch is that of a process.

    Example:
        >>> import torch
        >>> from wsss_losses import c2am_loss
        >>> fg, bg = torch.eye(2).repeat_interleave(4, 0).chunk(2)  # alike within, different across: the least loss
        >>> [f"{term.item():.4f}" for term in c2am_loss(fg, bg, normalize="weights")]
        ['0.0015', '0.0005', '0.0005', '0.0005']
    """
    _check_rows("fg", fg)
    check_shape("bg", bg, fg.shape, "to match fg")
    check_floating("bg", bg)
    _check_weight(pull_weight)
    all_fg, all_bg = gather_over_processes(fg, sync), gather_over_processes(bg.to(fg.dtype), sync)
    dtype = torch.promote_types(fg.dtype, torch.float32)
    all_fg, all_bg = all_fg.to(dtype), all_bg.to(dtype)
    pull_fg, pull_bg = (
        sim_max_loss(x, alpha=alpha, normalize=normalize, topk=topk, min_weight=min_weight) for x in (all_fg, all_bg)
    )
    push = sim_min_loss(all_bg, all_fg)
    total = pull_weight * (pull_fg + pull_bg) + push
    return C2AMTerms(*(term.to(fg.dtype) for term in (total, pull_fg, push, pull_bg)))


class C2AMLoss(nn.Module):
    """C2AM's objective: foregrounds together, backgrounds together, the two apart; see :func:`c2am_loss`.

    Args:
        alpha: decay of the pull with the rank of a neighbour; an attribute that may be changed between steps.
        normalize: ``"n2"``, ``"pairs"`` or ``"weights"``.
        pull_weight: weight of the two pulls.
        topk: pull no more than this number of neighbours of each row.
        min_weight: leave out ranks of lower weight.
        sync: compare the images of all processes of a distributed run.

    Example:
        >>> import torch
        >>> from wsss_losses import C2AMLoss
        >>> from wsss_modules import Disentangler
        >>> _ = torch.manual_seed(0)
        >>> regions = Disentangler(16)(torch.rand(8, 16, 7, 7))
        >>> terms = C2AMLoss()(regions.fg, regions.bg)
        >>> terms.total.backward()
    """

    def __init__(
        self,
        *,
        alpha: float = 0.25,
        normalize: Normalize = "n2",
        pull_weight: float = 1.0,
        topk: int | None = None,
        min_weight: float = 1e-7,
        sync: bool = False,
    ) -> None:
        super().__init__()
        _check_pull(alpha, normalize, topk, min_weight)
        _check_weight(pull_weight)
        self.alpha, self.pull_weight, self.topk, self.min_weight = alpha, pull_weight, topk, min_weight
        self.normalize: Normalize = normalize
        self.sync = sync

    def forward(self, fg: Tensor, bg: Tensor) -> C2AMTerms:
        """(N, D) features of both regions -> total and terms."""
        return c2am_loss(
            fg,
            bg,
            alpha=self.alpha,
            normalize=self.normalize,
            pull_weight=self.pull_weight,
            topk=self.topk,
            min_weight=self.min_weight,
            sync=self.sync,
        )

    def extra_repr(self) -> str:
        """Show the options."""
        return (
            f"alpha={self.alpha}, normalize={self.normalize!r}, pull_weight={self.pull_weight}, topk={self.topk}, "
            f"min_weight={self.min_weight}, sync={self.sync}"
        )


def _kept_ranks(count: int, alpha: float, topk: int | None, min_weight: float) -> int:
    """Number of ranks, rank 0 included, that are neither beyond ``topk`` nor of a weight below ``min_weight``."""
    kept = count if topk is None else min(count, topk + 1)
    if alpha > 0 and min_weight > 0:
        kept = min(kept, 2 + math.floor(-math.log(min_weight) / alpha))
    return kept


def _check_rows(name: str, features: Tensor) -> None:
    check_ndim(name, features, 2, "(N, D)")
    check_floating(name, features)


def _check_pull(alpha: float, normalize: str, topk: int | None, min_weight: float) -> None:
    if alpha < 0:
        raise ValueError(f"alpha: expected at least 0, got {alpha}")
    if normalize not in ("n2", "pairs", "weights"):
        raise ValueError(f"normalize: expected 'n2', 'pairs' or 'weights', got {normalize!r}")
    if topk is not None and topk < 1:
        raise ValueError(f"topk: expected at least 1, got {topk}")
    if not 0 <= min_weight < 1:
        raise ValueError(f"min_weight: expected at least 0 and below 1, got {min_weight}")


def _check_weight(pull_weight: float) -> None:
    if pull_weight < 0:
        raise ValueError(f"pull_weight: expected at least 0, got {pull_weight}")

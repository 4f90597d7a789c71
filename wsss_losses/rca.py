"""Contrast of image regions with a memory of the data set (RCA).

Axis letters: B batch, K foreground classes, N memory slots a class, D channels, H W map size, R (image, present class)
pairs of the batch.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor, nn

from wsss_losses._reduction import check_reduction, reduce
from wsss_modules import RegionMixUp, draw_region_mix_up, region_pool
from wsss_modules._checks import check_floating, check_ndim, check_shape
from wsss_modules._unit import unit


def regional_contrast_loss(
    embedding: Tensor,
    cam: Tensor,
    labels: Tensor,
    memory: Tensor,
    filled: Tensor | None = None,
    mix: RegionMixUp | None = None,
    generator: torch.Generator | None = None,
    *,
    temperature: float = 0.07,
    beta: int = 8,
    log_floor: float | None = None,
    reduction: Literal["sum", "mean", "none"] = "sum",
) -> Tensor:
    r"""Pull the embedding of each region towards all memory rows of its class and away from those of other classes.

    A region of image i and class a (see :func:`wsss_modules.region_mask`) is mixed with one of another image j and
    class b, :math:`q = \lambda r_{ia} + (1 - \lambda) r_{jb}`. With cosine similarities :math:`z_p = \cos(q, p) / \tau`
    to the rows p of the memory,

    .. math::
        \ell = \lambda \, t(a) + (1 - \lambda) \, t(b), \qquad
        t(k) = \operatorname{mean}_{p \in k} \Big[ \log \Big( e^{z_p} + \sum_{n \notin k} e^{z_n} \Big) - z_p \Big]

    so that a row competes with the rows of other classes (b among them in t(a)) but not with those of its own. The
    loss of an image is the mean over its regions.

    Args:
        embedding: (B, D, H, W) float, what the contrast shapes.
        cam: (B, K, H, W) float class maps before any ReLU, on the same grid; RCA: those of the coarse head.
        labels: (B, K) multi-hot; present means greater than 0.
        memory: (K, N, D) float, e.g. ``bank.slots`` of a :class:`wsss_modules.RegionMemoryBank`.
        filled: (K,) integers, number of slots in use, the first ones, e.g. ``bank.filled``; by default all.
        mix: the partners and weights of the R pairs; drawn if not given.
        generator: source of the draw, on the device of ``labels``.
        temperature: tau.
        beta: both parameters of the beta distribution of lambda, a whole number.
        log_floor: least argument of the logarithm relative to the largest ``exp(z)`` of all rows; 1e-4 in the released
            code. Below it the other classes have no gradient.
        reduction: ``"sum"`` over the images (released), ``"mean"`` over them, or ``"none"``: (B,).

    Returns:
        Scalar or (B,), at least 0 without ``log_floor``, in the dtype of ``embedding``.

    Raises:
        TypeError: an input is of the wrong kind.
        ValueError: a wrong shape, an empty memory, or an option out of range.

    Paper:
        Zhou, Zhang, Zhao and Li, "Regional Semantic Contrast and Aggregation for Weakly Supervised Semantic
        Segmentation", CVPR 2022, arXiv:2203.09653.

    Differences:
        ``log_floor=1e-4`` and a memory without ``filled`` give the released arithmetic; by default the logarithm is
        exact, which differs where all similarities of a region are far below the largest. A region that is empty costs
        nothing and does not count in its image's mean, an empty partner leaves the region unmixed, and a class without
        a filled slot costs nothing; the released code gives NaN for the first two and for an image without a label.

    Notes:
        Gradients reach ``embedding`` only. All regions are compared with the memory, normalised once, in one product;
        the normalised copy is kept for backward, so that the memory may be written before it. Cost O(R K N D). Computed
        in float32 for half precision, also under autocast. R depends on the labels: ``torch.compile`` makes several
        graphs. Under DDP each process mixes within its own images, and the average over processes divides the sum over
        images by their number; nothing else ties the images of a batch together.

    Example:
        >>> import torch
        >>> from wsss_losses import regional_contrast_loss
        >>> _ = torch.manual_seed(0)
        >>> embedding, cam = torch.randn(2, 8, 6, 6, requires_grad=True), torch.randn(2, 3, 6, 6)
        >>> labels, memory = torch.tensor([[1, 0, 1], [0, 1, 0]]), torch.randn(3, 4, 8)
        >>> loss = regional_contrast_loss(embedding, cam, labels, memory, filled=torch.tensor([4, 2, 0]))
        >>> loss.backward()
        >>> bool(loss > 0), embedding.grad.shape
        (True, torch.Size([2, 8, 6, 6]))
    """
    check_ndim("memory", memory, 3, "(K, N, D)")
    check_floating("memory", memory)
    if memory.shape[0] * memory.shape[1] == 0:
        raise ValueError(f"memory: expected at least one class and one slot, got shape {tuple(memory.shape)}")
    if filled is not None:
        check_shape("filled", filled, memory.shape[:1], "to match memory")
    check_ndim("embedding", embedding, 4, "(B, D, H, W)")
    check_floating("embedding", embedding)
    check_shape("embedding", embedding, (None, memory.shape[2], None, None), "to match memory")
    check_shape("labels", labels, (embedding.shape[0], memory.shape[0]), "to match embedding and memory")
    check_ndim("cam", cam, 4, "(B, K, H, W)")
    check_shape("cam", cam, (*labels.shape, *embedding.shape[2:]), "to match embedding and memory")
    if not temperature > 0:
        raise ValueError(f"temperature: expected a positive number, got {temperature}")
    if log_floor is not None and not log_floor > 0:
        raise ValueError(f"log_floor: expected a positive number or None, got {log_floor}")
    check_reduction(reduction)
    if mix is None:
        mix = draw_region_mix_up(labels, beta, generator)
    image, index = (labels > 0).nonzero(as_tuple=True)  # (R,)
    for name, part in zip(mix._fields, mix, strict=True):
        check_shape(f"mix.{name}", part, (len(image),), "for the present classes of labels")
    pool = region_pool(embedding, cam)
    dtype = pool.embedding.dtype
    present = pool.area[image, index] > 0
    weight = torch.where(pool.area[mix.partner, mix.partner_class] > 0, mix.weight.to(dtype), 1.0)
    own, partner = pool.embedding[image, index], pool.embedding[mix.partner, mix.partner_class]  # (R, D)
    query = weight[:, None] * own + (1 - weight[:, None]) * partner

    rows = unit(memory.detach().to(dtype))  # (K, N, D)
    with torch.autocast(embedding.device.type, enabled=False):
        similarity = (unit(query) @ rows.flatten(0, 1).mT).unflatten(1, rows.shape[:2]) / temperature  # (R, K, N)
    never = torch.finfo(dtype).min / 4
    usable = torch.ones(rows.shape[:2], dtype=torch.bool, device=rows.device)
    if filled is not None:
        usable = torch.arange(rows.shape[1], device=rows.device) < filled[:, None]
    similarity = torch.where(usable, similarity, never)
    log_sums = similarity.logsumexp(2)  # (R, K)

    def attraction(index: Tensor) -> Tensor:
        positive, counted = similarity[torch.arange(len(index), device=index.device), index], usable[index]  # (R, N)
        others = torch.arange(rows.shape[0], device=index.device) != index[:, None]
        negative = torch.where(others, log_sums, never).logsumexp(1, keepdim=True)
        log_total = torch.logaddexp(negative, positive)
        if log_floor is not None:
            log_total = log_total.clamp(min=similarity.detach().amax((1, 2))[:, None] + math.log(log_floor))
        cost = torch.where(counted, log_total - positive, 0.0)
        return cost.sum(1) / counted.sum(1).clamp(min=1)

    mixed = weight * attraction(index) + (1 - weight) * attraction(mix.partner_class)
    costs = mixed.new_zeros(len(labels)).index_add(0, image, torch.where(present, mixed, 0.0))
    regions = mixed.new_zeros(len(labels)).index_add(0, image, present.to(dtype))
    costs = costs / regions.clamp(min=1)
    return reduce(costs, reduction).to(embedding.dtype)


class RegionalContrastLoss(nn.Module):
    """Contrast of image regions with a memory of the data set; see :func:`regional_contrast_loss`.

    Args:
        temperature: divides the cosine similarities.
        beta: both parameters of the beta distribution of the mixing weights, a whole number.
        log_floor: least argument of the logarithm; 1e-4 in the released code.
        reduction: ``"sum"`` over the images (released), ``"mean"`` or ``"none"``.

    Example:
        >>> import torch
        >>> from wsss_losses import RegionalContrastLoss
        >>> from wsss_modules import RegionMemoryBank
        >>> _ = torch.manual_seed(0)
        >>> bank = RegionMemoryBank(num_classes=3, slots=4, channels=8)
        >>> features, embedding, cam = torch.rand(2, 8, 6, 6), torch.randn(2, 8, 6, 6), torch.randn(2, 3, 6, 6)
        >>> labels, probability = torch.tensor([[1, 0, 1], [0, 1, 0]]), torch.full((2, 3), 0.8)
        >>> criterion = RegionalContrastLoss()
        >>> criterion(embedding, cam, labels, bank.slots, bank.filled)  # nothing is stored yet
        tensor(0.)
        >>> bank.update(features, cam, labels, probability)
        >>> bool(criterion(embedding, cam, labels, bank.slots, bank.filled) > 0)
        True
    """

    def __init__(
        self,
        *,
        temperature: float = 0.07,
        beta: int = 8,
        log_floor: float | None = None,
        reduction: Literal["sum", "mean", "none"] = "sum",
    ) -> None:
        super().__init__()
        self.temperature, self.beta, self.log_floor, self.reduction = temperature, beta, log_floor, reduction

    def forward(
        self,
        embedding: Tensor,
        cam: Tensor,
        labels: Tensor,
        memory: Tensor,
        filled: Tensor | None = None,
        mix: RegionMixUp | None = None,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """Compare a batch with the memory."""
        return regional_contrast_loss(
            embedding,
            cam,
            labels,
            memory,
            filled,
            mix,
            generator,
            temperature=self.temperature,
            beta=self.beta,
            log_floor=self.log_floor,
            reduction=self.reduction,
        )

    def extra_repr(self) -> str:
        """Show the options."""
        return (
            f"temperature={self.temperature}, beta={self.beta}, log_floor={self.log_floor}, "
            f"reduction={self.reduction!r}"
        )

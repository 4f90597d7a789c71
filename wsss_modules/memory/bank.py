"""A memory of region embeddings over the whole data set, class by class, and its prototypes (RCA).

Axes: B images, K foreground classes, N slots a class, D feature channels, H W cells, M prototypes a class, O slots of
a class that one batch can reach.
"""

from __future__ import annotations

import torch
from einops import einsum
from torch import Tensor, nn

from wsss_modules._checks import check_floating, check_ndim, check_shape
from wsss_modules._distributed import gather_over_processes
from wsss_modules.memory.regions import RegionPool, pool_masks, region_mask
from wsss_modules.prototypes import kmeans


class RegionMemoryBank(nn.Module):
    r"""N slots a class that hold region embeddings of the data set, written one after the other and then over again.

    The t-th region of class k goes to slot ``t mod N`` as :math:`slot \leftarrow m \cdot slot + (1 - m) \cdot region`;
    the first one that reaches a slot is stored as it is.

    What a slot holds at the start: nothing (zeros, which ``filled`` keeps out of every use). In the released code
    (``legacy_init=True``) it holds standard normal noise, of norm about :math:`\sqrt D` = 22.6 for D = 512, and counts
    from the first step. What that means after 30 epochs is a matter of arithmetic: a slot keeps ``0.99 ** writes`` of
    the noise, and a class with n images makes at most ``30 n / 500`` writes a slot. VOC's 10,582 images have 264, 514
    and 3,898 of a class (least, median, most): 15.8, 30.8 and 233.9 writes, so that at least 0.85, 0.73 and 0.095 of
    the coefficient of a slot still belongs to the noise at the end. How much that weighs depends on the norm of the
    features too. Without the noise the same share belongs to the first region of a slot: a momentum of 0.99 makes a
    long memory, and what it mixes are unrelated regions, not views of one object.

    Args:
        num_classes: K, foreground classes.
        slots: N, slots a class.
        channels: D, length of an embedding.
        momentum: m, share of a slot that a write keeps, in [0, 1].
        threshold: A region is written if the probability of its class is above this.
        legacy_init: Start from noise that counts as filled, as released.
        legacy_intersection: Pool the second and each further class that an image writes over the cells that its region
            shares with those before, yet divide by its own area, as the released code does by masking in place.
        generator: Source of the noise of ``legacy_init``.

    Attributes:
        slots: (K, N, D) float32, a buffer.
        pointer: (K,) int64, the slot that is written next, a buffer.
        filled: (K,) int64, number of slots in use: the first ones. A buffer.

    Raises:
        ValueError: a size below 1, or a ``momentum`` outside [0, 1].

    Paper:
        Zhou, Zhang, Zhao and Li, Regional Semantic Contrast and Aggregation for Weakly Supervised Semantic
        Segmentation, CVPR 2022, arXiv:2203.09653.

    Differences:
        ``RegionMemoryBank(..., legacy_init=True, legacy_intersection=True)`` is the released arithmetic. Empty regions,
        over which the released code writes NaN for good, and rows that are not finite are never written.

    Notes:
        :meth:`update` writes a batch at once with the result of writing region by region, images in order; shapes do
        not depend on the data, so it works in ``torch.compile(fullgraph=True)`` and never waits for the device. It
        changes the buffers in place: :func:`wsss_losses.regional_contrast_loss` may come before it, since that keeps
        a normalised copy, but don't keep ``slots`` itself in a graph. Under DDP ``sync=True`` writes the regions of
        all processes, process by process, on every process.

    Example:
        >>> bank = RegionMemoryBank(num_classes=2, slots=3, channels=1)
        >>> features = torch.tensor([5.0, 7.0]).view(2, 1, 1, 1).expand(2, 1, 1, 2)
        >>> cam = torch.tensor([1.0, 0.0, 0.0, 1.0]).view(1, 2, 1, 2).expand(2, 2, 1, 2)
        >>> bank.update(features, cam, torch.tensor([[1, 0], [1, 1]]), torch.tensor([[0.9, 0.9], [0.8, 0.6]]))
        >>> bank.slots[0, :, 0], bank.filled  # the second class of the second image is not sure enough
        (tensor([5., 7., 0.]), tensor([2, 0]))
    """

    slots: Tensor
    pointer: Tensor
    filled: Tensor

    def __init__(
        self,
        num_classes: int,
        slots: int = 500,
        channels: int = 512,
        *,
        momentum: float = 0.99,
        threshold: float = 0.7,
        legacy_init: bool = False,
        legacy_intersection: bool = False,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        for name, size in (("num_classes", num_classes), ("slots", slots), ("channels", channels)):
            if size < 1:
                raise ValueError(f"{name}: expected at least 1, got {size}")
        if not 0 <= momentum <= 1:
            raise ValueError(f"momentum: expected a share in [0, 1], got {momentum}")
        self.momentum, self.threshold, self.legacy_intersection = momentum, threshold, legacy_intersection
        shape = (num_classes, slots, channels)
        self.register_buffer("slots", torch.randn(shape, generator=generator) if legacy_init else torch.zeros(shape))
        self.register_buffer("pointer", torch.zeros(num_classes, dtype=torch.int64))
        self.register_buffer("filled", torch.full((num_classes,), slots if legacy_init else 0))

    @torch.no_grad()
    def update(self, features: Tensor, cam: Tensor, labels: Tensor, probability: Tensor, *, sync: bool = False) -> None:
        """Pool the regions of the present and sure classes and write them, images in order, then classes.

        Args:
            features: (B, D, H, W) float that the regions are pooled from; RCA: the backbone's, not the embedding.
            cam: (B, K, H, W) float class maps before any ReLU, see :func:`region_mask`.
            labels: (B, K) multi-hot; present means greater than 0.
            probability: (B, K) float in [0, 1]; a class is sure above ``threshold``. RCA: the fine head's.
            sync: Write the regions of all processes of a distributed run.

        Raises:
            ValueError: a wrong shape.
        """
        num_classes, _, channels = self.slots.shape
        check_ndim("features", features, 4, "(B, D, H, W)")
        check_floating("features", features)
        check_shape("features", features, (None, channels, None, None), "for this bank")
        size = (features.shape[0], num_classes)
        check_shape("cam", cam, (*size, *features.shape[2:]), "to match features and this bank")
        check_shape("labels", labels, size, "to match features and this bank")
        check_shape("probability", probability, size, "to match labels")
        mask, sure = region_mask(cam), (labels > 0) & (probability > self.threshold)
        pool = _pool_intersections(features, mask, sure) if self.legacy_intersection else pool_masks(features, mask)
        self.write(pool.embedding, sure & (pool.area > 0), sync=sync)

    @torch.no_grad()
    def write(self, regions: Tensor, selected: Tensor, *, sync: bool = False) -> None:
        """Write embeddings that are already pooled.

        Args:
            regions: (B, K, D) float.
            selected: (B, K) bool, which of them to write; rows that are not finite are left out all the same.
            sync: Write the regions of all processes of a distributed run.

        Raises:
            ValueError: a wrong shape.
        """
        num_classes, slots, channels = self.slots.shape
        check_shape("regions", regions, (None, num_classes, channels), "for this bank")
        check_shape("selected", selected, regions.shape[:2], "to match regions")
        regions = regions.to(self.slots.dtype)
        selected = selected.bool() & regions.isfinite().all(2)
        regions = torch.where(selected[..., None], regions, 0.0)
        regions, selected = (gather_over_processes(x.detach(), sync) for x in (regions, selected))

        rank = selected.long().cumsum(0) - 1  # (B, K) place of a region among the new ones of its class
        count = selected.sum(0)  # (K,)
        steps = torch.arange(min(len(regions), slots), device=regions.device)
        places = (self.pointer[:, None] + steps) % slots  # (K, O), all different
        current = self.slots.gather(1, places[..., None].expand(-1, -1, channels))  # (K, O, D)
        writes = torch.div(count[:, None] - 1 - steps, slots, rounding_mode="floor").clamp(min=-1) + 1
        kept = torch.where(places < self.filled[:, None], self._kept(writes), 0)[..., None] * current

        # a region is stored with 1 - m, or whole if it is the first in its slot; each later one in the slot keeps m
        first = (rank < slots) & ((self.pointer + rank) % slots >= self.filled)
        later = torch.div(count - 1 - rank, slots, rounding_mode="floor").clamp(min=0)  # (B, K)
        kept_later = self._kept(later)
        share = torch.where(first, kept_later, (1 - self.momentum) * kept_later)
        goes_to = selected[..., None] & (rank[..., None] % slots == steps)  # (B, K, O)
        with torch.autocast(regions.device.type, enabled=False):
            added = einsum(torch.where(goes_to, share[..., None], 0), regions, "b k o, b k d -> k o d")
        new = torch.where((writes > 0)[..., None], kept + added, current)
        self.slots.scatter_(1, places[..., None].expand(-1, -1, channels), new)
        self.pointer.copy_((self.pointer + count) % slots)
        self.filled.copy_((self.filled + count).clamp(max=slots))

    def _kept(self, writes: Tensor) -> Tensor:
        """What a number of writes leaves of a slot."""
        return torch.full_like(writes, self.momentum, dtype=self.slots.dtype).pow(writes)

    def extra_repr(self) -> str:
        """Show sizes and options."""
        num_classes, slots, channels = self.slots.shape
        return (
            f"num_classes={num_classes}, slots={slots}, channels={channels}, momentum={self.momentum}, "
            f"threshold={self.threshold}, legacy_intersection={self.legacy_intersection}"
        )


def kmeans_prototypes(slots: Tensor, prototypes: int = 10, filled: Tensor | None = None, *, iters: int = 10) -> Tensor:
    """Centres of each class's memory, by :func:`kmeans` over its slots.

    Args:
        slots: (K, N, D) float, e.g. ``bank.slots``.
        prototypes: M, centres a class.
        filled: (K,) integers, number of slots in use, the first ones, e.g. ``bank.filled``; by default all.
        iters: Rounds of k-means.

    Returns:
        (K, M, D) in the dtype of ``slots``, without gradient. A class with fewer slots in use than M repeats centres;
        one without any has zeros.

    Raises:
        TypeError: ``slots`` is not floating point.
        ValueError: a wrong shape, or a number below 1.

    Paper:
        Zhou, Zhang, Zhao and Li, Regional Semantic Contrast and Aggregation for Weakly Supervised Semantic
        Segmentation, CVPR 2022, arXiv:2203.09653.

    Notes:
        All classes at once; squared Euclidean distance. Centres start at the first M slots, so that the same memory has
        the same prototypes.

    Example:
        >>> slots = torch.tensor([[0.0, 10.0, 2.0, 10.0, 99.0]])[..., None]
        >>> kmeans_prototypes(slots, 2, filled=torch.tensor([4]))[0, :, 0]
        tensor([ 1., 10.])
    """
    check_ndim("slots", slots, 3, "(K, N, D)")
    check_floating("slots", slots)
    valid = None
    if filled is not None:
        check_shape("filled", filled, slots.shape[:1], "to match slots")
        valid = torch.arange(slots.shape[1], device=slots.device) < filled[:, None]
    if prototypes < 1:
        raise ValueError(f"prototypes: expected at least 1, got {prototypes}")
    return kmeans(slots, prototypes, iters, valid=valid).centres


def _pool_intersections(features: Tensor, mask: Tensor, sure: Tensor) -> RegionPool:
    """Pool each region over what it shares with those of the sure classes before it, but divide by its own area."""
    writing = sure & mask.any(3).any(2)
    chain = torch.where(writing[..., None, None], mask, True).int().cumprod(1).bool() & mask
    shared = pool_masks(features, chain)
    area = mask.sum((2, 3))
    total = shared.embedding * shared.area[..., None]
    return RegionPool(total / area.clamp(min=1)[..., None], area)

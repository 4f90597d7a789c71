"""Attention maps of the training images, accumulated while a network trains (OAA, NSROM, RCA).

Axes: n training images, B images of a batch, K foreground classes, H W cells, A (image, present class) pairs of the
data set.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from wsss_modules._checks import check_floating, check_integer, check_ndim, check_shape
from wsss_modules._distributed import gather_over_processes
from wsss_modules._precision import at_least_float32


class OnlineAttentionAccumulator(nn.Module):
    r"""Keep, for each image and present class, the highest attention that any epoch has seen at each cell.

    A map becomes 8 bits, :math:`a = \operatorname{rint}(255 \max(map, 0) / (\max_{hw} map + \epsilon))`, and the stored
    one :math:`\max(stored, a)`, if the class was recognised with a probability of at least ``threshold``.

    Args:
        labels: (n, K) multi-hot tags of all training images; present means greater than 0. They fix the size of the
            state: absent classes have no map.
        size: (H, W) of the maps in cells, the same for all images: resize the images to a square, don't crop or mirror.
        threshold: Least probability of a map that is added.
        eps: Keeps the map of a class without attention at 0.

    Attributes:
        maps: (A, H, W) uint8, a buffer.
        written: (A,) bool, which of them have been written, a buffer.
        rows: (n, K) int64 place in ``maps``, -1 for an absent class, a buffer.

    Raises:
        ValueError: a wrong shape or ``size``.

    Paper:
        Jiang et al., Integral Object Mining via Online Attention Accumulation, ICCV 2019; Zhou, Zhang, Zhao and Li,
        Regional Semantic Contrast and Aggregation for Weakly Supervised Semantic Segmentation, CVPR 2022,
        arXiv:2203.09653; Yao et al., Non-Salient Region Object Mining for Weakly Supervised Semantic Segmentation, CVPR
        2021, arXiv:2103.14581.

    Differences:
        The released code of RCA and NSROM reads and writes one PNG a map in ``forward``, in every epoch. RCA's are
        named by the place in the batch, so that with several devices different images share a file; NSROM's by the
        image, so that a new run silently goes on from the files of an old one. Here the maps are a buffer, saved and
        resumed with the model. Nothing is accumulated in the first epoch there: call :meth:`update` from the second on.

    Notes:
        One byte a cell: VOC's 10,582 images with 1.5 classes at 46 x 46 cells take 33 MB. :meth:`update` has no shape
        that depends on the data and works in ``torch.compile(fullgraph=True)``. Under DDP ``sync=True`` adds the maps
        of all processes on every process; all batches must then have the same size.

    Example:
        >>> accumulator = OnlineAttentionAccumulator(torch.tensor([[1, 0], [1, 1]]), (1, 3))
        >>> sure = torch.full((1, 2), 0.8)
        >>> for row in ([1.0, 0.5, -1.0], [0.0, 2.0, 4.0]):
        ...     accumulator.update(torch.tensor([1]), torch.tensor(row).expand(1, 2, 1, 3), sure)
        >>> accumulator(torch.tensor([1]))[0, :, 0].mul(255).int()
        tensor([[255, 128, 255],
                [255, 128, 255]], dtype=torch.int32)
    """

    maps: Tensor
    written: Tensor
    rows: Tensor

    def __init__(self, labels: Tensor, size: tuple[int, int], *, threshold: float = 0.1, eps: float = 1e-8) -> None:
        super().__init__()
        check_ndim("labels", labels, 2, "(n, K)")
        if min(size) < 1:
            raise ValueError(f"size: expected at least one cell, got {tuple(size)}")
        self.threshold, self.eps = threshold, eps
        present = labels > 0
        place = present.flatten().long().cumsum(0).view_as(labels) - 1
        pairs = int(present.sum())
        self.register_buffer("maps", torch.zeros(pairs, *size, dtype=torch.uint8, device=labels.device))
        self.register_buffer("written", torch.zeros(pairs, dtype=torch.bool, device=labels.device))
        self.register_buffer("rows", torch.where(present, place, -1))

    @torch.no_grad()
    def update(
        self, index: Tensor, cam: Tensor, probability: Tensor | None = None, *, last: bool = False, sync: bool = False
    ) -> None:
        """Add the maps of a batch.

        Args:
            index: (B,) int64 images, 0..n-1.
            cam: (B, K, H, W) float, of any sign; negative attention counts as none. Only present classes are read.
            probability: (B, K) float in [0, 1] of the classes; by default that of the maps' means, see
                :meth:`probability`.
            last: In the last epoch, also write the map of a class that has none yet, however improbable.
            sync: Add the maps of all processes of a distributed run.

        Raises:
            TypeError: ``index`` does not hold integers, or ``cam`` is not floating point.
            ValueError: a wrong shape.
        """
        check_ndim("index", index, 1, "(B,)")
        check_integer("index", index)
        check_floating("cam", cam)
        shape = (len(index), self.rows.shape[1])
        check_shape("cam", cam, (*shape, *self.maps.shape[1:]), "to match index and this accumulator")
        probability = self.probability(cam) if probability is None else probability
        check_shape("probability", probability, shape, "to match cam")
        positive = at_least_float32(cam.detach()).clamp(min=0)
        scaled = 255 * positive / (positive.amax((2, 3), keepdim=True) + self.eps)
        bytes_ = scaled.nan_to_num(0).round().to(torch.uint8)
        sure = probability >= self.threshold
        index, bytes_, sure = (gather_over_processes(x.detach(), sync) for x in (index, bytes_, sure))
        if len(self.maps) == 0:
            return
        rows = self.rows[index]  # (B, K)
        place = rows.clamp(min=0).flatten()
        adding = (rows >= 0) & (sure | (last & ~self.written[place].view_as(rows)))
        bytes_ = torch.where(adding[..., None, None], bytes_, 0).flatten(0, 1)  # 0 changes nothing
        self.maps.scatter_reduce_(0, place[:, None, None].expand_as(bytes_), bytes_, "amax")
        self.written.copy_(
            self.written.to(torch.uint8).scatter_reduce(0, place, adding.flatten().to(torch.uint8), "amax").bool()
        )

    @staticmethod
    def probability(cam: Tensor) -> Tensor:
        """Sigmoid of the mean of the signed maps ``cam`` (B, K, H, W): (B, K), what NSROM's classifier says."""
        return at_least_float32(cam).mean((2, 3)).sigmoid()

    def forward(self, index: Tensor) -> Tensor:
        """Accumulated maps of images ``index`` (B,): (B, K, H, W) float32 in [0, 1], 0 for absent classes."""
        check_ndim("index", index, 1, "(B,)")
        check_integer("index", index)
        rows = self.rows[index]
        if len(self.maps) == 0:
            return self.maps.new_zeros(*rows.shape, *self.maps.shape[1:], dtype=torch.float32)
        maps = self.maps[rows.clamp(min=0)].float() / 255
        return torch.where(rows[..., None, None] >= 0, maps, 0.0)

    def extra_repr(self) -> str:
        """Show sizes and options."""
        images, classes = self.rows.shape
        size = tuple(self.maps.shape[1:])
        return f"images={images}, classes={classes}, size={size}, threshold={self.threshold}, eps={self.eps}"


def attention_to_uint8(cam: Tensor, size: tuple[int, int], *, eps: float = 1e-8) -> Tensor:
    r"""Attention as 8-bit pictures of another size, as NSROM stores it.

    :math:`\lfloor 255 \max(a, 0) / (\max_{hw} a + \epsilon) \rfloor`, then bicubic, rounded and cut to 0..255.

    Args:
        cam: (B, K, h, w) floating point, of any sign.
        size: (H, W) of the pictures.
        eps: Keeps a map without attention at 0.

    Returns:
        (B, K, H, W) uint8.

    Raises:
        TypeError: ``cam`` is not floating point.
        ValueError: a wrong shape, or ``size`` without a pixel.

    Paper:
        Yao et al., CVPR 2021, arXiv:2103.14581.

    Notes:
        Bicubic with a = -0.75 and half-pixel centres, as image libraries do it for 8-bit pictures. NaN counts as 0.

    Example:
        >>> attention_to_uint8(torch.tensor([[[[-1.0, 0.5, 1.0]]]]), (1, 3))
        tensor([[[[  0, 127, 255]]]], dtype=torch.uint8)
    """
    check_ndim("cam", cam, 4, "(B, K, h, w)")
    check_floating("cam", cam)
    if min(size) < 1:
        raise ValueError(f"size: expected at least one pixel, got {tuple(size)}")
    if cam.numel() == 0:
        return torch.zeros(*cam.shape[:2], *size, dtype=torch.uint8, device=cam.device)
    positive = at_least_float32(cam.detach()).nan_to_num(0).clamp(min=0)
    scaled = (255 * (positive / (positive.amax((2, 3), keepdim=True) + eps))).floor()
    large = F.interpolate(scaled, size, mode="bicubic", align_corners=False)
    return large.round().clamp(0, 255).to(torch.uint8)

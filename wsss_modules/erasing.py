"""Erasing areas of an image by its class activation maps, and the frozen classifier that judges what is left.

Axes: B images, K foreground classes, H W pixels of the images, h w cells of the maps.
"""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from wsss_modules._checks import check_floating, check_integer, check_ndim, check_shape
from wsss_modules._distributed import max_over_processes
from wsss_modules._precision import at_least_float32
from wsss_modules.cam import minmax_cam

__all__ = [
    "ClassSpecificErase",
    "DisjointNegatives",
    "ErasedClass",
    "ErasedImages",
    "FrozenClassifier",
    "SoftErase",
    "class_specific_erase",
    "sample_disjoint_negatives",
    "sample_erase_class",
    "soft_erase_mask",
]


class ErasedClass(NamedTuple):
    """One present class of each image.

    Attributes:
        erased: (B, K) the class that is to be erased: one 1 a row; zeros where there is none.
        remaining: (B, K) the other present classes, so that ``erased + remaining`` are the labels.
        chosen: (B,) int64 which class that is, 0..K-1; where there is none the number means nothing.
        valid: (B,) bool whether there is one.
    """

    erased: Tensor
    remaining: Tensor
    chosen: Tensor
    valid: Tensor


def sample_erase_class(
    labels: Tensor, *, generator: torch.Generator | None = None, index: Tensor | None = None
) -> ErasedClass:
    """Draw one of the present classes of each image, all with the same probability.

    Args:
        labels: (B, K) multi-hot; present means greater than 0.
        generator: Source of the draws. It may live on another device than ``labels``; nothing waits for either.
        index: (B,) int64 classes 0..K-1 to take instead of drawing. Where that class is absent, nothing is erased.

    Returns:
        `ErasedClass`, in the dtype of ``labels``. An image without a label is not valid.

    Raises:
        TypeError: ``index`` is not an integer tensor.
        ValueError: a wrong shape, no class at all, or both ``generator`` and ``index``.

    Paper:
        Kweon, Yoon, Kim, Park and Yoon, Unlocking the Potential of Ordinary Classifier: Class-specific Adversarial
        Erasing Framework for Weakly Supervised Semantic Segmentation, ICCV 2021, pp. 6994-7003.

    Differences:
        The released code draws image by image on the CPU and fails for an image without a label.

    Notes:
        O(B K), no loop over the images and no wait for the device. Compiles with ``fullgraph=True`` without
        ``generator``.

    Example:
        >>> labels = torch.tensor([[1, 1, 0], [0, 0, 1], [0, 0, 0]])
        >>> out = sample_erase_class(labels, index=torch.tensor([1, 2, 0]))
        >>> out.erased.tolist(), out.remaining.tolist()
        ([[0, 1, 0], [0, 0, 1], [0, 0, 0]], [[1, 0, 0], [0, 0, 0], [0, 0, 0]])
        >>> out.valid
        tensor([ True,  True, False])
    """
    check_ndim("labels", labels, 2, "(B, K)")
    batch, classes = labels.shape
    if classes == 0:
        raise ValueError(f"labels: expected at least one class, got shape {tuple(labels.shape)}")
    present = labels if labels.dtype == torch.bool else labels > 0
    if index is None:
        device = labels.device if generator is None else generator.device
        draws = torch.rand(batch, generator=generator, device=device).to(labels.device, non_blocking=True)
        index = _nth_present(present, draws)
    elif generator is not None:
        raise ValueError("index: expected None when a generator is given, got both")
    check_shape("index", index, (batch,), "to match labels")
    check_integer("index", index)
    index = index.to(torch.int64)
    valid = present.gather(1, index[:, None])[:, 0]
    taken = (torch.arange(classes, device=labels.device) == index[:, None]) & valid[:, None]
    zero = torch.zeros_like(labels)
    return ErasedClass(torch.where(taken, labels, zero), torch.where(taken, zero, labels), index, valid)


class ErasedImages(NamedTuple):
    """What `class_specific_erase` returns.

    Attributes:
        mask: (B, 1, H, W) in [0, 1], how much of each pixel was taken away.
        images: (B, 3, H, W) what is left of the images.
    """

    mask: Tensor
    images: Tensor


def class_specific_erase(
    cam: Tensor,
    erased: Tensor,
    images: Tensor,
    *,
    normalise: Literal["batch", "image"] = "batch",
    eps: float = 1e-5,
    sync: bool = False,
) -> ErasedImages:
    r"""Fade out of each image what the activation map of one of its classes shows.

    .. math:: m = \frac{\mathrm{relu}(\mathrm{up}(a_k))}{\max \mathrm{relu}(\mathrm{up}(a_k)) + \epsilon}, \qquad
        x' = x (1 - m)

    with the map :math:`a_k` of the erased class up-sampled to the size of the image :math:`x` before ReLU (bilinear,
    half-pixel centres).

    Args:
        cam: (B, K, h, w) maps before ReLU.
        erased: (B, K) multi-hot: the class to erase, see `sample_erase_class`. Greater than 0 means yes; an image
            without one stays as it is. If a row has several, the sum of their maps counts.
        images: (B, C, H, W) normalised images: what is erased goes to 0, which is the mean colour.
        normalise: "batch" takes the maximum over all images of the batch, "image" over each by itself.
        eps: Added to the maximum.
        sync: With "batch", take the maximum over all processes of a distributed run.

    Returns:
        `ErasedImages`: ``mask`` in the dtype of ``cam``, ``images`` in that of ``images``. Gradients flow to both
        inputs, through the maximum as well; a map that is nowhere positive erases nothing and gets no gradient.

    Raises:
        TypeError: ``cam`` or ``images`` is not floating point.
        ValueError: a wrong shape, or an unknown ``normalise``.

    Paper:
        Kweon et al., ICCV 2021, pp. 6994-7003; see `sample_erase_class`.

    Differences:
        With the released "batch", an image whose map is weak beside those of its batch is hardly erased, so that the
        result depends on who shares the batch; with "image" it does not.

    Notes:
        Up-samples one map an image, not K. Half precision is normalised in float32. Compiles with ``fullgraph=True``
        without ``sync``. The released code gathers the maps of its devices before it takes the maximum; with one
        process a device, ``sync=True`` does the same, value and (after DDP's averaging) gradient.

    Example:
        >>> cam, images = torch.tensor([[[[1.0, 3.0]], [[9.0, 9.0]]]]), torch.ones(1, 3, 1, 2)
        >>> out = class_specific_erase(cam, torch.tensor([[1, 0]]), images, eps=0)
        >>> out.mask, out.images[:, :1]
        (tensor([[[[0.3333, 1.0000]]]]), tensor([[[[0.6667, 0.0000]]]]))
    """
    check_ndim("cam", cam, 4, "(B, K, h, w)")
    check_floating("cam", cam)
    check_shape("erased", erased, cam.shape[:2], "to match cam")
    check_shape("images", images, (cam.shape[0], None, None, None), "to match cam")
    check_floating("images", images)
    if normalise not in ("batch", "image"):
        raise ValueError(f'normalise: expected "batch" or "image", got {normalise!r}')
    values = at_least_float32(cam)
    # The sum has one term, and takes no NaN from the other classes.
    picked = torch.where((erased > 0)[:, :, None, None], values, 0.0).sum(1, keepdim=True)  # (B, 1, h, w)
    shown = F.relu(F.interpolate(picked, images.shape[-2:], mode="bilinear", align_corners=False))
    if normalise == "batch":
        peak = max_over_processes(shown.amax() if shown.numel() else shown.sum(), sync)
    else:
        peak = shown.amax((1, 2, 3), keepdim=True)
    scale = peak + eps
    mask = shown / torch.where(scale > 0, scale, 1.0)
    return ErasedImages(mask.to(cam.dtype), (images * (1 - mask)).to(images.dtype))


class ClassSpecificErase(nn.Module):
    """Fade out of each image what the map of one class shows; see :func:`class_specific_erase`.

    Args:
        normalise: "batch" (released) or "image".
        eps: Added to the maximum.
        sync: With "batch", take the maximum over all processes of a distributed run.

    Shapes:
        cam (B, K, h, w), erased (B, K), images (B, C, H, W) -> `ErasedImages`.

    Example:
        >>> labels = torch.tensor([[1, 0, 1], [0, 1, 0]])
        >>> erased = sample_erase_class(labels, generator=torch.Generator().manual_seed(0)).erased
        >>> mask, images = ClassSpecificErase()(torch.randn(2, 3, 4, 4), erased, torch.randn(2, 3, 32, 32))
        >>> mask.shape, images.shape
        (torch.Size([2, 1, 32, 32]), torch.Size([2, 3, 32, 32]))
    """

    def __init__(
        self, *, normalise: Literal["batch", "image"] = "batch", eps: float = 1e-5, sync: bool = False
    ) -> None:
        super().__init__()
        if normalise not in ("batch", "image"):
            raise ValueError(f'normalise: expected "batch" or "image", got {normalise!r}')
        self.normalise: Literal["batch", "image"] = normalise
        self.eps, self.sync = eps, sync

    def forward(self, cam: Tensor, erased: Tensor, images: Tensor) -> ErasedImages:
        """Mask and erased images, see the class."""
        return class_specific_erase(cam, erased, images, normalise=self.normalise, eps=self.eps, sync=self.sync)

    def extra_repr(self) -> str:
        """Show the options."""
        return f"normalise={self.normalise!r}, eps={self.eps}, sync={self.sync}"


class FrozenClassifier(nn.Module):
    """A trained network that judges images and does not learn: gradients go through it to the images only.

    Its parameters lose ``requires_grad``, so that no gradient is computed, kept or exchanged for them, and it stays in
    eval mode (no dropout, stored statistics of batch norm) whatever ``train()`` is called on the modules around it.

    Args:
        module: The network. It is frozen itself, not copied.
        parts: Keep no activations in forward. In backward, recompute them for one part of the batch after the other:
            with n parts the activations of B / n images are in memory at a time, for the price of one more forward.
            None keeps them all. Each output of ``module`` must then be a tensor with the images along its first axis,
            or a tuple, list or dictionary of such tensors.

    Shapes:
        images (B, C, H, W) -> what ``module`` returns.

    Raises:
        ValueError: ``parts`` is less than 1.

    Paper:
        Kweon et al., ICCV 2021, pp. 6994-7003: the "ordinary classifier".

    Differences:
        The released code leaves the classifier out of the optimiser but computes the gradients of its weights in every
        step and never clears them. The images' gradients are the same.

    Notes:
        A call under ``torch.no_grad()`` gives outputs without a graph, as with any module.

    Example:
        >>> judge = FrozenClassifier(nn.Sequential(nn.Conv2d(3, 5, 3), nn.Dropout(), nn.AdaptiveAvgPool2d(1)))
        >>> images = torch.rand(2, 3, 8, 8, requires_grad=True)
        >>> judge.train()(images).sum().backward()
        >>> images.grad is None, judge.module[0].weight.grad is None, judge.module[1].training
        (False, True, False)
    """

    def __init__(self, module: nn.Module, *, parts: int | None = None) -> None:
        super().__init__()
        if parts is not None and parts < 1:
            raise ValueError(f"parts: expected at least 1 or None, got {parts}")
        self.module = module.requires_grad_(False)
        self.parts = parts
        self.train(self.training)

    def train(self, mode: bool = True) -> FrozenClassifier:
        """Keep the network in eval mode."""
        super().train(mode)
        self.module.eval()
        return self

    def forward(self, images: Tensor) -> Any:
        """What the network returns for ``images``."""
        if self.parts is None or not torch.is_grad_enabled():
            return self.module(images)
        return _join([checkpoint(self.module, part, use_reentrant=False) for part in images.chunk(self.parts)])

    def extra_repr(self) -> str:
        """Show the options."""
        return f"parts={self.parts}"


def soft_erase_mask(
    cam: Tensor,
    labels: Tensor,
    size: tuple[int, int],
    *,
    threshold: float = 0.6,
    eps: float = 1e-5,
    detach_mask: bool = False,
) -> Tensor:
    r"""Keep of an image what its class maps show a little, erase what they show clearly, and fade what they don't show.

    .. math::
        m = \max_{k\ present} \hat a_k, \qquad mask = m \ \text{if}\ m < threshold,\ \text{else}\ 0

    with :math:`\hat a_k` the ReLU of the map, upsampled and stretched to its full range by `minmax_cam`. The mask is
    0 where the activation is strong, nearly 0 on background, and the activation itself in between. Multiply the
    normalised images by it.

    Args:
        cam: (B, K, h, w), signed.
        labels: (B, K) multi-hot; present means greater than 0.
        size: (H, W) of the images in pixels.
        threshold: Activation from which on a pixel is erased.
        eps: See `minmax_cam`.
        detach_mask: Take the mask for a constant, see Differences.

    Returns:
        (B, 1, H, W) in [0, threshold), in the dtype of ``cam``; 0 for an image without a label. Gradients flow to
        ``cam`` through the values that are kept, and through the minimum and the maximum of their map.

    Raises:
        TypeError: ``cam`` is not floating point.
        ValueError: a wrong shape.

    Paper:
        Yoon, Kweon, Cho, Kim and Yoon, Adversarial Erasing Framework via Triplet with Gated Pyramid Pooling Layer for
        Weakly Supervised Semantic Segmentation, ECCV 2022.

    Differences:
        The released code lets the gradient of the masked pass go into the mask, which is the default here;
        ``detach_mask=True`` stops it.

    Notes:
        Upsamples the maps of present classes only, on VOC about one in thirteen. How many there are depends on the
        data, so this breaks the graph of ``torch.compile`` and waits for the device once. Upsampling is bilinear with
        half-pixel centres. Half precision is normalised in float32.

    Example:
        >>> cam = torch.tensor([[[[-1.0, 1.0, 2.0, 4.0]], [[9.0, 9.0, 9.0, 0.0]]]])
        >>> soft_erase_mask(cam, torch.tensor([[1, 0]]), (1, 4))
        tensor([[[[0.0000, 0.2500, 0.5000, 0.0000]]]])
    """
    check_floating("cam", cam)
    check_ndim("cam", cam, 4, "(B, K, h, w)")
    check_shape("labels", labels, cam.shape[:2], "to match cam")
    if detach_mask:
        cam = cam.detach()
    image, index = (labels > 0).nonzero(as_tuple=True)  # M pairs
    maps = F.relu(cam[image, index].to(torch.promote_types(cam.dtype, torch.float32)))
    large = F.interpolate(maps[:, None], size, mode="bilinear", align_corners=False)
    shown = minmax_cam(large[:, 0], eps)  # (M, H, W)
    strongest = shown.new_zeros(cam.shape[0], *size)
    strongest = strongest.scatter_reduce(0, image[:, None, None].expand_as(shown), shown, "amax")
    return torch.where(strongest < threshold, strongest, 0.0)[:, None].to(cam.dtype)


class SoftErase(nn.Module):
    """The mask that erases what class maps show clearly, and fades what they don't show; see :func:`soft_erase_mask`.

    Args:
        threshold: Activation from which on a pixel is erased.
        eps: See `minmax_cam`.
        detach_mask: Take the mask for a constant.

    Shapes:
        cam (B, K, h, w), labels (B, K), size (H, W) -> mask (B, 1, H, W).

    Example:
        >>> _ = torch.manual_seed(0)
        >>> images, labels = torch.randn(2, 3, 32, 32), torch.tensor([[1, 0, 1], [0, 1, 0]])
        >>> mask = SoftErase()(torch.randn(2, 3, 4, 4), labels, images.shape[2:])
        >>> (images * mask).shape
        torch.Size([2, 3, 32, 32])
    """

    def __init__(self, threshold: float = 0.6, *, eps: float = 1e-5, detach_mask: bool = False) -> None:
        super().__init__()
        self.threshold, self.eps, self.detach_mask = threshold, eps, detach_mask

    def forward(self, cam: Tensor, labels: Tensor, size: tuple[int, int]) -> Tensor:
        """The mask, see the class."""
        options = {"threshold": self.threshold, "eps": self.eps}
        return soft_erase_mask(cam, labels, size, **options, detach_mask=self.detach_mask)

    def extra_repr(self) -> str:
        """Show the options."""
        return f"threshold={self.threshold}, eps={self.eps}, detach_mask={self.detach_mask}"


class DisjointNegatives(NamedTuple):
    """A partner for each image of a batch that shares no class with it.

    Attributes:
        negative: (B,) int64 place of the partner in the batch; the image itself where there is none.
        valid: (B,) bool whether there is one.
    """

    negative: Tensor
    valid: Tensor


def sample_disjoint_negatives(
    labels: Tensor, *, generator: torch.Generator | None = None, draws: Tensor | None = None
) -> DisjointNegatives:
    """Draw for each image one of those in the batch that share no class with it, all with the same probability.

    Args:
        labels: (B, K) multi-hot; present means greater than 0.
        generator: Source of the draws. It may live on another device than ``labels``; nothing waits for either.
        draws: (B, B) floating point, at least 0, to take instead of drawing: of the images that share no class with
            image i, the one with the largest ``draws[i, j]`` is taken, the first of equals.

    Returns:
        `DisjointNegatives`. An image is not valid if all others share a class with it. Neither is one without a label,
        which is not drawn as a partner either.

    Raises:
        TypeError: ``draws`` is not floating point.
        ValueError: a wrong shape, or both ``generator`` and ``draws``.

    Paper:
        Yoon, Kweon, Cho, Kim and Yoon, Adversarial Erasing Framework via Triplet with Gated Pyramid Pooling Layer for
        Weakly Supervised Semantic Segmentation, ECCV 2022.

    Differences:
        The released code searches a list that Python reshuffles as the search goes on; its first image takes the first
        partner in the order of the batch. Where an image has no partner, its list of partners comes out too short and
        later images are paired with those of others, which may share a class; here the image is not valid.

    Notes:
        One matrix product and a maximum, O(B^2 K), without a loop over the images and without a wait for the device.
        Compiles with ``fullgraph=True`` without ``generator``. In a distributed run, gather the labels first, and keep
        the rows of the own images: `wsss_losses.erasing_repulsion_loss` with ``sync=True`` counts images over all
        processes.

    Example:
        >>> labels = torch.tensor([[1, 0, 0], [1, 1, 0], [0, 0, 1], [1, 1, 1]])
        >>> sample_disjoint_negatives(labels, draws=torch.tensor([0.1, 0.9, 0.5, 0.7]).expand(4, 4))
        DisjointNegatives(negative=tensor([2, 2, 1, 3]), valid=tensor([ True,  True,  True, False]))
    """
    check_ndim("labels", labels, 2, "(B, K)")
    batch = labels.shape[0]
    if draws is None:
        device = labels.device if generator is None else generator.device
        draws = torch.rand(batch, batch, generator=generator, device=device).to(labels.device, non_blocking=True)
    elif generator is not None:
        raise ValueError("draws: expected None when a generator is given, got both")
    check_shape("draws", draws, (batch, batch), "to match labels")
    check_floating("draws", draws)
    if batch == 0:
        return DisjointNegatives(labels.new_zeros(0, dtype=torch.int64), labels.new_zeros(0, dtype=torch.bool))
    present = labels if labels.dtype == torch.bool else labels > 0
    tagged = present.any(1)
    shared = present.float() @ present.float().T  # (B, B) number of classes in common
    disjoint = (shared == 0) & tagged[:, None] & tagged
    valid = disjoint.any(1)
    itself = torch.arange(batch, device=labels.device)
    return DisjointNegatives(torch.where(valid, torch.where(disjoint, draws, -1.0).argmax(1), itself), valid)


def _nth_present(present: Tensor, draws: Tensor) -> Tensor:
    """Index of a present class of each row: the n-th, with n uniform for ``draws`` uniform in [0, 1)."""
    count = present.sum(1)
    n = torch.minimum((draws * count).long(), (count - 1).clamp(min=0))  # (B,)
    return (present.cumsum(1) > n[:, None]).to(torch.uint8).argmax(1)


def _join(outputs: list[Any]) -> Any:
    """The outputs of parts of a batch as that of the batch."""
    first = outputs[0]
    if isinstance(first, Tensor):
        return torch.cat(outputs)
    if isinstance(first, dict):
        return {key: _join([output[key] for output in outputs]) for key in first}
    if isinstance(first, (tuple, list)):
        joined = [_join(list(column)) for column in zip(*outputs, strict=True)]
        return type(first)(*joined) if hasattr(first, "_fields") else type(first)(joined)
    raise TypeError(f"module: expected tensors in tuples, lists or dictionaries, got {type(first).__name__}")

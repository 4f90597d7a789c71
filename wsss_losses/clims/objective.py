"""The two objectives of CLIMS: the released one and that of the paper.

Axes: B images, K foreground classes, n pairs of an image and a class that it shows, D features of the image-text model,
L background texts, R background texts that are related to some class.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from wsss_losses._reduction import Reduction
from wsss_losses.clims._reduction import reduce_over_processes
from wsss_losses.clims.matching import (
    CLAMP,
    Clamp,
    background_text_matching_loss,
    check_matching_options,
    object_text_matching_loss,
)
from wsss_losses.clims.suppression import background_suppression_loss, class_background_suppression_loss, image_areas
from wsss_modules import MaskedPairs, image_text_similarity, masked_image_pairs, pairwise_cosine_similarity
from wsss_modules._checks import check_ndim, check_shape
from wsss_modules._precision import at_least_float32
from wsss_modules.text import Normalization

EncodeImage = Callable[[Tensor], Tensor]


class CLIMSTerms(NamedTuple):
    """Scalars: the terms, and ``total``, their sum with the weights of the objective."""

    total: Tensor
    object_text: Tensor
    background_text: Tensor
    suppression: Tensor
    area: Tensor


def clims_loss(
    activation: Tensor,
    images: Tensor,
    labels: Tensor,
    encode_image: EncodeImage,
    class_text: Tensor,
    background_text: Tensor,
    *,
    object_weight: float = 10.0,
    background_weight: float = 24.0,
    suppression_weight: float = 1.0,
    area_weight: float = 0.2,
    threshold: float = 0.26,
    suppression_reduction: Reduction = "sum",
    size: int | tuple[int, int] = 224,
    image_norm: Normalization | None = None,
    encoder_norm: Normalization | None = None,
    clamp: Clamp | None = CLAMP,
    leak: float = 0.0,
    positive: bool = False,
    sync: bool = False,
) -> CLIMSTerms:
    r"""Objective of CLIMS as released: class maps such that an image-text model finds the class in what they show only.

    .. math:: L = \alpha L_{OTM} + \beta L_{BTM} + \gamma L_{CBS} + \delta L_{REG}

    Each image is seen through the map of each class that it shows, and through what the map leaves
    (:func:`wsss_modules.masked_image_pairs`). The terms are :func:`object_text_matching_loss`,
    :func:`background_text_matching_loss`, :func:`background_suppression_loss` and :func:`area_regularization_loss`.

    Args:
        activation: (B, K, h, w) floating point in [0, 1], see :class:`wsss_modules.SigmoidCAMHead`.
        images: (B, 3, H, W) floating point, normalised.
        labels: (B, K) multi-hot; present above 0.5.
        encode_image: images (2 n, 3, S, S) in float32 -> features (2 n, D), differentiable with respect to the images,
            such as the image tower of CLIP in a :class:`wsss_modules.FrozenClassifier`. Called once, and not at all
            for a batch without labels.
        class_text: (K, D) features of the texts about the classes, see :class:`wsss_modules.TextPromptBank`.
        background_text: (L, D) features of the texts about backgrounds; L may be 0.
        object_weight: alpha; 10 for VOC, 2 for COCO.
        background_weight: beta; 24 for VOC, 14 for COCO.
        suppression_weight: gamma; 1 for VOC, 1.25 for COCO.
        area_weight: delta.
        threshold: of the suppression; 0.26 for VOC, 0.285 for COCO.
        suppression_reduction: "sum" over the pairs as released, so that its share depends on how many classes a batch
            shows, or "mean".
        size: side of the input of the image-text model in pixels, or (height, width).
        image_norm: (mean, std) of the normalisation that ``images`` went through.
        encoder_norm: (mean, std) that the image-text model wants instead. Both are given or none.
        clamp: of the similarities in both matching terms, or None.
        leak: slope of the matching terms beyond the clamp.
        positive: match with (s + 1) / 2 in place of s.
        sync: reduce all terms over the processes of a distributed run.

    Returns:
        The total and the four terms, scalars in the dtype of ``activation``. Without any label only the area is left.

    Raises:
        TypeError: ``activation`` or ``images`` is not floating point.
        ValueError: shapes don't match, features of another shape than those of the texts, or a negative weight.

    Paper:
        Xie, Hou, Ye and Shen, "CLIMS: Cross Language Image Matching for Weakly Supervised Semantic Segmentation", CVPR
        2022, arXiv:2203.02668.

    Differences:
        This is the improved version that the authors recommend; that of the paper is :func:`clims_camera_ready_loss`.
        The released code stops with an error where a batch shows one class only, or none. There a pair with a negative
        similarity sends nothing back, see ``leak`` and ``positive``. COCO's script has 2 as default of gamma, the
        authors' command 1.25.

    Notes:
        The image-text model sees 2 n images in one call, where the released code encodes 3 n, of which n twice, and
        all texts anew three times a step. Freeze its weights: the gradient only passes through. Similarities and
        logarithms are computed in float32. The number of pairs depends on the labels, so that it does not compile to
        one graph. With ``sync`` the batch of a process may be without labels.

    Example:
        >>> import torch
        >>> from wsss_losses import clims_loss
        >>> _ = torch.manual_seed(0)
        >>> project = torch.randn(3, 8)
        >>> encode = lambda images: images.mean((2, 3)) @ project
        >>> activation = torch.rand(2, 4, 6, 6, requires_grad=True)
        >>> labels = torch.tensor([[1, 0, 1, 0], [0, 1, 0, 0]])
        >>> text, backgrounds = torch.randn(4, 8), torch.randn(5, 8)
        >>> terms = clims_loss(activation, torch.randn(2, 3, 24, 24), labels, encode, text, backgrounds, size=16)
        >>> terms.total.backward()
    """
    weights = object_weight, background_weight, suppression_weight, area_weight
    _check_objective(weights, clamp, leak, suppression_reduction)
    check_ndim("background_text", background_text, 2, "(L, D)")
    pairs, shown, left = _encoded(activation, images, labels, encode_image, class_text, size, image_norm, encoder_norm)
    matching = Matching(clamp, leak, positive, sync)
    object_text, remaining = _matched(pairs, shown, left, class_text, None, matching)
    suppression = background_suppression_loss(
        pairwise_cosine_similarity(shown, background_text, clamp=None),
        threshold=threshold,
        reduction=suppression_reduction,
        sync=sync,
    )
    area = reduce_over_processes(image_areas(activation), None, "mean", sync)
    return _weighted(weights, (object_text, remaining, suppression, area), activation.dtype)


class CLIMSLoss(nn.Module):
    """The released objective of CLIMS; see :func:`clims_loss`.

    The image-text model is an argument of the call, so that it is no part of this module's parameters.

    Args:
        object_weight: weight of object-text matching.
        background_weight: weight of background-text matching.
        suppression_weight: weight of the suppression of backgrounds.
        area_weight: weight of the area.
        threshold: similarity from which a background is suppressed.
        suppression_reduction: "sum" or "mean" over the pairs.
        size: side of the input of the image-text model in pixels, or (height, width).
        image_norm: (mean, std) of the normalisation of the images.
        encoder_norm: (mean, std) that the image-text model wants instead.
        clamp: least and largest similarity in the matching terms, or None.
        leak: slope of the matching terms beyond the clamp.
        positive: match with (s + 1) / 2 in place of s.
        sync: reduce all terms over the processes of a distributed run.

    Example:
        >>> import torch
        >>> from wsss_losses import CLIMSLoss
        >>> _ = torch.manual_seed(0)
        >>> encode = lambda images: images.mean((2, 3)).repeat(1, 2)
        >>> activation, images = torch.full((2, 4, 6, 6), 0.5), torch.randn(2, 3, 24, 24)
        >>> no_labels, text, backgrounds = torch.zeros(2, 4), torch.randn(4, 6), torch.randn(5, 6)
        >>> terms = CLIMSLoss(size=16)(activation, images, no_labels, encode, text, backgrounds)
        >>> terms.total, terms.area
        (tensor(0.1000), tensor(0.5000))
    """

    def __init__(
        self,
        *,
        object_weight: float = 10.0,
        background_weight: float = 24.0,
        suppression_weight: float = 1.0,
        area_weight: float = 0.2,
        threshold: float = 0.26,
        suppression_reduction: Reduction = "sum",
        size: int | tuple[int, int] = 224,
        image_norm: Normalization | None = None,
        encoder_norm: Normalization | None = None,
        clamp: Clamp | None = CLAMP,
        leak: float = 0.0,
        positive: bool = False,
        sync: bool = False,
    ) -> None:
        super().__init__()
        _check_objective(
            (object_weight, background_weight, suppression_weight, area_weight), clamp, leak, suppression_reduction
        )
        self.object_weight, self.background_weight = object_weight, background_weight
        self.suppression_weight, self.area_weight = suppression_weight, area_weight
        self.threshold = threshold
        self.suppression_reduction: Reduction = suppression_reduction
        self.size, self.image_norm, self.encoder_norm = size, image_norm, encoder_norm
        self.clamp, self.leak, self.positive, self.sync = clamp, leak, positive, sync

    def forward(
        self,
        activation: Tensor,
        images: Tensor,
        labels: Tensor,
        encode_image: EncodeImage,
        class_text: Tensor,
        background_text: Tensor,
    ) -> CLIMSTerms:
        """Activations, images, labels, the image tower and features of the texts -> total and terms."""
        return clims_loss(
            activation,
            images,
            labels,
            encode_image,
            class_text,
            background_text,
            object_weight=self.object_weight,
            background_weight=self.background_weight,
            suppression_weight=self.suppression_weight,
            area_weight=self.area_weight,
            threshold=self.threshold,
            suppression_reduction=self.suppression_reduction,
            size=self.size,
            image_norm=self.image_norm,
            encoder_norm=self.encoder_norm,
            clamp=self.clamp,
            leak=self.leak,
            positive=self.positive,
            sync=self.sync,
        )

    def extra_repr(self) -> str:
        """Show the options."""
        return f"{_objective_options(self)}, threshold={self.threshold}"


def clims_camera_ready_loss(
    activation: Tensor,
    images: Tensor,
    labels: Tensor,
    encode_image: EncodeImage,
    class_text: Tensor,
    related_text: Tensor,
    related: Tensor,
    class_weight: Tensor,
    *,
    object_weight: float = 10.0,
    background_weight: float = 25.0,
    suppression_weight: float = 29.5,
    area_weight: float = 1.15,
    suppression_reduction: Reduction = "sum",
    size: int | tuple[int, int] = 224,
    image_norm: Normalization | None = None,
    encoder_norm: Normalization | None = None,
    clamp: Clamp | None = None,
    leak: float = 0.0,
    positive: bool = False,
    sync: bool = False,
) -> CLIMSTerms:
    r"""Objective of CLIMS as in the paper: backgrounds belong to classes, and some classes count threefold.

    .. math:: L = \alpha L_{OTM} + \beta L_{BTM} + \gamma L_{CBS} + \delta L_{REG}

    as :func:`clims_loss`, but with :func:`class_background_suppression_loss`, with weights of the pairs in both
    matching terms, and without a clamp.

    Args:
        activation: (B, K, h, w) floating point in [0, 1]. The camera-ready code has a channel more, which no term
            reads.
        images: (B, 3, H, W) floating point, normalised.
        labels: (B, K) multi-hot; present above 0.5.
        encode_image: images (2 n, 3, S, S) in float32 -> features (2 n, D), as in :func:`clims_loss`.
        class_text: (K, D) features of the texts about the classes.
        related_text: (R, D) features of the texts about backgrounds of all classes that have any; R may be 0.
        related: (K, R) bool, which of these are of which class.
        class_weight: (K,) at least 0; 3 for chair, dining table and sofa, else 1.
        object_weight: alpha.
        background_weight: beta.
        suppression_weight: gamma.
        area_weight: delta.
        suppression_reduction: "sum" over the pairs as released, or "mean".
        size: side of the input of the image-text model in pixels, or (height, width).
        image_norm: (mean, std) of the normalisation that ``images`` went through.
        encoder_norm: (mean, std) that the image-text model wants instead. Both are given or none.
        clamp: of the similarities in both matching terms, or None.
        leak: slope of the matching terms beyond the clamp.
        positive: match with (s + 1) / 2 in place of s.
        sync: reduce all terms over the processes of a distributed run.

    Returns:
        The total and the four terms, scalars in the dtype of ``activation``. Without any label only the area is left.

    Raises:
        TypeError: ``activation`` or ``images`` is not floating point, or ``related`` not bool.
        ValueError: shapes don't match, features of another shape than those of the texts, or a negative weight.

    Paper:
        Xie et al., CVPR 2022, arXiv:2203.02668.

    Differences:
        The image-text model of the paper was first fine-tuned on pairs of images and texts of VOC, and classifier and
        image-text model both had CLIP's normalisation. Its code is infinite for a similarity of 0 and NaN for a
        negative one; here the logarithm gets at least 1e-6.

    Notes:
        As :func:`clims_loss`. ``related_text``, ``related`` and ``class_weight`` are attributes of
        :class:`wsss_modules.TextPromptBank` with :data:`wsss_modules.CAMERA_READY_VOC_PROMPTS`.

    Example:
        >>> import torch
        >>> from wsss_losses import clims_camera_ready_loss
        >>> from wsss_modules import CAMERA_READY_VOC_PROMPTS, TextPromptBank
        >>> _ = torch.manual_seed(0)
        >>> bank = TextPromptBank(["boat", "cow"], lambda texts: torch.rand(len(texts), 3), CAMERA_READY_VOC_PROMPTS)
        >>> encode = lambda images: images.mean((2, 3))
        >>> terms = clims_camera_ready_loss(
        ...     torch.rand(1, 2, 6, 6), torch.rand(1, 3, 24, 24), torch.tensor([[0, 1]]), encode, bank.class_features,
        ...     bank.related_features, bank.related, bank.class_weight,
        ... )
        >>> terms.suppression  # cows have no backgrounds of their own
        tensor(0.)
    """
    weights = object_weight, background_weight, suppression_weight, area_weight
    _check_objective(weights, clamp, leak, suppression_reduction)
    check_ndim("related_text", related_text, 2, "(R, D)")
    check_shape("related", related, (labels.shape[-1], len(related_text)), "to match labels, related_text")
    check_shape("class_weight", class_weight, labels.shape[-1:], "to match labels")
    pairs, shown, left = _encoded(activation, images, labels, encode_image, class_text, size, image_norm, encoder_norm)
    matching = Matching(clamp, leak, positive, sync)
    weight = class_weight[pairs.class_index]
    object_text, remaining = _matched(pairs, shown, left, class_text, weight, matching)
    suppression = class_background_suppression_loss(
        pairwise_cosine_similarity(shown, related_text, clamp=None),
        related[pairs.class_index],
        reduction=suppression_reduction,
        sync=sync,
    )
    area = reduce_over_processes(image_areas(activation), None, "mean", sync)
    return _weighted(weights, (object_text, remaining, suppression, area), activation.dtype)


class CLIMSCameraReadyLoss(nn.Module):
    """The objective of the paper; see :func:`clims_camera_ready_loss`.

    Args:
        object_weight: weight of object-text matching.
        background_weight: weight of background-text matching.
        suppression_weight: weight of the suppression of backgrounds.
        area_weight: weight of the area.
        suppression_reduction: "sum" or "mean" over the pairs.
        size: side of the input of the image-text model in pixels, or (height, width).
        image_norm: (mean, std) of the normalisation of the images.
        encoder_norm: (mean, std) that the image-text model wants instead.
        clamp: least and largest similarity in the matching terms, or None.
        leak: slope of the matching terms beyond the clamp.
        positive: match with (s + 1) / 2 in place of s.
        sync: reduce all terms over the processes of a distributed run.

    Example:
        >>> import torch
        >>> from wsss_losses import CLIMSCameraReadyLoss
        >>> _ = torch.manual_seed(0)
        >>> no_texts, none_related = torch.zeros(0, 3), torch.zeros(2, 0, dtype=torch.bool)
        >>> terms = CLIMSCameraReadyLoss(size=16)(
        ...     torch.rand(1, 2, 6, 6), torch.rand(1, 3, 24, 24), torch.tensor([[1, 1]]), lambda x: x.mean((2, 3)),
        ...     torch.rand(2, 3), no_texts, none_related, torch.ones(2),
        ... )
        >>> bool(terms.object_text > 0), terms.suppression
        (True, tensor(0.))
    """

    def __init__(
        self,
        *,
        object_weight: float = 10.0,
        background_weight: float = 25.0,
        suppression_weight: float = 29.5,
        area_weight: float = 1.15,
        suppression_reduction: Reduction = "sum",
        size: int | tuple[int, int] = 224,
        image_norm: Normalization | None = None,
        encoder_norm: Normalization | None = None,
        clamp: Clamp | None = None,
        leak: float = 0.0,
        positive: bool = False,
        sync: bool = False,
    ) -> None:
        super().__init__()
        _check_objective(
            (object_weight, background_weight, suppression_weight, area_weight), clamp, leak, suppression_reduction
        )
        self.object_weight, self.background_weight = object_weight, background_weight
        self.suppression_weight, self.area_weight = suppression_weight, area_weight
        self.suppression_reduction: Reduction = suppression_reduction
        self.size, self.image_norm, self.encoder_norm = size, image_norm, encoder_norm
        self.clamp, self.leak, self.positive, self.sync = clamp, leak, positive, sync

    def forward(
        self,
        activation: Tensor,
        images: Tensor,
        labels: Tensor,
        encode_image: EncodeImage,
        class_text: Tensor,
        related_text: Tensor,
        related: Tensor,
        class_weight: Tensor,
    ) -> CLIMSTerms:
        """Activations, images, labels, the image tower, features and relations of the texts -> total and terms."""
        return clims_camera_ready_loss(
            activation,
            images,
            labels,
            encode_image,
            class_text,
            related_text,
            related,
            class_weight,
            object_weight=self.object_weight,
            background_weight=self.background_weight,
            suppression_weight=self.suppression_weight,
            area_weight=self.area_weight,
            suppression_reduction=self.suppression_reduction,
            size=self.size,
            image_norm=self.image_norm,
            encoder_norm=self.encoder_norm,
            clamp=self.clamp,
            leak=self.leak,
            positive=self.positive,
            sync=self.sync,
        )

    def extra_repr(self) -> str:
        """Show the options."""
        return _objective_options(self)


def _encoded(
    activation: Tensor,
    images: Tensor,
    labels: Tensor,
    encode_image: EncodeImage,
    class_text: Tensor,
    size: int | tuple[int, int],
    image_norm: Normalization | None,
    encoder_norm: Normalization | None,
) -> tuple[MaskedPairs, Tensor, Tensor]:
    """The pairs, and features (n, D) of what the maps show and of what they leave."""
    pairs = masked_image_pairs(
        activation, at_least_float32(images), labels, size=size, image_norm=image_norm, encoder_norm=encoder_norm
    )
    check_shape("class_text", class_text, (labels.shape[1], None), "(K, D) to match labels")
    count, channels = len(pairs.image_index), class_text.shape[1]
    if count == 0:  # of the graph of the maps, so that with ``sync`` this process takes its part in the backward
        empty = pairs.foreground.mean((1, 2, 3))[:, None].expand(-1, channels)
        return pairs, empty, empty
    features = encode_image(pairs.images.flatten(0, 1))
    check_shape("encode_image", features, (2 * count, channels), "for its images and class_text")
    return pairs, features[:count], features[count:]


class Matching(NamedTuple):
    """Options of both matching terms."""

    clamp: Clamp | None
    leak: float
    positive: bool
    sync: bool


def _matched(
    pairs: MaskedPairs, shown: Tensor, left: Tensor, class_text: Tensor, weight: Tensor | None, options: Matching
) -> tuple[Tensor, Tensor]:
    """Object-text and background-text matching."""
    text = class_text[pairs.class_index]
    clamp, leak, positive, sync = options
    return (
        object_text_matching_loss(
            image_text_similarity(shown, text), weight, clamp=clamp, leak=leak, positive=positive, sync=sync
        ),
        background_text_matching_loss(
            image_text_similarity(left, text), weight, clamp=clamp, leak=leak, positive=positive, sync=sync
        ),
    )


def _weighted(weights: tuple[float, ...], terms: tuple[Tensor, ...], dtype: torch.dtype) -> CLIMSTerms:
    total = torch.stack([weight * term for weight, term in zip(weights, terms, strict=True)]).sum()
    return CLIMSTerms(*(term.to(dtype) for term in (total, *terms)))


def _check_objective(weights: tuple[float, ...], clamp: Clamp | None, leak: float, reduction: str) -> None:
    names = ("object_weight", "background_weight", "suppression_weight", "area_weight")
    for name, weight in zip(names, weights, strict=True):
        if weight < 0:
            raise ValueError(f"{name}: expected at least 0, got {weight}")
    if reduction not in ("sum", "mean"):
        raise ValueError(f'suppression_reduction: expected "sum" or "mean", got {reduction!r}')
    check_matching_options(clamp, leak, "mean")


def _objective_options(loss: CLIMSLoss | CLIMSCameraReadyLoss) -> str:
    return (
        f"object_weight={loss.object_weight}, background_weight={loss.background_weight}, "
        f"suppression_weight={loss.suppression_weight}, area_weight={loss.area_weight}, "
        f"suppression_reduction={loss.suppression_reduction!r}, size={loss.size}, image_norm={loss.image_norm}, "
        f"encoder_norm={loss.encoder_norm}, clamp={loss.clamp}, leak={loss.leak}, positive={loss.positive}, "
        f"sync={loss.sync}"
    )

"""Images seen through class maps, and the texts that they are compared to by an image-text model (CLIMS).

Axes: B images, K foreground classes, D feature channels, n pairs of an image and a class that it shows, L background
texts, R related background texts, S side of the image-text model's input, H W pixels, h w cells.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from wsss_modules._checks import check_floating, check_ndim, check_shape
from wsss_modules._precision import at_least_float32
from wsss_modules._unit import unit

__all__ = [
    "CAMERA_READY_VOC_PROMPTS",
    "COCO_PROMPTS",
    "GENERAL_PROMPTS",
    "VOC_PROMPTS",
    "MaskedImagePairs",
    "MaskedPairs",
    "PromptSet",
    "SigmoidCAMHead",
    "SigmoidCAMOutput",
    "TextPromptBank",
    "image_text_similarity",
    "masked_image_pairs",
]

Normalization = tuple[Sequence[float], Sequence[float]]


class SigmoidCAMOutput(NamedTuple):
    """What `SigmoidCAMHead` returns.

    Attributes:
        activation: (B, K, H, W) in (0, 1), what the image is masked with in training.
        cam: (B, K, H, W) at least 0, the maps to use: the scores before the sigmoid, after a ReLU.
    """

    activation: Tensor
    cam: Tensor


class SigmoidCAMHead(nn.Module):
    """Class maps of a classifier without bias, through a sigmoid for training and a ReLU for use.

    Args:
        in_channels: D, channels of the features.
        num_classes: K, foreground classes.

    Shapes:
        features (B, D, H, W) -> `SigmoidCAMOutput`.

    Raises:
        ValueError: features without D channels.

    Paper:
        Xie, Hou, Ye and Shen, CLIMS: Cross Language Image Matching for Weakly Supervised Semantic Segmentation, CVPR
        2022, arXiv:2203.02668.

    Differences:
        The camera-ready version has a further channel that no loss reads and one more bottleneck before the classifier.

    Notes:
        The weights have the name and the shape of those of `CAMHead`, whose training CLIMS starts from:
        ``head.load_state_dict(trained.head.state_dict())``. Compiles with ``fullgraph=True``.

    Example:
        >>> import torch
        >>> out = SigmoidCAMHead(16, num_classes=20)(torch.rand(2, 16, 5, 7))
        >>> out.activation.shape, bool((out.activation < 1).all()), bool((out.cam >= 0).all())
        (torch.Size([2, 20, 5, 7]), True, True)
    """

    def __init__(self, in_channels: int, num_classes: int) -> None:
        super().__init__()
        self.classifier = nn.Conv2d(in_channels, num_classes, 1, bias=False)
        nn.init.xavier_uniform_(self.classifier.weight)

    def forward(self, features: Tensor) -> SigmoidCAMOutput:
        """Map the classes, see the class."""
        maps = self.class_maps(features)
        return SigmoidCAMOutput(maps.sigmoid(), F.relu(maps))

    def class_maps(self, features: Tensor) -> Tensor:
        """Signed class scores of each cell, (B, K, H, W)."""
        check_shape("features", features, (None, self.classifier.in_channels, None, None), "for this head")
        return self.classifier(features)


class MaskedPairs(NamedTuple):
    """The pairs of an image and a class that it shows, in the order of the images, then of the classes.

    Attributes:
        images: (2, n, C, S, S): the image through the map of the class, and through its complement. To encode all at
            once: ``encode_image(pairs.images.flatten(0, 1))``.
        image_index: (n,) int64 in 0..B-1.
        class_index: (n,) int64 in 0..K-1.
    """

    images: Tensor
    image_index: Tensor
    class_index: Tensor

    @property
    def foreground(self) -> Tensor:
        """(n, C, S, S), what the maps show."""
        return self.images[0]

    @property
    def background(self) -> Tensor:
        """(n, C, S, S), what the maps leave."""
        return self.images[1]


def masked_image_pairs(
    activation: Tensor,
    images: Tensor,
    labels: Tensor,
    *,
    size: int | tuple[int, int] = 224,
    image_norm: Normalization | None = None,
    encoder_norm: Normalization | None = None,
) -> MaskedPairs:
    r"""Each image through the map of each class that it shows, and through what the map leaves.

    .. math:: I^{fg}_i = M_{b k} \odot I_b, \qquad I^{bg}_i = (1 - M_{b k}) \odot I_b

    for the pairs i = (b, k) with ``labels[b, k] > 0.5``, map and image being resized to the input of an image-text
    model (bilinear, corners aligned).

    Args:
        activation: M, (B, K, h, w) floating point in [0, 1].
        images: I, (B, C, H, W) floating point, normalised, so that a pixel that is masked out takes the mean colour.
        labels: (B, K) multi-hot.
        size: side of the masked images in pixels, or (height, width).
        image_norm: (mean, std) of the normalisation that ``images`` went through.
        encoder_norm: (mean, std) that the image-text model wants instead. Both are given or none.

    Returns:
        `MaskedPairs`; images in the dtype of ``images``. A batch without a label has no pair.

    Raises:
        TypeError: ``activation`` or ``images`` is not floating point.
        ValueError: shapes don't match, or one of the normalisations without the other.

    Paper:
        Xie et al., CVPR 2022, arXiv:2203.02668.

    Differences:
        The released code stops with an error where a batch holds one pair, or none; labels other than 1 count for
        nothing there. It feeds the image-text model the normalisation of ImageNet, CLIP's being commented out, as does
        this without ``image_norm`` and ``encoder_norm``.

    Notes:
        Only maps of present classes are resized: n maps, not B K. The second normalisation is an affine map of the B
        images, not of the n pairs. Computed in float32 for half precision. The number of pairs depends on the data, so
        that it does not compile to one graph; asking for it is the only host synchronisation.

    Example:
        >>> import torch
        >>> labels = torch.tensor([[1, 0, 1], [0, 1, 0]])
        >>> pairs = masked_image_pairs(torch.rand(2, 3, 5, 5), torch.rand(2, 3, 40, 40), labels, size=32)
        >>> pairs.foreground.shape, pairs.image_index, pairs.class_index
        (torch.Size([3, 3, 32, 32]), tensor([0, 0, 1]), tensor([0, 2, 1]))
    """
    check_ndim("activation", activation, 4, "(B, K, h, w)")
    check_floating("activation", activation)
    check_shape("images", images, (len(activation), None, None, None), "(B, C, H, W) to match activation")
    check_floating("images", images)
    check_shape("labels", labels, activation.shape[:2], "to match activation")
    if (image_norm is None) != (encoder_norm is None):
        raise ValueError("image_norm, encoder_norm: expected both or none")
    height, width = (size, size) if isinstance(size, int) else size
    image_index, class_index = (labels > 0.5).nonzero(as_tuple=True)
    scenes = _resized(at_least_float32(images), (height, width))  # (B, C, S, S)
    if image_norm is not None and encoder_norm is not None:
        scenes = _renormalized(scenes, image_norm, encoder_norm)
    maps = at_least_float32(activation)[image_index, class_index][:, None]  # (n, 1, h, w)
    maps = _resized(maps, (height, width)).to(scenes.dtype)
    both = torch.stack([maps, 1 - maps])  # (2, n, 1, S, S)
    return MaskedPairs((both * scenes[image_index]).to(images.dtype), image_index, class_index)


class MaskedImagePairs(nn.Module):
    """Images through the maps of their classes, and through what these leave; see :func:`masked_image_pairs`.

    Args:
        size: side of the masked images in pixels, or (height, width).
        image_norm: (mean, std) of the normalisation that the images went through.
        encoder_norm: (mean, std) that the image-text model wants instead. Both are given or none.

    Example:
        >>> import torch
        >>> pairs = MaskedImagePairs(size=8)(torch.ones(1, 2, 4, 4), torch.rand(1, 3, 8, 8), torch.tensor([[0, 1]]))
        >>> bool((pairs.background.abs() < 1e-6).all())
        True
    """

    def __init__(
        self,
        *,
        size: int | tuple[int, int] = 224,
        image_norm: Normalization | None = None,
        encoder_norm: Normalization | None = None,
    ) -> None:
        super().__init__()
        if (image_norm is None) != (encoder_norm is None):
            raise ValueError("image_norm, encoder_norm: expected both or none")
        self.size, self.image_norm, self.encoder_norm = size, image_norm, encoder_norm

    def forward(self, activation: Tensor, images: Tensor, labels: Tensor) -> MaskedPairs:
        """Maps (B, K, h, w), images (B, C, H, W) and labels (B, K) -> masked images."""
        return masked_image_pairs(
            activation,
            images,
            labels,
            size=self.size,
            image_norm=self.image_norm,
            encoder_norm=self.encoder_norm,
        )

    def extra_repr(self) -> str:
        """Show the options."""
        return f"size={self.size}, image_norm={self.image_norm}, encoder_norm={self.encoder_norm}"


def image_text_similarity(image_features: Tensor, text_features: Tensor) -> Tensor:
    r"""Cosine of each image with its own text.

    .. math:: s_i = \frac{u_i \cdot v_i}{\|u_i\| \, \|v_i\|}

    without a scale and without a softmax.

    Args:
        image_features: u, (n, D) floating point.
        text_features: v, (n, D) floating point.

    Returns:
        (n,) in [-1, 1], in float32 for half precision, else in the dtype of ``image_features``. 0 where a row is zero.

    Raises:
        TypeError: features are not floating point.
        ValueError: shapes don't match.

    Paper:
        Xie et al., CVPR 2022, arXiv:2203.02668.

    Differences:
        The released code returns (n, 1, 1), and NaN for a row of zeros.

    Notes:
        For every image with every text: :func:`pairwise_cosine_similarity` with ``clamp=None``. In float32 under
        autocast too. Compiles with ``fullgraph=True``.

    Example:
        >>> import torch
        >>> image_text_similarity(torch.tensor([[3.0, 4.0], [0.0, 0.0]]), torch.tensor([[1.0, 0.0], [1.0, 0.0]]))
        tensor([0.6000, 0.0000])
    """
    check_ndim("image_features", image_features, 2, "(n, D)")
    check_floating("image_features", image_features)
    check_shape("text_features", text_features, image_features.shape, "to match image_features")
    check_floating("text_features", text_features)
    dtype = torch.promote_types(image_features.dtype, torch.float32)
    return (unit(image_features.to(dtype)) * unit(text_features.to(dtype))).sum(1)


@dataclass(frozen=True)
class PromptSet:
    """The words of a data set that an image-text model is asked for.

    Attributes:
        template: Sentence with ``{}`` in the place of a name.
        names: Class name -> what it is called in the sentence; others keep their name, ``_`` being a space.
        backgrounds: Things that are seen with the classes and belong to none.
        related: Class name -> such things that are seen with this class.
        weights: Class name -> weight of its pairs; others 1.
    """

    template: str = "a photo of {}."
    names: Mapping[str, str] = field(default_factory=dict)
    backgrounds: tuple[str, ...] = ()
    related: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    weights: Mapping[str, float] = field(default_factory=dict)

    def prompt(self, name: str) -> str:
        """The sentence for a class or a background."""
        return self.template.format(self.names.get(name, name).replace("_", " "))


_VOC_BACKGROUNDS = ("tree", "river", "sea", "lake", "water", "railway", "railroad", "track", "stone", "rocks")
_COCO_BACKGROUNDS = (
    "street sign, mountain, video game, men, track, bus stop, cabinet, tray, plate, shirt, city street, runway, tower, "
    "ramp, grass, pillow, urinal, lake, brick, fence, shower, airport, animal, shower curtain, road, mirror, jacket, "
    "church, snow, fruit, hay, floor, field, street, mouth, steam engine, cheese, river, tree branch, suit, child, "
    "soup, desk, tub, tennis court, teeth, bridge, sky, officer, sidewalk, dock, tree, court, rock, board, branch, "
    "pan, box, body, salad, dirt, leaf, hand, highway, vegetable, computer monitor, door, meat, pair, beach, harbor, "
    "ocean, baseball player, girl, market, window, blanket, boy, woman, bat, baby, flower, wall, bath tub, tarmac, "
    "tennis ball, roll, park"
)
_SPACED = {"diningtable": "dining table", "pottedplant": "potted plant", "tvmonitor": "tv monitor"}
_THRICE = ("chair", "diningtable", "dining table", "sofa")

GENERAL_PROMPTS = PromptSet(backgrounds=_VOC_BACKGROUNDS)
"""For any list of classes."""

VOC_PROMPTS = PromptSet(names={"person": "player", **_SPACED}, backgrounds=_VOC_BACKGROUNDS)
"""PASCAL VOC, the released version: people are called players."""

COCO_PROMPTS = PromptSet(names={"person": "player"}, backgrounds=tuple(_COCO_BACKGROUNDS.split(", ")))
"""COCO, the released version. Some of its backgrounds (woman, child, baseball player) speak against "player"."""

CAMERA_READY_VOC_PROMPTS = PromptSet(
    template="a photo of {}",
    related={
        "boat": ("river", "water", "lake", "sea", "building"),
        "train": ("railroad", "railway", "branches", "tree"),
    },
    weights=dict.fromkeys(_THRICE, 3.0),
)
"""PASCAL VOC, the camera-ready version: backgrounds for boat and train only, and three classes that count threefold."""


class TextPromptBank(nn.Module):
    """Features of the sentences about classes and backgrounds, encoded once.

    A sentence that occurs twice is encoded once, and a background that is also a class is left out: an image would be
    pushed to and from the same text.

    Args:
        classes: K class names.
        encode_text: a list of sentences -> (number of them, D), called once, without gradients.
        prompts: the words to use.

    Attributes:
        class_prompts: K sentences.
        background_prompts: L sentences.
        related_prompts: R sentences.
        class_features: (K, D).
        background_features: (L, D), L may be 0.
        related_features: (R, D) of all classes that have backgrounds of their own, R may be 0.
        related: (K, R) bool, which of these are of which class.
        class_weight: (K,).

    Shapes:
        class indices (n,) in 0..K-1 -> features (n, D) of their sentences.

    Raises:
        ValueError: no class, or features of another shape.

    Paper:
        Xie et al., CVPR 2022, arXiv:2203.02668.

    Differences:
        The released code tokenises and encodes all sentences anew three times a step.

    Notes:
        Features move with the module and are not part of its ``state_dict``: they follow from names and encoder.

    Example:
        >>> import torch
        >>> encode = lambda texts: torch.tensor([[len(text), text.count("a")] for text in texts]).float()
        >>> bank = TextPromptBank(["cat", "tree"], encode, GENERAL_PROMPTS)
        >>> bank.class_prompts, len(bank.background_prompts), bank(torch.tensor([1, 0])).shape
        (['a photo of cat.', 'a photo of tree.'], 9, torch.Size([2, 2]))
    """

    class_features: Tensor
    background_features: Tensor
    related_features: Tensor
    related: Tensor
    class_weight: Tensor

    def __init__(
        self, classes: Sequence[str], encode_text: Callable[[list[str]], Tensor], prompts: PromptSet = GENERAL_PROMPTS
    ) -> None:
        super().__init__()
        if len(classes) == 0:
            raise ValueError("classes: expected at least one name, got none")
        self.class_prompts = [prompts.prompt(name) for name in classes]
        self.background_prompts = self._without_classes(prompts, prompts.backgrounds)
        own = {name: self._without_classes(prompts, prompts.related.get(name, ())) for name in classes}
        self.related_prompts = list(dict.fromkeys(text for texts in own.values() for text in texts))
        sentences = list(dict.fromkeys([*self.class_prompts, *self.background_prompts, *self.related_prompts]))
        with torch.no_grad():
            features = encode_text(sentences).detach()
        check_shape("encode_text", features, (len(sentences), None), "for its sentences")
        place = {text: i for i, text in enumerate(sentences)}
        groups = {
            "class_features": self.class_prompts,
            "background_features": self.background_prompts,
            "related_features": self.related_prompts,
        }
        for name, texts in groups.items():
            index = torch.tensor([place[text] for text in texts], dtype=torch.long, device=features.device)
            self.register_buffer(name, features[index], persistent=False)
        related = torch.tensor(
            [[text in own[name] for text in self.related_prompts] for name in classes],
            dtype=torch.bool,
            device=features.device,
        ).reshape(len(classes), len(self.related_prompts))
        weight = torch.tensor([prompts.weights.get(name, 1.0) for name in classes], device=features.device)
        self.register_buffer("related", related, persistent=False)
        self.register_buffer("class_weight", weight, persistent=False)

    def forward(self, class_index: Tensor) -> Tensor:
        """Classes (n,) -> features of their sentences (n, D)."""
        return self.class_features[class_index]

    def _without_classes(self, prompts: PromptSet, backgrounds: Sequence[str]) -> list[str]:
        sentences = dict.fromkeys(prompts.prompt(name) for name in backgrounds)
        return [text for text in sentences if text not in self.class_prompts]


def _resized(maps: Tensor, size: tuple[int, int]) -> Tensor:
    if len(maps) == 0:  # interpolate refuses it; what comes back belongs to the graph of the maps all the same
        return maps.mean((2, 3), keepdim=True).expand(-1, -1, *size)
    if maps.shape[2:] == size:
        return maps
    return F.interpolate(maps, size, mode="bilinear", align_corners=True)


def _renormalized(images: Tensor, old: Normalization, new: Normalization) -> Tensor:
    """((x * std + mean) - new mean) / new std, channel by channel."""
    (mean, std), (new_mean, new_std) = (
        tuple(torch.tensor(tuple(values), dtype=images.dtype, device=images.device) for values in norm)
        for norm in (old, new)
    )
    scale, shift = std / new_std, (mean - new_mean) / new_std
    return images * scale[:, None, None] + shift[:, None, None]

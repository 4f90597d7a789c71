"""Image-text models that judge class maps (CLIMS): CLIP, a classifier read by the names of its classes, or one's own.

n images, L sentences, D features, S side of the images in pixels.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from recipes.pipeline.captions import train_on_captions
from recipes.pipeline.models import packaged_state_dict
from recipes.pipeline.run import Run
from recipes.pipeline.sentences import EncodeText, remembered, sentence_encoder
from recipes.pipeline.training import Schedule
from recipes.pipeline.views import view
from wsss_modules import FrozenClassifier, TextPromptBank, pairwise_cosine_similarity

CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)


class ImageTextModel(Protocol):
    """What the recipes ask of an image-text model; the cosine of two features says how well image and text match.

    ``image_tower``: normalised images (n, 3, S, S) to features (n, D), differentiable with respect to the images.
    ``encode_text``: L sentences to features (L, D), which are constants. ``size``: S. ``mean`` and ``std`` normalise
    images in [0, 1].
    """

    @property
    def image_tower(self) -> nn.Module: ...

    @property
    def size(self) -> int: ...

    @property
    def mean(self) -> tuple[float, ...]: ...

    @property
    def std(self) -> tuple[float, ...]: ...

    def encode_text(self, texts: Sequence[str]) -> Tensor: ...


@dataclass(frozen=True)
class ImageTextPair:
    """An :class:`ImageTextModel` put together from its parts."""

    image_tower: nn.Module
    text_tower: Callable[[Sequence[str]], Tensor]
    size: int
    mean: tuple[float, ...]
    std: tuple[float, ...]

    def encode_text(self, texts: Sequence[str]) -> Tensor:
        return self.text_tower(texts)


class ConvexCombination(nn.Module):
    """Images to the embeddings of the class names that a classifier sees in them, weighed by its probabilities.

    Paper: Norouzi et al., "Zero-Shot Learning by Convex Combination of Semantic Embeddings" (ConSE), ICLR 2014,
    arXiv:1312.5650.

    Args:
        classifier: images (n, 3, S, S) to logits (n, C).
        names: (C, D) embeddings of the names, of length 1.
        top: how many of the most probable classes count.
    """

    def __init__(self, classifier: nn.Module, names: Tensor, top: int = 10) -> None:
        super().__init__()
        self.classifier, self.top = classifier, top
        self.register_buffer("names", names, persistent=False)

    def forward(self, images: Tensor) -> Tensor:
        weights, classes = self.classifier(images).softmax(1).topk(self.top, dim=1)  # (n, top)
        weights = weights / weights.sum(1, keepdim=True)
        return (weights[..., None] * self.names[classes]).sum(1)


def conse_pair(encode: EncodeText, *, top: int = 10, random: bool = False) -> ImageTextPair:
    """EfficientNet-Lite0 with its ImageNet classifier, read by sentences about its classes.

    The sentences are WordNet's, "sorrel: a horse of a brownish orange to light brown color", since names alone
    ("sorrel", "ram") say too little: of 48 photographs of six animals, the class whose prompt is nearest is a tag of
    65 % with these, and of 50 % with the names.
    """
    name = "tf_efficientnet_lite0"
    classifier = timm.create_model(name)
    if not random:
        classifier.load_state_dict(packaged_state_dict(name))
    info = timm.data.ImageNetInfo()
    sentences = [info.index_to_description(k, detailed=True) for k in range(info.num_classes())]
    cfg = classifier.pretrained_cfg
    tower = ConvexCombination(classifier, F.normalize(encode(sentences), dim=1), top)
    return ImageTextPair(tower, encode, cfg["input_size"][-1], tuple(cfg["mean"]), tuple(cfg["std"]))


def open_clip_pair(name: str, weights: str | None, *, random: bool = False) -> ImageTextPair:
    """A CLIP of the package open_clip.

    Args:
        name: one of its architectures, such as ViT-B-32-quickgelu.
        weights: one of its names of weights, such as openai, or a file.
        random: take random weights instead.

    Raises:
        ValueError: the extra is not installed, or there are no such weights, or none are named.
    """
    try:
        import open_clip
    except ImportError as error:
        raise ValueError("critic: CLIP needs the extra: pip install 'wsss[clip]'") from error
    if name not in open_clip.list_models():
        known = "captions, conse, MODULE:FUNCTION or an architecture of open_clip"
        raise ValueError(f"critic.model: expected {known}, got {name!r}")
    if weights is None and not random:
        raise ValueError(f"critic.weights: expected a name of weights of {name}, such as openai, or a file; got none")
    try:
        clip = open_clip.create_model(name, pretrained=None if random else weights)
    except Exception as error:
        reason = f"{type(error).__name__}: {error}"
        raise ValueError(f"critic.weights: no weights {weights!r} of {name} ({reason}); give a file") from error
    tokenize, visual = open_clip.get_tokenizer(name), clip.visual
    size = visual.image_size if isinstance(visual.image_size, int) else visual.image_size[0]
    norm = (
        tuple(getattr(visual, part, None) or default)
        for part, default in zip(("image_mean", "image_std"), (CLIP_MEAN, CLIP_STD), strict=True)
    )
    clip.eval().requires_grad_(False)
    return ImageTextPair(visual, lambda texts: clip.encode_text(tokenize(list(texts))), size, *norm)


def own_pair(spec: str) -> ImageTextModel:
    """What the function MODULE:FUNCTION gives.

    Raises:
        ValueError: there is no such module, or no such function in it.
    """
    module, _, function = spec.partition(":")
    try:
        make = getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError, ValueError) as error:
        reason = f"{type(error).__name__}: {error}"
        raise ValueError(f"critic.model: expected MODULE:FUNCTION, {spec!r} can't be imported ({reason})") from error
    return make()


@dataclass(frozen=True)
class CriticConfig:
    """The image-text model that judges the maps, and what it is asked for."""

    model: str = "captions"
    """captions: trained on the captions of the data set; conse: an ImageNet classifier read by the embeddings of its
    class names; a CLIP of open_clip such as ViT-B-32-quickgelu; or MODULE:FUNCTION, which gives an ImageTextModel."""
    weights: str | None = None
    """CLIP: name of weights (openai) or a file."""
    size: int | None = None
    """Side of its images in pixels; by default its own."""
    top: int = 10
    """conse: how many of the most probable classes count."""
    renormalize: bool = True
    """Give it the normalisation that it was trained with; the released code keeps that of the classifier."""
    schedule: Schedule = field(default_factory=lambda: Schedule(epochs=10, batch_size=16, lr=0.005, head_lr=0.05))
    """captions: its training."""


def make_critic(run: Run, config: CriticConfig) -> ImageTextModel:
    """The image-text model of a run, its image tower frozen and on the run's device."""
    random = run.config.max_steps is not None
    if config.model == "captions":
        size = config.size or 128
        model = train_on_captions(run, config.schedule, size)
        tower, trunk = model.image_tower, model.image_tower.trunk
        pair: ImageTextModel = ImageTextPair(tower, model.encode_text, size, trunk.mean, trunk.std)
    elif config.model == "conse":
        encode = remembered(run.path("texts.npz"), sentence_encoder)
        pair = conse_pair(encode, top=config.top, random=random)
    elif ":" in config.model:
        pair = own_pair(config.model)
    else:
        pair = open_clip_pair(config.model, config.weights, random=random)
    frozen = FrozenClassifier(pair.image_tower).to(run.fabric.device, memory_format=torch.channels_last)
    return ImageTextPair(frozen, pair.encode_text, config.size or pair.size, tuple(pair.mean), tuple(pair.std))


@torch.no_grad()
def typical_similarity(run: Run, critic: ImageTextModel, bank: TextPromptBank, images: int = 256) -> dict[str, float]:
    """Mean cosine of whole training images with the texts of their tags, and with those of the other classes."""
    names = run.train[:images]
    sums = np.zeros((2, 2))
    with run.progress() as progress:
        for name in progress.track(names, description="similarity"):
            image = run.image(name)
            shown = view(image, (critic.size, critic.size), critic.mean, critic.std, flip=False)
            cosines = pairwise_cosine_similarity(critic.image_tower(shown), bank.class_features, clamp=None)[0].cpu()
            labels = torch.from_numpy(run.dataset.labels(name))
            sums += [[(cosines * mine).sum().item(), mine.sum().item()] for mine in (labels, 1 - labels)]
    of_tags, of_others = (total / max(count, 1) for total, count in sums)
    return {"of_tags": round(of_tags, 4), "of_other_classes": round(of_others, 4)}

"""A small image-text model trained on the captions of a data set: a backbone, and the words of a sentence.

n images or sentences, V words, D features.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import Dataset
from torchvision import tv_tensors
from torchvision.transforms import v2

from recipes.pipeline.data import ImageSet
from recipes.pipeline.models import Trunk, build_trunk, freeze_stages
from recipes.pipeline.run import Run
from recipes.pipeline.training import Moment, RandomScale, Schedule, crop_transform, fit, two_speed_groups


class ImageTower(nn.Module):
    """Pooled features of a backbone, projected to D."""

    def __init__(self, trunk: Trunk, dim: int) -> None:
        super().__init__()
        self.trunk, self.projection = trunk, nn.Linear(trunk.out_channels, dim)

    def forward(self, images: Tensor) -> Tensor:
        return self.projection(self.trunk(images).final.mean((2, 3)))


class CaptionModel(nn.Module):
    """An image tower, and the mean of the embeddings of the words of a sentence.

    Args:
        trunk: the backbone.
        words: the vocabulary; other words are left out of a sentence.
        dim: D, width of the tokens.
    """

    def __init__(self, trunk: Trunk, words: Sequence[str], dim: int = 64) -> None:
        super().__init__()
        self.image_tower = ImageTower(trunk, dim)
        self.place = {word: place for place, word in enumerate(words)}
        self.words = nn.Embedding(len(words), dim)
        nn.init.normal_(self.words.weight, std=dim**-0.5)
        self.log_scale = nn.Parameter(torch.tensor(math.log(10.0)))

    def forward(self, images: Tensor, counts: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Images and the words (n, V) of their captions -> unit features of both, and the scale of their cosines."""
        scale = self.log_scale.clamp(max=math.log(100.0)).exp()
        return F.normalize(self.image_tower(images), dim=1), F.normalize(self.from_counts(counts), dim=1), scale

    def from_counts(self, counts: Tensor) -> Tensor:
        return counts @ self.words.weight / counts.sum(1, keepdim=True).clamp(min=1)

    def count(self, text: str) -> Tensor:
        """(V,) how often each word occurs."""
        places = [self.place[word] for word in words_of(text) if word in self.place]
        return torch.bincount(torch.tensor(places, dtype=torch.long), minlength=len(self.place)).float()

    @torch.no_grad()
    def encode_text(self, texts: Sequence[str]) -> Tensor:
        """Sentences -> (number of them, D)."""
        return self.from_counts(torch.stack([self.count(text) for text in texts]).to(self.words.weight.device))


class CaptionedCrops(Dataset):
    """``image`` (3, size, size) and ``words`` (V,) of its caption."""

    def __init__(self, dataset: ImageSet, names: Sequence[str], transform: v2.Transform, model: CaptionModel) -> None:
        self.dataset, self.names, self.transform = dataset, names, transform
        self.counts = torch.stack([model.count(dataset.caption(name)) for name in names])

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        image = self.transform(tv_tensors.Image(self.dataset.image(self.names[index])))
        return {"image": image.as_subclass(Tensor), "words": self.counts[index]}


def symmetric_cross_entropy(images: Tensor, texts: Tensor, counts: Tensor, scale: Tensor) -> Tensor:
    """CLIP's loss: each image should find its caption among those of the batch, and each caption its image.

    Equal captions share what is right. ``images`` and ``texts``: (n, D) of length 1; ``counts``: (n, V).
    """
    logits = scale * images @ texts.T  # (n, n)
    alike = (counts[:, None] == counts[None]).all(2).to(logits.dtype)
    target = alike / alike.sum(1, keepdim=True)  # symmetric up to the order of equal rows
    return (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2


def train_on_captions(
    run: Run, schedule: Schedule, size: int, backbone: str = "tf_efficientnet_lite0", frozen_stages: int = 3
) -> CaptionModel:
    """Train on the captions of the training images, ``size`` pixels on a side.

    Raises:
        ValueError: there are no captions.
    """
    captions = [run.dataset.caption(name) for name in run.train]
    if not all(captions):
        missing = next(name for name, caption in zip(run.train, captions, strict=True) if not caption)
        raise ValueError(
            f"critic.model: captions needs a caption of each training image, {missing} has none; take conse or CLIP"
        )
    trunk = build_trunk(backbone, run.weights("imagenet"))
    freeze_stages(trunk.body, frozen_stages)
    model = CaptionModel(trunk, sorted({word for caption in captions for word in words_of(caption)}))
    transform = crop_transform(RandomScale(0.8, 1.2), size, trunk.mean, trunk.std)
    crops = CaptionedCrops(run.dataset, run.train, transform, model)

    def loss_of(wrapped: nn.Module, batch: dict[str, Tensor], at: Moment) -> Tensor:
        images, texts, scale = wrapped(batch["image"], batch["words"])
        return symmetric_cross_entropy(images, texts, batch["words"], scale)

    groups = two_speed_groups(model, [model.image_tower.projection, model.words], schedule)
    fit(run, "captions", model, crops, loss_of, groups, schedule)
    return model


def words_of(text: str) -> list[str]:
    return re.findall(r"[a-z]+", text.lower())

# /// script
# requires-python = ">=3.10"
# dependencies = ["wsss[recipes,weights]"]
# ///
"""RW (PSA): Learning Pixel-level Semantic Affinity with Image-level Supervision for WSSS (Ahn, Kwak, CVPR 2018).

Affinities of near pixels, learnt from the confident areas of the CAMs and no other label, spread the CAMs by a random
walk.

    python -m recipes run rw                                        # built-in demo data, two CPU cores
    python -m recipes run rw --preset paper --data voc:PATH --classify.weights FILE --affinity.weights FILE
    python -m recipes run rw --preset paper --data voc:PATH --devices 8 ...

Published with ResNet-38 on VOC 2012 train: CAM 47.7, after the walk 61.0 mIoU (README of the released code, whose
exponents of the background are 4, 32 and 16 as in ``paper``; those of the submission were 4, 24 and 16). The released
optimiser passes the weight decay as SGD's momentum, so that its momentum is 5e-4; ``paper`` does the same, since .9 at
this learning rate is a step ten times as large.
"""

from __future__ import annotations

import sys
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import Dataset
from torchvision import tv_tensors

from recipes.cli import run_recipe
from recipes.pipeline.cams import read_cam, write_cams
from recipes.pipeline.classification import check_backbones, make_trunk, train_classifier
from recipes.pipeline.files import load_arrays, save_arrays
from recipes.pipeline.labels import measure_cams, refine_masks, write_masks
from recipes.pipeline.models import Trunk
from recipes.pipeline.report import finish
from recipes.pipeline.run import Run, start
from recipes.pipeline.segmentation import segmentation_from_masks
from recipes.pipeline.training import Moment, RandomScale, crop_transform, fit, two_speed_groups
from recipes.pipeline.views import view
from recipes.settings.rw import PRESETS, AffinityConfig, Config, WalkConfig
from wsss_losses import AffinityLoss
from wsss_modules import (
    PSA_CRF,
    AffinityHead,
    LocalAffinity,
    RandomWalk,
    affinity_labels,
    affinity_offsets,
    background_score,
    confident_label,
    crf_kernels,
    dense_crf,
    propagate_cam,
    unary_from_scores,
    upsample_scores,
)

__all__ = ["PRESETS", "Config", "main"]

STRIDE = 8


class AffinityNet(nn.Module):
    """Images to the affinity of near pixels at stride 8: section 3.2."""

    def __init__(self, trunk: Trunk, config: AffinityConfig) -> None:
        super().__init__()
        self.trunk = trunk
        trunk.freeze_unused((-3, -2, -1))
        self.head = AffinityHead(trunk.level_channels[-3:], radius=config.radius, border=config.border)

    def maps(self, images: Tensor) -> list[Tensor]:
        levels = self.trunk(images).levels[-3:]
        size = (-(-images.shape[-2] // STRIDE), -(-images.shape[-1] // STRIDE))
        return [F.interpolate(level, size, mode="bilinear", align_corners=False) for level in levels]

    def forward(self, images: Tensor) -> Tensor:
        return self.head(*self.maps(images))

    def affinity(self, images: Tensor) -> LocalAffinity:
        return self.head.local_affinity(*self.maps(images))


class Scores(NamedTuple):
    """CRF scores of background and the k present classes, under a strong and a weak background."""

    keys: np.ndarray
    low: np.ndarray
    high: np.ndarray


class ConfidentCrops(Dataset):
    """``image`` (3, crop, crop) and ``mask`` (crop / 8, crop / 8): confident labels of section 3.1, 255 elsewhere."""

    def __init__(self, run: Run, config: AffinityConfig, trunk: Trunk) -> None:
        self.run, self.names = run, run.train
        self.transform = crop_transform(
            RandomScale(1.0, 1.0), config.crop, trunk.mean, trunk.std, jitter=True, mask_fill=0
        )

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        name = self.names[index]
        keys, low, high = read_scores(self.run, name)
        stacked = tv_tensors.Mask(torch.from_numpy(np.concatenate([low, high])))
        image, stacked = self.transform(tv_tensors.Image(self.run.dataset.image(name)), stacked)
        pooled = F.avg_pool2d(stacked.as_subclass(Tensor)[None], STRIDE)
        compact = confident_label(*pooled.chunk(2, dim=1))[0]
        classes = torch.full((256,), 255)
        classes[: 1 + len(keys)] = torch.from_numpy(np.append(0, keys))
        return {"image": image.as_subclass(Tensor), "mask": classes[compact]}


def write_scores(run: Run, config: AffinityConfig) -> None:
    """CAMs with a strong and with a weak background score, each refined by the CRF over the photograph."""

    @torch.no_grad()
    def work(name: str) -> None:
        cam, keys = read_cam(run, name).tensors(run.fabric.device)
        kernels = crf_kernels(run.image(name)[None], PSA_CRF)
        low, high = (
            dense_crf(kernels, unary_from_scores(torch.cat([background_score(cam, alpha), cam], 1)), PSA_CRF)[0]
            for alpha in (config.low_alpha, config.high_alpha)
        )
        arrays = {"keys": keys, "low": low.half(), "high": high.half()}
        save_arrays(run.path("crf", f"{name}.npz"), **{part: array.cpu().numpy() for part, array in arrays.items()})

    run.for_each(run.train, lambda name: run.path("crf", f"{name}.npz"), work)


def read_scores(run: Run, name: str) -> Scores:
    stored = load_arrays(run.path("crf", f"{name}.npz"))
    return Scores(stored["keys"], stored["low"].astype(np.float32), stored["high"].astype(np.float32))


def train_affinity(run: Run, classifier: Trunk | None, options: AffinityConfig) -> AffinityNet:
    trunk = make_trunk(run, options, output_stride=16, classifier=classifier)
    model = AffinityNet(trunk, options)
    loss = AffinityLoss(sync=run.fabric.world_size > 1)

    def loss_of(model: nn.Module, batch: dict[str, Tensor], at: Moment) -> NamedTuple:
        return loss(model(batch["image"]), affinity_labels(batch["mask"], options.radius, border=options.border))

    groups = two_speed_groups(model, [model.head], options.schedule, double_biases=True)
    fit(run, "affinity", model, ConfidentCrops(run, options, trunk), loss_of, groups, options.schedule)
    return model


def write_walks(run: Run, model: AffinityNet, walk: WalkConfig) -> None:
    """Section 3.3: CAMs and background score walk together at stride 8; the mask is the argmax at full size."""
    model.to(run.fabric.device, memory_format=torch.channels_last)

    def mask_of(name: str) -> Tensor:
        (cam, keys), image = read_cam(run, name).tensors(run.fabric.device), run.image(name)
        size = tuple(image.shape[-2:])
        plain = view(image, size, model.trunk.mean, model.trunk.std, flip=False)
        affinity = model.affinity(F.pad(plain, (0, -size[1] % STRIDE, 0, -size[0] % STRIDE)))
        options = {"beta": walk.beta, "n_steps": walk.steps, "method": walk.method}
        walked = propagate_cam(cam, affinity, alpha=walk.alpha, background=walk.background, stride=STRIDE, **options)
        best = upsample_scores(walked, size, stride=STRIDE)[0].argmax(0)
        return F.pad(keys, (1, 0))[best]

    write_masks(run, run.train, mask_of)


def refine_with_rw(
    run: Run, classifier: Trunk | None, affinity: AffinityConfig, walk: WalkConfig, mask_crf: bool
) -> None:
    """What PSA adds to any CAMs: from those in ``cam/`` to masks in ``mask/`` and, with a CRF, ``mask_crf/``.

    ``classifier`` is the backbone from which the affinity network starts, where it has the same architecture; None: it
    starts from other weights.
    """
    with run.stage("labels", "Confident areas: CRF under a strong and a weak background"):
        write_scores(run, affinity)

    with run.stage("affinity", "Affinity network"):
        net = train_affinity(run, classifier, affinity)

    with run.stage("masks", "Masks: random walk, and a dense CRF"):
        write_walks(run, net, walk)
        refine_masks(run, mask_crf)


def check(affinity: AffinityConfig, walk: WalkConfig, backbone: str) -> None:
    """Refuse what would only stop the run after the training of the classifier, which has this ``backbone``."""
    if affinity.weights == "classifier":
        check_backbones(affinity.backbone, backbone)
    affinity_offsets(affinity.radius)
    RandomWalk(walk.beta, walk.steps, walk.method)


def main(config: Config) -> dict:
    check(config.affinity, config.walk, config.classify.backbone)
    run = start("rw", config)

    with run.stage("classify", "Classifier from tags"):
        classifier = train_classifier(run, config.classify)

    with run.stage("cams", "Class activation maps"):
        write_cams(run, classifier, run.train + run.val, config.cams)
        measure_cams(run, config.threshold)

    refine_with_rw(run, classifier.trunk, config.affinity, config.walk, config.mask_crf)

    with run.stage("segment", "Segmentation network from the masks"):
        segmentation_from_masks(run, "mask_crf" if config.mask_crf else "mask", config.segment)

    return finish(run)


if __name__ == "__main__":
    run_recipe(sys.modules[__name__])

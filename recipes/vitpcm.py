# /// script
# requires-python = ">=3.10"
# dependencies = ["wsss[recipes,weights]"]
# ///
"""ViT-PCM: Max Pooling with Vision Transformers Reconciles Class and Shape in WSSS (Rossetti et al., ECCV 2022).

No CAM: each patch of a transformer is classified by a softmax over background and classes, and the image has what its
surest patch has. Predictions on a transformed image supervise those on another transform of it. What the patches say,
corrected by the tags and refined by a CRF, is the mask.

    python -m recipes run vitpcm                                    # built-in demo data, two CPU cores
    python -m recipes run vitpcm --preset small --data voc:PATH
    python -m recipes run vitpcm --preset paper --data voc:PATH --devices 4

Supervision: the released training reads the labels of an image off its pixel mask, that of the background included,
and keeps the checkpoint with the best mIoU on the masks of the validation images. This recipe uses tags only: the
background is there in every image, and the last checkpoint counts, but for ``--oracle-checkpoint-selection``.
Published with ViT-B/16 for VOC 2012 (with the authors' supervision, and the true tags also on val): masks 71.4 on
train, 69.3 on val.

``paper`` starts from a ViT-B/16 of 384 pixels; the other presets put four new blocks behind EfficientNet-Lite0. Images
are cropped to squares, where the authors squeeze them; at test time, where they squeeze them to 960 x 960 pixels, they
keep their shape, and the mirror image is seen too. Segmentation networks are not part of the released code: the last
stage is that of the other recipes.
"""

from __future__ import annotations

import sys
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from recipes.cli import run_recipe
from recipes.pipeline.attention import AttendingTrunk, freeze_but_last
from recipes.pipeline.cams import read_cam, share_of_classes, write_maps
from recipes.pipeline.labels import measure_cams, refine_masks, threshold_mask, write_masks
from recipes.pipeline.oracle import Choose, choose_by_masks, judges
from recipes.pipeline.report import finish
from recipes.pipeline.run import Run, start
from recipes.pipeline.segmentation import segmentation_from_masks
from recipes.pipeline.training import Moment, RandomLongSide, TaggedCrops, crop_transform, fit, two_speed_groups
from recipes.pipeline.views import views
from recipes.settings.vitpcm import PRESETS, Config, PatchConfig
from wsss_losses import multi_label_soft_margin_loss, patch_equivariance_loss, pooled_probability_bce_loss
from wsss_modules import (
    DEEPLAB_CRF,
    HVBiLSTM,
    PatchClassifierGMP,
    PatchClassifierOutput,
    PatchTransform,
    dense_crf,
    equivariance_target,
    merge_class_labels,
    mosaic2x2,
    split2x2,
    unary_from_scores,
)

__all__ = ["PRESETS", "Config", "main"]

THRESHOLD = 0.5  # of a class against the background: where it is the likelier of the two


class PatchNet(nn.Module):
    """Patches of a transformer that know their row and column, and their classes: section 3.2 and 3.3."""

    def __init__(self, trunk: AttendingTrunk, num_classes: int, config: PatchConfig) -> None:
        super().__init__()
        self.trunk = trunk
        self.lstm = HVBiLSTM(trunk.out_channels, config.hidden, config.dropout)
        self.classifier = PatchClassifierGMP(self.lstm.out_dim, 1 + num_classes, config.dropout)

    def forward(self, images: Tensor) -> PatchClassifierOutput:
        return self.classify(self.trunk.stem(images))

    def classify(self, stem: tuple[Tensor, ...]) -> PatchClassifierOutput:
        return self.classifier(self.lstm(self.trunk.encode(stem, attention=False).final))


class Views(NamedTuple):
    """What a step sees: scores of the first view and of the second one, and what the second should be."""

    first: PatchClassifierOutput
    second: Tensor
    target: Tensor


class TwoViews(nn.Module):
    """Two views of each image: the first supervises the second, section 3.4."""

    def __init__(self, net: PatchNet, config: PatchConfig) -> None:
        super().__init__()
        self.net, self.config = net, config
        patch, side, crop = net.trunk.output_stride, config.crop, config.view_crop
        if side < 1 or side % (2 * patch):
            raise ValueError(f"patches.crop: expected a multiple of two patches, {2 * patch} pixels, got {side}")
        if config.crop_probability > 0 and not patch <= crop <= side:
            raise ValueError(f"patches.view_crop: expected {patch} to {side} pixels, a patch to the image, got {crop}")

    def forward(self, images: Tensor, labels: Tensor) -> Views:
        batch, side, patch = len(images), images.shape[-1], self.net.trunk.output_stride
        half = (side // 2, side // 2)
        cut = {"crop_probability": self.config.crop_probability, "crop": self.config.view_crop, "lattice": patch}
        first = PatchTransform.draw(batch).to(images.device)
        second = PatchTransform.draw(batch, grid=(side, side), size=half, **cut).to(images.device)
        stem = self.net.trunk.stem(recolour(first.apply(images)))
        out = self.net.classify(stem)
        with torch.no_grad():  # the same images without dropout; the convolutional part has none and is shared
            was_training = self.net.training
            self.net.eval()
            probs = self.net.classify(tuple(level.detach() for level in stem)).probs
            self.net.train(was_training)
        target = equivariance_target(probs, labels, first, second.on_patches(patch))
        views = recolour(second.apply(images))
        tiled = self.config.mosaic and batch % 4 == 0
        seen = self.net(mosaic2x2(views) if tiled else views).probs
        return Views(out, split2x2(seen) if tiled else seen, target)


def recolour(images: Tensor) -> Tensor:
    """Contrast by a factor of .5 to 2 and saturation by .5 to 1.5 of normalised images, different for each.

    The authors also shift hues by up to .1 and make one image in ten grey; what they do to brightness has no effect.
    """
    contrast, saturation = (
        torch.rand(2, len(images), 1, 1, 1) * torch.tensor([1.5, 1.0]).view(2, 1, 1, 1, 1) + 0.5
    ).to(images.device)
    grey, level = images.mean(1, keepdim=True), images.mean((1, 2, 3), keepdim=True)
    return (grey + saturation * (images - grey) - level) * contrast + level


class PatchTerms(NamedTuple):
    """``total``: the sum of the terms: of tags, between views, of the classifier's weights."""

    total: Tensor
    tags: Tensor
    equivariance: Tensor
    penalty: Tensor


def with_background(labels: Tensor) -> Tensor:
    """Tags (B, K) to labels (B, 1 + K): the background is there in every image."""
    return F.pad(labels, (1, 0), value=1.0)


def oracle(run: Run, net: PatchNet, scale: float) -> Choose:
    """After each epoch, the mIoU of the likeliest classes on the val list, the tags known."""
    return choose_by_masks(
        run, "val", net, lambda name: patch_scores(run, net, name, scale).argmax(0), lambda at: at.in_epoch == 1
    )


def train(run: Run, net: PatchNet, config: PatchConfig, choose: Choose | None = None) -> None:
    """New layers first, then all that is trained."""
    model = TwoViews(net, config)
    bare = net.classifier

    def loss_of(wrapped: nn.Module, batch: dict[str, Tensor], at: Moment) -> PatchTerms:
        labels = with_background(batch["labels"])
        views: Views = wrapped(batch["image"], labels)
        if config.exact:
            tags = multi_label_soft_margin_loss(views.first.pooled_logits, labels)
        else:
            tags = pooled_probability_bce_loss(views.first.pooled, labels)
        between = patch_equivariance_loss(views.second, views.target)
        penalty = bare.l2_penalty(config.l2)
        return PatchTerms(tags + config.equivariance_weight * between + penalty, tags, between, penalty)

    trunk = net.trunk
    transform = crop_transform(RandomLongSide(*config.long_side), config.crop, trunk.mean, trunk.std)
    crops = TaggedCrops(run.dataset, run.train, transform)
    if trunk.body is None and config.trained_blocks is not None:
        freeze_but_last(trunk, config.trained_blocks)
    heads = [net.lstm, net.classifier, *trunk.new]
    pretrained = trunk.pretrained()
    for parameter in pretrained:
        parameter.requires_grad_(False)
    fit(run, "patches", model, crops, loss_of, two_speed_groups(model, heads, config.first), config.first)
    for parameter in pretrained:
        parameter.requires_grad_(True)
    groups = two_speed_groups(model, heads, config.schedule)
    fit(run, "classify", model, crops, loss_of, groups, config.schedule, choose=choose)


def patch_scores(run: Run, net: PatchNet, name: str, scale: float) -> Tensor:
    """Scores of background and tagged classes (1 + K, H, W), which add up to 1: of an image and its mirror image."""
    image = run.image(name)
    labels = torch.from_numpy(run.dataset.labels(name))[None].to(run.fabric.device)
    (both,) = views(image, net.trunk, (scale,), multiple=net.trunk.output_stride)
    plain, mirrored = net(both).probs
    merged = merge_class_labels(((plain + mirrored.flip(-1)) / 2)[None], with_background(labels))
    return F.interpolate(merged, image.shape[-2:], mode="bilinear", align_corners=False)[0]


def write_seeds(run: Run, net: PatchNet, scale: float) -> None:
    """Keep each class's share against the background, so that 0.5 is where they are equal."""

    def maps_of(name: str) -> dict[str, Tensor]:
        keys = torch.from_numpy(run.dataset.labels(name)).nonzero()[:, 0] + 1
        scores = patch_scores(run, net, name, scale)
        return {"keys": keys, "cam": share_of_classes(scores[F.pad(keys, (1, 0)).to(scores.device)])}

    write_maps(run, run.train + run.val, maps_of)


def crf_mask(run: Run, name: str) -> Tensor:
    """The scores of an image refined by a dense CRF with DeepLab's settings, as published."""
    cam, keys = read_cam(run, name).tensors(run.fabric.device)
    share = cam.clamp(max=1 - 1e-3)  # kept in half precision
    odds = torch.cat([share.new_ones(1, 1, *share.shape[2:]), share / (1 - share)], 1)
    scores = odds / odds.sum(1, keepdim=True)
    best = dense_crf(run.image(name)[None], unary_from_scores(scores), DEEPLAB_CRF)[0].argmax(0)
    return F.pad(keys, (1, 0))[best]


def main(config: Config) -> dict:
    if config.test_scale <= 0:
        raise ValueError(f"test_scale: expected a number above 0, got {config.test_scale}")
    run = start("vitpcm", config, takes=())
    if config.oracle_checkpoint_selection:
        judges(run, "val")  # or a word that there are none

    with run.stage("classify", "Classes of patches from tags, and two views of each image"):
        trunk = AttendingTrunk(config.tokens, weights=run.weights(config.tokens.weights))
        net = PatchNet(trunk, len(run.dataset.classes), config.patches)
        choose = oracle(run, net, config.test_scale) if config.oracle_checkpoint_selection else None
        train(run, net, config.patches, choose)

    with run.stage("cams", "Classes of patches, corrected by the tags"):
        write_seeds(run, net, config.test_scale)
        measure_cams(run, THRESHOLD)

    with run.stage("masks", "Masks: the likeliest class, and a dense CRF"):
        write_masks(run, run.train, lambda name: threshold_mask(run, name, THRESHOLD))
        refine_masks(run, config.mask_crf, lambda name: crf_mask(run, name))

    with run.stage("segment", "Segmentation network from the masks"):
        segmentation_from_masks(run, "mask_crf" if config.mask_crf else "mask", config.segment)

    return finish(run)


if __name__ == "__main__":
    run_recipe(sys.modules[__name__])

# /// script
# requires-python = ">=3.10"
# dependencies = ["wsss[recipes,weights]"]
# ///
"""AFA: Learning Affinity from Attention, End-to-End WSSS with Transformers (Ru et al., CVPR 2022).

One network, one training. In each step the CAMs of the batch become pseudo labels, refined by the pixels (PAR); these
say which cells are alike, which teaches an affinity that is read off the attention; the affinity corrects the CAMs by a
step of a random walk, and what comes out trains the decoder, whose masks are the result.

    python -m recipes run afa                                       # built-in demo data, two CPU cores
    python -m recipes run afa --preset small --data voc:PATH
    python -m recipes run afa --preset paper --data voc:PATH --devices 2

``paper`` starts from MiT-B1; the other presets put four new blocks behind EfficientNet-Lite0. Published for VOC 2012
val: 66.0 mIoU with a CRF; the authors' log, without one, peaks at 63.8 in 18,000 of 20,000 steps and ends lower, and
they test that checkpoint. Here it is the last one: none is chosen on masks. Their crops are drawn from images scaled by
0.5 to 2; ours from a range of sizes. They test images whose longer side is brought to 512 pixels; here images keep
their size. The regulariser of the paper is commented out in their code and absent here.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from recipes.cli import run_recipe
from recipes.pipeline.attention import Attended, AttendingTrunk, freeze_norms
from recipes.pipeline.cams import write_maps
from recipes.pipeline.labels import measure_cams, refine_masks, write_masks
from recipes.pipeline.report import finish
from recipes.pipeline.run import Run, start
from recipes.pipeline.segmentation import keep_and_measure
from recipes.pipeline.segmenter import SegFormer, SegFormerConfig, SegFormerHead
from recipes.pipeline.training import FramedCrops, Moment, RandomLongSide, crop_transform, fit, two_speed_groups
from recipes.pipeline.views import scaled_size, views
from recipes.settings.afa import PRESETS, AFAConfig, Config
from wsss_losses import AFALoss, AFATerms, afa_loss
from wsss_modules import (
    AffinityRandomWalk,
    AttentionAffinityHead,
    CAMHead,
    PixelAdaptiveRefinement,
    denormalize_images,
    labels_to_affinity,
    merge_multiscale_cams,
    refine_cam_with_background,
    refine_scores,
    refine_walked_scores,
)

__all__ = ["PRESETS", "Config", "main"]


class AFAOutput(NamedTuple):
    """Scores of the image (B, K), of the decoder (B, 1 + K, h, w), affinities (B, N, N) and the grid of their cells."""

    logits: Tensor
    seg_logits: Tensor
    affinity: Tensor
    grid: tuple[int, int]


@torch.no_grad()
def start_as_likeness(head: AttentionAffinityHead, head_width: int) -> None:
    """Read the mean of scaled logits, above 1/2 from half of that which a new block gives a token for itself."""
    head.proj.weight.fill_(1 / head.proj.in_channels)
    head.proj.bias.fill_(-(head_width**0.5))  # both directions are added: half of 2 sqrt(d)


class AFANet(nn.Module):
    """A transformer with a classifier, a decoder, and an affinity that is read off its attention: section 3."""

    def __init__(self, trunk: AttendingTrunk, num_classes: int, config: AFAConfig) -> None:
        super().__init__()
        self.trunk, self.mean, self.std = trunk, trunk.mean, trunk.std
        self.classifier = CAMHead(trunk.out_channels, num_classes, pool="max")
        self.affinity = AttentionAffinityHead(trunk.num_maps)
        self.logit_scale = 1.0
        if config.scaled_logits:
            self.logit_scale = trunk.head_width**-0.5
            start_as_likeness(self.affinity, trunk.head_width)
        self.decoder = SegFormerHead(trunk.level_channels, config.decoder_dim, 1 + num_classes)

    def forward(self, images: Tensor) -> AFAOutput:
        seen: Attended = self.trunk(images)
        scores = self.classifier(seen.final).logits, self.decoder(seen.levels)
        return AFAOutput(*scores, self.affinity_of(seen), tuple(seen.final.shape[-2:]))

    def affinity_of(self, seen: Attended) -> Tensor:
        return self.affinity([self.logit_scale * logits for logits in seen.attentions])

    def localise(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Signed CAMs (B, K, h, w) and affinities; the decoder is left out."""
        seen: Attended = self.trunk(images)
        return self.classifier.class_maps(seen.final), self.affinity_of(seen)


class Localised(NamedTuple):
    """``cam`` (B, K, H, W) in [0, 1], and affinity (B, N, N) and grid of one view."""

    cam: Tensor
    affinity: Tensor
    grid: tuple[int, int]


def localise(model: AFANet, views: Sequence[Tensor], size: tuple[int, int], walked: int) -> Localised:
    """CAMs merged over ``views``, each (2 B, 3, h, w): images and their mirror images; affinity of view ``walked``."""
    maps, affinities = zip(*(model.localise(x) for x in views), strict=True)
    cam, affinity = merge_multiscale_cams([x.float() for x in maps], size), affinities[walked][: len(views[0]) // 2]
    return Localised(cam, affinity.float(), tuple(maps[walked].shape[-2:]))


@torch.no_grad()
def pseudo_labels(
    run: Run, model: AFANet, batch: dict[str, Tensor], config: AFAConfig, walk: bool
) -> tuple[Tensor, Tensor]:
    """What a step learns from: PAR's labels of the CAMs, and those for the decoder, which have walked if ``walk``."""
    images, labels, size = batch["image"], batch["labels"], tuple(batch["image"].shape[-2:])
    sizes = [scaled_size(*size, s) for s in config.cam_scales]
    scaled = [F.interpolate(images, side, mode="bilinear", align_corners=False) for side in sizes]
    was_training = model.training
    model.eval()  # the released code lets drop path run here
    largest = config.cam_scales.index(max(config.cam_scales))
    with run.fabric.autocast():
        found = localise(model, [torch.cat([x, x.flip(-1)]) for x in scaled], size, largest)
    model.train(was_training)
    pixels, refine = denormalize_images(images, model.mean, model.std), par(config)
    options = {"regions": batch["region"]}
    plain = refine_cam_with_background(pixels, found.cam, labels, refine, low=config.low, high=config.high, **options)
    if not walk:
        return plain, plain
    coarse = F.interpolate(found.cam, found.grid, mode="bilinear", align_corners=False)
    low, high = AffinityRandomWalk(config.radius, backgrounds=(config.low, config.high))(coarse, found.affinity, labels)
    return plain, refine_walked_scores(pixels, low, high, labels, refine, **options)


def par(config: AFAConfig) -> PixelAdaptiveRefinement:
    return PixelAdaptiveRefinement(config.dilations, config.par_steps)


def check(config: Config) -> None:
    """Say what is wrong with settings that are first read when the tags are learnt."""
    par(config.afa)
    AffinityRandomWalk(config.afa.radius)
    AFALoss(seg_weight=config.afa.seg_weight, affinity_weight=config.afa.affinity_weight)
    if config.afa.low > config.afa.high:
        raise ValueError(f"afa.low: expected at most afa.high = {config.afa.high}, got {config.afa.low}")
    sizes = {"afa.cam_scales": config.afa.cam_scales, "scales": config.scales, "test_scales": config.test_scales}
    for name, scales in sizes.items():
        if not scales or min(scales) <= 0:
            raise ValueError(f"{name}: expected at least one size, each above 0, got {scales}")


def train(run: Run, model: AFANet, config: AFAConfig) -> None:
    """Tags alone, then labels made of the CAMs, then labels that have walked over the affinity."""

    def loss_of(wrapped: nn.Module, batch: dict[str, Tensor], at: Moment) -> AFATerms:
        out: AFAOutput = wrapped(batch["image"])
        progress, several = at.step / at.steps, run.fabric.world_size > 1
        if progress < config.tags_only:
            weights = {"seg_weight": 0.0, "affinity_weight": 0.0}
            terms = afa_loss(out.logits, None, None, batch["labels"], None, None, **weights, sync=several)
            if several:  # every process must see a gradient, also of what is not learnt yet
                terms = terms._replace(total=terms.total + 0 * (out.seg_logits.sum() + out.affinity.sum()))
            return terms
        plain, mask = pseudo_labels(run, model, batch, config, walk=progress >= config.walk_after)
        target = labels_to_affinity(plain, radius=config.radius, size=out.grid)
        weights = {"seg_weight": config.seg_weight, "affinity_weight": config.affinity_weight}
        return afa_loss(*out[:3], batch["labels"], mask, target, **weights, sync=several)

    if config.frozen_norms:
        freeze_norms(model.trunk)
    heads = [model.classifier, model.affinity, model.decoder, *model.trunk.new]
    groups = two_speed_groups(model, heads, config.schedule)
    transform = crop_transform(RandomLongSide(*config.long_side), config.crop, model.mean, model.std, mask_fill=0)
    fit(run, "afa", model, FramedCrops(run.dataset, run.train, transform), loss_of, groups, config.schedule)


def found_in(run: Run, model: AFANet, name: str, scales: Sequence[float]) -> Localised:
    image = run.image(name)
    stride, smallest = model.trunk.output_stride, model.trunk.smallest
    at_each_scale = list(views(image, model, scales, multiple=stride, smallest=smallest))
    middle = min(range(len(scales)), key=lambda i: abs(scales[i] - 1))
    return localise(model, at_each_scale, tuple(image.shape[-2:]), middle)


def write_seeds(run: Run, model: AFANet, scales: Sequence[float]) -> None:
    def maps_of(name: str) -> dict[str, Tensor]:
        keys = torch.from_numpy(run.dataset.labels(name)).nonzero()[:, 0]
        return {"keys": keys + 1, "cam": found_in(run, model, name, scales).cam[0][keys.to(run.fabric.device)]}

    write_maps(run, run.train + run.val, maps_of)


def write_walks(run: Run, model: AFANet, config: AFAConfig, scales: Sequence[float]) -> None:
    """Section 3.3: the CAMs walk under the low background and are refined by PAR; the mask is the argmax.

    As in the authors' evaluation, they walk over the affinity of the size nearest to the image's own.
    """

    def mask_of(name: str) -> Tensor:
        found = found_in(run, model, name, scales)
        labels = torch.from_numpy(run.dataset.labels(name))[None].to(found.cam.device)
        size = tuple(found.cam.shape[-2:])
        coarse = F.interpolate(found.cam, found.grid, mode="bilinear", align_corners=False)
        (scores,) = AffinityRandomWalk(config.radius, backgrounds=(config.low,))(coarse, found.affinity, labels)
        scores = F.interpolate(scores, size, mode="bilinear", align_corners=False)
        pixels = run.image(name)[None].float() / 255
        return refine_scores(pixels, scores, labels, par(config))[0].argmax(0)

    write_masks(run, run.train, mask_of)


def segment(run: Run, model: AFANet, config: Config) -> None:
    """Keep the decoder on its transformer; its masks, and those that a dense CRF refines."""
    settings = SegFormerConfig(config.tokens, config.afa.decoder_dim, config.test_scales, config.segment_crf)
    keep_and_measure(run, SegFormer(model.trunk, model.decoder), settings)


def main(config: Config) -> dict:
    check(config)  # before hours of training
    run = start("afa", config, takes=())

    with run.stage("train", "Tags, pseudo labels and affinities in one training"):
        trunk = AttendingTrunk(config.tokens, weights=run.weights(config.tokens.weights))
        model = AFANet(trunk, len(run.dataset.classes), config.afa)
        train(run, model, config.afa)

    with run.stage("cams", "Class activation maps"):
        write_seeds(run, model, config.scales)
        measure_cams(run, config.threshold)

    with run.stage("masks", "Masks: a step along the affinity, PAR, and a dense CRF"):
        write_walks(run, model, config.afa, config.scales)
        refine_masks(run, config.mask_crf)

    with run.stage("segment", "Masks of the decoder"):
        segment(run, model, config)

    return finish(run)


if __name__ == "__main__":
    run_recipe(sys.modules[__name__])

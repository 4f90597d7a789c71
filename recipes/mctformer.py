# /// script
# requires-python = ">=3.10"
# dependencies = ["wsss[recipes,weights]"]
# ///
"""MCTformer: Multi-class Token Transformer for Weakly Supervised Semantic Segmentation (Xu et al., CVPR 2022).

A transformer with one class token for each class. What a token attends to is a map of its class; a convolution over the
patch tokens gives another (V2), and their product is smoothed by the attention between patches. PSA turns such seeds
into masks.

    python -m recipes run mctformer                                 # built-in demo data, two CPU cores
    python -m recipes run mctformer --mct.variant v1                # class tokens alone; plus: MCTformer+
    python -m recipes run mctformer --preset small --data voc:PATH
    python -m recipes run mctformer --preset paper --data voc:PATH --affinity.weights FILE --segment.weights FILE

``paper`` starts from DeiT-S. The other presets put four new blocks behind EfficientNet-Lite0, whose features at stride
16 are the patches. Published for V2 on VOC 2012 train: seeds 61.7 mIoU, masks 69.1; users report seeds of 55 to 58.7,
and the authors that they vary between runs. The released code sweeps the threshold of the seeds on the masks of the
training images; here it is a constant, the background score of the random walk. Its augmentation is timm's, here
torchvision's of the same names; its segmentation network has two dilated convolutions, here one. MCTformer+ was trained
at 448 pixels, in batches of 32 for 45 epochs, and reads scales of 1, .75 and 1.25.
"""

from __future__ import annotations

import sys
from dataclasses import replace

import torch
from torch import Tensor, nn
from torchvision.transforms import v2

from recipes import rw
from recipes.cli import run_recipe
from recipes.pipeline.cams import Maps, write_cams
from recipes.pipeline.labels import measure_cams
from recipes.pipeline.report import finish
from recipes.pipeline.run import Run, start
from recipes.pipeline.segmentation import segmentation_from_masks
from recipes.pipeline.training import Moment, RandomLongSide, TaggedCrops, crop_transform, fit, two_speed_groups
from recipes.pipeline.transformers import HYBRID, TokenTrunk, build_token_trunk
from recipes.settings.mctformer import PRESETS, Config, MCTConfig
from wsss_losses import MCTformerLoss, MCTformerTerms
from wsss_modules import MultiClassTokenOutput, MultiClassTokenViT, query_key, refine_with_patch_affinity

__all__ = ["PRESETS", "Config", "main"]

MODES = ("fused", "patchcam", "mct")


def mode_of(config: Config) -> str:
    """Which maps are the seeds."""
    mct, hybrid = config.mct, config.tokens.backbone.startswith(HYBRID)
    if mct.variant == "v1" and mct.mode not in ("auto", "mct"):
        raise ValueError(f'mct.mode: expected "mct" or "auto" for v1, without maps of patches, got {mct.mode!r}')
    of_variant = "mct" if mct.variant == "v1" else "patchcam" if hybrid else "fused"
    return of_variant if mct.mode == "auto" else mct.mode


def build(run: Run, config: Config) -> tuple[TokenTrunk, MultiClassTokenViT]:
    """The encoder with a token for each class and without its last norm, section 3.2."""
    classes, plus = len(run.dataset.classes), config.mct.variant == "plus"
    tokens = replace(config.tokens, weights=run.weights(config.tokens.weights))
    trunk = build_token_trunk(tokens, classes, final_norm=False, pos_offset=0.0 if plus else 0.1)
    query_key(trunk.encoder.blocks[0], trunk.encoder.prefix)  # or a word on why not, before hours of training
    return trunk, MultiClassTokenViT(trunk.encoder, classes, config.mct.variant, n_layers=config.mct.layers)


def train(run: Run, trunk: TokenTrunk, model: MultiClassTokenViT, config: MCTConfig) -> None:
    """Tags of the class tokens and of the patch tokens, eq. 1."""
    loss = MCTformerLoss(contrast_weight=config.contrast_weight)

    def loss_of(model: nn.Module, batch: dict[str, Tensor], at: Moment) -> MCTformerTerms:
        out: MultiClassTokenOutput = model(batch["image"])
        tokens = out.class_tokens if config.variant == "plus" else None
        return loss(out.class_logits, out.patch_logits, tokens, batch["labels"])

    groups = two_speed_groups(model, new_parts(trunk, model), config.schedule)
    crops = TaggedCrops(run.dataset, run.train, augmentation(config, trunk))
    fit(run, "classify", model, crops, loss_of, groups, config.schedule)


def new_parts(trunk: TokenTrunk, model: MultiClassTokenViT) -> list[nn.Module | nn.Parameter]:
    """What has no pretrained weights."""
    encoder, head = trunk.encoder, [] if model.head is None else [model.head]
    if trunk.convolutional is None:
        return head
    return [*head, encoder.patch_embed.projection, encoder.blocks, encoder.prefix, encoder.pos_embed]


def augmentation(config: MCTConfig, trunk: TokenTrunk) -> v2.Transform:
    """Crops of the training images."""
    if config.augmentation == "crop":
        return crop_transform(RandomLongSide(*config.long_side), config.crop, trunk.mean, trunk.std)
    return v2.Compose(
        [
            v2.RandomResizedCrop(config.crop, interpolation=v2.InterpolationMode.BICUBIC, antialias=True),
            v2.RandomHorizontalFlip(),
            v2.RandAugment(num_ops=2, magnitude=9),
            v2.ToDtype(torch.float32, scale=True),
            v2.Normalize(list(trunk.mean), list(trunk.std)),
            v2.RandomErasing(p=0.25, value="random"),
        ]
    )


class Localizer(nn.Module):
    """The trained network read by its attention, sections 3.3 and 3.4."""

    def __init__(self, trunk: TokenTrunk, net: MultiClassTokenViT, mode: str, refine: bool) -> None:
        super().__init__()
        self.trunk, self.net, self.mode, self.refine = trunk, net, mode, refine

    def forward(self, images: Tensor) -> Maps:
        found = self.net.localize(images, self.mode)
        return Maps(refine_with_patch_affinity(found.cam, found.affinity) if self.refine else found.cam)


def write_seeds(run: Run, trunk: TokenTrunk, model: MultiClassTokenViT, config: Config) -> None:
    """Seeds of all images, and on request those of the other modes where there is ground truth."""
    options = {"stretch": True, "whole_cells": True}
    mct, main = config.mct, mode_of(config)
    write_cams(run, Localizer(trunk, model, main, mct.refine), run.train + run.val, config.cams, **options)
    measure_cams(run, config.threshold)
    if mct.compare_modes:
        modes = ("mct",) if mct.variant == "v1" else MODES
        for mode, refine in [(main, not mct.refine), *((mode, mct.refine) for mode in modes if mode != main)]:
            folder = f"cam_{mode}_{'refined' if refine else 'plain'}"
            write_cams(run, Localizer(trunk, model, mode, refine), run.seeds, config.cams, folder, **options)
            measure_cams(run, config.threshold, folder, f"seed, {mode} {'refined' if refine else 'plain'}")


def main(config: Config) -> dict:
    mode_of(config)  # or a word on what is wrong with it, before hours of training
    run = start("mctformer", config, takes=())

    with run.stage("classify", "Class tokens and patches from tags"):
        trunk, model = build(run, config)
        train(run, trunk, model, config.mct)

    with run.stage("cams", "Seeds: attention of class tokens, smoothed between patches"):
        write_seeds(run, trunk, model, config)

    rw.refine_with_rw(run, trunk.convolutional, config.affinity, config.walk, config.mask_crf)

    with run.stage("segment", "Segmentation network from the masks"):
        segmentation_from_masks(run, "mask_crf" if config.mask_crf else "mask", config.segment)

    return finish(run)


if __name__ == "__main__":
    run_recipe(sys.modules[__name__])

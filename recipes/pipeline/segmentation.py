"""The last stage of every system: a segmentation network trained on the pseudo masks, and its masks of new images."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from recipes.pipeline.files import save_mask
from recipes.pipeline.labels import measure_masks, read_mask
from recipes.pipeline.pretrained import save_pretrained
from recipes.pipeline.run import Run
from recipes.pipeline.segmenter import SegFormer, SegFormerConfig, SegmentConfig, Segmenter
from recipes.pipeline.training import (
    IGNORE,
    MaskedCrops,
    Moment,
    RandomScale,
    crop_transform,
    fit,
    two_speed_groups,
)
from recipes.pipeline.views import image_tensor
from wsss_modules import DenseCRF, unary_from_scores


def segmentation_from_masks(
    run: Run, folder: str, config: SegmentConfig, *, start_from: Segmenter | None = None
) -> None:
    """Train on the masks in ``folder``, and :func:`keep_and_measure`."""
    network = train_segmentation(run, lambda name: read_mask(run, name, folder), config, start_from=start_from)
    keep_and_measure(run, network, config)


def keep_and_measure(run: Run, network: Segmenter | SegFormer, config: SegmentConfig | SegFormerConfig) -> None:
    """Keep a trained network; segment and measure the val images, or without any the training images."""
    keep_network(run, network, config)
    segment(run, network, run.val or run.train, config)
    measure_masks(run, "segmentation", "segmentation")
    if config.crf:
        measure_masks(run, "segmentation_crf", "segmentation+crf")


def keep_network(run: Run, network: Segmenter | SegFormer, config: SegmentConfig | SegFormerConfig) -> None:
    """Write a trained network to ``model/``, for :func:`recipes.pipeline.pretrained.from_pretrained`."""
    if run.fabric.global_rank == 0:
        save_pretrained(
            run.folder / "model", network, config, run.dataset.classes, run.dataset.palette_index, recipe=run.recipe
        )


def train_segmentation(
    run: Run,
    mask_of: Callable[[str], np.ndarray],
    config: SegmentConfig,
    *,
    num_classes: int | None = None,
    stage: str = "segment",
    start_from: Segmenter | None = None,
) -> Segmenter:
    """Train on the masks (H, W) uint8 that ``mask_of`` gives for each training image: cross entropy, 255 ignored.

    ``num_classes`` counts the background; by default the masks are of the classes of the data set. ``start_from`` gives
    the weights to start from, in place of the pretrained ones.
    """
    config = replace(config, weights=run.weights(config.weights))
    model = Segmenter(config, num_classes or 1 + len(run.dataset.classes))
    if start_from is not None:
        model.load_state_dict(start_from.state_dict())

    def loss_of(model: nn.Module, batch: dict[str, Tensor], at: Moment) -> Tensor:
        return pixel_loss(model(batch["image"]), batch["mask"])

    groups = two_speed_groups(model, model.head_modules, config.schedule)
    fit(run, stage, model, masked_crops(run, mask_of, config, model), loss_of, groups, config.schedule)
    return model


def masked_crops(
    run: Run, mask_of: Callable[[str], np.ndarray], config: SegmentConfig, model: Segmenter
) -> MaskedCrops:
    """Augmented crops of the training images with their masks, normalised as ``model`` wants them."""
    transform = crop_transform(RandomScale(*config.scale), config.crop, model.mean, model.std)
    return MaskedCrops(run.dataset, run.train, mask_of, transform)


def pixel_loss(logits: Tensor, mask: Tensor) -> Tensor:
    """Cross entropy of logits (B, 1 + K, h, w), enlarged to the mask (B, H, W), over the labelled pixels."""
    logits = F.interpolate(logits, mask.shape[-2:], mode="bilinear", align_corners=False)
    labelled = (mask != IGNORE).sum().clamp(min=1)
    return F.cross_entropy(logits, mask, ignore_index=IGNORE, reduction="sum") / labelled


def segment(
    run: Run,
    network: Segmenter | SegFormer,
    names: Sequence[str],
    config: SegmentConfig | SegFormerConfig,
    folder: str = "segmentation",
) -> None:
    """Write ``FOLDER/IMAGE.png`` (and ``FOLDER_crf/IMAGE.png`` with ``config.crf``) for ``names``."""
    network.to(run.fabric.device, memory_format=torch.channels_last).eval()
    crf = DenseCRF(network.crf_settings) if config.crf else None

    @torch.no_grad()
    def work(name: str) -> None:
        image = image_tensor(run.dataset.image(name)).to(run.fabric.device)
        probabilities = network.probabilities(image, config.test_scales)
        if crf is not None:
            refined = crf(image[None], unary_from_scores(probabilities[None]))[0].argmax(0)
            save_mask(run.path(f"{folder}_crf", f"{name}.png"), refined.byte().cpu().numpy(), run.dataset.palette_index)
        mask = probabilities.argmax(0).byte().cpu().numpy()
        save_mask(run.path(folder, f"{name}.png"), mask, run.dataset.palette_index)

    run.for_each(names, lambda name: run.path(folder, f"{name}.png"), work)

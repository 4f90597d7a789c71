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
from recipes.pipeline.segmenter import SegmentConfig, Segmenter
from recipes.pipeline.training import (
    IGNORE,
    MaskedCrops,
    Moment,
    RandomScale,
    crop_transform,
    fit,
    two_speed_groups,
)
from recipes.pipeline.views import image_tensor, views
from wsss_modules import DEEPLAB_CRF, DenseCRF, unary_from_scores


def segmentation_from_masks(
    run: Run, folder: str, config: SegmentConfig, *, start_from: Segmenter | None = None
) -> None:
    """Train on the masks in ``folder``; segment and measure the val images, or without any the training images.

    The network is kept, see :func:`keep_network`.
    """
    network = train_segmentation(run, lambda name: read_mask(run, name, folder), config, start_from=start_from)
    keep_network(run, network, config)
    measure_segmentation(run, network, config)


def measure_segmentation(run: Run, network: Segmenter, config: SegmentConfig) -> None:
    """Segment and measure the val images, or without any the training images."""
    segment(run, network, run.val or run.train, config)
    measure_segmentation_masks(run, config.crf)


def measure_segmentation_masks(run: Run, crf: bool) -> None:
    """Measure what :func:`write_segmentations` wrote."""
    measure_masks(run, "segmentation", "segmentation")
    if crf:
        measure_masks(run, "segmentation_crf", "segmentation+crf")


def keep_network(run: Run, network: Segmenter, config: SegmentConfig) -> None:
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
    if run.config.max_steps is not None:
        config = replace(config, weights="random")
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
    run: Run, model: Segmenter, names: Sequence[str], config: SegmentConfig, folder: str = "segmentation"
) -> None:
    """Write ``FOLDER/IMAGE.png`` (and ``FOLDER_crf/IMAGE.png`` with ``config.crf``) for ``names``."""
    model.to(run.fabric.device, memory_format=torch.channels_last).eval()

    def probabilities_of(image: Tensor) -> Tensor:
        return segmentation_probabilities(model, image, config.test_scales)

    write_segmentations(run, names, probabilities_of, DenseCRF(DEEPLAB_CRF) if config.crf else None, folder)


def write_segmentations(
    run: Run,
    names: Sequence[str],
    probabilities_of: Callable[[Tensor], Tensor],
    crf: DenseCRF | None,
    folder: str = "segmentation",
) -> None:
    """Write the best class of ``probabilities_of(image)``, (1 + K, H, W), and with ``crf`` that of the refined ones."""

    @torch.no_grad()
    def work(name: str) -> None:
        image = image_tensor(run.dataset.image(name)).to(run.fabric.device)
        probabilities = probabilities_of(image)
        if crf is not None:
            refined = crf(image[None], unary_from_scores(probabilities[None]))[0].argmax(0)
            save_mask(run.path(f"{folder}_crf", f"{name}.png"), refined.byte().cpu().numpy(), run.dataset.palette_index)
        mask = probabilities.argmax(0).byte().cpu().numpy()
        save_mask(run.path(folder, f"{name}.png"), mask, run.dataset.palette_index)

    run.for_each(names, lambda name: run.path(folder, f"{name}.png"), work)


def segmentation_probabilities(model: Segmenter, image: Tensor, scales: Sequence[float]) -> Tensor:
    """Softmax averaged over ``scales`` and mirror images: image (3, H, W) uint8 to (1 + K, H, W)."""
    height, width = image.shape[-2:]
    total = image.new_zeros((), dtype=torch.float32)
    for both in views(image, model, scales, multiple=16):
        plain, mirrored = model(both)
        logits = torch.stack([plain, mirrored.flip(-1)]).float()
        up = F.interpolate(logits, (height, width), mode="bilinear", align_corners=False)
        total = total + up.softmax(1).mean(0)
    return total / len(scales)

# /// script
# requires-python = ">=3.10"
# dependencies = ["wsss[recipes,weights]"]
# ///
"""BBAM: Bounding Box Attribution Map for Weakly Supervised Segmentation (Lee, Yi, Shin, Yoon, CVPR 2021).

A detector learns the boxes. For each object the smallest part of the image is sought on which it still says the same
class and the same box; what it needs is the object. The parts become strict and loose masks of instances. From these
learn a mask head on the detector, and, as one label map, a segmentation network.

    python -m recipes run bbam                                              # built-in demo data, two CPU cores
    python -m recipes run bbam --preset small --data voc:PATH --boxes components_of_masks
    python -m recipes run bbam --preset paper --data voc:PATH               # VOC's XML boxes, GPU

This is supervision by *bounding boxes*: compare it with systems that use them. ``--boxes components_of_masks`` makes
boxes from ground-truth masks where a data set has none; a result with it must say so. In the tables here "seed" is the
attribution maps (val images take their boxes too), "mask" the label map of instance masks without a CRF, "mask+crf"
that with it. Average precision of instances is measured on val images whose boxes tell them apart.

The published constants are for images with a short side of 800 pixels; strides of the maps and the blur of the masks
shrink with the images in ``demo`` and ``small``, and a larger rate makes up for fewer steps. ``paper`` has the
published attribution on a ResNet-101 pyramid, on squares of 800 pixels; its masks train DeepLab-v2. The mask head
stands on the detector as it is, where the released Mask R-CNN is trained anew. The segment proposals of MCG are left
out; :func:`wsss_modules.match_segment_proposals` is their piece.
"""

from __future__ import annotations

import sys
from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from recipes.cli import run_recipe
from recipes.pipeline.cams import save_cam
from recipes.pipeline.data.boxes import Boxes, boxes_for
from recipes.pipeline.detection import Detector, train_detector
from recipes.pipeline.files import load_arrays, save_arrays, save_mask
from recipes.pipeline.instances import measure_instances, train_mask_head, write_instances
from recipes.pipeline.labels import measure_cams, measure_masks
from recipes.pipeline.report import finish
from recipes.pipeline.run import Run, start
from recipes.pipeline.segmentation import segmentation_from_masks
from recipes.pipeline.views import view
from recipes.settings.bbam import PRESETS, Config, ExplainConfig, MaskConfig
from wsss_losses import SeedGrowingMaskLoss
from wsss_modules import (
    BBAM_CRF,
    BoundingBoxAttributionMap,
    BoxMaskRefiner,
    DenseCRF,
    adaptive_mask_stride,
    boxes_to_masks,
    init_attribution_mask,
    instances_to_semantic,
    jitter_boxes,
    select_positive_proposals,
    unary_from_scores,
)

__all__ = ["PRESETS", "Config", "main"]


def explainer(
    detector_fn: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]], config: ExplainConfig
) -> BoundingBoxAttributionMap:
    """The descent of the maps."""
    return BoundingBoxAttributionMap(detector_fn, steps=config.steps, lr=config.lr, area=config.area, tv=config.tv)


def explain_image(
    detector: Detector, image: Tensor, boxes: Tensor, classes: Tensor, config: ExplainConfig, seed: int
) -> list[Tensor]:
    """Attribution maps (h, w), one for each box (n, 4) in pixels of the square ``image`` (1, 3, s, s)."""
    size, generator = (image.shape[2], image.shape[3]), torch.Generator().manual_seed(seed)
    drawn = [jitter_boxes(box, size, count=config.proposals, generator=generator).to(image.device) for box in boxes]
    boxes, classes = boxes.to(image.device), classes.to(image.device)
    with torch.no_grad():
        proposals = F.pad(torch.cat(drawn), (1, 0))
        logits, deltas = detector.detections(image, proposals)
        decoded = detector.decode(deltas, proposals)
    chosen, masks = [], []
    for k, (box, label) in enumerate(zip(boxes, classes, strict=True)):
        own = slice(k * config.proposals, (k + 1) * config.proposals)
        index = select_positive_proposals(
            logits[own], decoded[own], box, label, enough=config.positives, cap=config.positives
        ).chosen
        stride = adaptive_mask_stride(
            (box[2:] - box[:2]).prod(), size, smallest=config.stride[0], growth=config.stride[1]
        )
        masks.append(init_attribution_mask(decoded[own][index, label], size, stride))  # zeros without a positive
        chosen.append(drawn[k][index])
    explain = explainer(detector.detections, config)
    # an object without a positive starts from zeros, which it can only stay at
    told = [k for k, own in enumerate(chosen) if len(own)]
    for first in range(0, len(told), config.at_once):
        part = told[first : first + config.at_once]
        numbered = [F.pad(chosen[k], (1, 0), value=float(place)) for place, k in enumerate(part)]
        found = explain(image[0], torch.cat(numbered), classes[part], [masks[k] for k in part])
        for k, mask in zip(part, found, strict=True):
            masks[k] = mask
    return [mask[0] for mask in masks]


def write_maps(run: Run, detector: Detector, boxes: Boxes, config: ExplainConfig) -> None:
    """``cam``: for each class the strongest map of its objects, cut to their boxes; beside it each map as it is."""
    side, device = detector.size, run.fabric.device
    detector.to(device).eval()

    def work(name: str) -> None:
        image = run.image(name)
        size, (corners, classes) = (image.shape[-2], image.shape[-1]), boxes.tensors(name)
        square = view(image, (side, side), detector.mean, detector.std, flip=False)
        scale = side / torch.tensor([size[1], size[0]] * 2)
        seed = run.derived_seed("proposals", name)
        maps = explain_image(detector, square, corners * scale, classes, config, seed) if len(classes) else []
        full = image.new_zeros(0, *size, dtype=torch.float32)
        if maps:
            up = [F.interpolate(m[None, None], size, mode="bilinear", align_corners=True)[0] for m in maps]
            full = torch.cat(up) * boxes_to_masks(corners, size).to(device)
        keys = classes.unique()
        cam = torch.stack([full[(classes == key).to(device)].amax(0) for key in keys]) if len(keys) else full
        save_cam(run, name, keys, cam, **{f"object_{k}": mask for k, mask in enumerate(maps)})

    known = [name for name in run.train + run.val if name in boxes.of]
    run.for_each(known, lambda name: run.path("cam", f"{name}.npz"), work)


def write_instance_masks(run: Run, boxes: Boxes, config: MaskConfig) -> None:
    """``instances``: strict and loose mask of each object, with a CRF; ``mask`` and ``mask_crf``: one label map."""
    palette = run.dataset.palette_index

    def work(name: str) -> None:
        image, (corners, classes) = run.image(name), boxes.tensors(name)
        maps, size = read_objects(run, name, len(classes)), (image.shape[-2], image.shape[-1])
        for folder, crf in (("mask", None), ("mask_crf", dense_refiner(image))):
            both = {kind: torch.zeros(len(maps), *size, dtype=torch.bool) for kind in ("strict", "loose")}
            for kind, theta in (("strict", config.strict), ("loose", config.loose)):
                refine = BoxMaskRefiner(theta, crf, blur=config.blur, stretch=config.stretch)
                for k, (one, box) in enumerate(zip(maps, corners, strict=True)):
                    both[kind][k] = refine(one, box, size).mask
            label = instances_to_semantic(both["strict"], both["loose"], classes, corners)
            save_mask(run.path(folder, f"{name}.png"), label.numpy().astype(np.uint8), palette)
        save_arrays(run.path("instances", f"{name}.npz"), **{kind: masks.numpy() for kind, masks in both.items()})

    run.for_each(run.train, lambda name: run.path("instances", f"{name}.npz"), work)


def tell_unexplained(run: Run, boxes: Boxes) -> None:
    """Say of how many objects the detector never tells class and box, so that their maps are empty."""
    maps = [one for name in run.train if name in boxes.of for one in read_objects(run, name, len(boxes.of[name]))]
    empty = sum(not one.any() for one in maps)
    if empty:
        told = f"  {empty:,} of {len(maps):,} objects have an empty map: the detector finds them from no proposal"
        run.console.print(f"[yellow]{told}[/]", highlight=False)


def dense_refiner(image: Tensor) -> Callable[[Tensor], Tensor]:
    """A dense CRF over one image (3, H, W) uint8, whose kernels serve all objects: scores to probabilities."""
    crf = DenseCRF(BBAM_CRF)
    kernels = crf.prepare(image[None])
    return lambda scores: crf(kernels, unary_from_scores(scores[None].float().to(image.device)))[0].double().cpu()


def read_objects(run: Run, name: str, count: int) -> list[Tensor]:
    """The attribution maps (h, w) of an image's objects."""
    stored = load_arrays(run.path("cam", f"{name}.npz"))
    return [torch.from_numpy(stored[f"object_{k}"]) for k in range(count)]


def check(config: Config) -> None:
    """Tell a wrong option of a later stage before the detector is trained."""
    explain, masks = config.explain, config.masks
    if min(explain.at_once, explain.proposals, explain.positives) < 1:
        raise ValueError(f"explain: expected at least 1 of at_once, proposals and positives, got {explain}")
    adaptive_mask_stride(0.0, (1, 1), smallest=explain.stride[0], growth=explain.stride[1])
    explainer(lambda images, proposals: (images, proposals), explain)
    for theta in (masks.strict, masks.loose):
        BoxMaskRefiner(theta, blur=masks.blur)
    SeedGrowingMaskLoss(threshold=config.mask_head.threshold)


def main(config: Config) -> dict:
    check(config)
    run = start("bbam", config, takes=())
    boxes = boxes_for(run, config.boxes)

    with run.stage("detector", "Detector from boxes"):
        detector = train_detector(run, boxes, config.detect)

    with run.stage("cams", "What the detector needs of each object"):
        write_maps(run, detector, boxes, config.explain)
        tell_unexplained(run, boxes)
        measure_cams(run, config.seed_threshold)

    with run.stage("masks", "Masks of instances, as one label map"):
        write_instance_masks(run, boxes, config.masks)
        measure_masks(run)
        measure_masks(run, "mask_crf", "mask+crf")

    with run.stage("mask_head", "Mask head on the detector, from strict and loose masks"):
        head = train_mask_head(run, detector, boxes, config.mask_head)
        write_instances(run, detector, head, run.val, config.mask_head.score)
        measure_instances(run, boxes)

    with run.stage("segment", "Segmentation network from the masks"):
        segmentation_from_masks(run, "mask_crf", config.segment)

    return finish(run)


if __name__ == "__main__":
    run_recipe(sys.modules[__name__])

"""Instances on disk, a head that segments what a detector finds, and its average precision.

M padded number of boxes of a batch, m side of a mask inside its box, C classes with the background first.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import Dataset
from torchvision.ops import MultiScaleRoIAlign, roi_align

from recipes.pipeline.data.boxes import Boxes, flat_boxes
from recipes.pipeline.data.image_set import IGNORE, ImageSet
from recipes.pipeline.detection import Detector
from recipes.pipeline.files import load_arrays, save_arrays
from recipes.pipeline.run import Run
from recipes.pipeline.training import Moment, Schedule, fit, two_speed_groups
from recipes.pipeline.views import image_tensor, view
from wsss_losses import seed_growing_mask_loss
from wsss_modules import boxes_to_masks

SIDE = 28


@dataclass(frozen=True)
class MaskHeadConfig:
    """The mask head on the detector, which stands still."""

    channels: int = 64
    """Channels of its layers."""
    threshold: float = 0.9
    """Probability above which a prediction becomes a seed itself."""
    score: float = 0.3
    """Detections below this are left out."""
    schedule: Schedule = field(default_factory=lambda: Schedule(epochs=3, batch_size=16, lr=0.02, head_lr=0.02))
    """Training schedule."""


class Found(NamedTuple):
    """Instances of an image: masks (n, H, W) bool, classes (n,) 1..K, scores (n,)."""

    masks: np.ndarray
    classes: np.ndarray
    scores: np.ndarray


class MaskHead(nn.Module):
    """A mask for each class of each box, from the features of a detector that is not trained further."""

    def __init__(self, detector: Detector, num_classes: int, channels: int) -> None:
        super().__init__()
        self.detector = [detector]  # in a list: its weights are no part of this checkpoint
        pyramid = detector.rcnn.backbone
        names = [str(k) for k in range(len(pyramid.levels))]
        self.pool = MultiScaleRoIAlign(names, output_size=SIDE // 2, sampling_ratio=2)
        self.layers = nn.Sequential(
            nn.Conv2d(pyramid.out_channels, channels, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(channels, channels, 3, padding=1),
            nn.ReLU(),
            nn.ConvTranspose2d(channels, channels, 2, stride=2),
            nn.ReLU(),
            nn.Conv2d(channels, 1 + num_classes, 1),
        )

    def forward(self, images: Tensor, boxes: Tensor) -> Tensor:
        """Images (B, 3, s, s) and boxes (n, 5), sorted by image -> logits (n, C, m, m)."""
        with torch.no_grad():
            features = self.detector[0].rcnn.backbone(images)
        counts = torch.bincount(boxes[:, 0].long(), minlength=len(images)).tolist()
        return self.layers(
            self.pool(features, list(boxes[:, 1:].split(counts)), [tuple(images.shape[2:])] * len(images))
        )


class SeededBoxes(Dataset):
    """Squares with their boxes (M, 5) and, inside each, the strict and loose masks (M, m, m)."""

    def __init__(self, run: Run, boxes: Boxes, detector: Detector, folder: str = "instances") -> None:
        self.run, self.boxes, self.folder = run, boxes, folder
        self.names = [name for name in run.train if len(boxes.of[name])]
        self.mean, self.std, self.side = detector.mean, detector.std, detector.size

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        name, most = self.names[index], self.boxes.most
        image = image_tensor(self.run.dataset.image(name))
        corners, classes = self.boxes.tensors(name)
        scale = self.side / torch.tensor([image.shape[2], image.shape[1]] * 2)
        rows, seeds = torch.zeros(most, 5), torch.zeros(2, most, SIDE, SIDE)
        rows[: len(corners)] = torch.cat([classes[:, None].float(), corners * scale], 1)
        stored = load_arrays(self.run.path(self.folder, f"{name}.npz"))
        for k, kind in enumerate(("strict", "loose")):
            masks = torch.from_numpy(stored[kind])[:, None].float()
            numbered = torch.cat([torch.arange(len(corners))[:, None].float(), corners], 1)
            inside = roi_align(masks, numbered, SIDE, sampling_ratio=1, aligned=True)[:, 0]
            seeds[k, : len(corners)] = (inside >= 0.5).float()
        square = view(image, (self.side, self.side), self.mean, self.std, flip=False)[0]
        return {"image": square, "boxes": rows, "strict": seeds[0], "loose": seeds[1]}


def train_mask_head(run: Run, detector: Detector, boxes: Boxes, config: MaskHeadConfig) -> MaskHead:
    """Train the head on strict and loose masks; its own confident predictions fill what lies between them."""
    head = MaskHead(detector, len(run.dataset.classes), config.channels)
    sync = run.fabric.world_size > 1

    def loss_of(model: nn.Module, batch: dict[str, Tensor], at: Moment) -> Tensor:
        own, classes = flat_boxes(batch["boxes"])
        known = batch["boxes"][:, :, 0] > 0
        strict, loose = batch["strict"][known], batch["loose"][known]
        logits = model(batch["image"], own)
        return seed_growing_mask_loss(logits, classes, strict, loose, threshold=config.threshold, sync=sync)

    groups = two_speed_groups(head, [head.layers], config.schedule)
    fit(run, "mask_head", head, SeededBoxes(run, boxes, detector), loss_of, groups, config.schedule)
    return head.eval()


@torch.no_grad()
def find_instances(detector: Detector, head: MaskHead, image: Tensor, score: float) -> Found:
    """What detector and mask head find in an image (3, H, W) uint8."""
    size = (image.shape[1], image.shape[2])
    square = view(image, (detector.size, detector.size), detector.mean, detector.std, flip=False).contiguous()
    found = detector.rcnn([square[0]])[0]
    chosen = found["scores"] >= score
    boxes, classes, scores = (found[key][chosen] for key in ("boxes", "labels", "scores"))
    masks = torch.zeros(len(boxes), *size, dtype=torch.bool)
    if len(boxes):
        logits = head(square, F.pad(boxes, (1, 0)))[torch.arange(len(boxes), device=boxes.device), classes].cpu()
        scale = torch.tensor([size[1], size[0]] * 2) / detector.size
        for k, box in enumerate((boxes.cpu() * scale).round().long()):
            x1, y1, x2, y2 = (int(corner) for corner in box)
            x2, y2 = max(x2, x1 + 1), max(y2, y1 + 1)
            inside = F.interpolate(logits[k][None, None], (y2 - y1, x2 - x1), mode="bilinear", align_corners=False)
            masks[k, y1:y2, x1:x2] = (inside[0, 0] > 0)[: size[0] - y1, : size[1] - x1]
    return Found(masks.numpy(), classes.cpu().numpy(), scores.cpu().numpy())


def write_instances(run: Run, detector: Detector, head: MaskHead, names: Sequence[str], score: float) -> None:
    """``found/IMAGE.npz``: masks, classes and scores of what is found in each image."""
    detector.to(run.fabric.device).eval()
    head.to(run.fabric.device).eval()

    def work(name: str) -> None:
        found = find_instances(detector, head, run.image(name), score)
        save_arrays(run.path("found", f"{name}.npz"), **found._asdict())

    run.for_each(names, lambda name: run.path("found", f"{name}.npz"), work)


def read_instances(run: Run, name: str) -> Found:
    """What `write_instances` wrote."""
    return Found(**load_arrays(run.path("found", f"{name}.npz")))


def true_instances(dataset: ImageSet, boxes: Boxes, name: str) -> Found | None:
    """True instances of an image, from its mask and boxes; None where these don't tell them apart.

    They do if no pixel of a class lies in two boxes of that class. An instance is what its class has in its box.
    """
    mask = dataset.mask(name)
    if mask is None or name not in boxes.of:
        return None
    corners, classes = boxes.tensors(name)
    inside = boxes_to_masks(corners, (mask.shape[0], mask.shape[1])).numpy()
    own = inside & (mask == classes.numpy()[:, None, None])
    if (own.sum(0) > 1).any():
        return None
    return Found(own, classes.numpy(), np.ones(len(own)))


def average_precision(
    found: Mapping[str, Found], truth: Mapping[str, Found], ignored: Mapping[str, np.ndarray], overlap: float = 0.5
) -> dict[int, float]:
    """Area under the precision-recall curve of each class that occurs, in [0, 1].

    Args:
        found: Image -> what was found.
        truth: Image -> what is there; the images measured.
        ignored: Image -> (H, W) bool pixels that take no part.
        overlap: Intersection over union above which an instance counts as found; each is found once, by the surest.
    """
    result = {}
    for index in sorted({int(k) for own in truth.values() for k in own.classes}):
        total, hits = 0, []
        for name, own in truth.items():
            keep = ~ignored[name]
            there = own.masks[own.classes == index] & keep
            total, taken = total + len(there), np.zeros(len(there), dtype=bool)
            chosen = np.flatnonzero(found[name].classes == index)
            for k in chosen[np.argsort(-found[name].scores[chosen], kind="stable")]:
                mask = found[name].masks[k] & keep
                union = (there | mask).sum((1, 2))
                iou = (there & mask).sum((1, 2)) / np.maximum(union, 1)
                best = int(iou.argmax()) if len(iou) else -1
                right = best >= 0 and iou[best] > overlap and not taken[best]
                if right:
                    taken[best] = True
                hits.append((float(found[name].scores[k]), right))
        right = np.array([hit for _, hit in sorted(hits, key=lambda pair: -pair[0])], dtype=float)
        precision = right.cumsum() / np.arange(1, len(right) + 1)
        envelope = np.maximum.accumulate(precision[::-1])[::-1]  # the best precision at this recall or a higher one
        result[index] = float((envelope * right).sum() / total)
    return result


def measure_instances(run: Run, boxes: Boxes, overlaps: Sequence[float] = (0.25, 0.5, 0.75)) -> None:
    """AP of ``found/`` on the val images whose mask and boxes tell instances apart; recorded under "instances"."""
    truth = {name: true_instances(run.dataset, boxes, name) for name in run.val}
    known = {name: own for name, own in truth.items() if own is not None}
    if not known:
        run.console.print("  instances are not measured: val has no masks, or boxes that don't tell them apart")
        return
    found = {name: read_instances(run, name) for name in known}
    ignored = {name: run.dataset.mask(name) == IGNORE for name in known}
    for overlap in overlaps:
        by_class = average_precision(found, known, ignored, overlap)
        mean = 100 * sum(by_class.values()) / max(1, len(by_class))
        named = {run.dataset.classes[k - 1]: round(100 * ap, 2) for k, ap in by_class.items()}
        run.record(instances={f"ap{round(100 * overlap)}": {"mean": round(mean, 2), "images": len(known), **named}})
        run.console.print(
            f"  instances on val, {len(known)} of {len(run.val)} images: [bold]{mean:.1f}[/] AP at {overlap}"
        )

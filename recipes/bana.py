# /// script
# requires-python = ">=3.10"
# dependencies = ["wsss[recipes,weights]"]
# ///
"""BANA: Background-Aware Pooling and Noise-Aware Loss for WSSS (Oh, Kim, Ham, CVPR 2021, arXiv:2104.00905).

What lies outside all boxes is background for certain. A classifier pools boxes without what looks like it; attention
and class maps in the boxes give one label, the nearest prototype another; a segmentation network trusts what both say,
and the rest by degrees.

    python -m recipes run bana                                              # built-in demo data, two CPU cores
    python -m recipes run bana --preset small --data voc:PATH --boxes components_of_masks
    python -m recipes run bana --preset paper --data voc:PATH               # VOC's XML boxes, one GPU
    python -m recipes run bana --data coco:PATH                             # COCO's boxes

This is supervision by *bounding boxes*: compare it with systems that use them. ``--boxes components_of_masks`` makes
boxes from ground-truth masks where a data set has none; a result with it must say so. In the tables here "seed" is the
class maps in the boxes (val images take their boxes too), "mask" the labels by retrieval, "mask+crf" those of the CRF.

``paper`` has the published form of the networks, crops, rates and lengths, but timm's weights of VGG-16, so that fc6
and fc7 are new layers and learn as these do; in the first stage the poly schedule; biases that learn as weights; and
the jitter of all recipes here. Views of an image are averaged as probabilities, as in all recipes, not as cosines. The
released validation passes a corrupted image to the CRF; here it is the photograph.
"""

from __future__ import annotations

import sys
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import Dataset
from torchvision import tv_tensors
from torchvision.transforms import v2

from recipes.cli import run_recipe
from recipes.pipeline.cams import save_cam
from recipes.pipeline.classification import make_trunk
from recipes.pipeline.data.boxes import BoxedCrops, Boxes, boxes_for, flat_boxes
from recipes.pipeline.files import save_mask
from recipes.pipeline.labels import measure_cams, measure_masks, read_mask
from recipes.pipeline.models import Trunk
from recipes.pipeline.report import finish
from recipes.pipeline.run import Run, start
from recipes.pipeline.segmentation import keep_and_measure
from recipes.pipeline.segmenter import CosineSegmenter
from recipes.pipeline.training import Moment, RandomScale, crop_transform, fit, two_speed_groups
from recipes.pipeline.views import scaled_size, view
from recipes.settings.bana import PRESETS, BoxConfig, Config
from wsss_losses import NoiseAwareLoss, NoiseAwareTerms
from wsss_modules import (
    BANA_CRF,
    BoxClassifier,
    DenseCRF,
    background_mask_from_boxes,
    box_pseudo_labels,
    fuse_labels,
    unary_from_scores,
)

__all__ = ["PRESETS", "Config", "main"]


class BoxNet(nn.Module):
    """A backbone and the classifier of boxes; ``features`` are what is pooled."""

    def __init__(self, trunk: Trunk, num_classes: int, config: BoxConfig) -> None:
        super().__init__()
        self.trunk, channels = trunk, config.channels or trunk.out_channels
        layers: list[nn.Module] = []
        if config.channels:
            layers += [nn.Conv2d(trunk.out_channels, channels, 3, padding=1), nn.ReLU()]
            layers += [nn.Conv2d(channels, channels, 1), nn.ReLU()]
        self.project = nn.Sequential(*layers, nn.Dropout2d(config.dropout))
        self.head = BoxClassifier(channels, num_classes, grid=config.grid, align_corners=config.align_corners)

    def features(self, images: Tensor) -> Tensor:
        return self.project(self.trunk(images).final)

    def forward(self, images: Tensor, rows: Tensor, inside: Tensor) -> Tensor:
        boxes, classes = flat_boxes(rows)
        background = inside * background_mask_from_boxes(boxes, len(images), (inside.shape[2], inside.shape[3]))
        out = self.head(self.features(images), boxes, classes, background)
        if len(out.target) == 0:  # neither a box nor a pixel outside
            return 0 * out.logits.sum()
        return F.cross_entropy(out.logits, out.target)


def train_boxes(run: Run, boxes: Boxes, config: BoxConfig) -> BoxNet:
    """Classify the quarters of boxes, pooled without their background, and the background itself."""
    net = BoxNet(make_trunk(run, config, config.output_stride), len(run.dataset.classes), config)
    transform = crop_transform(
        RandomScale(*config.scale), config.crop, net.trunk.mean, net.trunk.std, jitter=config.jitter, mask_fill=0
    )
    crops = BoxedCrops(run.dataset, run.train, boxes, transform)

    def loss_of(model: nn.Module, batch: dict[str, Tensor], at: Moment) -> Tensor:
        return model(batch["image"], batch["boxes"], batch["inside"])

    groups = two_speed_groups(net, [net.project, net.head], config.schedule)
    fit(run, "boxes", net, crops, loss_of, groups, config.schedule)
    return net


def write_labels(run: Run, net: BoxNet, boxes: Boxes, config: BoxConfig) -> None:
    """``cam``: class maps in the boxes; of training images also ``mask`` (retrieval) and ``mask_crf``."""
    device, crf, palette = run.fabric.device, DenseCRF(BANA_CRF), run.dataset.palette_index
    net.to(device, memory_format=torch.channels_last).eval()
    weight, train = net.head.classifier.weight.flatten(1), set(run.train)

    @torch.no_grad()
    def work(name: str) -> None:
        image = run.image(name)
        size = (image.shape[-2], image.shape[-1])
        inputs = view(image, scaled_size(*size, config.label_scale), net.trunk.mean, net.trunk.std, flip=False)
        features, (corners, classes) = net.features(inputs)[0], boxes.tensors(name)

        def refine(scores: Tensor) -> Tensor:
            return crf(image[None], unary_from_scores(scores[None]))[0]

        labels = box_pseudo_labels(
            features, weight, corners, classes, size, crf=refine if name in train else None, threshold=config.threshold
        )
        if name in train:
            for folder, mask in (("mask", labels.y_ret), ("mask_crf", labels.y_crf)):
                save_mask(run.path(folder, f"{name}.png"), mask.byte().cpu().numpy(), palette)
        save_cam(run, name, labels.keys, labels.cam)

    known = [name for name in run.train + run.val if name in boxes.of]
    run.for_each(known, lambda name: run.path("cam", f"{name}.npz"), work)


class TwoLabelCrops(Dataset):
    """``image`` (3, crop, crop), and ``mask`` (2, crop, crop): the labels of the CRF and of retrieval, cut alike."""

    def __init__(self, run: Run, transform: v2.Transform) -> None:
        self.run, self.names, self.transform = run, run.train, transform

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        name = self.names[index]
        both = torch.stack([torch.from_numpy(read_mask(self.run, name, folder)) for folder in ("mask_crf", "mask")])
        image, both = self.transform(tv_tensors.Image(self.run.dataset.image(name)), tv_tensors.Mask(both))
        return {"image": image.as_subclass(Tensor), "mask": both.as_subclass(Tensor).long()}


def objective(config: Config, **options: bool) -> NoiseAwareLoss:
    """The noise-aware loss of the segmentation network."""
    return NoiseAwareLoss(temperature=config.temperature, gamma=config.gamma, lam=config.lam, **options)


def train_segmentation(run: Run, config: Config) -> CosineSegmenter:
    """Cross-entropy where both labels agree, weighted by confidence where they do not."""
    settings = replace(config.segment, weights=run.weights(config.segment.weights))
    model = CosineSegmenter(settings, 1 + len(run.dataset.classes), temperature=config.temperature)
    transform = crop_transform(RandomScale(*settings.scale), settings.crop, model.mean, model.std)
    criterion = objective(config, sync=run.fabric.world_size > 1)

    def loss_of(network: nn.Module, batch: dict[str, Tensor], at: Moment) -> NoiseAwareTerms:
        y_crf, y_ret = batch["mask"].unbind(1)
        return criterion(network(batch["image"]) / config.temperature, fuse_labels(y_crf, y_ret), y_crf)

    groups = two_speed_groups(model, model.head_modules, settings.schedule)
    fit(run, "segment", model, TwoLabelCrops(run, transform), loss_of, groups, settings.schedule)
    return model


def main(config: Config) -> dict:
    objective(config)  # tells a wrong option before anything is trained
    run = start("bana", config, takes=())
    boxes = boxes_for(run, config.boxes)

    with run.stage("boxes", "Classifier of boxes without their background"):
        net = train_boxes(run, boxes, config.box)

    with run.stage("labels", "Two labels from attention, class maps and prototypes"):
        write_labels(run, net, boxes, config.box)
        measure_cams(run, config.seed_threshold)
        measure_masks(run)
        measure_masks(run, "mask_crf", "mask+crf")

    with run.stage("segment", "Segmentation network with the noise-aware loss"):
        model = train_segmentation(run, config)
        keep_and_measure(run, model, config.segment)

    return finish(run)


if __name__ == "__main__":
    run_recipe(sys.modules[__name__])

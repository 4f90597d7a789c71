# /// script
# requires-python = ">=3.10"
# dependencies = ["wsss[recipes,weights]"]
# ///
"""IRN: Weakly Supervised Learning of Instance Segmentation with Inter-pixel Relations (Ahn, Cho, Kwak, CVPR 2019).

Class boundaries and displacements to instance centres, learnt from the confident areas of the CAMs and no other label;
CAMs then spread by a random walk that boundaries stop.

    python -m recipes run irn                                       # built-in demo data, two CPU cores
    python -m recipes run irn --preset paper --data voc:PATH        # VOC 2012, one GPU
    python -m recipes run irn --preset paper --data voc:PATH --devices 8
    python -m recipes run irn --preset small --data folder:PHOTOS --labels tags.csv

Published with ResNet-50 on VOC 2012 train: CAM 48.3, semantic masks 66.5 mIoU; the segmenter 63.5 on val. The released
optimiser passes the weight decay as SGD's momentum, so that its momentum is 1e-4; ``paper`` does the same.
"""

from __future__ import annotations

import sys
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from recipes.cli import run_recipe
from recipes.pipeline.cams import read_cam, write_cams
from recipes.pipeline.classification import train_classifier
from recipes.pipeline.files import load_tensors, replacing, save_arrays
from recipes.pipeline.labels import measure_cams, read_mask, refine_masks, write_masks
from recipes.pipeline.models import Trunk, build_trunk
from recipes.pipeline.report import finish
from recipes.pipeline.run import Run, start
from recipes.pipeline.segmentation import segmentation_from_masks
from recipes.pipeline.training import MaskedCrops, Moment, RandomScale, crop_transform, fit, two_speed_groups
from recipes.pipeline.views import scaled_size, view
from recipes.settings.irn import PRESETS, Config, RelationConfig, WalkConfig
from wsss_losses import InterPixelRelationLoss
from wsss_modules import (
    IRN_CRF,
    DenseCRF,
    EdgeDisplacement,
    IRNHead,
    IRNOutput,
    RandomWalk,
    affinity_offsets,
    cam_to_mask,
    cluster_centroids,
    confident_label_from_cam,
    detect_instances,
    edge_displacement_inference,
    find_centroids,
    propagate_to_edge,
    walk_scores,
)

__all__ = ["PRESETS", "Config", "main"]

STRIDE = 4


class IRNet(nn.Module):
    """A frozen backbone under a boundary and a displacement branch: section 4.1."""

    def __init__(self, trunk: Trunk) -> None:
        super().__init__()
        self.trunk = trunk.requires_grad_(False)
        self.head = IRNHead(trunk.level_channels, [max(stride, STRIDE) for stride in trunk.level_strides])

    def features(self, images: Tensor) -> list[Tensor]:
        first, *others = self.trunk(images).levels
        return [F.max_pool2d(first, 3, stride=2, padding=1), *others]

    def forward(self, images: Tensor) -> IRNOutput:
        return self.head(self.features(images))

    def train(self, mode: bool = True) -> IRNet:
        super().train(mode)
        self.trunk.eval()
        return self


def write_confident_labels(run: Run, config: RelationConfig) -> None:
    """Section 3.2: areas whose class, or background, survives a strict threshold and the CRF; 255 elsewhere."""
    crf = DenseCRF(IRN_CRF)

    def mask_of(name: str) -> Tensor:
        cam, keys = read_cam(run, name).tensors(run.fabric.device)
        thresholds = {"fg": config.foreground, "bg": config.background}
        return confident_label_from_cam(cam, run.image(name)[None], **thresholds, keys=keys, crf=crf)[0]

    write_masks(run, run.train, mask_of, "ir_label")


def train_relations(run: Run, config: RelationConfig) -> IRNet:
    """Section 4.2: pairs within ``radius`` of the same class attract, others repel; displacements agree on a centre."""
    model = IRNet(build_trunk(config.backbone, run.weights(config.weights), output_stride=16))
    transform = crop_transform(RandomScale(*config.scale), config.crop, model.trunk.mean, model.trunk.std)
    crops = MaskedCrops(run.dataset, run.train, lambda name: read_mask(run, name, "ir_label"), transform)
    loss = InterPixelRelationLoss(radius=config.radius, sync=run.fabric.world_size > 1)

    def loss_of(model: nn.Module, batch: dict[str, Tensor], at: Moment) -> NamedTuple:
        edge_logits, displacement = model(batch["image"])
        centres = batch["mask"][:, STRIDE // 2 :: STRIDE, STRIDE // 2 :: STRIDE]  # nearest, at stride 4
        return loss(edge_logits, displacement, centres)

    groups = two_speed_groups(model, [model.head.displacement], config.schedule)
    fit(run, "relations", model, crops, loss_of, groups, config.schedule)
    return model


def relations_of(run: Run, model: IRNet, name: str, zoom: float) -> EdgeDisplacement:
    image = run.image(name)
    size = scaled_size(*image.shape[-2:], zoom)
    return edge_displacement_inference(view(image, size, model.trunk.mean, model.trunk.std, flip=False), model)


def cam_on_grid(run: Run, name: str, edge: Tensor) -> Tensor:
    """The CAMs of an image on the grid of its edges, (1, k, h, w): as they are unless the images were enlarged."""
    cam = torch.from_numpy(read_cam(run, name).coarse)[None].to(edge.device)
    same = cam.shape[-2:] == edge.shape[-2:]
    return cam if same else F.interpolate(cam, edge.shape[-2:], mode="bilinear", align_corners=False)


def walked_scores(run: Run, name: str, maps: Tensor, edge: Tensor, walk: WalkConfig, zoom: float) -> Tensor:
    """Section 5: maps (1, C, h, w) after the walk, as scores at the size of the image."""
    options = {"radius": walk.radius, "beta": walk.beta, "n_steps": walk.steps, "method": walk.method}
    walked = propagate_to_edge(maps, edge, **options)
    height, width = run.dataset.size(name)
    scores = walk_scores(walked, scaled_size(height, width, zoom), stride=STRIDE)
    return scores if zoom == 1 else F.interpolate(scores, (height, width), mode="bilinear", align_corners=False)


def write_walks(run: Run, model: IRNet, walk: WalkConfig, zoom: float) -> None:
    def mask_of(name: str) -> Tensor:
        edge = relations_of(run, model, name, zoom).edge
        scores = walked_scores(run, name, cam_on_grid(run, name, edge) ** walk.cam_power, edge, walk, zoom)
        keys = torch.from_numpy(read_cam(run, name).keys).to(edge.device)
        return cam_to_mask(scores, walk.threshold, keys=keys)[0]

    write_masks(run, run.train, mask_of)


def refine_with_irn(run: Run, relation: RelationConfig, walk: WalkConfig, mask_crf: bool) -> IRNet:
    """What IRN adds to any CAMs: from those in ``cam/`` to masks in ``mask/`` and, with a CRF, ``mask_crf/``."""
    with run.stage("labels", "Confident areas"):
        write_confident_labels(run, relation)

    with run.stage("relations", "Inter-pixel relation network"):
        net = train_relations(run, relation)

    with run.stage("masks", "Masks: random walk between boundaries, and a dense CRF"):
        write_walks(run, net, walk, relation.zoom)
        refine_masks(run, mask_crf)

    return net


@torch.no_grad()
def centre_displacements(run: Run, model: IRNet, zoom: float) -> None:
    """Take the mean displacement off, which the loss leaves free; kept in ``checkpoints/mean_shift.pt``."""
    file = run.path("checkpoints", "mean_shift.pt")
    fitted = file.exists()
    run.fabric.barrier()  # all look before one writes
    if not fitted:
        model.head.mean_shift.fit(
            (relations_of(run, model, name, zoom).displacement for name in run.train), weighting="pixel"
        )
        if run.fabric.global_rank == 0:
            with replacing(file) as out:
                torch.save(model.head.mean_shift.state_dict(), out)
        run.fabric.barrier()
    model.head.mean_shift.load_state_dict(load_tensors(file))


def write_instances(run: Run, model: IRNet, walk: WalkConfig, zoom: float) -> None:
    """Section 5.1 and 5.2: group the cells by the centre they point to and let the CAM of each class and group walk."""

    @torch.no_grad()
    def work(name: str) -> None:
        edge, displacement = relations_of(run, model, name, zoom)
        groups = cluster_centroids(find_centroids(displacement[0]), displacement[0])  # (n, h, w)
        maps = (cam_on_grid(run, name, edge)[0][:, None] * groups).flatten(0, 1)[None]  # (1, k * n, h, w)
        scores = walked_scores(run, name, maps, edge, walk, zoom)[0]
        classes = torch.from_numpy(read_cam(run, name).keys).repeat_interleave(len(groups)).to(edge.device)
        found = detect_instances(scores, classes, threshold=walk.threshold)
        arrays = {key: value.cpu().numpy() for key, value in found._asdict().items()}
        save_arrays(run.path("instances", f"{name}.npz"), **arrays)

    run.for_each(run.train, lambda name: run.path("instances", f"{name}.npz"), work)


def check(relation: RelationConfig, walk: WalkConfig) -> None:
    """Refuse what would only stop the run after the training of the classifier."""
    if relation.background > relation.foreground:
        raise ValueError(
            f"relation.background: expected at most relation.foreground = {relation.foreground}, "
            f"got {relation.background}"
        )
    affinity_offsets(relation.radius)
    affinity_offsets(walk.radius)
    RandomWalk(walk.beta, walk.steps, walk.method)


def main(config: Config) -> dict:
    check(config.relation, config.walk)
    run = start("irn", config)

    with run.stage("classify", "Classifier from tags"):
        classifier = train_classifier(run, config.classify)

    with run.stage("cams", "Class activation maps"):
        write_cams(run, classifier, run.train + run.val, config.cams)
        measure_cams(run, config.threshold)

    net = refine_with_irn(run, config.relation, config.walk, config.mask_crf)

    if config.instances:
        with run.stage("instances", "Instances"):
            centre_displacements(run, net, config.relation.zoom)
            write_instances(run, net, config.walk, config.relation.zoom)

    with run.stage("segment", "Segmentation network from the masks"):
        segmentation_from_masks(run, "mask_crf" if config.mask_crf else "mask", config.segment)

    return finish(run)


if __name__ == "__main__":
    run_recipe(sys.modules[__name__])

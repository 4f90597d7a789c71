# /// script
# requires-python = ">=3.10"
# dependencies = ["wsss[recipes,weights]"]
# ///
"""ReviewKD: Distilling Knowledge via Knowledge Review (Chen et al., CVPR 2021), on pseudo masks.

A segmentation network trained on pseudo masks teaches a smaller one. The student's maps, each fused with all deeper
ones, are to become the teacher's, so that a shallow map of the teacher also teaches deeper stages of the student. The
fusion is dropped after the training. The student is trained twice from the same start, alone and under the teacher.

    python -m recipes run reviewkd                                  # built-in demo data, two CPU cores
    python -m recipes run reviewkd --reuse runs/cam-demo-s0         # with the classifier and the CAMs of a finished run
    python -m recipes run reviewkd --preset paper --data voc:PATH

ReviewKD was published for classification and detection; there is no published setting for segmentation, and all of
them here are ours: maps of the encoders at strides 4 and up, the weight 1 of ImageNet and detection with a warm-up, and
masks from CAMs and the dense CRF. The teacher is in eval mode and without gradients. Maps are taken before the
activation that ends a stage, as published for ImageNet.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn

from recipes.cli import run_recipe
from recipes.pipeline.cams import write_cams
from recipes.pipeline.classification import train_classifier
from recipes.pipeline.labels import masks_by_threshold, measure_cams, measure_masks, read_mask
from recipes.pipeline.models import Trunk
from recipes.pipeline.report import finish
from recipes.pipeline.run import Run, start
from recipes.pipeline.segmentation import keep_network, masked_crops, pixel_loss, segment, train_segmentation
from recipes.pipeline.segmenter import SegmentConfig, Segmenter
from recipes.pipeline.training import Moment, fit, two_speed_groups
from recipes.settings.reviewkd import PRESETS, Config, StudentConfig
from wsss_losses import review_kd_loss
from wsss_modules import ReviewDistiller, teacher_features

__all__ = ["PRESETS", "Config", "main"]


def unactivated_levels(network: Segmenter, images: Tensor) -> tuple[Tensor, list[Tensor]]:
    """The logits, and the maps of the encoder from fine to coarse, before the activation that ends a stage.

    A stage of an EfficientNet ends without one; before that of a ResNet, which works in place, its map is copied.
    """
    body = network.encoder.body if isinstance(network.encoder, Trunk) else network.encoder.model
    before: dict[int, Tensor] = {}

    def keep(stage: int, _: nn.Module, arguments: tuple[Tensor]) -> None:
        before[stage] = arguments[0].clone()

    hooks = []
    for stage in range(1, 5):  # level 0 is the stem
        blocks = getattr(body, f"layer{stage}", [None])
        activation = getattr(blocks[-1], "act3", getattr(blocks[-1], "act2", None))
        if activation is not None:
            hooks.append(activation.register_forward_pre_hook(partial(keep, stage)))
    try:
        logits, levels = network.with_levels(images)
    finally:
        for hook in hooks:
            hook.remove()
    return logits, [before.get(stage, level) for stage, level in enumerate(levels)]


class Teacher(nn.Module):
    """The maps of a trained network, ``stages`` of them, for images normalised as the student wants them.

    Each is divided by its root mean square. The scale of a map is its network's own affair (that of EfficientNet-Lite0
    would weigh fifty times as much as the cross entropy); published weights are for maps of about unit size.
    """

    def __init__(self, network: Segmenter, student: Segmenter, stages: Sequence[int]) -> None:
        super().__init__()
        self.network, self.stages = network, stages
        scale = [theirs / ours for theirs, ours in zip(student.std, network.std, strict=True)]
        shift = [(a - b) / s for a, b, s in zip(student.mean, network.mean, network.std, strict=True)]
        self.register_buffer("scale", torch.tensor(scale).view(3, 1, 1), persistent=False)
        self.register_buffer("shift", torch.tensor(shift).view(3, 1, 1), persistent=False)

    def forward(self, images: Tensor) -> list[Tensor]:
        levels = unactivated_levels(self.network, images * self.scale + self.shift)[1]
        maps = [levels[stage].float() for stage in self.stages]  # squares of half a number overflow
        return [x / x.square().mean().sqrt().clamp(min=1e-6) for x in maps]


class Reviewed(nn.Module):
    """A student with the fusion of its maps at ``stages``, which is needed in training only."""

    def __init__(self, student: Segmenter, stages: Sequence[int], distiller: ReviewDistiller) -> None:
        super().__init__()
        self.student, self.stages, self.distiller = student, stages, distiller

    def forward(self, images: Tensor, sizes: Sequence[tuple[int, int]]) -> tuple[Tensor, list[Tensor]]:
        logits, levels = unactivated_levels(self.student, images)
        return logits, self.distiller([levels[stage] for stage in self.stages], sizes)


class Terms(NamedTuple):
    total: Tensor
    segmentation: Tensor
    distillation: Tensor


@torch.no_grad()
def meeting_stages(student: Segmenter, teacher: Segmenter) -> tuple[dict[int, int], list[int], list[int]]:
    """Which stage of the teacher meets which of the student, and the channels of both.

    All stages of the student from stride 4 on. Networks with as many stages meet stage by stage, whatever their
    strides; otherwise a stage meets one of its own stride, if there is any, the deepest of them the deepest.
    """
    shapes = []
    for network in (student, teacher):
        was_training, image = network.training, torch.zeros(1, 3, 64, 64, device=next(network.parameters()).device)
        shapes.append([tuple(level.shape[1:3]) for level in network.eval().with_levels(image)[1]])
        network.train(was_training)
    of_student, of_teacher = shapes
    pairs: dict[int, int] = {}
    if len(of_student) == len(of_teacher):
        pairs = {stage: stage for stage, (_, side) in enumerate(of_student) if side <= 16}
    else:
        for side in {side for _, side in of_student if side <= 16}:
            ours, theirs = ([stage for stage, (_, s) in enumerate(of) if s == side][::-1] for of in shapes)
            if theirs:
                pairs |= {stage: theirs[min(place, len(theirs) - 1)] for place, stage in enumerate(ours)}
    if not pairs:
        raise ValueError(f"student: expected maps of the teacher's sizes, got {of_student} and {of_teacher}")
    pairs = dict(sorted(pairs.items()))
    return pairs, [of_student[stage][0] for stage in pairs], [of_teacher[stage][0] for stage in pairs.values()]


def check(config: StudentConfig) -> None:
    """A word on what is wrong with the settings, before the teacher is trained."""
    if not 3 <= config.depth <= 5:
        raise ValueError(f"student.depth: expected 3 to 5, got {config.depth}")
    if config.decoder_channels < 1 or config.mid_channels < 1:
        told = f"{config.decoder_channels} and {config.mid_channels}"
        raise ValueError(f"student.decoder_channels, student.mid_channels: expected at least 1, got {told}")
    if config.weight < 0 or config.warmup < 0:
        raise ValueError(
            f"student.weight, student.warmup: expected at least 0, got {config.weight} and {config.warmup}"
        )


def new_student(run: Run, config: StudentConfig) -> Segmenter:
    """The student as it starts, always the same."""
    torch.manual_seed(run.derived_seed("student"))
    network = replace(config.network, weights=run.weights(config.network.weights))
    classes = 1 + len(run.dataset.classes)
    return Segmenter(network, classes, depth=config.depth, decoder_channels=config.decoder_channels)


def train_student(run: Run, student: Segmenter, teacher: Segmenter | None, config: StudentConfig, stage: str) -> None:
    """On the masks that the teacher learnt from, alone or with the teacher's maps besides."""
    network, crops = (
        config.network,
        masked_crops(run, lambda name: read_mask(run, name, "mask_crf"), config.network, student),
    )
    if teacher is None:

        def alone(model: nn.Module, batch: dict[str, Tensor], at: Moment) -> Tensor:
            return pixel_loss(model(batch["image"]), batch["mask"])

        groups = two_speed_groups(student, student.head_modules, network.schedule)
        fit(run, stage, student, crops, alone, groups, network.schedule)
        return

    pairs, of_student, of_teacher = meeting_stages(student, teacher)
    distiller = ReviewDistiller(of_student, of_teacher, config.mid_channels)
    guide = Teacher(teacher, student, list(pairs.values())).to(run.fabric.device)

    def distilled(model: nn.Module, batch: dict[str, Tensor], at: Moment) -> Terms:
        with run.fabric.autocast():
            wanted = teacher_features(guide, batch["image"])
        logits, maps = model(batch["image"], [x.shape[-2:] for x in wanted])
        task = pixel_loss(logits, batch["mask"])
        warmup = config.warmup * at.steps
        distance = review_kd_loss(maps, wanted, at.step, weight=config.weight, warmup=warmup)
        return Terms(task + distance, task, distance)

    model = Reviewed(student, list(pairs), distiller)
    groups = two_speed_groups(model, [*student.head_modules, distiller], network.schedule)
    fit(run, stage, model, crops, distilled, groups, network.schedule)


def measure_student(run: Run, student: Segmenter, config: SegmentConfig, folder: str, what: str) -> None:
    segment(run, student.eval(), run.val or run.train, config, folder)
    measure_masks(run, folder, what)


def main(config: Config) -> dict:
    check(config.student)
    run = start("reviewkd", config)
    new_student(run, config.student)  # tells an unknown network or missing weights

    with run.stage("classify", "Classifier from tags"):
        classifier = train_classifier(run, config.classify)

    with run.stage("cams", "Class activation maps"):
        write_cams(run, classifier, run.train + run.val, config.cams)
        measure_cams(run, config.threshold)

    with run.stage("masks", "Masks: threshold, and a dense CRF"):
        masks_by_threshold(run, config.threshold, everywhere=True)

    with run.stage("segment", "Teacher from the masks"):
        teacher = train_segmentation(run, lambda name: read_mask(run, name, "mask_crf"), config.segment)
        measure_student(run, teacher, config.segment, "segmentation", "segmentation")

    network = config.student.network
    with run.stage("student", "Student alone"):
        alone = new_student(run, config.student)
        train_student(run, alone, None, config.student, "student")
        measure_student(run, alone, network, "student", "student alone")

    with run.stage("distil", "Student under the teacher"):
        distilled = new_student(run, config.student)
        train_student(run, distilled, teacher, config.student, "distil")
        keep_network(run, distilled, network)
        measure_student(run, distilled, network, "distilled", "student distilled")
        weights = {"teacher": teacher, "student": distilled}
        run.record(parameters={name: sum(p.numel() for p in net.parameters()) for name, net in weights.items()})

    return finish(run)


if __name__ == "__main__":
    run_recipe(sys.modules[__name__])

"""Losses of features: C2AM, W-OoD, RCA, PPC, ReviewKD."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

import wsss_losses as losses
from tests.losses.table.case import POSITIVE, LossCase, random, two_views
from wsss_modules import draw_region_mix_up


def _one_region(situation: str, seed: int = 4) -> tuple[Tensor]:
    """Features of images as after a ReLU: (B, D). No batch at all where all is ignored, none active without a label."""
    images = {"all_ignored": 0, "batch_1": 1, "smallest": 1}.get(situation, 2)
    features = random(images, 1 if situation == "smallest" else 5, seed=seed).abs() + 0.1
    return (features * (situation != "no_label"),)


def _two_regions(situation: str) -> tuple[Tensor, Tensor]:
    return (*_one_region(situation, seed=5), *_one_region(situation, seed=6))


def _wood(situation: str) -> tuple[Tensor, ...]:
    """Logits, features, logits of images from outside, labels, class and OoD centres, which of these there are."""
    batch, classes, clusters, channels = (1, 1, 1, 1) if situation == "smallest" else (2, 3, 10, 4)
    batch = 1 if situation == "batch_1" else batch
    labels = torch.tensor([[1.0, 1, 0], [0, 1, 1]], dtype=torch.float64)[:batch, :classes]
    labels = labels * 0 if situation == "no_label" else labels
    of_classes, of_clusters = torch.ones(classes, dtype=torch.bool), torch.ones(clusters, dtype=torch.bool)
    of_classes[2:], of_clusters[4:5] = False, False
    if situation == "all_ignored":
        of_classes, of_clusters = ~of_classes & of_classes, ~of_clusters & of_clusters
    ood_logits = random(batch, classes, seed=9)
    ood_logits[:, 0] += 100.0 if situation == "all_ignored" else 0.0
    centres = (random(classes, channels, seed=11), random(clusters, channels, seed=12))
    features = random(batch, channels, seed=10)
    return random(batch, classes, seed=8), features, ood_logits, labels, *centres, of_classes, of_clusters


def _regions(situation: str) -> tuple[Any, ...]:
    images, size = 1 if situation == "batch_1" else 2, 1 if situation == "smallest" else 4
    embedding, cam = random(images, 6, size, size, seed=1), 3 * random(images, 3, size, size, seed=2)
    labels = torch.tensor([[1.0, 0.0, 1.0], [0.0, 1.0, 0.0]], dtype=torch.float64)[:images]
    if situation in ("no_label", "all_ignored"):
        labels = torch.zeros_like(labels)
    mix = draw_region_mix_up(labels, generator=torch.Generator().manual_seed(4))
    return embedding, cam, labels, random(3, 4, 6, seed=3), torch.tensor([4, 2, 3]), mix


def _contrast(situation: str) -> tuple[Tensor, ...]:
    """Features and maps of both views, labels, the pixels drawn, and prototypes with the background's."""
    cam1, cam2, labels = two_views(situation)
    features = (random(len(x), 6, *x.shape[2:], seed=seed) for seed, x in enumerate((cam1, cam2), 5))
    drawn = (random(len(cam2), *cam2.shape[2:], seed=seed) > 0 for seed in (7, 8))
    return *features, cam1, cam2, labels, *drawn, random(4, 6, seed=9), random(4, 6, seed=10)


def _student_and_teacher(situation: str) -> tuple[Tensor, Tensor]:
    """Feature maps; no image at all where all is ignored, equal ones where there is no label."""
    images = {"all_ignored": 0, "batch_1": 1}.get(situation, 2)
    student = random(images, 3, *((1, 1) if situation == "smallest" else (5, 6)), seed=1)
    return student, student.clone() if situation == "no_label" else random(*student.shape, seed=2)


def _two_logits(situation: str) -> tuple[Tensor, Tensor]:
    images = {"all_ignored": 0, "batch_1": 1}.get(situation, 2)
    student = random(images, 1 if situation == "smallest" else 4, seed=1)
    return student, random(*student.shape, seed=2)


CASES = (
    LossCase(
        losses.sim_min_loss,
        losses.SimMinLoss,
        _two_regions,
        predictions=2,
        varies=({"reduction": "sum"}, {"reduction": "none"}),
        sync=True,
        axes=("B", "B"),
        ranges={"bg": POSITIVE, "fg": POSITIVE},
        scales={"bg": 0, "fg": 0},
        mean_over=lambda bg, fg: len(bg) ** 2,
    ),
    LossCase(
        losses.sim_max_loss,
        losses.SimMaxLoss,
        _one_region,
        varies=(
            {"reduction": "sum", "alpha": 0.05},
            {"reduction": "none", "normalize": "pairs"},
            {"normalize": "weights", "topk": 1, "min_weight": 0},
        ),
        sync=True,
        axes=("B",),
        ranges={"features": POSITIVE},
        scales={"features": 0},
        mean_over=lambda features: len(features) ** 2,
    ),
    LossCase(
        losses.c2am_loss,
        losses.C2AMLoss,
        _two_regions,
        predictions=2,
        varies=({"normalize": "weights", "pull_weight": 0.035},),
        sync=True,
        axes=("B", "B"),
        ranges={"fg": POSITIVE, "bg": POSITIVE},
        scales={"bg": 0, "fg": 0},
    ),
    LossCase(
        losses.ood_metric_loss,
        losses.OoDMetricLoss,
        lambda situation: (_wood(situation)[1], *_wood(situation)[3:]),
        options={"topk": 0.3},
        varies=(
            {"reduction": "sum", "selection": "image"},
            {"reduction": "none", "margin": 2.0, "topk": 0.5},
            {"topk": 0.0},
            {"topk": 1.0},
        ),
        sync=True,
        constants=4,
        axes=("B", "BK", "K", "", "K", ""),
        scales={"features class_centres ood_centres": 1},
    ),
    LossCase(
        losses.ood_negative_loss,
        losses.OoDNegativeLoss,
        lambda situation: _wood(situation)[2:3],
        options={"ignore_top": (0,)},
        zero_in=("all_ignored", "smallest"),  # the only class there is
        varies=({"reduction": "sum"}, {"reduction": "none", "ignore_top": (0, 2)}),
        axes=("B",),  # the first class is ignored
    ),
    LossCase(
        losses.wood_loss,
        losses.WOoDLoss,
        _wood,
        predictions=3,
        zero_in=(),  # tags are learnt without any centre too
        varies=(
            {"selection": "image", "margin": 2.0, "ignore_top": (0,)},
            {"distance_weight": 1.0, "ood_weight": 0.5, "topk": 0.5},
        ),
        sync=True,
        constants=4,
        axes=("BK", "B", "BK", "BK", "K", "", "K", ""),
    ),
    LossCase(
        losses.regional_contrast_loss,
        losses.RegionalContrastLoss,
        _regions,
        zero_in=("no_label", "all_ignored", "smallest"),
        varies=({"reduction": "none", "temperature": 0.5}, {"reduction": "mean", "log_floor": 1e-4}),
        data_dependent="the number of regions depends on the labels",
        axes=("B", "BK", "BK", "K", "K", ("R=image", "R=channel", "R")),
        scales={"embedding": 0, "memory": 0},
        shifts="cam",
    ),
    LossCase(
        losses.pixel_to_prototype_contrast_loss,
        losses.PixelToPrototypeContrastLoss,
        _contrast,
        predictions=2,
        zero_in=(),  # pixels of the background have a prototype too
        varies=(
            {"temperature": 0.5, "background": 0.4, "semi_hard": (0, 2), "hard_ratio": 0.9, "grid": (4, 5)},
            {"drop_absent": True, "cross_prototype_weight": 1.0, "cross_cam_weight": 0.5, "intra_weight": 2.0},
        ),
        sync=True,
        constants=2,
        axes=("B", "B", "BK", "BK", "BK", "B", "B", "C", "C"),
        scales={"features1": 0, "features2": 0, "cam1": 0, "cam2": 0},
    ),
    LossCase(
        losses.hierarchical_context_loss,
        losses.HierarchicalContextLoss,
        _student_and_teacher,
        zero_in=("all_ignored", "no_label"),
        varies=({"levels": (3, 2), "decay": 2.0, "reduction": "sum"}, {"reduction": "none"}),
        axes=("BK", "BK"),
        scales={"student teacher": 2},
    ),
    LossCase(
        losses.distill_kl_loss,
        losses.DistillKLLoss,
        _two_logits,
        zero_in=("all_ignored", "smallest"),  # the only class there is
        varies=({"temperature": 1.0, "reduction": "sum"}, {"reduction": "none"}),
        axes=("BK", "BK"),
        shifts="student teacher",
    ),
    LossCase(
        losses.review_kd_loss,
        losses.ReviewKDLoss,
        lambda situation: (*_student_and_teacher(situation), 8.0),
        zero_in=("all_ignored", "no_label"),
        varies=({"weight": 5.0, "warmup": 0.0, "levels": (2, 1), "decay": 0.25},),
        axes=("BK", "BK", ""),
        scales={"student teacher": 2},
    ),
)

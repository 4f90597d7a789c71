"""Losses of image scores and tags: OC-CSE, ReCAM, Spatial-BCE, MCTformer, ViT-PCM, EDAM."""

from __future__ import annotations

import torch
from torch import Tensor

import wsss_losses as losses
from tests.losses.table.case import UNIT, LossCase, image_labels, pixel_logits, random
from wsss_modules import merge_class_labels, sample_erase_class


def _erasing(situation: str) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Logits of two networks, labels, and the labels without the first class of each image."""
    labels = torch.tensor([[1.0, 0, 1, 0], [0, 1, 0, 0], [1, 1, 1, 1]], dtype=torch.float64)
    if situation == "no_label":
        labels[1] = 0
    if situation == "all_ignored":
        labels = labels * 0
    if situation == "batch_1":
        labels = labels[:1]
    if situation == "smallest":
        labels = labels[:1, :1]
    remaining = sample_erase_class(labels, index=labels.argmax(1)).remaining
    return random(*labels.shape, seed=4), random(*labels.shape, seed=5), labels, remaining


def _recam(situation: str) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Image logits, features of each class, labels, and the second classifier."""
    labels = torch.tensor([[1.0, 0, 1, 0], [0, 1, 0, 0], [1, 1, 1, 1]], dtype=torch.float64)
    if situation == "no_label":
        labels[1] = 0
    if situation == "all_ignored":
        labels = labels * 0
    if situation == "batch_1":
        labels = labels[:1]
    if situation == "smallest":
        labels = labels[:1, :1]
    batch, classes = labels.shape
    return random(batch, classes, seed=6), random(batch, classes, 3, seed=7), labels, random(classes, 3, seed=8)


def _spatial_bce(situation: str) -> tuple[Tensor, Tensor, Tensor]:
    labels = image_labels(situation)
    return pixel_logits(situation, 1), labels, torch.sigmoid(random(*labels.shape, seed=2))


def _spatial_bce_threshold(situation: str) -> tuple[Tensor, Tensor, Tensor]:
    return pixel_logits(situation, 1), image_labels(situation), pixel_logits(situation, 2)


def _foreground_ratio(situation: str) -> tuple[Tensor, Tensor, Tensor]:
    labels = image_labels(situation)
    return pixel_logits(situation, 1), labels, 0.2 * labels


def _class_tokens(situation: str) -> tuple[Tensor, Tensor]:
    """Class tokens after two blocks, (2, B, 3, 4), or (2, 1, 1, 1); and labels."""
    labels = image_labels(situation)
    smallest = situation == "smallest"
    labels = labels[:, :1] if smallest else labels
    return random(2, *labels.shape, 1 if smallest else 4, seed=3), labels


def _mctformer(situation: str) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    tokens, labels = _class_tokens(situation)
    return random(*labels.shape, seed=1), random(*labels.shape, seed=2), tokens, labels


def _tags(situation: str) -> tuple[Tensor, Tensor]:
    labels = image_labels(situation)
    return random(*labels.shape, seed=1), labels


def _pooled(situation: str) -> tuple[Tensor, Tensor]:
    """Probabilities and labels of background and three classes; only the background where there is no label."""
    labels = torch.nn.functional.pad(image_labels(situation), (1, 0), value=1.0)
    return torch.sigmoid(random(*labels.shape, seed=1)), labels


def _patch_views(situation: str) -> tuple[Tensor, Tensor]:
    labels = image_labels(situation)
    size = (1, 1) if situation == "smallest" else (4, 4)
    probs, views = (random(*labels.shape, *size, seed=seed).softmax(1) for seed in (1, 2))
    return views, merge_class_labels(probs, labels)


def _sampled_classes(situation: str) -> tuple[Tensor, Tensor, Tensor]:
    """Logits of two of three classes, labels, and which classes: another pair for each image."""
    labels = image_labels(situation)
    return random(len(labels), 2, seed=16), labels, torch.tensor([[3, 1], [2, 3]])[: len(labels)]


CASES = (
    LossCase(
        losses.multi_label_soft_margin_loss,
        losses.MultiLabelSoftMarginLoss,
        _tags,
        zero_in=(),  # the absence of all classes is learnt too
        varies=({"reduction": "sum"}, {"reduction": "none"}),
        axes=("BK", "BK"),
    ),
    LossCase(
        losses.class_specific_erasing_loss,
        losses.ClassSpecificErasingLoss,
        _erasing,
        predictions=2,
        zero_in=(),  # the absence of all classes is learnt too
        varies=({"reduction": "sum"}, {"reduction": "none", "weight": 1.0}),
        axes=("BK", "BK", "BK", "BK"),
        mean_over=lambda logits, erased, labels, remaining: {
            "classification": len(labels),
            "erasing": int(labels.any(1).sum()),  # nothing is erased where there is no label
        },
    ),
    LossCase(
        losses.sce_reactivation_loss,
        losses.SoftmaxReactivationLoss,
        lambda situation: _recam(situation)[1:],
        zero_in=("all_ignored", "smallest"),  # one class alone is certain
        varies=({"reduction": "sum"}, {"reduction": "none"}),
        axes=("BK", "BK", "K"),
        ignores_absent="class_features",
    ),
    LossCase(
        losses.recam_loss,
        losses.ReCAMLoss,
        _recam,
        predictions=2,
        zero_in=(),  # the absence of all classes is learnt too
        varies=({"sce_weight": 0.1, "reduction": "sum"}, {"reduction": "none"}),
        axes=("BK", "BK", "BK", "K"),
        ignores_absent="class_features",
    ),
    LossCase(
        losses.spatial_bce_loss,
        losses.SpatialBCELoss,
        _spatial_bce,
        zero_in=(),  # the absence of all classes is learnt too
        varies=(
            {"min_threshold": 0.5, "eps": 0.2, "reduction": "sum"},
            {"reduction": "none", "log_floor": 1e-2},
        ),
        axes=("BK", "BK", "BK"),
    ),
    LossCase(
        losses.spatial_bce_threshold_loss,
        losses.SpatialBCEThresholdLoss,
        _spatial_bce_threshold,
        zero_in=("all_ignored", "no_label"),
        sync=True,
        axes=("BK", "BK", "BK"),
        ignores_absent="threshold_logits",
    ),
    LossCase(
        losses.foreground_ratio_kl_loss,
        losses.ForegroundRatioKLLoss,
        _foreground_ratio,
        zero_in=("all_ignored", "no_label"),
        varies=({"reduction": "sum"}, {"reduction": "none"}),
        sync=True,
        axes=("BK", "BK", "BK"),
        ignores_absent="logits",
        mean_over=lambda logits, labels, ratio: int(labels.sum()),
    ),
    LossCase(
        losses.class_token_contrastive_loss,
        losses.ClassTokenContrastiveLoss,
        _class_tokens,
        zero_in=("no_label", "all_ignored", "smallest"),  # the only class there is
        varies=({"reduction": "sum", "num_layers": 1}, {"reduction": "none", "eps": 0.5}),
        axes=(".BK", "BK"),
        scales={"class_tokens": 0},
    ),
    LossCase(
        losses.mctformer_loss,
        losses.MCTformerLoss,
        _mctformer,
        predictions=3,
        zero_in=(),  # the absence of all classes is learnt too
        varies=({"reduction": "sum", "num_layers": 1}, {"reduction": "none", "contrast_weight": 0.5}),
        axes=("BK", "BK", ".BK", "BK"),
    ),
    LossCase(
        losses.pooled_probability_bce_loss,
        losses.PooledProbabilityBCELoss,
        _pooled,
        zero_in=(),  # the background is learnt in every image
        varies=({"reduction": "sum", "eps": 1e-3}, {"reduction": "none"}),
        axes=("BC", "BC"),
        ranges={"pooled": UNIT},
    ),
    LossCase(
        losses.patch_equivariance_loss,
        losses.PatchEquivarianceLoss,
        _patch_views,
        zero_in=("no_label", "all_ignored"),
        varies=({"reduction": "sum", "eps": 1e-3}, {"reduction": "none"}),
        axes=("BK", "BK"),
        ranges={"view_probs": UNIT},
    ),
    LossCase(
        losses.edam_loss,
        losses.EDAMLoss,
        _sampled_classes,
        zero_in=(),  # the absence of all classes is learnt too
        varies=({"reduction": "sum"}, {"reduction": "none"}),
        axes=("B", "BK", "B=class"),
    ),
)

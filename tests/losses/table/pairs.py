"""Losses over pairs of pixels: PSA, IRN, AFA."""

from __future__ import annotations

import torch
from torch import Tensor

import wsss_losses as losses
from tests.losses.table.case import UNIT, LossCase, label_map, random
from wsss_modules import AffinityLabels, affinity_labels, labels_to_affinity


def _pair_affinity(situation: str) -> tuple[Tensor, AffinityLabels]:
    labels = affinity_labels(label_map(situation, 5, 6), 3, border="full")
    return torch.sigmoid(random(*labels.neg.shape, seed=1)), labels


def _edge_and_mask(situation: str) -> tuple[Tensor, Tensor]:
    mask = label_map(situation, 5, 8)
    return random(len(mask), 1, *mask.shape[1:], seed=1), mask


def _displacement_and_mask(situation: str) -> tuple[Tensor, Tensor]:
    mask = label_map(situation, 5, 8)
    return random(len(mask), 2, *mask.shape[1:], seed=2), mask


def _irn_maps(situation: str) -> tuple[Tensor, Tensor, Tensor]:
    return (*_edge_and_mask(situation)[:1], *_displacement_and_mask(situation))


def _attention_affinity(situation: str) -> tuple[Tensor, Tensor]:
    target = labels_to_affinity(label_map(situation, 3, 4), radius=1, stride=1)
    return torch.sigmoid(random(*target.shape, seed=1)), target


def _segmentation(situation: str) -> tuple[Tensor, Tensor]:
    mask = label_map(situation, 6, 8)
    coarse = (1, 1) if situation == "smallest" else (3, 4)
    return random(len(mask), 3, *coarse, seed=2), mask


def _afa(situation: str) -> tuple[Tensor, ...]:
    (affinity, target), (seg_logits, mask) = _attention_affinity(situation), _segmentation(situation)
    labels = torch.tensor([[1.0, 0], [1, 1]], dtype=torch.float64)[: len(mask)]
    labels = labels * 0 if situation in ("no_label", "all_ignored") else labels
    return random(*labels.shape, seed=3), seg_logits, affinity, labels, mask, target


PAIR_OPTIONS = {"radius": 3}
FULL_BORDER = {"radius": 4, "border": "full", "num_classes": 2}

CASES = (
    LossCase(
        losses.affinity_loss,
        losses.AffinityLoss,
        _pair_affinity,
        zero_in=("all_ignored", "smallest"),
        sync=True,
        axes=("B", ("B", "B", "B")),
        ranges={"affinity": UNIT},
    ),
    LossCase(
        losses.boundary_affinity_loss,
        losses.BoundaryAffinityLoss,
        _edge_and_mask,
        options=PAIR_OPTIONS,
        zero_in=("all_ignored", "smallest"),
        varies=(FULL_BORDER,),
        sync=True,
        axes=("B", "B=class"),
    ),
    LossCase(
        losses.displacement_loss,
        losses.DisplacementLoss,
        _displacement_and_mask,
        options=PAIR_OPTIONS,
        zero_in=("all_ignored", "smallest"),
        varies=(FULL_BORDER,),
        sync=True,
        axes=("B", "B=class"),
    ),
    LossCase(
        losses.inter_pixel_relation_loss,
        losses.InterPixelRelationLoss,
        _irn_maps,
        predictions=2,
        options=PAIR_OPTIONS,
        zero_in=("all_ignored", "smallest"),
        varies=(FULL_BORDER,),
        sync=True,
        axes=("B", "B", "B=class"),
    ),
    LossCase(
        losses.attention_affinity_loss,
        losses.AttentionAffinityLoss,
        _attention_affinity,
        varies=({"form": "log", "eps": 1e-3}, *({"reduction": reduction} for reduction in ("mean", "sum", "none"))),
        sync=True,
        axes=("B", "B"),
        ranges={"affinity": UNIT},
    ),
    LossCase(
        losses.balanced_cross_entropy_loss,
        losses.BalancedCrossEntropyLoss,
        _segmentation,
        sync=True,
        axes=("BC", "B=class"),
        shifts="logits",
    ),
    LossCase(
        losses.afa_loss,
        losses.AFALoss,
        _afa,
        predictions=3,
        zero_in=(),  # the absence of all classes is learnt too
        varies=({"seg_weight": 1.0, "affinity_weight": 0.5},),
        sync=True,
        axes=("BK", "BC", "B", "BK", "B=class", "B"),
        ranges={"affinity": UNIT},
        shifts="seg_logits",
    ),
)

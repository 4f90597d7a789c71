"""Losses of boxes: BANA, BBAM."""

from __future__ import annotations

import torch
from torch import Tensor

import wsss_losses as losses
from tests.losses.table.case import COSINE, UNIT, LossCase, label_map, random


def _noise_aware(situation: str) -> tuple[Tensor, Tensor, Tensor]:
    """Coarse cosines, the label on which both agree, and the one to fall back on."""
    y_crf = label_map(situation, 6, 8)
    coarse = (1, 1) if situation == "smallest" else (3, 4)
    differ = random(*y_crf.shape, seed=17) > 0.3
    return torch.tanh(0.5 * random(len(y_crf), 3, *coarse, seed=18)), torch.where(differ, 255, y_crf), y_crf


def _mask_of_cells(situation: str) -> tuple[Tensor]:
    size = (1, 1) if situation == "smallest" else (4, 5)
    return (torch.sigmoid(random(1, *size, seed=19)) * (situation not in ("no_label", "all_ignored")),)


def _detections(situation: str) -> tuple[Tensor, ...]:
    """Detections under a mask, the mask, those without it, and classes; no proposal where there is nothing to tell."""
    count = {"no_label": 0, "all_ignored": 0, "batch_1": 1, "smallest": 1}.get(situation, 3)
    logits, deltas = random(count, 4, seed=20), random(count, 16, seed=21)
    clean = random(count, 4, seed=22), random(count, 16, seed=23)
    return logits, deltas, *_mask_of_cells(situation), *clean, torch.tensor([3, 1, 2])[:count]


def _region_masks(situation: str) -> tuple[Tensor, ...]:
    """Masks of two regions, their classes, and strict and loose seeds."""
    count, side = (1 if situation in ("batch_1", "smallest") else 2), 1 if situation == "smallest" else 6
    labels = torch.tensor([2, 1])[:count] * (situation not in ("no_label", "all_ignored"))
    strict = torch.zeros(count, side, side, dtype=torch.float64)
    loose = strict.clone()
    strict[:, 1:3, 1:4], loose[:, :4, :5] = 1, 1
    return 2 * random(count, 3, side, side, seed=24), labels, strict, loose


CASES = (
    LossCase(
        losses.noise_aware_loss,
        losses.NoiseAwareLoss,
        _noise_aware,
        varies=({"temperature": 5.0, "gamma": 2.0, "lam": 1.0}, {"gamma": 0.0}),
        sync=True,
        axes=("BC", "B=class", "B=class"),
        ranges={"cosine": COSINE},
    ),
    LossCase(
        losses.mask_total_variation,
        losses.MaskTotalVariation,
        _mask_of_cells,
        zero_in=("no_label", "all_ignored", "smallest"),  # nothing differs
        varies=({"beta": 2.0, "diagonal": False}, {"reduction": "mean"}),
        axes=("",),
        ranges={"mask": UNIT},
        scales={"mask": 3},
    ),
    LossCase(
        losses.box_attribution_loss,
        losses.BoxAttributionLoss,
        _detections,
        predictions=3,
        zero_in=("no_label", "all_ignored"),
        varies=({"area": 0.07, "tv": 0.1, "tv_beta": 2.0}, {"classification_weight": 0.0, "box_weight": 1.0}),
        axes=("B", "B", "", "B", "B", "B"),
        ranges={"mask": UNIT},
        shifts="logits clean_logits",
    ),
    LossCase(
        losses.seed_growing_mask_loss,
        losses.SeedGrowingMaskLoss,
        _region_masks,
        zero_in=("no_label", "all_ignored", "smallest"),  # a seed alone does not count
        varies=({"threshold": 0.6}, {"threshold": 1.0}),
        sync=True,
        axes=("BC", "B=class", "B", "B"),
    ),
)

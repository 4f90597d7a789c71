"""Losses of image-text similarities: CLIMS."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

import wsss_losses as losses
from tests.losses.table.case import COSINE, UNIT, LossCase, image_labels, random


def _pair_similarity(situation: str) -> tuple[Tensor, Tensor]:
    """Similarities of pairs of an image and a class, one of them negative, and the weights of the pairs."""
    pairs = {"no_label": 0, "all_ignored": 0, "batch_1": 1, "smallest": 1}.get(situation, 2)
    similarity, weight = torch.tensor([[0.4, -0.3], [3.0, 1.0]], dtype=torch.float64)
    return similarity[:pairs], weight[:pairs]


def _background_similarity(situation: str) -> tuple[Tensor, Tensor]:
    """Similarities with texts, and which texts are related to the class of the pair."""
    pairs = {"no_label": 0, "all_ignored": 0, "batch_1": 1, "smallest": 1}.get(situation, 2)
    texts = 1 if situation == "smallest" else 3
    similarity = torch.tensor([[0.5, -0.4, 0.15], [-0.6, 0.35, 0.8]], dtype=torch.float64)
    related = torch.tensor([[True, True, False], [False, False, True]])
    return similarity[:pairs, :texts], related[:pairs, :texts]


def _encode_image(images: Tensor) -> Tensor:
    """Stands in for the image tower of an image-text model, with 5 features; in float32 or better, autocast or not."""
    weight = random(3, 5, seed=19).to(images)
    return (images.mean((2, 3))[:, :, None] * weight).sum(1) + 0.5


def _image_text(situation: str) -> tuple[Any, ...]:
    """Activations, images, labels, the image tower, features of the classes' texts and of backgrounds."""
    labels = image_labels(situation)
    size = (1, 1) if situation == "smallest" else (3, 4)
    activation = torch.sigmoid(random(*labels.shape, *size, seed=20))
    images = random(len(labels), 3, 7, 8, seed=21) + 0.5 * random(len(labels), 3, 1, 1, seed=22)
    return activation, images, labels, _encode_image, random(3, 5, seed=23) + 0.5, random(4, 5, seed=24) + 0.5


def _image_related_text(situation: str) -> tuple[Any, ...]:
    related = torch.tensor([[1, 1, 0, 0], [0, 0, 0, 0], [0, 1, 1, 1]], dtype=torch.bool)
    return *_image_text(situation), related, torch.tensor([1.0, 3.0, 2.0], dtype=torch.float64)


CASES = (
    LossCase(
        losses.object_text_matching_loss,
        losses.ObjectTextMatchingLoss,
        _pair_similarity,
        zero_in=("no_label", "all_ignored"),
        varies=(
            {"clamp": None, "positive": True, "reduction": "sum"},
            {"leak": 0.5, "margin": 0.1, "reduction": "none"},
        ),
        sync=True,
        axes=("B", "B"),
        ranges={"similarity": COSINE},
        scales={"weight": 1},
    ),
    LossCase(
        losses.background_text_matching_loss,
        losses.BackgroundTextMatchingLoss,
        _pair_similarity,
        zero_in=("no_label", "all_ignored"),
        varies=(
            {"clamp": None, "positive": True, "reduction": "sum"},
            {"leak": 0.5, "margin": 0.1, "reduction": "none"},
        ),
        sync=True,
        axes=("B", "B"),
        ranges={"similarity": COSINE},
        scales={"weight": 1},
    ),
    LossCase(
        losses.background_suppression_loss,
        losses.BackgroundSuppressionLoss,
        lambda situation: _background_similarity(situation)[:1],
        zero_in=("no_label", "all_ignored"),
        varies=({"threshold": 0.1, "reduction": "mean"}, {"reduction": "none"}),
        sync=True,
        axes=("BK",),
        ranges={"similarity": COSINE},
    ),
    LossCase(
        losses.class_background_suppression_loss,
        losses.ClassBackgroundSuppressionLoss,
        _background_similarity,
        zero_in=("no_label", "all_ignored"),
        varies=({"reduction": "mean"}, {"reduction": "none"}),
        sync=True,
        axes=("BK", "BK"),
        ranges={"similarity": COSINE},
    ),
    LossCase(
        losses.area_regularization_loss,
        losses.AreaRegularizationLoss,
        lambda situation: _image_text(situation)[:1],
        zero_in=(),  # whatever an image shows
        varies=({"reduction": "sum"}, {"reduction": "none"}),
        axes=("BK",),
        ranges={"activation": UNIT},
        scales={"activation": 1},
    ),
    LossCase(
        losses.clims_loss,
        losses.CLIMSLoss,
        _image_text,
        options={"size": 6},
        zero_in=(),  # the area counts without a label too
        varies=(
            {"size": (5, 4), "leak": 0.5, "suppression_reduction": "mean", "threshold": 0.1},
            {
                "size": 6,
                "positive": True,
                "image_norm": ((0.4,) * 3, (0.2,) * 3),
                "encoder_norm": ((0.5,) * 3, (1,) * 3),
            },
        ),
        sync=True,
        constants=3,
        data_dependent="the number of pairs of an image and a class depends on the labels",
        axes=("BK", "B", "BK", "", "K", ""),
        ranges={"activation": UNIT},
    ),
    LossCase(
        losses.clims_camera_ready_loss,
        losses.CLIMSCameraReadyLoss,
        _image_related_text,
        options={"size": 6, "positive": True},
        zero_in=(),  # the area counts without a label too
        varies=({"size": 6, "clamp": (0.01, 0.99), "leak": 0.5, "area_weight": 2.0},),
        sync=True,
        constants=5,
        data_dependent="the number of pairs of an image and a class depends on the labels",
        axes=("BK", "B", "BK", "", "K", "", "K", "K"),
        ranges={"activation": UNIT},
    ),
)

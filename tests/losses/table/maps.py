"""Losses of class maps: AEFT, SEAM, SIPE, EPS, NSROM, L2G, AdvCAM."""

from __future__ import annotations

import torch
from torch import Tensor

import wsss_losses as losses
from tests.losses.table.case import POSITIVE, UNIT, LossCase, image_labels, pixel_logits, random, two_views
from wsss_modules import corner_and_random_boxes, local_attention_target


def _class_maps(situation: str) -> tuple[Tensor, Tensor, Tensor]:
    """Maps of images, maps of their erased copies, and labels of which no two images share one."""
    labels = {"no_label": [[0, 0, 0], [0, 1, 0]], "all_ignored": [[0] * 3] * 2, "batch_1": [[1, 0, 1]]}
    chosen = torch.tensor(labels.get(situation, [[1, 0, 1], [0, 1, 0]]))
    shape = (*chosen.shape, *((1, 1) if situation == "smallest" else (3, 4)))
    return random(*shape, seed=4), random(*shape, seed=5), chosen


def _class_maps_and_negatives(situation: str) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    gpp, cam, labels = _class_maps(situation)
    return gpp, cam, labels, torch.tensor([-1] if situation == "batch_1" else [1, 0])


def _aeft(situation: str) -> tuple[Tensor, ...]:
    """Image scores, pyramids of images and of erased copies, class maps, labels, negatives."""
    gpp, masked, labels = _class_maps(situation)
    cam, negatives = _class_maps_and_negatives(situation)[1::2]
    return random(*labels.shape, seed=6), gpp, masked, cam, labels, negatives


def _refined_views(situation: str) -> tuple[Tensor, ...]:
    """Maps in [0, 1] with a background of both views, then what `two_views` gives."""
    cam1, cam2, labels = two_views(situation)
    refined = (torch.sigmoid(random(len(x), 4, *x.shape[2:], seed=seed)) for seed, x in enumerate((cam1, cam2), 3))
    return *refined, cam1, cam2, labels


def _seam(situation: str) -> tuple[Tensor, ...]:
    refined1, refined2, cam1, cam2, labels = _refined_views(situation)
    return cam1, cam2, refined1, refined2, labels


def _scores_and_saliency(situation: str) -> tuple[Tensor, Tensor, Tensor]:
    labels = image_labels(situation)
    size = (1, 1) if situation == "smallest" else (5, 6)
    saliency = torch.sigmoid(3 * random(len(labels), 1, 3 * size[0], 2 * size[1], seed=2))
    return 3 * random(len(labels), 4, *size, seed=1), saliency, labels


def _eps(situation: str) -> tuple[Tensor, ...]:
    scores, saliency, labels = _scores_and_saliency(situation)
    return random(*labels.shape, seed=3), scores, saliency, labels


def _general_and_specific(situation: str) -> tuple[Tensor, Tensor]:
    """Maps with background in [0, 1] that differ, or, where all is ignored, hold nothing."""
    images, size = (1 if situation in ("batch_1", "smallest") else 2), (1, 1) if situation == "smallest" else (3, 4)
    maps = (torch.sigmoid(random(images, 4, *size, seed=seed)) for seed in (13, 14))
    scores, is_cam = (x * (situation != "all_ignored") for x in maps)
    return scores, is_cam


def _sipe(situation: str) -> tuple[Tensor, ...]:
    labels = image_labels(situation)
    scores, is_cam = _general_and_specific(situation)
    return random(*labels.shape, seed=15), scores, is_cam, labels, torch.ones_like(scores[:, :1])


def _whole_and_crops(situation: str) -> tuple[Tensor, ...]:
    """Maps of images, logits and maps of four crops each, labels, boxes and saliency, none where all is ignored."""
    labels = image_labels(situation)
    cells, crop = (1, 1) if situation == "smallest" else (4, 3)
    boxes = corner_and_random_boxes((8 * cells, 8 * cells), 8 * crop, 4, images=len(labels))
    # seed 7: no two classes peak at the same cell, a tie that eps breaks in float64 and rounding in others
    whole, local = random(len(labels), 4, cells, cells, seed=1), random(len(boxes), 4, crop, crop, seed=7)
    local = -local.abs() if situation == "all_ignored" else local
    saliency = torch.sigmoid(random(len(boxes), 1, 8 * crop, 8 * crop, seed=3)) * (situation != "all_ignored")
    return whole, random(len(boxes), 3, seed=4), local, labels, boxes, saliency


def _transfer(situation: str) -> tuple[Tensor, Tensor, Tensor]:
    whole, _, local, labels, boxes, saliency = _whole_and_crops(situation)
    return whole, local_attention_target(local, labels[boxes[:, 0]], saliency), boxes


def _attention_maps(situation: str) -> tuple[Tensor, Tensor]:
    """Class maps and accumulated maps of the present classes; a quarter of their cells has none."""
    labels = image_labels(situation)
    maps = pixel_logits(situation, 17)
    seen = torch.sigmoid(random(*maps.shape, seed=18)) - 0.3
    return maps, seen.clamp(min=0) * labels[:, :, None, None]


def _climbers(situation: str) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Class scores of two views, maps before and after a climb, and classes; nobody climbs where all is ignored."""
    climbers = {"all_ignored": 0, "batch_1": 1, "smallest": 1}.get(situation, 2)
    cells = (1, 1) if situation == "smallest" else (3, 4)
    cam, initial = (random(climbers, *cells, seed=seed).abs() for seed in (2, 3))
    index = torch.tensor([1, 3])[:climbers]
    return random(climbers, 2, 4, *cells, seed=1), cam * (situation != "no_label"), initial, index


CASES = (
    LossCase(
        losses.erasing_attraction_loss,
        losses.ErasingAttractionLoss,
        _class_maps,
        predictions=2,
        varies=tuple({"reduction": reduction} for reduction in ("present", "sum", "none")),
        sync=True,
        axes=("BK", "BK", "BK"),
        ignores_absent="gpp gpp_masked",
        scales={"gpp gpp_masked": 1},
    ),
    LossCase(
        losses.erasing_repulsion_loss,
        losses.ErasingRepulsionLoss,
        _class_maps_and_negatives,
        options={"min_hard": 1},  # two images only
        zero_in=("no_label", "all_ignored", "batch_1", "smallest"),
        varies=({"min_hard": 2, "margin": 0.3, "threshold": 0.6, "negative_threshold": 0.9},),
        sync=True,
        axes=("BK", "BK", "BK", "B=image"),
        ignores_absent="gpp",
        scales={"gpp": 0},
    ),
    LossCase(
        losses.aeft_loss,
        losses.AEFTLoss,
        _aeft,
        predictions=3,
        options={"min_hard": 1},  # two images only
        zero_in=(),  # the absence of all classes is learnt too
        varies=({"min_hard": 2, "margin": 0.3, "threshold": 0.6, "classified": 1, "attraction_weight": 1.0},),
        sync=True,
        axes=("BK", "BK", "BK", "BK", "BK", "B=image"),
        ignores_absent="gpp gpp_masked",
    ),
    LossCase(
        losses.adaptive_min_pooling_loss,
        losses.AdaptiveMinPoolingLoss,
        lambda situation: (torch.sigmoid(two_views(situation)[0]), two_views(situation)[2]),
        zero_in=("no_label", "all_ignored"),
        varies=({"fraction": 1.0, "reduction": "sum"}, {"reduction": "none"}),
        axes=("BK", "BK"),
        ranges={"cam": UNIT},
        ignores_absent="cam",
        scales={"cam": 1},
    ),
    LossCase(
        losses.equivariant_regularization_loss,
        losses.EquivariantRegularizationLoss,
        two_views,
        predictions=2,
        zero_in=("no_label", "all_ignored", "smallest"),
        varies=({"reduction": "sum"}, {"reduction": "none"}),
        axes=("BK", "BK", "BK"),
        ignores_absent="cam1 cam2",
        scales={"cam1 cam2": 0},
    ),
    LossCase(
        losses.equivariant_cross_regularization_loss,
        losses.EquivariantCrossRegularizationLoss,
        _refined_views,
        predictions=2,
        zero_in=(),  # the absence of all classes is background everywhere
        varies=({"ratio": 0.6, "reduction": "sum"}, {"legacy_background": True, "reduction": "none"}),
        axes=("BC", "BC", "BK", "BK", "BK"),
        ranges={"refined1": UNIT, "refined2": UNIT},
        ignores_absent="refined1 refined2",
        scales={"cam1": 0, "cam2": 0},
    ),
    LossCase(
        losses.seam_loss,
        losses.SEAMLoss,
        _seam,
        predictions=4,
        options={"ecr_weight": 0.0},  # it holds the first two predictions constant, which gradcheck can't
        zero_in=(),  # the absence of all classes is learnt too
        varies=({"ecr_weight": 0.0, "er_weight": 2.0, "reduction": "sum"}, {"ecr_weight": 0.0, "reduction": "none"}),
        axes=("BK", "BK", "BC", "BC", "BK"),
        ranges={"refined1": UNIT, "refined2": UNIT},
        ignores_absent="refined1 refined2",
    ),
    LossCase(
        losses.saliency_guided_map_loss,
        losses.SaliencyGuidedMapLoss,
        _scores_and_saliency,
        zero_in=(),  # the absence of all classes is background everywhere
        varies=(
            {"threshold": 0.0, "foreground_weight": 0.9, "reduction": "sum"},
            {"eps": 1.0, "eps_mode": "once", "reduction": "none"},
        ),
        axes=("BC", "B", "BK"),
        shifts="scores",
    ),
    LossCase(
        losses.eps_loss,
        losses.EPSLoss,
        _eps,
        predictions=2,
        zero_in=(),  # the absence of all classes is learnt too
        varies=({"foreground_weight": 1.0, "reduction": "sum"}, {"reduction": "none"}),
        axes=("BK", "BC", "B", "BK"),
        shifts="scores",
    ),
    LossCase(
        losses.general_specific_consistency_loss,
        losses.GeneralSpecificConsistencyLoss,
        _general_and_specific,
        predictions=2,
        varies=({"reduction": "sum"}, {"reduction": "none"}),
        axes=("BC", "BC"),
        ranges={"scores": UNIT, "is_cam": UNIT},
        scales={"scores is_cam": 1},
    ),
    LossCase(
        losses.sipe_loss,
        losses.SIPELoss,
        _sipe,
        predictions=3,
        zero_in=(),  # the absence of all classes is learnt too
        varies=({"reduction": "sum", "gsc_weight": 0.1}, {"reduction": "none"}),
        axes=("BK", "BC", "BC", "BK", "B"),
        ranges={"scores": UNIT, "is_cam": UNIT},
    ),
    LossCase(
        losses.attention_regression_loss,
        losses.AttentionRegressionLoss,
        _attention_maps,
        zero_in=(),  # the absence of all classes is learnt too
        varies=({"saturate": True, "eps": 1e-3},),
        sync=True,
        axes=("BK", "BK"),
    ),
    LossCase(
        losses.local_to_global_transfer_loss,
        losses.LocalToGlobalTransferLoss,
        _transfer,
        zero_in=(),  # a softmax never is the target
        varies=({"weight": 30.0, "aligned": True, "reduction": "sum"}, {"stride": 16, "reduction": "none"}),
        axes=("BC", ".C", "=box"),
        shifts="scores",
    ),
    LossCase(
        losses.l2g_loss,
        losses.L2GLoss,
        _whole_and_crops,
        predictions=2,
        zero_in=(),  # the absence of all classes is learnt too
        varies=(
            {"weight": 30.0, "threshold": 0.1, "background": "value", "aligned": True},
            {"empty_saliency": "attention", "global_weight": 0.5},
        ),
        axes=("BC", ".K", ".C", "BK", "=box", ""),
        ties_in=("smallest",),
    ),
    LossCase(
        losses.anti_adversarial_climb_loss,
        losses.AntiAdversarialClimbLoss,
        _climbers,
        predictions=2,
        varies=({"ad_coeff": 0.5, "threshold": 0.2, "reduction": "sum"}, {"reduction": "none"}),
        axes=("B.K", "B", "B", "B=channel"),
        ranges={"cam": POSITIVE},
        scales={"logits cam initial_cam": 1},
    ),
)

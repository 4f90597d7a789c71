"""Every public loss, with inputs for each situation. A loss that is not in this table fails `test_common.py`."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

import wsss_losses as losses
from wsss_modules import (
    AffinityLabels,
    affinity_labels,
    corner_and_random_boxes,
    draw_region_mix_up,
    labels_to_affinity,
    local_attention_target,
    merge_class_labels,
    sample_erase_class,
)

# What the images of a batch may lack. "typical" has everything.
SITUATIONS = ("typical", "no_label", "all_ignored", "batch_1", "smallest")

# Relative error of a result that is computed in float32 and rounded once to the dtype.
TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 2**-7, torch.float16: 2**-10}


@dataclass(frozen=True)
class LossCase:
    """One loss.

    Args:
        function: the functional form.
        module: the class.
        inputs: from a situation to the arguments, float64, on the CPU, the same at each call.
        predictions: how many leading arguments are differentiable predictions.
        options: keyword arguments of both forms, for small inputs.
        zero_in: situations in which there is nothing to learn, so that the loss is exactly 0.
        varies: further option sets for gradcheck, e.g. each reduction.
        sync: the loss takes part in a distributed run with ``sync=True``.
        constants: how many trailing arguments belong to no image, and are the same in all processes.
        data_dependent: why the loss can't be compiled to one graph, if so.
    """

    function: Callable[..., Any]
    module: type[nn.Module]
    inputs: Callable[[str], Sequence[Any]]
    predictions: int = 1
    options: Mapping[str, Any] = field(default_factory=dict)
    zero_in: tuple[str, ...] = ("all_ignored",)
    varies: tuple[Mapping[str, Any], ...] = ()
    sync: bool = False
    constants: int = 0
    data_dependent: str = ""

    @property
    def name(self) -> str:
        return self.function.__name__


def total(result: Tensor | tuple[Tensor, ...]) -> Tensor:
    """The value to minimise: the result itself, or the first of its terms."""
    return result if isinstance(result, Tensor) else result[0]


def label_map(situation: str, height: int, width: int) -> Tensor:
    """Mask (B, H, W) with two classes, background and ignored pixels."""
    generator = torch.Generator().manual_seed(3)
    if situation == "smallest":
        height = width = 1
    mask = torch.randint(0, 4, (1 if situation == "batch_1" else 2, height, width), generator=generator)
    if situation == "no_label":
        return torch.where(mask == 3, 255, 0)
    if situation == "all_ignored":
        return torch.full_like(mask, 255)
    return torch.where(mask == 3, 255, mask)


def random(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


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


def _image_labels(situation: str) -> Tensor:
    """(B, 3) tags of one or two classes, or of none."""
    labels = torch.tensor([[1, 0, 1], [0, 1, 0]], dtype=torch.float64)
    labels = labels[:1] if situation in ("batch_1", "smallest") else labels
    return torch.zeros_like(labels) if situation in ("no_label", "all_ignored") else labels


def _pixel_logits(situation: str, seed: int) -> Tensor:
    size = (1, 1) if situation == "smallest" else (5, 6)
    return random(len(_image_labels(situation)), 3, *size, seed=seed)


def _spatial_bce(situation: str) -> tuple[Tensor, Tensor, Tensor]:
    labels = _image_labels(situation)
    return _pixel_logits(situation, 1), labels, torch.sigmoid(random(*labels.shape, seed=2))


def _spatial_bce_threshold(situation: str) -> tuple[Tensor, Tensor, Tensor]:
    return _pixel_logits(situation, 1), _image_labels(situation), _pixel_logits(situation, 2)


def _foreground_ratio(situation: str) -> tuple[Tensor, Tensor, Tensor]:
    labels = _image_labels(situation)
    return _pixel_logits(situation, 1), labels, 0.2 * labels


def _class_tokens(situation: str) -> tuple[Tensor, Tensor]:
    """Class tokens after two blocks, (2, B, 3, 4), or (2, 1, 1, 1); and labels."""
    labels = _image_labels(situation)
    smallest = situation == "smallest"
    labels = labels[:, :1] if smallest else labels
    return random(2, *labels.shape, 1 if smallest else 4, seed=3), labels


def _mctformer(situation: str) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    tokens, labels = _class_tokens(situation)
    return random(*labels.shape, seed=1), random(*labels.shape, seed=2), tokens, labels


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


def _tags(situation: str) -> tuple[Tensor, Tensor]:
    labels = _image_labels(situation)
    return random(*labels.shape, seed=1), labels


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


def _pooled(situation: str) -> tuple[Tensor, Tensor]:
    """Probabilities and labels of background and three classes; only the background where there is no label."""
    labels = torch.nn.functional.pad(_image_labels(situation), (1, 0), value=1.0)
    return torch.sigmoid(random(*labels.shape, seed=1)), labels


def _patch_views(situation: str) -> tuple[Tensor, Tensor]:
    labels = _image_labels(situation)
    size = (1, 1) if situation == "smallest" else (4, 4)
    probs, views = (random(*labels.shape, *size, seed=seed).softmax(1) for seed in (1, 2))
    return views, merge_class_labels(probs, labels)


def _two_views(situation: str) -> tuple[Tensor, Tensor, Tensor]:
    """Signed class maps of an image and of a reduced copy, and labels."""
    labels = _image_labels(situation)
    sizes = ((1, 1), (1, 1)) if situation == "smallest" else ((6, 7), (4, 5))
    return *(random(*labels.shape, *size, seed=seed) for seed, size in enumerate(sizes, 1)), labels


def _refined_views(situation: str) -> tuple[Tensor, ...]:
    """Maps in [0, 1] with a background of both views, then what `_two_views` gives."""
    cam1, cam2, labels = _two_views(situation)
    refined = (torch.sigmoid(random(len(x), 4, *x.shape[2:], seed=seed)) for seed, x in enumerate((cam1, cam2), 3))
    return *refined, cam1, cam2, labels


def _seam(situation: str) -> tuple[Tensor, ...]:
    refined1, refined2, cam1, cam2, labels = _refined_views(situation)
    return cam1, cam2, refined1, refined2, labels


def _contrast(situation: str) -> tuple[Tensor, ...]:
    """Features and maps of both views, labels, the pixels drawn, and prototypes with the background's."""
    cam1, cam2, labels = _two_views(situation)
    features = (random(len(x), 6, *x.shape[2:], seed=seed) for seed, x in enumerate((cam1, cam2), 5))
    drawn = (random(len(cam2), *cam2.shape[2:], seed=seed) > 0 for seed in (7, 8))
    return *features, cam1, cam2, labels, *drawn, random(4, 6, seed=9), random(4, 6, seed=10)


def _scores_and_saliency(situation: str) -> tuple[Tensor, Tensor, Tensor]:
    labels = _image_labels(situation)
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
    labels = _image_labels(situation)
    scores, is_cam = _general_and_specific(situation)
    return random(*labels.shape, seed=15), scores, is_cam, labels, torch.ones_like(scores[:, :1])


def _sampled_classes(situation: str) -> tuple[Tensor, Tensor, Tensor]:
    """Logits of two of three classes, labels, and which classes: another pair for each image."""
    labels = _image_labels(situation)
    return random(len(labels), 2, seed=16), labels, torch.tensor([[3, 1], [2, 3]])[: len(labels)]


def _whole_and_crops(situation: str) -> tuple[Tensor, ...]:
    """Maps of images, logits and maps of four crops each, labels, boxes and saliency, none where all is ignored."""
    labels = _image_labels(situation)
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
    weight = random(3, 5, seed=19).to(images.dtype)
    return (images.mean((2, 3))[:, :, None] * weight).sum(1) + 0.5


def _image_text(situation: str) -> tuple[Any, ...]:
    """Activations, images, labels, the image tower, features of the classes' texts and of backgrounds."""
    labels = _image_labels(situation)
    size = (1, 1) if situation == "smallest" else (3, 4)
    activation = torch.sigmoid(random(*labels.shape, *size, seed=20))
    images = random(len(labels), 3, 7, 8, seed=21) + 0.5 * random(len(labels), 3, 1, 1, seed=22)
    return activation, images, labels, _encode_image, random(3, 5, seed=23) + 0.5, random(4, 5, seed=24) + 0.5


def _image_related_text(situation: str) -> tuple[Any, ...]:
    related = torch.tensor([[1, 1, 0, 0], [0, 0, 0, 0], [0, 1, 1, 1]], dtype=torch.bool)
    return *_image_text(situation), related, torch.tensor([1.0, 3.0, 2.0], dtype=torch.float64)


def _attention_maps(situation: str) -> tuple[Tensor, Tensor]:
    """Class maps and accumulated maps of the present classes; a quarter of their cells has none."""
    labels = _image_labels(situation)
    maps = _pixel_logits(situation, 17)
    seen = torch.sigmoid(random(*maps.shape, seed=18)) - 0.3
    return maps, seen.clamp(min=0) * labels[:, :, None, None]


def _climbers(situation: str) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Class scores of two views, maps before and after a climb, and classes; nobody climbs where all is ignored."""
    climbers = {"all_ignored": 0, "batch_1": 1, "smallest": 1}.get(situation, 2)
    cells = (1, 1) if situation == "smallest" else (3, 4)
    cam, initial = (random(climbers, *cells, seed=seed).abs() for seed in (2, 3))
    index = torch.tensor([1, 3])[:climbers]
    return random(climbers, 2, 4, *cells, seed=1), cam * (situation != "no_label"), initial, index


def _student_and_teacher(situation: str) -> tuple[Tensor, Tensor]:
    """Feature maps; no image at all where all is ignored, equal ones where there is no label."""
    images = {"all_ignored": 0, "batch_1": 1}.get(situation, 2)
    student = random(images, 3, *((1, 1) if situation == "smallest" else (5, 6)), seed=1)
    return student, student.clone() if situation == "no_label" else random(*student.shape, seed=2)


def _two_logits(situation: str) -> tuple[Tensor, Tensor]:
    images = {"all_ignored": 0, "batch_1": 1}.get(situation, 2)
    student = random(images, 1 if situation == "smallest" else 4, seed=1)
    return student, random(*student.shape, seed=2)


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


PAIR_OPTIONS = {"radius": 3}
FULL_BORDER = {"radius": 4, "border": "full", "num_classes": 2}

CASES = (
    LossCase(losses.affinity_loss, losses.AffinityLoss, _pair_affinity, zero_in=("all_ignored", "smallest"), sync=True),
    LossCase(
        losses.boundary_affinity_loss,
        losses.BoundaryAffinityLoss,
        _edge_and_mask,
        options=PAIR_OPTIONS,
        zero_in=("all_ignored", "smallest"),
        varies=(FULL_BORDER,),
        sync=True,
    ),
    LossCase(
        losses.displacement_loss,
        losses.DisplacementLoss,
        _displacement_and_mask,
        options=PAIR_OPTIONS,
        zero_in=("all_ignored", "smallest"),
        varies=(FULL_BORDER,),
        sync=True,
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
    ),
    LossCase(
        losses.class_specific_erasing_loss,
        losses.ClassSpecificErasingLoss,
        _erasing,
        predictions=2,
        zero_in=(),  # the absence of all classes is learnt too
        varies=({"reduction": "sum"}, {"reduction": "none", "weight": 1.0}),
    ),
    LossCase(
        losses.sce_reactivation_loss,
        losses.SoftmaxReactivationLoss,
        lambda situation: _recam(situation)[1:],
        zero_in=("all_ignored", "smallest"),  # one class alone is certain
        varies=({"reduction": "sum"}, {"reduction": "none"}),
    ),
    LossCase(
        losses.recam_loss,
        losses.ReCAMLoss,
        _recam,
        predictions=2,
        zero_in=(),  # the absence of all classes is learnt too
        varies=({"sce_weight": 0.1, "reduction": "sum"}, {"reduction": "none"}),
    ),
    LossCase(
        losses.erasing_attraction_loss,
        losses.ErasingAttractionLoss,
        _class_maps,
        predictions=2,
        varies=tuple({"reduction": reduction} for reduction in ("present", "sum", "none")),
        sync=True,
    ),
    LossCase(
        losses.erasing_repulsion_loss,
        losses.ErasingRepulsionLoss,
        _class_maps_and_negatives,
        options={"min_hard": 1},  # two images only
        zero_in=("no_label", "all_ignored", "batch_1", "smallest"),
        varies=({"min_hard": 2, "margin": 0.3, "threshold": 0.6, "negative_threshold": 0.9},),
        sync=True,
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
    ),
    LossCase(
        losses.spatial_bce_loss,
        losses.SpatialBCELoss,
        _spatial_bce,
        zero_in=(),  # the absence of all classes is learnt too
        varies=({"min_threshold": 0.5, "eps": 0.2, "reduction": "sum"}, {"reduction": "none"}),
    ),
    LossCase(
        losses.spatial_bce_threshold_loss,
        losses.SpatialBCEThresholdLoss,
        _spatial_bce_threshold,
        zero_in=("all_ignored", "no_label"),
        sync=True,
    ),
    LossCase(
        losses.foreground_ratio_kl_loss,
        losses.ForegroundRatioKLLoss,
        _foreground_ratio,
        zero_in=("all_ignored", "no_label"),
        varies=({"reduction": "sum"}, {"reduction": "none"}),
        sync=True,
    ),
    LossCase(
        losses.sim_min_loss,
        losses.SimMinLoss,
        _two_regions,
        predictions=2,
        varies=({"reduction": "sum"}, {"reduction": "none"}),
        sync=True,
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
    ),
    LossCase(
        losses.c2am_loss,
        losses.C2AMLoss,
        _two_regions,
        predictions=2,
        varies=({"normalize": "weights", "pull_weight": 0.035},),
        sync=True,
    ),
    LossCase(
        losses.class_token_contrastive_loss,
        losses.ClassTokenContrastiveLoss,
        _class_tokens,
        zero_in=("no_label", "all_ignored", "smallest"),  # the only class there is
        varies=({"reduction": "sum", "num_layers": 1}, {"reduction": "none", "eps": 0.5}),
    ),
    LossCase(
        losses.mctformer_loss,
        losses.MCTformerLoss,
        _mctformer,
        predictions=3,
        zero_in=(),  # the absence of all classes is learnt too
        varies=({"reduction": "sum", "num_layers": 1}, {"reduction": "none", "contrast_weight": 0.5}),
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
    ),
    LossCase(
        losses.ood_negative_loss,
        losses.OoDNegativeLoss,
        lambda situation: _wood(situation)[2:3],
        options={"ignore_top": (0,)},
        zero_in=("all_ignored", "smallest"),  # the only class there is
        varies=({"reduction": "sum"}, {"reduction": "none", "ignore_top": (0, 2)}),
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
    ),
    LossCase(
        losses.regional_contrast_loss,
        losses.RegionalContrastLoss,
        _regions,
        zero_in=("no_label", "all_ignored", "smallest"),
        varies=({"reduction": "none", "temperature": 0.5}, {"reduction": "mean", "log_floor": 1e-4}),
        data_dependent="the number of regions depends on the labels",
    ),
    LossCase(
        losses.multi_label_soft_margin_loss,
        losses.MultiLabelSoftMarginLoss,
        _tags,
        zero_in=(),  # the absence of all classes is learnt too
        varies=({"reduction": "sum"}, {"reduction": "none"}),
    ),
    LossCase(
        losses.attention_affinity_loss,
        losses.AttentionAffinityLoss,
        _attention_affinity,
        varies=({"form": "log", "eps": 1e-3}, *({"reduction": reduction} for reduction in ("mean", "sum", "none"))),
        sync=True,
    ),
    LossCase(
        losses.balanced_cross_entropy_loss,
        losses.BalancedCrossEntropyLoss,
        _segmentation,
        sync=True,
    ),
    LossCase(
        losses.afa_loss,
        losses.AFALoss,
        _afa,
        predictions=3,
        zero_in=(),  # the absence of all classes is learnt too
        varies=({"seg_weight": 1.0, "affinity_weight": 0.5},),
        sync=True,
    ),
    LossCase(
        losses.pooled_probability_bce_loss,
        losses.PooledProbabilityBCELoss,
        _pooled,
        zero_in=(),  # the background is learnt in every image
        varies=({"reduction": "sum", "eps": 1e-3}, {"reduction": "none"}),
    ),
    LossCase(
        losses.patch_equivariance_loss,
        losses.PatchEquivarianceLoss,
        _patch_views,
        zero_in=("no_label", "all_ignored"),
        varies=({"reduction": "sum", "eps": 1e-3}, {"reduction": "none"}),
    ),
    LossCase(
        losses.adaptive_min_pooling_loss,
        losses.AdaptiveMinPoolingLoss,
        lambda situation: (torch.sigmoid(_two_views(situation)[0]), _two_views(situation)[2]),
        zero_in=("no_label", "all_ignored"),
        varies=({"fraction": 1.0, "reduction": "sum"}, {"reduction": "none"}),
    ),
    LossCase(
        losses.equivariant_regularization_loss,
        losses.EquivariantRegularizationLoss,
        _two_views,
        predictions=2,
        zero_in=("no_label", "all_ignored", "smallest"),
        varies=({"reduction": "sum"}, {"reduction": "none"}),
    ),
    LossCase(
        losses.equivariant_cross_regularization_loss,
        losses.EquivariantCrossRegularizationLoss,
        _refined_views,
        predictions=2,
        zero_in=(),  # the absence of all classes is background everywhere
        varies=({"ratio": 0.6, "reduction": "sum"}, {"legacy_background": True, "reduction": "none"}),
    ),
    LossCase(
        losses.seam_loss,
        losses.SEAMLoss,
        _seam,
        predictions=4,
        options={"ecr_weight": 0.0},  # it holds the first two predictions constant, which gradcheck can't
        zero_in=(),  # the absence of all classes is learnt too
        varies=({"ecr_weight": 0.0, "er_weight": 2.0, "reduction": "sum"}, {"ecr_weight": 0.0, "reduction": "none"}),
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
    ),
    LossCase(
        losses.eps_loss,
        losses.EPSLoss,
        _eps,
        predictions=2,
        zero_in=(),  # the absence of all classes is learnt too
        varies=({"foreground_weight": 1.0, "reduction": "sum"}, {"reduction": "none"}),
    ),
    LossCase(
        losses.general_specific_consistency_loss,
        losses.GeneralSpecificConsistencyLoss,
        _general_and_specific,
        predictions=2,
        varies=({"reduction": "sum"}, {"reduction": "none"}),
    ),
    LossCase(
        losses.sipe_loss,
        losses.SIPELoss,
        _sipe,
        predictions=3,
        zero_in=(),  # the absence of all classes is learnt too
        varies=({"reduction": "sum", "gsc_weight": 0.1}, {"reduction": "none"}),
    ),
    LossCase(
        losses.attention_regression_loss,
        losses.AttentionRegressionLoss,
        _attention_maps,
        zero_in=(),  # the absence of all classes is learnt too
        varies=({"saturate": True, "eps": 1e-3},),
        sync=True,
    ),
    LossCase(
        losses.edam_loss,
        losses.EDAMLoss,
        _sampled_classes,
        zero_in=(),  # the absence of all classes is learnt too
        varies=({"reduction": "sum"}, {"reduction": "none"}),
    ),
    LossCase(
        losses.local_to_global_transfer_loss,
        losses.LocalToGlobalTransferLoss,
        _transfer,
        zero_in=(),  # a softmax never is the target
        varies=({"weight": 30.0, "aligned": True, "reduction": "sum"}, {"stride": 16, "reduction": "none"}),
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
    ),
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
    ),
    LossCase(
        losses.background_suppression_loss,
        losses.BackgroundSuppressionLoss,
        lambda situation: _background_similarity(situation)[:1],
        zero_in=("no_label", "all_ignored"),
        varies=({"threshold": 0.1, "reduction": "mean"}, {"reduction": "none"}),
        sync=True,
    ),
    LossCase(
        losses.class_background_suppression_loss,
        losses.ClassBackgroundSuppressionLoss,
        _background_similarity,
        zero_in=("no_label", "all_ignored"),
        varies=({"reduction": "mean"}, {"reduction": "none"}),
        sync=True,
    ),
    LossCase(
        losses.area_regularization_loss,
        losses.AreaRegularizationLoss,
        lambda situation: _image_text(situation)[:1],
        zero_in=(),  # whatever an image shows
        varies=({"reduction": "sum"}, {"reduction": "none"}),
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
    ),
    LossCase(
        losses.anti_adversarial_climb_loss,
        losses.AntiAdversarialClimbLoss,
        _climbers,
        predictions=2,
        varies=({"ad_coeff": 0.5, "threshold": 0.2, "reduction": "sum"}, {"reduction": "none"}),
    ),
    LossCase(
        losses.hierarchical_context_loss,
        losses.HierarchicalContextLoss,
        _student_and_teacher,
        zero_in=("all_ignored", "no_label"),
        varies=({"levels": (3, 2), "decay": 2.0, "reduction": "sum"}, {"reduction": "none"}),
    ),
    LossCase(
        losses.distill_kl_loss,
        losses.DistillKLLoss,
        _two_logits,
        zero_in=("all_ignored", "smallest"),  # the only class there is
        varies=({"temperature": 1.0, "reduction": "sum"}, {"reduction": "none"}),
    ),
    LossCase(
        losses.review_kd_loss,
        losses.ReviewKDLoss,
        lambda situation: (*_student_and_teacher(situation), 8.0),
        zero_in=("all_ignored", "no_label"),
        varies=({"weight": 5.0, "warmup": 0.0, "levels": (2, 1), "decay": 0.25},),
    ),
    LossCase(
        losses.noise_aware_loss,
        losses.NoiseAwareLoss,
        _noise_aware,
        varies=({"temperature": 5.0, "gamma": 2.0, "lam": 1.0}, {"gamma": 0.0}),
        sync=True,
    ),
    LossCase(
        losses.mask_total_variation,
        losses.MaskTotalVariation,
        _mask_of_cells,
        zero_in=("no_label", "all_ignored", "smallest"),  # nothing differs
        varies=({"beta": 2.0, "diagonal": False}, {"reduction": "mean"}),
    ),
    LossCase(
        losses.box_attribution_loss,
        losses.BoxAttributionLoss,
        _detections,
        predictions=3,
        zero_in=("no_label", "all_ignored"),
        varies=({"area": 0.07, "tv": 0.1, "tv_beta": 2.0}, {"classification_weight": 0.0, "box_weight": 1.0}),
    ),
    LossCase(
        losses.seed_growing_mask_loss,
        losses.SeedGrowingMaskLoss,
        _region_masks,
        zero_in=("no_label", "all_ignored", "smallest"),  # a seed alone does not count
        varies=({"threshold": 0.6}, {"threshold": 1.0}),
        sync=True,
    ),
)

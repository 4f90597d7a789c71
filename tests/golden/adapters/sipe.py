"""SIPE: side convolutions and classifier under flat names, labels with the background among them, single images."""

from __future__ import annotations

import re

import torch
from torch import Tensor

import wsss_losses as losses
import wsss_modules as modules
from tests.golden.case import Case, adapter


def exploration(case: Case) -> tuple[modules.ImageSpecificPrototypeExploration, modules.CAMHead, list[Tensor]]:
    """The module with the stored side convolutions, the head with the stored classifier, the maps of the stages."""
    count = sum(key.startswith("in.feat") for key in case.inputs)
    levels = [case.leaf(f"in.feat{i}") for i in range(1, count + 1)]
    sides = [case.params[f"param.side{i}.weight"] for i in range(1, count + 1)]
    weight = case.params["param.classifier.weight"]
    explore = modules.ImageSpecificPrototypeExploration([len(s[0]) for s in sides], [len(s) for s in sides])
    case.load(explore.hierarchy, rename_side)
    head = modules.CAMHead(weight.shape[1], weight.shape[0])
    case.load(head, lambda name: name if name.startswith("classifier.") else None)
    return explore, head, levels


def rename_side(name: str) -> str | None:
    number = re.fullmatch(r"side(\d+)\.weight", name)
    return f"sides.{int(number[1]) - 1}.weight" if number else None


@adapter("sipe/ipe")
def ipe(case: Case) -> dict[str, Tensor]:
    scores, valid, semantic = (case.inputs[f"in.{name}"] for name in ("norm_cam", "valid_mask", "sem_feature"))
    features = case.leaf("in.hie_feature")
    found = modules.structure_aware_seeds(scores, valid, semantic, bg_weight=case.call.get("bg_weight", 0.5))
    # where the released overlaps are 0 / 0 its argmax is that of NaN, and ours background
    undefined = case.expected["out.probs"].isnan().any(1, keepdim=True)
    seeds = torch.where(undefined, case.expected["out.seeds"], found.seeds)
    prototypes = modules.image_specific_prototypes(seeds, features)
    is_cam = modules.prototype_cam(prototypes, features)
    values = {"out.seeds": seeds, "out.probs": found.probs, "out.prototypes": prototypes, "out.IS_cam": is_cam}
    return {**values, **case.grads({"out.IS_cam": is_cam})}


@adapter("sipe/train_step")
def train_step(case: Case) -> dict[str, Tensor]:
    explore, head, levels = exploration(case)
    valid, labels = case.inputs["in.valid_mask"], case.inputs["in.label"]
    logits, class_maps = head(levels[-1]).logits, head.class_maps(levels[-1])
    found = explore(class_maps, levels, labels, inside=valid[:, :1])  # the background's mask is the inside of the crop
    # a zero feature: see ipe
    undefined = (levels[-1] == 0).all(1, keepdim=True) & (labels == 0).any(1)[:, None, None, None]
    if undefined.any():
        seeds = torch.where(undefined, case.expected["out.seeds"], found.seeds)
        features = explore.hierarchy(levels)
        is_cam = modules.prototype_cam(modules.image_specific_prototypes(seeds, features), features)
        found = found._replace(seeds=seeds, is_cam=is_cam)
    normalised = modules.normalize_cam(found.is_cam)
    terms = losses.sipe_loss(logits, found.scores, normalised, labels)
    values = {
        "out.score": logits,
        "out.norm_cam": found.scores,
        "out.seeds": found.seeds,
        "out.IS_cam": found.is_cam,
        "out.IS_cam_normalised": normalised,
        "out.loss_cls": terms.classification,
        "out.loss_gsc": terms.consistency,
        "out.loss": terms.total,
    }
    return {**values, **case.grads(terms.total)}


@adapter("sipe/infer")
def infer(case: Case) -> dict[str, Tensor]:
    explore, head, levels = exploration(case)
    class_maps = modules.merge_flip(*head.class_maps(levels[-1]))[None]
    features = modules.merge_flip(*explore.hierarchy(levels))[None]
    found = explore.read(class_maps, features, case.inputs["in.label"][None, 1:])
    return {"out.norm_cam": found.scores[0], "out.IS_cam": found.is_cam[0]}


@adapter("sipe/fuse")
def fuse(case: Case) -> dict[str, Tensor]:
    count = sum(key.startswith("in.is_cam") for key in case.inputs)
    maps = [case.inputs[f"in.is_cam{i}"][None] for i in range(count)]
    everything = torch.ones(1, maps[0].shape[1])
    fused = modules.multi_scale_cam(maps, everything, tuple(case.call["size"]))
    return {"out.fused": fused.cam}


@adapter("sipe/ir_label")
def ir_label(case: Case) -> dict[str, Tensor]:
    scores, keys = case.inputs["in.IS_cam"][None], case.inputs["in.keys"]
    label = modules.confident_label_from_scores(scores, bg_weight=case.call.get("bg_weight", 0.5), keys=keys[1:])
    return {"out.ir_label": label[0].to(torch.uint8)}

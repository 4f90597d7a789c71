"""AEFT: the released layer names its gates ``gconv``, the released losses are one function on one batch."""

import re

import torch
from torch import Tensor, nn

import wsss_losses as losses
import wsss_modules as modules
from tests.golden.case import Case, adapter


@adapter("aeft/sign_preserving_gate")
def sign_preserving_gate(case: Case) -> dict[str, Tensor]:
    coarse, fine = case.leaf("in.coarse"), case.leaf("in.fine")
    gate = modules.SignPreservingGate(coarse.shape[1])
    names = {"att_p.0.weight": "positive.weight", "att_n.0.weight": "negative.weight"}
    fused = case.load(gate, names.get)(coarse, fine)
    return {"out.fused": fused, **case.grads({"fused": fused})}


@adapter("aeft/gated_pyramid_pooling")
def gated_pyramid_pooling(case: Case) -> dict[str, Tensor]:
    cam = case.leaf("in.cam")
    pooling = modules.GatedPyramidPooling(cam.shape[1], case.call["levels"])
    out = case.load(pooling, modules.GatedPyramidPooling.released_key)(cam)
    values = {"out.logits": out.logits, "out.gpp": out.gpp}
    return {**values, **case.grads(values)}


@adapter("aeft/soft_erase_mask")
def soft_erase_mask(case: Case) -> dict[str, Tensor]:
    erase = modules.SoftErase(case.call["threshold"], eps=case.call["eps"])
    mask = erase(case.leaf("in.cam"), case.inputs["in.label"], case.call["out_size"])
    return {"out.mask": mask, **case.grads({"mask": mask})}


@adapter("aeft/attraction")
def attraction(case: Case) -> dict[str, Tensor]:
    gpp, masked, labels = case.leaf("in.gpp_anchor"), case.leaf("in.gpp_masked"), case.inputs["in.label"]
    loss = case.call["weight"] * losses.erasing_attraction_loss(gpp, masked, labels)
    pooled = {"out.anchor": responses(gpp, labels), "out.positive": responses(masked, labels)}
    return {"out.loss": loss, **pooled, **case.grads(loss)}


@adapter("aeft/repulsion")
def repulsion(case: Case) -> dict[str, Tensor]:
    call, cam, labels = case.call, case.inputs["in.cam"], case.inputs["in.label"]
    criterion = losses.ErasingRepulsionLoss(
        margin=call["margin"],
        threshold=call["anchor_threshold"],
        negative_threshold=call["negative_threshold"],
        min_hard=call["min_hard"],
        eps=call["eps"],
    )
    terms = criterion(case.leaf("in.gpp"), cam, labels, case.inputs["in.negative_index"])
    values = {"out.loss": terms.total, "out.distance": terms.distance, "out.num_hard": terms.hard}
    stretched = modules.minmax_cam(cam, call["eps"]) * labels[:, :, None, None]
    return {**values, "out.cam_norm": stretched, **case.grads(terms.total)}


def responses(gpp: Tensor, labels: Tensor) -> Tensor:
    """(B, K) what the attraction compares: its distance from maps without any response."""
    return losses.erasing_attraction_loss(gpp, torch.zeros_like(gpp), labels, reduction="none")


@adapter("aeft/aeft_full_update")
def full_update(case: Case) -> dict[str, Tensor]:
    """The toy network is one convolution; of the images, the first 8 are classified, as the notes of the files say."""
    call, images, labels = case.call, case.leaf("in.img"), case.inputs["in.label"]
    (classify, *pull_and_push), (erase, exclude) = call["W"], call["TH"]
    attraction, repulsion = (weight * (call["epo"] >= call["T"]) for weight in pull_and_push)
    kernel = case.params["param.f.weight"]
    stride = int(re.search(r"stride-(\d+)", call["toy_net"])[1])
    net = nn.ModuleDict(
        {
            "maps": nn.Conv2d(kernel.shape[1], len(kernel), kernel.shape[2:], stride, kernel.shape[-1] // 2),
            "pooling": modules.GatedPyramidPooling(len(kernel)),
        }
    )
    case.load(net, of_toy_net)
    cam = net["maps"](images)
    mask = modules.SoftErase(erase)(cam, labels, images.shape[2:])
    (logits, gpp), masked = net["pooling"](cam), net["pooling"](net["maps"](images * mask)).gpp
    options = {"attraction_weight": attraction, "repulsion_weight": repulsion, "margin": call["M"], "classified": 8}
    criterion = losses.AEFTLoss(**options, threshold=exclude)
    terms = criterion(logits, gpp, masked, cam, labels, case.inputs["in.negative_index"])
    total = terms.total + (classify - 1) * terms.classification
    return {
        "out.loss": total,
        "out.loss_cls": terms.classification,
        "out.loss_attract": attraction * terms.attraction,
        "out.loss_repulse": repulsion * terms.repulsion,
        "out.num_hard": terms.hard,
        "out.logits": logits,
        "out.anchor_attract": responses(gpp, labels),
        "out.positive_attract": responses(masked, labels),
        "out.cam": cam,
        "out.gpp": gpp,
        "out.gpp_masked": masked,
        "out.mask_positive": mask,
        **case.grads(total),
    }


def of_toy_net(name: str) -> str:
    layer, _, leaf = name.partition(".")
    return f"maps.{leaf}" if layer == "f" else f"pooling.{modules.GatedPyramidPooling.released_key(leaf)}"

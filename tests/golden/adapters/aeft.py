"""AEFT: the released layer names its gates ``gconv``, the released losses are one function on one batch."""

from types import SimpleNamespace

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
    from recipes import aeft  # the recipes need more than the library does

    call, labels = case.call, case.inputs["in.label"]
    attraction, repulsion = call["W"][1:]
    erase, exclude = call["TH"]
    options = aeft.TripletConfig(
        erase=erase, exclude=exclude, margin=call["M"], attraction=attraction, repulsion=repulsion
    )
    net = aeft.PyramidClassifier(Images(), labels.shape[1], modules.SoftErase(options.erase))
    kernel = case.params["param.f.weight"]
    net.head = nn.Conv2d(kernel.shape[1], len(kernel), kernel.shape[2:], stride=4, padding=1)
    case.load(net, lambda name: name.replace("f.", "head.") if name.startswith("f.") else of_pooling(name))
    out = net(case.leaf("in.img"), labels)
    chosen = case.inputs["in.negative_index"]
    negatives = modules.DisjointNegatives(chosen, torch.ones_like(chosen, dtype=torch.bool))
    terms = aeft.triplet_loss(out, labels, negatives, options, classified=8, sync=False)
    maps = {"out.cam": out.cam, "out.gpp": out.gpp, "out.gpp_masked": out.gpp_masked, "out.mask_positive": out.mask}
    return {
        "out.loss": terms.loss,
        "out.loss_cls": terms.classification,
        "out.loss_attract": attraction * terms.attraction,
        "out.loss_repulse": repulsion * terms.repulsion,
        "out.num_hard": terms.hard,
        "out.logits": out.logits,
        "out.anchor_attract": responses(out.gpp, labels),
        "out.positive_attract": responses(out.gpp_masked, labels),
        **maps,
        **case.grads(terms.loss),
    }


class Images(nn.Module):
    """A backbone whose features are the images."""

    out_channels = 3

    def forward(self, images: Tensor) -> SimpleNamespace:
        return SimpleNamespace(final=images)


def of_pooling(name: str) -> str | None:
    key = modules.GatedPyramidPooling.released_key(name.removeprefix("g."))
    return key and f"pooling.{key}"

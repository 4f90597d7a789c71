"""L2G: the background is the last channel there; boxes are floats; single images without a batch axis."""

import torch
from torch import Tensor

import wsss_losses as losses
import wsss_modules as modules
from tests.golden.case import Agreement, Case, adapter


@adapter("l2g/local_to_global_loss")
def local_to_global_loss(case: Case) -> dict[str, Tensor]:
    inputs, call = case.inputs, case.call
    whole, local = (case.leaf(f"in.{name}_map").roll(1, 1) for name in ("global", "local"))
    saliency, labels, boxes = inputs.get("in.local_saliency"), inputs["in.label"], inputs["in.boxes"]
    target_options = {"threshold": call["bg_thr"], "background": call["background_row"]}
    terms = losses.l2g_loss(
        whole,
        local[:, 1:].mean((2, 3)),
        local,
        labels,
        boxes,
        saliency,
        weight=call["kd_weight"],
        stride=call["stride"],
        **target_options,
    )
    target = modules.local_attention_target(local, labels[boxes[:, 0].long()], saliency, **target_options)
    aligned = modules.crop_align(whole, boxes, tuple(local.shape[2:]), stride=call["stride"])
    return {
        "out.target": target.roll(-1, 1),
        "out.aligned_prob": aligned.softmax(1).roll(-1, 1),
        "out.loss": terms.total,
        "out.loss_kd": terms.transfer,
        "out.loss_cls_local": terms.classification,
        "out.loss_cls_global_unused": terms.global_classification,
        **case.grads(terms.total),
    }


@adapter("l2g/pixel_correlation_head")
def pixel_correlation_head(case: Case) -> dict[str, Tensor]:
    stored = case.params["param.fc8.weight"]
    case.params["param.fc8.weight"] = stored.roll(1, 0)
    conv4, conv5, conv6 = (case.leaf(f"in.conv{i}") for i in (4, 5, 6))
    head = modules.PixelCorrelationCAMHead(
        conv6.shape[1],
        len(stored) - 1,
        side_channels=(conv4.shape[1], conv5.shape[1]),
        side_widths=tuple(len(case.params[f"param.{name}.weight"]) for name in ("f8_3", "f8_4")),
        embed=len(case.params["param.f9.weight"]),
    )
    out = case.load(head, head.released_key)(conv6, conv4, conv5, case.inputs["in.image"])
    values = {"out.map": out.scores.roll(-1, 1), "out.logits": out.logits}
    grads = case.grads(values)
    if "grad.param.fc8.weight" in grads:
        grads["grad.param.fc8.weight"] = grads["grad.param.fc8.weight"].roll(-1, 0)
    return {**values, **grads}


@adapter("l2g/cam_inference")
def cam_inference(case: Case) -> dict[str, Tensor | Agreement]:
    call, labels = case.call, case.inputs["in.label"][None]
    passes = [case.inputs[f"in.map.{i}"] for i in range(sum(key.startswith("in.map.") for key in case.inputs))]
    maps = [x[:, :-1] for x in passes]
    mirrored = [i % 2 == 1 for i in range(len(maps))]
    size = tuple(call["size"])
    # their mean has eps = 1e-8, ours is a sum
    options = {"relu": "sum", "interpolation": "bicubic", "eps": 1e-8 * len(maps)}
    out = modules.multi_scale_cam(maps, labels, size, mirrored=mirrored, **options)
    mask = modules.cam_to_mask(out.cam[None], call["thr"], keys=out.keys)[0]
    best = torch.cat([torch.full_like(out.cam[:1], call["thr"]), out.cam]).sort(0, descending=True).values
    tied = best[0] - best[1] < 1e-5 if len(best) > 1 else torch.zeros_like(mask, dtype=torch.bool)
    return {"out.norm_cam": out.cam, "out.pred": Agreement(mask, at_least=1 - tied.double().mean().item())}

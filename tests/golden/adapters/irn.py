"""IRNet: single images without a batch axis, 0-based classes, the released network's parameter names."""

import torch
from einops import rearrange, repeat
from torch import Tensor
from torch.nn import functional as F

import wsss_modules as modules
from tests.golden.case import Agreement, Case, adapter


@adapter("irn/cam_head")
def cam_head(case: Case) -> dict[str, Tensor]:
    classes, channels = case.params["param.classifier.weight"].shape[:2]
    head = case.load(modules.CAMHead(channels, classes).eval())
    out = head(case.inputs["in.features"])
    loss = F.multilabel_soft_margin_loss(out.logits, case.inputs["in.label"])
    cam = modules.merge_flip(out.cam[0], out.cam[1])
    return {"out.logits": out.logits, "out.cam": cam, "out.cls_loss": loss, **case.grads(loss)}


@adapter("irn/multi_scale_cam")
def multi_scale_cam(case: Case) -> dict[str, Tensor]:
    maps = [case.inputs[f"in.out_{i}"][None] for i in range(len(case.call["scales"]))]
    labels, size = case.inputs["in.label"][None], tuple(case.inputs["in.size"].tolist())
    out = modules.multi_scale_cam(maps, labels, size, stride=4, round_to=16, eps=case.call["eps"])
    return {"out.cam": out.cam, "out.high_res": out.high_res, "out.keys": out.keys - 1}


@adapter("irn/irn_head")
def irn_head(case: Case) -> dict[str, Tensor]:
    def width(name: str) -> int:
        return len(case.params[f"param.{name}.0.weight"])

    features = [case.inputs[f"in.x{i}"] for i in range(1, 6)]
    head = modules.IRNHead(
        [x.shape[1] for x in features],
        edge_width=width("fc_edge1"),
        displacement_widths=(width("fc_dp1"), width("fc_dp2"), width("fc_dp3")),
    )
    head = case.load(head, modules.IRNHead.released_key).train(case.call["training"])
    out = head(features)
    values = {"out.edge": out.edge_logits, "out.displacement": out.displacement}
    return {**values, **case.grads(values)}


@adapter("irn/mean_shift")
def mean_shift(case: Case) -> dict[str, Tensor]:
    return {"out.running_mean": modules.MeanShift().fit(case.inputs["in.displacement"])}


@adapter("irn/edge_displacement_tta")
def edge_displacement_tta(case: Case) -> dict[str, Tensor]:
    def net(pair: Tensor) -> tuple[Tensor, Tensor]:
        assert list(pair.shape) == case.call["padded"]
        return case.inputs["in.edge_logits"], case.inputs["in.displacement"]

    image = torch.zeros(1, 3, *case.inputs["in.size"].tolist())
    call = case.call
    out = modules.edge_displacement_inference(image, net, min_size=call["crop_size"], stride=call["stride"])
    return {"out.edge": out.edge[0], "out.displacement": out.displacement[0]}


@adapter("irn/centroids")
def centroids(case: Case) -> dict[str, Tensor]:
    displacement = case.inputs["in.displacement"]
    found = modules.find_centroids(displacement, case.call["iterations"])
    masks = modules.cluster_centroids(found, displacement, case.call["thres"])
    return {"out.centroids": found, "out.instance_map": masks}


@adapter("irn/ir_label")
def ir_label(case: Case) -> dict[str, object]:
    call, setting = case.call, case.call["crf"]
    parameters = modules.CRFParameters(
        iterations=setting["iters"],
        gaussian_sxy=setting["pos_sxy"],
        gaussian_weight=setting["pos_compat"],
        bilateral_sxy=setting["bi_sxy"],
        bilateral_srgb=setting["bi_srgb"],
        bilateral_weight=setting["bi_compat"],
    )
    cam, keys = case.inputs["in.cam"][None], case.inputs["in.keys"] + 1
    image = rearrange(case.inputs["in.image"], "h w rgb -> 1 rgb h w")
    gt_prob, fg, bg = setting["gt_prob"], call["conf_fg_thres"], call["conf_bg_thres"]
    crf = modules.DenseCRF(parameters)
    certain = modules.cam_to_mask(cam, fg)
    refined = crf(image, modules.unary_from_mask(certain, cam.shape[1] + 1, gt_prob=gt_prob)).argmax(1)
    return {
        "out.fg_argmax": Agreement(certain[0], at_least=1.0),
        "out.fg_argmax_after_crf": refined[0],
        "out.label": modules.confident_label_from_cam(cam, image, fg, bg, crf=crf, keys=keys, gt_prob=gt_prob)[0],
        "out.label_without_crf": modules.confident_label_from_cam(cam, None, fg, bg, keys=keys)[0],
    }


@adapter("irn/ins_seg_label")
def ins_seg_label(case: Case) -> dict[str, object]:
    call, cam, displacement = case.call, case.inputs["in.cam"], case.inputs["in.displacement"]
    found = modules.find_centroids(displacement, call["iterations"])
    masks = modules.cluster_centroids(found, displacement, call["thres"])
    x = rearrange(cam[:, None] * masks, "k n h w -> 1 (k n) h w")
    edge, steps = case.inputs["in.edge"][None], 2 ** call["exp_times"]
    walked = modules.propagate_to_edge(x, edge, radius=call["radius"], beta=call["beta"], n_steps=steps)
    scores = modules.walk_scores(walked, tuple(case.inputs["in.size"].tolist()))[0]
    classes = repeat(case.inputs["in.keys"] + 1, "k -> (k n)", n=len(masks))
    threshold, min_area = call["ins_seg_bg_thres"], call["min_area_fraction"]
    out = modules.detect_instances(scores, classes, threshold=threshold, min_area=min_area)
    return {
        "out.instance_map": masks,
        "out.mask": out.mask,
        "out.class": out.classes - 1,
        "out.score": out.score,
    }

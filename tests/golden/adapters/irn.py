"""IRNet: single images without a batch axis, 0-based classes, the released network's parameter names."""

import torch
from einops import rearrange, repeat
from torch import Tensor
from torch.nn import functional as F

import wsss_losses as losses
import wsss_modules as modules
from tests.golden.case import Agreement, Case, adapter


@adapter("irn/cam_head")
def cam_head(case: Case) -> dict[str, Tensor]:
    classes, channels = case.params["param.classifier.weight"].shape[:2]
    head = case.load(modules.CAMHead(channels, classes).eval())
    out = head(case.leaf("in.features"))
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
    displacement = case.inputs["in.displacement"]
    return {"out.running_mean": modules.MeanShift(displacement.shape[2]).to(displacement.dtype).fit(displacement)}


@adapter("irn/edge_displacement_tta")
def edge_displacement_tta(case: Case) -> dict[str, Tensor]:
    def net(pair: Tensor) -> tuple[Tensor, Tensor]:
        assert list(pair.shape) == case.call["padded"]
        return case.inputs["in.edge_logits"], case.inputs["in.displacement"]

    call = case.call
    # the released padding cuts what is larger
    image = torch.zeros(1, 3, *case.inputs["in.size"].clamp(max=call["crop_size"]).tolist())
    out = modules.edge_displacement_inference(image, net, multiple=1, min_size=call["crop_size"], stride=call["stride"])
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


@adapter("irn/path_index")
def path_index(case: Case) -> dict[str, Tensor]:
    radius, (height, width) = case.call["radius"], case.call["default_size"]
    offsets, paths = modules.path_offsets(radius)
    source, destination = modules.pair_index(radius, (height, width), order="path")
    values = {"out.search_dst": torch.tensor(offsets), "out.src_indices": source, "out.dst_indices": destination}
    for i, length in enumerate(sorted({len(path) for path in paths})):
        same_length = torch.tensor([path for path in paths if len(path) == length])  # (paths, length, 2)
        same_length = in_order_of(case.expected[f"out.search_paths_{i}"], same_length)
        values[f"out.search_paths_{i}"] = same_length
        values[f"out.path_indices_{i}"] = source + (same_length * torch.tensor([width, 1])).sum(-1)[..., None]
    return values


def in_order_of(stored: Tensor, paths: Tensor) -> Tensor:
    """``paths`` (paths, length, 2) with the points of each in the stored order, which is free where they tie."""
    if stored.shape != paths.shape:
        return paths
    ours, theirs = ((x[..., 0] * 1000 + x[..., 1]).argsort(1) for x in (paths, stored))
    return paths.gather(1, ours.gather(1, theirs.argsort(1))[..., None].expand_as(paths))


@adapter("irn/affinity_label")
def affinity_label(case: Case) -> dict[str, Tensor]:
    call = case.call
    mask = case.inputs["in.label"][None]
    labels = modules.affinity_labels(mask, call["radius"], order="path", num_classes=call["num_classes"])
    return {f"out.{name}": label[0].float() for name, label in labels._asdict().items()}


@adapter("irn/edge_to_affinity")
def edge_to_affinity(case: Case) -> dict[str, Tensor]:
    values = {"out.aff": modules.edge_to_affinity(case.leaf("in.edge"), case.call["radius"])}
    return {**values, **case.grads(values)}


@adapter("irn/pair_displacement")
def pair_displacement(case: Case) -> dict[str, Tensor]:
    delta, target = modules.pair_displacement(case.inputs["in.displacement"], case.call["radius"])
    return {
        "out.pair_disp": delta,
        "out.disp_target": target,
        "out.dp_fg": (delta - target).abs(),
        "out.dp_bg": delta.abs(),
    }


@adapter("irn/irn_loss")
def irn_loss(case: Case) -> dict[str, Tensor]:
    logits, displacement = case.leaf("in.edge_logits"), case.leaf("in.displacement")
    call, mask = case.call, case.inputs["in.label"]
    options = {"radius": call["radius"], "eps": call["eps"], "num_classes": call.get("num_classes", 21)}
    terms = losses.inter_pixel_relation_loss(logits, displacement, mask, **options)
    boundary = losses.boundary_affinity_loss(logits, mask, **options)
    return {
        "out.total_loss": terms.total,
        "out.pos_aff_loss": terms.positive,
        "out.neg_aff_loss": terms.negative,
        "out.bg_pos_aff_loss": boundary.bg,
        "out.fg_pos_aff_loss": boundary.fg,
        "out.dp_fg_loss": terms.displacement_fg,
        "out.dp_bg_loss": terms.displacement_bg,
        **case.grads(terms.total),
    }


@adapter("irn/propagate_to_edge")
def propagate_to_edge(case: Case) -> dict[str, Tensor]:
    call, edge = case.call, case.inputs["in.edge"][None]
    x = rearrange(case.inputs["in.x"], "... h w -> 1 (...) h w")
    steps = 2 ** call["exp_times"]
    walked = modules.propagate_to_edge(x, edge, radius=call["radius"], beta=call["beta"], n_steps=steps)
    matrix = modules.EdgeToAffinity(call["radius"])(edge).dense()[0]
    return {"out.rw": rearrange(walked, "1 c h w -> c 1 h w"), "out.aff_matrix": matrix}


@adapter("irn/to_transition_matrix")
def to_transition_matrix(case: Case) -> dict[str, Tensor]:
    matrix = case.inputs["in.affinity"]
    affinity = modules.LocalAffinity.from_dense(matrix[None], (1, len(matrix)))  # any matrix: pixels in one row
    walk = modules.RandomWalk(beta=case.call["beta"], n_steps=2 ** case.call["times"])
    ones = torch.eye(len(matrix), dtype=matrix.dtype).view(1, -1, 1, len(matrix))
    return {"out.trans_mat": walk(ones, affinity)[0, :, 0]}


@adapter("irn/sem_seg_label")
def sem_seg_label(case: Case) -> dict[str, object]:
    call, steps = case.call, 2 ** case.call["exp_times"]
    cam, edge = case.inputs["in.cam"][None], case.inputs["in.edge"][None]
    walked = modules.propagate_to_edge(cam, edge, radius=call["radius"], beta=call["beta"], n_steps=steps)
    scores = modules.walk_scores(walked, tuple(case.inputs["in.size"].tolist()))
    label = modules.cam_to_mask(scores, call["sem_seg_bg_thres"], keys=case.inputs["in.keys"] + 1)
    return {"out.rw_up": scores[0], "out.label": Agreement(label[0], at_least=0.999)}

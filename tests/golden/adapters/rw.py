"""AffinityNet + random walk (PSA): scores channels-last, single images without a batch axis, 0-based classes."""

import torch
from einops import rearrange
from torch import Tensor
from torch.nn import functional as F

import wsss_losses as losses
import wsss_modules as modules
from tests.golden.case import Agreement, Case, adapter


@adapter("rw/cam_head")
def cam_head(case: Case) -> dict[str, Tensor]:
    classes, channels = case.params["param.fc8.weight"].shape[:2]
    sqrt = bool(case.call["sqrt"])
    mode = "conv_then_gap" if sqrt else "gap_then_conv"
    head = modules.CAMHead(channels, classes, mode, sqrt, dropout=0.5).eval()
    out = case.load(head, lambda name: name.replace("fc8", "classifier"))(case.leaf("in.features"))
    loss = F.multilabel_soft_margin_loss(out.logits, case.inputs["in.label"])
    return {"out.logits": out.logits, "out.cam": out.cam, "out.cls_loss": loss, **case.grads(loss)}


@adapter("rw/multi_scale_cam")
def multi_scale_cam(case: Case) -> dict[str, Tensor]:
    maps = [case.inputs[f"in.cam_{i}"] for i in range(sum(key.startswith("in.cam_") for key in case.inputs))]
    size = tuple(case.inputs["in.size"].tolist())
    mirrored = [i % 2 == 1 for i in range(len(maps))]
    labels = case.inputs["in.label"][None]
    out = modules.multi_scale_cam(maps, labels, size, mirrored=mirrored, eps=case.call["eps"])
    scores = {
        key: modules.background_score(out.cam[None], float(key.removeprefix("out.scores_alpha")))[0]
        for key in case.expected
        if key.startswith("out.scores_alpha")
    }
    score_keys = torch.cat([torch.zeros(1, dtype=torch.int64), out.keys])
    return {"out.cam": out.cam, "out.keys": out.keys - 1, "out.score_keys": score_keys, **scores}


@adapter("rw/confident_label")
def confident_label(case: Case) -> dict[str, Tensor]:
    pooled = "in.scores_hw" not in case.inputs
    scores = case.inputs["in.scores_pooled" if pooled else "in.scores_hw"]
    low, high = rearrange(scores, "h w (two k) -> two 1 k h w", two=2)
    return {"out.label": modules.confident_label(low, high, pool=1 if pooled else case.call["pool"])[0]}


@adapter("rw/dense_crf")
def dense_crf(case: Case) -> dict[str, Tensor]:
    call, cam = case.call, case.inputs["in.cam"][None]
    scores = torch.cat([modules.background_score(cam, call["alpha"]), cam], 1)
    parameters = modules.CRFParameters(
        iterations=call["iters"],
        gaussian_sxy=call["pos_sxy"],
        gaussian_weight=call["pos_compat"],
        bilateral_sxy=call["bi_sxy"],
        bilateral_srgb=call["bi_srgb"],
        bilateral_weight=call["bi_compat"],
    )
    image = rearrange(case.inputs["in.image"], "h w c -> 1 c h w")
    unary = modules.unary_from_scores(scores, eps=call["clip"])
    return {"out.scores": modules.dense_crf(image, unary, parameters)[0]}


@adapter("rw/resnet38_backbone")
def resnet38_backbone(case: Case) -> dict[str, Tensor]:
    net = case.load(modules.ResNet38(case.call["width_divisor"])).eval()
    return {f"out.{name}": value for name, value in net(case.inputs["in.x"])._asdict().items()}


@adapter("rw/poly_sgd", "irn/poly_sgd")
def poly_sgd(case: Case) -> dict[str, Tensor]:
    from recipes.pipeline.training import poly_sgd  # the recipes need more than the library does

    call, start = case.call, case.inputs["in.p0"]
    sizes = call.get("sizes", [len(start)])
    rates, decays = (
        value if isinstance(value, list) else [value] * len(sizes) for value in (call["lr"], call["weight_decay"])
    )
    values = [part.clone().requires_grad_() for part in start.split(sizes)]
    groups = [
        {"params": [value], "lr": rate, "weight_decay": decay}
        for value, rate, decay in zip(values, rates, decays, strict=True)
    ]
    momentum, power = call["effective_momentum"], call.get("power", 0.9)
    optimizer, scheduler = poly_sgd(groups, call["max_step"], momentum=momentum, power=power)
    history, used = [], []
    for grads in case.inputs["in.grads"]:
        for value, grad in zip(values, grads.split(sizes), strict=True):
            value.grad = grad.clone()
        used.append(scheduler.get_last_lr()[0])
        optimizer.step()
        scheduler.step()
        history.append(torch.cat([value.detach() for value in values]))
    return {"out.params": torch.stack(history), "out.lr": torch.tensor(used, dtype=start.dtype)}


@adapter("rw/pair_index")
def pair_index(case: Case) -> dict[str, Tensor]:
    source, destination = modules.pair_index(int(case.inputs["in.radius"]), tuple(case.inputs["in.size"].tolist()))
    pairs = torch.stack([source.expand_as(destination), destination], -1).flatten(0, 1)
    return {"out.ind_from": source, "out.ind_to": destination.flatten(), "out.pairs_from_to": pairs}


@adapter("rw/affinity_label")
def affinity_label(case: Case) -> dict[str, Tensor]:
    mask = case.inputs["in.label"][None]
    labels = modules.affinity_labels(mask, case.call["radius"], ignore_index=case.call["ignore"])
    return {f"out.{name}": label[0].float() for name, label in labels._asdict().items()}


@adapter("rw/affinity_head")
def affinity_head(case: Case) -> dict[str, Tensor]:
    call, names = case.call, ("conv4", "conv5", "conv6")
    features = [case.leaf(f"in.{name}") for name in names]
    head = modules.AffinityHead(
        [x.shape[1] for x in features],
        widths=[len(case.params[f"param.f8_{i}.weight"]) for i in (3, 4, 5)],
        norm="gn" if call["groups"] else None,
        groups=call["groups"] or (1, 1, 1),
        radius=call["radius"],
    )
    head = case.load(head, modules.AffinityHead.released_key)
    if call["to_dense"]:
        return {"out.aff_matrix": head.local_affinity(*features).dense()[0]}
    values = {"out.aff": head(*features)}
    return {**values, **case.grads(values)}


@adapter("rw/affinity_loss")
def affinity_loss(case: Case) -> dict[str, Tensor]:
    labels = modules.AffinityLabels(*(case.inputs[f"in.{name}"] for name in modules.AffinityLabels._fields))
    terms = losses.affinity_loss(case.leaf("in.aff"), labels, eps=case.call["eps"])
    values = {"out.loss": terms.total, "out.bg_loss": terms.bg, "out.fg_loss": terms.fg, "out.neg_loss": terms.neg}
    return {**values, **case.grads(terms.total)}


@adapter("rw/transition_matrix")
def transition_matrix(case: Case) -> dict[str, Tensor]:
    call, matrix = case.call, case.inputs["in.aff_matrix"]
    size = (call["height"], call["width"])
    walk = modules.RandomWalk(beta=call["beta"], n_steps=2 ** call["logt"])
    affinity = modules.LocalAffinity.from_dense(matrix[None], size)
    ones = torch.eye(len(matrix), dtype=matrix.dtype).view(1, -1, *size)  # row i of the power: a walk from pixel i
    x = case.inputs["in.x"].view(1, -1, *size)
    return {"out.rw": walk(x, affinity)[0].flatten(1), "out.trans_mat_power": walk(ones, affinity)[0].flatten(1)}


@adapter("rw/rw_inference")
def rw_inference(case: Case) -> dict[str, object]:
    call, cam, keys = case.call, case.inputs["in.cam"][None], case.inputs["in.keys"]
    size = (-(-cam.shape[2] // call["stride"]), -(-cam.shape[3] // call["stride"]))
    scores = modules.propagate_cam(
        cam,
        modules.LocalAffinity.from_dense(case.inputs["in.aff_matrix"][None], size),
        alpha=call["alpha"],
        stride=call["stride"],
        beta=call["beta"],
        n_steps=2 ** call["logt"],
    )
    classes = torch.cat([torch.zeros(1, dtype=torch.int64), keys + 1])
    all_classes = scores.new_zeros(call["num_classes"], *size).index_copy(0, classes, scores[0])
    label = classes[modules.upsample_scores(scores, cam.shape[2:], stride=call["stride"])[0].argmax(0)]
    return {"out.rw_stride8": all_classes, "out.label": Agreement(label, at_least=0.999)}

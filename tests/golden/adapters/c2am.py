"""C2AM: scalars stored with shape (1,), maps without a batch axis, 8-bit saliency, keys with the background first.

The released pull leaves out no rank, however little it weighs.
"""

import torch
from torch import Tensor

import wsss_losses as losses
import wsss_modules as modules
from tests.golden.case import Case, adapter


@adapter("c2am/sim_min")
def sim_min(case: Case) -> dict[str, Tensor]:
    bg, fg = case.leaf("in.embedded_bg"), case.leaf("in.embedded_fg")
    loss, total = (losses.sim_min_loss(bg, fg, reduction=reduction) for reduction in (case.call["reduction"], "sum"))
    return {"out.loss": loss[None], "out.loss_sum": total[None], **case.grads(loss)}


@adapter("c2am/sim_max")
def sim_max(case: Case) -> dict[str, Tensor]:
    features, alpha = case.leaf("in.embedding"), case.call["alpha"]
    loss, total = (
        losses.sim_max_loss(features, alpha=alpha, reduction=reduction, min_weight=0)
        for reduction in (case.call["reduction"], "sum")
    )
    return {"out.loss": loss[None], "out.loss_sum": total[None], **case.grads(loss)}


@adapter("c2am/disentangler")
def disentangler(case: Case) -> dict[str, Tensor]:
    mode = case.call["mode"]
    head = case.load(modules.Disentangler(case.call["cin"])).train(mode == "train")
    x = case.leaf("in.x")
    out = head(x)
    regions = modules.RegionFeatures(out.fg, out.bg)
    if mode == "inference":  # the released head then pools with the logits, too
        regions = modules.pool_two_regions(x, out.logits)
    ccam = out.logits if mode == "inference" else out.probability
    values = {"out.fg_feats": regions.fg, "out.bg_feats": regions.bg, "out.ccam": ccam}
    after = {f"out.{name}_after": getattr(head.bn_head, name) for name in ("running_mean", "running_var")}
    return {**values, **case.grads(values), **after}


@adapter("c2am/c2am_objective")
def c2am_objective(case: Case) -> dict[str, Tensor]:
    head = case.load(modules.Disentangler(case.call["cin"])).train()
    out = head(case.leaf("in.x"))
    terms = losses.c2am_loss(out.fg, out.bg, alpha=case.call["alpha"], min_weight=0)
    named = {"loss": terms.total, "loss_fg_fg": terms.pull_fg, "loss_bg_fg": terms.push, "loss_bg_bg": terms.pull_bg}
    return {**{f"out.{name}": value[None] for name, value in named.items()}, **case.grads(terms.total)}


@adapter("c2am/polarity")
def polarity(case: Case) -> dict[str, Tensor]:
    found = modules.activation_polarity(case.inputs["in.ccam"])
    return {"out.is_background": found.inverted[None].to(torch.uint8)}


@adapter("c2am/ccam_merge")
def ccam_merge(case: Case) -> dict[str, Tensor]:
    views = [case.inputs[f"in.logits_{i}"] for i in range(len(case.call["scales"]))]  # plain and mirrored image each
    out = modules.merge_class_agnostic_maps(
        [view for pair in views for view in pair.split(1)],
        tuple(case.call["size"]),
        inverted=case.call["flag"],
        mirrored=[False, True] * len(views),
    )
    return {"out.cam": out.cam[0], "out.hr_cam": out.high_res[0]}


@adapter("c2am/background_cue")
def background_cue(case: Case) -> dict[str, Tensor]:
    cue = modules.threshold_cue(case.inputs["in.ccam"][None], case.call["threshold"])[0]
    saliency = case.inputs["in.saliency_u8"].double()[None, None] / 255  # the released arithmetic is numpy's
    keys = case.inputs["in.keys"]
    label = modules.refine_cam_with_background_cue(case.inputs["in.cams"][None], saliency, keys=keys[1:])[0]
    return {"out.cue_u8": cue.to(torch.uint8) * 255, "out.refined_label": label}


@adapter("c2am/poly_optimizer")
def poly_optimizer(case: Case) -> dict[str, Tensor]:
    from recipes.pipeline.training import poly_sgd  # the recipes need more than the library does

    call = case.call
    values = [case.inputs[name].clone().requires_grad_() for name in sorted(case.inputs)]
    groups = [
        {"params": [value], "lr": rate, "weight_decay": call["weight_decay"]}
        for value, rate in zip(values, call["lr"], strict=True)
    ]
    momentum = call["effective_sgd_momentum"]
    optimizer, scheduler = poly_sgd(groups, call["max_step"], momentum=momentum, power=call["power"])
    used, history = [], []
    for _ in range(call["steps"]):
        used.append(scheduler.get_last_lr())
        optimizer.zero_grad()
        (values[0].square().sum() + values[1].pow(3).sum()).backward()
        optimizer.step()
        scheduler.step()
        history.append(torch.cat([value.detach() for value in values]))
    return {"out.lr": torch.tensor(used, dtype=torch.float64), "out.params": torch.stack(history)}

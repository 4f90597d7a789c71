"""ReviewKD: the released names of the layers, sides of squares for sizes, sizes from deep to shallow."""

from __future__ import annotations

import re

import torch
from torch import Tensor

import wsss_losses as losses
import wsss_modules as modules
from tests.golden.case import Case, adapter
from tests.golden.compare import Within, choose_rule, parse_tolerance

NAMES = {r"\bconv1\.": "reduce.", r"\bconv2\.": "expand.", r"\batt_conv\.0\.": "attention.", r"\babfs\.": "blocks."}


def rename(name: str) -> str:
    for released, ours in NAMES.items():
        name = re.sub(released, ours, name)
    return name


def target(side: int | None, x: Tensor) -> tuple[int, int]:
    """The size that the released code resizes a map to: a square, unless its width is right already."""
    return tuple(x.shape[-2:]) if side is None or side == x.shape[-1] else (side, side)


def stages(case: Case, whose: str) -> list[str]:
    """Names of a list of inputs, from shallow to deep."""
    names = [name for name in case.inputs if name.startswith(f"in.{whose}.")]
    return sorted(names, key=lambda name: int(name.rsplit(".", 1)[1]))


@adapter("reviewkd/abf")
def abf(case: Case) -> dict[str, Tensor]:
    call = case.call
    fusion = modules.AttentionBasedFusion(call["in_channel"], call["mid_channel"], call["out_channel"], call["fuse"])
    fusion = case.load(fusion, rename).train(call["training"])
    x = case.leaf("in.x")
    out, residual = fusion(x, case.leaf("in.y") if call["fuse"] else None, target(call.get("out_shape"), x))
    values = {"out.out": out, "out.residual": residual}
    state = fusion.state_dict()
    after = {key: state[rename(key.removeprefix("after."))] for key in case.expected if key.startswith("after.")}
    return {**values, **case.grads(values), **after}


@adapter("reviewkd/hcl")
def hcl(case: Case) -> dict[str, Tensor]:
    student, teacher = ([case.leaf(name) for name in stages(case, whose)] for whose in ("student", "teacher"))
    loss = losses.hierarchical_context_loss(student, teacher, levels=case.call["levels"], detach_teacher=False)
    return {"out.loss": loss, **case.grads(loss)}


@adapter("reviewkd/distill_kl")
def distill_kl(case: Case) -> dict[str, Tensor]:
    student, teacher = case.leaf("in.student"), case.leaf("in.teacher")
    loss = losses.distill_kl_loss(student, teacher, temperature=case.call["T"], detach_teacher=False)
    return {"out.loss": loss, **case.grads(loss)}


@adapter("reviewkd/review_kd")
def review_kd(case: Case) -> dict[str, Tensor | Within]:
    call = case.call
    distiller = modules.ReviewDistiller(call["in_channels"], call["out_channels"], call["mid_channel"])
    case.load(distiller, rename).train(call["training"])
    student = [case.leaf(name) for name in stages(case, "student")][-len(call["in_channels"]) :]
    teacher = [case.leaf(name) for name in stages(case, "teacher")]
    sides = (call.get("out_shapes") or call.get("shapes") or [None] * len(student))[: len(student)]
    sizes = [target(side, x) for side, x in zip(sides[::-1], student, strict=True)]
    result = distiller(student, sizes)
    loss = losses.hierarchical_context_loss(result, teacher, detach_teacher=False)
    grads: dict[str, Tensor | Within] = {**case.grads(loss)}
    key = "grad.param.abfs.0.conv1.0.weight"
    if key in grads and call["training"] and student[-1].numel() == 2 * student[-1].shape[1]:
        grads[key] = widened(case, key, grads[key], distiller.blocks[0].reduce[0](student[-1]))
    return {**{f"out.result.{i}": x for i, x in enumerate(result)}, "out.loss": loss, **grads}


def widened(case: Case, key: str, value: Tensor, normed: Tensor) -> Within:
    """The file's tolerance for the weights before a batch norm of two values, and what float32 can be told apart by.

    Two values are normed to -1 and 1 whatever they are, so the gradient behind is a difference of equal terms, each as
    large as the gradient of the norm's weight over the standard deviation. Measured on the file "cifar" against the
    same layers in float64: the stored gradient is off by up to 1.35e-5, which is 3.6 units of such a term; ours by as
    much, or by a tenth on another processor. So eight units, 3.0e-5 at worst, are allowed where that is more.
    """
    rule = choose_rule(parse_tolerance(case.meta["tolerance"]), key, case.expected[key])
    deviation = normed.detach().std((0, 2, 3), unbiased=False)
    terms = case.expected["grad.param.abfs.0.conv1.1.weight"].abs() / deviation
    return Within(value, rule.rtol, max(rule.atol, 8 * torch.finfo(value.dtype).eps * float(terms.max())))

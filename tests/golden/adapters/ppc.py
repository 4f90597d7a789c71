"""PPC: the background is among the classes, at the place that ``bg_index`` says; pixels are flattened."""

from __future__ import annotations

import re

import torch
from torch import Tensor
from torch.nn import functional as F

import wsss_losses as losses
import wsss_modules as modules
from tests.golden.case import Case, adapter


class Layout:
    """The background's place: ``first`` moves it to the front, ``stored`` moves it back."""

    def __init__(self, case: Case, channels: int) -> None:
        place = case.call["bg_index"] % channels
        self.order = [place, *(k for k in range(channels) if k != place)]

    def first(self, x: Tensor, dim: int = 1) -> Tensor:
        return x.index_select(dim, torch.tensor(self.order))

    def classes(self, x: Tensor) -> Tensor:
        return self.first(x)[:, 1:]

    def stored(self, x: Tensor, dim: int = 1) -> Tensor:
        return x.index_select(dim, torch.tensor(self.order).argsort())

    def label_map(self, mask: Tensor) -> Tensor:
        return torch.tensor(self.order)[mask.flatten()].to(torch.uint8)


@adapter("ppc/seam_head", "ppc/eps_head")
def head(case: Case) -> dict[str, Tensor]:
    weight = case.params["param.fc8.weight"]
    layout = Layout(case, len(weight))
    case.params["param.fc8.weight"] = layout.first(weight, 0)
    conv4, conv5, conv6 = (case.leaf(f"in.conv{i}") for i in (4, 5, 6))
    widths = tuple(len(case.params[f"param.{name}.weight"]) for name in ("f8_3", "f8_4"))
    projection = next(case.params[f"param.{name}.weight"] for name in ("fc_proj", "proj_fc") if name_in(case, name))
    module = modules.SEAMHead(
        conv6.shape[1],
        len(weight) - 1,
        side_channels=(conv4.shape[1], conv5.shape[1]),
        side_widths=widths,
        embed=len(case.params["param.f9.weight"]),
        proj_dim=len(projection),
        dropout=0.0,
    )
    out = case.load(module, module.released_key)(conv6, conv4, conv5, case.inputs["in.image_low"])
    values = {
        "out.cam_low": layout.stored(out.scores),
        "out.cam_onehot": layout.stored(modules.one_hot_scores(out.scores[:, 1:])),
        "out.cam_rv_down": layout.stored(out.refined),
        "out.f_proj": out.projected,
    }
    given = {key: value for key, value in values.items() if key.replace("out.", "cot.") in case.cot}
    grads = case.grads(given)
    if "grad.param.fc8.weight" in grads:
        grads["grad.param.fc8.weight"] = layout.stored(grads["grad.param.fc8.weight"], 0)
    return {**values, **grads}


def name_in(case: Case, name: str) -> bool:
    return f"param.{name}.weight" in case.params


@adapter("ppc/seam_losses")
def seam_losses(case: Case) -> dict[str, Tensor]:
    call, layout = case.call, Layout(case, case.inputs["in.label"].shape[1])
    sizes = call["view1"], call["view2"]
    plain, refined = (
        [layout.first(upsampled(case.leaf(name), size)) for name, size in zip(names, sizes, strict=True)]
        for names in (("in.cam1", "in.cam2"), ("in.cam_rv1_down", "in.cam_rv2_down"))
    )
    labels = layout.classes(case.inputs["in.label"])
    cams = [scores[:, 1:] for scores in plain]
    terms = losses.seam_loss(*cams, *refined, labels, ratio=call["ecr_ratio"])
    cross = losses.equivariant_cross_regularization_loss(*refined, *cams, labels, ratio=call["ecr_ratio"])
    values = {
        "out.loss_cls": terms.classification + terms.min_pooling,
        "out.loss_er": terms.er,
        "out.loss_ecr": terms.ecr,
        "out.loss_ecr1": cross.first,
        "out.loss_ecr2": cross.second,
    }
    for view, (cam, maps) in enumerate(zip(cams, refined, strict=True), 1):
        values[f"out.loss_cls{view}"] = F.multilabel_soft_margin_loss(cam.mean((2, 3)), labels)
        values[f"out.loss_rvmin{view}"] = losses.adaptive_min_pooling_loss(maps[:, 1:], labels)
    return {**values, **case.grads(terms.total)}


def upsampled(maps: Tensor, size: list[int]) -> Tensor:
    """What the released network does to its maps before it returns them."""
    return F.interpolate(maps, tuple(size), mode="bilinear", align_corners=True)


@adapter("ppc/eps_er_ecr")
def er_and_ecr(case: Case) -> dict[str, Tensor]:
    call, layout = case.call, Layout(case, case.inputs["in.label"].shape[1])
    labels = layout.classes(case.inputs["in.label"])
    cams = [layout.classes(case.leaf(f"in.cam{view}")) for view in (1, 2)]
    refined = [layout.first(case.leaf(f"in.cam_rv{view}")) for view in (1, 2)]
    terms = losses.seam_loss(*cams, *refined, labels, ratio=call["ecr_ratio"], legacy_background=True)
    grads = case.grads(terms.er + terms.ecr)
    values = {"loss_er": terms.er, "loss_ecr": terms.ecr, "loss_rvmin_mean": terms.min_pooling}
    return {**{f"out.{name}": value for name, value in values.items()}, **grads}


@adapter("ppc/prototype_contrast", "ppc/eps_prototype_contrast")
def prototype_contrast(case: Case) -> dict[str, Tensor]:
    inputs, call = case.inputs, case.call
    layout, grid = Layout(case, inputs["in.label"].shape[1]), tuple(call["grid"])
    labels = layout.classes(inputs["in.label"])
    k = pixels_a_prototype(call["topk"], grid)
    background = call.get("bg_threshold", call.get("bg_thres"))
    features = [case.leaf(f"in.f_proj{view}") for view in (1, 2)]
    cams = [layout.classes(inputs[next(n for n in names if n in inputs)]) for names in cam_names()]
    values: dict[str, Tensor] = {}
    prototypes = []
    for view in (1, 2):
        # the released code brings the first view to this grid before all else
        small, cam = (on_grid(x[view - 1], grid) for x in (features, cams))
        own = modules.estimate_prototypes(small, cam, k).pixels
        stored = layout.first(case.expected[f"out.top_indices{view}"], 0)
        constant = torch.cat([torch.ones(1, dtype=torch.bool), tied(cam, own)])  # arbitrary there: see the notes
        pixels = torch.where(constant[:, None], stored, own)
        estimate = modules.estimate_prototypes(small, cam, k, pixels=pixels)
        prototypes.append(estimate.prototypes)
        mask = modules.cam_pseudo_labels(cam, labels, background)
        values[f"out.prototypes{view}"] = layout.stored(estimate.prototypes, 0)
        values[f"out.pseudo_label{view}"] = layout.label_map(mask)
        ordered = same_order(pixels, stored)
        values[f"out.top_indices{view}"] = layout.stored(ordered, 0)
    drawn = [inputs[f"in.random_pixels{view}"].view(len(labels), *grid) for view in (1, 2)]
    weight = call.get("weight", call.get("gamma"))
    terms = losses.pixel_to_prototype_contrast_loss(
        *features,
        *cams,
        labels,
        *drawn,
        *prototypes,
        temperature=call["tau"],
        background=background,
        confident=k / (grid[0] * grid[1]),
        semi_hard=tuple(call["semi_hard"]),
        hard_ratio=call.get("hard_ratio", 0.6),
        cross_prototype_weight=weight,
        cross_cam_weight=weight,
        intra_weight=weight,
        grid=grid,
    )
    values |= {
        "out.loss_nce": terms.total,
        "out.loss_cross_proto": terms.cross_prototype,
        "out.loss_cross_cam": terms.cross_cam,
        "out.loss_intra": terms.intra,
    }
    return {**values, **case.grads(terms.total)}


def cam_names() -> tuple[tuple[str, ...], ...]:
    return tuple((f"in.cam_rv{view}_down", f"in.cam_rv{view}") for view in (1, 2))


def pixels_a_prototype(text: str, grid: tuple[int, ...]) -> int:
    """The k of "h*w//8=32 over the whole batch"."""
    found = re.match(r"h\*w//(\d+)", text)
    assert found is not None, text
    return max(1, grid[0] * grid[1] // int(found[1]))


def on_grid(maps: Tensor, grid: tuple[int, ...]) -> Tensor:
    return F.interpolate(maps, grid, mode="bilinear", align_corners=True)


def tied(cam: Tensor, pixels: Tensor) -> Tensor:
    """(K,) whether the value of the last pixel chosen occurs again among those that are not: any choice is right."""
    rows = modules.minmax_cam(cam.detach(), clamp=False).transpose(0, 1).flatten(1)
    chosen = rows.gather(1, pixels[1:])
    last = chosen.min(1, keepdim=True).values
    return (rows == last).sum(1) > (chosen == last).sum(1)


def same_order(pixels: Tensor, stored: Tensor) -> Tensor:
    """``pixels`` in the order of ``stored`` where both are the same set: the order of equal values is arbitrary."""
    same = pixels.sort(1).values == stored.sort(1).values
    return torch.where(same.all(1, keepdim=True), stored, pixels)


@adapter("ppc/cam_fuse")
def cam_fuse(case: Case) -> dict[str, Tensor]:
    cam = modules.minmax_cam(case.inputs["in.cams"].sum(0), clamp=False)
    return {"out.norm_cam": cam, "out.pred": modules.cam_to_mask(cam[None], case.call["bg_score"])[0]}


@adapter("ppc/poly_sgd")
def poly_sgd(case: Case) -> dict[str, Tensor]:
    from recipes.pipeline.training import poly_sgd as make  # the recipes need more than the library does

    call = case.call
    p, q = (case.inputs[f"in.{name}"].clone().requires_grad_() for name in "pq")
    groups = [
        {"params": [p], "lr": call["lr"], "weight_decay": call["weight_decay"]},
        {"params": [q], "lr": 2 * call["lr"], "weight_decay": 0.0},
    ]
    optimizer, scheduler = make(groups, call["max_step"], momentum=call["effective_momentum"], power=call["power"])
    history: dict[str, list[Tensor]] = {"p": [], "q": [], "lr": []}
    for _ in range(call["steps"]):
        rate = scheduler.get_last_lr()[0]
        optimizer.zero_grad()
        (p.square().sum() + (q - 1).square().sum()).backward()
        optimizer.step()
        scheduler.step()
        for name, value in (("p", p.detach().clone()), ("q", q.detach().clone())):
            history[name].append(value)
        history["lr"].append(torch.tensor(rate, dtype=torch.float64))
    return {f"out.{name}": torch.stack(values) for name, values in history.items()}

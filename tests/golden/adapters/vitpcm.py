"""ViT-PCM: channels last, transforms as rows of nine numbers, LSTMs in the layout of Keras."""

import torch
from einops import rearrange
from torch import Tensor

import wsss_losses as losses
import wsss_modules as modules
from tests.golden.case import Case, adapter


def channels_first(x: Tensor) -> Tensor:
    return rearrange(x, "b h w c -> b c h w")


def channels_last(x: Tensor) -> Tensor:
    return rearrange(x, "b c h w -> b h w c")


def transform_of(rows: Tensor, grid: tuple[int, int], patch: int) -> modules.PatchTransform:
    """Stored as flip_lr, flip_ud, transpose, y1, x1, y2, x2, height, width, the last six in pixels; 0 for none."""
    flip_lr, flip_ud, transpose = (rows[:, :3] > 0).unbind(1)
    cells = (rows[:, 3:] // patch).long()
    cropped, resized = (rows[:, 3:7] > 0).any(1), (rows[:, 7:] > 0).any(1)
    if not cropped.any() and not resized.any():
        return modules.PatchTransform(flip_lr, flip_ud, transpose)
    whole = cells.new_tensor([0, 0, *grid[::-1]])
    box = torch.where(cropped[:, None], cells[:, [1, 0, 3, 2]], whole)
    own = torch.stack([box[:, 3] - box[:, 1], box[:, 2] - box[:, 0]], 1)  # what a crop has without a resize
    sizes = torch.where(resized[:, None], cells[:, 4:], own)
    return modules.PatchTransform(flip_lr, flip_ud, transpose, box, tuple(sizes[0].tolist()))


@adapter("vitpcm/hv_bilstm")
def hv_bilstm(case: Case) -> dict[str, Tensor]:
    features, names = case.leaf("in.features"), {}
    layer = modules.HVBiLSTM(features.shape[-1], case.call["hidden_dim"], case.call["dropout"]).to(features.dtype)
    places = {"kernel": "weight_ih", "recurrent_kernel": "weight_hh", "bias": "bias_ih"}
    with torch.no_grad():
        for name, parameter in layer.named_parameters():
            if "bias_hh" in name:
                parameter.zero_()
        for key, stored in case.params.items():
            axis, direction, kind = key.removeprefix("param.").split(".")
            names[key] = f"{axis}.{places[kind]}_l0" + "_reverse" * (direction == "backward")
            layer.get_parameter(names[key]).copy_(stored.mT if stored.ndim == 2 else stored)
    out = channels_last(layer.eval()(channels_first(features)))
    total = (out * case.cot["cot.features"]).sum()
    grads = torch.autograd.grad(total, [layer.get_parameter(name) for name in names.values()], retain_graph=True)
    values = {f"grad.{key}": grad.mT if grad.ndim == 2 else grad for key, grad in zip(names, grads, strict=True)}
    return {"out.features": out, **values, **case.grads({"out.features": out})}


@adapter("vitpcm/patch_classifier_mce")
def patch_classifier_mce(case: Case) -> dict[str, Tensor]:
    features, kernel, labels = case.leaf("in.features"), case.leaf("param.kernel"), case.inputs["in.labels"]
    layer = modules.PatchClassifierGMP(features.shape[-1], case.call["num_categories"])
    weight = rearrange(kernel, "d k -> k d 1 1")
    del layer.classifier.weight
    layer.classifier.weight = weight  # so that gradients reach the stored layout
    out = layer.eval()(channels_first(features))
    mce, penalty = losses.pooled_probability_bce_loss(out.pooled, labels), layer.l2_penalty(case.call["l2"])
    return {
        "out.logits": channels_last(out.logits),
        "out.preds": channels_last(out.probs),
        "out.pooled_preds": out.pooled,
        "out.mce_loss": mce,
        "out.reg_loss": penalty,
        **case.grads(mce + penalty),
    }


@adapter("vitpcm/merge_class_labels")
def merge_class_labels(case: Case) -> dict[str, Tensor]:
    merged = modules.merge_class_labels(channels_first(case.inputs["in.preds"]), case.inputs["in.labels"])
    return {"out.preds": channels_last(merged)}


@adapter("vitpcm/patch_affine")
def patch_affine(case: Case) -> dict[str, Tensor]:
    maps = channels_first(case.inputs["in.preds"])
    first, second = (
        transform_of(case.inputs[f"in.affine_{i}"], tuple(maps.shape[2:]), case.call["patch"]) for i in (1, 2)
    )
    reverted = first.inverse().apply(maps)
    values = {"applied_1": first.apply(maps), "reverted_1": reverted, "reverted_1_applied_2": second.apply(reverted)}
    return {f"out.{name}": channels_last(value) for name, value in values.items()}


@adapter("vitpcm/mosaic")
def mosaic(case: Case) -> dict[str, Tensor]:
    tiled = modules.mosaic2x2(channels_first(case.inputs["in.images"]))
    return {"out.mosaic": channels_last(tiled), "out.split": channels_last(modules.split2x2(tiled))}


@adapter("vitpcm/equivariance_loss")
def equivariance_loss(case: Case) -> dict[str, Tensor]:
    probs, labels = channels_first(case.inputs["in.preds"]), case.inputs["in.labels"]
    first, view = (
        transform_of(case.inputs[f"in.affine_{i}"], tuple(probs.shape[2:]), case.call["patch_size"]) for i in (1, 2)
    )
    target = modules.equivariance_target(probs, labels, first, view)
    views = modules.split2x2(channels_first(case.leaf("in.preds_mosaic")))
    loss = losses.patch_equivariance_loss(views, target)
    return {"out.loss": loss, "out.target": channels_last(target), **case.grads(loss)}


@adapter("vitpcm/resize")
def resize(case: Case) -> dict[str, Tensor]:
    x = channels_first(case.inputs["in.x"])
    never = torch.zeros(len(x), dtype=torch.bool)
    resized = modules.PatchTransform(never, never, never, None, tuple(case.call["size"])).apply(x)
    return {"out.x": channels_last(resized)}

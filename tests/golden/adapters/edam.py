"""EDAM: background mask last, 0-based classes, blocks and classifiers class by class, flat image-major logits."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.func import functional_call

import wsss_losses as losses
import wsss_modules as modules
from recipes.pipeline.training import poly_sgd
from tests.golden.case import Case, adapter

# Our parameters of a block, and the released ones that they are joined from.
BLOCK = {
    "qkv": [f"attention.linear_layers.{i}" for i in range(3)],
    "out": ["attention.output_linear"],
    "inner": ["feed_forward.w_1"],
    "outer": ["feed_forward.w_2"],
}
NORMS = {"norm1": "input_sublayer.norm", "norm2": "output_sublayer.norm"}


def block_state(case: Case, prefix: str) -> dict[str, Tensor]:
    """One block's parameters under our names, without the axis of blocks; leaves of the case."""
    state = {
        f"{ours}_{part}": torch.cat([case.leaf(f"param.{prefix}{name}.{part}") for name in names])
        for ours, names in BLOCK.items()
        for part in ("weight", "bias")
    }
    for ours, name in NORMS.items():
        state[f"{ours}_weight"] = case.leaf(f"param.{prefix}{name}.a_2")
        state[f"{ours}_bias"] = case.leaf(f"param.{prefix}{name}.b_2")
    return state


def hidden_width(case: Case) -> int:
    return next(len(value) for key, value in case.params.items() if key.endswith("feed_forward.w_1.bias"))


def of_classes(stored: dict[int, Tensor], num_classes: int) -> Tensor:
    """A parameter of all classes from those stored; the others, which are not sampled, as zeros."""
    nothing = torch.zeros_like(next(iter(stored.values())))
    return torch.stack([stored.get(k, nothing) for k in range(num_classes)])


@adapter("edam/edam_net")
def edam_net(case: Case) -> dict[str, Tensor]:
    call, features = case.call, case.leaf("in.feature")
    images, keys = len(features), case.inputs["in.label_idx"].long() + 1
    classes = case.params["param.mask_layer.weight"].shape[0] - 1
    segment = case.leaf("param.embedding.segment.weight")
    head = modules.EDAMHead(
        features.shape[1],
        classes,
        call["hidden"],
        call["heads"],
        call["layers"],
        hidden=hidden_width(case),
        max_images=len(segment),
    )
    sampled = [int(k) - 1 for k in keys.unique()]
    state = {
        "activation.conv.weight": case.leaf("param.mask_layer.weight").roll(1, 0),
        "project.weight": case.leaf("param.d_d.weight"),
        "attention.embedding.segment.weight": segment,
        "attention.classifier": of_classes(
            {k: case.leaf(f"param.fc_list.{k}.weight").flatten() for k in sampled}, classes
        ),
    }
    for layer in range(call["layers"]):
        blocks = {k: block_state(case, f"trans_list.{k}.{layer}.") for k in sampled}
        for name in blocks[sampled[0]]:
            joined = of_classes({k: block[name] for k, block in blocks.items()}, classes)
            state[f"attention.blocks.{layer}.{name}"] = joined
    out = functional_call(head.to(features.dtype).eval(), state, (features, keys), strict=True)
    labels = torch.zeros(images, classes, dtype=features.dtype)
    labels[:, keys - 1] = case.inputs["in.label"].view(images, -1)
    loss = losses.edam_loss(out.logits, labels, keys)
    return {
        "out.mask": out.scores.roll(-1, 1),
        "out.logits": out.logits.flatten(),
        "out.loss": loss,
        **case.grads(loss),
    }


@adapter("edam/transformer_block")
def transformer_block(case: Case) -> dict[str, Tensor]:
    x = case.leaf("in.x")
    block = modules.PreNormTransformerBlock(x.shape[-1], case.call["heads"], hidden_width(case))
    state = {name: value[None] for name, value in block_state(case, "").items()}
    y = functional_call(block.to(x.dtype).eval(), state, (x,), strict=True)
    return {"out.y": y, **case.grads({"out.y": y})}


@adapter("edam/token_embedding")
def token_embedding(case: Case) -> dict[str, Tensor]:
    x, call, segment = case.leaf("in.x"), case.call, case.leaf("param.segment.weight")
    embed: nn.Module = modules.ImagePositionEmbedding(x.shape[-1], len(segment)).to(x.dtype).eval()
    cells = call["hw"][0] * call["hw"][1]
    tokens = x.view(call["images"], call["classes"], cells, x.shape[-1])
    y = functional_call(embed, {"segment.weight": segment}, (tokens,), strict=True).view_as(x)
    values = {"out.y": y, "out.pe": embed.positions(cells)[None]}
    return {**values, **(case.grads({"out.y": y}) if case.cot else {})}


@adapter("edam/pseudo_label")
def pseudo_label(case: Case) -> dict[str, Tensor]:
    call, labels = case.call, case.inputs["in.label"]
    masks = case.inputs["in.summed_masks"][None]
    normalised = modules.normalize_cam(masks, eps=0)
    cam = torch.where(labels[None, :, None, None] > 0, normalised[:, : len(labels)], 0.0)
    saliency = case.inputs["in.saliency"][None, None].double() / 256  # a division that never rounds two levels to one
    options = {"salient": call["theta"] * 100 / 256, "alpha": call["alpha"], "beta": call["beta"]}
    values = {
        "out.norm_cam": normalised[0],
        "out.scores_sal": modules.saliency_guided_scores(cam, saliency, **options)[0],
        "out.pred_sal": modules.edam_pseudo_label(cam, saliency, **options)[0].to(torch.uint8),
    }
    for key in case.expected:
        if key.startswith("out.pred_theta"):
            threshold = float(key.removeprefix("out.pred_theta"))
            values[key] = modules.edam_pseudo_label(cam, threshold=threshold)[0].to(torch.uint8)
    return values


@adapter("edam/warmup_poly_sgd")
def warmup_poly_sgd(case: Case) -> dict[str, Tensor]:
    call, p = case.call, nn.Parameter(case.inputs["in.p"].clone())
    groups = [{"params": [p], "lr": call["lr"], "weight_decay": call["weight_decay"]}]
    optimizer, scheduler = poly_sgd(
        groups,
        call["max_step"],
        momentum=call["momentum"],
        power=call["power"],
        warmup=call["warm_up_step"],
        warmup_start=call["warmup_start"],
    )
    rates, values = [], []
    for _ in case.expected["out.lr"]:
        rates.append(scheduler.get_last_lr()[0])
        optimizer.zero_grad()
        p.square().sum().backward()
        optimizer.step()
        scheduler.step()
        values.append(p.detach().clone())
    return {"out.lr": torch.tensor(rates, dtype=torch.float64), "out.p": torch.stack(values)}

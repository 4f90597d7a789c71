"""MCTformer V1, V2 and MCTformer+: class keys from 0, single images without a batch axis in the seeds, DeiT's names."""

from __future__ import annotations

import torch
from torch import Tensor, nn

import wsss_losses as losses
import wsss_modules as modules
from tests.golden.case import Agreement, Case, adapter


def network(case: Case, variant: str) -> modules.MultiClassTokenViT:
    call = case.call
    dim, patch, classes = call["embed_dim"], call["patch_size"], call["num_classes"]
    blocks = [
        modules.TransformerBlock(dim, call["num_heads"], call["mlp_ratio"], qkv_bias=call["qkv_bias"])
        for _ in range(call["depth"])
    ]
    encoder = modules.TokenEncoder(
        nn.Conv2d(3, dim, patch, stride=patch),
        blocks,
        dim,
        num_prefix=classes,
        grid=modules.patch_grid((call["img_size"], call["img_size"]), patch),
        pos_offset=0.1,
    )
    net = modules.MultiClassTokenViT(encoder, classes, variant, n_layers=call["n_layers"])
    unused = "head" if variant == "v1" else "none"

    def rename(name: str) -> str | None:
        return None if name.split(".")[0] == unused else modules.MultiClassTokenViT.released_key(name)

    return case.load(net, rename).eval()


class Stack:
    """The attention of every block, whole."""

    def __init__(self) -> None:
        self.layers: list[Tensor] = []

    def __call__(self, layer: int, block: nn.Module, tokens: Tensor) -> None:
        self.layers.append(modules.attention_probabilities(*modules.query_key(block, tokens)))


@adapter("mctformer/v1_network", "mctformer/v2_network")
def whole_network(case: Case) -> dict[str, Tensor]:
    variant = "v1" if case.name.endswith("v1_network") else "v2"
    net, images, labels = network(case, variant), case.inputs["in.images"], case.inputs["in.labels"]
    stack = Stack()
    out = net(images, visit=stack)
    terms = losses.mctformer_loss(out.class_logits, out.patch_logits, None, labels)
    patch_attn = modules.patch_to_patch_attention(stack.layers, net.num_classes, reduce="none")
    values = {"out.loss": terms.total, "out.patch_attn": patch_attn, **case.grads(terms.total)}
    with torch.no_grad():
        found = net.localize(images)
        torch.testing.assert_close(found.affinity, patch_attn.sum(0), rtol=1e-5, atol=1e-6)
        if variant == "v1":
            return {**values, "out.logits": out.class_logits, "out.class_attn": found.cam.flatten(2)}
        maps = {f"out.cam_{mode}": net.localize(images, mode).cam for mode in ("fused", "patchcam", "mct")}
    return {**values, **maps, "out.class_logits": out.class_logits, "out.patch_logits": out.patch_logits}


def heads(case: Case, pool: nn.Module | None) -> tuple[Tensor, modules.PatchCAMOutput]:
    """Scores of the class tokens (of the last block), and what the head makes of the patches."""
    call, patches, tokens = case.call, case.leaf("in.patch_tokens"), case.leaf("in.class_tokens")
    head = modules.PatchCAMHead(patches.shape[2], call["num_classes"], pool)
    case.load(head, lambda name: name.replace("head.", "conv."))
    last = tokens if tokens.ndim == 3 else tokens[-1]
    return modules.ClassTokenPool()(last), head(patches, (call["height"], call["width"]))


def fused(case: Case, cam: Tensor, reduce: str, root: bool) -> dict[str, Tensor]:
    call, attn = case.call, case.inputs["in.attn"]
    maps = modules.class_to_patch_attention(attn, call["num_classes"], call["n_layers"], reduce=reduce)
    maps = maps.unflatten(2, cam.shape[2:])
    modes = ("fused", "patchcam", "mct")
    return {f"out.cam_{mode}": modules.fuse_attention_cam(maps, cam, mode, root=root) for mode in modes}


@adapter("mctformer/token_fusion")
def token_fusion(case: Case) -> dict[str, Tensor]:
    class_logits, out = heads(case, None)
    terms = losses.mctformer_loss(class_logits, out.logits, None, case.inputs["in.labels"])
    return {
        **fused(case, out.cam, "sum", root=False),
        "out.class_logits": class_logits,
        "out.patch_logits": out.logits,
        "out.class_loss": terms.class_tags,
        "out.patch_loss": terms.patch_tags,
        "out.loss": terms.total,
        "out.patch_attn": modules.patch_to_patch_attention(
            case.inputs["in.attn"], case.call["num_classes"], reduce="none"
        ),
        **case.grads(terms.total),
    }


@adapter("mctformer/plus_fusion")
def plus_fusion(case: Case) -> dict[str, Tensor]:
    call, labels = case.call, case.inputs["in.labels"]
    class_logits, out = heads(case, modules.GlobalWeightedRankPool(call["decay"]))
    options = {"contrast_weight": call["loss_weight"], "num_layers": call["num_cct"]}
    terms = losses.mctformer_loss(class_logits, out.logits, case.leaf("in.class_tokens"), labels, **options)
    scores = modules.MultiClassTokenOutput(class_logits, out.logits, *[None] * 4)
    return {
        **fused(case, out.cam, "mean", root=True),
        "out.class_logits": class_logits,
        "out.patch_logits": out.logits,
        "out.eval_logits": scores.logits,
        "out.class_loss": terms.class_tags,
        "out.patch_loss": terms.patch_tags,
        "out.contrastive_loss": terms.contrast,
        "out.loss": terms.total,
        **case.grads(terms.total),
    }


@adapter("mctformer/pos_embed_interpolate", "mctformer/plus_pos_embed_interpolate")
def pos_embed_interpolate(case: Case) -> dict[str, Tensor]:
    call = case.call
    classes = call.get("num_classes", 0)
    pos_embed = case.inputs["in.pos_embed" if "in.pos_embed" in case.inputs else "in.pos_embed_patch"]
    values = {}
    for height, width in call["sizes"]:
        grid = modules.patch_grid((height, width), call["patch"])
        options = {"offset": call["offset"], "resample_same": height != width}
        values[f"out.pos_{height}x{width}"] = modules.interpolate_pos_embed(pos_embed, classes, grid, **options)
    return values


@adapter("mctformer/checkpoint_init")
def checkpoint_init(case: Case) -> dict[str, Tensor]:
    state = {name.removeprefix("in."): value for name, value in case.inputs.items()}
    side = case.call["target_grid"]
    expanded = modules.expand_class_token_checkpoint(state, case.call["num_classes"], (side, side))
    return {f"out.{name}": value for name, value in expanded.items()}


@adapter("mctformer/seed_generation")
def seed_generation(case: Case) -> dict[str, Tensor]:
    call = case.call
    maps = []
    for i in range(sum(key.startswith("in.cam_") for key in case.inputs)):
        cam = case.inputs[f"in.cam_{i}"]
        refine = call["patch_attn_refine"]
        maps.append(modules.refine_with_patch_affinity(cam, case.inputs[f"in.patch_attn_{i}"]) if refine else cam)
    mirrored = [i % 2 == 1 for i in range(len(maps))]
    labels, size = case.inputs["in.labels"][None], (call["height"], call["width"])
    seeds = modules.multi_scale_cam(maps, labels, size, mirrored=mirrored, eps=1e-8, subtract_min=True)
    values = {f"out.seed_{key - 1}": cam for key, cam in zip(seeds.keys.tolist(), seeds.cam, strict=True)}
    for alpha in {key.removeprefix("out.unary_alpha").split("_")[0] for key in case.expected if "unary" in key}:
        scores = [modules.background_score(seeds.cam[None], float(alpha))[0, 0], *seeds.cam]
        keys = [0, *seeds.keys.tolist()]
        values |= {f"out.unary_alpha{alpha}_{key}": score for key, score in zip(keys, scores, strict=True)}
    return values


@adapter("mctformer/psa_random_walk")
def psa_random_walk(case: Case) -> dict[str, object]:
    call = case.call
    cam = torch.zeros(1, 0, *case.expected["out.label"].shape)  # an image without a class has no seed to tell its size
    if call["keys"]:
        cam = torch.stack([case.inputs[f"in.seed_{key}"] for key in call["keys"]])[None]
    stride = 8  # of the released network
    size = (-(-cam.shape[2] // stride), -(-cam.shape[3] // stride))
    scores = modules.propagate_cam(
        cam,
        modules.LocalAffinity.from_dense(case.inputs["in.affinity"][None], size),
        background=call["bg_thr"],
        stride=stride,
        beta=call["beta"],
        n_steps=2 ** call["logt"],
    )
    classes = torch.tensor([0, *(key + 1 for key in call["keys"])])
    label = classes[modules.upsample_scores(scores, cam.shape[2:], stride=stride)[0].argmax(0)]
    return {"out.cam_walk_grid": scores[0], "out.label": Agreement(label, at_least=0.998)}

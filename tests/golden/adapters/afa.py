"""AFA: boxes as rows and columns, classes with one-hot labels, heads and classifiers as 1 x 1 convolutions."""

import torch
from torch import Tensor

import wsss_losses as losses
import wsss_modules as modules
from tests.golden.case import Agreement, Case, Within, adapter

LABELS = 0.998  # "<=0.2% of pixels may differ"


def dtype_of(case: Case) -> torch.dtype:
    return getattr(torch, case.call.get("dtype", "float32").removeprefix("torch."))


def regions_of(case: Case) -> Tensor:
    """Stored as y1, y2, x1, x2."""
    return case.inputs["in.boxes"][:, [2, 0, 3, 1]]


def band_of(call: dict) -> tuple[float, float]:
    """The low and the high background score; a training step has the published ones."""
    return call.get("low_thre", 0.35), call.get("high_thre", 0.55)


def par_of(call: dict) -> modules.PixelAdaptiveRefinement:
    widths = {name: call[name] for name in ("w1", "w2") if name in call}
    return modules.PixelAdaptiveRefinement(call["dilations"], call["num_iter"], image_gradient=True, **widths)


@adapter("afa/par")
def par(case: Case) -> dict[str, Tensor]:
    values = {"out.masks": par_of(case.call)(case.leaf("in.images"), case.leaf("in.masks"))}
    return {**values, **case.grads(values)}


@adapter("afa/cam_to_label")
def cam_to_label(case: Case) -> dict[str, Tensor]:
    call, cam, labels = case.call, case.inputs["in.cam"], case.inputs["in.labels"]
    options = {"background": call["bkg_score"], "ignore_index": call["ignore_index"]}
    band = band_of(call)
    regions = regions_of(case)
    return {
        "out.label_nobox": modules.cam_to_label(cam, labels, **options),
        "out.label_bkg_score": modules.cam_to_label(cam, labels, regions=regions, **options),
        "out.label_ignore_mid": modules.cam_to_label(cam, labels, band=band, regions=regions, **options),
        "out.valid_cam": modules.select_present(cam, labels).full(*labels.shape),
    }


@adapter("afa/multi_scale_cam")
def multi_scale_cam(case: Case) -> dict[str, Tensor]:
    call = case.call
    maps = {scale: case.inputs[f"in.raw_cam_{i}"] for i, scale in enumerate(call["order"])}
    affinities = {scale: case.inputs[f"in.affinity_{i}"] for i, scale in enumerate(call["order"])}
    configured = call["scales"]
    released = call["order"][configured.index(max(configured))]  # looked up by the place in the other list
    cam = modules.merge_multiscale_cams(list(maps.values()), (call["height"], call["width"]))
    return {"out.cam": cam, "out.affinity": affinities[released]}


@adapter("afa/affinity_label_and_loss")
def affinity_label_and_loss(case: Case) -> dict[str, object]:
    call, mask = case.call, case.inputs["in.label"].long()
    ignore, radius, stride = call["ignore_index"], call["radius"], call["stride"]
    target = modules.labels_to_affinity(mask, radius=radius, stride=stride, ignore_index=ignore)
    loss = losses.attention_affinity_loss(case.leaf("in.affinity_pred"), target, ignore_index=ignore)
    values = {
        "out.affinity_label": Within(target),
        "out.loss": Within(loss, 1e-5, 1e-6),
        "out.pos_count": Within((target == 1).sum() + 1),
        "out.neg_count": Within((target == 0).sum() + 1),
        **{key: Within(grad, 1e-5, 1e-6) for key, grad in case.grads(loss).items()},
    }
    if radius is not None:
        grid = (mask.shape[1] // stride, mask.shape[2] // stride)
        values["out.radius_mask"] = Within(modules.local_window_mask(grid, radius))
    return values


@adapter("afa/seg_loss")
def seg_loss(case: Case) -> dict[str, Tensor]:
    mask, ignore = case.inputs["in.label"].long(), case.call["ignore_index"]
    loss = losses.balanced_cross_entropy_loss(case.leaf("in.logits"), mask, ignore_index=ignore)
    return {"out.loss": loss, **case.grads(loss)}


@adapter("afa/random_walk")
def random_walk(case: Case) -> dict[str, Tensor]:
    call, cam, affinity = case.call, case.inputs["in.cam"], case.inputs["in.affinity"]
    options = {
        "radius": call["radius"],
        "power": call["beta"],
        "eps": call["eps"],
        "n_steps": 2 ** call.get("n_log_iter", 0),
    }
    if call["bkg_score"] is None:
        return {"out.cam": modules.affinity_random_walk(cam, affinity, **options)}
    walk = modules.AffinityRandomWalk(**options, backgrounds=(call["bkg_score"],))
    return {"out.cam": walk(cam, affinity, case.inputs["in.labels"])[0]}


def refined_label(case: Case, call: dict, image: Tensor, refine: modules.PixelAdaptiveRefinement) -> Tensor:
    return modules.refine_cam_with_background(
        image,
        case.inputs["in.cam"],
        case.inputs["in.labels"],
        refine,
        regions=regions_of(case),
        **dict(zip(("low", "high"), band_of(call), strict=True)),
        **{name: call[name] for name in ("down_scale",) if name in call},
    )


@adapter("afa/par_refine")
def par_refine(case: Case) -> dict[str, object]:
    call, cam, labels = case.call, case.inputs["in.cam"], case.inputs["in.labels"]
    image, refine = modules.denormalize_images(case.inputs["in.images_normalised"], legacy=True), par_of(call)
    scores = torch.cat([torch.full_like(cam[:, :1], call["bkg_for_refined_cam"]), cam], 1)
    options = {"regions": regions_of(case), "down_scale": call["down_scale"]}
    return {
        "out.images01": Within(image),
        "out.label": Agreement(refined_label(case, call, image, refine), LABELS),
        "out.refined_cam_with_bkg": Within(modules.refine_scores(image, scores, labels, refine, **options), 1e-4, 1e-5),
    }


@adapter("afa/affinity_head")
def affinity_head(case: Case) -> dict[str, Tensor]:
    attentions = [case.leaf(f"in.attn_{i}") for i in range(sum(name.startswith("in.attn_") for name in case.inputs))]
    features = case.leaf("in.feature")
    pool = {"gmp": "max", "gap": "mean"}[case.call["pooling"]]
    classes = len(case.params["param.classifier.weight"])
    net = torch.nn.ModuleDict(
        {
            "cam": modules.CAMHead(features.shape[1], classes, pool=pool),
            "affinity": modules.AttentionAffinityHead(sum(attention.shape[1] for attention in attentions)),
        }
    )
    case.load(
        net,
        lambda name: (
            {"classifier": "cam.classifier", "attn_proj": "affinity.proj"}[name.split(".")[0]]
            + "."
            + name.split(".")[1]
        ),
    )
    learnt = {"out.affinity": net["affinity"](attentions), "out.logits": net["cam"](features).logits}
    return {**learnt, "out.cam": net["cam"].class_maps(features).detach(), **case.grads(learnt)}


@adapter("afa/mit_attention")
def mit_attention(case: Case) -> dict[str, Tensor]:
    call = case.call
    layer = modules.EfficientSelfAttention(
        call["dim"], call["num_heads"], call["sr_ratio"], qkv_bias=call.get("qkv_bias", True)
    )
    x, attention = case.load(layer)(case.leaf("in.x"), (call["H"], call["W"]), return_logits=True)
    values = {"out.x": x, "out.attn": attention}
    return {**values, **case.grads(values)}


@adapter("afa/training_step")
def training_step(case: Case) -> dict[str, object]:
    call, inputs, labels = case.call, case.inputs, case.inputs["in.labels"]
    image, refine = modules.denormalize_images(inputs["in.images_normalised"], legacy=True), par_of(call["par"])
    pseudo = refined_label(case, call, image, refine)
    grid = (call["infer_size"], call["infer_size"])
    coarse = torch.nn.functional.interpolate(inputs["in.cam"], grid, mode="bilinear", align_corners=False)
    walk = modules.AffinityRandomWalk(call["radius"], backgrounds=band_of(call))
    low, high = walk(coarse, inputs["in.affinity_infer"][: len(labels)], labels)
    walked = modules.refine_walked_scores(image, low, high, labels, refine, regions=regions_of(case))
    target = modules.labels_to_affinity(pseudo, radius=call["radius"])
    seg_target = pseudo if call["n_iter"] <= 6000 else walked
    predictions = [case.leaf(f"in.{name}") for name in ("logits", "seg_logits", "affinity_pred")]
    terms = losses.afa_loss(*predictions, labels, seg_target, target)
    known = [  # gradients are those of the same labels; that ours are the same but for a few is compared by itself
        case.expected["out.seg_target"].long(),
        case.expected["out.affinity_label"].long(),
    ]
    # the terms are stored also while their weights are 0
    weights = {"seg_weight": 0, "affinity_weight": 0} if call["n_iter"] <= call["cam_iters"] else {}
    total = losses.afa_loss(*predictions, labels, seg_target, target, **weights).total
    gradients = case.grads(losses.afa_loss(*predictions, labels, *known, **weights).total)
    plain = modules.cam_to_label(inputs["in.cam"], labels, band=band_of(call), regions=regions_of(case))
    masks = {"pseudo_label": plain, "refined_pseudo_label": pseudo, "seg_target": seg_target, "affinity_label": target}
    named = {"loss": total, "cls_loss": terms.classification, "seg_loss": terms.segmentation}
    values = {f"out.{name}": Agreement(mask, LABELS) for name, mask in masks.items()}
    values |= {f"out.{name}": Within(loss, 2e-3) for name, loss in {**named, "aff_loss": terms.affinity}.items()}
    return {**values, **{key: Within(grad, 2e-3, 1e-6) for key, grad in gradients.items()}}


@adapter("afa/poly_warmup_lr")
def poly_warmup_lr(case: Case) -> dict[str, Tensor]:
    from recipes.pipeline.training import AdamSchedule, warmup_adamw  # the recipes need more than the library does

    call, stored = case.call, case.expected["out.lr"]
    schedule = AdamSchedule(
        epochs=1,
        batch_size=1,
        lr=call["lr"],
        head_lr=call["lr"],
        warmup=call["warmup_iter"] / call["max_iter"],
        start=call["warmup_ratio"],
        decay="poly",
        power=call["power"],
    )
    group = {"params": [torch.nn.Parameter(torch.zeros(1))], "lr": call["lr"]}
    optimizer, scheduler = warmup_adamw([group], call["max_iter"], schedule)
    used = []
    for _ in range(len(stored)):
        used.append(scheduler.get_last_lr()[0])
        optimizer.step()
        scheduler.step()
    return {"out.lr": torch.tensor(used, dtype=stored.dtype)}


@adapter("afa/msc_flip_segmentation")
def msc_flip_segmentation(case: Case) -> dict[str, Tensor]:
    from recipes.pipeline.segmenter import merge_views

    scales = case.call["scales"]
    views = [case.inputs[f"in.seg_{i}"] for i in range(len(scales))]
    single = views[scales.index(1) if 1 in scales else 0].chunk(2)[0]  # without the mirror images
    merged = merge_views(views)
    full = torch.nn.functional.interpolate(merged, case.call["out_size"], mode="bilinear", align_corners=False)
    return {"out.msc_logits": merged, "out.msc_logits_full": full, "out.single_logits": single}

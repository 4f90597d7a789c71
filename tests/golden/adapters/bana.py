"""BANA: boxes as coordinates from -1 to 1 with the class as fifth column, classifiers as 1 x 1 convolutions."""

import torch
from torch import Tensor
from torch.nn import functional as F

import wsss_losses as losses
import wsss_modules as modules
from tests.golden.case import Agreement, Case, Within, adapter

LABELS = 0.999  # "allow 0.1% of pixels to differ (ties)"


def to_pixels(boxes: Tensor, size: tuple[int, ...]) -> Tensor:
    """x1, y1, x2, y2 in pixels of boxes stored in [-1, 1]; float64, so that the way back gives what is stored."""
    height, width = size
    half = torch.tensor([width - 1, height - 1] * 2, dtype=torch.float64) / 2
    return (boxes[:, :4].double() + 1) * half


@adapter("bana/pad_for_grid")
def pad_for_grid(case: Case) -> dict[str, Tensor]:
    return {"out.y": modules.pad_to_grid(case.inputs["in.x"], case.call["grid_size"])}


@adapter("bana/weighted_avg_pool")
def weighted_avg_pool(case: Case) -> dict[str, Tensor]:
    pooled = modules.weighted_roi_avg_pool(case.leaf("in.x"), case.leaf("in.weight"), tuple(case.call["roi_size"]))
    values = {"out.y": pooled}
    return {**values, **case.grads(values)}


@adapter("bana/bap_classification")
def bap_classification(case: Case) -> dict[str, Tensor]:
    call, mask, stored = case.call, case.inputs["in.bg_mask"], case.inputs["in.boxes"]
    index = case.inputs["in.box_batch_index"].double()
    boxes = torch.cat([index[:, None], to_pixels(stored, mask.shape[2:])], 1)
    features = case.leaf("in.features")
    classifier = modules.BoxClassifier(
        features.shape[1], call["num_classes"] - 1, output_size=tuple(call["roi_size"]), grid=call["grid_size"]
    )
    case.load(classifier)
    out = classifier(features, boxes, stored[:, 4].long(), mask, case.inputs.get("in.use_background"))
    loss = F.cross_entropy(out.logits, out.target)
    return {
        "out.bg_prototypes": out.prototypes,
        "out.bg_count_per_cell": out.cells,
        "out.fg_pooled": out.pooled,
        "out.logits": out.logits,
        "out.target": out.target,
        "out.loss": loss,
        **case.grads(loss),
    }


@adapter("bana/pseudo_label")
def pseudo_label(case: Case) -> dict[str, object]:
    call, stored, given = case.call, case.inputs["in.boxes"], case.inputs.get("in.crf_output")
    size, mask = tuple(call["image_size"]), case.inputs["in.bg_mask"][0]
    half = torch.tensor([size[1] - 1, size[0] - 1] * 2, dtype=stored.dtype) / 2
    boxes = (stored[:, :4] * half + half).long()
    labels = modules.box_pseudo_labels(
        case.inputs["in.features"][0],
        case.params["param.classifier.weight"].flatten(1),
        boxes,
        stored[:, 4].long(),
        size,
        crf=None if given is None else lambda scores: given,
        grid=call["grid_size"],
        threshold=call["bg_threshold"],
        background_mask=mask,
    )
    return {
        "out.bg_attention": Within(labels.attention[None], 1e-4, 1e-5),
        "out.unary": Within(labels.scores, 1e-4, 1e-5),
        "out.correlation": Within(labels.correlation, 1e-4, 1e-5),
        "out.labels_present": Within(labels.keys),
        "out.boxes_pixel": Within(torch.cat([boxes, stored[:, 4:].long()], 1)),
        "out.y_crf": Agreement(labels.y_crf, LABELS),
        "out.y_ret": Agreement(labels.y_ret, LABELS),
    }


@adapter("bana/noise_aware_loss")
def noise_aware_loss(case: Case) -> dict[str, Tensor]:
    call, y_crf = case.call, case.inputs["in.y_crf"]
    ignore = call["ignore_index"]
    fused = modules.fuse_labels(y_crf, case.inputs["in.y_ret"], ignore_index=ignore)
    cosine = modules.cosine_logits(
        case.leaf("in.features"), case.leaf("param.classifier.weight"), tuple(call["image_size"])
    )
    options = {name: call[name] for name in ("temperature", "gamma", "lam")}
    terms = losses.noise_aware_loss(cosine, fused, y_crf, ignore_index=ignore, **options)
    unreliable = (fused == ignore) & (y_crf != ignore)
    confidence = modules.label_confidence(cosine, y_crf, gamma=call["gamma"], ignore_index=ignore)
    return {
        "out.logit_cosine": cosine,
        "out.y_fused": fused,
        "out.confidence": confidence[unreliable],
        "out.loss": terms.total,
        "out.loss_ce": terms.trusted,
        "out.loss_wce": terms.noisy,
        **case.grads(terms.total),
    }


@adapter("bana/clip_boxes")
def clip_boxes(case: Case) -> dict[str, Tensor]:
    boxes = case.inputs["in.boxes"]
    cut = modules.crop_boxes(boxes[:, :4], case.inputs["in.crop"], legacy_far_edge=True)
    return {"out.boxes": torch.cat([cut, boxes[:, 4:]], 1)}

"""ReCAM: classifiers as 1 x 1 convolutions, single images without a batch axis, 0-based classes."""

from torch import Tensor

import wsss_losses as losses
import wsss_modules as modules
from tests.golden.case import Case, Within, adapter


def head_of(case: Case) -> modules.ReCAMHead:
    """The head with the stored first classifier."""
    classes, channels = case.params["param.classifier.weight"].shape[:2]
    head = modules.ReCAMHead(channels, classes, eps=case.call.get("eps", 1e-5))
    case.load(head.cam_head, lambda name: name if name == "classifier.weight" else None)
    return head


@adapter("recam/class_feature_pooling")
def class_feature_pooling(case: Case) -> dict[str, Tensor]:
    out = head_of(case)(case.leaf("in.feature"))
    values = {"out.logits": out.logits, "out.class_features": out.class_features, "out.cam": out.cam}
    return {**values, **case.grads(values)}


@adapter("recam/sce_loss")
def sce_loss(case: Case) -> dict[str, object]:
    features, labels = case.leaf("in.class_features"), case.inputs["in.label"]
    terms = losses.sce_reactivation_loss(features, labels, case.leaf("param.classifier.weight"))
    accuracy = Within(terms.accuracy[None], atol=1e-6)  # the released one is float32
    return {"out.loss": terms.total[None], "out.accuracy": accuracy, **case.grads(terms.total)}


@adapter("recam/recam_objective")
def recam_objective(case: Case) -> dict[str, Tensor]:
    out, labels = head_of(case)(case.leaf("in.feature")), case.inputs["in.label"]
    weight, sce_weight = case.leaf("param.recam_classifier.weight"), case.call["recam_loss_weight"]
    terms = losses.recam_loss(out.logits, out.class_features, labels, weight, sce_weight=sce_weight)
    values = {"out.loss": terms.total, "out.loss_cls": terms.multi_label, "out.loss_ce": terms.reactivation}
    return {**{name: value[None] for name, value in values.items()}, **case.grads(terms.total)}


@adapter("recam/reactivated_cam")
def reactivated_cam(case: Case) -> dict[str, Tensor]:
    features = case.inputs["in.feature"]
    weights = case.params["param.classifier.weight"], case.params["param.recam_classifier.weight"]

    def merged(mode: str) -> Tensor:
        plain, mirrored = modules.reactivated_cam(features, *weights, mode=mode)
        return modules.merge_flip(plain, mirrored)

    return {
        "out.cam_w": merged("cam"),
        "out.cam_w2": merged("recam"),
        "out.cam_product": merged("product"),
        "out.cam_product_separate": modules.reactivated_cam(features, *weights, signed=True),
    }


@adapter("recam/cam_merge_seed")
def cam_merge_seed(case: Case) -> dict[str, Tensor]:
    call, labels = case.call, case.inputs["in.label"][None]
    maps = [case.inputs[f"in.cam_{i}"][None] for i in range(len(call["scales"]))]
    out = modules.multi_scale_cam(maps, labels, tuple(call["size"]), stride=4, round_to=16)
    seed = modules.cam_to_mask(out.high_res[None], call["cam_eval_thres"], keys=out.keys)[0]
    return {"out.cam": out.cam, "out.high_res": out.high_res, "out.keys": out.keys - 1, "out.seed": seed}

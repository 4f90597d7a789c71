"""EPS: the background is the last channel there; single images without a batch axis; passes numbered in one list."""

import torch
from torch import Tensor

import wsss_losses as losses
import wsss_modules as modules
from tests.golden.case import Agreement, Case, adapter


def options(case: Case) -> dict[str, float]:
    return {"threshold": case.call["tau"], "foreground_weight": case.call["lam"]}


@adapter("eps/saliency_loss")
def saliency_loss(case: Case) -> dict[str, Tensor]:
    scores, saliency, labels = case.leaf("in.cam").roll(1, 1), case.inputs["in.saliency"], case.inputs["in.label"]
    loss = losses.saliency_guided_map_loss(scores, saliency, labels, **options(case))
    probability = scores.softmax(1)
    kept = modules.route_by_saliency(probability, saliency, labels, threshold=case.call["tau"])
    maps = modules.estimate_saliency(probability, kept, labels, foreground_weight=case.call["lam"])
    # the released background map is the complement
    values = {"fg_map": maps.foreground, "bg_map": 1 - maps.background, "estimated_saliency": maps.estimate}
    return {"out.loss": loss, **{f"out.{name}": value for name, value in values.items()}, **case.grads(loss)}


@adapter("eps/joint_loss")
def joint_loss(case: Case) -> dict[str, Tensor]:
    features, labels = case.leaf("in.features"), case.inputs["in.label"]
    stored = case.params["param.fc8.weight"]
    case.params["param.fc8.weight"] = stored.roll(1, 0)
    head = modules.BackgroundAwareCAMHead(features.shape[1], len(stored) - 1)
    out = case.load(head, {"fc8.weight": "classifier.weight"}.get)(features)
    terms = losses.eps_loss(out.logits, out.scores, case.inputs["in.saliency"], labels, **options(case))
    grads = case.grads(terms.total)
    grads["grad.param.fc8.weight"] = grads["grad.param.fc8.weight"].roll(-1, 0)
    return {
        # the released image scores include the background's, which no loss reads
        "out.logits": torch.cat([out.logits, out.scores[:, :1].mean((2, 3))], 1),
        "out.cam": out.scores.roll(-1, 1),
        "out.loss": terms.total,
        "out.loss_cls": terms.classification,
        "out.loss_sal": terms.saliency,
        **grads,
    }


@adapter("eps/cam_inference")
def cam_inference(case: Case) -> dict[str, Tensor | Agreement]:
    labels = case.inputs["in.label"][None]
    passes = [case.inputs[f"in.logits.{i}"] for i in range(sum(key.startswith("in.logits.") for key in case.inputs))]
    maps = [x.softmax(1)[:, :-1] for x in passes]  # the class maps of a background-aware head
    mirrored = [i % 2 == 1 for i in range(len(maps))]
    cam = modules.multi_scale_cam(maps, labels, tuple(case.call["size"]), mirrored=mirrored).full(*labels.shape)
    mask = modules.cam_to_mask(cam, case.call["thr"], labels=labels)[0]
    best = torch.cat([torch.full_like(cam[:, :1], case.call["thr"]), cam], 1).topk(2, dim=1).values[0]
    tied = best[0] - best[1] < 1e-5  # of the tolerance: these may differ
    return {"out.norm_cam": cam[0], "out.pred": Agreement(mask, at_least=1 - tied.double().mean().item())}

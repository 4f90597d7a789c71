"""OC-CSE: one frozen toy classifier without a head, views numbered with the mirrored ones odd, 0-based classes."""

import re

import torch
from torch import Tensor, nn

import wsss_losses as losses
import wsss_modules as modules
from tests.golden.case import Case, adapter


@adapter("occse/class_specific_erasing")
def class_specific_erasing(case: Case) -> dict[str, Tensor]:
    call, kernel = case.call, case.params["param.f.weight"]
    cam, images, labels = case.leaf("in.cam"), case.leaf("in.img"), case.inputs["in.label"]
    picked = modules.sample_erase_class(labels, index=case.inputs["in.label_mask"].argmax(1))
    torch.testing.assert_close(picked.remaining, case.inputs["in.label_remain"], rtol=0, atol=0)
    mask, erased = modules.class_specific_erase(cam, picked.erased, images, eps=call["eps"])
    size, stride = kernel.shape[2:], int(re.search(r"stride-(\d+)", call["toy_classifier"])[1])
    padding = [side // 2 for side in size]
    net = nn.Conv2d(kernel.shape[1], kernel.shape[0], size, stride, padding, bias=False)
    judge = modules.FrozenClassifier(case.load(net, lambda name: name.removeprefix("f.")))
    erased_logits = judge(erased).mean((2, 3))
    terms = losses.class_specific_erasing_loss(
        cam.mean((2, 3)), erased_logits, labels, picked.remaining, weight=call["weight"]
    )
    return {
        "out.mask": mask,
        "out.img_masked": erased,
        "out.logits_cl": erased_logits,
        "out.loss_all": terms.classification,
        "out.loss_select": call["weight"] * terms.erasing,  # stored with its weight
        "out.loss": terms.total,
        **case.grads(terms.total),
    }


@adapter("occse/multi_scale_flip_cam")
def multi_scale_flip_cam(case: Case) -> dict[str, Tensor]:
    call, labels = case.call, case.inputs["in.label"]
    maps = [case.inputs[f"in.cam_view{i}"] for i in range(sum(key.startswith("in.cam_view") for key in case.inputs))]
    mirrored = [i % 2 == 1 for i in range(len(maps))]
    out = modules.multi_scale_cam(maps, labels, tuple(call["size"]), mirrored=mirrored, relu=True, eps=call["eps"])
    scores = {
        f"out.bg_power_scores_alpha{alpha}": torch.cat([modules.background_score(out.cam[None], alpha)[0], out.cam])
        for alpha in call["alphas"]
    }
    return {"out.norm_cam": out.full(*labels.shape)[0], "out.keys": out.keys - 1, **scores}

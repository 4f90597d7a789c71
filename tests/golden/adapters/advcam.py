"""AdvCAM: one pair of an image and its mirror image without a batch axis, 0-based classes."""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor, nn

import wsss_losses as losses
import wsss_modules as modules
from tests.golden.case import Case, adapter


@adapter("advcam/adv_climb")
def adv_climb(case: Case) -> dict[str, Tensor]:
    image, gradient = case.inputs["in.image"], case.inputs["in.grad"]
    return {"out.image": modules.anti_adversarial_step(image, gradient, case.call["step_size"])}


@adapter("advcam/discriminative_mask")
def discriminative_mask(case: Case) -> dict[str, Tensor]:
    regions = case.inputs["in.regions"]
    flat = regions.reshape(1, -1)  # the released maximum is that of the whole tensor
    return {"out.mask": modules.discriminative_mask(flat, case.call["threshold"]).view(regions.shape)}


@adapter("advcam/positive_count_gap")
def positive_count_gap(case: Case) -> dict[str, Tensor]:
    return {"out.weight": modules.positive_count_weight(case.inputs["in.grad"])}


class TinyNet(nn.Module):
    """Two convolutions of stride 2 with ReLU and a 1 x 1 classifier: the stand-in for the ResNet."""

    def __init__(self, params: dict[str, Tensor]) -> None:
        super().__init__()
        self.stage1, self.stage4 = (
            nn.Sequential(nn.Conv2d(weight.shape[1], weight.shape[0], weight.shape[2], stride=2, padding=1), nn.ReLU())
            for weight in (params["param.stage1.0.weight"], params["param.stage4.0.weight"])
        )
        classes, channels = params["param.classifier.weight"].shape[:2]
        self.classifier = nn.Conv2d(channels, classes, 1, bias=False)

    def features(self, images: Tensor) -> Tensor:
        return self.stage4(self.stage1(images))

    def forward(self, images: Tensor) -> Tensor:
        return self.classifier(self.features(images))


def climber(case: Case, steps: int, **options: object) -> modules.AdvCAM:
    net, call = case.load(TinyNet(case.params)), case.call
    settings = {"step_size": call["AD_stepsize"], "ad_coeff": call["AD_coeff"], "threshold": call["score_th"]}
    return modules.AdvCAM(net, net.classifier, steps=steps, **settings, **options)


@adapter("advcam/climb_steps")
def climb_steps(case: Case) -> dict[str, Tensor]:
    advcam = climber(case, case.call["n_steps"] + 1)  # the last one does not move
    index = case.inputs["in.class"].view(1)
    labels = nn.functional.one_hot(index, len(case.params["param.classifier.weight"]))
    trail = list(advcam.climb(case.inputs["in.image"][None], labels))
    values = {}
    for here, after in pairwise(trail):
        logits = advcam.model(here.pairs[0]).detach()
        loss = losses.anti_adversarial_climb_loss(
            logits[None],
            here.region,
            trail[0].region,
            index,
            ad_coeff=advcam.ad_coeff,
            threshold=advcam.threshold,
        )
        torch.testing.assert_close(-loss.total, here.objective[0])
        values |= {
            f"out.step{here.step}.L_AD": loss.moved,
            f"out.step{here.step}.grad": here.gradient[0],
            f"out.step{here.step}.logits": logits,
            f"out.step{here.step}.mask": modules.discriminative_mask(here.region, advcam.threshold),
            f"out.step{here.step}.next_image": after.pairs[0],
            f"out.step{here.step}.objective": here.objective[0],
            f"out.step{here.step}.regions": here.region,
        }
    return values


@adapter("advcam/advcam")
def advcam(case: Case) -> dict[str, Tensor]:
    call, labels = case.call, case.inputs["in.label"][None]
    module = climber(case, call["adv_iter"], legacy_scale_weight=True)
    pairs = {scale: case.inputs[f"in.image_scale_{scale}"][None] for scale in map(float, call["scales"])}
    out = module(pairs, labels, tuple(call["image_size"]))
    total = module.accumulate(pairs, labels)
    return {
        "out.cam": out.cam,
        "out.high_res": out.high_res,
        "out.keys": out.keys - 1,
        **{f"out.accumulated_{scale}": value for scale, value in total.items()},
    }

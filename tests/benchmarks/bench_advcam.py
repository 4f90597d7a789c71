"""Time and peak memory of AdvCAM's climb beside the released form, on ResNet-18 with random weights.

``python -m tests.benchmarks.bench_advcam [--steps 4] [--side 224] [--device cuda] [--json FILE]``

The released form climbs for one class of one image after the other, takes Grad-CAM by a second backward pass, and has
every backward pass form the gradients of all weights too. Maps of the first steps are compared first; nothing is
reported if they differ. Later ones drift apart, since rounding flips ReLUs.
"""

import argparse
from functools import partial

import timm
import torch
from torch import Tensor, nn

from tests.benchmarks.harness import measure, report
from tests.modules.reference_advcam import climb_one
from wsss_modules import AdvCAM


class Net(nn.Module):
    """ResNet-18 at stride 32 with a 1 x 1 head."""

    def __init__(self, classes: int = 20) -> None:
        super().__init__()
        self.body = timm.create_model("resnet18", num_classes=0)
        self.head = nn.Conv2d(512, classes, 1, bias=False)

    def features(self, images: Tensor) -> Tensor:
        return self.body.forward_features(images)

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.features(images))


def ours(net: Net, pairs: Tensor, labels: Tensor, steps: int) -> list[Tensor]:
    return [step.region for step in AdvCAM(net, net.head, steps=steps).climb(pairs, labels)]


def released(net: Net, pairs: Tensor, labels: Tensor, steps: int) -> list[Tensor]:
    climbers = labels.nonzero().tolist()
    each = [climb_one(net.features, net.head, pairs[image], index, steps)[0] for image, index in climbers]
    net.zero_grad()
    return [torch.stack(regions) for regions in zip(*each, strict=True)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--side", type=int, default=224)
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--json", default=None)
    args = parser.parse_args()
    torch.manual_seed(0)
    net = Net().to(args.device).eval()
    plain = torch.randn(2, 3, args.side, args.side).to(args.device)
    pairs = torch.stack([plain, plain.flip(-1)], 1)
    labels = torch.zeros(2, 20, device=args.device)
    labels[[0, 0, 1], [3, 7, 7]] = 1  # 1.5 classes an image, as on VOC
    for here, there in zip(ours(net, pairs, labels, 2), released(net, pairs, labels, 2), strict=True):
        torch.testing.assert_close(here, there, rtol=1e-3, atol=1e-3 * there.max().item())
    forms = {"released": released, "here": ours}
    title = f"{args.steps} steps, 2 images of {args.side} pixels, 3 classes"
    rows = [
        measure(f"{title}, {name}", partial(form, net, pairs, labels, args.steps), args.repeat, device=args.device)
        for name, form in forms.items()
    ]
    report("AdvCAM", rows, args.json, args.device)
    print(f"{rows[0].seconds / rows[1].seconds:.1f} times as fast as the released form")


if __name__ == "__main__":
    main()

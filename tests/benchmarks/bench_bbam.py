"""Time and peak memory of BBAM's descent, threshold, overlaps and segment matching, beside the naive forms.

``python -m tests.benchmarks.bench_bbam [--objects 8] [--steps 10] [--size 128] [--repeat 3] [--json FILE]``

The naive descent takes one object after the other, makes the clean detections anew in every step and lets the weights
have gradients, as released; its detector is the same (EfficientNet-Lite0 with a pyramid, random weights), and its loss
loops over the proposals. Times are for all objects. Values are compared first, those of the descent after two steps:
its objective takes absolute values, whose slopes rounding turns about in further ones. Nothing is reported if they
differ.
"""

import argparse
from functools import partial

import torch
from torch import Tensor

from recipes.pipeline.detection import DetectConfig, Detector
from recipes.pipeline.models import build_trunk
from tests.benchmarks.harness import Timing, measure, report
from tests.modules.reference_bbam import descend_alone, looped_iou, sorted_rank_value
from wsss_modules import BoundingBoxAttributionMap, box_iou, segment_overlaps
from wsss_modules.attribution.instances import _value_at_rank


def descent(objects: int, steps: int, size: int, positives: int, repeat: int) -> list[Timing]:
    torch.manual_seed(0)
    detector = Detector(build_trunk("tf_efficientnet_lite0", "random"), 20, DetectConfig(size=size)).eval()
    image = torch.randn(3, size, size)
    corners = torch.rand(objects, positives, 2, 2).mul(size * 0.8).sort(2).values.flatten(2)
    corners[..., 2:] += 0.15 * size
    index = torch.arange(objects).repeat_interleave(positives)
    proposals = torch.cat([index[:, None].float(), corners.flatten(0, 1)], 1)
    classes = torch.randint(1, 21, (objects,))
    masks = [torch.full((1, 10, 10), 0.9) for _ in range(objects)]
    labels = classes.tolist()
    parts = [torch.cat([torch.zeros(positives, 1), own], 1) for own in corners]

    def naive(steps: int) -> list[Tensor]:
        return [
            descend_alone(detector.detections, image, corners[k], labels[k], masks[k], steps, 0.02, 0.007)
            for k in range(objects)
        ]

    def batched(steps: int) -> list[Tensor]:
        explain = BoundingBoxAttributionMap(detector.detections, steps=steps, tv=0.0)
        return explain(image, proposals, classes, masks)

    def alone(steps: int) -> list[Tensor]:
        explain = BoundingBoxAttributionMap(detector.detections, steps=steps, tv=0.0)
        return [explain(image, parts[k], classes[k : k + 1], masks[k : k + 1])[0] for k in range(objects)]

    torch.testing.assert_close(batched(2), naive(2), rtol=0, atol=1e-5)
    title = f"descent, {objects} objects, {steps} steps, {size} x {size}, {positives} proposals"
    return [
        measure(f"{title}, one batch", partial(batched, steps), repeat),
        measure(f"{title}, one by one with all gradients", partial(naive, steps), repeat),
        measure(f"{title}, one by one", partial(alone, steps), repeat),
    ]


def threshold(repeat: int) -> list[Timing]:
    x = torch.zeros(375, 500, dtype=torch.float64)
    x[40:330, 60:440] = torch.rand(290, 380, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    rank = 30_000

    def ours() -> float:
        return _value_at_rank(x[40:330, 60:440].flatten(), rank).item()

    assert ours() == sorted_rank_value(x, rank)
    rows = [measure("rank in a box of 290 x 380 of 375 x 500 pixels, selected", ours, repeat)]
    return [*rows, measure("rank of 375 x 500 pixels, Python sort", partial(sorted_rank_value, x, rank), repeat)]


def overlaps(repeat: int) -> list[Timing]:
    generator = torch.Generator().manual_seed(0)
    boxes = torch.rand(1000, 2, 2, generator=generator).mul(400).sort(1).values.flatten(1)
    boxes[:, 2:] += 2
    ours, naive = partial(box_iou, boxes, boxes[:1], truncate=True), partial(looped_iou, boxes, boxes[0])
    torch.testing.assert_close(ours()[:, 0], naive())
    return [measure("overlaps of 1000 boxes, at once", ours, repeat), measure("overlaps, in a loop", naive, repeat)]


def segments(repeat: int) -> list[Timing]:
    generator = torch.Generator().manual_seed(0)
    coarse = torch.randint(0, 600, (75, 100), generator=generator)
    superpixels = coarse.repeat_interleave(5, 0).repeat_interleave(5, 1)
    members = torch.rand(500, 600, generator=generator) > 0.7
    mask, box = torch.zeros(375, 500, dtype=torch.bool), torch.tensor([50, 40, 400, 300])
    mask[60:250, 80:390] = True
    ours = partial(segment_overlaps, mask, box, superpixels, members)

    def naive() -> Tensor:
        found = []
        for own in members:
            drawn = own[superpixels]
            found.append((drawn & mask).sum() / (drawn | mask).sum())
        return torch.stack(found).double()

    torch.testing.assert_close(ours().iou, naive(), rtol=1e-5, atol=0)
    title = "500 segment proposals on 375 x 500"
    return [measure(f"{title}, histograms", ours, repeat), measure(f"{title}, drawn one by one", naive, repeat)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--objects", type=int, default=8)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--size", type=int, default=128)
    parser.add_argument("--positives", type=int, default=20)
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--json", default=None)
    args = parser.parse_args()
    groups = [
        descent(args.objects, args.steps, args.size, args.positives, args.repeat),
        threshold(args.repeat),
        overlaps(args.repeat),
        segments(args.repeat),
    ]
    for ours, *others in groups:
        for other in others:
            print(f"{ours.name}: {other.seconds / ours.seconds:.1f} times as fast as {other.name.rsplit(', ', 1)[1]}")
    report("BBAM", [row for group in groups for row in group], args.json)


if __name__ == "__main__":
    main()

"""L2G's head, its target and its reading of boxes against the forms of the released code.

python -m tests.benchmarks.bench_l2g [--grid 28] [--features 4096] [--classes 20] [--crops 18] [--cells 40]
                                     [--threads 1] [--repeat 5] [--device cpu] [--json FILE]

``correlation`` is that of one image: classify and then propagate, against propagate and then classify with the N x N
matrix; forward, and forward and backward with gradients of features, classifier and keys. ``winner`` is the target of a
batch of crops without saliency, normalisation included, against a sort of all channels and a one-hot matrix of the
pixels, from maps that are normalised already; ``target`` is that with saliency, normalisation on both sides.
``reading`` compares `crop_align` with torchvision's kernel where that is installed. Values, and gradients where there
are some, are compared first; nothing is reported if they differ.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable

import torch
from torch import Tensor

from tests.benchmarks.bench_ppc import compare, with_gradients, without
from tests.benchmarks.harness import Timing, report
from tests.modules import reference_l2g
from wsss_modules import corner_and_random_boxes, crop_align, local_attention_target, pixel_correlation


def correlation(grid: int, channels: int, classes: int, repeat: int, device: str) -> list[Timing]:
    features = torch.rand(1, channels, grid, grid, device=device, requires_grad=True)
    weight = (torch.randn(1 + classes, channels, 1, 1, device=device) / channels**0.5).requires_grad_()
    keys = torch.randn(1, 192, grid, grid, device=device, requires_grad=True)
    direction = torch.rand(1, 1 + classes, grid, grid, device=device)

    def ours() -> Tensor:
        own = torch.einsum("kd,bdhw->bkhw", weight.flatten(1), features)
        return own + pixel_correlation(own, keys)

    def released() -> Tensor:
        return reference_l2g.propagate_then_classify(features, weight, keys)

    name = f"correlation-N{grid * grid}-D{channels}-C{1 + classes}"
    leaves = (features, weight, keys)
    both: dict[str, Callable[[], list[Tensor]]] = {
        form: with_gradients(lambda call=call: call() * direction, leaves)
        for form, call in (("ours", ours), ("released", released))
    }
    forward = {"ours": without(ours), "released": without(released)}
    return compare(f"{name}-forward", forward, repeat, device) + compare(f"{name}-both", both, repeat, device)


def targets(crops: int, classes: int, cells: int, repeat: int, device: str) -> list[Timing]:
    scores = torch.randn(crops, 1 + classes, cells, cells, device=device)
    scores += torch.randn(crops, 1 + classes, 1, 1, device=device)
    labels = torch.zeros(crops, classes, device=device)
    labels[torch.arange(crops), torch.arange(crops) % classes] = 1
    labels[::2, -1] = 1  # 1.5 classes an image, as on VOC
    saliency = torch.rand(crops, 1, cells, cells, device=device)
    maps = reference_l2g.attention(scores, labels)
    shape = f"n{crops}-C{1 + classes}-{cells}x{cells}"
    rows = compare(
        f"winner-{shape}",
        {
            "ours": without(lambda: local_attention_target(scores, labels)),
            "released, of normalised maps": without(lambda: reference_l2g.winner_by_sort(maps)),
        },
        repeat,
        device,
    )
    return rows + compare(
        f"target-{shape}",
        {
            "ours": without(lambda: local_attention_target(scores, labels, saliency)),
            "released": without(lambda: reference_l2g.target_by_sort(scores, labels, saliency)),
        },
        repeat,
        device,
    )


def readings(crops: int, classes: int, cells: int, repeat: int, device: str) -> list[Timing]:
    try:
        from torchvision.ops import roi_align
    except ImportError:
        return []
    grid, number = cells * 7 // 5, 6  # 56 for 40
    maps = torch.randn(crops // number, 1 + classes, grid, grid, device=device, requires_grad=True)
    boxes = corner_and_random_boxes((8 * grid, 8 * grid), 8 * cells, number, images=len(maps)).to(device)
    direction = torch.rand(len(boxes), 1 + classes, cells, cells, device=device)
    forms = {
        "ours": lambda: crop_align(maps, boxes, cells) * direction,
        "torchvision": lambda: roi_align(maps, boxes.float(), cells, spatial_scale=1 / 8) * direction,
    }
    calls = {form: with_gradients(call, [maps]) for form, call in forms.items()}
    return compare(f"reading-n{len(boxes)}-C{1 + classes}-{grid}-to-{cells}-both", calls, repeat, device)


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    numbers = {"grid": 28, "features": 4096, "classes": 20, "crops": 18, "cells": 40, "threads": 1, "repeat": 5}
    for name, default in numbers.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--json")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    common = options.repeat, options.device
    rows = correlation(options.grid, options.features, options.classes, *common)
    rows += targets(options.crops, options.classes, options.cells, *common)
    rows += readings(options.crops, options.classes, options.cells, *common)
    report("L2G", rows, options.json, options.device)


if __name__ == "__main__":
    main()

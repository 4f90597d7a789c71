"""PPC's contrast and SEAM's pixel correlation against the forms of the released code.

python -m tests.benchmarks.bench_ppc [--batch 8] [--grid 16] [--features 128] [--classes 21] [--cells 56] [--keys 192]
                                     [--chunk 128 256] [--threads 1] [--repeat 5] [--device cpu] [--json FILE]

``denominators`` are those of one view's intra-view term, without gradients. The released code gathers (P, C, D)
prototypes for them (``gathered``) and draws some for each pixel that it never uses (``released``). At the default sizes
ours are a product of 5.5 million multiplications and additions, a fifth of the time, and one selection of 13 of 21
logits a pixel, more than half of it, which no other operation of torch does faster: twenty times as fast is within
reach of the released form, not always of the gathered one. ``contrast`` is the whole loss with
given prototypes and draws, forward and backward.
``correlation`` is of one image at stride 8, forward, and forward and backward with gradients of the keys.
Values, and gradients where there are some, are compared first; nothing is reported if they differ.
"""

from __future__ import annotations

import argparse
import random
from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from tests.benchmarks.harness import Timing, measure, report
from tests.losses import reference_ppc
from tests.modules import reference_refinement
from wsss_losses import pixel_to_prototype_contrast_loss
from wsss_losses.ppc import _semi_hard_costs
from wsss_modules import cam_pseudo_labels, draw_half_of_each_class, pixel_correlation

Call = Callable[[], list[Tensor]]


def with_gradients(value: Callable[[], Tensor], leaves: Sequence[Tensor]) -> Call:
    """A call that gives the value and the gradients of its sum."""

    def call() -> list[Tensor]:
        result = value()
        return [result.detach(), *torch.autograd.grad(result.sum(), leaves)]

    return call


def without(value: Callable[[], Tensor]) -> Call:
    def call() -> list[Tensor]:
        with torch.no_grad():
            return [value()]

    return call


def compare(name: str, forms: dict[str, Call], repeat: int, device: str) -> list[Timing]:
    """Timings of all forms, the last of which is the released one, or an error if their values differ."""
    *ours, (_, released) = forms.items()
    expected = released()
    for form, call in ours:
        for a, b in zip(call(), expected, strict=True):
            error = ((a - b).abs().max() / b.abs().max()).item()
            if not error < 1e-4:
                raise SystemExit(f"{name}-{form}: differs by {error:.1e} of the largest value")
    rows = [measure(f"{name}-{form}", call, repeat, device) for form, call in forms.items()]
    for row in rows[:-1]:
        print(f"{row.name}: {rows[-1].seconds / row.seconds:.1f} times as fast")
    return rows


def denominators(pixels: Tensor, prototypes: Tensor, classes: Tensor) -> Tensor:
    """Costs of the pixels within a view, as the loss computes them."""
    known = torch.tensor(len(prototypes))
    return _semi_hard_costs(pixels @ prototypes.mT / 0.1, classes, (3, 13), known)[0]


def with_unused_draws(pixels: Tensor, prototypes: Tensor, classes: Tensor) -> Tensor:
    """The released code also draws ten of the prototypes for each pixel, which it never uses."""
    for _ in range(len(pixels)):
        random.sample(range(len(prototypes)), 10)
    return reference_ppc.intra_costs(pixels, prototypes, classes)


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    numbers = {"batch": 8, "grid": 16, "features": 128, "classes": 21, "cells": 56, "keys": 192}
    for name, default in {**numbers, "threads": 1, "repeat": 5}.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--chunk", type=int, nargs="+", default=[128, 256])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--json")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    batch, known, device = options.batch, options.classes, options.device
    grid, repeat = (options.grid, options.grid), options.repeat

    features = [torch.rand(batch, options.features, *grid, device=device, requires_grad=True) for _ in range(2)]
    cams = [torch.rand(batch, known - 1, *grid, device=device) for _ in range(2)]
    labels = torch.zeros(batch, known - 1, device=device)
    labels[torch.arange(batch), torch.arange(batch) % (known - 1)] = 1
    labels[::2, -1] = 1  # 1.5 classes an image, as on VOC
    prototypes = [F.normalize(torch.rand(known, options.features, device=device), dim=1) for _ in range(2)]
    masks = [cam_pseudo_labels(cam, labels) for cam in cams]
    drawn = [draw_half_of_each_class(mask, known) for mask in masks]
    pixels = F.normalize(features[0].detach().permute(0, 2, 3, 1).flatten(0, 2), dim=1)
    args = pixels, prototypes[0], masks[0].flatten()
    shape = f"P{len(pixels)}-C{known}-D{options.features}"
    rows = compare(
        f"denominators-{shape}",
        {
            "ours": without(lambda: denominators(*args)),
            "gathered": without(lambda: reference_ppc.intra_costs(*args)),
            "released": without(lambda: with_unused_draws(*args)),
        },
        repeat,
        device,
    )
    rows += compare(
        f"contrast-{shape}",
        {
            "ours": with_gradients(
                lambda: pixel_to_prototype_contrast_loss(*features, *cams, labels, *drawn, *prototypes).total, features
            ),
            "released": with_gradients(
                lambda: torch.stack(reference_ppc.contrast(features, prototypes, masks, drawn)).sum(), features
            ),
        },
        repeat,
        device,
    )

    cells = (options.cells, options.cells)
    maps = torch.rand(1, known, *cells, device=device)
    keys = torch.randn(1, options.keys, *cells, device=device, requires_grad=True)
    direction = torch.rand(1, known, *cells, device=device)
    correlations: dict[str, Callable[[], Tensor]] = {
        f"chunk{chunk}": lambda chunk=chunk: pixel_correlation(maps, keys, chunk=chunk) for chunk in options.chunk
    }
    correlations["released"] = lambda: reference_refinement.pixel_correlation(maps, keys)
    shape = f"N{cells[0] * cells[1]}-C{known}-E{options.keys}"
    forward = {form: without(call) for form, call in correlations.items()}
    both = {form: with_gradients(lambda call=call: call() * direction, [keys]) for form, call in correlations.items()}
    rows += compare(f"correlation-{shape}-forward", forward, repeat, device)
    rows += compare(f"correlation-{shape}-both", both, repeat, device)
    report("PPC and pixel correlation", rows, options.json, device)


if __name__ == "__main__":
    main()

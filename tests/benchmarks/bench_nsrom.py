"""NSROM's dilation and global reasoning against the forms of the released code.

python -m tests.benchmarks.bench_nsrom [--height 375] [--width 500] [--square 30] [--batch 5] [--channels 512]
                                       [--nodes 64] [--cells 32] [--threads 1] [--repeat 5] [--device cpu] [--json FILE]

``dilation`` is of one picture, by running sums, by two maxima along rows and columns, and by the maximum over the
square. ``reasoning`` is the unit in evaluation and ``training`` a step of it, forward and backward, at the published
sizes: batches of 5 images of 256 pixels at stride 8. Arithmetic sets both a bound of 1.8: 98,000 multiplications and
additions a cell for 180,000, and three times that with the backward pass; what the forms read and write of the size of
the map comes on top. Values, and gradients where there are some, are compared first; nothing is reported if they
differ.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional as F

from tests.benchmarks.harness import Timing, measure, report
from tests.modules import reference_graph, reference_object_mining
from wsss_modules import GlobalReasoningUnit, box_dilation

Call = Callable[[], list[Tensor]]


def compare(name: str, forms: dict[str, Call], repeat: int, device: str) -> list[Timing]:
    """Timings of all forms, the last of which is the released one, or an error if their values differ."""
    results = {form: call() for form, call in forms.items()}
    *ours, released = results
    for form in ours:
        for a, b in zip(results[form], results[released], strict=True):
            error = ((a.float() - b.float()).abs().max() / b.float().abs().max()).item()
            if not error < 1e-4:
                raise SystemExit(f"{name}-{form}: differs by {error:.1e} of the largest value")
    del results
    rows = [measure(f"{name}-{form}", call, repeat, device) for form, call in forms.items()]
    for row in rows[:-1]:
        print(f"{row.name}: {rows[-1].seconds / row.seconds:.1f} times as fast")
    return rows


def two_maxima(mask: Tensor, size: int) -> Tensor:
    """The maximum of a row's window, then of a column's."""
    sides = (size // 2, size - 1 - size // 2)
    rows = F.max_pool2d(F.pad(mask.float()[None, None], (*sides, 0, 0)), (1, size), stride=1)
    return F.max_pool2d(F.pad(rows, (0, 0, *sides)), (size, 1), stride=1)[0, 0] > 0


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    numbers = {"height": 375, "width": 500, "square": 30, "batch": 5, "channels": 512, "nodes": 64, "cells": 32}
    for name, default in {**numbers, "threads": 1, "repeat": 5}.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--json")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    device, square = options.device, options.square

    mask = torch.rand(options.height, options.width, device=device) > 0.9995
    rows = compare(
        f"dilation-{options.height}x{options.width}-{square}",
        {
            "sums": lambda: [box_dilation(mask, square)],
            "two-maxima": lambda: [two_maxima(mask, square)],
            "square": lambda: [reference_object_mining.max_dilation(mask, square)],
        },
        options.repeat,
        device,
    )

    unit = GlobalReasoningUnit(options.channels, options.nodes, normalize=True).to(device)
    features = torch.randn(options.batch, options.channels, options.cells, options.cells, device=device)
    leaves, upstream = [features.requires_grad_(), *unit.parameters()], torch.randn_like(features)

    def step(form: Callable[[GlobalReasoningUnit, Tensor], Tensor]) -> list[Tensor]:
        result = form(unit, features)
        return [result.detach(), *torch.autograd.grad(result, leaves, upstream)]

    size = f"B{options.batch}-C{options.channels}-M{options.nodes}-{options.cells}x{options.cells}"

    @torch.no_grad()
    def evaluate(form: Callable[[GlobalReasoningUnit, Tensor], Tensor]) -> list[Tensor]:
        return [form(unit, features)]

    for case, training, run in (("reasoning", False, evaluate), ("training", True, step)):
        unit.train(training)
        forms = {
            "reordered": partial(run, lambda unit, x: unit(x)),
            "as-written": partial(run, reference_graph.global_reasoning),
        }
        rows += compare(f"{case}-{size}", forms, options.repeat, device)
    report("NSROM", rows, options.json, device)


if __name__ == "__main__":
    main()

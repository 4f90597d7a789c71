"""Drawing disjoint negatives by one product, and erasing masks of present classes, beside the released forms.

python -m tests.benchmarks.bench_aeft [--threads 1] [--device cpu] [--json FILE]

The released forms are restated in `tests.modules.reference_aeft`: a search that compares two images at a time on the
host, and masks for which the maps of all classes are upsampled. Ours draws in the order in which the search looks, so
that both must find the same partners; if they don't, or if the masks differ, nothing is reported.
"""

from __future__ import annotations

import argparse
import random

import torch
from torch import Tensor

from tests.benchmarks.harness import Timing, measure, report
from tests.modules import reference_aeft
from wsss_losses import erasing_attraction_loss, erasing_repulsion_loss
from wsss_modules import GatedPyramidPooling, sample_disjoint_negatives, soft_erase_mask

CALLS = 100  # a single draw is too short for the clock


def voc_like_labels(batch: int, classes: int) -> Tensor:
    """One class an image, and some have a second: 1.5 on average, as on VOC."""
    generator = torch.Generator().manual_seed(0)
    first = torch.randint(classes, (batch, 1), generator=generator)
    second = torch.where(
        torch.rand(batch, 1, generator=generator) < 0.5, torch.randint(classes, (batch, 1), generator=generator), first
    )
    return torch.zeros(batch, classes).scatter(1, torch.cat([first, second], 1), 1.0)


def negatives(batch: int, classes: int, device: str) -> tuple[Timing, Timing]:
    """The search and our draw, each the time of one call."""
    labels = voc_like_labels(batch, classes)
    found, orders = reference_aeft.search_negatives(labels, random.Random(0))
    ours = sample_disjoint_negatives(labels, draws=reference_aeft.draws_of(orders))
    if ours.negative.tolist() != found or not bool(ours.valid.all()):
        raise SystemExit(f"B={batch}: the negatives differ")
    labels = labels.to(device)

    def draw() -> None:
        for _ in range(CALLS):
            sample_disjoint_negatives(labels)

    source, label = random.Random(0), f"negatives-B{batch}-K{classes}"
    search = measure(f"{label}-search", lambda: reference_aeft.search_negatives(labels, source), device=device)
    drawn = measure(f"{label}-product", draw, device=device)
    return search, Timing(drawn.name, drawn.seconds / CALLS, drawn.peak_mb)


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--json")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    device, rows = options.device, []

    for batch in (8, 32):
        search, drawn = negatives(batch, 20, device)
        print(f"B={batch}: search {search.seconds * 1e3:.2f} ms, product {drawn.seconds * 1e3:.4f} ms,", end=" ")
        print(f"{search.seconds / drawn.seconds:.0f} times faster")
        rows += [search, drawn]

    batch, classes, cells, size = 8, 20, 40, (320, 320)
    labels = voc_like_labels(batch, classes).to(device)
    cam = torch.randn(batch, classes, cells, cells, device=device).requires_grad_()
    pooling = GatedPyramidPooling(classes).to(device)
    gpp, label = pooling(cam).gpp.detach(), f"B{batch}-K{classes}-{cells}x{cells}"
    released = reference_aeft.soft_erase_of_all
    if not torch.equal(soft_erase_mask(cam, labels, size), released(cam, labels, size)):
        raise SystemExit("the erasing masks differ")
    chosen = sample_disjoint_negatives(labels)
    triplet = gpp.clone().requires_grad_()

    def train(value: Tensor, leaf: Tensor) -> None:
        torch.autograd.grad(value.sum(), leaf)

    calls = {
        f"pooling-forward-{label}": lambda: pooling(cam.detach()),
        f"pooling-forward-backward-{label}": lambda: train(pooling(cam).logits, cam),
        f"mask-released-forward-backward-{label}-to-320": lambda: train(released(cam, labels, size), cam),
        f"mask-forward-backward-{label}-to-320": lambda: train(soft_erase_mask(cam, labels, size), cam),
        f"attraction-forward-backward-{label}": lambda: train(erasing_attraction_loss(triplet, gpp, labels), triplet),
        f"repulsion-forward-backward-{label}": lambda: train(
            erasing_repulsion_loss(triplet, cam, labels, *chosen).total, triplet
        ),
    }
    rows += [measure(name, call, device=device) for name, call in calls.items()]
    report("AEFT", rows, options.json, device)


if __name__ == "__main__":
    main()

"""Spatial-BCE's rank threshold, at the size of the paper: 12 images, 20 classes, 47 x 47 cells.

python -m tests.benchmarks.bench_spatial_bce [--size 47] [--threads 1] [--device cpu] [--json FILE]

The naive form is the released one: it sorts the maps of all classes and picks one value a map in a Python loop. Half of
the images have one class, the others two. Also timed: the network step as a whole, with either threshold.
"""

from __future__ import annotations

import argparse

import torch

from tests.benchmarks.harness import measure, report
from tests.losses import reference_spatial_bce
from wsss_losses import spatial_bce_loss
from wsss_modules import rank_threshold

BATCH, CLASSES = 12, 20


def main() -> None:
    """Print the table; stop if the two forms differ in any value."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=int, default=47)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--json")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    device, size = options.device, options.size

    logits = (3 * torch.randn(BATCH, CLASSES, size, size)).to(device)
    labels = torch.zeros(BATCH, CLASSES)
    for image in range(BATCH):
        labels[image, torch.randperm(CLASSES)[: 1 + image % 2]] = 1
    labels = labels.to(device)
    ratio, prob = 0.6 * torch.rand_like(labels) * labels, logits.sigmoid()
    naive = reference_spatial_bce.rank_threshold
    if not torch.equal(rank_threshold(prob, ratio), naive(prob, ratio)):
        raise SystemExit("the two forms differ: no times are reported")

    label = f"B{BATCH}-K{CLASSES}-{size}x{size}-f32"
    rows = []
    for name, function in (("here", rank_threshold), ("released", naive)):
        rows.append(measure(f"rank_threshold-{name}-{label}", lambda f=function: f(prob, ratio), 11, device))
    leaf = logits.clone().requires_grad_()
    for name, function in (("here", rank_threshold), ("released", naive)):

        def step(function=function) -> None:  # type: ignore[no-untyped-def]
            loss = spatial_bce_loss(leaf, labels, function(leaf.detach().sigmoid(), ratio))
            torch.autograd.grad(loss, leaf)

        rows.append(measure(f"network-step-forward-backward-{name}-{label}", step, 11, device))
    report("Spatial-BCE, threshold of the network step", rows, options.json, device)


if __name__ == "__main__":
    main()

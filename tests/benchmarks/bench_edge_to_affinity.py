"""Boundary map to pair affinities, and IRN's loss, in training size: reused path maxima against the released gather.

python -m tests.benchmarks.bench_edge_to_affinity [--batch 32] [--gathered-batch 2] [--threads 2] [--json FILE]

The gathered form needs about 0.2 GB an image at radius 10 on 128 x 128, so that it runs on a smaller batch by default.
"""

from __future__ import annotations

import argparse

import torch
from torch import Tensor

from tests.benchmarks.harness import measure, report
from tests.modules import reference_affinity
from wsss_losses import affinity_loss, inter_pixel_relation_loss
from wsss_modules import affinity_labels, edge_to_affinity

RADIUS = 10


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--gathered-batch", type=int, default=2)
    parser.add_argument("--size", type=int, default=128)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--json")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    device = options.device
    rows = []

    def inputs(batch: int) -> tuple[Tensor, Tensor, Tensor]:
        generator = torch.Generator().manual_seed(0)
        logits = torch.randn(batch, 1, options.size, options.size, generator=generator)
        displacement = torch.randn(batch, 2, options.size, options.size, generator=generator)
        mask = torch.randint(0, 4, (batch, options.size, options.size), generator=generator)
        mask = torch.where(mask == 3, 255, mask)
        return logits.to(device).requires_grad_(), displacement.to(device).requires_grad_(), mask.to(device)

    # first calls make the path tables and warm the allocator
    inter_pixel_relation_loss(*inputs(1), radius=RADIUS).total.backward()

    # small peaks first: on a CPU, memory that an earlier row gave back would hide a later row's growth
    for batch in sorted({options.gathered_batch, options.batch}):
        *leaves, mask = inputs(batch)

        def fused(leaves: list[Tensor] = leaves, mask: Tensor = mask) -> None:
            torch.autograd.grad(inter_pixel_relation_loss(*leaves, mask, radius=RADIUS).total, leaves)

        name = f"irn-loss-fused-forward-backward-B{batch}-{options.size}x{options.size}-r{RADIUS}-f32"
        rows.append(measure(name, fused, repeat=2, device=device))

    *leaves, mask = inputs(options.gathered_batch)
    edge = torch.sigmoid(leaves[0]).detach().requires_grad_()
    label = f"B{options.gathered_batch}-{options.size}x{options.size}-r{RADIUS}-f32"

    def reused_edge() -> None:
        with torch.no_grad():
            edge_to_affinity(edge, RADIUS)

    def gathered_edge() -> None:
        with torch.no_grad():
            reference_affinity.gathered_edge_to_affinity(edge, RADIUS)

    def pieces() -> None:
        labels = affinity_labels(mask, RADIUS, order="path")
        torch.autograd.grad(affinity_loss(edge_to_affinity(edge, RADIUS), labels).total, edge)

    def gathered() -> None:
        torch.autograd.grad(reference_affinity.gathered_irn_loss(*leaves, mask, RADIUS), leaves)

    rows.append(measure(f"edge-to-affinity-reused-forward-{label}", reused_edge, device=device))
    rows.append(measure(f"edge-to-affinity-gathered-forward-{label}", gathered_edge, device=device))
    rows.append(measure(f"boundary-loss-of-pairs-forward-backward-{label}", pieces, repeat=2, device=device))
    rows.append(measure(f"irn-loss-gathered-forward-backward-{label}", gathered, repeat=2, device=device))
    report("IRN training pairs", rows, options.json, device)


if __name__ == "__main__":
    main()

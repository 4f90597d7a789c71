"""Time and peak memory of PSA's affinity of features, forward and backward, beside a gather of all pairs as released.

``python -m tests.benchmarks.bench_rw [--batch 2 16] [--channels 448] [--device cuda] [--json FILE]``

The gather holds 34 copies of the features. Values and gradients are compared first; nothing is reported if they differ.
"""

import argparse
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from tests.benchmarks.harness import Timing, measure_in_turn, report
from wsss_modules import feature_affinity, pair_index

SIZE = (28, 28)  # 224 pixels at stride 8, the crops of preset `small`
RADIUS = 5


def gathered(features: Tensor) -> Tensor:
    """The affinity of pairs that are all gathered before they are compared."""
    found = pair_index(RADIUS, SIZE)
    flat = features.flatten(2)
    source, destination = (index.to(features.device) for index in (found.source, found.destination))
    return torch.exp(-(flat[:, :, None, source] - flat[:, :, destination]).abs().mean(1))


def forward_backward(affinity: Callable[[Tensor], Tensor], features: Tensor) -> Tensor:
    """The affinity; the gradient of its sum is left in ``features.grad``."""
    features.grad = None
    found = affinity(features)
    found.sum().backward()
    return found.detach()


def compare(batch: int, channels: int, device: str) -> list[Timing]:
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(batch, channels, *SIZE, generator=generator).to(device).requires_grad_()
    forms = {"gather of all pairs": gathered, "offset by offset": partial(feature_affinity, radius=RADIUS)}
    steps = {name: partial(forward_backward, form, features) for name, form in forms.items()}
    (a, grad_a), (b, grad_b) = [(step(), features.grad) for step in steps.values()]
    torch.testing.assert_close(b, a, rtol=2e-6, atol=0.0)  # 4e-7 measured
    torch.testing.assert_close(grad_b, grad_a, rtol=0.0, atol=1e-7)  # 3e-8 measured, the largest is 0.05
    title = f"B={batch} C={channels} {SIZE[0]}x{SIZE[1]} radius {RADIUS}"
    rows = measure_in_turn({f"{title} {name}": step for name, step in steps.items()}, repeat=3, device=device)
    print(f"{title}: {rows[0].seconds / rows[1].seconds:.1f} times as fast as a gather")
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--batch", type=int, nargs="+", default=[2, 16])
    parser.add_argument("--channels", type=int, default=448)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--json", default=None)
    args = parser.parse_args()
    rows = [row for batch in args.batch for row in compare(batch, args.channels, args.device)]
    report("PSA's affinity of features, forward and backward", rows, args.json, args.device)


if __name__ == "__main__":
    main()

"""Time and peak memory of W-OoD's distance objective, forward and backward, and of its k-means, beside the naive forms.

``python -m tests.benchmarks.bench_wood [--device cuda] [--json FILE]``

The naive objective asks each of 70 centres in each of three layers whether it is missing, and so waits for the device
210 times; naive k-means holds the difference of each sample to each centre. Nothing is reported unless values agree.
"""

import argparse
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from tests.benchmarks.harness import measure, report
from tests.losses.reference_wood import metric_loss_loop
from wsss_losses import ood_metric_loss
from wsss_modules import Clusters, kmeans

REPEAT = 100  # steps in one measurement, since one takes less than a millisecond


def with_gradient(loss_of: Callable[..., Tensor], features: Tensor, *inputs: Tensor) -> tuple[Tensor, Tensor]:
    leaf = features.detach().requires_grad_()
    loss = loss_of(leaf, *inputs)
    return loss.detach(), torch.autograd.grad(loss, leaf)[0]


def steps(call: Callable[[], object]) -> None:
    for _ in range(REPEAT):
        call()


def naive_kmeans(x: Tensor, k: int, iters: int = 10) -> Clusters:
    """All differences at once, (N, k, C), and one mean per cluster."""
    centres = x[:k].clone()
    for _ in range(iters):
        labels = (x[:, None] - centres).square().sum(-1).argmin(1)
        centres = torch.stack([x[labels == q].mean(0) if (labels == q).any() else centres[q] for q in range(k)])
    return Clusters(labels, centres)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--json", default=None)
    args = parser.parse_args()
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.rand(shape, generator=generator).to(args.device)

    features, of_classes, of_clusters = draw(16, 2048), draw(20, 2048), draw(50, 2048)
    labels = (draw(16, 20) < 0.08).float()
    inputs = (features, labels, of_classes, of_clusters)
    ours = partial(with_gradient, ood_metric_loss, *inputs)
    loop = partial(with_gradient, partial(metric_loss_loop, layers=3), *inputs)
    torch.testing.assert_close(ours(), loop(), rtol=1e-5, atol=1e-7)

    samples = draw(2000, 2048)  # the naive form holds 2000 x 50 x 2048 differences, 0.8 GB
    torch.testing.assert_close(kmeans(samples, 50), naive_kmeans(samples, 50), rtol=1e-5, atol=1e-5)

    rows = [
        measure(f"{REPEAT} x loss and gradient, B=16 C=2048 K=20 Q=50", partial(steps, ours), device=args.device),
        measure(f"{REPEAT} x the same, released loop", partial(steps, loop), device=args.device),
        measure("k-means, N=2000 C=2048 k=50, 10 rounds", partial(kmeans, samples, 50), device=args.device),
        measure("the same, all differences at once", partial(naive_kmeans, samples, 50), 1, device=args.device),
    ]
    report("W-OoD", rows, args.json, args.device)


if __name__ == "__main__":
    main()

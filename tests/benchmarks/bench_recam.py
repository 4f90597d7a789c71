"""Time and peak memory of ReCAM's class-masked pooling, forward and backward, beside the released broadcast form.

``python -m tests.benchmarks.bench_recam [--batch 2 4] [--classes 20] [--channels 2048] [--device cuda] [--json FILE]``

The broadcast form needs about three tensors of B x K x D x H x W floats, 2.7 GB each at a batch of 16. Values and
gradients are compared first; nothing is reported if they differ.
"""

import argparse
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from tests.benchmarks.harness import Timing, measure, report
from tests.modules.reference_class_masked import broadcast_pooling
from wsss_modules import class_masked_pooling, pool_present_classes

SIZE = (32, 32)  # 512 pixels at stride 16


def forward_backward(pool: Callable[[Tensor, Tensor], Tensor], features: Tensor, cam: Tensor, labels: Tensor) -> Tensor:
    """The pooled vectors; gradients of their masked sum, as in the loss, are left in the inputs' ``grad``."""
    features.grad = cam.grad = None
    pooled = pool(features, cam)
    weights = labels if pooled.ndim == 3 else labels[labels > 0]
    (pooled * weights[..., None]).sum().backward()
    return pooled.detach()


def pool_present(features: Tensor, cam: Tensor, labels: Tensor) -> Tensor:
    return pool_present_classes(features, cam, labels).features


def compare(batch: int, classes: int, channels: int, device: str) -> list[Timing]:
    generator = torch.Generator().manual_seed(0)
    features = torch.rand(batch, channels, *SIZE, generator=generator).to(device).requires_grad_()
    cam = torch.rand(batch, classes, *SIZE, generator=generator).to(device).requires_grad_()
    labels = torch.zeros(batch, classes, device=device)
    labels[torch.arange(batch), torch.arange(batch) % classes] = 1
    labels[::2, -1] = 1  # 1.5 classes an image, as on VOC
    forms = {
        "broadcast": broadcast_pooling,
        "all classes": class_masked_pooling,
        "present classes": partial(pool_present, labels=labels),
    }
    steps = {name: partial(forward_backward, form, features, cam, labels) for name, form in forms.items()}
    results = {}
    for name, step in steps.items():
        pooled = step()
        results[name] = (pooled if pooled.ndim == 2 else pooled[labels > 0], features.grad, cam.grad)
    expected = results.pop("broadcast")
    for name, result in results.items():
        torch.testing.assert_close(result, expected, rtol=1e-4, atol=1e-4, msg=lambda m, n=name: f"{n}: {m}")
    del results, result, expected, pooled
    title = f"B={batch} K={classes} D={channels} {SIZE[0]}x{SIZE[1]}"
    rows = [measure(f"{title} {name}", step, repeat=3, device=device) for name, step in steps.items()]
    for row in rows[1:]:
        print(f"{row.name}: {rows[0].seconds / row.seconds:.1f} times as fast as broadcast")
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--batch", type=int, nargs="+", default=[2, 4])
    parser.add_argument("--classes", type=int, default=20)
    parser.add_argument("--channels", type=int, default=2048)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--json", default=None)
    args = parser.parse_args()
    rows = [row for batch in args.batch for row in compare(batch, args.classes, args.channels, args.device)]
    report("class-masked pooling, forward and backward", rows, args.json, args.device)


if __name__ == "__main__":
    main()

"""C2AM's pull loss against the double sort of the released code, and its pooling against two products with a copy.

python -m tests.benchmarks.bench_c2am [--threads 1] [--device cpu] [--json FILE]

Forward and backward. Both forms are run on the same inputs and must agree, in value and gradient, before a time is
reported.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable

import torch
from torch import Tensor

from tests.benchmarks.harness import Timing, measure, report
from tests.losses import reference_c2am as reference
from wsss_losses import sim_max_loss
from wsss_modules import pool_two_regions

ALPHA = 0.25


def pull_forms() -> dict[str, Callable[[Tensor], Tensor]]:
    return {
        "released": lambda x: reference.sim_max(x, ALPHA),
        "sort": lambda x: sim_max_loss(x, alpha=ALPHA, min_weight=0),
        "top-k": lambda x: sim_max_loss(x, alpha=ALPHA),
    }


def pool_forms() -> dict[str, Callable[[Tensor, Tensor], Tensor]]:
    """Each gives both regions stacked; "average minus" is a product for one of them, the other by subtraction."""

    def average_minus(x: Tensor, p: Tensor) -> Tensor:
        size = x.shape[2] * x.shape[3]
        fg = torch.bmm(x.flatten(2), p.flatten(2).mT)[..., 0] / size
        return torch.stack([fg, x.mean((2, 3)) - fg])

    return {
        "released": lambda x, p: torch.stack(reference.pool_two_regions(x, p)),
        "average minus": average_minus,
        "pool_two_regions": lambda x, p: torch.stack(pool_two_regions(x, p)),
    }


def compare(forms: dict[str, Callable[..., Tensor]], *inputs: Tensor) -> None:
    """Refuse to time forms that do not agree: float64, in which similarities have no ties."""
    found = {}
    for name, form in forms.items():
        leaves = [x.double().detach().requires_grad_() for x in inputs]
        value = form(*leaves)
        weights = torch.linspace(0, 1, value.numel(), dtype=value.dtype, device=value.device).view(value.shape) + 1
        found[name] = (value.detach(), *torch.autograd.grad((value * weights).sum(), leaves))
    for name, values in found.items():
        for ours, released in zip(values, found["released"], strict=True):
            # the leave-out of top-k, see its test, and the float32 weights of the released form
            tolerance = 1e-5 * released.abs().max().item()
            torch.testing.assert_close(ours, released, rtol=0, atol=tolerance, msg=lambda m, n=name: f"{n}: {m}")


def time_forms(
    label: str, forms: dict[str, Callable[..., Tensor]], inputs: tuple[Tensor, ...], device: str
) -> list[Timing]:
    compare(forms, *inputs)
    rows: list[Timing] = []
    for name, form in forms.items():
        leaves = [x.clone().requires_grad_() for x in inputs]

        def train(form: Callable[..., Tensor] = form, leaves: list[Tensor] = leaves) -> None:
            torch.autograd.grad(form(*leaves).sum(), leaves)

        train()  # warm up before memory is read
        rows.append(measure(f"{name}-{label}", train, repeat=9, device=device))
    base = rows[0].seconds
    print(", ".join(f"{row.name}: {base / row.seconds:.2f} x" for row in rows[1:]))
    return rows


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--json")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    rows: list[Timing] = []
    for channels in (128, 512, 1392, 3072):  # 1392: EfficientNet-Lite0; 3072: ResNet-50
        for count in (128, 512):
            features = torch.rand(count, channels) ** 4
            inputs = (features.to(options.device),)
            rows += time_forms(f"N{count}-D{channels}-f32", pull_forms(), inputs, options.device)
    for batch, channels, side in ((64, 1392, 14), (16, 3072, 28)):
        features, p = torch.rand(batch, channels, side, side).relu(), torch.rand(batch, 1, side, side)
        inputs = (features.to(options.device), p.to(options.device))
        rows += time_forms(f"B{batch}-D{channels}-{side}x{side}-f32", pool_forms(), inputs, options.device)
    report("C2AM: pull loss and pooling, forward and backward", rows, options.json, options.device)


if __name__ == "__main__":
    main()

"""Time and peak memory of ReviewKD's loss and fusion, forward and backward, beside the forms that the paper writes.

``python -m tests.benchmarks.bench_reviewkd [--batch 8] [--device cuda] [--json FILE]``

The naive loss pools both maps at each level; the naive fusion resizes the residual first and concatenates. Nothing is
reported unless values and gradients agree.
"""

import argparse
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from tests.benchmarks.harness import measure, report
from tests.losses.reference_reviewkd import hcl_loop
from tests.modules.reference_distillation import fuse_concatenated
from wsss_losses import hierarchical_context_loss
from wsss_modules import AttentionBasedFusion


def loss_and_gradient(loss_of: Callable[..., Tensor], student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
    leaf = student.detach().requires_grad_()
    loss = loss_of([leaf], [teacher])
    return loss.detach(), torch.autograd.grad(loss, leaf)[0]


def fuse_and_gradient(fuse: Callable[..., tuple[Tensor, Tensor]], x: Tensor, y: Tensor) -> tuple[Tensor, ...]:
    """The residual alone: the 3 x 3 convolution behind it is the same in both, and most of the time."""
    leaves = [x.detach().requires_grad_(), y.detach().requires_grad_()]
    residual = fuse(*leaves).residual
    return residual.detach(), *torch.autograd.grad(residual.sum(), leaves)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--json", default=None)
    args = parser.parse_args()
    torch.manual_seed(0)
    rows = []
    for height, width in ((64, 64), (50, 67)):
        maps = [torch.randn(args.batch, 256, height, width, device=args.device) for _ in range(2)]
        forms = {"both pooled": hcl_loop, "here": hierarchical_context_loss}
        calls = {name: partial(loss_and_gradient, form, *maps) for name, form in forms.items()}
        torch.testing.assert_close(*(call() for call in calls.values()), rtol=1e-4, atol=1e-9)
        rows += [
            measure(f"HCL {height}x{width}, {name}", call, args.repeat, device=args.device)
            for name, call in calls.items()
        ]
        print(f"HCL {height}x{width}: {rows[-2].seconds / rows[-1].seconds:.2f} times as fast as with both pooled")

    fusion = AttentionBasedFusion(64, 256, 8).to(args.device).eval().requires_grad_(False)
    fusion.expand = torch.nn.Identity()
    x = torch.randn(args.batch, 64, 64, 64, device=args.device)
    y = torch.randn(args.batch, 256, 32, 32, device=args.device)
    calls = {
        "concatenated": partial(fuse_and_gradient, partial(fuse_concatenated, fusion), x, y),
        "split": partial(fuse_and_gradient, fusion, x, y),
    }
    torch.testing.assert_close(*(call() for call in calls.values()), rtol=1e-4, atol=1e-4)
    rows += [measure(f"fusion 64x64, {name}", call, args.repeat, device=args.device) for name, call in calls.items()]
    print(f"fusion: {rows[-2].seconds / rows[-1].seconds:.2f} times as fast as on the concatenation")
    report("ReviewKD", rows, args.json, args.device)


if __name__ == "__main__":
    main()

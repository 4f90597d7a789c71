"""Processor time and peak memory of ReviewKD's loss and fusion beside the forms that the paper writes.

``python -m tests.benchmarks.bench_reviewkd [--batch 8] [--device cuda] [--json FILE]``

Forward alone, and with the gradients of maps and weights. The naive loss pools both maps at each level; the naive
fusion resizes the residual first and concatenates. Nothing is reported unless values and gradients agree.
"""

import argparse
from collections.abc import Callable, Mapping, Sequence
from functools import partial

import torch
from torch import Tensor

from tests.benchmarks.harness import Timing, measure_in_turn, report
from tests.losses.reference_reviewkd import hcl_loop
from tests.modules.reference_distillation import fuse_concatenated
from wsss_losses import hierarchical_context_loss
from wsss_modules import AttentionBasedFusion, FusedMaps


def loss_of(form: Callable[..., Tensor], student: Tensor, teacher: Tensor) -> Tensor:
    return form([student], [teacher])


def fused(form: Callable[..., FusedMaps], x: Tensor, y: Tensor) -> Tensor:
    """The residual alone: the 3 x 3 convolution behind it is the same in both, and most of the time."""
    return form(x, y).residual


def with_gradients(value: Callable[[], Tensor], leaves: Sequence[Tensor]) -> tuple[Tensor, ...]:
    out = value()
    return out.detach(), *torch.autograd.grad(out.sum(), leaves)


def beside(
    title: str, forms: Mapping[str, Callable[[], Tensor]], leaves: Sequence[Tensor], repeat: int, device: str
) -> list[Timing]:
    """Compare and time two forms, the naive one first, and print the ratios."""
    results = [with_gradients(form, leaves) for form in forms.values()]
    for naive, ours in zip(*results, strict=True):
        torch.testing.assert_close(ours, naive, rtol=1e-3, atol=1e-4 * float(naive.abs().max()))
    rows = []
    wholes = {name: partial(with_gradients, form, leaves) for name, form in forms.items()}
    for what, own in (("forward", forms), ("and back", wholes)):
        calls = {f"{title}, {name}, {what}": call for name, call in own.items()}
        rows += measure_in_turn(calls, repeat, device)
        print(f"{title}, {what}: {rows[-2].seconds / rows[-1].seconds:.2f} times as fast as {next(iter(forms))}")
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--repeat", type=int, default=7)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--json", default=None)
    args = parser.parse_args()
    torch.manual_seed(0)
    rows = []
    for height, width in ((64, 64), (50, 67), (8, 8)):
        student, teacher = (torch.randn(args.batch, 256, height, width, device=args.device) for _ in range(2))
        leaf = student.requires_grad_()
        losses = {"both pooled": hcl_loop, "here": hierarchical_context_loss}
        calls = {name: partial(loss_of, form, leaf, teacher) for name, form in losses.items()}
        rows += beside(f"HCL {height}x{width}", calls, [leaf], args.repeat, args.device)

    for height, width in ((64, 64), (50, 67), (8, 8)):
        fusion = AttentionBasedFusion(64, 256, 8).to(args.device)
        fusion.expand = torch.nn.Identity()
        x = torch.randn(args.batch, 64, height, width, device=args.device, requires_grad=True)
        y = torch.randn(args.batch, 256, height // 2, (width + 1) // 2, device=args.device, requires_grad=True)
        fusions = {"concatenated": partial(fuse_concatenated, fusion), "split": fusion}
        calls = {name: partial(fused, form, x, y) for name, form in fusions.items()}
        rows += beside(f"fusion {height}x{width}", calls, [x, y, *fusion.parameters()], args.repeat, args.device)
    report("ReviewKD, processor time", rows, args.json, args.device)


if __name__ == "__main__":
    main()

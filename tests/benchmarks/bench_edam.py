"""Time and peak memory of EDAM's attention beside the released loop over classes with explicit scores.

``python -m tests.benchmarks.bench_edam [--classes 4] [--grid 46 46] [--images 2] [--width 128] [--hidden 1]
[--backward] [--device cuda] [--json FILE]``

The published step has 20 classes; both forms grow linearly with their number. The two-layer network of a block, whose
hidden layer has 4 times the width, costs both forms the same; ``--hidden 1`` leaves attention alone. Values and, with
``--backward``, gradients are compared first; nothing is reported if they differ.
"""

import argparse
from functools import partial

import torch
from torch import Tensor

from tests.benchmarks.harness import Timing, measure, report
from tests.modules.reference_class_masks import transform
from wsss_modules import PreNormTransformerBlock


def looped(block: PreNormTransformerBlock, tokens: Tensor) -> Tensor:
    """Tokens (1, S, T, d): class s through block s, one after the other."""
    return torch.stack([transform(block, tokens[:, s], s) for s in range(tokens.shape[1])], 1)


def batched(block: PreNormTransformerBlock, tokens: Tensor) -> Tensor:
    return block(tokens, torch.arange(tokens.shape[1], device=tokens.device))


def step(form, block: PreNormTransformerBlock, tokens: Tensor, backward: bool) -> Tensor:
    """The result; with ``backward`` the gradients of the sum of its squares are left in ``grad``."""
    block.zero_grad()
    tokens.grad = None
    with torch.set_grad_enabled(backward):
        result = form(block, tokens)
    if backward:
        result.square().sum().backward()
    return result.detach()


def compare(args: argparse.Namespace) -> list[Timing]:
    torch.manual_seed(0)
    block = PreNormTransformerBlock(args.width, 2, args.hidden, num_blocks=args.classes).to(args.device).eval()
    cells = args.images * args.grid[0] * args.grid[1]
    tokens = torch.randn(1, args.classes, cells, args.width, device=args.device).requires_grad_(args.backward)
    forms = {"classes in a loop": looped, "classes in a batch": batched}
    steps = {name: partial(step, form, block, tokens, args.backward) for name, form in forms.items()}
    results = []
    for call in steps.values():
        results.append([call(), *([tokens.grad, *(p.grad for p in block.parameters())] if args.backward else [])])
    torch.testing.assert_close(results[1], results[0], rtol=1e-3, atol=1e-3)
    del results
    rows = [measure(name, call, repeat=3, device=args.device) for name, call in steps.items()]
    print(f"{rows[0].seconds / rows[1].seconds:.1f} times as fast as the loop")
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--classes", type=int, default=4)
    parser.add_argument("--grid", type=int, nargs=2, default=[46, 46])  # 368 pixels at stride 8
    parser.add_argument("--images", type=int, default=2)
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--hidden", type=int, default=None)
    parser.add_argument("--backward", action="store_true")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--json", default=None)
    args = parser.parse_args()
    what = "forward and backward" if args.backward else "forward"
    title = f"S={args.classes} T={args.images * args.grid[0] * args.grid[1]} d={args.width} hidden={args.hidden}"
    report(f"transformer blocks of classes, {what}, {title}", compare(args), args.json, args.device)


if __name__ == "__main__":
    main()

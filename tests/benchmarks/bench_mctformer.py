"""MCTformer's attention as running sums, its refinement and its seeds against the naive forms of the released code.

python -m tests.benchmarks.bench_mctformer [--size 368 496] [--present 3] [--device cpu] [--json FILE]

Three pairs: blocks of DeiT-S with the attention of all of them stacked, or summed as they run; the whole way from
tokens to refined maps; seeds of 20 classes enlarged and then masked, or of the present classes alone. Values are
compared first; nothing is reported if they differ.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable

import torch
from torch import Tensor, nn

from tests.benchmarks.harness import Timing, measure, report
from tests.modules import reference_class_tokens as reference
from wsss_modules import (
    AttentionSums,
    TransformerBlock,
    class_to_patch_attention,
    multi_scale_cam,
    patch_to_patch_attention,
    refine_with_patch_affinity,
)

DEPTH, DIM, HEADS, CLASSES, LAYERS = 12, 384, 6, 20, 3


def attention_rows(grid: tuple[int, int], labels: Tensor, device: str) -> list[Timing]:
    torch.manual_seed(0)
    blocks = nn.ModuleList(TransformerBlock(DIM, HEADS) for _ in range(DEPTH)).to(device).eval()
    for block in blocks:
        nn.init.normal_(block.attn.qkv.weight, std=0.1)
    patches = grid[0] * grid[1]
    tokens = torch.randn(2, CLASSES + patches, DIM, device=device)  # a view and its mirror image
    cam = torch.rand(2, CLASSES, *grid, device=device)

    def encode(visit: AttentionSums | None = None) -> Tensor:
        x = tokens
        for layer, block in enumerate(blocks):
            if visit is not None:
                visit(layer, block, x)
            x = block(x)
        return x

    def stacked() -> tuple[Tensor, Tensor, Tensor]:
        last, attention = reference.run_and_stack(blocks, tokens)
        class_maps = class_to_patch_attention(attention, CLASSES, LAYERS)
        return last, class_maps, patch_to_patch_attention(attention, CLASSES, reduce="none")

    def summed() -> tuple[Tensor, Tensor, Tensor]:
        sums = AttentionSums(DEPTH, CLASSES, n_layers=LAYERS)
        last = encode(sums)
        assert sums.patch_to_patch is not None
        return last, sums.class_to_patch, sums.patch_to_patch

    by_stack, by_sums = stacked(), summed()
    torch.testing.assert_close(by_sums[:2], by_stack[:2], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(by_sums[2], by_stack[2].sum(0), rtol=1e-4, atol=1e-5)
    naive, ours = reference.refine_by_class(cam, by_stack[2]), refine_with_patch_affinity(cam, by_sums[2])
    torch.testing.assert_close(ours, naive, rtol=1e-4, atol=1e-4)
    chosen = cam[:, labels > 0]
    few = refine_with_patch_affinity(chosen, by_sums[2])
    torch.testing.assert_close(few, naive[:, labels > 0], rtol=1e-4, atol=1e-4)
    layers, affinity = by_stack[2], by_sums[2]
    del by_stack, by_sums, naive, ours, few

    title = f"{grid[0]}x{grid[1]} patches"
    calls: dict[str, Callable[[], object]] = {
        "blocks without any export": encode,
        "blocks, attention stacked": stacked,
        "blocks, attention summed": summed,
        "refine class by class": lambda: reference.refine_by_class(cam, layers),
        "refine all classes": lambda: refine_with_patch_affinity(cam, affinity),
        "refine present classes": lambda: refine_with_patch_affinity(chosen, affinity),
    }
    return [measure(f"{title}  {name}", call, repeat=3, device=device) for name, call in calls.items()]


def seed_rows(grid: tuple[int, int], labels: Tensor, device: str) -> list[Timing]:
    torch.manual_seed(0)
    size = (16 * grid[0], 16 * grid[1])
    maps = [torch.rand(1, CLASSES, *grid, device=device) for _ in range(2)]
    identity = torch.eye(grid[0] * grid[1], device=device)[None, None]

    def all_classes() -> dict[int, Tensor]:
        return reference.seeds_of_all_classes(maps, [identity, identity], labels, size)

    def present_classes() -> dict[int, Tensor]:
        affinity = identity[0]
        index = labels.nonzero()[:, 0]
        refined = [refine_with_patch_affinity(cam[:, index], affinity) for cam in maps]
        ones = torch.ones(1, len(index), device=device)
        out = multi_scale_cam(refined, ones, size, mirrored=[False, True], eps=1e-8, subtract_min=True)
        return dict(zip((index + 1).tolist(), out.cam, strict=True))

    torch.testing.assert_close(present_classes(), all_classes(), rtol=1e-4, atol=1e-5)
    title = f"seeds {size[0]}x{size[1]}"
    return [
        measure(f"{title}  all classes, masked", all_classes, repeat=3, device=device),
        measure(f"{title}  present classes", present_classes, repeat=3, device=device),
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--size", type=int, nargs=2, default=[368, 496])
    parser.add_argument("--present", type=int, default=2)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--json", default=None)
    args = parser.parse_args()
    grid = (args.size[0] // 16, args.size[1] // 16)
    labels = torch.zeros(CLASSES, device=args.device)
    labels[: args.present] = 1
    with torch.no_grad():
        rows = attention_rows(grid, labels, args.device) + seed_rows(grid, labels, args.device)
    for naive, ours in ((1, 2), (3, 4), (3, 5), (6, 7)):
        ratio, less = rows[naive].seconds / rows[ours].seconds, rows[naive].peak_mb / max(0.1, rows[ours].peak_mb)
        print(f"{rows[ours].name}: {ratio:.1f} times as fast, {less:.1f} times less memory than {rows[naive].name}")
    report("MCTformer, inference", rows, args.json, args.device)


if __name__ == "__main__":
    main()

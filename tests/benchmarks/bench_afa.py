"""PAR, AFA's walk, affinity head, and pair labels with their loss, beside the forms that keep every intermediate."""

import argparse
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from tests.benchmarks.harness import Timing, measure, report
from tests.modules import reference_attention_affinity as reference
from tests.modules.reference_pixel_adaptive import par
from wsss_losses import attention_affinity_loss
from wsss_modules import (
    AttentionAffinityHead,
    affinity_random_walk,
    labels_to_affinity,
    local_window_mask,
    pixel_adaptive_refinement,
)

DILATIONS = (1, 2, 4, 8, 12, 24)
RADIUS = 8


def pair(
    title: str, naive: Callable[[], Tensor], ours: Callable[[], Tensor], repeat: int, device: str, **tolerance: float
) -> list[Timing]:
    torch.testing.assert_close(ours(), naive(), **tolerance)
    rows = [measure(f"{title} {name}", call, repeat, device) for name, call in (("naive", naive), ("here", ours))]
    print(f"{title}: {rows[0].seconds / rows[1].seconds:.1f} times as fast as the naive form")
    return rows


def refinement(side: int, channels: int, device: str, repeat: int) -> list[Timing]:
    image, masks = torch.rand(1, 3, side, side, device=device), torch.rand(1, channels, side, side, device=device)
    return pair(
        f"PAR {side}x{side} C={channels} T=10",
        lambda: par(image, masks, DILATIONS, 10),
        lambda: pixel_adaptive_refinement(image, masks),
        repeat,
        device,
        rtol=1e-4,
        atol=2e-5,
    )


def pairs_of_cells(side: int, batch: int, device: str, repeat: int) -> list[Timing]:
    cells, size = side * side, (side, side)
    affinity = torch.rand(batch, cells, cells, device=device)
    affinity = (affinity + affinity.mT) / 2
    x, window = torch.rand(batch, 8, *size, device=device), local_window_mask(size, RADIUS).to(device)
    head = AttentionAffinityHead(16).to(device)
    attentions = [torch.randn(batch, 8, cells, cells, device=device) for _ in range(2)]
    mask = torch.randint(0, 3, (batch, side, side), device=device)

    def naive_loss() -> Tensor:
        return reference.dense_affinity_loss(affinity, reference.repeated_labels(mask, window))

    def our_loss() -> Tensor:
        return attention_affinity_loss(affinity, labels_to_affinity(mask, radius=RADIUS, stride=1))

    title = f"{side}x{side} cells B={batch}"
    compare = partial(pair, repeat=repeat, device=device, rtol=1e-4, atol=1e-5)
    return [
        *compare(
            f"walk {title} C=8",
            lambda: reference.dense_walk(x, affinity, window),
            lambda: affinity_random_walk(x, affinity, radius=RADIUS, eps=0.1),
        ),
        *compare(f"labels and loss {title}", naive_loss, our_loss),
        *compare(
            f"head {title} 16 maps",
            lambda: reference.dense_head(attentions, head.proj.weight, head.proj.bias),
            lambda: head(attentions),
        ),
        *compare(
            f"window {side}x{side}",
            lambda: reference.loop_window(size, RADIUS).bool(),
            lambda: local_window_mask(size, RADIUS),
        ),
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--side", type=int, default=256)
    parser.add_argument("--channels", type=int, nargs="+", default=[3, 6])
    parser.add_argument("--cells", type=int, nargs="+", default=[32, 48])
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--json", default=None)
    args = parser.parse_args()
    torch.manual_seed(0)
    with torch.no_grad():
        rows = [row for c in args.channels for row in refinement(args.side, c, args.device, args.repeat)]
        rows += [row for n in args.cells for row in pairs_of_cells(n, args.batch, args.device, args.repeat)]
    report("AFA: refinement, walk, labels and head", rows, args.json, args.device)


if __name__ == "__main__":
    main()

"""Time and peak memory of SIPE's seeds, prototypes and image-specific CAMs beside the released broadcast forms.

``python -m tests.benchmarks.bench_sipe [--batch 2] [--classes 20] [--semantic 2048] [--channels 768] [--size 32 32]
[--device cuda] [--json FILE]``

``overlap`` is the step from the similarity of all cells to the overlaps; ``seeds`` has the similarity in it, which
costs both forms a product over ``--semantic`` channels. Prototypes and CAMs are timed forward and backward. Values and
gradients are compared first; nothing is reported if they differ.
"""

import argparse
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from tests.benchmarks.harness import Timing, measure, report
from tests.modules.reference_exploration import (
    broadcast_cosine,
    broadcast_iou,
    broadcast_prototypes,
    broadcast_seeds,
    similarity,
)
from wsss_modules import (
    image_specific_prototypes,
    normalize_cam_with_background,
    prototype_cam,
    structure_aware_seeds,
    structure_iou,
)


def forward_backward(form: Callable[[Tensor, Tensor], Tensor], first: Tensor, features: Tensor) -> Tensor:
    """The result; gradients of the sum of its squares are left in ``grad``."""
    first.grad = features.grad = None
    result = form(first, features)
    result.square().sum().backward()
    return result.detach()


def both(released: Callable[[], Tensor], ours: Callable[[], Tensor], title: str, leaves: list[Tensor], device: str):
    """The rows of both forms once their values and gradients agree."""
    with torch.set_grad_enabled(bool(leaves)):
        values = []
        for form in (released, ours):
            values.append([form(), *(leaf.grad for leaf in leaves)])
        torch.testing.assert_close(values[1], values[0], rtol=1e-4, atol=1e-5, msg=lambda text: f"{title}: {text}")
        del values
        return [
            measure(f"{title}, {name}", form, repeat=3, device=device)
            for name, form in (("broadcast", released), ("products", ours))
        ]


def compare(args: argparse.Namespace) -> list[Timing]:
    generator = torch.Generator().manual_seed(0)

    def random(channels: int) -> Tensor:
        return torch.randn(args.batch, channels, *args.size, generator=generator).to(args.device)

    scores, valid = normalize_cam_with_background(random(args.classes)), torch.ones(args.batch, args.classes + 1, 1, 1)
    valid, semantic, features = valid.to(args.device), random(args.semantic).relu(), random(args.channels)
    seeds = structure_aware_seeds(scores, valid, semantic).seeds
    # near ties fall either way in float32; the values of all forms are compared in float64 by the tests
    assert (seeds == broadcast_seeds(scores, valid, semantic)[0]).float().mean() > 0.999, "seeds differ"
    prototypes = image_specific_prototypes(seeds, features)
    affinity = similarity(semantic)
    leaf, marks, means = features.requires_grad_(), seeds.requires_grad_(), prototypes.requires_grad_()
    runs = {
        "overlap": (partial(broadcast_iou, scores, affinity), partial(structure_iou, scores, affinity), []),
        "seeds": (
            lambda: broadcast_seeds(scores, valid, semantic)[1],
            lambda: structure_aware_seeds(scores, valid, semantic).probs,
            [],
        ),
        "prototypes": (
            partial(forward_backward, broadcast_prototypes, marks, leaf),
            partial(forward_backward, image_specific_prototypes, marks, leaf),
            [marks, leaf],
        ),
        "cosine maps": (
            partial(forward_backward, broadcast_cosine, means, leaf),
            partial(forward_backward, prototype_cam, means, leaf),
            [means, leaf],
        ),
    }
    rows = []
    for title, (released, ours, leaves) in runs.items():
        pair = both(released, ours, title, leaves, args.device)
        print(f"{title}: {pair[0].seconds / pair[1].seconds:.1f} times as fast as broadcast")
        rows += pair
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--classes", type=int, default=20)
    parser.add_argument("--semantic", type=int, default=2048)
    parser.add_argument("--channels", type=int, default=768)
    parser.add_argument("--size", type=int, nargs=2, default=[32, 32])  # 512 pixels at stride 16
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--json", default=None)
    args = parser.parse_args()
    title = f"B={args.batch} C={args.classes + 1} D={args.semantic} S={args.channels} {args.size[0]}x{args.size[1]}"
    report(f"image-specific prototype exploration, {title}", compare(args), args.json, args.device)


if __name__ == "__main__":
    main()

"""RCA's contrast and read-out, forward and backward, against the forms of the released code.

python -m tests.benchmarks.bench_rca [--batch 8] [--size 46] [--channels 512] [--classes 20] [--slots 500]
                                     [--prototypes 10] [--regions 18] [--threads 1] [--repeat 5] [--device cpu]
                                     [--json FILE]

Folding saves products (2,448 D a pixel become 512 D at the default sizes, 4.8 times fewer, forward and backward) and
the maps between them; the contrast mainly saves normalising the memory and masking the features for every region.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from tests.benchmarks.harness import Timing, measure, report
from tests.losses import reference_rca
from tests.modules import reference_memory
from wsss_losses import regional_contrast_loss
from wsss_modules import SemanticAggregation, draw_region_mix_up


def with_gradients(value: Callable[[], Tensor], leaves: Sequence[Tensor]) -> Callable[[], list[Tensor]]:
    """A call that gives the value and its gradients."""

    def call() -> list[Tensor]:
        result = value()
        return [result, *torch.autograd.grad(result.sum(), leaves)]

    return call


def compare(
    name: str, ours: Callable[[], list[Tensor]], naive: Callable[[], list[Tensor]], repeat: int, device: str
) -> list[Timing]:
    """Timings of both, or an error if they don't give the same values and gradients."""
    for a, b in zip(ours(), naive(), strict=True):
        error = ((a - b).abs().max() / b.abs().max()).item()
        if not error < 1e-4:
            raise SystemExit(f"{name}: the two forms differ by {error:.1e} of the largest value")
    return [measure(f"{name}-{form}", call, repeat, device) for form, call in (("ours", ours), ("released", naive))]


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    numbers = {"batch": 8, "size": 46, "channels": 512, "classes": 20, "slots": 500, "prototypes": 10, "regions": 18}
    for name, default in {**numbers, "threads": 1, "repeat": 5}.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--json")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    batch, size, channels, classes = options.batch, options.size, options.channels, options.classes
    device = options.device
    shape = f"B{batch}-K{classes}-{size}x{size}-D{channels}"

    labels = torch.zeros(batch * classes)
    labels[torch.linspace(0, batch * classes - 1, options.regions).long()] = 1
    labels = labels.view(batch, classes).to(device)
    cam = torch.randn(batch, classes, size, size, device=device)
    embedding = torch.randn(batch, channels, size, size, device=device, requires_grad=True)
    memory = torch.randn(classes, options.slots, channels, device=device)
    mix = draw_region_mix_up(labels)
    rows = compare(
        f"contrast-{shape}-N{options.slots}-R{options.regions}",
        with_gradients(lambda: regional_contrast_loss(embedding, cam, labels, memory, mix=mix), [embedding]),
        with_gradients(lambda: reference_rca.regional_contrast(embedding, cam, labels, memory, mix).sum(), [embedding]),
        options.repeat,
        device,
    )

    layer = SemanticAggregation(channels, options.prototypes).to(device)
    features = torch.rand(batch, channels, size, size, device=device, requires_grad=True)
    prototypes = torch.randn(classes, options.prototypes, channels, device=device)
    leaves = [features, *layer.parameters()]
    rows += compare(
        f"aggregation-{shape}-M{options.prototypes}",
        with_gradients(lambda: layer(features, prototypes), leaves),
        with_gradients(lambda: reference_memory.aggregate(layer, features, prototypes), leaves),
        options.repeat,
        device,
    )
    report("RCA, forward and backward", rows, options.json, device)
    for ours, naive in zip(rows[::2], rows[1::2], strict=True):
        print(f"  {ours.name.removesuffix('-ours')}: {naive.seconds / ours.seconds:.1f} times as fast")


if __name__ == "__main__":
    main()

"""Time the Triton kernels on a GPU, each beside the plain form of its function, at the sizes of docs/kernels.md.

python -m tests.benchmarks.kernels [--json docs/data/kernels.json]

Values are compared first: a size whose values differ is reported with its error and without times. An operator alone is
replayed from a CUDA graph, so that its time is the GPU's; a function is timed as it is called, from Python, with the
cache emptied before. All times are medians.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from statistics import median

import torch
import triton
from torch import Tensor
from torch.nn import functional as F

from tests.benchmarks.harness import conditions, peak_mb
from wsss_losses import boundary_affinity_loss, pixel_to_prototype_contrast_loss
from wsss_modules import ExactGaussian, LocalAffinity, affinity_offsets, pixel_correlation, random_walk
from wsss_modules.affinity.offsets import inside
from wsss_modules.kernels.boundary_costs import boundary_pair_costs
from wsss_modules.kernels.gaussian_messages import gaussian_messages
from wsss_modules.kernels.pixel_adaptive import average_neighbours
from wsss_modules.kernels.prototype_contrast import prototype_contrast
from wsss_modules.kernels.relu_correlation import relu_correlation
from wsss_modules.kernels.stencil_walk import stencil_product
from wsss_modules.refinement.pixel_adaptive import DILATIONS, PixelAdaptiveKernel, _ring_offsets

LONG, VERY_LONG = 0.1, 1.0
"""Seconds from which a call is timed three times only, and once."""

MOST = 1e-4
"""Relative error, over the norm, beyond which a form counts as another function; 1e-7 to 3e-5 measured."""


@dataclass(frozen=True)
class Case:
    """A function of ``leaves`` at one size: with the backend named, and its operator alone."""

    kernel: str
    size: str
    operator: Callable[[], object] | None
    function: Callable[[str], Tensor]
    leaves: tuple[Tensor, ...]
    tf32: bool = False

    def with_gradients(self, backend: str) -> list[Tensor]:
        """The result and the gradients of its sum under fixed weights."""
        result = self.function(backend)
        weights = torch.linspace(-1, 2, result.numel(), device=result.device).view_as(result)
        return [result.detach(), *torch.autograd.grad((result * weights).sum(), self.leaves)]


@dataclass(frozen=True)
class Row:
    """Seconds, and MB on top of what was there; ``error`` is the largest over the result and all gradients."""

    kernel: str
    size: str
    error: float
    operator: float | None = None
    forward: float | None = None
    forward_torch: float | None = None
    gradients: float | None = None
    gradients_torch: float | None = None
    peak_mb: float | None = None
    peak_mb_torch: float | None = None


def cases() -> Iterator[Case]:
    """All kernels at two real sizes each."""
    yield from walks("B1 C4 94x125, r 5", 1, 4, 94, 125)
    yield from walks("B16 C21 128x128, r 5", 16, 21, 128, 128)
    yield boundary("B16 128x128, r 10", 16, 128)
    yield boundary("B32 128x128, r 10", 32, 128)
    yield average("B1 C4 375x500", 1, 4, 375, 500)
    yield average("B8 C21 320x320", 8, 21, 320, 320)
    for tf32 in (False, True):
        yield correlation("B8 C21 E192 56x56", 8, 21, 192, 56, tf32)
        yield correlation("B4 C21 E192 112x112", 4, 21, 192, 112, tf32)
    yield contrast("P2048 C21 D128", 2, 32, 21, 128)
    yield contrast("P25088 C21 D128", 8, 56, 21, 128)
    for tf32 in (False, True):
        yield messages("B1 C4 F5 375x500", 4, 375, 500, tf32)
        yield messages("B1 C21 F5 128x128", 21, 128, 128, tf32)


def rand(*shape: int) -> Tensor:
    """Uniform numbers in 0..1 on the GPU."""
    return torch.rand(shape, device="cuda")


def walks(size: str, batch: int, maps: int, height: int, width: int) -> Iterator[Case]:
    """A product with the affinity, and a whole walk."""
    offsets = affinity_offsets(5)
    x = rand(batch, maps, height, width).requires_grad_()
    values = (rand(batch, len(offsets), height, width) * inside(offsets, (height, width), x.device)).requires_grad_()
    flat = [step for offset in offsets for step in offset]
    operator = partial(stencil_product, x.detach(), values.detach(), flat)

    def product(backend: str) -> Tensor:
        return LocalAffinity(offsets, values).matvec(x, backend=backend)

    def walk(backend: str) -> Tensor:
        return random_walk(x, LocalAffinity(offsets, values), beta=8, n_steps=256, backend=backend)

    yield Case("stencil_walk", size, operator, product, (x, values))
    yield Case("stencil_walk", f"{size}, 256 steps", None, walk, (x, values))


def boundary(size: str, batch: int, side: int) -> Case:
    """The boundary loss of IRN."""
    logits = torch.randn(batch, 1, side, side, device="cuda").requires_grad_()
    labels = torch.tensor([0, 0, 1, 2, 255], device="cuda")[torch.randint(0, 5, (batch, side, side), device="cuda")]
    operator = partial(boundary_pair_costs, logits.detach()[:, 0], labels.to(torch.uint8), 10, False, 1e-5)
    return Case(
        "boundary_costs",
        size,
        operator,
        lambda backend: boundary_affinity_loss(logits, labels, radius=10, backend=backend).total,
        (logits,),
    )


def average(size: str, batch: int, maps: int, height: int, width: int) -> Case:
    """An iteration with the published 48 neighbours."""
    x = rand(batch, maps, height, width).requires_grad_()
    weights = rand(batch, 48, height, width).softmax(1).requires_grad_()
    offsets = _ring_offsets(DILATIONS)
    return Case(
        "pixel_adaptive",
        size,
        partial(average_neighbours, x.detach(), weights.detach(), offsets),
        lambda backend: PixelAdaptiveKernel(offsets, weights).refine(x, 1, backend=backend),
        (x, weights),
    )


def correlation(size: str, batch: int, maps: int, keys: int, side: int, tf32: bool) -> Case:
    """SEAM's pixel correlation."""
    x = rand(batch, maps, side, side).requires_grad_()
    k = torch.randn(batch, keys, side, side, device="cuda").requires_grad_()
    flat = F.normalize(k.detach().flatten(2), dim=1)
    operator = partial(relu_correlation, x.detach().flatten(2), flat)
    return Case(
        "relu_correlation", size, operator, lambda backend: pixel_correlation(x, k, backend=backend), (x, k), tf32
    )


def contrast(size: str, batch: int, side: int, prototypes: int, channels: int) -> Case:
    """The loss of PPC over two views."""
    views = [torch.randn(batch, channels, side, side, device="cuda").requires_grad_() for _ in range(2)]
    cams = [rand(batch, prototypes - 1, side, side) for _ in range(2)]
    labels = torch.ones(batch, prototypes - 1, device="cuda")
    pixels = F.normalize(views[0].detach().movedim(1, 3).flatten(0, 2), dim=1)
    rows, target = pixels[:prototypes].contiguous(), torch.randint(0, prototypes, (len(pixels),), device="cuda")
    known = torch.ones(prototypes, dtype=torch.bool, device="cuda")

    def loss(backend: str) -> Tensor:
        generator = torch.Generator("cuda").manual_seed(0)
        return pixel_to_prototype_contrast_loss(*views, *cams, labels, generator=generator, backend=backend).total

    operator = partial(prototype_contrast, pixels, rows, target, known, 0.1, 0, 0)
    return Case("prototype_contrast", size, operator, loss, tuple(views))


def messages(size: str, labels: int, height: int, width: int, tf32: bool) -> Case:
    """The bilateral kernel of a dense CRF, with features as a photograph gives them."""
    values = rand(1, height * width, labels).requires_grad_()
    rows, columns = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    place = torch.stack([rows, columns], 2).flatten(0, 1).cuda() / 80
    colour = F.interpolate(rand(1, 3, 12, 16), (height, width), mode="bicubic")[0].flatten(1).mT * 255 / 13
    features = torch.cat([place, colour], 1)[None]
    return Case(
        "gaussian_messages",
        size,
        partial(gaussian_messages, values.detach(), features.mT.contiguous()),
        lambda backend: ExactGaussian(features, normalize=False, backend=backend).filter(values),
        (values,),
        tf32,
    )


def relative_error(found: list[Tensor], expected: list[Tensor]) -> float:
    """The largest of |found - expected| / |expected|; NaN counts as infinite."""
    errors = [((a - b).norm() / b.norm().clamp(min=1e-30)).item() for a, b in zip(found, expected, strict=True)]
    return max(math.inf if math.isnan(error) else error for error in errors)


def seconds(call: Callable[[], object]) -> float:
    """Median between two events on the GPU."""
    call()
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))

    def once() -> float:
        start.record()
        call()
        end.record()
        torch.cuda.synchronize()
        return start.elapsed_time(end) / 1e3

    first = once()
    if first >= VERY_LONG:
        return first
    if first >= LONG:
        return median(once() for _ in range(3))
    return triton.testing.do_bench(call, warmup=20, rep=100, return_mode="median") / 1e3


def timed(case: Case) -> Row:
    """Compare, then time."""
    torch.backends.cuda.matmul.allow_tf32 = False
    expected = case.with_gradients("torch")
    error = relative_error(case.with_gradients("triton"), expected)
    row = {"kernel": case.kernel, "size": case.size + (", TF32" if case.tf32 else ""), "error": error}
    if error > MOST:
        return Row(**row)
    del expected
    torch.backends.cuda.matmul.allow_tf32 = case.tf32
    triton_, torch_ = partial(case.with_gradients, "triton"), partial(case.with_gradients, "torch")

    def forward(backend: str) -> Tensor:
        with torch.no_grad():
            return case.function(backend)

    return Row(
        **row,
        operator=case.operator and triton.testing.do_bench_cudagraph(case.operator, rep=50, return_mode="median") / 1e3,
        forward=seconds(partial(forward, "triton")),
        forward_torch=seconds(partial(forward, "torch")),
        gradients=seconds(triton_),
        gradients_torch=seconds(torch_),
        peak_mb=peak_mb(triton_, "cuda"),
        peak_mb_torch=peak_mb(torch_, "cuda"),
    )


def main() -> None:
    """Time all, print a line for each, and store them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help="modules of wsss_modules.kernels; all by default")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    torch.manual_seed(0)
    told = conditions("cuda") | {"triton": triton.__version__}
    rows: list[Row] = []
    for case in cases():
        if options.names and case.kernel not in options.names:
            continue
        rows.append(timed(case))
        shown = {key: value for key, value in asdict(rows[-1]).items() if isinstance(value, float)}
        print(rows[-1].kernel, rows[-1].size, *(f"{key} {value:.3g}" for key, value in shown.items()), flush=True)
        torch.cuda.empty_cache()
        if options.json:
            content = {"conditions": told, "rows": [asdict(row) for row in rows]}
            options.json.write_text(json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    main()

"""Write docs/kernels.md: what each Triton kernel does, its arithmetic, its times, and what the compiler makes of it.

python -m docs.make_kernels

Work is counted from shapes, registers are as ptxas reports them in this run, and times are read from the last run of
`python -m tests.benchmarks.kernels --json docs/data/kernels.json` on a GPU.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import triton

from tests.kernels.ahead import BUILDS, TARGETS, build
from wsss_modules import affinity_offsets, path_offsets

FLOPS, BYTES = 67e12, 3.35e12  # H100 SXM: float32 outside of tensor cores, and memory, per second
TIMES = json.loads((Path(__file__).parent / "data" / "kernels.json").read_text())


@dataclass(frozen=True)
class Size:
    """A real size with what a launch has to compute and, if every number is moved once, to move."""

    name: str
    flops: float
    moved: float

    def row(self) -> str:
        """The size as a row of a table."""
        compute, memory = self.flops / FLOPS, self.moved / BYTES
        bound = "compute" if compute > memory else "memory"
        floor = max(compute, memory) * 1e6
        return f"| {self.name} | {si(self.flops)}FLOP | {si(self.moved)}B | {floor:,.1f} µs | {bound} |"


def si(number: float) -> str:
    """Three digits and a prefix."""
    for factor, prefix in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if number >= factor:
            return f"{number / factor:.3g} {prefix}"
    return f"{number:.3g} "


def walk(name: str, batch: int, maps: int, pixels: int) -> Size:
    """A step of the walk."""
    offsets = len(affinity_offsets(5))
    flops = batch * pixels * maps * (offsets * 6 + 10)  # two ends: a difference, a product, a sum
    return Size(name, flops, 4 * batch * pixels * (8 * maps + offsets + 1))


def boundary(name: str, batch: int, pixels: int) -> Size:
    """Forward."""
    points = sum(map(len, path_offsets(10).paths))
    pairs = len(path_offsets(10).offsets)
    return Size(name, batch * pixels * (points + 20 * pairs), 5 * batch * pixels)


def average(name: str, batch: int, maps: int, pixels: int) -> Size:
    """An iteration."""
    return Size(name, 2 * 48 * batch * maps * pixels, 4 * batch * pixels * (48 + 2 * maps))


def correlation(name: str, batch: int, maps: int, keys: int, pixels: int) -> Size:
    """Forward."""
    return Size(name, batch * pixels**2 * (2 * keys + 2 * maps + 2), 4 * batch * pixels * (2 * maps + keys + 1))


def contrast(name: str, pixels: int, prototypes: int, channels: int) -> Size:
    """Costs and gradients."""
    moved = 4 * (2 * pixels * channels + prototypes * channels + 4 * pixels)
    return Size(name, 4 * pixels * prototypes * channels, moved)


def messages(name: str, batch: int, labels: int, features: int, pixels: int) -> Size:
    """One kernel of one mean-field step."""
    flops = batch * pixels**2 * (3 * features + 2 * labels + 2)
    return Size(name, flops, 4 * batch * pixels * (2 * labels + features))


INTRODUCTION = """# Kernels

Six operations have a Triton kernel beside their form in plain torch. The functions take `backend="auto" | "torch" |
"triton"`; `auto` takes Triton for CUDA tensors where triton is installed, and torch everywhere else.
`torch.compile(fullgraph=True)` sees one operator.

What has been done with each of them:

- **run in Triton's interpreter** on CPU tensors, forward and backward, against the plain form in float64
  (`python -m pytest tests/kernels`, which starts a process with `TRITON_INTERPRET=1`): odd sizes, strides, half
  precision, gradients from above other than 1, empty inputs, memory filled with NaN beforehand, and torch's own checks
  of operators;
- **compiled** to a cubin for GPUs of compute capability 8.0 and 9.0; the test fails if a kernel spills registers;
- **run and timed on a GPU**: the same tests (`python -m pytest -m gpu tests`, with every public loss against the CPU
  beside them), and `python -m tests.benchmarks.kernels`.

The first table of a kernel gives, for two real sizes, the floating-point operations of a launch, the bytes to move if
every number is moved once, and the larger of the two times that an H100 SXM needs for them at best (67 TFLOP/s of
float32 outside of tensor cores, 3.35 TB/s): the floor of a perfect kernel, not a promise.

The second one gives times in milliseconds, measured on an {device} ({date}, torch
{torch}, triton {triton}): of the operator alone, replayed from a CUDA graph; and of its public function as called from
Python, forward and with all gradients, by the kernel and in plain torch on the same GPU, with the memory in MB
that the latter two need. Medians; calls of more than a second were timed once. Where the operator takes much less than
its function, the rest is Python and small launches. Results and gradients of both forms were compared first, and
differ by the error in the last column, relative to the norm. Products of float32 are exact unless
`torch.backends.cuda.matmul.allow_tf32` lets torch round its own: rows with TF32 are of both forms under that setting,
their error of both without.
"""

SECTIONS = [
    (
        "Walk over a local affinity",
        "stencil_walk",
        """\
`LocalAffinity.matvec` and `random_walk`. Each pixel gathers from both ends of the half stencil; a step of the walk,
plain or accelerated by Chebyshev polynomials, with Kahan's lost digits and the weighted total, is one launch where the
plain form has three for each offset. Several steps in one launch would compute a border again (43 % more
work for four steps of radius 5 on tiles of 64 x 64) to save launches of a few microseconds each; it was not tried.
Backward walks again from about √n stored states and
adds the affinities' gradient with one launch a step, in a fixed order.""",
        [walk("B1 C4 94x125, r 5", 1, 4, 94 * 125), walk("B16 C21 128x128, r 5", 16, 21, 128 * 128)],
    ),
    (
        "Boundary costs by path maxima",
        "boundary_costs",
        """\
`boundary_affinity_loss` and `inter_pixel_relation_loss`. The maximum along the path of each pair, its label group
and its cost stay in registers; labels come as bytes or int32, and nothing of the size of the pairs is written. Pairs
are counted in the same launch. Backward finds the maxima again and adds each pair's gradient at the pixel that attains
it, by atomic additions in no fixed order. Operations below count one for each point of a path, read from the cache, and
bytes those of byte labels.""",
        [boundary("B16 128x128, r 10", 16, 128 * 128), boundary("B32 128x128, r 10", 32, 128 * 128)],
    ),
    (
        "Pixel-adaptive refinement",
        "pixel_adaptive",
        """\
`PixelAdaptiveKernel.refine`. One iteration a launch: 48 neighbours of each pixel are read where they lie, up to 16
maps share one reading of the weights, nothing is padded or unfolded. All iterations in one launch would need a barrier
over the whole image, since the neighbours reach 24 pixels far, and the weights don't fit into shared memory; so it
was not done. The maps' gradient gathers on a domain larger by that reach and is folded back: no atomics.""",
        [average("B1 C4 375x500", 1, 4, 375 * 500), average("B8 C21 320x320", 8, 21, 320 * 320)],
    ),
    (
        "Relu-cosine pixel correlation",
        "relu_correlation",
        """\
`pixel_correlation` (SEAM, L2G). Blocks of the N x N matrix are made in registers, forward and backward. Since the
matrix is symmetric, the gradient of the maps is the forward pass of what comes from above. The plain form makes one
half of the matrix by cuBLAS; with exact products its gradients take about as long as the kernel's, in half more
memory.""",
        [
            correlation("B8 C21 E192 56x56", 8, 21, 192, 56 * 56),
            correlation("B4 C21 E192 112x112", 4, 21, 192, 112 * 112),
        ],
    ),
    (
        "Pixel-to-prototype contrast",
        "prototype_contrast",
        """\
`pixel_to_prototype_contrast_loss` (PPC). Similarities, the choice of semi-hard prototypes, the logarithm of the
sum and the gradient with respect to the pixels in one pass; backward is a product with what comes from above. The
operator takes less than a hundredth of the whole loss, whose other steps (pseudo labels, prototypes, the draw of
pixels) launch many small kernels: it saves little time there, and needs the memory of gradients made ahead.""",
        [contrast("P2048 C21 D128", 2048, 21, 128), contrast("P25088 C21 D128", 25088, 21, 128)],
    ),
    (
        "Exact Gaussian messages",
        "gaussian_messages",
        """\
`ExactGaussian`, and with it `dense_crf(..., exact=True)`. Attention without a softmax over squared differences of
features: exact where the permutohedral lattice approximates, in time that grows with the square of the pixels. The
bilateral kernel of one mean-field step:""",
        [messages("B1 C4 F5 375x500", 1, 4, 5, 375 * 500), messages("B1 C21 F5 128x128", 1, 21, 5, 128 * 128)],
    ),
]


def measured(kernel: str) -> list[str]:
    """Times of a kernel as a table."""
    titles = "| size | operator | forward | in torch | with gradients | in torch | memory | in torch | error |"
    rows = [times(row) for row in TIMES["rows"] if row["kernel"] == kernel]
    return ["", titles, "| --- |" + " --: |" * 8, *rows]


def times(row: dict[str, Any]) -> str:
    """A size as a row of the table of times."""
    kinds = ("operator", "forward", "forward_torch", "gradients", "gradients_torch")
    cells = ["-" if row[kind] is None else digits(row[kind] * 1e3) for kind in kinds]
    cells += [digits(row[kind]) for kind in ("peak_mb", "peak_mb_torch")]
    return f"| {' | '.join([row['size'], *cells, format(row['error'], '.0e').replace('e-0', 'e-')])} |"


def digits(number: float) -> str:
    """Three digits, more before the point."""
    return f"{number:,.0f}" if number >= 100 else f"{number:.3g}"


def page() -> str:
    """The page in Markdown."""
    parts = [INTRODUCTION.format(**TIMES["conditions"])]
    for title, name, text, sizes in SECTIONS:
        parts.append(f"## {title}\n\n[wsss_modules/kernels/{name}.py](../wsss_modules/kernels/{name}.py)\n\n{text}\n")
        parts.append("| size | operations | moved | floor | bound by |\n| --- | --: | --: | --: | --- |")
        parts += [size.row() for size in sizes]
        parts += measured(name)
        parts.append("")
    parts.append(f"## Registers, shared memory and spills\n\nAs ptxas reports them, triton {triton.__version__}.\n")
    parts.append("| kernel | target | registers | shared memory | spilled |\n| --- | --- | --: | --: | --: |")
    for each in BUILDS:
        for capability in TARGETS:
            told = build(each, capability)
            parts.append(f"| {each.name} | sm_{capability} | {told.registers} | {told.shared} B | {told.spilled} B |")
    return "\n".join(parts) + "\n"


if __name__ == "__main__":
    Path(__file__).with_name("kernels.md").write_text(page())

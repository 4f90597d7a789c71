"""Random walk of two maps on 128 x 128 cells: stencil against the dense matrix and a sparse one.

python -m tests.benchmarks.bench_random_walk [--size 128] [--channels 2] [--threads 2] [--device cpu] [--json FILE]

The dense form of the released code is timed on a quarter of the side only (its time grows with the sixth power of
the side, its memory with the fourth), unless ``--dense`` is given.
"""

from __future__ import annotations

import argparse
import warnings

import torch
from torch import Tensor

from tests.benchmarks.harness import measure, report
from tests.modules import reference_affinity
from wsss_modules import EdgeToAffinity, LocalAffinity, propagate_to_edge, random_walk

RADIUS, BETA, STEPS = 5, 10, 256


def csr_walk(x: Tensor, affinity: LocalAffinity) -> Tensor:
    """The same steps with torch's sparse product, in increment form; the matrix is made anew, as in our function."""
    height, width = affinity.size
    sharp = affinity.power(BETA)
    inside = affinity.power(0).values[0] > 0
    index = torch.arange(height * width, device=x.device).view(height, width).expand_as(inside)
    steps = torch.tensor([dy * width + dx for dy, dx in affinity.offsets], device=x.device).view(-1, 1, 1)
    source, partner, weight = index[inside], (index + steps)[inside], sharp.values[0][inside]
    rows, columns = torch.cat([source, partner]), torch.cat([partner, source])
    degree = sharp.degree().flatten()
    values = torch.cat([weight, weight]) / degree[rows]
    diagonal = index[0].flatten()
    values = torch.cat([values, 1 / degree - 1])
    places = torch.stack([torch.cat([rows, diagonal]), torch.cat([columns, diagonal])])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # sparse CSR says that it is in beta
        change = torch.sparse_coo_tensor(places, values, (height * width,) * 2).coalesce().to_sparse_csr()
    y = x[0].flatten(1).T.contiguous()  # (N, C)
    for _ in range(STEPS):
        y = y + change @ y
    return y.T.reshape(x.shape)


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=int, default=128)
    parser.add_argument("--channels", type=int, default=2)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dense", action="store_true", help="time the dense form at the full size")
    parser.add_argument("--json")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    device, size = options.device, options.size

    edge = (torch.rand(1, 1, size, size) / 2).to(device)
    x = torch.rand(1, options.channels, size, size).to(device)
    affinity = EdgeToAffinity(RADIUS)(edge)
    label = f"B1-C{options.channels}-{size}x{size}-r{RADIUS}-f32"
    rows = []
    with torch.no_grad():
        for method in ("power", "chebyshev"):
            # warm up the allocator and the caches before memory is read
            random_walk(x, affinity, beta=BETA, n_steps=2, method=method)
            call = lambda method=method: random_walk(x, affinity, beta=BETA, n_steps=STEPS, method=method)  # noqa: E731
            rows.append(measure(f"stencil-{method}-{label}", call, device=device))
        rows.append(measure(f"csr-power-{label}", lambda: csr_walk(x, affinity), repeat=3, device=device))
        call = lambda: propagate_to_edge(x, edge, radius=RADIUS, method="chebyshev")  # noqa: E731
        rows.append(measure(f"propagate_to_edge-chebyshev-{label}", call, device=device))
    for method in ("power", "chebyshev"):
        for both in (False, True):
            leaf, values = x.clone().requires_grad_(), affinity.values.clone().requires_grad_(both)

            def train(method: str = method, leaf: Tensor = leaf, values: Tensor = values) -> None:
                walked = random_walk(leaf, LocalAffinity(affinity.offsets, values), beta=BETA, method=method)
                torch.autograd.grad(walked.sum(), (leaf, values) if values.requires_grad else leaf)

            name = f"stencil-{method}-forward-backward-{'x-affinity' if both else 'x'}-{label}"
            rows.append(measure(name, train, repeat=3, device=device))

    dense_size = size if options.dense else size // 4
    small = EdgeToAffinity(RADIUS)(edge[..., :dense_size, :dense_size])
    maps = x[..., :dense_size, :dense_size]

    def dense() -> Tensor:
        return reference_affinity.random_walk(maps, small.dense(), BETA, STEPS)

    label = f"B1-C{options.channels}-{dense_size}x{dense_size}-r{RADIUS}-f32"
    rows.append(measure(f"dense-power-{label}", dense, repeat=1, device=device))
    rows.append(measure(f"stencil-power-{label}", lambda: random_walk(maps, small, beta=BETA), device=device))
    report("random walk, 256 steps", rows, options.json, device)


if __name__ == "__main__":
    main()

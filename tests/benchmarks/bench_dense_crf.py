"""Time and peak memory of the dense CRF beside pydensecrf2 (if installed) and the dense N x N form.

``python -m tests.benchmarks.bench_dense_crf [--threads 2] [--json FILE]``. Calls take turns, so that a slow spell of
the machine falls on all of them. Images are photographs if they are at hand, else procedural. On a CPU a peak counts
only what the process had not held before: a row that follows a larger one shows less than it would alone.
"""

import argparse
from collections.abc import Callable
from functools import partial
from importlib.util import find_spec
from statistics import median

import torch

from tests.benchmarks.harness import Timing, measure, report
from tests.modules import reference_dense_crf as reference
from wsss_modules.dense_crf import (
    DEEPLAB_CRF,
    IRN_CRF,
    PSA_CRF,
    CRFParameters,
    crf_kernels,
    dense_crf,
    mean_field,
    unary_from_scores,
)

PRESETS = {"psa": PSA_CRF, "irn": IRN_CRF, "deeplab": DEEPLAB_CRF}


def cases(name: str, parameters: CRFParameters, height: int, width: int) -> dict[str, Callable[[], object]]:
    """The calls to compare on an image of the size, 3 labels, under their row names."""
    image = reference.photograph(height, width)
    if image is None:
        image = reference.procedural_image(height, width)
    batch, unary = image[None], unary_from_scores(reference.smooth_scores(3, height, width)[None])
    kernels = crf_kernels(batch, parameters)
    _, lattice = kernels.terms[1]
    values = torch.rand(1, height * width, 3)
    size = f"{name} {width}x{height}"
    calls: dict[str, Callable[[], object]] = {
        f"{size} build both lattices": partial(crf_kernels, batch, parameters),
        f"{size} filter, bilateral ({lattice.vertices} vertices)": partial(lattice.filter, values),
        f"{size} mean field, lattices at hand": partial(mean_field, unary, kernels, parameters.iterations),
        f"{size} whole CRF": partial(dense_crf, batch, unary, parameters),
    }
    if find_spec("pydensecrf"):
        calls[f"{size} whole CRF, pydensecrf2"] = partial(reference.peer_crf, image, unary[0], parameters)
    return calls


def in_turns(calls: dict[str, Callable[[], object]], rounds: int) -> list[Timing]:
    """Measure every call once per round; median seconds, largest peak."""
    timings: dict[str, list[Timing]] = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            timings[name].append(measure(name, call, repeat=1))
    return [Timing(name, median(t.seconds for t in ts), max(t.peak_mb for t in ts)) for name, ts in timings.items()]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--json", default=None)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    rows = []
    for name, parameters in PRESETS.items():
        rows += in_turns(cases(name, parameters, 375, 500), args.rounds)
    rows += in_turns(cases("deeplab", DEEPLAB_CRF, 1024, 1024), max(1, args.rounds // 3))

    image, scores = reference.procedural_image(60, 80), reference.smooth_scores(3, 60, 80)
    unary = unary_from_scores(scores[None])
    small: dict[str, Callable[[], object]] = {
        "psa 80x60 whole CRF": partial(dense_crf, image[None], unary, PSA_CRF),
        "psa 80x60 whole CRF, dense kernels": partial(reference.exact_mean_field, image, unary[0], PSA_CRF),
    }
    rows += in_turns(small, max(1, args.rounds // 3))
    report("dense CRF, 3 labels, 10 iterations", rows, args.json)


if __name__ == "__main__":
    main()

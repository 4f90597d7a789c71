"""Time and peak memory of merging CAMs over scales: present classes only, beside all classes.

``python -m tests.benchmarks.bench_cam [--device cuda] [--json FILE]``
"""

import argparse
from functools import partial

import torch

from tests.benchmarks.harness import measure, report
from tests.modules.reference_cam import dense_reference
from wsss_modules import multi_scale_cam


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--json", default=None)
    args = parser.parse_args()
    size, scales, mirrored = (375, 500), (1, 0.5, 1.5, 2), [False, True] * 4
    rows = []
    for classes in (20, 80):
        generator = torch.Generator().manual_seed(0)
        maps = [
            torch.rand(1, classes, -(-int(size[0] * s) // 8), -(-int(size[1] * s) // 8), generator=generator)
            for s in scales
            for _ in range(2)
        ]
        maps = [x.to(args.device) for x in maps]
        labels = torch.zeros(1, classes, device=args.device)
        labels[0, [3, 14]] = 1
        ours = partial(multi_scale_cam, maps, labels, size, mirrored=mirrored)
        naive = partial(dense_reference, maps, size, mirrored, size)
        rows.append(measure(f"K={classes} 500x375, 8 maps, 2 present", ours, device=args.device))
        rows.append(measure(f"K={classes} 500x375, 8 maps, all classes", naive, device=args.device))
    report("multi-scale CAM", rows, args.json, args.device)


if __name__ == "__main__":
    main()

"""Time and peak memory of centroids and connected components beside loops, the released form, and scipy.

``python -m tests.benchmarks.bench_instances [--device cuda] [--json FILE]``
"""

import argparse
from functools import partial
from importlib.util import find_spec

import torch

from tests.benchmarks.harness import measure, report
from tests.modules.reference_instances import centroids_numpy, flood_fill
from wsss_modules import connected_components, find_centroids


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--json", default=None)
    args = parser.parse_args()
    rows = []
    generator = torch.Generator().manual_seed(0)
    for density in (0.59, 0.95):  # the first is close to where components percolate
        mask = torch.rand(375, 500, generator=generator) < density
        there = mask.to(args.device)
        rows.append(
            measure(f"components 500x375, {density:.0%} on", partial(connected_components, there), 5, args.device)
        )
        rows.append(measure("  flood fill, Python", partial(flood_fill, mask.long()), 1))
        if find_spec("scipy"):
            from scipy.ndimage import label

            rows.append(measure("  scipy.ndimage.label", partial(label, mask.numpy()), 5))
    for height, width in ((94, 125), (128, 128)):
        position = torch.stack(torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")).float()
        centre = torch.tensor([height / 2, width / 3])[:, None, None]
        field = 0.5 * (centre - position) + torch.randn(2, height, width, generator=generator)
        there = field.to(args.device)
        rows.append(measure(f"centroids {width}x{height}, 300 steps", partial(find_centroids, there), 3, args.device))
        rows.append(measure("  released form, numpy", partial(centroids_numpy, field.numpy(), 300), 3))
    report("instances", rows, args.json, args.device)


if __name__ == "__main__":
    main()

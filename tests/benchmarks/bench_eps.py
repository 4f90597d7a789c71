"""EPS's saliency loss, forward and backward, against the released form with masks of the size of the maps.

python -m tests.benchmarks.bench_eps [--batch 8] [--classes 20] [--size 56] [--present 2] [--threads 1] [--repeat 15]
                                     [--device cpu] [--json FILE]

The default is a published step: crops of 448 pixels at stride 8. Values and gradients are compared first; nothing is
reported if they differ.
"""

from __future__ import annotations

import argparse

import torch
from torch import Tensor

from tests.benchmarks.harness import measure, report
from tests.losses import reference_eps
from wsss_losses import saliency_guided_map_loss


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in {"batch": 8, "classes": 20, "size": 56, "present": 2, "threads": 1, "repeat": 15}.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--json")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    batch, size, device = options.batch, options.size, options.device

    scores = (3 * torch.randn(batch, 1 + options.classes, size, size, device=device)).requires_grad_()
    saliency = torch.rand(batch, 1, 8 * size, 8 * size, device=device)
    labels = torch.rand(batch, options.classes, device=device)
    labels = (labels >= labels.topk(options.present, 1).values[:, -1:]).float()

    def step(loss_of) -> list[Tensor]:
        loss = loss_of(scores, saliency, labels)
        return [loss.detach(), *torch.autograd.grad(loss, scores)]

    forms = {"ours": saliency_guided_map_loss, "released": reference_eps.loss}
    for a, b in zip(*(step(form) for form in forms.values()), strict=True):
        error = ((a - b).abs().max() / b.abs().max()).item()
        if not error < 1e-4:
            raise SystemExit(f"the two forms differ by {error:.1e} of the largest value")
    shape = f"B{batch}-K{options.classes}-{size}x{size}"
    rows = [
        measure(f"{name}-{shape}", lambda form=form: step(form), options.repeat, device) for name, form in forms.items()
    ]
    report("EPS, forward and backward", rows, options.json, device)
    print(f"  {rows[1].seconds / rows[0].seconds:.1f} times as fast")


if __name__ == "__main__":
    main()

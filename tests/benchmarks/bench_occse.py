"""The pieces of a step of OC-CSE against the forms of the released code: split, erasing, frozen classifier.

python -m tests.benchmarks.bench_occse [--batch 8] [--size 224] [--classes 20] [--threads 2] [--json FILE]

Values are compared first; nothing is reported where they differ. The classifier is timm's ResNet-50, untrained. Its
"released" form computes gradients of its weights and never clears them.
"""

from __future__ import annotations

import argparse

import timm
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tests.benchmarks.harness import measure, report
from wsss_modules import FrozenClassifier, class_specific_erase, sample_erase_class


def split_one_by_one(labels: Tensor) -> tuple[Tensor, Tensor]:
    """A class of each image, drawn on the host: one wait for the device an image."""
    erased = torch.zeros_like(labels)
    for i, row in enumerate(labels):
        present = row.nonzero()[:, 0].tolist()
        erased[i, present[int(torch.randint(len(present), ()))]] = 1
    return erased, labels - erased


def erase_all_classes(cam: Tensor, erased: Tensor, images: Tensor) -> tuple[Tensor, Tensor]:
    """Up-sample the maps of all classes and pick one afterwards."""
    large = F.relu(F.interpolate(cam, images.shape[2:], mode="bilinear", align_corners=False))
    picked = (large * erased[:, :, None, None]).sum(1, keepdim=True)
    mask = picked / (picked.max() + 1e-5)
    return mask, images * (1 - mask)


def image_gradient(judge: nn.Module, images: Tensor) -> Tensor:
    """Forward and backward to the images, as in a step; gradients of weights are kept if they require any."""
    leaf = images.clone().requires_grad_()
    judge(leaf).square().sum().backward()
    assert leaf.grad is not None
    return leaf.grad


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--classes", type=int, default=20)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--json")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    device, batch, size, classes = options.device, options.batch, options.size, options.classes
    label = f"B{batch}-K{classes}-{size}x{size}-f32"

    labels = (torch.rand(batch, classes) < 0.1).float()
    labels[torch.arange(batch), torch.randint(classes, (batch,))] = 1
    labels = labels.to(device)
    for erased, remaining in (split_one_by_one(labels), sample_erase_class(labels)[:2]):
        assert torch.equal(erased + remaining, labels)
        assert torch.equal(erased.sum(1), torch.ones_like(erased[:, 0]))
    rows = [
        measure(f"split-released-B{batch}-K{classes}", lambda: split_one_by_one(labels), 50, device),
        measure(f"split-sample_erase_class-B{batch}-K{classes}", lambda: sample_erase_class(labels), 50, device),
    ]

    images = torch.randn(batch, 3, size, size, device=device)
    cam = torch.randn(batch, classes, size // 8, size // 8, device=device)
    erased = sample_erase_class(labels).erased
    torch.testing.assert_close(tuple(class_specific_erase(cam, erased, images)), erase_all_classes(cam, erased, images))
    for name, function in (("all-classes", erase_all_classes), ("one-class", class_specific_erase)):
        leaf = cam.clone().requires_grad_()

        def train(function=function, leaf=leaf) -> None:  # type: ignore[no-untyped-def]
            torch.autograd.grad(function(leaf, erased, images)[1].sum(), leaf)

        rows.append(measure(f"erase-{name}-forward-backward-{label}", train, 5, device))

    net = timm.create_model("resnet50", num_classes=classes).to(device).eval()
    released = image_gradient(net, images)
    rows.append(measure(f"judge-weight-gradients-{label}", lambda: image_gradient(net, images), 3, device))
    net.zero_grad(set_to_none=True)
    for parts in (None, 4):
        judge = FrozenClassifier(net, parts=parts)
        torch.testing.assert_close(image_gradient(judge, images), released, rtol=1e-3, atol=1e-5)
        name = f"judge-frozen{'' if parts is None else f'-parts{parts}'}-{label}"
        rows.append(measure(name, lambda judge=judge: image_gradient(judge, images), 3, device))
    report("class-specific erasing", rows, options.json, device)


if __name__ == "__main__":
    main()

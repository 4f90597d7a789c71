"""Transforms of patch maps image by image, and as two matrix products for the whole batch; row and column LSTMs."""

import argparse

import torch
from torch import Tensor
from torch.nn import functional as F

from tests.benchmarks.harness import Timing, measure, report
from wsss_modules import HVBiLSTM, PatchTransform


def image_by_image(x: Tensor, transform: PatchTransform) -> Tensor:
    """Crop, resize, flip and transpose each image by itself, as the released code does."""
    results = []
    for i in range(len(x)):
        one = x[i : i + 1]
        if transform.box is not None:
            x1, y1, x2, y2 = transform.box[i].tolist()
            one = one[:, :, y1:y2, x1:x2]
        if transform.size is not None:
            one = F.interpolate(one, transform.size, mode="bilinear", align_corners=True)
        one = one.flip(3) if transform.flip_lr[i] else one
        one = one.flip(2) if transform.flip_ud[i] else one
        results.append(one.mT if transform.transpose[i] else one)
    return torch.cat(results)


def transforms(batch: int, channels: int, side: int, device: str, repeat: int) -> list[Timing]:
    x = torch.rand(batch, channels, side, side, device=device)
    options = {"crop_probability": 0.3, "crop": side // 3, "grid": (side, side), "size": (side // 2, side // 2)}
    transform = PatchTransform.draw(batch, **options).to(x.device)
    exact = image_by_image(x.double(), transform).float()
    torch.testing.assert_close(transform.apply(x), exact, rtol=1e-5, atol=1e-6)  # 1.4e-7 measured; image by image 4e-5
    title = f"B={batch} C={channels} {side}x{side}"
    return [
        measure(f"{title} image by image", lambda: image_by_image(x, transform), repeat, device),
        measure(f"{title} two products", lambda: transform.apply(x), repeat, device),
    ]


def lstms(batch: int, side: int, device: str, repeat: int) -> list[Timing]:
    layer, x = HVBiLSTM(768, 192).to(device), torch.randn(batch, 768, side, side, device=device)

    def step() -> None:
        layer.zero_grad()
        layer(x).sum().backward()

    return [measure(f"HV-BiLSTM B={batch} 768 -> 4 x 192, {side}x{side}, forward and backward", step, repeat, device)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--json", default=None)
    args = parser.parse_args()
    torch.manual_seed(0)
    rows = transforms(args.batch, 21, 24, args.device, args.repeat)
    rows += transforms(args.batch, 3, 384, args.device, args.repeat)
    rows += lstms(2, 24, args.device, 1)
    report("ViT-PCM: transforms and LSTMs", rows, args.json, args.device)


if __name__ == "__main__":
    main()

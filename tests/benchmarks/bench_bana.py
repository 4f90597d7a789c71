"""Time and peak memory of BANA's labels from coarse features, of its pooling and of its loss, beside the naive forms.

``python -m tests.benchmarks.bench_bana [--size 512] [--channels 1024] [--repeat 3] [--json FILE]``

The naive labels up-sample the features to the size of the image, as released. Values are compared first; nothing is
reported if they differ.
"""

import argparse
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional as F

from tests.benchmarks.harness import Timing, measure, report
from tests.modules.reference_bana import full_size_labels, looped_bap
from wsss_losses import noise_aware_loss
from wsss_modules import background_aware_pooling, background_mask_from_boxes, box_pseudo_labels, fuse_labels


def labels(size: int, channels: int, repeat: int) -> list[Timing]:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(21, channels, generator=generator)
    s, cells = size // 16, size // 8
    boxes = torch.tensor([[s, s, 9 * s, 10 * s], [6 * s, 4 * s, 15 * s, 15 * s], [2 * s, 9 * s, 5 * s, 14 * s]])
    classes = torch.tensor([8, 15, 8])
    kind = torch.zeros(cells, cells, dtype=torch.int64)  # pure noise would leave every label to rounding
    for (x1, y1, x2, y2), label in zip((boxes // 8).tolist(), classes.tolist(), strict=True):
        kind[y1 + 1 : y2 - 1, x1 + 2 : x2 - 2] = label
    features = (weight[kind] + 0.5 * torch.randn(cells, cells, channels, generator=generator)).relu().permute(2, 0, 1)
    ours = partial(box_pseudo_labels, features, weight, boxes, classes, (size, size))
    naive = partial(full_size_labels, features, weight, boxes, classes, (size, size))
    found, expected = ours(), naive()
    for name in ("scores", "correlation"):
        # the threshold on the attention is hard: rounding decides 2 of 262,144 pixels at the default sizes
        same = torch.isclose(getattr(found, name), expected[name], rtol=1e-3, atol=1e-4)
        assert same.float().mean() > 0.9999, name
    for name in ("y_crf", "y_ret"):
        assert (getattr(found, name) == expected[name]).float().mean() > 0.9999
    del found, expected
    title = f"stage 2, {size} x {size}, D={channels}"
    return [measure(f"{title}, coarse", ours, repeat), measure(f"{title}, as large as the image", naive, repeat)]


def pooling(channels: int, repeat: int) -> list[Timing]:
    generator = torch.Generator().manual_seed(0)
    features = torch.rand(8, channels, 41, 41, generator=generator)
    corners = torch.rand(20, 2, 2, generator=generator).mul(320).sort(1).values.flatten(1).round()
    boxes = torch.cat([(torch.arange(20) % 8).float()[:, None].sort(0).values, corners], 1)
    mask = background_mask_from_boxes(boxes, 8, (321, 321))
    ours, naive = (partial(form, features, boxes, mask, grid=4) for form in (background_aware_pooling, looped_bap))
    torch.testing.assert_close(ours().pooled, naive(), rtol=1e-3, atol=1e-4)
    title = f"pooling of 20 boxes, 8 images, D={channels}, 41 x 41"
    return [measure(f"{title}, ours", ours, repeat), measure(f"{title}, box by box", naive, repeat)]


def picked_loss(cosine: Tensor, fused: Tensor, y_crf: Tensor) -> Tensor:
    """Noise-aware loss with lists of pixels, as released."""
    trusted = F.cross_entropy(20 * cosine, fused, ignore_index=255)
    places = [tuple(place) for place in ((fused == 255) & (y_crf != 255)).nonzero().tolist()]
    b, y, x = ([place[k] for place in places] for k in range(3))
    scores, label = cosine[b, :, y, x], y_crf[b, y, x]
    distance = 1 + scores
    sigma = (distance[range(len(label)), label] / distance.max(1).values) ** 7
    cost = F.cross_entropy(20 * scores, label, reduction="none")
    return trusted + 0.1 * (sigma * cost).sum() / sigma.sum()


def loss(repeat: int) -> list[Timing]:
    generator = torch.Generator().manual_seed(0)
    cosine = (torch.rand(4, 21, 321, 321, generator=generator) * 2 - 1).requires_grad_()
    y_crf, y_ret = torch.randint(0, 3, (2, 4, 321, 321), generator=generator)
    fused = fuse_labels(y_crf, y_ret)

    def ours() -> Tensor:
        return noise_aware_loss(cosine, fused, y_crf).total

    def naive() -> Tensor:
        return picked_loss(cosine, fused, y_crf)

    torch.testing.assert_close(ours(), naive())
    torch.testing.assert_close(
        torch.autograd.grad(ours(), cosine), torch.autograd.grad(naive(), cosine), rtol=1e-3, atol=1e-8
    )
    rows = []
    for name, form in (("weights", ours), ("lists of pixels", naive)):
        rows.append(measure(f"loss, 4 x 321 x 321, {name}", lambda f=form: f().backward(), repeat))
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--size", type=int, default=512)
    parser.add_argument("--channels", type=int, default=1024)
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--json", default=None)
    args = parser.parse_args()
    rows = [*labels(args.size, args.channels, args.repeat), *pooling(args.channels, args.repeat), *loss(args.repeat)]
    for ours, naive in zip(rows[::2], rows[1::2], strict=True):
        print(f"{ours.name}: {naive.seconds / ours.seconds:.1f} times as fast as {naive.name.rsplit(', ', 1)[1]}")
    report("BANA", rows, args.json)


if __name__ == "__main__":
    main()

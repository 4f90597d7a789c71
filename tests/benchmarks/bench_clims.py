"""Time and peak memory of CLIMS' judgement of a batch, forward and backward, beside the released order of things.

``python -m tests.benchmarks.bench_clims [--batch 8] [--classes 20] [--width 192] [--depth 4] [--json FILE]``

The released step enlarges the maps of all classes, stacks pairs in a loop, encodes what the maps show twice and what
they leave once, and encodes all texts three times. The towers are transformers with the tokens of CLIP ViT-B/32 (49
patches, 77 words), random, by default narrower and less deep than CLIP's (768 and 512 wide, 12 layers). Values and
gradients are compared first; nothing is reported if they differ.
"""

import argparse
from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor, nn

from tests.benchmarks.harness import Timing, measure, report
from tests.losses.reference_clims import looped_pairs, released_step
from wsss_losses import clims_loss
from wsss_modules import VOC_PROMPTS, FrozenClassifier, TextPromptBank, masked_image_pairs

CELLS, CROP, WORDS = 32, 512, 77  # stride 16


class Transformer(nn.Module):
    """Tokens to one feature, without dropout."""

    def __init__(self, width: int, depth: int) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(width, 3, 4 * width, 0.0, batch_first=True)
        self.layers = nn.TransformerEncoder(layer, depth, enable_nested_tensor=False)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.layers(tokens).mean(1)


class ImageTower(nn.Module):
    def __init__(self, width: int, depth: int) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, width, 32, 32)
        self.body = Transformer(width, depth)

    def forward(self, images: Tensor) -> Tensor:
        return self.body(self.patches(images).flatten(2).mT)


class TextTower(nn.Module):
    def __init__(self, width: int, depth: int) -> None:
        super().__init__()
        self.words = nn.Embedding(256, width)
        self.body = Transformer(width, depth)

    @torch.no_grad()
    def forward(self, texts: Sequence[str]) -> Tensor:
        codes = [list(text.encode()[:WORDS].ljust(WORDS, b" ")) for text in texts]
        return self.body(self.words(torch.tensor(codes)))


def gradient_of(step: Callable[[], Tensor], activation: Tensor) -> tuple[Tensor, Tensor]:
    value = step()
    return value.detach(), torch.autograd.grad(value, activation)[0]


def compare(batch: int, classes: int, width: int, depth: int, size: int) -> list[Timing]:
    torch.manual_seed(0)
    activation = torch.rand(batch, classes, CELLS, CELLS, requires_grad=True)
    images, labels = torch.randn(batch, 3, CROP, CROP), torch.zeros(batch, classes)
    labels[torch.arange(batch), torch.arange(batch) % classes] = 1
    labels[::2, -1] = 1  # 1.5 classes an image, as on VOC
    image_tower, text_tower = ImageTower(width, depth), TextTower(width, depth)
    names = [f"thing {k}" for k in range(classes)]
    bank = TextPromptBank(names, text_tower, VOC_PROMPTS)
    frozen = FrozenClassifier(image_tower)
    texts = bank.class_features, bank.background_features

    def pairs_released() -> Tensor:
        shown, left, _ = looped_pairs(activation, images, labels, size)
        return (shown * left).sum()

    def pairs_here() -> Tensor:
        pairs = masked_image_pairs(activation, images, labels, size=size)
        return (pairs.foreground * pairs.background).sum()

    def step_released() -> Tensor:
        prompts = bank.class_prompts, bank.background_prompts
        towers = image_tower.requires_grad_(True), text_tower
        return released_step(activation, images, labels, *towers, *prompts, size=size)

    def step_here() -> Tensor:
        frozen.module.requires_grad_(False)
        return clims_loss(activation, images, labels, frozen, *texts, size=size).total

    title, rows = f"B={batch} K={classes} S={size}", []
    for name, released, here in (("pairs", pairs_released, pairs_here), ("whole step", step_released, step_here)):
        forms = {"released": released, "here": here}
        results = [gradient_of(form, activation) for form in forms.values()]
        torch.testing.assert_close(results[1], results[0], rtol=1e-3, atol=1e-5)
        del results
        timed = [
            measure(f"{title} {name}, {form}", partial(gradient_of, step, activation), repeat=3)
            for form, step in forms.items()
        ]
        print(f"{name}: {timed[0].seconds / timed[1].seconds:.1f} times as fast as released")
        rows += timed
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--batch", type=int, nargs="+", default=[8])
    parser.add_argument("--classes", type=int, default=20)
    parser.add_argument("--width", type=int, default=192)
    parser.add_argument("--depth", type=int, default=4)
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--json", default=None)
    args = parser.parse_args()
    rows = [row for batch in args.batch for row in compare(batch, args.classes, args.width, args.depth, args.size)]
    report("CLIMS, forward and backward", rows, args.json)


if __name__ == "__main__":
    main()

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from wsss_modules import fuse_saliency_labels


def random_case(seed: int, batch: int = 2, classes: int = 3, size: tuple[int, int] = (9, 11)) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    scores = torch.rand(batch, 1 + classes, *size, generator=generator) ** 2
    saliency = torch.rand(batch, 1, *size, generator=generator) ** 3
    return scores, saliency


def by_pixel(scores: Tensor, saliency: Tensor, keys: list[int]) -> Tensor:
    """The rules of the released code, one pixel at a time."""
    batch, channels, height, width = scores.shape
    result = torch.zeros(batch, height, width, dtype=torch.int64)
    for b in range(batch):
        for y in range(height):
            for x in range(width):
                salient = saliency[b, 0, y, x].item()
                values = [1 - salient, *scores[b, 1:, y, x].tolist()]
                label = [0, *keys][values.index(max(values))]
                strong = 1.0 if channels > 1 and max(values[1:]) > 0.8 else salient
                if sum(value > 0.9 for value in values) > 1 or (strong >= 32 / 255 and label == 0):
                    label = 255
                result[b, y, x] = label
        labelled = ((result[b] > 0) & (result[b] < 255)).sum().item()
        if labelled / (height * width) < 0.01:
            result[b] = 255
    return result


@given(st.integers(0, 10**6), st.integers(0, 3))
def test_fusion_equals_the_rules_pixel_by_pixel(seed: int, classes: int) -> None:
    scores, saliency = random_case(seed, classes=classes)
    keys = [4, 9, 20][:classes]
    mask = fuse_saliency_labels(scores, saliency, keys=torch.tensor(keys, dtype=torch.int64))
    assert torch.equal(mask, by_pixel(scores, saliency, keys))
    assert mask.dtype == torch.int64
    assert set(mask.unique().tolist()) <= {0, 255, *keys}


def test_without_keys_map_k_is_class_k() -> None:
    scores, saliency = random_case(0)
    assert torch.equal(
        fuse_saliency_labels(scores, saliency), fuse_saliency_labels(scores, saliency, keys=torch.arange(1, 4))
    )


def test_background_scores_are_not_read() -> None:
    scores, saliency = random_case(1)
    other = scores.clone()
    other[:, 0] = float("nan")
    assert torch.equal(fuse_saliency_labels(other, saliency), fuse_saliency_labels(scores, saliency))


@pytest.mark.parametrize(("pixels", "kept"), [(6, False), (7, True)])
def test_an_image_with_less_than_one_percent_foreground_is_ignored_whole(pixels: int, kept: bool) -> None:
    scores, saliency = torch.zeros(1, 2, 7, 100), torch.zeros(1, 1, 7, 100)
    scores[0, 1, 0, :pixels] = 0.7
    saliency[0, 0, 0, :pixels] = 0.5
    mask = fuse_saliency_labels(scores, saliency)
    expected = torch.zeros(1, 7, 100, dtype=torch.int64)
    expected[0, 0, :pixels] = 1
    assert torch.equal(mask, expected if kept else torch.full_like(mask, 255))


def test_images_of_a_batch_do_not_touch_each_other() -> None:
    scores, saliency = random_case(2, batch=3)
    scores[1] = 0
    both = fuse_saliency_labels(scores, saliency)
    alone = [fuse_saliency_labels(scores[i : i + 1], saliency[i : i + 1]) for i in range(3)]
    assert torch.equal(both, torch.cat(alone))
    assert bool((both[1] == 255).all())


@pytest.mark.parametrize("option", [{"conflict": 2.0}, {"attention": 2.0}, {"salient": 2.0}])
def test_each_rule_can_be_switched_off_and_only_ever_ignores(option: dict[str, float]) -> None:
    scores, saliency = random_case(3, size=(40, 40))
    full, less = fuse_saliency_labels(scores, saliency), fuse_saliency_labels(scores, saliency, **option)
    assert bool(((full == less) | (full == 255)).all())
    assert not torch.equal(full, less)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_precisions(dtype: torch.dtype) -> None:
    scores, saliency = (x.to(dtype) for x in random_case(4))
    wide = fuse_saliency_labels(scores.double(), saliency.double())
    share = (fuse_saliency_labels(scores, saliency) == wide).double().mean()
    assert share == 1 if dtype == torch.float64 else share > 0.95  # 1 - saliency is rounded


def test_fusion_compiles() -> None:
    scores, saliency = random_case(5)
    compiled = torch.compile(fuse_saliency_labels, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(scores, saliency), fuse_saliency_labels(scores, saliency))


SCORES, SALIENCY = random_case(6)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: fuse_saliency_labels(SCORES[0], SALIENCY), ValueError, r"scores: expected shape \(B, 1\+K, H, W\)"),
        (
            lambda: fuse_saliency_labels(SCORES[:, :0], SALIENCY),
            ValueError,
            r"scores: expected the background at channel 0, got no channel",
        ),
        (
            lambda: fuse_saliency_labels(SCORES, SALIENCY[..., 1:]),
            ValueError,
            r"saliency: expected shape \(2, 1, 9, 11\) to match scores, got \(2, 1, 9, 10\)",
        ),
        (lambda: fuse_saliency_labels(SCORES, SALIENCY.byte()), TypeError, r"saliency: expected a floating-point"),
        (lambda: fuse_saliency_labels(SCORES.long(), SALIENCY), TypeError, r"scores: expected a floating-point"),
        (
            lambda: fuse_saliency_labels(SCORES, SALIENCY, keys=torch.arange(4)),
            ValueError,
            r"keys: expected shape \(3,\)",
        ),
        (lambda: fuse_saliency_labels(SCORES, SALIENCY, keys=torch.rand(3)), TypeError, r"keys: expected an integer"),
    ],
    ids=["axes", "no-channel", "size", "saliency-dtype", "scores-dtype", "keys-shape", "keys-dtype"],
)
def test_messages(call, error, message) -> None:
    with pytest.raises(error, match=message):
        call()

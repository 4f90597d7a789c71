from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from tests.modules import reference_refinement
from wsss_modules import (
    cam_pseudo_labels,
    draw_half_of_each_class,
    estimate_prototypes,
    minmax_cam,
    rank_in_class,
)


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def batch(seed: int = 0, images: int = 2, classes: int = 3) -> tuple[Tensor, Tensor]:
    """Features and class maps that are positive everywhere."""
    return random(images, 5, 3, 4, seed=seed), random(images, classes, 3, 4, seed=seed + 100).abs()


def test_map_of_zeros_becomes_minus_one_without_clamp() -> None:
    cam = torch.tensor([[[0.0, 0.0], [0.0, -3.0]], [[1.0, 3.0], [1.0, 2.0]]])
    out = minmax_cam(cam, clamp=False)
    assert torch.equal(out[0], torch.full((2, 2), -1.0))
    torch.testing.assert_close(out[1], torch.tensor([[-0.5, 1.0], [-0.5, 0.5]]), rtol=1e-4, atol=0)  # eps
    above = random(4, 5).abs() + 1e-4
    above[0, 0] = 0
    torch.testing.assert_close(minmax_cam(above, clamp=False).clamp(min=0), minmax_cam(above), rtol=0, atol=0)


@given(st.integers(0, 99), st.integers(1, 24))
def test_prototypes_are_those_of_the_loop(seed: int, k: int) -> None:
    features, cam = batch(seed)
    estimate = estimate_prototypes(features, cam, k)
    torch.testing.assert_close(estimate.prototypes, reference_refinement.prototypes(features, cam, k))
    torch.testing.assert_close(estimate.prototypes.norm(dim=1), torch.ones(4, dtype=torch.float64))
    assert estimate.pixels.shape == (4, k)
    assert estimate.valid.all()
    given = estimate_prototypes(features, cam, k, pixels=estimate.pixels)
    torch.testing.assert_close(given, estimate, rtol=0, atol=0)


@given(st.permutations(range(3)), st.permutations(range(4)))
def test_order_of_images_and_of_classes_is_of_no_account(images: list[int], classes: list[int]) -> None:
    features, cam = batch(images=3, classes=4)
    base = estimate_prototypes(features, cam, 5).prototypes[1:]  # the background's pixels are an arbitrary tie
    moved = estimate_prototypes(features[images], cam[images][:, classes], 5).prototypes[1:]
    torch.testing.assert_close(moved, base[classes])


@given(st.floats(1, 1e4))
def test_scale_of_the_maps_is_of_little_account(scale: float) -> None:
    features, cam = batch()
    base, scaled = (estimate_prototypes(features, x, 5).prototypes for x in (cam, scale * cam))
    torch.testing.assert_close(scaled, base, rtol=0, atol=1e-4)  # eps beside the range of the maps, 2


def test_equal_activations_take_the_first_pixels() -> None:
    features = random(2, 5, 3, 4)
    constant = torch.full((2, 2, 3, 4), 0.7, dtype=torch.float64)
    constant[:, 1] = 0
    estimate = estimate_prototypes(features, constant, 4)
    assert torch.equal(estimate.pixels, torch.arange(4).expand(3, 4))
    mean = features[0].flatten(1)[:, :4].mean(1)
    torch.testing.assert_close(estimate.prototypes, (mean / mean.norm()).expand(3, 5))


def test_activations_that_sum_to_zero_count_equally(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("wsss_modules.pixel_prototypes.minmax_cam", lambda cam, **_: cam)
    features, cam = torch.eye(2).view(1, 2, 1, 2), torch.tensor([[[[-0.5, 0.5]]]])
    half = torch.full((2,), 0.5).sqrt()
    torch.testing.assert_close(estimate_prototypes(features, cam, 2).prototypes, half.expand(2, 2))


def test_labels_keep_a_class_to_its_images() -> None:
    features, cam = batch(images=2)
    labels = torch.tensor([[1, 0, 0], [0, 1, 0]])
    estimate = estimate_prototypes(features, cam, 5, labels=labels, background="low_foreground")
    assert estimate.valid.tolist() == [True, True, True, False]
    assert not estimate.prototypes[3].any()
    alone = estimate_prototypes(features[:1], cam[:1], 5)
    torch.testing.assert_close(estimate.prototypes[1], alone.prototypes[1])
    assert bool((estimate.pixels[1] < 12).all())
    assert bool((estimate.pixels[2] >= 12).all())
    weakest = minmax_cam(cam, clamp=False)[[0, 1], [0, 1]].flatten().argsort()[:5]
    activation = minmax_cam(cam, clamp=False)[[0, 1], [0, 1]].clamp(0, 1).flatten()
    torch.testing.assert_close(activation[estimate.pixels[0]].sort().values, activation[weakest].sort().values)


def test_more_pixels_than_there_are_takes_all() -> None:
    features, cam = batch(images=1)
    assert estimate_prototypes(features, cam, 99).pixels.shape == (4, 12)
    labels = torch.tensor([[1, 0, 1], [0, 1, 0]])
    features, cam = batch(images=2)
    of_one_image = estimate_prototypes(features, cam, 20, labels=labels)  # 8 of the 20 are of the other image
    alone = estimate_prototypes(features[:1], cam[:1], 12)
    torch.testing.assert_close(of_one_image.prototypes[1], alone.prototypes[1])


def test_no_class_at_all_leaves_the_background() -> None:
    for background in ("constant", "low_foreground"):
        estimate = estimate_prototypes(random(1, 5, 3, 4), random(1, 0, 3, 4), 2, background=background)
        assert estimate.prototypes.shape == (1, 5)


def test_features_of_zeros_give_a_prototype_of_zeros() -> None:
    _, cam = batch()
    assert not estimate_prototypes(torch.zeros(2, 5, 3, 4), cam, 3).prototypes.any()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_the_rounded_float64_result(dtype: torch.dtype) -> None:
    features, cam = (x.to(dtype) for x in batch())
    ours = estimate_prototypes(features, cam, 4).prototypes
    assert ours.dtype == dtype
    exact = estimate_prototypes(features.double(), cam.double(), 4).prototypes
    torch.testing.assert_close(ours.double(), exact, rtol=0, atol=torch.finfo(dtype).eps)


def test_estimate_and_ranks_compile_to_one_graph() -> None:
    features, cam = batch()
    labels = torch.tensor([[1, 0, 1], [0, 1, 0]])

    def step(f: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
        mask = cam_pseudo_labels(c, labels)
        return estimate_prototypes(f, c, 4).prototypes, draw_half_of_each_class(mask, 4, lots=c[:, 0])

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(features, cam), step(features, cam))


@given(st.integers(0, 99), st.floats(0.05, 0.9))
def test_pseudo_labels_are_the_released_softmax_of_label_times_map(seed: int, background: float) -> None:
    _, cam = batch(seed)
    labels = torch.tensor([[1, 0, 1], [0, 0, 0]])
    scores = torch.cat([torch.full((2, 1, 3, 4), background), reference_refinement.stretched(cam)], 1)
    everywhere = torch.cat([torch.ones(2, 1), labels], 1)[:, :, None, None]
    assert torch.equal(cam_pseudo_labels(cam, labels, background), (scores * everywhere).softmax(1).argmax(1))


def test_absent_classes_and_maps_of_zeros_never_label() -> None:
    cam = random(1, 2, 3, 4).abs()
    assert not cam_pseudo_labels(cam, torch.zeros(1, 2)).any()
    assert not cam_pseudo_labels(torch.zeros_like(cam), torch.ones(1, 2)).any()
    assert set(cam_pseudo_labels(cam, torch.tensor([[0, 1]])).unique().tolist()) == {0, 2}


@given(st.integers(0, 99), st.integers(1, 30))
def test_ranks_count_the_smaller_ones_of_the_class(seed: int, pixels: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    classes = torch.randint(0, 4, (pixels,), generator=generator)
    values = torch.randint(0, 5, (pixels,), generator=generator).double()
    rank, count = rank_in_class(classes, values, 4)
    for i in range(pixels):
        mine = [j for j in range(pixels) if classes[j] == classes[i]]
        assert count[i] == len(mine)
        assert rank[i] == sum((values[j], j) < (values[i], i) for j in mine)


@given(st.integers(0, 99))
def test_half_of_each_class_is_drawn_anew_by_each_generator(seed: int) -> None:
    classes = torch.randint(0, 3, (2, 6, 7), generator=torch.Generator().manual_seed(seed))
    drawn = [draw_half_of_each_class(classes, 4, generator=torch.Generator().manual_seed(s)) for s in (0, 0, 1)]
    for c in range(4):
        assert drawn[0][classes == c].sum() == (classes == c).sum() // 2
    assert torch.equal(drawn[0], drawn[1])
    assert not torch.equal(drawn[0], drawn[2])


FEATURES, CAM = (x.float() for x in batch())


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: estimate_prototypes(FEATURES, CAM, 0), ValueError, "k: expected at least 1, got 0"),
        (
            lambda: estimate_prototypes(FEATURES, CAM, 1, background="none"),
            ValueError,
            'background: expected "constant" or "low_foreground", got \'none\'',
        ),
        (
            lambda: estimate_prototypes(FEATURES[:1], CAM, 1),
            ValueError,
            r"features: expected shape \(2, \*, 3, 4\) to match cam, got \(1, 5, 3, 4\)",
        ),
        (lambda: estimate_prototypes(FEATURES, CAM.long(), 1), TypeError, "cam: expected a floating-point tensor"),
        (lambda: estimate_prototypes(FEATURES.long(), CAM, 1), TypeError, "features: expected a floating-point"),
        (
            lambda: estimate_prototypes(FEATURES, CAM, 1, labels=torch.ones(2, 4)),
            ValueError,
            r"labels: expected shape \(2, 3\) to match cam, got \(2, 4\)",
        ),
        (
            lambda: estimate_prototypes(FEATURES, CAM, 1, pixels=torch.zeros(3, 1, dtype=torch.int64)),
            ValueError,
            r"pixels: expected shape \(4, \*\) for classes and background, got \(3, 1\)",
        ),
        (
            lambda: estimate_prototypes(FEATURES, CAM, 1, pixels=torch.zeros(4, 1)),
            TypeError,
            "pixels: expected an integer tensor",
        ),
        (lambda: cam_pseudo_labels(CAM[0], torch.ones(3)), ValueError, r"cam: expected shape \(B, K, H, W\)"),
        (
            lambda: rank_in_class(torch.zeros(3, dtype=torch.int64), torch.zeros(4), 2),
            ValueError,
            r"values: expected shape \(3,\) to match classes, got \(4,\)",
        ),
        (
            lambda: draw_half_of_each_class(torch.zeros(1, 2, 2, dtype=torch.int64), 2, lots=torch.zeros(1, 2, 3)),
            ValueError,
            r"lots: expected shape \(1, 2, 2\) to match classes, got \(1, 2, 3\)",
        ),
        (lambda: draw_half_of_each_class(torch.zeros(1, 2, 2), 2), TypeError, "classes: expected an integer tensor"),
    ],
)
def test_messages(call: Callable[[], object], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call()

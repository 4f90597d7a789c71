"""Boxes, cutting, reading and targets of L2G's crops."""

import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.autograd import gradcheck
from torch.nn import functional as F

from tests.modules import reference_l2g
from wsss_modules import corner_and_random_boxes, crop_align, cut_crops, local_attention_target, random_boxes


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=seeded(seed), dtype=torch.float64)


@given(st.integers(0, 99), st.integers(5, 20), st.integers(5, 20), st.integers(1, 5), st.integers(1, 5))
def test_boxes_are_of_one_size_and_stay_inside(seed: int, height: int, width: int, h: int, w: int) -> None:
    for draw, number in ((random_boxes, 3), (corner_and_random_boxes, 6)):
        boxes = draw((height, width), (h, w), number, images=2, generator=seeded(seed))
        assert boxes.dtype == torch.int64
        assert boxes[:, 0].tolist() == [0] * number + [1] * number
        assert bool((boxes[:, 3] - boxes[:, 1] == w).all())
        assert bool((boxes[:, 4] - boxes[:, 2] == h).all())
        assert bool((boxes[:, 1:] >= 0).all())
        assert int(boxes[:, 3].max()) <= width
        assert int(boxes[:, 4].max()) <= height


def test_corners_cover_the_four_corners_and_further_boxes_are_drawn() -> None:
    boxes = corner_and_random_boxes((9, 12), (4, 5), 6, images=2, generator=seeded(0)).view(2, 6, 5)
    corners = [[0, 0, 5, 4], [7, 0, 12, 4], [0, 5, 5, 9], [7, 5, 12, 9]]
    assert boxes[:, :4, 1:].tolist() == [corners, corners]
    assert not torch.equal(boxes[0, 4:, 1:], boxes[1, 4:, 1:])
    assert corner_and_random_boxes((9, 12), 4, 6, images=0).shape == (0, 5)


def test_draws_repeat_with_their_generator_and_can_be_given() -> None:
    first, again, other = (random_boxes((50, 60), 20, 4, images=2, generator=seeded(s)) for s in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    given_ = random_boxes((50, 60), 20, 4, images=2, offsets=first[:, 1:3].view(2, 4, 2))
    assert torch.equal(given_, first)
    with_corners = corner_and_random_boxes((50, 60), 20, 8, images=2, offsets=first[:, 1:3].view(2, 4, 2))
    assert torch.equal(with_corners.view(2, 8, 5)[:, 4:], first.view(2, 4, 5))


def test_every_place_is_drawn_and_the_last_one_is_not_in_the_released_way() -> None:
    seen = random_boxes((7, 6), 4, 200, generator=seeded(0))
    assert set(seen[:, 1].tolist()) == {0, 1, 2}
    assert set(seen[:, 2].tolist()) == {0, 1, 2, 3}
    released = random_boxes((7, 6), 4, 200, generator=seeded(0), legacy_end=True)
    assert set(released[:, 1].tolist()) == {0, 1}
    assert set(released[:, 2].tolist()) == {0, 1, 2}
    assert random_boxes((4, 4), 4, 2, legacy_end=True)[:, 1:].tolist() == [[0, 0, 4, 4]] * 2


def test_released_view_of_an_oblong_image_runs_over_its_lower_edge_and_misses_its_right() -> None:
    boxes = random_boxes((512, 683), 448, 4000, generator=seeded(0), legacy_crop=True)
    assert int(boxes[:, 3].max()) == 512  # of 683
    assert int(boxes[:, 4].max()) == 683  # of 512: by up to 171
    assert 0.70 < (boxes[:, 4] > 512).double().mean() < 0.75
    straight = random_boxes((512, 683), 448, 4000, generator=seeded(0))
    assert [int(straight[:, i].max()) for i in (3, 4)] == [683, 512]
    square = [random_boxes((500, 500), 448, 5, generator=seeded(0), legacy_crop=legacy) for legacy in (False, True)]
    assert torch.equal(*square)


@given(st.integers(0, 99))
def test_cut_is_a_slice_and_zero_outside(seed: int) -> None:
    images, size = random(2, 3, 6, 8, seed=seed), (4, 3)
    x, y = (torch.randint(-5, 9, (5,), generator=seeded(seed + i)) for i in (0, 1))
    boxes = torch.stack([torch.tensor([0, 1, 0, 1, 1]), x, y, x + 3, y + 4], 1)
    crops = cut_crops(images, boxes, size)
    padded = F.pad(images, (9, 14, 9, 14))
    for crop, (index, x1, y1, x2, y2) in zip(crops, boxes.tolist(), strict=True):
        assert torch.equal(crop, padded[index, :, y1 + 9 : y2 + 9, x1 + 9 : x2 + 9])
    whole = (images * 9).long()
    assert torch.equal(cut_crops(whole, boxes, size), cut_crops(whole.double(), boxes, size).long())
    assert cut_crops(images, boxes[:0], size).shape == (0, 3, 4, 3)
    assert not cut_crops(images[..., :0], boxes, size).any()


SIZES = st.integers(1, 4)


@given(st.integers(0, 99), SIZES, SIZES, st.sampled_from([1.0, 4.0, 8.0]), st.booleans())
def test_reading_is_that_of_all_points_one_by_one(seed: int, h: int, w: int, stride: float, aligned: bool) -> None:
    features = random(2, 2, 4, 5, seed=seed).requires_grad_()
    draw = torch.rand(3, 4, generator=seeded(seed), dtype=torch.float64)
    x1, y1 = (draw[:, :2] * torch.tensor([6.0, 5.0]) - 1).unbind(1)  # partly outside
    lengths = draw[:, 2:] * torch.tensor([5.0, 4.0])
    boxes = torch.stack([torch.tensor([0.0, 1.0, 1.0]), x1, y1, x1 + lengths[:, 0], y1 + lengths[:, 1]], 1)
    boxes[:, 1:] *= stride
    ours = crop_align(features, boxes, (h, w), stride=stride, aligned=aligned)
    theirs = reference_l2g.roi_align(features, boxes, (h, w), stride, aligned)
    torch.testing.assert_close(ours, theirs)
    direction = random(*ours.shape, seed=seed + 1)
    grads = [torch.autograd.grad((x * direction).sum(), features)[0] for x in (ours, theirs)]
    torch.testing.assert_close(*grads)


@pytest.mark.parametrize("stride", [6.0, 14.0])
def test_bins_of_one_cell_have_one_point_at_any_stride_and_place(stride: float) -> None:
    features, first = torch.randn(1, 1, 1, 40, generator=seeded(0)), torch.arange(200)
    first = first[first + 16 * stride <= 40 * stride]
    boxes = torch.stack([first * 0, first, first * 0, first + 16 * stride, first * 0 + stride], 1)
    place = (first[:, None].double() / stride + torch.arange(16) + 0.5).clamp(max=39)  # (n, 16)
    left, row = place.floor().long(), features.double().flatten()
    between = torch.lerp(row[left], row[(left + 1).clamp(max=39)], place - left)
    read = crop_align(features, boxes, (1, 16), stride=stride)[:, 0, 0]
    torch.testing.assert_close(read.double(), between, rtol=0, atol=2e-5)  # 8e-6 measured, places being float32


@pytest.mark.peer
@pytest.mark.parametrize("aligned", [False, True])
@pytest.mark.parametrize("crop", [40, 44, 27, 17], ids=lambda crop: f"crop{crop}")
def test_reading_is_torchvisions(crop: int, aligned: bool) -> None:
    ops = pytest.importorskip("torchvision.ops")
    features = random(2, 3, 8, 9).float()
    boxes = random_boxes((64, 72), crop, 5, images=2, generator=seeded(0))
    for size in ((5, 5), (2, 3), (1, 1)):
        theirs = ops.roi_align(features, boxes.float(), size, spatial_scale=1 / 8, aligned=aligned)
        torch.testing.assert_close(crop_align(features, boxes, size, aligned=aligned), theirs)


def test_box_of_the_whole_image_is_read_as_it_is_when_aligned() -> None:
    features = random(2, 3, 5, 6)
    boxes = torch.tensor([[0, 0, 0, 48, 40], [1, 0, 0, 48, 40]])
    torch.testing.assert_close(crop_align(features, boxes, (5, 6), aligned=True), features)
    # as released, cells are the mean of 2 x 2, and the last row and column are repeated
    padded = F.pad(features, (0, 1, 0, 1), mode="replicate")
    torch.testing.assert_close(crop_align(features, boxes, (5, 6)), F.avg_pool2d(padded, 2, stride=1))


@given(st.integers(0, 99), st.booleans())
def test_a_step_of_one_cell_shifts_what_is_read(seed: int, aligned: bool) -> None:
    features = random(1, 2, 9, 9, seed=seed)
    box = torch.tensor([[0, 8, 8, 40, 40]])
    here, further = (
        crop_align(features, box + torch.tensor([0, *step]), 4, aligned=aligned)
        for step in ([0, 0, 0, 0], [8, 16, 8, 16])
    )
    torch.testing.assert_close(further[..., :2, :3], here[..., 2:, 1:])


def test_reading_gradcheck() -> None:
    boxes = torch.tensor([[0, 3, 1, 20, 17], [1, 0, 0, 24, 32], [0, -4, -9, 10, 9]])
    features = random(2, 2, 4, 3).requires_grad_()
    assert gradcheck(lambda x: crop_align(x, boxes, (2, 3)), features)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_reading_in_half_precision_is_the_rounded_float64_result(dtype: torch.dtype) -> None:
    features, boxes = random(2, 3, 8, 8).to(dtype), random_boxes((64, 64), 43, 3, images=2, generator=seeded(0))
    read = crop_align(features, boxes, 5)
    assert read.dtype == dtype
    exact = crop_align(features.double(), boxes, 5)
    # the boxes are divided in float32: measured 6e-7 beside the rounding
    torch.testing.assert_close(read.double(), exact, rtol=torch.finfo(dtype).eps, atol=1e-5)


def test_reading_and_cutting_compile_to_one_graph() -> None:
    features, boxes = random(2, 3, 8, 8), random_boxes((64, 64), 43, 3, images=2, generator=seeded(0))

    def step(x: Tensor, boxes: Tensor) -> tuple[Tensor, Tensor]:
        return crop_align(x, boxes, 5), cut_crops(x, boxes // 8, 4)

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(features, boxes), step(features, boxes))


def test_no_box_and_a_single_cell_are_read() -> None:
    features = random(1, 2, 1, 1).requires_grad_()
    assert crop_align(features, torch.zeros(0, 5), 3).shape == (0, 2, 3, 3)
    read = crop_align(features, torch.tensor([[0, 0, 0, 8, 8]]), 2)
    torch.testing.assert_close(read, features.expand(1, 2, 2, 2))


def crops(seed: int, n: int = 3, classes: int = 3) -> tuple[Tensor, Tensor, Tensor]:
    """Maps of crops, labels and saliency without ties."""
    labels = torch.randint(0, 2, (n, classes), generator=seeded(seed))
    saliency = torch.rand(n, 1, 8, 10, generator=seeded(seed + 1), dtype=torch.float64)
    return random(n, 1 + classes, 4, 5, seed=seed), labels, saliency


OPTIONS = [
    *(("binary", "zero", 1e-3), ("value", "zero", 0.1), ("binary", "attention", 0.3), ("value", "attention", 0.6)),
]


@given(st.integers(0, 99), st.sampled_from(OPTIONS))
def test_target_is_that_of_all_pixels_one_by_one(seed: int, options: tuple[str, str, float]) -> None:
    background, empty, threshold = options
    scores, labels, saliency = crops(seed)
    saliency[0] = 0
    ours = local_attention_target(
        scores, labels, saliency, threshold=threshold, background=background, empty_saliency=empty
    )
    theirs = reference_l2g.target_by_loops(scores, labels, saliency, threshold, background, empty)
    torch.testing.assert_close(ours, theirs)


@given(st.integers(0, 99), st.integers(1, 2), st.integers(1, 4), st.sampled_from(OPTIONS))
def test_target_of_few_crops_and_classes(seed: int, n: int, classes: int, options: tuple[str, str, float]) -> None:
    background, empty, threshold = options
    scores, labels, saliency = crops(seed, n, classes)
    theirs = reference_l2g.target_by_loops(scores, labels, saliency, threshold, background, empty)
    for layout in (scores, scores.contiguous(memory_format=torch.channels_last)):
        ours = local_attention_target(
            layout, labels, saliency, threshold=threshold, background=background, empty_saliency=empty
        )
        torch.testing.assert_close(ours, theirs)


@given(st.integers(0, 99))
def test_target_without_saliency_is_the_winners_attention(seed: int) -> None:
    scores, labels, _ = crops(seed)
    theirs = reference_l2g.target_by_loops(scores, labels, None, 0.0, "binary", "zero")
    torch.testing.assert_close(local_attention_target(scores, labels), theirs)


@given(st.integers(0, 99))
def test_target_equals_the_sort_and_the_one_hot_matrix(seed: int) -> None:
    scores, labels, saliency = crops(seed)
    small = F.interpolate(saliency, scores.shape[2:])
    theirs = reference_l2g.target_by_sort(scores, labels, small)
    torch.testing.assert_close(local_attention_target(scores, labels, saliency), theirs)


@given(st.integers(0, 99), st.sampled_from(["binary", "value"]), st.booleans())
def test_target_has_at_most_one_channel_of_the_present_ones(seed: int, background: str, with_saliency: bool) -> None:
    scores, labels, saliency = crops(seed)
    target = local_attention_target(
        scores.requires_grad_(), labels, saliency if with_saliency else None, background=background
    )
    assert not target.requires_grad
    assert bool(((target >= 0) & (target <= 1)).all())
    assert bool(((target > 0).sum(1) <= 1).all())
    assert not target[:, 1:][labels == 0].any()


@given(st.integers(0, 99), st.floats(0.1, 50), st.integers(0, 3))
def test_scale_of_a_channel_is_of_no_account(seed: int, scale: float, channel: int) -> None:
    scores, labels, saliency = crops(seed)
    scaled = scores.clone()
    scaled[:, channel] *= scale
    # eps would break the ties of classes with their maximum at the same pixel
    targets = [local_attention_target(x, labels, saliency, background="value", eps=0.0) for x in (scores, scaled)]
    torch.testing.assert_close(*targets)


def test_full_saliency_leaves_no_background_and_none_only_background() -> None:
    scores, labels, saliency = crops(0)
    full, empty = (local_attention_target(scores, labels, torch.full_like(saliency, s)) for s in (1, 0))
    assert not full[:, 0].any()
    assert set(full.unique().tolist()) == {0, 1}
    assert not empty[:, 1:].any()
    assert set(empty[:, 0].unique().tolist()) == {0, 1}


def test_ties_go_to_the_first_class_and_not_to_the_background() -> None:
    scores = torch.tensor([[[[3.0, 1.0]], [[2.0, 0.0]], [[5.0, 0.0]]]])
    target = local_attention_target(scores, torch.tensor([[1, 1]]))
    torch.testing.assert_close(target[0, :, 0, 0], torch.tensor([0.0, 1.0, 0.0]))
    torch.testing.assert_close(target[0, :, 0, 1], torch.tensor([1 / 3, 0.0, 0.0]))


@pytest.mark.parametrize("with_saliency", [False, True])
def test_maps_without_a_positive_value_teach_nothing(with_saliency: bool) -> None:
    scores, labels, saliency = crops(0)
    target = local_attention_target(-scores.abs() - 1, labels, saliency if with_saliency else None)
    assert not target.any()
    assert local_attention_target(scores[:0], labels[:0], saliency[:0]).shape == (0, 4, 4, 5)


@pytest.mark.parametrize("wrong", [math.nan, math.inf])
@pytest.mark.parametrize("form", ["eager", "one graph"])
@pytest.mark.parametrize("with_saliency", [False, True])
def test_a_broken_map_breaks_its_own_channel_of_its_crop_and_no_other(
    with_saliency: bool, form: str, wrong: float
) -> None:
    scores, _, saliency = crops(0)
    labels = torch.tensor([[1, 1, 0], [1, 0, 0], [1, 1, 0]])
    broken = scores.clone()
    broken[0, 2, 1, 3] = wrong  # present
    broken[1, 2, 2, 2] = wrong  # absent, read on a CPU all the same: other crops have a class more
    broken[:, 3, 0, 0] = wrong  # absent everywhere
    broken[2, 0, 0, 0] = wrong  # background
    options = {"saliency": saliency, "background": "value", "empty_saliency": "attention"} if with_saliency else {}
    function = local_attention_target
    if form == "one graph":
        function = torch.compile(local_attention_target, fullgraph=True, backend="aot_eager")
    target = function(broken, labels, **options)
    assert target[0, 2].isnan().all()
    assert target[2, 0].isnan().all()
    without = scores.clone()
    without[0, 2] = without[2, 0] = -1.0  # teach nothing
    expected = local_attention_target(without, labels, **options)
    expected[0, 2] = expected[2, 0] = math.nan
    torch.testing.assert_close(target, expected, equal_nan=True)


def test_target_in_half_precision_and_in_one_graph() -> None:
    scores, labels, saliency = crops(0)
    half = local_attention_target(scores.half(), labels, saliency.half(), background="value")
    assert half.dtype == torch.float16
    exact = local_attention_target(scores.half().double(), labels, saliency.half().double(), background="value")
    torch.testing.assert_close(half.double(), exact, rtol=2**-10, atol=2**-20)
    compiled = torch.compile(local_attention_target, fullgraph=True, backend="aot_eager")
    tied = torch.ones_like(scores)  # all classes are read there, in another order
    torch.testing.assert_close(compiled(tied, labels), local_attention_target(tied, labels))
    torch.testing.assert_close(
        compiled(scores, labels, saliency, empty_saliency="attention"),
        local_attention_target(scores, labels, saliency, empty_saliency="attention"),
    )


MAPS, BOXES, LABELS = torch.rand(2, 3, 4, 5), torch.tensor([[0, 0, 0, 8, 8], [1, 8, 8, 16, 16]]), torch.ones(2, 2)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: random_boxes((8, 9), 9, 1), ValueError, r"crop: expected 1 x 1 pixels up to size \(8, 9\), got"),
        (lambda: random_boxes((8, 9), 0, 1), ValueError, r"crop: expected 1 x 1 pixels up to .* got \(0, 0\)"),
        (lambda: random_boxes((8, 9), 4, -1), ValueError, r"number, images: expected at least 0, got -1 and 1"),
        (
            lambda: random_boxes((8, 9), 4, 1, offsets=torch.tensor([[[5, 5]]])),
            ValueError,
            r"offsets: expected x in 0..5 and y in 0..4, got others",
        ),
        (
            lambda: random_boxes((8, 9), 4, 2, offsets=torch.tensor([[[5, 5]]])),
            ValueError,
            r"offsets: expected shape \(1, 2, 2\) of x and y, got \(1, 1, 2\)",
        ),
        (lambda: random_boxes((8, 9), 4, 1, offsets=torch.rand(1, 1, 2)), TypeError, "offsets: expected an integer"),
        (
            lambda: corner_and_random_boxes((8, 9), 4, 3),
            ValueError,
            r"number: expected at least the four corners, got 3",
        ),
        (lambda: cut_crops(MAPS[0], BOXES, 2), ValueError, r"images: expected shape \(B, C, H, W\), got \(3, 4, 5\)"),
        (lambda: cut_crops(MAPS, BOXES[:, 1:], 2), ValueError, r"boxes: expected shape \(\*, 5\) of image, x1, y1"),
        (lambda: cut_crops(MAPS, BOXES.float(), 2), TypeError, "boxes: expected an integer tensor"),
        (lambda: crop_align(MAPS.long(), BOXES, 2), TypeError, "features: expected a floating-point tensor"),
        (lambda: crop_align(MAPS, BOXES[0], 2), ValueError, r"boxes: expected shape \(\*, 5\) of image, x1, y1, x2"),
        (
            lambda: crop_align(MAPS, BOXES, 0),
            ValueError,
            r"out_size, stride: expected positive numbers, got 0 and 8",
        ),
        (lambda: crop_align(MAPS[..., :0], BOXES, 2), ValueError, r"features: expected at least one cell, got shape"),
        (lambda: local_attention_target(MAPS[0], LABELS), ValueError, r"scores: expected shape \(n, 1\+K, h, w\), got"),
        (lambda: local_attention_target(MAPS.long(), LABELS), TypeError, "scores: expected a floating-point tensor"),
        (
            lambda: local_attention_target(MAPS[:, :1], LABELS[:, :0]),
            ValueError,
            r"scores: expected the background and at least one class, got shape \(2, 1, 4, 5\)",
        ),
        (
            lambda: local_attention_target(MAPS, LABELS[:1]),
            ValueError,
            r"labels: expected shape \(2, 2\) to match scores, got \(1, 2\)",
        ),
        (
            lambda: local_attention_target(MAPS, LABELS, MAPS),
            ValueError,
            r"saliency: expected shape \(2, 1, \*, \*\) to match the class maps, got",
        ),
        (
            lambda: local_attention_target(MAPS, LABELS, threshold=-1),
            ValueError,
            "threshold: expected at least 0, got -1",
        ),
        (
            lambda: local_attention_target(MAPS, LABELS, background="soft"),
            ValueError,
            r'background: expected "binary" or "value", got \'soft\'',
        ),
        (
            lambda: local_attention_target(MAPS, LABELS, empty_saliency="one"),
            ValueError,
            r'empty_saliency: expected "zero" or "attention", got \'one\'',
        ),
    ],
)
def test_messages(call: Callable[[], object], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call()

"""BANA's pooling: boxes without their background."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.autograd import gradcheck

from tests.modules.reference_bana import looped_bap, looped_pool, looped_prototypes
from wsss_modules import (
    BackgroundAwarePooling,
    BoxClassifier,
    background_attention,
    background_aware_pooling,
    background_mask_from_boxes,
    background_prototypes,
    pad_to_grid,
    weighted_roi_avg_pool,
)

BOXES = torch.tensor([[1, 10, 4, 30, 20], [0, 2, 2, 21, 30], [1, 0, 0, 8, 9], [0, 16, 16, 40, 32]])
CLASSES = torch.tensor([3, 1, 2, 2])
SIZE = (32, 40)


def case(seed: int = 0, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor]:
    features = torch.rand(2, 5, 8, 10, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return features.to(dtype), BOXES, background_mask_from_boxes(BOXES, 2, SIZE)


@given(st.integers(1, 9), st.integers(1, 9), st.integers(1, 4))
def test_padding_ends_in_whole_cells_and_keeps_the_content(height: int, width: int, grid: int) -> None:
    x = torch.rand(2, 3, height, width, dtype=torch.float64)
    out = pad_to_grid(x, grid)
    assert out.shape[2] % grid == out.shape[3] % grid == 0
    assert max(out.shape[2] - height, out.shape[3] - width) < grid
    torch.testing.assert_close(out.sum(), x.sum())
    assert torch.equal(out[out != 0], x.flatten())


@given(st.integers(0, 99), st.integers(1, 4), st.sampled_from([(6, 8), (7, 5), (3, 3)]))
def test_prototypes_equal_the_loop_over_cells(seed: int, grid: int, size: tuple[int, int]) -> None:
    generator = torch.Generator().manual_seed(seed)
    features = torch.randn(2, 4, *size, generator=generator, dtype=torch.float64)
    mask = (torch.rand(2, 1, 2 * size[0] + 1, 3 * size[1], generator=generator) > 0.5).double()
    found = background_prototypes(features, mask, grid)
    prototypes, count = looped_prototypes(features, mask, grid)
    torch.testing.assert_close(found.prototypes, prototypes)
    assert torch.equal(found.cells, count)


@given(st.integers(1, 7), st.integers(1, 7), st.sampled_from([(1, 1), (2, 2), (2, 3), (4, 1)]))
def test_pooling_equals_the_loop_over_windows(height: int, width: int, output: tuple[int, int]) -> None:
    generator = torch.Generator().manual_seed(height * 10 + width)
    x = torch.randn(1, 3, height, width, generator=generator, dtype=torch.float64)
    weight = torch.rand(1, 1, height, width, generator=generator, dtype=torch.float64)
    pooled = weighted_roi_avg_pool(x, weight, output)
    torch.testing.assert_close(pooled[0], looped_pool(x[0], weight[0, 0], output))
    assert (pooled >= x.amin((2, 3), keepdim=True) - 1e-9).all()
    assert (pooled <= x.amax((2, 3), keepdim=True) + 1e-9).all()
    torch.testing.assert_close(weighted_roi_avg_pool(x, 7.5 * weight, output), pooled)
    even = weighted_roi_avg_pool(x, torch.full_like(weight, 0.3), output)
    torch.testing.assert_close(even[0], looped_pool(x[0], torch.ones(height, width).double(), output))


def test_a_window_without_weight_is_zero_and_finite() -> None:
    x = torch.rand(1, 2, 4, 4, requires_grad=True)
    pooled = weighted_roi_avg_pool(x, torch.zeros(1, 1, 4, 4))
    assert not pooled.any()
    assert torch.autograd.grad(pooled.sum(), x)[0].isfinite().all()


@given(st.integers(0, 99), st.integers(1, 4))
def test_pooled_boxes_equal_the_loop_over_boxes(seed: int, grid: int) -> None:
    features, boxes, mask = case(seed)
    out = background_aware_pooling(features, boxes, mask, grid=grid)
    torch.testing.assert_close(out.pooled, looped_bap(features, boxes, mask.double(), grid))


@given(st.permutations(range(4)))
def test_order_of_boxes_is_kept(order: list[int]) -> None:
    features, boxes, mask = case()
    classifier = BoxClassifier(5, 3).double()
    out = classifier(features, boxes, CLASSES, mask)
    moved = classifier(features, boxes[order], CLASSES[order], mask)
    torch.testing.assert_close(moved.pooled, out.pooled[order])
    rows = torch.arange(16).view(4, 4)[order].flatten()
    torch.testing.assert_close(moved.logits[:16], out.logits[rows])
    assert torch.equal(moved.target[:16], out.target[rows])
    assert torch.equal(out.target[16:], torch.zeros(int((out.cells > 0).sum()), dtype=torch.int64))


@given(st.integers(0, 99), st.floats(0.1, 9))
def test_attention_is_a_share_that_lengths_do_not_change(seed: int, factor: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    features = torch.randn(4, 3, 5, generator=generator, dtype=torch.float64)
    queries = torch.randn(6, 4, generator=generator, dtype=torch.float64)
    valid = torch.rand(6, generator=generator) > 0.4
    attention = background_attention(features, queries, valid)
    assert attention.min() >= 0
    assert attention.max() <= 1
    torch.testing.assert_close(background_attention(features, factor * queries, valid), attention)
    torch.testing.assert_close(background_attention(factor * features, queries, valid), attention)
    changed = torch.where(valid[:, None], queries, 9.0)
    torch.testing.assert_close(background_attention(features, changed, valid), attention)


@pytest.mark.parametrize(("share", "plain"), [(0.0, True), (0.125, True), (0.1875, False)])
def test_little_background_means_plain_pooling(share: float, plain: bool) -> None:
    features = torch.rand(1, 3, 4, 4, dtype=torch.float64)
    boxes, mask = torch.tensor([[0, 2, 2, 14, 14]]), torch.zeros(1, 1, 16, 16)
    mask[..., : round(16 * share), :] = 1
    out = background_aware_pooling(features, boxes, mask, grid=1)
    even = background_aware_pooling(features, boxes, mask, grid=1, use_background=torch.tensor([False]))
    assert torch.equal(out.pooled, even.pooled) == plain


def test_an_image_without_background_is_pooled_plainly_even_when_asked_for_attention() -> None:
    features, boxes, mask = case()
    nowhere = torch.zeros_like(mask)
    forced = background_aware_pooling(features, boxes, nowhere, use_background=torch.ones(2))
    torch.testing.assert_close(forced, background_aware_pooling(features, boxes, nowhere))
    assert forced.pooled.isfinite().all()


@given(st.integers(0, 99))
def test_pooled_boxes_stay_among_the_features_where_a_box_looks_like_the_background(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    direction, length = torch.rand(1, 16, 1, 1, generator=generator), torch.rand(1, 1, 8, 8, generator=generator)
    features, boxes = direction * (0.5 + length), torch.tensor([[0, 40, 40, 100, 100]])
    mask = background_mask_from_boxes(boxes, 1, (128, 128))
    pooled = background_aware_pooling(features, boxes, mask).pooled
    assert (pooled >= 0).all()
    assert (pooled <= 1.0001 * features.amax((2, 3), keepdim=True)).all()


def test_no_boxes_and_boxes_without_area_do_not_fail() -> None:
    features, _, mask = case()
    features.requires_grad_()
    classifier = BoxClassifier(5, 3).double()
    out = classifier(features, torch.zeros(0, 5), torch.zeros(0, dtype=torch.int64), mask)
    assert out.pooled.shape == (0, 5, 2, 2)
    torch.nn.functional.cross_entropy(out.logits, out.target).backward()
    thin = background_aware_pooling(features, torch.tensor([[0, 5, 5, 5, 9], [1, 7, 7, 7, 7]]), mask)
    assert thin.pooled.isfinite().all()


def test_aligned_corners_read_the_features_where_the_box_lies() -> None:
    """A map that is its own column number, pooled in two windows of an even box."""
    features = torch.arange(9.0).expand(1, 1, 9, 9)
    boxes, mask = torch.tensor([[0, 0, 0, 8, 8]]), torch.zeros(1, 1, 9, 9)
    out = background_aware_pooling(features, boxes, mask, output_size=(1, 1), align_corners=True)
    torch.testing.assert_close(out.pooled.flatten(), torch.tensor([4.0]))
    released = background_aware_pooling(features, boxes, mask, output_size=(1, 1))
    assert released.pooled.item() < 4, "zeros from outside blend in"


def test_with_aligned_corners_no_zeros_blend_in_at_the_border() -> None:
    features, boxes = torch.ones(1, 1, 9, 9), torch.tensor([[0, 0, 0, 33, 33], [0, 20, 20, 33, 33]])
    mask = torch.zeros(1, 1, 33, 33)
    aligned = background_aware_pooling(features, boxes, mask, align_corners=True).pooled
    torch.testing.assert_close(aligned, torch.ones(2, 1, 2, 2))
    assert (background_aware_pooling(features, boxes, mask).pooled.amin((1, 2, 3)) < 0.99).all()


def test_gradients_reach_features_through_queries_too() -> None:
    features, boxes, mask = case()

    def pooled(x: Tensor) -> Tensor:
        return background_aware_pooling(x, boxes, mask, grid=2).pooled

    assert gradcheck(pooled, features[:, :2].clone().requires_grad_())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_computed_in_float32(dtype: torch.dtype) -> None:
    features, boxes, mask = case(dtype=dtype)
    out = background_aware_pooling(features, boxes, mask)
    exact = background_aware_pooling(features.float(), boxes, mask)
    assert out.pooled.dtype == dtype
    assert torch.equal(out.pooled, exact.pooled.to(dtype)) or torch.allclose(
        out.pooled.float(), exact.pooled, rtol=2 * torch.finfo(dtype).eps
    )


def test_background_inside_a_box_counts_less() -> None:
    """Channel 0 is what lies outside, channel 1 an object of 3 x 3 cells in a box of 5 x 5."""
    features = torch.zeros(1, 2, 8, 8, dtype=torch.float64)
    features[:, 0], features[:, :, 2:5, 2:5] = 1, torch.tensor([0.0, 1.0]).view(2, 1, 1).double()
    boxes = torch.tensor([[0, 8, 8, 24, 24]])
    mask = background_mask_from_boxes(boxes, 1, (32, 32))
    aware = BackgroundAwarePooling(output_size=(1, 1))(features, boxes, mask).pooled.flatten()
    plain = BackgroundAwarePooling(output_size=(1, 1), min_background=1.0)(features, boxes, mask).pooled.flatten()
    assert aware[1] / aware.sum() > 0.8
    assert aware[1] / aware.sum() > 1.5 * plain[1] / plain.sum()


FEATURES, _, MASK = case()


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: pad_to_grid(FEATURES, 0), ValueError, r"grid: expected at least 1, got 0"),
        (lambda: background_prototypes(FEATURES.long(), MASK), TypeError, r"features: expected a floating"),
        (lambda: background_prototypes(FEATURES, MASK[:1]), ValueError, r"background_mask: expected shape \(2, 1"),
        (
            lambda: background_attention(FEATURES, FEATURES[0, 0], torch.ones(8)),
            ValueError,
            r"prototypes: expected shape \(2, \*, 5\) to match features",
        ),
        (lambda: weighted_roi_avg_pool(FEATURES, MASK), ValueError, r"weight: expected shape \(2, 1, 8, 10\)"),
        (lambda: weighted_roi_avg_pool(FEATURES, FEATURES[:, :1], (0, 2)), ValueError, r"output_size: expected at"),
        (lambda: background_aware_pooling(FEATURES, BOXES + 2, MASK), ValueError, r"boxes: expected image indices"),
        (
            lambda: background_aware_pooling(FEATURES, BOXES, MASK, use_background=torch.ones(3)),
            ValueError,
            r"use_background: expected shape \(2,\)",
        ),
        (
            lambda: BoxClassifier(5, 3)(FEATURES, BOXES, CLASSES[:2], MASK),
            ValueError,
            r"classes: expected shape \(4,\) to match boxes",
        ),
    ],
)
def test_messages_name_argument_expected_and_given(call, error, message) -> None:
    with pytest.raises(error, match=message):
        call()

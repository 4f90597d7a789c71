"""Boxes: geometry, and BANA's labels from them."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from tests.modules.reference_bana import full_size_labels
from wsss_modules import (
    BANA_CRF,
    BoxPseudoLabeler,
    UpsampledFeatures,
    background_mask_from_boxes,
    box_iou,
    box_pseudo_labels,
    boxes_to_masks,
    crop_boxes,
    dense_crf,
    fuse_labels,
    normalize_boxes,
    unary_from_scores,
)

SIZE = (13, 17)


def random_boxes(count: int, seed: int, size: tuple[int, int] = SIZE) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    corners = [(torch.rand(count, 2, generator=generator) * (n + 1)).long().sort(1).values for n in (size[1], size[0])]
    (x1, x2), (y1, y2) = (corner.unbind(1) for corner in corners)
    return torch.stack([x1, y1, x2.maximum(x1 + 1), y2.maximum(y1 + 1)], 1)


def case(seed: int, count: int = 3, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    features = torch.rand(6, 4, 5, generator=generator, dtype=dtype)
    weight = torch.randn(5, 6, generator=generator, dtype=dtype)
    return features, weight, random_boxes(count, seed), torch.randint(1, 5, (count,), generator=generator)


@given(st.integers(0, 199), st.integers(1, 4))
def test_coarse_labels_equal_those_of_features_as_large_as_the_image(seed: int, count: int) -> None:
    inputs = case(seed, count)
    labels = box_pseudo_labels(*inputs, SIZE)
    expected = full_size_labels(*inputs, SIZE)
    for name in ("scores", "correlation", "attention"):
        torch.testing.assert_close(getattr(labels, name), expected[name], rtol=1e-10, atol=1e-10)
    for name in ("y_crf", "y_ret"):
        assert torch.equal(getattr(labels, name), expected[name]), name


@given(
    st.integers(0, 99), st.sampled_from([(1, 1), (1, 5), (4, 1), (4, 5)]), st.sampled_from([(1, 1), (9, 11), (3, 2)])
)
def test_upsampled_features_answer_as_the_full_ones(seed: int, cells: tuple[int, int], size: tuple[int, int]) -> None:
    generator = torch.Generator().manual_seed(seed)
    features = torch.randn(7, *cells, generator=generator, dtype=torch.float64)
    full = torch.nn.functional.interpolate(features[None], size, mode="bilinear", align_corners=True)[0]
    up = UpsampledFeatures(features, size)
    torch.testing.assert_close(up.norm(), full.norm(dim=0), rtol=1e-7, atol=1e-7)  # 2e-8: cancellation under the root
    weight = torch.randn(3, 7, generator=generator, dtype=torch.float64)
    torch.testing.assert_close(up.project(weight), torch.einsum("cd,dhw->chw", weight, full))
    regions = torch.rand(4, *size, generator=generator) > 0.6
    mean, count = up.mean(regions)
    assert torch.equal(count, regions.sum((1, 2)).double())
    for region, own in zip(regions, mean, strict=True):
        torch.testing.assert_close(own, full[:, region].mean(1) if region.any() else torch.zeros_like(own))


@given(st.integers(0, 99))
def test_a_class_is_only_found_in_its_own_boxes(seed: int) -> None:
    features, weight, boxes, classes = case(seed)
    labels = box_pseudo_labels(features, weight, boxes, classes, SIZE)
    masks = boxes_to_masks(boxes, SIZE)
    for found in (labels.y_crf, labels.y_ret):
        assert set(found.unique().tolist()) <= {0, *classes.tolist()}
        for key in labels.keys:
            assert not (found == key)[~masks[classes == key].any(0)].any()
    assert labels.attention.min() >= 0
    assert labels.attention.max() <= 1 + 1e-12
    torch.testing.assert_close(labels.scores.sum(0), torch.ones(SIZE, dtype=torch.float64))


def test_order_of_boxes_changes_nothing_where_those_of_a_class_are_apart() -> None:
    features, weight, _, _ = case(0)
    boxes, classes = torch.tensor([[0, 0, 6, 9], [4, 2, 12, 12], [9, 0, 17, 8]]), torch.tensor([2, 1, 2])
    labels = box_pseudo_labels(features, weight, boxes, classes, SIZE)
    for order in ([2, 0, 1], [1, 2, 0]):
        torch.testing.assert_close(box_pseudo_labels(features, weight, boxes[order], classes[order], SIZE), labels)


@pytest.mark.parametrize("boxes", [[[0, 0, 17, 13]], [[-5, -5, 40, 40]], [[0, 0, 9, 13], [9, 0, 17, 13]]])
def test_boxes_that_cover_the_image_leave_no_background_and_stay_finite(boxes: list[list[int]]) -> None:
    features, weight, _, _ = case(1)
    labels = box_pseudo_labels(features, weight, torch.tensor(boxes), torch.ones(len(boxes), dtype=torch.int64), SIZE)
    assert not labels.attention.any()
    assert all(bool(x.isfinite().all()) for x in labels if x.is_floating_point())
    assert labels.cam.max() == pytest.approx(1)


def test_a_background_mask_from_elsewhere_decides_what_is_certain() -> None:
    """Corners that were rounded twice, so that mask and box differ by a column on each side."""
    features, weight, _, _ = case(0)
    boxes, classes = torch.tensor([[3, 2, 11, 9]]), torch.tensor([2])
    background = background_mask_from_boxes(torch.tensor([[0, 4, 2, 12, 9]]), 1, SIZE)[0, 0]
    weight = weight.abs()  # class maps without zeros
    labels = BoxPseudoLabeler()(features, weight, boxes, classes, SIZE, background_mask=background)
    planes = torch.stack([labels.attention, labels.cam[0]])
    torch.testing.assert_close(labels.scores[:, 2:9, 4:12], planes[:, 2:9, 4:12].softmax(0))
    assert (labels.scores[0, 2:9, 3] == 1).all()
    assert torch.equal(labels.scores[1, 2:9, 3], labels.cam[0, 2:9, 3])
    assert labels.cam[0, 2:9, 3].any()
    assert (labels.correlation[0, 2:9, 3] == 1).all()
    outside = torch.ones(SIZE, dtype=torch.bool)
    outside[2:9, 3:11] = False
    assert not labels.y_crf[outside].any()
    assert not labels.y_ret[outside].any()
    given = background_mask_from_boxes(torch.cat([torch.zeros(1, 1), boxes], 1), 1, SIZE)[0, 0]
    same = box_pseudo_labels(features, weight, boxes, classes, SIZE, background_mask=given)
    torch.testing.assert_close(same, box_pseudo_labels(features, weight, boxes, classes, SIZE))


@pytest.mark.parametrize("boxes", [[[3, 3, 3, 8]], [[20, 3, 30, 8]], [[4.2, 3.1, 4.9, 8.0]]])
def test_a_box_without_a_pixel_labels_nothing(boxes: list[list[float]]) -> None:
    features, weight, _, _ = case(2)
    labels = box_pseudo_labels(features, weight, torch.tensor(boxes), torch.tensor([4]), SIZE)
    assert not labels.y_crf.any()
    assert not labels.y_ret.any()
    assert all(bool(x.isfinite().all()) for x in labels if x.is_floating_point())


def test_an_image_without_boxes_is_background() -> None:
    features, weight, _, _ = case(3)
    labels = box_pseudo_labels(features, weight, torch.zeros(0, 4), torch.zeros(0, dtype=torch.int64), SIZE)
    assert labels.scores.shape == (1, *SIZE)
    assert labels.cam.shape == (0, *SIZE)
    assert not labels.y_crf.any()
    assert not labels.y_ret.any()


def test_features_of_zeros_stay_finite() -> None:
    features, weight, boxes, classes = case(4)
    labels = box_pseudo_labels(features * 0, weight, boxes, classes, SIZE)
    assert all(bool(x.isfinite().all()) for x in labels if x.is_floating_point())
    assert not labels.y_ret.any(), "background wins ties"


@given(st.integers(0, 99))
def test_likeness_stays_a_share_where_neighbouring_features_cancel(seed: int) -> None:
    a = torch.randn(8, generator=torch.Generator().manual_seed(seed))
    features = torch.stack([a, -0.7 * a, 0.3 * a, -a], 1)[:, None]
    weight = torch.randn(3, 8, generator=torch.Generator().manual_seed(seed + 1))
    labels = box_pseudo_labels(features, weight, torch.tensor([[5, 0, 60, 9]]), torch.tensor([1]), (9, 101))
    for share in (labels.attention, labels.correlation):
        assert share.min() >= 0
        assert share.max() <= 1


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_computed_in_float32(dtype: torch.dtype) -> None:
    features, weight, boxes, classes = case(5, dtype=dtype)
    labels = box_pseudo_labels(features, weight, boxes, classes, SIZE)
    exact = box_pseudo_labels(features.double(), weight.double(), boxes, classes, SIZE)
    torch.testing.assert_close(labels.scores.double(), exact.scores, rtol=1e-5, atol=1e-5)


def test_the_crf_is_any_callable_over_scores() -> None:
    features, weight, boxes, classes = case(6, dtype=torch.float32)
    image = torch.randint(0, 256, (1, 3, *SIZE), dtype=torch.uint8)

    def crf(scores: Tensor) -> Tensor:
        return dense_crf(image, unary_from_scores(scores[None]), BANA_CRF)[0]

    called = BoxPseudoLabeler()(features, weight, boxes, classes, SIZE, crf)
    stored = BoxPseudoLabeler(crf)(features, weight, boxes, classes, SIZE)
    assert torch.equal(called.y_crf, stored.y_crf)
    with pytest.raises(ValueError, match=r"crf\(scores\): expected shape"):
        box_pseudo_labels(features, weight, boxes, classes, SIZE, crf=lambda scores: scores[:1])


@given(st.integers(0, 99))
def test_masks_of_boxes_are_their_pixels(seed: int) -> None:
    boxes = random_boxes(3, seed)
    masks = boxes_to_masks(boxes, SIZE)
    for (x1, y1, x2, y2), mask in zip(boxes.tolist(), masks, strict=True):
        expected = torch.zeros(SIZE, dtype=torch.bool)
        expected[y1:y2, x1:x2] = True
        assert torch.equal(mask, expected)
    background = background_mask_from_boxes(torch.cat([torch.tensor([[1], [0], [1]]), boxes], 1), 3, SIZE)
    assert torch.equal(background[0, 0] == 0, masks[1])
    assert torch.equal(background[1, 0] == 0, masks[0] | masks[2])
    assert background[2].all()


def test_rounding_of_corners() -> None:
    box = torch.tensor([[1.6, 0.0, 3.2, 1.0]])
    assert boxes_to_masks(box, (1, 5)).int().tolist() == [[[0, 1, 1, 1, 0]]]
    assert boxes_to_masks(box, (1, 5), rounding="truncate").int().tolist() == [[[0, 1, 1, 0, 0]]]


def test_normalized_boxes_are_grid_coordinates_of_pixel_centres() -> None:
    boxes = torch.tensor([[0.0, 3.0, 16.0, 12.0]])
    out = normalize_boxes(boxes, SIZE)
    torch.testing.assert_close(out, torch.tensor([[-1.0, -0.5, 1.0, 1.0]]))
    assert torch.equal(normalize_boxes(boxes, (1, 1)), torch.zeros(1, 4))


@given(st.integers(0, 99), st.integers(-9, 9), st.integers(-9, 9))
def test_iou_is_that_of_the_pixels_and_moves_with_the_boxes(seed: int, dx: int, dy: int) -> None:
    a, b = random_boxes(4, seed), random_boxes(3, seed + 1000)
    iou = box_iou(a, b)
    masks_a, masks_b = boxes_to_masks(a, SIZE), boxes_to_masks(b, SIZE)
    shared = (masks_a[:, None] & masks_b).sum((2, 3))
    union = (masks_a[:, None] | masks_b).sum((2, 3))
    torch.testing.assert_close(iou, shared / union)
    shift = torch.tensor([dx, dy, dx, dy])
    torch.testing.assert_close(box_iou(a + shift, b + shift), iou)
    torch.testing.assert_close(box_iou(b, a).T, iou)
    torch.testing.assert_close(box_iou(a + 0.4, b + 0.7, truncate=True), iou.double())


def test_boxes_without_area_overlap_nothing() -> None:
    empty = torch.tensor([[3, 3, 3, 9], [5, 5, 2, 2]])
    assert not box_iou(empty, empty).any()


def test_crops_move_boxes_and_cut_them() -> None:
    boxes, crop = torch.tensor([[5, 0, 30, 8], [0, 0, 4, 4], [12, 4, 14, 6]]), torch.tensor([10, 2, 20, 12])
    assert crop_boxes(boxes, crop).tolist() == [[0, 0, 10, 6], [0, 0, 0, 2], [2, 2, 4, 4]]
    assert crop_boxes(boxes, crop, legacy_far_edge=True).tolist()[0] == [0, 0, 11, 6]


def test_fusion_keeps_what_both_say() -> None:
    a, b = torch.randint(0, 4, (2, 2, 5, 6))
    fused = fuse_labels(a, b)
    assert torch.equal(fused[a == b], a[a == b])
    assert (fused[a != b] == 255).all()
    both = torch.full((1, 2), 255)
    assert torch.equal(fuse_labels(both, both), both)


FEATURES, WEIGHT, BOXES, CLASSES = case(7)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: boxes_to_masks(BOXES[0], SIZE), ValueError, r"boxes: expected shape \(\*, 4\) of x1"),
        (lambda: boxes_to_masks(BOXES, SIZE, rounding="up"), ValueError, r'rounding: expected "outwards" or'),
        (
            lambda: background_mask_from_boxes(torch.tensor([[2, 0, 0, 1, 1]]), 2, SIZE),
            ValueError,
            r"boxes: expected image indices in 0..1, got 2..2",
        ),
        (lambda: background_mask_from_boxes(BOXES, 2, SIZE), ValueError, r"boxes: expected shape \(\*, 5\) of image"),
        (lambda: normalize_boxes(BOXES[:, :3], SIZE), ValueError, r"boxes: expected shape \(\.\.\., 4\)"),
        (lambda: crop_boxes(BOXES, BOXES), ValueError, r"crop: expected shape \(4,\)"),
        (lambda: box_iou(BOXES, BOXES[0]), ValueError, r"b: expected shape \(\*, 4\)"),
        (
            lambda: box_pseudo_labels(FEATURES[None], WEIGHT, BOXES, CLASSES, SIZE),
            ValueError,
            r"features: expected shape \(D, h, w\)",
        ),
        (
            lambda: box_pseudo_labels(FEATURES, WEIGHT[:, :2], BOXES, CLASSES, SIZE),
            ValueError,
            r"weight: expected shape \(\*, 6\) to match features",
        ),
        (
            lambda: box_pseudo_labels(FEATURES, WEIGHT, BOXES, CLASSES[:1], SIZE),
            ValueError,
            r"classes: expected shape \(3,\) to match boxes",
        ),
        (
            lambda: box_pseudo_labels(FEATURES, WEIGHT, BOXES, CLASSES * 0, SIZE),
            ValueError,
            r"classes: expected 1..4 to match weight, got 0..0",
        ),
        (lambda: box_pseudo_labels(FEATURES, WEIGHT, BOXES, CLASSES.float(), SIZE), TypeError, r"classes: expected an"),
        (lambda: UpsampledFeatures(FEATURES[:, :0], SIZE), ValueError, r"features: expected at least one cell"),
        (lambda: fuse_labels(CLASSES.float(), CLASSES), TypeError, r"y_crf: expected an integer tensor"),
        (lambda: fuse_labels(CLASSES, CLASSES[:2]), ValueError, r"y_ret: expected shape \(3,\) to match y_crf"),
    ],
)
def test_messages_name_argument_expected_and_given(call, error, message) -> None:
    with pytest.raises(error, match=message):
        call()

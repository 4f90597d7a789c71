"""BBAM: masks under which a detector says the same, and what becomes of them."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from tests.modules.reference_bbam import descend_alone, looped_blur, looped_iou, sorted_rank_value
from wsss_modules import (
    BBAM_CRF,
    BoundingBoxAttributionMap,
    BoxMaskRefiner,
    PerturbImage,
    adaptive_mask_stride,
    box_iou,
    box_seed_probability,
    boxes_to_masks,
    dense_crf,
    init_attribution_mask,
    instances_to_semantic,
    jitter_boxes,
    match_segment_proposals,
    perturb_image,
    refine_box_mask,
    segment_overlaps,
    select_positive_proposals,
    unary_from_scores,
)


class Detector(torch.nn.Module):
    """Boxes see the image through the mean of their pixels in a small convolution's output."""

    def __init__(self, classes: int = 4) -> None:
        super().__init__()
        self.convolution = torch.nn.Conv2d(3, 6, 3, padding=1)
        self.logits, self.deltas = torch.nn.Linear(6, classes), torch.nn.Linear(6, 4 * classes)

    def forward(self, images: Tensor, proposals: Tensor) -> tuple[Tensor, Tensor]:
        x = self.convolution(images).relu()
        rows = []
        for image, x1, y1, x2, y2 in proposals.tolist():
            rows.append(x[int(image), :, int(y1) : int(y2), int(x1) : int(x2)].mean((1, 2)))
        pooled = torch.stack(rows) if rows else x.new_zeros(0, 6)
        return 4 * self.logits(pooled), self.deltas(pooled)


PROPOSALS = torch.tensor([[0, 2, 2, 10, 9], [1, 8, 3, 20, 15], [0, 1, 2, 9, 10], [2, 4, 4, 7, 8]]).float()
CLASSES = torch.tensor([1, 3, 2])
# not ones: where nothing is hidden, rounding would decide in which direction the changes point
MASKS = [torch.full((1, 3, 4), 0.9), torch.full((1, 5, 6), 0.8), torch.full((1, 2, 2), 0.5)]


def image(seed: int = 0) -> Tensor:
    return torch.randn(3, 16, 24, generator=torch.Generator().manual_seed(seed))


def test_objects_in_one_batch_go_where_each_goes_alone() -> None:
    torch.manual_seed(0)
    detector = Detector()
    explain = BoundingBoxAttributionMap(detector, steps=12, lr=0.05, area=0.01, tv=0.0)
    together = explain(image(), PROPOSALS, CLASSES, MASKS)
    for k, mask in enumerate(together):
        own = PROPOSALS[PROPOSALS[:, 0] == k, 1:]
        alone = descend_alone(detector, image(), own, int(CLASSES[k]), MASKS[k], 12, 0.05, 0.01)
        torch.testing.assert_close(mask, alone, rtol=0, atol=1e-4)  # 2e-6: Adam enlarges rounding
        assert mask.min() >= 0
        assert mask.max() <= 1


def test_an_image_for_each_object_is_the_same_as_one_for_all() -> None:
    torch.manual_seed(0)
    explain = BoundingBoxAttributionMap(Detector(), steps=4, lr=0.05)
    shared = explain(image(), PROPOSALS, CLASSES, MASKS)
    torch.testing.assert_close(explain(image().expand(3, -1, -1, -1), PROPOSALS, CLASSES, MASKS), shared)


def test_masks_of_half_precision_images_take_full_steps() -> None:
    def detector(images: Tensor, proposals: Tensor) -> tuple[Tensor, Tensor]:
        assert images.dtype == torch.bfloat16
        return tuple(x.to(torch.bfloat16) for x in linear_detector(images.float(), proposals))

    explain = BoundingBoxAttributionMap(detector, steps=10, lr=1e-3, area=0.5)
    found = explain(image().bfloat16(), PROPOSALS[:1], CLASSES[:1], [torch.full((1, 6, 6), 0.9)])[0]
    assert found.dtype == torch.float32
    assert (found < 0.9).all()


def test_weights_get_no_gradient_and_starting_masks_stay() -> None:
    detector = Detector()
    before = [mask.clone() for mask in MASKS]
    BoundingBoxAttributionMap(detector, steps=2)(image(), PROPOSALS, CLASSES, MASKS)
    assert all(parameter.grad is None for parameter in detector.parameters())
    assert all(torch.equal(a, b) for a, b in zip(MASKS, before, strict=True))


def linear_detector(images: Tensor, proposals: Tensor) -> tuple[Tensor, Tensor]:
    """The deltas of class 1 are eight times the brightness of four quarters."""
    v = F.adaptive_avg_pool2d(images.mean(1, keepdim=True), 2).flatten(1)[proposals[:, 0].long()]
    return v.new_zeros(len(v), 2), torch.cat([torch.zeros_like(v), 8 * v], 1)


@pytest.mark.parametrize("area", [0.007, 0.02, 0.07])
def test_the_area_of_a_converged_mask_is_bounded_by_the_cost_of_hiding_all(area: float) -> None:
    picture = torch.rand(3, 12, 12, generator=torch.Generator().manual_seed(1))
    proposals, mask = torch.tensor([[0.0, 0, 0, 12, 12]]), [torch.ones(1, 6, 6)]
    clean = linear_detector(picture[None], proposals)[1]
    hidden = linear_detector(0 * picture[None], proposals)[1]
    whole = 0.5 * (clean - hidden)[:, 4:].abs().mean()
    explain = BoundingBoxAttributionMap(linear_detector, steps=150, area=area, tv=0.0)
    found = explain(picture, proposals, torch.tensor([1]), mask)[0]
    assert found.sum() <= whole / area + 1e-3
    smaller = BoundingBoxAttributionMap(linear_detector, steps=150, area=2 * area, tv=0.0)
    assert smaller(picture, proposals, torch.tensor([1]), mask)[0].sum() <= found.sum() + 1e-3


def test_a_price_of_0_drops_nothing() -> None:
    explain = BoundingBoxAttributionMap(linear_detector, steps=20, area=0.0)
    mask = torch.ones(1, 6, 6)
    found = explain(torch.rand(3, 12, 12), torch.tensor([[0.0, 0, 0, 12, 12]]), torch.tensor([1]), [mask])[0]
    assert torch.equal(found, mask)


def test_an_object_without_proposals_only_loses_area() -> None:
    explain = BoundingBoxAttributionMap(Detector(), steps=60)
    found = explain(image(), torch.zeros(0, 5), torch.tensor([1]), [torch.ones(1, 3, 3)])
    assert not found[0].any()
    assert explain(image(), torch.zeros(0, 5), torch.zeros(0, dtype=torch.int64), []) == []


def test_the_descent_can_be_watched_and_stopped() -> None:
    explain = BoundingBoxAttributionMap(Detector(), steps=30, lr=0.05)
    seen = [state.step for state in explain.iterate(image(), PROPOSALS, CLASSES, MASKS)]
    assert seen == list(range(1, 31))
    seen = []
    explain(image(), PROPOSALS, CLASSES, MASKS, callback=lambda state: seen.append(state.step) or state.step == 3)
    assert seen == [1, 2, 3]
    still = BoundingBoxAttributionMap(Detector(), steps=200, lr=0.05, tolerance=1e-3)
    done = list(still.iterate(image(), torch.zeros(0, 5), torch.tensor([1]), [torch.zeros(1, 3, 3)]))
    assert len(done) == 1


@given(st.integers(0, 99), st.floats(0, 1))
def test_perturbing_is_linear_in_the_mask(seed: int, share: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    picture = torch.randn(3, 7, 9, generator=generator, dtype=torch.float64)
    a, b = torch.rand(2, 1, 3, 4, generator=generator, dtype=torch.float64)
    background = torch.randn(3, 7, 9, generator=generator, dtype=torch.float64)
    for ground in (None, background):
        first, second = perturb_image(picture, a, ground), perturb_image(picture, b, ground)
        mixed = perturb_image(picture, share * a + (1 - share) * b, ground)
        torch.testing.assert_close(mixed, share * first + (1 - share) * second)
        torch.testing.assert_close(perturb_image(picture, torch.ones_like(a), ground), picture)
        hidden = perturb_image(picture, torch.zeros_like(a), ground)
        torch.testing.assert_close(hidden, torch.zeros_like(picture) if ground is None else background)
    batch = perturb_image(picture, torch.stack([a, b]))
    torch.testing.assert_close(batch, torch.stack([perturb_image(picture, a), perturb_image(picture, b)]))
    assert torch.equal(PerturbImage(background)(picture, a), perturb_image(picture, a, background))


@given(st.lists(st.floats(0, 1), min_size=2, max_size=5))
def test_stride_grows_with_the_box(shares: list[float]) -> None:
    strides = adaptive_mask_stride(torch.tensor(sorted(shares)) * 800 * 600, (600, 800))
    assert (strides >= 16).all()
    assert (strides <= 64 + 1e-3).all()
    assert (strides.diff() >= 0).all()


def test_the_first_mask_keeps_to_the_grid() -> None:
    boxes = torch.tensor([[-30.0, -5.0, 25.0, 12.0], [60.0, 30.0, 400.0, 90.0]])
    mask = init_attribution_mask(boxes, (40, 70), 10.0)
    assert mask.shape == (1, 4, 7)
    assert mask[0].int().tolist() == [[1, 1, 0, 0, 0, 0, 0]] + [[0] * 7] * 2 + [[0] * 6 + [1]]
    wrapped = init_attribution_mask(boxes[:1], (40, 70), 10.0, wrap_negative=True)
    assert not wrapped.any(), "-3 counts from the other end: columns 4 to 2"
    assert init_attribution_mask(boxes, (5, 5), 10.0).shape == (1, 1, 1)
    pixels = init_attribution_mask(boxes[:0], (40, 70), 10.0, legacy_pixels=torch.tensor([[1.5, 0.0, 3.0, 2.0]]))
    assert pixels.sum() == 4


@given(st.integers(0, 99))
def test_jittered_boxes_stay_near_and_inside(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    box = torch.tensor([30.0, 5.0, 90.0, 45.0])
    boxes = jitter_boxes(box, (48, 96), count=50, generator=generator)
    assert boxes.shape == (50, 4)
    assert ((boxes - box).abs() <= 0.3 * torch.tensor([60.0, 40, 60, 40]) + 1e-4).all()
    assert boxes.min() >= 0
    assert (boxes[:, 2] <= 96).all()
    assert (boxes[:, 3] <= 48).all()


@given(st.integers(0, 99))
def test_overlaps_equal_the_loop_over_proposals(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    a = torch.rand(6, 2, 2, generator=generator).mul(40).sort(1).values.flatten(1) + torch.tensor([0, 0, 2, 2])
    torch.testing.assert_close(box_iou(a, a[:1], truncate=True)[:, 0], looped_iou(a, a[0]))


def test_positives_are_of_the_right_class_and_the_first_that_overlap_enough() -> None:
    target = torch.tensor([10.0, 10, 110, 110])
    shifts = torch.tensor([0.0, 3, 8, 12, 40, 0])  # IoU 1, .94, .85, .79, .43; the last has another class
    own = target + shifts[:, None] * torch.tensor([1.0, 0, 1, 0])
    boxes = torch.stack([torch.zeros_like(own), own, own], 1)
    logits = F.one_hot(torch.tensor([1, 1, 1, 1, 1, 2]), 3).float()
    found = select_positive_proposals(logits, boxes.flatten(1), target, 1, enough=1)
    assert found.chosen.tolist() == [0, 1]
    assert found.threshold == 0.9
    found = select_positive_proposals(logits, boxes, target, torch.tensor(1), enough=2)
    assert found.chosen.tolist() == [0, 1, 2]
    assert found.threshold == 0.85
    found = select_positive_proposals(logits, boxes, target, 1, enough=3)
    assert found.chosen.tolist() == [0, 1, 2]
    assert found.threshold == 0.8
    assert select_positive_proposals(logits, boxes, target, 1, enough=9, cap=2).chosen.tolist() == [0, 1]
    assert select_positive_proposals(logits[:0], boxes[:0], target, 1).chosen.shape == (0,)


SIZE = (20, 26)
BOX = torch.tensor([5, 3, 21, 16])


def seed_map(seed: int = 0) -> Tensor:
    return torch.rand(1, 6, 8, generator=torch.Generator().manual_seed(seed))


@given(st.integers(0, 99), st.sampled_from([0.85, 0.2]), st.integers(0, 12))
def test_seed_equals_sorting_and_blurring_pixel_by_pixel(seed: int, theta: float, radius: int) -> None:
    mask = seed_map(seed)
    x1, y1, x2, y2 = BOX.tolist()
    x = (mask[0].double() - mask.min().double()) / mask.max().double()
    x = F.interpolate(x[None, None], SIZE, mode="bilinear", align_corners=False)[0, 0]
    inside = torch.zeros(SIZE, dtype=torch.bool)
    inside[y1:y2, x1:x2] = True
    x = x * inside
    x = (x / (sorted_rank_value(x, int((x2 - x1) * (y2 - y1) * (1 - theta))) + 1e-8)).clamp(0, 1)
    x = looped_blur(x, radius) * inside
    x = (x - x.min()) / x.max()
    ours = box_seed_probability(mask, BOX, SIZE, theta, blur=(radius, 0.0))
    torch.testing.assert_close(ours, x, rtol=1e-9, atol=1e-9)


@given(st.integers(0, 99))
def test_masks_lie_in_the_box_and_the_loose_one_covers_the_strict_one(seed: int) -> None:
    strict, loose = (BoxMaskRefiner(theta, blur=(1.0, 2.0))(seed_map(seed), BOX, SIZE).mask for theta in (0.85, 0.2))
    assert not (strict & ~loose).any()
    inside = torch.zeros(SIZE, dtype=torch.bool)
    inside[3:16, 5:21] = True
    assert not (loose & ~inside).any()


@pytest.mark.parametrize("mask", [None, torch.zeros(1, 6, 8)])
def test_without_a_map_degrees_of_the_box_are_tried(mask: Tensor | None) -> None:
    whole = refine_box_mask(mask, BOX, SIZE, 0.85)
    assert whole.mask.sum() == 16 * 13, "0.95 is the first above 0.9"
    assert whole.crf_calls == 4
    never = refine_box_mask(mask, BOX, SIZE, 0.85, crf=torch.zeros_like)
    assert never.mask.shape == SIZE, "a box always has a mask"
    assert not never.mask.any()


def test_a_mask_that_is_too_small_is_tried_again() -> None:
    box = torch.tensor([4, 4, 10, 10])  # 36 of 520 pixels
    asked: list[Tensor] = []

    def crf(scores: Tensor) -> Tensor:
        asked.append(scores[1])
        return scores if len(asked) > 1 else torch.zeros_like(scores)

    found = refine_box_mask(seed_map(), box, SIZE, 0.85, crf=crf, blur=(1.0, 0.0))
    assert [round(float(x.max()), 2) for x in asked[1:]] == [0.7, 0.8, 0.9, 0.95]
    assert found.mask.sum() == 36
    large = refine_box_mask(seed_map(), BOX, SIZE, 0.85, crf=torch.zeros_like, blur=(1.0, 0.0))
    assert large.crf_calls == 1, "its box is more than a tenth of the image"


def test_a_box_that_covers_the_image_needs_the_values_stretched() -> None:
    box, mask = torch.tensor([0, 0, 26, 20]), 0.5 + 0.5 * seed_map()
    released = refine_box_mask(mask, box, SIZE, 0.2)
    stretched = refine_box_mask(mask, box, SIZE, 0.2, stretch=True)
    assert not released.mask.any()
    assert stretched.mask.any()


@pytest.mark.parametrize("box", [[30, 3, 40, 9], [4, 4, 4, 9]])
def test_a_box_without_a_pixel_has_an_empty_mask(box: list[int]) -> None:
    found = refine_box_mask(seed_map(), torch.tensor(box), SIZE, 0.85)
    assert not found.mask.any()
    assert found.probability.isfinite().all()


def test_the_crf_is_any_callable_over_scores() -> None:
    picture = torch.randint(0, 256, (1, 3, *SIZE), dtype=torch.uint8)

    def crf(scores: Tensor) -> Tensor:
        return dense_crf(picture, unary_from_scores(scores[None]), BBAM_CRF)[0]

    assert refine_box_mask(seed_map(), BOX, SIZE, 0.2, crf=crf, blur=(2.0, 0.0)).mask.shape == SIZE
    with pytest.raises(ValueError, match=r"crf\(scores\): expected shape"):
        refine_box_mask(seed_map(), BOX, SIZE, 0.2, crf=lambda scores: scores[0])


def test_instances_become_one_label_map() -> None:
    strict, loose = torch.zeros(3, 6, 8), torch.zeros(3, 6, 8)
    boxes = torch.tensor([[0, 0, 6, 6], [1, 1, 3, 3], [5, 0, 8, 4]])
    for k, (x1, y1, x2, y2) in enumerate(boxes.tolist()):
        strict[k, y1:y2, x1:x2] = 1
    loose.copy_(strict)
    loose[2, 4, 6] = 1
    label = instances_to_semantic(strict, loose, torch.tensor([1, 2, 3]), boxes)
    assert (label[1:3, 1:3] == 2).all(), "inside another box"
    assert (label[:4, 5] == 255).all(), "of two classes"
    assert label[4, 6] == 255, "loose only"
    assert label[0, 0] == 1
    assert label[0, 7] == 3
    assert label[5, 7] == 0
    for order in ([2, 1, 0], [1, 2, 0]):
        moved = instances_to_semantic(strict[order], loose[order], torch.tensor([1, 2, 3])[order], boxes[order])
        assert torch.equal(moved, label)
    nothing = instances_to_semantic(strict[:0], loose[:0], torch.zeros(0, dtype=torch.int64), boxes[:0])
    assert nothing.shape == (6, 8)
    assert not nothing.any()


@given(st.integers(0, 199), st.integers(1, 5))
def test_label_map_is_what_each_pixel_says_for_itself(seed: int, count: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    corners = torch.randint(0, 5, (count, 2, 2), generator=generator).sort(1).values  # few places: boxes recur
    boxes = (corners + torch.tensor([[0], [1]])).flatten(1)
    classes = torch.randint(1, 4, (count,), generator=generator)
    inside = boxes_to_masks(boxes, (6, 6))
    loose = inside & (torch.rand(inside.shape, generator=generator) < 0.8)
    strict = loose & (torch.rand(inside.shape, generator=generator) < 0.8)
    label = instances_to_semantic(strict, loose, classes, boxes)
    rows = boxes.tolist()
    nested = [
        k
        for k, (x1, y1, x2, y2) in enumerate(rows)
        if any(a <= x1 and b <= y1 and c >= x2 and d >= y2 and [a, b, c, d] != rows[k] for a, b, c, d in rows)
    ]
    nested.sort(key=lambda k: -(rows[k][2] - rows[k][0]) * (rows[k][3] - rows[k][1]))
    for y, x in torch.cartesian_prod(torch.arange(6), torch.arange(6)).tolist():
        found = {int(classes[k]) for k in range(count) if strict[k, y, x]}
        expected = 0 if not found else found.pop() if len(found) == 1 else 255
        for k in nested:
            expected = int(classes[k]) if strict[k, y, x] else expected
        if any(loose[k, y, x] and not strict[k, y, x] for k in range(count)):
            expected = 255
        assert label[y, x] == expected


def test_of_two_objects_in_the_same_box_neither_covers_the_other() -> None:
    strict = torch.ones(2, 3, 3)
    strict[0, 0], strict[1, 2] = 0, 0
    boxes = torch.tensor([[0, 0, 3, 3]]).expand(2, 4)
    label = instances_to_semantic(strict, strict, torch.tensor([4, 7]), boxes)
    assert label.tolist() == [[7] * 3, [255] * 3, [4] * 3]


def segments(seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 9, SIZE, generator=generator), torch.rand(7, 9, generator=generator) > 0.5


@given(st.integers(0, 99))
def test_overlaps_of_segments_are_those_of_their_pixels(seed: int) -> None:
    superpixels, members = segments(seed)
    mask = torch.rand(SIZE, generator=torch.Generator().manual_seed(seed)) > 0.5
    found = segment_overlaps(mask, BOX, superpixels, members, limit=0.4)
    drawn = members[:, superpixels]  # (7, H, W)
    inside = torch.zeros(SIZE, dtype=torch.bool)
    inside[3:16, 5:21] = True
    torch.testing.assert_close(
        found.iou, ((drawn & mask).sum((1, 2)) / (drawn | mask).sum((1, 2))).double(), rtol=1e-6, atol=0
    )
    assert torch.equal(found.in_box, (drawn & inside).sum((1, 2)) > 0.4 * drawn.sum((1, 2)))
    assert torch.equal(found.in_mask, (drawn & mask).sum((1, 2)) > 0.4 * drawn.sum((1, 2)))


def test_true_overlaps_don_t_depend_on_where_all_is_and_index_sums_do() -> None:
    small = torch.zeros(12, 12, dtype=torch.bool)
    small[1:4, 1:5] = True
    moved = small.roll((6, 5), (0, 1))
    pixels, box = torch.arange(144).view(12, 12), torch.tensor([0, 0, 12, 12])

    def iou(mask: Tensor, legacy: bool) -> Tensor:
        half = mask & (torch.arange(12) <= int(mask.nonzero()[:, 1].min()) + 1)
        return segment_overlaps(mask, box, pixels, half.flatten()[None], legacy_index_sum=legacy).iou

    torch.testing.assert_close(iou(small, False), iou(moved, False))
    assert not torch.isclose(iou(small, True), iou(moved, True))


def test_segments_take_the_place_of_a_mask() -> None:
    superpixels = (torch.arange(40)[:, None] // 10 * 4 + torch.arange(40) // 10).long()  # 4 x 4 squares
    members = torch.zeros(4, 16, dtype=torch.bool)
    members[0, [0, 1, 4, 5]] = True  # the object
    members[1, [0, 1]] = True
    members[2, [10]] = True  # inside the mask too, beyond the box
    members[3, [15]] = True
    mask = torch.zeros(40, 40, dtype=torch.bool)
    mask[:20, :18], mask[20:30, 20:30] = True, True
    box = torch.tensor([0, 0, 36, 20])
    found = match_segment_proposals(mask, box, superpixels, members, min_side=26)
    expected = torch.zeros(40, 40, dtype=torch.bool)
    expected[:20, :20] = True
    assert torch.equal(found, expected)
    unmatched = match_segment_proposals(mask, box, superpixels, members[3:], min_side=0)
    assert torch.equal(unmatched, mask), "none lies in the box"
    small = match_segment_proposals(mask, box, superpixels, members, min_side=27)
    assert torch.equal(small, mask), "720 pixels"


def test_segments_beside_a_mask_don_t_replace_it() -> None:
    superpixels = (torch.arange(40)[:, None] // 10 * 4 + torch.arange(40) // 10).long()
    members = torch.zeros(2, 16, dtype=torch.bool)
    members[0, 3] = True  # in the box, but not in the mask
    members[1, [0, 1, 4, 5, 8]] = True  # 97 % of the mask, with a superpixel that the box does not reach
    mask, box = torch.zeros(40, 40, dtype=torch.bool), torch.tensor([0, 0, 40, 20])
    mask[:20, :20], mask[20:30, :9] = True, True
    assert torch.equal(match_segment_proposals(mask, box, superpixels, members, min_side=0), mask)
    members[0, 2] = True
    mask[:, 20] = True  # a pixel's width of the first
    found = match_segment_proposals(mask, box, superpixels, members, min_side=0)
    expected = torch.zeros_like(mask)
    expected[:10, 20:] = True
    assert torch.equal(found, expected), "the second is not added, since it leaves the box"


IMAGE = image()
EXPLAIN = BoundingBoxAttributionMap(Detector(), steps=1)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: EXPLAIN(IMAGE, PROPOSALS, CLASSES, MASKS[:2]), ValueError, r"masks: expected 3, one for each of"),
        (lambda: EXPLAIN(IMAGE, PROPOSALS + 1, CLASSES, MASKS), ValueError, r"boxes: expected image indices in 0..2"),
        (lambda: EXPLAIN(IMAGE, PROPOSALS, CLASSES + 9, MASKS), ValueError, r"classes: expected 0..3, got"),
        (lambda: EXPLAIN(IMAGE, PROPOSALS, CLASSES.float(), MASKS), TypeError, r"classes: expected an integer"),
        (lambda: EXPLAIN(IMAGE.long(), PROPOSALS, CLASSES, MASKS), TypeError, r"image: expected a floating"),
        (lambda: EXPLAIN(IMAGE[None].expand(2, -1, -1, -1), PROPOSALS, CLASSES, MASKS), ValueError, r"image: expected"),
        (lambda: EXPLAIN(IMAGE, PROPOSALS, CLASSES, [m[0] for m in MASKS]), ValueError, r"masks: expected shape"),
        (
            lambda: BoundingBoxAttributionMap(lambda x, p: (p[:, :2], p), steps=1)(IMAGE, PROPOSALS, CLASSES, MASKS),
            ValueError,
            r"detector_fn: expected shape \(4, 8\) as deltas",
        ),
        (lambda: BoundingBoxAttributionMap(Detector(), lr=-1), ValueError, r"lr: expected at least 0, got -1"),
        (lambda: PerturbImage("blur"), ValueError, r'background: expected "mean" or a tensor'),
        (lambda: perturb_image(IMAGE[:2], MASKS[0]), ValueError, r"image: expected shape \(3, H, W\)"),
        (lambda: perturb_image(IMAGE, MASKS[0][0]), ValueError, r"mask: expected shape \(1, h, w\)"),
        (lambda: adaptive_mask_stride(3.0, (0, 5)), ValueError, r"size: expected at least one pixel"),
        (lambda: adaptive_mask_stride(3.0, (5, 5), smallest=0), ValueError, r"smallest, growth: expected above 0"),
        (lambda: init_attribution_mask(PROPOSALS[:, 1:], (9, 9), 0.0), ValueError, r"stride: expected above 0"),
        (lambda: jitter_boxes(PROPOSALS, (9, 9)), ValueError, r"box: expected shape \(4,\)"),
        (
            lambda: select_positive_proposals(torch.zeros(2, 3), torch.zeros(2, 8), BOX, 1),
            ValueError,
            r"decoded_boxes: expected shape \(2, 12\) to match logits",
        ),
        (
            lambda: select_positive_proposals(torch.zeros(2, 3), torch.zeros(2, 12), BOX, 1, thresholds=()),
            ValueError,
            r"thresholds: expected at least one, got none",
        ),
        (lambda: box_seed_probability(seed_map(), BOX, SIZE, 1.5), ValueError, r"theta: expected a number in \[0, 1\]"),
        (lambda: box_seed_probability(seed_map().long(), BOX, SIZE, 0.5), TypeError, r"mask: expected a floating"),
        (lambda: refine_box_mask(None, BOX, SIZE, 0.2, fallbacks=()), ValueError, r"fallbacks: expected at least one"),
        (lambda: refine_box_mask(None, BOX, SIZE, -0.1), ValueError, r"theta: expected a number in \[0, 1\], got -0.1"),
        (lambda: BoxMaskRefiner(85), ValueError, r"theta: expected a number in \[0, 1\], got 85"),
        (lambda: BoxMaskRefiner(0.85, retries=()), ValueError, r"retries: expected at least one degree, got none"),
        (lambda: BoundingBoxAttributionMap(Detector(), tv_beta=0), ValueError, r"tv_beta: expected above 0, got 0"),
        (lambda: BoundingBoxAttributionMap(Detector(), box_weight=-1), ValueError, r"box_weight: expected at least 0"),
        (
            lambda: instances_to_semantic(MASKS[0], MASKS[1], CLASSES[:1], BOX[None]),
            ValueError,
            r"loose: expected shape \(1, 3, 4\) to match strict",
        ),
        (
            lambda: segment_overlaps(
                torch.ones(SIZE), BOX, *[x + 1 if x.dtype == torch.int64 else x for x in segments()]
            ),
            ValueError,
            r"superpixels: expected 0..8 to match members, got up to 9",
        ),
    ],
)
def test_messages_name_argument_expected_and_given(call, error, message) -> None:
    with pytest.raises(error, match=message):
        call()

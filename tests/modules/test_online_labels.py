import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from wsss_modules import (
    PixelAdaptiveRefinement,
    cam_to_label,
    fuse_thresholds,
    merge_multiscale_cams,
    present_softmax,
    refine_cam_with_background,
    refine_scores,
    refine_walked_scores,
)

seeds = st.integers(0, 1000)
PAR = PixelAdaptiveRefinement((1, 2), 3)
LABELS = torch.tensor([[1, 0, 1], [0, 1, 0]])


def maps(seed: int = 0, size: tuple[int, int] = (8, 10)) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(2, 3, *size, generator=generator), torch.rand(2, 3, *size, generator=generator)


# merging


@given(seeds)
def test_merged_maps_are_stretched_to_the_full_range_whatever_the_order(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    views = [torch.randn(4, 3, *size, generator=generator) for size in ((4, 5), (2, 3), (6, 8))]
    merged = merge_multiscale_cams(views, (16, 20))
    torch.testing.assert_close(merge_multiscale_cams(views[::-1], (16, 20)), merged)
    assert torch.equal(merged.amin((2, 3)), torch.zeros(2, 3))
    assert bool((merged <= 1).all())
    swapped = merge_multiscale_cams([torch.cat(view.chunk(2)[::-1]) for view in views], (16, 20))
    torch.testing.assert_close(swapped, merged.flip(3))


def test_merge_follows_its_definition() -> None:
    view = torch.randn(2, 1, 3, 4)
    plain, mirrored = F.interpolate(view, (6, 8), mode="bilinear", align_corners=False)
    total = torch.maximum(plain, mirrored.flip(-1)).relu()
    expected = (total - total.min()) / ((total - total.min()).max() + 1e-5)
    torch.testing.assert_close(merge_multiscale_cams([view], (6, 8))[0], expected)
    negative = merge_multiscale_cams([-torch.ones(2, 2, 3, 4)], (6, 8))
    assert not negative.any()


# softmax and labels


@given(seeds, st.floats(0, 1))
def test_softmax_runs_over_background_and_present_classes(seed: int, background: float) -> None:
    cam, _ = maps(seed)
    scores = present_softmax(cam, LABELS, background)
    torch.testing.assert_close(scores.sum(1), torch.ones(2, 8, 10))
    assert not scores[1, [1, 3]].any()
    one = torch.stack([torch.full((8, 10), background), cam[1, 1]]).softmax(0)
    torch.testing.assert_close(scores[1, [0, 2]], one)


def test_without_a_class_all_is_background() -> None:
    assert torch.equal(present_softmax(torch.rand(1, 2, 2, 2), torch.zeros(1, 2), 0.3)[:, 0], torch.ones(1, 2, 2))
    assert present_softmax(torch.rand(1, 0, 2, 2), torch.zeros(1, 0), 0.3).shape == (1, 1, 2, 2)
    assert not cam_to_label(torch.rand(1, 2, 2, 2), torch.zeros(1, 2)).any()
    assert not cam_to_label(torch.rand(1, 2, 2, 2), torch.zeros(1, 2), band=(0.1, 0.2)).any()


@given(seeds, st.floats(0, 1), st.floats(0, 1))
def test_labels_are_monotone_in_the_threshold(seed: int, first: float, second: float) -> None:
    cam, _ = maps(seed)
    low, high = sorted((first, second))
    assert bool(
        ((cam_to_label(cam, LABELS, background=high) > 0) <= (cam_to_label(cam, LABELS, background=low) > 0)).all()
    )
    band = cam_to_label(cam, LABELS, band=(low, high))
    certain, possible = (cam_to_label(cam, LABELS, background=t) for t in (high, low))
    assert torch.equal(band == 255, (certain == 0) & (possible > 0))
    assert torch.equal(cam_to_label(cam, LABELS, band=(low, low)), cam_to_label(cam, LABELS, background=low))


def test_thresholds_belong_to_the_side_below() -> None:
    cam = torch.tensor([0.25, 0.3, 0.5, 0.75]).view(1, 1, 1, 4)
    assert cam_to_label(cam, torch.ones(1, 1), background=0.25).flatten().tolist() == [0, 1, 1, 1]
    assert cam_to_label(cam, torch.ones(1, 1), band=(0.25, 0.5)).flatten().tolist() == [0, 255, 255, 1]


def test_regions_may_reach_beyond_the_image_and_hide_what_is_outside() -> None:
    cam, other = maps()
    regions = torch.tensor([[2, 1, 7, 5], [0, 0, 99, 99]])
    label = cam_to_label(cam, LABELS, regions=regions)
    inside = torch.zeros(2, 8, 10, dtype=torch.bool)
    inside[0, 1:5, 2:7] = inside[1] = True
    assert torch.equal(label == 255, ~inside)
    changed = torch.where(inside[:, None], cam, other)
    assert torch.equal(cam_to_label(changed, LABELS, regions=regions), label)


def test_fusion_says_unsure_where_the_backgrounds_disagree() -> None:
    strict, lenient = torch.tensor([[[0, 0, 2, 2]]]), torch.tensor([[[0, 1, 2, 1]]])
    assert fuse_thresholds(strict, lenient).flatten().tolist() == [0, 255, 2, 2]


# with refinement


def naive_refined_label(image: Tensor, cam: Tensor, labels: Tensor, low: float, high: float) -> Tensor:
    """Image by image, threshold by threshold, over all classes."""

    def half(x: Tensor) -> Tensor:
        return F.interpolate(x, (x.shape[2] // 2, x.shape[3] // 2), mode="bilinear", align_corners=False)

    out = []
    for i in range(len(image)):
        both = []
        for background in (low, high):
            scores = present_softmax(half(cam[i : i + 1]), labels[i : i + 1], background)
            refined = PAR(half(image[i : i + 1]), scores)
            both.append(F.interpolate(refined, image.shape[2:], mode="bilinear", align_corners=False).argmax(1))
        out.append(fuse_thresholds(both[1], both[0]))
    return torch.cat(out)


@given(seeds)
def test_refined_labels_are_those_of_each_image_alone(seed: int) -> None:
    cam, image = maps(seed)
    labels = torch.randint(0, 2, (2, 3), generator=torch.Generator().manual_seed(seed))
    expected = naive_refined_label(image, cam, labels, 0.3, 0.6)
    assert torch.equal(refine_cam_with_background(image, cam, labels, PAR, low=0.3, high=0.6), expected)


def test_refined_scores_know_no_padding() -> None:
    scores, image = torch.rand(2, 4, 12, 12), torch.rand(2, 3, 12, 12)
    regions = torch.tensor([[0, 0, 8, 12], [4, 2, 99, 10]])
    out = refine_scores(image, scores, LABELS, PAR, regions=regions)
    cut = refine_scores(image[1:, :, 2:10, 4:], scores[1:, :, 2:10, 4:], LABELS[1:], PAR)
    torch.testing.assert_close(out[1:, :, 2:10, 4:], cut)
    assert not out[0, :, :, 8:].any()
    assert not out[1, [1, 3]].any()  # absent
    everything = torch.tensor([[0, 0, 12, 12]] * 2)
    torch.testing.assert_close(
        refine_scores(image, scores, LABELS, PAR, regions=everything), refine_scores(image, scores, LABELS, PAR)
    )


def test_walked_scores_are_refined_as_scores_are() -> None:
    image = torch.rand(2, 3, 8, 10)
    low, high = (present_softmax(torch.rand(2, 3, 8, 10), LABELS, b) for b in (0.2, 0.6))
    lenient, strict = (refine_scores(image, scores, LABELS, PAR).argmax(1) for scores in (low, high))
    regions = torch.tensor([[0, 0, 10, 4], [0, 0, 10, 8]])
    expected = fuse_thresholds(strict, lenient)
    assert torch.equal(refine_walked_scores(image, low, high, LABELS, PAR), expected)
    label = refine_walked_scores(image, low, high, LABELS, PAR, regions=regions)
    assert bool((label[0, 4:] == 255).all())
    assert torch.equal(label[1], expected[1])


@pytest.mark.parametrize("labels", [[[0, 0, 0], [0, 0, 0]], [[0, 0, 0], [1, 1, 1]]], ids=str)
def test_images_without_a_class_are_background(labels: list[list[int]]) -> None:
    cam, image = maps()
    tags = torch.tensor(labels)
    assert not refine_cam_with_background(image, cam, tags, PAR)[0].any()
    scores = present_softmax(cam, tags, 0.5)
    assert not refine_walked_scores(image, scores, scores, tags, PAR)[0].any()


def test_regions_without_a_pixel_say_nothing() -> None:
    cam, image = maps()
    regions = torch.tensor([[5, 2, 5, 6], [12, 0, 20, 8]])  # no column, and beside the image
    scores = present_softmax(cam, LABELS, 0.5)
    assert bool((cam_to_label(cam, LABELS, regions=regions) == 255).all())
    assert bool((refine_cam_with_background(image, cam, LABELS, PAR, regions=regions) == 255).all())
    assert bool((refine_walked_scores(image, scores, scores, LABELS, PAR, regions=regions) == 255).all())
    assert not refine_scores(image, scores, LABELS, PAR, regions=regions).any()


def test_one_pixel_images_and_half_precision() -> None:
    cam, image = torch.rand(1, 2, 1, 1), torch.rand(1, 3, 1, 1)
    assert refine_cam_with_background(image, cam, torch.ones(1, 2), PAR).shape == (1, 1, 1)
    cam, image = (x.bfloat16() for x in maps())
    assert refine_cam_with_background(image, cam, LABELS, PAR).dtype == torch.int64


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: merge_multiscale_cams([], (4, 4)), ValueError, "maps: expected at least one tensor"),
        (lambda: merge_multiscale_cams([torch.rand(3, 1, 2, 2)], (4, 4)), ValueError, "as many mirror images, got 3"),
        (
            lambda: merge_multiscale_cams([torch.rand(2, 1, 2, 2), torch.rand(2, 2, 2, 2)], (4, 4)),
            ValueError,
            r"maps\[1\]: expected shape \(2, 1, \*, \*\) to match maps\[0\]",
        ),
        (lambda: present_softmax(torch.rand(1, 2, 2, 2), torch.ones(1, 3), 0.1), ValueError, "labels: expected shape"),
        (
            lambda: cam_to_label(torch.rand(1, 2, 2, 2), torch.ones(1, 2), band=(0.5, 0.4)),
            ValueError,
            r"band: expected \(low, high\) in ascending order",
        ),
        (
            lambda: cam_to_label(torch.rand(1, 2, 2, 2), torch.ones(1, 2), regions=torch.zeros(1, 5).long()),
            ValueError,
            r"regions: expected shape \(1, 4\)",
        ),
        (
            lambda: cam_to_label(torch.rand(1, 2, 2, 2), torch.ones(1, 2), regions=torch.zeros(1, 4)),
            TypeError,
            "regions: expected an integer tensor",
        ),
        (
            lambda: refine_cam_with_background(*maps()[::-1], LABELS, PAR, low=0.6, high=0.5),
            ValueError,
            "low: expected at most high = 0.5, got 0.6",
        ),
        (
            lambda: refine_cam_with_background(torch.rand(2, 3, 4, 4), maps()[0], LABELS, PAR),
            ValueError,
            r"image: expected shape \(2, 3, 8, 10\) to match the maps",
        ),
        (
            lambda: fuse_thresholds(torch.zeros(1, 2, 2), torch.zeros(1, 2, 2)),
            TypeError,
            "strict: expected an integer tensor",
        ),
    ],
)
def test_messages(call, error, message) -> None:
    with pytest.raises(error, match=message):
        call()

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from tests.modules import reference_object_mining as reference
from wsss_modules import (
    background_extraction_label,
    box_dilation,
    non_salient_region_masking,
    potential_object_mining,
)

KEYS = (3, 7, 12)


def pictures(seed: int, classes: int, size: tuple[int, int] = (9, 11)) -> tuple[dict[int, np.ndarray], np.ndarray]:
    """8-bit maps of some classes, one of them perhaps constant, and saliency."""
    rng = np.random.default_rng(seed)
    cam = {k: (rng.random(size) ** 2 * 255).astype(np.uint8) for k in KEYS[:classes]}
    if classes and seed % 5 == 0:
        cam[KEYS[0]][:] = rng.choice([0, 77])
    saliency = (rng.random(size) ** 3 * 255).astype(np.uint8)
    return cam, saliency


def stacked(cam: dict[int, np.ndarray], size: tuple[int, int] = (9, 11)) -> Tensor:
    if not cam:
        return torch.zeros(1, 0, *size)
    return torch.from_numpy(np.stack(list(cam.values()))).float()[None]


def keys_of(cam: dict[int, np.ndarray]) -> Tensor:
    return torch.tensor(list(cam), dtype=torch.int64)


def fraction(saliency: np.ndarray) -> Tensor:
    return torch.from_numpy(saliency).double()[None, None] / 255


@given(st.integers(0, 10**6), st.integers(0, 3))
def test_labels_equal_the_released_rules(seed: int, classes: int) -> None:
    attention, saliency = pictures(seed, classes)
    cam, _ = pictures(seed + 1, classes)
    expected = reference.initial_label(attention, saliency)
    label = background_extraction_label(stacked(attention), fraction(saliency), keys=keys_of(attention))
    assert torch.equal(label[0], torch.from_numpy(expected))
    expected = reference.whole_or_nothing(reference.mined(expected, cam))
    mined = potential_object_mining(label, stacked(cam), keys=keys_of(cam))
    assert torch.equal(mined[0], torch.from_numpy(expected))


@given(st.integers(0, 10**6), st.sampled_from([10, 50, 100, 250]), st.booleans())
def test_labels_of_few_grey_levels_equal_the_released_rules(seed: int, levels: int, double: bool) -> None:
    """Ranges in which thresholds and the middle of two values are hit exactly, so that the rounding decides."""
    rng = np.random.default_rng(seed)
    attention, cam = ({k: rng.integers(0, levels + 1, (9, 11)).astype(np.uint8) for k in KEYS[:2]} for _ in range(2))
    saliency = rng.choice([0, 25, 26, 31, 32, 178, 179, 229, 230, 255], (9, 11)).astype(np.uint8)
    dtype, keys = torch.float64 if double else torch.float32, keys_of(cam)
    label = background_extraction_label(stacked(attention).to(dtype), fraction(saliency), keys=keys)
    assert torch.equal(label[0], torch.from_numpy(reference.initial_label(attention, saliency)))
    label = torch.from_numpy(rng.choice([0, 0, *KEYS[:2]], (1, 9, 11)))
    mined = potential_object_mining(label, stacked(cam).to(dtype), keys=keys, min_foreground=0)
    assert torch.equal(mined[0], torch.from_numpy(reference.mined(label[0].numpy(), cam)))


@given(st.integers(0, 10**6))
def test_mining_only_turns_background_into_ignored(seed: int) -> None:
    attention, saliency = pictures(seed, 2)
    label = background_extraction_label(stacked(attention), fraction(saliency), keys=keys_of(attention))
    assert set(label.unique().tolist()) <= {0, 255, *attention}
    cam = stacked(pictures(seed + 1, 2)[0])
    mined = potential_object_mining(label, cam, keys=keys_of(attention), min_foreground=0)
    assert bool(((mined == label) | ((label == 0) & (mined == 255))).all())
    scaled = potential_object_mining(label, 0.25 * cam + 3, keys=keys_of(attention), min_foreground=0)
    assert torch.equal(scaled, mined)


def test_a_higher_foreground_threshold_never_adds_foreground() -> None:
    attention, saliency = pictures(1, 3, (40, 40))
    options = {"keys": keys_of(attention), "salient": 2.0, "attention": 2.0, "conflict": 2.0}
    low, high = (
        background_extraction_label(stacked(attention), fraction(saliency), foreground=t, **options) for t in (0.3, 0.6)
    )
    assert bool(((high == low) | (high == 0)).all())
    assert not torch.equal(low, high)


def test_without_labelled_pixels_the_upper_half_is_mined() -> None:
    mask = torch.tensor([[[0, 0, 0, 0, 0, 2]]])
    cam = torch.tensor([[[[0.0, 4.0, 6.0, 8.0, 10.0, 5.0]]]])
    # above 0.3: 4 5 6 8 10, median 6; above that 8 and 10, median 9
    assert potential_object_mining(mask, cam).tolist() == [[[0, 0, 0, 0, 255, 2]]]
    # the class has a pixel, but no attention there
    mask = torch.tensor([[[1, 0, 0, 0, 0, 2]]])
    assert potential_object_mining(mask, cam).tolist() == [[[1, 0, 0, 0, 255, 2]]]
    # all that exceeds 0.3 is the maximum: no upper half
    cam = torch.tensor([[[[0.0, 1.0, 1.0, 1.0, 1.0, 0.0]]]])
    assert potential_object_mining(mask, cam).tolist() == mask.tolist()


def test_images_of_a_batch_are_mined_alone() -> None:
    generator = torch.Generator().manual_seed(0)
    mask = torch.randint(0, 4, (3, 8, 9), generator=generator)
    cam = torch.rand(3, 3, 8, 9, generator=generator)
    alone = [potential_object_mining(mask[i : i + 1], cam[i : i + 1]) for i in range(3)]
    assert torch.equal(potential_object_mining(mask, cam), torch.cat(alone))
    assert bool((potential_object_mining(mask, cam) == 255).any())


@pytest.mark.parametrize(("pixels", "kept"), [(6, False), (7, True)])
def test_an_image_with_less_than_one_percent_foreground_is_ignored_whole(pixels: int, kept: bool) -> None:
    mask, nothing = torch.zeros(1, 7, 100, dtype=torch.int64), torch.zeros(1, 1, 7, 100)
    mask[0, 0, :pixels] = 1
    expected = mask if kept else torch.full_like(mask, 255)
    assert torch.equal(potential_object_mining(mask, nothing), expected)
    assert torch.equal(potential_object_mining(mask, nothing[:, :0]), expected)
    assert torch.equal(non_salient_region_masking(mask, mask, nothing, torch.ones(1, 1)), expected)
    assert torch.equal(potential_object_mining(mask, nothing, min_foreground=0), mask)


@given(st.integers(0, 10**6), st.integers(1, 3), st.integers(1, 14))
def test_masked_labels_equal_the_released_rules(seed: int, classes: int, dilation: int) -> None:
    rng = np.random.default_rng(seed)
    segmentation = rng.choice([0, 0, 0, 0, 0, 0, 3, 7], (9, 11)) * (rng.random((9, 1)) > 0.7)
    pseudo = rng.choice([0, 0, 0, 0, 0, 3, 255], (9, 11)) * (rng.random((1, 11)) > 0.7)
    saliency = (rng.choice([0, 0, 0, 0, 0, 0, 1, 200], (9, 11)) * (rng.random((9, 11)) > 0.8)).astype(np.uint8)
    expected = reference.masked(segmentation, pseudo, saliency, classes, dilation)
    labels = (torch.arange(12) < classes).float()[None]
    found = non_salient_region_masking(
        torch.from_numpy(segmentation)[None],
        torch.from_numpy(pseudo)[None],
        fraction(saliency).float(),
        labels,
        dilation=dilation,
    )
    assert torch.equal(found[0], torch.from_numpy(expected))


def test_images_with_one_class_keep_the_segmentation() -> None:
    segmentation = torch.randint(0, 3, (2, 6, 7))
    pseudo, saliency = torch.full_like(segmentation, 2), torch.rand(2, 1, 6, 7)
    labels = torch.tensor([[0, 1], [1, 1]])
    found = non_salient_region_masking(segmentation, pseudo, saliency, labels)
    assert torch.equal(found[0], segmentation[0])
    assert torch.equal(found[1], torch.where(segmentation[1] == 0, 2, segmentation[1]))
    same = non_salient_region_masking(segmentation, pseudo, saliency, labels, min_classes=3)
    assert torch.equal(same, segmentation)


def test_classes_that_the_image_has_not_may_be_refused() -> None:
    segmentation = torch.tensor([[[1, 3, 3, 0, 255, 9]], [[1, 3, 3, 0, 255, 2]]])
    pseudo = torch.tensor([[[0, 2, 0, 2, 0, 0]], [[0, 1, 0, 1, 0, 0]]])
    labels = torch.tensor([[1, 1, 0], [1, 0, 0]])
    nothing = torch.zeros(2, 1, 1, 6)
    plain = non_salient_region_masking(segmentation, pseudo, nothing, labels)
    assert plain.tolist() == [[[1, 3, 3, 2, 255, 9]], segmentation[1].tolist()]
    strict = non_salient_region_masking(segmentation, pseudo, nothing, labels, restrict_to_image_labels=True)
    assert strict.tolist() == [[[1, 2, 255, 2, 255, 255]], [[1, 1, 255, 0, 255, 255]]]


@given(st.integers(0, 10**6), st.integers(1, 9), st.integers(1, 12), st.integers(1, 12))
def test_box_sums_equal_the_maximum_of_the_square(seed: int, size: int, height: int, width: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    mask = torch.rand(height, width, generator=generator) > 0.9
    grown = box_dilation(mask, size)
    assert torch.equal(grown, reference.max_dilation(mask, size))
    assert grown.dtype == torch.bool
    assert bool((box_dilation(mask, size + 1) >= grown).all())


def test_dilation_of_batches_numbers_and_squares_larger_than_the_picture() -> None:
    masks = torch.rand(2, 3, 5, 6) > 0.9
    each = [[box_dilation(masks[b, k], 3) for k in range(3)] for b in range(2)]
    assert torch.equal(box_dilation(masks, 3), torch.stack([torch.stack(row) for row in each]))
    assert torch.equal(box_dilation(masks.float(), 3), box_dilation(masks, 3))
    assert torch.equal(box_dilation(masks, 1), masks)
    assert not box_dilation(torch.zeros(4, 4), 30).any()
    single = torch.zeros(4, 4)
    single[3, 3] = -1
    assert box_dilation(single, 30).all()


def test_labels_compile() -> None:
    attention, saliency = pictures(3, 2)
    cam, labels = stacked(attention), torch.tensor([[1, 1]])

    def labelled(cam: Tensor, saliency: Tensor) -> Tensor:
        mask = potential_object_mining(background_extraction_label(cam, saliency), cam)
        return non_salient_region_masking(mask % 3, mask, saliency, labels, restrict_to_image_labels=True)

    compiled = torch.compile(labelled, fullgraph=True, backend="aot_eager")
    inputs = cam, fraction(saliency).float()
    assert torch.equal(compiled(*inputs), labelled(*inputs))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_maps_in_half_precision_are_stretched_in_full_precision(dtype: torch.dtype) -> None:
    attention, saliency = pictures(4, 2)
    exact = background_extraction_label(stacked(attention), fraction(saliency))
    assert torch.equal(background_extraction_label(stacked(attention).to(dtype), fraction(saliency)), exact)
    mined = potential_object_mining(exact, stacked(attention))
    assert torch.equal(potential_object_mining(exact, stacked(attention).to(dtype)), mined)


CAM, SALIENCY, MASK = torch.rand(2, 3, 4, 5), torch.rand(2, 1, 4, 5), torch.zeros(2, 4, 5, dtype=torch.int64)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (
            lambda: background_extraction_label(CAM[0], SALIENCY),
            ValueError,
            r"cam: expected shape \(B, K, H, W\), got \(3, 4, 5\)",
        ),
        (lambda: background_extraction_label(CAM.byte(), SALIENCY), TypeError, r"cam: expected a floating-point"),
        (
            lambda: background_extraction_label(CAM, SALIENCY[..., 1:]),
            ValueError,
            r"saliency: expected shape \(2, 1, 4, 5\) to match scores, got \(2, 1, 4, 4\)",
        ),
        (
            lambda: potential_object_mining(MASK[:1], CAM),
            ValueError,
            r"mask: expected shape \(2, 4, 5\) to match cam, got \(1, 4, 5\)",
        ),
        (lambda: potential_object_mining(MASK.float(), CAM), TypeError, r"mask: expected an integer tensor"),
        (
            lambda: potential_object_mining(MASK, CAM, keys=torch.arange(2)),
            ValueError,
            r"keys: expected shape \(3,\) to match cam, got \(2,\)",
        ),
        (
            lambda: non_salient_region_masking(MASK, MASK[:, 1:], SALIENCY, CAM[:, :, 0, 0]),
            ValueError,
            r"pseudo_label: expected shape \(2, 4, 5\) to match segmentation, got \(2, 3, 5\)",
        ),
        (
            lambda: non_salient_region_masking(MASK, MASK, SALIENCY[:, 0], CAM[:, :, 0, 0]),
            ValueError,
            r"saliency: expected shape \(2, 1, 4, 5\) to match segmentation, got \(2, 4, 5\)",
        ),
        (
            lambda: non_salient_region_masking(MASK, MASK, SALIENCY, CAM[:1, :, 0, 0]),
            ValueError,
            r"labels: expected shape \(2, \*\) to match segmentation, got \(1, 3\)",
        ),
        (
            lambda: non_salient_region_masking(MASK.float(), MASK, SALIENCY, CAM[:, :, 0, 0]),
            TypeError,
            r"segmentation: expected an integer tensor",
        ),
        (lambda: box_dilation(MASK, 0), ValueError, r"size: expected at least 1 pixel, got 0"),
        (lambda: box_dilation(MASK[0, 0], 3), ValueError, r"mask: expected shape \(\.\.\., H, W\), got \(5,\)"),
    ],
)
def test_messages(call, error, message) -> None:
    with pytest.raises(error, match=message):
        call()

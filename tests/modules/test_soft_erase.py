import random

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from tests.modules import reference_aeft
from wsss_modules import SoftErase, minmax_cam, normalize_cam, sample_disjoint_negatives, soft_erase_mask

HALF = [torch.float16, torch.bfloat16]
LABELS = torch.tensor([[1, 0, 1], [0, 1, 0], [0, 0, 0]])


def random_map(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@given(st.integers(0, 99), st.floats(1e-6, 1e-2))
def test_minmax_cam_equals_its_formula_map_by_map(seed: int, eps: float) -> None:
    cam = random_map(2, 3, 4, 5, seed=seed)
    expected = torch.stack([reference_aeft.minmax(x, eps) for x in cam.flatten(0, 1)]).view_as(cam)
    torch.testing.assert_close(minmax_cam(cam, eps), expected, rtol=1e-12, atol=1e-12)
    assert ((minmax_cam(cam, eps) >= 0) & (minmax_cam(cam, eps) < 1)).all()


def test_minmax_cam_without_eps_is_the_stretched_normalisation() -> None:
    cam = random_map(2, 3, 4, 5)
    torch.testing.assert_close(minmax_cam(cam, 0), normalize_cam(cam.clamp(min=0), 0, subtract_min=True))


@pytest.mark.parametrize("value", [-2.0, 0.0, 3.0])
@pytest.mark.parametrize("dtype", [torch.float32, *HALF])
def test_minmax_cam_of_a_constant_map_is_zero_with_a_finite_gradient(value: float, dtype: torch.dtype) -> None:
    cam = torch.full((1, 2, 3, 3), value, dtype=dtype, requires_grad=True)
    out = minmax_cam(cam)
    assert out.dtype == dtype
    assert not out.any()
    (grad,) = torch.autograd.grad(out.sum(), cam)
    assert not grad.any()


def test_minmax_cam_gradient_flows_through_minimum_and_maximum() -> None:
    cam = (random_map(2, 2, 3, 3).abs() + 0.1).requires_grad_()
    assert torch.autograd.gradcheck(minmax_cam, cam)
    flat = cam.detach().flatten(2)
    (grad,) = torch.autograd.grad(minmax_cam(cam)[..., 1, 1].sum(), cam)
    grad = grad.flatten(2)
    middle = (flat.argmax(2) != 4) & (flat.argmin(2) != 4)
    assert middle.any()
    for place in (flat.argmax(2), flat.argmin(2)):
        assert grad.gather(2, place[..., None])[..., 0][middle].all()


@pytest.mark.parametrize("shape", [(0, 3, 4, 4), (2, 0, 4, 4), (2, 3, 0, 4)])
def test_minmax_cam_of_empty_maps(shape: tuple[int, ...]) -> None:
    assert minmax_cam(torch.zeros(shape)).shape == shape


@pytest.mark.parametrize("size", [(12, 20), (7, 5), (3, 5), (1, 1)])
@pytest.mark.parametrize("threshold", [0.6, 0.25])
def test_mask_equals_the_form_with_loops(size: tuple[int, int], threshold: float) -> None:
    cam = random_map(3, 3, 3, 5)
    mask = soft_erase_mask(cam, LABELS, size, threshold=threshold)
    for image in range(3):
        expected = reference_aeft.soft_erase_mask(cam[image], LABELS[image], size, threshold, 1e-5)
        torch.testing.assert_close(mask[image], expected.double(), rtol=1e-6, atol=1e-6)


@given(st.integers(0, 99), st.floats(0.05, 1.0))
def test_mask_lies_below_the_threshold_and_is_zero_without_a_label(seed: int, threshold: float) -> None:
    mask = SoftErase(threshold)(random_map(3, 3, 4, 4, seed=seed), LABELS, (9, 9))
    assert mask.shape == (3, 1, 9, 9)
    assert (mask >= 0).all()
    assert (mask < threshold).all()
    assert not mask[2].any()
    assert mask[:2].any()


def test_threshold_itself_is_erased() -> None:
    cam = torch.tensor([[[[0.0, 1.0, 2.0]]]], dtype=torch.float64)
    middle = minmax_cam(cam)[0, 0, 0, 1].item()
    labels = torch.ones(1, 1)
    assert soft_erase_mask(cam, labels, (1, 3), threshold=middle)[0, 0, 0, 1] == 0
    assert soft_erase_mask(cam, labels, (1, 3), threshold=middle + 1e-9)[0, 0, 0, 1] == middle


def test_strong_areas_and_background_are_erased_and_the_middle_is_kept() -> None:
    cam = torch.tensor([[[[-5.0, 0.5, 1.0]]]])
    mask = soft_erase_mask(cam, torch.ones(1, 1, dtype=torch.bool), (1, 3))
    torch.testing.assert_close(mask[0, 0, 0], torch.tensor([0.0, 0.5, 0.0]), rtol=1e-4, atol=0)


def test_absent_classes_may_be_anything() -> None:
    cam = random_map(3, 3, 4, 4)
    for garbage in (1e6, float("nan"), float("inf")):
        spoilt = torch.where((LABELS > 0)[:, :, None, None], cam, garbage).requires_grad_()
        mask = soft_erase_mask(spoilt, LABELS, (9, 9))
        assert torch.equal(mask, soft_erase_mask(cam, LABELS, (9, 9)))
    (grad,) = torch.autograd.grad(mask.sum(), spoilt)
    assert not grad[LABELS == 0].nan_to_num().any()


def test_mask_does_not_depend_on_the_scale_of_the_map_up_to_eps() -> None:
    cam = random_map(3, 3, 4, 4)
    torch.testing.assert_close(
        soft_erase_mask(1000 * cam, LABELS, (9, 9), eps=0), soft_erase_mask(cam, LABELS, (9, 9), eps=0)
    )


def test_gradient_reaches_the_map_unless_it_is_detached() -> None:
    cam = random_map(3, 3, 4, 4).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: soft_erase_mask(x, LABELS, (6, 6)), cam)
    mask = SoftErase(detach_mask=True)(cam, LABELS, (6, 6))
    assert not mask.requires_grad
    assert torch.equal(mask, SoftErase()(cam, LABELS, (6, 6)))


@pytest.mark.parametrize("value", [-1.0, 0.0, 7.0])
def test_constant_maps_give_an_empty_mask_and_a_finite_gradient(value: float) -> None:
    cam = torch.full((3, 3, 2, 2), value, requires_grad=True)
    mask = soft_erase_mask(cam, LABELS, (5, 5))
    assert not mask.any()
    (grad,) = torch.autograd.grad(mask.sum(), cam)
    assert grad.isfinite().all()


@pytest.mark.parametrize("dtype", HALF)
def test_mask_in_half_precision_is_the_rounded_float64_mask(dtype: torch.dtype) -> None:
    cam = random_map(2, 3, 4, 4).to(dtype)
    mask = soft_erase_mask(cam, LABELS[:2], (8, 8))
    assert mask.dtype == dtype
    exact = soft_erase_mask(cam.double(), LABELS[:2], (8, 8))
    torch.testing.assert_close(mask.double(), exact, rtol=torch.finfo(dtype).eps, atol=1e-6)


@pytest.mark.parametrize("labels", [LABELS, torch.ones(3, 3), LABELS * 0], ids=["some", "all", "none"])
def test_mask_and_gradient_equal_the_form_over_all_classes(labels: Tensor) -> None:
    cam = random_map(3, 3, 4, 4).requires_grad_()
    mask, expected = soft_erase_mask(cam, labels, (9, 11)), reference_aeft.soft_erase_of_all(cam, labels, (9, 11))
    assert torch.equal(mask, expected)
    weight = random_map(*mask.shape, seed=1)
    torch.testing.assert_close(*(torch.autograd.grad((weight * out).sum(), cam)[0] for out in (mask, expected)))


def test_no_class_and_no_image() -> None:
    assert not soft_erase_mask(torch.zeros(2, 0, 4, 4), torch.zeros(2, 0), (8, 8)).any()
    assert soft_erase_mask(torch.zeros(0, 3, 4, 4), torch.zeros(0, 3), (8, 8)).shape == (0, 1, 8, 8)


def voc_like_labels(batch: int, classes: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    first = torch.randint(classes, (batch,), generator=generator)
    labels = (torch.rand(batch, classes, generator=generator) < 0.3 / classes).float()
    return labels.scatter(1, first[:, None], 1.0)


@given(st.integers(0, 99), st.integers(1, 9), st.integers(1, 5))
def test_negatives_are_disjoint_and_valid_says_whether_there_is_one(seed: int, batch: int, classes: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    labels = (torch.rand(batch, classes, generator=generator) < 0.4).float()
    negative, valid = sample_disjoint_negatives(labels, generator=generator)
    assert negative.dtype == torch.int64
    for i in range(batch):
        partners = [
            j for j in range(batch) if labels[i].any() and labels[j].any() and not (labels[i] * labels[j]).any()
        ]
        assert valid[i] == bool(partners)
        assert negative[i].item() in (partners or [i])


@given(st.integers(0, 30))
def test_negatives_are_those_of_the_released_search_in_the_same_order(seed: int) -> None:
    labels = voc_like_labels(12, 8, seed)
    negatives, orders = reference_aeft.search_negatives(labels, random.Random(seed))
    negative, valid = sample_disjoint_negatives(labels, draws=reference_aeft.draws_of(orders))
    assert valid.all()
    assert negative.tolist() == negatives


def test_each_partner_is_drawn_equally_often() -> None:
    labels = torch.tensor([[1, 0, 0], [0, 1, 0], [1, 0, 1], [0, 0, 1], [0, 1, 1]])
    generator = torch.Generator().manual_seed(0)
    drawn = torch.stack([sample_disjoint_negatives(labels, generator=generator).negative for _ in range(3000)])
    counts = torch.bincount(drawn[:, 0], minlength=5)
    assert counts[[0, 2]].tolist() == [0, 0]
    assert ((counts[[1, 3, 4]] - 1000).abs() < 4 * (3000 * 2 / 9) ** 0.5).all(), "within four standard deviations"


def test_same_generator_same_negatives_and_another_seed_others() -> None:
    labels = voc_like_labels(32, 20, 0)

    def drawn(seed: int) -> list[int]:
        return sample_disjoint_negatives(labels, generator=torch.Generator().manual_seed(seed)).negative.tolist()

    assert drawn(1) == drawn(1)
    assert drawn(1) != drawn(2)


@pytest.mark.parametrize("dtype", [torch.bool, torch.int64, torch.float16, torch.float64])
def test_negatives_don_t_depend_on_the_dtype_of_the_labels(dtype: torch.dtype) -> None:
    labels, draws = voc_like_labels(8, 5, 1), torch.rand(8, 8)
    expected = sample_disjoint_negatives(labels, draws=draws)
    for got, wanted in zip(sample_disjoint_negatives(labels.to(dtype), draws=draws), expected, strict=True):
        assert torch.equal(got, wanted)


def test_images_without_a_partner_are_marked_and_don_t_move_the_others() -> None:
    labels = torch.tensor([[1, 0, 0], [1, 1, 1], [0, 1, 0], [0, 0, 0]])
    negative, valid = sample_disjoint_negatives(labels)
    assert valid.tolist() == [True, False, True, False]
    assert negative.tolist() == [2, 1, 0, 3]
    negative, valid = sample_disjoint_negatives(labels[:1])
    assert (negative.tolist(), valid.tolist()) == ([0], [False])
    assert [len(x) for x in sample_disjoint_negatives(labels[:0])] == [0, 0]


def test_draws_of_zero_are_draws() -> None:
    negative, valid = sample_disjoint_negatives(torch.eye(3), draws=torch.zeros(3, 3))
    assert valid.all()
    assert negative.tolist() == [1, 0, 0]


def test_sampler_compiles_to_one_graph() -> None:
    labels, draws = voc_like_labels(8, 5, 1), torch.rand(8, 8)
    compiled = torch.compile(sample_disjoint_negatives, fullgraph=True, backend="aot_eager")
    for got, wanted in zip(compiled(labels, draws=draws), sample_disjoint_negatives(labels, draws=draws), strict=True):
        assert torch.equal(got, wanted)


def test_messages_name_argument_expected_and_given() -> None:
    cam = torch.zeros(2, 3, 4, 4)
    with pytest.raises(ValueError, match=r"labels: expected shape \(2, 3\) to match cam, got \(2, 4\)"):
        soft_erase_mask(cam, torch.zeros(2, 4), (8, 8))
    with pytest.raises(TypeError, match=r"cam: expected a floating-point tensor, got torch.int64"):
        soft_erase_mask(cam.long(), torch.zeros(2, 3), (8, 8))
    with pytest.raises(ValueError, match=r"cam: expected shape \(B, K, h, w\), got \(3, 4, 4\)"):
        soft_erase_mask(cam[0], torch.zeros(3, 4), (8, 8))
    with pytest.raises(ValueError, match=r"cam: expected shape \(\.\.\., H, W\), got \(5,\)"):
        minmax_cam(torch.zeros(5))
    with pytest.raises(TypeError, match=r"cam: expected a floating-point tensor, got torch.bool"):
        minmax_cam(torch.zeros(5, 5, dtype=torch.bool))
    with pytest.raises(ValueError, match=r"labels: expected shape \(B, K\), got \(3,\)"):
        sample_disjoint_negatives(torch.zeros(3))
    with pytest.raises(ValueError, match=r"draws: expected shape \(2, 2\) to match labels, got \(2, 3\)"):
        sample_disjoint_negatives(torch.zeros(2, 3), draws=torch.zeros(2, 3))
    with pytest.raises(TypeError, match=r"draws: expected a floating-point tensor, got torch.int64"):
        sample_disjoint_negatives(torch.zeros(2, 3), draws=torch.zeros(2, 2, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"draws: expected None when a generator is given, got both"):
        sample_disjoint_negatives(torch.zeros(2, 3), generator=torch.Generator(), draws=torch.zeros(2, 2))

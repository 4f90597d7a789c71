import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.autograd import gradcheck

from tests.modules.reference_class_masked import broadcast_pooling, looped_pooling
from wsss_modules import class_masked_pooling, normalize_cam, pool_present_classes

HALF = [torch.float16, torch.bfloat16]
POOLS = ["mean", "mass"]


def maps(
    batch: int = 2, classes: int = 4, channels: int = 5, size: tuple[int, int] = (3, 6), seed: int = 0
) -> tuple[Tensor, Tensor]:
    """Features and masks in float64."""
    generator = torch.Generator().manual_seed(seed)
    features = torch.randn(batch, channels, *size, generator=generator, dtype=torch.float64)
    return features, torch.rand(batch, classes, *size, generator=generator, dtype=torch.float64)


def test_pooling_is_the_mean_of_masked_features_over_all_pixels() -> None:
    features, cam = maps()
    pooled = class_masked_pooling(features, cam)
    for image in range(2):
        for channel in range(4):
            torch.testing.assert_close(pooled[image, channel], looped_pooling(features, cam, image, channel))


@given(st.integers(0, 3), st.integers(1, 4), st.integers(1, 5), st.integers(1, 4), st.integers(1, 4))
def test_pooling_equals_the_broadcast_form_at_any_size(b: int, k: int, d: int, h: int, w: int) -> None:
    features, cam = maps(b, k, d, (h, w))
    torch.testing.assert_close(class_masked_pooling(features, cam), broadcast_pooling(features, cam))


def test_gradients_equal_those_of_the_broadcast_form() -> None:
    for memory_format in (torch.contiguous_format, torch.channels_last):
        leaves = [x.contiguous(memory_format=memory_format).requires_grad_() for x in maps()]
        cotangent = torch.randn(2, 4, 5, dtype=torch.float64)
        ours = torch.autograd.grad((class_masked_pooling(*leaves) * cotangent).sum(), leaves)
        released = torch.autograd.grad((broadcast_pooling(*leaves) * cotangent).sum(), leaves)
        torch.testing.assert_close(ours, released)


@pytest.mark.parametrize("pool", POOLS)
@given(seed=st.integers(0, 99))
def test_present_classes_are_rows_of_the_dense_form(pool: str, seed: int) -> None:
    leaves = [x.requires_grad_() for x in maps(3, seed=seed)]
    labels = torch.rand(3, 4, generator=torch.Generator().manual_seed(seed)) > 0.6
    dense, present = class_masked_pooling(*leaves, pool=pool), pool_present_classes(*leaves, labels, pool=pool)
    assert torch.equal(torch.stack([present.image, present.keys - 1], 1), labels.nonzero())
    torch.testing.assert_close(present.features, dense[labels])
    cotangent = torch.randn_like(present.features)
    ours = torch.autograd.grad((present.features * cotangent).sum(), leaves)
    torch.testing.assert_close(ours, torch.autograd.grad((dense[labels] * cotangent).sum(), leaves))


def test_soft_labels_are_present_and_no_label_gives_no_row() -> None:
    features, cam = maps()
    labels = torch.tensor([[0.2, 0, 0, 0], [0, 0, 0, 1.0]])
    assert pool_present_classes(features, cam, labels).keys.tolist() == [1, 4]
    nothing = pool_present_classes(features.requires_grad_(), cam, torch.zeros(2, 4))
    assert nothing.features.shape == (0, 5)
    (grad,) = torch.autograd.grad(nothing.features.sum(), features)
    assert not grad.any()


def test_absent_maps_may_hold_anything() -> None:
    features, cam = maps()
    labels = torch.tensor([[1, 0, 1, 0], [0, 1, 0, 0]])
    clean = pool_present_classes(features, cam, labels).features
    cam = torch.where(labels[:, :, None, None] > 0, cam, float("nan")).requires_grad_()
    pooled = pool_present_classes(features, cam, labels).features
    assert torch.equal(pooled, clean)
    (grad,) = torch.autograd.grad(pooled.sum(), cam)
    assert grad.isfinite().all()


@pytest.mark.parametrize("pool", POOLS)
def test_empty_batch(pool: str) -> None:
    features, cam = maps(batch=0)
    assert class_masked_pooling(features, cam, pool=pool).shape == (0, 4, 5)
    assert pool_present_classes(features, cam, torch.zeros(0, 4), pool=pool).features.shape == (0, 5)


def small_and_large_object() -> tuple[Tensor, Tensor]:
    """The same object on 1 and on 9 of 36 pixels, with maps that are right."""
    object_mask = torch.zeros(2, 1, 6, 6, dtype=torch.float64)
    object_mask[0, :, :1, :1] = 1
    object_mask[1, :, :3, :3] = 1
    appearance = torch.randn(1, 5, 1, 1, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    return object_mask * appearance, object_mask


def test_mean_gives_an_object_a_length_that_grows_with_its_area() -> None:
    small, large = class_masked_pooling(*small_and_large_object())
    torch.testing.assert_close(9 * small, large)


def test_mass_gives_an_object_the_same_length_whatever_its_area() -> None:
    small, large = class_masked_pooling(*small_and_large_object(), pool="mass", eps=0.0)
    torch.testing.assert_close(small, large)


@pytest.mark.parametrize("pool", POOLS)
def test_dead_class_gives_zeros_and_no_gradient_beyond_its_relu(pool: str) -> None:
    features, scores = maps()
    scores[:, 1] = -1.0
    leaves = [x.requires_grad_() for x in (features, scores)]
    pooled = class_masked_pooling(features, normalize_cam(scores.relu()), pool=pool)
    assert not pooled[:, 1].any()
    grads = torch.autograd.grad(pooled[:, 1].sum(), leaves)
    assert all(not grad.any() for grad in grads)


@pytest.mark.parametrize("pool", POOLS)
def test_gradcheck(pool: str) -> None:
    leaves = [x.requires_grad_() for x in maps(2, 2, 3, (2, 3))]
    labels = torch.tensor([[1, 1], [0, 1]])
    assert gradcheck(lambda f, a: class_masked_pooling(f, a, pool=pool), leaves)
    assert gradcheck(lambda f, a: pool_present_classes(f, a, labels, pool=pool).features, leaves)


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("pool", POOLS)
def test_half_precision_neither_overflows_nor_loses_small_addends(dtype: torch.dtype, pool: str) -> None:
    features = torch.full((1, 2, 64, 64), 1000.0, dtype=dtype)  # a sum of 4 million overflows float16
    cam = torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(0)).to(dtype)
    pooled = class_masked_pooling(features, cam, pool=pool)
    exact = class_masked_pooling(features.double(), cam.double(), pool=pool)
    assert pooled.dtype == dtype
    torch.testing.assert_close(pooled.double(), exact, rtol=torch.finfo(dtype).eps, atol=0)


def test_autocast_does_not_lower_the_precision() -> None:
    features, cam = (x.float() for x in maps())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        pooled = class_masked_pooling(features, cam)
    assert torch.equal(pooled, class_masked_pooling(features, cam))


@pytest.mark.parametrize("pool", POOLS)
def test_dense_form_compiles_to_one_graph(pool: str) -> None:
    def step(features: Tensor, cam: Tensor) -> Tensor:
        return class_masked_pooling(features, cam, pool=pool)

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(*maps()), step(*maps()))


FEATURES, CAM = (x.float() for x in maps())


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: class_masked_pooling(FEATURES[0], CAM), ValueError, r"features: expected shape \(B, D, H, W\), got"),
        (
            lambda: class_masked_pooling(FEATURES, CAM[..., :2]),
            ValueError,
            r"cam: expected shape \(2, \*, 3, 6\) to match features, got \(2, 4, 3, 2\)",
        ),
        (lambda: class_masked_pooling(FEATURES, CAM > 0.5), TypeError, r"cam: expected a floating-point tensor"),
        (lambda: class_masked_pooling(FEATURES.long(), CAM), TypeError, r"features: expected a floating-point tensor"),
        (lambda: class_masked_pooling(FEATURES, CAM, pool="sum"), ValueError, r'pool: expected "mean" or "mass"'),
        (
            lambda: pool_present_classes(FEATURES, CAM, torch.ones(2, 3)),
            ValueError,
            r"labels: expected shape \(2, 4\) to match cam, got \(2, 3\)",
        ),
    ],
    ids=["features", "cam", "bool-mask", "integer-features", "pool", "labels"],
)
def test_messages_name_argument_expected_and_given(call, error, message) -> None:
    with pytest.raises(error, match=message):
        call()


def test_mass_of_an_empty_mask_gives_zeros_without_eps() -> None:
    pooled = class_masked_pooling(torch.ones(1, 2, 3, 3), torch.zeros(1, 4, 3, 3), pool="mass", eps=0.0)
    assert torch.equal(pooled, torch.zeros(1, 4, 2))

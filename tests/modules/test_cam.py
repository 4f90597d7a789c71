import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn import functional as F

from tests.modules.reference_cam import dense_reference
from wsss_modules import (
    CAMHead,
    background_score,
    cam_to_mask,
    merge_flip,
    multi_scale_cam,
    normalize_cam,
    select_present,
)

HALF = [torch.float16, torch.bfloat16]


def test_normalize_cam_divides_by_each_maps_own_maximum() -> None:
    cam = torch.rand(2, 3, 4, 5)
    expected = torch.stack([torch.stack([m / (m.max() + 1e-5) for m in image]) for image in cam])
    assert torch.equal(normalize_cam(cam), expected)


def test_normalize_cam_stretches_with_subtract_min() -> None:
    cam = torch.rand(2, 3, 4, 5) + 2
    out = normalize_cam(cam, 1e-8, subtract_min=True)
    assert torch.equal(out.amin((2, 3)), torch.zeros(2, 3))
    torch.testing.assert_close(out.amax((2, 3)), torch.ones(2, 3))


@pytest.mark.parametrize("eps", [1e-5, 0.0])
@pytest.mark.parametrize("subtract_min", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, *HALF])
def test_normalize_cam_leaves_a_zero_map_zero(eps: float, subtract_min: bool, dtype: torch.dtype) -> None:
    cam = torch.zeros(1, 2, 3, 3, dtype=dtype)
    cam[0, 1, 1, 1] = 4.0
    out = normalize_cam(cam, eps, subtract_min=subtract_min)
    assert out.dtype == dtype
    assert not out[0, 0].any()
    torch.testing.assert_close(out[0, 1, 1, 1].float(), torch.tensor(1.0), rtol=0, atol=1e-4)


def test_normalize_cam_leaves_a_negative_map_as_it_is() -> None:
    cam = torch.tensor([[-1.0, -2.0]])
    assert torch.equal(normalize_cam(cam), cam)


@pytest.mark.parametrize("shape", [(0, 3, 4, 4), (2, 0, 4, 4), (1, 1, 1, 1)])
def test_normalize_cam_of_degenerate_shapes(shape: tuple[int, ...]) -> None:
    assert normalize_cam(torch.rand(shape)).shape == shape


@given(st.floats(0.01, 1000))
def test_normalize_cam_does_not_depend_on_the_scale_up_to_eps(gain: float) -> None:
    cam = torch.rand(1, 2, 5, 5).double() + 0.1
    bound = 1e-5 / 0.1 * (1 + 1 / gain)  # eps over the least maximum, on both sides
    torch.testing.assert_close(normalize_cam(gain * cam), normalize_cam(cam), rtol=bound, atol=0)
    torch.testing.assert_close(normalize_cam(gain * cam, 0), normalize_cam(cam, 0))


def test_normalize_cam_gradient_flows_through_the_maximum() -> None:
    cam = torch.rand(2, 2, 3, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(normalize_cam, cam)
    assert torch.autograd.gradcheck(lambda x: normalize_cam(x, subtract_min=True), cam)


def test_background_score_values() -> None:
    cam = torch.rand(2, 3, 4, 5)
    for alpha in (1, 4, 16, 32):
        torch.testing.assert_close(background_score(cam, alpha)[:, 0], (1 - cam.amax(1)) ** alpha)


def test_background_score_skips_absent_classes() -> None:
    cam = torch.rand(2, 3, 4, 5)
    labels = torch.tensor([[1.0, 0, 1], [0, 0, 0]])
    score = background_score(cam, 4, labels)
    torch.testing.assert_close(score[0], background_score(cam[:1, [0, 2]], 4)[0])
    assert torch.equal(score[1], torch.ones(1, 4, 5)), "an image without a class is all background"


def test_background_score_without_any_class_is_one() -> None:
    assert torch.equal(background_score(torch.zeros(2, 0, 3, 4), 32), torch.ones(2, 1, 3, 4))


@pytest.mark.parametrize("dtype", HALF)
def test_background_score_in_half_precision_is_as_good_as_its_input(dtype: torch.dtype) -> None:
    cam = torch.rand(1, 3, 16, 16).to(dtype)
    out = background_score(cam, 32)
    assert out.dtype == dtype
    exact = (1 - cam.double().amax(1, keepdim=True)) ** 32
    torch.testing.assert_close(out.double(), exact, rtol=torch.finfo(dtype).eps, atol=1e-7)


def test_background_score_stays_in_range_and_finite_beyond_one() -> None:
    cam = torch.full((1, 1, 2, 2), 1.0001, requires_grad=True)
    score = background_score(cam, 2.5)
    assert torch.equal(score, torch.zeros_like(score))
    (grad,) = torch.autograd.grad(score.sum(), cam)
    assert bool(grad.isfinite().all())


@pytest.mark.parametrize("reduce", ["sum", "mean", "max"])
def test_merge_flip_is_equivariant(reduce: str) -> None:
    a, b = torch.rand(2, 3, 4, 5), torch.rand(2, 3, 4, 5)
    assert torch.equal(merge_flip(b, a, reduce=reduce), merge_flip(a, b, reduce=reduce).flip(-1))


def test_merge_flip_values() -> None:
    a = torch.rand(3, 4, 5)
    assert torch.equal(merge_flip(a, a.flip(-1)), 2 * a)
    assert torch.equal(merge_flip(a, a.flip(-1), reduce="mean"), a)
    assert torch.equal(merge_flip(a, a.flip(-1) / 2, reduce="max"), a)


SCALES = [(4, 5), (2, 3), (6, 7), (8, 9)]


def scale_maps(batch: int = 2, classes: int = 4) -> list[torch.Tensor]:
    return [torch.rand(batch, classes, *size) for size in SCALES]


def test_multi_scale_cam_equals_the_dense_form() -> None:
    maps, labels, size = scale_maps(), torch.tensor([[1, 0, 1, 0], [0, 1, 0, 0]]), (30, 37)
    mirrored = [False, True, False, True]
    out = multi_scale_cam(maps, labels, size, mirrored=mirrored, stride=4, round_to=16)
    assert out.keys.tolist() == [1, 3, 2]
    assert out.image.tolist() == [0, 0, 1]
    high = dense_reference(maps, size, mirrored, (32, 48))
    low = dense_reference(maps, (8, 10), mirrored, (8, 10))
    for got, expected in ((out.high_res, high), (out.cam, low)):
        torch.testing.assert_close(got, expected[out.image, out.keys - 1], rtol=1e-5, atol=1e-6)


def test_multi_scale_cam_of_a_batch_equals_that_of_its_images() -> None:
    maps, labels = scale_maps(), torch.tensor([[0, 1, 1, 0], [1, 0, 0, 1]])
    both = multi_scale_cam(maps, labels, (20, 21), round_to=8)
    for i in range(2):
        one = multi_scale_cam([m[i : i + 1] for m in maps], labels[i : i + 1], (20, 21), round_to=8)
        mine = both.of_image(i)
        assert torch.equal(mine.keys, one.keys)
        assert torch.equal(mine.cam, one.cam)
        assert torch.equal(mine.high_res, one.high_res)


def test_multi_scale_cam_flips_with_its_views() -> None:
    maps, labels, mirrored = scale_maps(), torch.ones(2, 4), [False, True, False, True]
    out = multi_scale_cam(maps, labels, (16, 18), mirrored=mirrored)
    flipped = multi_scale_cam([m.flip(-1) for m in maps], labels, (16, 18), mirrored=mirrored)
    torch.testing.assert_close(flipped.cam, out.cam.flip(-1))


def test_multi_scale_cam_does_not_depend_on_the_scale_of_the_maps() -> None:
    maps, labels = scale_maps(), torch.ones(2, 4)
    large = multi_scale_cam([100 * m for m in maps], labels, (16, 18))
    torch.testing.assert_close(large.cam, multi_scale_cam(maps, labels, (16, 18)).cam, rtol=1e-4, atol=0)


def test_multi_scale_cam_applies_relu_between_the_up_sampling_and_the_sum() -> None:
    maps, labels, size = [2 * m - 1 for m in scale_maps()], torch.tensor([[1, 0, 1, 0], [0, 1, 0, 0]]), (30, 37)
    mirrored = [False, True, False, True]
    out = multi_scale_cam(maps, labels, size, mirrored=mirrored, relu=True, stride=4, round_to=16)
    for got, grid, cut in ((out.cam, (8, 10), (8, 10)), (out.high_res, (32, 48), size)):
        positive = [F.interpolate(m, grid, mode="bilinear", align_corners=False).clamp(min=0) for m in maps]
        expected = dense_reference(positive, cut, mirrored, grid)
        torch.testing.assert_close(got, expected[out.image, out.keys - 1], rtol=1e-5, atol=1e-6)
        assert bool((got >= 0).all())


def test_multi_scale_cam_applies_relu_to_the_sum_of_bicubic_maps() -> None:
    maps, labels, size = [2 * m - 1 for m in scale_maps()], torch.tensor([[1, 0, 1, 0], [0, 1, 0, 0]]), (30, 37)
    mirrored = [False, True, False, True]
    options = {"relu": "sum", "interpolation": "bicubic"}
    out = multi_scale_cam(maps, labels, size, mirrored=mirrored, stride=4, round_to=16, **options)
    for got, grid, cut in ((out.cam, (8, 10), (8, 10)), (out.high_res, (32, 48), size)):
        back = [m.flip(-1) if flip else m for m, flip in zip(maps, mirrored, strict=True)]
        total = sum(F.interpolate(m, grid, mode="bicubic", align_corners=False)[..., : cut[0], : cut[1]] for m in back)
        expected = total.clamp(min=0)
        expected = expected / (expected.amax((2, 3), keepdim=True) + 1e-5)
        torch.testing.assert_close(got, expected[out.image, out.keys - 1], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("name", "value"), [("relu", "each"), ("interpolation", "nearest")])
def test_multi_scale_cam_names_an_unknown_option(name: str, value: str) -> None:
    with pytest.raises(ValueError, match=rf"{name}: expected .*, got '{value}'"):
        multi_scale_cam(scale_maps(), torch.ones(2, 4), (16, 18), **{name: value})


def test_multi_scale_cam_with_relu_of_maps_that_need_none_is_the_same() -> None:
    maps, labels = scale_maps(), torch.ones(2, 4)
    plain, rectified = (multi_scale_cam(maps, labels, (16, 18), relu=relu).cam for relu in (False, True))
    assert torch.equal(plain, rectified)


def test_multi_scale_cam_with_relu_of_wholly_negative_maps_is_zero() -> None:
    maps = [-m for m in scale_maps()]
    assert not multi_scale_cam(maps, torch.ones(2, 4), (16, 18), relu=True).cam.any()


def test_multi_scale_cam_does_not_depend_on_the_order_of_the_views() -> None:
    maps, labels, mirrored = [2 * m - 1 for m in scale_maps()], torch.ones(2, 4), [False, True, True, False]
    out = multi_scale_cam(maps, labels, (16, 18), mirrored=mirrored, relu=True)
    back = multi_scale_cam(maps[::-1], labels, (16, 18), mirrored=mirrored[::-1], relu=True)
    torch.testing.assert_close(back.cam, out.cam)


def test_multi_scale_cam_of_a_dead_class_is_zero() -> None:
    maps = [m * torch.tensor([1.0, 0, 1, 1])[:, None, None] for m in scale_maps(1)]
    out = multi_scale_cam(maps, torch.ones(1, 4), (16, 18), stride=4, round_to=16)
    for part in (out.cam, out.high_res):
        assert bool(part.isfinite().all())
        assert not part[1].any()
        assert bool((part[[0, 2, 3]].amax((1, 2)) > 0.99).all())


def test_multi_scale_cam_without_a_label_is_empty() -> None:
    out = multi_scale_cam(scale_maps(), torch.zeros(2, 4), (30, 37), stride=4, round_to=16)
    assert out.cam.shape == (0, 8, 10)
    assert out.high_res.shape == (0, 30, 37)
    assert len(out.keys) == len(out.image) == 0
    assert not out.full(2, 4).any()


@pytest.mark.parametrize("size", [(1, 1), (1, 7), (17, 33)])
def test_multi_scale_cam_of_any_size(size: tuple[int, int]) -> None:
    out = multi_scale_cam([torch.rand(1, 2, 1, 1)], torch.ones(1, 2), size, stride=4, round_to=16)
    assert out.high_res.shape == (2, *size)
    assert out.cam.shape == (2, -(-size[0] // 4), -(-size[1] // 4))


@pytest.mark.parametrize("dtype", HALF)
def test_multi_scale_cam_sums_half_precision_in_float32(dtype: torch.dtype) -> None:
    maps, labels = [(1000 * m).to(dtype) for m in scale_maps()], torch.ones(2, 4)
    out = multi_scale_cam(maps, labels, (30, 37)).cam
    exact = multi_scale_cam([m.double() for m in maps], labels, (30, 37)).cam
    assert out.dtype == dtype
    torch.testing.assert_close(out.double(), exact, rtol=torch.finfo(dtype).eps, atol=1e-6)


def test_present_cam_there_and_back() -> None:
    cam, labels = torch.rand(3, 4, 5, 6), torch.tensor([[1, 0, 1, 1], [0, 0, 0, 0], [0, 1, 0, 0]])
    out = select_present(cam, labels)
    assert torch.equal(out.full(3, 4), cam * labels[:, :, None, None])
    assert out.of_image(1).cam.shape == (0, 5, 6)
    assert out.of_image(2).keys.tolist() == [2]


def test_cam_to_mask_is_the_argmax_with_a_constant_in_front() -> None:
    cam = torch.rand(3, 4, 9, 9)
    expected = torch.cat([torch.full((3, 1, 9, 9), 0.8), cam], 1).argmax(1)
    mask = cam_to_mask(cam, 0.8)
    assert mask.dtype == torch.int64
    assert torch.equal(mask, expected)


def test_cam_to_mask_with_a_background_map() -> None:
    cam = torch.rand(3, 4, 9, 9)
    background = background_score(cam, 1.0)
    assert torch.equal(cam_to_mask(cam, background), torch.cat([background, cam], 1).argmax(1))


def test_cam_to_mask_ties_go_to_background_and_then_to_the_first_class() -> None:
    cam = torch.tensor([0.5, 0.7]).view(1, 1, 1, 2).expand(1, 3, 1, 2)
    assert cam_to_mask(cam, 0.5).tolist() == [[[0, 1]]]


def test_cam_to_mask_never_gives_an_absent_class() -> None:
    cam, labels = torch.rand(2, 4, 9, 9), torch.tensor([[True, False, True, False], [False] * 4])
    mask = cam_to_mask(cam, 0.2, labels=labels)
    assert set(mask[0].unique().tolist()) <= {0, 1, 3}
    assert torch.equal(mask[0], cam_to_mask(cam[:1, [0, 2]], 0.2, keys=torch.tensor([1, 3]))[0])
    assert not mask[1].any()


def test_cam_to_mask_without_a_class_or_with_nan_is_background() -> None:
    assert not cam_to_mask(torch.zeros(1, 0, 3, 3), 0.1).any()
    assert not cam_to_mask(torch.full((1, 2, 3, 3), float("nan")), 0.1).any()


@pytest.mark.parametrize("sqrt", [False, True])
@pytest.mark.parametrize("mode", ["gap_then_conv", "conv_then_gap"])
def test_cam_head_logits_are_the_mean_of_its_class_maps(mode: str, sqrt: bool) -> None:
    head = CAMHead(6, 3, mode, sqrt, dropout=0.5).eval()
    features = torch.randn(2, 6, 4, 5)
    maps = torch.einsum("kd,bdhw->bkhw", head.classifier.weight[:, :, 0, 0], features)
    out = head(features)
    torch.testing.assert_close(out.logits, maps.mean((2, 3)))
    torch.testing.assert_close(out.cam, maps.clamp(min=0) ** (0.5 if sqrt else 1.0))
    torch.testing.assert_close(head.class_maps(features), maps)


@pytest.mark.parametrize("mode", ["gap_then_conv", "conv_then_gap"])
def test_cam_head_drops_channels_in_training_but_not_in_the_maps(mode: str) -> None:
    head = CAMHead(32, 3, mode, dropout=0.5)
    features = torch.randn(2, 32, 4, 5)
    first, second = head(features), head(features)
    assert not torch.equal(first.logits, second.logits)
    assert torch.equal(first.cam, second.cam)
    torch.manual_seed(1)
    dropped = head.dropout(features)
    torch.manual_seed(1)
    expected = torch.einsum("kd,bdhw->bk", head.classifier.weight[:, :, 0, 0], dropped) / 20
    torch.testing.assert_close(head(features).logits, expected)


def test_cam_head_square_root_has_a_finite_gradient_at_zero() -> None:
    head = CAMHead(4, 2, sqrt=True)
    features = torch.zeros(1, 4, 3, 3, requires_grad=True)
    (grad,) = torch.autograd.grad(head(features).cam.sum(), features)
    assert torch.equal(grad, torch.zeros_like(grad))


def test_cam_head_gradients() -> None:
    head = CAMHead(3, 2, sqrt=True).double()
    features = torch.rand(1, 3, 2, 2, dtype=torch.float64, requires_grad=True)
    head.classifier.weight.data.abs_()
    assert torch.autograd.gradcheck(lambda x: tuple(head(x)), features)


@pytest.mark.parametrize("dtype", HALF)
def test_cam_head_in_half_precision(dtype: torch.dtype) -> None:
    out = CAMHead(8, 3, sqrt=True).to(dtype)(torch.rand(1, 8, 1, 1, dtype=dtype))
    assert out.logits.dtype == out.cam.dtype == dtype


@pytest.mark.parametrize("mode", ["gap_then_conv", "conv_then_gap"])
def test_cam_pieces_compile(mode: str) -> None:
    head = CAMHead(6, 3, mode).eval()

    def step(features: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, ...]:
        logits, cam = head(features)
        cam = normalize_cam(cam)
        return logits, background_score(cam, 4, labels), cam_to_mask(cam, 0.3, labels=labels), merge_flip(cam, cam)

    args = torch.randn(2, 6, 4, 5), torch.tensor([[1, 0, 1], [0, 0, 0]])
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")(*args)
    for got, expected in zip(compiled, step(*args), strict=True):
        torch.testing.assert_close(got, expected)


CAM, LABELS = torch.rand(1, 3, 4, 4), torch.ones(1, 3)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (
            lambda: normalize_cam(torch.ones(2, 2).long()),
            TypeError,
            r"cam: expected a floating-point tensor, got torch",
        ),
        (lambda: normalize_cam(torch.ones(2)), ValueError, r"cam: expected shape \(..., H, W\), got \(2,\)"),
        (lambda: background_score(CAM[0], 4), ValueError, r"cam: expected shape \(B, K, H, W\), got \(3, 4, 4\)"),
        (lambda: background_score(CAM, -1), ValueError, r"alpha: expected at least 0, got -1"),
        (lambda: background_score(CAM, 4, LABELS[:, :2]), ValueError, r"labels: expected shape \(1, 3\) to match cam"),
        (lambda: merge_flip(CAM, CAM[:, :2]), ValueError, r"mirrored: expected shape \(1, 3, 4, 4\) to match maps"),
        (lambda: merge_flip(CAM, CAM, reduce="min"), ValueError, r"reduce: expected .* got 'min'"),
        (
            lambda: select_present(CAM, LABELS[0]),
            ValueError,
            r"labels: expected shape \(1, 3\) to match cam, got \(3,\)",
        ),
        (lambda: multi_scale_cam([], LABELS, (4, 4)), ValueError, r"maps: expected at least one tensor"),
        (
            lambda: multi_scale_cam([CAM[:, :2]], LABELS, (4, 4)),
            ValueError,
            r"maps\[0\]: expected shape \(1, 3, \*, \*\)",
        ),
        (
            lambda: multi_scale_cam([CAM], LABELS, (4, 4), mirrored=[True] * 2),
            ValueError,
            r"mirrored: .* 1 maps, got 2",
        ),
        (
            lambda: multi_scale_cam([CAM], LABELS, (4, 4), stride=0),
            ValueError,
            r"stride, round_to: expected at least 1",
        ),
        (lambda: cam_to_mask(CAM, torch.ones(1, 4, 4)), ValueError, r"threshold: expected shape \(1, 1, 4, 4\)"),
        (lambda: cam_to_mask(CAM, 0.1, keys=torch.arange(2)), ValueError, r"keys: expected shape \(3,\) to match cam"),
        (lambda: cam_to_mask(CAM, 0.1, keys=torch.rand(3)), TypeError, r"keys: expected an integer tensor"),
        (lambda: CAMHead(4, 3, "gap"), ValueError, r"mode: expected .* got 'gap'"),
        (lambda: CAMHead(4, 3)(torch.rand(1, 5, 2, 2)), ValueError, r"features: expected shape \(\*, 4, \*, \*\)"),
    ],
    ids=lambda value: value.split(":")[0] if isinstance(value, str) else "",
)
def test_cam_messages(call, error, message) -> None:
    with pytest.raises(error, match=message):
        call()

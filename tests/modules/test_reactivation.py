import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.autograd import gradcheck
from torch.func import functional_call

from wsss_modules import CAMHead, ReCAMHead, class_masked_pooling, merge_flip, normalize_cam, reactivated_cam

HALF = [torch.float16, torch.bfloat16]
MODES = ["product", "sum", "recam", "cam"]


def case(seed: int = 0, classes: int = 4) -> tuple[Tensor, Tensor, Tensor]:
    """Features and the weights of both classifiers, float64."""
    generator = torch.Generator().manual_seed(seed)
    shapes = (2, 6, 3, 5), (classes, 6), (classes, 6)
    features, w, w2 = (torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes)
    return features, w, w2


def linear_maps(features: Tensor, weight: Tensor) -> Tensor:
    return torch.einsum("kd,bdhw->bkhw", weight, features)


@pytest.mark.parametrize("mode", MODES)
def test_each_mode_reads_with_its_weights(mode: str) -> None:
    features, w, w2 = case()
    weights = {"product": w * w2, "sum": w + w2, "recam": w2, "cam": w}[mode]
    expected = linear_maps(features, weights)
    torch.testing.assert_close(reactivated_cam(features, w, w2, mode=mode, signed=True), expected)
    torch.testing.assert_close(reactivated_cam(features, w, w2, mode=mode), expected.clamp(min=0))


def test_product_with_ones_is_the_cam_and_with_itself_has_only_agreeing_channels() -> None:
    features, w, _ = case()
    cam = reactivated_cam(features, w, w, mode="cam", signed=True)
    torch.testing.assert_close(reactivated_cam(features, w, torch.ones_like(w), signed=True), cam)
    torch.testing.assert_close(reactivated_cam(features, w, w, signed=True), linear_maps(features, w**2))


def test_clamp_negative_leaves_out_channels_that_both_deny() -> None:
    features, w, w2 = case()
    both = (w < 0) & (w2 < 0)
    assert both.any()
    expected = linear_maps(features, torch.where(both, 0.0, w * w2))
    torch.testing.assert_close(reactivated_cam(features, w, w2, clamp_negative=True, signed=True), expected)
    assert not torch.allclose(reactivated_cam(features, w, w2, signed=True), expected)


@given(st.permutations(range(4)), st.sampled_from(MODES))
def test_permuting_the_classes_of_both_classifiers_permutes_the_maps(order: list[int], mode: str) -> None:
    features, w, w2 = case()
    torch.testing.assert_close(
        reactivated_cam(features, w[order], w2[order], mode=mode), reactivated_cam(features, w, w2, mode=mode)[:, order]
    )


def test_merged_maps_of_a_symmetric_image_are_symmetric() -> None:
    features, w, w2 = case()
    symmetric = features + features.flip(-1)
    plain, mirrored = reactivated_cam(torch.stack([symmetric[0], symmetric[0].flip(-1)]), w, w2)
    merged = merge_flip(plain, mirrored)
    torch.testing.assert_close(merged, merged.flip(-1))


def test_convolution_weights_are_taken_as_they_are() -> None:
    features, w, w2 = case()
    stored = reactivated_cam(features, w[:, :, None, None], w2[:, :, None, None])
    assert torch.equal(stored, reactivated_cam(features, w, w2))


@pytest.mark.parametrize("mode", MODES)
def test_reactivated_cam_gradients(mode: str) -> None:
    leaves = [x.requires_grad_() for x in case()]
    assert gradcheck(lambda *x: reactivated_cam(*x, mode=mode, signed=True), leaves)


@pytest.mark.parametrize("dtype", HALF)
def test_product_of_small_weights_survives_half_precision(dtype: torch.dtype) -> None:
    features, w, w2 = (x.to(dtype) for x in case())
    w, w2 = w * 1e-2, w2 * 1e-2  # products of 1e-4 are subnormal in float16
    maps = reactivated_cam(features * 100, w, w2)
    exact = reactivated_cam((features * 100).double(), w.double(), w2.double())
    assert maps.dtype == dtype
    torch.testing.assert_close(maps.double(), exact, rtol=torch.finfo(dtype).eps, atol=1e-6)


def test_head_maps_pools_and_classifies() -> None:
    head = ReCAMHead(6, 4).double()
    features = case()[0]
    out = head(features)
    plain = head.cam_head(features)
    assert torch.equal(out.logits, plain.logits)
    assert torch.equal(out.cam, normalize_cam(plain.cam))
    assert torch.equal(out.class_features, class_masked_pooling(features, out.cam))
    assert torch.equal(out.recam_weight, head.recam_classifier.weight)
    w, w2 = head.cam_head.classifier.weight, head.recam_classifier.weight
    for mode in MODES:
        assert torch.equal(head.reactivated_cam(features, mode=mode), reactivated_cam(features, w, w2, mode=mode))


def test_head_pools_only_the_present_classes_when_it_knows_them() -> None:
    head, features = ReCAMHead(6, 4, pool="mass").double(), case()[0]
    labels = torch.tensor([[1, 0, 1, 0], [0, 0, 0, 0]])
    out, dense = head(features, labels), head(features)
    assert torch.equal(out.cam, dense.cam)
    torch.testing.assert_close(out.class_features, dense.class_features[labels > 0])
    expected = class_masked_pooling(features, dense.cam, pool="mass")
    torch.testing.assert_close(dense.class_features, expected)


@given(st.floats(0.1, 100))
def test_masks_depend_on_the_scale_of_the_weights_only_through_eps(gain: float) -> None:
    head, features = ReCAMHead(6, 4).double(), case()[0]
    cam = head(features).cam
    head.cam_head.classifier.weight.data /= gain
    assert torch.allclose(head(features * gain).cam, cam, rtol=0, atol=1e-12), "scaled back, the maps are the same"
    scores = head.cam_head(features).cam
    assert (head(features).cam - scores / scores.amax((2, 3), keepdim=True)).abs().max() <= 1e-5 / (
        scores.amax((2, 3)).min()
    )


def gradients_of_class_features(detach_cam: bool) -> dict[str, Tensor | None]:
    torch.manual_seed(0)
    head, features = ReCAMHead(6, 4, detach_cam=detach_cam).double(), case()[0].requires_grad_()
    named = {"features": features, **dict(head.named_parameters())}
    pooled = head(features).class_features
    grads = torch.autograd.grad(pooled.square().sum(), list(named.values()), allow_unused=True)
    return dict(zip(named, grads, strict=True))


def test_gradient_reaches_the_first_classifier_through_the_masks_unless_detached() -> None:
    through, stopped = gradients_of_class_features(False), gradients_of_class_features(True)
    assert through["cam_head.classifier.weight"].any()
    assert stopped["cam_head.classifier.weight"] is None
    assert not torch.allclose(through["features"], stopped["features"])
    assert stopped["features"].any()


@pytest.mark.parametrize("pool", ["mean", "mass"])
def test_head_gradients_include_the_first_classifier_and_the_maximum(pool: str) -> None:
    head, features = ReCAMHead(6, 3, pool=pool).double(), case()[0].requires_grad_()
    names = [name for name, _ in head.named_parameters()]

    def values(features: Tensor, *parameters: Tensor) -> tuple[Tensor, ...]:
        return tuple(functional_call(head, dict(zip(names, parameters, strict=True)), features))

    assert gradcheck(values, [features, *head.parameters()])


def test_dead_class_gives_zeros_and_its_first_classifier_no_gradient() -> None:
    head, features = ReCAMHead(6, 4).double(), case()[0].abs()
    head.cam_head.classifier.weight.data[2] = -1.0
    out = head(features)
    assert not out.cam[:, 2].any()
    assert not out.class_features[:, 2].any()
    (grad,) = torch.autograd.grad(out.class_features.sum(), head.cam_head.classifier.weight)
    assert grad.isfinite().all()
    assert not grad[2].any()


@pytest.mark.parametrize(("batch", "size"), [(0, (3, 4)), (1, (1, 1)), (3, (1, 5))])
def test_head_of_degenerate_shapes(batch: int, size: tuple[int, int]) -> None:
    out = ReCAMHead(6, 4)(torch.rand(batch, 6, *size))
    assert out.class_features.shape == (batch, 4, 6)
    assert all(bool(value.isfinite().all()) for value in out)


def test_head_starts_from_the_weights_of_a_plain_one() -> None:
    plain, head = CAMHead(6, 4), ReCAMHead(6, 4)
    head.cam_head.load_state_dict(plain.state_dict())
    features = torch.rand(2, 6, 3, 3)
    assert torch.equal(head(features).logits, plain(features).logits)
    other = ReCAMHead(6, 4)
    other.load_state_dict(head.state_dict())
    assert all(torch.equal(a, b) for a, b in zip(other(features), head(features), strict=True))


@pytest.mark.parametrize("dtype", HALF)
def test_head_in_half_precision(dtype: torch.dtype) -> None:
    out = ReCAMHead(6, 4).to(dtype)(torch.rand(1, 6, 3, 3, dtype=dtype))
    assert all(value.dtype == dtype for value in out)


def test_head_and_maps_compile_to_one_graph() -> None:
    head, features = ReCAMHead(6, 4).double(), case()[0]

    def step(features: Tensor) -> tuple[Tensor, ...]:
        return (*head(features), head.reactivated_cam(features, clamp_negative=True))

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(features), step(features))


FEATURES, W, W2 = (x.float() for x in case())


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: reactivated_cam(FEATURES[0], W, W2), ValueError, r"features: expected shape \(B, D, H, W\), got"),
        (
            lambda: reactivated_cam(FEATURES, W[:, :5], W2),
            ValueError,
            r"weight: expected shape \(\*, 6\) to match feat",
        ),
        (lambda: reactivated_cam(FEATURES, W, W2[:3]), ValueError, r"recam_weight: expected shape \(4, 6\) to match w"),
        (
            lambda: reactivated_cam(FEATURES, W[0], W2),
            ValueError,
            r"weight: expected shape \(K, D\) or \(K, D, 1, 1\), got \(6,\)",
        ),
        (
            lambda: reactivated_cam(FEATURES, W[:, :, None, None].expand(4, 6, 3, 3), W2),
            ValueError,
            r"weight: expected shape \(\*, \*, 1, 1\) as a 1 x 1 convolution, got \(4, 6, 3, 3\)",
        ),
        (lambda: reactivated_cam(FEATURES, W, W2, mode="max"), ValueError, r"mode: expected \"product\".* got 'max'"),
        (
            lambda: reactivated_cam(FEATURES, W, W2, mode="sum", clamp_negative=True),
            ValueError,
            r"clamp_negative: expected mode=\"product\", got mode='sum'",
        ),
        (lambda: reactivated_cam(FEATURES.long(), W, W2), TypeError, r"features: expected a floating-point tensor"),
        (lambda: ReCAMHead(6, 4, pool="max"), ValueError, r"pool: expected \"mean\" or \"mass\", got 'max'"),
        (lambda: ReCAMHead(5, 4)(FEATURES), ValueError, r"features: expected shape \(\*, 5, \*, \*\) for this head"),
        (lambda: ReCAMHead(6, 4)(FEATURES, torch.ones(2, 3)), ValueError, r"labels: expected shape \(2, 4\) to match"),
    ],
    ids=[
        *("features", "weight", "recam_weight", "weight-ndim", "weight-3x3", "mode", "clamp", "integer", "pool"),
        *("channels", "labels"),
    ],
)
def test_messages_name_argument_expected_and_given(call, error, message) -> None:
    with pytest.raises(error, match=message):
        call()

import copy

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck
from torch.nn import functional as F

from tests.losses import reference_c2am as reference
from wsss_modules import (
    BorderPolarity,
    Disentangler,
    activation_polarity,
    merge_class_agnostic_maps,
    normalize_cam,
    pairwise_cosine_similarity,
    pool_two_regions,
    refine_cam_with_background_cue,
    threshold_cue,
)

HALF = [torch.float16, torch.bfloat16]


def maps(batch: int = 3, channels: int = 6, height: int = 5, width: int = 7) -> tuple[Tensor, Tensor]:
    return torch.rand(batch, channels, height, width), torch.rand(batch, 1, height, width)


@given(st.integers(0, 3), st.integers(1, 8), st.integers(1, 6), st.integers(1, 6))
def test_regions_add_up_to_the_average(batch: int, channels: int, height: int, width: int) -> None:
    features, p = maps(batch, channels, height, width)
    out = pool_two_regions(features, p)
    torch.testing.assert_close(out.fg + out.bg, features.mean((2, 3)))
    torch.testing.assert_close(tuple(out), reference.pool_two_regions(features, p))


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_pooling_does_not_depend_on_the_memory_format(memory_format: torch.memory_format) -> None:
    features, p = maps()
    out = pool_two_regions(features.contiguous(memory_format=memory_format), p)
    torch.testing.assert_close(tuple(out), reference.pool_two_regions(features, p))


def test_whole_image_in_one_region_leaves_exactly_nothing_for_the_other() -> None:
    features, _ = maps()
    ones = torch.ones(3, 1, 5, 7)
    everything, nothing = pool_two_regions(features, ones), pool_two_regions(features, 0 * ones)
    assert not everything.bg.any()
    assert not nothing.fg.any()
    torch.testing.assert_close(everything.fg, nothing.bg)


def test_pooling_gradcheck() -> None:
    features, p = (x.double().requires_grad_() for x in maps(2, 3, 3, 4))
    assert gradcheck(pool_two_regions, (features, p))


@pytest.mark.parametrize("dtype", HALF)
def test_pooling_in_half_precision_is_the_rounded_float64_result(dtype: torch.dtype) -> None:
    features, p = (x.to(dtype) for x in maps(2, 8, 24, 24))
    exact = pool_two_regions(features.double(), p.double())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        autocast = pool_two_regions(features, p)
    for out in (pool_two_regions(features, p), autocast):
        assert out.fg.dtype == out.bg.dtype == dtype
        for ours, rounded_once in zip(out, exact, strict=True):
            torch.testing.assert_close(ours.double(), rounded_once, rtol=torch.finfo(dtype).eps, atol=0)


def test_disentangler_maps_and_pools_with_the_probability() -> None:
    head, features = Disentangler(6).eval(), torch.rand(2, 6, 5, 7)
    with torch.no_grad():
        head.bn_head.running_mean.fill_(0.2)
        head.bn_head.weight.fill_(3.0)
    out = head(features)
    torch.testing.assert_close(out.probability, out.logits.sigmoid())
    torch.testing.assert_close((out.fg, out.bg), tuple(pool_two_regions(features, out.probability)))
    convolved = F.conv2d(features, head.activation_head.weight, padding=1)
    torch.testing.assert_close(out.logits, 3 * (convolved - 0.2) / (1 + 1e-5) ** 0.5)


def test_disentangler_in_training_centres_the_map_over_the_batch() -> None:
    out = Disentangler(6)(torch.rand(4, 6, 5, 7) + 10)
    torch.testing.assert_close(out.logits.mean(), torch.tensor(0.0), rtol=0, atol=1e-4)
    torch.testing.assert_close(out.logits.std(correction=0), torch.tensor(1.0), rtol=0, atol=1e-2)


def test_disentangler_sends_its_gradient_to_the_backbone() -> None:
    head, features = Disentangler(6), torch.rand(2, 6, 5, 7, requires_grad=True)
    out = head(features)
    (grad,) = torch.autograd.grad(out.fg.square().sum(), features)
    assert bool(grad.abs().sum((1, 2, 3)).gt(0).all())


def test_disentangler_survives_state_dict_and_double() -> None:
    head, features = Disentangler(6), torch.rand(2, 6, 5, 7)
    head(features)  # running statistics move
    other = Disentangler(6)
    other.load_state_dict(head.state_dict())
    torch.testing.assert_close(other.eval()(features), head.eval()(features), rtol=0, atol=0)
    double = copy.deepcopy(head).double()(features.double())
    torch.testing.assert_close(double.logits.float(), head(features).logits)


@pytest.mark.parametrize("mode", [True, False], ids=["train", "eval"])
def test_disentangler_compiles(mode: bool) -> None:
    head, features = Disentangler(6).train(mode), torch.rand(2, 6, 5, 7)
    compiled = torch.compile(copy.deepcopy(head), fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(features), head(features))


@given(st.integers(8, 16), st.integers(8, 16), st.integers(1, 4))
def test_polarity_of_a_map_and_of_its_complement_are_opposite(height: int, width: int, border: int) -> None:
    p = torch.rand(3, 1, height, width)
    ours, other = activation_polarity(p, border=border), activation_polarity(1 - p, border=border)
    torch.testing.assert_close(ours.border + other.border, torch.tensor(1.0))
    assert bool(ours.inverted) is not bool(other.inverted)
    assert bool(ours.inverted) is bool(ours.border > 0.5)


def test_polarity_is_the_mean_of_the_means_of_four_sides() -> None:
    p = torch.rand(2, 1, 9, 12, dtype=torch.float64)
    sides = [p[:, :, :3], p[:, :, 6:], p[:, :, :, :3], p[:, :, :, 9:]]
    torch.testing.assert_close(activation_polarity(p, border=3).border, sum(side.mean() for side in sides) / 4)


def test_polarity_of_maps_smaller_than_the_border_is_their_mean() -> None:
    p = torch.rand(2, 1, 3, 2)
    torch.testing.assert_close(activation_polarity(p).border, p.mean())


@pytest.mark.parametrize("dtype", HALF)
def test_polarity_in_half_precision(dtype: torch.dtype) -> None:
    p = torch.rand(2, 1, 40, 40).to(dtype)
    found = activation_polarity(p)
    assert found.border.dtype == torch.float32
    torch.testing.assert_close(found.border.double(), activation_polarity(p.double()).border, rtol=1e-6, atol=0)


def test_border_polarity_averages_over_all_images() -> None:
    batches = [torch.rand(n, 1, 10, 10) for n in (1, 5, 2)]
    polarity = BorderPolarity(border=2)
    assert polarity.polarity().border == 0.5
    for batch in batches:
        running = polarity(batch)
    expected = activation_polarity(torch.cat(batches), border=2)
    torch.testing.assert_close(running.border, expected.border)
    assert bool(running.inverted) is bool(expected.inverted)
    assert polarity.images == 8
    restored = BorderPolarity(border=2)
    restored.load_state_dict(polarity.state_dict())
    assert restored.polarity() == running
    restored.reset()
    assert restored.polarity().border == 0.5
    assert repr(restored) == "BorderPolarity(border=2)"


def test_border_polarity_gives_out_values_that_stay() -> None:
    polarity = BorderPolarity()
    first = polarity(torch.full((1, 1, 8, 8), 0.25, requires_grad=True))
    polarity(torch.ones(1, 1, 8, 8))
    assert first.border == 0.25
    assert not polarity.border_mean.requires_grad


def views(batch: int = 1) -> list[Tensor]:
    return [torch.randn(batch, 1, *size) for size in ((4, 5), (4, 5), (7, 9), (7, 9))]


MIRRORED = [False, True, False, True]


def merged_by_hand(logits: list[Tensor], size: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """Each image by itself: maps with their mirrored twins, then resized, summed, divided."""
    height, width = size
    grids = [(-(-height // 4), -(-width // 4)), (-(-height // 16) * 16, -(-width // 16) * 16)]
    found = []
    for grid in grids:
        total = torch.zeros(len(logits[0]), 1, *grid)
        for plain, mirrored in zip(logits[::2], logits[1::2], strict=True):
            both = plain.relu() + mirrored.relu().flip(-1)
            total += F.interpolate(both, grid, mode="bilinear", align_corners=False)
        total = total[..., :height, :width] if grid == grids[1] else total
        found.append(total / (total.amax((2, 3), keepdim=True) + 1e-5))
    return found[0], found[1]


def test_merged_maps_equal_those_by_hand() -> None:
    logits, size = views(2), (30, 37)
    out = merge_class_agnostic_maps(logits, size, inverted=False, mirrored=MIRRORED)
    torch.testing.assert_close(tuple(out), merged_by_hand(logits, size))
    assert out.cam.shape == (2, 1, 8, 10)
    assert out.high_res.shape == (2, 1, 30, 37)


def test_inverted_maps_are_merged_as_released_or_as_the_logits_of_the_complement() -> None:
    logits, size = views(), (30, 37)
    released = merge_class_agnostic_maps(logits, size, inverted=True, mirrored=MIRRORED)
    torch.testing.assert_close(tuple(released), merged_by_hand([1 - x for x in logits], size))
    negated = merge_class_agnostic_maps(logits, size, inverted=True, mirrored=MIRRORED, invert="negate")
    other_head = merge_class_agnostic_maps([-x for x in logits], size, inverted=False, mirrored=MIRRORED)
    torch.testing.assert_close(negated, other_head)


@pytest.mark.parametrize("inverted", [False, True])
def test_map_without_foreground_is_zero(inverted: bool) -> None:
    logits = [torch.full((1, 1, 3, 3), 2.0 if inverted else -2.0)]
    out = merge_class_agnostic_maps(logits, (12, 12), inverted=inverted)
    assert not out.cam.any()
    assert not out.high_res.any()


def test_threshold_cue_leaves_ties_to_the_background() -> None:
    cam = torch.rand(2, 1, 6, 7)
    cam[0, 0, 0, 0] = 0.3
    cue = threshold_cue(cam)
    assert cue.dtype == torch.int64
    assert torch.equal(cue, (cam[:, 0] > 0.3).long())
    assert cue[0, 0, 0] == 0


def released_refinement(cam: Tensor, saliency: Tensor, keys: Tensor) -> Tensor:
    """Argmax of [1 - saliency, maps] through the keys, one image at a time."""
    found = []
    for maps_of_image, shown in zip(cam, saliency, strict=True):
        stacked = torch.cat([1 - shown, maps_of_image])
        found.append(torch.cat([torch.zeros(1, dtype=torch.int64), keys])[stacked.argmax(0)])
    return torch.stack(found)


@given(st.integers(0, 9), st.integers(1, 4))
def test_refined_cam_is_the_argmax_with_the_cue_as_background(seed: int, classes: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    cam = torch.randint(0, 6, (2, classes, 6, 7), generator=generator) / 5  # many ties
    saliency = torch.randint(0, 6, (2, 1, 6, 7), generator=generator) / 5
    keys = torch.tensor([3, 7, 11, 20])[:classes]
    cue = refine_cam_with_background_cue(cam, saliency, keys=keys)
    assert torch.equal(cue, released_refinement(cam, saliency, keys))


def test_refined_cam_at_both_ends_of_the_saliency() -> None:
    cam = normalize_cam(torch.rand(1, 2, 6, 7) + 0.1)
    black, white = torch.zeros(1, 1, 6, 7), torch.ones(1, 1, 6, 7)
    assert not refine_cam_with_background_cue(cam, black).any()
    assert torch.equal(refine_cam_with_background_cue(cam, white), cam.argmax(1) + 1)
    assert not refine_cam_with_background_cue(0 * cam, white).any()
    assert not refine_cam_with_background_cue(cam[:, :0], white).any()


def test_refined_cam_leaves_out_absent_classes() -> None:
    cam, saliency = torch.rand(2, 3, 6, 7), torch.rand(2, 1, 6, 7)
    labels = torch.tensor([[1, 0, 1], [0, 1, 0]])
    mask = refine_cam_with_background_cue(cam, saliency, labels=labels)
    assert set(mask[0].unique().tolist()) <= {0, 1, 3}
    assert set(mask[1].unique().tolist()) <= {0, 2}


@given(st.integers(0, 9), st.integers(1, 9), st.integers(1, 9))
def test_similarities_of_pairs(seed: int, n: int, m: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    a, b = (torch.randn(count, 4, generator=generator, dtype=torch.float64) for count in (n, m))
    expected = F.cosine_similarity(a[:, None], b, dim=-1)
    torch.testing.assert_close(pairwise_cosine_similarity(a, b, clamp=None), expected)
    torch.testing.assert_close(pairwise_cosine_similarity(a, b), expected.clamp(0.0005, 0.9995))
    torch.testing.assert_close(pairwise_cosine_similarity(a), pairwise_cosine_similarity(a, a))


def test_similarity_with_itself_has_the_gradient_of_two_arguments() -> None:
    a = torch.randn(7, 5, dtype=torch.float64, requires_grad=True)
    weights = torch.randn(7, 7, dtype=torch.float64)
    (ours,) = torch.autograd.grad((pairwise_cosine_similarity(a, clamp=None) * weights).sum(), a)
    (both,) = torch.autograd.grad((pairwise_cosine_similarity(a, a, clamp=None) * weights).sum(), a)
    torch.testing.assert_close(ours, both)
    assert gradcheck(lambda a: pairwise_cosine_similarity(a, clamp=None), a)
    assert gradgradcheck(lambda a: pairwise_cosine_similarity(a, clamp=None), a)
    vmapped = torch.vmap(lambda a: pairwise_cosine_similarity(a, clamp=None))(torch.stack([a, 2 * a]))
    torch.testing.assert_close(vmapped[0], vmapped[1])


@pytest.mark.parametrize("dtype", HALF)
def test_similarities_of_half_precision_rows_are_float32(dtype: torch.dtype) -> None:
    a = torch.rand(5, 300).to(dtype)
    exact = pairwise_cosine_similarity(a.double())
    assert pairwise_cosine_similarity(a).dtype == torch.float32
    with torch.autocast("cpu", dtype=torch.bfloat16):
        torch.testing.assert_close(pairwise_cosine_similarity(a).double(), exact, rtol=1e-6, atol=0)


def test_similarities_compile() -> None:
    compiled = torch.compile(pairwise_cosine_similarity, fullgraph=True, backend="aot_eager")
    a = torch.rand(4, 5, requires_grad=True)
    torch.testing.assert_close(compiled(a), pairwise_cosine_similarity(a))
    compiled(a).sum().backward()


X, P = torch.rand(2, 3, 4, 5), torch.rand(2, 1, 4, 5)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: pool_two_regions(X[0], P), ValueError, r"features: expected shape \(B, D, H, W\), got \(3, 4, 5\)"),
        (
            lambda: pool_two_regions(X, P[:1]),
            ValueError,
            r"activation: expected shape \(2, 1, 4, 5\) to match features",
        ),
        (lambda: pool_two_regions(X, P.long()), TypeError, r"activation: expected a floating-point tensor"),
        (lambda: pool_two_regions(X[..., :0], P[..., :0]), ValueError, r"features: expected at least one cell"),
        (lambda: Disentangler(4)(X), ValueError, r"features: expected shape \(\*, 4, \*, \*\) for this head"),
        (lambda: activation_polarity(X), ValueError, r"probability: expected shape \(\*, 1, \*, \*\)"),
        (lambda: activation_polarity(P.bool()), TypeError, r"probability: expected a floating-point tensor"),
        (lambda: activation_polarity(P[:0]), ValueError, r"probability: expected at least one map with a cell"),
        (lambda: activation_polarity(P, border=0), ValueError, r"border: expected at least 1, got 0"),
        (lambda: BorderPolarity(border=0), ValueError, r"border: expected at least 1, got 0"),
        (lambda: merge_class_agnostic_maps([], (8, 8), inverted=True), ValueError, r"logits: expected at least one"),
        (
            lambda: merge_class_agnostic_maps([P, P[:1]], (8, 8), inverted=True),
            ValueError,
            r"logits\[1\]: expected shape \(2, 1, \*, \*\)",
        ),
        (
            lambda: merge_class_agnostic_maps([P], (8, 8), inverted=True, invert="minus"),
            ValueError,
            r'invert: expected "one_minus" or "negate", got \'minus\'',
        ),
        (lambda: threshold_cue(X), ValueError, r"cam: expected shape \(\*, 1, \*, \*\)"),
        (lambda: refine_cam_with_background_cue(X[0], P), ValueError, r"cam: expected shape \(B, K, H, W\)"),
        (lambda: refine_cam_with_background_cue(X, P[:, 0]), ValueError, r"saliency: expected shape \(2, 1, 4, 5\)"),
        (
            lambda: refine_cam_with_background_cue(X, (P * 255).byte()),
            TypeError,
            r"saliency: expected floating point in \[0, 1\], got torch.uint8; divide 8-bit maps by 255",
        ),
        (lambda: pairwise_cosine_similarity(X), ValueError, r"a: expected shape \(N, D\)"),
        (lambda: pairwise_cosine_similarity(X[0, 0], X[0, 0, :, 1:]), ValueError, r"b: expected shape \(\*, 5\)"),
        (lambda: pairwise_cosine_similarity(X[0, 0].long()), TypeError, r"a: expected a floating-point tensor"),
    ],
    ids=lambda value: value.split(":")[0] if isinstance(value, str) else "",
)
def test_messages(call, error, message) -> None:
    with pytest.raises(error, match=message):
        call()

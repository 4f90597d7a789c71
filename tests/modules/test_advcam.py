"""AdvCAM: the step, the regions and the climb."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

from tests.modules.reference_advcam import climb_one
from wsss_modules import (
    AdvCAM,
    GradCAM,
    anti_adversarial_step,
    discriminative_mask,
    linear_head_regions,
    multi_scale_cam,
    positive_count_weight,
)


class Net(nn.Module):
    """Two convolutions and a 1 x 1 head, in float64."""

    def __init__(self, seed: int = 0, channels: int = 6, classes: int = 4) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.features = nn.Sequential(
            nn.Conv2d(3, 5, 3, 2, 1), nn.BatchNorm2d(5), nn.ReLU(), nn.Conv2d(5, channels, 3, 2, 1), nn.ReLU()
        )
        self.head = nn.Conv2d(channels, classes, 1, bias=False)
        self.double().eval()

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.features(images))


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def pairs(images: int = 2, height: int = 12, width: int = 16, seed: int = 0) -> Tensor:
    plain = draw(images, 3, height, width, seed=seed)
    return torch.stack([plain, plain.flip(-1)], 1)


LABELS = torch.tensor([[1, 0, 0, 1], [0, 1, 0, 0]])
IMAGE, INDEX = [0, 0, 1], [0, 3, 1]  # of the climbers


# The step.


@given(
    st.integers(0, 1000),
    st.sampled_from([0.0, 0.08, 3.0]),
    st.sampled_from(["batch", "image"]),
    st.sampled_from(["scope", "channel"]),
)
def test_step_stays_near_and_within_the_range_of_its_scope(seed: int, xi: float, scope: str, clamp: str) -> None:
    x, g = pairs(seed=seed), draw(2, 2, 3, 12, 16, seed=seed + 1)
    moved = anti_adversarial_step(x, g, xi, scope=scope, clamp=clamp)
    assert (moved - x).abs().max() <= xi + 1e-12
    axes = tuple(axis for axis in range(scope == "image", 5) if clamp == "scope" or axis != 2)
    assert (moved.amin(axes) >= x.amin(axes)).all()
    assert (moved.amax(axes) <= x.amax(axes)).all()


@given(st.floats(1e-3, 1e3))
def test_step_does_not_depend_on_the_scale_of_the_gradient(scale: float) -> None:
    x, g = pairs(), draw(2, 2, 3, 12, 16, seed=1)
    torch.testing.assert_close(anti_adversarial_step(x, g * scale), anti_adversarial_step(x, g), rtol=1e-9, atol=1e-9)


def test_step_without_a_gradient_stays_and_unnormalised_step_is_a_multiple_of_it() -> None:
    x, g = pairs(), draw(2, 2, 3, 12, 16, seed=1)
    assert torch.equal(anti_adversarial_step(x, torch.zeros_like(x)), x)
    plain = anti_adversarial_step(x, g, 0.01, normalize_grad=False, clamp="none")
    torch.testing.assert_close(plain, x + 0.01 * g)
    assert anti_adversarial_step(x[:0], g[:0]).shape == (0, 2, 3, 12, 16)


def test_each_pair_steps_by_itself_in_image_scope() -> None:
    x, g = pairs(), draw(2, 2, 3, 12, 16, seed=1)
    together = anti_adversarial_step(x, g, scope="image")
    alone = torch.cat([anti_adversarial_step(x[i : i + 1], g[i : i + 1]) for i in range(2)])
    assert torch.equal(together, alone)


@pytest.mark.parametrize(
    ("error", "message", "arguments"),
    [
        (TypeError, "images: expected a floating-point tensor", {"images": torch.ones(1, 3, 2, 2, dtype=torch.uint8)}),
        (TypeError, "gradient: expected a floating-point tensor", {"gradient": torch.ones(1, 3, 2, 2).long()}),
        (ValueError, r"images: expected shape \(B, \.\.\., C, H, W\)", {"images": torch.ones(2, 2)}),
        (ValueError, "gradient: expected shape .* to match images", {"gradient": torch.ones(1, 3, 2, 1)}),
        (ValueError, "step_size: expected at least 0, got -1", {"step_size": -1}),
        (ValueError, "scope: expected", {"scope": "pair"}),
        (ValueError, "clamp: expected", {"clamp": "pair"}),
    ],
)
def test_step_names_the_wrong_argument(error: type[Exception], message: str, arguments: dict[str, object]) -> None:
    sound = {"images": torch.ones(1, 3, 2, 2), "gradient": torch.ones(1, 3, 2, 2)}
    with pytest.raises(error, match=message):
        anti_adversarial_step(**{**sound, **arguments})


# The regions.


@given(st.integers(0, 1000), st.floats(0, 1), st.integers(-20, 20))
def test_mask_does_not_depend_on_the_scale_of_a_map(seed: int, threshold: float, power: int) -> None:
    cam = draw(3, 4, 5, seed=seed).relu()
    mask = discriminative_mask(cam, threshold)
    assert torch.equal(discriminative_mask(cam * 2.0**power, threshold), mask)
    assert torch.equal(mask > 0, cam > threshold * cam.amax((1, 2), keepdim=True))
    if threshold < 1:  # a map's high entries are those of its high entries
        assert torch.equal(discriminative_mask(cam * mask, threshold), mask)


def test_mask_marks_entries_strictly_above_a_share_of_each_map() -> None:
    cam = torch.tensor([[[0.0, 1.0, 2.0]], [[0.0, 0.0, 0.0]], [[8.0, 4.0, 4.1]]])
    assert discriminative_mask(cam).tolist() == [[[0, 0, 1]], [[0, 0, 0]], [[1, 0, 1]]]
    assert not discriminative_mask(cam.requires_grad_()).requires_grad


@given(st.integers(0, 1000), st.integers(1, 7), st.integers(1, 5), st.sampled_from(["any", "negative", "positive"]))
def test_closed_form_equals_grad_cam_of_a_linear_head(seed: int, channels: int, classes: int, sign: str) -> None:
    features = draw(3, 2, channels, 3, 4, seed=seed).relu()
    head = nn.Conv2d(channels, classes, 1, bias=False).double()
    with torch.no_grad():
        head.weight.copy_(draw(classes, channels, 1, 1, seed=seed + 1))
        if sign != "any":
            head.weight.copy_(head.weight.abs() * (1 if sign == "positive" else -1))
    index = torch.arange(3) % classes

    class Given(nn.Module):
        def forward(self, _: Tensor) -> Tensor:
            return features.flatten(0, 1).requires_grad_()

    scores, region = GradCAM(Given(), head)(torch.zeros(3, 2, 3, 3, 4), index)
    torch.testing.assert_close(linear_head_regions(scores, index, head.weight), region, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(linear_head_regions(scores.relu(), index, head.weight.flatten(1)), region)
    if sign == "negative":
        assert not region.any()


def test_positive_count_is_that_of_the_scope() -> None:
    gradient = draw(3, 2, 4, 2, 2)
    whole, each = positive_count_weight(gradient), positive_count_weight(gradient, scope="image")
    torch.testing.assert_close(whole, gradient.sum((3, 4), keepdim=True) / (gradient > 0).sum())
    alone = torch.cat([positive_count_weight(one[None]) for one in gradient])
    torch.testing.assert_close(each, alone)
    assert positive_count_weight(-gradient.abs().half()).isfinite().all()


def test_grad_cam_by_means_is_the_mean_gradient_times_the_features() -> None:
    net, index = Net(), torch.tensor([2, 0])
    head = nn.Sequential(net.head, nn.Tanh())
    x = pairs()
    scores, region = GradCAM(net.features, head, weighting="mean")(x, index)
    features = net.features(x.flatten(0, 1)).detach().requires_grad_()
    own = head(features).relu().unflatten(0, (2, 2))[[0, 1], :, index]
    gradient = torch.autograd.grad(own.sum(), features)[0]
    expected = (gradient.mean((2, 3), keepdim=True) * features).sum(1).relu()
    torch.testing.assert_close(region.flatten(0, 1), expected.detach(), check_dtype=False)
    assert scores.shape == (2, 2, 4, 3, 4)


@pytest.mark.parametrize(
    ("message", "call"),
    [
        ("cam: expected shape", lambda: discriminative_mask(torch.ones(3))),
        ("threshold: expected a number in", lambda: discriminative_mask(torch.ones(3, 3), 1.5)),
        ("gradient: expected shape", lambda: positive_count_weight(torch.ones(3, 3))),
        ("scope: expected", lambda: positive_count_weight(torch.ones(3, 3, 3), scope="pair")),
        ("scores: expected shape", lambda: linear_head_regions(torch.ones(1, 2, 3, 4), torch.tensor([0]))),
        ("index: expected shape", lambda: linear_head_regions(torch.ones(1, 2, 3, 4, 4), torch.tensor([0, 1]))),
        (
            "weight: expected shape .* to match scores",
            lambda: linear_head_regions(torch.ones(1, 2, 3, 4, 4), torch.tensor([0]), torch.ones(4, 5)),
        ),
        ("weighting: expected", lambda: GradCAM(nn.Identity(), nn.Identity(), weighting="max")),
        ("pairs: expected shape", lambda: GradCAM(nn.Identity(), nn.Identity())(torch.ones(1, 3, 4, 4), INDEX)),
        (
            "head: expected scores with a gradient",
            lambda: GradCAM(nn.Identity(), lambda f: f.detach())(torch.ones(1, 2, 3, 4, 4), torch.tensor([0])),
        ),
    ],
)
def test_regions_name_the_wrong_argument(message: str, call: Callable[[], object]) -> None:
    with pytest.raises(ValueError, match=message):
        call()
    with pytest.raises(TypeError, match="floating-point"):
        discriminative_mask(torch.ones(2, 2).long())


# The climb.


def test_batched_climb_equals_the_released_loop_over_images_and_classes() -> None:
    net, x = Net(), pairs()
    trail = list(AdvCAM(net, net.head, steps=5).climb(x, LABELS))
    for climber, (image, index) in enumerate(zip(IMAGE, INDEX, strict=True)):
        regions, images = climb_one(net.features, net.head, x[image], index, 5)
        for step, region, pair in zip(trail, regions, images, strict=True):
            torch.testing.assert_close(step.region[climber], region)
            torch.testing.assert_close(step.pairs[climber], pair)
    assert [step.gradient is None for step in trail] == [False] * 4 + [True]


@pytest.mark.parametrize("chunk", [1, 2, 3, 9])
def test_chunks_change_nothing(chunk: int) -> None:
    net, x = Net(), pairs()
    whole = list(AdvCAM(net, net.head, steps=3).climb(x, LABELS))[-1]
    parts = list(AdvCAM(net, net.head, steps=3, chunk=chunk).climb(x, LABELS))[-1]
    torch.testing.assert_close(parts[:4], whole[:4])


def test_grad_cam_of_the_linear_head_climbs_the_same_way() -> None:
    net, x = Net(), pairs()
    closed = list(AdvCAM(net, net.head, steps=4).climb(x, LABELS))
    general = list(AdvCAM(GradCAM(net.features, net.head), steps=4).climb(x, LABELS))
    for one, other in zip(closed, general, strict=True):
        torch.testing.assert_close(one[:4], other[:4])


def test_a_small_step_raises_the_objective() -> None:
    net = Net()
    # the weight of the moves is left out: at the first step they have no gradient yet, but cost something at the second
    advcam = AdvCAM(net, net.head, ad_coeff=0.0, step_size=1e-4, clamp="none")
    first, second = advcam.climb(pairs(), LABELS, steps=2)
    assert (second.objective > first.objective).all()
    moved = (second.pairs - first.pairs).abs().amax((1, 2, 3, 4))
    torch.testing.assert_close(moved, torch.full_like(moved, 1e-4))


def test_the_first_gradient_does_not_depend_on_the_weight_of_the_moves_and_later_ones_do() -> None:
    net = Net()
    ours = [list(AdvCAM(net, None, ad_coeff=coeff, steps=3).climb(pairs(), LABELS)) for coeff in (0.0, 7.0)]
    assert torch.equal(ours[0][0].gradient, ours[1][0].gradient)
    assert not torch.allclose(ours[0][1].gradient, ours[1][1].gradient)


def test_swapping_the_views_mirrors_the_map() -> None:
    net, x = Net(), pairs()
    plain = list(AdvCAM(net, net.head, steps=3).climb(x, LABELS))[-1].region
    swapped = list(AdvCAM(net, net.head, steps=3).climb(x.flip(1), LABELS))[-1].region
    torch.testing.assert_close(swapped, plain.flip(-1))


def scales(x: Tensor) -> dict[float, Tensor]:
    def resized(scale: float) -> Tensor:
        return F.interpolate(x.flatten(0, 1), scale_factor=scale, mode="bilinear").unflatten(0, x.shape[:2])

    return {scale: resized(scale) for scale in (1.0, 0.5, 1.5)}


def test_one_step_is_the_multi_scale_cam() -> None:
    net, views = Net(), scales(pairs())
    out = AdvCAM(net, None, steps=1)(views, LABELS, (12, 16))
    maps = [net(x[:, 0]).relu() + net(x[:, 1]).relu().flip(-1) for x in views.values()]
    expected = multi_scale_cam(maps, LABELS, (12, 16), stride=4, round_to=16)
    torch.testing.assert_close(out.cam, expected.cam.detach())
    torch.testing.assert_close(out.high_res, expected.high_res.detach())
    assert out.keys.tolist() == [1, 4, 2] == expected.keys.tolist()
    assert out.image.tolist() == IMAGE
    assert 0 <= out.high_res.min() <= out.high_res.max() <= 1


@pytest.mark.parametrize(
    ("steps", "at_half", "fair", "legacy"), [(27, 13, 27 / 13, 2), (12, 6, 2, 2), (8, 5, 1.6, 1), (5, 5, 1, 1)]
)
def test_the_half_scale_takes_fewer_steps_and_weighs_as_much(
    steps: int, at_half: int, fair: float, legacy: float
) -> None:
    ours, theirs = (AdvCAM(Net(), steps=steps, legacy_scale_weight=flag) for flag in (False, True))
    some = {1.0: 0, 0.5: 0}
    assert (ours.steps_at(0.5), ours.steps_at(1.0)) == (at_half, steps)
    assert ours.weight_at(0.5, some) == pytest.approx(fair)
    assert ours.weight_at(1.0, some) == 1
    assert theirs.weight_at(0.5, some) == theirs.weight_at(1.0, some) == legacy
    assert theirs.weight_at(1.0, {1.0: 0, 2.0: 0}) == 1


def test_accumulation_is_the_weighted_sum_of_the_steps_and_a_callback_sees_and_stops_them() -> None:
    net, views = Net(), scales(pairs())
    advcam = AdvCAM(net, net.head, steps=12)
    seen: list[tuple[float, int]] = []

    def stop_after_two(scale: float, step: object) -> bool:
        seen.append((scale, step.step))
        return scale == 1.5 and step.step == 1

    total = advcam.accumulate(views, LABELS, stop_after_two)
    assert seen == [*((0.5, t) for t in range(6)), *((1.0, t) for t in range(12)), (1.5, 0), (1.5, 1)]
    half = list(advcam.climb(views[0.5], LABELS, steps=6))
    torch.testing.assert_close(total[0.5], 2 * torch.stack([step.region for step in half]).sum(0))
    torch.testing.assert_close(total[1.5], sum(s.region for s in advcam.climb(views[1.5], LABELS, steps=2)))


def test_images_without_a_class_have_no_map_and_a_dead_class_a_map_of_zeros() -> None:
    net, views = Net(), scales(pairs())
    nothing = AdvCAM(net, net.head, steps=2)(views, torch.zeros(2, 4), (12, 16))
    assert nothing.cam.shape == (0, 3, 4)
    assert nothing.high_res.shape == (0, 12, 16)
    assert list(AdvCAM(net).climb(pairs(), torch.zeros(2, 4))) == []
    with torch.no_grad():
        net.head.weight[1] = -net.head.weight[1].abs()
    out = AdvCAM(net, net.head, steps=3)(views, LABELS, (12, 16))
    assert not out.cam[2].any()
    assert out.cam.isfinite().all()
    assert out.cam[0].any()


@pytest.mark.parametrize("size", [(1, 1), (1, 9), (8, 12)])
def test_an_image_of_one_value_has_nowhere_to_climb(size: tuple[int, int]) -> None:
    net, flat = Net(), torch.full((2, 2, 3, *size), 0.4, dtype=torch.float64)
    first, second = AdvCAM(net, net.head, steps=2).climb(flat, LABELS)
    assert first.gradient.any()
    assert torch.equal(second.pairs, first.pairs)
    assert torch.equal(second.region, first.region)
    out = AdvCAM(net, net.head, steps=2)({1.0: flat}, LABELS, size)
    assert out.high_res.shape == (3, *size)
    assert 0 <= out.high_res.min() <= out.high_res.max() <= 1


def test_the_network_and_the_images_are_as_before() -> None:
    net, x = Net(), pairs()
    net.train()
    net.features[0].requires_grad_(False)
    net.features[1].eval()
    before, state, images = [m.training for m in net.modules()], copy.deepcopy(net.state_dict()), x.clone()
    with torch.no_grad():
        for _ in AdvCAM(net, net.head, steps=3).climb(x, LABELS):
            assert [m.training for m in net.modules()] == before  # while it waits, too
    assert [p.requires_grad for p in net.parameters()] == [False, False, True, True, True, True, True]
    assert all(p.grad is None for p in net.parameters())
    assert all(torch.equal(value, state[name]) for name, value in net.state_dict().items())
    assert torch.equal(x, images)
    assert not x.requires_grad


def test_a_function_with_an_output_that_has_cams_will_do() -> None:
    from wsss_modules import CAMOutput

    net = Net()
    named = AdvCAM(lambda images: CAMOutput(net(images).mean((2, 3)), net(images).relu()), net.head, steps=3)
    ours, theirs = (list(m.climb(pairs(), LABELS))[-1].region for m in (named, AdvCAM(net, net.head, steps=3)))
    torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_low_precision_networks_climb_with_images_in_float32(dtype: torch.dtype) -> None:
    net = Net().to(dtype)
    trail = list(AdvCAM(net, net.head, steps=3).climb(pairs().to(dtype), LABELS))
    assert all(x.dtype == torch.float32 and x.isfinite().all() for step in trail for x in step[1:4])
    exact = list(AdvCAM(net.double(), net.head, steps=1).climb(pairs().to(dtype).double(), LABELS))
    # measured 4e-3 of the maximum in bfloat16, 1e-3 in float16
    error = (trail[0].region - exact[0].region).abs().max() / exact[0].region.max()
    assert error < 16 * torch.finfo(dtype).eps


@pytest.mark.parametrize(
    ("error", "message", "call"),
    [
        (ValueError, "steps: expected at least 1", lambda: AdvCAM(Net(), steps=0)),
        (ValueError, "step_size, ad_coeff: expected at least 0", lambda: AdvCAM(Net(), ad_coeff=-1)),
        (ValueError, "threshold: expected a number in", lambda: AdvCAM(Net(), threshold=2)),
        (ValueError, "clamp: expected", lambda: AdvCAM(Net(), clamp="scope")),
        (ValueError, "chunk: expected at least 1", lambda: AdvCAM(Net(), chunk=0)),
        (ValueError, "head: expected a 1 x 1 convolution without bias", lambda: AdvCAM(Net(), nn.Conv2d(3, 4, 1))),
        (ValueError, "head: expected None with a GradCAM", lambda: AdvCAM(GradCAM(Net(), Net()), Net().head)),
        (ValueError, "pairs: expected shape .* mirror image", lambda: AdvCAM(Net()).climb(pairs()[:, :1], LABELS)),
        (ValueError, "pairs: expected shape", lambda: AdvCAM(Net()).climb(pairs()[:, 0], LABELS)),
        (TypeError, "pairs: expected a floating-point", lambda: AdvCAM(Net()).climb(pairs().long(), LABELS)),
        (ValueError, "labels: expected shape", lambda: AdvCAM(Net()).climb(pairs(), LABELS[:1])),
        (ValueError, "steps: expected at least 1", lambda: AdvCAM(Net()).climb(pairs(), LABELS, steps=0)),
        (ValueError, "pairs: expected at least one scale", lambda: AdvCAM(Net())({}, LABELS, (4, 4))),
        (
            ValueError,
            "model: expected maps with a gradient",
            lambda: next(AdvCAM(lambda x: Net()(x).detach()).climb(pairs(), LABELS)),
        ),
        (
            ValueError,
            r"model\(images\): expected shape \(6, 3, \*, \*\) to match labels, got \(6, 4, 3, 4\)",
            lambda: next(AdvCAM(Net()).climb(pairs(), torch.tensor([[1, 0, 1], [0, 1, 0]]))),
        ),
        (
            ValueError,
            r"model\(images\): expected shape \(3, 2, 5, \*, \*\) to match labels",
            lambda: next(
                AdvCAM(GradCAM(Net().features, Net().head)).climb(pairs(), torch.eye(5)[[0, 2]] + torch.eye(5)[[1, 2]])
            ),
        ),
    ],
)
def test_advcam_names_the_wrong_argument(error: type[Exception], message: str, call: Callable[[], object]) -> None:
    with pytest.raises(error, match=message):
        call()

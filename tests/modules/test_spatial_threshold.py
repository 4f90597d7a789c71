import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from tests.losses import reference_spatial_bce as reference
from wsss_modules import (
    AdaptiveCamThreshold,
    AlternatingSchedule,
    SpatialBCEHead,
    adaptive_cam_threshold,
    cam_to_mask,
    mean_threshold,
    rank_threshold,
    threshold_without_temperature,
)

seeds = st.integers(0, 2**16)
EVERY_DTYPE = [torch.float16, torch.bfloat16, torch.float32, torch.float64]


def random_maps(seed: int, batch: int = 2, classes: int = 3, height: int = 4, width: int = 7) -> Tensor:
    return torch.randn(batch, classes, height, width, generator=torch.Generator().manual_seed(seed))


def random_cam_case(seed: int, classes: int = 4) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    cam = torch.randn(2, classes, 5, 6, generator=generator)
    labels = (torch.rand(2, classes, generator=generator) < 0.6).float()
    return cam, labels, torch.rand(2, classes, generator=generator), torch.randn(classes, generator=generator)


# rank_threshold


@given(seeds, st.integers(1, 6), st.integers(1, 9), st.booleans())
def test_rank_threshold_equals_the_full_sort_with_a_loop(seed: int, height: int, width: int, with_ties: bool) -> None:
    prob = random_maps(seed, height=height, width=width).sigmoid()
    prob = (4 * prob).round() / 4 if with_ties else prob
    ratio = torch.rand(2, 3) * (torch.rand(2, 3) < 0.5)
    assert torch.equal(rank_threshold(prob, ratio), reference.rank_threshold(prob, ratio))


@given(seeds, st.floats(0, 1))
def test_at_most_the_share_of_pixels_is_strictly_above(seed: int, ratio: float) -> None:
    prob = random_maps(seed).sigmoid()
    share = torch.full((2, 3), ratio, dtype=torch.float64)
    t = rank_threshold(prob, share)
    pixels = prob.flatten(2)
    assert ((pixels > t[..., None]).sum(-1) <= ratio * 28).all()
    assert ((pixels >= t[..., None]).sum(-1) >= min(math.floor(ratio * 28) + 1, 28)).all()
    assert (pixels == t[..., None]).any(-1).all()


@pytest.mark.parametrize("dtype", EVERY_DTYPE, ids=str)
def test_rank_threshold_at_the_ends(dtype: torch.dtype) -> None:
    prob = random_maps(0).sigmoid().to(dtype)
    none, every = torch.zeros(2, 3), torch.ones(2, 3)
    assert rank_threshold(prob, none).dtype == dtype
    assert torch.equal(rank_threshold(prob, none), prob.amax((2, 3)))
    assert torch.equal(rank_threshold(prob, every), prob.amin((2, 3)))  # the released code: index out of range
    single = prob[:, :, :1, :1]
    for ratio in (none, 0.5 * every, every):
        assert torch.equal(rank_threshold(single, ratio), single[:, :, 0, 0])


def test_rank_is_truncated_in_the_precision_of_the_ratio() -> None:
    prob = torch.arange(100, dtype=torch.float32).flip(0).view(1, 1, 10, 10)  # the value of rank k is 99 - k
    assert 0.29 * 100 < 29  # in float64, but 29 in float32
    assert rank_threshold(prob, torch.tensor([[0.29]])) == 70
    assert rank_threshold(prob, torch.tensor([[0.29]], dtype=torch.float64)) == 71


def test_rank_threshold_has_no_gradient_and_leaves_its_input_alone() -> None:
    prob = random_maps(0).sigmoid().requires_grad_()
    before = prob.detach().clone()
    assert not rank_threshold(prob, torch.full((2, 3), 0.3)).requires_grad
    assert torch.equal(prob, before)


def test_rank_threshold_compiles_to_one_graph_with_equal_values() -> None:
    compiled = torch.compile(rank_threshold, fullgraph=True, backend="aot_eager")
    for seed in range(3):  # other rows have a ratio each time
        ratio = torch.rand(2, 3) * (torch.rand(2, 3) < 0.5)
        prob = random_maps(seed).sigmoid()
        assert torch.equal(compiled(prob, ratio), rank_threshold(prob, ratio))


def test_the_operation_behind_rank_threshold_keeps_the_rules_of_custom_operations() -> None:
    rank = torch.tensor([[0, 3, 27], [1, 0, 0]])
    torch.library.opcheck(torch.ops.wsss.value_of_rank.default, (random_maps(0).flatten(2), rank))


@pytest.mark.gpu
def test_rank_threshold_on_a_gpu_equals_that_on_the_cpu() -> None:
    prob, ratio = random_maps(0, height=47, width=47).sigmoid(), torch.rand(2, 3)
    assert torch.equal(rank_threshold(prob.cuda(), ratio.cuda()).cpu(), rank_threshold(prob, ratio))


def test_messages_of_rank_threshold() -> None:
    prob = torch.rand(2, 3, 4, 4)
    with pytest.raises(ValueError, match=r"prob: expected shape \(B, K, H, W\), got \(3, 4, 4\)"):
        rank_threshold(prob[0], torch.zeros(2, 3))
    with pytest.raises(ValueError, match=r"foreground_ratio: expected shape \(2, 3\) to match prob, got \(2, 1\)"):
        rank_threshold(prob, torch.zeros(2, 1))
    with pytest.raises(TypeError, match=r"foreground_ratio: expected a floating-point tensor, got torch.int64"):
        rank_threshold(prob, torch.zeros(2, 3, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"prob: expected maps with at least one pixel, got \(2, 3, 0, 4\)"):
        rank_threshold(prob[:, :, :0], torch.zeros(2, 3))


# mean_threshold, threshold_without_temperature


@pytest.mark.parametrize("dtype", EVERY_DTYPE, ids=str)
def test_mean_comes_before_the_sigmoid(dtype: torch.dtype) -> None:
    logits = (4 * random_maps(1)).to(dtype)
    t = mean_threshold(logits)
    assert t.dtype == dtype
    torch.testing.assert_close(t.double(), logits.double().mean((2, 3)).sigmoid(), rtol=2**-7, atol=0)
    assert not torch.allclose(t, logits.sigmoid().mean((2, 3)), atol=0.01)


@given(st.floats(0.001, 0.999), st.floats(-2, 4))
def test_threshold_without_temperature_is_the_root_of_the_released_search(t: float, temperature: float) -> None:
    ours = threshold_without_temperature(
        torch.tensor([[t]], dtype=torch.float64), torch.tensor([temperature], dtype=torch.float64)
    )
    assert ours.item() == pytest.approx(reference.threshold_without_temperature(t, temperature), abs=1e-12)


@given(seeds)
def test_bare_maps_exceed_their_threshold_where_scaled_ones_do(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    cam = torch.randn(1, 3, 50, generator=generator, dtype=torch.float64)
    temperature = torch.randn(3, generator=generator, dtype=torch.float64)
    t = torch.rand(1, 3, generator=generator, dtype=torch.float64)
    scaled = (temperature.exp()[:, None] * cam).sigmoid() > t[..., None]
    assert torch.equal(cam.sigmoid() > threshold_without_temperature(t, temperature)[..., None], scaled)


def test_threshold_without_temperature_is_monotone_and_keeps_its_ends() -> None:
    t = torch.linspace(0, 1, 101)[:, None].expand(-1, 3)
    ours = threshold_without_temperature(t, torch.tensor([-1.0, 0.0, 2.3]))
    assert (ours.diff(dim=0) > 0).all()
    torch.testing.assert_close(ours[:, 1], t[:, 1])
    assert torch.equal(ours[[0, -1]], t[[0, -1]])


# adaptive_cam_threshold


@pytest.mark.parametrize("normalize", [True, False])
@given(seeds)
def test_adaptive_cam_threshold_equals_the_loop_over_pixels(normalize: bool, seed: int) -> None:
    cam, labels, t, temperature = random_cam_case(seed)
    out = adaptive_cam_threshold(cam, labels, t, temperature, normalize=normalize)
    for b in range(2):
        kept = torch.zeros_like(cam[b])
        for y in range(5):
            for x in range(6):
                values = [cam[b, k, y, x].sigmoid().item() if labels[b, k] else 0.0 for k in range(4)]
                for k in range(4):
                    kept[k, y, x] = values[k] if values[k] == max(values) else 0.0
        for k in range(4):
            bar = reference.threshold_without_temperature(t[b, k].item(), temperature[k].item())
            top = kept[k].max().item()
            scaled = kept[k] / (top + 1e-8) if normalize else kept[k]
            torch.testing.assert_close(out.cam[b, k], scaled)
            assert out.threshold[b, k].item() == pytest.approx(bar, abs=1e-6)
            clear = (scaled - bar).abs() > 1e-5
            wanted = torch.where(scaled > bar, scaled - bar, -1.0)
            torch.testing.assert_close(out.scores[b, k][clear], wanted[clear])


def test_equal_maxima_all_stay_and_absent_classes_never_do() -> None:
    cam = torch.tensor([1.0, 1.0, 5.0]).view(1, 3, 1, 1)
    out = adaptive_cam_threshold(cam, torch.tensor([[1, 1, 0]]), torch.full((1, 3), 0.5), torch.zeros(3))
    assert (out.scores[0, :2] > 0).all()
    assert (out.scores[0, 2] == -1).all()
    assert (out.cam[0, 2] == 0).all()


def test_image_without_a_class_is_background() -> None:
    cam, labels, t, temperature = random_cam_case(0)
    for level in (t, torch.zeros_like(t), torch.ones_like(t)):
        out = adaptive_cam_threshold(cam, torch.zeros_like(labels), level, temperature)
        assert (out.scores == -1).all()
        assert (cam_to_mask(out.scores, 0.0) == 0).all()
    empty = adaptive_cam_threshold(cam[:, :0], labels[:, :0], t[:, :0], temperature[:0])
    assert empty.scores.shape == (2, 0, 5, 6)


@given(seeds)
def test_classes_may_be_given_in_any_order(seed: int) -> None:
    cam, labels, t, temperature = random_cam_case(seed)
    order = torch.randperm(4)
    out = adaptive_cam_threshold(cam, labels, t, temperature)
    moved = adaptive_cam_threshold(cam[:, order], labels[:, order], t[:, order], temperature[order])
    for ours, theirs in zip(out, moved, strict=True):
        torch.testing.assert_close(theirs, ours[:, order])


@given(seeds)
def test_undivided_maps_give_the_mask_of_the_trained_probabilities(seed: int) -> None:
    cam, _, t, _ = random_cam_case(seed, classes=1)
    temperature = torch.tensor([2.3])
    out = adaptive_cam_threshold(cam.double(), torch.ones(2, 1), t.double(), temperature.double(), normalize=False)
    trained = (cam * temperature.exp()).double().sigmoid() > t.double()[..., None, None]
    assert torch.equal(cam_to_mask(out.scores, 0.0) > 0, trained[:, 0])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_low_precision_maps_are_compared_in_float32(dtype: torch.dtype) -> None:
    cam, labels, t, temperature = random_cam_case(1)
    out = adaptive_cam_threshold(cam.to(dtype), labels, t, temperature)
    exact = adaptive_cam_threshold(cam.to(dtype).float(), labels, t, temperature)
    assert out.scores.dtype == out.cam.dtype == dtype
    assert torch.equal(out.scores, exact.scores.to(dtype))


def test_adaptive_threshold_compiles_and_its_class_equals_the_function() -> None:
    arguments = random_cam_case(2)
    module = AdaptiveCamThreshold(normalize=False, eps=1e-5)
    assert repr(module) == "AdaptiveCamThreshold(normalize=False, eps=1e-05)"
    expected = adaptive_cam_threshold(*arguments, normalize=False, eps=1e-5)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    for ours in (module(*arguments), compiled(*arguments)):
        for value, reference_value in zip(ours, expected, strict=True):
            torch.testing.assert_close(value, reference_value)


def test_messages_of_the_adaptive_threshold() -> None:
    cam, labels, t, temperature = random_cam_case(0)
    with pytest.raises(ValueError, match=r"cam: expected shape \(B, K, H, W\), got \(4, 5, 6\)"):
        adaptive_cam_threshold(cam[0], labels, t, temperature)
    with pytest.raises(ValueError, match=r"labels: expected shape \(2, 4\) to match cam, got \(4,\)"):
        adaptive_cam_threshold(cam, labels[0], t, temperature)
    with pytest.raises(ValueError, match=r"threshold: expected shape \(2, 4\) to match cam, got \(2, 3\)"):
        adaptive_cam_threshold(cam, labels, t[:, :3], temperature)
    with pytest.raises(ValueError, match=r"temperature: expected shape \(4,\) to match threshold, got \(3,\)"):
        adaptive_cam_threshold(cam, labels, t, temperature[:3])
    with pytest.raises(TypeError, match=r"threshold: expected a floating-point tensor, got torch.int64"):
        adaptive_cam_threshold(cam, labels, t.long(), temperature)


# AlternatingSchedule


def test_schedule_takes_80_network_steps_then_20_threshold_steps() -> None:
    schedule = AlternatingSchedule()
    kinds = [schedule.is_network_step(step) for step in range(1000)]
    assert [kinds[step] for step in (0, 79, 80, 99, 100)] == [True, True, False, False, True]
    assert sum(kinds) == 800
    assert AlternatingSchedule(cycle=3, network_steps=0).is_network_step(0) is False
    assert AlternatingSchedule(cycle=3, network_steps=3).is_network_step(2) is True


def test_messages_of_the_schedule() -> None:
    with pytest.raises(ValueError, match=r"cycle: expected at least 1 step, got 0"):
        AlternatingSchedule(cycle=0, network_steps=0)
    with pytest.raises(ValueError, match=r"network_steps: expected 0..10, the steps of a cycle, got 80"):
        AlternatingSchedule(cycle=10)


# SpatialBCEHead


def released_state(classes: int = 5, channels: int = 6, middle: int = 4) -> dict[str, Tensor]:
    state = {"threshold.weight": torch.randn(classes, channels, 1, 1), "temperature": torch.randn(classes)}
    state["mask_layer_downsample.weight"] = torch.randn(middle, channels, 1, 1)
    return state | {f"fc_list.{k}.weight": torch.randn(1, middle, 1, 1) for k in range(classes)}


@pytest.mark.parametrize("prefix", ["", "module."])
def test_head_equals_one_convolution_a_class(prefix: str) -> None:
    state = released_state(classes=12)
    head = SpatialBCEHead(6, 12, 4)
    head.load_released_state_dict({f"{prefix}{key}": value for key, value in state.items()})
    features = torch.randn(2, 6, 5, 3)
    out = head(features)
    active = features.clamp(min=0)
    middle = F.conv2d(active, state["mask_layer_downsample.weight"])
    maps = torch.cat([F.conv2d(middle, state[f"fc_list.{k}.weight"]) for k in range(12)], dim=1)
    torch.testing.assert_close(out.cam, maps)
    torch.testing.assert_close(out.logits, maps * state["temperature"].exp().view(1, -1, 1, 1))
    torch.testing.assert_close(out.threshold_logits, F.conv2d(active, state["threshold.weight"]))


def test_head_starts_xavier_uniform_with_scale_10() -> None:
    head = SpatialBCEHead(300, 20)
    torch.testing.assert_close(head.temperature.exp(), torch.full((20,), 10.0))
    for weight, fan_in, fan_out in (
        (head.threshold.weight, 300, 20),
        (head.reduce.weight, 300, 128),
        (head.classifier.weight, 128, 1),  # one convolution a class in the released code
    ):
        bound = math.sqrt(6 / (fan_in + fan_out))
        assert weight.abs().max() <= bound
        assert weight.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.05)


def test_threshold_branch_reaches_the_features_but_not_the_classifier() -> None:
    head, features = SpatialBCEHead(6, 3, 4), torch.randn(2, 6, 3, 3, requires_grad=True)
    mean_threshold(head(features).threshold_logits).sum().backward()
    assert features.grad is not None
    assert features.grad.any()
    assert not features.grad[features.detach() < 0].any()
    assert head.classifier.weight.grad is None
    assert head.temperature.grad is None


def test_head_round_trips_compiles_and_works_under_autocast() -> None:
    head, features = SpatialBCEHead(6, 3, 4), torch.randn(2, 6, 3, 3)
    copy = SpatialBCEHead(6, 3, 4)
    copy.load_state_dict(head.state_dict())
    expected = head(features)
    compiled = torch.compile(copy, fullgraph=True, backend="aot_eager")
    for ours, theirs in zip(compiled(features), expected, strict=True):
        torch.testing.assert_close(ours, theirs)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        for ours, theirs in zip(head(features), expected, strict=True):
            torch.testing.assert_close(ours.float(), theirs, rtol=0.05, atol=0.05 * theirs.abs().max().item())


def test_message_of_the_head() -> None:
    with pytest.raises(
        ValueError, match=r"features: expected shape \(\*, 6, \*, \*\) for this head, got \(2, 5, 3, 3\)"
    ):
        SpatialBCEHead(6, 3)(torch.zeros(2, 5, 3, 3))

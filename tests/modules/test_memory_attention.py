"""Read-out of prototypes and accumulated attention."""

import pytest
import torch
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.autograd import gradcheck

from tests.modules import reference_memory
from wsss_modules import OnlineAttentionAccumulator, SemanticAggregation, attention_to_uint8

# Read-out


def layer_and_inputs(
    classes: int = 3, per_class: int = 2, channels: int = 5, **options
) -> tuple[SemanticAggregation, Tensor, Tensor]:
    layer = SemanticAggregation(channels, per_class, **options).double()
    return layer, torch.randn(2, channels, 3, 4).double(), torch.randn(classes, per_class, channels).double()


@given(st.integers(1, 6), st.integers(1, 4), st.integers(1, 8), st.booleans())
def test_folded_read_out_equals_the_one_with_similarities(
    classes: int, per_class: int, channels: int, softmax: bool
) -> None:
    options = {"scale": channels**-0.5, "softmax": True} if softmax else {}
    layer, features, prototypes = layer_and_inputs(classes, per_class, channels, **options)
    features.requires_grad_()
    leaves = [features, *layer.parameters()]
    cotangent = torch.randn(2, channels, 3, 4).double()
    ours, naive = layer(features, prototypes), reference_memory.aggregate(layer, features, prototypes)
    torch.testing.assert_close(ours, naive, rtol=1e-10, atol=1e-10)
    for a, b in zip(
        torch.autograd.grad((ours * cotangent).sum(), leaves),
        torch.autograd.grad((naive * cotangent).sum(), leaves),
        strict=True,
    ):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("softmax", [False, True])
def test_order_of_prototypes_does_not_matter(softmax: bool) -> None:
    layer, features, prototypes = layer_and_inputs(softmax=softmax)
    flat = prototypes.flatten(0, 1)[torch.randperm(6)].view_as(prototypes)
    torch.testing.assert_close(layer(features, flat), layer(features, prototypes))


def test_zero_prototypes_without_biases_leave_the_pixels_own_part() -> None:
    layer, features, prototypes = layer_and_inputs()
    for part in (layer.query, layer.key, layer.value, layer.aggregate):
        torch.nn.init.zeros_(part.bias)
    own = torch.nn.functional.conv2d(features, layer.project.weight[:, :5], layer.project.bias)
    torch.testing.assert_close(layer(features, torch.zeros_like(prototypes)), own)


def test_scale_multiplies_the_similarities() -> None:
    layer, features, prototypes = layer_and_inputs(classes=3, per_class=2)
    own = layer.project(torch.cat([features, torch.zeros_like(features)], 1))
    torch.nn.init.zeros_(layer.aggregate.bias)

    def read(scale) -> Tensor:
        other = SemanticAggregation(5, 2, scale=scale).double()
        other.load_state_dict(layer.state_dict())
        return other(features, prototypes) - own

    torch.testing.assert_close(read("released"), read(3 / 2))
    torch.testing.assert_close(read("mean"), read(1.0) / 6)


def test_softmax_reads_a_mean_of_the_values() -> None:
    layer, features, prototypes = layer_and_inputs(scale=0.0, softmax=True)  # equal similarities
    mean = layer.value(prototypes.flatten(0, 1)).mean(0)[None, :, None, None].expand_as(features)
    expected = layer.project(torch.cat([features, layer.aggregate(mean)], 1))
    torch.testing.assert_close(layer(features, prototypes), expected)
    sharp, nearest = SemanticAggregation(5, 2, scale=1e4, softmax=True).double(), layer_and_inputs()[0]
    nearest.load_state_dict(layer.state_dict())
    sharp.load_state_dict(layer.state_dict())
    similarity = torch.einsum("bdhw,pd->bphw", layer.query(features), layer.key(prototypes.flatten(0, 1)))
    best = layer.value(prototypes.flatten(0, 1))[similarity.argmax(1)].movedim(-1, 1)
    torch.testing.assert_close(
        sharp(features, prototypes),
        layer.project(torch.cat([features, layer.aggregate(best)], 1)),
        rtol=1e-6,
        atol=1e-6,
    )


@pytest.mark.parametrize("softmax", [False, True])
def test_aggregation_gradcheck_and_no_gradient_to_prototypes(softmax: bool) -> None:
    layer, features, prototypes = layer_and_inputs(softmax=softmax)
    features, prototypes = features[:1, :, :2, :2].requires_grad_(), prototypes.requires_grad_()
    assert gradcheck(lambda x: layer(x, prototypes.detach()), [features])
    assert torch.autograd.grad(layer(features, prototypes).sum(), prototypes, allow_unused=True) == (None,)


@pytest.mark.parametrize("softmax", [False, True])
def test_aggregation_compiles(softmax: bool) -> None:
    layer, features, prototypes = layer_and_inputs(softmax=softmax)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(features, prototypes), layer(features, prototypes))


@pytest.mark.parametrize("softmax", [False, True])
def test_autocast_gives_its_own_precision(softmax: bool) -> None:
    layer, features, prototypes = layer_and_inputs(channels=16, softmax=softmax)
    exact = layer(features, prototypes)
    layer, features, prototypes = layer.float(), features.float(), prototypes.float()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        low = layer(features, prototypes)
    assert low.dtype == torch.bfloat16
    assert (low.double() - exact).abs().max() < 0.05 * exact.abs().max()


def test_weights_are_folded_in_float32_under_autocast() -> None:
    layer = SemanticAggregation(16, 2)
    features, prototypes = torch.zeros(1, 16, 1, 1), 100 * torch.randn(3, 2, 16)  # what is left is the folded bias
    with torch.autocast("cpu", dtype=torch.bfloat16):
        low = layer(features, prototypes)
    torch.testing.assert_close(low, layer(features, prototypes).bfloat16(), rtol=0, atol=0)


def test_half_precision_layer() -> None:
    layer, features, prototypes = layer_and_inputs(channels=16)
    exact = layer(features, prototypes)
    low = layer.bfloat16()(features.bfloat16(), prototypes.bfloat16())
    assert low.dtype == torch.bfloat16
    assert (low.double() - exact).abs().max() < 0.05 * exact.abs().max()


# Accumulation

LABELS = torch.tensor([[1, 0, 1], [0, 0, 0], [0, 1, 0], [1, 1, 1]])


def accumulated(
    labels: Tensor, steps: list[tuple[Tensor, Tensor, Tensor, bool]], threshold: float = 0.1
) -> dict[tuple[int, int], Tensor]:
    """Maps by (image, class), one at a time, as files would hold them."""
    files: dict[tuple[int, int], Tensor] = {}
    for index, cam, probability, last in steps:
        for i, maps, sure in zip(index.tolist(), cam, probability, strict=True):
            for k in labels[i].nonzero().flatten().tolist():
                forced = last and (i, k) not in files
                if sure[k] < threshold and not forced:
                    continue
                new = reference_memory.attention_byte(maps[k])
                files[i, k] = torch.maximum(files.get((i, k), new), new)
    return files


@given(st.integers(0, 10**6))
def test_accumulation_equals_one_file_a_map(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    labels = (torch.rand(6, 4, generator=generator) < 0.5).long()
    ours = OnlineAttentionAccumulator(labels, (3, 4))
    steps = []
    for epoch in range(3):
        for index in torch.randperm(6, generator=generator).split(2):
            cam = torch.randn(2, 4, 3, 4, generator=generator)
            probability = 0.2 * torch.rand(2, 4, generator=generator)
            steps.append((index, cam, probability, epoch == 2))
            ours.update(index, cam, probability, last=epoch == 2)
    files = accumulated(labels, steps)
    assert [tuple(pair) for pair in labels.nonzero()[ours.written].tolist()] == sorted(files)
    for (i, k), expected in files.items():
        assert (ours.maps[ours.rows[i, k]].int() - expected.int()).abs().max() <= 1  # ties of the rounding
    assert bool(ours.written.all())


def test_maps_never_fall_and_repeating_a_map_changes_nothing() -> None:
    accumulator = OnlineAttentionAccumulator(LABELS, (4, 5))
    index, sure = torch.tensor([3, 0]), torch.ones(2, 3)
    for _ in range(4):
        before = accumulator.maps.clone()
        cam = torch.randn(2, 3, 4, 5)
        accumulator.update(index, cam, sure)
        assert bool((accumulator.maps >= before).all())
        once = accumulator.maps.clone()
        accumulator.update(index, cam, sure)
        assert torch.equal(accumulator.maps, once)
    assert not accumulator.maps[accumulator.rows[2, 1]].any()


def test_forward_gives_present_maps_and_zeros_for_absent_ones() -> None:
    accumulator = OnlineAttentionAccumulator(LABELS, (4, 5))
    cam = torch.rand(4, 3, 4, 5) + 1
    accumulator.update(torch.arange(4), cam, torch.ones(4, 3))
    maps = accumulator(torch.tensor([2, 0, 1]))
    expected = cam / cam.amax((2, 3), keepdim=True) * LABELS[..., None, None]
    torch.testing.assert_close(maps, expected[[2, 0, 1]], rtol=0, atol=0.51 / 255)
    assert maps.dtype == torch.float32


def test_an_image_twice_in_a_batch_keeps_the_higher_values() -> None:
    accumulator = OnlineAttentionAccumulator(torch.tensor([[1]]), (1, 2))
    cam = torch.tensor([[1.0, 0.5], [0.25, 1.0]]).view(2, 1, 1, 2)
    accumulator.update(torch.tensor([0, 0]), cam, torch.ones(2, 1))
    assert accumulator.maps.tolist() == [[[255, 255]]]


@pytest.mark.parametrize(
    ("probability", "last", "written"), [(0.1, False, True), (0.0999, False, False), (0.0, True, True)]
)
def test_threshold_is_reached_or_the_last_epoch_forces(probability: float, last: bool, written: bool) -> None:
    accumulator = OnlineAttentionAccumulator(LABELS, (2, 2))
    sure = torch.full((4, 3), probability, dtype=torch.float64)
    accumulator.update(torch.arange(4), torch.rand(4, 3, 2, 2), sure, last=last)
    assert bool(accumulator.written.all()) is written
    assert bool(accumulator.maps.any()) is written


def test_without_a_probability_the_means_of_the_maps_give_it() -> None:
    one, other = (OnlineAttentionAccumulator(LABELS, (2, 2)) for _ in range(2))
    cam = torch.randn(4, 3, 2, 2) - 2  # some means are below and some above that of a probability of 0.1
    probability = 1 / (1 + torch.exp(-cam.mean((2, 3))))
    one.update(torch.arange(4), cam)
    other.update(torch.arange(4), cam, probability)
    torch.testing.assert_close(one.state_dict(), other.state_dict())
    assert 0 < one.written.sum() < len(one.written)
    torch.testing.assert_close(one.probability(cam), probability)


def test_the_order_of_images_is_of_no_account() -> None:
    one, other = (OnlineAttentionAccumulator(LABELS, (2, 3)) for _ in range(2))
    cam, order = torch.randn(4, 3, 2, 3), torch.tensor([2, 0, 3, 1])
    one.update(torch.arange(4), cam, last=True)
    for index in order.split(1):
        other.update(index, cam[index], last=True)
    torch.testing.assert_close(one.state_dict(), other.state_dict())


def test_the_last_epoch_does_not_force_what_is_written() -> None:
    accumulator = OnlineAttentionAccumulator(torch.tensor([[1]]), (1, 2))
    accumulator.update(torch.tensor([0]), torch.tensor([[[[1.0, 0.0]]]]), torch.tensor([[0.9]]))
    accumulator.update(torch.tensor([0]), torch.tensor([[[[0.0, 1.0]]]]), torch.tensor([[0.05]]), last=True)
    assert accumulator.maps.tolist() == [[[255, 0]]]


def test_negative_and_broken_attention_counts_as_none() -> None:
    accumulator = OnlineAttentionAccumulator(torch.tensor([[1, 1]]), (1, 3))
    cam = torch.tensor([[[[-3.0, -1.0, -2.0]], [[float("nan"), 1.0, 2.0]]]])
    accumulator.update(torch.tensor([0]), cam, torch.ones(1, 2))
    assert accumulator.written.all()
    assert not accumulator.maps.any()


def test_state_has_fixed_shapes_and_goes_through_state_dict() -> None:
    accumulator, restored = (OnlineAttentionAccumulator(LABELS, (4, 5)) for _ in range(2))
    shapes = {key: value.shape for key, value in accumulator.state_dict().items()}
    assert shapes == {"maps": (6, 4, 5), "written": (6,), "rows": (4, 3)}
    accumulator.update(torch.tensor([0, 2]), torch.rand(2, 3, 4, 5), torch.ones(2, 3))
    restored.load_state_dict(accumulator.state_dict())
    assert torch.equal(restored(torch.arange(4)), accumulator(torch.arange(4)))
    assert {key: value.shape for key, value in accumulator.state_dict().items()} == shapes


def test_a_data_set_without_a_label_has_no_map() -> None:
    accumulator = OnlineAttentionAccumulator(torch.zeros(2, 3), (4, 5))
    accumulator.update(torch.tensor([1]), torch.rand(1, 3, 4, 5), torch.ones(1, 3), last=True)
    assert torch.equal(accumulator(torch.arange(2)), torch.zeros(2, 3, 4, 5))


def test_accumulation_compiles() -> None:
    eager, compiled = (OnlineAttentionAccumulator(LABELS, (4, 5)) for _ in range(2))
    step = torch.compile(compiled.update, fullgraph=True, backend="aot_eager")
    for last in (False, True):
        inputs = torch.tensor([3, 0]), torch.randn(2, 3, 4, 5), torch.rand(2, 3) / 5
        eager.update(*inputs, last=last)
        step(*inputs, last=last)
    torch.testing.assert_close(compiled.state_dict(), eager.state_dict())


def accumulate_half_of_a_batch(rank: int, address: str) -> None:
    dist.init_process_group("gloo", init_method=address, rank=rank, world_size=2)
    try:
        generator = torch.Generator().manual_seed(1)
        cam, sure = torch.randn(4, 3, 4, 5, generator=generator), torch.ones(4, 3)
        half, index = slice(2 * rank, 2 * rank + 2), torch.tensor([3, 0, 2, 1])
        mine, whole = (OnlineAttentionAccumulator(LABELS, (4, 5)) for _ in range(2))
        mine.update(index[half], cam[half], sure[half], sync=True)
        whole.update(index, cam, sure)
        torch.testing.assert_close(mine.state_dict(), whole.state_dict())
    finally:
        dist.destroy_process_group()


@pytest.mark.slow
def test_two_processes_accumulate_what_one_does(tmp_path) -> None:
    torch.multiprocessing.spawn(accumulate_half_of_a_batch, args=((tmp_path / "meeting").as_uri(),), nprocs=2)


# Export


def test_export_of_the_same_size_only_scales_and_cuts_off() -> None:
    cam = torch.randn(2, 3, 5, 6)
    pictures = attention_to_uint8(cam, (5, 6))
    highest = cam.amax((2, 3), keepdim=True)
    expected = (255 * (cam.clamp(min=0) / (highest + 1e-8))).to(torch.uint8)
    assert torch.equal(pictures, expected)
    assert pictures.dtype == torch.uint8
    assert bool((pictures.amax((2, 3)) == 255).all())


def test_export_enlarges_every_map_for_itself_and_stays_in_range() -> None:
    cam = torch.zeros(1, 3, 4, 4)
    cam[0, 0, 1, 1], cam[0, 1] = 7.0, -1.0
    cam[0, 2, :, 2:] = 3.0  # bicubic overshoots at the edge
    pictures = attention_to_uint8(cam, (16, 12))
    assert pictures.shape == (1, 3, 16, 12)
    assert pictures[0, 0].argmax() // 12 in range(4, 8)
    assert not pictures[0, 1].any()
    assert set(pictures[0, 2, :, [0, -1]].unique().tolist()) == {0, 255}
    assert torch.equal(attention_to_uint8(1000 * cam, (16, 12)), pictures)
    assert attention_to_uint8(cam[:, :0], (3, 3)).shape == (1, 0, 3, 3)


LAYER, FEATURES, PROTOTYPES = SemanticAggregation(5, 2), torch.rand(2, 5, 3, 4), torch.rand(3, 2, 5)
ACCUMULATOR, INDEX, CAM, SURE = (
    OnlineAttentionAccumulator(LABELS, (3, 4)),
    torch.arange(2),
    torch.rand(2, 3, 3, 4),
    torch.rand(2, 3),
)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: SemanticAggregation(0), ValueError, r"channels: expected at least 1, got 0"),
        (lambda: SemanticAggregation(4, 0), ValueError, r"prototypes: expected at least 1, got 0"),
        (lambda: SemanticAggregation(4, scale="sum"), ValueError, r'scale: expected "released", "mean" or a number'),
        (
            lambda: LAYER(FEATURES[0], PROTOTYPES),
            ValueError,
            r"features: expected shape \(B, D, H, W\), got \(5, 3, 4\)",
        ),
        (
            lambda: LAYER(FEATURES[:, 1:], PROTOTYPES),
            ValueError,
            r"features: expected shape \(\*, 5, \*, \*\) for this layer",
        ),
        (
            lambda: LAYER(FEATURES, PROTOTYPES[:, :1]),
            ValueError,
            r"prototypes: expected shape \(\*, 2, 5\) for this layer",
        ),
        (lambda: LAYER(FEATURES.int(), PROTOTYPES), TypeError, r"features: expected a floating-point tensor"),
        (
            lambda: OnlineAttentionAccumulator(LABELS[0], (3, 4)),
            ValueError,
            r"labels: expected shape \(n, K\), got \(3,\)",
        ),
        (
            lambda: OnlineAttentionAccumulator(LABELS, (0, 4)),
            ValueError,
            r"size: expected at least one cell, got \(0, 4\)",
        ),
        (lambda: ACCUMULATOR.update(INDEX.float(), CAM, SURE), TypeError, r"index: expected an integer tensor"),
        (lambda: ACCUMULATOR.update(INDEX[None], CAM, SURE), ValueError, r"index: expected shape \(B,\), got \(1, 2\)"),
        (
            lambda: ACCUMULATOR.update(INDEX, CAM[..., 1:], SURE),
            ValueError,
            r"cam: expected shape \(2, 3, 3, 4\) to match index and this accumulator, got \(2, 3, 3, 3\)",
        ),
        (lambda: ACCUMULATOR.update(INDEX, CAM.byte(), SURE), TypeError, r"cam: expected a floating-point tensor"),
        (
            lambda: ACCUMULATOR.update(INDEX, CAM, SURE[:1]),
            ValueError,
            r"probability: expected shape \(2, 3\) to match cam",
        ),
        (lambda: ACCUMULATOR(INDEX.float()), TypeError, r"index: expected an integer tensor"),
        (lambda: attention_to_uint8(CAM[0], (3, 4)), ValueError, r"cam: expected shape \(B, K, h, w\), got"),
        (lambda: attention_to_uint8(CAM.byte(), (3, 4)), TypeError, r"cam: expected a floating-point tensor"),
        (lambda: attention_to_uint8(CAM, (0, 4)), ValueError, r"size: expected at least one pixel, got \(0, 4\)"),
    ],
    ids=lambda value: value.split(":")[0] if isinstance(value, str) else "",
)
def test_messages(call, error, message) -> None:
    with pytest.raises(error, match=message):
        call()

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.autograd import gradcheck

from tests.modules import reference_affinity as reference
from wsss_modules import (
    EdgeToAffinity,
    LocalAffinity,
    RandomWalk,
    affinity_offsets,
    background_score,
    cam_to_mask,
    propagate_cam,
    propagate_to_edge,
    random_walk,
    upsample_scores,
    walk_scores,
)
from wsss_modules import _stencil_walk as stencil_module
from wsss_modules._stencil_walk import stencil_walk
from wsss_modules.random_walk import _chebyshev_weights

opcheck_reads_grad = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
METHODS = ["power", "chebyshev"]
methods = st.sampled_from(METHODS)
sides = st.integers(1, 8)
radii = st.integers(2, 6)
seeds = st.integers(0, 99)


def random_affinity(size: tuple[int, int], radius: int, seed: int = 0, batch: int = 1) -> LocalAffinity:
    """Any symmetric stencil, one pair in four zero; not one that comes from an edge map."""
    generator = torch.Generator().manual_seed(seed)
    shape = (batch, len(affinity_offsets(radius)), size[0] * size[1])
    pairs = torch.rand(shape, generator=generator, dtype=torch.float64)
    pairs = torch.where(torch.rand(shape, generator=generator) < 0.25, 0, pairs)
    return LocalAffinity.from_pairs(pairs, radius, size, border="full")


def random_maps(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# against the dense matrix


@given(sides, sides, radii, st.sampled_from([0.0, 0.5, 1.0, 2.0, 8.0, 10.0]), st.integers(0, 300), seeds)
def test_walk_equals_the_power_of_the_dense_matrix(
    height: int, width: int, radius: int, beta: float, n_steps: int, seed: int
) -> None:
    affinity = random_affinity((height, width), radius, seed, batch=2)
    x = random_maps(2, 3, height, width, seed=seed)
    sharp = affinity.power(beta).dense()  # beta = 0 keeps pairs beyond the radius out, where 0**0 would be 1
    expected = reference.random_walk(x, sharp, 1, n_steps)
    walked = random_walk(x, affinity, beta=beta, n_steps=n_steps)
    torch.testing.assert_close(walked, expected, rtol=0, atol=2e-12)
    exact = random_walk(x, affinity, beta=beta, n_steps=n_steps, method="chebyshev", tolerance=0)
    torch.testing.assert_close(exact, expected, rtol=0, atol=2e-12)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(("radius", "beta"), [(2, 8), (5, 8), (5, 1), (10, 10), (10, 0)])
def test_float32_walk_stays_close_to_float64(radius: int, beta: float, method: str) -> None:
    size = (24, 31)
    affinity = random_affinity(size, radius)
    single = affinity.to(torch.float32)
    x = random_maps(1, 2, *size).sigmoid().float()
    sharp = single.to(torch.float64).power(beta).dense()
    expected = reference.random_walk(x.double(), sharp, 1, 256)
    error = (random_walk(x, single, beta=beta, method=method).double() - expected).abs().max()
    assert error < 1e-6  # measured: at most 5e-7; the released dense float32 form has 2e-5


@given(st.integers(0, 600), st.sampled_from([0.0, 1e-9, 1e-7, 1e-3]))
def test_chebyshev_weights_rebuild_the_power(n_steps: int, tolerance: float) -> None:
    weights = _chebyshev_weights(n_steps, tolerance)
    angle = torch.linspace(0, math.pi, 301, dtype=torch.float64)
    series = sum(weight * torch.cos(k * angle) for k, weight in enumerate(weights))
    assert (series - torch.cos(angle) ** n_steps).abs().max() <= 2 * tolerance + 1e-12
    assert sum(weights) == pytest.approx(1, abs=1e-13)
    assert len(weights) <= n_steps + 1


def test_chebyshev_takes_a_third_of_256_steps() -> None:
    assert len(_chebyshev_weights(256, 1e-7)) - 1 == 84
    assert len(_chebyshev_weights(256, 1e-12)) - 1 == 112


@pytest.mark.parametrize("n_steps", [0, 1, 2, 3, 64, 255, 256, 1000])
@pytest.mark.parametrize("tolerance", [1e-3, 1e-7])
def test_chebyshev_stays_within_its_tail_bound(n_steps: int, tolerance: float) -> None:
    affinity = random_affinity((7, 9), 4)
    x = random_maps(1, 2, 7, 9)
    power = random_walk(x, affinity, n_steps=n_steps)
    chebyshev = random_walk(x, affinity, n_steps=n_steps, method="chebyshev", tolerance=tolerance)
    degree = affinity.power(8).degree()[:, None]
    error = ((power - chebyshev).square() * degree).sum((2, 3)).sqrt()
    assert (error <= 2 * tolerance * (x.square() * degree).sum((2, 3)).sqrt() + 1e-12).all()


# properties


@given(sides, sides, radii, methods, seeds)
def test_walk_keeps_constants_and_range(height: int, width: int, radius: int, method: str, seed: int) -> None:
    affinity = random_affinity((height, width), radius, seed)
    constant = torch.full((1, 1, height, width), 0.7, dtype=torch.float64)
    assert torch.equal(random_walk(constant, affinity, method=method), constant)
    x = random_maps(1, 3, height, width, seed=seed)
    walked = random_walk(x, affinity, method=method)
    assert (walked.amax((2, 3)) <= x.amax((2, 3))).all()
    assert (walked.amin((2, 3)) >= x.amin((2, 3))).all()


@given(st.sampled_from([1, 7, 256]), methods, seeds)
def test_walk_is_linear_and_treats_channels_alike(n_steps: int, method: str, seed: int) -> None:
    affinity = random_affinity((5, 6), 4, seed)
    walk = RandomWalk(beta=4, n_steps=n_steps, method=method, tolerance=1e-12)
    x, y = random_maps(1, 4, 5, 6, seed=seed), random_maps(1, 4, 5, 6, seed=seed + 1)
    # clamping to the range of each map may cost what the tolerance allows
    torch.testing.assert_close(
        walk(2 * x - 3 * y, affinity), 2 * walk(x, affinity) - 3 * walk(y, affinity), rtol=0, atol=1e-10
    )
    order = [2, 0, 3, 1]
    assert torch.equal(walk(x[:, order], affinity), walk(x, affinity)[:, order])


@given(radii, st.sampled_from([2, 3]), methods, seeds)
def test_walk_commutes_with_mirror_images(radius: int, axis: int, method: str, seed: int) -> None:
    edge = random_maps(1, 1, 5, 7, seed=seed).sigmoid()
    x = random_maps(1, 2, 5, 7, seed=seed + 1)
    options = {"radius": radius, "n_steps": 64, "method": method}
    mirrored = propagate_to_edge(x.flip(axis), edge.flip(axis), **options)
    torch.testing.assert_close(mirrored.flip(axis), propagate_to_edge(x, edge, **options), rtol=0, atol=1e-12)


@pytest.mark.parametrize("method", METHODS)
def test_walk_without_any_affinity_is_the_identity(method: str) -> None:
    affinity = LocalAffinity(affinity_offsets(3), torch.zeros(1, 12, 4, 5))
    x = torch.randn(1, 2, 4, 5)
    torch.testing.assert_close(random_walk(x, affinity, method=method), x, rtol=1e-6, atol=0)
    assert torch.equal(random_walk(x, affinity), x)


def test_beta_0_averages_over_the_disc() -> None:
    x = random_maps(1, 1, 9, 11)
    step = random_walk(x, random_affinity((9, 11), 3), beta=0, n_steps=1)
    near = [(dy, dx) for dy, dx in affinity_offsets(3)] + [(-dy, -dx) for dy, dx in affinity_offsets(3)] + [(0, 0)]
    expected = torch.stack([x[0, 0, 4 + dy, 5 + dx] for dy, dx in near]).mean()
    torch.testing.assert_close(step[0, 0, 4, 5], expected)


@pytest.mark.parametrize("method", METHODS)
def test_isolated_pixel_keeps_its_value(method: str) -> None:
    values = random_affinity((5, 5), 3).values.clone()
    for p, (dy, dx) in enumerate(affinity_offsets(3)):
        values[0, p, 2, 2] = 0
        if 0 <= 2 - dx < 5:
            values[0, p, 2 - dy, 2 - dx] = 0
    x = random_maps(1, 2, 5, 5)
    walked = random_walk(x, LocalAffinity(affinity_offsets(3), values), method=method)
    torch.testing.assert_close(walked[0, :, 2, 2], x[0, :, 2, 2], rtol=1e-13, atol=0)
    assert not torch.isclose(walked[0, :, 0, 0], x[0, :, 0, 0]).any()


def test_affinity_beyond_the_border_is_not_read() -> None:
    affinity = random_affinity((4, 5), 3)
    garbage = torch.where(affinity.power(0).values == 1, affinity.values, 0.9)
    x = random_maps(1, 2, 4, 5)
    assert torch.equal(random_walk(x, LocalAffinity(affinity.offsets, garbage)), random_walk(x, affinity))


def test_faint_affinities_are_not_slow_denormals() -> None:
    affinity = LocalAffinity(affinity_offsets(3), torch.full((1, 12, 6, 6), 1e-4))
    x = random_maps(1, 1, 6, 6).float()
    assert torch.equal(random_walk(x, affinity, beta=10, n_steps=4), x)  # 1e-40 is a denormal float32
    expected = reference.random_walk(x.double(), affinity.to(torch.float64).dense(), 2, 256)  # 1e-8 counts
    walked = random_walk(x, affinity, beta=2)
    torch.testing.assert_close(walked.double(), expected, rtol=0, atol=1e-6)
    assert (walked - x).abs().max() > 1e-5


# batches, dtypes, layouts


def test_batch_equals_its_images() -> None:
    affinity, x = random_affinity((5, 6), 4, batch=3), random_maps(3, 2, 5, 6)
    alone = [random_walk(x[i : i + 1], LocalAffinity(affinity.offsets, affinity.values[i : i + 1])) for i in range(3)]
    torch.testing.assert_close(random_walk(x, affinity), torch.cat(alone), rtol=0, atol=1e-15)


def test_one_affinity_serves_a_batch() -> None:
    affinity, x = random_affinity((5, 6), 4), random_maps(3, 2, 5, 6)
    repeated = LocalAffinity(affinity.offsets, affinity.values.repeat(3, 1, 1, 1))
    assert torch.equal(random_walk(x, affinity), random_walk(x, repeated))


@pytest.mark.parametrize("limit", [1, 30, 31, 61, 95])
def test_blocks_of_images_and_channels_equal_all_at_once(limit: int, monkeypatch: pytest.MonkeyPatch) -> None:
    affinity, x = random_affinity((5, 6), 4, batch=3), random_maps(3, 3, 5, 6).requires_grad_()
    results = []
    for serial in (10_000, limit):
        monkeypatch.setattr(stencil_module, "SERIAL", serial)
        values = affinity.values.clone().requires_grad_()
        walked = random_walk(x, LocalAffinity(affinity.offsets, values), n_steps=9, beta=2)
        results.append((walked, *torch.autograd.grad(walked.square().sum(), (x, values))))
        results[-1] += torch.autograd.grad(random_walk(x, affinity, n_steps=9, beta=2).square().sum(), x)
    torch.testing.assert_close(*results, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_walked_in_float32(dtype: torch.dtype) -> None:
    affinity = random_affinity((9, 9), 4).to(dtype)
    x = random_maps(1, 2, 9, 9).sigmoid().to(dtype)
    walked = random_walk(x, affinity)
    assert walked.dtype == dtype
    expected = random_walk(x.double(), affinity.to(torch.float64)).to(dtype)
    torch.testing.assert_close(walked, expected, rtol=torch.finfo(dtype).eps, atol=0)


def test_memory_layout_does_not_matter_and_inputs_stay() -> None:
    affinity, x = random_affinity((5, 6), 4), random_maps(1, 3, 5, 6)
    before = x.clone(), affinity.values.clone()
    strided = LocalAffinity(affinity.offsets, affinity.values.to(memory_format=torch.channels_last))
    assert torch.equal(random_walk(x.to(memory_format=torch.channels_last), strided), random_walk(x, affinity))
    assert torch.equal(x, before[0])
    assert torch.equal(affinity.values, before[1])
    unchanged = random_walk(x, affinity, n_steps=0)
    assert torch.equal(unchanged, x)
    assert unchanged.data_ptr() != x.data_ptr()


def test_no_channel_gives_no_channel() -> None:
    assert random_walk(torch.zeros(1, 0, 3, 3), random_affinity((3, 3), 2)).shape == (1, 0, 3, 3)


# gradients


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("n_steps", [0, 1, 2, 3, 7, 16])
def test_walk_gradcheck(n_steps: int, method: str) -> None:
    affinity = random_affinity((3, 4), 3, batch=2)
    values, x = affinity.values.clamp(min=0.05).requires_grad_(), random_maps(2, 2, 3, 4).requires_grad_()

    def walk(x: Tensor, values: Tensor) -> Tensor:
        return random_walk(x, LocalAffinity(affinity.offsets, values), beta=2, n_steps=n_steps, method=method)

    assert gradcheck(walk, (x, values))


@pytest.mark.parametrize("method", METHODS)
def test_walk_gradient_equals_that_of_the_dense_matrix(method: str) -> None:
    edge, x = random_maps(1, 1, 4, 5).sigmoid().requires_grad_(), random_maps(1, 2, 4, 5).requires_grad_()
    upstream = random_maps(1, 2, 4, 5, seed=7)
    walked = propagate_to_edge(x, edge, radius=4, beta=3, n_steps=64, method=method, tolerance=1e-13)
    dense = reference.random_walk(x * (1 - edge), reference.edge_matrix(edge, 4), 3, 64)
    torch.testing.assert_close(walked, dense)
    for ours, theirs in zip(
        torch.autograd.grad(walked, (x, edge), upstream), torch.autograd.grad(dense, (x, edge), upstream), strict=True
    ):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("method", METHODS)
def test_float32_gradients_stay_close_to_float64(method: str) -> None:
    affinity = random_affinity((20, 24), 5)
    grads = []
    for dtype in (torch.float32, torch.float64):
        values = affinity.values.float().to(dtype).requires_grad_()
        x = random_maps(1, 2, 20, 24).float().to(dtype).requires_grad_()
        walked = random_walk(x, LocalAffinity(affinity.offsets, values), method=method)
        grads.append(torch.autograd.grad(walked.square().sum(), (x, values)))
    for single, double in zip(*grads, strict=True):
        assert (single - double).abs().max() < 1e-5 * double.abs().max()  # measured: 2e-6


def test_only_the_wanted_gradients_are_made() -> None:
    affinity = random_affinity((4, 5), 3)
    x = random_maps(1, 2, 4, 5).requires_grad_()
    random_walk(x, affinity).sum().backward()
    assert affinity.values.grad is None
    assert x.grad is not None
    torch.testing.assert_close(x.grad.sum(), torch.tensor(40.0).double())  # constants are preserved
    values = affinity.values.clone().requires_grad_()
    random_walk(x.detach(), LocalAffinity(affinity.offsets, values)).sum().backward()
    assert values.grad is not None
    assert values.grad.any()


# the operation


@opcheck_reads_grad
def test_stencil_walk_operation_is_well_formed() -> None:
    values, x = random_affinity((4, 5), 2).values.clone().requires_grad_(), random_maps(1, 2, 4, 5).requires_grad_()
    offsets = [component for offset in affinity_offsets(2) for component in offset]
    for n_steps, weights in ((3, []), (3, _chebyshev_weights(3, 0))):
        torch.library.opcheck(stencil_walk, (x, values, offsets, n_steps, weights))


@pytest.mark.parametrize("method", METHODS)
def test_walk_compiles_to_one_graph(method: str) -> None:
    def loss(edge: Tensor, x: Tensor) -> Tensor:
        return propagate_to_edge(x, edge, radius=3, n_steps=20, method=method).square().sum()

    inputs = random_maps(1, 1, 4, 5).sigmoid().requires_grad_(), random_maps(1, 2, 4, 5).requires_grad_()
    expected = loss(*inputs)
    result = torch.compile(loss, fullgraph=True, backend="aot_eager")(*inputs)
    torch.testing.assert_close(result, expected)
    for ours, theirs in zip(torch.autograd.grad(result, inputs), torch.autograd.grad(expected, inputs), strict=True):
        torch.testing.assert_close(ours, theirs)


# edge-aware walk


@given(sides, sides, radii, methods, seeds)
def test_propagate_to_edge_equals_the_dense_form(height: int, width: int, radius: int, method: str, seed: int) -> None:
    edge = random_maps(2, 1, height, width, seed=seed).sigmoid()
    x = random_maps(2, 2, height, width, seed=seed + 1).sigmoid()
    expected = reference.random_walk(x * (1 - edge), reference.edge_matrix(edge, radius), 10, 256)
    walked = propagate_to_edge(x, edge, radius=radius, method=method, tolerance=1e-13)
    torch.testing.assert_close(walked, expected, rtol=0, atol=2e-12)
    assert walked.min() >= 0
    assert (walked.amax((2, 3)) <= x.amax((2, 3))).all()


def test_propagate_to_edge_keeps_constants_without_edge_and_stops_after_0_steps() -> None:
    constant = torch.full((1, 2, 5, 6), 0.3)
    assert torch.equal(propagate_to_edge(constant, torch.zeros(1, 1, 5, 6)), constant)
    edge = torch.rand(1, 1, 5, 6)
    assert torch.equal(propagate_to_edge(constant, edge, n_steps=0), constant * (1 - edge))


@given(st.integers(0, 7), st.integers(1, 2), radii, methods)
def test_a_wall_keeps_two_halves_apart(column: int, thickness: int, radius: int, method: str) -> None:
    edge = random_maps(1, 1, 6, 8).sigmoid() / 2
    edge[..., column : column + thickness] = 1
    x = torch.zeros(1, 1, 6, 8, dtype=torch.float64)
    x[..., :column] = 1
    walked = propagate_to_edge(x, edge, radius=radius, method=method)
    assert not walked[..., column:].any()
    assert (walked[..., :column] > 0).all()


# whole inference


def test_propagate_cam_walks_the_background_too() -> None:
    cam = random_maps(1, 2, 13, 18).sigmoid()
    affinity = random_affinity((4, 5), 3)
    scores = torch.cat([background_score(cam, 4), cam], 1)
    padded = torch.zeros(1, 3, 16, 20, dtype=torch.float64)
    padded[..., :13, :18] = scores
    pooled = padded.unfold(2, 4, 4).unfold(3, 4, 4).mean((-1, -2))
    expected = reference.random_walk(pooled, affinity.dense(), 8, 256)
    torch.testing.assert_close(propagate_cam(cam, affinity, alpha=4, stride=4), expected, rtol=0, atol=1e-12)


def test_propagate_cam_walks_a_constant_background_that_is_0_outside_of_the_image() -> None:
    cam = random_maps(1, 2, 13, 18).sigmoid()
    affinity = random_affinity((4, 5), 3)
    padded = torch.zeros(1, 3, 16, 20, dtype=torch.float64)
    padded[..., :13, :18] = torch.cat([torch.full_like(cam[:, :1], 0.39), cam], 1)
    pooled = padded.unfold(2, 4, 4).unfold(3, 4, 4).mean((-1, -2))
    expected = reference.random_walk(pooled, affinity.dense(), 8, 64)
    walked = propagate_cam(cam, affinity, background=0.39, stride=4, n_steps=64)
    torch.testing.assert_close(walked, expected, rtol=0, atol=1e-12)


def test_propagate_cam_without_a_class_is_background() -> None:
    scores = propagate_cam(torch.zeros(1, 0, 16, 16), random_affinity((2, 2), 2).to(torch.float32))
    assert torch.equal(scores, torch.ones(1, 1, 2, 2))


@given(st.integers(1, 9), st.integers(1, 9))
def test_walk_scores_are_relative_to_the_largest_of_the_crop(height: int, width: int) -> None:
    walked = random_maps(2, 3, -(-height // 4), -(-width // 4)).sigmoid() / 7
    scores = walk_scores(walked, (height, width))
    assert scores.shape == (2, 3, height, width)
    torch.testing.assert_close(scores.amax((1, 2, 3)), torch.ones(2, dtype=torch.float64))
    large = upsample_scores(walked, (height, width), stride=4)
    torch.testing.assert_close(scores * large.amax((1, 2, 3), keepdim=True), large)
    strongest = cam_to_mask(scores, 1 - 1e-12)
    assert (strongest > 0).sum() >= 2
    assert torch.equal(strongest > 0, scores.amax(1) > 1 - 1e-12)


def test_walk_scores_of_empty_maps_are_zero_and_keep_a_gradient() -> None:
    walked = torch.zeros(1, 2, 3, 3, requires_grad=True)
    scores = walk_scores(walked, (10, 12))
    assert not scores.any()
    assert not cam_to_mask(scores, 0.25).any()
    scores.sum().backward()
    assert walked.grad is not None
    assert walked.grad.isfinite().all()
    assert walk_scores(torch.zeros(1, 0, 3, 3), (10, 12)).shape == (1, 0, 10, 12)


# messages


def test_messages_name_argument_expected_and_given() -> None:
    affinity = random_affinity((3, 4), 2)
    x = torch.zeros(1, 2, 3, 4)
    with pytest.raises(ValueError, match=r"n_steps: expected an integer >= 0, got -1"):
        random_walk(x, affinity, n_steps=-1)
    with pytest.raises(ValueError, match=r"method: expected 'power' or 'chebyshev', got 'dense'"):
        RandomWalk(method="dense")
    with pytest.raises(ValueError, match=r"tolerance: expected a number in \[0, 1\), got 1"):
        RandomWalk(tolerance=1)
    with pytest.raises(ValueError, match=r"beta: expected a number >= 0, got -2"):
        random_walk(x, affinity, beta=-2)
    with pytest.raises(
        ValueError, match=r"affinity: expected values \(B, P, H, W\) to match x \(1, 2, 4, 3\), got \(1, 4, 3, 4\)"
    ):
        random_walk(x.mT, affinity)
    with pytest.raises(ValueError, match=r"affinity: expected values .* to match x \(3, 2, 3, 4\), got \(2, 4, 3, 4\)"):
        random_walk(x.expand(3, -1, -1, -1), random_affinity((3, 4), 2, batch=2))
    with pytest.raises(TypeError, match=r"x: expected a floating-point tensor, got torch.int64"):
        random_walk(x.long(), affinity)
    with pytest.raises(ValueError, match=r"x: expected shape \(B, C, H, W\), got \(2, 3, 4\)"):
        random_walk(x[0], affinity)
    with pytest.raises(ValueError, match=r"edge: expected shape \(1, 1, 3, 4\) to match x, got \(1, 2, 3, 4\)"):
        propagate_to_edge(x, x)
    with pytest.raises(ValueError, match=r"size: expected at most 4 times \(3, 4\), got \(13, 4\)"):
        upsample_scores(x, (13, 4), stride=4)


def test_repr_shows_the_options() -> None:
    assert repr(RandomWalk(beta=4, method="chebyshev")) == (
        "RandomWalk(beta=4, n_steps=256, method='chebyshev', tolerance=1e-07)"
    )
    assert repr(EdgeToAffinity(7)) == "EdgeToAffinity(radius=7)"

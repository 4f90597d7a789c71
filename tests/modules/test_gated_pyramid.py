import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from tests.modules import reference_aeft
from wsss_modules import GatedPyramidPooling, SignPreservingGate

SIZES = [(16, 16), (20, 17), (5, 7), (1, 1)]


def make_pooling(classes: int = 3, levels: tuple[int, ...] = (2, 4, 8, 16), seed: int = 0) -> GatedPyramidPooling:
    torch.manual_seed(seed)
    pooling = GatedPyramidPooling(classes, levels).double()
    for weight in pooling.parameters():  # gates far from the one half that they start at
        weight.data *= 20
    return pooling


def swapped(pooling: GatedPyramidPooling) -> GatedPyramidPooling:
    """A copy in which positive and negative gates have changed places."""
    other = GatedPyramidPooling(pooling.num_classes, pooling.levels).double()
    names = {"positive": "negative", "negative": "positive"}
    state = {".".join(names.get(part, part) for part in key.split(".")): x for key, x in pooling.state_dict().items()}
    other.load_state_dict(state)
    return other


def random_map(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("size", [(6, 5), (3, 4)])
def test_pyramid_equals_the_form_with_loops(size: tuple[int, int]) -> None:
    pooling, cam = make_pooling(2, (2, 3, 5)), random_map(2, 2, *size)
    out = pooling(cam)
    gates = [(gate.positive.weight, gate.negative.weight) for gate in pooling.gates]
    for image in range(2):
        logits, gpp = reference_aeft.gated_pyramid(cam[image], gates, pooling.levels)
        torch.testing.assert_close(out.logits[image], logits)
        torch.testing.assert_close(out.gpp[image], gpp)


@pytest.mark.parametrize("size", SIZES)
def test_negated_map_with_swapped_gates_gives_negated_scores(size: tuple[int, int]) -> None:
    pooling, cam = make_pooling(), random_map(2, 3, *size)
    out, other = pooling(cam), swapped(pooling)(-cam)
    torch.testing.assert_close(other.logits, -out.logits)
    torch.testing.assert_close(other.gpp, -out.gpp)
    plain = pooling(-cam)
    assert not torch.allclose(plain.gpp, -out.gpp), "the gates of both signs are different"


@given(st.permutations(range(4)))
def test_permuted_classes_with_permuted_gate_inputs_give_permuted_scores(order: list[int]) -> None:
    pooling, cam = make_pooling(4), random_map(1, 4, 9, 8)
    other = GatedPyramidPooling(4).double()
    inputs = torch.tensor([*order, *(4 + k for k in order)])  # coarse and fine channels of a gate
    other.load_state_dict({key: weight[:, inputs] for key, weight in pooling.state_dict().items()})
    out, permuted = pooling(cam), other(cam[:, order])
    torch.testing.assert_close(permuted.logits, out.logits[:, order])
    torch.testing.assert_close(permuted.gpp, out.gpp[:, order])


def test_zero_map_scores_exactly_zero() -> None:
    cam = torch.zeros(2, 3, 9, 9, dtype=torch.float64, requires_grad=True)
    out = make_pooling()(cam)
    assert not out.logits.any()
    assert not out.gpp.any()
    (grad,) = torch.autograd.grad(out.logits.sum() + out.gpp.sum(), cam)
    assert grad.isfinite().all()


@pytest.mark.parametrize("size", SIZES)
def test_constant_map_has_a_pyramid_of_its_sign_and_a_score_of_its_square(size: tuple[int, int]) -> None:
    pooling = GatedPyramidPooling(1, (1, 2)).double()
    for weight in pooling.parameters():
        weight.data.zero_()  # every gate one half
    for value in (3.0, -3.0):
        out = pooling(torch.full((1, 1, *size), value, dtype=torch.float64))
        torch.testing.assert_close(out.gpp, torch.full_like(out.gpp, value / 2))
        torch.testing.assert_close(out.logits, torch.full_like(out.logits, value * abs(value) / 2))


@given(st.integers(0, 99))
def test_gate_keeps_the_sign_where_both_maps_have_it_and_never_amplifies(seed: int) -> None:
    torch.manual_seed(seed)
    gate = SignPreservingGate(3).double()
    coarse, fine = random_map(1, 3, 6, 6, seed=seed), random_map(1, 3, 6, 6, seed=seed + 1000)
    fused = gate(coarse, fine)
    agree = coarse.sign() == fine.sign()
    assert torch.equal(fused.sign()[agree], coarse.sign()[agree])
    bound = torch.maximum(coarse.abs(), fine.abs())
    assert (fused.abs() < bound).all(), "each of two gates below 1 weighs half of a map"


def test_gates_of_one_sign_see_nothing_of_the_other() -> None:
    gate = make_pooling().gates[0]
    coarse, fine = random_map(1, 3, 6, 6), random_map(1, 3, 6, 6, seed=1)
    less = gate(coarse.clamp(min=0), fine.clamp(min=0)) + gate(coarse.clamp(max=0), fine.clamp(max=0))
    torch.testing.assert_close(gate(coarse, fine), less)


def test_gates_are_shared_by_the_classes_and_read_all_of_them() -> None:
    gate = make_pooling().gates[0]
    coarse, fine = random_map(1, 3, 6, 6).abs(), torch.zeros(1, 3, 6, 6, dtype=torch.float64)
    openness = gate(coarse, fine) / coarse
    torch.testing.assert_close(openness[:, 0], openness[:, 1])
    other = coarse.clone()
    other[:, 2] += 1  # another class changes what is left of this one
    assert not torch.allclose(gate(other, fine)[:, 0], gate(coarse, fine)[:, 0])


def test_a_gate_can_refuse_both_scales() -> None:
    gate = SignPreservingGate(1).double()
    gate.positive.weight.data.fill_(-50.0)
    x = torch.ones(1, 1, 5, 5, dtype=torch.float64)
    assert gate(x, x).max() < 1e-20, "a softmax would have passed at least half"


def test_scaled_maps_don_t_give_scaled_output_because_of_the_gates() -> None:
    gate = make_pooling().gates[0]
    coarse, fine = random_map(1, 3, 6, 6), random_map(1, 3, 6, 6, seed=1)
    assert not torch.allclose(gate(2 * coarse, 2 * fine), 2 * gate(coarse, fine), rtol=1e-2)


def test_a_peak_scores_less_than_the_same_response_spread_out() -> None:
    pooling = GatedPyramidPooling(1).double()
    for weight in pooling.parameters():
        weight.data.zero_()
    peak = torch.zeros(1, 1, 16, 16, dtype=torch.float64)
    peak[..., 8, 8] = 16.0
    spread = torch.full_like(peak, 1.0)
    torch.testing.assert_close(peak.square().mean(), spread.square().mean())
    assert pooling(peak).logits.item() < pooling(spread).logits.item()


@pytest.mark.parametrize("size", [(6, 7), (1, 1)])
def test_pooling_gradcheck(size: tuple[int, int]) -> None:
    pooling = make_pooling(2, (1, 2, 4))
    cam = random_map(1, 2, *size).requires_grad_()
    weights = tuple(pooling.parameters())
    assert torch.autograd.gradcheck(lambda x, *_: tuple(pooling(x)), (cam, *weights))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_close_to_float64_and_keeps_its_dtype(dtype: torch.dtype) -> None:
    pooling, cam = make_pooling().to(dtype), random_map(2, 3, 20, 17).to(dtype)
    out = pooling(cam)
    assert out.logits.dtype == out.gpp.dtype == dtype
    exact = pooling.double()(cam.double())
    eps = torch.finfo(dtype).eps  # a few roundings on the way: pools, gates, sums
    torch.testing.assert_close(out.gpp.double(), exact.gpp, rtol=0, atol=8 * eps * exact.gpp.abs().max().item())
    torch.testing.assert_close(out.logits.double(), exact.logits, rtol=0, atol=8 * eps)


def test_products_beyond_half_precision_are_averaged_before_rounding() -> None:
    cam = torch.zeros(1, 1, 4, 4, dtype=torch.float16)
    cam[..., 1, 1] = 1000.0
    pooling = GatedPyramidPooling(1).half()
    for weight in pooling.parameters():
        torch.nn.init.zeros_(weight)
    out = pooling(cam)
    assert (cam * out.gpp).isinf().any()
    assert out.logits.isfinite().all()
    torch.testing.assert_close(out.logits.float(), pooling.float()(cam.float()).logits, rtol=1e-2, atol=0)


def test_pooling_compiles_to_one_graph() -> None:
    pooling, cam = make_pooling(), random_map(2, 3, 20, 17).requires_grad_()
    compiled = torch.compile(pooling, fullgraph=True, backend="aot_eager")
    out, expected = compiled(cam), pooling(cam)
    torch.testing.assert_close(tuple(out), tuple(expected))
    grads = [torch.autograd.grad(result.logits.sum(), cam)[0] for result in (out, expected)]
    torch.testing.assert_close(*grads)


def test_released_names_cover_the_layer_and_nothing_else() -> None:
    released = [f"gconv{i}.att_{sign}.0.weight" for i in (1, 2, 3) for sign in "pn"]
    keys = [GatedPyramidPooling.released_key(name) for name in released]
    assert set(keys) == set(GatedPyramidPooling(20).state_dict())
    assert keys[:2] == ["gates.0.positive.weight", "gates.0.negative.weight"]
    assert GatedPyramidPooling.released_key("fc9.weight") is None
    assert GatedPyramidPooling.released_key("gconv1.bn.weight") is None


def test_empty_batch() -> None:
    out = GatedPyramidPooling(3)(torch.zeros(0, 3, 8, 8))
    assert out.logits.shape == (0, 3)
    assert out.gpp.shape == (0, 3, 8, 8)


def test_training_the_pooling_on_maps_tells_two_patterns_apart() -> None:
    torch.manual_seed(0)
    features = torch.randn(8, 4, 12, 12) * 0.1
    labels = torch.eye(2).repeat(4, 1)
    features[labels[:, 0] > 0, 0, 2:8, 2:8] += 1
    features[labels[:, 1] > 0, 1, 4:10, 4:10] += 1
    model = torch.nn.Sequential(torch.nn.Conv2d(4, 2, 1, bias=False), GatedPyramidPooling(2))
    optimizer = torch.optim.Adam(model.parameters(), lr=0.1)
    for _ in range(40):
        loss = torch.nn.functional.binary_cross_entropy_with_logits(model(features).logits, labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert torch.equal(model(features).logits > 0, labels > 0)


def test_messages_name_argument_expected_and_given() -> None:
    with pytest.raises(ValueError, match=r"levels: expected at least two ascending numbers of cells, got \(4, 2\)"):
        GatedPyramidPooling(3, (4, 2))
    with pytest.raises(ValueError, match=r"levels: expected at least two ascending numbers of cells, got \(4,\)"):
        GatedPyramidPooling(3, (4,))
    with pytest.raises(ValueError, match=r"cam: expected shape \(\*, 3, \*, \*\) \(B, K, H, W\), got \(1, 2, 4, 4\)"):
        GatedPyramidPooling(3)(torch.zeros(1, 2, 4, 4))
    with pytest.raises(TypeError, match=r"cam: expected a floating-point tensor, got torch.int64"):
        GatedPyramidPooling(3)(torch.zeros(1, 3, 4, 4, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"fine: expected shape \(1, 3, 4, 4\) to match coarse, got \(1, 3, 4, 5\)"):
        SignPreservingGate(3)(torch.zeros(1, 3, 4, 4), torch.zeros(1, 3, 4, 5))
    with pytest.raises(TypeError, match=r"fine: expected a floating-point tensor, got torch.bool"):
        SignPreservingGate(3)(torch.zeros(1, 3, 4, 4), torch.zeros(1, 3, 4, 4, dtype=torch.bool))

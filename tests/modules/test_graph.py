import copy
from functools import partial

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.autograd import gradcheck

from tests.modules import reference_graph
from wsss_modules import GlobalReasoningUnit


def unit_and_map(
    channels: int = 6, nodes: int = 2, size: tuple[int, int] = (3, 5), batch: int = 2, **options
) -> tuple[GlobalReasoningUnit, Tensor]:
    torch.manual_seed(0)
    return GlobalReasoningUnit(channels, nodes, **options).double(), torch.randn(batch, channels, *size).double()


@given(st.integers(1, 7), st.integers(1, 4), st.integers(1, 5), st.booleans(), st.booleans())
def test_reordered_products_equal_the_written_ones(
    channels: int, nodes: int, width: int, normalize: bool, training: bool
) -> None:
    unit, x = unit_and_map(channels, nodes, (2, width), normalize=normalize)
    torch.nn.init.normal_(unit.norm.weight)
    torch.nn.init.normal_(unit.norm.bias)
    unit(3 * x)  # so that the running statistics are not 0 and 1
    unit.train(training)
    naive, cotangent = copy.deepcopy(unit), torch.randn(x.shape).double()
    results = []
    for form in (unit, partial(reference_graph.global_reasoning, naive)):
        leaves = [x.clone().requires_grad_(), *(unit if form is unit else naive).parameters()]
        result = form(leaves[0])
        results.append([result, *torch.autograd.grad((result * cotangent).sum(), leaves)])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(unit.state_dict(), naive.state_dict())


def test_a_single_cell_has_no_variance() -> None:
    unit, x = unit_and_map(size=(1, 1), batch=1)
    torch.nn.init.normal_(unit.norm.bias)
    torch.testing.assert_close(unit.train()(x), x + unit.norm.bias[None, :, None, None])
    assert all(value.isfinite().all() for value in unit.state_dict().values())


@pytest.mark.parametrize("empty", [(0, 6, 3, 5), (2, 6, 0, 5)], ids=["image", "cell"])
def test_a_batch_without_a_cell_leaves_the_statistics(empty: tuple[int, ...]) -> None:
    unit, _ = unit_and_map()
    before = copy.deepcopy(unit.state_dict())
    assert unit.train()(torch.zeros(empty).double()).shape == empty
    torch.testing.assert_close(unit.state_dict(), before)


@pytest.mark.parametrize("momentum", [0.3, None])
def test_statistics_move_as_the_batch_norm_says(momentum: float | None) -> None:
    unit, x = unit_and_map()
    unit.norm.momentum = momentum
    naive = copy.deepcopy(unit)
    for _ in range(3):
        unit.train()(x)
        reference_graph.global_reasoning(naive.train(), x)
        x = x.roll(1, 1) + 1
    torch.testing.assert_close(unit.state_dict(), naive.state_dict())


def test_another_batch_norm_in_its_place_is_called() -> None:
    unit, x = unit_and_map()
    plain = copy.deepcopy(unit)
    unit.norm = torch.nn.SyncBatchNorm.convert_sync_batchnorm(unit.norm)
    for module in (unit, plain):
        module.eval()
    torch.testing.assert_close(unit(x), plain(x))


def test_cells_have_no_order() -> None:
    unit, x = unit_and_map()
    order = torch.randperm(15)
    moved = x.flatten(2)[:, :, order].view_as(x)
    for training in (False, True):
        unit.train(training)
        torch.testing.assert_close(unit(moved), unit(x).flatten(2)[:, :, order].view_as(x))


def test_without_what_comes_back_the_unit_is_the_identity() -> None:
    unit, x = unit_and_map()
    torch.nn.init.zeros_(unit.extend.weight)
    assert torch.equal(unit.eval()(x), x)
    started, x = unit_and_map(zero_init=True)
    assert torch.equal(started.train()(x), x)
    assert not torch.equal(unit_and_map()[0](x), x)


def test_images_of_a_batch_do_not_touch_each_other_in_eval() -> None:
    unit, x = unit_and_map(batch=3)
    unit.eval()
    torch.testing.assert_close(unit(x), torch.cat([unit(x[i : i + 1]) for i in range(3)]))


def test_normalised_nodes_do_not_grow_with_the_map() -> None:
    for normalize in (False, True):
        unit, x = unit_and_map(normalize=normalize)
        unit.eval()
        tiled = unit(x.repeat(1, 1, 1, 2))[..., : x.shape[3]]
        assert torch.allclose(tiled, unit(x)) is normalize


def test_every_parameter_learns_and_statistics_move() -> None:
    unit, x = unit_and_map()
    before = unit.norm.running_var.clone()
    unit.train()(x).square().sum().backward()
    assert all(p.grad is not None and p.grad.any() for p in unit.parameters())
    assert not torch.equal(before, unit.norm.running_var)


def test_state_dict_goes_through_and_released_names_cover_it() -> None:
    unit, x = unit_and_map()
    other = GlobalReasoningUnit(6, 2).double()
    other.load_state_dict(unit.state_dict())
    torch.testing.assert_close(other.eval()(x), unit.eval()(x))
    leaves = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")
    released = [f"blocker.{leaf}" for leaf in leaves]
    released += [f"{name}.{leaf}" for name in ("conv_state", "conv_proj", "gcn.conv1") for leaf in ("weight", "bias")]
    released += ["gcn.conv2.weight", "conv_extend.weight"]
    assert {unit.released_key(name) for name in released} == set(unit.state_dict())


def test_gradcheck() -> None:
    unit, x = unit_and_map(size=(2, 2))
    assert gradcheck(unit.train(), [x.requires_grad_()])


def test_unit_compiles() -> None:
    unit, x = unit_and_map()
    compiled = torch.compile(unit.eval(), fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), unit(x))


@pytest.mark.parametrize("autocast", [False, True])
def test_half_precision(autocast: bool) -> None:
    unit, x = unit_and_map(16, 4, normalize=True)
    exact = unit.eval()(x)
    unit, x = (unit.float(), x.float()) if autocast else (unit.bfloat16(), x.bfloat16())
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        low = unit(x)
    assert low.dtype == x.dtype
    assert (low.double() - exact).abs().max() < 0.05 * exact.abs().max()


def test_sums_over_many_cells_do_not_overflow_in_float16() -> None:
    unit, x = unit_and_map(4, 2, (64, 64), batch=1)
    torch.nn.init.constant_(unit.state.bias, 40.0)  # 40 times 4,096 cells is more than float16 holds
    torch.nn.init.constant_(unit.project.bias, 1.0)
    unit.extend.weight.data *= 1e-3
    assert unit.eval().half()(x.half()).isfinite().all()


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: GlobalReasoningUnit(0, 2), ValueError, r"channels: expected at least 1, got 0"),
        (lambda: GlobalReasoningUnit(2, 0), ValueError, r"nodes: expected at least 1, got 0"),
        (
            lambda: GlobalReasoningUnit(4, 2)(torch.rand(2, 3, 5, 5)),
            ValueError,
            r"features: expected shape \(\*, 4, \*, \*\) for this unit, got \(2, 3, 5, 5\)",
        ),
        (lambda: GlobalReasoningUnit(4, 2)(torch.rand(4, 5, 5)), ValueError, r"features: expected shape \(B, C, H, W"),
        (lambda: GlobalReasoningUnit(4, 2)(torch.ones(1, 4, 5, 5).int()), TypeError, r"features: expected a floating"),
    ],
)
def test_messages(call, error, message) -> None:
    with pytest.raises(error, match=message):
        call()

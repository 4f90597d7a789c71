"""Laws that losses obey for any input, over the columns of the table `tests/losses/table`."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.heap import bytes_in_use
from tests.losses.table import CASES, SITUATIONS, LossCase, total
from tests.losses.table.case import REAL
from tests.losses.test_common import arguments, gradients

each_loss = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
few = settings(max_examples=6)
seeds = st.integers(0, 2**31 - 1)
situations = st.sampled_from(SITUATIONS)


def having(column: Callable[[LossCase], Any]) -> pytest.MarkDecorator:
    """Only the losses with an entry in a column."""
    return pytest.mark.parametrize("case", [case for case in CASES if column(case)], ids=lambda case: case.name)


def drawn(
    case: LossCase,
    situation: str,
    seed: int,
    dtype: torch.dtype = torch.float64,
    *,
    magnitude: float = 1.0,
    extremes: float = 0.0,
) -> list[Any]:
    """Inputs of a situation with other predictions: anywhere in their ranges, a share of them at the ends or 0."""
    inputs = arguments(case, situation, dtype)
    generator = torch.Generator().manual_seed(seed)
    for index, name in enumerate(list(case.parameters)[: case.predictions]):
        low, high = case.ranges.get(name, REAL)
        leaf = inputs[index]
        if high > 1:
            values = (magnitude * torch.randn(leaf.shape, generator=generator)).clamp(-high, high)
            values = values if low < 0 else values.abs()
        else:
            values = low + (high - low) * torch.rand(leaf.shape, generator=generator)
        ends = torch.tensor([low, 0.0, high])[torch.randint(0, 3, leaf.shape, generator=generator)]
        at_end = torch.rand(leaf.shape, generator=generator) < extremes
        inputs[index] = torch.where(at_end, ends, values).to(dtype).requires_grad_()
    return inputs


def detached(inputs: list[Any]) -> list[Any]:
    return [x.detach() if isinstance(x, Tensor) else x for x in inputs]


def terms(result: Any) -> list[Tensor]:
    return [result] if isinstance(result, Tensor) else list(result)


@each_loss
@few
@given(
    seed=seeds,
    situation=situations,
    magnitude=st.sampled_from([1e-6, 1.0, 1e3, 1e6]),
    extremes=st.sampled_from([0.0, 0.3, 1.0]),
)
def test_any_input_in_range_gives_a_finite_loss_and_gradient(
    case: LossCase, seed: int, situation: str, magnitude: float, extremes: float
) -> None:
    inputs = drawn(case, situation, seed, torch.float32, magnitude=magnitude, extremes=extremes)
    result = case.function(*inputs, **case.options)
    assert all(term.isfinite().all() for term in terms(result))
    assert all(grad.isfinite().all() for grad in gradients(case, result, inputs))


@each_loss
@few
@given(seed=seeds, situation=situations)
def test_float32_agrees_with_float64(case: LossCase, seed: int, situation: str) -> None:
    assume(situation not in case.ties_in)
    single = detached(drawn(case, situation, seed, torch.float32))
    double = [x.double() if isinstance(x, Tensor) and x.is_floating_point() else x for x in single]
    found, exact = (total(case.function(*inputs, **case.options)) for inputs in (single, double))
    torch.testing.assert_close(found.double(), exact, rtol=2e-5, atol=2e-6)


@each_loss
@few
@given(seed=seeds, situation=situations, data=st.data())
def test_order_of_images_and_classes_does_not_matter(
    case: LossCase, seed: int, situation: str, data: st.DataObject
) -> None:
    inputs = detached(drawn(case, situation, seed))
    images, classes = case.size(inputs, "B"), case.size(inputs, "K")
    # label maps alone don't tell how many classes there are: they hold 1 and 2
    shuffled = [data.draw(st.permutations(range(count))) for count in (images, classes or 2)]
    moved = case.permuted(inputs, *(torch.tensor(order, dtype=torch.int64) for order in shuffled))
    before, after = (total(case.function(*x, **case.options)) for x in (inputs, moved))
    torch.testing.assert_close(after, before)
    if any(options.get("reduction") == "none" for options in case.varies) and "R" not in str(case.axes):
        options = {**case.options, "reduction": "none"}
        before, after = (total(case.function(*x, **options)) for x in (inputs, moved))
        if before.ndim == 1 and len(before) == images:
            torch.testing.assert_close(after, before[shuffled[0]])


@having(lambda case: "labels" in case.parameters and any("K" in str(a) or "C" in str(a) for a in case.axes))
@few
@given(seed=seeds)
def test_absent_classes_count_only_where_they_should(case: LossCase, seed: int) -> None:
    inputs, other = (detached(drawn(case, "typical", s)) for s in (seed, seed + 1))
    labels = case.named(inputs)["labels"]
    for index, name in enumerate(list(case.parameters)[: case.predictions]):
        letters = case.axes[index]
        if not isinstance(letters, str) or "B" not in letters or not {"K", "C"} & set(letters) or labels.ndim != 2:
            continue
        absent = labels == 0
        if "C" in letters and inputs[index].shape[letters.index("C")] > absent.shape[1]:
            absent = torch.nn.functional.pad(absent, (1, 0))  # the background is always there
        first = letters.index("B")
        absent = absent.reshape(*[1] * first, *absent.shape, *[1] * (inputs[index].ndim - first - 2))
        changed = [*inputs[:index], torch.where(absent, other[index], inputs[index]), *inputs[index + 1 :]]
        before, after = (total(case.function(*x, **case.options)) for x in (inputs, changed))
        assert torch.isclose(before, after, rtol=1e-10, atol=1e-12).item() is (name in case.ignores_absent.split()), (
            name
        )


@having(lambda case: case.scales)
@few
@given(seed=seeds, factor=st.floats(0.25, 4.0))
def test_scale_law(case: LossCase, seed: int, factor: float) -> None:
    inputs = detached(drawn(case, "typical", seed))
    before = total(case.function(*inputs, **case.options))
    for names, degree in case.scales.items():
        scaled = [factor * x if name in names.split() else x for name, x in case.named(inputs).items()]
        after = total(case.function(*scaled, **case.options))
        torch.testing.assert_close(after, factor**degree * before, rtol=1e-4, atol=1e-7, msg=f"degree in {names}")


@having(lambda case: case.shifts)
@few
@given(seed=seeds, size=st.floats(-20.0, 20.0))
def test_what_all_classes_have_in_common_does_not_matter(case: LossCase, seed: int, size: float) -> None:
    inputs = detached(drawn(case, "typical", seed))
    before = total(case.function(*inputs, **case.options))
    for moved in case.shifts.split():
        shifted = []
        for name, x in case.named(inputs).items():
            noise = size * torch.rand_like(x[:, :1]) if name == moved else 0
            shifted.append(x + noise if name == moved else x)
        torch.testing.assert_close(total(case.function(*shifted, **case.options)), before, msg=f"shift of {moved}")


@having(lambda case: any(options.get("reduction") == "none" for options in case.varies))
@few
@given(seed=seeds, situation=situations)
def test_reductions_agree(case: LossCase, seed: int, situation: str) -> None:
    inputs = detached(drawn(case, situation, seed))
    results = [
        case.function(*inputs, **{**case.options, "reduction": reduction}) for reduction in ("none", "sum", "mean")
    ]
    costs, summed, mean = map(total, results)
    torch.testing.assert_close(summed, costs.sum())
    count = case.mean_over(*inputs) if case.mean_over else costs.numel()
    for name, number in count.items() if isinstance(count, dict) else ():
        _, summed, mean = (getattr(result, name) for result in results)
        torch.testing.assert_close(mean, summed / max(1, number), msg=name)
    if isinstance(count, int):
        torch.testing.assert_close(mean, summed / max(1, count))


@pytest.fixture(scope="module")
def quick_collection() -> Iterator[None]:
    """Leave what was imported out of the search for garbage."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


@each_loss
@pytest.mark.usefixtures("quick_collection")
def test_memory_is_flat_over_100_steps(case: LossCase) -> None:
    criterion, inputs = case.module(**case.options), arguments(case, "typical", torch.float32)

    def held_after(steps: int) -> int:
        for _ in range(steps):
            gradients(case, criterion(*inputs), inputs)
        gc.collect()
        return bytes_in_use()

    before = held_after(10)
    assert held_after(100) - before < 100 * 100  # a scalar with its graph takes more than 300 bytes

"""What holds for every loss in every situation of the table `tests/losses/table`."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd import gradcheck

import wsss_losses
from tests.losses.table import CASES, SITUATIONS, TOLERANCE, LossCase, total

each_loss = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
each_situation = pytest.mark.parametrize("situation", SITUATIONS)


def arguments(case: LossCase, situation: str, dtype: torch.dtype = torch.float64) -> list[Any]:
    """Inputs with floating-point tensors in ``dtype``, predictions being leaves."""
    inputs = [x.to(dtype) if isinstance(x, Tensor) and x.is_floating_point() else x for x in case.inputs(situation)]
    leaves = [x.clone().requires_grad_() for x in inputs[: case.predictions]]
    return [*leaves, *inputs[case.predictions :]]


def gradients(case: LossCase, result: Any, inputs: list[Any]) -> tuple[Tensor, ...]:
    return torch.autograd.grad(total(result), inputs[: case.predictions])


def test_every_public_loss_is_in_the_table() -> None:
    public = {name: getattr(wsss_losses, name) for name in wsss_losses.__all__}
    results = {name for name, value in public.items() if inspect.isclass(value) and issubclass(value, tuple)}
    covered = {case.name for case in CASES} | {case.module.__name__ for case in CASES}
    assert covered == set(public) - results
    assert wsss_losses.__all__ == sorted(wsss_losses.__all__)


@each_loss
def test_class_and_function_have_the_same_options(case: LossCase) -> None:
    def options(signature: inspect.Signature) -> dict[str, Any]:
        parameters = signature.parameters.values()
        return {p.name: p.default for p in parameters if p.kind is inspect.Parameter.KEYWORD_ONLY}

    of_class = options(inspect.signature(case.module.__init__))
    assert options(inspect.signature(case.function)) == of_class
    tensors = [p for p in inspect.signature(case.function).parameters if p not in of_class]
    assert tensors == list(inspect.signature(case.module.forward).parameters)[1:]


@each_loss
def test_class_equals_function(case: LossCase) -> None:
    for options in (case.options, *case.varies):
        criterion = case.module(**options)
        inputs = arguments(case, "typical")
        torch.testing.assert_close(criterion(*inputs), case.function(*inputs, **options), rtol=0, atol=0)
        assert all(f"{name}={value!r}" in repr(criterion) for name, value in options.items())
        assert isinstance(criterion, nn.Module)


@each_loss
@each_situation
def test_loss_and_gradient_are_finite_and_attached(case: LossCase, situation: str) -> None:
    inputs = arguments(case, situation)
    before = [x.detach().clone() for x in inputs[: case.predictions]]
    result = case.function(*inputs, **case.options)
    terms = [result] if isinstance(result, Tensor) else list(result)
    assert all(term.isfinite().all() for term in terms)
    grads = gradients(case, result, inputs)
    assert all(grad.isfinite().all() for grad in grads)
    if situation in case.zero_in:
        assert total(result) == 0
        assert not any(grad.any() for grad in grads)
    elif situation == "typical":
        assert all(grad.any() for grad in grads)
    assert all(torch.equal(x, y) for x, y in zip(inputs, before, strict=False))


def on_device(x: Any, device: str) -> Any:
    """An argument there; predictions stay leaves, a tuple of tensors keeps its type."""
    if isinstance(x, Tensor):
        return x.detach().to(device).requires_grad_(x.requires_grad)
    return type(x)(*(on_device(part, device) for part in x)) if isinstance(x, tuple) else x


@pytest.mark.gpu
@each_loss
@each_situation
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_a_gpu_gives_what_the_cpu_gives(case: LossCase, situation: str, dtype: torch.dtype) -> None:
    if dtype == torch.float32 and situation in case.ties_in:
        pytest.skip("rounding decides between classes that tie")
    inputs = arguments(case, situation, dtype)
    exact = arguments(case, situation)
    moved = [on_device(x, "cuda") for x in inputs]
    result, expected = case.function(*moved, **case.options), case.function(*exact, **case.options)
    rtol = TOLERANCE.get(dtype, 1e-7)
    for found, reference in zip(*(([r] if isinstance(r, Tensor) else r) for r in (result, expected)), strict=True):
        torch.testing.assert_close(found.cpu().double(), reference, rtol=rtol, atol=rtol)
    pairs = zip(gradients(case, result, moved), gradients(case, expected, exact), strict=True)
    for found, reference in pairs:
        torch.testing.assert_close(
            found.cpu().double(), reference, rtol=rtol, atol=rtol * max([1.0, *reference.abs().flatten().tolist()])
        )


@each_loss
def test_gradcheck(case: LossCase) -> None:
    for options in (case.options, *case.varies):
        inputs = arguments(case, "typical")
        rest = inputs[case.predictions :]

        def loss(*leaves: Tensor, rest: list[Any] = rest, options: Any = options) -> Any:
            return case.function(*leaves, *rest, **options)

        assert gradcheck(loss, inputs[: case.predictions])


@each_loss
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_low_precision_result_is_the_rounded_float64_result(case: LossCase, dtype: torch.dtype) -> None:
    inputs = arguments(case, "typical", dtype)
    result = case.function(*inputs, **case.options)
    exact_inputs = [
        x.detach().double().requires_grad_() if isinstance(x, Tensor) and x.is_floating_point() else x for x in inputs
    ]
    exact = case.function(*exact_inputs, **case.options)
    rtol = TOLERANCE[dtype]
    for term, reference in zip(*(([r] if isinstance(r, Tensor) else r) for r in (result, exact)), strict=True):
        assert term.dtype == dtype
        torch.testing.assert_close(term.double(), reference, rtol=rtol, atol=0)
    pairs = zip(gradients(case, result, inputs), gradients(case, exact, exact_inputs), strict=True)
    for grad, reference in pairs:
        assert grad.dtype == dtype
        torch.testing.assert_close(grad.double(), reference, rtol=rtol, atol=rtol * reference.abs().max().item())


@each_loss
def test_autocast_does_not_lower_the_precision(case: LossCase) -> None:
    inputs = arguments(case, "typical", torch.float32)
    plain = case.function(*inputs, **case.options)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        torch.testing.assert_close(case.function(*inputs, **case.options), plain, rtol=0, atol=0)


@each_loss
def test_loss_compiles_to_one_graph(case: LossCase) -> None:
    if case.data_dependent:
        pytest.skip(case.data_dependent)
    inputs = arguments(case, "typical")
    compiled = torch.compile(case.module(**case.options), fullgraph=True, backend="aot_eager")
    expected = case.function(*inputs, **case.options)
    result = compiled(*inputs)
    torch.testing.assert_close(result, expected)
    torch.testing.assert_close(gradients(case, result, inputs), gradients(case, expected, inputs))


@each_loss
def test_sync_without_a_process_group_changes_nothing(case: LossCase) -> None:
    if not case.sync:
        assert "sync" not in inspect.signature(case.function).parameters
        return
    inputs = arguments(case, "typical")
    alone = case.function(*inputs, **case.options)
    torch.testing.assert_close(case.function(*inputs, **case.options, sync=True), alone, rtol=0, atol=0)


def image(x: Any, index: int) -> Any:
    """One image of a batched argument; a tuple of tensors keeps its type."""
    if isinstance(x, Tensor):
        return x[index : index + 1]
    return type(x)(*(image(part, index) for part in x))


def compare_one_image_a_process_with_one_batch(rank: int, address: str) -> None:
    """Each of two processes takes one image; value and averaged gradient must be those of the batch."""
    dist.init_process_group("gloo", init_method=address, rank=rank, world_size=2)
    try:
        for case in (case for case in CASES if case.sync):
            for situation in ("typical", "no_label", "all_ignored"):
                compare_mine_with_the_batch(case, situation, rank)
    finally:
        dist.destroy_process_group()


def compare_mine_with_the_batch(case: LossCase, situation: str, rank: int) -> None:
    whole = arguments(case, situation)
    expected = case.function(*whole, **case.options)
    expected_grads = gradients(case, expected, whole)
    inputs = arguments(case, situation)
    batched = len(inputs) - case.constants
    mine = [*(image(x, rank) for x in inputs[:batched]), *inputs[batched:]]
    mine[: case.predictions] = [x.detach().requires_grad_() for x in mine[: case.predictions]]
    result = case.function(*mine, **case.options, sync=True)
    torch.testing.assert_close(result, expected, msg=lambda text: f"{case.name}, {situation}: {text}")
    for grad, reference in zip(gradients(case, result, mine), expected_grads, strict=True):
        averaged = grad / dist.get_world_size()  # as DistributedDataParallel does over the processes
        torch.testing.assert_close(averaged, reference[rank : rank + 1])
    if situation == "typical":
        alone = case.function(*mine, **case.options)
        assert not torch.isclose(total(alone), total(expected)), f"{case.name}: the images don't differ"


@pytest.mark.slow
def test_sync_over_two_processes_equals_one_process(tmp_path: Path) -> None:
    spawn: Callable[..., Any] = torch.multiprocessing.spawn
    spawn(compare_one_image_a_process_with_one_batch, args=((tmp_path / "meeting").as_uri(),), nprocs=2)

"""The losses of ReviewKD; what holds for every loss stands in test_common.py."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from tests.losses.reference_reviewkd import hcl_loop
from wsss_losses import (
    HierarchicalContextLoss,
    ReviewKDLoss,
    distill_kl_loss,
    hierarchical_context_loss,
    review_kd_loss,
)
from wsss_modules import ReviewDistiller

sides = st.sampled_from([1, 2, 3, 4, 5, 6, 8, 12])


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@given(sides, sides)
def test_hcl_equals_the_loop_that_pools_both_maps(height: int, width: int) -> None:
    s, t = draw(2, 3, height, width).requires_grad_(), draw(2, 3, height, width, seed=1)
    ours, loop = hierarchical_context_loss(s, t), hcl_loop([s], [t])
    torch.testing.assert_close(ours, loop)
    torch.testing.assert_close(torch.autograd.grad(ours, s), torch.autograd.grad(loop, s))


@given(sides, sides, st.floats(-3, 3))
def test_hcl_of_a_constant_offset_is_its_square_and_scales_with_the_square(h: int, w: int, offset: float) -> None:
    s, t = draw(2, 3, h, w), draw(2, 3, h, w, seed=1)
    torch.testing.assert_close(hierarchical_context_loss(s, s + offset).item(), offset**2, rtol=1e-9, atol=1e-12)
    plain = hierarchical_context_loss(s, t)
    torch.testing.assert_close(hierarchical_context_loss(3 * s, 3 * t), 9 * plain)
    torch.testing.assert_close(hierarchical_context_loss(t, s), plain)
    torch.testing.assert_close(hierarchical_context_loss(s + offset, t + offset), plain)
    torch.testing.assert_close(hierarchical_context_loss(s.flip(0), t.flip(0)), plain)


@pytest.mark.parametrize(
    ("height", "levels", "weights"),
    [
        (1, [], 1.0),
        (2, [1], 1.5),
        (3, [2, 1], 1.75),
        (4, [2, 1], 1.75),
        (5, [4, 2, 1], 1.875),
        (8, [4, 2, 1], 1.875),
    ],
    ids=str,
)
@pytest.mark.parametrize("width", [1, 3, 8])
def test_the_height_alone_decides_which_levels_count(
    height: int, levels: list[int], weights: float, width: int
) -> None:
    s = draw(1, 2, height, width)
    full, pooled = s.square().mean(), [F.adaptive_avg_pool2d(s, level).square().mean() for level in levels]
    total = full + sum(cost * 0.5 ** (i + 1) for i, cost in enumerate(pooled))
    loss = hierarchical_context_loss(s, torch.zeros_like(s))
    torch.testing.assert_close(loss, total / weights)
    assert (loss > (1 + 1e-9) * full / weights) == bool(levels)


@pytest.mark.parametrize("student", [torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("teacher", [torch.float32, torch.float64])
def test_student_and_teacher_may_differ_in_precision(student: torch.dtype, teacher: torch.dtype) -> None:
    x, y = torch.rand(2, 3, 8, 8, dtype=torch.float64).to(student), torch.rand(2, 3, 8, 8, dtype=torch.float64)
    loss = hierarchical_context_loss([x.requires_grad_()], [y.to(teacher)])
    expected = hierarchical_context_loss([x.detach().double()], [y.to(teacher).double()])
    assert loss.item() == pytest.approx(expected.item(), rel=1e-3)  # measured: 3.1e-4, a float16 student's own rounding
    loss.backward()
    assert x.grad is not None
    assert x.grad.dtype == student


def test_hcl_of_a_list_is_the_sum_of_its_stages() -> None:
    students, teachers = ([draw(b, 3, 6, 9, seed=s + b) for b in (2, 1)] for s in (0, 10))
    alone = [hierarchical_context_loss(s, t) for s, t in zip(students, teachers, strict=True)]
    torch.testing.assert_close(hierarchical_context_loss(students, teachers), sum(alone))
    assert hierarchical_context_loss([], []) == 0
    with pytest.raises(ValueError, match="student: expected one batch size with reduction none"):
        hierarchical_context_loss(students, teachers, reduction="none")


def test_no_gradient_reaches_the_teacher_unless_asked_for() -> None:
    s, t = draw(2, 3, 4, 4).requires_grad_(), draw(2, 3, 4, 4, seed=1).requires_grad_()
    for loss in (hierarchical_context_loss, lambda a, b: review_kd_loss(a, b, 5)):
        loss(s, t).backward()
    assert t.grad is None
    hierarchical_context_loss(s, t, detach_teacher=False).backward()
    assert t.grad.any()
    kept = distill_kl_loss(s, t, detach_teacher=False)
    assert torch.autograd.grad(kept, t)[0].any()


def test_kl_per_pixel_is_the_mean_over_pixels_and_ignores_constants() -> None:
    s, t = draw(2, 5, 3, 4), draw(2, 5, 3, 4, seed=1)
    pixels = [x.permute(0, 2, 3, 1).reshape(-1, 5) for x in (s, t)]
    torch.testing.assert_close(distill_kl_loss(s, t), distill_kl_loss(*pixels))
    torch.testing.assert_close(distill_kl_loss(s + draw(2, 1, 3, 4, seed=2), t), distill_kl_loss(s, t))
    p, q = (x.div(4).softmax(1) for x in pixels[::-1])
    torch.testing.assert_close(distill_kl_loss(s, t), 16 * (p * (p / q).log()).sum(1).mean())
    assert distill_kl_loss(s, s) == 0
    assert (distill_kl_loss(s, t, reduction="none") > 0).all()


@pytest.mark.parametrize(("epoch", "ramp"), [(0, 0.0), (5, 0.25), (20, 1.0), (99, 1.0)])
def test_distillation_warms_up(epoch: float, ramp: float) -> None:
    s, t = draw(2, 3, 4, 4), draw(2, 3, 4, 4, seed=1)
    torch.testing.assert_close(review_kd_loss(s, t, epoch, weight=3.0), 3 * ramp * hierarchical_context_loss(s, t))
    torch.testing.assert_close(review_kd_loss(s, t, epoch, warmup=0.0), hierarchical_context_loss(s, t))


def test_loss_with_a_distiller_teaches_student_and_distiller_and_takes_the_teachers_sizes() -> None:
    distiller = ReviewDistiller([4, 6], [5, 7]).double()
    students = [draw(2, c, s, s + 1, seed=s).requires_grad_() for c, s in ((4, 8), (6, 4))]
    teachers = [draw(2, c, s, s + 2, seed=s).requires_grad_() for c, s in ((5, 10), (7, 5))]
    loss = ReviewKDLoss(distiller, weight=2.0, warmup=0.0)
    out = loss(students, teachers, 0)
    out.backward()
    assert all(x.grad.any() for x in students)
    assert all(x.grad is None for x in teachers)
    assert all(p.grad.any() for p in distiller.parameters())
    assert list(loss.parameters()) == list(distiller.parameters())


def test_a_distiller_of_one_stage_takes_maps_without_a_list() -> None:
    loss = ReviewKDLoss(ReviewDistiller([4], [5]).double().eval(), warmup=0.0)
    student, teacher = draw(2, 4, 6, 8), draw(2, 5, 3, 4, seed=1)
    torch.testing.assert_close(loss(student, teacher, 0), loss([student], [teacher], 0))


MAP = torch.ones(2, 3, 4, 4)


@pytest.mark.parametrize(
    ("error", "message", "call"),
    [
        (
            ValueError,
            "teacher: expected 2 maps to match student, got 1",
            lambda: hierarchical_context_loss([MAP] * 2, MAP),
        ),
        (ValueError, r"student\[0\]: expected shape \(B, C, H, W\)", lambda: hierarchical_context_loss(MAP[0], MAP[0])),
        (ValueError, r"teacher\[0\]: expected shape", lambda: hierarchical_context_loss(MAP, MAP[:1])),
        (TypeError, r"student\[0\]: expected a floating", lambda: hierarchical_context_loss(MAP.long(), MAP)),
        (TypeError, r"teacher\[0\]: expected a floating", lambda: hierarchical_context_loss(MAP, MAP.long())),
        (ValueError, "levels: expected at least 1 each", lambda: HierarchicalContextLoss(levels=(2, 0))),
        (ValueError, "decay: expected at least 0", lambda: hierarchical_context_loss(MAP, MAP, decay=-1)),
        (ValueError, "reduction: expected", lambda: hierarchical_context_loss(MAP, MAP, reduction="max")),
        (ValueError, r"student: expected shape \(B, K\) or", lambda: distill_kl_loss(MAP[0], MAP[0])),
        (ValueError, "teacher: expected shape", lambda: distill_kl_loss(MAP, MAP[:1])),
        (TypeError, "teacher: expected a floating", lambda: distill_kl_loss(MAP, MAP.long())),
        (ValueError, "temperature: expected more than 0", lambda: distill_kl_loss(MAP, MAP, temperature=0)),
        (ValueError, "epoch: expected at least 0", lambda: review_kd_loss(MAP, MAP, -1)),
        (ValueError, "weight, warmup: expected at least 0", lambda: ReviewKDLoss(weight=-1.0)),
    ],
)
def test_the_wrong_argument_is_named(error: type[Exception], message: str, call: Callable[[], object]) -> None:
    with pytest.raises(error, match=message):
        call()

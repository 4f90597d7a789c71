"""What a student pays for its distance from a teacher: features at several resolutions, and logits (ReviewKD).

Axes: B images, C channels of a map, K classes, H W cells; stages from shallow to deep.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from wsss_losses._reduction import Reduction, check_reduction, reduce
from wsss_modules._checks import check_floating, check_ndim, check_shape
from wsss_modules._precision import at_least_float32

Maps = Tensor | Sequence[Tensor]


def hierarchical_context_loss(
    student: Maps,
    teacher: Maps,
    *,
    levels: Sequence[int] = (4, 2, 1),
    decay: float = 0.5,
    reduction: Reduction = "mean",
    detach_teacher: bool = True,
) -> Tensor:
    r"""Squared distance of feature maps at full resolution and of their averages over ever larger windows.

    .. math::
        L = \sum_{stages} \frac{\mathrm{mse}(s, t) + \sum_{i} \gamma^i \, \mathrm{mse}(P_{l_i} s, P_{l_i} t)}
        {1 + \sum_i \gamma^i}

    with :math:`P_l` the average over l x l windows and :math:`l_1, l_2, \dots` those levels that are smaller than the
    height of the map: only they are counted by i.

    Args:
        student: s, (B, C, H, W) floating point, or a list with one for each stage.
        teacher: t, of the same shapes.
        levels: l, in the order of falling weight.
        decay: gamma, from one level to the next.
        reduction: "mean" over the images of each stage, "sum", or "none" for (B,).
        detach_teacher: No gradient to the teacher.

    Returns:
        A scalar or (B,), in the dtype of the student's (first) map; 0 for an empty list.

    Raises:
        TypeError: a map is not floating point.
        ValueError: lists of different lengths, maps of different shapes, a level less than 1, a negative ``decay``, an
            unknown ``reduction``, or stages of different batch sizes with "none".

    Paper:
        Chen, Liu, Zhao and Jia, "Distilling Knowledge via Knowledge Review", CVPR 2021, arXiv:2104.09044, section 3.4.

    Differences:
        The levels and their weights are the released code's, as is that the width does not matter: a narrow map is
        averaged over windows that overlap. There, surplus maps are left out without a word, and the teacher's keep
        their graph (``detach_teacher=False``).

    Notes:
        Averages are linear, so that only the difference of the maps is averaged, over the windows of all levels in one
        product. No second derivative, nor transforms of ``torch.func``. Computed in float32 for half precision.
        Compiles with ``fullgraph=True``. Under DDP the mean over processes with equal batches is that of one process.

    Example:
        >>> import torch
        >>> from wsss_losses import hierarchical_context_loss
        >>> student = [torch.zeros(2, 3, 8, 6), torch.zeros(2, 5, 1, 1)]
        >>> hierarchical_context_loss(student, [x + 2 for x in student])  # 4 for each stage
        tensor(8.)
    """
    _check_levels(levels, decay, reduction)
    students, teachers = _stages(student), _stages(teacher)
    if len(students) != len(teachers):
        raise ValueError(f"teacher: expected {len(students)} maps to match student, got {len(teachers)}")
    if not students:
        return torch.zeros(())
    if reduction == "none" and len({len(x) for x in students}) > 1:
        raise ValueError(f"student: expected one batch size with reduction none, got {[len(x) for x in students]}")
    total: Tensor | None = None
    for stage, (s, t) in enumerate(zip(students, teachers, strict=True)):
        check_ndim(f"student[{stage}]", s, 4, "(B, C, H, W)")
        check_floating(f"student[{stage}]", s)
        check_shape(f"teacher[{stage}]", t, s.shape, "to match student")
        check_floating(f"teacher[{stage}]", t)
        with torch.autocast(s.device.type, enabled=False):
            cost = _stage_cost(s, t.detach() if detach_teacher else t, levels, decay, reduction)
        total = cost if total is None else total + cost
    assert total is not None  # for mypy: there is a stage
    return total.to(students[0].dtype)


class HierarchicalContextLoss(nn.Module):
    """Squared distance of feature maps at several resolutions; see :func:`hierarchical_context_loss`.

    Args:
        levels: sides of the averages, in the order of falling weight.
        decay: factor from one level to the next.
        reduction: "mean", "sum" or "none".
        detach_teacher: no gradient to the teacher.

    Example:
        >>> import torch
        >>> from wsss_losses import HierarchicalContextLoss
        >>> student = torch.rand(2, 3, 8, 6, requires_grad=True)
        >>> HierarchicalContextLoss()(student, torch.rand(2, 3, 8, 6)).backward()
    """

    def __init__(
        self,
        *,
        levels: Sequence[int] = (4, 2, 1),
        decay: float = 0.5,
        reduction: Reduction = "mean",
        detach_teacher: bool = True,
    ) -> None:
        super().__init__()
        _check_levels(levels, decay, reduction)
        self.levels, self.decay, self.detach_teacher = tuple(levels), decay, detach_teacher
        self.reduction: Reduction = reduction

    def forward(self, student: Maps, teacher: Maps) -> Tensor:
        """Maps of the student and of the teacher -> loss."""
        return hierarchical_context_loss(
            student,
            teacher,
            levels=self.levels,
            decay=self.decay,
            reduction=self.reduction,
            detach_teacher=self.detach_teacher,
        )

    def extra_repr(self) -> str:
        """Show the options."""
        return (
            f"levels={self.levels}, decay={self.decay}, reduction={self.reduction!r}, "
            f"detach_teacher={self.detach_teacher}"
        )


def distill_kl_loss(
    student: Tensor,
    teacher: Tensor,
    *,
    temperature: float = 4.0,
    reduction: Reduction = "mean",
    detach_teacher: bool = True,
) -> Tensor:
    r"""Divergence of the student's softened class probabilities from the teacher's.

    .. math:: L_b = T^2 \sum_k p^t_{bk} (\log p^t_{bk} - \log p^s_{bk}), \qquad p = \mathrm{softmax}(z / T)

    averaged over the pixels where there are any.

    Args:
        student: (B, K) or (B, K, H, W) floating point, logits.
        teacher: logits of the same shape.
        temperature: T, above 0.
        reduction: "mean" over the B images, "sum", or "none" for (B,).
        detach_teacher: No gradient to the teacher.

    Returns:
        A scalar or (B,), in the dtype of ``student``; at least 0.

    Raises:
        TypeError: ``student`` or ``teacher`` is not floating point.
        ValueError: shapes don't match, a ``temperature`` of 0 or less, or an unknown ``reduction``.

    Paper:
        Hinton, Vinyals and Dean, "Distilling the Knowledge in a Neural Network", arXiv:1503.02531; an option of the
        released code of Chen et al., CVPR 2021, off by default there.

    Differences:
        The released code is for (B, K); of logits at each pixel it would take the sum over pixels.

    Notes:
        Computed in float32 for half precision. Compiles with ``fullgraph=True``.

    Example:
        >>> import torch
        >>> from wsss_losses import distill_kl_loss
        >>> student, teacher = torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 2.0]])
        >>> distill_kl_loss(student, teacher, temperature=1.0), distill_kl_loss(student, student + 3)
        (tensor(0.8287), tensor(0.))
    """
    _check_kl(temperature, reduction)
    if student.ndim not in (2, 4):
        raise ValueError(f"student: expected shape (B, K) or (B, K, H, W), got {tuple(student.shape)}")
    check_floating("student", student)
    check_shape("teacher", teacher, student.shape, "to match student")
    check_floating("teacher", teacher)
    target = teacher.detach() if detach_teacher else teacher
    with torch.autocast(student.device.type, enabled=False):
        of_student, of_teacher = (F.log_softmax(at_least_float32(z) / temperature, 1) for z in (student, target))
        costs = F.kl_div(of_student, of_teacher, reduction="none", log_target=True).sum(1)  # (B, ...)
        costs = costs.flatten(1).mean(1) if costs.ndim > 1 else costs
        return reduce(costs * temperature**2, reduction).to(student.dtype)


class DistillKLLoss(nn.Module):
    """Divergence of softened class probabilities; see :func:`distill_kl_loss`.

    Args:
        temperature: T, above 0.
        reduction: "mean", "sum" or "none".
        detach_teacher: no gradient to the teacher.

    Example:
        >>> import torch
        >>> from wsss_losses import DistillKLLoss
        >>> student = torch.randn(2, 21, 4, 4, requires_grad=True)
        >>> DistillKLLoss(temperature=2.0)(student, torch.randn(2, 21, 4, 4)).backward()
    """

    def __init__(self, *, temperature: float = 4.0, reduction: Reduction = "mean", detach_teacher: bool = True) -> None:
        super().__init__()
        _check_kl(temperature, reduction)
        self.temperature, self.detach_teacher = temperature, detach_teacher
        self.reduction: Reduction = reduction

    def forward(self, student: Tensor, teacher: Tensor) -> Tensor:
        """Logits of the student and of the teacher -> loss."""
        return distill_kl_loss(
            student,
            teacher,
            temperature=self.temperature,
            reduction=self.reduction,
            detach_teacher=self.detach_teacher,
        )

    def extra_repr(self) -> str:
        """Show the options."""
        return f"temperature={self.temperature}, reduction={self.reduction!r}, detach_teacher={self.detach_teacher}"


def review_kd_loss(
    student: Maps,
    teacher: Maps,
    epoch: float,
    *,
    weight: float = 1.0,
    warmup: float = 20.0,
    levels: Sequence[int] = (4, 2, 1),
    decay: float = 0.5,
) -> Tensor:
    r"""What ReviewKD adds to the loss of the task: the hierarchical context loss with a weight that warms up.

    .. math:: L = w \, \min(1, epoch / warmup) \, L_{HCL}(s, t)

    Args:
        student: maps of the student after a :class:`wsss_modules.ReviewDistiller`, see
            :func:`hierarchical_context_loss`.
        teacher: maps of the teacher; no gradient reaches them.
        epoch: at least 0, may be a fraction: the first epoch of a training, 0, has no distillation.
        weight: w; 0.6 to 8 as published.
        warmup: epochs, in the same unit as ``epoch``; 20 for CIFAR-100, 0 (none) for ImageNet and detection.
        levels: see :func:`hierarchical_context_loss`.
        decay: see :func:`hierarchical_context_loss`.

    Returns:
        A scalar, in the dtype of the student's first map.

    Raises:
        TypeError: see :func:`hierarchical_context_loss`.
        ValueError: also if ``epoch``, ``weight`` or ``warmup`` is negative.

    Paper:
        Chen, Liu, Zhao and Jia, "Distilling Knowledge via Knowledge Review", CVPR 2021, arXiv:2104.09044.

    Differences:
        A warm-up of 0 divides by zero in the released code.

    Notes:
        See :func:`hierarchical_context_loss`. ``epoch`` is a number of Python's, and compiled code may be made anew for
        another one.

    Example:
        >>> import torch
        >>> from wsss_losses import review_kd_loss
        >>> student = torch.zeros(2, 3, 8, 6)
        >>> [f"{review_kd_loss(student, student + 2, epoch, weight=5.0).item():.1f}" for epoch in (0, 10, 30)]
        ['0.0', '10.0', '20.0']
    """
    _check_warmup(weight, warmup)
    if epoch < 0:
        raise ValueError(f"epoch: expected at least 0, got {epoch}")
    ramp = 1.0 if warmup == 0 else min(1.0, epoch / warmup)
    return weight * ramp * hierarchical_context_loss(student, teacher, levels=levels, decay=decay)


class ReviewKDLoss(nn.Module):
    """Review the student's maps, compare them with the teacher's, warm up; see :func:`review_kd_loss`.

    Args:
        distiller: a :class:`wsss_modules.ReviewDistiller`, which learns along with the student: pass its parameters to
            the optimiser. It brings maps to the teacher's sizes. None: maps are comparable as they come.
        weight: weight of the distillation.
        warmup: epochs in which it grows.
        levels: sides of the averages.
        decay: factor from one level to the next.

    Example:
        >>> import torch
        >>> from wsss_losses import ReviewKDLoss
        >>> from wsss_modules import ReviewDistiller
        >>> student = [torch.rand(2, c, s, s, requires_grad=True) for c, s in ((8, 8), (16, 4))]
        >>> teacher = [torch.rand(2, c, s, s) for c, s in ((24, 16), (32, 8))]
        >>> ReviewKDLoss(ReviewDistiller([8, 16], [24, 32]), weight=5.0)(student, teacher, epoch=30).backward()
    """

    def __init__(
        self,
        distiller: nn.Module | None = None,
        *,
        weight: float = 1.0,
        warmup: float = 20.0,
        levels: Sequence[int] = (4, 2, 1),
        decay: float = 0.5,
    ) -> None:
        super().__init__()
        _check_warmup(weight, warmup)
        _check_levels(levels, decay, "mean")
        self.distiller = distiller
        self.weight, self.warmup, self.levels, self.decay = weight, warmup, tuple(levels), decay

    def forward(self, student: Maps, teacher: Maps, epoch: float) -> Tensor:
        """Maps of the student and of the teacher, and the epoch -> loss."""
        students, teachers = _stages(student), _stages(teacher)
        if self.distiller is not None:
            students = self.distiller(students, [x.shape[-2:] for x in teachers])
        return review_kd_loss(
            students,
            teachers,
            epoch,
            weight=self.weight,
            warmup=self.warmup,
            levels=self.levels,
            decay=self.decay,
        )

    def extra_repr(self) -> str:
        """Show the options."""
        return f"weight={self.weight}, warmup={self.warmup}, levels={self.levels}, decay={self.decay}"


def _stages(maps: Maps) -> list[Tensor]:
    return [maps] if isinstance(maps, Tensor) else list(maps)


def _stage_cost(student: Tensor, teacher: Tensor, levels: Sequence[int], decay: float, reduction: Reduction) -> Tensor:
    """Weighted mean of the squared distances of one stage at full resolution and at the levels, reduced."""
    s, t = at_least_float32(student), at_least_float32(teacher)
    s, t = (x.to(torch.promote_types(s.dtype, t.dtype)) for x in (s, t))
    counted = [level for level in levels if level < s.shape[2]]
    shares = [decay**i for i in range(1, 1 + len(counted))]
    windows = torch.cat([s.new_zeros(0, s.shape[2] * s.shape[3]), *(_windows(s, level) for level in counted)])
    share = torch.cat([s.new_zeros(0), *(s.new_full((k**2,), w / k**2) for k, w in zip(counted, shares, strict=True))])
    costs = _DistanceOverWindows.apply(s.flatten(2), t.flatten(2), windows, share)  # (B, C)
    cost = costs.sum(1) / (max(1, costs.shape[1]) * (1 + sum(shares)))
    if reduction == "none":
        return cost
    return cost.sum() / max(1, len(s)) if reduction == "mean" else cost.sum()


class _DistanceOverWindows(torch.autograd.Function):
    """Mean square of s - t (B, C, N), and squares of its averages over windows (W, N), times their share: (B, C).

    Written out, forward and backward read and write something of the size of the maps half as often.
    """

    @staticmethod
    def forward(ctx: Any, s: Tensor, t: Tensor, windows: Tensor, share: Tensor) -> Tensor:
        difference = s - t
        averages = difference @ windows.mT  # (B, C, W)
        ctx.save_for_backward(difference, averages, windows, share)
        squares = torch.linalg.vector_norm(difference, dim=2).square()
        return squares / max(1, s.shape[2]) + averages.square() @ share

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor | None, None, None]:
        difference, averages, windows, share = ctx.saved_tensors
        slope = 2 * grad[:, :, None]
        of_student = difference * (slope / max(1, difference.shape[2]))
        of_student.baddbmm_(averages * share * slope, windows.expand(len(difference), -1, -1))
        return of_student, -of_student if ctx.needs_input_grad[1] else None, None, None


def _windows(x: Tensor, level: int) -> Tensor:
    """(l * l, H W): the share of each cell in the average over each of l x l windows, those of adaptive pooling."""
    rows, columns = (_spans(x, side, level) for side in x.shape[2:])
    return (rows[:, None, :, None] * columns[:, None]).flatten(0, 1).flatten(1)


def _spans(x: Tensor, side: int, level: int) -> Tensor:
    """(l, side): the same along one axis, whose windows overlap where the side is no multiple of l."""
    place, window = torch.arange(side, device=x.device), torch.arange(level, device=x.device)[:, None]
    start, stop = window * side // level, ((window + 1) * side + level - 1) // level
    return ((place >= start) & (place < stop)).to(x.dtype) / (stop - start)


def _check_levels(levels: Sequence[int], decay: float, reduction: str) -> None:
    check_reduction(reduction)
    if any(level < 1 for level in levels):
        raise ValueError(f"levels: expected at least 1 each, got {tuple(levels)}")
    if decay < 0:
        raise ValueError(f"decay: expected at least 0, got {decay}")


def _check_kl(temperature: float, reduction: str) -> None:
    check_reduction(reduction)
    if temperature <= 0:
        raise ValueError(f"temperature: expected more than 0, got {temperature}")


def _check_warmup(weight: float, warmup: float) -> None:
    if weight < 0 or warmup < 0:
        raise ValueError(f"weight, warmup: expected at least 0, got {weight} and {warmup}")

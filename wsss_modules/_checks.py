"""Argument checks shared by the public functions. Messages name the argument, what was expected and what came."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor


def check_ndim(name: str, tensor: Tensor, ndim: int, shape: str) -> None:
    """Raise ``ValueError`` unless ``tensor`` has ``ndim`` axes; ``shape`` is the expected shape in letters."""
    if tensor.ndim != ndim:
        raise ValueError(f"{name}: expected shape {shape}, got {tuple(tensor.shape)}")


def check_shape(name: str, tensor: Tensor, expected: Sequence[int | None], reason: str) -> None:
    """Raise ``ValueError`` unless ``tensor`` has the ``expected`` shape (``None`` = any); ``reason`` completes it."""
    same = tensor.ndim == len(expected) and all(
        e is None or e == s for e, s in zip(expected, tensor.shape, strict=True)
    )
    if not same:
        wanted = "(" + ", ".join("*" if e is None else str(e) for e in expected) + (",)" if len(expected) == 1 else ")")
        raise ValueError(f"{name}: expected shape {wanted} {reason}, got {tuple(tensor.shape)}")


def check_floating(name: str, tensor: Tensor) -> None:
    """Raise ``TypeError`` unless ``tensor`` is a floating-point tensor."""
    if not tensor.is_floating_point():
        raise TypeError(f"{name}: expected a floating-point tensor, got {tensor.dtype}")


def check_integer(name: str, tensor: Tensor, hint: str = "") -> None:
    """Raise ``TypeError`` unless ``tensor`` holds integers; ``hint`` says what the caller may have meant."""
    if tensor.is_floating_point() or tensor.is_complex():
        raise TypeError(f"{name}: expected an integer tensor, got {tensor.dtype}" + (f"; {hint}" if hint else ""))

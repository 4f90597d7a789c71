"""Triton kernels, one file per operation: kernels, launcher, custom operator with its gradient.

Nothing here is imported before it is used, so that the package works where triton is not installed. The functions that
use a kernel have ``backend="auto" | "torch" | "triton"``; see :func:`wsss_modules.kernels.backend.runs_triton`.
"""

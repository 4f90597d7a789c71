"""A network that is only looked through: in eval mode, without gradients for its weights, and as before afterwards."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn


@contextmanager
def frozen(module: object) -> Iterator[None]:
    """Put ``module`` in eval mode and take ``requires_grad`` off its parameters; give both back, layer by layer.

    What is no ``nn.Module``, such as a function, is left alone.
    """
    modes = [(layer, layer.training) for layer in module.modules()] if isinstance(module, nn.Module) else []
    flags = [(p, p.requires_grad) for p in module.parameters()] if isinstance(module, nn.Module) else []
    try:
        for layer, _ in modes:
            layer.training = False
        for parameter, _ in flags:
            parameter.requires_grad_(False)
        yield
    finally:
        for layer, mode in modes:
            layer.training = mode
        for parameter, flag in flags:
            parameter.requires_grad_(flag)

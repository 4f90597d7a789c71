"""One golden file as a `Case`, and the table of adapters that feed cases to the library's public API."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn

from tests.golden.compare import Agreement, GoldenError, Overlap, Within, choose_rule, compare, parse_tolerance

__all__ = ["ADAPTERS", "Agreement", "Case", "GoldenError", "Overlap", "Within", "adapter", "check", "run"]

Adapter = Callable[["Case"], Mapping[str, Any]]
ADAPTERS: dict[str, Adapter] = {}


def adapter(*names: str) -> Callable[[Adapter], Adapter]:
    """Register a function as the adapter of ``SYSTEM/PIECE``, the file name up to the double underscore."""

    def register(function: Adapter) -> Adapter:
        for name in names:
            other = ADAPTERS.get(name)
            if other is not None and other.__code__.co_filename != function.__code__.co_filename:
                raise ValueError(f"adapter {name!r} is defined in {other.__module__} and in {function.__module__}")
            ADAPTERS[name] = function
        return function

    return register


@dataclass
class Case:
    """The tensors and the metadata of one golden file, under their full names ("in.x", "param.x", "cot.x", "out.x")."""

    path: Path
    meta: dict[str, str]
    inputs: dict[str, Tensor]
    params: dict[str, Tensor]
    cot: dict[str, Tensor]
    expected: dict[str, Tensor]
    _leaves: dict[str, Tensor] = field(default_factory=dict, repr=False)

    @classmethod
    def read(cls, path: Path, device: str = "cpu") -> Case:
        with safe_open(path, framework="pt", device=device) as file:
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (safe_open is not a mapping)
            meta = dict(file.metadata() or {})
        groups: dict[str, dict[str, Tensor]] = {"in": {}, "param": {}, "cot": {}, "expected": {}}
        for key, tensor in tensors.items():
            prefix = key.split(".")[0]
            groups[prefix if prefix in groups else "expected"][key] = tensor
        return cls(path, meta, groups["in"], groups["param"], groups["cot"], groups["expected"])

    @property
    def name(self) -> str:
        """``SYSTEM/PIECE``, the name of the adapter."""
        return f"{self.path.parent.name}/{self.path.stem.split('__')[0]}"

    @cached_property
    def call(self) -> dict[str, Any]:
        """The hyper-parameters of the call."""
        return json.loads(self.meta.get("call") or "{}")

    def leaf(self, name: str) -> Tensor:
        """An input or parameter that requires grad; `grads` reports its gradient under ``grad.NAME``."""
        if name not in self._leaves:
            self._leaves[name] = (self.inputs | self.params)[name].detach().clone().requires_grad_()
        return self._leaves[name]

    def load(self, module: nn.Module, rename: Callable[[str], str | None] = lambda name: name) -> nn.Module:
        """Copy the ``param.*`` values into ``module`` (in their dtype) and make its parameters leaves for `grads`.

        ``rename`` turns the stored name (without "param.") into the module's key; None leaves the value out. Every key
        of the module, apart from BatchNorm's counters, must be given a value.
        """
        renamed = {key: rename(key.removeprefix("param.")) for key in self.params}
        state = {ours: self.params[key] for key, ours in renamed.items() if ours is not None}
        dtypes = {value.dtype for value in state.values() if value.is_floating_point()}
        module.to(*{value.device for value in state.values()}, *dtypes)
        missing, unexpected = module.load_state_dict(state, strict=False)
        missing = [key for key in missing if not key.endswith("num_batches_tracked")]
        if missing or unexpected:
            raise GoldenError(f"{self.name}: parameters without a stored value {missing}, without a place {unexpected}")
        parameters = dict(module.named_parameters())
        for key, ours in renamed.items():
            if ours in parameters:
                self._leaves[key] = parameters[ours]
        return module

    def grads(self, outputs: Tensor | Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The stored ``grad.*`` of all leaves: of a scalar, or of the sum of output times cotangent over a mapping.

        The mapping's keys are output names, with or without "out."; outputs that have no cotangent are left out.
        """
        if isinstance(outputs, Tensor):
            total = outputs
        else:
            names = {key: "cot." + key.removeprefix("out.") for key in outputs}
            pairs = [(outputs[key], self.cot[cot]) for key, cot in names.items() if cot in self.cot]
            if len(pairs) != len(self.cot):
                raise GoldenError(f"{self.name}: cotangents {sorted(self.cot)}, outputs given {sorted(outputs)}")
            total = torch.stack([(out * cot).sum() for out, cot in pairs]).sum()
        wanted = {key: leaf for key, leaf in self._leaves.items() if f"grad.{key}" in self.expected}
        if not wanted:
            return {}
        grads = torch.autograd.grad(total, list(wanted.values()), allow_unused=True, retain_graph=True)
        return {
            f"grad.{key}": torch.zeros_like(leaf) if grad is None else grad
            for (key, leaf), grad in zip(wanted.items(), grads, strict=True)
        }


def check(case: Case, values: Mapping[str, Any]) -> list[str]:
    """Compare an adapter's values with all stored ones; return one line for each that misses."""
    rules = parse_tolerance(case.meta.get("tolerance", ""))
    failures = []
    for key, stored in sorted(case.expected.items()):
        if key not in values:
            failures.append(f"{key}: the adapter does not return it")
            continue
        value = values[key]
        if not isinstance(value, (Within, Agreement, Overlap)):
            value = torch.as_tensor(value)
            try:
                value = choose_rule(rules, key, stored).apply(value)
            except GoldenError as error:
                failures.append(str(error))
                continue
        failure = compare(key, value, stored)
        if failure is not None:
            failures.append(failure)
    return failures


def run(path: Path, adapters: Mapping[str, Adapter] = ADAPTERS, device: str = "cpu") -> None:
    """Run one golden file through its adapter on ``device``; raise `GoldenError` with all that differs."""
    case = Case.read(path, device)
    if not case.expected:
        raise GoldenError(f"{case.path.name}: holds no out.* or grad.* value")
    if case.name not in adapters:
        system = case.path.parent.name
        raise GoldenError(
            f"{system}/{case.path.name}: no adapter. Add to tests/golden/adapters/{system}.py a function decorated "
            f'with @adapter("{case.name}") that takes the Case and returns a dict with {sorted(case.expected)}'
        )
    failures = check(case, adapters[case.name](case))
    if failures:
        text = f"{system_and_file(path)} (tolerance: {case.meta.get('tolerance', 'none given')})"
        raise GoldenError("\n  ".join([text, *failures]))


def system_and_file(path: Path) -> str:
    """The test id: the system's folder and the file's stem."""
    return f"{path.parent.name}/{path.stem}"

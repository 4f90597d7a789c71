"""Kernels compiled ahead of time to a cubin, for which no GPU is needed; registers, shared memory and spills of each.

docs/make_kernels.py writes them down.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import triton
import triton.language as tl
from triton.backends import nvidia
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from wsss_modules.kernels import (
    boundary_costs,
    gaussian_messages,
    pixel_adaptive,
    prototype_contrast,
    relu_correlation,
    stencil_walk,
)

TARGETS = (80, 90)


@dataclass(frozen=True)
class Build:
    """A kernel with the types and constants that it is compiled for.

    ``pointers`` holds the type of those to tensors of floating point; others are named in ``types``, numbers are int32.
    """

    kernel: Any
    constants: dict[str, Any]
    floats: str = "fp32"
    types: dict[str, str] = field(default_factory=dict)
    label: str = ""
    options: dict[str, int] = field(default_factory=dict)  # of the launch

    @property
    def name(self) -> str:
        return "-".join(filter(None, (self.kernel.__name__, self.floats, self.label)))

    def source(self) -> ASTSource:
        signature = {}
        for name in self.kernel.arg_names:
            kind = f"*{self.floats}" if name.endswith("_ptr") else "i32"
            signature[name] = "constexpr" if name in self.constants else self.types.get(name, kind)
        return ASTSource(
            self.kernel, signature, {(self.kernel.arg_names.index(k),): v for k, v in self.constants.items()}
        )


@dataclass(frozen=True)
class Report:
    """What ptxas says of a kernel; shared memory in bytes."""

    registers: int
    shared: int
    spilled: int


def build(build: Build, capability: int) -> Report:
    """Compile to a cubin and read what the assembler reports."""
    target = GPUTarget("cuda", capability, 32)
    compiled = triton.compile(build.source(), target=target, options=build.options)
    if not compiled.asm["cubin"]:
        raise RuntimeError(f"{build.name}: no cubin for sm_{capability}")
    architecture = "sm_90a" if capability == 90 else f"sm_{capability}"
    with tempfile.TemporaryDirectory() as folder:
        ptx = Path(folder) / "kernel.ptx"
        ptx.write_text(compiled.asm["ptx"])
        command = [
            str(Path(nvidia.__file__).parent / "bin" / "ptxas"),
            "-v",
            f"--gpu-name={architecture}",
            str(ptx),
            "-o",
            f"{folder}/kernel.cubin",
        ]
        told = subprocess.run(command, check=True, capture_output=True, text=True).stderr
    registers = int(re.search(r"Used (\d+) registers", told)[1])
    spilled = sum(map(int, re.findall(r"(\d+) bytes spill", told)))
    return Report(registers, compiled.metadata.shared, spilled)


OFFSETS = {"offsets_ptr": "*i32"}
WALK = {"BLOCK_C": stencil_walk.MAX_BLOCK_C, "BLOCK_N": stencil_walk.BLOCK_N, "ACC": tl.float32}
NUMBERS = {"scale": "fp32", "momentum": "fp32", "weight": "fp32", "eps": "fp32"}
COSTS = {"label_ptr": "*u8", "starts_ptr": "*i32", "points_ptr": "*i32", "costs_ptr": "*fp32", "counts_ptr": "*i32"}
COSTS |= {"grad_ptr": "*fp32", "out_ptr": "*fp32"} | {"offsets_ptr": "*i32"} | NUMBERS
CONTRAST = {"BLOCK_C": 32, "BLOCK_P": prototype_contrast.BLOCK_P, "BLOCK_D": prototype_contrast.BLOCK_D}
OF_PIXELS = {"target_ptr": "*i64", "known_ptr": "*i8", "cost_ptr": "*fp32", "own_ptr": "*fp32", "scale": "fp32"}
SUMS = {"sums_ptr": "*fp32", "totals_ptr": "*fp32", "u_ptr": "*fp32", "v_ptr": "*fp32"}


def parted(options: dict[str, Any]) -> tuple[dict[str, Any], dict[str, int]]:
    """What a launch is given as constants of the kernel and as options of the compiler."""
    compiler = {key: value for key, value in options.items() if key.startswith("num_")}
    return {key: value for key, value in options.items() if key not in compiler}, compiler


def builds() -> Iterator[Build]:
    """All kernels, for 21 classes and in the precisions that they are used in."""
    for floats in ("fp32", "bf16"):
        for kernel, blocks in (
            (pixel_adaptive.average_kernel, pixel_adaptive.AVERAGE),
            (pixel_adaptive.maps_gradient_kernel, pixel_adaptive.MAPS_GRADIENT),
            (pixel_adaptive.weights_gradient_kernel, pixel_adaptive.WEIGHTS_GRADIENT),
        ):
            yield Build(kernel, blocks | {"ACC": tl.float32}, floats, OFFSETS)
        labelled, launch = parted(boundary_costs.OPTIONS | {"UNKNOWN": 255})
        yield Build(boundary_costs.costs_kernel, labelled, floats, COSTS, options=launch)
        yield Build(boundary_costs.logits_gradient_kernel, labelled, floats, COSTS, options=launch)
    for what, label in (
        (stencil_walk.PRODUCT, "product"),
        (stencil_walk.CHANGE, "change"),
        (stencil_walk.STEP, "step"),
    ):
        yield Build(stencil_walk.walk_kernel, WALK | {"WHAT": what}, types=OFFSETS | NUMBERS, label=label)
    gradient = {"BLOCK_N": stencil_walk.BLOCK_N, "ACC": tl.float32}
    yield Build(stencil_walk.values_gradient_kernel, gradient, types=OFFSETS | NUMBERS)
    for precision in ("ieee", "tf32"):
        exact = {"PRECISION": precision}
        sums, launch = parted(relu_correlation.SUMS[precision] | exact | {"BLOCK_C": 32})
        yield Build(relu_correlation.sums_kernel, sums, types=SUMS, label=precision, options=launch)
        keys, launch = parted(relu_correlation.KEYS_GRADIENT[precision] | exact)
        yield Build(relu_correlation.keys_gradient_kernel, keys, types=SUMS, label=precision, options=launch)
        for features in (2, 5):
            label = f"{features} features-{precision}"
            constants, launch = parted(gaussian_messages.OPTIONS[precision] | exact)
            constants |= {"BLOCK_C": 32, "N_FEATURES": features}
            yield Build(gaussian_messages.messages_kernel, constants, label=label, options=launch)
        for ranked in (False, True):
            label = f"{'semi-hard' if ranked else 'all'}-{precision}"
            constants = CONTRAST | exact | {"RANKED": ranked}
            yield Build(prototype_contrast.contrast_kernel, constants, types=OF_PIXELS, label=label)


BUILDS = list(builds())

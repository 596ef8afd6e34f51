"""Hand-written kernels for the tests of the C++ printer: how they are written, collected, given inputs, compiled and launched."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
import sympy
import torch
from tilewright.codegen.cpp.schedule import CpuTarget, detect_target
from tilewright.codegen.kernel import Axis, Buffer, Kernel, Load, Store
from tilewright.codegen.target import Compiled
from tilewright.ir.dims import evaluate

TARGETS = {"native": None, "v3": CpuTarget(32, level="x86-64-v3"), "v2": CpuTarget(16, level="x86-64-v2")}


@dataclass(frozen=True)
class Case:
    """A kernel and one set of sizes for it. ranges: for inputs of integers, values are in [0, this)."""

    kernel: Kernel
    sizes: Mapping[str, int] = field(default_factory=dict)
    ranges: Mapping[str, int] = field(default_factory=dict)


Make = Callable[[], Kernel]


class Cases(dict[str, list[Case]]):
    """Name of a kernel -> its cases; the name is that of the function that makes it."""

    def case(
        self, *size_sets: dict[str, int], ranges: dict[str, int] | None = None
    ) -> Callable[[Callable[[], Kernel]], Callable[[], Kernel]]:
        def add(make: Callable[[], Kernel]) -> Callable[[], Kernel]:
            kernel = replace(make(), name=f"k_{make.__name__}")
            self[make.__name__] = [Case(kernel, sizes, ranges or {}) for sizes in size_sets or ({},)]
            return make

        return add


def kernel(
    grid: dict[str, Any], inner: dict[str, Any], inputs: dict[str, tuple], outputs: dict[str, tuple], sizes: str = "", **more: Any
) -> Kernel:
    """grid, inner: axis -> extent; inputs: name -> (dtype, size); outputs: name -> (index, value, size[, dtype if not the value's])."""
    axes = [Axis(k, e) for k, e in grid.items()] + [Axis(k, e, True) for k, e in inner.items()]
    return Kernel(
        "k", tuple(axes), tuple(Buffer(k, d, e) for k, (d, e) in inputs.items()),
        tuple(Buffer(k, o[3] if len(o) > 3 else o[1].dtype, o[2]) for k, o in outputs.items()),
        tuple(Store(k, sympy.sympify(o[0]), o[1]) for k, o in outputs.items()), sizes=tuple(sizes), **more,
    )  # fmt: skip


def load(buffer: str, index: object, dtype: torch.dtype = torch.float32, **more: Any) -> Load:
    return Load(dtype, buffer, sympy.sympify(index), **more)


def inputs_of(case: Case, seed: int) -> list[torch.Tensor]:
    """Random values for every input, flat."""
    generator = torch.Generator().manual_seed(seed)
    return [_input(b, evaluate(b.size, case.sizes), case.ranges.get(b.name), generator) for b in case.kernel.inputs]


def _input(buffer: Buffer, size: int, high: int | None, generator: torch.Generator) -> torch.Tensor:
    if buffer.dtype == torch.bool:
        return torch.rand(size, generator=generator) > 0.5
    if buffer.dtype.is_floating_point:
        return torch.randn(size, generator=generator).to(buffer.dtype)
    info = torch.iinfo(buffer.dtype)
    low, top = (0, high) if high is not None else (max(info.min, -100), min(info.max, 100))
    return torch.randint(low, top, (size,), generator=generator).to(buffer.dtype)


def launch(compiled: Compiled, case: Case, inputs: list[torch.Tensor], threads: int = 2) -> list[torch.Tensor]:
    """The outputs, flat. Memory of an output holds something else before the call."""
    kernel = compiled.kernel
    memory = {b.name: x.clone() for b, x in zip(kernel.inputs, inputs)}
    for b in kernel.outputs:
        alias = dict(kernel.inplace).get(b.name)
        memory[b.name] = memory[alias] if alias else torch.full((evaluate(b.size, case.sizes),), 99, dtype=torch.uint8).to(b.dtype)
    arguments = [memory[b.name].data_ptr() for b in (*kernel.inputs, *kernel.outputs)]
    compiled.launch(*arguments, *(case.sizes[k] for k in kernel.sizes), threads)
    return [memory[b.name] for b in kernel.outputs]


def target_for(name: str) -> CpuTarget:
    """One of TARGETS; skips the test where this CPU cannot run it."""
    target = TARGETS[name] or detect_target()
    if detect_target().vector_bytes < target.vector_bytes:
        pytest.skip("not on this CPU")
    return target

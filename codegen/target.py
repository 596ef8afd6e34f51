"""`Target`: what the host program needs to know of a machine to run kernels on it. One entry per device type."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Union

from .kernel import Kernel


@dataclass(frozen=True)
class Compiled:
    """A kernel ready to run.

    launch(*inputs, *outputs, *sizes): buffers in the kernel's order, then sizes as ints. Buffers are data pointers and the number of
    threads comes last if `Target.native`, else they are tensors. It returns the number of a fault that was met (`Kernel.faults`), or 0;
    None where there can be none, and where the device reports faults by itself.
    source: the text it was compiled from.
    """

    kernel: Kernel
    source: str
    launch: Callable[..., Any]


@dataclass(frozen=True)
class Failed:
    """A kernel that could not be compiled, and why in one sentence."""

    kernel: Kernel
    reason: str


@dataclass(frozen=True)
class Target:
    """compile(kernels): all of them, in parallel where it can; it never raises for a single kernel's fault.

    native: whether `launch` is a C function: addresses, sizes, threads; else (Triton) it takes tensors and sizes.
    """

    name: str
    compile: Callable[[Sequence[Kernel]], list[Union[Compiled, Failed]]]
    native: bool


def _compile_cpp(kernels: Sequence[Kernel]) -> list[Union[Compiled, Failed]]:
    from .cpp.toolchain import compile_kernels

    return compile_kernels(kernels)


def _compile_triton(kernels: Sequence[Kernel]) -> list[Union[Compiled, Failed]]:
    from .triton.toolchain import compile_kernels

    return compile_kernels(kernels)


TARGETS: dict[str, Target] = {"cpu": Target("cpp", _compile_cpp, native=True), "cuda": Target("triton", _compile_triton, native=False)}
"""Device type -> target; the toolchains are imported when first used."""

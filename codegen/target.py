"""`Target`: what the host program needs to know of a machine to run kernels on it. One entry per device type."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Union

from .kernel import Kernel


@dataclass(frozen=True)
class Native:
    """How runs of calls reach a C function: run(address of the words, address of the table), and the function's entry (cpp/call.h)."""

    run: Callable[..., int]
    entry: int


@dataclass(frozen=True)
class Compiled:
    """A kernel ready to run.

    launch(*inputs, *outputs, *sizes): buffers in the kernel's order, then sizes as ints. Buffers are data pointers and the number of
    threads comes last if there is a `native`, else they are tensors. It returns the number of a fault that was met (`Kernel.faults`), or 0;
    None where there can be none, and where the device reports faults by itself.
    source: the text it was compiled from. native: if it is a C function, how the host program calls it.
    """

    kernel: Kernel
    source: str
    launch: Callable[..., Any]
    native: Native | None = None


@dataclass(frozen=True)
class Failed:
    """A kernel that could not be compiled, and why in one sentence."""

    kernel: Kernel
    reason: str


@dataclass(frozen=True)
class Target:
    """compile(kernels): all of them, in parallel where it can; it never raises for a single kernel's fault."""

    name: str
    compile: Callable[[Sequence[Kernel]], list[Union[Compiled, Failed]]]


def _compile_cpp(kernels: Sequence[Kernel]) -> list[Union[Compiled, Failed]]:
    from .cpp.toolchain import compile_kernels

    return compile_kernels(kernels)


def _compile_triton(kernels: Sequence[Kernel]) -> list[Union[Compiled, Failed]]:
    from .triton.toolchain import compile_kernels

    return compile_kernels(kernels)


TARGETS: dict[str, Target] = {"cpu": Target("cpp", _compile_cpp), "cuda": Target("triton", _compile_triton)}
"""Device type -> target; the toolchains are imported when first used."""

"""`Target`: what the host program needs to know of a machine to run kernels on it. One entry per device type."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Union

from ..ir.dims import Dim
from .kernel import Buffer, Kernel
from .pool import Empty
from .threads import threads


@dataclass(frozen=True)
class Address:
    """An address that stays what it is, and what to call it."""

    name: str
    value: int


@dataclass(frozen=True)
class ByMultiples:
    """One address where all `sizes` are multiples of a number, another where not: code that is better for most sizes, and code for any."""

    sizes: tuple[str, ...]
    multiples_of: int
    then: Address
    otherwise: Address


@dataclass(frozen=True)
class ByAmount:
    """One address where an amount of sizes is below a number, another where not: code for small sizes, and for all."""

    amount: Dim
    below: int
    then: Union[Address, ByMultiples]
    otherwise: Address


Argument = Union[str, Dim, Address, ByMultiples, ByAmount]


@dataclass(frozen=True)
class NativeCall:
    """A call of a C function by its entry (cpp/call.h). arguments: buffers of the kernel by name, sizes, addresses."""

    name: str
    entry: int
    arguments: tuple[Argument, ...]


@dataclass(frozen=True)
class Native:
    """How runs of calls compute a kernel: run(address of the words, address of the table) makes the `calls`, one after the other.

    asked: what every call of a program asks for, and the C functions take last: the number of threads, or the stream; named `asking`.
    scratch: buffers that the calls hand to each other. alignment: in bytes, of every buffer. failed(name of the call, number): the error
    that a result other than 0 stands for; None where it is a fault of the kernel (`Kernel.faults`), or there is none.
    empty: what makes new tensors of a program on the CPU; None leaves it as it is. update: the entry of `update_cache` (cpp/toolchain.py).
    """

    run: Callable[..., int]
    calls: tuple[NativeCall, ...]
    asked: Callable[[], int] = threads
    asking: str = "threads"
    scratch: tuple[Buffer, ...] = ()
    alignment: int = 1
    failed: Callable[[str, int], Exception] | None = None
    empty: Empty | None = None
    update: int | None = None


@dataclass(frozen=True)
class Usage:
    """What a kernel takes of a GPU, known once it is compiled: registers per thread, how many of them are spilled to memory (NVIDIA: bytes
    per thread), bytes of shared memory per program. Of several launches each is the most that one takes.
    """

    registers: int
    spills: int
    shared: int


@dataclass(frozen=True)
class Compiled:
    """A kernel ready to run.

    launch(*inputs, *outputs, *sizes): buffers in the kernel's order, then sizes as ints. On a CPU buffers are data pointers and the number
    of threads comes last; on a GPU they are tensors. It returns the number of a fault that was met (`Kernel.faults`), or 0; None where
    there can be none, and where the device reports faults by itself.
    source: the text it was compiled from. native: if C functions do it, how the host program calls them. notes: what was tried before.
    usage: where it was compiled for another machine.
    """

    kernel: Kernel
    source: str
    launch: Callable[..., Any]
    native: Native | None = None
    notes: tuple[str, ...] = ()
    usage: Usage | None = None


@dataclass(frozen=True)
class Failed:
    """A kernel that could not be compiled, and why in one sentence."""

    kernel: Kernel
    reason: str


@dataclass(frozen=True)
class Target:
    """compile(kernels, device): all of them, in parallel where it can; it never raises for a single kernel's fault."""

    name: str
    compile: Callable[[Sequence[Kernel], str], list[Union[Compiled, Failed]]]


def _compile_cpp(kernels: Sequence[Kernel], device: str) -> list[Union[Compiled, Failed]]:
    from .cpp.toolchain import compile_kernels

    return compile_kernels(kernels)


def _compile_triton(kernels: Sequence[Kernel], device: str) -> list[Union[Compiled, Failed]]:
    from .triton.installed import needed, unusable

    if found := unusable():
        return [Failed(kernel, needed(found)) for kernel in kernels]
    from .triton.toolchain import compile_kernels

    return compile_kernels(kernels, device)


TARGETS: dict[str, Target] = {"cpu": Target("cpp", _compile_cpp), "cuda": Target("triton", _compile_triton)}
"""Device type -> target; the toolchains are imported when first used."""

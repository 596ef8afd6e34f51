"""`Target`: what the host program needs to know of a machine to run kernels on it. One entry per device type."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Union

from .kernel import Kernel


@dataclass(frozen=True)
class Compiled:
    """A kernel ready to run.

    launch(*inputs, *outputs, *sizes): buffers in the kernel's order, as data pointers or tensors (`Target.pointers`), then sizes as ints.
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

    pointers: whether `launch` takes addresses (C++) or tensors (Triton).
    """

    name: str
    compile: Callable[[Sequence[Kernel]], list[Union[Compiled, Failed]]]
    pointers: bool


def _compile_cpp(kernels: Sequence[Kernel]) -> list[Union[Compiled, Failed]]:
    from .cpp.toolchain import compile_kernels

    return compile_kernels(kernels)


TARGETS: dict[str, Target] = {"cpu": Target("cpp", _compile_cpp, pointers=True)}

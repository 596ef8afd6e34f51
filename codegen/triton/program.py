"""`Program`: a printed kernel, and what it takes to launch it. Templates make programs; `runtime` and `offline` use them."""

from __future__ import annotations

import keyword
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import sympy

from ...ir.dims import Dim, floordiv
from ..kernel import Buffer, Kernel

ALIGNMENT = 16  # bytes: the widest load

MOST_PROGRAMS = (2**31 - 1, 65535, 65535)
"""Of a launch, along each dimension of its grid: CUDA's and HIP's limits."""


@dataclass(frozen=True)
class Launch:
    """One call of a function of the program's source, which takes pointers, sizes and constants in this order.

    buffers: whose pointers it takes, by name; grid: how many programs run along one to three dimensions, in sizes of the kernel;
    constants: its constexpr parameters by name; wide: sizes are passed in 64 bits; needs: what not every GPU has (`features`).
    """

    function: str
    buffers: tuple[str, ...]
    grid: tuple[Dim, ...]
    constants: Mapping[str, int]
    num_warps: int = 4
    num_stages: int = 2
    wide: bool = False
    needs: tuple[str, ...] = ()

    def options(self, kernel: Kernel) -> dict[str, Any]:
        """Options of Triton's compiler. No contraction of a*b+c: eager rounds the product, and x*x - x*x is 0.

        Assertions are on where positions are computed, as in eager's kernels; those on integer overflow never are: integers wrap.
        """
        options = {"num_warps": self.num_warps, "num_stages": self.num_stages, "enable_fp_fusion": False}
        return options | ({"debug": True, "sanitize_overflow": False} if kernel.faults else {})


@dataclass(frozen=True)
class Program:
    """A printed kernel: its launches run in order; `runtime.load` makes functions of its `source`, which is a whole module.

    schedule: the options of its template. scratch: buffers that launches hand to each other. whole: (extent, block) of what must fit one
    block, which is known of a symbolic extent at the launch only.
    """

    kernel: Kernel
    schedule: Any
    source: str
    launches: tuple[Launch, ...]
    scratch: tuple[Buffer, ...] = ()
    whole: tuple[tuple[Dim, int], ...] = ()

    def buffer(self, name: str) -> Buffer:
        return next(b for b in (*self.kernel.inputs, *self.kernel.outputs, *self.scratch) if b.name == name)


def multiples(kernel: Kernel) -> tuple[str, ...]:
    """The sizes that are known to be multiples of ALIGNMENT."""
    return tuple(size for size, known in kernel.ranges if known.divisor % ALIGNMENT == 0)


def function_name(kernel: Kernel) -> str:
    """The kernel's name as a Python identifier."""
    name = "".join(c if c.isalnum() or c == "_" else "_" for c in kernel.name)
    return f"k_{name}" if not name or name[0].isdigit() or keyword.iskeyword(name) else name


def pointers(kernel: Kernel) -> tuple[str, ...]:
    """The buffers of a kernel in the order in which its function takes them."""
    return tuple(b.name for b in (*kernel.inputs, *kernel.outputs))


def blocks_of(extent: Dim, block: int) -> Dim:
    """How many blocks cover an extent."""
    return -(-extent // block) if isinstance(extent, int) else floordiv(sympy.sympify(extent) + block - 1, block)

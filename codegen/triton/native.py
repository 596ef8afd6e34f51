"""Launches as native calls: what the host program needs to run a kernel's binaries by the routine of cpp/call.h.

Neither Triton nor its compiler takes part.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from ...ir.dims import dim, free_symbols, product, symbol
from ..build import BuildError, build
from ..cpp.schedule import detect_target
from ..cpp.toolchain import LAUNCH, RUN
from ..kernel import Buffer, Kernel, Load, Store, scalars
from ..target import Address, Argument, ByMultiples, Native, NativeCall
from .binary import Binary, OfflineError
from .driver import DoesNotFit, Driver
from .program import Launch, Program

ALIGNMENT = 16  # bytes: the widest load


@dataclass(frozen=True)
class Routines:
    """run: makes a run of calls; entry: the address of the function that makes one launch."""

    run: Callable[..., int]
    entry: int


def routines() -> Routines | None:
    """Those of this machine, built once; None without a C++ compiler."""
    run, launch = build([RUN, LAUNCH], detect_target().level)
    if isinstance(run, BuildError) or isinstance(launch, BuildError):
        return None
    return Routines(run, ctypes.cast(launch, ctypes.c_void_p).value or 0)  # type: ignore[arg-type]


Find = Callable[[Launch, tuple[str, ...]], Binary]
"""The binary of a launch, for any sizes or for such of which some are multiples of ALIGNMENT. Raises OfflineError where there is none."""


def native(program: Program, find: Find, driver: Driver, routine: Routines) -> Native:
    """The launches of a program, whose binaries are loaded. Raises OfflineError, DriverError, and DoesNotFit where smaller blocks might."""
    ready = [_ready(program, one, find, driver) for one in program.launches]
    own = [_scratch(made, i) for i, made in enumerate(ready)]
    calls = tuple(_call(program, made, memory, routine.entry) for made, memory in zip(ready, own))
    scratch = (*program.scratch, *(b for b in own if b is not None))
    return Native(routine.run, calls, driver.stream, f"stream_{driver.index}", scratch, ALIGNMENT, driver.failed)


@dataclass(frozen=True)
class _Ready:
    """A launch whose code is loaded. extra and scratch: as in `Binary`."""

    launch: Launch
    extra: int
    scratch: int
    kernel: Address | ByMultiples


def _ready(program: Program, one: Launch, find: Find, driver: Driver) -> _Ready:
    """Loads code for any sizes; where sizes are strides, also code for multiples of 16, which reads whole vectors."""
    binary, sizes = find(one, ()), strides(program.kernel)
    address = Address(f"{one.function}_at", driver.load(binary).address)
    plain = _Ready(one, binary.extra, binary.scratch, address)
    if not sizes:
        return plain
    try:
        special = find(one, sizes)
        better = Address(f"{one.function}_{ALIGNMENT}_at", driver.load(special).address)
    except (OfflineError, DoesNotFit):
        return plain
    if special.extra != binary.extra or better.value == address.value:
        return plain
    return _Ready(one, binary.extra, max(binary.scratch, special.scratch), ByMultiples(sizes, ALIGNMENT, better, address))


def strides(kernel: Kernel) -> tuple[str, ...]:
    """The sizes that tell where rows begin."""
    indices = [v.index for v in (*kernel.stores, *scalars(kernel.stores)) if isinstance(v, (Store, Load))]
    found = {s.name for s in free_symbols(indices)}  # type: ignore[attr-defined]
    return tuple(size for size in kernel.sizes if size in found)


def _scratch(ready: _Ready, number: int) -> Buffer | None:
    """Memory of the compiler's own for a launch, if it takes some."""
    if not ready.scratch:
        return None
    return Buffer(f"{ready.launch.function}_{number}_scratch", torch.uint8, dim(product(ready.launch.grid) * ready.scratch))


def _call(program: Program, ready: _Ready, own: Buffer | None, entry: int) -> NativeCall:
    """Parameters, numbers of programs and the kernel: the arguments of `launch` in cpp/call.h."""
    one = ready.launch
    extra: list[Argument] = [0] * ready.extra
    if own is not None:
        extra[0] = own.name
    grid = (*one.grid, 1, 1)[:3]
    return NativeCall(one.function, entry, (*one.buffers, *map(symbol, program.kernel.sizes), *extra, *grid, ready.kernel))


def launcher(program: Program) -> Callable[..., None]:
    """launch(*tensors, *sizes), by Triton's own launches."""
    names = [b.name for b in (*program.kernel.inputs, *program.kernel.outputs)]
    return partial(_launch, program, names)


def _launch(program: Program, names: Sequence[str], *arguments: Any) -> None:
    from .runtime import launch  # Triton need not be there where nothing is launched by it

    launch(program, dict(zip(names, arguments)), dict(zip(program.kernel.sizes, arguments[len(names) :])))

"""Launches as native calls: what the host program needs to run a kernel's binaries by the routine of cpp/call.h.

Neither Triton nor its compiler takes part.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch

from ...ir.dims import dim, free_symbols, product, symbol
from ..build import BuildError, build
from ..cpp.schedule import detect_target
from ..cpp.toolchain import LAUNCH, RUN
from ..kernel import Buffer, Kernel, Load, Store, scalars
from ..target import Address, Argument, ByAmount, ByMultiples, Native, NativeCall
from .binary import Binary, OfflineError
from .driver import DoesNotFit, Driver
from .program import ALIGNMENT, Launch, Program, multiples
from .schedule import NARROW, reach
from .templates import widened


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


Find = Callable[[Program, Launch, tuple[str, ...]], Binary]
"""The binary of a program's launch, for any sizes or for such of which some are multiples of ALIGNMENT. Raises OfflineError where there is
none."""


def native(program: Program, find: Find, driver: Driver, routine: Routines) -> Native:
    """The launches of a program, whose binaries are loaded. Raises OfflineError, DriverError, and DoesNotFit where smaller blocks might."""
    wide = widened(program)
    ready = [_ready(program, one, find, driver) for one in program.launches]
    if wide is not None:
        large = [_loaded(wide, one, find, driver) for one in wide.launches]
        ready = [_or_wide(program, small, binary) for small, binary in zip(ready, large, strict=True)]
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
    kernel: Address | ByMultiples | ByAmount


def _loaded(program: Program, one: Launch, find: Find, driver: Driver) -> _Ready:
    """Code for any sizes."""
    binary = find(program, one, ())
    return _Ready(one, binary.extra, binary.scratch, Address(f"{one.function}_at", driver.load(binary).address))


def _ready(program: Program, one: Launch, find: Find, driver: Driver) -> _Ready:
    """Loads code for any sizes; where sizes are strides, also code for multiples of 16, which reads whole vectors."""
    plain, sizes = _loaded(program, one, find, driver), strides(program.kernel)
    assert isinstance(plain.kernel, Address)
    if not sizes:
        return plain
    try:
        special = find(program, one, sizes)
        better = Address(f"{one.function}_{ALIGNMENT}_at", driver.load(special).address)
    except (OfflineError, DoesNotFit):
        return plain
    if special.extra != plain.extra or better.value == plain.kernel.value:
        return plain
    return _Ready(one, plain.extra, max(plain.scratch, special.scratch), ByMultiples(sizes, ALIGNMENT, better, plain.kernel))


def _or_wide(program: Program, small: _Ready, large: _Ready) -> _Ready:
    """The one where offsets fit 32 bits, else the other. Both take the same words: of those of sizes the one reads the lower halves."""
    assert isinstance(large.kernel, Address) and not isinstance(small.kernel, ByAmount)
    assert (small.launch.buffers, small.launch.grid, small.extra) == (large.launch.buffers, large.launch.grid, large.extra)
    either = ByAmount(reach(program.kernel, program.scratch), NARROW, small.kernel, large.kernel)
    return replace(small, scratch=max(small.scratch, large.scratch), kernel=either)


def strides(kernel: Kernel) -> tuple[str, ...]:
    """The sizes that tell where rows begin, and may do so at no multiple of 16."""
    indices = [v.index for v in (*kernel.stores, *scalars(kernel.stores)) if isinstance(v, (Store, Load))]
    found = {s.name for s in free_symbols(indices)} - set(multiples(kernel))  # type: ignore[attr-defined]
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

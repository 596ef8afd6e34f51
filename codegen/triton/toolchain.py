"""From kernels to callables: print for Triton, compile for the device in hand, load, and describe the launches to the host program.

    compile_kernels([kernel], "cuda:0")  -->  Compiled: native calls that launch its binaries on the current stream

Where there is no C++ compiler, which makes the routine that launches, or no device, Triton launches: on CPU tensors its interpreter runs.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Any, Union

import torch

from ...ir.dims import dim, free_symbols, product, symbol
from ..build import BuildError, build, cores
from ..cpp.schedule import detect_target
from ..cpp.toolchain import LAUNCH, RUN
from ..kernel import Buffer, Kernel, Load, Store, scalars
from ..target import Address, Argument, ByMultiples, Compiled, Failed, Native, NativeCall
from .driver import DoesNotFit, Driver, DriverError, driver_of
from .legalize import UnsupportedByTriton
from .offline import OfflineError, compile_binary
from .program import Launch, Program
from .runtime import launch
from .smaller import smaller
from .templates import build as print_program

ALIGNMENT = 16  # bytes: the widest load
TRIES = 4  # schedules for one kernel


def compile_kernels(kernels: Sequence[Kernel], device: str = "cuda", driver: Driver | None = None) -> list[Union[Compiled, Failed]]:
    """Every kernel ready to run on a device ("cuda:1"), or why it cannot be. driver: instead of that of the machine."""
    try:
        driver = driver or _driver(device)
        routines = build([RUN, LAUNCH], detect_target().level) if driver is not None else [BuildError(function="run", reason="")]
    except DriverError as error:
        return [Failed(kernel, str(error)) for kernel in kernels]
    run, entry = routines[0], routines[-1]
    if driver is None or isinstance(run, BuildError) or isinstance(entry, BuildError):
        return [_for_triton(kernel, device) for kernel in kernels]
    with ThreadPoolExecutor(cores()) as pool:
        return list(pool.map(lambda kernel: _compile(kernel, driver, run, _address(entry)), kernels))


def _driver(device: str) -> Driver | None:
    """The driver of torch's device of that name; None where it has none."""
    place = torch.device(device)
    if place.type != "cuda" or not torch.cuda.is_available():
        return None
    return driver_of(torch.cuda.current_device() if place.index is None else place.index)


def _address(function: Any) -> int:
    return ctypes.cast(function, ctypes.c_void_p).value or 0


def _compile(kernel: Kernel, driver: Driver, run: Callable[..., int], entry: int) -> Compiled | Failed:
    """Under the schedule of its template; where the device has not enough for it, or Triton fails, under smaller ones."""
    tried: list[str] = []
    schedule: Any = None
    try:
        while len(tried) < TRIES:
            program = print_program(kernel, schedule)
            if reason := _unknown_block(program):
                return Failed(kernel, reason)
            try:
                native = _native(program, driver, run, entry)
                return Compiled(kernel, program.source, _launcher(program), native, tuple(tried))
            except (OfflineError, DoesNotFit) as error:
                tried.append(f"{program.schedule}: {error}")
            schedule = smaller(program.schedule)
            if schedule is None:
                break
    except (UnsupportedByTriton, DriverError) as error:
        tried.append(str(error))
    return Failed(kernel, "; ".join(tried))


def _unknown_block(program: Program) -> str:
    """Why the program might not be launched for some sizes; "" where it always may."""
    unknown = [extent for extent, _ in program.whole if not isinstance(extent, int)]
    return f"an inner extent of {unknown[0]} must fit one block, and is not known" if unknown else ""


def _native(program: Program, driver: Driver, run: Callable[..., int], entry: int) -> Native:
    ready = [_ready(program, one, driver) for one in program.launches]
    own = [_scratch(made, i) for i, made in enumerate(ready)]
    calls = tuple(_call(program, made, memory, entry) for made, memory in zip(ready, own))
    scratch = (*program.scratch, *(b for b in own if b is not None))
    return Native(run, calls, driver.stream, f"stream_{driver.index}", scratch, ALIGNMENT, driver.failed)


@dataclass(frozen=True)
class _Ready:
    """A launch whose code is loaded. extra and scratch: as in `Binary`."""

    launch: Launch
    extra: int
    scratch: int
    kernel: Address | ByMultiples


def _ready(program: Program, one: Launch, driver: Driver) -> _Ready:
    """Loads code for any sizes; where sizes are strides, also code for multiples of 16, which reads whole vectors."""
    target, strides = driver.facts.architecture, _strides(program.kernel)
    binary = compile_binary(program, one, target)
    address = Address(f"{one.function}_at", driver.load(binary).address)
    plain = _Ready(one, binary.extra, binary.scratch, address)
    if not strides:
        return plain
    try:
        special = compile_binary(program, one, target, strides)
        better = Address(f"{one.function}_{ALIGNMENT}_at", driver.load(special).address)
    except (OfflineError, DoesNotFit):
        return plain
    if special.extra != binary.extra or better.value == address.value:
        return plain
    return _Ready(one, binary.extra, max(binary.scratch, special.scratch), ByMultiples(strides, ALIGNMENT, better, address))


def _strides(kernel: Kernel) -> tuple[str, ...]:
    """The sizes that tell where rows begin."""
    indices = [v.index for v in (*kernel.stores, *scalars(kernel.stores)) if isinstance(v, (Store, Load))]
    found = {s.name for s in free_symbols(indices)}
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


# -- by Triton's own launches


def _for_triton(kernel: Kernel, device: str) -> Compiled | Failed:
    """Triton compiles at the first launch. The interpreter, which is for tests, takes what may turn out not to fit a block."""
    try:
        program = print_program(kernel)
    except UnsupportedByTriton as error:
        return Failed(kernel, str(error))
    if reason := _unknown_block(program) if device != "cpu" else "":
        return Failed(kernel, reason)
    return Compiled(kernel, program.source, _launcher(program))


def _launcher(program: Program) -> Callable[..., None]:
    """launch(*tensors, *sizes)."""
    names = [b.name for b in (*program.kernel.inputs, *program.kernel.outputs)]
    return partial(_launch, program, names)


def _launch(program: Program, names: Sequence[str], *arguments: Any) -> None:
    launch(program, dict(zip(names, arguments)), dict(zip(program.kernel.sizes, arguments[len(names) :])))

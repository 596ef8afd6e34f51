"""From kernels to callables: print for Triton, compile for the device in hand, load, and describe the launches to the host program.

    compile_kernels([kernel], "cuda:0")  -->  Compiled: native calls that launch its binaries on the current stream

Where there is no C++ compiler, which makes the routine that launches, or no device, Triton launches: on CPU tensors its interpreter runs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Union

import torch

from ..build import cores
from ..kernel import Kernel
from ..target import Compiled, Failed
from .binary import Binary
from .driver import DoesNotFit, Driver, DriverError, driver_of
from .legalize import UnsupportedByTriton
from .native import Routines, launcher, native, routines
from .offline import OfflineError, compile_binary
from .program import Launch, Program
from .smaller import TRIES
from .templates import build as print_program
from .templates import following


def compile_kernels(kernels: Sequence[Kernel], device: str = "cuda", driver: Driver | None = None) -> list[Union[Compiled, Failed]]:
    """Every kernel ready to run on a device ("cuda:1"), or why it cannot be. driver: instead of that of the machine."""
    try:
        driver = driver or _driver(device)
        routine = routines() if driver is not None else None
    except DriverError as error:
        return [Failed(kernel, str(error)) for kernel in kernels]
    if driver is None or routine is None:
        return [_for_triton(kernel, device) for kernel in kernels]
    with ThreadPoolExecutor(cores()) as pool:
        return list(pool.map(lambda kernel: _compile(kernel, driver, routine), kernels))


def _driver(device: str) -> Driver | None:
    """The driver of torch's device of that name; None where it has none."""
    place = torch.device(device)
    if place.type != "cuda" or not torch.cuda.is_available():
        return None
    return driver_of(torch.cuda.current_device() if place.index is None else place.index)


def _compile(kernel: Kernel, driver: Driver, routine: Routines) -> Compiled | Failed:
    def attempt(program: Program, tried: tuple[str, ...]) -> Compiled:
        def find(program: Program, one: Launch, multiples: tuple[str, ...]) -> Binary:
            return compile_binary(program, one, driver.facts.architecture, multiples)

        return Compiled(kernel, program.source, launcher(program), native(program, find, driver, routine), tried)

    return under_schedules(kernel, attempt)


Attempt = Callable[[Program, tuple[str, ...]], Compiled]


def under_schedules(kernel: Kernel, attempt: Attempt) -> Compiled | Failed:
    """attempt(program, what was tried before) under the schedule that was chosen, or that of the kernel's template; where the device has
    not enough for it, or Triton fails, under others."""
    tried: list[str] = []
    schedule: Any = None
    try:
        while len(tried) < TRIES:
            program = print_program(kernel, schedule)
            if reason := unknown_block(program):
                return Failed(kernel, reason)
            try:
                return attempt(program, tuple(tried))
            except (OfflineError, DoesNotFit) as error:
                tried.append(f"{program.schedule}: {error}")
            schedule = following(kernel, program.schedule, len(tried) == 1)
            if schedule is None:
                break
    except (UnsupportedByTriton, DriverError) as error:
        tried.append(str(error))
    return Failed(kernel, "; ".join(tried))


def unknown_block(program: Program) -> str:
    """Why the program might not be launched for some sizes; "" where it always may."""
    unknown = [extent for extent, _ in program.whole if not isinstance(extent, int)]
    return f"an inner extent of {unknown[0]} must fit one block, and is not known" if unknown else ""


def _for_triton(kernel: Kernel, device: str) -> Compiled | Failed:
    """By Triton's own launches: it compiles at the first. The interpreter, which is for tests, takes what may turn out not to fit a
    block."""
    try:
        program = print_program(kernel)
    except UnsupportedByTriton as error:
        return Failed(kernel, str(error))
    if reason := unknown_block(program) if device != "cpu" else "":
        return Failed(kernel, reason)
    return Compiled(kernel, program.source, launcher(program))

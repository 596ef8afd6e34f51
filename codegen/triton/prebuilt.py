"""Binaries that another machine compiled, and kernels that are run from them. Neither Triton nor its compiler takes part.

A binary belongs to what it was compiled from. Here a kernel is printed again, and what fits the text is launched:

    key(program, launch, "sm_90")  -->  Binary

so that whoever lowers or prints a kernel in another way finds none, rather than one that takes other parameters.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from typing import Union

from ..code import Code
from ..kernel import Kernel
from ..target import Compiled, Failed, Target
from .binary import Binary, OfflineError
from .driver import Driver, DriverError
from .legalize import UnsupportedByTriton
from .native import Routines, launcher, native, routines
from .program import Launch, Program
from .program import multiples as known_multiples
from .smaller import TRIES
from .templates import build, following, widened


def key(program: Program, one: Launch, target: str, multiples: Sequence[str] = ()) -> str:
    """What a launch is compiled from, and how it is called. multiples: sizes that it takes to be multiples of 16."""
    buffers = [(name, str(program.buffer(name).dtype)) for name in one.buffers]
    options = sorted(one.options(program.kernel).items())
    parts = [
        target,
        program.source,
        one.function,
        buffers,
        program.kernel.sizes,
        sorted(one.constants.items()),
        options,
        one.wide,
        sorted({*multiples, *known_multiples(program.kernel)}),
    ]
    return hashlib.sha256(json.dumps(parts, default=str).encode()).hexdigest()


def prebuilt(code: Code[Binary], driver: Driver) -> Target:
    """Runs kernels on a device from their binaries; those that have none fail."""

    def compile(kernels: Sequence[Kernel], device: str) -> list[Union[Compiled, Failed]]:
        routine = routines()
        if routine is None:
            return [Failed(kernel, "there is no C++ compiler for the routine that launches kernels") for kernel in kernels]
        return [_found(kernel, code, driver, routine) for kernel in kernels]

    return Target("binaries", compile)


def _found(kernel: Kernel, code: Code[Binary], driver: Driver, routine: Routines) -> Compiled | Failed:
    try:
        program = _compiled(kernel, code)
        if program is None:
            return Failed(kernel, f"there is no code for it among that for {code.target}")

        def find(program: Program, one: Launch, multiples: tuple[str, ...]) -> Binary:
            found = code.binaries.get(key(program, one, code.target, multiples))
            if found is None:
                raise OfflineError(kernel=kernel.name, target=code.target, reason="it was left out")
            return found

        return Compiled(kernel, program.source, launcher(program), native(program, find, driver, routine))
    except (UnsupportedByTriton, DriverError) as error:
        return Failed(kernel, str(error))


def _compiled(kernel: Kernel, code: Code[Binary]) -> Program | None:
    """The kernel as it was printed when it was compiled: under the first schedule, or another one where that did not fit."""
    schedule = None
    for tried in range(TRIES):
        program = build(kernel, schedule)
        wide = widened(program)
        if all(key(p, one, code.target) in code.binaries for p in (program, wide) if p is not None for one in p.launches):
            return program
        schedule = following(kernel, program.schedule, tried == 0)
        if schedule is None:
            return None
    return None

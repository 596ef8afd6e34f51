"""Compiles kernels for a GPU that is not here; `prebuilt.py` runs them where there is one.

binaries: dict[str, Binary] = {}
list_program(graph, {"cuda": cross_target("sm_90", binaries)})
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Union

from ..build import cores
from ..kernel import Kernel
from ..target import Compiled, Failed, Target, Usage
from .binary import SHARED_BYTES, Binary, OfflineError
from .driver import DoesNotFit
from .native import launcher, strides
from .offline import binary_and_usage, most
from .prebuilt import key
from .program import Launch, Program
from .templates import widened
from .toolchain import under_schedules


def cross_target(name: str, binaries: dict[str, Binary]) -> Target:
    """Compiles for one of SHARED_BYTES, as `toolchain` does for the device in hand; `binaries` gets what is compiled, by `prebuilt.key`."""

    def attempt(kernel: Kernel, program: Program, tried: tuple[str, ...]) -> Compiled:
        programs = [p for p in (program, widened(program)) if p is not None]
        made = {key(p, one, name): _compiled(kernel, p, one, name) for p in programs for one in p.launches}
        if sizes := strides(program.kernel):
            made |= _for_multiples(kernel, program, name, sizes)
        binaries.update((text, binary) for text, (binary, _) in made.items())
        return Compiled(kernel, program.source, launcher(program), None, tried, most([usage for _, usage in made.values()]))

    def compile(kernels: Sequence[Kernel], device: str) -> list[Union[Compiled, Failed]]:
        with ThreadPoolExecutor(cores()) as pool:
            return list(pool.map(lambda kernel: under_schedules(kernel, partial(attempt, kernel)), kernels))

    return Target(name, compile)


def _for_multiples(kernel: Kernel, program: Program, name: str, sizes: tuple[str, ...]) -> dict[str, tuple[Binary, Usage]]:
    """Code that is better for most sizes; without it that for any size is taken."""
    try:
        return {key(program, one, name, sizes): _compiled(kernel, program, one, name, sizes) for one in program.launches}
    except (OfflineError, DoesNotFit):
        return {}


def _compiled(kernel: Kernel, program: Program, one: Launch, name: str, multiples: tuple[str, ...] = ()) -> tuple[Binary, Usage]:
    """Raises OfflineError, and DoesNotFit for what a device would refuse to load."""
    binary, usage = binary_and_usage(program, one, name, multiples)
    most = SHARED_BYTES[binary.target]
    if binary.shared > most:
        reason = f"it takes {binary.shared} bytes of shared memory, and {binary.target} has {most} for one program"
        raise DoesNotFit(action=f"run {kernel.name}", reason=reason)
    return binary, usage

"""From kernels to callables: schedule, print, build."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import Union

from ..build import BuildError, Source, build
from ..kernel import Kernel
from ..target import Compiled, Failed
from .contraction import print_any
from .schedule import CpuTarget, detect_target


def compile_kernels(kernels: Sequence[Kernel], target: CpuTarget | None = None) -> list[Union[Compiled, Failed]]:
    """Every kernel as a C function, launch(*addresses, *sizes, threads), or why it could not be made one."""
    target = target or detect_target()
    printed = [_print(k, target) for k in kernels]
    sources = [p for p in printed if isinstance(p, Source)]
    functions = iter(build(sources, target.level))
    return [p if isinstance(p, Failed) else _loaded(k, p, next(functions)) for k, p in zip(kernels, printed)]


def _print(kernel: Kernel, target: CpuTarget) -> Source | Failed:
    try:
        text = print_any(kernel, target)
    except NotImplementedError as error:
        return Failed(kernel, str(error))
    pointers = len(kernel.inputs) + len(kernel.outputs)
    arguments = (ctypes.c_void_p,) * pointers + (ctypes.c_int64,) * len(kernel.sizes) + (ctypes.c_int,)
    return Source(kernel.name, text, arguments, ctypes.c_int64 if kernel.faults else None)


def _loaded(kernel: Kernel, source: Source, function: object) -> Compiled | Failed:
    if isinstance(function, BuildError):
        return Failed(kernel, str(function))
    return Compiled(kernel, source.text, function)  # type: ignore[arg-type]

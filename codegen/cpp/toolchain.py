"""From kernels to callables: schedule, print, build."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from typing import Union

from ...ir.dims import symbol
from ..attentions import attentions
from ..build import BuildError, Loaded, Source, build, entry_address
from ..errors import Unsupported
from ..kernel import Kernel
from ..pool import START, Empty, allocator
from ..target import Compiled, Failed, Native, NativeCall
from .attention import print_attention
from .contraction import print_any
from .expressions import STORAGE
from .recurrence import print_recurrence
from .schedule import CpuTarget, detect_target

RUN = Source(
    "run_calls",
    "int64_t run_calls(const int64_t* words, const int64_t* values) { return run(words, values); }\n",
    (ctypes.c_void_p, ctypes.c_void_p),
    ctypes.c_int64,
)
"""The routine that makes a run of kernel calls."""

LAUNCH = Source(
    "launch_kernel",
    "int64_t launch_kernel(const int64_t* values, const int64_t* places) { return launch(values, places); }\n",
    (ctypes.c_void_p, ctypes.c_void_p),
    ctypes.c_int64,
)
"""The entry that launches kernels of a GPU."""


UPDATE = Source(
    "update_cache",
    """\
void update_cache(char* cache, const char* fresh, const int64_t* position, int64_t batch, int64_t heads, int64_t tokens, int64_t length,
                  int64_t bytes, int64_t of_batch, int64_t of_head, int64_t of_token, int) {
  update_rows(cache, fresh, position, batch, heads, tokens, length, bytes, {of_batch, of_head, of_token});
}
""",
    (*(ctypes.c_void_p,) * 3, *(ctypes.c_int64,) * 8, ctypes.c_int),
)
"""The kernel that updates a cache in place: the same for all caches."""

Builder = Callable[[Sequence[Source], str], list[Loaded]]
"""The functions of sources for a level, each or why there is none."""


def compile_kernels(kernels: Sequence[Kernel], target: CpuTarget | None = None, builder: Builder = build) -> list[Union[Compiled, Failed]]:
    """Every kernel as a C function, launch(*addresses, *sizes, threads), or why it could not be made one."""
    target = target or detect_target()
    printed = [_print(k, target) for k in kernels]
    sources = [p for p in printed if isinstance(p, Source)]
    run, start, update, *built = builder([RUN, START, UPDATE, *sources], target.level)
    functions, empty = iter(built), allocator(start)
    return [p if isinstance(p, Failed) else _loaded(k, p, next(functions), run, update, empty) for k, p in zip(kernels, printed)]


def sources_of(kernels: Sequence[Kernel], target: CpuTarget) -> list[Source]:
    """All that `compile_kernels` builds."""
    printed = [_print(k, target) for k in kernels]
    return [RUN, START, UPDATE, *(p for p in printed if isinstance(p, Source))]


def _print(kernel: Kernel, target: CpuTarget) -> Source | Failed:
    unread = next((b.dtype for b in kernel.inputs if b.dtype not in STORAGE), None)
    if unread is not None:
        return Failed(kernel, f"elements of {unread} have no form in C++")
    try:
        text = _printer(kernel)(kernel, target)
    except Unsupported as error:
        return Failed(kernel, str(error))
    pointers = len(kernel.inputs) + len(kernel.outputs)
    arguments = (ctypes.c_void_p,) * pointers + (ctypes.c_int64,) * len(kernel.sizes) + (ctypes.c_int,)
    return Source(kernel.name, text, arguments, ctypes.c_int64 if kernel.faults else None)


def _printer(kernel: Kernel) -> Callable[[Kernel, CpuTarget], str]:
    if kernel.recurrence is not None:
        return print_recurrence
    return print_attention if attentions(kernel) else print_any


def _loaded(kernel: Kernel, source: Source, function: Loaded, run: Loaded, update: Loaded, empty: Empty) -> Compiled | Failed:
    if isinstance(function, BuildError) or isinstance(run, BuildError):
        return Failed(kernel, str(function if isinstance(function, BuildError) else run))
    arguments = (*(b.name for b in (*kernel.inputs, *kernel.outputs)), *map(symbol, kernel.sizes))
    updating = None if isinstance(update, BuildError) else entry_address(update)
    calls = (NativeCall(kernel.name, entry_address(function), arguments),)
    return Compiled(kernel, source.text, function, Native(run, calls, empty=empty, update=updating))

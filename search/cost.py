"""Predicted seconds of a kernel under a schedule on a GPU, before it is compiled or, with what the compiler says of it, after.

    waves of programs, each as long as the slowest of: bytes / bandwidth, cached bytes / bandwidth of the cache, operations / rate

Bandwidth is reached only with enough bytes under way (Little's law: bytes in flight = bandwidth * delay), rates with enough warps. Both
depend on how many programs a processor holds, which registers, shared memory and threads limit. Numbers, not schedules, are compared
with measured times: by rank correlation (`spearman`).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from ..codegen.kernel import Kernel
from ..codegen.target import Usage
from .gpus import Gpu, of_target
from .work import Work, estimator

TYPICAL = of_target("sm_90")
"""The GPU to think of where none is named."""

MATRIX_WARPS = 4
"""Warps that keep the matrix units of a processor busy."""
PLAIN_WARPS = 8
"""Warps that keep its arithmetic busy."""
PLAIN_SHARE = 0.5
"""Of plain arithmetic's rate, which counts a multiplication with an addition as two: what mixed instructions reach."""
MOST_REGISTERS = 255
"""Of a thread."""
FULL_WIDTH: Mapping[str, tuple[int, int, float]] = {"sm_90": (64, 4, 0.6)}
"""Target -> rows and warps that its widest instruction of matrix units takes, and the share of the rate without it."""
RESERVED = 1024
"""Bytes of shared memory that every program takes beside its own."""


def predicted_seconds(
    kernel: Kernel, schedule: Any, gpu: Gpu = TYPICAL, usage: Usage | None = None, sizes: Mapping[str, int] = {}
) -> float:
    """Seconds of one call. usage: what the compiled kernel takes; sizes: of symbolic extents. Raises UnsupportedByTriton."""
    return seconds(estimator(kernel, sizes)(schedule), gpu, usage)


def seconds(works: Sequence[Work], gpu: Gpu, usage: Usage | None = None) -> float:
    """Seconds of launches, one after the other."""
    first, *rest = works
    spills = max(0.0, 4 * (first.registers - MOST_REGISTERS)) if usage is None else float(usage.spills)
    if usage is not None:
        first = replace(first, registers=usage.registers, shared=usage.shared)
    return sum(_launch(work, gpu) for work in rest) + _launch(first, gpu) * _slower(spills)


def _slower(spills: float) -> float:
    """How many times as long a kernel takes that spills so many bytes of a thread: always more than any schedule gains."""
    return 2 + spills / 64 if spills else 1.0


def _launch(work: Work, gpu: Gpu) -> float:
    slots = gpu.processors * residents(work, gpu)
    waves, rest = divmod(work.programs, slots)
    return gpu.launch + waves * _wave(work, gpu, slots) + (_wave(work, gpu, rest) if rest else 0.0)


def residents(work: Work, gpu: Gpu) -> int:
    """Programs that a processor holds at a time."""
    threads = work.warps * gpu.lanes
    registers = 8 * math.ceil(min(max(work.registers, 16), MOST_REGISTERS) / 8)
    return max(1, min(gpu.registers // (registers * threads), gpu.shared // (work.shared + RESERVED), gpu.threads // threads, gpu.programs))


def _wave(work: Work, gpu: Gpu, programs: int) -> float:
    """Seconds of so many programs at a time."""
    crowd = math.ceil(programs / gpu.processors)  # of the processor that has most
    part = programs / max(work.programs, 1)
    memory = part * work.memory / min(gpu.bandwidth, programs * work.flight / gpu.delay)
    reach = gpu.cache_bandwidth * min(1.0, programs / gpu.processors)
    cache = programs * work.cached / min(reach, programs * work.flight / gpu.cache_delay)
    matrix = crowd * work.flops / (_rate(work, gpu) * min(1.0, crowd * work.warps / MATRIX_WARPS))
    plain = crowd * work.plain / (PLAIN_SHARE * gpu.plain / gpu.processors * min(1.0, crowd * work.warps / PLAIN_WARPS))
    moving, computing = max(memory, cache), matrix + plain
    waiting = gpu.delay + work.waits * gpu.cache_delay
    working = max(moving, computing) + min(moving, computing) / (1 + work.stages * crowd)  # one hides the other
    return max(waiting, working + waiting / crowd)


def _rate(work: Work, gpu: Gpu) -> float:
    """Operations per second of the matrix units of one processor, on tiles of this shape."""
    rows, warps, share = FULL_WIDTH.get(gpu.target, (0, 0, 1.0))
    narrow = work.rows < rows or work.warps < warps
    return gpu.rates.get(work.dtype, gpu.plain) / gpu.processors * work.fed * (share if narrow else 1.0)


def spearman(a: Sequence[float], b: Sequence[float]) -> float:
    """Rank correlation of two equally long series, ties at their middle rank; 0 where one of them is constant. Raises ValueError."""
    if len(a) != len(b) or len(a) < 2:
        raise ValueError(f"ranks of {len(a)} and {len(b)} values cannot be compared")
    x, y = _ranks(a), _ranks(b)
    middle = (len(a) - 1) / 2
    both = sum((p - middle) * (q - middle) for p, q in zip(x, y))
    spread = math.sqrt(sum((p - middle) ** 2 for p in x) * sum((q - middle) ** 2 for q in y))
    return both / spread if spread else 0.0


def _ranks(values: Sequence[float]) -> list[float]:
    order = sorted(range(len(values)), key=values.__getitem__)
    ranks = [0.0] * len(values)
    begin = 0
    for end in range(1, len(order) + 1):
        if end == len(order) or values[order[end]] != values[order[begin]]:
            for place in order[begin:end]:
                ranks[place] = (begin + end - 1) / 2
            begin = end
    return ranks

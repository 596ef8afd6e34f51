"""How a kernel is walked on a CPU: `Schedule`, and the default one. A schedule never changes what is computed."""

from __future__ import annotations

import math
from dataclasses import dataclass

import sympy
import torch

from ...ir.dims import Dim
from ...ir.scalar import Apply, Const, Scalar
from ..kernel import Axis, Kernel, Load, Position, Reduce, Scan, free_axes, scalars
from .lanes import LaneAnalysis, stride_along


@dataclass(frozen=True)
class CpuTarget:
    """vector_bytes: register width; cache_bytes: the private cache of a core, which bounds row buffers; level: a `-march` value."""

    vector_bytes: int = 32
    cache_bytes: int = 1 << 20
    level: str = "native"


@dataclass(frozen=True)
class Schedule:
    """vector: the axis whose points are lanes (None: scalar code); lanes: how many in the main loop.

    order: inner axes, outermost first, the vector axis last where it is inner. ways: independent accumulators of cheap reductions.
    split: threads share the first inner loop instead of the grid (a grid of few points). chunk: points of a vectorised grid axis per
    item of the parallel loop. buffer_bytes: what row buffers of one grid point may take; above it values are recomputed.
    """

    vector: str | None
    lanes: int
    order: tuple[str, ...] = ()
    ways: int = 4
    split: bool = False
    chunk: int = 4096
    buffer_bytes: int = 1 << 19


def detect_target() -> CpuTarget:
    """The machine in hand, by what torch found (its ATEN_CPU_CAPABILITY included)."""
    widths = {"AVX512": 64, "AVX2": 32}
    return CpuTarget(vector_bytes=widths.get(torch.backends.cpu.get_cpu_capability(), 16))


SMALL_GRID = 4  # fewer points than this do not keep the cores busy
MIN_SPLIT = 1 << 15


def default_schedule(kernel: Kernel, target: CpuTarget) -> Schedule:
    """Lanes along the axis with most contiguous accesses; a grid axis wins only where it is clearly better."""
    best, best_score = None, 0.0
    free = free_axes(kernel)
    scanned = {v.axis for v in scalars(kernel.stores) if isinstance(v, Scan)}
    for axis in reversed(kernel.axes):
        if axis.name in scanned or (isinstance(axis.extent, int) and axis.extent < 4):
            continue
        score = _contiguity(kernel, free, axis)
        if score > best_score:
            best, best_score = axis, score
    lanes = _lanes(kernel, best, target) if best is not None else 1
    vector = best.name if best is not None and lanes > 1 else None
    order = _order(kernel, vector, scanned)
    columns = best is not None and not best.inner and bool(kernel.inner)
    # worth it with 32 registers only: measured 2.4 times faster from memory on AVX-512, slower on AVX2
    if columns and lanes == 16 and best is not None and _streams(kernel) and (not isinstance(best.extent, int) or best.extent >= 4 * lanes):
        lanes *= 4
    return Schedule(
        vector=vector,
        lanes=lanes,
        order=order,
        split=_splits(kernel, scanned, vector),
        chunk=max(64, lanes) if columns else 4096,
        buffer_bytes=target.cache_bytes // 2,
    )


def _contiguity(kernel: Kernel, free: dict[Scalar, frozenset[str]], axis: Axis) -> float:
    """Contiguous accesses along the axis less strided ones, each weighted by how often it happens; a slight bias to inner axes."""
    score = 0.25 if axis.inner else 0.0
    accesses = [(v.index, free[v], bool(v.indirect)) for v in scalars(kernel.stores) if isinstance(v, Load)]
    accesses += [(s.index, _axes_of(kernel, s.index), False) for s in kernel.stores]
    rank = {a.name: a for a in kernel.axes}
    for index, axes, indirect in accesses:
        if axis.name not in axes:
            continue
        everything = max(_points(a.extent for a in kernel.axes), 1)  # an empty reduction has no points
        weight = _points(rank[name].extent for name in axes) / everything
        step = stride_along(index, axis.symbol, 4)
        contiguous = step == 1 or (step == 0 and indirect)
        score += weight * (1.0 if contiguous else 0.5 if step == 0 else -0.5)
    short = axis.extent if isinstance(axis.extent, int) else 1024
    return score * min(1.0, short / 16)


STREAMING = frozenset({"add", "sub", "mul", "neg"})


def _streams(kernel: Kernel) -> bool:
    """Does it only add up floats? Then several registers of columns at once use more of each row that memory delivers."""

    def simple(value: Scalar) -> bool:
        if isinstance(value, Load):
            return value.mask is None and not value.indirect and kernel.buffer(value.buffer).dtype == torch.float32
        if isinstance(value, Reduce):
            return value.op == "sum"
        return isinstance(value, Const) or isinstance(value, Apply) and value.op in STREAMING and value.dtype == torch.float32

    return all(simple(v) for v in scalars(kernel.stores))


def _points(extents: object) -> float:
    return math.prod(e if isinstance(e, int) else 64 for e in extents)  # type: ignore[attr-defined]


def _axes_of(kernel: Kernel, index: sympy.Expr) -> frozenset[str]:
    return frozenset(a.name for a in kernel.axes) & {s.name for s in sympy.sympify(index).free_symbols}  # type: ignore[attr-defined]


def _lanes(kernel: Kernel, axis: Axis, target: CpuTarget) -> int:
    """As many as registers hold of the widest dtype that is computed in vectors, at most 4-byte lanes' worth."""
    analysis = LaneAnalysis(kernel, axis.name, target.vector_bytes // 4)
    widest = 4
    for value in scalars(kernel.stores):
        if isinstance(value, Const):
            continue
        wide = analysis.varies(value) or isinstance(value, Reduce)
        if isinstance(value, Apply) and value.op in ("lt", "le", "gt", "ge", "eq", "ne") and analysis.narrow(value):
            continue
        if isinstance(value, Position) and analysis.only_compared(value):
            continue
        if wide:
            widest = max(widest, 8 if isinstance(value, Scan) else value.dtype.itemsize)
    lanes = target.vector_bytes // widest
    extent = axis.extent if isinstance(axis.extent, int) else lanes
    while lanes > 4 and lanes > extent:
        lanes //= 2
    return lanes


def _order(kernel: Kernel, vector: str | None, scanned: set[str]) -> tuple[str, ...]:
    """Inner axes in their order, scanned ones after the others, the vector axis last."""
    names = [a.name for a in kernel.inner]
    return tuple(sorted(names, key=lambda n: (n == vector, n in scanned, names.index(n))))


def _splits(kernel: Kernel, scanned: set[str], vector: str | None) -> bool:
    extents = [a.extent for a in kernel.grid]
    if scanned or not kernel.inner or any(a.name == vector for a in kernel.grid) or any(not isinstance(e, int) for e in extents):
        return False
    inner = [a.extent for a in kernel.inner]
    long = any(not isinstance(e, int) for e in inner) or _size(inner) >= MIN_SPLIT
    return _size(extents) < SMALL_GRID and long


def _size(extents: list[Dim]) -> int:
    return math.prod(int(e) for e in extents)

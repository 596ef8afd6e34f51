"""How a kernel is walked on a GPU: block sizes, warps, and whether the inner axes fit one block. A schedule never changes what is computed.

The grid axes are flattened into one row of points, XBLOCK of them per program. The inner axes form *groups* - axes that are always
reduced together are one group - and each group is one dimension of the block: whole (persistent) or in chunks of RBLOCK (looped).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import sympy

from ...ir.dims import Dim, FloorDiv, Mod, SymbolRange, dim, evaluate, free_symbols, product
from ..kernel import Axis, Buffer, Kernel, Load, Position, Reduce, Scan, free_axes, scalars

LARGEST_BLOCK = 1 << 20  # elements; Triton's own limit
_PERSISTENT_ELEMENTS = 8192  # more per program would spill registers
_POINTWISE_BLOCK = 1024
NARROW = 2**31 - LARGEST_BLOCK
"""Offsets and positions below it are computed in 32 bits: a block may end beyond the last element."""


@dataclass(frozen=True)
class Schedule:
    """xblock, rblock: points per program and chunk, powers of two. wide: index arithmetic in 64 bits.

    persistent: the whole inner extent lies in one block; rblock is then at least the extent of every inner group without a static one.
    """

    xblock: int = _POINTWISE_BLOCK
    rblock: int = 1
    num_warps: int = 4
    num_stages: int = 2
    persistent: bool = True
    wide: bool = False


def refusal(schedule: Schedule) -> str | None:
    """Why a schedule is none for any kernel; None where it may be one."""
    lengths = {name: getattr(schedule, name) for name in ("xblock", "rblock", "num_warps")}
    return next((f"{name} is a power of two, not {n}" for name, n in lengths.items() if n < 1 or n & (n - 1)), None)


def next_power_of_two(n: int) -> int:
    return 1 << max(n - 1, 0).bit_length()


def inner_groups(kernel: Kernel) -> tuple[tuple[Axis, ...], ...]:
    """The inner axes, partitioned: axes in one group appear in the same reductions and in no scan."""
    values = scalars(kernel.stores)
    reductions = [frozenset(v.axes) for v in values if isinstance(v, Reduce)]
    scanned = {v.axis for v in values if isinstance(v, Scan)}

    def together(a: Axis, b: Axis) -> bool:
        return not {a.name, b.name} & scanned and all((a.name in r) == (b.name in r) for r in reductions)

    groups: list[tuple[Axis, ...]] = []
    for axis in kernel.inner:
        if groups and all(together(axis, other) for other in groups[-1]):
            groups[-1] = (*groups[-1], axis)
        else:
            groups.append((axis,))
    return tuple(groups)


def group_block(group: Iterable[Axis], schedule: Schedule) -> int:
    """The block length of an inner group."""
    extent = product(a.extent for a in group)
    if schedule.persistent and isinstance(extent, int):
        return next_power_of_two(extent)
    return schedule.rblock


def needs_whole_block(kernel: Kernel, groups: tuple[tuple[Axis, ...], ...]) -> bool:
    """True when a value spans two inner groups, which a loop over one of them cannot give."""
    owner = {a.name: n for n, group in enumerate(groups) for a in group}
    spans = [{owner[a] for a in axes if a in owner} for axes in free_axes(kernel).values()]
    spans += [{owner[a] for a in v.axes} for v in scalars(kernel.stores) if isinstance(v, Reduce)]
    return any(len(s) > 1 for s in spans)


def default_schedule(kernel: Kernel) -> Schedule:
    """A reasonable schedule from sizes, dtypes and the axis that is contiguous in memory; the tuner starts here."""
    wide = is_wide(kernel)
    groups = inner_groups(kernel)
    points = _static(product(a.extent for a in kernel.grid))
    if not groups:
        block = min(_POINTWISE_BLOCK, next_power_of_two(points))
        return Schedule(xblock=block, num_warps=_warps(block), wide=wide)
    extents = [product(a.extent for a in group) for group in groups]
    inner = math.prod(next_power_of_two(_static(e)) for e in extents)
    outer = _contiguous_over_grid(kernel)
    xblock = min(64 if outer else max(1, 1024 // inner), next_power_of_two(points))
    limit = LARGEST_BLOCK if needs_whole_block(kernel, groups) else _PERSISTENT_ELEMENTS // element_width(kernel)
    while xblock > 1 and xblock * inner > limit and xblock * min(inner, 32) > 512:
        xblock //= 2
    if xblock * inner <= limit and all(isinstance(e, int) for e in extents):
        return Schedule(xblock, inner, _warps(xblock * inner), persistent=True, wide=wide)
    if limit == LARGEST_BLOCK:
        return Schedule(1, inner, 16, persistent=True, wide=wide)
    rblock = max(16, min(inner, 2048 // xblock))
    return Schedule(xblock, rblock, _warps(xblock * rblock), persistent=False, wide=wide)


def _warps(elements: int) -> int:
    return max(1, min(16, next_power_of_two(elements) // 256))


def element_width(kernel: Kernel) -> int:
    """Registers per element, roughly: 2 where 8-byte values are computed."""
    return max((v.dtype.itemsize // 4 for v in scalars(kernel.stores) if isinstance(v, Load)), default=1) or 1


def _static(extent: object) -> int:
    """A size to plan for: that of a symbolic extent is unknown, and taken as large."""
    return extent if isinstance(extent, int) else 4096


def _contiguous_over_grid(kernel: Kernel) -> bool:
    """True when memory is contiguous along the last grid axis rather than along the last inner one (sums over columns)."""
    if not kernel.grid or not kernel.inner:
        return False
    last, inner = kernel.grid[-1].symbol, kernel.inner[-1].symbol
    votes = 0
    for value in scalars(kernel.stores):
        if isinstance(value, Load) and value.index.has(inner):
            votes += 1 if value.index.coeff(last) == 1 else -1 if value.index.coeff(inner) == 1 else 0
    return votes > 0


def reach(kernel: Kernel, scratch: Iterable[Buffer] = ()) -> Dim:
    """What no element offset and no position passes, in sizes of the kernel; 0 where all are NARROW. scratch: further buffers."""
    extents = {a.symbol: sympy.sympify(a.extent) for a in kernel.axes}
    amounts: list[Dim] = [b.size for b in (*kernel.inputs, *kernel.outputs, *scratch)]
    amounts += [product(a.extent for a in kernel.grid), product(a.extent for a in kernel.inner)]
    amounts += [_most(v.index, extents) for v in scalars(kernel.stores) if isinstance(v, Position)]
    known = list(dict.fromkeys(sympy.sympify(a) for a in amounts if not isinstance(a, int) or a >= NARROW))
    most = [a for a in known if not any(a is not b and (b - a).is_nonnegative for b in known)]
    return dim(sympy.Max(*most)) if most else 0


def _most(index: sympy.Expr, extents: Mapping[sympy.Symbol, Any]) -> sympy.Expr:
    """What a position does not pass, nor falls below on the other side of 0."""
    plain = sympy.sympify(index).replace(Mod, lambda a, b: b).replace(FloorDiv, lambda a, b: a)
    terms: list[sympy.Expr] = [term.xreplace(extents) for term in sympy.Add.make_args(sympy.expand(plain))]  # type: ignore[misc]
    return sympy.Add(*(-t if t.could_extract_minus_sign() else t for t in terms))  # type: ignore[return-value]


def is_wide(kernel: Kernel, scratch: Iterable[Buffer] = ()) -> bool:
    """Whether offsets pass 32 bits, however small the sizes are."""
    known = dict(kernel.ranges)
    return evaluate(reach(kernel, scratch), {s: known.get(s, SymbolRange()).lo for s in kernel.sizes}) >= NARROW


def may_be_wide(kernel: Kernel, scratch: Iterable[Buffer] = ()) -> bool:
    """Whether they do for some sizes; a size without an upper bound may be any."""
    known, most = dict(kernel.ranges), reach(kernel, scratch)
    highest = {s: known.get(s, SymbolRange()).hi for s in kernel.sizes}
    if any(highest[s.name] is None for s in free_symbols([most])):  # type: ignore[attr-defined]
        return True
    return evaluate(most, {s: hi or 0 for s, hi in highest.items()}) >= NARROW

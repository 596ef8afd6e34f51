"""Left operands that are read where they lie: each row of them is a few runs of neighbouring elements, or zeros.

x[m, k]                                     one run
inside ? x[b, y + s, x + t, c] : 0          a run over c for each (s, t), all or nothing of which is inside
the same with few channels                  a run over (t, c) for each s, of which a part may be inside
"""

from __future__ import annotations

from dataclasses import dataclass

import sympy

from ...ir.dims import free_symbols, product
from ...ir.scalar import Apply, Const, Scalar
from ..kernel import Axis, Kernel, Load, Position, cone
from .product import Product, Right, merge

FEW_ROWS = 8  # so few have paths of their own
FEW_TILES, DEEP = 8, 6144  # a product of so few tiles and so many terms is divided along its depth
SHORT = 16  # a shorter run is joined with its neighbours, though parts of it may then be outside
SHORTEST = 4  # elements of a run that are worth its start


@dataclass(frozen=True)
class Runs:
    """A row of the left operand is one run of `load` for each point over `taps`, in order; start: where it begins in the buffer.

    A run is `size` elements, of which all are read or none, as the mask of the load says; or so many for each point along `step`, and
    the mask holds for points that are neighbours.
    """

    load: Load
    taps: tuple[Axis, ...]
    step: Axis | None
    size: int
    start: sympy.Expr


def find_runs(kernel: Kernel, found: Product, right: Right) -> Runs | None:
    """The runs of a left operand against panels; None where it is computed, or too short to be worth it."""
    value, axes = merge(found.left, found.depth)
    if right.kind != "panels" or not _worth(found, right) or not isinstance(value, Load) or not axes:
        return None
    if value.indirect or value.other != 0 or kernel.buffer(value.buffer).dtype != found.dot.dtype or not _is_of_positions(value.mask):
        return None
    taps, step, size = _divided(value, axes)
    if size * (int(step.extent) if step else 1) < SHORTEST:  # type: ignore[arg-type]
        return None
    start = value.index.subs({a.symbol: 0 for a in axes[len(taps) :]})
    return Runs(value, taps, step, size, start)  # type: ignore[arg-type]


def _divided(load: Load, axes: tuple[Axis, ...]) -> tuple[tuple[Axis, ...], Axis | None, int]:
    """The axes of the depth as (taps, step, size), see Runs; size 0 where the load has no runs."""
    *outer, last = axes
    if _stride(load.index, last) != 1 or not _is_between(load.mask, last):
        return axes, None, 0
    if _depends(load.mask, last):
        return axes[:-1], last, 1
    size = int(last.extent)  # type: ignore[arg-type]
    if size < SHORT and outer and _stride(load.index, outer[-1]) == size and _is_between(load.mask, outer[-1]):
        return axes[:-2], outer[-1], size
    return axes[:-1], None, size


def _worth(found: Product, right: Right) -> bool:
    """Whether sizes are such that the walk over runs is meant for them."""
    rows, columns, depth = (product(a.extent for a in axes) for axes in (found.rows, found.columns, found.depth))
    if not isinstance(depth, int) or not isinstance(columns, int) or depth == 0:
        return False
    if not isinstance(rows, int):
        return True
    tiles = -(-rows // right.blocks.rows) * -(-columns // right.blocks.columns)
    return rows > FEW_ROWS and (depth < DEEP or tiles >= FEW_TILES)


def _stride(index: sympy.Expr, axis: Axis) -> sympy.Expr:
    return sympy.expand(index.subs(axis.symbol, axis.symbol + 1) - index)  # type: ignore[operator]


def _is_of_positions(mask: Scalar | None) -> bool:
    return mask is None or all(isinstance(v, (Apply, Const, Position)) for v in cone([mask]))


def _depends(value: Scalar | None, axis: Axis) -> bool:
    return value is not None and axis.name in {s.name for s in free_symbols(v.index for v in cone([value]) if isinstance(v, Position))}


def _is_between(mask: Scalar | None, axis: Axis) -> bool:
    """Does the mask hold for neighbours along the axis only? So do comparisons of what moves evenly with it, and all of several."""
    if mask is None or not _depends(mask, axis):
        return True
    if not isinstance(mask, Apply):
        return False
    if mask.op == "and":
        return all(_is_between(v, axis) for v in mask.args)
    return mask.op in ("lt", "le", "gt", "ge") and all(_is_even(v, axis) for v in mask.args)


def _is_even(value: Scalar, axis: Axis) -> bool:
    if isinstance(value, Position):
        return axis.symbol not in _stride(value.index, axis).free_symbols
    return not _depends(value, axis)

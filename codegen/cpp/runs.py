"""Left operands that are read where they lie: each row of them is a few runs of neighbouring elements, or zeros.

x[m, k]                                     one run
inside ? x[b, y + s, x + t, c] : 0          a run over c for each (s, t), all or nothing of which is inside
the same with few channels                  a run over (t, c) for each s, of which a part may be inside

Windows of 3 x 3 neighbouring points over enough of an image need fewer products than terms (winograd.h).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import sympy

from ...ir.dims import free_symbols, product
from ...ir.scalar import Apply, Const, Scalar
from ..kernel import Axis, Kernel, Load, Position, cone
from .product import Product, Right, merge

FEW_ROWS, FEW_WORD_ROWS = 8, 20  # so few have paths of their own
FEW_TILES, DEEP = 8, 6144  # a product of so few tiles and so many terms is divided along its depth
SHORT = 16  # a shorter run is joined with its neighbours, though parts of it may then be outside
SHORTEST = 4  # elements of a run that are worth its start
FEW_CHANNELS, FEW_COLUMNS = 16, 32  # turning fewer into tiles takes what the products save
MANY_TILES = 128  # of 2 x 2 points; fewer do not pay for turning the weights


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
    if right.kind not in ("panels", "turned", "widened", "words") or not _worth(found, right) or not isinstance(value, Load) or not axes:
        return None
    if value.indirect or value.other != 0 or kernel.buffer(value.buffer).dtype != found.dot.dtype or not _is_of_positions(value.mask):
        return None
    taps, step, size = _divided(value, axes)
    if size * (int(step.extent) if step else 1) < SHORTEST:  # type: ignore[arg-type]
        return None
    start = value.index.subs({a.symbol: 0 for a in axes[len(taps) :]})
    return Runs(value, taps, step, size, start)  # type: ignore[arg-type]


def find_images(found: Product, runs: Runs) -> tuple[int, int, int] | None:
    """(images, height, width) of the results of a convolution that is faster in tiles (winograd.h); None for other products."""
    if len(found.rows) < 2 or runs.step is not None or [a.extent for a in runs.taps] != [3, 3]:
        return None
    *outer, down, across = found.rows
    images, height, width, columns = (product(a.extent for a in axes) for axes in (outer, [down], [across], found.columns))
    if not (isinstance(images, int) and isinstance(height, int) and isinstance(width, int) and isinstance(columns, int)):
        return None
    tiles = images * -(-height // 2) * -(-width // 2)
    if tiles < MANY_TILES or runs.size < FEW_CHANNELS or columns < FEW_COLUMNS:
        return None
    together = all(_moves_together(runs.load, point, tap) for point, tap in zip((down, across), runs.taps))
    return (images, height, width) if together else None


def _moves_together(load: Load, point: Axis, tap: Axis) -> bool:
    """Does one step along the points read what one step along the window reads?"""
    moved: Any = {point.symbol: point.symbol + 1, tap.symbol: tap.symbol - 1}  # type: ignore[operator]
    indices = [load.index, *(v.index for v in cone([load.mask] if load.mask else []) if isinstance(v, Position))]
    return all(sympy.expand(i.subs(moved, simultaneous=True) - i) == 0 for i in map(sympy.sympify, indices))


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
        return right.kind == "panels"
    tiles = -(-rows // right.blocks.rows) * -(-columns // right.blocks.columns)
    return rows > (FEW_WORD_ROWS if right.kind == "words" else FEW_ROWS) and (depth < DEEP or tiles >= FEW_TILES)


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

"""Rows of keys and values in memory, as attention.h reads them: elements side by side, or integers with a scale for each row.

Of 64 columns, in memory after each other:

    keys[64*j + c]                                                        -->   tile::Rows<float>
    float(levels[64*j + c]) * scales[j]                                   -->   tile::Levels<int8_t, float, 0, 1, 0>
    (float(levels[32*j + c % 32] >> 4*(c // 32) & 15) - 8) * scales[j]    -->   tile::Levels<uint8_t, float, 8, 1, 32>
"""

from __future__ import annotations

from dataclasses import dataclass

import sympy

from ...ir.dims import FloorDiv, Mod
from ...ir.scalar import Const, Scalar
from ..kernel import Axis, Load
from .words import Level, affine


@dataclass(frozen=True)
class Place:
    """Row `key` of a buffer begins at element start + key * ld."""

    load: Load
    start: sympy.Expr
    ld: sympy.Expr


@dataclass(frozen=True)
class Scales:
    """What rows of integers stand for: (level - zero) * scale. half: columns that share their bytes with the others; 0 where none do."""

    place: Place
    zero: int
    half: int


def find_rows(value: Scalar, key: Axis, column: Axis, lanes: int) -> tuple[Place, Scales | None] | None:
    """Where the rows of a value lie that is read where it is, with a multiple of the lanes of columns; None for others."""
    if not isinstance(column.extent, int) or column.extent % lanes:
        return None
    place = _rows(value, key, column)
    if place is not None:
        return place, None
    found = affine(value)
    return None if found is None else _levels(*found, key, column, lanes)


def _rows(value: Scalar, key: Axis, column: Axis) -> Place | None:
    if not isinstance(value, Load) or value.mask is not None or value.indirect:
        return None
    return _place(value, sympy.sympify(value.index), key, column, 1)


def _place(load: Load, index: sympy.Expr, key: Axis, column: Axis, step: int) -> Place | None:
    """The place of an index that moves by `step` with each column."""
    j, c = key.symbol, column.symbol
    ld, along = (sympy.expand(index.subs(s, s + 1) - index) for s in (j, c))  # type: ignore[operator]
    start = sympy.expand(index.subs({j: 0, c: 0}))
    if along != step or {j, c} & (ld.free_symbols | start.free_symbols) or sympy.expand(start + j * ld + c * step - index) != 0:
        return None
    return Place(load, start, ld)


def _levels(level: Level, zero: Scalar | None, scale: Scalar, key: Axis, column: Axis, lanes: int) -> tuple[Place, Scales] | None:
    if zero is not None and not (isinstance(zero, Const) and float(zero.value).is_integer() and abs(zero.value) < 256):
        return None
    if not isinstance(scale, Load) or scale.mask is not None or scale.indirect:
        return None
    scales = _place(scale, sympy.sympify(scale.index), key, column, 0)
    half, index = (0, sympy.sympify(level.load.index)) if level.bits == 8 else _halves(level, column)
    if scales is None or not scales.ld.is_Integer or half % lanes:
        return None
    place = _place(level.load, index, key, column, 1)
    return None if place is None else (place, Scales(scales, 0 if zero is None else int(zero.value), half))


def _halves(level: Level, column: Axis) -> tuple[int, sympy.Expr]:
    """(half of the columns, the index of the first half's bytes), where byte c holds columns c and half + c; else an index of no rows."""
    c, half, nowhere = column.symbol, int(column.extent) // 2, sympy.Integer(0)  # type: ignore[arg-type]
    if level.bits != 4 or half == 0:
        return 0, nowhere
    low, high = (sympy.sympify(part(c, half)) for part in (Mod, FloorDiv))
    index = sympy.sympify(level.load.index)
    if level.shift.subs({high: 1}) != 4 or level.shift.subs({high: 0}) != 0 or c in index.subs({low: 0}).free_symbols:
        return 0, nowhere
    return half, index.subs({low: c})

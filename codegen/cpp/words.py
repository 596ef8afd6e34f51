"""Right operands of few bits: words of 32 bits in panels, and what their levels stand for (words.h, bytes.h).

    byte = q[6144*(n // 48) + 192*u + 4*(n % 48) + t // 2]        word u of column n: 8 terms of 4 bits, t in 0..7
    (float(byte >> 4*(t % 2) & 15) - zero[n, g]) * scale[n, g]    group g of its terms

`pack-weights` lays weights so. They are known by what is read where, not by who wrote it: a word is the next 32 / bits terms of a column,
the first in its lowest bits; a row of a panel is a word of each of its columns.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import sympy
import torch

from ...ir.dims import FloorDiv, free_symbols
from ...ir.scalar import Apply, Const, Scalar
from ..kernel import Axis, Load, Position, Reduce, Scan, cone

WORD = 32


@dataclass(frozen=True)
class Level:
    """An integer of so many bits of a byte: those above `shift`, all of them where they have a sign."""

    load: Load
    bits: int
    signed: bool
    shift: sympy.Expr


@dataclass(frozen=True)
class Words:
    """Levels in words. start: where the bytes of column `n` begin; ld: bytes from a row of a panel to the next.

    (level - zero) * scale is the value. `group` terms share scale and zero: the row-major position over `axes` is the number of a group,
    `places` says what those axes of the depth are at its first term that are no such axis.
    """

    level: Level
    start: sympy.Expr
    ld: int
    group: int
    axes: tuple[Axis, ...]
    places: Mapping[str, sympy.Expr]
    scale: Scalar
    zero: Scalar | None


def find_words(value: Scalar, moved: Scalar, depth: Sequence[Axis]) -> Words | None:
    """The words of a value over the axes of the depth, outermost first; None for others. moved: the value by a flat column."""
    if not depth or not all(isinstance(a.extent, int) and a.extent > 0 for a in depth):
        return None
    found, flat = affine(value), affine(moved)
    if found is None or flat is None:
        return None
    _, zero, scale = found
    place = _word_rows(flat[0], depth)
    grouped = _groups([scale, *([] if zero is None else [zero])], depth)
    if place is None or grouped is None:
        return None
    if grouped[0] % (WORD // flat[0].bits) and grouped[0] != _size(depth):
        return None
    return Words(flat[0], *place, *grouped, scale, zero)


# ---- (level - zero) * scale


def affine(value: Scalar) -> tuple[Level, Scalar | None, Scalar] | None:
    """(level, zero, scale) of a value that is (level - zero) * scale; None for others."""
    if value.dtype == torch.int32:
        level = _level(value)
        return None if level is None else (level, None, Const(torch.float32, 1.0))
    if not isinstance(value, Apply) or value.dtype != torch.float32:
        return None
    if value.op != "mul":
        found = _less_zero(value)
        return None if found is None else (*found, Const(torch.float32, 1.0))
    for factor, scale in (value.args, value.args[::-1]):
        found = _less_zero(factor)
        if found is not None:
            return (*found, scale)
    return None


def _less_zero(value: Scalar) -> tuple[Level, Scalar | None] | None:
    if isinstance(value, Apply) and value.op == "sub":
        level = _level(value.args[0])
        return None if level is None else (level, value.args[1])
    level = _level(value)
    return None if level is None else (level, None)


_WIDER = frozenset({torch.int16, torch.int32, torch.int64, torch.float32})


def _level(value: Scalar) -> Level | None:
    """The level that is converted to a wider type."""
    if not isinstance(value, Apply) or value.op != "cast":
        return None
    while isinstance(value, Apply) and value.op == "cast" and value.dtype in _WIDER:
        value = value.args[0]
    load = _bytes(value)
    if load is not None:
        return Level(load, 8, load.dtype == torch.int8, sympy.Integer(0))
    if not isinstance(value, Apply) or value.op != "and" or value.dtype != torch.uint8:
        return None
    moved, mask = value.args
    bits = (int(mask.value) + 1).bit_length() - 1 if isinstance(mask, Const) else 0
    if bits not in (1, 2, 4) or mask.value != (1 << bits) - 1:  # type: ignore[attr-defined]
        return None
    shift: sympy.Expr | None = sympy.Integer(0)
    if isinstance(moved, Apply) and moved.op == "shr":
        moved, shift = moved.args[0], _integer(moved.args[1])
    load = _bytes(moved)
    return Level(load, bits, False, shift) if load is not None and load.dtype == torch.uint8 and shift is not None else None


def _bytes(value: Scalar) -> Load | None:
    """The value as a plain load of bytes, if it is one."""
    if not isinstance(value, Load) or value.mask is not None or value.indirect:
        return None
    return value if value.dtype in (torch.int8, torch.uint8) else None


def _integer(value: Scalar) -> sympy.Expr | None:
    """The scalar as an index expression, if it is one."""
    while isinstance(value, Apply) and value.op == "cast" and not value.dtype.is_floating_point:
        value = value.args[0]
    if isinstance(value, Position):
        return value.index
    return sympy.Integer(int(value.value)) if isinstance(value, Const) else None


# ---- where words are


def _word_rows(level: Level, depth: Sequence[Axis]) -> tuple[sympy.Expr, int] | None:
    """(start, ld) of Words, if the levels are in words."""
    at = _term_places(depth, WORD // level.bits)
    if at is None:
        return None
    (places, steps), index = at, level.load.index
    first = sympy.expand(index.subs(places[0]))
    for t, place in enumerate(places):
        byte, bit = divmod(t * level.bits, 8)
        if sympy.expand(index.subs(place) - first) != byte or level.shift.subs(place) != bit:
            return None
    moves = [(sympy.expand(first.subs(s, s + 1) - first), count) for s, count in steps]
    if not all(move.is_Integer and int(move) % (4 * count) == 0 for move, count in moves):
        return None
    apart = {int(move) // count for move, count in moves}
    if len(apart) > 1:
        return None
    return first.subs({s: 0 for s, _ in steps}), apart.pop() if apart else 0


def _term_places(depth: Sequence[Axis], terms: int) -> tuple[list[dict[Any, Any]], list[tuple[Any, int]]] | None:
    """(the axes at term t of some word, for each t; the symbols that choose the word, each with how many words it moves by)."""
    places: list[dict[Any, Any]] = [{} for _ in range(terms)]
    steps: list[tuple[Any, int]] = []
    for axis, stride in _strides(depth):
        extent = int(axis.extent)  # type: ignore[arg-type]
        if stride % terms == 0:
            steps.append((axis.symbol, stride // terms))
        elif terms % stride:
            return None
        elif terms % (stride * extent) == 0:
            for t, place in enumerate(places):
                place[axis.symbol] = t // stride % extent
        elif axis is depth[0] or stride * extent % terms == 0:
            steps.append((axis.symbol, 1))  # what counts from now on is words
            for t, place in enumerate(places):
                place[axis.symbol] = terms // stride * axis.symbol + t // stride
        else:
            return None
    return places, steps


def word_axes(depth: Sequence[Axis], terms: int) -> tuple[tuple[Axis, ...], list[dict[str, sympy.Expr]]] | None:
    """(axes of words of so many terms, what the axes of the depth are at each term of a word), where words are whole."""
    known = all(isinstance(a.extent, int) and a.extent > 0 for a in depth)
    at = _term_places(depth, terms) if known and _size(depth) % terms == 0 else None
    if at is None:
        return None
    places, steps = at
    words = {s: count for s, count in steps}
    axes = [replace(a, extent=int(a.extent) * stride // (terms * words[a.symbol])) for a, stride in _strides(depth) if a.symbol in words]  # type: ignore[arg-type]
    return tuple(reversed(axes)), [{s.name: sympy.sympify(v) for s, v in place.items()} for place in places]


def _groups(values: Sequence[Scalar], depth: Sequence[Axis]) -> tuple[int, tuple[Axis, ...], dict[str, sympy.Expr]] | None:
    """(terms that share the values, the axes of groups, what the axes of the depth are at the first term of a group)."""
    if any(isinstance(v, (Reduce, Scan)) for v in cone(values)):
        return None
    changes = [stride * period for axis, stride in _strides(depth) for period in _periods(values, axis)]
    group = math.gcd(*changes) if changes else _size(depth)
    axes, places = [], dict[str, sympy.Expr]()
    for axis, stride in reversed(list(_strides(depth))):
        extent = int(axis.extent)  # type: ignore[arg-type]
        if stride % group == 0:
            axes.append(axis)
        elif group % stride:
            return None
        elif stride * extent > group:
            share = group // stride
            axes.append(replace(axis, extent=-(-extent // share)))
            places[axis.name] = share * axis.symbol
        else:
            places[axis.name] = sympy.Integer(0)
    return group, tuple(axes), places


def _periods(values: Sequence[Scalar], axis: Axis) -> Iterator[int]:
    """After how many steps along the axis the values change, at the earliest; nothing where they do not depend on it."""
    for value in cone(values):
        if not isinstance(value, (Load, Position)) or axis.symbol not in free_symbols([value.index]):
            continue
        divisions = [d for d in value.index.atoms(FloorDiv) if d.args[0] == axis.symbol and d.args[1].is_Integer]
        rest = value.index.xreplace({d: sympy.Integer(0) for d in divisions})
        yield from (int(d.args[1]) for d in divisions)  # type: ignore[call-overload]
        if axis.symbol in rest.free_symbols:
            yield 1


def _strides(depth: Sequence[Axis]) -> Iterator[tuple[Axis, int]]:
    """Each axis with the terms that it moves by, innermost first."""
    stride = 1
    for axis in reversed(depth):
        yield axis, stride
        stride *= int(axis.extent)  # type: ignore[arg-type]


def _size(depth: Sequence[Axis]) -> int:
    return math.prod(int(a.extent) for a in depth)  # type: ignore[arg-type]

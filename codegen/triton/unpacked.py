"""Values that bytes hold several of, taken out of each byte once.

    w[n, k] = packed[n, k // 2] >> k % 2 * 4 & 15     -->     packed = tl.load(packed_ptr + 2048*n + k_bytes)
                                                              values = tl.interleave(packed & 15, packed >> 4)

The axes of the depth that number the values of a byte are the innermost ones, and nothing that is loaded depends on them. A block of bytes
is as much shorter, and the value is written over it once for each position of these axes; interleaved, these are a block of values. Where
terms are only added, nothing is interleaved: the terms of a byte are added first.
"""

from __future__ import annotations

import functools
import math
import operator
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

import sympy

from ...ir.scalar import Apply, Scalar
from ..hashcons import shared
from ..kernel import Axis, Kernel, Load, Store, cone, free_axes, operands
from .expressions import Expressions
from .indices import Span
from .layout import Dimension, mask_lines
from .legalize import rewritten
from .scalars import Text

MOST = 8
"""Values in a byte, of one bit."""

Free = Mapping[Scalar, frozenset[str]]


class Unpacking(Expressions):
    """Writes values over blocks whose last dimension may be that of packed values."""

    def unpack(self, roots: Iterable[Scalar], whole: Dimension, per: int = 1) -> None:
        """Writes what is taken out of bytes among what the roots are computed from. `per` positions of the dimension `whole` are one
        here: bytes may hold what is itself read from bytes of several.
        """
        depth = self.layout.dimensions[-1]
        if per == 1 and depth is not whole:
            return
        for value, axes in _held(roots, self._free, depth.span.axes).items():
            if whole.block < 2 * per * _count(axes):
                continue
            code = self._interleaved(value, axes, whole, per * _count(axes))
            self.stand_in(value, Text(self._variable("values", code, self._scope(self._free[value]))))

    def _interleaved(self, value: Scalar, axes: tuple[Axis, ...], whole: Dimension, per: int) -> str:
        """The value over a block of bytes, for each of those in a byte."""
        number = [Store("", sympy.Integer(0), _at(value, axes, n)) for n in range(_count(axes))]
        kernel = replace(self.kernel, axes=tuple(a for a in self.kernel.axes if a not in axes), stores=shared(number), inplace=())
        groups = (*self.layout.groups[:-1], self._bytes(axes, whole, per))
        part = Unpacking(kernel, replace(self.layout, groups=groups), self.schedule, self)
        values = [s.value for s in kernel.stores]
        part.unpack(values, whole, per)
        for one in values:
            part.prepare(one)
        return _interleave([part.text(one).code for one in values])

    def _bytes(self, axes: tuple[Axis, ...], whole: Dimension, per: int) -> Dimension:
        """The dimension of bytes, whose positions are written if they are not yet."""
        flat, depth = whole.span.flat, self.layout.dimensions[-1]
        points, spread = f"tl.arange(0, {whole.constant} // {per})", self.layout.spread(depth)
        code = f"({flat}_start // {per} + {points}){spread}" if whole.looped else f"{points}{spread}"
        code += ".to(tl.int64)" if self.schedule.wide else ""
        scope = self._scope(frozenset(a.name for a in depth.span.axes))
        known = code in scope.variables
        span = Span(depth.span.axes[: -len(axes)], self._variable(f"{flat}_bytes", code, scope))
        packed = replace(whole, span=span, constant=f"{whole.constant} // {per}", block=whole.block // per, start="")
        scope.lines.extend(() if known else mask_lines(packed))
        return packed


def one_term_a_byte(kernel: Kernel, values: Sequence[Scalar], depth: tuple[Axis, ...]) -> tuple[list[Scalar], tuple[Axis, ...]]:
    """Values that are summed over the depth: the same, over what is left of it where those of a byte are added first."""
    values = list(values)
    while True:
        stores = tuple(Store("", sympy.Integer(0), v) for v in values)
        axes = max(_held(values, free_axes(replace(kernel, stores=stores)), depth).values(), key=len, default=())
        if not axes:
            return values, depth
        terms = [[_at(v, axes, n) for n in range(_count(axes))] for v in values]
        stores = shared([Store("", sympy.Integer(0), functools.reduce(operator.add, several)) for several in terms])
        values, depth = [s.value for s in stores], depth[: -len(axes)]


def _held(roots: Iterable[Scalar], free: Free, depth: tuple[Axis, ...]) -> dict[Scalar, tuple[Axis, ...]]:
    """The values that bytes hold several of -> the axes that number those of one byte."""
    found: dict[Scalar, tuple[Axis, ...]] = {}
    stack, seen = list(roots), set[Scalar]()
    while stack:
        value = stack.pop()
        if value in seen:
            continue
        seen.add(value)
        axes = _numbering(value, free, depth)
        if axes:
            found[value] = axes
        else:
            stack.extend(operands(value))
    return found


def _numbering(value: Scalar, free: Free, depth: tuple[Axis, ...]) -> tuple[Axis, ...]:
    if not isinstance(value, Apply) or value.dtype.is_floating_point or value.dtype.itemsize > 1:
        return ()
    read = frozenset().union(*(free[v] for v in cone([value]) if isinstance(v, Load)))
    axes = tuple(a for a in depth if a.name in free[value] - read)
    innermost = 0 < len(axes) < len(depth) and axes == depth[-len(axes) :]
    return axes if innermost and read and _count(axes) in (2, 4, MOST) else ()


def _count(axes: Sequence[Axis]) -> int:
    return math.prod(a.extent if isinstance(a.extent, int) else 0 for a in axes)


def _at(value: Scalar, axes: Sequence[Axis], number: int) -> Scalar:
    """The value at a position of the axes, counted in row-major order."""
    places = {}
    for axis in reversed(axes):
        number, rest = divmod(number, int(axis.extent))
        places[axis.symbol] = sympy.Integer(rest)
    return rewritten([Store("", sympy.Integer(0), value)], {}, places)[0].value


def _interleave(parts: Sequence[str]) -> str:
    """One after the other in turn: the first of every part, then the second of every part, ..."""
    if len(parts) == 1:
        return parts[0]
    return f"tl.interleave({_interleave(parts[::2])}, {_interleave(parts[1::2])})"

"""What kind of window a kernel's reduction is: which axes slide over which, what is read there, and where nothing is to be read.

    out[i, j, k, c] = sum over a, b of (inside ? x[i, 2*j + a - 1, 2*k + b - 1, c] : 0) * w[a, b, c]

The points along k (the strip) and the elements along b of their windows meet in columns q = 2*k + b: what is read from x depends on q
alone (a *column*), what is read from w on b alone (a *tap*).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import sympy
import torch

from ...ir.dims import FloorDiv, Mod, free_symbols, symbol
from ...ir.scalar import Apply, Const, Scalar
from ..kernel import Attend, Axis, Dot, Kernel, Load, Position, Reduce, Scan, cone, free_axes, operands, scalars
from .expressions import COMPARE

MAX_TAPS = 11
"""A longer side of a window is not unrolled."""

IDENTITY = {"sum": 0.0, "max": -math.inf, "min": math.inf}


@dataclass(frozen=True)
class Window:
    """reduce: the one reduction, over `outer` axes (loops) and the `taps` axis (unrolled).

    strip: the grid axis along which points share columns: element b of point p is column q = stride*p + dilation*b.
    element: what is added up, computed of `column` and `tap` (None where there is none). moved: the column over `first` (the first
    point of a strip) and `q`. inside: conditions on a column, over the same; inside_outer: conditions on each outer axis.
    """

    reduce: Reduce
    strip: Axis
    taps: Axis
    outer: tuple[Axis, ...]
    stride: int
    dilation: int
    first: str
    q: str
    element: Scalar
    column: Scalar
    tap: Scalar | None
    moved: Scalar
    inside: tuple[Scalar, ...]
    inside_outer: Mapping[str, tuple[Scalar, ...]]

    @property
    def size(self) -> int:
        return int(self.taps.extent)


def find_window(kernel: Kernel, vector: str | None) -> Window | None:
    """The window that the kernel walks, with the channels along `vector`; None where it is none of ours."""
    reduces = [v for v in scalars(kernel.stores) if isinstance(v, Reduce)]
    if len(reduces) != 1 or vector not in {a.name for a in kernel.grid} or reduces[0].op not in IDENTITY:
        return None
    if any(isinstance(v, (Scan, Dot, Attend)) or isinstance(v, Load) and v.indirect for v in scalars(kernel.stores)):
        return None
    (reduce,) = reduces
    if set(reduce.axes) != {a.name for a in kernel.inner} or not all(isinstance(a.extent, int) for a in kernel.inner):
        return None
    free = free_axes(kernel)
    if any((free[s.value] | _names(s.index)) & set(reduce.axes) for s in kernel.stores):
        return None  # it also stores something for each element of a window
    for taps in reversed(kernel.inner):
        for strip in reversed(kernel.grid):
            if strip.name != vector and 1 < int(taps.extent) <= MAX_TAPS:
                found = _Slide(kernel, reduce, strip, taps, vector or "").window()
                if found is not None:
                    return found
    return None


class _Unfit(Exception):
    """The reduction has no such window."""


class _Slide:
    """One choice of the strip and the taps."""

    def __init__(self, kernel: Kernel, reduce: Reduce, strip: Axis, taps: Axis, vector: str) -> None:
        self.kernel, self.reduce, self.strip, self.taps, self.vector = kernel, reduce, strip, taps, vector
        self.free = free_axes(kernel)
        taken = {a.name for a in kernel.axes} | set(kernel.sizes) | {b.name for b in (*kernel.inputs, *kernel.outputs)}
        self.first, self.q = (_fresh(base, taken) for base in (f"{strip.name}_first", "q"))

    def window(self) -> Window | None:
        try:
            return self._window()
        except _Unfit:
            return None

    def _window(self) -> Window:
        masked = _masked_part(self.reduce)
        conditions = _conjuncts(masked) if masked is not None else []
        bare = _Unmasked(set(conditions)).of(self.reduce.value)
        indices = [v.index for v in cone([bare, *conditions]) if isinstance(v, (Load, Position))]
        self.stride, self.dilation = self._ratio(indices)
        inside: list[Scalar] = []
        outer: dict[str, list[Scalar]] = {a.name: [] for a in self.kernel.inner if a.name != self.taps.name}
        for condition in conditions:
            axes = {n for v in cone([condition]) if isinstance(v, Position) for n in _names(v.index)} - set(self.kernel.sizes)
            own = axes & outer.keys()
            if axes <= {self.strip.name, self.taps.name}:
                inside.append(_mapped(condition, self._moved))
            elif len(own) == 1 and not axes & {self.strip.name, self.taps.name, self.vector}:
                outer[own.pop()].append(condition)
            else:
                raise _Unfit
        column, tap = self._parts(bare)
        return Window(
            self.reduce, self.strip, self.taps, tuple(a for a in self.kernel.inner if a.name != self.taps.name), self.stride,
            self.dilation, self.first, self.q, bare, column, tap, _mapped(column, self._moved), tuple(inside),
            {n: tuple(c) for n, c in outer.items()},
        )  # fmt: skip

    # ---- how indices move

    def _ratio(self, indices: Sequence[sympy.Expr]) -> tuple[int, int]:
        """(stride, dilation) in columns, by the indices that both axes move."""
        found: set[sympy.Expr] = set()
        for index in indices:
            along, across = (_step(index, a) for a in (self.strip, self.taps))
            if along != 0 and across != 0:
                found.add(sympy.cancel(along / across))
            elif along != 0:
                raise _Unfit  # a column of each point's own
        if len(found) != 1:
            raise _Unfit
        (ratio,) = found
        if not isinstance(ratio, sympy.Rational) or ratio <= 0:
            raise _Unfit
        if ratio > int(self.taps.extent) or ratio.q > MAX_TAPS:
            raise _Unfit  # no columns are shared, most are not read: rows of a matrix, far apart
        return int(ratio.p), int(ratio.q)

    def _kind(self, value: Scalar) -> str:
        """ "column", "tap", "mixed", or "" for what neither axis moves."""
        kinds = {self._kind(v) for v in operands(value)} - {""}
        if isinstance(value, (Load, Position)):
            names = _names(value.index)
            if self.strip.name in names:
                kinds.add("column")
            elif self.taps.name in names:
                kinds.add("tap")
        return kinds.pop() if len(kinds) == 1 else "mixed" if kinds else ""

    def _parts(self, element: Scalar) -> tuple[Scalar, Scalar | None]:
        """(column, tap): the one largest value of each kind."""
        found: dict[str, list[Scalar]] = {"column": [], "tap": []}
        stack, seen = [element], set()
        while stack:
            value = stack.pop()
            if value in seen:
                continue
            seen.add(value)
            kind = self._kind(value)
            if kind in found:
                found[kind].append(value)
            elif kind == "mixed":
                if not isinstance(value, Apply):
                    raise _Unfit
                stack.extend(operands(value))
        if len(found["column"]) != 1 or len(found["tap"]) > 1:
            raise _Unfit
        return found["column"][0], (found["tap"] or [None])[0]

    def _moved(self, index: sympy.Expr) -> sympy.Expr:
        """The index of a column as a function of q instead of the point and the element."""
        step = sympy.cancel(_step(index, self.taps) / self.dilation)
        start = index.subs({self.strip.symbol: symbol(self.first), self.taps.symbol: sympy.Integer(0)})
        return sympy.expand(start + symbol(self.q) * step)


def _fresh(base: str, taken: set[str]) -> str:
    while base in taken:
        base += "_"
    taken.add(base)
    return base


def _names(index: sympy.Expr) -> set[str]:
    return {s.name for s in free_symbols([index])}


def _step(index: sympy.Expr, axis: Axis) -> sympy.Expr:
    """By how much the index grows along the axis. Raises _Unfit where that is not the same everywhere."""
    index = sympy.sympify(index)
    if axis.symbol not in index.free_symbols:
        return sympy.Integer(0)
    if any(axis.symbol in a.free_symbols for a in index.atoms(FloorDiv, Mod, sympy.Max, sympy.Min)):
        raise _Unfit
    step = sympy.expand(index.subs(axis.symbol, axis.symbol + 1) - index)
    if axis.symbol in step.free_symbols:
        raise _Unfit
    return step


def _mapped(value: Scalar, move: Callable[[sympy.Expr], sympy.Expr]) -> Scalar:
    """The value with every index moved."""
    if isinstance(value, Position):
        return Position(value.dtype, move(sympy.sympify(value.index)))
    if isinstance(value, Load):
        return replace(value, index=move(sympy.sympify(value.index)))
    if isinstance(value, Apply):
        return Apply(value.dtype, value.op, tuple(_mapped(v, move) for v in value.args))
    return value


# ---- masks: a window's elements outside of the image change nothing, so they are skipped


def _masked_part(reduce: Reduce) -> Scalar | None:
    """The condition without which the element of the reduction is its identity; None where there is none."""
    value = reduce.value
    if isinstance(value, Apply) and value.op == "mul" and reduce.op == "sum":
        masks = [m for m in (_mask(v, 0.0) for v in value.args) if m is not None]
        return masks[0] if masks else None
    return _mask(value, IDENTITY[reduce.op])


def _mask(value: Scalar, identity: float) -> Scalar | None:
    while isinstance(value, Apply) and value.op == "cast" and value.dtype.is_floating_point:
        (value,) = value.args
    if isinstance(value, Load):
        return value.mask if value.other == identity else None
    if isinstance(value, Apply) and value.op == "where":
        condition, _, otherwise = value.args
        return condition if isinstance(otherwise, Const) and otherwise.value == identity else None
    return None


def _conjuncts(condition: Scalar) -> list[Scalar]:
    """The comparisons of positions that a condition is made of. Raises _Unfit for any other."""
    if isinstance(condition, Apply) and condition.op == "and" and condition.dtype == torch.bool:
        return [c for part in condition.args for c in _conjuncts(part)]
    compares = isinstance(condition, Apply) and condition.op in COMPARE.keys() - {"eq", "ne"}
    if not compares or not all(isinstance(v, (Position, Const)) for v in condition.args):  # type: ignore[attr-defined]
        raise _Unfit
    return [condition]


class _Unmasked:
    """Values where certain conditions hold: no load asks for them, nothing is selected by them."""

    def __init__(self, known: set[Scalar]) -> None:
        self.known = known
        self.memo: dict[Scalar, Scalar] = {}

    def of(self, value: Scalar) -> Scalar:
        if value not in self.memo:
            self.memo[value] = self._of(value)
        return self.memo[value]

    def _of(self, value: Scalar) -> Scalar:
        if isinstance(value, Load) and value.mask is not None:
            if not self._holds(value.mask):
                raise _Unfit
            return replace(value, mask=None)
        if isinstance(value, Apply):
            if value.op == "where" and self._holds(value.args[0]):
                return self.of(value.args[1])
            return Apply(value.dtype, value.op, tuple(map(self.of, value.args)))
        return value

    def _holds(self, condition: Scalar) -> bool:
        try:
            return all(c in self.known for c in _conjuncts(condition))
        except _Unfit:
            return False

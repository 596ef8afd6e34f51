"""Contractions of uneven parts as products of matrices: what remains when the parts are walked one by one.

sum over a, b within ends[a-1] <= i < ends[a] of x[i, b] * w[a, b, j]   -->   for group a: x[i, b] @ w[a, b, j], of its rows i
sum over a, b within starts[i] <= a < starts[i+1] of x[r, b + c[a]] * v[a, j, b]   -->   for a of block row i: x[r, b + c[a]] @ v[a, b, j]
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, NoReturn, Union

import sympy

from ...ir.dims import Dim, dim
from ...ir.scalar import Apply, Const, Scalar
from ..kernel import Axis, Dot, Kernel, Load, Position, free_axes, scalars
from .attention_parts import flat
from .legalize import UnsupportedByTriton, rewritten

if TYPE_CHECKING:
    from .product import Product


@dataclass(frozen=True)
class Groups:
    """Rows of groups, whose number is the batch: group n ends before the row that element first + n of a buffer says.

    The rows behind the last group are a group too, in which there is nothing to add up.
    """

    axis: Axis
    ends: str
    first: Dim

    @property
    def count(self) -> int:
        assert isinstance(self.axis.extent, int)
        return self.axis.extent


@dataclass(frozen=True)
class Blocks:
    """Blocks of a row of blocks, which is the batch: those numbered begin .. end are multiplied one after the other."""

    axis: Axis
    begin: Scalar
    end: Scalar
    batch: frozenset[str]


Parts = Union[Groups, Blocks]


def is_ragged(kernel: Kernel) -> bool:
    """Whether a kernel has contractions of parts that are not equally large."""
    return any(isinstance(v, Dot) and v.within for v in scalars(kernel.stores))


@dataclass(frozen=True)
class _Limits:
    """What a contraction is within, and the axis of its sum that numbers the parts."""

    at: Scalar
    begin: Scalar
    end: Scalar
    part: Axis


def one_part(kernel: Kernel) -> tuple[Kernel, _Limits | None]:
    """The kernel of one part, whose number is a grid axis, and what the parts are. Raises UnsupportedByTriton."""
    if not is_ragged(kernel):
        return kernel, None
    free = free_axes(kernel)
    found = [v for v in scalars(kernel.stores) if isinstance(v, Dot)]
    if len({(d.within, d.axes) for d in found}) > 1:
        _refuse(kernel, "its contractions are of different parts")
    at, begin, end = found[0].within
    numbers = {n for v in (at, begin, end) for n in free[v]} & set(found[0].axes)
    if len(numbers) != 1 or len(found[0].axes) < 2:
        _refuse(kernel, "the parts of its contraction are not numbered by one axis of the sum")
    (number,) = numbers
    parts: dict[Scalar, Scalar] = {d: replace(d, axes=tuple(a for a in d.axes if a != number), within=()) for d in found}
    axes = tuple(replace(a, inner=False) if a.name == number else a for a in kernel.axes)
    part = next(a for a in axes if a.name == number)
    return replace(kernel, axes=axes, stores=rewritten(kernel.stores, parts)), _Limits(at, begin, end, part)


def with_parts(product: Product, kernel: Kernel, limits: _Limits) -> Product:
    """The product of one part as one of all of them: the part is no row, column or batch of it. Raises UnsupportedByTriton."""
    free = free_axes(kernel)
    along = limits.part.name in free[limits.at]
    return (_blocks if along else _groups)(product, kernel, limits, free)


def _groups(product: Product, kernel: Kernel, limits: _Limits, free: dict[Scalar, frozenset[str]]) -> Product:
    part, rows = limits.part, free[limits.at]
    if rows & {a.name for a in product.columns}:
        operands = tuple((b, a) for a, b in product.operands)
        product = replace(product, operands=operands, rows=product.columns, columns=product.rows)
    batch = tuple(a for a in product.batch if a.name != part.name)
    columns = tuple(a for a in product.columns if a.name != part.name)
    position = limits.at.index if isinstance(limits.at, Position) else sympy.Integer(0)
    if batch or sympy.expand(position - flat(product.rows)) != 0:
        _refuse(kernel, "the rows of its groups are not the rows of its contraction")
    if not isinstance(part.extent, int):
        _refuse(kernel, "the number of its groups is known at the launch only")
    before, end = _read(kernel, limits.begin), _read(kernel, limits.end)
    shifted = sympy.expand(end.index.xreplace({part.symbol: part.symbol - 1}) - before.index)
    if before.buffer != end.buffer or shifted != 0 or before.mask is None or before.other != 0:
        _refuse(kernel, "a group does not begin where the one before ends")
    first = sympy.expand(end.index - part.symbol)
    if part.symbol in first.free_symbols:
        _refuse(kernel, "the ends of its groups are not side by side in memory")
    return replace(product, batch=(part,), columns=columns, parts=Groups(part, end.buffer, dim(first)))


def _read(kernel: Kernel, limit: Scalar) -> Load:
    """The load that a limit is."""
    while isinstance(limit, Apply) and limit.op == "cast":
        limit = limit.args[0]
    if not isinstance(limit, Load):
        _refuse(kernel, "the limits of its groups are computed")
    return limit


def _blocks(product: Product, kernel: Kernel, limits: _Limits, free: dict[Scalar, frozenset[str]]) -> Product:
    part, batch = limits.part, free[limits.begin] | free[limits.end]
    if limits.at.index != part.symbol if isinstance(limits.at, Position) else not isinstance(limits.at, Const):
        _refuse(kernel, "the limits of its blocks are not about their numbers")
    if batch & {n for pair in product.operands for v in pair for n in free_axes(product.kernel)[v]}:
        _refuse(kernel, "its operands depend on more than the blocks of a row")
    if not isinstance(product.size(product.depth), int):
        _refuse(kernel, "the width of its blocks is known at the launch only")
    others = batch | {part.name}
    if any(a.name not in others for a in product.batch):
        _refuse(kernel, "its blocks are those of a batch")
    rows, columns = (tuple(a for a in axes if a.name not in others) for axes in (product.rows, product.columns))
    rest = tuple(a for a in product.kernel.grid if a.name in batch)
    return replace(product, batch=rest, rows=rows, columns=columns, parts=Blocks(part, limits.begin, limits.end, batch))


def _refuse(kernel: Kernel, reason: str) -> NoReturn:
    raise UnsupportedByTriton(what=kernel.name, reason=reason)

"""Contractions of uneven parts as Triton functions: groups of rows, and blocks of a sparse matrix, whose limits are loaded.

    experts[i, j] = sum over k of x[i, k] * w[g, k, j], g the group of row i

      group, first, end: those of this program's block of rows, found from the ends of all groups
      m = first ..; for blocks of k: as in `contraction`; store at [m, n] where m < end

    sparse[i, j] = sum over blocks t of row j of x[i, columns[t]] @ values[t].T

      for t from begin to end, which are loaded: multiply and add; store at [m, n]

There is one launch for all groups: as many programs as there can be blocks of rows, of which those that have none return. What is written
is in the same order every time: no two programs add to one element.
"""

from __future__ import annotations

from dataclasses import replace

import sympy

from ...ir.dims import Dim, dim, floordiv, to_source
from ...ir.scalar import Apply, Scalar
from ..kernel import Kernel, Load, Store
from .contraction import DotPrinter
from .expressions import Expressions, Scope
from .indices import Span
from .layout import Dimension, Layout, extent_source
from .legalize import UnsupportedByTriton, legalize
from .operands import Operand
from .printer import module
from .product import Product, find_product
from .program import Program
from .ragged_roles import Blocks, Groups
from .scalars import ATOM
from .schedule import next_power_of_two
from .tiles import Tiles, refusal


def build_ragged(kernel: Kernel, tiles: Tiles) -> Program:
    """The program of a kernel with contractions of uneven parts. Raises UnsupportedByTriton, also where the tiles are not legal."""
    found = find_product(kernel)
    limit = refusal(kernel, tiles)
    if limit is not None:
        raise UnsupportedByTriton(what=f"{kernel.name} by these tiles", reason=limit)
    printer = (_GroupsPrinter if isinstance(found.parts, Groups) else _BlocksPrinter)(found, tiles)
    return Program(kernel, tiles, module([printer.function()]), (printer.launch(),))


class _Rows(Dimension):
    """The rows of a group, which end somewhere in a block."""

    @property
    def masked(self) -> bool:
        return True


class _GroupsPrinter(DotPrinter):
    """A program has a block of rows of one group."""

    def __init__(self, found: Product, tiles: Tiles) -> None:
        super().__init__(found, tiles)
        assert isinstance(found.parts, Groups)
        self.parts = found.parts
        self.m = _Rows(self.m.span, self.m.constant, self.m.block, shared=True)
        self.k, self.down = replace(self.k, looped=True), replace(self.down, looped=True)
        self.batch = Span(self.found.batch, self.unused("group"))
        self.found = replace(self.found, batch=())  # programs are not numbered by it
        self.first_row, self.end = self.unused("first_row"), self.unused("end")

    def counts(self) -> tuple[Dim, Dim]:
        """Blocks of rows: as many as there can be, whatever the groups, of which those behind the last are one."""
        rows, block, parts = self.m.span.extent, self.m.block, self.parts.count + 1
        if isinstance(rows, int):
            parts = min(parts, rows)  # each with a row at least: full blocks, and one that is not
        return dim(floordiv(dim(rows + parts * (block - 1)), block)), super().counts()[1]

    def start(self, writer: Expressions) -> None:
        """Which group and rows are this program's, if any."""
        super().start(writer)
        lines = writer.outer.lines
        count, ends = self.parts.count, f"{self.parts.ends}_ptr"
        if self.parts.first != 0:
            ends += f" + {to_source(self.parts.first)}"
        arguments = [ends, self._at["BLOCK_M"], extent_source(self.m.span), count, next_power_of_two(count + 1), "BLOCK_M"]
        found = f"_find_group({', '.join(map(str, arguments))}, {'tl.int64' if self.tiles.wide else 'tl.int32'})"
        lines.extend((f"{self.batch.flat}, {self.first_row}, {self.end} = {found}", f"if {self.batch.flat} > {count}:", "    return"))

    def position(self, dimension: Dimension, spread: str) -> list[str]:
        if dimension.constant != self.m.constant:
            return super().position(dimension, spread)
        flat = dimension.span.flat
        return [f"{flat} = ({self.first_row} + tl.arange(0, BLOCK_M)){spread}", f"{dimension.mask} = {flat} < {self.end}"]

    def range(self) -> str:
        """Behind the last group there is nothing to add up."""
        depth = f"tl.where({self.batch.flat} < {self.parts.count}, {extent_source(self.k.span)}, 0)"
        return f"for {self.k.span.flat}_start in range(0, {depth}, BLOCK_K):"


class _BlockWriter(Operand):
    """Operands, of which some values change with the block."""

    inside: frozenset[str] = frozenset()

    def _scope(self, axes: frozenset[str]) -> Scope:
        return self.body if self.body is not None and axes & self.inside else super()._scope(axes)


class _BlocksPrinter(DotPrinter):
    """A program has rows, and columns of one row of blocks."""

    writer = _BlockWriter

    def __init__(self, found: Product, tiles: Tiles) -> None:
        super().__init__(found, tiles)
        assert isinstance(found.parts, Blocks)
        self.parts = found.parts
        self.batch = Span(self.found.batch, self.unused("block_row"))
        self.limits = self.unused("begin"), self.unused("end")

    @property
    def repeats(self) -> bool:
        return True

    def operand(self, side: int, fixed: Dimension, beside: Expressions | None = None) -> Operand:
        writer = super().operand(side, fixed, beside)
        assert isinstance(writer, _BlockWriter)
        writer.inside = frozenset({self.parts.axis.name})
        return writer

    def start(self, writer: Expressions) -> None:
        """Which blocks are multiplied, too."""
        super().start(writer)
        values = tuple(Store("", sympy.Integer(0), _loaded(v)) for v in (self.parts.begin, self.parts.end))
        reader = Operand(legalize(replace(self.kernel, stores=values)), Layout(self.batch, None, ()), self.tiles, writer)
        most = extent_source(Span((self.parts.axis,), ""))
        for name, store, bound in zip(self.limits, reader.kernel.stores, ("tl.maximum({}, 0)", f"tl.minimum({{}}, {most})")):
            reader.prepare(store.value)
            cast = ".to(tl.int64)" if self.tiles.wide else "" if store.value.dtype.itemsize == 4 else ".to(tl.int32)"
            writer.outer.lines.append(f"{name} = {bound.format(reader.text(store.value).at(ATOM) + cast)}")

    def range(self) -> str:
        return f"for {self.parts.axis.name} in range({', '.join(self.limits)}):"


def _loaded(limit: Scalar) -> Scalar:
    """The limit as it is stored: 64 bits are not needed for it."""
    while isinstance(limit, Apply) and limit.op == "cast" and isinstance(limit.args[0], (Apply, Load)):
        limit = limit.args[0]
    return limit

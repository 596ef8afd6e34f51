"""Kernels with an attention as C++ functions on the vocabulary of attention.h.

    // k_attention: softmax(q @ k + mask) @ v    model.py:41
    void k_attention(const float* q, const float* k, const float* v, float* out, int threads)
      heads(...): for each head of keys and values
        query: writes one row of queries
        keys, values: rows in place, or copied where they are not contiguous
        bounds: which keys a row may attend to (causal, sliding window)
        score: from the products of one row to scores: scale, masks
        finish: from the result of one row to what is stored
        attend<...>(rows, keys, ..., query, bounds, score, finish)

What is printed is what differs between kernels. How tiles are walked is in the header.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import reduce

import sympy

from ...ir.dims import free_symbols, product, symbol
from ...ir.scalar import Apply, Const, Scalar
from ..attention_limits import LOG2_E, find_limits
from ..attentions import find_attention
from ..kernel import Axis, Buffer, Dot, Kernel, Load, Position, Store, cone
from .body import Scope
from .expressions import ADD, MULTIPLY, STORAGE, index_text, wrap
from .parts import PartPrinter
from .product import Rewrite
from .rows import Place, Scales, find_rows
from .schedule import CpuTarget

FEW_ROWS = 4  # so few queries read every key once: packing would not pay
TILE_ROWS = 48  # these meet every key at once, so none is packed for later
ROWS = 6  # of a register tile


def print_attention(kernel: Kernel, target: CpuTarget) -> str:
    """The kernel as the text of one C++ function; see print_kernel."""
    return AttentionPrinter(kernel, target).text()


class AttentionPrinter(PartPrinter):
    """Prints a kernel with one attention."""

    def __init__(self, kernel: Kernel, target: CpuTarget) -> None:
        super().__init__(kernel, target)
        self.found = find_attention(kernel)
        self.dot, (self.summed,) = self.found.only_dot, self.found.depths
        self.limits = find_limits(kernel, self.found.attend)
        self.factor = _factor(self.limits.inside, self.dot) if self.found.softmax else None
        self.dtype = self.found.attend.dtype
        self.kind = STORAGE[self.dtype]
        self.lanes = target.vector_bytes // self.dtype.itemsize
        self.callables = {name: self.names.fresh(name) for name in ("query", "keys", "values", "bounds", "score", "finish")}
        self.row = self.flat_name(self.found.rows, "row")
        self.reached = ""
        self.tile, self.begin, self.end = (self.names.fresh(name) for name in ("tile", "begin", "end"))

    def grid(self) -> None:
        found = self.found
        head = self.flat_name(found.batch, "head")
        part, parts = self.names.fresh("part"), self.names.fresh("parts")
        rows = self.size(*found.rows)
        width = sum(a.extent for a in (found.column, self.summed) if isinstance(a.extent, int))
        work = self.size(*found.rows, found.key, Axis("width", width))
        self.open(f"tile::heads({self.size(*found.batch)}, {rows}, {work}, threads, [=](int64_t {head}, int64_t {part}, int64_t {parts})")
        self.bind(found.batch, head, self.kernel.stores)
        self.writer(self.callables["query"], self.query(), self.row, found.rows, self.summed)
        self.bounds()
        widths = self.rows_of("keys", self.dot.right, self.summed), self.rows_of("values", found.attend.value, found.column)
        terms = self.key_terms()
        self.score(terms)
        self.finish()
        few, count = product(a.extent for a in found.rows), self.reached or self.size(found.key)
        direct, once = (isinstance(few, int) and few <= most for most in (FEW_ROWS, TILE_ROWS))
        vectors, weights = 4 if self.target.vector_bytes == 64 else 2, "tile::Soften" if found.softmax else "tile::Given"
        together = min((ROWS, ROWS - 1, ROWS - 2), key=lambda r: -(-few // r) * r) if once else ROWS
        shape = (few if direct else together, vectors, self.lanes, *widths, self.kind, weights)
        function, sizes = ("attend", f"{rows}, {count}, {part}, {parts}")
        if once:
            function, sizes = ("attend_few", count) if direct else ("attend_tile", f"{rows}, {count}")
        order = (self.callables[n] for n in ("keys", "values", "query", "bounds", "score", "finish"))
        self.line(f"tile::{function}<{', '.join(map(str, shape))}>({sizes}, {', '.join(order)});")
        self.close("});")

    # ---- operands

    def query(self) -> Scalar:
        """The left operand, so that products are scores to the base 2 where nothing else happens to them."""
        left = self.dot.left
        return left if self.factor is None else Apply(self.dtype, "mul", (left, Const(self.dtype, self.factor * LOG2_E)))

    def writer(self, name: str, value: Scalar, flat: str, rows: Sequence[Axis], column: Axis) -> None:
        """A lambda (tile, row) that writes the value for all columns."""
        stores = (Store(self.tile, column.symbol, value),)
        self.open(f"const auto {name} = [=]({self.kind}* {self.tile}, int64_t {flat})")
        self.bind(rows, flat, stores)
        self.walk(column, ("0", self.size(column)), stores, (Buffer(self.tile, self.dtype, column.extent),))
        self.close("};")

    def rows_of(self, name: str, value: Scalar, column: Axis) -> int:
        """Declares the rows of keys or values; returns how many columns they have, a multiple of the lanes."""
        used, key = column.extent, self.found.key
        assert isinstance(used, int)
        wide = -(-used // self.lanes) * self.lanes
        rows = find_rows(value, key, column, self.lanes)
        if rows is not None:
            self.line(f"const {self.rows_text(*rows, self.callables[name])};")
            return wide
        write, memory = self.names.fresh(name + "_row"), self.names.fresh(name + "_copy")
        self.writer(write, value, key.name, (key,), column)
        count = self.seen()
        self.line(f"tile::Row<{self.kind}> {memory}({count}*{wide});")
        self.line(f"const auto {self.callables[name]} = tile::copied<{used}, {wide}>({memory}, {count}, {write});")
        return wide

    def rows_text(self, place: Place, scales: Scales | None, name: str) -> str:
        """The declaration of rows that are read where they lie."""
        storage, at, ld = self.place_text(place)
        if scales is None:
            return f"tile::Rows<{storage}> {name} = {{{at}, {ld}}}"
        kind, first, step = self.place_text(scales.place)
        return f"tile::Levels<{storage}, {kind}, {scales.zero}, {step}, {scales.half}> {name} = {{{at}, {ld}, {first}}}"

    def place_text(self, place: Place) -> tuple[str, str, str]:
        """(type of an element, the first row, elements between rows) as C++."""
        buffer, storage = self.names.buffers[place.load.buffer], STORAGE[self.kernel.buffer(place.load.buffer).dtype]
        at = buffer if place.start == 0 else f"{buffer} + {wrap(index_text(place.start, {}), ADD)}"
        return storage, at, index_text(place.ld, {})[0]

    def seen(self) -> str:
        """How many keys any row attends to at most: no more are copied, so what a cache does not hold yet costs nothing."""
        if not self.limits.ends:
            return wrap(index_text(self.found.key.extent, {}), MULTIPLY)
        if not self.reached:
            self.reached = self.names.fresh("seen")
            sizes = f"{self.size(*self.found.rows)}, {self.size(self.found.key)}"
            self.line(f"const int64_t {self.reached} = tile::seen({sizes}, {self.callables['bounds']});")
        return self.reached

    # ---- scores and results

    def bounds(self) -> None:
        """The lambda that says which keys a row attends to."""
        begins, ends = self.limits.begins, self.limits.ends
        self.open(f"const auto {self.callables['bounds']} = [=](int64_t {self.row})")
        self.bind(self.found.rows, self.row, [Store("", sympy.Integer(0), v) for v in (*begins, *ends)])
        scope = Scope(frozenset())
        self.body.emit([*begins, *ends], scope)
        begin = _chosen("most_of", ["0", *(scope.texts[v][0] for v in begins)])
        end = _chosen("least_of", [self.size(self.found.key), *(scope.texts[v][0] for v in ends)])
        self.line(f"return tile::Bounds{{{begin}, {end}}};")
        self.close("};")

    def key_terms(self) -> dict[Scalar, Load]:
        """Computes what the score takes from the key alone, padding masks for instance, once for all rows of a head."""
        key, rows, terms = self.found.key, {a.name for a in self.found.rows}, {}
        stack = [self.limits.inside]
        while stack:
            value = stack.pop()
            if not isinstance(value, Apply) or value in terms:
                continue
            below = cone([value])
            used = {s.name for s in free_symbols([v.index for v in below if isinstance(v, (Load, Position))])}
            if value.dtype != self.dtype or used & rows or key.name not in used or self.dot in below:
                stack.extend(value.args)
                continue
            name, memory = self.names.fresh("term"), self.names.fresh("term_memory")
            self.line(f"tile::Row<{self.kind}> {memory}({self.size(key)});")
            self.line(f"{self.kind}* const {name} = {memory};")
            self.walk(key, ("0", self.size(key)), (Store(name, key.symbol, value),), (Buffer(name, self.dtype, key.extent),))
            terms[value] = Load(self.dtype, name, key.symbol)
        return terms

    def score(self, terms: dict[Scalar, Load]) -> None:
        """The lambda that turns products of one row with keys begin .. end into scores, in place; none for scores that are products."""
        if self.factor is not None:
            self.line(f"const tile::Plain {self.callables['score']};")
            return
        key, dot = self.found.key, self.dot
        at = key.symbol - symbol(self.begin)
        stores = (Store(self.tile, at, Rewrite({dot: Load(dot.dtype, self.tile, at), **terms}, {})(self.limits.inside)),)
        parameters = f"{self.kind}* {self.tile}, int64_t {self.row}, int64_t {self.begin}, int64_t {self.end}"
        self.open(f"const auto {self.callables['score']} = [=]({parameters})")
        self.bind(self.found.rows, self.row, stores)
        some = symbol("some")  # a part of the keys, whose number is known at run time
        buffers = (Buffer(name, self.dtype, some) for name in (self.tile, *(t.buffer for t in terms.values())))
        self.walk(replace(key, extent=some), (self.begin, self.end), stores, tuple(buffers))
        self.close("};")

    def finish(self) -> None:
        """The lambda that stores one row: the kernel itself, with the attention a load from the result."""
        column, attend = self.found.column, self.found.attend
        rewrite = Rewrite({attend: Load(attend.dtype, self.tile, column.symbol)}, {})
        stores = tuple(rewrite.store(s) for s in self.kernel.stores)
        self.open(f"const auto {self.callables['finish']} = [=](const {self.kind}* {self.tile}, int64_t {self.row})")
        self.bind(self.found.rows, self.row, stores)
        self.walk(column, ("0", self.size(column)), stores, (Buffer(self.tile, self.dtype, column.extent),))
        self.close("};")


def _chosen(function: str, texts: Sequence[str]) -> str:
    """The least or the most of several integers, as C++."""
    return reduce(lambda chosen, text: f"{function}({chosen}, int64_t({text}))", texts[1:], texts[0])


def _factor(score: Scalar, dot: Dot) -> float | None:
    """What the score multiplies the product by, None where it does something else."""
    if score is dot:
        return 1.0
    if isinstance(score, Apply) and score.op == "mul" and dot in score.args:
        other = score.args[score.args[0] is dot]
        return float(other.value) if isinstance(other, Const) else None
    return None

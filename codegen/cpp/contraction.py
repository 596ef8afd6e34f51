"""Kernels with a contraction as C++ functions on the vocabulary of dot.h.

    // k_linear_gelu: gelu(x @ w + b)    model.py:41
    void k_linear_gelu(const float* x, const float* w, const float* b, float* out, int threads)
      left: writes one row of the left operand          (casts, gathers, masks: whatever it is computed from)
      right: panels of the right operand, read in place or copied
      finish: from the sums of one row to what is stored
      product<8, float>(rows, columns, depth, threads, left, right, finish)

What is printed is what differs between kernels: these three. How tiles are walked is in the header.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import sympy
import torch

from ...ir.dims import Dim, FloorDiv, Mod, free_symbols, product, symbol
from ...ir.scalar import Scalar
from ..errors import Unsupported
from ..hashcons import shared
from ..kernel import Axis, Buffer, Kernel, Load, Position, Reduce, Scan, Store, cone, operands
from .body import Scope, row_index
from .expressions import ADD, STORAGE, index_text, wrap
from .integers import in_int32, words_of
from .lanes import stride_along
from .plan import Phase, plan_block
from .printer import KernelPrinter, print_kernel
from .product import Rewrite, Right, dots, find_product, flatten, merge, plan_right, without_matrix
from .runs import Runs, find_images, find_runs
from .schedule import CpuTarget, Schedule, default_schedule
from .windows import print_reduction
from .words import Words, word_axes

WORD_ROWS = 8  # of a right operand that are computed at once where bytes of words are read
FEW_TILE_ROWS = 4  # of a tile whose right operand is turned into numbers as it is read
UNALIGNED = 1 << 40  # lanes of a block that may begin anywhere: no modulus is a multiple


def print_any(kernel: Kernel, target: CpuTarget) -> str:
    """The kernel as the text of one C++ function, by the printer for its kind; see print_kernel."""
    if not dots(kernel):
        return print_reduction(kernel, target)
    plain = without_matrix(kernel)
    if plain is not None:
        return print_kernel(plain, default_schedule(plain, target))
    return ContractionPrinter(kernel, target).text()


class ContractionPrinter(KernelPrinter):
    """Prints a kernel with one product of matrices."""

    def __init__(self, kernel: Kernel, target: CpuTarget) -> None:
        super().__init__(kernel, Schedule(vector=None, lanes=1))
        self.target = target
        self.found = find_product(kernel, target)
        self.plan = plan_right(kernel, self.found, target)
        self.words_read: tuple[Buffer, ...] = ()
        if self.plan.kind in ("from_rows", "from_columns"):
            right, self.words_read = in_int32(self.found.right, kernel)
            self.found = replace(self.found, right=right)
            self.plan = plan_right(kernel, self.found, target)
        self.left_runs = find_runs(kernel, self.found, self.plan)
        if self.plan.kind == "bytes":  # the walk takes them as they are
            self.found = replace(self.found, left=operands(self.found.left)[0])
        self.kind = STORAGE[self.found.dot.dtype]
        self.m, self.n, self.k = (self.names.fresh(name) for name in "mnk")
        self.names.buffers |= {name: name for name in ("to", "sums")}  # of the lambdas
        self.names.buffers |= {words_of(b.name): f"((const int32_t*){self.names.buffers[b.name]})" for b in kernel.inputs}

    def grid(self) -> None:
        """The body of the function: one product, or one for each point of the batch."""
        batch = self.found.batch
        if not batch:
            self.product()
            return
        flat = self.flat_name(batch, "batch")
        work = self.size(*self.found.rows, *self.found.columns, *self.found.depth)
        self.open(f"batches({self.size(*batch)}, {work}, threads, [=](int64_t {flat}, int threads)")
        self.bind(batch, flat, [s.value for s in self.kernel.stores], [s.index for s in self.kernel.stores])
        self.product()
        self.close("});")

    def product(self) -> None:
        found, runs = self.found, self.left_runs
        if runs is None:
            self.left()
        else:
            self.runs(runs)
        call = self.right()
        self.finish()
        rows, sizes = self.plan.blocks.rows, [self.size(*axes) for axes in (found.rows, found.columns, found.depth)]
        if runs is None:
            self.line(f"{call}({', '.join(sizes)}, threads, left, right, finish);")
            return
        data = self.names.buffers[runs.load.buffer]
        images = find_images(found, runs) if self.plan.kind == "panels" else None
        if images is not None:
            points = ", ".join(map(str, images))
            self.line(f"winograd<{rows}>(Images{{{points}}}, {sizes[1]}, {runs.size}, threads, {data}, left, right, finish);")
            return
        pieces, sizes[2:] = self.size(*((runs.step,) if runs.step else ())), [self.size(*runs.taps), str(runs.size)]
        walk = "product_of_runs" if self.plan.kind == "panels" else "product_of_runs_packed"
        self.line(f"{walk}<{rows}, {pieces}>({', '.join(sizes)}, threads, {data}, left, right, finish);")

    # ---- positions

    def size(self, *axes: Axis) -> str:
        return index_text(product(a.extent for a in axes), {})[0]

    def flat_name(self, axes: Sequence[Axis], name: str) -> str:
        """What the flat position over the axes is called: a single axis is its own."""
        return axes[0].name if len(axes) == 1 else name

    def bind(self, axes: Sequence[Axis], flat: str, roots: Sequence[Scalar], indices: Sequence[Dim] = ()) -> None:
        """Variables for those of several axes that the values under the roots or the indices use."""
        if len(axes) < 2:
            return
        indices = [*indices, *(v.index for v in cone(roots) if isinstance(v, (Load, Position)))]
        used = {s.name for s in free_symbols(indices)}
        places = flatten(axes, symbol(flat))
        parts = [f"{a.name} = {index_text(places[a.name], {})[0]}" for a in axes if a.name in used]
        if parts:
            self.line(f"const int64_t {', '.join(parts)};")

    def part(
        self,
        axes: Sequence[Axis],
        stores: Sequence[Store],
        inputs: Sequence[Buffer] = (),
        outputs: Sequence[Buffer] = (),
        lanes: int | None = None,
    ) -> KernelPrinter:
        """A printer of stores over some axes, all others being bound, whose lines go here. lanes: 1 for scalar code."""
        axes = tuple(replace(a, inner=True) for a in axes)
        kernel = replace(self.kernel, axes=axes, stores=tuple(stores), inputs=(*self.kernel.inputs, *self.words_read, *inputs))
        kernel = replace(kernel, outputs=tuple(outputs), inplace=()) if outputs else kernel
        schedule = Schedule(vector=None, lanes=1) if lanes == 1 else replace(default_schedule(kernel, self.target), split=False)
        printer = KernelPrinter(kernel, schedule)
        printer.lines, printer.depth = self.lines, self.depth
        printer.names = printer.body.names = self.names
        return printer

    # ---- operands

    def left(self) -> None:
        found = self.found
        self.whole("left", found.left, found.rows, self.m, found.depth)

    def runs(self, runs: Runs) -> None:
        """A lambda (row, m) that says where the runs of row m begin and what of them is inside."""
        rows, mask = self.found.rows, runs.load.mask
        at = self.flat_name(rows, self.m)
        step = (runs.step,) if runs.step else ()
        self.open(f"const auto left = [=](auto& row, int64_t {at}) LANES")
        self.bind(rows, at, [runs.load])
        to = self.written((), runs.load.dtype)
        printer = self.part((*runs.taps, *step), [Store("to", row_index([]), runs.load)], outputs=[to], lanes=1)
        scope = Scope(frozenset())
        for axis in runs.taps:
            printer.hoist([mask] if mask else [], scope)
            printer.open(f"for (int64_t {axis.name} = 0; {axis.name} < {index_text(axis.extent, {})[0]}; {axis.name}++)")
            scope = scope.inner([axis.name])
        printer.hoist([mask] if mask else [], scope)
        printer.open(f"row.run({index_text(runs.start, {})[0]}, [=](int64_t{''.join(f' {a.name}' for a in step)}) LANES")
        scope = scope.inner([a.name for a in step])
        printer.body.emit([mask] if mask else [], scope)
        printer.line(f"return {scope.texts[mask][0] if mask else 'true'};")
        printer.close("});")
        for _ in runs.taps:
            printer.close()
        self.close("};")

    def right(self) -> str:
        """Declares the right operand; returns the function that multiplies by it, with its first template arguments."""
        found, plan = self.found, self.plan
        blocks, tile = f"{plan.blocks.vectors}, {plan.blocks.lanes}", f"<{plan.blocks.rows}, {self.kind}>"
        rows = product(a.extent for a in found.rows)
        if plan.words is not None:
            self.words(plan, plan.words, blocks)
            few = max(1, min(rows, FEW_TILE_ROWS)) if isinstance(rows, int) else FEW_TILE_ROWS
            tiles = f"{few}, {plan.blocks.rows}" if plan.kind == "words" else plan.blocks.rows
            return f"product_of_{plan.kind}<{tiles}>"
        if plan.load is not None:
            self.plain(plan, blocks)
            walk = {"turned": "product_packed" if isinstance(rows, int) else "product_turned", "widened": "product_packed"}
            return walk.get(plan.kind, "product") + tile
        if plan.kind == "from_columns":
            self.whole("column", found.right, found.columns, self.n, found.depth)
        else:
            several = word_axes(found.depth, WORD_ROWS) if self.words_read else None
            if several is not None:
                return self.word_rows(blocks, *several) + tile
            self.ranged("row", [found.right], found.depth, self.k, found.columns)
        sizes = f"{self.size(*found.columns)}, {self.size(*found.depth)}"
        self.line(f"const auto right = {plan.kind}<{blocks}>({sizes}, {plan.kind.removeprefix('from_').removesuffix('s')});")
        return "product_packed" + tile

    def word_rows(self, blocks: str, axes: Sequence[Axis], places: Sequence[Mapping[str, sympy.Expr]]) -> str:
        """Declares a right operand of which several rows are computed at once, from the words that hold all of them."""
        values = [Rewrite({}, place)(self.found.right) for place in places]
        self.ranged("rows", values, axes, self.k, self.found.columns, self.plan.blocks.columns)
        sizes = f"{self.size(*self.found.columns)}, {self.size(*self.found.depth)}"
        self.line(f"const auto right = from_word_rows<{blocks}, {WORD_ROWS}>({sizes}, rows);")
        return "product_packed"

    def words(self, plan: Right, words: Words, blocks: str) -> None:
        """Declares a right operand of levels in words."""
        assert plan.n is not None and plan.load is not None
        start = index_text(words.start.subs(plan.n, symbol(self.n)), {})
        place = f"[=](int64_t {self.n}) {{ return {self.names.buffers[plan.load.buffer]} + {wrap(start, ADD)}; }}"
        ld = words.ld // 4
        if plan.kind == "bytes":
            self.line(f"const auto right = byte_panels<{blocks}>({ld}, {place});")
            return
        move, parts = Rewrite({}, words.places), {"scale": words.scale, "zero": words.zero}
        for name, value in parts.items():
            if value is not None:
                self.ranged(name, [move(value)], words.axes, "group", self.found.columns)
        sizes = f"{self.size(*self.found.columns)}, {self.size(*self.found.depth)}, {words.group}, {ld}"
        level = f"{words.level.bits}, {'true' if words.level.signed else 'false'}"
        zero = "Nothing{}" if words.zero is None else "zero"
        self.line(f"const auto right = words<{blocks}, {level}>({sizes}, {place}, scale, {zero});")

    def plain(self, plan: Right, blocks: str) -> None:
        """Declares a right operand that is in memory as it is needed."""
        assert plan.load is not None and plan.n is not None and plan.start is not None and plan.ld is not None
        found, buffer = self.found, self.names.buffers[plan.load.buffer]
        storage = STORAGE[self.kernel.buffer(plan.load.buffer).dtype]
        ld = index_text(plan.ld, {})[0]
        at = symbol(self.n) if plan.kind in ("panels", "widened") else 0
        start = index_text(plan.start.subs(plan.n, at), {})  # type: ignore[arg-type]
        place = buffer if start[0] == "0" else f"{buffer} + {wrap(start, ADD)}"
        sizes = f"{self.size(*found.columns)}, {self.size(*found.depth)}"
        if plan.kind == "panels":
            self.line(f"const auto right = panels<{blocks}>({ld}, [=](int64_t {self.n}) {{ return {place}; }});")
        elif plan.kind == "widened":
            depth = self.size(*found.depth)
            self.line(f"const auto right = widened_panels<{blocks}>({ld}, {depth}, [=](int64_t {self.n}) {{ return {place}; }});")
        elif plan.kind == "turned":
            self.line(f"const auto right = turned<{blocks}>({place}, {ld}, {sizes});")
        elif plan.kind == "row_major":
            self.line(f"const RowMajor<{storage}, {blocks}> right({place}, {ld}, {sizes});")
        else:
            self.line(f"const Columns<{storage}, {plan.blocks.lanes}> right{{{place}, {ld}, {self.size(*found.columns)}}};")

    def whole(self, name: str, value: Scalar, fixed: Sequence[Axis], flat: str, along: Sequence[Axis]) -> None:
        """A lambda (to, position over `fixed`) that writes the value at all positions over `along`."""
        value, along = merge(value, along)
        at = self.flat_name(fixed, flat)
        others = {a.name for a in (*self.kernel.grid, *self.found.depth)}
        axes = (*along, *(a for a in self.kernel.inner if a.name not in others))
        store = Store("to", row_index([(a.name, a.extent) for a in along]), value)
        self.open(f"const auto {name} = [=]({STORAGE[value.dtype]}* to, int64_t {at})")
        self.bind(fixed, at, [value])
        printer = self.part(axes, [store], outputs=[self.written(along, value.dtype)])
        block = plan_block(printer.kernel, printer.free, frozenset(), [store], [], set())
        for row in printer.choose_rows(block, frozenset(), False):
            printer.line(row)
        printer.phases(block.phases, Scope(frozenset()))
        self.close("};")

    def ranged(self, name: str, values: Sequence[Scalar], fixed: Sequence[Axis], flat: str, along: Sequence[Axis], apart: int = 0) -> None:
        """A lambda (to, position over `fixed`, begin, end) that writes values at flat positions begin .. end over `along`.

        apart: how far behind each other in memory one value's are and the next one's.
        """
        if len(values) == 1:
            value, along = merge(values[0], along)
            values = [value]
        if any(isinstance(v, (Reduce, Scan)) for v in cone(values)):
            raise Unsupported(reason="a right operand with a reduction")
        at = self.flat_name(fixed, flat)
        inner = along[-1] if along else Axis(self.n, 1)
        several = len(along) > 1
        first, last = ("first", "last") if several else ("begin", "end")
        dtype = values[0].dtype
        self.open(f"const auto {name} = [=]({STORAGE[dtype]}* to, int64_t {at}, int64_t begin, int64_t end)")
        self.bind(fixed, at, values)
        if several:
            self.segments(along[:-1], inner, values)
        index = inner.symbol - symbol(first) + (symbol("at") if several else 0)
        stores = shared([Store("to", index + apart * n, value) for n, value in enumerate(values)])
        printer = self.part([inner], stores, outputs=[self.written(along, dtype)])
        self.row_loop(printer, inner.name, first, last, symbol("end") if several else inner.extent, aligned=not several)
        if several:
            self.close("});")
        self.close("};")

    def written(self, along: Sequence[Axis], dtype: torch.dtype) -> Buffer:
        return Buffer("to", dtype, product(a.extent for a in along))

    # ---- results

    def finish(self) -> None:
        """The lambda that turns sums into what is stored: the kernel itself, with the contraction a load of sums."""
        found = self.found
        m, n = self.flat_name(found.rows, self.m), self.flat_name(found.columns, self.n)
        sums = Load(found.dot.dtype, "sums", symbol(n) - symbol("begin"))
        places = flatten(found.columns, symbol(n)) if len(found.columns) > 1 else {}
        rewrite = Rewrite({found.dot: sums}, places)
        stores = self.along_rows([rewrite.store(s) for s in self.kernel.stores])
        self.open(f"const auto finish = [=](const {self.kind}* sums, int64_t {m}, int64_t begin, int64_t end)")
        self.bind(found.rows, m, [s.value for s in stores], [s.index for s in stores])
        lanes = self.target.vector_bytes // 4
        if all(stride_along(s.index, symbol(n), lanes) is not None for s in stores):
            extent = product(a.extent for a in found.columns)
            printer = self.part([Axis(n, extent)], stores, inputs=[self.sums(extent)])
            self.row_loop(printer, n, "begin", "end", extent)
        else:
            self.finish_segments()
        self.close("};")

    def along_rows(self, stores: list[Store]) -> list[Store]:
        """The stores by the flat position over the rows, where that saves dividing it."""
        if len(self.found.rows) < 2:
            return stores
        flat = symbol(self.m)
        rewrite = Rewrite({}, flatten(self.found.rows, flat))
        merged = [rewrite.store(s) for s in stores]
        values = cone([s.value for s in merged])
        indices = [*(s.index for s in merged), *(v.index for v in values if isinstance(v, (Load, Position)))]
        return stores if any(flat in a.free_symbols for i in indices for a in i.atoms(FloorDiv, Mod)) else merged

    def finish_segments(self) -> None:
        """The same where the columns lie in several pieces: a loop over each."""
        *_, last = columns = self.found.columns
        sums = Load(self.found.dot.dtype, "sums", last.symbol - symbol("first") + symbol("at"))
        rewrite = Rewrite({self.found.dot: sums}, {})
        stores = [rewrite.store(s) for s in self.kernel.stores]
        self.segments(columns[:-1], last, [s.value for s in stores], [s.index for s in stores])
        printer = self.part([last], stores, inputs=[self.sums(last.extent)])
        self.row_loop(printer, last.name, "first", "last", symbol("end"), aligned=False)
        self.close("});")

    def segments(self, outer: Sequence[Axis], inner: Axis, roots: Sequence[Scalar], indices: Sequence[Dim] = ()) -> None:
        """Opens the loop over the parts of begin .. end that lie in one row of the inner axis."""
        name = self.flat_name(outer, "outer")
        extent = index_text(inner.extent, {})[0]
        self.open(f"segments(begin, end, {extent}, [&](int64_t {name}, int64_t first, int64_t last, int64_t at)")
        self.bind(outer, name, roots, indices)

    def sums(self, size: Dim) -> Buffer:
        return Buffer("sums", self.found.dot.dtype, size)

    def row_loop(self, printer: KernelPrinter, n: str, begin: str, end: str, extent: Dim, aligned: bool = True) -> None:
        """The loop over part of an axis that stores what the printer's kernel stores; aligned: `begin` is a multiple of the lanes."""
        if not aligned:
            printer.analysis.lanes = UNALIGNED
        stores = list(printer.kernel.stores)
        scope = Scope(frozenset())
        printer.hoist([s.value for s in stores], scope)
        vector = printer.schedule.vector is not None
        if vector:
            printer.open(f"each<{printer.lane_counts(extent)}>({begin}, {end}, [&]<int L>(int64_t {n}) LANES")
        else:
            printer.open(f"for (int64_t {n} = {begin}; {n} < {end}; {n}++)")
        printer.innermost(Phase(stores=stores), [], scope.inner([n], "L" if vector else None))
        printer.close("});" if vector else "}")

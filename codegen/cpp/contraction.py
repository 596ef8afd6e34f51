"""Kernels with a contraction as C++ functions on the vocabulary of dot.h.

    // k_linear_gelu: gelu(x @ w + b)    model.py:41
    void k_linear_gelu(const float* x, const float* w, const float* b, float* out, int threads)
      left: writes one row of the left operand          (casts, gathers, masks: whatever it is computed from)
      right: panels of the right operand, read in place or copied
      finish: from the sums of one row to what is stored
      product<8, 3, 16>(rows, columns, depth, threads, left, right, finish)

What is printed is what differs between kernels: these three. How tiles are walked is in the header.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import sympy

from ...ir.dims import Dim, free_symbols, product, symbol
from ...ir.scalar import Scalar
from ..kernel import Axis, Buffer, Kernel, Load, Position, Store, cone, scalars
from .body import Scope, row_index
from .expressions import ADD, MULTIPLY, STORAGE, index_text, wrap
from .plan import Phase, plan_block
from .printer import KernelPrinter, print_kernel
from .product import FEW_ROWS, InPlace, Rewrite, blocks_for, dots, find_product, flatten, panel_of, without_matrix
from .schedule import CpuTarget, Schedule, default_schedule


def print_any(kernel: Kernel, target: CpuTarget) -> str:
    """The kernel as the text of one C++ function, by the printer for its kind; see print_kernel."""
    if not dots(kernel):
        return print_kernel(kernel, default_schedule(kernel, target))
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
        self.blocks = blocks_for(self.found, target)
        self.kind = STORAGE[self.found.dot.dtype]
        self.callables = {name: self.names.fresh(name) for name in ("left", "right", "finish")}

    def grid(self) -> None:
        """The body of the function: one product, or one for each point of the batch."""
        if not self.found.batch:
            self.product()
            return
        flat = self.flat_name(self.found.batch, "batch")
        work = wrap(self.size(*self.found.rows, *self.found.columns, *self.found.depth), MULTIPLY)
        self.open(f"batches({self.size(*self.found.batch)[0]}, {work}, threads, [=](int64_t {flat}, int threads)")
        self.bind(self.found.batch, flat, self.found.dot, [s.index for s in self.kernel.stores])
        self.product()
        self.close("});")

    def product(self) -> None:
        found, blocks = self.found, self.blocks
        sizes = ", ".join(self.size(*axes)[0] for axes in (found.rows, found.columns, found.depth))
        self.writer(self.callables["left"], found.left, found.rows, found.depth, "m")
        self.right()
        self.finish()
        shape = f"{blocks.rows}, {blocks.vectors}, {blocks.lanes}, {self.kind}"
        self.line(f"product<{shape}>({sizes}, threads, {', '.join(self.callables.values())});")

    # ---- positions

    def size(self, *axes: Axis) -> tuple[str, int]:
        return index_text(product(a.extent for a in axes), {})

    def flat_name(self, axes: Sequence[Axis], name: str) -> str:
        """What the flat position over the axes is called: a single axis is its own."""
        return axes[0].name if len(axes) == 1 else self.names.fresh(name)

    def bind(self, axes: Sequence[Axis], flat: str, root: Scalar | None, indices: Sequence[Dim] = ()) -> None:
        """Variables for those of several axes that the values under `root` or the indices use."""
        if len(axes) < 2:
            return
        used = {s.name for s in free_symbols(indices)}
        for value in cone([root] if root is not None else []):
            if isinstance(value, (Load, Position)):
                used |= {s.name for s in free_symbols([value.index])}
        places = flatten(axes, symbol(flat))
        parts = [f"{a.name} = {index_text(places[a.name], {})[0]}" for a in axes if a.name in used]
        if parts:
            self.line(f"const int64_t {', '.join(parts)};")

    def within(self, kernel: Kernel, schedule: Schedule) -> KernelPrinter:
        """A printer of a part, whose lines go here."""
        part = KernelPrinter(kernel, schedule)
        part.lines, part.depth = self.lines, self.depth
        part.names = part.body.names = self.names
        return part

    # ---- operands

    def writer(self, name: str, value: Scalar, fixed: Sequence[Axis], along: Sequence[Axis], flat: str) -> None:
        """A lambda (to, position over `fixed`) that writes the value at all positions over `along`."""
        to, at = self.names.fresh("to"), self.flat_name(fixed, flat)
        self.names.buffers[to] = to
        own = {a.name for a in (*self.kernel.grid, *self.found.depth)}
        axes = tuple(replace(a, inner=True) for a in along) + tuple(a for a in self.kernel.inner if a.name not in own)
        index = row_index([(a.name, a.extent) for a in along])
        part = replace(
            self.kernel, axes=axes, outputs=(Buffer(to, self.found.dot.dtype, product(a.extent for a in along)),),
            stores=(Store(to, index, value),), inplace=(),
        )  # fmt: skip
        printer = self.within(part, replace(default_schedule(part, self.target), split=False))
        self.open(f"const auto {name} = [=]({self.kind}* {to}, int64_t {at})")
        self.bind(fixed, at, value)
        printer.depth = self.depth
        block = plan_block(part, printer.free, frozenset(), list(part.stores), [], set())
        for row in printer.choose_rows(block, frozenset(), False):
            printer.line(row)
        printer.phases(block.phases, Scope(frozenset()))
        self.close("};")

    def right(self) -> None:
        """Panels of the right operand: where it lies, or copied by its rows or by its columns, whichever are contiguous."""
        found, name = self.found, self.callables["right"]
        place = panel_of(self.kernel, found, self.blocks)
        if place is not None and self.in_place(place):
            return
        by_columns = self.contiguous(found.depth) > self.contiguous(found.columns)
        writer = self.names.fresh("column" if by_columns else "row")
        fixed, along = (found.columns, found.depth) if by_columns else (found.depth, found.columns)
        self.writer(writer, found.right, fixed, along, "n" if by_columns else "k")
        method = f"turned<{self.blocks.lanes}>" if by_columns else "rows"
        self.line(f"Packed<{self.kind}, {self.blocks.columns}> {name}({self.size(*found.columns)[0]}, {self.size(*found.depth)[0]});")
        self.line(f"{name}.{method}(threads, {writer});")

    def in_place(self, place: InPlace) -> bool:
        """Declares the panels of an operand that need not be copied; False where copying is better."""
        name, buffer = self.callables["right"], self.names.buffers[place.load.buffer]
        storage = STORAGE[self.kernel.buffer(place.load.buffer).dtype]
        ld = index_text(place.ld, {})[0]
        if place.overrun and place.compact:
            n = self.names.fresh("n")
            start = index_text(place.start.subs(place.n, symbol(n)), {})
            self.line(f"const auto {name} = [=](int64_t {n}) {{ return Panel<{storage}>{{{buffer} + {wrap(start, ADD)}, {ld}}}; }};")
            return True
        rows = product(a.extent for a in self.found.rows)
        base = sympy.expand(place.start - place.n)
        if not (place.compact or isinstance(rows, int) and rows <= FEW_ROWS) or place.n in base.free_symbols:
            return False
        start = "" if base == 0 else f" + {wrap(index_text(base, {}), ADD)}"
        sizes = ", ".join(self.size(*axes)[0] for axes in (self.found.columns, self.found.depth))
        self.line(f"const RowMajor<{storage}, {self.blocks.columns}> {name}({buffer}{start}, {ld}, {sizes});")
        return True

    def contiguous(self, axes: Sequence[Axis]) -> int:
        """How many loads of the right operand are contiguous along one of the axes."""
        loads = [v for v in cone([self.found.right]) if isinstance(v, Load)]
        return sum(any(sympy.expand(v.index.subs(a.symbol, a.symbol + 1) - v.index) == 1 for a in axes) for v in loads)

    # ---- results

    def finish(self) -> None:
        """The lambda that turns sums into what is stored: the kernel itself, with the contraction a load from the tile."""
        found = self.found
        tile, begin, end = (self.names.fresh(name) for name in ("tile", "begin", "end"))
        m, n = self.flat_name(found.rows, "m"), self.flat_name(found.columns, "n")
        self.names.buffers[tile] = tile
        sums = Load(found.dot.dtype, tile, symbol(n) - symbol(begin))
        places = flatten(found.columns, symbol(n)) if len(found.columns) > 1 else {}
        rewrite = Rewrite({found.dot: sums}, places)
        columns = product(a.extent for a in found.columns)
        stores = tuple(rewrite.store(s) for s in self.kernel.stores)
        inputs = (*self.kernel.inputs, Buffer(tile, found.dot.dtype, columns))
        part = replace(self.kernel, axes=(Axis(n, columns, True),), inputs=inputs, stores=stores)
        printer = self.within(part, replace(default_schedule(part, self.target), split=False))
        self.open(f"const auto {self.callables['finish']} = [=](const {self.kind}* {tile}, int64_t {m}, int64_t {begin}, int64_t {end})")
        indices = [s.index for s in stores] + [v.index for v in scalars(stores) if isinstance(v, (Load, Position))]
        self.bind(found.rows, m, None, indices)
        printer.depth = self.depth
        self.row_loop(printer, n, begin, end, columns)
        self.close("};")

    def row_loop(self, printer: KernelPrinter, n: str, begin: str, end: str, columns: Dim) -> None:
        stores = list(printer.kernel.stores)
        scope = Scope(frozenset())
        printer.hoist([s.value for s in stores], scope)
        if printer.schedule.vector is None:
            printer.open(f"for (int64_t {n} = {begin}; {n} < {end}; {n}++)")
            inside = scope.inner([n])
        else:
            printer.open(f"each<{printer.lane_counts(columns)}>({begin}, {end}, [&]<int L>(int64_t {n}) LANES")
            inside = scope.inner([n], "L")
        printer.innermost(Phase(stores=stores), [], inside)
        printer.close("}" if printer.schedule.vector is None else "});")

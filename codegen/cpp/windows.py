"""Kernels with a window as C++ functions on the vocabulary of windows.h.

    // k_conv_relu: relu(conv(x, w))    model.py:41
    void k_conv_relu(const float* x, const float* w, float* out, int threads)
      taps: the weights with their channels in order
      parallel over images and rows
        strips of 8 points along a row, with checks only at the borders
          each<16>(0, channels)
            slide<8, ...>: every column that is read serves all points it belongs to
            from the sums to what is stored

What is printed is what is read at a column and at a tap, what is added up, and what becomes of the sums.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from ...ir.dims import Dim, floordiv, product
from ...ir.scalar import Scalar
from ..kernel import Axis, Buffer, Kernel, Load, Store, free_axes
from .body import Body, Scope, row_index
from .expressions import PRIMARY, STORAGE, index_text, literal
from .lanes import LaneAnalysis, stride_along
from .plan import Phase
from .printer import KernelPrinter, print_kernel
from .schedule import CpuTarget, Schedule, default_schedule
from .sliding import IDENTITY, MAX_TAPS, Window, find_window

STRIPS = (8, 7, 6, 5, 4)
"""Points of a strip, best first where the extent is a multiple of them."""

FEW_ITEMS = 8
"""Fewer rows than this are cut into pieces, so that threads have something to share."""

PIECE = 32  # strips


class WindowPrinter(KernelPrinter):
    """Prints a kernel with one window."""

    def __init__(self, kernel: Kernel, window: Window, schedule: Schedule, target: CpuTarget) -> None:
        super().__init__(kernel, replace(schedule, lanes=min(schedule.lanes, target.vector_bytes // window.reduce.dtype.itemsize)))
        self.window = window
        self.channels = self.axes[self.schedule.vector or ""]
        self.points = _points(window, target)
        self.names.reserve(window.first, window.q)
        self.sum, self.row = (self.names.fresh(n) for n in ("sum", "taps"))
        self.tap = self._staged() if self._scattered() else window.tap
        part = self._part()
        self.free = free_axes(part)
        self.analysis = LaneAnalysis(part, self.schedule.vector, self.schedule.lanes)
        self.body = Body(part, self.analysis, self.names, self.line)

    def _part(self) -> Kernel:
        """The kernel with the values of its window in place of the reduction's, for what is printed of it."""
        w, old = self.window, self.kernel
        parts = [v for v in (w.moved, self.tap, w.element, *w.inside, *(c for cs in w.inside_outer.values() for c in cs)) if v is not None]
        stores = (*old.stores, *(Store(old.outputs[0].name, row_index([]), v) for v in parts))
        inputs = old.inputs
        if self.tap is not w.tap and isinstance(self.tap, Load):
            inputs = (*inputs, Buffer(self.tap.buffer, self.tap.dtype, self._staged_size()))
            self.names.buffers[self.tap.buffer] = self.row
        return replace(old, axes=(*old.axes, Axis(w.q, w.stride * self.points + w.size * w.dilation)), inputs=inputs, stores=stores)

    # ---- taps

    def _scattered(self) -> bool:
        """Whether neighbouring channels have their taps apart, as in weights [c, 1, h, w]."""
        tap = self.window.tap
        if not isinstance(tap, Load) or not self.free[tap] <= {*(a.name for a in self.kernel.inner), self.channels.name}:
            return False
        return stride_along(tap.index, self.channels.symbol, self.schedule.lanes) not in (0, 1)

    def _tap_axes(self) -> list[tuple[str, Dim]]:
        return [(a.name, a.extent) for a in (*self.kernel.inner, self.channels)]

    def _staged_size(self) -> Dim:
        return product(d for _, d in self._tap_axes())

    def _staged(self) -> Load:
        """The tap where it is copied to, channels in order."""
        assert isinstance(self.window.tap, Load)
        return Load(self.window.tap.dtype, self.row, row_index(self._tap_axes()))

    def stage(self) -> None:
        """Copies the taps, once per call."""
        source, copy = self.window.tap, self.tap
        if copy is source or source is None or not isinstance(copy, Load):
            return
        kind, memory = STORAGE[copy.dtype], self.names.fresh(f"{self.row}_row")
        self.line(f"Row<{kind}> {memory}({index_text(self._staged_size(), {})[0]});")
        self.line(f"{kind}* const {self.row} = {memory};")
        for axis in self.kernel.inner:
            self.open(f"for (int64_t {axis.name} = 0; {axis.name} < {axis.extent}; {axis.name}++)")
        self.open(self.each())
        scope = Scope(frozenset({*(a.name for a in self.kernel.inner), self.channels.name}), "L")
        self.body.emit([source], scope)
        at = index_text(copy.index, {})[0]
        self.line(f"store<L>({self.row} + {at}, {scope.texts[source][0]});")
        self.close("});")
        for _ in self.kernel.inner:
            self.close()

    def each(self) -> str:
        extent = index_text(self.channels.extent, {})[0]
        return f"each<{self.lane_counts(self.channels.extent)}>(0, {extent}, [&]<int L>(int64_t {self.channels.name}) LANES"

    # ---- the walk

    def grid(self) -> None:
        w = self.window
        self.stage()
        self.function("within", f"int64_t {w.first}, int64_t {w.q}", w.inside, Scope(frozenset()))
        extent = index_text(w.strip.extent, {})[0]
        last = w.dilation * (w.size - 1)
        point = w.strip.name
        plain = f"span({extent}, [=](int64_t {point}) {{ return within({point}, 0) && within({point}, {last}); }})"
        self.line(f"const Span plain = {plain if w.inside else f'{{0, {extent}}}'};")
        loops: list[tuple[str, Dim]] = [(a.name, a.extent) for a in self.kernel.grid if a not in (w.strip, self.channels)]
        begin, end = "0", extent
        if self.cuts(loops):
            piece = self.names.fresh(f"{point}_piece")
            size = PIECE * self.points
            loops.append((piece, floordiv(w.strip.extent + size - 1, size)))
            begin, end = f"{piece}*{size}", f"min({piece}*{size} + {size}, int64_t({extent}))"
        self.parallel(loops, [], lambda: self.line_of_points(begin, end))

    def cuts(self, loops: Sequence[tuple[str, Dim]]) -> bool:
        rows, extent = product(d for _, d in loops), self.window.strip.extent
        few = not loops or isinstance(rows, int) and rows < FEW_ITEMS
        return few and not (isinstance(extent, int) and extent <= PIECE * self.points)

    def function(self, name: str, parameters: str, conditions: Sequence[Scalar], scope: Scope) -> None:
        """A lambda of whether all conditions hold."""
        self.open(f"const auto {name} = [=]({parameters}) LANES")
        inside = scope.inner(())
        self.body.emit(list(conditions), inside)
        self.line(f"return {' && '.join(f'({inside.texts[c][0]})' for c in conditions) or 'true'};")
        self.close("};")

    def line_of_points(self, begin: str, end: str) -> None:
        """All points along the strip axis, from the bounds of its windows along the other axes to the strips."""
        w = self.window
        bound = frozenset(a.name for a in self.kernel.grid if a not in (w.strip, self.channels))
        bounds: dict[str, tuple[str, str]] = {}
        for axis in w.outer:
            conditions = w.inside_outer[axis.name]
            bounds[axis.name] = ("0", str(axis.extent))
            if conditions:
                holds, known = (self.names.fresh(f"{axis.name}_{n}") for n in ("inside", "span"))
                self.function(holds, f"int64_t {axis.name}", conditions, Scope(bound))
                self.line(f"const Span {known} = span({axis.extent}, {holds});")
                bounds[axis.name] = (f"{known}.begin", f"{known}.end")
        whole = isinstance(w.strip.extent, int) and w.strip.extent % self.points == 0 and begin == "0"
        frame = f"strips<{self.points}, {str(whole).lower()}>({begin}, {end}, plain"
        self.open(f"{frame}, [&]<int P, bool Checked>(int64_t {w.first}) LANES")
        self.open(self.each())
        self.strip(Scope(bound | {self.channels.name}, "L"), bounds)
        self.close("});")
        self.close("});")

    def strip(self, scope: Scope, bounds: dict[str, tuple[str, str]]) -> None:
        """The points of one strip, in the lanes of some channels."""
        w, stores = self.window, list(self.kernel.stores)
        self.hoist([s.value for s in stores], scope)
        kind, p = STORAGE[w.reduce.dtype], self.names.fresh("p")
        self.line(f"vec<{kind}, L> {self.sum}[P];")
        self.line(f"UNROLL for (auto& s : {self.sum}) s = splat<L>({literal(IDENTITY[w.reduce.op], w.reduce.dtype)[0]});")
        inside = scope
        for axis in w.outer:
            self.rows(axis, bounds[axis.name], unrolled=axis is w.outer[-1] and int(axis.extent) <= MAX_TAPS)
            inside = inside.inner([axis.name])
        self.slide(inside)
        for _ in w.outer:
            self.close()
        self.open(f"UNROLL for (int {p} = 0; {p} < P; {p}++)")
        self.line(f"const int64_t {w.strip.name} = {w.first} + {p};")
        done = scope.inner([w.strip.name])
        done.texts[w.reduce] = (f"{self.sum}[{p}]", PRIMARY)
        self.statements(Phase(stores=stores), done)
        self.close()

    def rows(self, axis: Axis, bounds: tuple[str, str], unrolled: bool) -> None:
        """Opens the loop over an outer axis: unrolled, so that the addresses of all rows are computed once."""
        name, (begin, end) = axis.name, bounds
        if not unrolled:
            self.open(f"for (int64_t {name} = {begin}; {name} < {end}; {name}++)")
            return
        check = "" if begin == "0" else f" if ({name} >= {begin} && {name} < {end})"
        self.open(f"UNROLL for (int64_t {name} = 0; {name} < {axis.extent}; {name}++){check}")

    def slide(self, scope: Scope) -> None:
        w = self.window
        column, tap, so_far = (self.names.fresh(n) for n in ("column", "tap", "so_far"))
        self.line(f"slide<P, {w.stride}, {w.size}, {w.dilation}, Checked>({self.sum},")
        self.depth += 1
        self.line(f"[&](int64_t {w.q}) LANES {{ return within({w.first}, {w.q}); }},")
        self.value(f"int64_t {w.q}", w.moved, scope.inner([w.q]))
        if self.tap is None:
            self.line("[](int64_t) LANES { return 0; },")
        else:
            self.value(f"int64_t {w.taps.name}", self.tap, scope.inner([w.taps.name]))
        adding = scope.inner(())
        adding.texts[w.column] = (column, PRIMARY)
        if w.tap is not None:
            adding.texts[w.tap] = (tap, PRIMARY)
        self.open(f"[&](auto {so_far}, auto {column}, auto {tap}) LANES")
        self.body.emit([w.element], adding)
        text = adding.texts[w.element][0]
        self.line(f"return {so_far} + {text};" if w.reduce.op == "sum" else f"return {w.reduce.op}({so_far}, {text});")
        self.close("});")
        self.depth -= 1

    def value(self, parameter: str, value: Scalar, scope: Scope) -> None:
        """A lambda of a value in all lanes, as an argument."""
        self.open(f"[&]({parameter}) LANES")
        self.body.emit([value], scope)
        self.line(f"return splat<L>({scope.texts[value][0]});")
        self.close("},")


def _points(window: Window, target: CpuTarget) -> int:
    """Points of a strip: their sums, the taps and a column are in registers. Points that share little gain little."""
    registers = 32 if target.vector_bytes == 64 else 16
    most = max(4, registers - 2 - (window.size if window.tap is not None else 0))
    sizes = [s for s in STRIPS if s <= min(most, max(4, STRIPS[0] // window.stride))]
    extent = window.strip.extent
    if not isinstance(extent, int):
        return 4
    if extent < 4:
        return extent
    return next((s for s in sizes if extent % s == 0), 4)


def print_reduction(kernel: Kernel, target: CpuTarget) -> str:
    """A kernel without contractions: a window where it walks one."""
    schedule = default_schedule(kernel, target)
    window = find_window(kernel, schedule.vector)
    return print_kernel(kernel, schedule) if window is None else WindowPrinter(kernel, window, schedule, target).text()

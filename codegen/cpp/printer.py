"""Kernels as C++ functions: `print_kernel(kernel, schedule)`.

    // add_softmax: softmax(x + y)    model.py:12
    void add_softmax(const float* x, const float* y, float* out, int threads)
      parallel over the grid
        for each grid point: phases, each one loop over the inner axes

Loops are `each<16, 1>(0, n, [&]<int L>(int64_t r) LANES {...})`: the body is written once, for L lanes, and serves the tail with 1.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch

from ...ir.dims import Dim, floordiv, product, symbol
from ...ir.scalar import Const, Scalar
from ..errors import Unsupported
from ..kernel import Axis, Kernel, Position, Reduce, Scan, cone, free_axes, operands, scalars
from .body import Body, Names, Scope, row_index
from .expressions import MULTIPLY, PRIMARY, STORAGE, index_text, wrap
from .lanes import LaneAnalysis, stride_along
from .plan import Block, Phase, index_axes, keep_rows, operation_cost, phase_roots, plan_block
from .schedule import Schedule

ACCUMULATORS = {
    "sum": "Sum",
    "prod": "Prod",
    "max": "Max",
    "min": "Min",
    "any": "Any",
    "all": "All",
    "argmax": "ArgMax",
    "argmin": "ArgMin",
}
WORK_PER_THREAD = 1 << 15  # cycles a thread must have to be worth waking
STACK_BYTES = 1 << 16  # row buffers beyond this come from the heap
PARTS = 64  # of a loop that threads share
CHEAP_BODY = 40  # cycles per vector below which a reduction waits for its own additions


def print_kernel(kernel: Kernel, schedule: Schedule) -> str:
    """The kernel as the text of one C++ function.

    Its parameters are pointers (inputs, then outputs), sizes as int64_t, and the number of threads; it returns the fault it met, if the
    kernel has any. Raises Unsupported with a reason for what it has no text for.
    """
    return KernelPrinter(kernel, schedule).text()


@dataclass(frozen=True)
class Accumulator:
    """A C++ accumulator: its type, its variable, and the method that gives the result."""

    kind: str
    name: str
    final: str


class KernelPrinter:
    """Walks one kernel. Lines are collected in `lines`; `depth` is the indentation."""

    def __init__(self, kernel: Kernel, schedule: Schedule) -> None:
        self.kernel = kernel
        self.schedule = schedule
        self.free = free_axes(kernel)
        self.axes = {a.name: a for a in kernel.axes}
        self.analysis = LaneAnalysis(kernel, schedule.vector, schedule.lanes)
        self.names = Names(kernel)
        self.body = Body(kernel, self.analysis, self.names, self.line)
        self.lines: list[str] = []
        self.depth = 0
        self.shared: tuple[str, str, str, str] | None = None  # axis whose loop the threads share, its bounds in this part, the part

    # ---- text

    def line(self, text: str) -> None:
        self.lines.append("  " * self.depth + text)

    def open(self, text: str) -> None:
        self.line(text + " {")
        self.depth += 1

    def close(self, text: str = "}") -> None:
        self.depth -= 1
        self.line(text)

    def text(self) -> str:
        kernel = self.kernel
        title = f"{kernel.name}: {kernel.label}".rstrip(": ")
        comment = "    ".join(filter(None, (title, "  ".join(kernel.sources))))
        self.line("// " + re.sub(r"[\r\n\\\\]+", " ", comment))
        parameters = [f"const {STORAGE[b.dtype]}* {self.names.buffers[b.name]}" for b in kernel.inputs]
        parameters += [f"{STORAGE[b.dtype]}* {self.names.buffers[b.name]}" for b in kernel.outputs]
        parameters += [f"int64_t {s}" for s in kernel.sizes] + ["int threads"]
        self.open(f"{'int64_t' if kernel.faults else 'void'} {kernel.name}({', '.join(parameters)})")
        if kernel.faults:
            self.line("int64_t met = 0, *const fault = &met;")
        self.grid()
        if kernel.faults:
            self.line("return met;")
        self.close()
        return "\n".join(self.lines) + "\n"

    # ---- the grid

    def grid(self) -> None:
        """The parallel loop over grid points, or over chunks of lanes along a grid axis."""
        vector = self.schedule.vector
        lane_axis = next((a for a in self.kernel.grid if a.name == vector), None)
        bound = frozenset(a.name for a in self.kernel.grid)
        block = plan_block(self.kernel, self.free, bound, list(self.kernel.stores), [], set())
        rows = self.choose_rows(block, bound, lane_axis is not None)
        loops: list[tuple[str, Dim]] = [(a.name, a.extent) for a in self.kernel.grid if a.name != vector]
        chunk = ""
        if lane_axis is not None and not (isinstance(lane_axis.extent, int) and lane_axis.extent <= self.schedule.chunk):
            chunk = self.names.fresh(f"{lane_axis.name}_chunk")
            loops.append((chunk, floordiv(lane_axis.extent + self.schedule.chunk - 1, self.schedule.chunk)))
        scope = Scope(bound - {vector} if vector else bound)

        def values(inside: Scope) -> None:
            if rows:
                self.line("IN_TURN;")
            self.phases(block.phases, inside)

        def point() -> None:
            if lane_axis is None:
                values(scope.inner(()))
                return
            begin, end = self.chunk_range(lane_axis, chunk)
            self.open(f"each<{self.lane_counts(lane_axis.extent)}>({begin}, {end}, [&]<int L>(int64_t {lane_axis.name}) LANES")
            values(scope.inner([lane_axis.name], "L"))
            self.close("});")

        if self.schedule.split:
            self.serial(loops, rows, point)
        else:
            self.parallel(loops, rows, point)

    def serial(self, loops: list[tuple[str, Dim]], rows: list[str], body: Callable[[], None]) -> None:
        """A grid of few points: the threads share the loops inside each point instead."""
        for row in rows:
            self.line(row)
        for name, extent in loops:
            self.open(f"for (int64_t {name} = 0; {name} < {index_text(extent, {})[0]}; {name}++)")
        body()
        for _ in loops:
            self.close()

    def chunk_range(self, axis: Axis, chunk: str) -> tuple[str, str]:
        extent = index_text(axis.extent, {})[0]
        if not chunk:
            return "0", extent
        size = self.schedule.chunk
        return f"{chunk}*{size}", f"min({chunk}*{size} + {size}, int64_t({extent}))"

    def parallel(self, loops: list[tuple[str, Dim]], rows: list[str], body: Callable[[], None]) -> None:
        if not loops:
            for row in rows:
                self.line(row)
            body()
            return
        total = index_text(product(d for _, d in loops), {})[0]
        self.open(f"parallel({total}, {self.grain(loops)}, threads, [=](int64_t begin, int64_t end)")
        for row in rows:
            self.line(row)
        if len(loops) == 1:
            name = loops[0][0]
            self.open(f"for (int64_t {name} = begin; {name} < end; {name}++)")
        else:
            self.flat_loop(loops)
        body()
        self.close()
        self.close("});")

    def flat_loop(self, loops: list[tuple[str, Dim]]) -> None:
        """One loop over the flattened axes; their indices are divided out once and then stepped."""
        flat = self.names.fresh("point")
        starts, step = [], []
        for n, (name, extent) in enumerate(loops):
            below = wrap(index_text(product(d for _, d in loops[n + 1 :]), {}), MULTIPLY + 1)
            start = "begin" if n == len(loops) - 1 else f"begin / {below}"
            size = wrap(index_text(extent, {}), MULTIPLY + 1)
            starts.append(f"{name} = {start}" + (f" % {size}" if n else ""))
            step[:0] = [name, index_text(extent, {})[0]] if n else [name]
        self.line(f"int64_t {', '.join(starts)};")
        self.open(f"for (int64_t {flat} = begin; {flat} < end; {flat}++, next({', '.join(step)}))")

    def grain(self, loops: list[tuple[str, Dim]]) -> str:
        """How many items of the parallel loop make work for a thread."""
        cycles = sum(operation_cost(v) % 1000 for v in scalars(self.kernel.stores)) + 1
        looped = {name for name, _ in loops}
        extents: list[Dim] = [a.extent for a in self.kernel.axes if a.name not in looped]
        if any(name not in self.axes for name in looped):  # a chunked lane axis
            extents = [a.extent for a in self.kernel.inner] + [self.schedule.chunk]
        points = product(extents)
        per_point = max(cycles / self.schedule.lanes, 1.0)
        if isinstance(points, int):
            return str(max(1, int(WORK_PER_THREAD / max(points * per_point, 1))))
        return f"{int(WORK_PER_THREAD / per_point)} / ({index_text(points, {})[0]} + 1) + 1"

    def lane_counts(self, extent: Dim) -> str:
        """Template arguments of `each`: the main lane count and what serves the tail."""
        lanes = self.schedule.lanes
        static = isinstance(extent, int)
        counts, rest = [], extent if isinstance(extent, int) else 2 * lanes - 1
        for count in sorted({lanes, min(lanes, 16), 4, 1} if static or lanes > 8 else {lanes, 1}, reverse=True):
            if count <= min(rest, lanes):
                counts.append(count)
                rest = rest % count
        return ", ".join(map(str, counts or [1]))

    # ---- row buffers

    def choose_rows(self, block: Block, bound: frozenset[str], columns: bool) -> list[str]:
        """Declarations of the buffers that keep values between phases; none where they would not fit the cache."""
        keep_rows(block, self.free, bound)
        declarations, total = [], 0
        for value, phase in block.kept.items():
            order = [n for n in self.schedule.order if n in self.free[value]]
            axes = [(n, self.axes[n].extent) for n in order]
            wide = self.schedule.lanes if columns and self.analysis.varies(value) else 1
            size = product([*(d for _, d in axes), wide])
            total += size * value.dtype.itemsize if isinstance(size, int) else 0
            name = self.names.fresh(self.names.hint(value) + "_row")
            at = index_text(row_index(axes) * wide, {})[0]
            self.body.rows[value] = (name, phase, at)
            declarations.append((STORAGE[value.dtype], name, size))
        if total > self.schedule.buffer_bytes:
            self.body.rows.clear()
            return []
        stack = total <= STACK_BYTES
        return [
            f"alignas(64) {kind} {name}[{max(size, 1)}];"
            if stack and isinstance(size, int)
            else f"Row<{kind}> {name}({index_text(size, {})[0]});"
            for kind, name, size in declarations
        ]

    # ---- phases and loops

    def phases(self, phases: list[Phase], scope: Scope) -> None:
        for number, phase in enumerate(phases):
            outermost = scope.bound == frozenset(a.name for a in self.kernel.grid)
            here = scope
            if outermost:
                here.phase = number
            self.phase(phase, here)

    def phase(self, phase: Phase, scope: Scope) -> None:
        nests: dict[tuple[str, ...], Phase] = {}
        for reduce in phase.reduces:
            nests.setdefault(self.loop_order(frozenset(reduce.axes), reduce.value, scope), Phase()).reduces.append(reduce)
        for store in phase.stores:
            axes = (self.free[store.value] | index_axes(self.kernel, store.index)) - scope.bound
            nests.setdefault(self.loop_order(axes, store.value, scope), Phase()).stores.append(store)
        for axes, items in nests.items():
            if axes:
                self.nest(axes, items, scope)
            else:
                self.statements(items, scope)

    def loop_order(self, axes: frozenset[str], root: Scalar, scope: Scope) -> tuple[str, ...]:
        """The schedule's order, but axes that a reduction under the root needs again come inside the others."""
        again = {a for v in cone([root], scope.texts) if isinstance(v, Reduce) for a in v.axes}
        order = [n for n in self.schedule.order if n in axes]
        return tuple(sorted(order, key=lambda n: (n == self.schedule.vector, n in again)))

    def statements(self, items: Phase, scope: Scope) -> None:
        self.body.emit([s.value for s in items.stores], scope)
        for store in items.stores:
            self.body.store(store, scope)

    def nest(self, axes: tuple[str, ...], items: Phase, scope: Scope) -> None:
        """The loops over `axes` that serve the items, and the results of its reductions after them."""
        roots = phase_roots(items)
        outside, scope = scope, self.unbind(axes, scope)
        self.hoist(roots, scope)
        vectorised = self.schedule.vector in axes
        cycles = sum(operation_cost(v) for v in cone(roots, scope.texts) if not isinstance(v, Reduce))
        ways = self.schedule.ways if vectorised and not items.stores and cycles < CHEAP_BODY else 1
        results = [self.accumulator(r, vectorised, ways, scope) for r in items.reduces]
        split = self.schedule.split and not self.shared
        if split:
            self.begin_parts(axes[0], cycles, results)
        inside = scope.inner(())
        for position, name in enumerate(axes):
            inside = self.loop(name, axes[position + 1 :], ways, roots, inside)
        self.innermost(items, [r.name for r in results], inside)
        for name in reversed(axes):
            self.close("});" if name == self.schedule.vector else "}")
        if split:
            self.end_parts(results)
        for reduce, result in zip(items.reduces, results):
            name = self.names.fresh(self.names.hint(reduce))
            self.line(f"const auto {name} = {result.name}.{result.final}();")
            outside.texts[reduce] = (name, PRIMARY)

    def begin_parts(self, axis: str, cycles: float, results: list[Accumulator]) -> None:
        """Threads share the loop over `axis` in parts whose number does not depend on the threads, so neither does the result."""
        for result in results:
            self.line(f"{result.kind} {result.name}_parts[{PARTS}];")
        extent = self.axes[axis].extent
        points = index_text(product(a.extent for a in self.kernel.inner), {})
        grain = f"{int(PARTS * WORK_PER_THREAD * self.schedule.lanes / (cycles + 1))} / ({points[0]} + 1) + 1"
        self.open(f"parallel({PARTS}, {grain}, threads, [&](int64_t begin, int64_t end)")
        part = self.names.fresh("part")
        self.open(f"for (int64_t {part} = begin; {part} < end; {part}++)")
        size, step = index_text(extent, {})[0], self.schedule.lanes if axis == self.schedule.vector else 1
        first, last = self.names.fresh(f"{axis}_begin"), self.names.fresh(f"{axis}_end")
        self.line(f"const int64_t {first} = share({size}, {part}, {PARTS}, {step}), {last} = share({size}, {part} + 1, {PARTS}, {step});")
        for result in results:
            self.line(f"{result.kind} {result.name};")
        self.shared = (axis, first, last, part)

    def end_parts(self, results: list[Accumulator]) -> None:
        assert self.shared is not None
        part = self.shared[3]
        for result in results:
            self.line(f"{result.name}_parts[{part}] = {result.name};")
        self.close()
        self.close("});")
        for result in results:
            self.line(f"{result.kind} {result.name};")
            self.line(f"for (auto& part : {result.name}_parts) {result.name}.merge(part);")
        self.shared = None

    def unbind(self, axes: tuple[str, ...], scope: Scope) -> Scope:
        """The scope for loops over axes of which some are bound outside already: what depends on those is computed anew."""
        again = scope.bound & set(axes)
        if not again:
            return scope
        if scope.lanes == "L" and self.schedule.vector in again:
            raise Unsupported(reason="a reduction over the vector axis inside a loop over that axis")
        texts = {v: t for v, t in scope.texts.items() if not self.free[v] & again}
        return replace(scope, bound=scope.bound - again, texts=texts)

    def loop(self, name: str, deeper: tuple[str, ...], ways: int, roots: list[Scalar], scope: Scope) -> Scope:
        """Opens the loop over one axis and computes what depends on no deeper one; returns the scope inside."""
        self.declare_scans(name, deeper, roots, scope)
        extent = self.axes[name].extent
        start, stop = "0", index_text(extent, {})[0]
        if self.shared is not None and self.shared[0] == name:
            start, stop, extent = self.shared[1], self.shared[2], symbol("part")
        if name == self.schedule.vector:
            unrolled = ways > 1
            each, extra = ("each4", ", int way") if unrolled else ("each", "")
            self.open(f"{each}<{self.lane_counts(extent)}>({start}, {stop}, [&]<int L>(int64_t {name}{extra}) LANES")
            inside = scope.inner([name], "L")
            inside.unrolled = unrolled
        else:
            self.open(f"for (int64_t {name} = {start}; {name} < {stop}; {name}++)")
            inside = scope.inner([name])
        if deeper:
            self.nested_blocks(roots, inside)
            self.hoist(roots, inside)
        return inside

    def nested_blocks(self, roots: list[Scalar], scope: Scope) -> None:
        """Computes the reductions under the roots that depend only on what is bound here."""
        block = plan_block(self.kernel, self.free, scope.bound, [], roots, set(scope.texts))
        for phase in block.phases:
            self.phase(phase, scope)

    def innermost(self, items: Phase, accumulators: list[str], scope: Scope) -> None:
        """The body of the innermost loop. Reductions over deeper axes become blocks of their own first."""
        roots = phase_roots(items)
        self.nested_blocks(roots, scope)
        self.body.emit(roots, scope)
        for reduce, acc in zip(items.reduces, accumulators):
            self.accumulate(reduce, acc, scope)
        for store in items.stores:
            self.body.store(store, scope)

    def hoist(self, roots: list[Scalar], scope: Scope) -> None:
        """Variables for the largest values under the roots that need nothing but what is bound here."""
        found: list[Scalar] = []
        stack, seen = list(reversed(roots)), set(scope.texts)
        while stack:
            value = stack.pop()
            if value in seen or self.body.in_row(value, scope):
                continue
            seen.add(value)
            reduces = any(isinstance(v, (Reduce, Scan)) for v in cone([value], scope.texts))
            if self.free[value] <= scope.bound and not reduces and not isinstance(value, (Const, Position)):
                found.append(value)
            else:
                stack.extend(operands(value))
        self.body.emit(found, scope, variables=True)

    # ---- reductions and scans

    def accumulator(self, reduce: Reduce, vectorised: bool, ways: int, scope: Scope) -> Accumulator:
        """The accumulator of a reduction; declared here unless threads have one each."""
        lanewise = not vectorised and self.body.varies(reduce, scope)
        lanes = str(self.schedule.lanes) if vectorised else "L" if lanewise else "1"
        argument = f", {ways}" if ways > 1 else ""
        kind = f"{ACCUMULATORS[reduce.op]}<{STORAGE[reduce.value.dtype]}, {lanes}{argument}>"
        name = self.names.fresh(f"{reduce.op}_acc")
        if not self.schedule.split or self.shared is not None:
            self.line(f"{kind} {name};")
        return Accumulator(kind, name, "lanewise" if lanewise else "value")

    def accumulate(self, reduce: Reduce, acc: str, scope: Scope) -> None:
        text = scope.texts[reduce.value][0]
        vectorised = scope.lanes == "L" and (self.schedule.vector in reduce.axes or self.body.varies(reduce, scope))
        if vectorised and not self.body.varies(reduce.value, scope):
            text = f"splat<L>({text})"
        arguments = [text]
        if reduce.op in ("argmax", "argmin"):
            arguments.append(self.position(reduce, scope, vectorised))
        elif scope.unrolled:
            arguments.append("way")
        self.line(f"{acc}.add({', '.join(arguments)});")

    def position(self, reduce: Reduce, scope: Scope, vectorised: bool) -> str:
        """Flat position over the reduced axes, in every lane."""
        flat = row_index([(n, self.axes[n].extent) for n in reduce.axes])
        text = index_text(flat, {})[0]
        if not vectorised:
            return f"int64_t({text})"
        step = stride_along(flat, self.analysis.axis, self.schedule.lanes) if self.schedule.vector in reduce.axes else 0  # type: ignore[arg-type]
        if step == 0:
            return f"splat<L>(int64_t({text}))"
        factor = "" if step == 1 else f"*{wrap(index_text(step, {}), MULTIPLY + 1)}"  # type: ignore[arg-type]
        return f"{text} + iota<int64_t, L>(){factor}"

    def declare_scans(self, name: str, deeper: tuple[str, ...], roots: list[Scalar], scope: Scope) -> None:
        for value in cone(roots, scope.texts):
            if not isinstance(value, Scan) or value.axis != name:
                continue
            if self.free[value] & set(deeper):
                raise Unsupported(reason="a scan whose axis is not the innermost it depends on")
            kind = "double" if value.dtype == torch.float32 else STORAGE[value.dtype]
            lanes = "L" if self.body.varies(value, scope) else "1"
            start = 0 if value.op == "cumsum" else 1
            running = self.names.fresh(value.op)
            self.line(f"vec<{kind}, {lanes}> {running} = splat<{lanes}>({kind}({start}));")
            self.body.scans[value] = running

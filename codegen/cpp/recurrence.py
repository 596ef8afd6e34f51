"""Kernels of a recurrence as C++ functions on the vocabulary of recurrence.h.

    // k_lstm: lstm_layer    model.py:41
    void k_lstm(const float* gates, const float* h0, ..., float* out, float* h, float* c, int threads)
      pack: the weights of a block of units, lanes side by side
      start, finish: one row's states before the first and after the last step
      next: one row's states after a step, from the sums of products and the states before
      recurrence<4, 2, 16, float>(rows, units, steps, reverse, threads, pack, start, next, finish)

What is printed is what differs between kernels: these four. How threads and tiles walk them is in the header.
"""

from __future__ import annotations

from collections.abc import Sequence

import sympy

from ...ir.dims import symbol
from ...ir.scalar import Scalar
from ..errors import Unsupported
from ..kernel import Dot, Kernel, Last, Load, Previous, Recurrence, State, Store, cone
from .body import Scope
from .expressions import ADD, PRIMARY, STORAGE, index_text, wrap
from .printer import KernelPrinter
from .schedule import CpuTarget, Schedule


def print_recurrence(kernel: Kernel, target: CpuTarget) -> str:
    """The kernel as the text of one C++ function; see print_kernel."""
    assert kernel.recurrence is not None
    return RecurrencePrinter(kernel, kernel.recurrence, target).text()


class RecurrencePrinter(KernelPrinter):
    """Prints a kernel with a recurrence over rows along one axis, whose products all read one state."""

    def __init__(self, kernel: Kernel, recurrence: Recurrence, target: CpuTarget) -> None:
        dtype = recurrence.states[0].following.dtype
        super().__init__(kernel, Schedule(recurrence.unit, target.vector_bytes // dtype.itemsize))
        self.recurrence, self.unit, self.kind = recurrence, recurrence.unit, STORAGE[dtype]
        self.dots = [v for v in cone(s.following for s in recurrence.states) if isinstance(v, Dot)]
        self.states = self._ordered()
        rows = [a for a in kernel.grid if a.name != self.unit]
        if len(rows) != 1:
            raise Unsupported(reason="a recurrence over rows along several axes")
        self.row = rows[0]
        self.begin, self.end = self.names.fresh("begin"), self.names.fresh("end")

    def _ordered(self) -> list[State]:
        """The states, the multiplied one first."""
        read = {d.left.state for d in self.dots if isinstance(d.left, Previous) and d.axes == (d.left.at,)}
        strangers = [d for d in self.dots if not isinstance(d.left, Previous) or self.free[d.right] != {self.unit, *d.axes}]
        if len(read) != 1 or strangers:
            raise Unsupported(reason="the products of a recurrence must multiply one state by weights of each unit")
        return sorted(self.recurrence.states, key=lambda s: s.name not in read)

    def grid(self) -> None:
        """The body of the function."""
        functions = {name: self.names.fresh(name) for name in ("pack", "start", "next", "finish")}
        state, sums, before, after = (self.names.fresh(n) for n in ("state", "sums", "before", "after"))
        held = f"{self.kind}* const* "
        self.pack(functions["pack"])
        scope = self.open_row(functions["start"], held + state)
        self.keep([s.initial for s in self.states], state, scope)
        self.close_row()
        scope = self.open_row(functions["next"], f"const {self.kind}* {sums}, {held}{before}, {held}{after}", self.recurrence.step)
        self.next(sums, before, after, scope)
        self.close_row()
        scope = self.open_row(functions["finish"], held + state)
        self.finish(state, scope)
        self.close_row()
        extents = [index_text(d, {})[0] for d in (self.row.extent, self.axes[self.unit].extent, self.axes[self.recurrence.step].extent)]
        arguments = [*extents, str(self.recurrence.reverse).lower(), "threads", *functions.values()]
        shape = f"{len(self.dots)}, {len(self.states)}, {self.schedule.lanes}, {self.kind}"
        self.line(f"recurrence<{shape}>({', '.join(arguments)});")

    # ---- the four functions

    def pack(self, name: str) -> None:
        """The weights of units begin .. end as to[source][n * lanes + unit - begin]."""
        lanes = self.schedule.lanes
        to = self.names.fresh("to")
        self.open(f"const auto {name} = [=]({self.kind}* {to}, int64_t {self.begin}, int64_t {self.end})")
        for n, dot in enumerate(self.dots):
            (source,) = dot.axes
            self.open(f"for (int64_t {source} = 0; {source} < {index_text(self.axes[source].extent, {})[0]}; {source}++)")
            scope = self.open_lanes(Scope(frozenset({source})))
            self.body.emit([dot.right], scope)
            self.line(f"store<L>({to} + {source}*{len(self.dots) * lanes} + {self.of_block(n)}, {scope.texts[dot.right][0]});")
            self.close("});")
            self.close()
        self.close("};")

    def next(self, sums: str, before: str, after: str, scope: Scope) -> None:
        self.fetch_ahead()
        for n, dot in enumerate(self.dots):
            scope.texts[dot] = (f"load<L>({sums} + {self.of_block(n)})", PRIMARY)
        places = {s.name: i for i, s in enumerate(self.states)}
        for value in self.free:
            if isinstance(value, Previous) and value.at == self.unit:
                scope.texts[value] = (f"load<L>({before}[{places[value.state]}] + {self.unit})", PRIMARY)
        stores = self.stores(last=False)
        self.keep([s.following for s in self.states], after, scope, [s.value for s in stores])
        for store in stores:
            self.body.store(store, scope)

    def fetch_ahead(self) -> None:
        """Fetches what the next step reads: rows lie too far apart for the CPU to foresee it."""
        step = symbol(self.recurrence.step)
        following = step - 1 if self.recurrence.reverse else step + 1
        for value in self.free:
            if isinstance(value, Load) and step in value.index.free_symbols:
                place = index_text(sympy.expand(value.index.subs(step, following)), {})
                self.line(f"fetch({self.names.buffers[value.buffer]} + {wrap(place, ADD)});")

    def finish(self, state: str, scope: Scope) -> None:
        places = {s: i for i, s in enumerate(self.states)}
        for store in self.stores(last=True):
            assert isinstance(store.value, Last)
            scope.texts[store.value] = (f"load<L>({state}[{places[store.value.state]}] + {self.unit})", PRIMARY)
            self.body.store(store, scope)

    # ---- their parts

    def stores(self, last: bool) -> list[Store]:
        return [s for s in self.kernel.stores if isinstance(s.value, Last) == last]

    def open_row(self, name: str, parameters: str, step: str = "") -> Scope:
        """A function of one row, from unit begin to end; of one step too."""
        positions = [*([step] if step else []), self.row.name, self.begin, self.end]
        self.open(f"const auto {name} = [=]({', '.join(f'int64_t {p}' for p in positions)}, {parameters})")
        return self.open_lanes(Scope(frozenset({self.row.name, *([step] if step else [])})))

    def close_row(self) -> None:
        self.close("});")
        self.close("};")

    def open_lanes(self, scope: Scope) -> Scope:
        counts = self.lane_counts(self.axes[self.unit].extent)
        self.open(f"each<{counts}>({self.begin}, {self.end}, [&]<int L>(int64_t {self.unit}) LANES")
        return scope.inner([self.unit], "L")

    def of_block(self, n: int) -> str:
        """Where the n-th number of a unit lies among those of its block."""
        offset = f"{n * self.schedule.lanes} + " if n else ""
        return f"{offset}{self.unit} - {self.begin}"

    def keep(self, values: Sequence[Scalar], place: str, scope: Scope, more: Sequence[Scalar] = ()) -> None:
        """Computes values, all before any is stored, and keeps the first of them as states."""
        self.body.emit([*values, *more], scope, variables=True)
        for i, value in enumerate(values):
            self.line(f"store<L>({place}[{i}] + {self.unit}, {scope.texts[value][0]});")

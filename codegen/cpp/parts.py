"""Kernels printed in parts: each part is a lambda that computes some of the kernel along one axis, all other positions being bound."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from ...ir.dims import Dim, free_symbols, product, symbol
from ..kernel import Axis, Buffer, Kernel, Load, Position, Store, cone
from .body import Scope
from .expressions import index_text
from .plan import Phase
from .printer import KernelPrinter
from .product import flatten
from .schedule import CpuTarget, Schedule, default_schedule


class PartPrinter(KernelPrinter):
    """A printer whose `grid` opens lambdas and lets `walk` print what is in them."""

    def __init__(self, kernel: Kernel, target: CpuTarget) -> None:
        super().__init__(kernel, Schedule(vector=None, lanes=1))
        self.target = target

    def size(self, *axes: Axis) -> str:
        return index_text(product(a.extent for a in axes), {})[0]

    def flat_name(self, axes: Sequence[Axis], name: str) -> str:
        """What the flat position over the axes is called: a single axis is its own."""
        return axes[0].name if len(axes) == 1 else self.names.fresh(name)

    def bind(self, axes: Sequence[Axis], flat: str, stores: Sequence[Store], indices: Sequence[Dim] = ()) -> None:
        """Variables for those of several axes that the stores or the indices use."""
        if len(axes) < 2:
            return
        found = [v for v in cone([s.value for s in stores]) if isinstance(v, (Load, Position))]
        used = {s.name for s in free_symbols([*indices, *(s.index for s in stores), *(v.index for v in found)])}
        places = flatten(axes, symbol(flat))
        parts = [f"{a.name} = {index_text(places[a.name], {})[0]}" for a in axes if a.name in used]
        if parts:
            self.line(f"const int64_t {', '.join(parts)};")

    def walk(self, axis: Axis, span: tuple[str, str], stores: Sequence[Store], buffers: Sequence[Buffer]) -> None:
        """The loop over the axis from span[0] to span[1] that does the stores; `buffers`: what they use beside the kernel's own."""
        own = tuple(b for b in buffers if b.name not in {x.name for x in (*self.kernel.inputs, *self.kernel.outputs)})
        for buffer in own:
            self.names.buffers[buffer.name] = buffer.name
        written = {s.buffer for s in stores}
        outputs = tuple(b for b in (*self.kernel.outputs, *own) if b.name in written)
        axis = replace(axis, inner=True)
        part = replace(self.kernel, axes=(axis,), inputs=(*self.kernel.inputs, *own), outputs=outputs, stores=tuple(stores), inplace=())
        printer = KernelPrinter(part, replace(default_schedule(part, self.target), split=False))
        printer.lines, printer.depth = self.lines, self.depth
        printer.names = printer.body.names = self.names
        scope = Scope(frozenset())
        printer.hoist([s.value for s in stores], scope)
        if printer.schedule.vector is None:
            printer.open(f"for (int64_t {axis.name} = {span[0]}; {axis.name} < {span[1]}; {axis.name}++)")
            inside, end = scope.inner([axis.name]), "}"
        else:
            printer.open(f"each<{printer.lane_counts(axis.extent)}>({span[0]}, {span[1]}, [&]<int L>(int64_t {axis.name}) LANES")
            inside, end = scope.inner([axis.name], "L"), "});"
        printer.innermost(Phase(stores=list(stores)), [], inside)
        printer.close(end)

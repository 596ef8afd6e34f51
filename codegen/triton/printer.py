"""The Triton printer: a kernel and a schedule become a module that a person could have written.

One program takes XBLOCK points of the flattened grid. Without inner axes that is all. With them a block has one more dimension per inner
group: the whole extent at once (persistent), or a loop over chunks of RBLOCK with one pass per level of reductions - a pass reloads and
recomputes what it needs, accumulates in a block, and reduces the block once after the loop.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from ...ir.scalar import Scalar
from ..kernel import Kernel, Reduce, Store, operands, scalars
from .expressions import Expressions
from .layout import Dimension, Layout, extent_source, layout_of, mask_lines
from .legalize import UnsupportedByTriton, legalize
from .program import Launch, Program, blocks_of, function_name, pointers
from .reductions import HELPERS
from .schedule import Schedule, inner_groups, needs_whole_block, refusal

_HEADER = "import triton\nimport triton.language as tl\n"
_LIBDEVICE = "from triton.language.extra import libdevice\n"


def build_blocks(kernel: Kernel, schedule: Schedule) -> Program:
    """Points and reductions: the program of `printer`. Raises UnsupportedByTriton, also for blocks that are no powers of two."""
    problem = refusal(schedule)
    if problem is not None:
        raise UnsupportedByTriton(what=f"{kernel.name} by this schedule", reason=problem)
    layout = layout_of(legalize(kernel), schedule)
    constants = {d.constant: d.block for d in layout.dimensions}
    whole = tuple((g.span.extent, g.block) for g in layout.groups if not g.looped)
    grid = (blocks_of(layout.grid.extent, constants.get("XBLOCK", 1)),)
    warps, stages, wide = schedule.num_warps, schedule.num_stages, schedule.wide
    launch = Launch(function_name(kernel), pointers(kernel), grid, constants, warps, stages, wide)
    return Program(kernel, schedule, print_kernel(kernel, schedule), (launch,), whole=whole)


def print_kernel(kernel: Kernel, schedule: Schedule) -> str:
    """A Python module with the kernel as one @triton.jit function, named `function_name(kernel)`.

    Its parameters: a pointer `<buffer>_ptr` per input, then per output; the sizes; the block lengths (constexpr).
    Raises UnsupportedByTriton.
    """
    return print_module([(kernel, schedule)])


def print_module(kernels: Sequence[tuple[Kernel, Schedule]]) -> str:
    """One module that holds several kernels and the helpers they need, each helper once."""
    return module([print_function(kernel, schedule) for kernel, schedule in kernels])


def print_function(kernel: Kernel, schedule: Schedule) -> str:
    """The kernel as a @triton.jit function, without what stands above it in its module."""
    return _Printer(kernel, schedule).function()


def module(functions: Sequence[str]) -> str:
    """The module of these functions: with the imports and helpers that they use."""
    body = "\n\n".join(functions)
    helpers = [text.strip("\n") + "\n" for name, text in HELPERS.items() if f"{name}(" in body or f"combine_fn={name}" in body]
    imports = _HEADER + (_LIBDEVICE if any("libdevice." in text for text in (body, *helpers)) else "")
    return "\n\n".join([imports, *helpers, body])


def comment(kernel: Kernel) -> str:
    """What stands above the function of a kernel."""
    title = f"# {kernel.name}: {kernel.label}" if kernel.label else f"# {kernel.name}"
    return "".join(f"{line}\n" for line in (title, *(f"#   {source}" for source in kernel.sources)))


def function_text(kernel: Kernel, buffers: Sequence[str], constants: Iterable[str], lines: Sequence[str]) -> str:
    """A function of a kernel's program, which takes pointers, sizes and block lengths."""
    parameters = ", ".join([*(f"{b}_ptr" for b in buffers), *kernel.sizes, *(f"{c}: tl.constexpr" for c in constants)])
    body = "\n".join(f"    {line}" for line in lines)
    return f"{comment(kernel)}@triton.jit\ndef {function_name(kernel)}({parameters}):\n{body}\n"


def widened_sizes(kernel: Kernel, wide: bool) -> list[str]:
    """Triton passes sizes that fit as 32 bits, in which their products may not fit: the lines that widen them."""
    return [f"{size} = tl.cast({size}, tl.int64)" for size in kernel.sizes] if wide else []


class _Printer:
    """State of printing one kernel: the lines of the function so far and the expressions already written."""

    def __init__(self, kernel: Kernel, schedule: Schedule) -> None:
        self.kernel = legalize(kernel)
        self.schedule = schedule
        self.layout: Layout = layout_of(self.kernel, schedule)
        if not schedule.persistent and needs_whole_block(self.kernel, inner_groups(self.kernel)):
            raise UnsupportedByTriton(
                what=kernel.name, reason="a value spans two inner axes that are reduced apart; only a persistent schedule can"
            )
        self.expressions = Expressions(self.kernel, self.layout, schedule)

    def function(self) -> str:
        self._prologue()
        if self.layout.groups and not self.schedule.persistent:
            self._passes()
        else:
            self._straight()
        constants = [d.constant for d in self.layout.dimensions]
        return function_text(self.kernel, pointers(self.kernel), constants, self.expressions.outer.lines)

    def _prologue(self) -> None:
        """The points of this program, and the inner points of a persistent block."""
        lines = self.expressions.outer.lines
        lines.extend(widened_sizes(self.kernel, self.schedule.wide))
        cast = ".to(tl.int64)" if self.schedule.wide else ""
        points = self.layout.points
        if points is None and self.kernel.grid:
            lines.append(f"{self.layout.grid.flat} = tl.program_id(0){cast}")
        if points is not None:
            row = f"tl.program_id(0){cast} * XBLOCK + tl.arange(0, XBLOCK)"
            spread = self.layout.spread(points)
            lines.append(f"{points.span.flat} = " + (f"({row}){spread}" if spread else row))
            lines.extend(mask_lines(points))
        for group in self.layout.groups:
            if not group.looped:
                lines.append(f"{group.span.flat} = tl.arange(0, {group.constant}){self.layout.spread(group)}{cast}")
                lines.extend(mask_lines(group))

    def _straight(self) -> None:
        """Every value once, then the stores: so nothing is overwritten before it was read."""
        stores = [self._store(store) for store in self.kernel.stores]
        self.expressions.outer.lines.extend(stores)

    def _store(self, store: Store) -> str:
        self.expressions.prepare(store.value)
        return self.expressions.store(store)

    def _passes(self) -> None:
        """One loop per level of reductions and group; what depends on no inner axis is stored at the end."""
        work, final = self._work()
        for (_, position), (reductions, stores) in sorted(work.items(), key=lambda item: item[0]):
            self._pass(self.layout.groups[position], reductions, stores)
        lines = [self._store(store) for store in final]
        self.expressions.outer.lines.extend(lines)

    def _work(self) -> tuple[dict[tuple[int, int], tuple[list[Reduce], list[Store]]], list[Store]]:
        """(level, group) -> what its pass reduces and stores; and the stores that belong to no pass.

        An output that shares memory with an input is stored in the last pass: earlier ones would overwrite what later ones read again.
        """
        levels = _levels(self.kernel)
        groups = self.layout.groups
        work: dict[tuple[int, int], tuple[list[Reduce], list[Store]]] = {}
        for value in levels:
            if isinstance(value, Reduce):
                (group,) = self.layout.along(value.axes)
                work.setdefault((levels[value.value], groups.index(group)), ([], []))[0].append(value)
        last = max([level for level, _ in work] + [levels[s.value] for s in self.kernel.stores], default=0)
        shared = {output for output, _ in self.kernel.inplace}
        final: list[Store] = []
        for store in self.kernel.stores:
            along = [d for d in self.expressions.domain(store) if d in groups]
            if not along:
                final.append(store)
                continue
            level = last if store.buffer in shared else levels[store.value]
            work.setdefault((level, groups.index(along[0])), ([], []))[1].append(store)
        return work, final

    def _pass(self, group: Dimension, reductions: Sequence[Reduce], stores: Sequence[Store]) -> None:
        expressions = self.expressions
        flat, extent = group.span.flat, extent_source(group.span)
        body = expressions.enter()
        cast = ".to(tl.int64)" if self.schedule.wide else ""
        body.lines.append(f"{flat} = {flat}_start + tl.arange(0, {group.constant}){self.layout.spread(group)}{cast}")
        body.lines.extend(mask_lines(group))
        finishing: list[tuple[Reduce, list[str]]] = []
        for reduction in reductions:
            self.expressions.prepare(reduction.value)
            finishing.append((reduction, expressions.accumulate(reduction)))
        lines = [self._store(store) for store in stores]
        body.lines.extend(lines)
        expressions.leave()
        outer = expressions.outer.lines
        outer.append(f"for {flat}_start in range(0, {extent}, {group.constant}):")
        outer.extend(f"    {line}" for line in body.lines)
        for reduction, names in finishing:
            expressions.finish(reduction, names)


def _levels(kernel: Kernel) -> dict[Scalar, int]:
    """Scalar -> how many reductions deep what it is computed from lies: the pass that can compute it."""
    levels: dict[Scalar, int] = {}
    for value in scalars(kernel.stores):
        levels[value] = max((levels[v] + isinstance(v, Reduce) for v in operands(value)), default=0)
    return levels

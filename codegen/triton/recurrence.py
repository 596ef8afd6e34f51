"""The template of recurrences (layers of an LSTM, GRU or plain RNN): a program walks all steps of a block of rows.

    rnn[step, row, unit]: h = tanh(x[step, row, unit] + sum over source of h before [row, source] * w[unit, source])

      row: the rows of this program
      h = h0                                                 in registers where one block holds all units, else in memory
      for step, for a block of units:
        dot = h before @ w.T                                 block by block along the source
        h = tanh(x [row, unit] + dot)                        the kernel's own scalars; stored where the kernel says so
        wait for the program's other threads                 where states are in memory
      store h

All units of a row are one program's: the next step needs all of them, and programs cannot wait for each other. A state in memory lies
there twice: a step reads those of the one before, and writes the others.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import sympy

from ...ir.dims import Mod, product
from ...ir.scalar import Scalar
from ..kernel import Axis, Dot, Kernel, Last, Load, Previous, Store, cone
from ..names import unique
from .attention_parts import flat
from .expressions import Scope
from .indices import Span
from .layout import Dimension, Layout, extent_source, flat_name, mask_lines
from .legalize import UnsupportedByTriton, legalize, rewritten
from .operands import Operand, variable
from .printer import function_text, module, widened_sizes
from .program import Launch, Program, blocks_of, function_name
from .recurrence_tiles import Layer, RecurrenceTiles, find_layer, holds_weights, in_registers, refusal, values_of_step


def build_recurrence(kernel: Kernel, tiles: RecurrenceTiles) -> Program:
    """Raises UnsupportedByTriton where the kernel is no recurrence that is walked, or its tiles are not legal."""
    found = find_layer(kernel)
    problem = refusal(found, tiles)
    if problem is not None:
        raise UnsupportedByTriton(what=kernel.name, reason=problem)
    printer = RecurrencePrinter(found, tiles)
    text = printer.function()
    grid = (blocks_of(product(a.extent for a in found.rows), tiles.block_m),)
    launch = Launch(function_name(kernel), printer.buffers, grid, printer.constants, tiles.num_warps, tiles.num_stages, tiles.wide)
    return Program(kernel, tiles, module([text]), (launch,), printer.memory)


@dataclass(frozen=True)
class Walk:
    """How a block {a} of states is multiplied by a block {b} of weights: one of several blocks, all at once, and the total of several."""

    empty: str
    add: str
    whole: str
    total: str


WALKS = {
    "dot": Walk(
        "tl.full([BLOCK_M, BLOCK_N], 0, tl.float32)",
        '{acc} = tl.dot({a}, {b}.T, {acc}, input_precision="ieee")',
        'tl.dot({a}, {b}.T, input_precision="ieee")',
        "{acc}",
    ),
    "sum": Walk(
        "tl.full([BLOCK_M, BLOCK_N, BLOCK_K], 0, tl.float32)",
        "{acc} += {a} * {b}",
        "tl.sum({a} * {b}, axis=2, keep_dims=True)",
        "tl.sum({acc}, axis=2, keep_dims=True)",
    ),
}


class _Writer(Operand):
    """Writes values inside of a loop and before it. inside: axes along which the body of the loop moves."""

    inside: frozenset[str] = frozenset()

    def _scope(self, axes: frozenset[str]) -> Scope:
        return self.body if self.body is not None and axes & self.inside else self.outer

    @property
    def here(self) -> list[str]:
        """The lines of what is being written."""
        return (self.body or self.outer).lines


class RecurrencePrinter:
    """Prints the function of a kernel with a recurrence."""

    def __init__(self, found: Layer, tiles: RecurrenceTiles) -> None:
        self.found, self.tiles, self.walk = found, tiles, WALKS[tiles.walk]
        self.states, self.registers = found.recurrence.states, in_registers(found, tiles)
        self.memory = () if self.registers else found.memory
        kernel, unit = found.kernel, found.unit
        self.buffers = tuple(b.name for b in (*kernel.inputs, *kernel.outputs, *self.memory))
        taken = {a.name for a in kernel.axes} | set(kernel.sizes)
        rows = found.rows or (Axis(unique("row", taken), 1),)
        down = replace(unit, name=unique(f"{unit.name}_down", taken))
        name = flat_name(rows, "row", taken)
        self.rows = Dimension(Span(rows, name), "BLOCK_M", tiles.block_m, shared=True)
        self.unit = _dimension(unit, "BLOCK_N", tiles.block_n)
        self.down = self.unit if tiles.walk == "sum" else _dimension(down, "BLOCK_N", tiles.block_n)
        block = ("BLOCK_N", tiles.block_n) if self.registers else ("BLOCK_K", tiles.block_k)
        self.source = _dimension(found.source, *block)
        inner = tuple(replace(a, inner=True) for a in (*rows, unit, down, found.step, found.source))
        self.kernel = replace(kernel, axes=inner, inputs=(*kernel.inputs, *self.memory), recurrence=None)
        self.results = (self.rows, self.unit) if tiles.walk == "dot" else (self.rows, self.unit, self.source)
        self.constants = {d.constant: d.block for d in (self.rows, self.unit, self.source)}
        self.cast = ".to(tl.int64)" if tiles.wide else ""
        self.changing = frozenset((found.step.name, unit.name) if self.unit.looped else (found.step.name,))
        self.beside: _Writer | None = None
        self.first = self.beside = self.writer(self.starts(), self.results, zero=(self.unit,))
        self.lines, self.fresh = self.first.outer.lines, self.first.fresh
        self.turn, self.variables = self.fresh("turn"), {s.name: self.fresh(s.name) for s in self.states}
        self.begins = {d.span.flat: self.fresh(f"{d.span.flat}_start") for d in (self.unit, self.source)}

    def function(self) -> str:
        self.place()
        self.start()
        self.steps()
        self.finish()
        return function_text(self.kernel, self.buffers, self.constants, self.lines)

    def writer(
        self, stores: Iterable[Store], dimensions: Sequence[Dimension], known: Mapping[Scalar, Scalar] = {},
        body: Scope | None = None, inside: frozenset[str] = frozenset(), zero: Sequence[Dimension] = (),
    ) -> _Writer:  # fmt: skip
        """A writer of the values of these stores, in which others stand for what is known. body: of the loop it writes, if any."""
        legal = legalize(replace(self.kernel, stores=rewritten(stores, known)))
        made = _Writer(legal, Layout(Span((), "program"), None, tuple(dimensions)), self.tiles, self.beside, zero)
        made.body, made.inside = body, inside
        made.name_variables()
        return made

    # ---- where a program stands

    def place(self) -> None:
        """The rows of this program, and what it has whole blocks of."""
        self.lines.extend(widened_sizes(self.kernel, self.tiles.wide))
        points = f"tl.program_id(0){self.cast} * BLOCK_M + tl.arange(0, BLOCK_M)"
        self.lines.append(f"{self.rows.span.flat} = ({points}){self.spread(self.rows)}")
        self.lines.extend(mask_lines(self.rows))
        for dimension in dict.fromkeys((self.unit, self.down, self.source)):
            if not dimension.looped:
                self.lines.extend(self.position(dimension))

    def spread(self, dimension: Dimension) -> str:
        """The subscript that puts points along a dimension of its blocks."""
        if dimension in self.results:
            return Layout(Span((), ""), None, self.results).spread(dimension)
        return "[:, None]" if dimension is self.down else "[None, :]"

    def position(self, dimension: Dimension) -> list[str]:
        """The points of a dimension, in its loop if it has one, and which of them exist."""
        points, start = f"tl.arange(0, {dimension.constant})", self.source if dimension is self.source else self.unit
        at = f"({self.begins[start.span.flat]} + {points})" if dimension.looped else points
        return [f"{dimension.span.flat} = {at}{self.spread(dimension)}{self.cast}", *mask_lines(dimension)]

    def loop(self, dimension: Dimension, lines: Sequence[str]) -> list[str]:
        """The loop over the blocks of a dimension."""
        head = f"for {self.begins[dimension.span.flat]} in range(0, {extent_source(dimension.span)}, {dimension.constant}):"
        return [head, *(f"    {line}" for line in lines)]

    def each(self, write: Callable[[Scope | None], None]) -> None:
        """Lets `write` write for all units: a block of them at a time where one does not hold all."""
        if not self.unit.looped:
            write(None)
            return
        body = Scope(self.position(self.unit))
        write(body)
        self.lines.extend(self.loop(self.unit, body.lines))

    @staticmethod
    def store(writer: _Writer) -> None:
        """All values first, then the stores."""
        for store in writer.kernel.stores:
            writer.prepare(store.value)
        stores = [writer.store(s) for s in writer.kernel.stores]
        writer.here.extend(stores)

    # ---- states

    def slot(self, step: sympy.Expr) -> sympy.Expr:
        """Which of the two places of a state in memory a step reads; the next step reads the other one."""
        return sympy.sympify(Mod(step, sympy.Integer(2)))  # type: ignore[return-value]

    def ends(self) -> tuple[sympy.Expr, sympy.Expr]:
        """Which of them is read by the first step, and which is written by the last one."""
        steps = sympy.sympify(self.found.step.extent)
        if self.found.recurrence.reverse:  # from steps - 1 to 0
            return self.slot(steps + 1), sympy.Integer(1)
        return sympy.Integer(0), self.slot(steps)

    def place_of(self, unit: Axis, slot: sympy.Expr) -> sympy.Expr:
        """The position of a state in memory."""
        units = self.found.units
        return sympy.expand(flat(self.rows.span.axes) * 2 * units + slot * units + unit.symbol)

    def state(self, name: str, index: sympy.Expr) -> Load:
        """A state: in memory at the index, or a variable that has its axes."""
        number = next(i for i, s in enumerate(self.states) if s.name == name)
        dtype = self.states[number].following.dtype
        return variable(dtype, self.variables[name], index) if self.registers else Load(dtype, self.memory[number].name, index)

    def starts(self) -> list[Store]:
        index = self.place_of(self.found.unit, self.ends()[0])
        places = [b.name for b in self.memory] or [""] * len(self.states)
        return [Store(name, index, s.initial) for name, s in zip(places, self.states)]

    def start(self) -> None:
        """The states before the first step."""
        if self.registers:
            for state, store in zip(self.states, self.first.kernel.stores):
                value = self.first.operand(store.value, along=(self.rows, self.unit))
                self.lines.append(f"{self.variables[state.name]} = {value}")
            return

        def write(body: Scope | None) -> None:
            self.store(self.writer(self.starts(), self.results, {}, body, self.changing))

        self.each(write)
        self.lines.append("tl.debug_barrier()")

    def finish(self) -> None:
        """The stores of the last states."""
        stores = [s for s in self.found.kernel.stores if isinstance(s.value, Last)]
        index = self.place_of(self.found.unit, self.ends()[1])
        known: dict[Scalar, Scalar] = {s.value: self.state(s.value.state.name, index) for s in stores if isinstance(s.value, Last)}

        def write(body: Scope | None) -> None:
            self.store(self.writer(stores, self.results, known, body, self.changing))

        self.each(write)

    # ---- steps

    def steps(self) -> None:
        """The loop over the steps."""
        step, reverse = self.found.step, self.found.recurrence.reverse
        lines, extent = self.step(), extent_source(Span((step,), ""))
        turn = self.turn if self.tiles.wide or reverse else step.name
        if turn != step.name:
            last = str(step.extent - 1) if isinstance(step.extent, int) else f"{extent} - 1"
            at = f"{last} - {turn}" if reverse else turn
            lines.insert(0, f"{step.name} = tl.cast({at}, tl.int64)" if self.tiles.wide else f"{step.name} = {at}")
        self.lines.append(f"for {turn} in range(0, {extent}):")
        self.lines.extend(f"    {line}" for line in lines)

    def step(self) -> list[str]:
        """What one step does."""
        dimensions = dict.fromkeys((self.unit, self.down)) if self.unit.looped else ()
        body = Scope([line for d in dimensions for line in self.position(d)])
        known = self.known(self.multiply(body))
        after = self.place_of(self.found.unit, 1 - self.slot(self.found.step.symbol))
        places = [b.name for b in self.memory] or [""] * len(self.states)
        stores = [Store(name, after, s.following) for name, s in zip(places, self.states)]
        stores.extend(s for s in self.found.kernel.stores if not isinstance(s.value, Last))
        writer = self.writer(stores, self.results, known, body, self.changing)
        if self.registers:
            self.hand_on(writer)
            return body.lines
        self.store(writer)
        return [*(self.loop(self.unit, body.lines) if self.unit.looped else body.lines), "tl.debug_barrier()"]

    def hand_on(self, writer: _Writer) -> None:
        """The stores of a step, and its states in the variables of those before."""
        following, others = writer.kernel.stores[: len(self.states)], writer.kernel.stores[len(self.states) :]
        for store in writer.kernel.stores:
            writer.prepare(store.value)
        values = [writer.operand(s.value, along=(self.rows, self.unit), zero=(self.unit,)) for s in following]
        stores = [writer.store(s) for s in others]
        names = ", ".join(self.variables[s.name] for s in self.states)
        writer.here.extend([*stores, f"{names} = {', '.join(values)}"])

    def known(self, products: Mapping[Dot, str]) -> dict[Scalar, Scalar]:
        """What stands for the products of a step, and for the states before."""
        found, step = self.found, self.found.step.symbol
        everywhere = sympy.Add(*(a.symbol for a in self.rows.span.axes), found.unit.symbol, step)
        before = everywhere if self.registers else self.place_of(found.unit, self.slot(step))
        known: dict[Scalar, Scalar] = {dot: variable(dot.dtype, name, everywhere) for dot, name in products.items()}
        for value in cone(values_of_step(found.kernel, found.recurrence)):
            if isinstance(value, Previous) and value.at == found.unit.name:
                known[value] = self.state(value.state, before)
        return known

    # ---- products

    def multiply(self, body: Scope) -> dict[Dot, str]:
        """Writes the products with the states before, for the units of a body; by which variable each is known."""
        looped, dots = self.source.looped, self.found.dots
        depth = Scope(self.position(self.source)) if looped else body
        names = [self.fresh("acc" if looped else "dot") for _ in dots]
        body.lines.extend(f"{name} = {self.walk.empty}" for name in names if looped)
        before, weights = self.before(depth), self.weights(depth)
        for name, a, store in zip(names, before, weights.kernel.stores):
            b = weights.operand(store.value, along=(self.down, self.source))
            code = self.walk.add if looped else f"{{acc}} = {self.walk.whole}"
            depth.lines.append(code.format(acc=name, a=a, b=b))
        if looped:
            body.lines.extend(self.loop(self.source, depth.lines))
            names = [self.total(name, body) for name in names]
        return dict(zip(dots, names))

    def total(self, acc: str, body: Scope) -> str:
        code = self.walk.total.format(acc=acc)
        if code == acc:
            return acc
        name = self.fresh("dot")
        body.lines.append(f"{name} = {code}")
        return name

    def before(self, depth: Scope) -> list[str]:
        """Variables that hold, for each product, the state before, along the terms."""
        states = [dot.left.state for dot in self.found.dots if isinstance(dot.left, Previous)]
        if self.registers:
            return [self.variables[name] for name in states] if self.tiles.walk == "dot" else self.turned(states, depth)
        index = self.place_of(self.found.source, self.slot(self.found.step.symbol))
        stores = [Store("", sympy.Integer(0), self.state(name, index)) for name in states]
        across = (self.rows, self.source)
        inside = frozenset({self.found.step.name, self.found.source.name})
        blocks = across if self.tiles.walk == "dot" else self.results
        writer = self.writer(stores, blocks, {}, depth.shared(), inside, (self.source,))
        return [writer.operand(s.value, along=across) for s in writer.kernel.stores]

    def turned(self, states: Sequence[str], body: Scope) -> list[str]:
        """States in variables, along the terms."""
        names = {state: self.fresh(f"{state}_before") for state in dict.fromkeys(states)}
        body.lines.extend(f"{name} = tl.reshape({self.variables[state]}, [BLOCK_M, 1, BLOCK_N])" for state, name in names.items())
        return [names[state] for state in states]

    def weights(self, depth: Scope) -> _Writer:
        """A writer of the weights of each product, in order."""
        moved = {self.found.unit.symbol: self.down.span.axes[0].symbol}
        stores = rewritten([Store("", sympy.Integer(0), dot.right) for dot in self.found.dots], {}, moved)
        dimensions = () if holds_weights(self.found, self.tiles) else (self.down, self.source)
        inside = frozenset(a.name for d in dimensions for a in d.span.axes)
        blocks = (self.down, self.source) if self.tiles.walk == "dot" else self.results
        return self.writer(stores, blocks, {}, depth.shared(), inside, (self.source,))


def _dimension(axis: Axis, constant: str, block: int) -> Dimension:
    """An axis as a dimension, in a loop where one block does not hold it."""
    assert isinstance(axis.extent, int)
    return Dimension(Span((axis,), axis.name), constant, block, looped=block < axis.extent)

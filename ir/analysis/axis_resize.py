"""`resized`: the graph for another size of an axis.

    t : f32[1, 16, 8] = constant        t' : f32[1, s, 8] = slice(t, dim=1, start=0, stop=s)
    y : f32[1, 16, 8] = add(x, t)  -->  y' : f32[1, s, 8] = add(x', t')

Constants that are aligned with the axis give their first entries. Only sizes change, not what nodes do: it computes what the model
computes on an input of that size where no node says otherwise by a constant (a mean that was folded into a product with 1 / size).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from types import MappingProxyType
from typing import Any, Union

from ..dims import Dim, SymbolRange, contiguous_strides, dim, free_symbols, same, same_shape
from ..errors import TilewrightError, TypeInferenceError
from ..graph import Graph, Node, order
from ..ops import OPS
from .axis_spread import Conflict, operand_ends, spread
from .places import OUT, Along, Axis, End

Remake = Union[Node, Callable[[Node, tuple[Node, ...]], Node]]
"""What stands for a node: another node, or what makes one from the node and its new operands."""


class CannotResize(TilewrightError):
    """A node has no form for another size of the axis."""

    template = "{node} cannot be made for size {size} of the axis: {reason}"


def resized(graph: Graph, axis: Axis, size: Dim, replace: Mapping[Node, Remake] | None = None) -> Graph:
    """The graph with values along `axis` made for `size`, an integer or an expression of sizes; `replace` says what stands for some nodes.

    Inputs keep their order; those that come in by `replace` and are new follow. Raises CannotResize, which names the node.
    """
    return _Resizer(graph, axis, size, replace or {}).run()


class _Resizer:
    def __init__(self, graph: Graph, axis: Axis, size: Dim, given: Mapping[Node, Remake]) -> None:
        self.graph, self.axis, self.size, self.given = graph, axis, size, given
        self.new: dict[Node, Node] = {}
        self.aligned: dict[Any, Node] = {}
        self.cut = False

    def run(self) -> Graph:
        graph = self.graph
        moving = {n for n in self.axis.labels} | set(self.axis.sources)
        for node in order(graph):
            if node in moving or node in self.given or any(x in self.new and self.new[x] is not x for x in node.inputs):
                self.new[node] = self._node(node)
            elif node.op.name == "input":
                self.new[node] = node
        roots = {n: self.new.get(n, n) for n in (*graph.inputs, *graph.roots)}
        made = replace(
            graph,
            inputs=tuple(roots[n] for n in graph.inputs),
            outputs=tuple(roots[n] for n in graph.outputs),
            writes=tuple((roots[target], roots[value]) for target, value in graph.writes),
            symbols=self._symbols(),
            arena={},
            inplace={},
        )
        extra = [n for n in order(made) if n.op.name == "input" and n not in made.inputs]
        kept = [n for n in made.inputs if n.op.name == "input"]
        return replace(made, inputs=(*kept, *extra))

    def _symbols(self) -> dict[str, SymbolRange]:
        """A new symbol has at most the size that the axis had, if constants were cut to it."""
        known = dict(self.graph.symbols)
        hi = self.axis.size if self.cut and isinstance(self.axis.size, int) else None
        return {s.name: SymbolRange(1, hi) for s in free_symbols([self.size])} | known

    def _node(self, node: Node) -> Node:
        given = self.given.get(node)
        if isinstance(given, Node):
            return given
        ends = self._ends(node)
        inputs = self._operands(node, ends)
        if given is not None:
            return given(node, inputs)
        self._check_part(node, ends)
        shapes = self._shapes(node, ends)
        if node.op.name == "input":
            kind = node.tensor.with_shape(shapes[0])
            return replace(node, type=kind, attrs=MappingProxyType({**node.attrs, "type": kind, "strides": None}))
        return self._made(node, inputs, shapes)

    def _check_part(self, node: Node, ends: Mapping[End, Along]) -> None:
        """Where a slice leaves out the end of what it reads, nobody says from which end it counts, unless the whole axis is left."""
        if node.op.name != "slice":
            return
        d = node.attrs["dim"] % node.tensor.rank
        here, there = ends.get((0, d)), ends.get((OUT, d))
        if here is not None and (there is None or not there.whole) and not same(node.attrs["stop"], node.inputs[0].shape[d]):
            raise self._error(node, "it takes a part of it, which may be counted from either end")

    def _operands(self, node: Node, ends: Mapping[End, Along]) -> tuple[Node, ...]:
        found = []
        for k, x in enumerate(node.inputs):
            told = {(OUT, d): along for (operand, d), along in ends.items() if operand == k}
            found.append(self.new[x] if x in self.new else self._align(x, told) if told else x)
        return tuple(found)

    def _ends(self, node: Node) -> Mapping[End, Along]:
        """Where the node holds the axis: what its operands and its result say, spread to constants."""
        if node.op.name in ("item", "input"):
            return {}
        known = {(OUT, d): along for d, along in enumerate(self.axis.everywhere(node) or ()) if along}
        for k, x in enumerate(node.inputs):
            if x in self.new:
                known |= {(k, d): along for d, along in enumerate(self.axis.everywhere(x) or ()) if along}
        try:
            return spread(node, known, self.axis.size)
        except Conflict as conflict:
            raise self._error(node, conflict) from conflict

    def _shapes(self, node: Node, ends: Mapping[End, Along]) -> list[tuple[Dim, ...]]:
        """The new shapes of the results."""
        if not isinstance(node.type, tuple):
            return [self._shape(node.shape, dict(enumerate(self.axis.everywhere(node) or ())))]
        held = [{d: along for (operand, d), along in ends.items() if operand == ~r} for r in range(len(node.type))]
        return [self._shape(kind.shape, places) for kind, places in zip(node.type, held)]

    def _shape(self, shape: tuple[Dim, ...], places: Mapping[int, Along | None]) -> tuple[Dim, ...]:
        return tuple(along.extent(self.size) if (along := places.get(d)) else extent for d, extent in enumerate(shape))

    def _made(self, node: Node, inputs: tuple[Node, ...], shapes: list[tuple[Dim, ...]]) -> Node:
        change = ATTRIBUTES.get(node.op.name)
        attrs = MappingProxyType({**node.attrs, **(change(node, inputs, shapes) if change else {})})
        try:
            made = replace(node, attrs=attrs).with_inputs(inputs)
        except TypeInferenceError as error:
            raise self._error(node, error.fields["reason"]) from error
        if not isinstance(node.type, tuple) and not same_shape(made.shape, shapes[0]):
            raise self._error(node, f"it would be {list(made.shape)}, not {list(shapes[0])}")
        return made

    def _align(self, x: Node, told: Mapping[End, Along]) -> Node:
        """What depends on no input of the axis, cut to the new size; views and element by element what it is made of."""
        key = (x, tuple(sorted(((d, along) for (_, d), along in told.items()), key=lambda item: item[0])))
        if key not in self.aligned:
            self.aligned[key] = self._aligned(x, told)
        return self.aligned[key]

    def _aligned(self, x: Node, told: Mapping[End, Along]) -> Node:
        given = self.given.get(x)
        if isinstance(given, Node):
            return given
        ends = operand_ends(x, told, self.axis.size)
        below = [{(OUT, d): along for (operand, d), along in ends.items() if operand == k} for k in range(len(x.inputs))]
        inputs = tuple(self._align(operand, b) if b else operand for operand, b in zip(x.inputs, below))
        if given is not None:
            return given(x, inputs)
        shape = self._shape(x.shape, {d: along for (operand, d), along in ends.items() if operand == OUT})
        part = x.op.name == "slice" and (OUT, x.attrs["dim"] % x.tensor.rank) in told  # of a larger table: the part is cut, not the table
        if (x.op.name in ("iota", "full") or any(below)) and not part:
            return self._made(x, inputs, [shape])
        return self._cut(x, told)

    def _cut(self, x: Node, told: Mapping[End, Along]) -> Node:
        """The first entries of a constant along the axis."""
        if isinstance(self.size, int) and isinstance(self.axis.size, int) and self.size > self.axis.size:
            raise self._error(x, f"it has entries for {self.axis.size} indices")
        self.cut = True
        for (_, d), along in told.items():
            if along.order is not None:
                raise self._error(x, "its rows are in an order that is computed")
            length, kept = along.length(self.axis.size), along.length(self.size)
            split = (*x.shape[:d], along.outer, length, along.inner, *x.shape[d + 1 :])
            merged = (*x.shape[:d], along.extent(self.size), *x.shape[d + 1 :])
            whole = x if along.single else OPS["reshape"](x, shape=split, prov=x.prov)
            cut = OPS["slice"](whole, dim=d if along.single else d + 1, start=0, stop=kept, hint=x.hint, prov=x.prov)
            x = cut if along.single else OPS["reshape"](cut, shape=merged, prov=x.prov)
        return x

    def _error(self, node: Node, reason: object) -> CannotResize:
        return CannotResize(node.prov.source, node=f"{node.op.name} {node.hint}".strip(), size=self.size, reason=reason)


Shape = tuple[Dim, ...]
Change = Callable[[Node, tuple[Node, ...], Sequence[Shape]], Mapping[str, Any]]


def _new_shape(node: Node, inputs: tuple[Node, ...], shapes: Sequence[Shape]) -> Mapping[str, Any]:
    return {"shape": shapes[0]}


def _slice(node: Node, inputs: tuple[Node, ...], shapes: Sequence[Shape]) -> Mapping[str, Any]:
    """A slice that goes to the end still does; one that leaves the whole axis leaves it."""
    d = node.attrs["dim"] % node.tensor.rank
    if same(node.inputs[0].shape[d], inputs[0].shape[d]):
        return {}
    if same(node.attrs["stop"], node.inputs[0].shape[d]):
        return {"stop": inputs[0].shape[d]}
    return {"stop": dim(node.attrs["start"] + shapes[0][d])} if node.attrs["step"] == 1 else {}


def _layout(node: Node, inputs: tuple[Node, ...], shapes: Sequence[Shape]) -> Mapping[str, Any]:
    return {"strides": _strides(node.attrs["strides"], shapes[0])}


def _strides(old: tuple[Dim, ...], shape: Shape) -> tuple[Dim, ...]:
    """Strides for the new shape, dimensions in memory in the order they were."""
    if not all(isinstance(s, int) for s in old):
        return contiguous_strides(shape)
    nested = sorted(range(len(shape)), key=lambda d: (-old[d], d))
    dense = contiguous_strides(tuple(shape[d] for d in nested))
    return tuple(dense[nested.index(d)] for d in range(len(shape)))


def _extern(node: Node, inputs: tuple[Node, ...], shapes: Sequence[Shape]) -> Mapping[str, Any]:
    """What torch returns has the new shapes; operands lie as they did."""
    types = tuple(t.with_shape(shape) for t, shape in zip(node.attrs["types"], shapes))
    strides = tuple(s and _strides(s, x.shape) for s, x in zip(node.attrs["strides"], inputs))
    return {"types": types, "strides": strides}


ATTRIBUTES: dict[str, Change] = {
    "reshape": _new_shape,
    "expand": _new_shape,
    "full": _new_shape,
    "iota": lambda node, inputs, shapes: {"length": shapes[0][0]},
    "slice": _slice,
    "layout": _layout,
    "extern": _extern,
}
"""Op -> its attributes that hold sizes, for new operands and the new shapes of its results."""

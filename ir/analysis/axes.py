"""Axis analysis: for an axis of an input (tokens, batch, rows of an image), where it lives in every value, and how each node treats it.

    tokens [b, S]: axis 1       embedding -> [b, S, d]                 S at 1       parallel
                                attention(q, k, v, causal=True)        S at 2       prefix
                                mean(x, dims=[1])                      nowhere      mixing: mean reduces it

Places are found by links between dimensions (`axis_links.py`), which are followed in both directions: from the input to what depends on
it, and from there to constants and other inputs that meet it element by element (tables of positions, masks). Labels are read off the
links and, where keys are masked, off the masks (`axis_masks.py`). A graph for another size of the axis: `axis_resize.py`.
"""

from __future__ import annotations

from collections.abc import Mapping

from ..graph import Graph, Node, order
from .axis_labels import labelled
from .axis_resize import CannotResize, resized
from .axis_roles import key_roles
from .axis_spread import Conflict, operand_ends, spread
from .places import OUT, Along, Axis, End, How, Label, Places

__all__ = ["Along", "Axis", "CannotResize", "How", "Label", "Places", "axis_of", "resized"]


def axis_of(graph: Graph, input: Node, dim: int) -> Axis:
    """The axis that is dimension `dim` of `input`. What is not understood is labelled MIXING, with the reason.

    An axis of size 1 cannot be told from what broadcasts: its first reader is MIXING.
    """
    search = _Search(graph, input, dim % input.tensor.rank)
    search.run()
    return search.result()


Ends = dict[End, Along]


class _Search:
    """Places of all values, found by sweeps over the graph until nothing new turns up.

    sources: inputs the axis lives in. hints: results of dependent nodes that readers found to hold the axis. ends: of every node that
    depends on a source, where the axis is in its operands and results. aligned: constants, and what is computed from them, that meet it.
    """

    def __init__(self, graph: Graph, input: Node, dim: int) -> None:
        self.graph, self.input, self.dim = graph, input, dim
        self.size = input.shape[dim]
        self.nodes = order(graph)
        self.sources: dict[Node, int] = {input: dim}
        self.hints: dict[Node, Ends] = {}
        self.ends: dict[Node, Ends] = {}
        self.aligned: dict[Node, Ends] = {}
        self.conflicts: dict[Node, str] = {}
        self.computed: set[Node] = set()  # what depends on an input
        for node in self.nodes:
            if node.op.name == "input" or not self.computed.isdisjoint(node.inputs):
                self.computed.add(node)
        self._changed = True

    def run(self) -> None:
        if self.size == 1:
            self.ends = {self.input: {(OUT, self.dim): Along()}}
            self.conflicts = {n: SINGLE for n in self.nodes if self.input in n.inputs}
            return
        while self._changed:
            self._changed, self.ends, self.conflicts, self.aligned = False, {}, {}, {}
            for node in self.nodes:
                self._visit(node)

    def _visit(self, node: Node) -> None:
        if node in self.sources:
            self.ends[node] = {(OUT, self.sources[node]): Along(), **self.hints.get(node, {})}
        elif any(x in self.ends for x in node.inputs):
            known = {(k, d): along for k, x in enumerate(node.inputs) for d, along in self._dims(x).items()}
            self.ends[node] = self._spread(node, known | self.hints.get(node, {}))
            self._tell(node)

    def _dims(self, x: Node) -> dict[int, Along]:
        """Dimension -> how it holds the axis, of a single result."""
        return {d: along for (operand, d), along in self.ends.get(x, {}).items() if operand == OUT and not isinstance(x.type, tuple)}

    def _spread(self, node: Node, known: Ends) -> Ends:
        if node.op.name == "item":
            chosen = self.ends[node.inputs[0]].items()
            found = {(OUT, d): along for (operand, d), along in chosen if ~operand == node.attrs["index"]}
            lost = {} if found else {(0, d): along for (operand, d), along in chosen if operand < 0}
            return known | found | lost
        try:
            return spread(node, known, self.size)
        except Conflict as conflict:
            self.conflicts[node] = str(conflict)
            return known

    def _tell(self, node: Node) -> None:
        """What the node knows of its operands is passed on to them."""
        if node.op.name == "item":
            return
        for k, x in enumerate(node.inputs):
            told = {(OUT, d): along for (operand, d), along in self.ends[node].items() if operand == k}
            if told and x in self.ends:
                self._hint(x, told)
            elif told:
                self._align(x, told)

    def _hint(self, x: Node, told: Ends) -> None:
        hints = self.hints.setdefault(x, {})
        new = {end: along for end, along in told.items() if end not in self.ends[x] and end not in hints}
        hints.update(new)
        self._changed |= bool(new)

    def _align(self, x: Node, told: Ends) -> None:
        """`x` depends on no source: it is aligned with the axis, and what it is made of, too. An input becomes a source."""
        if x.op.name == "input":
            self._changed |= x not in self.sources
            self.sources.setdefault(x, next(iter(told))[1])
            return
        if x in self.aligned and all(self.aligned[x].get(end) == along for end, along in told.items()):
            return
        ends = operand_ends(x, told, self.size, follow=x in self.computed)
        self.aligned.setdefault(x, ends)
        for k, operand in enumerate(x.inputs):
            below = {(OUT, d): along for (at, d), along in ends.items() if at == k}
            if below:
                self._align(operand, below)

    def result(self) -> Axis:
        ends = {n: self.ends[n] if n in self.ends else self.aligned[n] for n in self.nodes if n in self.ends or n in self.aligned}
        where = {n: _places(n, ends[n]) for n in ends if not isinstance(n.type, tuple)}
        roles = key_roles(ends)
        dependent = [n for n in self.nodes if (n in self.ends or n in self.conflicts) and n not in self.sources]
        return Axis(
            self.input,
            self.dim,
            self.size,
            places={n: kept for n in where if any(kept := _only(where[n], roles.rows.get(n, set())))},
            keys={n: kept for n in where if any(kept := _only(where[n], roles.keys.get(n, set())))},
            labels=labelled(self.graph, dependent, self.ends, self.conflicts, self.size),
            sources=self.sources,
        )


SINGLE = "the axis has a single index, which cannot be told from sizes that broadcast"


def _places(node: Node, ends: Mapping[End, Along]) -> Places:
    return tuple(ends.get((OUT, d)) for d in range(node.tensor.rank))


def _only(places: Places, dims: set[int]) -> Places:
    return tuple(along if d in dims else None for d, along in enumerate(places))

"""How each node treats an axis: read off the links that the axis lives in, softened where masks hide keys."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch

from ..dims import Dim
from ..graph import Graph, Node
from ..op import Category
from .axis_links import links
from .axis_masks import Fill, Masks, Matrix, any_of, later, reach
from .axis_routing import Routing
from .axis_spread import spread
from .places import OUT, PARALLEL, Along, End, How, Label, Link, Step, mixing

Ends = Mapping[End, Along]

HIDING = {
    "softmax": Fill.LOW, "log_softmax": Fill.LOW, "amax": Fill.LOW, "matmul": Fill.ZERO, "sum": Fill.ZERO, "mean": Fill.ZERO,
    "any": Fill.ZERO, "prod": Fill.ONE, "all": Fill.ONE,
}  # fmt: skip
"""Op -> what elements must hold for its result not to read what they stand for."""


def labelled(graph: Graph, nodes: Iterable[Node], ends: Mapping[Node, Ends], conflicts: Mapping[Node, str], size: Dim) -> dict[Node, Label]:
    """The labels of nodes that depend on the axis, which they hold at `ends`."""
    labels = _Labels(size, Routing(graph, ends))
    return {n: mixing(conflicts[n]) if n in conflicts else labels.of(n, ends.get(n, {})) for n in nodes}


class _Labels:
    def __init__(self, size: Dim, routing: Routing) -> None:
        self.size, self.masks, self.routing = size, Masks(size), routing

    def of(self, node: Node, ends: Ends) -> Label:
        if node.op.name == "input":
            return PARALLEL
        if node.op.name == "item":
            return _item(ends)
        if node.op.name == "reshape":
            return self._reshape(node, ends)
        table = links(node)
        worst = PARALLEL
        for end in (e for e in ends if e[0] >= 0):
            found = [self._link(node, link, end, ends) for link in table if end in link.ends]
            for label in found or [mixing(f"{_name(node)} is not known to keep its indices apart")]:
                worst = worst.and_also(label)
        return worst

    def _reshape(self, node: Node, ends: Ends) -> Label:
        kept = all(any(e[0] == OUT for e in spread(node, {end: along}, self.size)) for end, along in ends.items() if end[0] == 0)
        return PARALLEL if kept else mixing("it is cut into parts")

    def _link(self, node: Node, link: Link, end: End, ends: Ends) -> Label:
        """How the node treats the axis in the operand at `end`."""
        how, along = link.label.how, ends[end]
        if how is How.MIXING:
            hidden = self._attention(node, ends) if node.op.name == "attention" else self._hidden(node, link, ends)
            if hidden is None or not isinstance(self.size, int):
                return self.routing.label(node, link, ends)
            return reach(hidden, along, self.size, link.label)
        if how is How.PREFIX and (along.outer != 1 or along.order is not None):
            return mixing(f"{node.op.name} runs over other dimensions, too")
        result = next((ends[e] for e in link.ends if e[0] < 0 and e in ends), None)
        if isinstance(link.step, Step):
            lost = "a single index of it is left" if along.single else f"{node.op.name} works on it merged with other dimensions"
            if result is not None and _beside_keys(end, along, result, ends) and link.step.reach == 0:
                return PARALLEL
            return mixing(lost) if result is None else link.step.label(along, result, link.label.reason)
        return link.label if result is None else link.label.and_also(_distance(along, result))

    def _hidden(self, node: Node, link: Link, ends: Ends) -> Matrix | None:
        """Which keys do not count in rows of an operand that holds the axis twice: in the mixed dimension, and in one it keeps."""
        fill = HIDING.get(node.op.name)
        for k, d in link.ends:
            rows = [(at, along) for (operand, at), along in ends.items() if operand == k and at != d]
            if k >= 0 and fill and (k, d) in ends and len(rows) == 1:
                return self.masks.fills(node.inputs[k], rows[0], (d, ends[k, d])).get(fill)
        return None

    def _attention(self, node: Node, ends: Ends) -> Matrix | None:
        """Which keys a query does not see: those after it if causal, and those that its mask hides from it."""
        rank = node.tensor.rank
        rows, keys = ends.get((0, rank - 2)), ends.get((1, rank - 2))
        if rows is None or keys is None or not isinstance(self.size, int):
            return None
        hidden = later(self.size) if node.attrs["causal"] and rows.plain and keys.plain else None
        if len(node.inputs) < 4:
            return hidden
        mask = node.inputs[3]
        row, column = ((d, ends[3, d]) if (3, d) in ends else None for d in (mask.tensor.rank - 2, mask.tensor.rank - 1))
        return any_of(hidden, self.masks.fills(mask, row, column).get(Fill.ZERO if mask.dtype == torch.bool else Fill.LOW))


def _item(ends: Ends) -> Label:
    """One of several results; what holds the axis in another one was left by the last of its steps."""
    return PARALLEL if any(e[0] == OUT for e in ends) or not ends else mixing("it is what is left behind the last index")


def _beside_keys(end: End, along: Along, result: Along, ends: Ends) -> bool:
    """Where rows are in another dimension, keys that stand behind those of the axis move none of them."""
    twice = any(operand == end[0] and d != end[1] for operand, d in ends)
    return twice and all(a.start == 0 and a.stride == 1 and isinstance(a.extra, int) and a.extra >= 0 for a in (along, result))


def _distance(operand: Along, result: Along) -> Label:
    """Where the two hold the axis moved against each other, an index of the result reads a neighbour."""
    by = operand.start - result.start
    return PARALLEL if by == 0 else Label(How.WINDOW, max(-by, 0), max(by, 0), "it meets itself moved")


def _name(node: Node) -> str:
    return node.attrs["target"] if node.op.category is Category.EXTERN else node.op.name

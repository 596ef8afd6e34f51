"""How each node treats an axis: read off the links that the axis lives in, softened where masks hide keys."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch

from ..dims import Dim
from ..graph import Node
from ..op import Category
from .axis_links import OUT, End, Link, links, mixing
from .axis_masks import Fill, Masks, Matrix, any_of, later, reach
from .axis_spread import spread
from .places import PARALLEL, Along, How, Label

Ends = Mapping[End, Along]

HIDING = {
    "softmax": Fill.LOW, "log_softmax": Fill.LOW, "amax": Fill.LOW, "matmul": Fill.ZERO, "sum": Fill.ZERO, "mean": Fill.ZERO,
    "any": Fill.ZERO, "prod": Fill.ONE, "all": Fill.ONE,
}  # fmt: skip
"""Op -> what elements must hold for its result not to read what they stand for."""


def labelled(nodes: Iterable[Node], ends: Mapping[Node, Ends], conflicts: Mapping[Node, str], size: Dim) -> dict[Node, Label]:
    """The labels of nodes that depend on the axis, which they hold at `ends`."""
    labels = _Labels(size)
    return {n: mixing(conflicts[n]) if n in conflicts else labels.of(n, ends.get(n, {})) for n in nodes}


class _Labels:
    def __init__(self, size: Dim) -> None:
        self.size, self.masks = size, Masks(size)

    def of(self, node: Node, ends: Ends) -> Label:
        if node.op.name in ("item", "input"):
            return PARALLEL
        if node.op.name == "reshape":
            return self._reshape(node, ends)
        table = links(node)
        worst = PARALLEL
        for end in (e for e in ends if e[0] >= 0):
            found = [self._link(node, link, ends) for link in table if end in link.ends]
            for label in found or [mixing(f"{_name(node)} is not known to keep its indices apart")]:
                worst = worst.or_worse(label)
        return worst

    def _reshape(self, node: Node, ends: Ends) -> Label:
        kept = all(any(e[0] == OUT for e in spread(node, {end: along}, self.size)) for end, along in ends.items() if end[0] == 0)
        return PARALLEL if kept else mixing("it is cut into parts")

    def _link(self, node: Node, link: Link, ends: Ends) -> Label:
        if link.label.how is How.PREFIX and any(ends[e].outer != 1 for e in link.ends if e in ends):
            return mixing(f"{node.op.name} runs over other dimensions, too")
        if link.label.how is not How.MIXING:
            return link.label
        hidden = self._attention(node, ends) if node.op.name == "attention" else self._hidden(node, link, ends)
        return reach(hidden, link.label)

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


def _name(node: Node) -> str:
    return node.attrs["target"] if node.op.category is Category.EXTERN else node.op.name

"""A graph computed part by part along an axis: what treats indices alone, once for each part; a causal attention, with the keys so far.

    y = mlp(x)                                y1, y2 = mlp(x[:, :k]), mlp(x[:, k:])
    a = attention(q, k, v, causal)     -->    a1 = attention(q1, k1, v1, causal)
                                              a2 = attention(q2, cat(k1, k2), cat(v1, v2), mask)
    z = mean(y)                               z = mean(cat(y1, y2))

Whatever else there is reads the parts joined, and its result is cut where parts are wanted again: the same function for every graph.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from ..ir.analysis.axes import Along, Axis, How
from ..ir.analysis.axis_externs import SUMS
from ..ir.errors import TilewrightError
from ..ir.graph import Graph, Node, order
from ..ir.op import Category
from ..ir.ops import OPS
from ..ir.rewrite import remap

_SIZED = ("reshape", "expand")
"""Ops that are told the sizes of their result."""

_WHOLE = ("layout", "as_strided")
"""Ops that are for one size only."""


class Parts:
    """sizes: of the parts, in order. worked: contractions and attentions that are computed part by part; joined: those that are not."""

    def __init__(self, graph: Graph, axis: Axis, sizes: Sequence[int], rule: str) -> None:
        self.graph, self.axis, self.sizes, self.rule = graph, axis, tuple(sizes), rule
        self.starts = [sum(self.sizes[:i]) for i in range(len(self.sizes))]
        self.new: dict[Node, Node] = {n: n for n in graph.inputs}
        self.parts: dict[Node, tuple[Node, ...]] = {}
        self.worked: list[Node] = []
        self.joined: list[Node] = []
        self._sums = 0

    def rewritten(self) -> Graph:
        for node in order(self.graph):
            if node in self.new:
                continue
            made = self._parted(node)
            if made is None:
                self._count(node, self.joined)
                self.new[node] = self._on(node, [self.whole(i) for i in node.inputs])
            else:
                self._count(node, self.worked)
                self.parts[node] = made
        return remap(self.graph, {n: self.whole(n) for n in (*self.graph.inputs, *self.graph.roots)})

    def _count(self, node: Node, where: list[Node]) -> None:
        """Of those that the axis lives in, or did in what they read."""
        works = node.op.category is Category.CONTRACTION or node.op.name == "attention"
        if works and any(self.axis.everywhere(n) is not None for n in (node, *node.inputs)):
            where.append(node)

    # -- values, whole and in parts

    def whole(self, node: Node) -> Node:
        if node not in self.new:
            dim, along = self._place(node)
            self.new[node] = self._join(self.parts[node], dim, along, node)
        return self.new[node]

    def part(self, node: Node) -> tuple[Node, ...]:
        if node not in self.parts:
            dim, along = self._place(node)
            value = self.new[node]
            spans = zip(self.starts, self.sizes)
            self.parts[node] = tuple(self._cut(value, dim, along, start, start + size, node) for start, size in spans)
        return self.parts[node]

    def _place(self, node: Node) -> tuple[int, Along]:
        """The one dimension that the axis is in."""
        places = self.axis.everywhere(node) or ()
        return next((d, along) for d, along in enumerate(places) if along is not None)

    def _divisible(self, node: Node) -> bool:
        places = [p for p in self.axis.everywhere(node) or () if p is not None]
        return len(places) == 1 and places[0].order is None

    def _cut(self, value: Node, dim: int, along: Along, start: int, stop: int, node: Node) -> Node:
        """Indices start .. stop of the axis."""
        lead, rest = value.shape[:dim], value.shape[dim + 1 :]
        if along.outer != 1:
            value = self._make("reshape", node, value, shape=(*lead, along.outer, self.axis.size * along.inner, *rest))
        at = dim + (along.outer != 1)
        cut = self._make("slice", node, value, dim=at, start=start * along.inner, stop=stop * along.inner)
        if along.outer == 1:
            return cut
        return self._make("reshape", node, cut, shape=(*lead, along.extent(stop - start), *rest))

    def _join(self, parts: Sequence[Node], dim: int, along: Along, node: Node) -> Node:
        if along.outer == 1:
            return self._make("cat", node, *parts, dim=dim)
        lead, rest = node.shape[:dim], node.shape[dim + 1 :]
        opened = [
            self._make("reshape", node, p, shape=(*lead, along.outer, size * along.inner, *rest)) for p, size in zip(parts, self.sizes)
        ]
        return self._make("reshape", node, self._make("cat", node, *opened, dim=dim + 1), shape=node.shape)

    # -- nodes

    def _parted(self, node: Node) -> tuple[Node, ...] | None:
        """One node for each part, None where it needs them joined."""
        label = self.axis.labels.get(node)
        living = [i for i in node.inputs if self.axis.everywhere(i) is not None]
        if label is None or not living or not self._divisible(node) or node.op.name in _WHOLE:
            return None
        if node.op.name == "attention" and _looks_back(label.how, label.after):
            return self._attention(node)
        if label.how is not How.PARALLEL or not all(map(self._divisible, living)):
            return None
        if node.op.name == "extern" and node.attrs["target"] not in SUMS:
            return None
        return self._alone(node)

    def _alone(self, node: Node) -> tuple[Node, ...] | None:
        dim, along = self._place(node)
        found: list[Node] = []
        for p, size in enumerate(self.sizes):
            inputs = [self.part(i)[p] if self.axis.everywhere(i) is not None else self.whole(i) for i in node.inputs]
            shape = (*node.shape[:dim], along.extent(size), *node.shape[dim + 1 :])
            try:
                made = node.op(*inputs, hint=node.hint, prov=node.prov.with_rule(self.rule), **self._attrs(node, shape, p))
            except TilewrightError:  # sizes that something else has, too
                return None
            if made.shape != shape:
                return None
            found.append(made)
        self._sums += node.op.name == "extern" and node.attrs["target"] == SUMS[0]
        return tuple(found)

    def _attrs(self, node: Node, shape: tuple[Any, ...], part: int) -> Mapping[str, Any]:
        if node.op.name in _SIZED:
            return {**node.attrs, "shape": shape}
        if node.op.name != "extern":
            return node.attrs
        # sums of different parts are under way together: each is waited for just before the next one of its part
        begun = node.attrs["target"] == SUMS[0]
        count = 2 * len(self.sizes) * self._sums + 2 * part
        return {**node.attrs, "types": (node.tensor.with_shape(shape),), "sequence": count + begun}

    def _attention(self, node: Node) -> tuple[Node, ...] | None:
        """Queries of a part with the keys up to its end."""
        q, k, v, *masks = node.inputs
        if not all(self._rows(x) for x in (q, k, v)) or node.tensor.rank < 3:
            return None
        found: list[Node] = []
        for p, (start, size) in enumerate(zip(self.starts, self.sizes)):
            stop = start + size
            keys, values = (self._so_far(x, p) for x in (k, v))
            mask = self._mask(node, masks[0], start, stop) if masks else None
            if node.attrs["causal"] and p:
                mask = self._causal(node, mask, start, size)
            attrs = {**node.attrs, "causal": node.attrs["causal"] and not p}
            operands = (self.part(q)[p], keys, values, *(() if mask is None else (mask,)))
            found.append(node.op(*operands, hint=node.hint, prov=node.prov.with_rule(self.rule), **attrs))
        return tuple(found)

    def _rows(self, node: Node) -> bool:
        """Whether the axis is the last but one dimension of a value."""
        if not self._divisible(node):
            return False
        dim, along = self._place(node)
        return along.plain and dim == node.tensor.rank - 2

    def _so_far(self, node: Node, part: int) -> Node:
        parts = self.part(node)[: part + 1]
        return parts[0] if part == 0 else self._make("cat", node, *parts, dim=node.tensor.rank - 2)

    def _mask(self, node: Node, mask: Node, start: int, stop: int) -> Node:
        """Rows of the queries, columns of the keys so far; of sizes that are 1, all."""
        value, rank, size = self.whole(mask), mask.tensor.rank, self.axis.size
        if rank > 1 and mask.shape[-2] == size:
            value = self._make("slice", node, value, dim=rank - 2, start=start, stop=stop)
        return self._make("slice", node, value, dim=rank - 1, start=0, stop=stop) if rank and mask.shape[-1] == size else value

    def _causal(self, node: Node, mask: Node | None, start: int, size: int) -> Node:
        device = node.tensor.device
        rows = self._make("reshape", node, self._make("iota", node, length=size, start=start, device=device), shape=(size, 1))
        keep = self._make("ge", node, rows, self._make("iota", node, length=start + size, device=device))
        if mask is None:
            return keep
        if mask.dtype == torch.bool:
            return self._make("logical_and", node, mask, keep)
        return self._make("where", node, keep, mask, -math.inf)

    def _make(self, op: str, node: Node, *operands: Any, **attrs: Any) -> Node:
        return OPS[op](*operands, prov=node.prov.with_rule(self.rule), **attrs)

    def _on(self, node: Node, inputs: Sequence[Node]) -> Node:
        return node if tuple(inputs) == node.inputs else node.with_inputs(tuple(inputs))


def _looks_back(how: How, after: int) -> bool:
    return how is How.PREFIX or how is How.WINDOW and after == 0

"""Footprint: what the intermediate values of a canonical graph will take once its nodes are kernels, foretold without making them.

    c = conv(x, w)       one kernel, of which a alone is in memory
    a = add(c, s)

`plan-memory` says what it comes to; this tells plans apart before there are any kernels. Values that are returned are not counted, unless
by `held_bytes`.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field, replace

from ..dims import hint, same_shape
from ..graph import Graph, Node, is_scalar, order, use_counts
from ..op import Category
from ..types import TensorType

Bytes = Callable[[Node], int]


@dataclass
class Step:
    """A kernel or call: `node` is its result. reads: results of other steps. dying: those that it may be written over."""

    node: Node
    reads: dict[Node, None] = field(default_factory=dict)
    over: list[Node] = field(default_factory=list)


class Footprint:
    """The steps that a graph runs in, and how much memory they hold at a time."""

    def __init__(self, graph: Graph) -> None:
        self.graph = graph
        self.roots = frozenset(graph.roots)
        self.counts = use_counts(graph)
        self.home: dict[Node, Node] = {}
        """Value -> the result in whose memory it is; missing for inputs and constants."""
        self.joined: dict[Node, Node] = {}
        """Value that is never in memory -> the node that is computed with it."""
        self.position = {n: k for k, n in enumerate(order(graph))}
        for node in self.position:
            self._join(node)
        self.returned = frozenset(self.home[n] for n in graph.roots if n in self.home)
        """Results that are returned, themselves or by a view of them."""
        self.steps = [self._step(n) for n in self.position if self.is_result(n)]

    def is_result(self, node: Node) -> bool:
        """Whether it is the result of a kernel or call."""
        return self.home.get(node) is node and node not in self.joined

    def bytes(self, node: Node) -> int:
        """With symbolic sizes at a plausible value."""
        types = node.type if isinstance(node.type, tuple) else (node.type,)
        return sum(hint(t.nbytes, self.graph.symbols) for t in types if isinstance(t, TensorType))

    def peak(self, size: Bytes, among: Collection[Node] | None = None, extra: Mapping[Node, int] = {}) -> int:
        """The most bytes that values hold at a time. size: of a result. among: of these steps alone. extra: what a step takes itself."""
        steps = self.steps if among is None else [s for s in self.steps if s.node in among]
        last = {read: k for k, step in enumerate(steps) for read in step.reads}
        known = {s.node for s in steps}
        live = peak = 0
        held: dict[Node, int] = {}
        for k, step in enumerate(steps):
            dying = [n for n in step.reads if n in known and last[n] == k and n not in self.returned]
            written_over = next((n for n in step.over if n in dying and size(n) == size(step.node)), None)
            held[step.node] = 0 if step.node in self.returned else size(step.node)
            live += held[step.node] - (held[written_over] if written_over else 0)
            peak = max(peak, live, live - held[step.node] + extra.get(step.node, 0))
            live -= sum(held[n] for n in dying if n is not written_over)
            if step.node not in last:
                live -= held[step.node]
        return peak

    # -- which values are in memory

    def _join(self, node: Node) -> None:
        if is_scalar(node) or node.op.category is Category.CONSTANT:
            return
        self.home[node] = node
        if node.op.category is Category.VIEW or node.op.name in ("pad", "item"):
            self.home.pop(node)
            if node.inputs[0] in self.home:
                self.home[node] = self.home[node.inputs[0]]
            return
        taken = self._taken(node)
        if taken is not None:
            self.joined[taken] = node

    def _taken(self, node: Node) -> Node | None:
        """The operand that is computed in the kernel of a pointwise node: the last one that nothing else reads."""
        if not _is_pointwise(node):
            return None
        own = [i for i in node.inputs if self.home.get(i) is i and self.counts[i] == 1 and same_shape(i.tensor.shape, node.shape)]
        return max(own, key=self.position.__getitem__, default=None)

    def _step(self, node: Node) -> Step:
        step, stack = Step(node), [node]
        pointwise = True
        while stack:
            inside = stack.pop()
            pointwise = pointwise and _is_pointwise(inside)
            for operand in inside.inputs:
                if operand in self.joined and self.joined[operand] is inside:
                    stack.append(operand)
                elif operand in self.home:
                    step.reads[self.home[operand]] = None
                    if self.home[operand] is operand and operand.type == node.type:
                        step.over.append(operand)
        return step if pointwise else replace(step, over=[])  # other kernels write in other orders than they read


def _is_pointwise(node: Node) -> bool:
    return node.op.category is Category.POINTWISE or node.op.name in ("gelu", "batch_norm")


def peak_bytes(graph: Graph) -> int:
    """The most bytes that the intermediate values of a graph hold at a time."""
    found = Footprint(graph)
    return found.peak(found.bytes)


def held_bytes(graph: Graph) -> int:
    """The most bytes that values other than constants hold at a time: the intermediate ones, and all that is given and returned."""
    found = Footprint(graph)
    return found.peak(found.bytes) + sum(found.bytes(n) for n in {*graph.inputs, *found.returned})

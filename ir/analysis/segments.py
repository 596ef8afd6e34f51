"""Where a graph can be cut in two, and what then crosses: `segments(graph)`.

    x -> [embed] -> h0 -> [layer] -> h1 -> [layer] -> h2 -> [head] -> y
    mask -------------------^----------------^                             cut after h1: h1 and the mask cross

A cut lies behind a single tensor that everything goes through (`blocks.cut_points`), seen from any of the inputs; where a graph has too few
of these, behind each of its contractions. What hangs from other inputs crosses beside it, in the form that takes the fewest bytes: light
nodes that depend on no cut point (a mask made of lengths) are computed again where they are read, if that is less to carry. What depends on
no input is not carried at all. The set is a least cut of a network, always the one nearest to its readers: such cuts are nested, so what
crosses one can be computed from what crosses any before it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import networkx as nx

from ..dims import free_symbols, hint
from ..graph import Graph, Node, order, users
from ..op import Category
from ..types import TensorType
from ..verify import sizes_in
from .blocks import cut_points

_LIGHT = frozenset({
    Category.POINTWISE, Category.VIEW, Category.REDUCTION, Category.SCAN, Category.CONSTANT, Category.STRUCTURE, Category.GATHER,
})  # fmt: skip
_HEAVY = frozenset({"embedding", "region"})
"""Of these categories, but reading weights or doing whatever their body does."""


@dataclass(frozen=True, eq=False)
class Cut:
    """after: the cut point. crosses: all that is read behind the cut, by nodes or by the caller, and computed before it. nbytes: of these,
    a plausible number where sizes vary."""

    after: Node
    crosses: tuple[Node, ...]
    nbytes: int


@dataclass(frozen=True, eq=False)
class Segments:
    """cuts: in order, between len(cuts) + 1 segments. place: the segment of each node that is computed once; what else there is (inputs,
    constants, what is light and hangs from them alone) belongs to every segment that reads it. home: of each input that is written back,
    the segment that keeps it."""

    graph: Graph
    cuts: tuple[Cut, ...]
    place: Mapping[Node, int]
    home: Mapping[Node, int]


def segments(graph: Graph, least: int = 1) -> Segments:
    """Every place to cut. least: so many cuts are wanted; where single tensors give fewer, sets of several are offered.

    A place that has state, or random draws, on both sides, or where what comes behind would not be told a size, is none.
    """
    found = _segments(graph, _points(graph))
    if len(found.cuts) >= least:
        return found
    return max(found, _segments(graph, _contractions(graph)), key=lambda s: len(s.cuts))


def is_light(node: Node) -> bool:
    """Whether it costs no more than reading its operands once, and no weights are among these."""
    return node.op.category in _LIGHT and node.op.name not in _HEAVY


def _points(graph: Graph) -> list[Node]:
    """Cut points as seen from any of the inputs, in the order of the graph, from the first heavy node on."""
    heavy: set[Node] = set()
    for node in order(graph):
        if not is_light(node) or any(i in heavy for i in node.inputs):
            heavy.add(node)
    found: set[Node] = set()
    for source in graph.inputs:
        if isinstance(source.type, TensorType):
            chains = [cut_points(graph, source, sink) for sink in dict.fromkeys((*graph.outputs[:1], *graph.outputs[-1:]))]
            found.update(n for n in max(chains, key=len, default=[]) if n in heavy)
    return [n for n in order(graph) if n in found]


def _contractions(graph: Graph) -> list[Node]:
    readers = users(graph)
    return [n for n in order(graph) if n.op.category is Category.CONTRACTION and readers[n]]


def _segments(graph: Graph, points: Sequence[Node]) -> Segments:
    """As far as the points are legal; those that are not are left out, and their segments joined."""
    analysis = _Analysis(graph, points)
    cuts = [analysis.cut(i + 1) for i in range(len(points))]
    joined = [0]  # segment between points -> segment between legal cuts
    for cut in cuts:
        joined.append(joined[-1] + (cut is not None))
    place, home = ({n: joined[i] for n, i in found.items()} for found in (analysis.place, analysis.home))
    return Segments(graph, tuple(c for c in cuts if c is not None), place, home)


class _Analysis:
    """place, home: as of `Segments`. free: what depends on no input."""

    def __init__(self, graph: Graph, points: Sequence[Node]) -> None:
        self.graph, self.points = graph, points
        self.nodes, self.readers = order(graph), users(graph)
        self.index = {n: i for i, n in enumerate(self.nodes)}
        self.state = {target for target, _ in graph.writes}
        self.free = self._free()
        self.place = self._places()
        self.home = {t: max((self.place[n] for n in self._of_state(t, v)), default=0) for t, v in graph.writes}

    def _free(self) -> set[Node]:
        found: set[Node] = set()
        for node in self.nodes:
            if node.op.name != "input" and not _draws(node) and all(i in found for i in node.inputs):
                found.add(node)
        return found

    def _of_state(self, target: Node, value: Node) -> list[Node]:
        """What reads and makes it, of the nodes that are computed once."""
        return [n for n in (*self.readers[target], value) if n in self.place]

    def _once(self) -> list[Node]:
        """Nodes that are computed in one segment only: the heavy, and what depends on them, on a cut point or on state."""
        reached: set[Node] = {*self.points, *self.state}
        found: list[Node] = []
        for node in self.nodes:
            if node.op.name == "input" or node in self.free:
                continue
            if node in reached or not is_light(node) or any(i in reached for i in node.inputs):
                reached.add(node)
                found.append(node)
        return found

    def _places(self) -> dict[Node, int]:
        """What a cut point needs comes before it, all else as soon as its operands are there, behind the cut points among them; or, if that
        is everywhere, where it is read first. The results of one node stay with it."""
        once, needed, points = self._once(), self._needed(), set(self.points)
        place: dict[Node, int] = {}
        fixed: set[Node] = set()
        for node in once:
            above = [i for i in node.inputs if i in place]
            soonest = max((place[i] + (i in points) for i in above), default=0)
            place[node] = needed[node] if node in needed and node.op.name != "item" else soonest
            if node in needed or node.op.name == "item" or any(i in fixed for i in above):
                fixed.add(node)
        for node in reversed(once):
            reading = [place[r] for r in self.readers[node] if r in place]
            if node not in fixed and reading:
                place[node] = min(reading)
        return place

    def _needed(self) -> dict[Node, int]:
        """Node -> the first of the points that depends on it."""
        found: dict[Node, int] = {}
        for i, point in enumerate(self.points):
            stack = [point]
            while stack:
                node = stack.pop()
                if node not in found:
                    found[node] = i
                    stack += node.inputs
        return found

    def cut(self, number: int) -> Cut | None:
        """The cut before segment `number`, if it is legal."""
        if self._splits_state(number):
            return None
        wanted = self._wanted(number)
        crosses = self._least(wanted, number)
        if crosses is None or not self._sizes_told(wanted, crosses, number):
            return None
        point = self.points[number - 1]
        ordered = sorted(crosses, key=lambda n: (n is not point, self.index[n]))
        return Cut(point, tuple(ordered), sum(self._nbytes(n) for n in ordered))

    def _splits_state(self, number: int) -> bool:
        together = [self._of_state(target, value) for target, value in self.graph.writes]
        together.append([n for n in self.place if _draws(n)])
        return any(len({self.place[n] >= number for n in nodes}) > 1 for nodes in together) or bool(self.state & set(self.graph.outputs))

    def _wanted(self, number: int) -> list[Node]:
        """What is needed behind the cut: operands, and what is returned or written back there."""
        read = (i for n, place in self.place.items() if place >= number for i in n.inputs)
        written = (value for target, value in self.graph.writes if self.home[target] >= number)
        return list(dict.fromkeys([*read, *self.graph.outputs, *written]))

    def _leaf(self, node: Node, number: int) -> bool:
        """Whether a value is there before the cut, and not made again behind it."""
        return node.op.name == "input" or node in self.place and self.place[node] < number

    def _between(self, wanted: Iterable[Node], number: int) -> list[Node]:
        """All that must cross, or be made again of what does: from what is wanted up to what is there before the cut."""
        found: dict[Node, None] = {}
        stack = list(wanted)
        while stack:
            node = stack.pop()
            behind = node in self.place and self.place[node] >= number
            if node not in found and node not in self.free and node not in self.state and not behind:
                found[node] = None
                stack += () if self._leaf(node, number) else node.inputs
        return list(found)

    def _least(self, wanted: Sequence[Node], number: int) -> set[Node] | None:
        """The values to carry, with the fewest bytes in all; None where what would have to be carried is no tensor."""
        network: nx.DiGraph = nx.DiGraph()
        network.add_nodes_from(("source", "sink"))
        between = self._between(wanted, number)
        for node in between:
            carried = {"capacity": self._nbytes(node)} if isinstance(node.type, TensorType) else {}
            network.add_edge((node, "in"), (node, "out"), **carried)
            if self._leaf(node, number):
                network.add_edge("source", (node, "in"))
            else:
                network.add_edges_from(((i, "out"), (node, "in")) for i in node.inputs if i not in self.free)
        known = set(between)
        network.add_edges_from(((n, "out"), "sink") for n in wanted if n in known)
        try:
            before, _ = nx.minimum_cut(network, "source", "sink")[1]
        except nx.NetworkXUnbounded:
            return None
        return {n for n in between if (n, "in") in before and (n, "out") not in before}

    def _sizes_told(self, wanted: Sequence[Node], crosses: set[Node], number: int) -> bool:
        if not self.graph.symbols:
            return True
        told = {d for n in crosses for d in n.shape}
        needed: set[Node] = set()
        stack = [n for n in (*wanted, *(n for n, place in self.place.items() if place >= number)) if n not in crosses]
        while stack:
            node = stack.pop()
            if node not in needed:
                needed.add(node)
                stack += [i for i in node.inputs if i not in crosses]
        return all(symbol in told for n in needed for symbol in free_symbols(sizes_in((n.type, *n.attrs.values()))))

    def _nbytes(self, node: Node) -> int:
        return hint(node.tensor.nbytes, self.graph.symbols)


def _draws(node: Node) -> bool:
    return node.attrs.get("sequence") is not None

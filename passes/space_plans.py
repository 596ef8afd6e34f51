"""Where a stage of an image is to end, and in how many patches it is to be computed: least memory for an allowed amount of arithmetic.

arithmetic of a node   = that of one point * sum over patches of its rows * its columns      (rows and columns are independent)
memory of a stage      = the largest patch of each value, as long as it lives, and all results; then these once more, joined
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction

from ..ir.analysis.footprint import Footprint
from ..ir.analysis.halo import Span, Stage, needs_of_parts
from ..ir.dims import hint
from ..ir.graph import Graph, Node, users

PARTS = (1, 2, 3, 4, 5, 6, 7, 8, 10, 12, 14, 16, 20, 24, 28, 32)
"""Into how many parts an axis is cut. One leaves it as it is."""

MOST_PATCHES = 64
"""More make the program long, and each of them small."""

AS_GOOD = 1.03
"""Memory that is larger by so much is as good, if it takes less arithmetic."""


@dataclass(frozen=True)
class SpacePlan:
    """The stage ends with `end`, whose image is cut into `parts` along each axis.

    peak: bytes that the intermediate values of the graph will hold at a time, foretold. flops: of the whole graph, the halo included.
    """

    end: Node
    parts: tuple[int, ...]
    peak: int
    flops: Fraction

    @property
    def patches(self) -> int:
        return math.prod(self.parts)


def divided(size: int, parts: int) -> tuple[Span, ...]:
    """An axis in parts that differ by at most one; the longer ones stand at the ends, where the halo has one side only.

    Equal parts in between read alike, so that they share their kernels.
    """
    short, longer = divmod(size, parts)
    sizes = [short + (k < longer - longer // 2 or k >= parts - longer // 2) for k in range(parts)]
    stops = list(itertools.accumulate(sizes))
    return tuple(Span(stop - own, stop) for own, stop in zip(sizes, stops))


def point_flops(graph: Graph, node: Node, stage: Stage) -> Fraction:
    """Arithmetic of a node for one point of its image."""
    flops = node.op.cost(tuple(i.type for i in node.inputs), node.type, node.attrs).flops
    return Fraction(hint(flops, graph.symbols), math.prod(stage.sizes(node)))


def graph_flops(graph: Graph) -> int:
    """Arithmetic of a graph, by the costs of its ops."""
    return sum(hint(n.op.cost(tuple(i.type for i in n.inputs), n.type, n.attrs).flops, graph.symbols) for n in users(graph))


@dataclass(frozen=True)
class _Cut:
    """One axis in parts: of each node the points of all parts together, and of the largest."""

    parts: int
    total: dict[Node, int]
    largest: dict[Node, int]


class Planner:
    """All plans for a stage of a graph."""

    def __init__(self, graph: Graph, stage: Stage, overhead: float) -> None:
        self.graph, self.stage = graph, stage
        self.footprint = Footprint(graph)
        self.readers = users(graph)
        self.exact = self.footprint.peak(self.footprint.bytes)
        self.flops = graph_flops(graph)
        self.allowed = self.flops * (1 + Fraction(overhead))
        self.points = {n: point_flops(graph, n, stage) for n in stage.readings}

    def plans(self) -> Iterator[SpacePlan]:
        """Those that hold less than the graph does, within the allowed arithmetic."""
        for end in self.ends():
            region = _Region(self, end)
            if region.least() >= self.exact:
                continue
            cuts = [list(region.cuts(axis)) for axis in range(len(self.stage.dims))]
            for chosen in itertools.product(*cuts):
                if 1 < math.prod(cut.parts for cut in chosen) <= MOST_PATCHES:
                    plan = region.plan(chosen)
                    if plan.flops <= self.allowed and plan.peak < self.exact:
                        yield plan

    def plan(self, end: Node, parts: Sequence[int]) -> SpacePlan | None:
        """The plan with these parts, whatever it costs; None where an axis cannot be cut so."""
        region = _Region(self, end)
        cuts = [region.cut(axis, n) for axis, n in enumerate(parts)]
        known = [cut for cut in cuts if cut is not None]
        return region.plan(known) if len(known) == len(cuts) else None

    def ends(self) -> list[Node]:
        """Results through which everything goes that the stage gives to the rest."""
        found = []
        for end in (n for n in self.stage.readings if self.footprint.is_result(n)):
            under = self.stage.under(end)
            inside = set(under)
            if all(n is end or n not in self.footprint.roots and inside.issuperset(self.readers[n]) for n in under):
                found.append(end)
        return found


class _Region:
    """A stage up to one of its ends."""

    def __init__(self, planner: Planner, end: Node) -> None:
        self.planner, self.end, self.stage = planner, end, planner.stage
        self.bytes, self.footprint = planner.footprint.bytes, planner.footprint
        self.under = self.stage.under(end)
        self.rest = {s.node for s in self.footprint.steps} - set(self.under) | {end}
        self.whole = sum((self._flops(n, self.stage.sizes(n)) for n in self.under), start=Fraction(0))
        self.returned = end in self.footprint.roots

    def _flops(self, node: Node, points: Sequence[int]) -> Fraction:
        return self.planner.points[node] * math.prod(points)

    def cuts(self, axis: int) -> Iterator[_Cut]:
        """The axis in as many parts as may be within what is allowed, the other axes being whole."""
        for parts in PARTS:
            cut = self.cut(axis, parts) if parts <= self.stage.sizes(self.end)[axis] else None
            if cut is None or self._more(axis, cut) > self.planner.allowed - self.planner.flops:
                return
            yield cut

    def _more(self, axis: int, cut: _Cut) -> Fraction:
        """Arithmetic beyond that of the whole image."""
        apart = ((n, self.stage.sizes(n)) for n in self.under)
        return sum((self._flops(n, (*own[:axis], cut.total[n], *own[axis + 1 :])) for n, own in apart), start=-self.whole)

    def cut(self, axis: int, parts: int) -> _Cut | None:
        whole = {n: self.stage.sizes(n)[axis] for n in self.under}
        if parts == 1:
            return _Cut(1, whole, whole)
        taken = needs_of_parts(self.stage, self.end, axis, divided(whole[self.end], parts))
        if taken is None:
            return None
        return _Cut(parts, {n: sum(s[n].size for s in taken) for n in whole}, {n: max(s[n].size for s in taken) for n in whole})

    def plan(self, cuts: Sequence[_Cut]) -> SpacePlan:
        inside = sum((self._flops(n, [cut.total[n] for cut in cuts]) for n in self.under), start=Fraction(0))
        flops = self.planner.flops - self.whole + inside
        return SpacePlan(self.end, tuple(cut.parts for cut in cuts), self._peak(self._patches(cuts)), flops)

    # -- memory

    def least(self) -> int:
        """However small the patches are."""
        return self._peak(self._results())

    def _peak(self, stage: int) -> int:
        return self.footprint.peak(self.bytes, self.rest, {self.end: stage})

    def _results(self) -> int:
        """The results of all patches, and these joined."""
        return self.bytes(self.end) * (1 if self.returned else 2)

    def _patches(self, cuts: Sequence[_Cut]) -> int:
        """The largest patch beside the results of all others."""

        def size(node: Node) -> int:
            part = math.prod(cut.largest[node] for cut in cuts)
            return self.bytes(node) * part // math.prod(self.stage.sizes(node))

        patch = self.footprint.peak(size, set(self.under))
        own = 0 if self.returned else size(self.end)
        return max(self.bytes(self.end) - own + patch, self._results())


def best_plan(planner: Planner, limit: int = 0) -> SpacePlan | None:
    """The plan with the least memory, of those as good the one with the least arithmetic, then the fewest patches, then whole rows.

    limit: bytes that are little enough: of the plans that keep it, the one with the least arithmetic.
    """
    plans = list(planner.plans())
    if not plans:
        return None
    enough = max(limit, int(AS_GOOD * min(p.peak for p in plans)))
    return min((p for p in plans if p.peak <= enough), key=lambda p: (p.flops, p.patches, p.peak, p.parts[::-1]))

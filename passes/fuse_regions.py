"""fuse-regions: which nodes become one kernel."""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import ClassVar

from ..ir import ops
from ..ir.analysis.points import Refusal
from ..ir.analysis.primitives import EXPANDED, expanded
from ..ir.graph import Graph, Node, Stage, graph_input, lift, scalar_value
from ..ir.op import Category
from ..ir.rewrite import remap
from .base import Notes, Pass, Reason
from .fusion_cost import Price
from .fusion_regions import Builder, Region, connect, dissolve, inside_order, loose_sizes, merge, waits
from .fusion_units import FILLS, Units, find_units
from .recurrences import recurrence_region

MAX_SIBLINGS = 8
"""Readers of one value that are tried against each other: a value with more is small or shared by whole layers."""


@dataclass(frozen=True)
class FuseRegions(Pass):
    """Partitions a graph into kernels, by modelled bytes saved against recomputation.

        h = linear(x, w)                  h = linear(x, w)
        a = add(h, r)            -->      y = region(h, r) { add, layer_norm }
        y = layer_norm(a)

    Composites other than `attention` become primitives first. Externs, scatters, and those contractions, windows and attentions that are
    not ours stay library calls; views stay outside, unless read by a region, where they vanish into its indices. The reshape that joins
    the heads of an attention is in its kernel.
    max_values, max_buffers: limits on one kernel's scalars and tensors. library: contractions and attentions that were measured to be
    faster by the library, by their `signature`. offered: such as are the library's unless measured, and are ours here (`contractions.py`).
    """

    max_values: int = 400
    max_buffers: int = 32
    library: tuple[str, ...] = ()
    offered: tuple[str, ...] = ()

    name: ClassVar[str] = "fuse-regions"
    leaves: ClassVar[Stage | None] = Stage.FUSED

    def run(self, graph: Graph, notes: Notes | None = None) -> Graph:
        notes = notes if notes is not None else Notes()
        units = find_units(expanded(graph), self.library, self.offered)
        partition = _Partition(units, self.max_values, self.max_buffers)
        partition.grow(notes)
        partition.note(notes)
        made = _assemble(units, partition)
        dissolve(partition.regions())
        return made


class _Partition:
    """Merges regions greedily, best gain first, until no merge gains."""

    def __init__(self, units: Units, max_values: int, max_buffers: int) -> None:
        self.units, self.max_values, self.max_buffers = units, max_values, max_buffers
        self.builder = Builder(units)
        self.single: dict[Node, int] = {}
        self._drop_unplaceable()
        self.home: dict[Node, Region] = {}
        for k, node in enumerate(n for n in units.nodes if n not in units.transparent):
            self.home[node] = Region((node,), 1 << k)
        connect(self.home, units)
        for node, region in self.home.items():
            found = self.builder.price((node,)) if units.computes(node) else None
            region.price = found if isinstance(found, Price) else None
        self.products = list(itertools.accumulate((n.op.category is Category.CONTRACTION for n in units.nodes), initial=0))
        self.refused: dict[tuple[Region, Region], Refusal] = {}
        self.heap: list[tuple[int, int, Region, Region]] = []
        self.ticket = itertools.count()

    def _drop_unplaceable(self) -> None:
        """A unit that is no kernel even alone runs as it is."""
        for node in self.units.nodes:
            if self.units.computes(node):
                found = self.builder.price((node,))
                if isinstance(found, Refusal):
                    self.units.barriers[node] = found
                else:
                    self.single[node] = found.bytes

    def grow(self, notes: Notes) -> None:
        for region in list(self.home.values()):
            self._offer(region, region.next)
            self._offer(region, self._siblings(region))
        while self.heap:
            _, _, a, b = heapq.heappop(self.heap)
            if self._alive(a) and self._alive(b):
                self._try(a, b, notes)

    def _alive(self, region: Region) -> bool:
        return self.home[region.members[0]] is region

    def _offer(self, region: Region, others: Iterable[Region]) -> None:
        for other in others:
            gain = self._gain(region, other)
            if gain is not None and gain > 0:
                heapq.heappush(self.heap, (-gain, next(self.ticket), region, other))

    def _siblings(self, region: Region) -> list[Region]:
        """Regions that read a value which this one reads too."""
        found: dict[Region, None] = {}
        for source in region.previous:
            if len(source.next) <= MAX_SIBLINGS:
                found.update(dict.fromkeys(sorted(source.next, key=lambda r: r.bits)))
        return [r for r in found if r is not region and r.bits > region.bits]

    def _gain(self, a: Region, b: Region) -> int | None:
        """Bytes that one kernel for both saves; None where there is no such kernel."""
        if a.price is None or b.price is None:
            return None
        cost = self._joint(a, b)
        if isinstance(cost, Refusal):
            self.refused[a, b] = cost
            return None
        gain = a.price.work + b.price.work - cost.work
        if gain <= 0:
            self.refused[a, b] = Refusal(Reason.RECOMPUTE, b.members[0], f"{-gain} bytes' worth of time lost")
        elif cost.bytes >= a.price.bytes + b.price.bytes and b not in a.next and a not in b.next and self._products_between(a, b):
            self.refused[a, b] = Refusal(Reason.NO_GAIN, b.members[0], "one start is saved, and a result lies in memory for long")
            return None
        return gain

    def _products_between(self, a: Region, b: Region) -> int:
        """How many contractions and windows run after one of them and before the other: patches of an image follow each other so."""
        position = self.builder.position
        first, second = sorted((a, b), key=lambda region: position[region.members[0]])
        start, stop = position[first.members[-1]], position[second.members[0]]
        return self.products[max(stop, start)] - self.products[start]

    def _joint(self, a: Region, b: Region) -> Price | Refusal:
        found = self.builder.price(self._members(a, b))
        if isinstance(found, Price) and (found.values > self.max_values or found.buffers > self.max_buffers):
            return Refusal(Reason.TOO_LARGE, b.members[0], f"{found.values} values, {found.buffers} tensors")
        return found

    def _members(self, a: Region, b: Region) -> tuple[Node, ...]:
        return tuple(inside_order((*a.members, *b.members), self.builder.position))

    def _try(self, a: Region, b: Region, notes: Notes) -> None:
        if waits(a, b) or waits(b, a):
            self.refused[a, b] = Refusal(Reason.CYCLE, b.members[0], "")
            return
        if not notes.may(FuseRegions.name, b.members[-1], f"{label(a.members)} into {label(b.members)}"):
            return
        cost = self._joint(a, b)
        assert isinstance(cost, Price)
        live = {r for r in self.home.values() if r is not a and r is not b}
        made = merge(a, b, self._members(a, b), cost, live)
        for node in made.members:
            self.home[node] = made
        neighbours = sorted(made.next | made.previous, key=lambda r: r.bits)
        self._offer(made, [r for r in neighbours if r in made.next])
        for earlier in (r for r in neighbours if r in made.previous):
            self._offer(earlier, [made])
        self._offer(made, self._siblings(made))

    def regions(self) -> list[Region]:
        """Kernels and single units, in an order that respects who waits for whom."""
        live = list(dict.fromkeys(self.home.values()))
        return sorted(live, key=lambda r: (-bin(r.after).count("1"), self.builder.position[r.members[0]]))

    def note(self, notes: Notes) -> None:
        for region in self.regions():
            if region.price is not None:
                saved = sum(self.single[n] for n in region.members) - region.price.bytes
                notes.apply(FuseRegions.name, label(region.members), region.members[-1], saved)
        for node, refusal in self.units.barriers.items():
            if refusal is not None:
                notes.decline(FuseRegions.name, node.op.name, refusal.reason, node, refusal.value)
        for a, b, refusal in self._separate():
            what = f"{label(a.members)} into {label(b.members)}"
            notes.decline(FuseRegions.name, what, refusal.reason, b.members[0], refusal.value)

    def _separate(self) -> Iterator[tuple[Region, Region, Refusal]]:
        """Neighbours that stayed apart, with the reason."""
        for a in self.regions():
            for b in sorted(a.next, key=lambda r: r.bits):
                if a.price is None and b.price is None:
                    continue
                if a.price is None or b.price is None:
                    outside = (a if a.price is None else b).members[0]
                    if self.units.barriers[outside] is None and outside.op.category is not Category.CONSTANT:
                        yield a, b, Refusal(Reason.LIBRARY_CALL, outside, outside.op.name)
                    continue
                yield a, b, self.refused.get((a, b)) or self.refused.get((b, a)) or Refusal(Reason.CYCLE, b.members[0])


def label(members: Iterable[Node]) -> str:
    """What a region computes, in at most four words: composites by their own name."""
    words: dict[str, None] = {}
    for node in members:
        composite = next((r.removeprefix(EXPANDED) for r in node.prov.rules if r.startswith(EXPANDED)), None)
        words[composite or node.op.name] = None
    kept = [w for w in words if w not in ("cast",)] or list(words)
    return "+".join(kept[:4]) + ("+..." if len(kept) > 4 else "")


def _assemble(units: Units, partition: _Partition) -> Graph:
    graph = units.graph
    new: dict[Node, Node] = {n: n for n in graph.inputs}
    for region in partition.regions():
        if region.price is not None or region.members[0].op.category in _INSIDE_ONLY:
            _emit(region, partition.builder, new)
        else:
            _resolve(region.members[0], new)
    for root in graph.roots:
        _resolve(root, new)
    return remap(graph, new, stage=Stage.FUSED)


_INSIDE_ONLY = frozenset({Category.POINTWISE, Category.REDUCTION, Category.SCAN})
"""What stands only in regions: one that cannot be a kernel is run by its op's eager meaning, and is listed with the reason."""


def _emit(region: Region, builder: Builder, new: dict[Node, Node]) -> None:
    """Puts the region node and, for several outputs, its items in place of the members."""
    inside, outside = builder.needed(region.members)
    operands = [_resolve(n, new) for n in outside] + [lift(s) for s in loose_sizes(inside, outside)]
    outputs = builder.outputs(region.members)
    prov = region.members[0].prov.union(*(n.prov for n in region.members[1:])).with_rule(FuseRegions.name)
    node = ops.op("region")(*operands, body=builder.body(region.members), label=label(region.members), hint=outputs[0].hint, prov=prov)
    if len(outputs) == 1:
        new[outputs[0]] = node
        return
    for k, out in enumerate(outputs):
        new[out] = ops.op("item")(node, index=k, hint=out.hint, prov=out.prov)


def _resolve(node: Node, new: dict[Node, Node]) -> Node:
    """The new value of a node, transparent ones rebuilt on the way; iterative, as chains may be long."""
    stack = [node]
    while stack:
        top = stack[-1]
        missing = [] if top in new else [i for i in top.inputs if i not in new]
        if missing:
            stack.extend(missing)
            continue
        stack.pop()
        if top not in new:
            new[top] = _moved(top, new)
    return new[node]


def _moved(node: Node, new: dict[Node, Node]) -> Node:
    """The node on its new operands; a fill that is needed as a value of its own is a kernel, and so is a recurrence."""
    if node.op.name in FILLS:
        return _fill(node)
    inputs = tuple(new[i] for i in node.inputs)
    if node.op.category is Category.RECURRENCE:
        return recurrence_region(node, inputs, FuseRegions.name)
    return node if inputs == node.inputs else node.with_inputs(inputs)


def _fill(node: Node) -> Node:
    sizes = [graph_input(s.name, lift(s).type) for s in loose_sizes((node,), ())]  # type: ignore[attr-defined]
    body = Graph("region", tuple(sizes), (node,))
    operands = [lift(scalar_value(s)) for s in sizes]
    return ops.op("region")(*operands, body=body, label=node.op.name, hint=node.hint, prov=node.prov.with_rule(FuseRegions.name))

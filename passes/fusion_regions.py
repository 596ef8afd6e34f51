"""Regions while they grow: members, body, key, price; and who waits for whom."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from typing import Any

import sympy

from ..ir.analysis.iteration import Placement, place
from ..ir.analysis.points import Refusal
from ..ir.analysis.products import computed_operands, joining_windows
from ..ir.dims import free_symbols
from ..ir.graph import Graph, Node, graph_input, is_scalar, lift, scalar_value
from ..ir.reasons import Reason
from ..ir.rewrite import attr_key
from ..ir.types import TensorType
from .contractions import takes_computed
from .fusion_cost import Price, price
from .fusion_units import Units


@dataclass(eq=False)
class Region:
    """A set of units that will be one kernel. `bits`: one bit per member; `after`: the bits of everything that waits for it."""

    members: tuple[Node, ...]
    bits: int
    after: int = 0
    next: set[Region] = field(default_factory=set)
    previous: set[Region] = field(default_factory=set)
    price: Price | None = None


@dataclass
class Builder:
    """Bodies, keys and prices of sets of units. Equal bodies (modulo which values they read) are analysed once and shared."""

    units: Units
    position: dict[Node, int] = field(default_factory=dict)
    bodies: dict[Any, Graph] = field(default_factory=dict)
    prices: dict[Any, Price | Refusal] = field(default_factory=dict)
    priced: dict[tuple[Node, ...], Price | Refusal] = field(default_factory=dict)
    heads: dict[Node, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.position = {n: k for k, n in enumerate(self.units.nodes)}
        self._roots = set(self.units.graph.roots)

    def outputs(self, members: Iterable[Node]) -> tuple[Node, ...]:
        """Members whose value is needed outside: by other units, through views, or as a result."""
        inside = set(members)
        return tuple(n for n in inside_order(inside, self.position) if self._escapes(n, inside))

    def _escapes(self, node: Node, inside: set[Node]) -> bool:
        stack = [node]
        while stack:
            value = stack.pop()
            if value in self._roots:
                return True
            for reader in self.units.readers[value]:
                if reader in self.units.transparent:
                    stack.append(reader)
                elif reader not in inside:
                    return True
        return False

    def needed(self, members: Iterable[Node]) -> tuple[list[Node], list[Node]]:
        """(nodes of the body: members and transparent nodes; the values it reads from outside), both in the order members read them.

        That order depends on nothing outside, so that equal layers give equal bodies although they share masks and numbers.
        """
        members = inside_order(members, self.position)
        inside: list[Node] = []
        outside: dict[Node, None] = {}
        seen: set[Node] = set()
        own = set(members)
        stack = [(n, False) for n in reversed(members)]
        while stack:
            node, ready = stack.pop()
            if ready:
                inside.append(node)
            elif node not in seen and (node in own or node in self.units.transparent):
                seen.add(node)
                stack.append((node, True))
                stack.extend((i, False) for i in reversed(node.inputs))
            elif node not in seen:
                outside[node] = None
        return inside, list(outside)

    def key(self, members: Iterable[Node]) -> Any:
        """Equal for bodies that compute the same from different values."""
        inside, outside = self.needed(members)
        number = {n: k for k, n in enumerate((*outside, *inside))}
        reads = tuple((str(n.type), n.attrs.get("strides") if n.op.name == "input" else None) for n in outside)
        nodes = tuple((self._head(n), tuple(number[i] for i in n.inputs)) for n in inside)
        return reads, nodes, tuple(number[n] for n in self.outputs(members))

    def _head(self, node: Node) -> Any:
        if node not in self.heads:
            attrs = tuple((k, attr_key(v)) for k, v in node.attrs.items())
            self.heads[node] = (node.op.name, attrs, str(node.type))
        return self.heads[node]

    def body(self, members: Iterable[Node]) -> Graph:
        """The members as a graph of their own."""
        key = self.key(members)
        if key not in self.bodies:
            self.bodies[key] = self._build(members)
        return self.bodies[key]

    def _build(self, members: Iterable[Node]) -> Graph:
        inside, outside = self.needed(members)
        new: dict[Node, Node] = {}
        for node in outside:
            new[node] = graph_input(node.hint, node.type, node.attrs.get("strides") if node.op.name == "input" else None, node.prov)
        inputs = [new[n] for n in outside] + [graph_input(s.name, lift(s).type) for s in loose_sizes(inside, outside)]  # type: ignore[attr-defined]
        for node in inside:
            if is_scalar(node):
                new[node] = lift(scalar_value(node))
            else:
                new[node] = replace(node, inputs=tuple(new[i] for i in node.inputs))
        outputs = tuple(new[n] for n in self.outputs(members))
        return Graph("region", tuple(inputs), outputs, symbols=self.units.graph.symbols)

    def price(self, members: tuple[Node, ...]) -> Price | Refusal:
        """What one kernel for all of them costs, or why there is none."""
        if members not in self.priced:  # a merge is asked for when it is offered and when it is made
            self.priced[members] = self._price(members)
        return self.priced[members]

    def _price(self, members: tuple[Node, ...]) -> Price | Refusal:
        key = self.key(members)
        if key not in self.prices:
            body = self.body(members)
            try:
                placement = place(body)
                self.prices[key] = _reading_refusal(placement) or price(body, placement)
            except Refusal as refusal:
                self.prices[key] = refusal.with_traceback(None)  # its frames hold this builder, and so the graph
        return self.prices[key]


def _reading_refusal(placement: Placement) -> Refusal | None:
    """Why a region is no kernel though it could be one: a product or window reads an operand that is better computed once."""
    for product, k in computed_operands(placement.points):
        if not takes_computed(product, product.inputs[k]):
            return Refusal(Reason.PROLOGUE, product, product.inputs[k].op.name)
    window = next(iter(joining_windows(placement.points)), None)
    return Refusal(Reason.PROLOGUE, window, "cat") if window else None


def inside_order(nodes: Iterable[Node], position: dict[Node, int]) -> list[Node]:
    return sorted(nodes, key=position.__getitem__)


def loose_sizes(inside: Iterable[Node], outside: Iterable[Node]) -> list[sympy.Symbol]:
    """Size symbols of a body that are no dimension of a value it reads: they are passed as operands."""
    bound = {d for n in outside if isinstance(n.type, TensorType) for d in n.type.shape if isinstance(d, sympy.Symbol)}
    used: set[Any] = set()
    for node in (*inside, *outside):
        if isinstance(node.type, TensorType):
            used |= free_symbols(node.type.shape)
        value = scalar_value(node)
        used |= free_symbols([value]) if isinstance(value, sympy.Expr) else set()
        for attr in node.attrs.values():
            used |= free_symbols(attr if isinstance(attr, tuple) else (attr,))
    return sorted(used - bound, key=lambda s: s.name)


def connect(regions: dict[Node, Region], units: Units) -> None:
    """Fills next, previous and after of one-unit regions given in topological order."""
    for node, region in regions.items():
        for source in units.sources[node]:
            if source in regions:
                regions[source].next.add(region)
                region.previous.add(regions[source])
    for region in reversed(list(regions.values())):
        for later in region.next:
            region.after |= later.after | later.bits


def waits(a: Region, b: Region) -> bool:
    """Whether b needs a through something else, so that they cannot be one kernel."""
    return any(later is not b and later.after & b.bits for later in a.next)


def merge(a: Region, b: Region, members: tuple[Node, ...], cost: Price, regions: Iterable[Region]) -> Region:
    """One region in place of two; `regions` are all others, whose `after` is brought up to date."""
    made = Region(members, a.bits | b.bits, (a.after | b.after) & ~(a.bits | b.bits), price=cost)
    made.next = (a.next | b.next) - {a, b}
    made.previous = (a.previous | b.previous) - {a, b}
    for later in made.next:
        later.previous -= {a, b}
        later.previous.add(made)
    for earlier in made.previous:
        earlier.next -= {a, b}
        earlier.next.add(made)
    dissolve((a, b))
    for region in regions:
        if region.after & made.bits:
            region.after |= made.after | made.bits
    return made


def dissolve(regions: Iterable[Region]) -> None:
    """Takes regions that are needed no more out of each other's hands: the graph's constants would stay until Python looks for cycles."""
    for region in regions:
        region.next.clear()
        region.previous.clear()


__all__ = ["Builder", "Region", "connect", "dissolve", "inside_order", "loose_sizes", "merge", "waits"]

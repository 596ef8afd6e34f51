"""reuse-blocks: a graph as pieces that run one after the other, so that a caller may leave out branches whose input changed little.

    y = f(x)    -->    h = head(x)    b, s = branch(h), h + b, or b as it was and h + b    y = tail(s)

A branch is that of a residual unit (`ir/analysis/residuals.py`): what an attention or an MLP adds, with the sum, which fuses into it. All
pieces run in order are the graph, to the bit: the same nodes on the same values. Who decides, by what: `driver/iterated.py`. Sources:
"Cache Me if You Can: Accelerating Diffusion Models through Block Caching" (Wimbauer et al., 2023); "Delta-DiT" (Chen et al., 2024) for the
residual as what is kept.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from ..ir.analysis.residuals import Unit, units
from ..ir.graph import Graph, Node, graph_input, order

FIXED = frozenset({"constant", "scalar", "full", "iota"})
"""What every piece that reads it has for its own."""


@dataclass(frozen=True, eq=False)
class Piece:
    """graph: takes the values of `takes`, nodes of the whole graph, and returns those of `gives`. unit: whose branch it is, else None; what
    is added, and the sum, are then among what it gives."""

    graph: Graph
    takes: tuple[Node, ...]
    gives: tuple[Node, ...]
    unit: Unit | None = None


def pieces(graph: Graph) -> list[Piece]:
    """The pieces of a graph without write-backs and random draws, in the order to run them; one, where there is no residual unit."""
    nodes = order(graph)
    at = {n: i for i, n in enumerate(nodes)}
    branches = sorted(units(graph), key=lambda unit: at[added(unit)])
    kept = {n for unit in branches for n in (added(unit), unit.result)}
    place = _places(nodes, branches, graph.outputs)
    read: dict[Node, set[int]] = {}
    for node, number in place.items():
        for operand in node.inputs:
            read.setdefault(operand, set()).add(number)
    found: list[Piece] = []
    for number in range(2 * len(branches) + 1):
        inside = [n for n in place if place[n] == number]
        gives = tuple(n for n in inside if n in kept or n in graph.outputs or read.get(n, set()) - {number})
        if gives:
            found.append(_piece(graph, f"{graph.name}_{number}", inside, gives, branches[number // 2] if number % 2 else None))
    return found


def added(unit: Unit) -> Node:
    """What the branch ends in."""
    return next(i for i in unit.result.inputs if i is not unit.kept)


def _places(nodes: Sequence[Node], branches: Sequence[Unit], outputs: Sequence[Node]) -> Mapping[Node, int]:
    """The number of the piece of each node: odd for branches, even for what lies between them, as soon as it can be computed.

    What is fixed has none, unless it is returned.
    """
    own = {n: 2 * i + 1 for i, unit in enumerate(branches) for n in (*unit.branch, unit.result)}
    place: dict[Node, int] = {}
    for node in nodes:
        if node.op.name != "input" and (node.op.name not in FIXED or node in outputs):
            soonest = max((place[i] + place[i] % 2 for i in node.inputs if i in place), default=0)
            place[node] = own.get(node, soonest)
    return place


def _piece(graph: Graph, name: str, inside: Sequence[Node], gives: tuple[Node, ...], unit: Unit | None) -> Piece:
    own = set(inside)
    takes = tuple(dict.fromkeys(i for n in inside for i in n.inputs if i not in own and i.op.name not in FIXED))
    new = {n: n if n.op.name == "input" else graph_input(n.hint or n.op.name, n.type, prov=n.prov) for n in takes}
    fresh = tuple(new.values())
    for node in inside:
        inputs = tuple(new.get(i, i) for i in node.inputs)
        new[node] = node if inputs == node.inputs else replace(node, inputs=inputs)
    made = replace(graph, name=name, inputs=fresh, outputs=tuple(new[n] for n in gives), arena={}, inplace={})
    return Piece(made, takes, gives, unit)

"""split-layers: one graph becomes several that run one after the other, each with weights of its own (GPipe; split computing).

    g(x, mask) -> y     -->     g_1(x, mask) -> h, mask        g_2(h, mask) -> y

Where is `ir/analysis/segments.py`; which of these places is chosen by cost (`search/stages.py`). The parts run in sequence are the graph,
to the bit: the same nodes on the same values. `rounded` lets what crosses a cut do so in 8 bits: that is bounded, not exact.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from ..ir.analysis.segments import Segments
from ..ir.dims import Dim, free_symbols
from ..ir.graph import Graph, Node, graph_input, order
from ..ir.ops import OPS
from ..ir.rewrite import remap
from ..ir.verify import sizes_in

LEAST_ROW = 16
"""Shorter rows would not take fewer bytes with a scale for each."""


@dataclass(frozen=True, eq=False)
class Part:
    """graph: takes what crosses into it and then `state`, the inputs of the whole graph that it alone reads and writes back; returns what
    crosses out of it. The first part takes the inputs of the whole graph, the last one returns its outputs."""

    graph: Graph
    state: tuple[Node, ...] = ()

    @property
    def takes(self) -> tuple[Node, ...]:
        """Its inputs without state."""
        return self.graph.inputs[: len(self.graph.inputs) - len(self.state)]


def split(found: Segments, at: Sequence[int]) -> list[Part]:
    """len(at) + 1 parts. at: numbers of cuts of `found`, ascending."""
    graph = found.graph
    written = {target for target, _ in graph.writes}
    borders = [tuple(n for n in graph.inputs if n not in written), *(found.cuts[i].crosses for i in at), graph.outputs]
    segments = [0, *(i + 1 for i in at), len(found.cuts) + 1]
    parts: list[Part] = []
    for i, (takes, gives) in enumerate(zip(borders, borders[1:])):
        state = tuple(n for n in graph.inputs if n in written and segments[i] <= found.home[n] < segments[i + 1])
        parts.append(_part(graph, f"{graph.name}_{i + 1}", takes, gives, state))
    return parts


def _part(graph: Graph, name: str, takes: tuple[Node, ...], gives: tuple[Node, ...], state: tuple[Node, ...]) -> Part:
    """What lies between the values it takes and those it gives."""
    fresh = _inputs(takes, first=takes == tuple(n for n in graph.inputs if n not in dict(graph.writes)))
    new: dict[Node, Node] = dict(zip(takes, fresh)) | {n: n for n in state}
    writes = tuple((target, value) for target, value in graph.writes if target in new)
    stack = [*gives, *(value for _, value in writes)]
    while stack:
        node = stack[-1]
        missing = [] if node in new else [i for i in node.inputs if i not in new]
        if missing:
            stack += missing
            continue
        stack.pop()
        if node not in new:
            inputs = tuple(new[i] for i in node.inputs)
            new[node] = node if inputs == node.inputs else replace(node, inputs=inputs)
    made = replace(
        graph,
        name=name,
        inputs=(*fresh, *state),
        outputs=tuple(new[n] for n in gives),
        writes=tuple((target, new[value]) for target, value in writes),
    )
    used = {s.name for n in order(made) for s in free_symbols(sizes_in((n.type, *n.attrs.values())))}  # type: ignore[attr-defined]
    return Part(replace(made, symbols={name: known for name, known in graph.symbols.items() if name in used}), state)


def _inputs(takes: Sequence[Node], first: bool) -> tuple[Node, ...]:
    """Inputs of a part, each under a name of its own; those of the whole graph are what they were, but what was carried is contiguous."""
    taken = {n.hint for n in takes if n.op.name == "input"}
    found: list[Node] = []
    for node in takes:
        if node.op.name == "input" and (first or node.attrs["strides"] is None):
            found.append(node)
            continue
        name = base = node.hint or node.op.name
        number = 1
        while name in taken and node.op.name != "input":
            number += 1
            name = f"{base}_{number}"
        taken.add(name)
        found.append(graph_input(name, node.type, prov=node.prov))
    return tuple(found)


def rounded(before: Part, after: Part) -> tuple[Part, Part]:
    """The two parts with what crosses between them in 8 bits, a scale for each row: what is floating point, and long enough to gain by it.

    gives h : f32[8, 64]    -->    gives q : i8[8, 64], scale : f32[8, 1];  takes these, and reads dequantize(q, scale)
    """
    gives: list[Node] = []
    takes: list[Node] = []
    new: dict[Node, Node] = {}
    for value, read in zip(before.graph.outputs, after.takes, strict=True):
        if not _gains(value):
            gives.append(value)
            takes.append(read)
            continue
        both = OPS["quantize_rows"](value, prov=value.prov)
        coded = [OPS["item"](both, index=i, hint=f"{read.hint}_{name}", prov=value.prov) for i, name in enumerate(("rounded", "scale"))]
        inputs = [graph_input(n.hint, n.type, prov=n.prov) for n in coded]
        gives += coded
        takes += inputs
        new[read] = OPS["dequantize"](*inputs, dtype=read.dtype, hint=read.hint, prov=read.prov)
    return Part(replace(before.graph, outputs=tuple(gives)), before.state), _reading(after, tuple(takes), new)


def rounded_nbytes(node: Node) -> Dim:
    """What crosses, once it is rounded: bytes."""
    if not _gains(node):
        return node.tensor.nbytes
    return node.tensor.with_dtype(torch.int8).nbytes + replace(node.tensor, shape=(*node.shape[:-1], 1)).nbytes


def _gains(node: Node) -> bool:
    return node.dtype in (torch.float32, torch.float64) and node.tensor.rank > 0 and _long(node.shape[-1])


def _long(size: object) -> bool:
    return isinstance(size, int) and size >= LEAST_ROW


def _reading(part: Part, takes: tuple[Node, ...], new: dict[Node, Node]) -> Part:
    """The part with other inputs, and nodes made of these in place of those it had."""
    graph = part.graph
    replaced: dict[Node, Node] = dict(new)
    for node in order(graph):
        if node not in replaced:
            inputs = tuple(replaced[i] for i in node.inputs)
            replaced[node] = node if inputs == node.inputs else replace(node, inputs=inputs)
    return Part(remap(replace(graph, inputs=(*takes, *part.state)), replaced), part.state)

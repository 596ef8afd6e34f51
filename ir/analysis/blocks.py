"""Repeated structure: `cut_points` (single tensors that everything passes through) and `blocks` (stretches that are equal modulo weights).

    x -> [embed] -> h0 -> [layer] -> h1 -> [layer] -> h2 -> [head] -> y        cut points h0, h1, h2; blocks: one class of two

A cut point dominates an output as seen from an input. What hangs from other inputs, masks and positions, may be read by any segment:
it is an operand of the block, like the weights that several blocks share.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import networkx as nx

from ..graph import Graph, Node, order, users
from ..types import TensorType
from .hashing import canonical


@dataclass(frozen=True, eq=False)
class Block:
    """A group of nodes: `nodes[i]` and `operands[i]` correspond across the blocks of one class.

    nodes: in canonical order, operands first. operands: what they read from outside. results: those of the nodes that others read.
    """

    nodes: tuple[Node, ...]
    operands: tuple[Node, ...]
    results: tuple[Node, ...]
    digest: str


def cut_points(graph: Graph, source: Node | None = None, output: Node | None = None) -> list[Node]:
    """Single tensors through which every path from `source` to `output` goes, in order; both ends left out.

    source: an input (default: all tensor inputs together). output: one of the outputs (default: all outputs and write-backs together).
    """
    sources = [source] if source else [n for n in graph.inputs if isinstance(n.type, TensorType)]
    sinks = [output] if output else list(graph.roots)
    chain = _dominators(graph, sources, sinks)
    ends = {*sources, *(sinks if len(set(sinks)) == 1 else ())}
    return [n for n in chain if n not in ends and isinstance(n.type, TensorType)]


def _dominators(graph: Graph, sources: Sequence[Node], sinks: Sequence[Node]) -> list[Node]:
    """Every node that all paths from the sources to the sinks go through, in order; empty if there is no path."""
    flow: nx.DiGraph = nx.DiGraph()
    flow.add_node("source")
    flow.add_edges_from(("source", n) for n in sources)
    flow.add_edges_from((n, "sink") for n in sinks)
    flow.add_edges_from((operand, n) for n in order(graph) for operand in n.inputs)
    above = nx.immediate_dominators(flow, "source")
    chain: list[Node] = []
    at = above.get("sink", "source")
    while at != "source":
        chain.append(at)
        at = above[at]
    return chain[::-1]


def isomorphic_regions(graph: Graph) -> list[list[Block]]:
    """Classes of at least two segments between successive cut points that are equal modulo weights, names and sizes' names."""
    classes: dict[str, list[Block]] = {}
    taken: set[Node] = set()
    readers = users(graph)
    for segments in _chains(graph, readers):
        for segment in segments:
            if not taken & set(segment):
                taken |= set(segment)
                block = _block(graph, segment, readers)
                classes.setdefault(block.digest, []).append(block)
    return [found for found in classes.values() if len(found) > 1]


def blocks(graph: Graph) -> list[list[Block]]:
    """The repeated layers of a model: classes of at least two equal stretches of segments, each class in order.

    A stretch is the shortest period of a run, so an encoder of six layers gives one class of six blocks.
    """
    classes: dict[str, list[Block]] = {}
    taken: set[Node] = set()
    known: set[tuple[str, ...]] = set()
    readers = users(graph)
    for segments in _chains(graph, readers):
        digests = [_block(graph, s, readers).digest for s in segments]
        for start, period, count in _runs(digests, [len(s) for s in segments], 0, len(segments), known):
            for i in range(start, start + period * count, period):
                group = [n for segment in segments[i : i + period] for n in segment]
                if not taken & set(group):
                    taken.update(group)
                    block = _block(graph, group, readers)  # joined segments may share what the segments do not
                    classes.setdefault(block.digest, []).append(block)
    return [found for found in classes.values() if len(found) > 1]


def _block(graph: Graph, group: Sequence[Node], readers: dict[Node, list[Node]]) -> Block:
    form = canonical(group, weights=False)
    inside, roots = set(group), set(graph.roots)
    results = tuple(n for n in form.nodes if n in roots or any(r not in inside for r in readers[n]))
    return Block(form.nodes, form.leaves, results, form.digest)


# -- segments between cut points


def _chains(graph: Graph, readers: dict[Node, list[Node]]) -> list[list[list[Node]]]:
    """For each tensor input the segments up to the output that it reaches through the most cut points.

    Those that cover most nodes come first: the main input before a mask that enters half way.
    """
    chains: list[list[list[Node]]] = []
    for source in graph.inputs:
        if not isinstance(source.type, TensorType):
            continue
        best = max((_dominators(graph, [source], [sink]) for sink in _main_outputs(graph)), key=len, default=[])
        cuts = [n for n in best if isinstance(n.type, TensorType)]
        if len(cuts) > 2:
            chains.append(_segments(graph, cuts, readers))
    return sorted(chains, key=lambda segments: sum(len(s) for s in segments), reverse=True)


def _main_outputs(graph: Graph) -> list[Node]:
    """Where the main path of a model may end: its first and last output (state that is carried along lies between them)."""
    return list(dict.fromkeys((*graph.outputs[:1], *graph.outputs[-1:])))


def _segments(graph: Graph, cuts: list[Node], readers: dict[Node, list[Node]]) -> list[list[Node]]:
    """segments[i]: the nodes on paths from cuts[i] (not included) to cuts[i + 1], and what only they read."""
    nodes = order(graph)
    index = {n: i for i, n in enumerate(cuts)}
    place: dict[Node, int] = {}
    for n in nodes:  # downwards: how many cuts lie at or above a node of the path
        above = [index[i] + 1 if i in index else place[i] for i in n.inputs if i in index or i in place]
        if n is not cuts[0] and above:
            place[n] = max(above)
    reaches = {cuts[-1]}
    for n in reversed(nodes):
        if any(r in reaches for r in readers[n]):
            reaches.add(n)
    segment = {n: i for n, i in place.items() if n in reaches}
    fixed = {*graph.inputs, *graph.roots, cuts[0]}
    for n in reversed(nodes):  # upwards: what a single segment reads belongs to it
        wanted = {segment.get(r) for r in readers[n]}
        if n not in segment and n not in fixed and n not in place and len(wanted) == 1:
            only = wanted.pop()
            if only is not None:
                segment[n] = only
    found: list[list[Node]] = [[] for _ in cuts]
    for n in nodes:
        if n in segment and n.op.name != "scalar":
            found[segment[n]].append(n)
    return [s for s in found if s]


# -- runs of equal segments


def _runs(digests: list[str], sizes: list[int], start: int, stop: int, known: set[tuple[str, ...]]) -> list[tuple[int, int, int]]:
    """(start, period, count) of repeated stretches in digests[start:stop]: the run that covers most nodes, then those beside it.

    A stretch that is `known` from another run may stand alone. Of runs that cover the same: the one whose stretch occurs most often in
    all, then the shortest period, then the last, for a layer ends in the norm that follows it.
    """
    best = (0, 0, 0, 0, 0)
    for period in range(1, stop - start + 1):
        for at in range(start, stop - period + 1):
            unit = tuple(digests[at : at + period])
            count = _count(digests, at, period, stop)
            covered = sum(sizes[at : at + count * period]) if count > 1 or unit in known else 0
            if covered and covered >= best[0]:
                best = max(best, (covered, _occurrences(digests, unit), -period, at, count))
    covered, _, negative, at, count = best
    if not covered:
        return []
    period = -negative
    known.add(tuple(digests[at : at + period]))
    left = _runs(digests, sizes, start, at, known)
    return [*left, (at, period, count), *_runs(digests, sizes, at + period * count, stop, known)]


def _count(digests: list[str], at: int, period: int, stop: int) -> int:
    """How often the stretch at `at` follows itself."""
    count = 1
    while at + (count + 1) * period <= stop and digests[at : at + period] == digests[at + count * period : at + (count + 1) * period]:
        count += 1
    return count


def _occurrences(digests: list[str], unit: tuple[str, ...]) -> int:
    """How often the stretch occurs without overlap."""
    found = at = 0
    while at + len(unit) <= len(digests):
        same = tuple(digests[at : at + len(unit)]) == unit
        found += same
        at += len(unit) if same else 1
    return found

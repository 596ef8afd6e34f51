"""A layered drawing of a directed graph: each node a row below what it reads, rows in an order of few crossings, lines straight.

    place([40, 60, 40], [(0, 1), (1, 2), (0, 2)])  -->  a column of three, and a line from the first to the last beside the second

After Sugiyama, Tagawa and Toda (1981): longest-path rows, bends where a line passes a row, sweeps by barycentre; then columns by least
squares under the order of the row (pool adjacent violators), alternately towards what stands above and below.
"""

from __future__ import annotations

from bisect import bisect_right, insort
from collections.abc import Sequence
from dataclasses import dataclass, field

GAP = 18.0
"""Between neighbours of a row."""
BEND = 10.0
"""The width that a passing line takes."""
SWEEPS, STRAIGHTENING = 6, 12
STIFF, PLAIN, LOOSE = 8.0, 2.0, 0.25
"""How much a line wants to be straight: between two bends, between two nodes, between a node and a bend."""

Edge = tuple[int, int]


@dataclass(frozen=True)
class Placed:
    """x: the middle of each node; row: its row, from 0; width: of the whole. routes: an edge -> the points (x, row) where it bends."""

    x: list[float]
    row: list[int]
    width: float
    routes: dict[Edge, list[tuple[float, int]]]


@dataclass
class _Layers:
    """Nodes and, behind them, bends: their widths, rows, and neighbours above and below. nodes: how many of them are nodes."""

    nodes: int
    widths: list[float]
    row: list[int]
    above: list[list[int]] = field(default_factory=list)
    below: list[list[int]] = field(default_factory=list)

    def link(self, upper: int, lower: int) -> None:
        self.above[lower].append(upper)
        self.below[upper].append(lower)


def place(widths: Sequence[float], edges: Sequence[Edge]) -> Placed:
    """Places nodes of these widths. Edges lead from lower numbers to higher ones; others are not drawn (there are no cycles then)."""
    edges = sorted({(a, b) for a, b in edges if a < b})
    layers, chains = _with_bends(widths, edges)
    order = _ordered(layers)
    x = _columns(layers, order)
    left = min((x[i] - w / 2 for i, w in enumerate(layers.widths)), default=0.0)
    right = max((x[i] + w / 2 for i, w in enumerate(layers.widths)), default=0.0)
    x = [value - left for value in x]
    routes = {edge: [(x[i], layers.row[i]) for i in bends] for edge, bends in chains.items()}
    return Placed(x[: len(widths)], layers.row[: len(widths)], right - left, routes)


def _rows(count: int, edges: Sequence[Edge]) -> list[int]:
    """Below all that is read; what reads nothing stands just above its first reader."""
    row = [0] * count
    for a, b in edges:  # sorted by a, and a < b: the row of a is final
        row[b] = max(row[b], row[a] + 1)
    reads = {b for _, b in edges}
    first: dict[int, int] = {}
    for a, b in edges:
        if a not in reads:
            first[a] = min(first.get(a, row[b]), row[b])
    return [first[i] - 1 if i in first else value for i, value in enumerate(row)]


def _with_bends(widths: Sequence[float], edges: Sequence[Edge]) -> tuple[_Layers, dict[Edge, list[int]]]:
    """A long edge passes each row between its ends in a bend; edges from one node share them."""
    layers = _Layers(len(widths), [*widths], _rows(len(widths), edges), [[] for _ in widths], [[] for _ in widths])
    trunks: dict[int, list[int]] = {}
    chains: dict[Edge, list[int]] = {}
    for a, b in edges:
        trunk = trunks.setdefault(a, [])
        while len(trunk) < layers.row[b] - layers.row[a] - 1:
            trunk.append(len(layers.widths))
            layers.widths.append(BEND)
            layers.row.append(layers.row[a] + len(trunk))
            layers.above.append([])
            layers.below.append([])
            layers.link(trunk[-2] if len(trunk) > 1 else a, trunk[-1])
        chains[a, b] = trunk[: layers.row[b] - layers.row[a] - 1]
        layers.link(chains[a, b][-1] if chains[a, b] else a, b)
    return layers, chains


# ---- the order within rows


def _ordered(layers: _Layers) -> list[list[int]]:
    """The order of each row, of the sweep with the fewest crossings."""
    order: list[list[int]] = [[] for _ in range(max(layers.row, default=-1) + 1)]
    for i, row in enumerate(layers.row):
        order[row].append(i)
    best, fewest = [*order], _crossings(layers, order)
    for sweep in range(SWEEPS):
        order = _swept(layers, order, down=sweep % 2 == 0)
        crossings = _crossings(layers, order)
        if crossings < fewest:
            best, fewest = [*order], crossings
    return best


def _swept(layers: _Layers, order: list[list[int]], down: bool) -> list[list[int]]:
    """Each row sorted by the mean place of its neighbours in the row before."""
    neighbours = layers.above if down else layers.below
    place = {i: float(k) for row in order for k, i in enumerate(row)}
    result = [*order]
    for k in range(len(order)) if down else reversed(range(len(order))):
        wanted = {i: sum(place[n] for n in neighbours[i]) / len(neighbours[i]) if neighbours[i] else place[i] for i in order[k]}
        result[k] = sorted(order[k], key=wanted.__getitem__)
        place.update((i, float(at)) for at, i in enumerate(result[k]))
    return result


def _crossings(layers: _Layers, order: list[list[int]]) -> int:
    """Pairs of lines that cross, rows two by two."""
    total = 0
    for upper, lower in zip(order, order[1:]):
        place = {i: k for k, i in enumerate(lower)}
        seen: list[int] = []
        for i in upper:
            ends = sorted(place[j] for j in layers.below[i])
            total += sum(len(seen) - bisect_right(seen, end) for end in ends)
            for end in ends:
                insort(seen, end)
    return total


# ---- columns


def _columns(layers: _Layers, order: list[list[int]]) -> list[float]:
    """The middle of each node and bend."""
    x = [0.0] * len(layers.widths)
    for row in order:
        _settle(layers, row, [(0.0, 1.0)] * len(row), x)
    for step in range(STRAIGHTENING):
        down = step % 2 == 0
        neighbours = layers.above if down else layers.below
        for row in order if down else reversed(order):
            _settle(layers, row, [_wanted(layers, i, neighbours[i], x) for i in row], x)
    return x


def _wanted(layers: _Layers, i: int, neighbours: Sequence[int], x: Sequence[float]) -> tuple[float, float]:
    """Where a node or bend would stand, and how much it matters."""
    pulls = [(x[n], (PLAIN, LOOSE, STIFF)[(i >= layers.nodes) + (n >= layers.nodes)]) for n in neighbours] or [(x[i], LOOSE)]
    weight = sum(w for _, w in pulls)
    return sum(at * w for at, w in pulls) / weight, weight


def _settle(layers: _Layers, row: Sequence[int], wanted: Sequence[tuple[float, float]], x: list[float]) -> None:
    """Puts a row as near to where it wants to be, with these weights, as its order and widths allow (least squares)."""
    offsets, at = [], 0.0
    for k, i in enumerate(row):
        at += (layers.widths[row[k - 1]] + layers.widths[i]) / 2 + GAP if k else 0.0
        offsets.append(at)
    blocks: list[tuple[float, float, int]] = []  # the sum of what its members want, that of their weights, and how many they are
    for offset, (want, weight) in zip(offsets, wanted):
        blocks.append(((want - offset) * weight, weight, 1))
        while len(blocks) > 1 and blocks[-2][0] / blocks[-2][1] > blocks[-1][0] / blocks[-1][1]:
            (a, v, m), (b, w, n) = blocks.pop(), blocks.pop()
            blocks.append((a + b, v + w, m + n))
    base = [total / weight for total, weight, count in blocks for _ in range(count)]
    for i, offset, start in zip(row, offsets, base):
        x[i] = start + offset

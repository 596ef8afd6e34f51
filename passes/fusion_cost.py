"""What a region costs: bytes moved, arithmetic, one launch. In bytes, so that it can be weighed against memory traffic."""

from __future__ import annotations

import math
from dataclasses import dataclass

from ..ir.analysis.indices import Poly, expression
from ..ir.analysis.iteration import Placement
from ..ir.analysis.points import Kind, Point
from ..ir.dims import dim, hint
from ..ir.graph import Graph
from ..ir.types import TensorType
from .fusion_units import flops_per_element

FLOPS_PER_BYTE = 4
"""Flops that take as long as moving one byte: low for vector units, to leave room for what the compiler does not vectorise."""

LAUNCH_BYTES = 32 * 1024
"""Memory traffic that takes as long as starting one kernel (about 2 microseconds)."""

FEW_ROWS, MANY_POINTS = 16, 1 << 16
"""A kernel of fewer grid points than the first, that writes more elements than the second inside them, does not run in parallel."""


@dataclass(frozen=True)
class Price:
    """bytes: memory read and written. work: everything, in bytes. values: scalars; buffers: tensors read and written."""

    bytes: int
    work: int
    values: int
    buffers: int


def price(body: Graph, placement: Placement) -> Price:
    """The price of a placed region; symbolic sizes take their hint."""
    model = _Model(body, placement)
    moved = model.loaded() + sum(hint(o.tensor.nbytes, body.symbols) for o in body.outputs)
    work = moved + model.flops() // FLOPS_PER_BYTE + LAUNCH_BYTES
    if model.serial():
        work += 2 * moved
    tensors = sum(isinstance(n.type, TensorType) for n in body.inputs) + len(body.outputs)
    values = sum(p.kind in (Kind.APPLY, Kind.LOAD, Kind.REDUCE, Kind.SCAN, Kind.DOT, Kind.ATTEND, Kind.WINDOW) for p in placement.points)
    return Price(moved, work, values, tensors)


def _converts(dot: Point) -> bool:
    """Whether an operand of a product is anything but read."""
    return any(operand.kind is Kind.APPLY for operand in dot.operands[:2])


class _Model:
    """How often each value is computed: values that do not depend on the innermost axes are computed outside their loops."""

    def __init__(self, body: Graph, placement: Placement) -> None:
        self.body, self.placement = body, placement
        self.depth = {a.name: k for k, a in enumerate(placement.axes, start=1)}
        self.trips = [1]
        for axis in placement.axes:
            self.trips.append(self.trips[-1] * self._size(axis.extent))
        self.grid = sum(not a.inner for a in placement.axes)
        self.deepest: dict[Point, int] = {}
        for point in placement.points:
            self.deepest[point] = self._depth(point)
        separate = any(p.kind is Kind.ATTEND or p.kind is Kind.DOT and _converts(p) for p in placement.points)
        self.runs = self._separate_runs() if separate else {p: self.trips[k] for p, k in self.deepest.items()}

    def _size(self, extent: Poly) -> int:
        return hint(dim(expression(extent)), self.body.symbols)

    def _depth(self, point: Point) -> int:
        below = max((self.deepest[p] for p in point.operands), default=0)
        if point.kind in (Kind.REDUCE, Kind.DOT, Kind.ATTEND, Kind.WINDOW):
            return min(below, self.grid)
        return max(below, *(self.depth.get(n, 0) for n in point.index.names()), 0)

    def _separate_runs(self) -> dict[Point, int]:
        """How often each value is computed where loops are nested in several ways, each over the axes that it needs: in an attention, and
        in a product with an operand that is computed or converted, a block of which is made beside other blocks' products.
        """
        axes, final = self.placement.normal_form()
        sizes = {a.name: self._size(a.extent) for a in axes}
        inner = frozenset(a.name for a in axes if a.inner)
        free: dict[Point, frozenset[str]] = {}
        for point in self.placement.points:
            summed = inner if point.kind is Kind.DOT and not point.axes else frozenset(point.axes)
            below = frozenset().union(*(free[p] for p in point.operands)) - summed
            free[point] = below | (final.get(point.index, point.index).names() & sizes.keys())
        return {p: math.prod(sizes[n] for n in names) for p, names in free.items()}

    def flops(self) -> int:
        total = 0
        for point in self.placement.points:
            if point.node is not None and point.kind in (Kind.APPLY, Kind.REDUCE, Kind.SCAN, Kind.DOT, Kind.WINDOW):
                total += flops_per_element(point.node, self.body) * self.runs[point.operands[0] if point.kind is Kind.REDUCE else point]
        return total

    def loaded(self) -> int:
        """Bytes read: every element of a buffer at most once (rows stay in cache)."""
        reads: dict[object, int] = {}
        for point in self.placement.points:
            if point.kind is Kind.LOAD:
                reads[point.node] = reads.get(point.node, 0) + self.runs[point]
        return sum(min(hint(n.tensor.nbytes, self.body.symbols), k * n.dtype.itemsize) for n, k in reads.items())  # type: ignore[attr-defined]

    def serial(self) -> bool:
        written = any(self.deepest[o.point] > self.grid for o in self.placement.outputs)
        return written and self.grid < len(self.placement.axes) and self.trips[self.grid] < FEW_ROWS and self.trips[-1] > MANY_POINTS

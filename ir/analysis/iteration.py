"""Pull-based evaluation of a region: which loops one kernel needs, and what every output element reads.

    place(body)  ->  Placement(axes, outputs, points)

The axes come from an anchor: a reduction gives one grid axis per kept and one inner axis per reduced dimension; without
reductions the dimensions of the largest output are the grid. Each output gets an index over the axes, and the evaluation
follows the operands from there (`Puller`): views change the index, region inputs become loads, equal values at equal indices are
one point. Fusion uses the result to prove a region legal and to price it, lowering maps its points to kernel scalars.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

from ..graph import Graph, Node, order
from ..op import Category
from ..reasons import Reason
from .indices import ONE, Poly, Ranges, divide, linear, poly, product, quotients, variable
from .points import Index, Kind, Point, Refusal, dims_of, reduced_dims, regroup
from .pull import Puller

GRID_NAMES = "ijklmn"
INNER_NAMES = "rtuvwq"

MAX_SPLITS = 6
"""Axes that may be added to spare divisions in the innermost loops."""

MAX_ANCHORS = 4
"""Spaces that are tried for one region; regions that are one kernel rarely have more than one."""

Step = dict[str, Poly]


@dataclass(frozen=True)
class LoopAxis:
    """0 <= name < extent; `inner` axes are walked inside one grid point."""

    name: str
    extent: Poly
    inner: bool = False


@dataclass(frozen=True, eq=False)
class Output:
    """A region output: the element at row-major `offset` is `point`, for every point of the axes that `offset` mentions."""

    node: Node
    offset: Poly
    point: Point


@dataclass(frozen=True, eq=False)
class Placement:
    """A region as one loop nest. points: operands first, each once; every index is over the axes' names.

    whole: what is to be one axis, though indices take it apart.
    """

    axes: tuple[LoopAxis, ...]
    outputs: tuple[Output, ...]
    points: tuple[Point, ...]
    ranges: Ranges = field(repr=False, default_factory=lambda: Ranges({}))
    whole: tuple[Poly, ...] = ()

    def normal_form(self) -> tuple[tuple[LoopAxis, ...], dict[Poly, Poly]]:
        """(axes, index -> the same index over these axes): as few divisions as possible, and as few axes."""
        form = _Form(list(self.axes), {p: p for p in (*_indices(self), *self.whole)}, self.ranges)
        fixed = any(p.kind is Kind.SCAN or p.axes for p in self.points)
        form.split(lambda axis: not (fixed and axis.inner) and all(variable(axis.name) != form.used[p] for p in self.whole))
        form.merge(lambda axis: not (fixed and axis.inner))
        return tuple(form.axes), form.used


def place(body: Graph) -> Placement:
    """The loop nest of a region whose nodes are primitives; raises Refusal where it is not one kernel."""
    anchors = _anchors(body)
    problem: Refusal | None = None
    for anchor in anchors:
        try:
            return _place(body, anchor)
        except Refusal as refusal:
            problem = problem or refusal.with_traceback(None)  # it would hold this frame, which holds it
    assert problem is not None
    raise problem


def _anchors(body: Graph) -> list[Node | None]:
    """Reductions and scans whose space may be the kernel's, one per distinct space; [None] where there are none."""
    found: dict[tuple[tuple[Poly, ...], tuple[int, ...]], Node | None] = {}
    for node in order(body):
        if node.op.category in (Category.REDUCTION, Category.SCAN):
            found.setdefault((dims_of(node.inputs[0]), reduced_dims(node)), node)
    return list(found.values())[:MAX_ANCHORS] or [None]


def _place(body: Graph, anchor: Node | None) -> Placement:
    ranges = Ranges(body.symbols)
    space = dims_of(anchor.inputs[0]) if anchor else _largest(body)
    inner = set(reduced_dims(anchor)) if anchor else set()
    names = _axis_names(space, inner, body)
    axes: list[LoopAxis] = []
    index: list[Poly] = []
    for d, extent in enumerate(space):
        if extent == ONE:
            index.append(poly(0))
            continue
        axes.append(LoopAxis(names[d], extent, d in inner))
        index.append(ranges.add(names[d], extent))
    loops = Loops(tuple(axes), space, tuple(index), inner)
    puller = Puller(ranges, tuple(a.name for a in axes if a.inner), tuple(a.extent for a in axes if a.inner))
    outputs = []
    for node in body.outputs:
        at = loops.output_index(node, ranges)
        outputs.append(Output(node, ranges.recombine(linear(at, dims_of(node))), puller.at(node, at)))
    axes += [LoopAxis(name, extent, True) for name, extent in puller.own]
    ordered = sorted(axes, key=lambda a: a.inner)
    return Placement(tuple(ordered), tuple(outputs), tuple(puller.points), ranges, tuple(puller.whole))


@dataclass(frozen=True)
class Loops:
    """The axes of a kernel and how they number the dimensions of its anchor's space."""

    axes: tuple[LoopAxis, ...]
    space: tuple[Poly, ...]
    index: Index
    inner: set[int]

    def output_index(self, node: Node, ranges: Ranges) -> Index:
        """Where an output stands at the current point; raises Refusal(DIFFERENT_SPACE)."""
        shape = dims_of(node)
        if shape == self.space:
            return self.index
        kept = [d for d in range(len(self.space)) if d not in self.inner]
        total = product(shape)
        if total == product(self.space[d] for d in kept) and self.inner:
            small = tuple(self.space[d] for d in kept)
            at = tuple(self.index[d] for d in kept)
            return regroup(at, small, shape, ranges)
        if total == product(self.space):
            return regroup(self.index, self.space, shape, ranges)
        raise Refusal(Reason.DIFFERENT_SPACE, node, f"{node.type} beside a space of {list(self.space)}")


def _largest(body: Graph) -> tuple[Poly, ...]:
    """The shape of the first output that has as many elements as any provably has."""
    best = dims_of(body.outputs[0])
    for node in body.outputs[1:]:
        shape = dims_of(node)
        if len(shape) > len(best) and product(shape) == product(best):
            best = shape
    return best


def _axis_names(space: Sequence[Poly], inner: set[int], body: Graph) -> list[str]:
    taken = set(body.symbols) | {name for d in space for name in d.names()}
    streams = (_fresh(GRID_NAMES, taken), _fresh(INNER_NAMES, taken))
    return [next(streams[d in inner]) for d in range(len(space))]


def _fresh(letters: str, taken: set[str]) -> Iterator[str]:
    suffix = ""
    count = 0
    while True:
        yield from (c + suffix for c in letters if c + suffix not in taken)
        count += 1
        suffix = str(count)


def _indices(placement: Placement) -> list[Poly]:
    used = [o.offset for o in placement.outputs]
    used += [p.index for p in placement.points if p.kind in (Kind.LOAD, Kind.POSITION, Kind.IOTA, Kind.INSIDE)]
    return list(dict.fromkeys(used))


class _Form:
    """The axes on their way to fewest divisions and fewest axes."""

    def __init__(self, axes: list[LoopAxis], used: dict[Poly, Poly], ranges: Ranges) -> None:
        self.axes, self.used, self.ranges = axes, used, ranges

    def split(self, allowed: Callable[[LoopAxis], bool]) -> None:
        """An axis i that indices take apart as i // d and i % d becomes two: i = d*i_hi + i_lo."""
        for _ in range(MAX_SPLITS):
            found = next(((a, d) for a in self.axes if allowed(a) for d in self._divisors(a)), None)
            if found is None:
                return
            axis, d = found
            high = LoopAxis(self._fresh(axis.name), self.ranges.floordiv(axis.extent, d), axis.inner)
            step = {axis.name: self.ranges.add(high.name, high.extent) * d + variable(axis.name)}
            self.ranges.add(axis.name, d)
            self.used = self._moved(step)
            at = self.axes.index(axis)
            self.axes[at : at + 1] = [high, LoopAxis(axis.name, d, axis.inner)]

    def _divisors(self, axis: LoopAxis) -> list[Poly]:
        """Divisors of the axis' extent by which an index divides the bare axis, greatest first."""
        found: dict[Poly, None] = {}
        own = variable(axis.name)
        for p in self.used.values():
            for atom in quotients(p):
                if atom.args[0] == own and not divide(axis.extent, atom.args[1])[1].terms and atom.args[1] != axis.extent:
                    found[atom.args[1]] = None
        return sorted(found, key=lambda d: (d.constant or 0, str(d)), reverse=True)

    def _fresh(self, name: str) -> str:
        taken = self.ranges.extents.keys() | self.ranges.symbols.keys()
        return next(n for n in (f"{name}{k}" for k in itertools.count(1)) if n not in taken)

    def merge(self, allowed: Callable[[LoopAxis], bool]) -> None:
        """Adjacent axes i, j become one where every index has them as extent*i + j."""
        k = len(self.axes) - 2
        while k >= 0:
            outer, low = self.axes[k], self.axes[k + 1]
            if outer.inner == low.inner and allowed(low):
                step = {low.name: variable(low.name) - low.extent * variable(outer.name)}
                self.ranges.add(low.name, outer.extent * low.extent)
                moved = self._moved(step)
                if not any(outer.name in p.names() for p in moved.values()):
                    self.used = moved
                    self.axes[k : k + 2] = [LoopAxis(low.name, outer.extent * low.extent, low.inner)]
                else:
                    self.ranges.add(low.name, low.extent)
            k -= 1

    def _moved(self, step: Step) -> dict[Poly, Poly]:
        return {p: now.substitute(step, self.ranges) for p, now in self.used.items()}

"""`split-space`: the first stage of a graph of images is computed patch by patch, so that less memory holds its intermediate values."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from ..ir.analysis.halo import Reach, Span, Stage, needs_of_parts, stage_of, window_extent
from ..ir.graph import Graph, Node
from ..ir.ops import OPS
from ..ir.rewrite import cleaned, rewrite
from ..ir.types import TensorType, normalize_dim
from .base import Notes, Pass, Reason, describe
from .space_plans import Planner, SpacePlan, best_plan, divided

RULE = "split-space"


@dataclass(frozen=True)
class SplitSpace(Pass):
    """Computes the stage at the start of a graph patch by patch; each reads of the image what its part of the result needs.

        c = conv(x, w, padding=1)            c0 = conv(x[0:10], w, padding 1 before)    d0 = conv(c0, v, padding 1 before)    d[0:8]
        d = conv(c, v, padding=1)    -->     c1 = conv(x[6:16], w, padding 1 behind)    d1 = conv(c1, v, padding 1 behind)    d[8:16]
        y = mean(d, [2, 3])                  d = cat(d0, d1)
                                             y = mean(d, [2, 3])

    Exact: what lies outside of a value is what the op puts there, zeros or -inf, and what lies inside is computed, twice where two
    patches need it. Where the stage ends and how many patches there are is chosen: the least memory for an allowed amount of arithmetic.
    Patches run one after the other, in the order in which `cat` reads them. After the patch-based inference of Lin et al., "MCUNetV2"
    (2021).

    overhead: by what share the arithmetic of the whole graph may grow. limit: bytes of intermediate values that are little enough, 0 for
    as few as possible. A stage ends before what needs the whole image: global pooling, group and instance norms, squeeze-and-excitation,
    flattening. Refused: graphs without such a stage, and those that would hold no less.
    """

    overhead: float = 0.25
    limit: int = 0

    name: ClassVar[str] = RULE

    def run(self, graph: Graph, notes: Notes | None = None) -> Graph:
        notes = notes if notes is not None else Notes()
        stage = first_stage(graph)
        if stage is None:
            notes.decline(self.name, f"patches of {graph.name}", Reason.SHAPE_MISMATCH, None, "no convolution of an image starts it")
            return graph
        planner = Planner(graph, stage, self.overhead)
        if self.limit and planner.exact <= self.limit:
            notes.decline(
                self.name, f"patches of {stage.source.hint}", Reason.NO_GAIN, stage.source, f"{_mib(planner.exact)} are within the limit"
            )
            return graph
        plan = best_plan(planner, self.limit)
        for node, why in stage.refused.items():
            notes.decline(self.name, describe(node), Reason.WHOLE_IMAGE, node, why)
        if plan is None:
            value = f"no patches within {self.overhead:.0%} more arithmetic take less than {_mib(planner.exact)}"
            notes.decline(self.name, f"patches of {stage.source.hint}", Reason.NO_GAIN, stage.source, value)
            return graph
        if not notes.may(self.name, plan.end):
            return graph
        notes.apply(self.name, _told(plan, planner), plan.end)
        return with_patches(graph, stage, plan.end, plan.parts)


def first_stage(graph: Graph) -> Stage | None:
    """The stage at an input that holds most nodes, with convolutions or pooling among them; None where there is none."""
    stages = [stage_of(graph, x, dims) for x in graph.inputs for dims in _image_dims(x)]
    stages = [s for s in stages if any(_is_window(n) for n in s.readings)]
    return max(stages, key=lambda s: len(s.readings), default=None)


def _image_dims(x: Node) -> list[tuple[int, ...]]:
    """Where an input may have axes of space: behind the channels, or before."""
    if not isinstance(x.type, TensorType) or x.type.rank < 3:
        return []
    return [tuple(range(2, x.type.rank)), tuple(range(1, x.type.rank - 1))]


def _is_window(node: Node) -> bool:
    return node.op.name in ("conv", "max_pool", "avg_pool")


def _told(plan: SpacePlan, planner: Planner) -> str:
    grid = "x".join(map(str, plan.parts))
    before, after, more = planner.exact, plan.peak, float(plan.flops / max(planner.flops, 1)) - 1
    return f"{grid} patches up to {describe(plan.end)}: {_mib(before)} -> {_mib(after)} at a time, {more:+.1%} arithmetic"


def _mib(size: int) -> str:
    return f"{size / 2**20:.1f} MiB" if size >= 2**20 else f"{size / 2**10:.1f} KiB"


def with_patches(graph: Graph, stage: Stage, end: Node, parts: Sequence[int]) -> Graph:
    """The graph with the stage up to `end` computed in so many parts along each axis, any of which compute the same.

    Raises ValueError for more parts than an axis can be cut into.
    """
    sizes = stage.sizes(end)
    spans = [_along(stage, end, axis, divided(size, n)) for axis, (size, n) in enumerate(zip(sizes, parts, strict=True))]
    pieces = {at: _Patch(stage, end, chosen).result for at, chosen in _grid(spans)}
    joined = _joined(pieces, [len(s) for s in spans], stage.dims_of(end), end)
    return cleaned(rewrite(graph, lambda node, inputs: joined if node is end else None))


def _along(stage: Stage, end: Node, axis: int, parts: Sequence[Span]) -> Sequence[Mapping[Node, Span]]:
    """For each part of `end` along an axis what it needs of each node. An axis in one part is left whole, whatever of it is read."""
    if len(parts) == 1:
        return [{n: Span(0, stage.sizes(n)[axis]) for n in (stage.source, *stage.under(end))}]
    found = needs_of_parts(stage, end, axis, parts)
    if found is None:
        raise ValueError(f"{len(parts)} parts along axis {axis} are too many: one reads nothing of the image, or two need the same")
    return found


def _grid(spans: Sequence[Sequence[Mapping[Node, Span]]]) -> list[tuple[tuple[int, ...], list[Mapping[Node, Span]]]]:
    places = itertools.product(*(range(len(s)) for s in spans))
    return [(at, [spans[axis][k] for axis, k in enumerate(at)]) for at in places]


def _joined(pieces: Mapping[tuple[int, ...], Node], counts: Sequence[int], dims: Sequence[int], end: Node) -> Node:
    """The result of all patches, the last axis joined first."""
    found = dict(pieces)
    for axis in reversed(range(len(counts))):
        rest = dict.fromkeys(at[:axis] for at in found)
        rows = {at: [found[(*at, k)] for k in range(counts[axis])] for at in rest}
        prov = end.prov.with_rule(RULE)
        found = {at: row[0] if len(row) == 1 else OPS["cat"](*row, dim=dims[axis], hint=end.hint, prov=prov) for at, row in rows.items()}
    return found[()]


@dataclass(frozen=True)
class _Cut:
    """An operand as one patch reads it along one dimension: `before` and `after` it, what the op puts outside of the image."""

    before: int
    after: int


class _Patch:
    """The nodes of a stage for one patch: of each no more than is needed."""

    def __init__(self, stage: Stage, end: Node, spans: Sequence[Mapping[Node, Span]]) -> None:
        self.stage, self.spans = stage, spans
        self.made: dict[Node, Node] = {}
        for node in stage.under(end):
            self.made[node] = self._made(node)
        self.result = self.made[end]

    def _made(self, node: Node) -> Node:
        operands: list[Node] = []
        cuts: dict[int, _Cut] = {}
        for operand, reaches in zip(node.inputs, self.stage.readings[node].reaches):
            operands.append(self._read(operand, reaches, node, cuts))
        changes = _CHANGES[node.op.name](node, operands[0], cuts) if node.op.name in _CHANGES else {}
        return node.op(*operands, **{**node.attrs, **changes}, hint=node.hint, prov=node.prov.with_rule(RULE))

    def _read(self, operand: Node, reaches: Sequence[Reach | None], node: Node, cuts: dict[int, _Cut]) -> Node:
        """What the patch of a node reads of an operand; how it is cut along each dimension goes into `cuts`."""
        cut = self.made.get(operand, operand)
        for axis, reach in enumerate(reaches):
            if reach is None or self._whole(axis):
                continue
            size, wanted = operand.shape[reach.dim], reach.of(self.spans[axis][node])
            inside = wanted.within(size)
            there = self.spans[axis][operand] if operand in self.made else Span(0, size)
            if inside != there:
                bounds = {"start": inside.start - there.start, "stop": inside.stop - there.start}
                cut = OPS["slice"](cut, dim=reach.dim, **bounds, hint=operand.hint, prov=operand.prov.with_rule(RULE))
            cuts[reach.dim] = _Cut(inside.start - wanted.start, wanted.stop - inside.stop)
        return cut

    def _whole(self, axis: int) -> bool:
        """Whether the axis is in one part, and every op as it was along it."""
        return all(span == Span(0, self.stage.sizes(n)[axis]) for n, span in self.spans[axis].items())


# -- how attributes change with what is read: by the dimensions along which the operand was cut


Changes = dict[str, Any]


def _window(node: Node, x: Node, cuts: Mapping[int, _Cut]) -> Changes:
    """Padding where the image ends, and none where it goes on; as many windows as there were along dimensions that are not cut."""
    a = node.attrs
    first = 1 if a["channels_last"] else x.tensor.rank - len(a["padding"])
    before, after = list(a["padding"]), list(a["padding_after"] or a["padding"])
    for k, d in enumerate(range(first, first + len(before))):
        if d in cuts:
            before[k], after[k] = cuts[d].before, cuts[d].after
        elif a.get("ceil"):
            reached = (node.shape[d] - 1) * a["stride"][k] - before[k] + window_extent(node, k)
            after[k] = max(after[k], reached - x.shape[d])
    changes: Changes = {"padding": tuple(before), "padding_after": () if before == after else tuple(after)}
    return changes if "ceil" not in a else {**changes, "ceil": False}


def _pad(node: Node, x: Node, cuts: Mapping[int, _Cut]) -> Changes:
    low, high = list(node.attrs["low"]), list(node.attrs["high"])
    for d, cut in cuts.items():
        low[d], high[d] = cut.before, cut.after
    return {"low": tuple(low), "high": tuple(high)}


def _slice(node: Node, x: Node, cuts: Mapping[int, _Cut]) -> Changes:
    """Along the dimension that it cuts its operand has been cut to what it reads."""
    d = normalize_dim(node.attrs["dim"], node.tensor.rank)
    return {"start": 0, "stop": x.shape[d]} if d in cuts else {}


_CHANGES = {"conv": _window, "max_pool": _window, "avg_pool": _window, "pad": _pad, "slice": _slice}

"""In-place updates: which values that are written back to an input can be computed in that input's own memory.

    c = index_put(cache, kv, position)      c lies in cache: only the rows at `position` are written
    y = attention(q, c, c)
    write cache = c                         nothing left to do

State is a value: the update of a cache is a new cache. Where nobody reads the old one afterwards, both may be the same memory.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from ..dims import Dim, same
from ..graph import Graph, Node, order
from ..op import Category
from .memory import Owner, may_share, owners

UPDATES = frozenset({"index_put", "scatter", "slice_scatter", "cache_update"})
"""Ops whose result is their first operand but for some positions."""


class Hazard(Exception):
    """Why a value cannot be computed in the memory of the input it is written to, and the node at which it would go wrong."""

    def __init__(self, node: Node, why: str) -> None:
        super().__init__(why)
        self.node, self.why = node, why


@dataclass
class InPlace:
    """target: node -> the input in whose memory it is computed. refused: what stays a copy although it is an update."""

    target: dict[Node, Node] = field(default_factory=dict)
    refused: list[tuple[Node, Hazard]] = field(default_factory=list)


def in_place(graph: Graph, steps: Sequence[Node] | None = None) -> InPlace:
    """The updates of `graph.writes` that run in place if the nodes run as `steps` (default: `order(graph)`)."""
    steps = order(graph) if steps is None else steps
    found = InPlace()
    for target, value in graph.writes:
        if value.op.name not in UPDATES:
            continue
        try:
            updates = _updates(target, value)
            _check_layout(target)
            _check_order(graph, steps, target, value, updates)
        except Hazard as hazard:
            found.refused.append((value, hazard))
        else:
            found.target.update(dict.fromkeys(updates, target))
    return found


def puts_back(node: Node) -> Node | None:
    """The update inside a part of the first operand that a `slice_scatter` puts back where it came from, if it is one.

    Done in place, such a node has nothing left to do.
    """
    if node.op.name != "slice_scatter":
        return None
    inner = _squeezed(node.inputs[1])
    if inner.op.name not in UPDATES:
        return None
    part = inner
    while part.op.name in UPDATES:
        part = _squeezed(part.inputs[0])
    return inner if _is_part(part, node.inputs[0], node) else None


def _updates(target: Node, value: Node) -> list[Node]:
    """The updates that lead from `target` to `value`. Raises Hazard where anything else stands between."""
    found: list[Node] = []
    node = value
    while node is not target:
        if node.op.name not in UPDATES:
            raise Hazard(node, f"it does not start from {target.hint or 'the input'}")
        _collect(node, found)
        node = node.inputs[0]
    return found


def _collect(node: Node, found: list[Node]) -> None:
    """The update, and those inside the part that it puts back."""
    found.append(node)
    inner = puts_back(node)
    while inner is not None and inner.op.name in UPDATES:
        _collect(inner, found)
        inner = _squeezed(inner.inputs[0])


def _squeezed(node: Node) -> Node:
    """The node under reshapes that only add or drop dimensions of size 1, which are views of any memory."""
    while node.op.name == "reshape" and _long(node) == _long(node.inputs[0]):
        node = node.inputs[0]
    return node


def _long(node: Node) -> list[Dim]:
    return [d for d in node.shape if not same(d, 1)]


def _is_part(part: Node, base: Node, scatter: Node) -> bool:
    """Whether `part` is the slice of `base` that `scatter` writes."""
    dim = scatter.attrs["dim"] % base.tensor.rank
    start, stop, step = (scatter.attrs[k] for k in ("start", "stop", "step"))
    if part is base:
        return same(start, 0) and same(stop, base.shape[dim]) and step == 1
    if not part.inputs or part.inputs[0] is not base or part.attrs.get("dim", -1) % base.tensor.rank != dim:
        return False
    if part.op.name == "select":
        return same(part.attrs["index"], start) and same(stop, start + 1)
    return part.op.name == "slice" and part.attrs["step"] == step and same(part.attrs["start"], start) and same(part.attrs["stop"], stop)


def _check_layout(target: Node) -> None:
    """No element of the input may lie where another lies."""
    strides: Iterable[Dim] | None = target.attrs["strides"]
    if strides is None:
        return
    extents = [(s, n) for s, n in zip(strides, target.shape) if n != 1]
    if not all(isinstance(v, int) for pair in extents for v in pair):
        raise Hazard(target, f"whether strides {list(strides)} overlap is not known")
    reach = 0
    for stride, size in sorted(extents):  # type: ignore[type-var]
        if stride <= reach:  # type: ignore[operator]
            raise Hazard(target, f"strides {list(strides)} overlap")
        reach += (size - 1) * stride  # type: ignore[operator]


def _check_order(graph: Graph, steps: Sequence[Node], target: Node, value: Node, updates: Sequence[Node]) -> None:
    """Raises Hazard where a node that runs after an update reads what was there before it, or an update reads what it overwrites."""
    mine = set(updates)
    owner = Owner(target)
    owned = owners(steps, lambda n: n.inputs[:1] if n in mine else may_share(n))
    version: dict[Node, int] = {target: 0}  # how many updates the memory has seen when it holds the value
    seen = 0
    for node in steps:
        inside = [i for i in node.inputs if owner in owned[i]]
        if node in mine:
            seen = _update(node, inside, version, seen)
            version[node] = seen
            continue
        for operand in inside:
            if version[operand] < seen:
                raise Hazard(node, "it reads the old value later")
        if owner in owned[node] and node is not target:
            version[node] = max(version[i] for i in inside)
    _check_results(graph, target, version, seen)
    if version[value] != seen:
        raise Hazard(value, "a later update does not belong to it")


def _check_results(graph: Graph, target: Node, version: Mapping[Node, int], seen: int) -> None:
    """Raises Hazard where a result lies in the memory, which later calls change, or another input gets an old value at the end.

    version: value in the memory -> how many updates it has seen.
    """
    for root in graph.outputs:
        if root in version and (version[root] > 0 or not _looks_at(root, target)):
            raise Hazard(root, "it is a result as well")
    for other, written in graph.writes:
        if other is not target and version.get(written, seen) < seen:
            raise Hazard(written, "its old value is written to another input")


def _update(node: Node, inside: list[Node], version: dict[Node, int], seen: int) -> int:
    """How many updates the memory has seen after `node`."""
    if puts_back(node) is not None:
        return seen
    if version[node.inputs[0]] < seen:
        raise Hazard(node, "it updates the old value later")
    if any(i in inside for i in node.inputs[1:]):
        raise Hazard(node, "it reads what it overwrites")
    return seen + 1


def _looks_at(root: Node, target: Node) -> bool:
    """Whether a result shows the input by its meaning, whatever the input holds in the end."""
    while root.op.category is Category.VIEW:
        root = root.inputs[0]
    return root is target

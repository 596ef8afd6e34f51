"""Memory: which values may share it, who owns it, from which step to which it is needed."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from ..dims import same_shape
from ..graph import Graph, Node, is_scalar
from ..op import Category
from ..types import TensorType


@dataclass(frozen=True)
class Owner:
    """Result number `index` of `node`: the place where memory comes into being."""

    node: Node
    index: int = 0


@dataclass(frozen=True)
class Lifetime:
    """An owner's memory is needed from step `start` to step `end`, both included."""

    owner: Owner
    start: int
    end: int

    def overlaps(self, other: Lifetime) -> bool:
        return self.start <= other.end and other.start <= self.end


def views(node: Node) -> tuple[Node, ...]:
    """The operands whose memory the result is a view of by its meaning."""
    if node.op.category is Category.VIEW:
        return () if node.attrs.get("own") else node.inputs[:1]
    alias = node.op.name == "item" or (node.op.name == "extern" and _returns_alias(node.attrs["target"]))
    return tuple(n for n in node.inputs if not is_scalar(n)) if alias else ()


def may_share(node: Node) -> tuple[Node, ...]:
    """The operands whose memory the result may lie in as the host runs the node.

    Beside views: a torch function that returns its operand where nothing is to be done (a cast to the same dtype, a sum of one element).
    """
    if node.op.name == "cast" or node.op.category is Category.REDUCTION:
        return node.inputs[:1]
    return views(node)


def _returns_alias(target: str) -> bool:
    from ..ops.structure import resolve

    return any(r.alias_info is not None for r in resolve(target)._schema.returns)


def takes_memory(node: Node) -> bool:
    """Whether the node can be computed into memory that the host provides: our kernels, and products whose `out` does not copy."""
    if node.op.name in ("region", "grouped_matmul"):
        return True
    if node.op.name == "linear":
        return node.inputs[0].tensor.rank >= 2
    return node.op.name == "matmul" and foldable(node.inputs[0].tensor, node.inputs[1].tensor)


def foldable(a: TensorType, b: TensorType) -> bool:
    """Whether a @ b is one mm or bmm on reshaped operands: b a matrix, or both with the same leading dimensions."""
    if a.rank < 2 or b.rank < 2:
        return False
    return b.rank == 2 or same_shape(a.shape[:-2], b.shape[:-2])


def owners(steps: Sequence[Node], shares: Callable[[Node], tuple[Node, ...]] = may_share) -> dict[Node, frozenset[Owner]]:
    """Value -> the owners of the memory it may lie in. A region's items own memory each; the region itself has all of them.

    shares: `may_share`, or `views` for what the graph means instead of what may happen.
    """
    found: dict[Node, frozenset[Owner]] = {}
    for node in steps:
        if node.op.name == "item" and node.inputs[0].op.name == "region":
            found[node] = frozenset({Owner(node.inputs[0], node.attrs["index"])})
            continue
        shared = shares(node)
        if shared:
            found[node] = frozenset().union(*(found[n] for n in shared))
        else:
            count = len(node.type) if isinstance(node.type, tuple) else 1
            found[node] = frozenset(Owner(node, i) for i in range(count))
    return found


def lifetimes(graph: Graph, steps: Sequence[Node]) -> dict[Owner, Lifetime]:
    """When each owner's memory is needed if the nodes run as `steps`; outputs and written-back values live to the end (step len(steps))."""
    owned = owners(steps)
    ends: dict[Owner, int] = {}
    starts: dict[Owner, int] = {}
    for step, node in enumerate(steps):
        for owner in owned[node]:
            starts.setdefault(owner, step)
            ends[owner] = max(ends.get(owner, step), step)
        if node.op.name == "item":  # names a result, reads nothing
            continue
        for owner in _owners_of(node.inputs, owned):
            ends[owner] = max(ends[owner], step)
    for owner in _owners_of(graph.roots, owned):
        ends[owner] = len(steps)
    return {owner: Lifetime(owner, starts[owner], ends[owner]) for owner in starts}


def _owners_of(nodes: Iterable[Node], owned: dict[Node, frozenset[Owner]]) -> set[Owner]:
    return {owner for n in nodes for owner in owned[n]}


def owner_type(owner: Owner) -> TensorType:
    kind: Any = owner.node.type
    return kind[owner.index] if isinstance(kind, tuple) else kind

"""Memory: which values may share it, who owns it, from which step to which it is needed."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from ..dims import same
from ..graph import Graph, Node, is_scalar
from ..op import Category
from ..types import TensorType

_FRESH_CATEGORIES = frozenset({Category.CONTRACTION, Category.CONSTANT, Category.GATHER})


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


def may_share(node: Node) -> tuple[Node, ...]:
    """The operands whose memory the result may be a view of; empty where the result is always new memory.

    Torch's functions return an operand itself where nothing is to be done (a cast to the same dtype), so everything counts that is not
    known to make new memory.
    """
    if node.op.name in ("region", "attention") or node.op.category in _FRESH_CATEGORIES:
        return ()
    if node.op.name == "layout" and node.attrs["own"]:
        return ()
    if node.op.name == "extern" and not _returns_alias(node.attrs["target"]):
        return ()
    return tuple(n for n in node.inputs if not is_scalar(n))


def _returns_alias(target: str) -> bool:
    from ..ops.structure import resolve

    return any(r.alias_info is not None for r in resolve(target)._schema.returns)


def takes_memory(node: Node) -> bool:
    """Whether the node can be computed into memory that the host provides: our kernels, and products whose `out` does not copy."""
    if node.op.name == "region":
        return True
    if node.op.name == "linear":
        return node.inputs[0].tensor.rank >= 2
    return node.op.name == "matmul" and foldable(node.inputs[0].tensor, node.inputs[1].tensor)


def foldable(a: TensorType, b: TensorType) -> bool:
    """Whether a @ b is one mm or bmm on reshaped operands: b a matrix, or both with the same leading dimensions."""
    if a.rank < 2 or b.rank < 2:
        return False
    return b.rank == 2 or (a.rank == b.rank and all(same(x, y) for x, y in zip(a.shape[:-2], b.shape[:-2])))


def owners(steps: Sequence[Node]) -> dict[Node, frozenset[Owner]]:
    """Value -> the owners of the memory it may lie in. A region's items own memory each; the region itself has all of them."""
    found: dict[Node, frozenset[Owner]] = {}
    for node in steps:
        if node.op.name == "item" and node.inputs[0].op.name == "region":
            found[node] = frozenset({Owner(node.inputs[0], node.attrs["index"])})
            continue
        shared = may_share(node)
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

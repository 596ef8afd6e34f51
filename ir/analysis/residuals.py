"""Residual units: places where a graph adds to a value something that was computed from it.

    x -> [branch: norm, attention, projection] -> add(x, .) -> y        y = x would be a graph, too

Source: "Residual Networks Behave Like Ensembles of Relatively Shallow Networks" (Veit et al., 2016).
"""

from __future__ import annotations

from dataclasses import dataclass

from ..graph import Graph, Node, order, users
from ..op import Category
from .hashing import canonical


@dataclass(frozen=True, eq=False)
class Unit:
    """result = add(kept, what `branch` ends in). branch: all between `kept` and `result`, with the constants that nothing else reads.

    name: the module path of the last contraction in it. digest: equal for units that are equal modulo weights; their branches correspond.
    """

    name: str
    kept: Node
    result: Node
    branch: tuple[Node, ...]
    digest: str

    @property
    def kind(self) -> str:
        """What it does: "attention" if there is one in it, else "mlp"."""
        return "attention" if any(n.op.name == "attention" for n in self.branch) else "mlp"


def units(graph: Graph) -> list[Unit]:
    """The innermost residual units that compute a contraction or an attention, in order; names differ."""
    nodes, readers = order(graph), users(graph)
    below = {n: i for i, n in enumerate(nodes)}
    found: list[Unit] = []
    names: dict[str, int] = {}
    results: set[Node] = set()
    for node in nodes:
        kept = _kept(node, below)
        branch = _between(node, kept, below) if kept is not None else []
        last = next((n for n in reversed(branch) if _works(n)), None)
        if kept is None or last is None or results.intersection(branch):
            continue
        results.add(node)
        group = _with_constants(branch, readers)
        name = next(iter(last.prov.modules), "") or f"{last.op.name}_{len(found)}"
        names[name] = names.get(name, 0) + 1
        form = canonical(group, weights=False)
        found.append(Unit(name if names[name] == 1 else f"{name}#{names[name]}", kept, node, form.nodes, form.digest))
    return found


def _works(node: Node) -> bool:
    return node.op.category is Category.CONTRACTION or node.op.name == "attention"


def _kept(node: Node, below: dict[Node, int]) -> Node | None:
    """The operand of a sum that the other one was computed from, of the same type."""
    if node.op.name != "add" or len(set(node.inputs)) != 2:
        return None
    for kept, other in (node.inputs, node.inputs[::-1]):
        if kept.type == node.type and _computed(kept) and _reaches(kept, other, below):
            return kept
    return None


def _computed(node: Node) -> bool:
    """Whether a value differs between calls."""
    return node.op.category is not Category.CONSTANT or node.op.name == "input"


def _reaches(start: Node, end: Node, below: dict[Node, int]) -> bool:
    """Whether `end` was computed from `start`, another node."""
    return end is not start and bool(_between(end, start, below, inclusive=True))


def _between(end: Node, start: Node, below: dict[Node, int], inclusive: bool = False) -> list[Node]:
    """What lies on paths from `start` to `end`, in order; `start` left out, and `end` unless inclusive."""
    least, above, stack = below[start], {end}, [end]
    while stack:
        for operand in stack.pop().inputs:
            if operand not in above and below[operand] >= least:
                above.add(operand)
                stack.append(operand)
    reached = {start}
    for node in sorted(above, key=below.__getitem__):
        if reached.intersection(node.inputs):
            reached.add(node)
    found = sorted(reached - {start} - (set() if inclusive else {end}), key=below.__getitem__)
    return found if end in reached else []


def _with_constants(branch: list[Node], readers: dict[Node, list[Node]]) -> list[Node]:
    """The branch and what only it reads, views of constants included."""
    inside, found = set(branch), list(branch)
    at = 0
    while at < len(found):
        for operand in found[at].inputs:
            fixed = operand.op.name in ("constant", "full", "iota") or operand.op.category is Category.VIEW
            if fixed and operand not in inside and inside.issuperset(readers[operand]):
                inside.add(operand)
                found.append(operand)
        at += 1
    return found

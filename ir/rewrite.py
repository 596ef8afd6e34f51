"""Rewriting: a memoised map from old nodes to new ones. Equal nodes merge and unused ones vanish by construction."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from typing import Any

import sympy
import torch

from .graph import Data, Graph, Node, order, visit
from .provenance import Provenance
from .types import ScalarType

_HASHABLE = (int, str, torch.dtype, sympy.Expr)
"""Attributes that equal values identify, type for type; floats are not among them (NaN, -0.0)."""

Rewrite = Callable[[Node, "tuple[Node, ...]"], "Node | None"]


class Interner:
    """Merges structurally equal nodes: same op, same (already interned) operands, same attributes, same type.

    Effectful nodes differ in `sequence` and never merge. What the duplicates knew of their origin is kept in `merged`.
    """

    def __init__(self) -> None:
        self._known: dict[Any, Node] = {}
        self.merged: dict[Node, Provenance] = {}

    def __call__(self, node: Node) -> Node:
        kept = self._known.setdefault(structural_key(node), node)
        if kept is not node and node.prov != kept.prov:
            self.merged[kept] = self.merged.get(kept, kept.prov).union(node.prov)
        return kept


def structural_key(node: Node) -> Any:
    """Hashable identity of a node given that of its operands."""
    if node.op.name == "input":
        return id(node)
    attrs = tuple((k, attr_key(v)) for k, v in node.attrs.items())
    kind = str(node.type) if isinstance(node.type, ScalarType) else node.type
    return (node.op.name, tuple(id(n) for n in node.inputs), attrs, kind)


def attr_key(value: Any) -> Any:
    """An attribute as a key: 1, 1.0, True and -0.0, 0.0 all differ; tensors and graphs compare by identity."""
    if isinstance(value, tuple):
        return tuple(attr_key(v) for v in value)
    if isinstance(value, (Data, Graph, Node)):
        return id(value)
    if isinstance(value, _HASHABLE):
        return (type(value), value)
    return (type(value).__name__, repr(value))


def rewrite(graph: Graph, rule: Rewrite, **changes: Any) -> Graph:
    """The graph with `rule(node, new_operands)` in place of each node, operands first.

    The rule returns a new node, or None to keep the node on its new operands. Inputs are kept as they are. `changes` replace
    fields of the result (`stage=`, `name=`).
    """
    intern = Interner()
    new: dict[Node, Node] = {n: n for n in graph.inputs}
    done: set[Node] = set(graph.inputs)
    for node in order(graph):
        if node in new:
            continue
        inputs = tuple(new[n] for n in node.inputs)
        made = rule(node, inputs)
        if made is None:
            made = node if inputs == node.inputs else node.with_inputs(inputs)
        new[node] = _interned(made, intern, done)
    result = remap(graph, new, **changes)
    return _with_provenance(result, intern.merged) if intern.merged else result


def _interned(root: Node, intern: Interner, done: set[Node]) -> Node:
    """Interns every node a rule has just built under `root`; `done` holds the nodes of the new graph."""
    fresh: list[Node] = []
    visit(root, set(), fresh, done)
    made: dict[Node, Node] = {}
    for node in fresh:
        inputs = tuple(made.get(n, n) for n in node.inputs)
        made[node] = intern(node if inputs == node.inputs else replace(node, inputs=inputs))
    done.update(made.values())
    return made.get(root, root)


def _with_provenance(graph: Graph, merged: Mapping[Node, Provenance]) -> Graph:
    new: dict[Node, Node] = {n: n for n in graph.inputs}
    for node in order(graph):
        if node not in new:
            inputs = tuple(new[n] for n in node.inputs)
            keep = inputs == node.inputs and node not in merged
            new[node] = node if keep else replace(node, inputs=inputs, prov=merged.get(node, node.prov))
    return remap(graph, new)


def remap(graph: Graph, new: Mapping[Node, Node], **changes: Any) -> Graph:
    """The graph whose outputs and written-back values are the images under `new`; the memory plan is dropped."""
    return replace(
        graph,
        outputs=tuple(new[n] for n in graph.outputs),
        writes=tuple((i, new[v]) for i, v in graph.writes),
        arena={},
        inplace={},
        **changes,
    )


def cleaned(graph: Graph) -> Graph:
    """Common subexpressions merged, dead nodes gone."""
    return rewrite(graph, lambda node, inputs: None)


def inline(graph: Graph, operands: Iterable[Node]) -> tuple[Node, ...]:
    """The outputs of `graph` with `operands` bound to its inputs: how a region's body or an expansion is spliced in."""
    new = dict(zip(graph.inputs, operands, strict=True))
    for node in order(graph):
        if node not in new:
            inputs = tuple(new[n] for n in node.inputs)
            new[node] = node if inputs == node.inputs else replace(node, inputs=inputs)
    return tuple(new[n] for n in graph.outputs)

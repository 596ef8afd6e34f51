"""Size symbols that get a value: a graph for any batch becomes one for a batch of 4."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from types import MappingProxyType
from typing import Any

import sympy

from .dims import dim, symbol
from .graph import Graph, Node, order
from .rewrite import cleaned, remap
from .types import ScalarType, TensorType


def with_sizes(graph: Graph, sizes: Mapping[str, int]) -> Graph:
    """The graph for these values of some of its symbols; inputs keep their places. Where nothing is known of them, it is the same graph."""
    return cleaned(settled(graph, sizes)[0]) if sizes else graph


def settled(graph: Graph, sizes: Mapping[str, int]) -> tuple[Graph, dict[Node, Node]]:
    """The same, node for node: also old node -> new node."""
    values = {symbol(name): value for name, value in sizes.items()}
    new: dict[Node, Node] = {}
    for node in (*graph.inputs, *order(graph)):
        if node not in new:
            new[node] = _settled(node, tuple(new[n] for n in node.inputs), values)
    symbols = {name: known for name, known in graph.symbols.items() if name not in sizes}
    made = remap(graph, new, inputs=tuple(new[n] for n in graph.inputs), symbols=symbols)
    return replace(made, writes=tuple((new[target], new[value]) for target, value in graph.writes)), new


def _settled(node: Node, inputs: tuple[Node, ...], values: Mapping[Any, int]) -> Node:
    attrs = {k: _value(v, values) for k, v in node.attrs.items()}
    if inputs == node.inputs and attrs == dict(node.attrs):
        return node
    if node.op.name == "input":
        return replace(node, attrs=MappingProxyType(attrs), type=_value(node.type, values))
    return replace(node, attrs=MappingProxyType(attrs)).with_inputs(inputs)


def _value(value: Any, values: Mapping[Any, int]) -> Any:
    """An attribute or a type in which symbols are replaced."""
    if isinstance(value, sympy.Expr):
        return dim(value.xreplace(dict(values)))
    if isinstance(value, TensorType):
        return value.with_shape(tuple(_value(d, values) for d in value.shape))
    if isinstance(value, ScalarType):
        return replace(value, value=_value(value.value, values))
    if isinstance(value, Graph):
        inner, _ = settled(value, {s.name: n for s, n in values.items()})
        return inner
    if isinstance(value, tuple) and not hasattr(value, "_fields"):
        return tuple(_value(v, values) for v in value)
    return value

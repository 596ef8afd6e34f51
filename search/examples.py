"""Plausible inputs of a graph, to time it on: the values do not matter, the shapes and strides do."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import sympy
import torch

from ..ir.dims import SymbolRange, free_symbols, hint
from ..ir.graph import Graph, Node, graph_input, order
from ..ir.types import ScalarType


def example_inputs(graph: Graph, known: Mapping[int, torch.Tensor] = {}) -> list[Any]:
    """One value for each input: those `known` by number, else random floats, zeros for integers (a valid position anywhere) and true.

    Sizes that vary are plausible ones. What the graph writes to is a copy.
    """
    written = {target for target, _ in graph.writes}
    values: list[Any] = []
    for i, node in enumerate(graph.inputs):
        value = known[i].detach() if i in known else _example(node, graph.symbols)
        values.append(value.clone() if i in known and node in written else value)
    return values


def with_sizes(graph: Graph) -> Graph:
    """A part of a larger graph, with an input for each size that its values mention: no other input needs to tell it. Of others it knows
    nothing."""
    sizes = {str(s): s for s in sorted({s for node in order(graph) for s in _symbols(node)}, key=str)}
    inputs = (graph_input(name, ScalarType(torch.int64, s)) for name, s in sizes.items())
    return replace(graph, inputs=(*graph.inputs, *inputs), symbols={k: v for k, v in graph.symbols.items() if k in sizes})


def _symbols(node: Node) -> set[sympy.Symbol]:
    types = node.type if isinstance(node.type, tuple) else (node.type,)
    return free_symbols([d for t in types if not isinstance(t, ScalarType) for d in t.shape])  # type: ignore[return-value]


def _example(node: Node, symbols: Mapping[str, SymbolRange]) -> Any:
    if isinstance(node.type, ScalarType):
        return hint(node.type.value, symbols)  # type: ignore[arg-type]
    shape = tuple(hint(d, symbols) for d in node.shape)
    strides = node.attrs["strides"]
    like = {"dtype": node.dtype, "device": node.tensor.device}
    value = torch.empty(shape, **like) if strides is None else torch.empty_strided(shape, tuple(hint(s, symbols) for s in strides), **like)
    if node.dtype.is_floating_point or node.dtype.is_complex:
        return value.copy_(torch.randn(shape, dtype=torch.float32, device=node.tensor.device))
    return value.fill_(1 if node.dtype == torch.bool else 0)

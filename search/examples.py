"""Plausible inputs of a graph, to time it on: the values do not matter, the shapes and strides do."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from ..ir.dims import SymbolRange, hint
from ..ir.graph import Graph, Node
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

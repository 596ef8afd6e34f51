"""`interpret(graph, inputs)`: runs each op's torch meaning. The oracle of every pass and kernel test."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import sympy
import torch

from .dims import evaluate
from .graph import Graph, Node, order
from .types import ScalarType, TensorType


def interpret(
    graph: Graph, inputs: Sequence[Any], dtype: torch.dtype | None = None, sizes: Mapping[str, int] | None = None
) -> list[Any]:
    """The outputs of the graph on `inputs` (tensors, and ints for sizes), in order; written-back values update their input in place.

    dtype: run every floating-point computation in this dtype instead (torch.float64 gives the reference of the error rule).
    sizes: values of symbols that the inputs do not tell (a region's body may mention a size of the graph around it).
    """
    env = {**(sizes or {}), **bind_sizes(graph, inputs)}
    values: dict[Node, Any] = {node: _widen(value, dtype) for node, value in zip(graph.inputs, inputs, strict=True)}
    for node in order(graph):
        if node not in values:
            values[node] = _run(node, [values[n] for n in node.inputs], env, dtype)
    results = [values[n] for n in graph.outputs]
    if not graph.writes:
        return results
    results = [_copy(r) for r in results]  # a result may be a view of what is about to be overwritten
    callers = dict(zip(graph.inputs, inputs))
    written = [(callers[target], _copy(values[value])) for target, value in graph.writes]
    for target, value in written:
        target.copy_(value)
    return results


def _copy(value: Any) -> Any:
    return value.clone() if isinstance(value, torch.Tensor) else value


def _run(node: Node, operands: list[Any], env: dict[str, int], dtype: torch.dtype | None) -> Any:
    attrs = {k: concrete(v, env) for k, v in node.attrs.items()}
    if dtype is not None and isinstance(attrs.get("dtype"), torch.dtype) and attrs["dtype"].is_floating_point:
        attrs["dtype"] = dtype
    return _widen(node.op.eager(*operands, **attrs), dtype)


def _widen(value: Any, dtype: torch.dtype | None) -> Any:
    if dtype is not None and isinstance(value, torch.Tensor) and value.is_floating_point():
        return value.to(dtype)
    return tuple(_widen(v, dtype) for v in value) if isinstance(value, tuple) else value


def bind_sizes(graph: Graph, inputs: Sequence[Any]) -> dict[str, int]:
    """Symbol name -> size, read from the inputs whose type mentions the bare symbol."""
    env: dict[str, int] = {}
    for node, value in zip(graph.inputs, inputs, strict=True):
        if isinstance(node.type, ScalarType) and isinstance(node.type.value, sympy.Symbol):
            env[node.type.value.name] = int(value)
        if isinstance(node.type, TensorType):
            for d, size in zip(node.type.shape, value.shape):
                if isinstance(d, sympy.Symbol):
                    env[d.name] = int(size)
    return env


def concrete(value: Any, env: dict[str, int]) -> Any:
    """An attribute with its sizes evaluated."""
    if isinstance(value, sympy.Expr):
        return evaluate(value, env)
    if isinstance(value, tuple) and not hasattr(value, "_fields"):
        return tuple(concrete(v, env) for v in value)
    return value

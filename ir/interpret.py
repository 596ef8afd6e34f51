"""`interpret(graph, inputs)`: runs each op's torch meaning. The oracle of every pass and kernel test."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import sympy
import torch

from .dims import evaluate
from .graph import Graph, Node, order, visit
from .types import ScalarType, TensorType


def interpret(
    graph: Graph,
    inputs: Sequence[Any],
    dtype: torch.dtype | None = None,
    sizes: Mapping[str, int] | None = None,
    known: Mapping[Node, Any] | None = None,
    watch: Callable[[Node, Any], object] | None = None,
) -> list[Any]:
    """The outputs of the graph on `inputs` (tensors, and ints for sizes), in order.

    Values the graph writes back update their input in place, after all outputs have their value.
    dtype: run every floating-point computation in this dtype instead (torch.float64 gives the reference of the error rule). Random
    draws keep their own dtype, so they draw the same numbers.
    sizes: values of symbols that the inputs do not tell (a region's body may mention a size of the graph around it).
    known: what some nodes have been found to be, on these inputs; only what follows from them is run.
    watch: called with each node that is run, and its value.
    """
    env = {**(sizes or {}), **bind_sizes(graph, inputs)}
    values: dict[Node, Any] = {node: _widen(value, dtype) for node, value in zip(graph.inputs, inputs, strict=True)} | dict(known or {})
    nodes = order(graph) if known is None else _unknown(graph, values)
    last = {operand: node for node in nodes for operand in node.inputs}
    kept = {*graph.roots, *graph.inputs}
    for node in nodes:
        if node not in values:
            values[node] = _run(node, [values[n] for n in node.inputs], env, dtype)
            if watch is not None:
                watch(node, values[node])
            for operand in dict.fromkeys(node.inputs):
                if last[operand] is node and operand not in kept:
                    del values[operand]  # its last reader has run
    results = [values[n] for n in graph.outputs]
    if not graph.writes:
        return results
    results = [_copy(r) for r in results]  # a result may be a view of what is about to be overwritten
    callers = dict(zip(graph.inputs, inputs))
    written = [(callers[target], _copy(values[value])) for target, value in graph.writes]
    for target, value in written:
        target.copy_(value)
    return results


def _unknown(graph: Graph, known: Mapping[Node, Any]) -> list[Node]:
    """What must be run to have the roots, operands first."""
    found: list[Node] = []
    seen: set[Node] = set()
    for root in graph.roots:
        visit(root, seen, found, known)
    return found


def _copy(value: Any) -> Any:
    return value.clone() if isinstance(value, torch.Tensor) else value


def _run(node: Node, operands: list[Any], env: Mapping[str, int], dtype: torch.dtype | None) -> Any:
    if node.op.name == "region":
        results = interpret(node.attrs["body"], operands, dtype, env)
        return results[0] if len(results) == 1 else tuple(results)
    attrs = {k: concrete(v, env) for k, v in node.attrs.items()}
    if dtype is None:
        return node.op.eager(*operands, **attrs)
    if node.op.name == "extern":
        return _widen(_run_extern(node, operands, attrs, dtype), dtype)
    if isinstance(attrs.get("dtype"), torch.dtype) and attrs["dtype"].is_floating_point:
        attrs["dtype"] = dtype
    return _widen(node.op.eager(*operands, **attrs), dtype)


def _run_extern(node: Node, operands: list[Any], attrs: dict[str, Any], dtype: torch.dtype) -> Any:
    """An ATen op in `dtype`; in its own dtypes where it draws random numbers, reinterprets bits or has no kernel for `dtype`."""
    if attrs["sequence"] is None and attrs["target"] not in _READS_BITS:
        try:
            return node.op.eager(*operands, **{**attrs, "kwargs": _replace_dtype(attrs["kwargs"], dtype)})
        except (RuntimeError, NotImplementedError):
            pass  # no such kernel: below, as the model runs it
    own = [x.to(n.type.dtype) if isinstance(n.type, TensorType) else x for x, n in zip(operands, node.inputs)]
    return node.op.eager(*own, **attrs)


_READS_BITS = frozenset({"aten.view.dtype"})


def _replace_dtype(kwargs: tuple[tuple[str, Any], ...], dtype: torch.dtype) -> tuple[tuple[str, Any], ...]:
    return tuple((k, dtype if isinstance(v, torch.dtype) and v.is_floating_point else v) for k, v in kwargs)


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


def concrete(value: Any, env: Mapping[str, int]) -> Any:
    """An attribute with its sizes evaluated."""
    if isinstance(value, sympy.Expr):
        return evaluate(value, env)
    if isinstance(value, tuple) and not hasattr(value, "_fields"):
        return tuple(concrete(v, env) for v in value)
    return value

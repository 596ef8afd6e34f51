"""Recurrences in a fused graph: each is a region of its own."""

from __future__ import annotations

from collections.abc import Sequence

from ..ir import ops
from ..ir.dims import Dim, contiguous_strides, dim
from ..ir.graph import Graph, Node, graph_input

_ROW_MAJOR = frozenset({"region", "linear", "matmul"})
"""Ops whose result is computed into memory of its own, row by row."""


def recurrence_region(node: Node, operands: Sequence[Node], rule: str) -> Node:
    """A region of the recurrence alone, whose results are the recurrence's, in order.

    Slices and transposes of what was just computed (the columns of merged products) are read in place: they keep their strides.
    """
    inputs = tuple(graph_input(o.hint or o.op.name, o.type, _strides(o), o.prov) for o in operands)
    inside = node.with_inputs(inputs)
    assert isinstance(inside.type, tuple)
    outputs = tuple(ops.op("item")(inside, index=k, hint=name) for k, name in zip(range(len(inside.type)), ("out", "h", "c")))
    body = Graph("region", inputs, outputs)
    return ops.op("region")(*operands, body=body, label=node.op.name, hint=node.hint, prov=node.prov.with_rule(rule))


def _strides(node: Node) -> tuple[Dim, ...] | None:
    """The strides of a value that is not row-major, as far as they are known."""
    if node.op.name == "input":
        return node.attrs["strides"]
    found = _known_strides(node)
    return None if found is None or found == contiguous_strides(node.shape) else found


def _known_strides(node: Node) -> tuple[Dim, ...] | None:
    if node.op.name in _ROW_MAJOR or node.op.name == "item" and node.inputs[0].op.name in _ROW_MAJOR:
        return contiguous_strides(node.shape)
    if node.op.name not in _VIEWS:
        return None
    x = node.inputs[0]
    inner = _known_strides(x)
    return None if inner is None else _VIEWS[node.op.name](node, x, inner)


def _slice(node: Node, x: Node, strides: tuple[Dim, ...]) -> tuple[Dim, ...]:
    d = node.attrs["dim"] % x.tensor.rank
    return (*strides[:d], dim(strides[d] * node.attrs["step"]), *strides[d + 1 :])


def _select(node: Node, x: Node, strides: tuple[Dim, ...]) -> tuple[Dim, ...]:
    d = node.attrs["dim"] % x.tensor.rank
    return (*strides[:d], *strides[d + 1 :])


def _permute(node: Node, x: Node, strides: tuple[Dim, ...]) -> tuple[Dim, ...]:
    return tuple(strides[d] for d in node.attrs["dims"])


_VIEWS = {"slice": _slice, "select": _select, "permute": _permute}

"""Composites into primitives: what fusion and lowering work on."""

from __future__ import annotations

from collections.abc import Callable, Container
from dataclasses import replace

import sympy

from .. import ops
from ..dims import Dim, dim, product
from ..graph import Graph, Node, visit
from ..op import Category
from ..rewrite import rewrite
from ..types import compute_dtype
from .points import reduced_dims

LIBRARY_COMPOSITES = frozenset({"attention", "attention_gradient"})
"""Composites that a vendor library runs as one call."""


EXPANDED = "expand "
"""The rule that expansions carry in their provenance, followed by the composite's name."""


def expanded(graph: Graph, keep: Container[str] = LIBRARY_COMPOSITES) -> Graph:
    """The graph with every composite not in `keep`, `mean` and `var` in terms of primitives; expansions inherit provenance."""
    return rewrite(graph, lambda node, inputs: _expansion(node, inputs, keep))


def _expansion(node: Node, inputs: tuple[Node, ...], keep: Container[str]) -> Node | None:
    if node.op.name in keep:
        return None
    if node.op.name in _EXPANSIONS and node.dtype.is_floating_point:
        made = _EXPANSIONS[node.op.name](inputs[0], node)
    elif node.op.name == "item":
        return _result(node, inputs[0], keep)
    elif node.op.category is Category.COMPOSITE and node.op.expand is not None:
        made = node.op.expand(*inputs, **node.attrs)
    else:
        return None
    return _settled(made, inputs, node, keep) if isinstance(made, Node) else None


def _result(item: Node, whole: Node, keep: Container[str]) -> Node | None:
    """One of the results of a composite with several, which vanishes once every item of it stands for itself."""
    if whole.op.category is not Category.COMPOSITE or whole.op.expand is None or whole.op.name in keep:
        return None
    made = whole.op.expand(*whole.inputs, **whole.attrs)
    assert isinstance(made, tuple)
    return _settled(made[item.attrs["index"]], whole.inputs, replace(whole, hint=item.hint), keep)


def _settled(root: Node, inputs: tuple[Node, ...], origin: Node, keep: Container[str]) -> Node:
    """The expansion with nested ones expanded too, every new node carrying the provenance of `origin`."""
    fresh: list[Node] = []
    visit(root, set(), fresh, set(inputs))
    prov = origin.prov.with_rule(EXPANDED + origin.op.name)
    new: dict[Node, Node] = {}
    for node in fresh:
        operands = tuple(new.get(n, n) for n in node.inputs)
        hint = origin.hint if node is root else node.hint
        made = replace(node, inputs=operands, prov=prov, hint=hint)
        new[node] = _expansion(made, operands, keep) or made
    return new.get(root, root)


def _mean(x: Node, node: Node) -> Node:
    total = ops.sum(_wide(x), dims=node.attrs["dims"], keepdim=node.attrs["keepdim"])
    return _narrow(ops.div(total, _count(node)), node)


def _var(x: Node, node: Node) -> Node | None:
    degrees = _degrees(_count(node), node.attrs["correction"])
    if degrees is None:
        return None
    x, dims = _wide(x), reduced_dims(node)
    centered = ops.sub(x, ops.div(ops.sum(x, dims=dims, keepdim=True), _count(node)))
    total = ops.sum(ops.mul(centered, centered), dims=dims, keepdim=node.attrs["keepdim"])
    return _narrow(ops.div(total, degrees), node)


_EXPANSIONS: dict[str, Callable[[Node, Node], Node | None]] = {"mean": _mean, "var": _var}


def _wide(x: Node) -> Node:
    wide = compute_dtype(x.dtype)
    return x if x.dtype == wide else ops.cast(x, dtype=wide)


def _narrow(x: Node, node: Node) -> Node:
    return x if x.dtype == node.dtype else ops.cast(x, dtype=node.dtype)


def _count(node: Node) -> Dim:
    shape = node.inputs[0].shape
    return dim(product(shape[d] for d in reduced_dims(node)))


def _degrees(count: Dim, correction: float) -> Dim | float | None:
    """max(0, count - correction), None where that is no integer function of sizes."""
    if isinstance(count, int):
        return max(0.0, count - correction)
    if correction != int(correction):
        return None
    return count if correction == 0 else sympy.Max(0, count - int(correction))

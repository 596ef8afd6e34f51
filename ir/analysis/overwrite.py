"""Which operands of a region its results may be written over.

    region(x, scale) { y = mul(x, scale); return gelu(y) }      the result may lie where x lies: element i is read before it is written
    region(x)        { return sub(x, amax(x)) }                 it may not: other elements of x are read later

An operand qualifies if the region reads it in elementwise ops of its own shape only.
"""

from __future__ import annotations

from ..dims import same_shape
from ..graph import Graph, Node, is_scalar, order
from ..op import Category
from .primitives import expanded

_KINDS = frozenset({Category.POINTWISE, Category.REDUCTION, Category.VIEW, Category.CONSTANT})
"""What such a region consists of; kernels of contractions, attentions and recurrences write in other orders."""


def overwritable(body: Graph) -> frozenset[tuple[int, int]]:
    """(output, input) of a region's body, by number: the output may lie in the memory of the input."""
    body = expanded(body)
    steps = order(body)
    if any(n.op.category not in _KINDS for n in steps):
        return frozenset()
    found: set[tuple[int, int]] = set()
    for i, node in enumerate(body.inputs):
        if is_scalar(node) or node.attrs["strides"] is not None or body.inputs.count(node) > 1:
            continue
        values = _elementwise(node, steps)
        found |= {(k, i) for k, out in enumerate(body.outputs) if out in values and out is not node and out.type == node.type}
    return frozenset(found)


def _elementwise(source: Node, steps: list[Node]) -> set[Node]:
    """What is computed from the source, element by element; nothing if anything else is computed from it."""
    values = {source}
    for node in steps:
        if values.isdisjoint(node.inputs):
            continue
        if node.op.category is not Category.POINTWISE or not same_shape(node.shape, source.shape):
            return set()
        values.add(node)
    return values

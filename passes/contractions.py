"""Contractions that become kernels of ours: those whose constant weight lies in panels. `pack-weights` puts it there, which is the decision.

    w [n, k]  -->  panels [n / 48, k, 48]: the 48 columns that one register block of a kernel reads stand together for each k
"""

from __future__ import annotations

from ..ir.graph import Node
from ..ir.op import Category

PANELS = (48, 64, 32, 16)
"""Columns of a panel, best first: multiples of every vector width."""

PRODUCTS = frozenset({"linear", "matmul", "conv"})


def is_native(node: Node) -> bool:
    """Whether the contraction's weight is packed, so that it is a kernel of ours."""
    return node.op.name in PRODUCTS and is_packed(node.inputs[1])


def is_packed(weight: Node) -> bool:
    """Whether a weight is a view of panels: a permuted constant whose last dimension is a panel."""
    first = weight
    while weight.op.category is Category.VIEW:
        first, weight = weight, weight.inputs[0]
    if weight.op.name != "constant" or first.op.name != "permute" or weight.tensor.rank < 3:
        return False
    return weight.shape[-1] in PANELS

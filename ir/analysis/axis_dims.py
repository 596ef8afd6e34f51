"""Building blocks of links: which dimensions of operands and results go together, where they broadcast or keep their shape."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import sympy

from ..dims import Dim, Mod, dim, floordiv, same
from ..graph import Node
from ..op import Category
from ..types import TensorType
from .places import OUT, PARALLEL, End, Label, Link

Links = list[Link]


def result_types(node: Node) -> tuple[TensorType, ...]:
    return node.type if isinstance(node.type, tuple) else (node.tensor,)


def end_size(node: Node, end: End) -> Dim:
    """The size of a dimension of an operand or result."""
    operand, d = end
    return result_types(node)[~operand].shape[d] if operand < 0 else node.inputs[operand].shape[d]


def tensors(node: Node) -> list[tuple[int, TensorType]]:
    """The operands that are one tensor, with their numbers."""
    return [(k, x.type) for k, x in enumerate(node.inputs) if isinstance(x.type, TensorType)]


def broadcast_links(shape: Sequence[Dim], operands: Iterable[tuple[int, TensorType]], stop: int = 0) -> Links:
    """A link per dimension of the result, but for the last `stop`; operands of size 1 there do not take part."""
    found, operands = [], list(operands)
    for d in range(len(shape) - stop):
        ends = [(k, d - len(shape) + x.rank) for k, x in operands if d - len(shape) + x.rank >= 0]
        sizes = dict(operands)
        ends = [(k, e) for k, e in ends if same(sizes[k].shape[e], shape[d])]
        found.append(Link(((OUT, d), *ends)))
    return found


def like_first(mixed: Iterable[int], label: Label, rank: int) -> Links:
    """Result like the first operand; `mixed` are the dimensions that have this label."""
    mixed = set(mixed)
    return [Link(((0, d), (OUT, d)), label if d in mixed else PARALLEL) for d in range(rank)]


def is_every_index(node: Node, length: Dim) -> bool:
    """Whether a value is 0, 1, 2, ... length - 1, in any shape."""
    while node.op.category is Category.VIEW and node.op.name in ("reshape", "expand") or node.op.name == "cast":
        node = node.inputs[0]
    return node.op.name == "iota" and node.attrs["start"] == 0 and node.attrs["step"] == 1 and same(node.attrs["length"], length)


def quotient(a: Dim, b: Dim) -> Dim | None:
    """a / b where b divides a for certain."""
    if isinstance(b, int) and b == 0:
        return None
    if isinstance(a, int) and isinstance(b, int):
        return a // b if a % b == 0 else None
    return floordiv(a, b) if same(dim(Mod(sympy.sympify(a), sympy.sympify(b))), 0) else None

"""Whether an axis is in a dimension as rows (queries, positions) or as keys: told by what reads the value, back to what it is made of.

softmax(scores [h, S, S], dim=2)  -->  keys at 2, rows at 1, of the scores and of every mask and bias that was added to them
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from ..graph import Node
from ..op import Category
from .axis_links import links
from .places import OUT, Along, End, How

Ends = Mapping[End, Along]


@dataclass
class Roles:
    """Node -> the dimensions in which the axis is rows, and those in which it is keys; of a mask that serves as both, in both."""

    rows: dict[Node, set[int]] = field(default_factory=dict)
    keys: dict[Node, set[int]] = field(default_factory=dict)


def key_roles(ends: Mapping[Node, Ends]) -> Roles:
    """The roles of every value, last ones first. `ends` is in topological order."""
    roles = Roles()
    for node in reversed(list(ends)):
        dims = {d for operand, d in ends[node] if operand == OUT}
        _complete(node, dims, roles)
        keys = roles.keys[node]
        for k, x in enumerate(node.inputs):
            for d in (d for operand, d in ends[node] if operand == k):
                told = roles.keys if _as_key(node, (k, d), ends[node], keys) else roles.rows
                told.setdefault(x, set()).add(d)
    return roles


def _complete(node: Node, dims: set[int], roles: Roles) -> None:
    """What no reader said: of two dimensions the last are the keys, a single one are rows."""
    rows, keys = roles.rows.setdefault(node, set()), roles.keys.setdefault(node, set())
    rows &= dims
    keys &= dims
    if len(dims) > 1:
        if not keys:
            keys |= (dims - rows) or {max(dims)}
        rows -= keys
    rows |= dims - keys
    if node.op.name == "input":
        rows |= dims


def _as_key(node: Node, end: End, ends: Ends, keys: set[int]) -> bool:
    """Whether a reader takes a dimension of its operand as keys."""
    k, d = end
    table = [link for link in links(node) if end in link.ends]
    twice = sum(operand == k for operand, _ in ends) > 1
    if any(link.label.how is How.MIXING for link in table):
        return twice or (node.op.name == "attention" and k == 3)
    if node.op.category is Category.CONTRACTION or node.op.name == "attention":
        return False
    if node.op.name == "reshape":
        return _reshaped_from(node, ends, keys, d)
    return any(operand == OUT and at in keys for link in table for operand, at in link.ends)


def _reshaped_from(node: Node, ends: Ends, keys: set[int], d: int) -> bool:
    """A reshape keeps the order of dimensions: the first of the operand that holds the axis is the first of the result that does."""
    before = sorted(at for operand, at in ends if operand == 0)
    after = sorted(at for operand, at in ends if operand == OUT)
    return len(before) == len(after) and after[before.index(d)] in keys

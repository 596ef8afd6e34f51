"""Constants at compile time: their values through views, new ones under fresh names."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from ..ir.graph import Data, Graph, Node, constants
from ..ir.op import Category
from ..ir.ops import OPS
from ..ir.provenance import Provenance
from ..ir.types import ScalarType

GENERATED = frozenset({"full", "iota"})


def value_of(node: Node, generated: bool = False) -> torch.Tensor | None:
    """The tensor that a constant, or a view of one with sizes known, stands for; None for anything else.

    generated: fills and ranges count as constants.
    """
    views: list[Node] = []
    while node.op.category is Category.VIEW and node.inputs:
        views.append(node)
        node = node.inputs[0]
    value = _base(node, generated)
    for view in reversed(views):
        if value is None or not static(view):
            return None
        value = view.op.eager(value, **view.attrs)
    return value


def _base(node: Node, generated: bool) -> torch.Tensor | None:
    if generated and node.op.name in GENERATED and static(node):
        return node.op.eager(**node.attrs)
    if node.op.name != "constant" or node.attrs["data"].value is None:
        return None
    return node.attrs["data"].value.detach()


def static(node: Node) -> bool:
    """No size symbol in the types of the node and its operands, nor (then) in its attributes."""
    types = (node.type, *(i.type for i in node.inputs))
    for t in types:
        if isinstance(t, ScalarType):
            if t.value is None or not isinstance(t.value, (bool, int, float, complex)):
                return False
        elif isinstance(t, tuple) or not all(isinstance(d, int) for d in t.shape):
            return False
    return all(plain(v) for v in node.attrs.values())


def plain(value: object) -> bool:
    """An attribute without size symbols."""
    if isinstance(value, tuple):
        return all(plain(v) for v in value)
    return not hasattr(value, "free_symbols")


class ConstantMaker:
    """Makes constants of one graph, with names that are not taken."""

    def __init__(self, graph: Graph) -> None:
        self.taken = set(constants(graph))

    def make(self, base: str, value: torch.Tensor, prov: Provenance, hint: str = "") -> Node:
        """A constant node holding `value` (made contiguous), named after `base`."""
        name, number = base, 1
        while name in self.taken:
            number += 1
            name = f"{base}.{number}"
        self.taken.add(name)
        return OPS["constant"](data=Data(name, value.detach().contiguous()), prov=prov, hint=hint)

    def derived(self, sources: Sequence[Node], suffix: str, function: Callable[..., torch.Tensor], prov: Provenance) -> Node:
        """The constant function(*values of sources), named after the first of them."""
        values = [value_of(s) for s in sources]
        with torch.no_grad():
            made = function(*values)
        return self.make(f"{source_name(sources[0])}.{suffix}", made, prov)


def source_name(node: Node) -> str:
    """The name of the first constant under `node`."""
    while node.op.name != "constant" and node.inputs:
        node = node.inputs[0]
    return node.attrs["data"].name if node.op.name == "constant" else node.hint or node.op.name

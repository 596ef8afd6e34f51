"""Constants at compile time: their values through views, new ones under fresh names."""

from __future__ import annotations

import math
import mmap
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch

from ..ir.graph import Data, Graph, Node, constants
from ..ir.op import Category
from ..ir.ops import OPS
from ..ir.provenance import Provenance
from ..ir.types import ScalarType
from .base import describe

LARGE = 1 << 20
"""Bytes from which on a constant has pages of its own."""

GENERATED = frozenset({"full", "iota"})


def is_constant(node: Node, generated: bool = False) -> bool:
    """Whether `value_of` the node is a tensor; computes none."""
    while node.op.category is Category.VIEW and node.inputs:
        if not static(node):
            return False
        node = node.inputs[0]
    if generated and node.op.name in GENERATED:
        return static(node)
    return node.op.name == "constant" and node.attrs["data"].known


def value_of(node: Node, generated: bool = False) -> torch.Tensor | None:
    """The tensor that a constant, or a view of one with sizes known, stands for; None for anything else.

    generated: fills and ranges count as constants. A constant that is yet to be computed is computed, and kept from then on: whoever only
    asks whether there is one asks `is_constant`.
    """
    if not is_constant(node, generated):
        return None
    views: list[Node] = []
    while node.op.category is Category.VIEW and node.inputs:
        views.append(node)
        node = node.inputs[0]
    value = node.op.eager(**node.attrs).detach()
    for view in reversed(views):
        value = view.op.eager(value, **view.attrs)
    return value


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
        return OPS["constant"](data=Data(self._fresh(base), value.detach().contiguous()), prov=prov, hint=hint)

    def derived(self, sources: Sequence[Node], suffix: str, function: Callable[..., torch.Tensor], prov: Provenance) -> Node:
        """The constant function(*values of sources), named after the first of them."""
        return self.make(f"{source_name(sources[0])}.{suffix}", computed(sources, function), prov)

    def later(self, sources: Sequence[Node], suffix: str, fill: Callable[..., object], shape: Sequence[Any], prov: Provenance) -> Node:
        """The same for weights, of which each form takes memory: computed when it is first read, by fill(result, *values of sources).

        Nothing but `fill` and the sources is kept until then.
        """
        sizes = tuple(map(int, shape))
        kind = replace(sources[0].tensor, shape=sizes)

        def made() -> torch.Tensor:
            result = memory(sizes, kind.dtype, kind.device)
            computed(sources, lambda *values: fill(result, *values))
            return result

        under = tuple(n.attrs["data"] for n in map(constant_under, sources) if n.op.name == "constant")
        data = Data(self._fresh(f"{source_name(sources[0])}.{suffix}"), make=made, sources=under)
        return OPS["constant"](data=data, type=kind, prov=prov)

    def _fresh(self, base: str) -> str:
        name, number = base, 1
        while name in self.taken:
            number += 1
            name = f"{base}.{number}"
        self.taken.add(name)
        return name


def stray_reader(weight: Node, readers: Mapping[Node, list[Node]], roots: Collection[Node], serves: Callable[[Node, Node], bool]) -> str:
    """Who, through views, reads the constant under a weight and is not served, in words; "" if nobody. serves(reader, what it reads)."""
    stack = [constant_under(weight)]
    while stack:
        value = stack.pop()
        if value in roots:
            return "the result"
        for reader in readers[value]:
            if reader.op.category is Category.VIEW:
                stack.append(reader)
            elif not serves(reader, value):
                return describe(reader)
    return ""


def computed(sources: Sequence[Node], function: Callable[..., Any]) -> Any:
    """function(*values of sources), without recording gradients."""
    with torch.no_grad():
        return function(*(value_of(s) for s in sources))


def memory(shape: tuple[int, ...], dtype: torch.dtype, device: str) -> torch.Tensor:
    """An uninitialised tensor. A large one has pages of its own, which go back to the system with it; in glibc's heap weights of several
    sizes that come and go leave holes that stay."""
    nbytes = math.prod(shape) * dtype.itemsize
    if device != "cpu" or nbytes < LARGE or not hasattr(mmap, "MAP_ANONYMOUS"):
        return torch.empty(shape, dtype=dtype, device=device)
    pages = mmap.mmap(-1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    return torch.frombuffer(pages, dtype=dtype).view(shape)


def constant_under(node: Node) -> Node:
    """The first constant under `node`."""
    while node.op.name != "constant" and node.inputs:
        node = node.inputs[0]
    return node


def source_name(node: Node) -> str:
    """The name of the first constant under `node`."""
    node = constant_under(node)
    return node.attrs["data"].name if node.op.name == "constant" else node.hint or node.op.name

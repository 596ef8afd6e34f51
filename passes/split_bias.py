"""`split-bias`: the bias of a linear is added by the kernel that reads it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from ..ir.dims import hint
from ..ir.graph import Graph, Node, users
from ..ir.op import Category
from ..ir.ops import OPS
from ..ir.rewrite import rewrite
from .attentions import ATTENTIONS
from .base import Notes, Pass, Reason, describe
from .contractions import is_native
from .facts import readers_through

_KERNEL_CATEGORIES = frozenset({Category.POINTWISE, Category.REDUCTION, Category.COMPOSITE})
_LIBRARY_READERS = ATTENTIONS
_DTYPES = frozenset({torch.float32, torch.float64})
"""Narrower ones would be rounded once more, between product and sum."""


@dataclass(frozen=True)
class SplitBias(Pass):
    """The bias of a linear whose one reader becomes a kernel is added there.

        h = linear(x, w, b)              p = linear(x, w)
        y = gelu(h)              -->     h = add(p, b)
                                         y = gelu(h)

    On a CPU the library copies the bias into the result and adds the product to it, which writes and reads the result once more; a
    kernel that reads it anyway adds a row of numbers for nothing. Refused where a library call or the caller reads the sum, and where
    several readers could end in several kernels.
    """

    name: ClassVar[str] = "split-bias"

    def run(self, graph: Graph, notes: Notes | None = None) -> Graph:
        notes = notes or Notes()
        readers, roots = users(graph), set(graph.roots)

        def split(node: Node, inputs: tuple[Node, ...]) -> Node | None:
            if not _has_bias(node):
                return None
            found = readers_through(node, readers, roots, lambda n: n.op.category is Category.VIEW)
            if len(found) != 1:
                notes.decline(self.name, describe(node), Reason.SHARED, node, f"{len(found)} readers")
                return None
            (reader,) = found
            if reader is None or reader.op.category not in _KERNEL_CATEGORIES or reader.op.name in _LIBRARY_READERS:
                guilty = "the caller" if reader is None else reader.op.name
                notes.decline(self.name, describe(node), Reason.LIBRARY_CALL, node, guilty)
                return None
            if not notes.may(self.name, node):
                return None
            notes.apply(self.name, describe(node), node, 2 * hint(node.tensor.nbytes, graph.symbols))
            x, weight, bias = inputs
            prov = node.prov.with_rule(self.name)
            return OPS["add"](OPS["linear"](x, weight, prov=prov), bias, hint=node.hint, prov=prov)

        return rewrite(graph, split)


def _has_bias(node: Node) -> bool:
    if node.op.name != "linear" or len(node.inputs) != 3 or is_native(node):  # a kernel of ours adds it anyway
        return False
    return node.dtype in _DTYPES and node.tensor.device == "cpu" and node.tensor.rank > 1

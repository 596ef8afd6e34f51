"""What is left of an attention's mask once padding is gone: sequences lie one after the other, and each row knows its own.

    [b, 1, s, s]: key <= query and keep[b, key]     -->   [n, n]: first[row] <= key < last[row] and key <= row

Conditions that hold for all tokens vanish; causal ones compare packed rows; what else depends on positions is read at them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from ..ir.analysis.padding import Range, Tokens
from ..ir.dims import Dim, same
from ..ir.graph import Node, is_scalar, topological
from ..ir.op import Category
from ..ir.ops import OPS
from .attention_rules import is_causal


@dataclass(frozen=True)
class Layout:
    """Where packed rows come from, as inputs of the packed graph.

    rows i64 [n]: the place of each in [b * s]. positions i64 [n]: in its sequence [s]. first, last i64 [n]: the packed rows that its
    sequence begins at, and ends before. places i64 [b, s]: the packed row of each token, -1 of padding.
    """

    rows: Node
    positions: Node
    first: Node
    last: Node
    places: Node

    @property
    def count(self) -> Dim:
        return self.rows.shape[0]

    @property
    def inputs(self) -> tuple[Node, ...]:
        return (self.rows, self.positions, self.first, self.last, self.places)


class CannotPack(Exception):
    """A node has no packed form: which one, and why."""

    def __init__(self, node: Node, why: str) -> None:
        super().__init__(why)
        self.node, self.why = node, why


def packed_mask(attention: Node, layout: Layout, valid: Tokens) -> Node:
    """The mask of an attention over packed rows, bool or added to the scores.

    valid: the tokens that are no padding, everywhere. Raises CannotPack.
    """
    old = attention.inputs[3]
    own = _own_sequence(layout, attention)
    if valid.range(old, (None, None)) == _nothing(old):
        return own
    left = _Left(attention, layout, valid).of(old)
    if left.dtype == torch.bool:
        return OPS["logical_and"](own, left, prov=old.prov)
    low = OPS["full"](shape=(), value=float("-inf"), dtype=left.dtype, device=left.tensor.device)
    return OPS["where"](own, left, low, prov=old.prov)


def _nothing(mask: Node) -> Range:
    """What a mask holds where it does nothing."""
    return Range(1, 1) if mask.dtype == torch.bool else Range(0, 0)


def _own_sequence(layout: Layout, attention: Node) -> Node:
    """bool [n, n]: the key is of the row's own sequence."""
    n, prov = layout.count, attention.prov
    keys = OPS["iota"](length=n, device=layout.rows.tensor.device)
    first, last = (OPS["reshape"](x, shape=(n, 1)) for x in (layout.first, layout.last))
    return OPS["logical_and"](OPS["ge"](keys, first, prov=prov), OPS["lt"](keys, last, prov=prov), prov=prov)


class _Left:
    """The parts of one mask over packed rows. Rows and keys are the last two dimensions of every part that has them."""

    def __init__(self, attention: Node, layout: Layout, valid: Tokens) -> None:
        self.attention, self.layout, self.valid = attention, layout, valid
        self.length = attention.shape[-2]
        self.made: dict[Node, Node] = {}

    def of(self, node: Node) -> Node:
        while node.op.name == "expand":
            (node,) = node.inputs
        if node not in self.made:
            self.made[node] = self._of(node)
        return self.made[node]

    def _of(self, node: Node) -> Node:
        known = self.valid.range(node, (None, None))
        if is_scalar(node):
            return node
        if known.known:
            return OPS["full"](shape=(), value=_typed(known.lo, node.dtype), dtype=node.dtype, device=node.tensor.device)
        if node.dtype == torch.bool and is_causal(node):
            at = OPS["iota"](length=self.layout.count, device=node.tensor.device)
            return OPS["ge"](OPS["reshape"](at, shape=(self.layout.count, 1)), at, prov=node.prov)
        if self.valid.mask not in topological([node]):
            return self._read(node)
        if node.op.category is not Category.POINTWISE:
            raise CannotPack(self.attention, f"its mask is computed from that of padding by {node.op.name}")
        if node.op.name == "where" and self.valid.range(node.inputs[0], (None, None)).known:
            chosen = node.inputs[1 if self.valid.range(node.inputs[0], (None, None)).lo else 2]
            if not is_scalar(chosen) and chosen.dtype == node.dtype:
                return self.of(chosen)
        return OPS[node.op.name](*(self.of(x) for x in node.inputs), hint=node.hint, prov=node.prov, **node.attrs)

    def _read(self, node: Node) -> Node:
        """What depends on positions only, read at those of the rows and keys."""
        rank, n = node.tensor.rank, self.layout.count
        if rank == self.attention.tensor.rank and not same(node.shape[0], 1):
            raise CannotPack(self.attention, "its mask differs between sequences by more than their padding")
        at: dict[int, tuple[Any, ...]] = {}
        for d, shape in ((rank - 2, (n, 1)), (rank - 1, (n,))):
            if d >= 0 and same(node.shape[d], self.length):
                at[d] = shape
        shapes = list(at.values()) if len(at) > 1 else [(n,)] * len(at)
        indices = [OPS["reshape"](self.layout.positions, shape=s) for s in shapes]
        return OPS["index"](node, *indices, dims=tuple(at), prov=node.prov) if at else node


def _typed(value: float, dtype: torch.dtype) -> bool | int | float:
    return bool(value) if dtype == torch.bool else value if dtype.is_floating_point else int(value)

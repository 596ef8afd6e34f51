"""What a model knows of positions - tables of sines, learned positions, masks - read at positions that come with the call.

cos = constant : f32[1, 1, S, d]              table = constant : f32[S, 1, 1, d]
y   = rope(q, cos, sin)                -->    rows  = index(table, at) : f32[b, n, 1, 1, d]        at : i64[b, n]
                                              y     = rope(q, permute and reshape(rows) : f32[b, 1, n, d], ...)
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ..ir.analysis.axes import Along
from ..ir.dims import dim, product
from ..ir.graph import Node
from ..ir.ops import OPS
from ..ir.provenance import Provenance
from .weights import ConstantMaker


@dataclass(frozen=True)
class Table:
    """A value that no input decides, for a batch of two. tokens: the dimension that the tokens are in, `along` how; batch: that of the
    batch, and how it is in there, if it is."""

    value: torch.Tensor
    tokens: int
    along: Along
    batch: tuple[int, Along] | None


@dataclass(frozen=True)
class Target:
    """What the rows meet element by element: its rank, and the dimension of the batch in it."""

    rank: int
    batch: int


class Uneven(Exception):
    """The rows of a batch differ in what no input decides, or nothing says where the batch belongs."""


def rows_at(table: Table, at: Node, target: Target, maker: ConstantMaker, hint: str, prov: Provenance) -> Node:
    """The rows `at` [b, n] of the table, as they meet a value. Raises Uneven."""
    if not table.along.whole or table.along.inner != 1:
        raise Uneven
    if table.batch is not None and table.batch[0] == table.tokens:
        return _flat_rows(table, at, maker, hint, prov)
    if table.along.outer != 1:
        raise Uneven
    value, t, p = _without_batch(table), table.tokens, table.batch and table.batch[0]
    outer, inner = (int(table.batch[1].outer), int(table.batch[1].inner)) if table.batch is not None else (1, 1)
    if p is None:
        p = target.batch - (target.rank - value.dim())
        if p < 0:  # a dimension for the batch in front
            value, t, p = value.reshape(*(1,) * -p, *value.shape), t - p, 0
        if p == t or value.shape[p] != 1:
            raise Uneven
    rows = OPS["index"](maker.make(f"{hint}.rows", value.movedim(t, 0), prov), at, dims=(0,), hint=hint, prov=prov)
    place, axes = {}, 2  # of the dimensions of the table behind the batch and the tokens; that of the batch is two
    sizes = list(at.shape)
    for d in (d for d in range(value.dim()) if d != t):
        place[d], axes = axes, axes + 1 + (d == p)
        sizes += [outer, inner] if d == p else [value.shape[d]]
    order = [{t: (1,), p: (place[p], 0, place[p] + 1)}.get(d) or (place[d],) for d in range(value.dim())]
    shape = [{t: at.shape[1], p: dim(outer * at.shape[0] * inner)}.get(d, value.shape[d]) for d in range(value.dim())]
    spread = OPS["reshape"](rows, shape=tuple(sizes), prov=prov)
    return OPS["reshape"](OPS["permute"](spread, dims=tuple(k for part in order for k in part), prov=prov), shape=tuple(shape), prov=prov)


def _without_batch(table: Table) -> torch.Tensor:
    """The value for one row of the batch; its dimension keeps what is around the batch in it."""
    if table.batch is None:
        return table.value
    d, along = table.batch
    return _one_of_two(table.value.unflatten(d, (int(along.outer), 2, int(along.inner))), d + 1).flatten(d, d + 1)


def _one_of_two(x: torch.Tensor, dim: int) -> torch.Tensor:
    one, other = x.select(dim, 0), x.select(dim, 1)
    if not torch.equal(one, other):
        raise Uneven
    return one


def _flat_rows(table: Table, at: Node, maker: ConstantMaker, hint: str, prov: Provenance) -> Node:
    """Rows of [b * S, ...]: the tokens of one row of the batch behind those of another."""
    t = table.tokens
    one = _one_of_two(table.value.unflatten(t, (2, -1)), t)
    rows = OPS["index"](maker.make(f"{hint}.rows", one, prov), at, dims=(t,), hint=hint, prov=prov)
    return OPS["reshape"](rows, shape=(*one.shape[:t], dim(product(at.shape)), *one.shape[t + 1 :]), prov=prov)

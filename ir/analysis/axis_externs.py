"""Links of ATen ops that have no op here: those torch calls pointwise, and a table of those that work along one dimension."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ..graph import Node
from ..ops.structure import Ref, resolve
from .axis_dims import Links, broadcast_links, result_types, tensors
from .axis_routing import SORTS, sort_of
from .places import OUT, PARALLEL, How, Label, Link, Reorder, mixing

ORDERED = mixing("it is ordered along it")


@dataclass(frozen=True)
class Row:
    """An op that takes the rows of its first argument along one dimension, each alone. at: the argument that names the dimension."""

    at: int = 1
    default: int | None = -1
    label: Label = ORDERED


_PREFIX = Label(How.PREFIX)
ROWS: dict[str, Row] = {
    "aten.topk": Row(at=2),
    "aten.sort": Row(),
    "aten.argsort": Row(),
    "aten.kthvalue": Row(at=2),
    "aten.median": Row(default=None),
    "aten.mode": Row(),
    "aten.cummax": Row(default=None, label=_PREFIX),
    "aten.cummin": Row(default=None, label=_PREFIX),
    "aten.logcumsumexp": Row(default=None, label=_PREFIX),
    "aten.logsumexp": Row(default=None, label=mixing("it is summed over")),
    "aten._softmax": Row(default=None, label=mixing("it is normalized along it")),
    "aten._log_softmax": Row(default=None, label=mixing("it is normalized along it")),
    "aten.glu": Row(label=mixing("its halves are multiplied")),
    "aten.renorm": Row(at=2, default=None, label=mixing("it is normalized over it")),
}
"""ATen op, without its overload -> how it works along a dimension; along the others it works element by element."""


SUMS = ("_c10d_functional.all_reduce.default", "_c10d_functional.wait_tensor.default")
"""Sums over processes: element by element, though in an order that all processes keep."""


COMPLEX = ("aten.view_as_complex.default", "aten.view_as_real.default")
"""A last dimension of two real numbers and a complex one; the others stay."""


def extern_links(node: Node) -> Links:
    target = node.attrs["target"]
    if target in SUMS:
        return _pointwise(node)
    if node.attrs["sequence"] is not None:
        return []  # what it draws depends on the shape
    if target in SORTS and node.inputs[0].tensor.rank == 1:
        return _rows_sorted(node)
    if target in COMPLEX:
        return [Link(((0, d), (OUT, d))) for d in range(min(node.tensor.rank, node.inputs[0].tensor.rank))]
    row = ROWS.get(target.rpartition(".")[0])
    if row is not None:
        return _along_rows(node, row)
    return _pointwise(node) if _is_pointwise(node, target) else []


def _is_pointwise(node: Node, target: str) -> bool:
    try:
        tags = resolve(target).tags
    except AttributeError:
        return False
    return torch.Tag.pointwise in tags and isinstance(node.attrs["types"], tuple) and len(node.attrs["types"]) == 1


def _pointwise(node: Node) -> Links:
    return broadcast_links(node.shape, tensors(node))


def _rows_sorted(node: Node) -> Links:
    """The results hold the axis in the order of the sort; what is sorted is a permutation: in its inverse, each row is in its place."""
    step = Reorder(node if sort_of(node.inputs[0]) is None else None)
    return [Link(((0, 0), *((~r, 0) for r, _ in enumerate(result_types(node)))), mixing("it is ordered along it"), step)]


def _along_rows(node: Node, row: Row) -> Links:
    """The dimension is an argument, by position or by name; a dimension that the results lack is reduced."""
    args, named = node.attrs["args"], dict(node.attrs["kwargs"])
    at = args[row.at] if len(args) > row.at else named.get("dim", row.default)
    at = at[0] if isinstance(at, tuple) and len(at) == 1 else at
    if not isinstance(at, int) or isinstance(at, bool) or args[:1] != (Ref(0),) or not node.inputs[0].tensor.rank:
        return []
    rank = node.inputs[0].tensor.rank
    found, kept = [], 0
    for d in range(rank):
        dropped = d == at % rank and any(t.rank < rank for t in result_types(node))
        elsewhere = dropped or (d == at % rank and row.label is ORDERED)
        ends = [] if elsewhere else [(~r, kept) for r, _ in enumerate(result_types(node))]
        found.append(Link(((0, d), *ends), row.label if d == at % rank else PARALLEL))
        kept += not dropped
    return found

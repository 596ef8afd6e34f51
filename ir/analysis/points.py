"""`Point`: one value of a region evaluated at one index; and how each kind of op passes an index on to its operands.

An index is a tuple of `Poly`, one per dimension. Views have no points of their own: they only change the index.
"""

from __future__ import annotations

import enum
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from ..graph import Node
from ..reasons import Reason
from ..types import normalize_dim
from .indices import ONE, ZERO, Poly, Ranges, const, linear, poly

Index = tuple[Poly, ...]


class Refusal(Exception):
    """Raised inside an evaluation: the reason, the node it stands at, and the guilty value in words."""

    def __init__(self, reason: Reason, node: Node | None = None, value: str = "") -> None:
        super().__init__(f"{reason.value}: {value}" if value else reason.value)
        self.reason, self.node, self.value = reason, node, value


class Kind(enum.Enum):
    LOAD = "an element of a region input at offset `index`; operands: computed positions `names`, then the mask if any"
    CONST = "the number `value`"
    POSITION = "the integer `index`; operands: the computed positions `names` in it"
    APPLY = "a pointwise op on its operands"
    IOTA = "start + index * step"
    INSIDE = "0 <= index < bound; operands: the computed positions `names` in it"
    BOTH = "logical and of two conditions"
    CONVERT = "the operand in the dtype of the node"
    SELECT = "operand 0 ? operand 1 : operand 2, in the dtype of the node"
    WRAP = "an integer operand that must lie in 0 .. bound-1; a negative one counts from the end if `value`; then the mask if any"
    REDUCE = "a reduction over all inner axes"
    SCAN = "a scan along the inner axis"
    DOT = "the sum of operand 0 * operand 1 over axes of its own; plus operand 2 if any; if masked, of terms within the last three operands"
    ATTEND = "the sum of softmax(operand 0) * operand 1 over an axis of its own; of operand 0 * operand 1 if `value`"
    WINDOW = "a pooling of operand 0 over axes of its own, a mean divides by operand 1; of a depthwise convolution as DOT"


@dataclass(frozen=True, eq=False)
class Point:
    """One evaluated value. Compared by identity; equal values at equal indices are one point.

    axes: what a DOT or ATTEND beside other such points sums over; else it is all inner axes.
    """

    kind: Kind
    node: Node | None = None
    operands: tuple[Point, ...] = ()
    index: Poly = ZERO
    names: tuple[str, ...] = ()
    bound: Poly = ZERO
    value: bool | int | float = 0
    dtype: torch.dtype = torch.int64
    masked: bool = False
    axes: tuple[str, ...] = ()


def dims_of(node: Node) -> tuple[Poly, ...]:
    return tuple(poly(d) for d in node.shape)


def broadcast_index(index: Index, shape: Sequence[Poly]) -> Index:
    """The index of an operand of `shape` that broadcasts to the space of `index`."""
    lead = len(index) - len(shape)
    return tuple(ZERO if d == ONE else i for i, d in zip(index[lead:], shape))


def _reshape(node: Node, index: Index, ranges: Ranges) -> Index:
    return regroup(index, dims_of(node), dims_of(node.inputs[0]), ranges)


def regroup(index: Index, outer: Sequence[Poly], inner: Sequence[Poly], ranges: Ranges) -> Index:
    """The index in shape `inner` of the element at `index` of shape `outer` (same elements, row-major), group by matching group."""
    if tuple(outer) == tuple(inner):
        return index
    if ZERO in outer or ZERO in inner:  # no element: any index will do that keeps the read inside the empty loops
        return (sum(index, start=ZERO), *(ZERO,) * len(inner))[: len(inner)]
    found: list[Poly] = []
    start = begin = 0
    cuts = _prefixes(outer)
    for stop, total in enumerate(_prefixes(inner), start=1):
        last = stop == len(inner)
        at = len(outer) if last else max((k for k, c in enumerate(cuts, start=1) if c == total and k >= start), default=-1)
        if at < 0:
            continue
        group = linear(index[start:at], outer[start:at])
        found.extend(ranges.delinearize(ranges.recombine(group), inner[begin:stop]))
        start, begin = at, stop
    return tuple(ZERO if d == ONE else i for i, d in zip(found, inner))


def _prefixes(shape: Sequence[Poly]) -> list[Poly]:
    found, total = [], ONE
    for d in shape:
        total = total * d
        found.append(total)
    return found


def _permute(node: Node, index: Index, ranges: Ranges) -> Index:
    found: list[Poly] = [ZERO] * len(index)
    for i, d in zip(index, node.attrs["dims"]):
        found[d] = i
    return tuple(found)


def _expand(node: Node, index: Index, ranges: Ranges) -> Index:
    return broadcast_index(index, dims_of(node.inputs[0]))


def _slice(node: Node, index: Index, ranges: Ranges) -> Index:
    d = normalize_dim(node.attrs["dim"], len(index))
    moved = index[d] * const(node.attrs["step"]) + poly(node.attrs["start"])
    return (*index[:d], moved, *index[d + 1 :])


def _select(node: Node, index: Index, ranges: Ranges) -> Index:
    d = normalize_dim(node.attrs["dim"], len(index) + 1)
    return (*index[:d], poly(node.attrs["index"]), *index[d:])


def _flip(node: Node, index: Index, ranges: Ranges) -> Index:
    dims = {normalize_dim(d, len(index)) for d in node.attrs["dims"]}
    return tuple(poly(s) - ONE - i if k in dims else i for k, (i, s) in enumerate(zip(index, node.shape)))


def _layout(node: Node, index: Index, ranges: Ranges) -> Index:
    return index


def _as_strided(node: Node, index: Index, ranges: Ranges) -> Index:
    """Through the storage position, where the operand's own layout is dense."""
    x = node.inputs[0]
    of = tuple(poly(s) for s in node.attrs["of"])
    dims = dims_of(x)
    order = dense_order(dims, of)
    if order is None:
        raise Refusal(Reason.LAYOUT, node, f"strides {list(node.attrs['of'])} of {x.type}")
    position = poly(node.attrs["offset"])
    for i, s in zip(index, node.attrs["strides"]):
        position = position + i * poly(s)
    split = ranges.delinearize(position, [dims[d] for d in order])
    found: list[Poly] = [ZERO] * len(dims)
    for d, i in zip(order, split):
        found[d] = i
    return tuple(found)


def dense_order(dims: Sequence[Poly], strides: Sequence[Poly]) -> list[int] | None:
    """The dimensions from outermost to innermost in memory, if elements lie there without gaps or overlaps."""
    left = [d for d in range(len(dims)) if dims[d] != ONE]
    order = [d for d in range(len(dims)) if dims[d] == ONE]
    step = ONE
    dense: list[int] = []
    while left:
        d = next((d for d in left if strides[d] == step), None)
        if d is None:
            return None
        left.remove(d)
        dense.append(d)
        step = step * dims[d]
    return order + dense[::-1]


VIEW_INDEX: dict[str, Callable[[Node, Index, Ranges], Index]] = {
    "reshape": _reshape,
    "permute": _permute,
    "expand": _expand,
    "slice": _slice,
    "select": _select,
    "flip": _flip,
    "layout": _layout,
    "as_strided": _as_strided,
}


def reduced_dims(node: Node) -> tuple[int, ...]:
    """The dimensions a reduction drops, ascending; of a scan, the one it runs along."""
    rank = node.inputs[0].tensor.rank
    if "dim" in node.attrs:
        return (normalize_dim(node.attrs["dim"], rank),) if rank else ()
    dims = node.attrs["dims"]
    return tuple(sorted({normalize_dim(d, rank) for d in dims})) if dims and rank else tuple(range(rank))


def input_offset(node: Node, index: Index) -> Poly:
    """Element offset in the memory of a region input: by its strides where it carries them, else row-major."""
    strides = node.attrs.get("strides")
    if ZERO in dims_of(node):  # nothing to read: the offset must only stay inside the empty loops
        return sum(index, start=ZERO)
    if strides is None:
        return linear(index, dims_of(node))
    return sum((i * poly(s) for i, s in zip(index, strides)), start=ZERO)


__all__ = [
    "VIEW_INDEX", "Index", "Kind", "Point", "Refusal", "broadcast_index", "dense_order", "dims_of", "input_offset",
    "reduced_dims", "regroup",
]  # fmt: skip

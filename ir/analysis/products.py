"""How contractions are evaluated at an index: a point of kind DOT over axes of its own.

linear(x, w)[i, j]   -->   sum over c of x[i, c] * w[j, c]
conv(x, w)[n, o, y]  -->   sum over ky, c of x[n, c, stride*y + ky - padding] * w[o, c, ky], 0 outside of x

An operand is read or computed: linear(x, dequantize(q, s))[i, j]  -->  sum over c of x[i, c] * (q[j, c] * s[j])
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING

import torch

from ..graph import Node
from ..ops.contractions import is_depthwise, kernel_of
from ..reasons import Reason
from .indices import Poly, const
from .points import Index, Kind, Point, Refusal, broadcast_index, dims_of
from .windows import FLOATS, check, depthwise, padded, positions

if TYPE_CHECKING:
    from .pull import Mask, Puller

OWN_NAMES = "abcd"
_EXACT = frozenset({torch.int32})
_SUMMED = frozenset({Kind.REDUCE, Kind.SCAN, Kind.DOT, Kind.ATTEND, Kind.WINDOW})
_COMPUTED = _SUMMED | {Kind.APPLY}


def _dot(puller: Puller, node: Node, left: Point, right: Point, bias: Point | None) -> Point:
    for operand in (left, right):
        require_unsummed(node, operand)
    operands = (left, right) if bias is None else (left, right, bias)
    return puller.add(Point(Kind.DOT, node, operands, dtype=node.dtype))


def require_unsummed(node: Node, operand: Point) -> None:
    """An operand is read, or computed from what is read at one place of it."""
    _require(node, operand, lambda point: point.kind not in _SUMMED)


def require_memory(node: Node, operand: Point) -> None:
    """An operand is read, not computed: it is read once for every row or column."""
    _require(node, operand, is_read)


def _require(node: Node, operand: Point, allowed: Callable[[Point], bool]) -> None:
    for point in _under(operand):
        if not allowed(point):
            assert point.node is not None
            raise Refusal(Reason.PROLOGUE, node, point.node.op.name)


def is_read(point: Point) -> bool:
    """Whether a value is in memory as it is, or in another dtype."""
    return point.kind not in _COMPUTED or (point.node is not None and point.node.op.name == "cast")


def computed_operands(points: Iterable[Point]) -> list[tuple[Node, int]]:
    """(product, number of an operand) for those operands of products among the points that are computed where they are multiplied: of an
    attention its keys and values."""
    found: list[tuple[Node, int]] = []
    for p in points:
        if p.kind not in (Kind.DOT, Kind.ATTEND) or p.node is None:
            continue
        operands = ((2, p.operands[1]),) if p.kind is Kind.ATTEND else enumerate(p.operands[:2])
        found += [(p.node, k) for k, operand in operands if not all(map(is_read, _under(operand)))]
    return found


def joining_windows(points: Iterable[Point]) -> list[Node]:
    """Convolutions and poolings among the points that pick what they read out of the pieces of a concatenation, once for each element of a
    window. Where a window is one element, they pick once, and the concatenation need not be in memory."""
    windows = [p for p in points if p.node and (p.kind is Kind.WINDOW or p.kind is Kind.DOT and p.node.op.name == "conv")]
    several = [p for p in windows if p.node and any(k != 1 for k in kernel_of(p.node))]
    return [p.node for p in several if p.node and any(q.kind is Kind.SELECT and _joins(q) for q in _under(p.operands[0]))]


def _joins(point: Point) -> bool:
    return point.node is not None and point.node.op.name == "cat"


def _under(operand: Point) -> Iterator[Point]:
    """What an operand is computed from, up to what is loaded."""
    stack, seen = [operand], set[Point]()
    while stack:
        point = stack.pop()
        if point in seen:
            continue
        seen.add(point)
        yield point
        if point.kind is not Kind.LOAD:
            stack.extend(point.operands)


def linear(puller: Puller, node: Node, index: Index, mask: Mask) -> Point:
    check(node, mask, _EXACT if node.op.name == "int_linear" else FLOATS)
    x, w, *bias = node.inputs
    (depth,) = puller.own_axes(node, dims_of(x)[-1:])
    left = puller.at(x, (*index[:-1], depth))
    right = puller.at(w, (index[-1], depth))
    return _dot(puller, node, left, right, puller.at(bias[0], index[-1:]) if bias else None)


def matmul(puller: Puller, node: Node, index: Index, mask: Mask) -> Point:
    check(node, mask)
    a, b = (dims_of(x) for x in node.inputs)
    (depth,) = puller.own_axes(node, a[-1:])
    rows, columns = len(a) > 1, len(b) > 1
    batch = index[: len(index) - rows - columns]
    row = index[len(batch) : len(batch) + rows]
    left = puller.at(node.inputs[0], (*broadcast_index(batch, a[:-2]), *row, depth))
    column = index[len(index) - columns :] if columns else ()
    right = puller.at(node.inputs[1], (*broadcast_index(batch, b[:-2]), depth, *column))
    return _dot(puller, node, left, right, None)


def conv(puller: Puller, node: Node, index: Index, mask: Mask) -> Point:
    check(node, mask)
    a = node.attrs
    if a["transposed"]:
        raise Refusal(Reason.NOT_EXPRESSIBLE, node, "transposed convolution")
    x, w, *bias = node.inputs
    last = a["channels_last"]
    n, out, *place = (index[0], index[-1], *index[1:-1]) if last else index
    channels, *window = dims_of(w)[1:]
    *taps, channel = puller.own_axes(node, (*window, channels))
    space = dims_of(x)[1:-1] if last else dims_of(x)[2:]
    at = positions(node, place, taps)
    source = _group(puller, node, out) * channels + channel if a["groups"] > 1 else channel
    left = padded(puller, node, (n, *at, source) if last else (n, source, *at), at, space)
    right = puller.at(w, (out, channel, *taps))
    make = depthwise if is_depthwise(node) else _dot
    return make(puller, node, left, right, puller.at(bias[0], (out,)) if bias else None)


def _group(puller: Puller, node: Node, out: Poly) -> Poly:
    size = dims_of(node.inputs[1])[0].constant
    if size is None:
        raise Refusal(Reason.NOT_EXPRESSIBLE, node, "groups of an unknown number of channels")
    return puller.ranges.floordiv(out, const(size // node.attrs["groups"]))


PRODUCTS: dict[str, Callable[[Puller, Node, Index, Mask], Point]] = {
    "linear": linear, "int_linear": linear, "matmul": matmul, "conv": conv,
}  # fmt: skip

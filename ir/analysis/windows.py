"""How windows are evaluated at an index: a point of kind WINDOW over axes of its own, one for each dimension of the window.

max_pool(x)[n, c, y]             -->   the largest over ky of x[n, c, stride*y + ky - padding], -inf outside of x
avg_pool(x)[n, c, y]             -->   the sum over ky of the same, 0 outside of x, divided by the number of elements
conv(x, w)[n, c, y], depthwise   -->   the sum over ky of x[n, c, stride*y + ky - padding] * w[c, ky], 0 outside of x
"""

from __future__ import annotations

from collections.abc import Callable, Container, Sequence
from typing import TYPE_CHECKING

import torch

from ..graph import Node
from ..ops.contractions import is_depthwise
from ..reasons import Reason
from ..types import compute_dtype
from .indices import ONE, Poly, Quotient, const
from .points import Index, Kind, Point, Refusal, dims_of

if TYPE_CHECKING:
    from .pull import Mask, Puller

FLOATS = frozenset({torch.float32, torch.float64, torch.bfloat16, torch.float16})


def check(node: Node, mask: Mask, dtypes: Container[torch.dtype] = FLOATS) -> None:
    """Raises Refusal unless a product or window can be walked here."""
    if mask:
        raise Refusal(Reason.TILED_AXIS, node, f"{node.op.name} inside one piece of a concatenation")
    if node.dtype not in dtypes:
        raise Refusal(Reason.UNSUPPORTED_DTYPE, node, str(node.type))


def positions(node: Node, place: Sequence[Poly], taps: Sequence[Poly]) -> Index:
    """Where in x the window at `place` has its elements `taps`."""
    a = node.attrs
    dilation = a.get("dilation") or (1,) * len(taps)
    return tuple(
        i * const(s) + t * const(d) - const(p) for i, t, s, d, p in zip(place, taps, a["stride"], dilation, a["padding"], strict=True)
    )


def padded(puller: Puller, node: Node, index: Index, at: Index, space: Sequence[Poly], fill: float = 0) -> Point:
    """The first operand there, `fill` outside of its space."""
    x = node.inputs[0]
    conditions = tuple(c for i, d in zip(at, space) if (c := puller.inside(i, d)) is not None)
    value = puller.at(x, index, conditions)
    if not conditions or value.kind is Kind.LOAD and value.masked and fill == 0:  # a masked load is 0 where nothing is read
        return value
    return puller.add(Point(Kind.SELECT, x, (puller.all_of(conditions), value, puller.number(fill, x.dtype)), dtype=x.dtype))


def depthwise(puller: Puller, node: Node, left: Point, right: Point, bias: Point | None) -> Point:
    """The convolution of each channel alone, whose elements have been evaluated."""
    assert is_depthwise(node)
    return puller.add(Point(Kind.WINDOW, node, (left, right) if bias is None else (left, right, bias), dtype=node.dtype))


def max_pool(puller: Puller, node: Node, index: Index, mask: Mask) -> Point:
    value, _ = _elements(puller, node, index, mask, float("-inf"))
    return puller.add(Point(Kind.WINDOW, node, (value,), dtype=node.dtype))


def avg_pool(puller: Puller, node: Node, index: Index, mask: Mask) -> Point:
    value, place = _elements(puller, node, index, mask, 0)
    count = node.attrs["divisor"] or _count(node, place)
    wide = compute_dtype(node.dtype)
    if isinstance(count, int):
        divisor = puller.number(count, wide)
    else:
        divisor = puller.add(Point(Kind.CONVERT, node, (puller.position(count),), dtype=wide))
    return puller.add(Point(Kind.WINDOW, node, (value, divisor), dtype=node.dtype))


def _elements(puller: Puller, node: Node, index: Index, mask: Mask, fill: float) -> tuple[Point, Index]:
    """(the elements of a pooling window, where the window is)."""
    check(node, mask)
    kernel = node.attrs["kernel"]
    last, rank = node.attrs["channels_last"], len(kernel)
    place = index[1:-1] if last else index[len(index) - rank :]
    at = positions(node, place, puller.own_axes(node, [const(k) for k in kernel]))
    source = (index[0], *at, index[-1]) if last else (*index[: len(index) - rank], *at)
    return padded(puller, node, source, at, _space(node), fill), place


def _space(node: Node) -> tuple[Poly, ...]:
    dims = dims_of(node.inputs[0])
    return dims[1:-1] if node.attrs["channels_last"] else dims[len(dims) - len(node.attrs["kernel"]) :]


def _count(node: Node, place: Index) -> int | Poly:
    """How many elements the average of the window at `place` is over."""
    a = node.attrs
    total = ONE
    for i, k, s, p, size in zip(place, a["kernel"], a["stride"], a["padding"], _space(node), strict=True):
        start = i * const(s) - const(p)
        margin = const(p if a["count_padding"] else 0)
        reaches = a["ceil"] or margin != const(p)
        stop = _atom("min", start + const(k), size + margin) if reaches else start + const(k)
        total = total * (stop - (_atom("max", start, -margin) if margin != const(p) else start))
    return total if total.constant is None else total.constant


def _atom(op: str, *args: Poly) -> Poly:
    return Poly({(Quotient(op, args),): 1})


POOLS: dict[str, Callable[[Puller, Node, Index, Mask], Point]] = {"max_pool": max_pool, "avg_pool": avg_pool}

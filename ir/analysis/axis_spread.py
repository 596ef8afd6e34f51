"""How what is known of an axis at some ends of a node (dimensions of operands and results) spreads to its other ends.

add(x [b, S, d], y [S, d])       S at x 1      -->  at y 0, at result 1
reshape [b, S, h * d] -> [b * S, h, d]         -->  result 0 has S with outer b
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

from ..dims import Dim, dim, product, same
from ..graph import Node
from ..op import Category
from .axis_dims import end_size, quotient
from .axis_links import links
from .places import OUT, Along, End, Link


class Conflict(Exception):
    """One dimension of a node would hold the axis in two ways."""


def spread(node: Node, known: Mapping[End, Along], size: Dim) -> dict[End, Along]:
    """Every end at which the node holds the axis, given some of them. Raises Conflict where they disagree.

    Ends may hold it moved against each other, by some indices: the result then has it as the operand that holds the whole axis.
    """
    found, work = dict(known), sorted(known, key=lambda end: known[end].whole)
    table = [] if node.op.name == "reshape" else links(node)
    while work:
        end = work.pop()
        for other, along, exact in _moves(node, table, end, found[end], size):
            if other not in found:
                found[other] = along
                work.append(other)
            elif found[other] != along if exact else replace(found[other], start=0) != replace(along, start=0):
                raise Conflict("its operands hold the axis in different places")
    return found


def _moves(node: Node, table: Sequence[Link], end: End, along: Along, size: Dim) -> Iterator[tuple[End, Along, bool]]:
    """Where else the node holds the axis, and whether it must hold it there in this way."""
    if node.op.name == "reshape":
        yield from ((other, there, True) for other, there in _reshaped(node, end, along, size))
    for link in (link for link in table if end in link.ends):
        there = along if link.step is None else link.step.forward(along) if end[0] >= 0 else None
        if there is None or (link.step is not None and same(there.length(size), 1)):  # a single index looks like what broadcasts
            continue
        extent = there.extent(size)
        yield from ((other, there, link.step is not None) for other in link.ends if other != end and same(end_size(node, other), extent))


def _reshaped(node: Node, end: End, along: Along, size: Dim) -> Iterator[tuple[End, Along]]:
    x, out = node.inputs[0].shape, node.shape
    source, target, other = (x, out, OUT) if end[0] == 0 else (out, x, 0)
    place = reshaped(source, target, end[1], along)
    if place is not None:
        d, moved = place
        if same(moved.extent(size), target[d]):
            yield (other, d), moved


def reshaped(source: Sequence[Dim], target: Sequence[Dim], d: int, along: Along) -> tuple[int, Along] | None:
    """Where dimension `d` of a shape is after a reshape: it may be merged with neighbours, or be split off from them, but stays whole."""
    outer = dim(product(source[:d]) * along.outer)
    inner = dim(along.inner * product(source[d + 1 :]))
    for at, extent in enumerate(target):
        before, after = quotient(outer, product(target[:at])), quotient(inner, product(target[at + 1 :]))
        if before is not None and after is not None and not same(extent, 1):
            return at, replace(along, outer=before, inner=after)
    return None


def operand_ends(node: Node, told: Mapping[End, Along], size: Dim, follow: bool = False) -> dict[End, Along]:
    """The ends of a node that depends on nothing of the axis, told where its result meets it.

    Views and element-by-element ops are followed to what they are made of, and with `follow` all others; what is not stays a leaf.
    """
    if node.op.category not in FOLLOWED and not follow:
        return dict(told)
    try:
        return spread(node, told, size)
    except Conflict:
        return dict(told)


FOLLOWED = (Category.VIEW, Category.POINTWISE)
"""What is made of constants is aligned by way of these; anything else is computed as it was, and its result is cut."""

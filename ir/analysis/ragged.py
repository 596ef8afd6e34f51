"""How contractions of uneven parts are evaluated at an index: a DOT of those terms that lie within limits, which are loaded.

grouped_matmul(x, w, ends)[i, j]                     -->  sum over a, b of x[i, b] * w[a, b, j], of those a whose rows i is one of
block_sparse_linear(x, values, columns, starts)[i, j]  -->  sum over a, b of x[i, c*columns[a] + b] * values[a, j % r, b], of those
                                                             a that are blocks of row j // r; blocks are [r, c]
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from ..graph import Node
from ..reasons import Reason
from .indices import ONE, ZERO, Poly, linear, product, variable
from .points import Index, Kind, Point, Refusal, dims_of
from .products import require_memory, require_unsummed
from .windows import check

if TYPE_CHECKING:
    from .pull import Mask, Puller


def grouped_matmul(puller: Puller, node: Node, index: Index, mask: Mask) -> Point:
    check(node, mask)
    x, w, ends = node.inputs
    row, column = index
    if not _in_order(puller, row, dims_of(x)[0]):
        raise Refusal(Reason.NOT_EXPRESSIBLE, node, f"{node.op.name} of rows that are not read in order")
    group, depth = _own_axes(puller, node, dims_of(w)[0], dims_of(w)[1])
    left = puller.at(x, (row, depth))
    right = puller.at(w, (group, depth, column))
    return _dot(puller, node, left, right, (puller.position(row), _begin(puller, node, ends, group), puller.at(ends, (group,))))


def _begin(puller: Puller, node: Node, ends: Node, group: Poly) -> Point:
    """Where the group before ends. In front of the first one nothing is read, which is 0."""
    before = puller.inside(group - ONE, dims_of(ends)[0])
    assert before is not None
    begin = read = puller.at(ends, (group - ONE,), (before,))
    require_memory(node, begin)
    while read.kind is not Kind.LOAD and len(read.operands) == 1:
        (read,) = read.operands
    if not read.masked:
        raise Refusal(Reason.NOT_EXPRESSIBLE, node, f"{node.op.name} with ends that are not all of a dimension")
    return begin


def _in_order(puller: Puller, row: Poly, rows: Poly) -> bool:
    """Whether a row is the flat position over axes that together number all of the rows."""
    axes = [n for n in puller.ranges.extents if n in row.names()]
    extents = [puller.ranges.extents[n] for n in axes]
    return row == linear([variable(n) for n in axes], extents) and not puller.names(row) and (product(extents) == rows or ZERO in extents)


def block_sparse_linear(puller: Puller, node: Node, index: Index, mask: Mask) -> Point:
    check(node, mask)
    x, values, columns, starts = node.inputs
    count, height, width = dims_of(values)
    block, depth = _own_axes(puller, node, count, width)
    across, down = puller.ranges.floordiv(index[-1], height), puller.ranges.mod(index[-1], height)
    blocks = puller.ranges.floordiv(dims_of(x)[-1], width)
    place = puller.indirect(node, puller.at(columns, (block,)), blocks, (), wraps=False)
    left = puller.at(x, (*index[:-1], place * width + depth))
    right = puller.at(values, (block, down, depth))
    limits = (puller.position(block), puller.at(starts, (across,)), puller.at(starts, (across + ONE,)))
    return _dot(puller, node, left, right, limits)


def _own_axes(puller: Puller, node: Node, parts: Poly, depth: Poly) -> tuple[Poly, Poly]:
    """The axes of the sum: over the parts, and along each."""
    if ONE in (parts, depth):
        raise Refusal(Reason.NOT_EXPRESSIBLE, node, f"{node.op.name} of a single part, or of parts of length 1")
    part, along = puller.own_axes(node, (parts, depth))
    return part, along


def _dot(puller: Puller, node: Node, left: Point, right: Point, within: tuple[Point, Point, Point]) -> Point:
    for operand in (left, right):
        require_unsummed(node, operand)
    for limit in within[1:]:
        require_memory(node, limit)
    return puller.add(Point(Kind.DOT, node, (left, right, *within), dtype=node.dtype, masked=True))


RAGGED: dict[str, Callable[[Puller, Node, Index, Mask], Point]] = {
    "grouped_matmul": grouped_matmul, "block_sparse_linear": block_sparse_linear,
}  # fmt: skip

"""How an attention is evaluated at an index: a point of kind ATTEND over the keys.

    attention(q, k, v)[i, e]   -->   sum over a of softmax over a (score[i, a]) * v[a, e]; or sigmoid (score[i, a]) * v[a, e]
                                     score[i, a] = scale * (sum over b of q[i, b] * k[a, b]), masked

Here a numbers the keys and b the columns of query and key.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from ..graph import Node, graph_input
from ..ops import OPS
from ..ops.composites import attention_scores
from ..reasons import Reason
from ..types import TensorType, compute_dtype
from .indices import ONE, Poly, const
from .points import Index, Kind, Point, Refusal, broadcast_index, dims_of
from .products import require_memory
from .windows import check

if TYPE_CHECKING:
    from .pull import Mask, Puller


def attention(puller: Puller, node: Node, index: Index, mask: Mask) -> Point:
    """The score is evaluated like any other value: the product of query and key stands in the place of an input."""
    check(node, mask)
    q, k, v, *masks = node.inputs
    keys, depth = dims_of(k)[-2:]
    if ONE in (keys, depth, dims_of(v)[-1]):
        raise Refusal(Reason.NOT_EXPRESSIBLE, node, f"{node.op.name} over a single key or column")
    *batch, row, column = index
    at, c = puller.own_axes(node, (keys, depth))
    left = puller.at(q, (*_heads(puller, q, batch, node), row, c))
    right = puller.at(k, (*_heads(puller, k, batch, node), at, c))
    value = puller.at(v, (*_heads(puller, v, batch, node), at, column))
    for operand in (left, right, value):
        require_memory(node, operand)
    wide = compute_dtype(node.dtype)
    product = graph_input("product", TensorType(wide, (*node.shape[:-1], k.shape[-2]), node.tensor.device))
    place = (*batch, row, at)
    puller.place(product, place, puller.add(Point(Kind.DOT, node, (left, right), dtype=wide, axes=tuple(c.names()))))
    score = attention_scores(product, *masks, causal=node.attrs["causal"], scale=node.attrs["scale"])
    given = node.attrs["weights"] == "sigmoid"
    weights = puller.at(OPS["sigmoid"](score) if given else score, place)
    return puller.add(Point(Kind.ATTEND, node, (weights, value), dtype=node.dtype, axes=tuple(at.names()), value=given))


def _heads(puller: Puller, x: Node, batch: Sequence[Poly], node: Node) -> Index:
    """The batch index of an operand: it broadcasts, and several heads may share one of its own."""
    shape = dims_of(x)[:-2]
    found = broadcast_index(tuple(batch), shape)
    if not shape or shape[-1] in (ONE, dims_of(node)[-3]):
        return found
    heads, groups = node.shape[-3], x.shape[-3]
    return (*found[:-1], puller.ranges.floordiv(batch[-1], const(int(heads) // int(groups))))  # type: ignore[arg-type]


ATTENTION: dict[str, Callable[[Puller, Node, Index, Mask], Point]] = {"attention": attention}

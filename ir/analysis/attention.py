"""How an attention, and a gradient of one, is evaluated at an index: a point of kind ATTEND over the keys (or queries).

    attention(q, k, v)[i, e]   -->   sum over a of softmax over a (score[i, a]) * v[a, e]; or sigmoid (score[i, a]) * v[a, e]
                                     score[i, a] = scale * (sum over b of q[i, b] * k[a, b]), masked

Here a numbers the keys and b the columns of query and key. Keys and values are read, or computed where they are met:

    attention(q, dequantize(k, s), v)   -->   score[i, a] = scale * (sum over b of q[i, b] * (k[a, b] * s[a])), masked

A gradient has a second product in its score, of grad and value over c.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from ..graph import Node, graph_input
from ..ops import OPS
from ..ops.attention_gradients import gradient_weights
from ..ops.composites import attention_scores
from ..reasons import Reason
from ..types import TensorType, compute_dtype
from .indices import ONE, Poly, const
from .points import Index, Kind, Point, Refusal, broadcast_index, dims_of
from .products import require_memory, require_unsummed
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
    require_memory(node, left)
    for operand in (right, value):
        require_unsummed(node, operand)
    puller.whole.append(column)
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


def gradient(puller: Puller, node: Node, index: Index, mask: Mask) -> Point:
    """A gradient is summed over what its rows meet: keys for that of a query, queries for those of a key and a value."""
    check(node, mask)
    grad, q, k, v, logsumexp, delta, *masks = node.inputs
    attrs, (*batch, row, column) = node.attrs, index
    of_query, of_value = attrs["of"] == "query", attrs["of"] == "value"
    walked, value = (k, k) if of_query else (q, grad if of_value else q)
    widths = dims_of(q)[-1:] if of_value else (dims_of(q)[-1], dims_of(v)[-1])
    if ONE in (dims_of(walked)[-2], *widths, dims_of(node)[-1]):
        raise Refusal(Reason.NOT_EXPRESSIBLE, node, f"{node.op.name} over a single key or column")
    at, *columns = puller.own_axes(node, (dims_of(walked)[-2], *widths))
    place = (*batch, row, at) if of_query else (*batch, at, row)

    def read(x: Node, *index: Poly) -> Point:
        found = puller.at(x, (*_heads(puller, x, batch, node), *index))
        require_memory(node, found)
        return found

    wide, products = compute_dtype(q.dtype), []
    space = TensorType(wide, (*q.shape[:-1], k.shape[-2]), q.tensor.device)
    for (a, b), c in zip(((q, k), (grad, v)), columns):
        mine, theirs = (a, b) if of_query else (b, a)
        products.append(graph_input("product", space))
        operands = (read(mine, row, c), read(theirs, at, c))
        puller.place(products[-1], place, puller.add(Point(Kind.DOT, node, operands, dtype=wide, axes=tuple(c.names()))))
    scores, moved = products[0], None if of_value else products[1]
    weights = gradient_weights(scores, moved, logsumexp, delta, *masks, causal=attrs["causal"], scale=attrs["scale"])
    operands = (puller.at(weights, place), read(value, at, column))
    attended = puller.add(Point(Kind.ATTEND, node, operands, dtype=q.dtype, axes=tuple(at.names()), value=True))
    if of_value:
        return attended
    whole = graph_input("attended", TensorType(wide, node.shape, q.tensor.device))
    puller.place(whole, index, attended)
    return puller.at(OPS["mul"](whole, attrs["scale"]), index)


ATTENTION: dict[str, Callable[[Puller, Node, Index, Mask], Point]] = {"attention": attention, "attention_gradient": gradient}

"""Which dimensions of operands and results are one and the same axis: a table per op, read in both directions by the axis analysis.

    linear(x [b, s, k], w [n, k]) -> [b, s, n]        b: x 0, result 0      s: x 1, result 1      n: w 0, result 2      k: x 2, w 1, summed

A link says which dimensions go together element by element, and how the op treats indices along them. What no link names is mixed.
"""

from __future__ import annotations

from collections.abc import Callable

from ..dims import same
from ..graph import Node
from ..op import Category
from ..types import TensorType
from .axis_dims import Links, broadcast_links, end_size, is_every_index, like_first, tensors
from .axis_externs import extern_links
from .axis_routing import puts_back
from .axis_windows import WINDOWS
from .places import OUT, PARALLEL, End, How, Label, Link, Reorder, mixing


def links(node: Node) -> Links:
    """The links of a node; none for an op that is not known here."""
    rule = LINKS.get(node.op.name) or _BY_CATEGORY.get(node.op.category)
    return rule(node) if rule else []


def _pointwise(node: Node) -> Links:
    return broadcast_links(node.shape, tensors(node))


def _rope(node: Node) -> Links:
    """Halves or neighbours of the last dimension are exchanged."""
    last = tuple((k, x.rank - 1) for k, x in tensors(node))
    return [
        *broadcast_links(node.shape, tensors(node), 1),
        Link(((OUT, len(node.shape) - 1), *last), mixing("its elements are rotated in pairs")),
    ]


def _reduction(node: Node) -> Links:
    rank = node.inputs[0].tensor.rank
    dropped = {d % rank for d in node.attrs["dims"]} if node.attrs["dims"] else set(range(rank))
    found, at = [], 0
    for d in range(rank):
        if d in dropped:
            found.append(Link(((0, d),), mixing(f"{node.op.name} reduces it")))
        else:
            found.append(Link(((0, d), (OUT, d if node.attrs["keepdim"] else at))))
            at += 1
    return found


def _scan(node: Node) -> Links:
    rank = node.tensor.rank
    return like_first([node.attrs["dim"] % rank] if rank else [], Label(How.PREFIX), rank)


def _softmax(node: Node) -> Links:
    rank = node.tensor.rank
    return like_first([node.attrs["dim"] % rank] if rank else [], mixing("it is normalized along it"), rank)


def _norm(node: Node) -> Links:
    rank, axes = node.tensor.rank, node.attrs["axes"]
    label = mixing("it is normalized over it")
    found = like_first(range(rank - axes, rank), label, rank)
    parameters = [(k, x) for k, x in tensors(node) if k]
    return found + [Link(((OUT, rank - axes + d), *((k, d) for k, _ in parameters)), label) for d in range(axes if parameters else 0)]


def _group_norm(node: Node) -> Links:
    return like_first(range(1, node.tensor.rank), mixing("it is normalized over it"), node.tensor.rank)


def _batch_norm(node: Node) -> Links:
    channels = Link(((0, 1), (OUT, 1), *((k, 0) for k, _ in tensors(node) if k)))
    return [*(link for link in like_first((), PARALLEL, node.tensor.rank) if (0, 1) not in link.ends), channels]


def _permute(node: Node) -> Links:
    return [Link(((0, d), (OUT, i))) for i, d in enumerate(node.attrs["dims"])]


def _expand(node: Node) -> Links:
    return broadcast_links(node.shape, tensors(node))


def _select(node: Node) -> Links:
    rank = node.inputs[0].tensor.rank
    d = node.attrs["dim"] % rank
    kept = [i for i in range(rank) if i != d]
    return [*(Link(((0, i), (OUT, at))) for at, i in enumerate(kept)), Link(((0, d),), mixing("it takes one index of it"))]


def _flip(node: Node) -> Links:
    rank = node.tensor.rank
    turned = {d % rank for d in node.attrs["dims"]}
    return [Link(((0, d),), mixing("it is reversed")) if d in turned else Link(((0, d), (OUT, d))) for d in range(rank)]


def _layout(node: Node) -> Links:
    return like_first((), PARALLEL, node.tensor.rank)


def _matmul(node: Node) -> Links:
    a, b = node.inputs[0].tensor, node.inputs[1].tensor
    rank = node.tensor.rank
    lead = [(0, TensorType(a.dtype, a.shape[:-2]))] if a.rank > 2 else []
    lead += [(1, TensorType(b.dtype, b.shape[:-2]))] if b.rank > 2 else []
    stop = (a.rank > 1) + (b.rank > 1)
    found = broadcast_links(node.shape[: rank - stop], lead)
    if a.rank > 1:
        found.append(Link(((0, a.rank - 2), (OUT, rank - stop))))
    if b.rank > 1:
        found.append(Link(((1, b.rank - 1), (OUT, rank - 1))))
    return [*found, Link(((0, a.rank - 1), (1, max(b.rank - 2, 0))), mixing("it is summed over"))]


def _linear(node: Node) -> Links:
    """int_linear, too."""
    rank = node.tensor.rank
    columns = ((1, 0), *(((2, 0),) if len(node.inputs) > 2 else ()), (OUT, rank - 1))
    inner = Link(((0, rank - 1), (1, 1)), mixing("it is summed over"))
    return [*(Link(((0, d), (OUT, d))) for d in range(rank - 1)), Link(columns), inner]


def _embedding(node: Node) -> Links:
    rank = node.inputs[1].tensor.rank
    return [*(Link(((1, d), (OUT, d))) for d in range(rank)), Link(((0, 1), (OUT, rank)))]


def _index(node: Node) -> Links:
    """What stands in dimensions that are not indexed goes with the result; so do the indices, which are read one by one."""
    x, *indices = (t for _, t in tensors(node))
    dims = node.attrs["dims"]
    block = node.tensor.rank - x.rank + len(dims)
    front = dims[0] if dims[-1] - dims[0] == len(dims) - 1 else 0
    rest = [d for d in range(x.rank) if d not in dims]
    kept = [Link(((0, d), (OUT, at if at < front else at + block))) for at, d in enumerate(rest)]
    read = []
    for b in range(block):
        ends = [(k, b - block + i.rank) for k, i in enumerate(indices, start=1) if b - block + i.rank >= 0]
        read.append(Link(((OUT, front + b), *(e for e in ends if same(end_size(node, e), node.shape[front + b])))))
    indexed = [Link(((0, d),), mixing("it is read at computed indices")) for d in dims]
    for k, d in enumerate(dims):  # a dimension that is read in order, beside others at computed places: each of its indices alone
        if is_every_index(node.inputs[k + 1], x.shape[d]):
            at = [
                b for b, link in enumerate(read) if any(operand == k + 1 and end_size(node, (operand, e)) != 1 for operand, e in link.ends)
            ]
            if len(at) == 1:
                indexed[k] = Link(((0, d), (OUT, front + at[0])))
    return [*kept, *read, *indexed]


def _gather(node: Node) -> Links:
    d = node.attrs["dim"] % node.tensor.rank
    sides = [Link(((0, i), (1, i), (OUT, i)) if same(node.inputs[0].shape[i], node.shape[i]) else ((1, i), (OUT, i)))
             for i in range(node.tensor.rank) if i != d]  # fmt: skip
    return [*sides, Link(((1, d), (OUT, d))), Link(((0, d),), mixing("it is read at computed indices"))]


def _attention(node: Node) -> Links:
    """Queries and their mask rows go together; keys, values and mask columns are attended over."""
    types = tensors(node)
    rank = node.tensor.rank
    logits = (*node.shape[:-1], node.inputs[1].shape[-2])
    lead = [(k, TensorType(x.dtype, x.shape[:-2])) for k, x in types if x.rank > 2]
    found = broadcast_links(logits[:-2], lead)
    masks = [(k, x) for k, x in types if k == 3]
    rows = [(k, x.rank - 2) for k, x in masks if x.rank > 1 and same(x.shape[-2], logits[-2])]
    keys = [(k, x.rank - 1) for k, x in masks if x.rank > 0 and same(x.shape[-1], logits[-1])]
    return [
        *found,
        Link(((0, rank - 2), *rows, (OUT, rank - 2))),
        Link(((1, rank - 2), (2, rank - 2), *keys), mixing("every query attends to all keys")),
        Link(((0, rank - 1), (1, rank - 1)), mixing("it is summed over")),
        Link(((2, rank - 1), (OUT, rank - 1))),
    ]


def _scatter(node: Node) -> Links:
    """scatter and gather's inverse: alone along every dimension but the one that is written at computed indices."""
    rank, d = node.tensor.rank, node.attrs["dim"] % max(node.tensor.rank, 1)
    sides = [Link(tuple(e for e in ((0, i), (1, i), (2, i), (OUT, i)) if _is_like(node, e, i))) for i in range(rank) if i != d]
    return [*sides, Link(((0, d), (1, d), (2, d), (OUT, d)), mixing("it is written at computed indices"))]


def _is_like(node: Node, end: End, d: int) -> bool:
    """Whether an operand is a tensor as long as the result in this dimension."""
    k = end[0]
    return k < 0 or (isinstance(node.inputs[k].type, TensorType) and same(end_size(node, end), node.shape[d]))


def _written(node: Node) -> Links:
    """slice_scatter and cache_update: x with something else in a part of one dimension."""
    rank, d = node.tensor.rank, node.attrs["dim"] % node.tensor.rank
    sides = [Link(((0, i), (1, i), (OUT, i))) for i in range(rank) if i != d]
    return [*sides, Link(((0, d), (OUT, d))), Link(((1, d),), mixing("it is written into a part of another value"))]


def _index_put(node: Node) -> Links:
    """Dimensions that are not indexed are each alone; the value's last ones are those."""
    if puts_back(node):
        rows = [Link(((1, 0), (2, 0))), Link(((1, 0), (OUT, 0)), step=Reorder(None)), Link(((0, 0), (OUT, 0)))]
        return [*rows, *(Link(((0, d), (1, d), (OUT, d))) for d in range(1, node.tensor.rank))]
    rank, dims, value = node.tensor.rank, node.attrs["dims"], node.inputs[1].tensor
    label = mixing("it is written at computed indices")
    block = max(t.rank for k, t in tensors(node) if k > 1)
    front = dims[0] if dims[-1] - dims[0] == len(dims) - 1 else 0
    rest = [d for d in range(rank) if d not in dims]
    total = len(rest) + block
    found = []
    for at, d in enumerate(rest):
        v = (at if at < front else at + block) - (total - value.rank)
        ends = ((0, d), (OUT, d)) + (((1, v),) if v >= 0 and same(value.shape[v], node.shape[d]) else ())
        found.append(Link(ends))
    mixed = [Link(((0, d), (OUT, d)), label) for d in dims]
    return [*found, *mixed, *(Link(((k, d),), label) for k, t in tensors(node) if k > 1 for d in range(t.rank))]


def _grouped(node: Node) -> Links:
    """Rows in their order; which group a row is in comes with the ends of groups."""
    return [
        Link(((0, 0), (OUT, 0))),
        Link(((0, 1), (1, 1)), mixing("it is summed over")),
        Link(((1, 2), (OUT, 1))),
        Link(((1, 0), (2, 0)), mixing("groups are told apart along it")),
    ]


def _last(node: Node) -> Links:
    """Of operands and results of one rank, the last dimension is mixed."""
    rank = node.inputs[0].tensor.rank
    results = len(node.type) if isinstance(node.type, tuple) else 1
    ends = [[*((k, d) for k, t in tensors(node) if t.rank == rank), *((~r, d) for r in range(results))] for d in range(rank)]
    return [Link(tuple(e), mixing("its elements go together") if d == rank - 1 else PARALLEL) for d, e in enumerate(ends)]


def _recurrence(node: Node) -> Links:
    """gates [steps, batch, columns], states [batch, units] -> out [steps, batch, units], states."""
    steps, batch = (1, 0) if node.attrs["batch_first"] else (0, 1)
    states = len(node.type) - 1  # type: ignore[arg-type]
    label = mixing("its steps run from the last to the first") if node.attrs["reverse"] else Label(How.PREFIX)
    rows = ((0, batch), (OUT, 1), *((1 + k, 0) for k in range(states)), *((~(1 + k), 0) for k in range(states)))
    return [Link(((0, steps), (OUT, 0)), label), Link(rows), Link(((0, 2),), mixing("its columns are gates"))]


LINKS: dict[str, Callable[[Node], Links]] = {
    "rope": _rope,
    "softmax": _softmax,
    "log_softmax": _softmax,
    "layer_norm": _norm,
    "rms_norm": _norm,
    "group_norm": _group_norm,
    "batch_norm": _batch_norm,
    "permute": _permute,
    "expand": _expand,
    "select": _select,
    "flip": _flip,
    "layout": _layout,
    "matmul": _matmul,
    "linear": _linear,
    "int_linear": _linear,
    "embedding": _embedding,
    "index": _index,
    "gather": _gather,
    "scatter": _scatter,
    "index_put": _index_put,
    "slice_scatter": _written,
    "cache_update": _written,
    "grouped_matmul": _grouped,
    "block_sparse_linear": lambda node: [
        Link(((0, d), (OUT, d)), mixing("it is summed over") if d == node.tensor.rank - 1 else PARALLEL) for d in range(node.tensor.rank)
    ],
    "unpack": _last,
    "dequantize": _last,
    "quantize_rows": _last,
    "lstm_layer": _recurrence,
    "gru_layer": _recurrence,
    "rnn_layer": _recurrence,
    "extern": extern_links,
    "attention": _attention,
    **WINDOWS,
}
_BY_CATEGORY: dict[Category, Callable[[Node], Links]] = {
    Category.POINTWISE: _pointwise,
    Category.REDUCTION: _reduction,
    Category.SCAN: _scan,
}

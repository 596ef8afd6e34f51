"""Which dimensions of operands and results are one and the same axis: a table per op, read in both directions by the axis analysis.

    linear(x [b, s, k], w [n, k]) -> [b, s, n]        b: x 0, result 0      s: x 1, result 1      n: w 0, result 2      k: x 2, w 1, summed

A link says which dimensions go together element by element, and how the op treats indices along them. What no link names is mixed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from ..dims import same
from ..graph import Node
from ..op import Category
from ..types import TensorType
from .places import PARALLEL, How, Label

End = tuple[int, int]
"""(operand, dimension); result number r is operand ~r, so that the only result is operand -1."""

OUT = -1


@dataclass(frozen=True)
class Link:
    """Dimensions that hold the same axis; `label`: how the op treats it."""

    ends: tuple[End, ...]
    label: Label = PARALLEL


Links = list[Link]


def mixing(reason: str) -> Label:
    return Label(How.MIXING, reason=reason)


def links(node: Node) -> Links:
    """The links of a node; none for an op that is not known here."""
    rule = LINKS.get(node.op.name) or _BY_CATEGORY.get(node.op.category)
    return rule(node) if rule else []


def result_types(node: Node) -> tuple[TensorType, ...]:
    return node.type if isinstance(node.type, tuple) else (node.tensor,)


def end_size(node: Node, end: End) -> object:
    """The size of a dimension of an operand or result."""
    operand, d = end
    return result_types(node)[~operand].shape[d] if operand < 0 else node.inputs[operand].shape[d]


def tensors(node: Node) -> list[tuple[int, TensorType]]:
    """The operands that are one tensor, with their numbers."""
    return [(k, x.type) for k, x in enumerate(node.inputs) if isinstance(x.type, TensorType)]


def _broadcast(shape: Sequence[object], operands: Iterable[tuple[int, TensorType]], stop: int = 0) -> Links:
    """A link per dimension of the result, but for the last `stop`; operands of size 1 there do not take part."""
    found, operands = [], list(operands)
    for d in range(len(shape) - stop):
        ends = [(k, d - len(shape) + x.rank) for k, x in operands if d - len(shape) + x.rank >= 0]
        sizes = dict(operands)
        ends = [(k, e) for k, e in ends if same(sizes[k].shape[e], shape[d])]  # type: ignore[arg-type]
        found.append(Link(((OUT, d), *ends)))
    return found


def _pointwise(node: Node) -> Links:
    return _broadcast(node.shape, tensors(node))


def _rope(node: Node) -> Links:
    """Halves or neighbours of the last dimension are exchanged."""
    last = tuple((k, x.rank - 1) for k, x in tensors(node))
    return [
        *_broadcast(node.shape, tensors(node), 1),
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


def _same_shape(mixed: Iterable[int], label: Label, rank: int) -> Links:
    """Result like the first operand; `mixed` are the dimensions that have this label."""
    mixed = set(mixed)
    return [Link(((0, d), (OUT, d)), label if d in mixed else PARALLEL) for d in range(rank)]


def _scan(node: Node) -> Links:
    rank = node.tensor.rank
    return _same_shape([node.attrs["dim"] % rank] if rank else [], Label(How.PREFIX), rank)


def _softmax(node: Node) -> Links:
    rank = node.tensor.rank
    return _same_shape([node.attrs["dim"] % rank] if rank else [], mixing("it is normalized along it"), rank)


def _norm(node: Node) -> Links:
    rank, axes = node.tensor.rank, node.attrs["axes"]
    label = mixing("it is normalized over it")
    found = _same_shape(range(rank - axes, rank), label, rank)
    parameters = [(k, x) for k, x in tensors(node) if k]
    return found + [Link(((OUT, rank - axes + d), *((k, d) for k, _ in parameters)), label) for d in range(axes if parameters else 0)]


def _group_norm(node: Node) -> Links:
    return _same_shape(range(1, node.tensor.rank), mixing("it is normalized over it"), node.tensor.rank)


def _batch_norm(node: Node) -> Links:
    channels = Link(((0, 1), (OUT, 1), *((k, 0) for k, _ in tensors(node) if k)))
    return [*(link for link in _same_shape((), PARALLEL, node.tensor.rank) if (0, 1) not in link.ends), channels]


def _permute(node: Node) -> Links:
    return [Link(((0, d), (OUT, i))) for i, d in enumerate(node.attrs["dims"])]


def _expand(node: Node) -> Links:
    return _broadcast(node.shape, tensors(node))


def _slice(node: Node) -> Links:
    """Whole dimensions only; a part of one is a shift."""
    rank, d = node.tensor.rank, node.attrs["dim"] % node.tensor.rank
    whole = same(node.shape[d], node.inputs[0].shape[d])
    return [Link(((0, i), (OUT, i))) for i in range(rank) if i != d or whole] + (
        [] if whole else [Link(((0, d),), mixing("it takes a part of it"))]
    )


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
    return _same_shape((), PARALLEL, node.tensor.rank)


def _cat(node: Node) -> Links:
    d = node.attrs["dim"] % node.tensor.rank
    sides = [Link(((OUT, i), *((k, i) for k, _ in tensors(node)))) for i in range(node.tensor.rank) if i != d]
    return [*sides, *(Link(((k, d),), mixing("it is joined with others along it")) for k, _ in tensors(node))]


def _pad(node: Node) -> Links:
    padded = [bool(lo or hi) for lo, hi in zip(node.attrs["low"], node.attrs["high"])]
    return [Link(((0, d),), mixing("it is padded")) if at else Link(((0, d), (OUT, d))) for d, at in enumerate(padded)]


def _matmul(node: Node) -> Links:
    a, b = node.inputs[0].tensor, node.inputs[1].tensor
    rank = node.tensor.rank
    lead = [(0, TensorType(a.dtype, a.shape[:-2]))] if a.rank > 2 else []
    lead += [(1, TensorType(b.dtype, b.shape[:-2]))] if b.rank > 2 else []
    stop = (a.rank > 1) + (b.rank > 1)
    found = _broadcast(node.shape[: rank - stop], lead)
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
        read.append(Link(((OUT, front + b), *(e for e in ends if same(end_size(node, e), node.shape[front + b])))))  # type: ignore[arg-type]
    return [*kept, *read, *(Link(((0, d),), mixing("it is read at computed indices")) for d in dims)]


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
    found = _broadcast(logits[:-2], lead)
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
    "slice": _slice,
    "select": _select,
    "flip": _flip,
    "layout": _layout,
    "cat": _cat,
    "pad": _pad,
    "matmul": _matmul,
    "linear": _linear,
    "int_linear": _linear,
    "embedding": _embedding,
    "index": _index,
    "gather": _gather,
    "attention": _attention,
}
_BY_CATEGORY: dict[Category, Callable[[Node], Links]] = {
    Category.POINTWISE: _pointwise,
    Category.REDUCTION: _reduction,
    Category.SCAN: _scan,
}

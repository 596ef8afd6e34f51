"""Through which ops a shard of a value is carried: which dimension of the result is sharded, if one of an operand is.

h : [b, s, heads * d], sharded in its last    --reshape-->    [b, s, heads, d], sharded in heads    --permute-->    [b, heads, s, d]
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

from ..ir.graph import Node, is_scalar
from ..ir.op import Category

Dims = Mapping[Node, int]


def carried(node: Node, dims: Dims, count: int) -> int | None:
    """The dimension of the result that is sharded over `count` processes; None where the shards of the operands do not go on.

    dims: of each sharded value the dimension. Each process has a stretch of it, in order.
    """
    rule = _RULES.get(node.op.name) or _CATEGORIES.get(node.op.category)
    found = rule(node, dims, count) if rule is not None else None
    size = node.shape[found] if found is not None else None
    return found if isinstance(size, int) and size % count == 0 else None


def _pointwise(node: Node, dims: Dims, count: int) -> int | None:
    """All operands in the same dimension, counted from the last; those that are whole are cut, or broadcast there."""
    rank = node.tensor.rank
    places = {dims[i] - i.tensor.rank for i in node.inputs if i in dims and not is_scalar(i)}
    if len(places) != 1:
        return None
    place = places.pop()
    return rank + place if all(i.shape[place] == node.shape[place] for i in node.inputs if i in dims) else None


def _matmul(node: Node, dims: Dims, count: int) -> int | None:
    """In a dimension that matrices are lined up along."""
    found = _pointwise(node, dims, count)
    return found if found is not None and found < node.tensor.rank - 2 and all(i.tensor.rank > 2 for i in node.inputs) else None


def _cat(node: Node, dims: Dims, count: int) -> int | None:
    found = _pointwise(node, dims, count)
    return found if found != node.attrs["dim"] else None


def _reshape(node: Node, dims: Dims, count: int) -> int | None:
    """Of a dimension that is split, the outer part; one that is merged with those behind it is the outer part of the new one."""
    source = node.inputs[0]
    dim, sizes, shape = dims[source], source.shape, node.shape
    if not all(isinstance(d, int) for d in (*sizes, *shape)):
        return None
    before = math.prod(sizes[:dim])
    places = [e for e in range(len(shape)) if math.prod(shape[:e]) == before and shape[e] % count == 0]
    fitting = [e for e in places if shape[e] % sizes[dim] == 0 or sizes[dim] % shape[e] == 0]
    return fitting[-1] if fitting else None


def _permute(node: Node, dims: Dims, count: int) -> int | None:
    return node.attrs["dims"].index(dims[node.inputs[0]])


def _expand(node: Node, dims: Dims, count: int) -> int | None:
    source = node.inputs[0]
    place = dims[source] - source.tensor.rank
    return node.tensor.rank + place if source.shape[place] == node.shape[place] else None


def _slice(node: Node, dims: Dims, count: int) -> int | None:
    dim = dims[node.inputs[0]]
    return dim if node.attrs["dim"] != dim else None


def _select(node: Node, dims: Dims, count: int) -> int | None:
    dim, taken = dims[node.inputs[0]], node.attrs["dim"]
    return None if dim == taken else dim - (taken < dim)


def _along(node: Node, dims: Dims, count: int) -> int | None:
    """What works along one dimension, or the last few, does so in each index of the others alone."""
    source = node.inputs[0]
    if source not in dims:
        return None
    inner = node.attrs.get("axes")
    first = node.attrs["dim"] if inner is None else source.tensor.rank - inner
    dim = dims[source]
    return dim if dim < first or (inner is None and dim != first) else None


def _attention(node: Node, dims: Dims, count: int) -> int | None:
    """By heads, the dimension before tokens: of all three; or of queries alone, where all share one head of keys."""
    q, k, v = node.inputs[:3]
    heads = q.tensor.rank - 3
    if heads < 0 or dims.get(q) != heads or any(m in dims for m in node.inputs[3:]):
        return None
    groups = k.shape[heads] if k.tensor.rank == q.tensor.rank else None
    together = all(dims.get(x) == heads for x in (k, v)) or all(x not in dims for x in (k, v))
    fits = groups == 1 and k not in dims or isinstance(groups, int) and groups % count == 0
    return heads if together and fits else None


def _rope(node: Node, dims: Dims, count: int) -> int | None:
    """Tables go with every head."""
    x, *tables = node.inputs
    tokens = x.tensor.rank - 2
    return dims[x] if x in dims and dims[x] < tokens and not any(t in dims for t in tables) else None


_RULES: dict[str, Callable[[Node, Dims, int], int | None]] = {
    "matmul": _matmul,
    "cat": _cat,
    "reshape": _reshape,
    "permute": _permute,
    "expand": _expand,
    "slice": _slice,
    "select": _select,
    "softmax": _along,
    "rms_norm": _along,
    "layer_norm": _along,
    "attention": _attention,
    "rope": _rope,
}
_CATEGORIES = {Category.POINTWISE: _pointwise}

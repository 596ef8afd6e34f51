"""ATen indexing, gathering, scattering and concatenation -> ours."""

from __future__ import annotations

from typing import Any

import torch

from ..graph import Node
from ..types import TensorType, normalize_dim
from .aten_views import slice_bounds
from .call import Call, Converter, Result, cast, make, reshape


def _cat(call: Call, tensors: tuple[Node, ...], d: int) -> Result:
    """Tensors of shape [0] are skipped whatever the rank of the others, as ATen does."""
    kept = [t for t in tensors if not (t.shape == (0,) and len(call.shape) != 1)]
    return make("cat", *kept, dim=normalize_dim(d, len(call.shape))) if kept else None


def _stack(call: Call, tensors: tuple[Node, ...], d: int) -> Result:
    d = normalize_dim(d, len(call.shape))
    apart = [reshape(t, (*t.shape[:d], 1, *t.shape[d:])) for t in tensors]
    return make("cat", *apart, dim=d)


def _positions(indices: tuple[Node | None, ...]) -> tuple[tuple[int, ...], list[Node]] | None:
    """Indexed dimensions and their indices; None where a mask makes the result's size depend on data."""
    dims = tuple(i for i, index in enumerate(indices) if index is not None)
    given = [index for index in indices if index is not None]
    return None if any(i.dtype in (torch.bool, torch.uint8) for i in given) or not given else (dims, given)


def _index(call: Call, x: Node, indices: tuple[Node | None, ...]) -> Result:
    found = _positions(indices)
    return None if found is None else make("index", x, *found[1], dims=found[0])


def _index_put(call: Call, x: Node, indices: tuple[Node | None, ...], value: Node, accumulate: bool, *rest: Any) -> Result:
    found = _positions(indices)
    return None if found is None else make("index_put", x, value, *found[1], dims=found[0], accumulate=accumulate)


def _index_select(call: Call, x: Node, d: int, index: Node) -> Result:
    """Unlike `index`, it has no negative positions."""
    if x.tensor.rank == 0 or index.tensor.rank != 1:
        return None
    d = normalize_dim(d, x.tensor.rank)
    if x.tensor.rank == 2 and d == 0:
        return make("embedding", x, index)
    column = reshape(index, tuple(index.shape[0] if i == d else 1 for i in range(x.tensor.rank)))
    return make("gather", x, make("expand", column, shape=call.shape), dim=d)


def _gather(call: Call, x: Node, d: int, index: Node, sparse: bool) -> Result:
    return make("gather", x, index, dim=normalize_dim(d, x.tensor.rank)) if x.tensor.rank and index.tensor.rank else None


def _scatter(reduce: str = "set") -> Converter:
    def convert(call: Call, x: Node, d: int, index: Node, src: Any) -> Result:
        return _scattered(x, d, index, src, reduce)

    return convert


_REDUCTIONS = {"add": "sum", "multiply": "prod"}


def _scatter_reducing(call: Call, x: Node, d: int, index: Node, src: Any, reduce: str, include_self: bool = True) -> Result:
    return _scattered(x, d, index, src, _REDUCTIONS.get(reduce, reduce), include_self)


def _scattered(x: Node, d: int, index: Node, src: Any, reduce: str, include_self: bool = True) -> Result:
    if not x.tensor.rank or not index.tensor.rank:
        return None
    return make("scatter", x, index, src, dim=normalize_dim(d, x.tensor.rank), reduce=reduce, include_self=include_self)


def _slice_scatter(call: Call, x: Node, src: Node, d: int, start: Any, stop: Any, step: int) -> Result:
    d = normalize_dim(d, x.tensor.rank)
    length = src.shape[d]
    low, high = slice_bounds(x.shape[d], start, stop, step, length)
    return make("slice_scatter", x, cast(src, x.dtype), dim=d, start=low, stop=high, step=step)


def _select_scatter(call: Call, x: Node, src: Node, d: int, index: Any) -> Result:
    d = normalize_dim(d, x.tensor.rank)
    if isinstance(index, int) and index < 0:
        index = x.shape[d] + index
    apart = reshape(cast(src, x.dtype), (*src.shape[:d], 1, *src.shape[d:]))
    return make("slice_scatter", x, apart, dim=d, start=index, stop=index + 1, step=1)


def _embedding(call: Call, weight: Node, ids: Node, *rest: Any) -> Result:
    return make("embedding", weight, ids) if isinstance(weight.type, TensorType) and weight.type.rank == 2 else None


GATHERS: dict[str, Converter] = {
    "aten.cat.default": _cat, "aten.stack.default": _stack,
    "aten.index.Tensor": _index, "aten._unsafe_index.Tensor": _index,
    "aten.index_put.default": _index_put, "aten._unsafe_index_put.default": _index_put, "aten.index_select.default": _index_select,
    "aten.gather.default": _gather, "aten.scatter.src": _scatter(), "aten.scatter.value": _scatter(),
    "aten.scatter_add.default": _scatter("sum"),
    "aten.scatter.reduce": _scatter_reducing, "aten.scatter.value_reduce": _scatter_reducing, "aten.scatter_reduce.two": _scatter_reducing,
    "aten.slice_scatter.default": _slice_scatter, "aten.select_scatter.default": _select_scatter, "aten.embedding.default": _embedding,
}  # fmt: skip

"""Reads and writes at computed positions: cat, pad, gather, index, embedding, scatter, and the KV cache update."""

from __future__ import annotations

from typing import Any

import torch

from ..dims import Dim, dim, same
from ..op import Category, Cost, Op, streaming_cost
from ..types import TensorType, Type, broadcast, normalize_dim, one_device, promote
from .views import slice_length


def _infer_cat(*xs: TensorType, dim: int = 0) -> Type:
    if not xs:
        raise ValueError("it takes at least one tensor")
    d = normalize_dim(dim, xs[0].rank)
    if not xs[0].rank:
        raise ValueError("it takes tensors with dimensions")
    for x in xs[1:]:
        if x.rank != xs[0].rank or not all(same(a, b) for i, (a, b) in enumerate(zip(x.shape, xs[0].shape)) if i != d):
            raise ValueError(f"{x} does not continue {xs[0]} along dimension {d}")
    shape = list(xs[0].shape)
    shape[d] = _sum(x.shape[d] for x in xs)
    return TensorType(promote(*xs), tuple(shape), one_device(*xs))


def _sum(dims: Any) -> Dim:
    total: Any = 0
    for d in dims:
        total = total + d
    return dim(total)


def _infer_pad(x: TensorType, *, low: tuple[Dim, ...], high: tuple[Dim, ...], value: float = 0) -> Type:
    """low and high give the elements added before and after, one per dimension; negative ones crop."""
    if not len(low) == len(high) == x.rank:
        raise ValueError(f"low and high need one entry for each of the {x.rank} dimensions")
    shape = tuple(dim(lo + d + hi) for lo, d, hi in zip(low, x.shape, high))
    if any(isinstance(d, int) and d < 0 for d in shape):
        raise ValueError("it crops more than there is")
    return x.with_shape(shape)


def _pad(x: torch.Tensor, *, low: Any, high: Any, value: Any) -> torch.Tensor:
    pairs = [p for lo, hi in reversed(list(zip(low, high))) for p in (lo, hi)]
    return torch.nn.functional.pad(x, pairs, value=value)


def _infer_gather(x: TensorType, index: TensorType, *, dim: int) -> Type:
    """out[i][j][k] = x[i][index[i][j][k]][k] for dim 1."""
    d = normalize_dim(dim, x.rank)
    _integer_index(index)
    if index.rank != x.rank:
        raise ValueError("the index must have as many dimensions as the tensor")
    for i, (a, b) in enumerate(zip(index.shape, x.shape)):
        if i != d and isinstance(a, int) and isinstance(b, int) and a > b:
            raise ValueError(f"the index is longer than the tensor along dimension {i}")
    one_device(x, index)
    return x.with_shape(index.shape)


def _integer_index(*indices: TensorType) -> None:
    for t in indices:
        if t.dtype not in (torch.int64, torch.int32):
            raise ValueError(f"an index must be int64 or int32, not {t.dtype}")


def _infer_index(x: TensorType, *indices: TensorType, dims: tuple[int, ...]) -> TensorType:
    """Advanced indexing: indices broadcast together; `dims` are the indexed dimensions, ascending. Negative indices wrap.

    The index dimensions stand where the first indexed dimension was if `dims` are adjacent, else in front (NumPy's rule).
    """
    if len(indices) != len(dims) or list(dims) != sorted(set(dims)):
        raise ValueError("one integer index per entry of dims, dims ascending")
    if not dims or dims[0] < 0 or dims[-1] >= x.rank:
        raise ValueError(f"dims must lie in 0..{x.rank - 1}")
    _integer_index(*indices)
    one_device(x, *indices)
    block = broadcast(*(i.shape for i in indices))
    rest = [(i, d) for i, d in enumerate(x.shape) if i not in dims]
    front = dims[0] if dims[-1] - dims[0] == len(dims) - 1 else 0
    before = tuple(d for i, d in rest if i < front)
    after = tuple(d for i, d in rest if i >= front)
    return x.with_shape((*before, *block, *after))


def full_index(indices: Any, dims: tuple[int, ...]) -> list[Any]:
    """The indices as ATen takes them: None for dimensions that are not indexed."""
    index: list[Any] = [None] * (dims[-1] + 1)
    for d, i in zip(dims, indices):
        index[d] = i
    return index


def _infer_embedding(weight: TensorType, ids: TensorType) -> Type:
    """weight [rows, d], ids [...] integer in [0, rows) -> [..., d]."""
    _integer_index(ids)
    one_device(weight, ids)
    if weight.rank != 2:
        raise ValueError("the weight must have two dimensions")
    return weight.with_shape((*ids.shape, *weight.shape[1:]))


def _infer_scatter(x: TensorType, index: TensorType, src: Any, *, dim: int, reduce: str = "set", include_self: bool = True) -> Type:
    """x with src written at index along dim. reduce: set, sum, prod, amax, amin, mean. src is a tensor or a number."""
    normalize_dim(dim, x.rank)
    _integer_index(index)
    if index.rank != x.rank:
        raise ValueError("the index must have as many dimensions as the tensor")
    if isinstance(src, TensorType) and src.dtype != x.dtype:
        raise ValueError(f"it writes {src.dtype} into {x.dtype}")
    if reduce not in ("set", "sum", "prod", "amax", "amin", "mean"):
        raise ValueError(f"unknown reduce {reduce!r}")
    return x


def _scatter(x: torch.Tensor, index: torch.Tensor, src: Any, *, dim: int, reduce: str, include_self: bool) -> torch.Tensor:
    if reduce == "set":
        return torch.scatter(x, dim, index, src)
    if not isinstance(src, torch.Tensor):
        src = torch.full(index.shape, src, dtype=x.dtype, device=x.device)
    return torch.scatter_reduce(x, dim, index, src, reduce, include_self=include_self)


def _infer_index_put(x: TensorType, value: TensorType, *indices: TensorType, dims: tuple[int, ...], accumulate: bool = False) -> Type:
    written = _infer_index(x, *indices, dims=dims)
    if value.dtype != x.dtype:
        raise ValueError(f"it writes {value.dtype} into {x.dtype}")
    if len(broadcast(value.shape, written.shape)) != written.rank:
        raise ValueError(f"{value} does not broadcast to {written}")
    return x


def _index_put(x: torch.Tensor, value: torch.Tensor, *indices: torch.Tensor, dims: Any, accumulate: bool) -> torch.Tensor:
    return torch.ops.aten.index_put(x, full_index(indices, dims), value, accumulate)


def _infer_slice_scatter(x: TensorType, src: TensorType, *, dim: int, start: Dim, stop: Dim, step: int = 1) -> Type:
    """x with x[start:stop:step] along dim replaced by src; bounds already clamped as in `slice`."""
    d = normalize_dim(dim, x.rank)
    length = slice_length(start, stop, step)
    if src.rank != x.rank or not all(same(a, length if i == d else b) for i, (a, b) in enumerate(zip(src.shape, x.shape))):
        raise ValueError(f"{src} does not fit the slice, which has {length} entries along dimension {d}")
    return x


def _infer_cache_update(cache: TensorType, new: TensorType, position: Any, *, dim: int) -> Type:
    """cache with new written from index `position` (a size or an integer tensor) on along dim: state in, state out.

    position: one; or [n], for each entry of the first dimension its own. What of new would then lie beyond
    the end of the cache is left out; the position itself must lie in the cache.
    """
    d = normalize_dim(dim, cache.rank)
    if isinstance(position, TensorType) and position.rank:
        _integer_index(position)
        if d == 0 or position.rank != 1 or not same(position.shape[0], cache.shape[0]):
            raise ValueError("there is one position, or one for each entry of the first dimension, which is not the one written along")
    if new.dtype != cache.dtype or new.rank != cache.rank:
        raise ValueError(f"{new} does not fit into {cache}")
    if not all(same(a, b) for i, (a, b) in enumerate(zip(new.shape, cache.shape)) if i != d):
        raise ValueError(f"{new} does not fit into {cache}")
    return cache


def _cache_update(cache: torch.Tensor, new: torch.Tensor, position: Any, *, dim: int) -> torch.Tensor:
    if isinstance(position, torch.Tensor) and position.dim():
        return update_rows(cache.clone(memory_format=torch.contiguous_format), new, position, dim)
    rows = torch.arange(new.shape[dim], device=cache.device) + position
    return cache.index_copy(dim, rows, new)


def update_rows(cache: torch.Tensor, new: torch.Tensor, position: torch.Tensor, dim: int) -> torch.Tensor:
    """In place, each entry of the first dimension from a position of its own on."""
    batch, count, length = new.shape[0], new.shape[dim], cache.shape[dim]
    at = position.long().reshape(batch, 1)
    entries = torch.arange(batch, device=cache.device).reshape(batch, 1)
    # beyond the end the last one that fits is written again: no size depends on the data
    taken = torch.minimum(torch.arange(count, device=cache.device), length - 1 - at)
    cache.movedim(dim, 1).index_put_((entries, at + taken), new.movedim(dim, 1)[entries, taken])
    return cache


def _cost_copy(types: tuple[Type, ...], out: Type, attrs: Any) -> Cost:
    """Every operand read once, the result written once; nothing is computed."""
    return Cost(0, streaming_cost(types, out).bytes)


def _cost_read(types: tuple[Any, ...], out: Type, attrs: Any) -> Cost:
    """Only the rows asked for are read, not the whole table; then the index and the result."""
    return Cost(0, dim(streaming_cost(types[1:], out).bytes + out.nbytes))  # type: ignore[union-attr]


GATHERS: tuple[Op, ...] = (
    Op("cat", Category.GATHER, _infer_cat, lambda *xs, dim: torch.cat(xs, dim), _cost_copy),
    Op("pad", Category.GATHER, _infer_pad, _pad, _cost_copy),
    Op("gather", Category.GATHER, _infer_gather, lambda x, index, *, dim: torch.gather(x, dim, index), _cost_read),
    Op("index", Category.GATHER, _infer_index, lambda x, *indices, dims: torch.ops.aten.index(x, full_index(indices, dims)), _cost_read),
    Op("embedding", Category.GATHER, _infer_embedding, lambda weight, ids: torch.nn.functional.embedding(ids, weight), _cost_read),
    Op("scatter", Category.GATHER, _infer_scatter, _scatter, _cost_copy),
    Op("index_put", Category.GATHER, _infer_index_put, _index_put, _cost_copy),
    Op("slice_scatter", Category.GATHER, _infer_slice_scatter,
       lambda x, src, *, dim, start, stop, step: torch.slice_scatter(x, src, dim, start, stop, step), _cost_copy),
    Op("cache_update", Category.GATHER, _infer_cache_update, _cache_update, _cost_copy),
)  # fmt: skip

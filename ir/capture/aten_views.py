"""ATen views and copies -> ours. A copy is its operand: values have no identity here (`outputs.py` keeps results apart in memory)."""

from __future__ import annotations

import sys
from typing import Any

from torch._ops import OpOverload

from ..dims import Dim, dim, same
from ..graph import Node
from ..ops.views import slice_length
from ..types import normalize_dim
from .call import Call, Converter, Result, make, reshape


def _identity(call: Call, x: Node, *rest: Any) -> Result:
    return x


def _reshape(call: Call, x: Node, *rest: Any) -> Result:
    """Everything that keeps the elements in row-major order; the new shape is read from the fake result."""
    return reshape(x, call.shape)


def _transpose(call: Call, x: Node, a: int, b: int) -> Result:
    rank = x.tensor.rank
    if rank == 0:
        return x
    dims = list(range(rank))
    a, b = normalize_dim(a, rank), normalize_dim(b, rank)
    dims[a], dims[b] = dims[b], dims[a]
    return make("permute", x, dims=tuple(dims))


def _t(call: Call, x: Node) -> Result:
    return make("permute", x, dims=(1, 0)) if x.tensor.rank == 2 else x


def _permute(call: Call, x: Node, dims: tuple[int, ...]) -> Result:
    return make("permute", x, dims=tuple(normalize_dim(d, x.tensor.rank) for d in dims))


def _expand(call: Call, x: Node, *rest: Any) -> Result:
    return x if x.shape == call.shape else make("expand", x, shape=call.shape)


def bound(value: Any, size: Dim, default: Dim) -> Dim:
    """A slice bound counted from the front, not clamped above; None and sys.maxsize mean `default`."""
    if value is None or (isinstance(value, int) and value == sys.maxsize):
        return default
    if isinstance(value, int) and value < 0:
        return max(size + value, 0) if isinstance(size, int) else dim(size + value)
    return value


def slice_bounds(size: Dim, start: Any, stop: Any, step: int, length: Dim) -> tuple[Dim, Dim]:
    """start and stop clamped into the dimension, given how many elements torch found there to be."""
    if same(length, 0):
        return 0, 0
    low = bound(start, size, 0)
    high = bound(stop, size, size)
    if isinstance(high, int) and isinstance(size, int):
        return low, min(high, size)
    if step == 1:
        return low, dim(low + length)
    fits = (stop for stop in (high, size) if same(slice_length(low, stop, step), length))
    return low, next(fits, dim(low + (length - 1) * step + 1))


def _slice(call: Call, x: Node, d: int, start: Any, stop: Any, step: int) -> Result:
    d = normalize_dim(d, x.tensor.rank)
    low, high = slice_bounds(x.shape[d], start, stop, step, call.shape[d])
    if same(low, 0) and same(high, x.shape[d]) and step == 1:
        return x
    return make("slice", x, dim=d, start=low, stop=high, step=step)


def _select(call: Call, x: Node, d: int, index: Any) -> Result:
    d = normalize_dim(d, x.tensor.rank)
    if isinstance(index, int) and index < 0:
        index = dim(x.shape[d] + index)
    return make("select", x, dim=d, index=index)


def _split(call: Call, x: Node, sizes: Any, d: int = 0) -> Result:
    """split, split_with_sizes, chunk: consecutive slices whose lengths the fake results tell."""
    d = normalize_dim(d, x.tensor.rank)
    start: Dim = 0
    parts: list[Node] = []
    for t in call.types:
        stop = dim(start + t.shape[d])
        parts.append(make("slice", x, dim=d, start=start, stop=stop))
        start = stop
    return tuple(parts)


def _unbind(call: Call, x: Node, d: int) -> Result:
    return tuple(make("select", x, dim=normalize_dim(d, x.tensor.rank), index=i) for i in range(len(call.types)))


def _flip(call: Call, x: Node, dims: tuple[int, ...]) -> Result:
    return make("flip", x, dims=tuple(normalize_dim(d, x.tensor.rank) for d in dims))


def _roll(call: Call, x: Node, shifts: Any, dims: Any) -> Result:
    """Each dimension cut in two and put together the other way round; without dimensions, the flat tensor."""
    flat = reshape(x, (x.tensor.numel,)) if not dims else x
    turned = _rolled(flat, shifts, dims or (0,))
    return None if turned is None else reshape(turned, x.shape)


def _rolled(x: Node, shifts: tuple[Any, ...], dims: tuple[int, ...]) -> Node | None:
    for shift, d in zip(shifts, dims):
        d = normalize_dim(d, x.tensor.rank)
        n = x.shape[d]
        if not isinstance(n, int) or not isinstance(shift, int):
            return None
        cut = -shift % n if n else 0
        if cut:
            x = make("cat", make("slice", x, dim=d, start=cut, stop=n), make("slice", x, dim=d, start=0, stop=cut), dim=d)
    return x


def _repeat(call: Call, x: Node, repeats: tuple[Any, ...]) -> Result:
    """[a, b] repeated (r, s) times: [1, a, 1, b] expanded to [r, a, s, b] and read as [r a, s b]."""
    shape = (1,) * (len(repeats) - x.tensor.rank) + x.shape
    apart = tuple(d for n in shape for d in (1, n))
    wide = tuple(d for r, n in zip(repeats, shape) for d in (r, n))
    return reshape(make("expand", reshape(x, apart), shape=wide), call.shape)


def _restrided(call: Call, x: Node, *rest: Any) -> Result:
    """unfold, diagonal: the fake tensors tell where the result's elements lie in the operand."""
    source, out = call.fake(0), call.node.meta["val"]
    offset = dim(call.sizes.dim(out.storage_offset()) - call.sizes.dim(source.storage_offset()))
    return make(
        "as_strided", x, shape=call.shape, strides=call.sizes.dims(out.stride()), offset=offset, of=call.sizes.dims(source.stride())
    )


def _as_strided(call: Call, x: Node, *rest: Any) -> Result:
    """as_strided looks at the memory behind views: it is taken of the tensor that owns it. Left to ATen if it might look outside."""
    base = call.raw[0]
    while _is_view(base):
        base = base.args[0]
    source, out = base.meta["val"], call.node.meta["val"]
    owner, sizes = call.lookup(base), call.sizes
    offset = dim(sizes.dim(out.storage_offset()) - sizes.dim(source.storage_offset()))
    strides, of = sizes.dims(out.stride()), sizes.dims(source.stride())
    last, end = dim(offset + _span(call.shape, strides)), _span(owner.shape, of)
    inside = all(isinstance(v, int) for v in (offset, last, end)) and offset >= 0 and last <= end
    return make("as_strided", owner, shape=call.shape, strides=strides, offset=offset, of=of) if inside and owner.dtype == x.dtype else None


def _is_view(node: Any) -> bool:
    return isinstance(node.target, OpOverload) and any(r.alias_info is not None for r in node.target._schema.returns)


def _span(shape: tuple[Dim, ...], strides: tuple[Dim, ...]) -> Dim:
    """How far the last element lies behind the first; negative where there is none."""
    return -1 if 0 in shape else dim(sum((n - 1) * s for n, s in zip(shape, strides)))


def _pad(call: Call, x: Node, pad: tuple[Any, ...], value: Any) -> Result:
    rank = x.tensor.rank
    pairs = [(0, 0)] * (rank - len(pad) // 2) + [(pad[i], pad[i + 1]) for i in range(len(pad) - 2, -1, -2)]
    return make("pad", x, low=tuple(p[0] for p in pairs), high=tuple(p[1] for p in pairs), value=value)


VIEWS: dict[str, Converter] = {
    **{f"aten.{name}.default": _identity for name in ("alias", "detach", "clone", "lift_fresh_copy", "lift_fresh", "lift", "contiguous")},
    **{f"aten.{name}.default": _reshape for name in ("view", "reshape", "_unsafe_view", "_reshape_alias", "unsqueeze", "squeeze")},
    "aten.squeeze.dim": _reshape, "aten.squeeze.dims": _reshape, "aten.flatten.using_ints": _reshape, "aten.unflatten.int": _reshape,
    "aten.t.default": _t, "aten.transpose.int": _transpose, "aten.permute.default": _permute, "aten.expand.default": _expand,
    "aten.slice.Tensor": _slice, "aten.select.int": _select, "aten.unbind.int": _unbind,
    "aten.split.Tensor": _split, "aten.split_with_sizes.default": _split, "aten.chunk.default": _split,
    "aten.unsafe_split.Tensor": _split, "aten.unsafe_split_with_sizes.default": _split,
    "aten.flip.default": _flip, "aten.roll.default": _roll, "aten.repeat.default": _repeat,
    "aten.unfold.default": _restrided, "aten.diagonal.default": _restrided, "aten.as_strided.default": _as_strided,
    "aten.constant_pad_nd.default": _pad,
    "prims.view_of.default": _identity,
}  # fmt: skip

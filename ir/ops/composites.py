"""Composites: ops that high-level passes want to see whole; each `expand`s into the others. Statistics are computed in float32 or wider."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F

from ..dims import Dim, dim, product, same
from ..graph import Node
from ..op import Category, Cost, Op, streaming_cost
from ..types import TensorType, Type, broadcast, compute_dtype, normalize_dim
from .constants import CONSTANTS
from .contractions import CONTRACTIONS
from .gather import GATHERS
from .pointwise import POINTWISE
from .reductions import REDUCTIONS
from .views import VIEWS

_OPS = {op.name: op for op in (*POINTWISE, *REDUCTIONS, *VIEWS, *GATHERS, *CONTRACTIONS, *CONSTANTS)}


def _op(name: str) -> Op:
    return _OPS[name]


def _cast(x: Node, dtype: torch.dtype) -> Node:
    return x if x.dtype == dtype else _op("cast")(x, dtype=dtype)


def _float(x: TensorType) -> None:
    if not x.dtype.is_floating_point:
        raise ValueError("it takes a floating-point tensor")


def _infer_softmax(x: TensorType, *, dim: int) -> Type:
    _float(x)
    normalize_dim(dim, x.rank)
    return x


def _expand_softmax(x: Node, *, dim: int) -> Node:
    wide = _cast(x, compute_dtype(x.dtype))
    if x.tensor.rank == 0:
        return _op("full")(shape=(), value=1.0, dtype=x.dtype, device=x.tensor.device)
    e = _op("exp")(_op("sub")(wide, _op("amax")(wide, dims=(dim,), keepdim=True)))
    return _cast(_op("div")(e, _op("sum")(e, dims=(dim,), keepdim=True)), x.dtype)


def _expand_log_softmax(x: Node, *, dim: int) -> Node:
    wide = _cast(x, compute_dtype(x.dtype))
    shifted = _op("sub")(wide, _op("amax")(wide, dims=(dim,), keepdim=True))
    total = _op("sum")(_op("exp")(shifted), dims=(dim,), keepdim=True)
    return _cast(_op("sub")(shifted, _op("log")(total)), x.dtype)


def _infer_norm(x: TensorType, w: TensorType | None = None, b: TensorType | None = None, *, axes: int = 1, eps: float = 1e-5) -> Type:
    """Normalizes over the last `axes` dimensions; w and b have the shape of those dimensions."""
    _float(x)
    if not 1 <= axes <= x.rank:
        raise ValueError(f"axes must be in 1..{x.rank}")
    for p in (w, b):
        if p is not None and (p.rank != axes or not all(same(a, s) for a, s in zip(p.shape, x.shape[-axes:]))):
            raise ValueError("weight and bias must have the shape of the normalized dimensions")
    return x


def _layer_norm(x: Any, w: Any = None, b: Any = None, *, axes: int, eps: float) -> Any:
    return F.layer_norm(x, x.shape[-axes:], w, b, eps)


def _expand_layer_norm(x: Node, w: Node | None = None, b: Node | None = None, *, axes: int, eps: float) -> Node:
    dims = tuple(range(x.tensor.rank - axes, x.tensor.rank))
    wide = _cast(x, compute_dtype(x.dtype))
    centered = _op("sub")(wide, _op("mean")(wide, dims=dims, keepdim=True))
    variance = _op("mean")(_op("mul")(centered, centered), dims=dims, keepdim=True)
    return _affine(_op("mul")(centered, _op("rsqrt")(_op("add")(variance, eps))), w, b, x.dtype)


def _affine(y: Node, w: Node | None, b: Node | None, dtype: torch.dtype) -> Node:
    """y * w + b in the dtype of y, then cast."""
    if w is not None:
        y = _op("mul")(y, _cast(w, y.dtype))
    if b is not None:
        y = _op("add")(y, _cast(b, y.dtype))
    return _cast(y, dtype)


def _infer_rms_norm(x: TensorType, w: TensorType | None = None, *, axes: int = 1, eps: float = 1e-6) -> Type:
    return _infer_norm(x, w, axes=axes, eps=eps)


def _rms_norm(x: Any, w: Any = None, *, axes: int, eps: float) -> Any:
    return F.rms_norm(x, x.shape[-axes:], w, eps)


def _expand_rms_norm(x: Node, w: Node | None = None, *, axes: int, eps: float) -> Node:
    dims = tuple(range(x.tensor.rank - axes, x.tensor.rank))
    wide = _cast(x, compute_dtype(x.dtype))
    square = _op("mean")(_op("mul")(wide, wide), dims=dims, keepdim=True)
    return _affine(_op("mul")(wide, _op("rsqrt")(_op("add")(square, eps))), w, None, x.dtype)


def _infer_group_norm(x: TensorType, w: TensorType | None = None, b: TensorType | None = None, *, groups: int, eps: float = 1e-5) -> Type:
    """x [n, c, *space]; w, b [c]; c divisible by groups."""
    _float(x)
    if x.rank < 2 or (isinstance(x.shape[1], int) and x.shape[1] % groups):
        raise ValueError("channels must divide into groups")
    return x


def _group_norm(x: Any, w: Any = None, b: Any = None, *, groups: int, eps: float) -> Any:
    return F.group_norm(x, groups, w, b, eps)


def _expand_group_norm(x: Node, w: Node | None = None, b: Node | None = None, *, groups: int, eps: float) -> Node:
    n, c, *space = x.shape
    grouped = _op("reshape")(x, shape=(n, groups, dim(product(space) * c / groups)))
    y = _expand_layer_norm(_cast(grouped, compute_dtype(x.dtype)), axes=1, eps=eps)
    y = _op("reshape")(y, shape=x.shape)
    return _affine(y, _per_channel(w, len(space)), _per_channel(b, len(space)), x.dtype)


def _per_channel(p: Node | None, space: int) -> Node | None:
    return None if p is None else _op("reshape")(p, shape=(p.shape[0], *(1,) * space))


def _infer_batch_norm(
    x: TensorType, mean: TensorType, var: TensorType, w: TensorType | None = None, b: TensorType | None = None, *, eps: float = 1e-5
) -> Type:
    """Evaluation mode: (x - mean) / sqrt(var + eps) * w + b per channel; x [n, c, *space], the rest [c]."""
    _float(x)
    return x


def _batch_norm(x: Any, mean: Any, var: Any, w: Any = None, b: Any = None, *, eps: float) -> Any:
    return F.batch_norm(x, mean, var, w, b, False, 0.0, eps)


def _expand_batch_norm(x: Node, mean: Node, var: Node, w: Node | None = None, b: Node | None = None, *, eps: float) -> Node:
    wide, space = compute_dtype(x.dtype), x.tensor.rank - 2
    scale = _op("rsqrt")(_op("add")(_cast(var, wide), eps))
    scale = scale if w is None else _op("mul")(scale, _cast(w, wide))
    y = _op("mul")(_op("sub")(_cast(x, wide), _per_channel(_cast(mean, wide), space)), _per_channel(scale, space))
    return _affine(y, None, _per_channel(b, space), x.dtype)


def _infer_attention(
    q: TensorType, k: TensorType, v: TensorType, mask: TensorType | None = None, *, causal: bool = False, scale: float
) -> Type:
    """q [..., h, m, d], k [..., g, n, d], v [..., g, n, e] with h a multiple of g (grouped queries) -> [..., h, m, e].

    mask broadcasts to [..., h, m, n]: bool (True = attend) or added to the logits. causal: key position <= query position, both from 0.
    A row with nothing to attend to yields 0 under a bool mask.
    """
    _float(q)
    if not same(q.shape[-1], k.shape[-1]) or not same(k.shape[-2], v.shape[-2]):
        raise ValueError("q and k must agree in their last dimension, k and v in their length")
    return q.with_shape((*broadcast(q.shape[:-3], k.shape[:-3]), *q.shape[-3:-1], v.shape[-1]))


def _attention(q: Any, k: Any, v: Any, mask: Any = None, *, causal: bool, scale: float) -> Any:
    grouped = q.dim() > 2 and q.shape[-3] != k.shape[-3]
    return F.scaled_dot_product_attention(q, k, v, mask, 0.0, causal, scale=scale, enable_gqa=grouped)


def _expand_attention(q: Node, k: Node, v: Node, mask: Node | None = None, *, causal: bool, scale: float) -> Node:
    if q.tensor.rank > 2 and not same(q.shape[-3], k.shape[-3]):
        k, v = (_repeat_heads(t, q.shape[-3]) for t in (k, v))
    rank = k.tensor.rank
    kt = _op("permute")(k, dims=(*range(rank - 2), rank - 1, rank - 2))
    logits = _op("mul")(_op("matmul")(q, kt), scale)
    m, n = q.shape[-2], k.shape[-2]
    if causal:
        rows = _op("reshape")(_op("iota")(length=m, device=q.tensor.device), shape=(m, 1))
        keep = _op("ge")(rows, _op("iota")(length=n, device=q.tensor.device))
        mask = keep if mask is None else _op("logical_and")(mask, keep)
    if mask is not None and mask.dtype == torch.bool:
        logits = _op("where")(mask, logits, -math.inf)
    elif mask is not None:
        logits = _op("add")(logits, mask)
    weights = _expand_softmax(logits, dim=-1)
    if mask is not None and mask.dtype == torch.bool:
        weights = _op("where")(_op("any")(mask, dims=(-1,), keepdim=True), weights, 0.0)
    return _op("matmul")(weights, v)


def _repeat_heads(x: Node, heads: Dim) -> Node:
    *lead, g, n, d = x.shape
    ratio = dim(heads / g) if isinstance(heads, int) and isinstance(g, int) and heads % g == 0 else None
    if ratio is None:
        raise ValueError(f"{heads} query heads do not group over {g} key heads")
    wide = _op("expand")(_op("reshape")(x, shape=(*lead, g, 1, n, d)), shape=(*lead, g, int(heads) // int(g), n, d))
    return _op("reshape")(wide, shape=(*lead, heads, n, d))


def _cost_attention(types: tuple[Any, ...], out: Type, attrs: Any) -> Cost:
    q, k, v = types[:3]
    logits = product(q.shape[:-1]) * k.shape[-2]
    return Cost(dim(2 * logits * (q.shape[-1] + v.shape[-1])), streaming_cost(types, out).bytes)


def _infer_rope(x: TensorType, cos: TensorType, sin: TensorType, *, interleaved: bool = False) -> Type:
    """Rotary position embedding: x * cos + rotate(x) * sin; rotate swaps halves (or neighbours if interleaved), negating the first."""
    broadcast(x.shape, cos.shape, sin.shape)
    return x


def _rope(x: Any, cos: Any, sin: Any, *, interleaved: bool) -> Any:
    if interleaved:
        rotated = torch.stack((-x[..., 1::2], x[..., ::2]), -1).flatten(-2)
    else:
        a, b = x.chunk(2, -1)
        rotated = torch.cat((-b, a), -1)
    return x * cos + rotated * sin


def _expand_rope(x: Node, cos: Node, sin: Node, *, interleaved: bool) -> Node:
    n, d = x.shape[-1], x.tensor.rank - 1
    half = dim(n / 2) if isinstance(n, int) else n // 2
    if interleaved:
        even = _op("slice")(x, dim=d, start=0, stop=n, step=2)
        odd = _op("slice")(x, dim=d, start=1, stop=n, step=2)
        parts = [_op("reshape")(p, shape=(*p.shape, 1)) for p in (_op("neg")(odd), even)]
        rotated = _op("reshape")(_op("cat")(*parts, dim=d + 1), shape=x.shape)
    else:
        a = _op("slice")(x, dim=d, start=0, stop=half)
        b = _op("slice")(x, dim=d, start=half, stop=n)
        rotated = _op("cat")(_op("neg")(b), a, dim=d)
    return _op("add")(_op("mul")(x, cos), _op("mul")(rotated, sin))


COMPOSITES: tuple[Op, ...] = (
    Op("softmax", Category.COMPOSITE, _infer_softmax, lambda x, *, dim: torch.softmax(x, dim), expand=_expand_softmax),
    Op("log_softmax", Category.COMPOSITE, _infer_softmax, lambda x, *, dim: torch.log_softmax(x, dim), expand=_expand_log_softmax),
    Op("layer_norm", Category.COMPOSITE, _infer_norm, _layer_norm, expand=_expand_layer_norm),
    Op("rms_norm", Category.COMPOSITE, _infer_rms_norm, _rms_norm, expand=_expand_rms_norm),
    Op("group_norm", Category.COMPOSITE, _infer_group_norm, _group_norm, expand=_expand_group_norm),
    Op("batch_norm", Category.COMPOSITE, _infer_batch_norm, _batch_norm, expand=_expand_batch_norm),
    Op("attention", Category.COMPOSITE, _infer_attention, _attention, _cost_attention, expand=_expand_attention),
    Op("rope", Category.COMPOSITE, _infer_rope, _rope, expand=_expand_rope),
)

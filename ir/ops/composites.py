"""Composites: ops that high-level passes want to see whole; each `expand`s into the others.

Statistics are computed in float32 or wider, whatever the storage; attention also multiplies there, as eager's reference path does.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F

from ..dims import Dim, dim, floordiv, product, same
from ..graph import Node
from ..op import Category, Cost, Op, streaming_cost
from ..types import TensorType, Type, broadcast, compute_dtype, normalize_dim, one_device, promote
from .constants import CONSTANTS
from .contractions import CONTRACTIONS
from .gathers import GATHERS
from .pointwise import POINTWISE, check_native
from .reductions import REDUCTIONS
from .views import VIEWS

_OPS = {op.name: op for op in (*POINTWISE, *REDUCTIONS, *VIEWS, *GATHERS, *CONTRACTIONS, *CONSTANTS)}


def _op(name: str) -> Op:
    return _OPS[name]


def _cast(x: Node, dtype: torch.dtype) -> Node:
    return x if x.dtype == dtype else _op("cast")(x, dtype=dtype)


def _float(x: TensorType) -> None:
    check_native(x)
    if not x.dtype.is_floating_point:
        raise ValueError("it takes a floating-point tensor")


def _parameters(x: TensorType, *parameters: TensorType | None) -> None:
    """Weights, biases and statistics have x's dtype, or all of them float32 beside a 16-bit x."""
    given = [p for p in parameters if p is not None]
    dtypes = {p.dtype for p in given}
    if dtypes - {x.dtype} and (dtypes != {torch.float32} or x.dtype.itemsize != 2):
        raise ValueError(f"{', '.join(str(d) for d in sorted(dtypes, key=str))} parameters do not go with {x.dtype}")
    one_device(x, *given)


def _infer_softmax(x: TensorType, *, dim: int) -> Type:
    _float(x)
    normalize_dim(dim, x.rank)
    return x


def _is_empty(x: Node) -> bool:
    return any(same(d, 0) for d in x.shape)


def _expand_softmax(x: Node, *, dim: int) -> Node:
    if _is_empty(x):
        return x
    wide = _cast(x, compute_dtype(x.dtype))
    e = _op("exp")(_op("sub")(wide, _op("amax")(wide, dims=(dim,), keepdim=True)))
    share = _op("reciprocal")(_op("sum")(e, dims=(dim,), keepdim=True))  # one division a row, of a sum that is at least 1
    return _cast(_op("mul")(e, share), x.dtype)


def _expand_log_softmax(x: Node, *, dim: int) -> Node:
    if _is_empty(x):
        return x
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
    _parameters(x, w, b)
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
    _check_channels(x, w, b)
    channels = x.shape[1]
    if not isinstance(channels, int) or groups < 1 or channels % groups:
        raise ValueError(f"{channels} channels do not divide into {groups} groups")
    _parameters(x, w, b)
    return x


def _check_channels(x: TensorType, *parameters: TensorType | None) -> None:
    if x.rank < 2:
        raise ValueError("it takes a tensor with batch and channel dimensions")
    for p in parameters:
        if p is not None and (p.rank != 1 or not same(p.shape[0], x.shape[1])):
            raise ValueError(f"{p} does not have one entry for each of the {x.shape[1]} channels")


def _group_norm(x: Any, w: Any = None, b: Any = None, *, groups: int, eps: float) -> Any:
    return F.group_norm(x, groups, w, b, eps)


def _expand_group_norm(x: Node, w: Node | None = None, b: Node | None = None, *, groups: int, eps: float) -> Node:
    n, c, *space = x.shape
    grouped = _op("reshape")(x, shape=(n, groups, dim(product(space) * (c // groups))))
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
    _check_channels(x, mean, var, w, b)
    _parameters(x, mean, var, w, b)
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
    q: TensorType, k: TensorType, v: TensorType, mask: TensorType | None = None, *, causal: bool = False, scale: float,
    weights: str = "softmax",
) -> Type:  # fmt: skip
    """q [..., h, m, d], k [..., g, n, d], v [..., g, n, e] with h a multiple of g (grouped queries) -> [..., h, m, e].

    mask broadcasts to [..., h, m, n]: bool (True = attend) or added to the logits. causal: key position <= query position, both from 0.
    A row with nothing to attend to (all False, all -inf, or no keys) yields 0. weights: softmax of the logits over the keys, or the
    sigmoid of each (Ramapuram et al., Theory, Analysis, and Best Practices for Sigmoid Self-Attention, 2024).
    """
    _float(q)
    if weights not in ("softmax", "sigmoid"):
        raise ValueError(f"weights are by softmax or by sigmoid, not by {weights}")
    if q.dtype != k.dtype or q.dtype != v.dtype:
        raise ValueError("q, k and v must have one dtype")
    if not 2 <= q.rank == k.rank == v.rank:
        raise ValueError("q, k and v must have the same rank, at least 2")
    if not same(q.shape[-1], k.shape[-1]) or not same(k.shape[-2], v.shape[-2]):
        raise ValueError("q and k must agree in their last dimension, k and v in their length")
    lead = (*broadcast(q.shape[:-3], k.shape[:-3], v.shape[:-3]), *_check_heads(q, k, v))
    _check_mask(mask, q.dtype, (*lead, q.shape[-2], k.shape[-2]))
    one_device(q, k, v, *([mask] if mask else []))
    return q.with_shape((*lead, q.shape[-2], v.shape[-1]))


def _check_heads(q: TensorType, k: TensorType, v: TensorType) -> tuple[Dim, ...]:
    """(h,), or () for a single head without dimension."""
    if q.rank == 2:
        return ()
    h, g = q.shape[-3], k.shape[-3]
    if not same(g, v.shape[-3]):
        raise ValueError("k and v must have the same number of heads")
    if not same(h, g) and not (isinstance(h, int) and isinstance(g, int) and g and h % g == 0):
        raise ValueError(f"{h} query heads do not group over {g} key heads")
    return (h,)


def _check_mask(mask: TensorType | None, dtype: torch.dtype, logits: tuple[Dim, ...]) -> None:
    if mask is None:
        return
    if mask.dtype not in (torch.bool, torch.float32, dtype):
        raise ValueError(f"the mask must be bool, float32 or {dtype}")
    if len(broadcast(mask.shape, logits)) != len(logits):
        raise ValueError(f"{mask} has more dimensions than the logits")


def _attention(q: Any, k: Any, v: Any, mask: Any = None, *, causal: bool, scale: float, weights: str) -> Any:
    if weights == "sigmoid":
        return _sigmoid_attention(q, k, v, mask, causal, scale)
    grouped = q.dim() > 2 and q.shape[-3] != k.shape[-3]
    if causal and mask is not None:
        keep = torch.ones(q.shape[-2], k.shape[-2], dtype=torch.bool, device=q.device).tril()
        mask = mask & keep if mask.dtype == torch.bool else mask.masked_fill(~keep, -math.inf)
        causal = False
    if mask is not None and mask.dtype == torch.float32 and q.dtype == torch.float64:
        mask = mask.double()
    return F.scaled_dot_product_attention(q, k, v, mask, 0.0, causal, scale=scale, enable_gqa=grouped)


def _sigmoid_attention(q: Any, k: Any, v: Any, mask: Any, causal: bool, scale: float) -> Any:
    wide = compute_dtype(q.dtype)
    if q.dim() > 2:
        k, v = (t.repeat_interleave(q.shape[-3] // t.shape[-3], -3) if t.shape[-3] != q.shape[-3] else t for t in (k, v))
    logits = masked_logits((q.to(wide) @ k.to(wide).mT) * scale, mask, causal)
    return (logits.sigmoid() @ v.to(wide)).to(q.dtype)


def masked_logits(logits: Any, mask: Any, causal: bool) -> Any:
    """The meaning of `attention_scores`, from scaled products on."""
    if causal:
        logits = logits.masked_fill(~torch.ones(logits.shape[-2:], dtype=torch.bool, device=logits.device).tril(), -math.inf)
    if mask is None:
        return logits
    return torch.where(mask, logits, -math.inf) if mask.dtype == torch.bool else logits + mask.to(logits.dtype)


def _expand_attention(q: Node, k: Node, v: Node, mask: Node | None = None, *, causal: bool, scale: float, weights: str) -> Node:
    out = q.tensor.with_shape(_infer_attention(*(t.tensor for t in (q, k, v)), causal=causal, scale=scale).shape)  # type: ignore[union-attr]
    if same(k.shape[-2], 0):
        return _op("full")(shape=out.shape, value=0.0, dtype=q.dtype, device=out.device)
    if q.tensor.rank > 2 and not same(q.shape[-3], k.shape[-3]):
        k, v = (repeat_heads(t, q.shape[-3]) for t in (k, v))
    wide = compute_dtype(q.dtype)
    logits = attention_scores(_op("matmul")(_cast(q, wide), transposed(_cast(k, wide))), mask, causal=causal, scale=scale)
    shares = _op("sigmoid")(logits) if weights == "sigmoid" else _expand_softmax(logits, dim=-1)
    if mask is not None and weights == "softmax":
        nothing = _op("eq")(_op("amax")(logits, dims=(-1,), keepdim=True), -math.inf)
        shares = _op("where")(nothing, 0.0, shares)
    return _cast(_op("matmul")(shares, _cast(v, wide)), q.dtype)


def transposed(x: Node) -> Node:
    """x with its last two dimensions swapped."""
    rank = x.tensor.rank
    return _op("permute")(x, dims=(*range(rank - 2), rank - 1, rank - 2))


def attention_scores(product: Node, mask: Node | None = None, *, causal: bool, scale: float) -> Node:
    """What an attention takes the softmax or sigmoid of, from q @ k^T: scaled; -inf where a bool mask is False or, if causal, where the
    key comes after the query; other masks are added.
    """
    logits = _op("mul")(product, scale)
    if causal:
        m, n = logits.shape[-2:]
        device = logits.tensor.device
        rows = _op("reshape")(_op("iota")(length=m, device=device), shape=(m, 1))
        keep = _op("ge")(rows, _op("iota")(length=n, device=device))
        logits = _op("where")(keep, logits, -math.inf)
    if mask is None:
        return logits
    if mask.dtype == torch.bool:
        return _op("where")(mask, logits, -math.inf)
    return _op("add")(logits, _cast(mask, logits.dtype))


def repeat_heads(x: Node, heads: Dim) -> Node:
    """Each of the g heads `heads / g` times in a row."""
    *lead, g, n, d = x.shape
    wide = _op("expand")(_op("reshape")(x, shape=(*lead, g, 1, n, d)), shape=(*lead, g, heads // g, n, d))
    return _op("reshape")(wide, shape=(*lead, heads, n, d))


def _cost_attention(types: tuple[Any, ...], out: Type, attrs: Any) -> Cost:
    q, k, v = types[:3]
    logits = product(q.shape[:-1]) * k.shape[-2]
    return Cost(dim(logits * (2 * (q.shape[-1] + v.shape[-1]) + 14)), streaming_cost(types, out).bytes)


def _infer_rope(x: TensorType, cos: TensorType, sin: TensorType, *, interleaved: bool = False) -> Type:
    """Rotary position embedding: x * cos + rotate(x) * sin; rotate swaps halves (or neighbours if interleaved), negating the first."""
    _float(x)
    if not x.rank or isinstance(x.shape[-1], int) and x.shape[-1] % 2:
        raise ValueError("the last dimension must be even")
    return TensorType(promote(x, cos, sin), broadcast(x.shape, cos.shape, sin.shape), one_device(x, cos, sin))


def _rope(x: Any, cos: Any, sin: Any, *, interleaved: bool) -> Any:
    if interleaved:
        rotated = torch.stack((-x[..., 1::2], x[..., ::2]), -1).flatten(-2)
    else:
        a, b = x.chunk(2, -1)
        rotated = torch.cat((-b, a), -1)
    return x * cos + rotated * sin


def _expand_rope(x: Node, cos: Node, sin: Node, *, interleaved: bool) -> Node:
    n, d = x.shape[-1], x.tensor.rank - 1
    half = floordiv(n, 2)
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


def _cost(flops_per_element: int) -> Any:
    return lambda types, out, attrs: streaming_cost(types, out, flops_per_element)


# name, types, torch meaning, cost, expansion
COMPOSITES: tuple[Op, ...] = tuple(
    Op(name, Category.COMPOSITE, infer, eager, cost, expand=expand)
    for name, infer, eager, cost, expand in (
        ("softmax", _infer_softmax, lambda x, *, dim: torch.softmax(x, dim), _cost(14), _expand_softmax),
        ("log_softmax", _infer_softmax, lambda x, *, dim: torch.log_softmax(x, dim), _cost(14), _expand_log_softmax),
        ("layer_norm", _infer_norm, _layer_norm, _cost(8), _expand_layer_norm),
        ("rms_norm", _infer_rms_norm, _rms_norm, _cost(5), _expand_rms_norm),
        ("group_norm", _infer_group_norm, _group_norm, _cost(8), _expand_group_norm),
        ("batch_norm", _infer_batch_norm, _batch_norm, _cost(4), _expand_batch_norm),
        ("attention", _infer_attention, _attention, _cost_attention, _expand_attention),
        ("rope", _infer_rope, _rope, _cost(4), _expand_rope),
    )
)

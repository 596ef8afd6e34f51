"""The gradients of an attention, by recomputing its weights from the logarithms of their sums (FlashAttention-2, Dao 2023, section 3.1.2).

weights = exp(scores - logsumexp)               [.., h, m, n], 0 where masked
moved   = weights * (grad @ v^T - delta)        delta = sum of grad * out over the columns: [.., h, m]
gradient of q = scale * moved @ k;    of k = scale * moved^T @ q;    of v = weights^T @ grad
"""

from __future__ import annotations

import math
from typing import Any

import torch

from ..dims import dim, product, same, same_shape
from ..graph import Node
from ..op import Category, Cost, Op, streaming_cost
from ..types import TensorType, Type, compute_dtype, one_device
from .composites import COMPOSITES, attention_scores, masked_logits, repeat_heads, transposed
from .contractions import CONTRACTIONS
from .pointwise import POINTWISE
from .views import VIEWS

OF = ("query", "key", "value")

_OPS = {op.name: op for op in (*POINTWISE, *VIEWS, *CONTRACTIONS)}
_ATTENTION = next(op for op in COMPOSITES if op.name == "attention")


def _infer(
    grad: TensorType, q: TensorType, k: TensorType, v: TensorType, logsumexp: TensorType, delta: TensorType, mask: TensorType | None = None,
    *, of: str, causal: bool = False, scale: float,
) -> Type:  # fmt: skip
    """Of softmax attention over q [.., h, m, d], k [.., g, n, d], v [.., g, n, e], whose result has the gradient grad [.., h, m, e].

    logsumexp, delta: [.., h, m] in compute dtype, as said above; a row without keys has -inf or inf. of: "query" gives [.., h, m, d];
    "key" and "value" give [.., h, n, d or e], of each query head: where heads share keys their sum is to follow, and they are in compute
    dtype for it. mask and causal as of the attention.
    """
    if of not in OF:
        raise ValueError(f"gradients are of query, key or value, not of {of}")
    out = _ATTENTION.infer(q, k, v, *([] if mask is None else [mask]), causal=causal, scale=scale)
    assert isinstance(out, TensorType)
    if grad.dtype != q.dtype or not same_shape(grad.shape, out.shape):
        raise ValueError(f"the gradient {grad} is not like the result {out}")
    if not (
        same_shape(q.shape[:-2], out.shape[:-2]) and same_shape(k.shape[:-3], out.shape[:-3]) and same_shape(v.shape[:-3], out.shape[:-3])
    ):
        raise ValueError("its operands must have the batch of the result")
    for rows in (logsumexp, delta):
        if rows.dtype != compute_dtype(q.dtype) or not same_shape(rows.shape, out.shape[:-1]):
            raise ValueError(f"{rows} does not have a number of {compute_dtype(q.dtype)} for each row of the result")
    one_device(q, grad, logsumexp, delta)
    if of == "query":
        return q
    dtype = q.dtype if same_shape(k.shape[:-2], q.shape[:-2]) else compute_dtype(q.dtype)
    return TensorType(dtype, (*out.shape[:-2], *(k if of == "key" else v).shape[-2:]), q.device)


def _eager(
    grad: Any, q: Any, k: Any, v: Any, logsumexp: Any, delta: Any, mask: Any = None, *, of: str, causal: bool, scale: float
) -> Any:  # fmt: skip
    wide = compute_dtype(q.dtype)
    shared = q.dim() > 2 and q.shape[-3] != k.shape[-3]
    dtype = wide if shared and of != "query" else q.dtype
    grad, q, k, v = (t.to(wide) for t in (grad, q, k, v))
    if shared:
        k, v = (t.repeat_interleave(q.shape[-3] // t.shape[-3], -3) for t in (k, v))
    logits = masked_logits((q @ k.mT) * scale, mask, causal)
    weights = (logits - torch.where(logsumexp == -math.inf, 0, logsumexp).unsqueeze(-1)).exp()
    if of == "value":
        return (weights.mT @ grad).to(dtype)
    moved = weights * (grad @ v.mT - delta.unsqueeze(-1))
    return ((moved @ k if of == "query" else moved.mT @ q) * scale).to(dtype)


def _expand(
    grad: Node, q: Node, k: Node, v: Node, logsumexp: Node, delta: Node, mask: Node | None = None, *, of: str, causal: bool, scale: float
) -> Node:  # fmt: skip
    wide = compute_dtype(q.dtype)
    shared = q.tensor.rank > 2 and not same(q.shape[-3], k.shape[-3])
    dtype = wide if shared and of != "query" else q.dtype
    grad, q, k, v = (t if t.dtype == wide else _OPS["cast"](t, dtype=wide) for t in (grad, q, k, v))
    if shared:
        k, v = (repeat_heads(t, q.shape[-3]) for t in (k, v))
    matmul = _OPS["matmul"]
    moved = None if of == "value" else matmul(grad, transposed(v))
    weights = gradient_weights(matmul(q, transposed(k)), moved, logsumexp, delta, mask, causal=causal, scale=scale)
    if of == "value":
        made = matmul(transposed(weights), grad)
    else:
        made = _OPS["mul"](matmul(weights, k) if of == "query" else matmul(transposed(weights), q), scale)
    return made if made.dtype == dtype else _OPS["cast"](made, dtype=dtype)


def gradient_weights(
    scores: Node, moved: Node | None, logsumexp: Node, delta: Node, mask: Node | None = None, *, causal: bool, scale: float
) -> Node:
    """The weights from q @ k^T; times `moved - delta` if it is given, which is grad @ v^T."""
    logits = attention_scores(scores, mask, causal=causal, scale=scale)
    base = _OPS["where"](_OPS["eq"](logsumexp, -math.inf), 0.0, logsumexp)  # of a row without keys, whose logits are -inf
    weights = _OPS["exp"](_OPS["sub"](logits, _column(base)))
    return weights if moved is None else _OPS["mul"](weights, _OPS["sub"](moved, _column(delta)))


def _column(rows: Node) -> Node:
    return _OPS["reshape"](rows, shape=(*rows.shape, 1))


def _cost(types: tuple[Any, ...], out: Type, attrs: Any) -> Cost:
    _, q, k, v = types[:4]
    logits = product(q.shape[:-1]) * k.shape[-2]
    products = 4 * q.shape[-1] + 2 * v.shape[-1] if attrs["of"] != "value" else 2 * (q.shape[-1] + v.shape[-1])
    return Cost(dim(logits * (products + 14)), streaming_cost(types, out).bytes)


ATTENTION_GRADIENTS: tuple[Op, ...] = (Op("attention_gradient", Category.COMPOSITE, _infer, _eager, _cost, expand=_expand),)

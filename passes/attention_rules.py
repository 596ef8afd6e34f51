"""Rules of `recognize` for attention: matmul, scale, masks and biases, softmax or sigmoid, matmul."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace

import torch

from ..ir.dims import product, same, same_shape
from ..ir.errors import TypeInferenceError
from ..ir.graph import Node
from ..ir.ops import OPS
from ..ir.patterns import Refusal, Var, pat
from ..ir.reasons import Reason
from ..ir.rules import Match, Rule, pattern_rule
from ..ir.types import ScalarType, TensorType, same_type
from .attentions import WALKED, attention_refusal
from .facts import device_type, literal
from .weights import value_of

MOST_LAYERS = 4
"""Of masks and biases on one product."""

_FAR_BELOW = -1e30
"""Added to a logit, it leaves nothing of it: exp(logit + fill - max) is 0 beside any attended key."""


@dataclass(frozen=True)
class _Parts:
    """The operands of an attention under construction; `inner` are the nodes it swallows."""

    product: Node
    weights: str = "softmax"
    scale: float = 1.0
    mask: Node | None = None
    causal: bool = False
    inner: tuple[Node, ...] = field(default=())


def _attends(m: Match) -> bool | Refusal:
    found = _analyse(m)
    if isinstance(found, Refusal):
        return found
    shared = m.escaping(*found.inner)
    if shared is not None:
        return Refusal(Reason.SHARED, shared)
    made = _build(found, m["v"])
    if made is None or not same_type(made.type, m.root.type):
        return Refusal(Reason.SHAPE_MISMATCH, m.root)
    return found.weights == "softmax" or _is_kernel(made)


def _is_kernel(attention: Node) -> bool | Refusal:
    """No library has a sigmoid attention: as one op it is a kernel of ours, or nothing is gained."""
    if device_type(attention) not in WALKED:
        return Refusal(Reason.OTHER_DEVICE, attention)
    refusal = attention_refusal(attention)
    return True if refusal is None else Refusal(refusal.reason, refusal.value)


def _rewritten(m: Match) -> Node:
    found = _analyse(m)
    made = None if isinstance(found, Refusal) else _build(found, m["v"])
    assert made is not None, "the check has built it before"
    return made


def _analyse(m: Match) -> _Parts | Refusal:
    logits, last, weights = m["logits"], m["logits"].tensor.rank - 1, m["p"].op.name
    if last < 2 or m["p"].attrs.get("dim", last) not in (last, -1):
        return Refusal(Reason.SHAPE_MISMATCH, m["p"])
    parts = _masked(logits, weights)
    if isinstance(parts, Refusal):
        return parts
    if parts.product.op.name != "matmul":
        return Refusal(Reason.SHAPE_MISMATCH, parts.product)
    if not same_shape(parts.product.shape, logits.shape) or parts.product.dtype != logits.dtype:
        return Refusal(Reason.SHAPE_MISMATCH, parts.mask)
    return parts


# -- from the softmax down to the product


def _masked(logits: Node, weights: str, layers: int = MOST_LAYERS) -> _Parts | Refusal:
    """The masks and biases, the last one first, then the scale, then the product."""
    parts = _scaled(logits, weights)
    if parts is not None:
        return parts
    if layers == 0 or logits.op.name not in _LAYERS:
        return Refusal(Reason.SHAPE_MISMATCH, logits)
    return _LAYERS[logits.op.name](logits, weights, layers - 1)


def _apart(logits: Node, weights: str, layers: int) -> _Parts | Refusal:
    """reshape(.. reshape(product: [b, h, m, n], [b * h, m, n]) .., [b, h, m, n]): heads were beside the batch for a while, as in BLOOM."""
    parts = _masked(logits.inputs[0], weights, layers)
    if isinstance(parts, Refusal):
        return parts
    view, mask = parts.product, parts.mask
    if view.op.name != "reshape" or not same_shape(view.inputs[0].shape, logits.shape):
        return Refusal(Reason.SHAPE_MISMATCH, logits)
    if mask is not None and same_shape(mask.shape[:-2], view.shape[:-2]):
        mask = OPS["reshape"](mask, shape=(*logits.shape[:-2], *mask.shape[-2:]))
    elif mask is not None and mask.tensor.rank > 2:
        return Refusal(Reason.SHAPE_MISMATCH, mask)
    return replace(parts, product=view.inputs[0], mask=mask, inner=(*parts.inner, logits))


def _keeps_rows(view: Node) -> bool:
    """Only the dimensions in front of the last two differ."""
    return view.inputs[0].tensor.rank > 1 < view.tensor.rank and same_shape(view.shape[-2:], view.inputs[0].shape[-2:])


def _sum(logits: Node, weights: str, layers: int) -> _Parts | Refusal:
    for value, mask in (logits.inputs, logits.inputs[::-1]):
        parts = None if isinstance(value.type, ScalarType) else _masked(value, weights, layers)
        if isinstance(parts, _Parts):
            return _added_mask(logits, parts, mask)
    return Refusal(Reason.SHAPE_MISMATCH, logits)


def _scaled(node: Node, weights: str) -> _Parts | None:
    """matmul(q, kt), times or divided by numbers; or a view of it that joins heads and batch."""
    scale, inner = 1.0, []
    while node.op.name in ("mul", "div"):
        number = _factor(node)
        if number is None:
            return None
        scale *= number
        inner.append(node)
        node = node.inputs[0]
    if node.op.name == "reshape" and node.inputs[0].op.name == "matmul" and _keeps_rows(node):
        return _Parts(node, weights, scale, inner=(*inner, node, node.inputs[0]))
    return _Parts(node, weights, scale, inner=(*inner, node)) if node.op.name == "matmul" else None


def _factor(node: Node) -> float | None:
    """What a product or quotient by a number multiplies its first operand with."""
    x, by = node.inputs
    number = literal(by)
    if isinstance(x.type, ScalarType) or x.dtype != node.dtype or not isinstance(number, (int, float)) or number == 0:
        return None
    if not same_shape(x.shape, node.shape):
        return None
    return float(number) if node.op.name == "mul" else 1.0 / number


def _added_mask(logits: Node, parts: _Parts, mask: Node) -> _Parts | Refusal:
    inner, number, like = (*parts.inner, logits), literal(mask), parts.product.tensor
    if isinstance(number, (int, float)):
        mask = OPS["full"](shape=(1, 1), value=float(number), dtype=like.dtype, device=like.device)
    if isinstance(mask.type, ScalarType) or mask.tensor.rank < 2 or mask.dtype != like.dtype:
        return Refusal(Reason.SHAPE_MISMATCH, mask)
    return replace(parts, mask=mask if parts.mask is None else OPS["add"](_as_bias(parts.mask, like), mask), inner=inner)


def _where_mask(node: Node, weights: str, layers: int) -> _Parts | Refusal:
    """where(keep, logits, fill) or where(drop, fill, logits)."""
    condition, a, b = node.inputs
    for value, fill, keep in ((a, b, True), (b, a, False)):
        number = literal(fill)
        if isinstance(value.type, ScalarType) or not isinstance(number, (int, float)) or number > _FAR_BELOW:
            continue
        parts = _masked(value, weights, layers)
        if isinstance(parts, _Parts):
            return _filled(node, parts, condition, float(number), keep)
    return Refusal(Reason.SHAPE_MISMATCH, node)


_LAYERS = {"where": _where_mask, "add": _sum, "reshape": _apart}


def _as_bias(mask: Node, like: TensorType) -> Node:
    """What a mask adds to the logits."""
    return mask if mask.dtype != torch.bool else _biased(mask, None, -math.inf, like)


def _biased(keep: Node, bias: Node | None, fill: float, like: TensorType) -> Node:
    """`bias` (0) where `keep`, else `fill`."""
    nothing, low = (OPS["full"](shape=(), value=v, dtype=like.dtype, device=like.device) for v in (0.0, fill))
    return OPS["where"](keep, nothing if bias is None else bias, low)


def _filled(node: Node, parts: _Parts, condition: Node, fill: float, keep: bool) -> _Parts | Refusal:
    inner = (*parts.inner, node)
    attended = condition if keep else OPS["logical_not"](condition)
    sigmoid = parts.weights == "sigmoid"
    if is_causal(attended) and (sigmoid or parts.mask is None or _masks_nothing(parts.mask)):
        return replace(parts, causal=True, inner=inner)
    if math.isinf(fill) and not sigmoid:
        return Refusal(Reason.NOT_FINITE, "a row that is masked everywhere yields NaN, as one op it would yield 0")
    if condition.tensor.rank < 2:
        return Refusal(Reason.SHAPE_MISMATCH, condition)
    like = parts.product.tensor
    if sigmoid:  # of what is far below it is 0
        bias = None if parts.mask is None else _as_bias(parts.mask, like)
        return replace(parts, mask=attended if bias is None else _biased(attended, bias, -math.inf, like), inner=inner)
    return replace(parts, mask=_biased(attended, parts.mask, fill, like), inner=inner)


def _masks_nothing(bias: Node) -> bool:
    """The bias is made of positions and of numbers that are the same for all keys (the slopes of ALiBi): it leaves every key in account."""
    stack = [bias]
    while stack:
        node = stack.pop()
        shape: tuple[object, ...] = getattr(node.type, "shape", ())
        number = literal(node)
        if isinstance(number, (int, float)):
            if abs(number) >= -_FAR_BELOW:
                return False
        elif node.op.name != "iota" and not all(same(d, 1) for d in shape[-2:]):  # type: ignore[arg-type]
            if node.op.name not in _OF_POSITIONS and not _is_moderate(node):
                return False
            stack.extend(node.inputs)
    return True


_OF_POSITIONS = frozenset({"add", "sub", "mul", "neg", "abs", "minimum", "maximum", "cast", "reshape", "expand", "permute", "slice"})


def _is_moderate(node: Node) -> bool:
    value = value_of(node)
    return value is not None and bool((value.abs() < -_FAR_BELOW).all())


_MIRRORED = {"le": "ge", "lt": "gt", "ge": "le", "gt": "lt"}
_NEGATED = {"le": "gt", "lt": "ge", "ge": "lt", "gt": "le"}


def is_causal(keep: Node) -> bool:
    """`keep` is True exactly where key position <= query position, both counted from 0."""
    value = value_of(keep)
    if value is not None:
        return value.dtype == torch.bool and _lower_triangle(value)
    if keep.op.name == "logical_not":
        (compared,) = keep.inputs
        return compared.op.name in _NEGATED and _orders(_NEGATED[compared.op.name], *compared.inputs)
    return keep.op.name in _MIRRORED and _orders(keep.op.name, *keep.inputs)


def _orders(op: str, a: Node, b: Node) -> bool:
    """`a op b` says that the key comes no later than the query."""
    if op in ("le", "lt"):
        op, a, b = _MIRRORED[op], b, a
    if a.op.name == "sub":  # query - key >= 0, > -1
        return literal(b) == (0 if op == "ge" else -1) and _counts(a.inputs[0], 2) and _counts(a.inputs[1], 1)
    if b.op.name == "sub":  # 0 >= key - query, 1 > key - query
        return literal(a) == (0 if op == "ge" else 1) and _counts(b.inputs[0], 1) and _counts(b.inputs[1], 2)
    return op == "ge" and _counts(a, 2) and _counts(b, 1)


def _counts(node: Node, axis: int) -> bool:
    """0, 1, 2, ... along the last (1) or last but one (2) dimension."""
    shape: tuple[object, ...] = getattr(node.type, "shape", ())
    while node.op.name in ("reshape", "cast") and node.inputs:
        node = node.inputs[0]
    counted = node.op.name == "iota" and node.attrs["start"] == 0 and node.attrs["step"] == 1
    return counted and len(shape) >= axis and same(shape[-axis], node.shape[0])  # type: ignore[arg-type]


def _lower_triangle(value: torch.Tensor) -> bool:
    """Every [m, n] slice is True on and below its diagonal, False above."""
    if value.dim() < 2 or not value.numel():
        return False
    return torch.equal(value, torch.ones(value.shape[-2:], dtype=torch.bool, device=value.device).tril().expand(value.shape))


# -- operands


def _build(parts: _Parts, v: Node) -> Node | None:
    """The attention node, or None where the operands do not fit."""
    q, kt = parts.product.inputs
    q, q_scale = _unscaled(q)
    kt, outer = _unscaled(kt)
    k, k_scale = _unscaled(_transposed(kt))
    if q.tensor.rank < 3 or not q.tensor.rank == k.tensor.rank == v.tensor.rank:
        return None
    few_k, few_v = _ungrouped(k), _ungrouped(v)
    if few_k is not None and few_v is not None and same(few_k.shape[-3], few_v.shape[-3]):
        k, v = few_k, few_v
    if not same(k.shape[-3], v.shape[-3]) or not q.dtype == k.dtype == v.dtype:
        return None
    heads, groups = q.shape[-3], k.shape[-3]
    if not same(heads, groups) and not (isinstance(heads, int) and isinstance(groups, int) and groups and heads % groups == 0):
        return None
    operands = (q, k, v) if parts.mask is None else (q, k, v, parts.mask)
    try:
        scale = parts.scale * q_scale * outer * k_scale
        return OPS["attention"](*operands, causal=parts.causal, scale=scale, weights=parts.weights)
    except TypeInferenceError:
        return None


def _unscaled(node: Node) -> tuple[Node, float]:
    """x and s for x * s."""
    scale = 1.0
    while node.op.name in ("mul", "div"):
        number = _factor(node)
        if number is None:
            break
        scale, node = scale * number, node.inputs[0]
    return node, scale


def _transposed(kt: Node) -> Node:
    """kt with its last two dimensions swapped, as one view of what kt views."""
    rank = kt.tensor.rank
    dims = (*range(rank - 2), rank - 1, rank - 2)
    if kt.op.name != "permute":
        return OPS["permute"](kt, dims=dims)
    composed = tuple(kt.attrs["dims"][d] for d in dims)
    return kt.inputs[0] if composed == tuple(range(rank)) else OPS["permute"](kt.inputs[0], dims=composed)


def _ungrouped(x: Node) -> Node | None:
    """The g key heads of reshape(expand(reshape(x: [b, g, n, d], [b, g, 1, n, d]), [b, g, r, n, d]), [b, g * r, n, d])."""
    if x.op.name != "reshape" or x.inputs[0].op.name != "expand":
        return None
    wide = x.inputs[0]
    source = wide.inputs[0]
    *lead, g, r, n, d = wide.shape if wide.tensor.rank > 3 else (0, 0, 0, 0)
    if wide.tensor.rank != x.tensor.rank + 1 or not same_shape(source.shape, (*lead, g, 1, n, d)):
        return None
    if not same_shape(x.shape, (*lead, product((g, r)), n, d)):
        return None
    few = (*lead, g, n, d)
    direct = source.op.name == "reshape" and same_shape(source.inputs[0].shape, few)
    return source.inputs[0] if direct else OPS["reshape"](source, shape=few)


# -- masks that say something simpler


def _attended(mask: Node) -> torch.Tensor | None:
    """Where a constant mask lets attend, if it says nothing but that."""
    value = value_of(mask)
    if value is None or value.dtype == torch.bool:
        return value
    return value == 0 if bool((value[value != 0] <= _FAR_BELOW).all()) else None


def _attends_all(m: Match) -> bool | Refusal:
    keep = _attended(m["mask"])
    return keep is not None and bool(keep.all()) or Refusal(Reason.NOT_CONSTANT, m["mask"])


def _attends_causally(m: Match) -> bool | Refusal:
    keep = _attended(m["mask"])
    logits = (m["q"].shape[-2], m["k"].shape[-2])
    causal = keep is not None and tuple(keep.shape[-2:]) == logits and _lower_triangle(keep)
    return causal or is_causal(m["mask"]) or Refusal(Reason.NOT_CONSTANT, m["mask"])


def _without_mask(causal: bool) -> Callable[[Match], Node]:
    def rewrite(m: Match) -> Node:
        attrs = m.root.attrs
        return OPS["attention"](m["q"], m["k"], m["v"], **{**attrs, "causal": causal or attrs["causal"]})

    return rewrite


_WEIGHED = pat("matmul", pat(("softmax", "sigmoid"), Var("logits"), name="p"), Var("v"))
_MASKED = pat("attention", Var("q"), Var("k"), Var("v"), Var("mask"))

ATTENTION_RULES: list[Rule] = [
    pattern_rule("recognize.no-mask", _MASKED, _without_mask(False), _attends_all),
    pattern_rule("recognize.causal-mask", _MASKED, _without_mask(True), _attends_causally),
    pattern_rule("recognize.attention", _WEIGHED, _rewritten, _attends),
]

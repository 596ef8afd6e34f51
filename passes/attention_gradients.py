"""Rules of `recognize` for the backward of attention: a call of torch becomes the gradients of our op, where these are kernels.

    g = extern[aten._scaled_dot_product_*_backward](grad, q, k, v, out, lse, ..)
    dk = item(g, index=1)
    -->
    delta = sum(mul(grad, out), dims=[-1])
    dk = attention_gradient(grad, q, k, v, lse, delta, of="key")

Where heads share keys, the gradients of their keys and values are summed over them afterwards.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from ..ir.dims import dim, same, same_shape
from ..ir.errors import TypeInferenceError
from ..ir.graph import Node
from ..ir.ops import OPS, Ref
from ..ir.ops.attention_gradients import OF
from ..ir.ops.structure import resolve
from ..ir.patterns import Refusal
from ..ir.reasons import Reason
from ..ir.rules import Outcome, Rule, Site
from ..ir.types import compute_dtype, same_type
from .attentions import WALKED, attention_refusal
from .facts import device_type

_BEGIN, _END = "aten._scaled_dot_product_", "_backward.default"
_BIAS = ("attn_bias", "attn_mask")


def _gradient(item: Node, site: Site) -> Outcome:
    (call,) = item.inputs
    target = call.attrs.get("target", "")
    if not (target.startswith(_BEGIN) and target.endswith(_END)) or device_type(item) not in WALKED:
        return None
    given = _arguments(call)
    wanted = tuple(given.get("grad_input_mask", (True, True, True, False)))
    if given["dropout_p"] != 0:
        return Refusal(Reason.STATE, call)
    if wanted != (True, True, True, False) or len(call.attrs["types"]) < len(OF):
        return Refusal(Reason.NOT_EXPRESSIBLE, "the gradient of a mask, or not of all three operands")
    made = _one(given, OF[item.attrs["index"]])
    if made is None:
        return Refusal(Reason.SHAPE_MISMATCH, call)
    refusal = attention_refusal(made)
    if refusal is not None:
        return Refusal(refusal.reason, refusal.value)
    made = _summed(made, given["query" if made.attrs["of"] == "query" else "key"])
    return made if same_type(made.type, item.type) else Refusal(Reason.SHAPE_MISMATCH, item)


def _arguments(call: Node) -> Mapping[str, Any]:
    """The arguments of an extern by their names in its schema, tensors as nodes."""
    arguments = resolve(call.attrs["target"])._schema.arguments
    values = dict(zip((a.name.rstrip("_") for a in arguments if not a.kwarg_only), call.attrs["args"])) | dict(call.attrs["kwargs"])
    return {name: call.inputs[value.index] if isinstance(value, Ref) else value for name, value in values.items()}


def _one(given: Mapping[str, Any], of: str) -> Node | None:
    """The gradient; None where the operands do not fit."""
    q, out, scale = given["query"], given["out"], given.get("scale")
    if scale is None and not isinstance(q.shape[-1], int):
        return None
    bias = next((given[name] for name in _BIAS if given.get(name) is not None), None)
    wide = compute_dtype(q.dtype)
    terms = OPS["mul"](*(t if t.dtype == wide else OPS["cast"](t, dtype=wide) for t in (given["grad_out"], out)))
    delta = OPS["sum"](terms, dims=(out.tensor.rank - 1,))
    factor = 1 / math.sqrt(q.shape[-1]) if scale is None else float(scale)
    try:
        operands = [given["grad_out"], q, given["key"], given["value"], _rows(given["logsumexp"], q), delta]
        operands += [] if bias is None else [bias]
        return OPS["attention_gradient"](*operands, of=of, causal=given.get("is_causal", False), scale=factor)
    except TypeInferenceError:
        return None


def _rows(logsumexp: Node, q: Node) -> Node:
    """One number for each row of a query: the kernels of torch give some more, or a dimension more. Raises TypeInferenceError."""
    rank, length = q.tensor.rank - 1, q.shape[-2]
    if logsumexp.tensor.rank == rank + 1 and same(logsumexp.shape[-1], 1):
        logsumexp = OPS["reshape"](logsumexp, shape=logsumexp.shape[:-1])
    if logsumexp.tensor.rank != rank or same(logsumexp.shape[-1], length):
        return logsumexp
    return OPS["slice"](logsumexp, dim=rank - 1, start=0, stop=length)


def _summed(made: Node, like: Node) -> Node:
    """Over the heads that share a key."""
    if same_shape(made.shape[:-2], like.shape[:-2]):
        return made
    *lead, heads, n, d = made.shape
    groups = like.shape[-3]
    apart = OPS["reshape"](made, shape=(*lead, groups, dim(heads // groups), n, d))
    return OPS["cast"](OPS["sum"](apart, dims=(len(lead) + 1,)), dtype=like.dtype)


GRADIENT_RULES: list[Rule] = [Rule("recognize.attention-gradient", ("item",), _gradient)]

"""The way out: an ATen (or custom) op without native form becomes an `extern` node, typed by the fake tensors, run by torch."""

from __future__ import annotations

from typing import Any

import sympy
import torch

from ..dims import Dim
from ..errors import CaptureError
from ..graph import Node, scalar_value
from ..ops import OPS, Ref
from ..types import ScalarType, TensorType
from .call import Call

_LITERALS = (bool, int, float, complex, str, sympy.Expr, torch.dtype, torch.device, torch.layout, torch.memory_format, type(None))


def extern(call: Call, args: tuple[Any, ...], sequence: int | None) -> Node:
    """The call as an extern node; raises CaptureError for an argument that is neither a tensor nor a literal.

    Operands are given as eager lays them out: views need it, vendor kernels (oneDNN's RNN) rely on it without a check, and what a custom
    op looks at nobody knows.
    """
    target = call.node.target
    operands: list[Node] = []
    raws: list[Any] = []
    positional, keyword = [], []
    for argument, value, raw in zip(target._schema.arguments, args, call.raw):  # type: ignore[union-attr]
        template = _template(value, raw, operands, raws, call)
        if argument.kwarg_only:
            keyword.append((argument.name, template))
        else:
            positional.append(template)
    return OPS["extern"](
        *operands, target=target_name(target), args=tuple(positional), kwargs=tuple(keyword), types=call.types,
        strides=_strides(call, raws), sequence=sequence,
    )  # fmt: skip


def target_name(target: Any) -> str:
    """ "aten.topk.default"."""
    return f"{target.namespace}.{target._schema.name.split('::')[-1]}.{target._overloadname}"


def _template(value: Any, raw: Any, operands: list[Node], raws: list[Any], call: Call) -> Any:
    if isinstance(value, Node):
        if isinstance(value.type, ScalarType):
            return scalar_value(value)
        return _reference(value, raw, operands, raws)
    if isinstance(value, tuple):
        return tuple(_template(v, r, operands, raws, call) for v, r in zip(value, raw))
    if isinstance(value, _LITERALS):
        return value
    raise CaptureError(reason=f"{target_name(call.node.target)} takes an argument of type {type(value).__name__}")


def _reference(value: Node, raw: Any, operands: list[Node], raws: list[Any]) -> Ref:
    for i, (known, known_raw) in enumerate(zip(operands, raws)):
        if known is value and known_raw is raw:
            return Ref(i)
    operands.append(value)
    raws.append(raw)
    return Ref(len(operands) - 1)


def _strides(call: Call, raws: list[Any]) -> tuple[tuple[Dim, ...] | None, ...]:
    return tuple(call.sizes.dims(raw.meta["val"].stride()) for raw in raws)


def results(node: Node, count: int) -> tuple[Node, ...]:
    """The tensors an extern returns, one node each."""
    return (node,) if isinstance(node.type, TensorType) else tuple(OPS["item"](node, index=i) for i in range(count))

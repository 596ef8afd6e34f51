"""Convolutions and poolings of the host program, in the memory order that the graph asks for."""

from __future__ import annotations

from typing import Any

import torch

from ..ir.dims import hint
from ..ir.graph import Node
from ..ir.ops.contractions import channels_first_view, channels_last_view
from .host import Host, Scope, Value

PACKED_BYTES = 64 * 1024
"""Constant weights of this size and more are stored in the library's own order: it then reorders none per call, which takes longer
than the 20 microseconds that such a call costs."""


def emit_window(host: Host, node: Node) -> None:
    """A convolution or pooling as a call of the library.

    With channels last the library gets a view [n, c, *space] of the operand, sees the order in its strides, and answers in it: another
    view is the result, row-major again. Where it answers in another order, which it may for sizes of 1, the result is laid out anew.
    """
    x, *weights = node.inputs
    if not node.attrs["channels_last"]:
        host.define(node, _call(host, node, host.values[x], [host.values[w] for w in weights]), Scope.CALL, host.tensors(node.inputs))
        return
    rows = host.dense(host.values[x])
    view = host.derive(rows, "nchw", f"{host.bind('channels_first', channels_first_view)}({rows.name})")
    operands = [_ordered(host, node, w) if i == 0 else host.values[w] for i, w in enumerate(weights)]
    text = _packed_call(host, node, view, operands) if _packs(host, node) else _call(host, node, view, operands)
    out = host.define(None, text, Scope.CALL, [view, *operands], hint=f"{node.hint or node.op.name}_nchw")
    host.define(node, f"{host.bind('channels_last', rows_last)}({out.name})", Scope.CALL, [out], True)


def rows_last(x: torch.Tensor) -> torch.Tensor:
    """[n, c, *space] as row-major [n, *space, c]: a view where the channels lie last already."""
    return channels_last_view(x).contiguous()


def _call(host: Host, node: Node, x: Value, weights: list[Value]) -> str:
    a = node.attrs
    if node.op.name != "conv" or a["padding_after"]:
        settings = [f"{k}={host.literal(v)}" for k, v in {**a, "channels_last": False}.items()]
        return f"{host.bind(node.op.name, node.op.eager)}({', '.join([x.name, *(w.name for w in weights), *settings])})"
    operands = [x.name, *(w.name for w in weights), *(["None"] if len(weights) == 1 else [])]
    extra = a["output_padding"] or (0,) * (node.tensor.rank - 2)
    numbers = (a["stride"], a["padding"], a["dilation"], a["transposed"], extra, a["groups"])
    return f"{host.bind('convolution', torch.convolution)}({', '.join([*operands, *map(host.literal, numbers)])})"


def _packed_call(host: Host, node: Node, x: Value, weights: list[Value]) -> str:
    a = node.attrs
    operands = [x.name, *(w.name for w in weights), *(["None"] if len(weights) == 1 else [])]
    numbers = (a["padding"], a["stride"], a["dilation"], a["groups"], "none", (), "")
    function = host.bind("convolution_packed", torch.ops.mkldnn._convolution_pointwise.default)
    return f"{function}({', '.join([*operands, *map(host.literal, numbers)])})"


def _packs(host: Host, node: Node) -> bool:
    """Whether the weight is a constant that is worth the library's own order."""
    if node.op.name != "conv" or node.tensor.rank != 4 or node.dtype != torch.float32:
        return False
    if node.attrs["transposed"] or node.attrs["padding_after"]:
        return False
    weight = node.inputs[1]
    large = weight.op.name == "constant" and hint(weight.tensor.nbytes, host.graph.symbols) >= PACKED_BYTES
    return large and torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_convolution_pointwise")


def _ordered(host: Host, node: Node, weight: Node) -> Value:
    """The weight as the call takes it; a constant is put in order once."""
    value = host.values[weight]
    if weight.op.name != "constant" or weight.tensor.rank != 4:
        return value
    if not _packs(host, node):
        return host.derive(value, "last", f"{value.name}.contiguous(memory_format=torch.channels_last)")
    a, (n, *space, c) = node.attrs, (hint(d, host.graph.symbols) for d in node.inputs[0].shape)
    numbers = (a["padding"], a["stride"], a["dilation"], a["groups"], (n, c, *space))
    text = f"{host.bind('packed', packed)}({', '.join([value.name, *map(host.literal, numbers)])})"
    return host.derive(value, "packed", text)


def packed(weight: torch.Tensor, padding: Any, stride: Any, dilation: Any, groups: int, size: Any) -> torch.Tensor:
    """The weight [out, c / groups, h, w] in the order that the library likes best for images of `size`; it serves images of any size."""
    return torch.ops.mkldnn._reorder_convolution_weight(weight, padding, stride, dilation, groups, size)

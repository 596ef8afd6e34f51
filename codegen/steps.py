"""Steps of the host program that are no kernels: views, constants, library calls and what runs by `eager`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from ..ir.analysis.memory import foldable
from ..ir.dims import contiguous_strides, product, same_shape, to_source
from ..ir.graph import Node, is_scalar
from ..ir.op import Category
from ..ir.ops.structure import Ref, resolve, tensor_leaves
from .calls import Moves
from .host import Host, Scope, Value
from .strides import strides
from .windows import emit_window

LIBRARY = frozenset(
    {"matmul", "linear", "grouped_matmul", "block_sparse_linear", "conv", "max_pool", "avg_pool", "attention", "attention_gradient"}
)
"""Ops that a vendor's library computes as well as anyone: scheduled there on purpose."""

LIBRARY_EXTERNS = (
    "aten.convolution_backward", "aten._scaled_dot_product", "aten.mm", "aten.addmm", "aten.bmm", "aten.baddbmm", "aten.max_pool",
    "aten.avg_pool", "aten._grouped_mm", "transformers.grouped_mm_fallback",
)  # fmt: skip
"""Prefixes of extern targets that count as such too: training's halves of them, and grouped products of experts."""


def is_library_call(node: Node) -> bool:
    """Whether the node is a product, convolution, pooling or attention, which we leave to the library on purpose."""
    if node.op.name == "extern":
        return node.attrs["target"].startswith(LIBRARY_EXTERNS)
    return node.op.name in LIBRARY or node.op.category is Category.GATHER


# -- views


def emit_view(host: Host, node: Node) -> None:
    """A strided tensor over its operand's memory where torch can make one, made as rarely as the operand is."""
    x = host.values[node.inputs[0]]
    expression, contiguous = _VIEWS[node.op.name](host, node, x)
    copies = node.op.name in ("flip", "layout", "as_strided") or (node.op.name == "reshape" and ".reshape(" in expression)
    scope = Scope.CALL if copies else max(x.scope, Scope.FRAME) if _mentions_sizes(node) else x.scope
    at = x.at if node.op.name == "reshape" and contiguous else ""
    host.define(node, expression, scope, [x], contiguous, moves=Moves.READER if copies else Moves.NAME, at=at, nbytes=x.nbytes)


def _reshape(host: Host, node: Node, x: Value) -> tuple[str, bool]:
    shape = host.literal(node.shape)
    if x.contiguous:
        return f"{x.name}.view({shape})", True
    return f"{x.name}.{'reshape' if strides(node) is None else 'view'}({shape})", False


def _permute(host: Host, node: Node, x: Value) -> tuple[str, bool]:
    return f"{x.name}.permute({host.literal(node.attrs['dims'])})", False


def _expand(host: Host, node: Node, x: Value) -> tuple[str, bool]:
    return f"{x.name}.expand({host.literal(node.shape)})", False


def _slice(host: Host, node: Node, x: Value) -> tuple[str, bool]:
    start, stop, step = (node.attrs[k] for k in ("start", "stop", "step"))
    d = node.attrs["dim"] % node.inputs[0].tensor.rank
    text = f"{to_source(start)}:{to_source(stop)}" + (f":{step}" if step != 1 else "")
    return f"{x.name}[{':, ' * d}{text}]", x.contiguous and d == 0 and step == 1


def _select(host: Host, node: Node, x: Value) -> tuple[str, bool]:
    d = node.attrs["dim"] % node.inputs[0].tensor.rank
    return f"{x.name}.select({d}, {host.literal(node.attrs['index'])})", x.contiguous and d == 0


def _flip(host: Host, node: Node, x: Value) -> tuple[str, bool]:
    return f"{x.name}.flip({host.literal(node.attrs['dims'])})", False


def _as_strided(host: Host, node: Node, x: Value) -> tuple[str, bool]:
    return _eager_text(host, node), False


def _layout(host: Host, node: Node, x: Value) -> tuple[str, bool]:
    strides = node.attrs["strides"]
    plain = same_shape(strides, contiguous_strides(node.shape))
    own = ", own=True" if node.attrs["own"] else ""
    return f"laid_out({x.name}, {host.literal(strides)}{own})", plain


_VIEWS: dict[str, Callable[[Host, Node, Value], tuple[str, bool]]] = {
    "reshape": _reshape, "permute": _permute, "expand": _expand, "slice": _slice, "select": _select, "flip": _flip,
    "as_strided": _as_strided, "layout": _layout,
}  # fmt: skip


# -- constants


def emit_constant(host: Host, node: Node) -> None:
    """A weight is a global of the program; fills and ranges are made once per set of sizes."""
    if node.op.name == "constant":
        data = node.attrs["data"]
        tensor = node.op.eager(**node.attrs).detach()
        name = host.name(node.hint or data.name)
        host.names[name] = tensor
        host.values[node] = Value(name, Scope.PROGRAM, tensor.is_contiguous())
        return
    static = all(isinstance(d, int) for d in node.shape) and not _mentions_sizes(node)
    host.define(node, _eager_text(host, node), Scope.PROGRAM if static else Scope.FRAME, (), True)


def _mentions_sizes(node: Node) -> bool:
    values = [v for a in node.attrs.values() for v in (a if isinstance(a, tuple) else (a,))]
    return any(hasattr(v, "free_symbols") and v.free_symbols for v in values)


# -- calls


def emit_call(host: Host, node: Node) -> None:
    """A library function, or the op's torch meaning."""
    _CALLS.get(node.op.name, _eager)(host, node)


def _eager(host: Host, node: Node) -> None:
    host.define(node, _eager_text(host, node), Scope.CALL, host.tensors(node.inputs))


def _eager_text(host: Host, node: Node) -> str:
    function = host.bind(node.op.name if node.op.name not in host.names else f"{node.op.name}_op", node.op.eager)
    parts = [host.operand(n) for n in node.inputs]
    parts += [f"{k}={host.literal(v)}" for k, v in node.attrs.items()]
    return f"{function}({', '.join(parts)})"


def _extern(host: Host, node: Node) -> None:
    """The resolved overload on its argument template."""
    target = resolve(node.attrs["target"])
    function = host.bind(node.attrs["target"].replace(".", "_"), target)
    operands = [_with_layout(host, node, i) for i in range(len(node.inputs))]
    parts = [_template(host, a, operands) for a in node.attrs["args"]]
    parts += [f"{k}={_template(host, v, operands)}" for k, v in node.attrs["kwargs"]]
    text = f"{function}({', '.join(parts)})"
    returns = target._schema.returns
    if len(returns) != 1 or str(returns[0].type) != "Tensor":
        text = f"{host.bind('tensor_leaves', tensor_leaves)}({text})" + ("[0]" if len(node.attrs["types"]) == 1 else "")
    host.define(node, text, Scope.CALL, host.tensors(node.inputs))


def _with_layout(host: Host, node: Node, i: int) -> str:
    """Operand i, laid out as the op's meaning needs it."""
    operand = node.inputs[i]
    strides = node.attrs["strides"]
    if not strides or strides[i] is None or is_scalar(operand):
        return host.operand(operand)
    return f"laid_out({host.operand(operand)}, {host.literal(strides[i])})"


def _template(host: Host, value: Any, operands: list[str]) -> str:
    if isinstance(value, Ref):
        return operands[value.index]
    if isinstance(value, tuple):
        return f"[{', '.join(_template(host, v, operands) for v in value)}]"
    return host.literal(value)


def _item(host: Host, node: Node) -> None:
    source = host.values[node.inputs[0]]
    host.define(node, f"{source.name}[{node.attrs['index']}]", Scope.CALL, [source])


def _matmul(host: Host, node: Node) -> None:
    a, b = node.inputs
    if not foldable(a.tensor, b.tensor):
        _eager(host, node)
        return
    if b.tensor.rank == 2:
        _product(host, node, "mm", _rows(host, a), host.values[b])
    else:
        _product(host, node, "bmm", _batched(host, a), _batched(host, b))


def _linear(host: Host, node: Node) -> None:
    x, w, *bias = node.inputs
    if x.tensor.rank < 2:
        _eager(host, node)
        return
    weight = host.values[w]
    turned = host.derive(weight, "t", f"{weight.name}.t()")
    if bias:
        _product(host, node, "addmm", host.values[bias[0]], _rows(host, x), turned)
    else:
        _product(host, node, "mm", _rows(host, x), turned)


def _grouped_matmul(host: Host, node: Node) -> None:
    function = host.bind("grouped_matmul", node.op.eager)
    operands = [host.values[n] for n in node.inputs]
    out = host.memory(node, node.tensor, node.hint or node.op.name)
    host.line(f"{function}({', '.join(v.name for v in operands)}, out={out.name})", reads=[*operands, out])


def _product(host: Host, node: Node, function: str, *operands: Value) -> None:
    """function(*operands) in two or three dimensions, into the node's memory."""
    host.bind(function, getattr(torch, function))
    out = host.memory(node, node.tensor, node.hint or node.op.name)
    rank = 3 if function == "bmm" else 2
    shape = (product(node.shape[:-2]), *node.shape[-2:]) if rank == 3 else (product(node.shape[:-1]), node.shape[-1])
    flat = out if node.tensor.rank == rank else host.derive(out, "flat", f"{out.name}.view({host.literal(shape)})", True)
    host.line(f"{function}({', '.join(v.name for v in operands)}, out={flat.name})", reads=[*operands, flat])


def _rows(host: Host, node: Node) -> Value:
    """[..., k] as a matrix."""
    return _folded(host, node, (product(node.shape[:-1]), node.shape[-1]))


def _batched(host: Host, node: Node) -> Value:
    """[..., m, k] as a batch of matrices."""
    return _folded(host, node, (product(node.shape[:-2]), *node.shape[-2:]))


def _folded(host: Host, node: Node, shape: tuple[Any, ...]) -> Value:
    value = host.values[node]
    if node.tensor.rank == len(shape):
        return value
    text = host.literal(shape)
    if value.contiguous:
        return host.derive(value, "flat", f"{value.name}.view({text})", True)
    if value.scope is Scope.CALL:
        return host.derive(value, "flat", f"{value.name}.reshape({text})")
    # it may be a copy, and must be made after what it copies: in this call
    return host.define(None, f"{value.name}.reshape({text})", Scope.CALL, [value], hint=f"{value.name}_flat")


_CALLS: dict[str, Callable[[Host, Node], None]] = {
    "extern": _extern, "item": _item, "matmul": _matmul, "linear": _linear, "grouped_matmul": _grouped_matmul, "conv": emit_window,
    "max_pool": emit_window, "avg_pool": emit_window,
}  # fmt: skip

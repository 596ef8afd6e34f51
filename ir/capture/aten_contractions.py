"""ATen products, convolutions, pooling, normalizations and attention -> ours."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.fx

from ..dims import same
from ..graph import Node
from ..types import compute_dtype
from .aten_pointwise import scaled
from .call import Call, Converter, Result, cast, make, reshape
from .sparse import BlockMatrix


def _matmul(call: Call, a: Node, b: Node) -> Result:
    return make("matmul", a, b)


def _linear(call: Call, x: Node, w: Node | BlockMatrix, b: Node | None) -> Result:
    if isinstance(w, BlockMatrix):
        total = make("block_sparse_linear", x, w.values, w.columns, w.starts)
        return total if b is None else make("add", total, b)
    return make("linear", x, w, *([b] if b is not None else []))


def _transposed_operand(w: Node) -> Node | None:
    """v where w is v transposed."""
    return w.inputs[0] if w.op.name == "permute" and w.attrs["dims"] == (1, 0) else None


def _addmm(call: Call, bias: Node, a: Node, b: Node, beta: Any, alpha: Any) -> Result:
    weight = _transposed_operand(b)
    if weight is not None and bias.tensor.rank == 1 and same(bias.shape[0], b.shape[1]) and beta == alpha == 1:
        return make("linear", a, weight, bias)
    return _product_sum(call, bias, a, b, beta, alpha)


def _product_sum(call: Call, bias: Node, a: Node, b: Node, beta: Any, alpha: Any) -> Result:
    """beta * bias + alpha * (a @ b); beta = 0 ignores bias, NaN and all. Sums in compute dtype, as ATen does."""
    wide = compute_dtype(call.type.dtype)
    product = scaled(cast(make("matmul", a, b), wide), alpha)
    if beta == 0:
        return cast(product, call.type.dtype)
    return cast(make("add", product, scaled(cast(bias, wide), beta)), call.type.dtype)


def _convolution(
    call: Call, x: Node, w: Node, b: Node | None, stride: Any, padding: Any, dilation: Any, transposed: bool, output_padding: Any,
    groups: int,
) -> Result:  # fmt: skip
    space = x.tensor.rank - 2
    stride, padding, dilation, extra = (_spread(v, space) for v in (stride, padding, dilation, output_padding))
    operands = [x, w] + ([b] if b is not None else [])
    return make("conv", *operands, stride=stride, padding=padding, dilation=dilation, groups=groups, transposed=transposed,
                output_padding=extra if transposed else ())  # fmt: skip


def _spread(value: Any, space: int) -> tuple[int, ...]:
    """One entry per spatial dimension; a single number serves all."""
    values = tuple(value) if isinstance(value, Sequence) else (value,)
    return values * space if len(values) == 1 else values


def _max_pool(space: int) -> Converter:
    def convert(call: Call, x: Node, kernel: Any, stride: Any, padding: Any, dilation: Any, ceil: bool) -> Result:
        if not call.only(0):
            return None
        pool = _max_pool_values(space)
        return pool(call, x, kernel, stride, padding, dilation, ceil), None  # type: ignore[return-value]

    return convert


def _max_pool_values(space: int) -> Converter:
    def convert(call: Call, x: Node, kernel: Any, stride: Any, padding: Any, dilation: Any, ceil: bool) -> Result:
        kernel = _spread(kernel, space)
        return make("max_pool", x, kernel=kernel, stride=_spread(stride, space) if stride else kernel, padding=_spread(padding, space),
                    dilation=_spread(dilation, space), ceil=ceil)  # fmt: skip

    return convert


def _avg_pool(space: int) -> Converter:
    def convert(
        call: Call, x: Node, kernel: Any, stride: Any, padding: Any, ceil: bool, count_padding: bool, divisor: Any = None
    ) -> Result:
        kernel = _spread(kernel, space)
        return make("avg_pool", x, kernel=kernel, stride=_spread(stride, space) if stride else kernel, padding=_spread(padding, space),
                    ceil=ceil, count_padding=count_padding, divisor=divisor)  # fmt: skip

    return convert


def _adaptive_avg_pool(call: Call, x: Node, size: Any) -> Result:
    """Whole-image means and evenly dividing windows; other sizes are left to ATen."""
    space = len(size)
    if all(same(s, 1) for s in size):
        return make("mean", x, dims=tuple(range(-space, 0)), keepdim=True)
    extents = x.shape[-space:]
    if not all(isinstance(n, int) and isinstance(s, int) and s and n % s == 0 for n, s in zip(extents, size)):
        return None
    kernel = tuple(n // s for n, s in zip(extents, size))
    return make("avg_pool", x, kernel=kernel, stride=kernel, padding=(0,) * space)


def _statistics(x: Node, dims: tuple[int, ...], eps: float) -> tuple[Node, Node]:
    """Mean and 1 / sqrt(variance + eps) as the expansion of layer_norm computes them, so that both merge."""
    wide = cast(x, compute_dtype(x.dtype))
    mean = make("mean", wide, dims=dims, keepdim=True)
    centered = make("sub", wide, mean)
    variance = make("mean", make("mul", centered, centered), dims=dims, keepdim=True)
    return mean, make("rsqrt", make("add", variance, eps))


def _with_statistics(call: Call, out: Node, x: Node, dims: tuple[int, ...], eps: float) -> Result:
    """(normalized, mean, rstd), the statistics only if they are read (training)."""
    if call.only(0):
        return out, None, None
    mean, rstd = (cast(reshape(s, t.shape), t.dtype) for s, t in zip(_statistics(x, dims, eps), call.types[1:]))
    return out, mean, rstd


def _given(*operands: Node | None) -> list[Node] | None:
    """Optional operands without the trailing Nones; None where one is missing in the middle."""
    kept = [o for o in operands if o is not None]
    return kept if list(operands[: len(kept)]) == kept else None


def _affine_norm(name: str, x: Node, w: Node | None, b: Node | None, **attrs: Any) -> Node:
    """The norm, a bias without a weight added afterwards."""
    operands = _given(w, b)
    if operands is not None:
        return make(name, x, *operands, **attrs)
    assert b is not None
    one = make("full", shape=b.shape, value=1, dtype=b.dtype, device=b.tensor.device)
    return make(name, x, one, b, **attrs)


def _layer_norm(call: Call, x: Node, shape: Any, w: Node | None, b: Node | None, eps: float) -> Result:
    axes = len(shape)
    out = _affine_norm("layer_norm", x, w, b, axes=axes, eps=eps)
    return _with_statistics(call, out, x, tuple(range(x.tensor.rank - axes, x.tensor.rank)), eps)


def _group_norm(call: Call, x: Node, w: Any, b: Any, n: Any, c: Any, space: Any, groups: int, eps: float) -> Result:
    out = _affine_norm("group_norm", x, w, b, groups=groups, eps=eps)
    grouped = reshape(x, (n, groups, *((c // groups, space) if isinstance(c, int) else (-1,)))) if isinstance(c, int) else None
    if grouped is None and not call.only(0):
        return None
    return (out, None, None) if grouped is None else _with_statistics(call, out, grouped, (2, 3), eps)


def _rms_norm(call: Call, x: Node, shape: Any, w: Node | None, eps: float | None) -> Result:
    if not call.only(0):
        return None
    return _rms_norm_values(call, x, shape, w, eps), None  # type: ignore[return-value]


def _rms_norm_values(call: Call, x: Node, shape: Any, w: Node | None, eps: float | None) -> Result:
    eps = torch.finfo(compute_dtype(x.dtype)).eps if eps is None else eps
    return make("rms_norm", x, *([w] if w is not None else []), axes=len(shape), eps=eps)


def _batch_norm_inference(call: Call, x: Node, w: Any, b: Any, mean: Node, var: Node, momentum: float, eps: float) -> Result:
    return _affine_batch_norm(x, mean, var, w, b, eps), None, None


def _affine_batch_norm(x: Node, mean: Node, var: Node, w: Node | None, b: Node | None, eps: float) -> Node:
    operands = _given(w, b)
    if operands is None:
        assert b is not None
        operands = [make("full", shape=b.shape, value=1, dtype=b.dtype, device=b.tensor.device), b]
    return make("batch_norm", x, mean, var, *operands, eps=eps)


def _attend(
    q: Node, k: Node, v: Node, mask: Node | None, dropout: Any, causal: bool, scale: Any
) -> Node | None:  # fmt: skip
    width = q.shape[-1]
    if dropout != 0 or (scale is None and not isinstance(width, int)) or not isinstance(scale, (int, float, type(None))):
        return None
    if mask is not None and mask.dtype != torch.bool and mask.dtype != q.dtype:
        return None
    factor = float(scale) if scale is not None else 1 / math.sqrt(width)
    return make("attention", q, k, v, *([mask] if mask is not None else []), causal=causal, scale=factor)


def _attention(call: Call, q: Node, k: Node, v: Node, mask: Any, dropout: Any, causal: bool, scale: Any, grouped: bool) -> Result:
    return _attend(q, k, v, mask, dropout, causal, scale)


def _fused_attention(order: str) -> Converter:
    """The backend-specific variants: `order` names their arguments; only the output, not what backward needs, is ours."""
    names = order.split()

    def convert(call: Call, q: Node, k: Node, v: Node, *rest: Any) -> Result:
        if not call.only(0):
            return None
        given = dict(zip(names, rest))
        out = _attend(q, k, v, given.get("mask"), given["dropout"], given["causal"], given["scale"])
        return None if out is None else (out, *(None,) * (len(call.types) - 1))

    return convert


def _grouped_mm(call: Call, x: Node, w: Node, ends: Node | None, bias: Node | None = None, out_dtype: torch.dtype | None = None) -> Result:
    """Groups of rows; torch's other forms (groups of columns, of the depth) are left to it."""
    plain = ends is not None and bias is None and out_dtype in (None, x.dtype) and (x.tensor.rank, w.tensor.rank) == (2, 3)
    return make("grouped_matmul", x, w, ends) if plain else None


CONTRACTIONS: dict[str, Converter] = {
    "aten.mm.default": _matmul, "aten.bmm.default": _matmul, "aten.mv.default": _matmul, "aten.dot.default": _matmul,
    "aten.matmul.default": _matmul, "aten.linear.default": _linear,
    "aten.addmm.default": _addmm, "aten.addmv.default": _product_sum, "aten.baddbmm.default": _product_sum,
    "aten._grouped_mm.default": _grouped_mm, "transformers.grouped_mm_fallback.default": _grouped_mm,
    "aten.convolution.default": _convolution,
    "aten.max_pool2d_with_indices.default": _max_pool(2), "aten.max_pool3d_with_indices.default": _max_pool(3),
    "aten.max_pool1d.default": _max_pool_values(1), "aten.max_pool2d.default": _max_pool_values(2),
    "aten.avg_pool1d.default": _avg_pool(1), "aten.avg_pool2d.default": _avg_pool(2), "aten.avg_pool3d.default": _avg_pool(3),
    "aten._adaptive_avg_pool2d.default": _adaptive_avg_pool, "aten._adaptive_avg_pool3d.default": _adaptive_avg_pool,
    "aten.adaptive_avg_pool1d.default": _adaptive_avg_pool,
    "aten.native_layer_norm.default": _layer_norm, "aten.native_group_norm.default": _group_norm,
    "aten._fused_rms_norm.default": _rms_norm, "aten.rms_norm.default": _rms_norm_values,
    "aten._native_batch_norm_legit_no_training.default": _batch_norm_inference,
    "aten.scaled_dot_product_attention.default": _attention,
    "aten._scaled_dot_product_flash_attention_for_cpu.default": _fused_attention("dropout causal mask scale"),
    "aten._scaled_dot_product_flash_attention.default": _fused_attention("dropout causal debug scale"),
    "aten._scaled_dot_product_efficient_attention.default": _fused_attention("mask logsumexp dropout causal scale"),
    "aten._scaled_dot_product_cudnn_attention.default": _fused_attention("mask logsumexp dropout causal debug scale"),
    "aten._scaled_dot_product_fused_attention_overrideable.default": _fused_attention("mask dropout causal debug scale"),
}  # fmt: skip

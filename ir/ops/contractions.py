"""Contractions and windows: matmul, linear, convolution, pooling. In this order of dims: batch, channels, then space (NCHW).

With `channels_last` a convolution or pooling takes and yields [n, *space, c] instead; weights are as ever.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import sympy
import torch
import torch.nn.functional as F

from ..dims import Dim, Mod, dim, floordiv, product, same
from ..op import Category, Cost, Op, streaming_cost
from ..types import TensorType, Type, broadcast, one_device


def _infer_matmul(a: TensorType, b: TensorType) -> Type:
    """torch.matmul for ranks >= 2: [..., m, k] x [..., k, n], leading dims broadcast; also [k] x [k] and [.., m, k] x [k]."""
    _same_dtype(a, b)
    if a.rank == 0 or b.rank == 0:
        raise ValueError("it takes tensors with dimensions")
    inner = b.shape[-2] if b.rank > 1 else b.shape[0]
    if not same(a.shape[-1], inner):
        raise ValueError(f"inner sizes {a.shape[-1]} and {inner} differ")
    lead = broadcast(a.shape[:-2], b.shape[:-2])
    rows = a.shape[-2:-1] if a.rank > 1 else ()
    columns = b.shape[-1:] if b.rank > 1 else ()
    return a.with_shape((*lead, *rows, *columns))


def _same_dtype(*types: TensorType) -> None:
    if len({t.dtype for t in types}) > 1:
        raise ValueError("operands must have one dtype; cast them first")
    if types[0].dtype == torch.bool:
        raise ValueError("it is not defined for bool")
    one_device(*types)


def _infer_linear(x: TensorType, w: TensorType, b: TensorType | None = None) -> Type:
    """x [..., k], w [n, k], b [n] -> [..., n]: x @ w.T + b."""
    _same_dtype(x, w, *([b] if b else []))
    if w.rank != 2 or x.rank < 1 or not same(x.shape[-1], w.shape[1]):
        raise ValueError("x must end in the columns of w")
    if b is not None and (b.rank != 1 or not same(b.shape[0], w.shape[0])):
        raise ValueError("b must have one entry per row of w")
    return x.with_shape((*x.shape[:-1], w.shape[0]))


def _infer_grouped_matmul(x: TensorType, w: TensorType, ends: TensorType) -> Type:
    """x [m, k], w [groups, k, n], ends i32 or i64 [groups]: rows ends[g - 1] .. ends[g] of x @ w[g]; rows behind the last are 0."""
    _same_dtype(x, w)
    if x.rank != 2 or w.rank != 3 or not same(x.shape[1], w.shape[1]):
        raise ValueError("x must end in the rows of w")
    if ends.rank != 1 or not same(ends.shape[0], w.shape[0]) or ends.dtype not in (torch.int32, torch.int64):
        raise ValueError("there must be one end for each group")
    one_device(x, w, ends)
    return x.with_shape((x.shape[0], w.shape[2]))


def grouped_matmul(x: torch.Tensor, w: torch.Tensor, ends: torch.Tensor, *, out: torch.Tensor | None = None) -> torch.Tensor:
    """One product for each group that has rows."""
    out = x.new_empty(x.shape[0], w.shape[2]) if out is None else out
    start = 0
    for group, end in enumerate(ends.tolist()):
        if end > start:
            torch.mm(x[start:end], w[group], out=out[start:end])
            start = end
    out[start:].zero_()
    return out


def _infer_block_sparse_linear(x: TensorType, values: TensorType, columns: TensorType, starts: TensorType) -> Type:
    """x [..., k], values [blocks, r, c], columns [blocks], starts [n / r + 1] -> [..., n]: x @ w.T, w [n, k] of blocks [r, c].

    Block row i has the blocks starts[i] .. starts[i + 1], in block columns `columns`; the others count as absent, whatever x is there.
    Starts ascend and columns exist, as `torch.sparse_bsr_tensor` checks: a kernel does not.
    """
    _same_dtype(x, values)
    if values.rank != 3 or any(same(d, 0) for d in values.shape[1:]):
        raise ValueError("values must be blocks with elements")
    if x.rank < 1 or not same(dim(Mod(sympy.sympify(x.shape[-1]), sympy.sympify(values.shape[2]))), 0):
        raise ValueError("x must end in whole blocks")
    if columns.rank != 1 or not same(columns.shape[0], values.shape[0]):
        raise ValueError("there must be one column for each block")
    if starts.rank != 1 or same(starts.shape[0], 0):
        raise ValueError("there must be a start for each block row, and an end")
    if not {columns.dtype, starts.dtype} <= {torch.int32, torch.int64}:
        raise ValueError("columns and starts must be i32 or i64")
    one_device(x, values, columns, starts)
    return x.with_shape((*x.shape[:-1], dim((starts.shape[0] - 1) * values.shape[1])))


def block_sparse_linear(x: torch.Tensor, values: torch.Tensor, columns: torch.Tensor, starts: torch.Tensor) -> torch.Tensor:
    """One product for each block row: its blocks side by side, and what of x stands at their columns."""
    _, height, width = values.shape
    parts = x.unflatten(-1, (x.shape[-1] // width, width))
    out = x.new_zeros(*x.shape[:-1], len(starts) - 1, height)
    limits = starts.tolist()
    for row, (start, end) in enumerate(zip(limits, limits[1:])):
        if end > start:
            weight = values[start:end].transpose(0, 1).flatten(1)
            out[..., row, :] = F.linear(parts[..., columns[start:end], :].flatten(-2), weight)
    return out.flatten(-2)


def _cost_blocks(types: tuple[Any, ...], out: Type, attrs: Any) -> Cost:
    x, values = types[:2]
    return Cost(dim(2 * product(x.shape[:-1]) * values.numel), streaming_cost(types, out).bytes)


def _cost_product(types: tuple[Any, ...], out: Type, attrs: Any) -> Cost:
    inner = types[0].shape[-1]
    return Cost(dim(2 * inner * out.numel), streaming_cost(types, out).bytes)  # type: ignore[union-attr]


def _infer_conv(
    x: TensorType, w: TensorType, b: TensorType | None = None, *, stride: tuple[int, ...], padding: tuple[int, ...],
    dilation: tuple[int, ...], groups: int = 1, transposed: bool = False, output_padding: tuple[int, ...] = (), channels_last: bool = False,
    padding_after: tuple[int, ...] = (),
) -> Type:  # fmt: skip
    """x [n, c, *space], w [out, c / groups, *kernel] (transposed: [c, out / groups, *kernel]) -> [n, out, *space']; 1 to 3 spatial dims.

    padding_after: the padding behind x, where it differs from `padding` before it.
    """
    _same_dtype(x, w, *([b] if b else []))
    if channels_last:
        x = _first(x)
    space = x.rank - 2
    if not 1 <= space <= 3 or w.rank != x.rank:
        raise ValueError("x and w must have one batch, one channel and 1 to 3 spatial dimensions")
    if not len(stride) == len(padding) == len(dilation) == space:
        raise ValueError(f"stride, padding and dilation need one entry for each of the {space} spatial dimensions")
    after = _after(padding, padding_after)
    if padding_after and transposed:
        raise ValueError("a transposed convolution has one padding")
    if not same(x.shape[1], w.shape[0] if transposed else dim(w.shape[1] * groups)):
        raise ValueError(f"x has {x.shape[1]} channels, w takes {w.shape[0] if transposed else dim(w.shape[1] * groups)}")
    if transposed:
        channels = dim(w.shape[1] * groups)
        extra = output_padding or (0,) * space
        out = [(i - 1) * s - 2 * p + d * (k - 1) + e + 1
               for i, k, s, p, d, e in zip(x.shape[2:], w.shape[2:], stride, padding, dilation, extra)]  # fmt: skip
    else:
        channels = w.shape[0]
        out = [window_count(*each) for each in zip(x.shape[2:], w.shape[2:], stride, padding, after, dilation)]
    space_out = _positive(out)
    return x.with_shape((x.shape[0], *space_out, channels) if channels_last else (x.shape[0], channels, *space_out))


def _after(padding: tuple[int, ...], padding_after: tuple[int, ...]) -> tuple[int, ...]:
    if padding_after and len(padding_after) != len(padding):
        raise ValueError("padding_after needs one entry for each spatial dimension")
    return padding_after or padding


def _filled(x: torch.Tensor, padding: Any, padding_after: Any, fill: float = 0.0) -> tuple[torch.Tensor, Any]:
    """(x [.., *space], the padding that is left to torch, which has one for both sides)."""
    if not padding_after:
        return x, padding
    pairs = [n for before, after in zip(reversed(padding), reversed(padding_after)) for n in (before, after)]
    return F.pad(x, pairs, value=fill), (0,) * len(padding)


def _first(x: TensorType) -> TensorType:
    """[n, *space, c] as [n, c, *space]."""
    if x.rank < 3:
        raise ValueError("with channels last x must have one batch dimension, space and channels")
    return x.with_shape((x.shape[0], x.shape[-1], *x.shape[1:-1]))


def channels_first_view(x: torch.Tensor) -> torch.Tensor:
    """[n, *space, c] as [n, c, *space], in the same memory."""
    return x.permute(0, -1, *range(1, x.dim() - 1))


def channels_last_view(x: torch.Tensor) -> torch.Tensor:
    """[n, c, *space] as [n, *space, c], in the same memory."""
    return x.permute(0, *range(2, x.dim()), 1)


def is_depthwise(node: Any) -> bool:
    """Whether a node is a convolution of each channel alone (to one result or several)."""
    return node.op.name == "conv" and node.attrs["groups"] > 1 and not node.attrs["transposed"] and node.inputs[1].shape[1] == 1


def kernel_of(node: Any) -> tuple[Dim, ...]:
    """The sides of the window of a convolution or pooling."""
    return node.inputs[1].shape[2:] if node.op.name == "conv" else node.attrs["kernel"]


def _positive(space: Iterable[Dim]) -> tuple[Dim, ...]:
    sizes = tuple(dim(d) for d in space)
    if any(isinstance(d, int) and d < 1 for d in sizes):
        raise ValueError(f"no window fits: the result would have spatial size {list(sizes)}")
    return sizes


def window_count(size: Dim, kernel: Dim, stride: int, low: int, high: int, dilation: int, ceil: bool = False) -> Dim:
    """How many windows fit along one axis; with `ceil` the last one may reach beyond the end, but must start before it."""
    span = dim(size + low + high - dilation * (kernel - 1) - 1)
    if not ceil:
        return dim(floordiv(span, stride) + 1)
    reaching = dim(floordiv(dim(span + stride - 1), stride) + 1)
    starting = dim(floordiv(dim(size + low - 1), stride) + 1)
    return min(reaching, starting) if isinstance(reaching, int) and isinstance(starting, int) else dim(sympy.Min(reaching, starting))


def _conv(
    x: Any, w: Any, b: Any = None, *, stride: Any, padding: Any, dilation: Any, groups: int, transposed: bool, output_padding: Any,
    channels_last: bool, padding_after: Any,
) -> Any:  # fmt: skip
    extra = output_padding or (0,) * (x.dim() - 2)
    x = channels_first_view(x) if channels_last else x
    x, padding = _filled(x, padding, padding_after)
    out = torch.ops.aten.convolution(x, w, b, stride, padding, dilation, transposed, extra, groups)
    return channels_last_view(out) if channels_last else out


def _cost_conv(types: tuple[Any, ...], out: Type, attrs: Any) -> Cost:
    x, w = types[:2]
    per_pixel = product(w.shape[1:])  # multiply-adds one output (transposed: input) element takes part in
    pixels = x.numel if attrs["transposed"] else out.numel  # type: ignore[union-attr]
    return Cost(dim(2 * pixels * per_pixel), streaming_cost(types, out).bytes)


def _infer_pool(
    x: TensorType, *, kernel: tuple[int, ...], stride: tuple[int, ...], padding: tuple[int, ...],
    dilation: tuple[int, ...] = (), ceil: bool = False, channels_last: bool = False, padding_after: tuple[int, ...] = (),
) -> Type:  # fmt: skip
    """x [..., *space] with len(kernel) spatial dims at the end. padding_after: the padding behind x, where it differs."""
    space = len(kernel)
    if channels_last:
        if x.rank != space + 2:
            raise ValueError("with channels last x must have one batch dimension, space and channels")
        window: Any = {"kernel": kernel, "stride": stride, "padding": padding, "dilation": dilation}
        out = _infer_pool(_first(x), **window, ceil=ceil, padding_after=padding_after)
        return x.with_shape((out.shape[0], *out.shape[2:], out.shape[1]))  # type: ignore[union-attr]
    if not 1 <= space <= 3 or x.rank not in (space + 1, space + 2):
        raise ValueError("x must have channels, 1 to 3 spatial dimensions, and at most one batch dimension")
    if not x.dtype.is_floating_point:
        raise ValueError("it takes a floating-point tensor")
    if any(2 * p > k for p, k in zip(padding, kernel)):
        raise ValueError("padding may be at most half of the kernel")
    after = _after(padding, padding_after)
    if padding_after and ceil:
        raise ValueError("with padding_after it counts whole windows")
    dilations = dilation or (1,) * space
    out = (window_count(*each, ceil=ceil) for each in zip(x.shape[-space:], kernel, stride, padding, after, dilations))
    return x.with_shape((*x.shape[:-space], *_positive(out)))


def _infer_avg_pool(
    x: TensorType, *, kernel: tuple[int, ...], stride: tuple[int, ...], padding: tuple[int, ...],
    ceil: bool = False, count_padding: bool = True, divisor: int | None = None, channels_last: bool = False,
    padding_after: tuple[int, ...] = (),
) -> Type:  # fmt: skip
    """Means of windows; count_padding: padded zeros count as elements; divisor replaces the count."""
    if padding_after and not count_padding and divisor is None:
        raise ValueError("with padding_after all windows count as many elements")
    if len(kernel) == 1 and divisor is not None:
        raise ValueError("in one dimension there is no divisor")
    spatial = x.shape[1:-1] if channels_last else x.shape[-3:]
    if len(kernel) == 3 and any(isinstance(d, int) and d < k for d, k in zip(spatial, kernel)):
        raise ValueError("in three dimensions the kernel may not be larger than x without padding")
    window: Any = {"kernel": kernel, "stride": stride, "padding": padding, "padding_after": padding_after}
    return _infer_pool(x, **window, ceil=ceil, channels_last=channels_last)


_MAX_POOL = (F.max_pool1d, F.max_pool2d, F.max_pool3d)
_AVG_POOL = (F.avg_pool1d, F.avg_pool2d, F.avg_pool3d)


def _max_pool(
    x: Any, *, kernel: Any, stride: Any, padding: Any, dilation: Any, ceil: bool, channels_last: bool, padding_after: Any
) -> Any:  # fmt: skip
    x, padding = _filled(channels_first_view(x) if channels_last else x, padding, padding_after, -math.inf)
    out = _MAX_POOL[len(kernel) - 1](x, kernel, stride, padding, dilation or 1, ceil)
    return channels_last_view(out) if channels_last else out


def _avg_pool(
    x: Any, *, kernel: Any, stride: Any, padding: Any, ceil: bool, count_padding: bool, divisor: int | None, channels_last: bool,
    padding_after: Any,
) -> Any:  # fmt: skip
    extra = {} if len(kernel) == 1 else {"divisor_override": divisor}
    x, padding = _filled(channels_first_view(x) if channels_last else x, padding, padding_after)
    out = _AVG_POOL[len(kernel) - 1](x, kernel, stride, padding, ceil, count_padding, **extra)
    return channels_last_view(out) if channels_last else out


def _cost_pool(types: tuple[Any, ...], out: Type, attrs: Any) -> Cost:
    return Cost(dim(product(attrs["kernel"]) * out.numel), streaming_cost(types, out).bytes)  # type: ignore[union-attr]


CONTRACTIONS: tuple[Op, ...] = (
    Op("matmul", Category.CONTRACTION, _infer_matmul, torch.matmul, _cost_product),
    Op("linear", Category.CONTRACTION, _infer_linear, F.linear, _cost_product),
    Op("grouped_matmul", Category.CONTRACTION, _infer_grouped_matmul, grouped_matmul, _cost_product),
    Op("block_sparse_linear", Category.CONTRACTION, _infer_block_sparse_linear, block_sparse_linear, _cost_blocks),
    Op("conv", Category.CONTRACTION, _infer_conv, _conv, _cost_conv),
    Op("max_pool", Category.CONTRACTION, _infer_pool, _max_pool, _cost_pool),
    Op("avg_pool", Category.CONTRACTION, _infer_avg_pool, _avg_pool, _cost_pool),
)

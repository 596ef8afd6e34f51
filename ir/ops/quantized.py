"""Low-bit values: integers packed into bytes, integers and 8-bit floats with scales, rows quantized as they come, integer products.

    w    = dequantize(unpack(packed, bits=4), scale, zero, dtype=bf16)       weights of 4 bits in groups
    q, s = quantize_rows(x); y = cast(int_linear(q, w8), f32) * s            activations and weights of 8 bits

All but the product are composites: analyses and printers see shifts, products and views.
"""

from __future__ import annotations

import math
from typing import Any

import torch

from ..dims import Dim, dim, same
from ..graph import Node
from ..op import Category, Cost, Op, streaming_cost
from ..types import FLOAT8, TensorType, Type, category, compute_dtype, one_device
from .constants import CONSTANTS
from .pointwise import POINTWISE, check_native
from .reductions import REDUCTIONS
from .views import VIEWS

_OPS = {op.name: op for op in (*POINTWISE, *REDUCTIONS, *VIEWS, *CONSTANTS)}

MOST = 127
"""The largest magnitude in a quantized row: symmetric, so -128 does not occur."""


def _cast(x: Node, dtype: torch.dtype) -> Node:
    return x if x.dtype == dtype else _OPS["cast"](x, dtype=dtype)


# -- bytes that hold several integers


def _infer_unpack(packed: TensorType, *, bits: int) -> Type:
    """packed u8 [..., n] -> u8 [..., n * 8 / bits]: element i * (8 / bits) + j is in bits [j * bits, (j + 1) * bits) of byte i."""
    if bits not in (1, 2, 4):
        raise ValueError(f"bits must be 1, 2 or 4, not {bits}")
    if packed.dtype != torch.uint8 or not packed.rank:
        raise ValueError("it takes uint8 with dimensions")
    return packed.with_shape((*packed.shape[:-1], dim(packed.shape[-1] * (8 // bits))))


def _unpack(packed: torch.Tensor, *, bits: int) -> torch.Tensor:
    shifts = torch.arange(0, 8, bits, dtype=torch.uint8, device=packed.device)
    return ((packed[..., None] >> shifts) & (1 << bits) - 1).reshape(*packed.shape[:-1], packed.shape[-1] * (8 // bits))


def _expand_unpack(packed: Node, *, bits: int) -> Node:
    shifts = _OPS["iota"](length=8 // bits, step=bits, dtype=torch.uint8, device=packed.tensor.device)
    moved = _OPS["bitwise_right_shift"](_OPS["reshape"](packed, shape=(*packed.shape, 1)), shifts)
    shape = (*packed.shape[:-1], dim(packed.shape[-1] * (8 // bits)))
    return _OPS["reshape"](_OPS["bitwise_and"](moved, (1 << bits) - 1), shape=shape)


# -- values with scales


def _infer_dequantize(q: TensorType, scale: TensorType, zero: TensorType | None = None, *, dtype: torch.dtype) -> Type:
    """(q - zero) * scale; q [..., k] integers or 8-bit floats, scale and zero [..., g] for groups of k / g along the last dimension.

    Computed in float32 (float64 if scale or result are), then rounded to `dtype`. g is 1 or divides k; the other sizes of scale and zero
    are those of q, or 1.
    """
    if q.dtype not in FLOAT8 and (category(q.dtype) != 1 or q.dtype.itemsize > 4):
        raise ValueError("it takes integers of at most 32 bits or 8-bit floats")
    if not scale.dtype.is_floating_point or not dtype.is_floating_point or dtype in FLOAT8:
        raise ValueError("scale and result are floating-point tensors")
    given = (scale,) if zero is None else (scale, zero)
    check_native(*given)
    for t in given:
        _check_scale(q, t)
    if zero is not None and not same(zero.shape[-1], scale.shape[-1]):
        raise ValueError(f"{scale.shape[-1]} groups of scales, {zero.shape[-1]} of zeros")
    one_device(q, *given)
    return q.with_dtype(dtype)


def _check_scale(q: TensorType, scale: TensorType) -> None:
    if scale.rank != q.rank or not q.rank:
        raise ValueError("scale and zero must have as many dimensions as the values, at least one")
    if not all(same(g, 1) or same(g, size) for g, size in zip(scale.shape[:-1], q.shape[:-1])):
        raise ValueError(f"scales of {list(scale.shape)} do not go with values of {list(q.shape)}")
    k, groups = q.shape[-1], scale.shape[-1]
    divides = isinstance(k, int) and isinstance(groups, int) and groups > 0 and k % groups == 0
    if _splits(k, groups) and not divides:
        raise ValueError(f"{groups} groups do not divide {k} values")


def _splits(k: Dim, groups: Dim) -> bool:
    """Whether the last dimension must become two for scales to broadcast to it."""
    return not same(groups, 1) and not same(groups, k)


def _wide(*dtypes: torch.dtype) -> torch.dtype:
    return torch.float64 if torch.float64 in dtypes else torch.float32


def _dequantize(q: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor | None = None, *, dtype: torch.dtype) -> torch.Tensor:
    wide, (*lead, k), groups = _wide(dtype, scale.dtype), q.shape, scale.shape[-1]
    value = q.to(wide)
    if _splits(k, groups):
        value, scale = value.reshape(*lead, groups, k // groups), scale[..., None]
        zero = None if zero is None else zero[..., None]
    if zero is not None:
        value = value - zero.to(wide)
    return (value * scale.to(wide)).to(dtype).reshape(q.shape)


def _expand_dequantize(q: Node, scale: Node, zero: Node | None = None, *, dtype: torch.dtype) -> Node:
    wide, (*lead, k), groups = _wide(dtype, scale.dtype), q.shape, scale.shape[-1]
    value, shape = q, q.shape
    if _splits(k, groups):
        value = _OPS["reshape"](q, shape=(*lead, groups, k // groups))
        scale = _OPS["reshape"](scale, shape=(*scale.shape, 1))
        zero = zero and _OPS["reshape"](zero, shape=(*zero.shape, 1))
    value = _cast(value, wide)
    if zero is not None:
        value = _OPS["sub"](value, _cast(zero, wide))
    value = _cast(_OPS["mul"](value, _cast(scale, wide)), dtype)
    return value if value.tensor.rank == len(shape) else _OPS["reshape"](value, shape=shape)


# -- rows quantized as they come


def _infer_quantize_rows(x: TensorType) -> Type:
    """x [..., k] -> (i8 [..., k], scale [..., 1] in float32, of float64 in float64): symmetric, the largest magnitude of a row is 127.

    Rounded half to even. The scale of a row of zeros is 1; that of a row with NaN or infinities is NaN, and its values are 0.
    """
    check_native(x)
    if not x.dtype.is_floating_point or not x.rank:
        raise ValueError("it takes a floating-point tensor with dimensions")
    return (x.with_dtype(torch.int8), TensorType(compute_dtype(x.dtype), (*x.shape[:-1], 1), x.device))


def _quantize_rows(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    wide = x.to(compute_dtype(x.dtype))
    if not x.shape[-1]:
        return wide.to(torch.int8), wide.new_ones((*x.shape[:-1], 1))
    largest = wide.abs().amax(-1, keepdim=True)
    finite, step = largest.isfinite(), largest / MOST
    scale = torch.where(finite, torch.where(step > 0, step, 1.0), math.nan)  # of numbers next to 0 it may be 0, too
    q = torch.where(finite, (wide / scale).round(), 0.0).clamp(-MOST, MOST)
    return q.to(torch.int8), scale


def _expand_quantize_rows(x: Node) -> tuple[Node, Node]:
    wide = _cast(x, compute_dtype(x.dtype))
    if same(x.shape[-1], 0):
        one = _OPS["full"](shape=(*x.shape[:-1], 1), value=1.0, dtype=wide.dtype, device=x.tensor.device)
        return _cast(wide, torch.int8), one
    largest = _OPS["amax"](_OPS["abs"](wide), dims=(x.tensor.rank - 1,), keepdim=True)
    finite, step = _OPS["isfinite"](largest), _OPS["div"](largest, float(MOST))
    scale = _OPS["where"](finite, _OPS["where"](_OPS["gt"](step, 0.0), step, 1.0), math.nan)
    q = _OPS["where"](finite, _OPS["round"](_OPS["div"](wide, scale)), 0.0)
    return _cast(_OPS["clamp"](q, float(-MOST), float(MOST)), torch.int8), scale


# -- products of integers


def _infer_int_linear(q: TensorType, w: TensorType) -> Type:
    """q i8 [..., k], w i8 [n, k] -> i32 [..., n]: q @ w.T, exact as long as it fits (k up to 2 ** 17)."""
    if q.dtype != torch.int8 or w.dtype != torch.int8:
        raise ValueError("it takes int8")
    if w.rank != 2 or q.rank < 1 or not same(q.shape[-1], w.shape[1]):
        raise ValueError("q must end in the columns of w")
    one_device(q, w)
    return TensorType(torch.int32, (*q.shape[:-1], w.shape[0]), q.device)


def _int_linear(q: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    """By way of float64, which holds every sum exactly and has a fast product everywhere."""
    return (q.double() @ w.double().t()).to(torch.int64).to(torch.int32)


def _cost_int_linear(types: tuple[Any, ...], out: Type, attrs: Any) -> Cost:
    return Cost(dim(2 * types[0].shape[-1] * out.numel), streaming_cost(types, out).bytes)  # type: ignore[union-attr]


def _cost(flops_per_element: int) -> Any:
    return lambda types, out, attrs: streaming_cost(types, out, flops_per_element)


QUANTIZED: tuple[Op, ...] = (
    Op("unpack", Category.COMPOSITE, _infer_unpack, _unpack, _cost(2), expand=_expand_unpack),
    Op("dequantize", Category.COMPOSITE, _infer_dequantize, _dequantize, _cost(3), expand=_expand_dequantize),
    Op("quantize_rows", Category.COMPOSITE, _infer_quantize_rows, _quantize_rows, _cost(5), expand=_expand_quantize_rows),
    Op("int_linear", Category.CONTRACTION, _infer_int_linear, _int_linear, _cost_int_linear),
)

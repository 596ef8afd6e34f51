"""Reductions (`dims` dropped, or kept as 1) and scans (cumulative along `dim`)."""

from __future__ import annotations

from typing import Any

import torch

from ..op import Category, Op, streaming_cost
from ..types import TensorType, Type, category, normalize_dim


def _reduced(x: TensorType, dims: tuple[int, ...], keepdim: bool) -> tuple[Any, ...]:
    drop = {normalize_dim(d, x.rank) for d in dims} if dims else set(range(x.rank))
    if keepdim:
        return tuple(1 if i in drop else d for i, d in enumerate(x.shape))
    return tuple(d for i, d in enumerate(x.shape) if i not in drop)


def _infer_sum(x: TensorType, *, dims: tuple[int, ...] = (), keepdim: bool = False) -> Type:
    dtype = torch.int64 if category(x.dtype) < 2 else x.dtype
    return TensorType(dtype, _reduced(x, dims, keepdim), x.device)


def _infer_mean(x: TensorType, *, dims: tuple[int, ...] = (), keepdim: bool = False) -> Type:
    if category(x.dtype) < 2:
        raise ValueError("it takes a floating-point or complex tensor")
    return TensorType(x.dtype, _reduced(x, dims, keepdim), x.device)


def _infer_extremum(x: TensorType, *, dims: tuple[int, ...] = (), keepdim: bool = False) -> Type:
    return TensorType(x.dtype, _reduced(x, dims, keepdim), x.device)


def _infer_bool(x: TensorType, *, dims: tuple[int, ...] = (), keepdim: bool = False) -> Type:
    return TensorType(torch.bool, _reduced(x, dims, keepdim), x.device)


def _infer_arg(x: TensorType, *, dims: tuple[int, ...] = (), keepdim: bool = False) -> Type:
    if len(dims) > 1:
        raise ValueError("it reduces one dimension, or all of them")
    return TensorType(torch.int64, _reduced(x, dims, keepdim), x.device)


def _infer_var(x: TensorType, *, dims: tuple[int, ...] = (), correction: float = 1.0, keepdim: bool = False) -> Type:
    if not x.dtype.is_floating_point:
        raise ValueError("it takes a floating-point tensor")
    return TensorType(x.dtype, _reduced(x, dims, keepdim), x.device)


def _infer_scan(x: TensorType, *, dim: int) -> Type:
    normalize_dim(dim, x.rank)
    return x.with_dtype(torch.int64) if category(x.dtype) < 2 else x


def _all_dims(x: torch.Tensor, dims: tuple[int, ...]) -> tuple[int, ...]:
    return dims or tuple(range(x.dim()))


def _prod(x: torch.Tensor, *, dims: tuple[int, ...], keepdim: bool) -> torch.Tensor:
    out = x.to(torch.int64) if category(x.dtype) < 2 else x
    for d in sorted((d % max(x.dim(), 1) for d in _all_dims(x, dims)), reverse=True):
        out = torch.prod(out, d, keepdim=keepdim)
    return out


def _bool(function: Any) -> Any:
    def call(x: torch.Tensor, *, dims: tuple[int, ...], keepdim: bool) -> torch.Tensor:
        x = x.to(torch.bool)
        return function(x, _all_dims(x, dims), keepdim=keepdim) if x.dim() else x

    return call


def _arg(function: Any) -> Any:
    return lambda x, *, dims, keepdim: function(x, dims[0] if dims else None, keepdim=keepdim)


def _extremum(function: Any) -> Any:
    return lambda x, *, dims, keepdim: function(x, _all_dims(x, dims), keepdim=keepdim) if x.dim() else x


def _cost(types: tuple[Type, ...], out: Type, attrs: Any) -> Any:
    moved = streaming_cost(types, out)
    return type(moved)(types[0].numel, moved.bytes)  # type: ignore[union-attr]


REDUCTIONS: tuple[Op, ...] = (
    Op("sum", Category.REDUCTION, _infer_sum, lambda x, *, dims, keepdim: torch.sum(x, _all_dims(x, dims), keepdim=keepdim), _cost),
    Op("mean", Category.REDUCTION, _infer_mean, lambda x, *, dims, keepdim: torch.mean(x, _all_dims(x, dims), keepdim=keepdim), _cost),
    Op("prod", Category.REDUCTION, _infer_sum, _prod, _cost),
    Op("amax", Category.REDUCTION, _infer_extremum, _extremum(torch.amax), _cost),
    Op("amin", Category.REDUCTION, _infer_extremum, _extremum(torch.amin), _cost),
    Op("any", Category.REDUCTION, _infer_bool, _bool(torch.any), _cost),
    Op("all", Category.REDUCTION, _infer_bool, _bool(torch.all), _cost),
    Op("argmax", Category.REDUCTION, _infer_arg, _arg(torch.argmax), _cost),
    Op("argmin", Category.REDUCTION, _infer_arg, _arg(torch.argmin), _cost),
    Op("var", Category.REDUCTION, _infer_var,
       lambda x, *, dims, correction, keepdim: torch.var(x, _all_dims(x, dims), correction=correction, keepdim=keepdim), _cost),
    Op("cumsum", Category.SCAN, _infer_scan, lambda x, *, dim: torch.cumsum(x, dim), _cost),
    Op("cumprod", Category.SCAN, _infer_scan, lambda x, *, dim: torch.cumprod(x, dim), _cost),
)  # fmt: skip

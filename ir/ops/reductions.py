"""Reductions (`dims` dropped, or kept as 1) and scans (cumulative along `dim`)."""

from __future__ import annotations

from typing import Any

import torch

from ..dims import dim, same
from ..op import Category, Cost, Op, streaming_cost
from ..types import TensorType, Type, category, normalize_dim
from .pointwise import check_native


def _reduced(x: TensorType, dims: tuple[int, ...], keepdim: bool, needs_elements: bool = False) -> tuple[Any, ...]:
    """The shape left over; dims=() reduces all. needs_elements: the op has no identity, so an empty dimension cannot be reduced."""
    check_native(x)
    drop = {normalize_dim(d, x.rank) for d in dims} if dims else set(range(x.rank))
    if len(drop) < len(dims):
        raise ValueError(f"a dimension appears twice in {list(dims)}")
    if needs_elements and any(i in drop and same(d, 0) for i, d in enumerate(x.shape)):
        raise ValueError("a dimension of size 0 has no largest or smallest element")
    if keepdim:
        return tuple(1 if i in drop else d for i, d in enumerate(x.shape))
    return tuple(d for i, d in enumerate(x.shape) if i not in drop)


def _infer_sum(x: TensorType, *, dims: tuple[int, ...] = (), keepdim: bool = False) -> Type:
    dtype = torch.int64 if category(x.dtype) < 2 else x.dtype
    return TensorType(dtype, _reduced(x, dims, keepdim), x.device)


def _infer_mean(x: TensorType, *, dims: tuple[int, ...] = (), keepdim: bool = False) -> Type:
    _floating(x)
    return TensorType(x.dtype, _reduced(x, dims, keepdim), x.device)


def _floating(x: TensorType) -> None:
    if not x.dtype.is_floating_point:
        raise ValueError("it takes a floating-point tensor")


def _infer_extremum(x: TensorType, *, dims: tuple[int, ...] = (), keepdim: bool = False) -> Type:
    return TensorType(x.dtype, _reduced(x, dims, keepdim, needs_elements=True), x.device)


def _infer_bool(x: TensorType, *, dims: tuple[int, ...] = (), keepdim: bool = False) -> Type:
    """Is any (are all) elements non-zero; uint8 is refused, there torch yields uint8."""
    if x.dtype == torch.uint8:
        raise ValueError("on uint8 its result is no bool")
    return TensorType(torch.bool, _reduced(x, dims, keepdim), x.device)


def _infer_arg(x: TensorType, *, dims: tuple[int, ...] = (), keepdim: bool = False) -> Type:
    """Index of the first extremum (of the first NaN if there is one) along one dimension, or in the flattened tensor for dims=()."""
    if len(dims) > 1:
        raise ValueError("it reduces one dimension, or all of them")
    if x.dtype == torch.bool:
        raise ValueError("it is not defined for bool")
    return TensorType(torch.int64, _reduced(x, dims, keepdim, needs_elements=True), x.device)


def _infer_var(x: TensorType, *, dims: tuple[int, ...] = (), correction: float = 1.0, keepdim: bool = False) -> Type:
    """Sum of squared deviations over max(0, count - correction); NaN where that is 0 / 0."""
    _floating(x)
    return TensorType(x.dtype, _reduced(x, dims, keepdim), x.device)


def _infer_scan(x: TensorType, *, dim: int) -> Type:  # integers and bool are summed in int64
    check_native(x)
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


def _cost(flops_per_element: int) -> Any:
    """Work is done per element read, not per element written."""
    return lambda types, out, attrs: Cost(dim(flops_per_element * types[0].numel), streaming_cost(types, out).bytes)


REDUCTIONS: tuple[Op, ...] = (
    Op("sum", Category.REDUCTION, _infer_sum, lambda x, *, dims, keepdim: torch.sum(x, _all_dims(x, dims), keepdim=keepdim), _cost(1)),
    Op("mean", Category.REDUCTION, _infer_mean, lambda x, *, dims, keepdim: torch.mean(x, _all_dims(x, dims), keepdim=keepdim), _cost(1)),
    Op("prod", Category.REDUCTION, _infer_sum, _prod, _cost(1)),
    Op("amax", Category.REDUCTION, _infer_extremum, _extremum(torch.amax), _cost(1)),
    Op("amin", Category.REDUCTION, _infer_extremum, _extremum(torch.amin), _cost(1)),
    Op("any", Category.REDUCTION, _infer_bool, _bool(torch.any), _cost(1)),
    Op("all", Category.REDUCTION, _infer_bool, _bool(torch.all), _cost(1)),
    Op("argmax", Category.REDUCTION, _infer_arg, _arg(torch.argmax), _cost(1)),
    Op("argmin", Category.REDUCTION, _infer_arg, _arg(torch.argmin), _cost(1)),
    Op("var", Category.REDUCTION, _infer_var,
       lambda x, *, dims, correction, keepdim: torch.var(x, _all_dims(x, dims), correction=correction, keepdim=keepdim), _cost(3)),
    Op("cumsum", Category.SCAN, _infer_scan, lambda x, *, dim: torch.cumsum(x, dim), _cost(1)),
    Op("cumprod", Category.SCAN, _infer_scan, lambda x, *, dim: torch.cumprod(x, dim), _cost(1)),
)  # fmt: skip

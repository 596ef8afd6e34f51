"""ATen reductions and scans -> ours. `dtype=` arguments become casts of the operand, as in ATen."""

from __future__ import annotations

from typing import Any

import torch

from ..graph import Node
from ..types import compute_dtype
from .call import Call, Converter, Result, cast, make, reshape


def _dims(dim: Any) -> tuple[int, ...]:
    """None, one dimension or several -> ours, where () means all."""
    if dim is None:
        return ()
    return (dim,) if isinstance(dim, int) else tuple(dim)


def _reduce(name: str) -> Converter:
    """op(self, dim, keepdim, *, dtype)."""

    def convert(call: Call, x: Node, dim: Any, keepdim: bool, dtype: torch.dtype | None = None) -> Result:
        return make(name, x if dtype is None else cast(x, dtype), dims=_dims(dim), keepdim=keepdim)

    return convert


def _reduce_all(name: str) -> Converter:
    """op(self, *, dtype) over every dimension."""

    def convert(call: Call, x: Node, dtype: torch.dtype | None = None) -> Result:
        return make(name, x if dtype is None else cast(x, dtype))

    return convert


def _reduce_every(name: str) -> Converter:
    """any, all over every dimension."""
    return lambda call, x: make(name, cast(x, torch.bool))


def _reduce_some(name: str) -> Converter:
    """any, all (self, dim, keepdim): an empty list of dimensions has a meaning of its own, left to ATen; uint8 gives uint8."""

    def convert(call: Call, x: Node, dim: Any, keepdim: bool) -> Result:
        return None if dim is not None and _dims(dim) == () else make(name, cast(x, torch.bool), dims=_dims(dim), keepdim=keepdim)

    return convert


def _extremum(value: str, index: str) -> Converter:
    """max.dim and min.dim: values and positions."""

    def convert(call: Call, x: Node, dim: int, keepdim: bool) -> Result:
        if x.dtype == torch.bool:
            return None
        return (
            make(value, x, dims=(dim,), keepdim=keepdim) if call.used(0) else None,
            make(index, x, dims=(dim,), keepdim=keepdim) if call.used(1) else None,
        )

    return convert


def _var(call: Call, x: Node, dim: Any, correction: Any, keepdim: bool) -> Result:
    return make("var", x, dims=_dims(dim), correction=1.0 if correction is None else float(correction), keepdim=keepdim)


def _var_mean(call: Call, x: Node, dim: Any, correction: Any, keepdim: bool) -> Result:
    return _var(call, x, dim, correction, keepdim), make("mean", x, dims=_dims(dim), keepdim=keepdim)  # type: ignore[return-value]


def _scan(name: str) -> Converter:
    def convert(call: Call, x: Node, dim: int, dtype: torch.dtype | None) -> Result:
        return make(name, x if dtype is None else cast(x, dtype), dim=dim) if x.tensor.rank else None

    return convert


def _softmax(name: str) -> Converter:
    def convert(call: Call, x: Node, dim: int, half_to_float: bool) -> Result:
        return make(name, cast(x, compute_dtype(x.dtype)) if half_to_float else x, dim=dim)

    return convert


def _softmax_int(name: str) -> Converter:
    def convert(call: Call, x: Node, dim: int, dtype: torch.dtype | None) -> Result:
        return make(name, x if dtype is None else cast(x, dtype), dim=dim)

    return convert


def _histc(call: Call, x: Node, bins: int, low: float, high: float) -> Result:
    """How often each of the integers 0 .. bins - 1 occurs; histograms of other numbers are left to ATen."""
    source = x.inputs[0] if x.op.name == "cast" else x
    if source.dtype not in (torch.int32, torch.int64) or low != 0 or high != bins - 1:
        return None
    values = reshape(source, (1, source.tensor.numel))
    numbers = reshape(make("iota", length=bins, dtype=source.dtype, device=x.tensor.device), (bins, 1))
    return cast(make("sum", cast(make("eq", values, numbers), torch.int64), dims=(1,)), x.dtype)


REDUCTIONS: dict[str, Converter] = {
    "aten.sum.dim_IntList": _reduce("sum"), "aten.sum.default": _reduce_all("sum"),
    "aten.mean.dim": _reduce("mean"), "aten.mean.default": _reduce_all("mean"),
    "aten.prod.dim_int": _reduce("prod"), "aten.prod.default": _reduce_all("prod"),
    "aten.amax.default": _reduce("amax"), "aten.amin.default": _reduce("amin"),
    "aten.max.default": _reduce_all("amax"), "aten.min.default": _reduce_all("amin"),
    "aten.max.dim": _extremum("amax", "argmax"), "aten.min.dim": _extremum("amin", "argmin"),
    "aten.histc.default": _histc,
    "aten.argmax.default": _reduce("argmax"), "aten.argmin.default": _reduce("argmin"),
    "aten.any.default": _reduce_every("any"), "aten.any.dim": _reduce_some("any"), "aten.any.dims": _reduce_some("any"),
    "aten.all.default": _reduce_every("all"), "aten.all.dim": _reduce_some("all"), "aten.all.dims": _reduce_some("all"),
    "aten.var.correction": _var, "aten.var_mean.correction": _var_mean,
    "aten.cumsum.default": _scan("cumsum"), "aten.cumprod.default": _scan("cumprod"),
    "aten._softmax.default": _softmax("softmax"), "aten._log_softmax.default": _softmax("log_softmax"),
    "aten.softmax.int": _softmax_int("softmax"), "aten.log_softmax.int": _softmax_int("log_softmax"),
}  # fmt: skip

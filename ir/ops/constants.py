"""Constants: weights by name, fills and ranges."""

from __future__ import annotations

from typing import Any

import torch

from ..dims import Dim
from ..graph import Data
from ..op import Category, Op, no_cost
from ..types import TensorType, Type


def _infer_constant(*, data: Data, type: TensorType | None = None) -> Type:
    """`type` may be left out where the data is at hand."""
    if type is not None:
        return type
    if data.value is None:
        raise ValueError("a constant without data needs its type")
    return tensor_type(data.value)


def tensor_type(value: torch.Tensor) -> TensorType:
    """The type of a tensor at hand."""
    device = "cpu" if value.device.type == "cpu" else str(value.device)
    return TensorType(value.dtype, tuple(int(d) for d in value.shape), device)


def _constant(*, data: Data, type: Any = None) -> torch.Tensor:
    if data.value is None:
        raise RuntimeError(f'constant "{data.name}" has no data: the graph was read without its weights')
    return data.value


def _infer_full(*, shape: tuple[Dim, ...] = (), value: Any, dtype: torch.dtype, device: str = "cpu") -> Type:
    """`value` is a number or, for integers, a size."""
    return TensorType(dtype, shape, device)


def _full(*, shape: tuple[int, ...], value: Any, dtype: torch.dtype, device: str) -> torch.Tensor:
    return torch.full(shape, value, dtype=dtype, device=device)


def _infer_iota(*, length: Dim, start: Any = 0, step: Any = 1, dtype: torch.dtype = torch.int64, device: str = "cpu") -> Type:
    """out[i] = start + i * step."""
    return TensorType(dtype, (length,), device)


def _iota(*, length: int, start: Any, step: Any, dtype: torch.dtype, device: str) -> torch.Tensor:
    wide = torch.float64 if dtype.is_floating_point else torch.int64
    return (torch.arange(length, dtype=wide, device=device) * step + start).to(dtype)


CONSTANTS: tuple[Op, ...] = (
    Op("constant", Category.CONSTANT, _infer_constant, _constant, no_cost),
    Op("full", Category.CONSTANT, _infer_full, _full, no_cost),
    Op("iota", Category.CONSTANT, _infer_iota, _iota, no_cost),
)

"""Views: out[i] = in[f(i)] with f known at compile time. They cost nothing: code generation dissolves them into index expressions."""

from __future__ import annotations

from typing import Any

import torch

from ..dims import Dim, dim, floordiv, product, same
from ..op import Category, Op, no_cost
from ..types import TensorType, Type, normalize_dim


def _infer_reshape(x: TensorType, *, shape: tuple[Dim, ...]) -> Type:
    """The same elements in row-major order; every size is given, none is -1."""
    if not same(x.numel, product(shape)):
        raise ValueError(f"{x.numel} elements do not fit shape {list(shape)}")
    return x.with_shape(shape)


def _infer_permute(x: TensorType, *, dims: tuple[int, ...]) -> Type:
    if sorted(dims) != list(range(x.rank)):
        raise ValueError(f"dims must be a permutation of 0..{x.rank - 1}, not {list(dims)}")
    return x.with_shape(tuple(x.shape[d] for d in dims))


def _infer_expand(x: TensorType, *, shape: tuple[Dim, ...]) -> Type:
    """Dimensions of size 1 repeated, new ones in front; every size is given, none is -1."""
    lead = len(shape) - x.rank
    if lead < 0:
        raise ValueError("the new shape has fewer dimensions")
    for old, new in zip(x.shape, shape[lead:]):
        if old is not new and not same(old, 1) and not same(old, new):
            raise ValueError(f"size {old} does not expand to {new}")
    return x.with_shape(shape)


def _infer_slice(x: TensorType, *, dim: int, start: Dim, stop: Dim, step: int = 1) -> Type:
    """start and stop are already clamped into the tensor: 0 <= start <= stop <= size."""
    d = normalize_dim(dim, x.rank)
    if not isinstance(step, int) or step < 1:
        raise ValueError("step must be positive")
    if not _ordered(0, start, stop, x.shape[d]):
        raise ValueError(f"bounds {start}:{stop} are not clamped into 0..{x.shape[d]}")
    return x.with_shape((*x.shape[:d], slice_length(start, stop, step), *x.shape[d + 1 :]))


def _ordered(*values: Dim) -> bool:
    """No two neighbours are known to descend."""
    return all(not (isinstance(a, int) and isinstance(b, int)) or a <= b for a, b in zip(values, values[1:]))


def slice_length(start: Dim, stop: Dim, step: int) -> Dim:
    return floordiv(dim(stop - start + (step - 1)), step)


def _infer_select(x: TensorType, *, dim: int, index: Dim) -> Type:
    """index is already in [0, size)."""
    d = normalize_dim(dim, x.rank)
    if not x.rank:
        raise ValueError("it takes a tensor with dimensions")
    if not _ordered(0, index) or not _ordered(index + 1, x.shape[d]):
        raise ValueError(f"index {index} is outside 0..{x.shape[d]}")
    return x.with_shape((*x.shape[:d], *x.shape[d + 1 :]))


def _infer_flip(x: TensorType, *, dims: tuple[int, ...]) -> Type:
    if len({normalize_dim(d, x.rank) for d in dims}) < len(dims):
        raise ValueError(f"a dimension appears twice in {list(dims)}")
    return x


def _infer_as_strided(x: TensorType, *, shape: tuple[Dim, ...], strides: tuple[Dim, ...], offset: Dim = 0, of: tuple[Dim, ...]) -> Type:
    """Element i of the result is at `offset + i . strides` of x laid out with strides `of`."""
    if len(shape) != len(strides) or len(of) != x.rank:
        raise ValueError("strides must have one entry per dimension of the result, `of` one per dimension of the operand")
    return x.with_shape(shape)


def laid_out(x: torch.Tensor, strides: tuple[int, ...], own: bool = False) -> torch.Tensor:
    """x with exactly these strides: a copy unless it has them, always one if `own`; along a stride of 0 all elements of x must be equal."""
    if not own and x.stride() == tuple(strides):
        return x
    once = x
    for d, stride in enumerate(strides):
        once = once.narrow(d, 0, 1) if stride == 0 and x.shape[d] > 1 else once
    out = torch.empty_strided(once.shape, strides, dtype=x.dtype, device=x.device).copy_(once)
    return out if once is x else out.as_strided(x.shape, strides)


def _as_strided(x: torch.Tensor, *, shape: Any, strides: Any, offset: int, of: Any) -> torch.Tensor:
    base = laid_out(x, of)
    return base.as_strided(shape, strides, base.storage_offset() + offset)


def _slice(x: torch.Tensor, *, dim: int, start: int, stop: int, step: int) -> torch.Tensor:
    index = [slice(None)] * x.dim()
    index[dim] = slice(start, stop, step)
    return x[tuple(index)]


def _infer_layout(x: TensorType, *, strides: tuple[Dim, ...], own: bool = False) -> Type:
    """own: in memory that nothing else shares: a copy of an input, or of what is returned already."""
    if len(strides) != x.rank:
        raise ValueError(f"strides must have one entry for each of the {x.rank} dimensions")
    return x


VIEWS: tuple[Op, ...] = (
    Op("reshape", Category.VIEW, _infer_reshape, lambda x, *, shape: x.reshape(shape), no_cost),
    Op("permute", Category.VIEW, _infer_permute, lambda x, *, dims: x.permute(dims), no_cost),
    Op("expand", Category.VIEW, _infer_expand, lambda x, *, shape: x.expand(shape), no_cost),
    Op("slice", Category.VIEW, _infer_slice, _slice, no_cost),
    Op("select", Category.VIEW, _infer_select, lambda x, *, dim, index: x.select(dim, index), no_cost),
    Op("flip", Category.VIEW, _infer_flip, lambda x, *, dims: x.flip(dims), no_cost),
    Op("as_strided", Category.VIEW, _infer_as_strided, _as_strided, no_cost),
    # the same values, laid out in memory with these strides: how a graph returns a tensor as eager lays it out
    Op("layout", Category.VIEW, _infer_layout, lambda x, *, strides, own: laid_out(x, strides, own), no_cost),
)

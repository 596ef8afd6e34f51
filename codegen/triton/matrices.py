"""Operands of a contraction that are matrices in memory as they are multiplied: tensor descriptors (NVIDIA's TMA) can copy blocks of them.

x[m, k] at 16 + 1024*m + k in bfloat16      -->  Matrix("x", offset=16, stride=1024)
x[image, y, x, channel] with a padding      -->  None: what lies outside of the image is masked
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import sympy

from ...ir.dims import Dim, Mod, dim, free_symbols
from ...ir.scalar import Scalar
from ..kernel import Axis, Load
from .indices import Span
from .product import Product, is_turned

LINE = 16
"""Bytes: rows begin at multiples of it."""


@dataclass(frozen=True)
class Matrix:
    """Rows of contiguous elements: row r begins at offset + r * stride. Rows lie along the rows or columns of the product, or along its
    depth where the operand is turned (`is_turned`)."""

    buffer: str
    offset: Dim
    stride: Dim


def matrices(found: Product) -> dict[tuple[int, int], Matrix]:
    """(number of the contraction, side) -> its operand, where that is a matrix."""
    every = {(n, side): _matrix(found, pair[side], side) for n, (*pair, _) in enumerate(found.multiplied) for side in (0, 1)}
    return {place: matrix for place, matrix in every.items() if matrix is not None}


def _matrix(found: Product, value: Scalar, side: int) -> Matrix | None:
    if not isinstance(value, Load) or value.mask is not None or value.indirect:
        return None
    buffer = found.kernel.buffer(value.buffer)
    fixed, depth = (found.rows, found.columns)[side], found.depth
    if buffer.dtype != value.dtype or not fixed or not _may_be_long(found.size(fixed)) or not _may_be_deep(found.size(depth)):
        return None
    terms = _linear(value.index, (depth, fixed) if is_turned(found, side) else (fixed, depth))
    names = {a.name for a in found.kernel.axes}
    if terms is None or any(s.name in names for s in free_symbols(terms)):  # type: ignore[attr-defined]
        return None
    stride, inner, offset = terms
    if inner != 1 or isinstance(stride, int) and stride <= 0:
        return None
    return Matrix(value.buffer, offset, stride) if all(_lies_well(n * buffer.dtype.itemsize) for n in (stride, offset)) else None


def _may_be_long(extent: Dim) -> bool:
    """A descriptor counts in 32 bits."""
    return not isinstance(extent, int) or extent < 2**31


def _may_be_deep(extent: Dim) -> bool:
    """What is empty has no descriptor; an empty depth must be known, since programs run over it."""
    return isinstance(extent, int) and 0 < extent < 2**31


def _linear(index: Dim, spans: Sequence[tuple[Axis, ...]]) -> list[Dim] | None:
    """By how much an index moves with the flat point over each of some axes, then the rest of it; None where it does otherwise."""
    strides: list[Dim] = []
    rest: sympy.Expr = sympy.sympify(index)  # type: ignore[assignment]
    for axes in spans:
        span = Span(axes, "")
        rest, stands = span.runs(rest)
        if [(run.first, run.last) for run in stands.values()] != [(0, len(axes) - 1)]:
            return None
        (flat,) = stands
        rest = sympy.expand(rest)
        stride = rest.coeff(flat)
        rest = sympy.expand(rest - stride * flat)
        strides.append(dim(stride))
    return [*strides, dim(rest)]


def _lies_well(nbytes: Dim) -> bool:
    return Mod(sympy.sympify(nbytes), sympy.Integer(LINE)) == 0

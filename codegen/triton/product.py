"""The roles of the axes of a kernel with contractions, and its operands as `tl.dot` takes them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NoReturn

import sympy
import torch

from ...ir.dims import Dim, evaluate, free_symbols, product
from ...ir.scalar import Apply, Scalar
from ..hashcons import shared
from ..kernel import Attend, Axis, Dot, Kernel, Load, Reduce, Scan, cone, free_axes, scalars
from ..kernel import operands as below
from .legalize import UnsupportedByTriton, legalize, rewritten
from .ragged_roles import Parts, one_part, with_parts

ACCUMULATORS: dict[torch.dtype, torch.dtype] = {
    torch.float16: torch.float32, torch.bfloat16: torch.float32, torch.float32: torch.float32, torch.float64: torch.float64,
    torch.int8: torch.int32,
}  # fmt: skip
"""What `tl.dot` multiplies, and what it adds in."""

NARROW: dict[torch.dtype, torch.dtype] = {torch.float16: torch.float32, torch.bfloat16: torch.float32, torch.int8: torch.int32}
"""Operands that matrix units take as they are stored, and what they are widened to elsewhere."""

FEW = 16
"""Rows and columns that `tl.dot` pads to: fewer leave matrix units idle."""

TYPICAL = 64
"""A size that is known at the launch only, where strides are compared."""


@dataclass(frozen=True)
class Product:
    """left[batch, rows, depth] @ right[batch, depth, columns]; each a tuple of axes, outermost first.

    kernel: legalized, its `dots` all over the same depth; operands: of each, the one with the rows first. parts: what is uneven, if
    anything; the product is then that of one part.
    """

    kernel: Kernel
    dots: tuple[Dot, ...]
    operands: tuple[tuple[Scalar, Scalar], ...]
    batch: tuple[Axis, ...]
    rows: tuple[Axis, ...]
    columns: tuple[Axis, ...]
    depth: tuple[Axis, ...]
    parts: Parts | None = None

    def size(self, axes: Sequence[Axis]) -> Dim:
        return product(a.extent for a in axes)

    @property
    def reduces(self) -> bool:
        """Whether results are reduced over the columns."""
        return any(a.inner for a in self.columns)

    @property
    def multiplied(self) -> tuple[tuple[Scalar, Scalar, torch.dtype], ...]:
        """Of each contraction both operands as they are multiplied, and in which dtype."""
        return tuple(multiplied(self.kernel, left, right, dot.dtype) for dot, (left, right) in zip(self.dots, self.operands))


def dots(kernel: Kernel) -> list[Dot]:
    return [v for v in scalars(kernel.stores) if isinstance(v, Dot)]


def is_contraction(kernel: Kernel) -> bool:
    return kernel.recurrence is None and bool(dots(kernel)) and not any(isinstance(v, Attend) for v in scalars(kernel.stores))


def without_matrix(kernel: Kernel) -> Kernel:
    """A contraction that has a batch but neither rows nor columns (depthwise) as a sum that is reduced; other kernels as they are."""
    if not is_contraction(kernel):
        return kernel
    found, free = dots(kernel), free_axes(kernel)
    if any(d.within or (free[d.left] ^ free[d.right]) - set(d.axes) for d in found):
        return kernel
    return replace(kernel, stores=rewritten(kernel.stores, {d: as_sum(d) for d in found}))


def as_sum(dot: Dot) -> Reduce:
    return Reduce(dot.dtype, "sum", Apply(dot.dtype, "mul", (dot.left, dot.right)), dot.axes)


def find_product(kernel: Kernel) -> Product:
    """The roles of the axes of a kernel with contractions. Raises UnsupportedByTriton where they are no products of matrices."""
    whole = kernel
    kernel, limits = one_part(whole)
    kernel = _one_depth(legalize(kernel))
    found, free = dots(kernel), free_axes(kernel)
    depth = [a for a in kernel.axes if a.name in found[0].axes]
    walked = [a for a in kernel.axes if a not in depth]
    operands, left, right = _sides(found, free)
    if _are_turned(walked, left, right):
        operands, left, right = [(b, a) for a, b in operands], right, left
    roles = Product(
        kernel,
        tuple(found),
        tuple(operands),
        batch=tuple(a for a in walked if a.name in left & right),
        rows=tuple(a for a in walked if a.name not in right),  # axes of neither operand are rows that repeat
        columns=tuple(a for a in walked if a.name in right - left),
        depth=_ordered(kernel, operands[0], depth),
    )
    _check(roles, free)
    return roles if limits is None else with_parts(roles, whole, limits)


def _one_depth(kernel: Kernel) -> Kernel:
    """The kernel with all contractions over the axes of the first one."""
    found = dots(kernel)
    extents = {a.name: a.extent for a in kernel.axes}
    if any([extents[a] for a in d.axes] != [extents[a] for a in found[0].axes] for d in found):
        _refuse(kernel, "its contractions are not equally deep")
    if any(isinstance(v, (Dot, Reduce, Scan)) for v in cone(v for d in found for v in (d.left, d.right))):
        _refuse(kernel, "an operand of its contraction is itself summed")
    axes = {a.name: a.symbol for a in kernel.axes}
    places = {axes[a]: axes[b] for d in found for a, b in zip(d.axes, found[0].axes) if a != b}
    if not places:
        return kernel
    moved = rewritten(kernel.stores, {}, places)
    renamed: dict[Scalar, Scalar] = {d: replace(d, axes=found[0].axes) for d in scalars(moved) if isinstance(d, Dot)}
    stores = shared(rewritten(moved, renamed))
    return replace(kernel, stores=stores, axes=tuple(a for a in kernel.axes if a.symbol not in places))


def _refuse(kernel: Kernel, reason: str) -> NoReturn:
    raise UnsupportedByTriton(what=kernel.name, reason=reason)


def _sides(found: Sequence[Dot], free: dict[Scalar, frozenset[str]]) -> tuple[list[tuple[Scalar, Scalar]], frozenset[str], frozenset[str]]:
    """The operands of each contraction, rows first as in the first one, and the axes of all on either side."""
    operands: list[tuple[Scalar, Scalar]] = []
    left: frozenset[str] = frozenset()
    right: frozenset[str] = frozenset()
    for dot in found:
        sides = [(dot.left, dot.right), (dot.right, dot.left)]
        a, b = min(sides, key=lambda s: len(((left | free[s[0]]) & (right | free[s[1]])) - set(dot.axes)))
        operands.append((a, b))
        left, right = left | free[a] - set(dot.axes), right | free[b] - set(dot.axes)
    return operands, left, right


def _are_turned(walked: Sequence[Axis], left: frozenset[str], right: frozenset[str]) -> bool:
    """Whether the rows should be the columns: what a result is reduced over are columns, and few of them had better be rows."""
    if any(a.inner for a in walked):
        return any(a.inner for a in walked if a.name in left - right)
    rows = product(a.extent for a in walked if a.name not in right)
    columns = product(a.extent for a in walked if a.name in right - left)
    return isinstance(columns, int) and columns < FEW and (not isinstance(rows, int) or rows > columns)


def _ordered(kernel: Kernel, operands: tuple[Scalar, Scalar], depth: Sequence[Axis]) -> tuple[Axis, ...]:
    """The axes of the depth in the order of an operand in memory, the right one if it is: largest stride first."""
    left, right = operands
    one = right if isinstance(right, Load) else left
    loads = [v for v in cone([one]) if isinstance(v, Load)]
    return tuple(sorted(depth, key=lambda axis: -max((abs(stride(kernel, v.index, axis)) for v in loads), default=0)))


def stride(kernel: Kernel, index: sympy.Expr, axis: Axis) -> int:
    """By how much an index moves with the axis, near 0."""
    names = {a.name for a in kernel.axes}
    at = {s.name: 0 if s.name in names else TYPICAL for s in free_symbols([index])}
    return int(evaluate(index, at | {axis.name: 1}) - evaluate(index, at | {axis.name: 0})) if axis.name in at else 0


def deep_loads(found: Product, side: int) -> list[Load]:
    """What is loaded for the left (0) or right (1) operands, but for what is the same along the depth (scales of rows or columns)."""
    loads = [v for pair in found.operands for v in cone([pair[side]]) if isinstance(v, Load)]
    return [v for v in loads if any(stride(found.kernel, v.index, a) for a in found.depth)] or loads


def shared_terms(found: Product) -> int:
    """How many terms along the depth, a power of two, share what is loaded for each group of them (scales); 0 where nothing is."""
    least = 0
    for load in (v for side in (0, 1) for v in deep_loads(found, side)):
        moving = [n for n, a in enumerate(found.depth) if stride(found.kernel, load.index, a)]
        behind = product(a.extent for a in found.depth[moving[-1] + 1 :]) if moving else 0
        if isinstance(behind, int) and behind >= FEW:
            least = min(least or behind, behind & -behind)
    return least


def is_computed(found: Product) -> bool:
    """Whether an operand is more than what is loaded, in whatever dtype."""
    return any(isinstance(v, Apply) and v.op != "cast" for v in cone(v for pair in found.operands for v in pair))


def is_turned(found: Product, side: int) -> bool:
    """Whether an operand lies in memory along its rows or columns rather than along the depth."""
    fixed, loads = (found.rows, found.columns)[side], deep_loads(found, side)

    def contiguous(axes: Sequence[Axis]) -> int:
        return sum(any(abs(stride(found.kernel, v.index, a)) == 1 for a in axes) for v in loads)

    return contiguous(fixed) > contiguous(found.depth)


def _check(roles: Product, free: dict[Scalar, frozenset[str]]) -> None:
    kernel = roles.kernel
    columns = {a.name for a in roles.columns}
    if any(a.inner for a in (*roles.batch, *roles.rows)):
        _refuse(kernel, "a result is reduced over what is not its columns")
    if roles.reduces and not isinstance(roles.size(roles.columns), int):
        _refuse(kernel, "a result is reduced over columns whose number is known at the launch only")
    above = cone((s.value for s in kernel.stores), cone(roles.dots))
    for value in above:
        if isinstance(value, (Reduce, Scan)) and set(value.axes if isinstance(value, Reduce) else (value.axis,)) != columns:
            _refuse(kernel, "a reduction beside a contraction is not over all of its columns")
    read = {v.buffer for v in cone(roles.dots) if isinstance(v, Load)}
    if any(source in read for _, source in kernel.inplace):
        _refuse(kernel, "an output lies over an operand of its contraction")
    spread = spreads(above, roles.dots)
    if any(s.value not in spread and s.buffer in dict(kernel.inplace) for s in kernel.stores):
        _refuse(kernel, "an output over an input holds no result of its contraction")


def spreads(values: Sequence[Scalar], sums: Sequence[Scalar], reduced: bool = False) -> set[Scalar]:
    """The values, given operands first, that have an element per row and column, since they follow from the sums; what is `reduced` too."""
    found = set(sums)
    for value in values:
        if (reduced or not isinstance(value, Reduce)) and any(v in found for v in below(value)):
            found.add(value)
    return found


# ---- operands


def multiplied(kernel: Kernel, left: Scalar, right: Scalar, total: torch.dtype) -> tuple[Scalar, Scalar, torch.dtype]:
    """Both as they are stored where that is one narrow dtype, else as the kernel computes them."""
    a, b = (narrow(kernel, v) for v in (left, right))
    if a.dtype == b.dtype and a.dtype in NARROW and a.dtype.is_floating_point == total.is_floating_point:
        return a, b, a.dtype
    return left, right, total


def narrow(kernel: Kernel, value: Scalar) -> Scalar:
    """The value before it was widened."""
    if isinstance(value, Apply) and value.op == "cast" and not _loses(value.args[0].dtype, value.dtype):
        return narrow(kernel, value.args[0])
    if isinstance(value, Load):
        dtype = kernel.buffer(value.buffer).dtype
        if dtype in NARROW and value.dtype == NARROW[dtype] and float(torch.tensor(value.other).to(dtype)) == value.other:
            return replace(value, dtype=dtype)
    return value


def _loses(source: torch.dtype, target: torch.dtype) -> bool:
    return source not in NARROW or torch.promote_types(source, target) != target or source == target

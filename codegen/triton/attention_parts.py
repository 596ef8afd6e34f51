"""Attentions whose keys are split over several programs: what each hands over, and the kernel that joins it.

    part s of a row:  largest[s], total[s] = sum of weights, attended[s] = sum of weights * values;  weights = 2^(score - largest[s])
    join:  f[s] = 2^(largest[s] - max over s of largest);  (sum over s of f * attended) / (sum over s of f * total)

Where weights are given, parts are sums: attended[s] alone, and (sum over s of attended).
The joining kernel is an ordinary one of the kernel IR, whose stores are those of the attention.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace

import sympy

from ...ir.dims import product
from ...ir.scalar import Scalar, apply, where
from ..attentions import Attention
from ..kernel import Axis, Buffer, Kernel, Load, Reduce, scalars
from ..names import unique
from .legalize import rewritten


@dataclass(frozen=True)
class Parts:
    """buffers: largest and total, by part of each row, of a softmax; attended, by column as well. join: the kernel over them."""

    buffers: tuple[Buffer, ...]
    join: Kernel


def parts_of(kernel: Kernel, found: Attention, splits: int) -> Parts:
    """The parts of an attention whose rows stand in the order of `found`: batch, rows, part, column."""
    taken = {b.name for b in (*kernel.inputs, *kernel.outputs)} | {a.name for a in kernel.axes} | set(kernel.sizes)
    of_rows = ("largest", "total") if found.softmax else ()
    names = [unique(name, taken) for name in (*of_rows, "attended")]
    part = Axis(unique("s", taken), splits, inner=True)
    walked = (*found.batch, *found.rows, part)
    dtype = found.attend.dtype
    spaces = (*(walked for _ in of_rows), (*walked, found.column))
    buffers = tuple(Buffer(name, dtype, product(a.extent for a in axes)) for name, axes in zip(names, spaces))
    loads = [Load(dtype, b.name, flat(axes)) for b, axes in zip(buffers, spaces)]
    joined = _joined(part.name, *loads) if found.softmax else Reduce(dtype, "sum", loads[0], (part.name,))
    stores = rewritten(kernel.stores, {found.attend: joined})
    read = {v.buffer for v in scalars(stores) if isinstance(v, Load)}
    inputs = (*(b for b in kernel.inputs if b.name in read), *buffers)
    label = f"joins the parts of {kernel.name}"
    join = replace(kernel, name=f"{kernel.name}_join", axes=(*kernel.grid, part), inputs=inputs, stores=stores, label=label)
    return Parts(buffers, join)


def _joined(part: str, largest: Scalar, total: Scalar, attended: Scalar) -> Scalar:
    dtype = total.dtype
    top = Reduce(dtype, "max", largest, (part,))
    base = where(apply("eq", top, -math.inf), 0.0, top)
    factor = apply("exp2", largest - base)
    above, below = (Reduce(dtype, "sum", factor * value, (part,)) for value in (attended, total))
    return above / where(apply("eq", below, 0.0), 1.0, below)


def flat(axes: Iterable[Axis]) -> sympy.Expr:
    """The row-major position over the axes."""
    position = sympy.Integer(0)
    for axis in axes:
        position = sympy.expand(position * axis.extent + axis.symbol)
    return position

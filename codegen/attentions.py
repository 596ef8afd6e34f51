"""What both printers know of a kernel with an attention: which axes are queries, keys and columns, and what of the score is a mask."""

from __future__ import annotations

from dataclasses import dataclass

import sympy
import torch

from ..ir.scalar import Apply, Const, Scalar
from .errors import Unsupported
from .kernel import Attend, Axis, Dot, Kernel, Load, Reduce, Scan, cone, free_axes, scalars

MOST_COLUMNS = 256


@dataclass(frozen=True)
class Attention:
    """The roles of the axes. rows: queries that meet the same keys; batch: everything else; column: of the values; depth: of the keys."""

    attend: Attend
    dot: Dot
    batch: tuple[Axis, ...]
    rows: tuple[Axis, ...]
    column: Axis
    key: Axis
    depth: Axis


def attentions(kernel: Kernel) -> list[Attend]:
    return [v for v in scalars(kernel.stores) if isinstance(v, Attend)]


def find_attention(kernel: Kernel) -> Attention:
    """The parts of a kernel with one attention. Raises Unsupported with a reason where they are not what the template walks."""
    attend, dot = _only_attend(kernel)
    free = free_axes(kernel)
    score, keys, values = free[attend.score] - {attend.axis}, free[dot.right] - {attend.axis}, free[attend.value] - {attend.axis}
    columns = [a for a in kernel.grid if a.name in values - score]
    axes = {a.name: a for a in kernel.axes}
    if len(columns) != 1 or len(dot.axes) != 1 or free[dot.left] & {attend.axis, columns[0].name}:
        raise Unsupported(reason="an attention over other axes than queries, keys and columns")
    depth = axes[dot.axes[0]]
    if any(not isinstance(a.extent, int) or a.extent > MOST_COLUMNS for a in (columns[0], depth)):
        raise Unsupported(reason="an attention of wide heads, or of a width known at run time only")
    rows = [a for a in kernel.grid if a.name in score - keys - values]
    batch = tuple(a for a in kernel.grid if a not in rows and a is not columns[0])
    # the longest first: a tile of rows covers few positions of it, which a causal mask serves with few keys
    ordered = tuple(sorted(rows, key=lambda a: -a.extent if isinstance(a.extent, int) else -(1 << 20)))
    _check_stores(kernel, attend, free)
    return Attention(attend, dot, batch, ordered, columns[0], axes[attend.axis], depth)


def _only_attend(kernel: Kernel) -> tuple[Attend, Dot]:
    found, everything = attentions(kernel), scalars(kernel.stores)
    products = [v for v in everything if isinstance(v, Dot)]
    if len(found) != 1 or len(products) != 1 or products[0] not in cone([found[0].score]):
        raise Unsupported(reason="a kernel with several contractions")
    if any(isinstance(v, (Reduce, Scan)) for v in everything):
        raise Unsupported(reason="a reduction beside an attention")
    if found[0].dtype not in (torch.float32, torch.float64):
        raise Unsupported(reason=f"an attention in {found[0].dtype}")
    return found[0], products[0]


def _check_stores(kernel: Kernel, attend: Attend, free: dict[Scalar, frozenset[str]]) -> None:
    grid = {a.name for a in kernel.grid}
    read = {v.buffer for v in cone([attend]) if isinstance(v, Load)}
    for store in kernel.stores:
        used = grid & (free[store.value] | {s.name for s in sympy.sympify(store.index).free_symbols})  # type: ignore[attr-defined]
        if used != grid or free[store.value] - grid:
            raise Unsupported(reason="a store over other points than those of the attention")
    if any(source in read for _, source in kernel.inplace):
        raise Unsupported(reason="an output over an operand of an attention")


def hidden(score: Scalar) -> list[Scalar]:
    """The selections under a score that make it -inf where their condition does not hold."""
    found: list[Scalar] = []
    stack = [score]
    while stack:
        value = stack.pop()
        if not isinstance(value, Apply):
            continue
        if value.op == "add" and value.dtype.is_floating_point:
            stack.extend(value.args)
        elif value.op == "where" and isinstance(value.args[2], Const) and value.args[2].value == float("-inf"):
            found.append(value)
            stack.append(value.args[1])
    return found


def all_of(condition: Scalar) -> list[Scalar]:
    if isinstance(condition, Apply) and condition.op == "and":
        return [c for a in condition.args for c in all_of(a)]
    return [condition]

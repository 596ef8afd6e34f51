"""What both printers know of a kernel with an attention: which axes are queries, keys and columns, and what of the score is a mask.

The names are those of softmax(q k^T) v. Whatever else is an `Attend` has the same parts: in a gradient of the keys, "rows" are keys, and
"keys", over which is summed, are queries.
"""

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
    """The roles of the axes. rows: queries that meet the same keys; batch: everything else; column: of the values.

    dots: the products of rows and keys in the score, in their order; depths: of their operands, each its own.
    """

    attend: Attend
    dots: tuple[Dot, ...]
    batch: tuple[Axis, ...]
    rows: tuple[Axis, ...]
    column: Axis
    key: Axis
    depths: tuple[Axis, ...]

    @property
    def softmax(self) -> bool:
        return self.attend.weights == "softmax"

    @property
    def only_dot(self) -> Dot:
        """Of what walks one product per score. Raises Unsupported."""
        dot, *others = self.dots
        if others:
            raise Unsupported(reason="a kernel with several contractions")
        return dot


def attentions(kernel: Kernel) -> list[Attend]:
    return [v for v in scalars(kernel.stores) if isinstance(v, Attend)]


def find_attention(kernel: Kernel) -> Attention:
    """The parts of a kernel with one attention. Raises Unsupported with a reason where they are not what the template walks."""
    attend, dots = _only_attend(kernel)
    free = free_axes(kernel)
    score, values = free[attend.score] - {attend.axis}, free[attend.value] - {attend.axis}
    keys = frozenset().union(*(free[d.right] for d in dots)) - {attend.axis}
    columns = [a for a in kernel.grid if a.name in values - score]
    axes = {a.name: a for a in kernel.axes}
    if len(columns) != 1 or any(len(d.axes) != 1 or free[d.left] & {attend.axis, columns[0].name} for d in dots):
        raise Unsupported(reason="an attention over other axes than queries, keys and columns")
    depths = tuple(axes[d.axes[0]] for d in dots)
    if any(not isinstance(a.extent, int) or a.extent > MOST_COLUMNS for a in (columns[0], *depths)):
        raise Unsupported(reason="an attention of wide heads, or of a width known at run time only")
    rows = [a for a in kernel.grid if a.name in score - keys - values]
    batch = tuple(a for a in kernel.grid if a not in rows and a is not columns[0])
    # the longest first: a tile of rows covers few positions of it, which a causal mask serves with few keys
    ordered = tuple(sorted(rows, key=lambda a: -a.extent if isinstance(a.extent, int) else -(1 << 20)))
    _check_stores(kernel, attend, free)
    return Attention(attend, dots, batch, ordered, columns[0], axes[attend.axis], depths)


def _only_attend(kernel: Kernel) -> tuple[Attend, tuple[Dot, ...]]:
    found, everything = attentions(kernel), scalars(kernel.stores)
    products = tuple(v for v in everything if isinstance(v, Dot))
    if len(found) != 1 or not products or not set(products) <= set(cone([found[0].score])):
        raise Unsupported(reason="a kernel with several contractions")
    if found[0].weights == "softmax" and len(products) > 1:
        raise Unsupported(reason="a softmax over several products")
    if any(isinstance(v, (Reduce, Scan)) for v in everything):
        raise Unsupported(reason="a reduction beside an attention")
    if found[0].dtype not in (torch.float32, torch.float64):
        raise Unsupported(reason=f"an attention in {found[0].dtype}")
    return found[0], products


def _check_stores(kernel: Kernel, attend: Attend, free: dict[Scalar, frozenset[str]]) -> None:
    grid = {a.name for a in kernel.grid}
    read = {v.buffer for v in cone([attend]) if isinstance(v, Load)}
    for store in kernel.stores:
        used = grid & (free[store.value] | {s.name for s in sympy.sympify(store.index).free_symbols})  # type: ignore[attr-defined]
        if used != grid or free[store.value] - grid:
            raise Unsupported(reason="a store over other points than those of the attention")
    if any(source in read for _, source in kernel.inplace):
        raise Unsupported(reason="an output over an operand of an attention")


_INF = float("inf")
_MAKES: dict[tuple[float, str], tuple[float, ...]] = {
    (-_INF, "add"): (-_INF, -_INF), (-_INF, "sub"): (-_INF, _INF), (-_INF, "neg"): (_INF,),
    (_INF, "add"): (_INF, _INF), (_INF, "sub"): (_INF, -_INF), (_INF, "neg"): (-_INF,), (_INF, "exp"): (_INF,),
    (0.0, "mul"): (0.0, 0.0), (0.0, "div"): (0.0, _INF), (0.0, "exp"): (-_INF,),
}  # fmt: skip
"""(what a float is, its operation) -> what each operand, by itself, must be to make it so."""


def hidden(attend: Attend) -> list[Scalar]:
    """The selections that leave a key out of account where their condition does not hold: their score is -inf, or their weight 0."""
    return selections(attend.score, -_INF if attend.weights == "softmax" else 0.0)


def selections(score: Scalar, out: float) -> list[Scalar]:
    """The selections under a score that make it `out` where their condition does not hold."""
    found: list[Scalar] = []
    stack = [(score, out)]
    while stack:
        value, wanted = stack.pop()
        if not isinstance(value, Apply) or not value.dtype.is_floating_point:
            continue
        stack.extend((a, w) for a, w in zip(value.args, _MAKES.get((wanted, value.op), ())))
        if value.op == "where" and isinstance(value.args[2], Const) and value.args[2].value == wanted:
            found.append(value)
            stack.append((value.args[1], wanted))
    return found


def all_of(condition: Scalar) -> list[Scalar]:
    if isinstance(condition, Apply) and condition.op == "and":
        return [c for a in condition.args for c in all_of(a)]
    return [condition]

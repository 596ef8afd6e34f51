"""What happens along the vector axis: which values differ between lanes, and by what stride indices move."""

from __future__ import annotations

from typing import Any

import sympy

from ...ir.dims import Dim, FloorDiv, Mod, symbol
from ...ir.scalar import Apply, Const, Scalar
from ..kernel import Kernel, Load, Position, Previous, Reduce, free_axes, operands, scalars

COMPARISONS = ("lt", "le", "gt", "ge", "eq", "ne")


def stride_along(index: Dim, axis: sympy.Symbol, lanes: int) -> sympy.Expr | None:
    """By how much the index moves from lane to lane, None where that differs between lanes.

    Blocks of lanes start at multiples of `lanes`, so `axis % m` and `axis // m` do not wrap inside a block when `lanes` divides m.
    """
    expr: Any = sympy.sympify(index)
    if axis not in expr.free_symbols:
        return sympy.Integer(0)
    for atom in sorted(expr.atoms(FloorDiv, Mod), key=sympy.count_ops):
        if axis not in atom.free_symbols or not expr.has(atom):
            continue
        argument, modulus = atom.args
        if axis in modulus.free_symbols or not _aligned(argument, modulus, axis, lanes):
            return None
        expr = expr.xreplace({atom: argument if isinstance(atom, Mod) else sympy.Integer(0)})
    step = sympy.expand(expr.subs(axis, axis + 1) - expr)
    return None if axis in step.free_symbols else step


def _aligned(argument: Any, modulus: Any, axis: sympy.Symbol, lanes: int) -> bool:
    rest = sympy.expand(sympy.sympify(argument) - axis)
    if axis in rest.free_symbols or not modulus.is_Integer or int(modulus) % lanes:  # type: ignore[call-overload]
        return False
    return all(int(term.as_coeff_Mul()[0]) % lanes == 0 for term in sympy.Add.make_args(rest) if term != 0)


class LaneAnalysis:
    """Which values of a kernel differ between the lanes of one block along `axis` (None: no value does)."""

    def __init__(self, kernel: Kernel, axis: str | None, lanes: int) -> None:
        self.axis = symbol(axis) if axis else None
        self.lanes = lanes
        self._free = free_axes(kernel)
        self._all = scalars(kernel.stores)
        self._memo: dict[Scalar, bool] = {}
        self._stored = {s.value for s in kernel.stores}

    def varies(self, value: Scalar) -> bool:
        if value not in self._memo:
            self._memo[value] = self._varies(value)
        return self._memo[value]

    def _varies(self, value: Scalar) -> bool:
        if self.axis is None or isinstance(value, Const) or self.axis.name not in self._free[value]:
            return False
        if isinstance(value, (Reduce, Previous)):
            return True
        if isinstance(value, Position):
            return stride_along(value.index, self.axis, self.lanes) != 0
        if isinstance(value, Apply) and value.op in COMPARISONS and self._steps_between_blocks(value):
            return False
        if isinstance(value, Load) and stride_along(value.index, self.axis, self.lanes) != 0:
            return True
        return any(self.varies(v) for v in operands(value))

    def _steps_between_blocks(self, value: Apply) -> bool:
        """Is this comparison of positions the same for all lanes of a block, because it changes at a multiple of `lanes`?"""
        difference = self.difference(value)
        if difference is None or self.axis is None:
            return False
        step = stride_along(difference, self.axis, self.lanes)
        if step == 0:
            return True
        if step not in (1, -1) or value.op in ("eq", "ne") or difference.atoms(FloorDiv, Mod):
            return False
        # `axis + rest < 0` changes where axis = -rest, `<=` one later
        rest = sympy.expand(difference * step - self.axis)
        inclusive = value.op in ("le", "gt") if step == 1 else value.op in ("lt", "ge")
        offset = rest - 1 if inclusive else rest
        return all(int(t.as_coeff_Mul()[0]) % self.lanes == 0 for t in sympy.Add.make_args(sympy.expand(offset)) if t != 0)

    def difference(self, value: Apply) -> sympy.Expr | None:
        """a - b of a comparison of two index expressions or constants, None where they are something else."""
        sides = [self._index_of(v) for v in value.args]
        if len(sides) != 2 or sides[0] is None or sides[1] is None:
            return None
        return sympy.expand(sides[0] - sides[1])

    def _index_of(self, value: Scalar) -> sympy.Expr | None:
        if isinstance(value, Position):
            return sympy.sympify(value.index)
        if isinstance(value, Const) and not value.dtype.is_floating_point:
            return sympy.Integer(int(value.value))
        return None

    def narrow(self, value: Scalar) -> bool:
        """A comparison of positions: printed on 32-bit lane offsets, whatever the width of its operands."""
        return isinstance(value, Apply) and value.op in COMPARISONS and self.difference(value) is not None and self._linear(value)

    def _linear(self, value: Apply) -> bool:
        difference = self.difference(value)
        if difference is None or self.axis is None:
            return False
        step = stride_along(difference, self.axis, self.lanes)
        return step is not None and bool(step.is_Integer) and abs(int(step)) < 1 << 20

    def only_compared(self, value: Scalar) -> bool:
        """Is every user of this position such a comparison?"""
        users = [u for u in self._all if value in operands(u)]
        return value not in self._stored and bool(users) and all(self.narrow(u) for u in users)

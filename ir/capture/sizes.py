"""Sizes: torch's symbolic integers become our dims, and what its ShapeEnv knows of each symbol becomes a `SymbolRange`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import sympy
import torch
from torch.fx.experimental.symbolic_shapes import statically_known_true

from ..dims import Dim, Mod, SymbolRange, dim, floordiv, symbol
from ..errors import CaptureError
from ..types import TensorType


def _mod(a: Dim, b: Dim) -> Dim:
    return dim(Mod(sympy.sympify(a), sympy.sympify(b)))


def _ceildiv(a: Dim, b: Dim) -> Dim:
    return floordiv(dim(a + b - 1), b)


# torch.utils._sympy.functions, by class name: several of them exist in two versions (torch's and sympy's own)
_FUNCTIONS: Mapping[str, Callable[..., Any]] = {
    "FloorDiv": floordiv, "CleanDiv": floordiv, "CeilDiv": _ceildiv, "Mod": _mod, "PythonMod": _mod,
    "ModularIndexing": lambda a, b, n: _mod(floordiv(a, b), n),
    "Max": sympy.Max, "Min": sympy.Min, "Identity": lambda a: a, "PowByNatural": lambda a, n: a**n,
}  # fmt: skip
_ROUNDING = ("FloorToInt", "TruncToInt")  # of a / b on non-negative integers: both are floor division


class Sizes:
    """Converts sizes and remembers every symbol it has met, with its range in `ranges`."""

    def __init__(self) -> None:
        self.ranges: dict[str, SymbolRange] = {}
        self._known: dict[sympy.Expr, Dim] = {}
        self._same: dict[Dim, Dim] = {}  # divided sizes and what they are equal to
        self._alike: dict[int, list[tuple[int | torch.SymInt, Dim]]] = {}  # by their size in the example

    def dim(self, value: Any) -> Dim:
        """int or torch.SymInt -> Dim; raises CaptureError for what has no form in our dims."""
        if isinstance(value, int):
            return int(value)
        expr = value.node.expr
        if expr not in self._known:
            for s in expr.free_symbols:
                self.ranges[s.name] = _range(s, value.node.shape_env)
            self._known[expr] = self._equal(value)
        return self._known[expr]

    def _equal(self, value: torch.SymInt) -> Dim:
        """The size, or where it is a divided one, the first that torch's guards make it equal to: `2*(s // 2)` is `s` if s was even."""
        found = dim(_convert(value.node.expr))
        if not value.node.has_hint():
            return found
        if isinstance(found, sympy.Expr) and self._same:
            found = self._factors(found)
        example = int(value.node.hint)
        here = self._alike.setdefault(example, [(example, example)])
        if isinstance(found, sympy.Expr) and found.atoms(sympy.Function):
            for other, known in here:
                if statically_known_true(value == other):
                    self._same[found] = known
                    return known
        here.append((value, found))
        return found

    def _factors(self, size: sympy.Expr) -> Dim:
        """A product of sizes with its factors replaced by what they are equal to."""
        product: Any = sympy.Mul(*(self._same.get(f, f) for f in sympy.Mul.make_args(sympy.factor_terms(size))))
        for divided, known in self._same.items():
            if divided.is_Mul and product.is_Mul:  # type: ignore[union-attr]
                product = product.subs(divided, known)
        return dim(product)

    def dims(self, values: Any) -> tuple[Dim, ...]:
        return tuple(self.dim(v) for v in values)

    def tensor_type(self, fake: torch.Tensor) -> TensorType:
        """The type of a (fake) tensor."""
        device = "cpu" if fake.device.type == "cpu" else str(fake.device)
        return TensorType(fake.dtype, self.dims(fake.shape), device)


def _range(s: sympy.Symbol, shape_env: Any) -> SymbolRange:
    known = shape_env.var_to_range.get(s) if shape_env is not None else None
    if known is None:
        return SymbolRange()
    hi = int(known.upper) if known.upper.is_Integer else None
    lo = int(known.lower) if known.lower.is_Integer else 0
    return SymbolRange(max(lo, 0), hi)


def _convert(expr: sympy.Expr) -> Any:
    if expr.is_Symbol:
        return symbol(expr.name)  # type: ignore[attr-defined]
    if expr.is_Integer:
        return int(expr)
    name = type(expr).__name__
    if name in _ROUNDING and type(expr.args[0]).__name__ == "IntTrueDiv":
        return floordiv(*(_convert(a) for a in expr.args[0].args))  # type: ignore[arg-type]
    args = [_convert(a) for a in expr.args]  # type: ignore[arg-type]
    if name in _FUNCTIONS:
        return _FUNCTIONS[name](*args)
    if expr.is_Add or expr.is_Mul:
        return expr.func(*args)
    if expr.is_Pow and isinstance(args[1], int) and args[1] >= 0:
        return sympy.sympify(args[0]) ** args[1]
    raise CaptureError(reason=f"the size {expr} has no integer form ({name})")

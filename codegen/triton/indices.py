"""Index expressions as Triton text, and the flat points that axes are unrolled from.

A block dimension walks the flat points of several axes; an index that uses them in row-major order is written over the flat point itself:

    x[1024*i + j] + bias[j]   over the flat point p of (i, j)   -->   x[p] + bias[p % 1024]
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import sympy

from ...ir.dims import Dim, FloorDiv, Mod, dim, floordiv, product, same, symbol, to_source
from ..kernel import Axis


@dataclass(frozen=True)
class Run:
    """Adjacent axes first..last of a span, read as one number in row-major order."""

    first: int
    last: int


@dataclass(frozen=True)
class Span:
    """Axes walked as one dimension of the block. `flat` is the name of the variable that holds the flat point."""

    axes: tuple[Axis, ...]
    flat: str

    @property
    def extent(self) -> Dim:
        return product(a.extent for a in self.axes)

    def runs(self, index: sympy.Expr) -> tuple[sympy.Expr, dict[sympy.Symbol, Run]]:
        """The index over symbols of runs, as few as its coefficients allow, and what these symbols stand for."""
        used = [n for n, a in enumerate(self.axes) if index.has(a.symbol)]
        coefficients = _coefficients(index, [self.axes[n].symbol for n in used])
        stands: dict[sympy.Symbol, Run] = {}
        while used:
            last = first = used.pop()
            while coefficients and used and used[-1] == first - 1 and self._continues(first, coefficients):
                first = used.pop()
            if first < last:
                index = self._merged(index, first, last, coefficients)
            stands[symbol(self._name(first, last))] = Run(first, last)
        return index, stands

    def _continues(self, n: int, coefficients: Mapping[sympy.Symbol, sympy.Expr]) -> bool:
        """Axis n-1 strides over exactly the extent of axis n."""
        inner, outer = self.axes[n].symbol, self.axes[n - 1].symbol
        return same(dim(coefficients[outer]), dim(coefficients[inner] * self.axes[n].extent))

    def _merged(self, index: sympy.Expr, first: int, last: int, coefficients: Mapping[sympy.Symbol, sympy.Expr]) -> sympy.Expr:
        rest: sympy.Expr = index.xreplace({a.symbol: sympy.Integer(0) for a in self.axes[first : last + 1]})  # type: ignore[assignment]
        return sympy.Add(rest, coefficients[self.axes[last].symbol] * symbol(self._name(first, last)))  # type: ignore[return-value]

    def _name(self, first: int, last: int) -> str:
        return "_".join(a.name for a in self.axes[first : last + 1])

    def value(self, run: Run) -> sympy.Expr:
        """The run over the flat point."""
        after = product(a.extent for a in self.axes[run.last + 1 :])
        own = product(a.extent for a in self.axes[run.first : run.last + 1])
        point = floordiv(symbol(self.flat), after)
        return sympy.sympify(point if run.first == 0 else Mod(point, sympy.sympify(own)))  # type: ignore[return-value]


def _coefficients(index: sympy.Expr, symbols: list[sympy.Symbol]) -> dict[sympy.Symbol, sympy.Expr]:
    """Symbol -> its coefficient; empty when the index is not linear in them."""
    index = sympy.expand(index)
    found: dict[sympy.Symbol, sympy.Expr] = {s: index.coeff(s) for s in symbols}  # type: ignore[misc]
    rest = sympy.expand(index - sympy.Add(*(c * s for s, c in found.items())))
    return {} if symbols and any(e.has(*symbols) for e in (rest, *found.values())) else found


def index_source(index: Dim, names: Mapping[str, str], may_be_negative: frozenset[str] = frozenset()) -> str:
    """The index as Triton text; `names` renames its symbols.

    Triton divides towards zero, so floors of what may be negative are spelt out; names in `may_be_negative` may be.
    """
    expr = sympy.sympify(index)
    if may_be_negative:
        expr = expr.xreplace({symbol(s): sympy.Symbol(names.get(s, s), integer=True) for s in may_be_negative})
    expr = expr.xreplace({symbol(s): symbol(t) for s, t in names.items() if s not in may_be_negative})
    return to_source(dim(_floored(expr)), _FUNCTIONS)  # type: ignore[arg-type]


def _call(name: str) -> Callable[..., str]:
    def text(*args: str) -> str:
        result = args[0]
        for a in args[1:]:
            result = f"{name}({result}, {a})"
        return result

    return text


class _Floor(sympy.Function):
    """FloorDiv whose dividend may be negative."""


class _Rest(sympy.Function):
    """Mod whose dividend may be negative."""


def _floored(expr: sympy.Expr) -> sympy.Expr:
    if not expr.args:
        return expr
    args = [_floored(a) for a in expr.args]  # type: ignore[arg-type]
    if isinstance(expr, (FloorDiv, Mod)) and not expr.args[0].is_nonnegative:  # type: ignore[attr-defined]
        return (_Floor if isinstance(expr, FloorDiv) else _Rest)(*args)  # type: ignore[return-value]
    return expr.func(*args)  # type: ignore[return-value]


_FUNCTIONS: dict[type, Callable[..., str]] = {
    sympy.Max: _call("tl.maximum"),
    sympy.Min: _call("tl.minimum"),
    _Floor: lambda a, b: f"((({a}) - (({a}) % ({b}) + ({b})) % ({b})) // ({b}))",
    _Rest: lambda a, b: f"((({a}) % ({b}) + ({b})) % ({b}))",
}

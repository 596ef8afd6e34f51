"""Dimensions: `int | sympy.Expr` over size symbols, with the few integer functions that shapes and indices need.

A symbol is a non-negative integer; what is known of it (`SymbolRange`) travels with the graph. Nothing here ever evaluates
text, so dimensions can be read from untrusted files.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Union

import sympy

Dim = Union[int, sympy.Expr]


@dataclass(frozen=True)
class SymbolRange:
    """What is known of a size symbol: lo <= s <= hi (hi None: unbounded) and s % divisor == 0."""

    lo: int = 0
    hi: int | None = None
    divisor: int = 1


class FloorDiv(sympy.Function):
    """floor(a / b) on integers, b > 0; simplifies constants, unit divisors and terms that b divides: (4*s + 3) // 4 is s."""

    nargs = 2
    is_integer = True

    @classmethod
    def eval(cls, a: sympy.Expr, b: sympy.Expr) -> sympy.Expr | None:  # type: ignore[override]
        if b == 1 or a.is_zero:
            return a
        if a.is_Integer and b.is_Integer:
            return sympy.Integer(int(a) // int(b))
        quotient, rest = _divide(a, b)
        return None if quotient == 0 else quotient + cls(rest, b)

    def _eval_is_nonnegative(self) -> bool | None:
        return all(arg.is_nonnegative for arg in self.args) or None


class Mod(sympy.Function):
    """a mod b on integers with the sign of b (Python's rule), b > 0."""

    nargs = 2
    is_integer = True

    @classmethod
    def eval(cls, a: sympy.Expr, b: sympy.Expr) -> sympy.Expr | None:  # type: ignore[override]
        if b == 1 or a.is_zero:
            return sympy.Integer(0)
        if a.is_Integer and b.is_Integer:
            return sympy.Integer(int(a) % int(b))
        quotient, rest = _divide(a, b)
        return None if quotient == 0 else cls(rest, b)

    def _eval_is_nonnegative(self) -> bool | None:
        return True


def _divide(a: sympy.Expr, b: sympy.Expr) -> tuple[sympy.Expr, sympy.Expr]:
    """(q, r) with a == q * b + r, q the sum of the terms of `a` that b divides exactly."""
    quotient, rest = [], []
    for term in sympy.Add.make_args(sympy.expand(a)):
        q = term / b
        exact = q.as_coeff_Mul()[0].is_Integer and not any(p.is_Pow and not p.args[1].is_positive for p in sympy.Mul.make_args(q))
        (quotient if exact else rest).append(q if exact else term)
    return sympy.Add(*quotient), sympy.Add(*rest)


FUNCTIONS: dict[str, Callable[..., Any]] = {"FloorDiv": FloorDiv, "Mod": Mod, "Max": sympy.Max, "Min": sympy.Min}


def symbol(name: str) -> sympy.Symbol:
    """The size symbol of that name (a non-negative integer)."""
    return sympy.Symbol(name, integer=True, nonnegative=True)


def dim(value: Any) -> Dim:
    """Normal form: Python int when constant, else an expanded sympy expression. Raises TypeError for anything but these."""
    if isinstance(value, int):
        return int(value)
    if not isinstance(value, sympy.Expr):
        raise TypeError(f"a size is an integer or an expression of sizes, not {value!r}")
    expr = value if value.is_Symbol else _expanded(value)
    return int(expr) if expr.is_Integer else expr


@functools.lru_cache(maxsize=4096)
def _expanded(expr: sympy.Expr) -> sympy.Expr:
    expanded = sympy.expand(expr)
    return expanded.doit() if expanded.has(sympy.Max, sympy.Min) else expanded  # sympy's own rewriting leaves Max(1, 2) as it is


def floordiv(a: Dim, b: Dim) -> Dim:
    if isinstance(a, int) and isinstance(b, int):
        return a // b
    return dim(FloorDiv(sympy.sympify(a), sympy.sympify(b)))


def product(dims: Iterable[Dim]) -> Dim:
    return dim(math.prod(dims, start=1))


def same(a: Dim, b: Dim) -> bool:
    """True when a and b are provably equal."""
    if isinstance(a, int) and isinstance(b, int):
        return a == b
    return a == b or dim(sympy.sympify(a) - sympy.sympify(b)) == 0


def same_shape(a: Iterable[Dim], b: Iterable[Dim]) -> bool:
    """Provably equal, dimension by dimension."""
    a, b = tuple(a), tuple(b)
    return len(a) == len(b) and all(same(x, y) for x, y in zip(a, b))


def contiguous_strides(shape: tuple[Dim, ...]) -> tuple[Dim, ...]:
    """Row-major strides, in elements, as torch gives them: a size 0 counts as 1."""
    strides: list[Dim] = []
    step: Dim = 1
    for d in reversed(shape):
        strides.append(step)
        step = dim(step * (max(d, 1) if isinstance(d, int) else d))
    return tuple(reversed(strides))


def free_symbols(dims: Iterable[Dim]) -> set[sympy.Symbol]:
    found: set[sympy.Symbol] = set()
    for d in dims:
        if isinstance(d, sympy.Expr):
            found |= d.free_symbols  # type: ignore[arg-type]
    return found


def evaluate(value: Dim, env: Mapping[str, int]) -> int:
    """The value of a dim under name -> int; raises KeyError for an unbound symbol."""
    if isinstance(value, int):
        return value
    if value.is_Symbol:
        return env[value.name]  # type: ignore[attr-defined]
    if value.is_Integer:
        return int(value)
    args = [evaluate(a, env) for a in value.args]  # type: ignore[arg-type]
    return int(_EVALUATORS[type(value)](args)) if type(value) in _EVALUATORS else _unknown(value)


def _unknown(value: sympy.Expr) -> int:
    raise TypeError(f"{type(value).__name__} is not an integer function of sizes: {value}")


def _inexact(divisor: int) -> int:
    raise TypeError(f"sizes divide by // only, not exactly by {divisor}")


_EVALUATORS: dict[type, Callable[[list[int]], int]] = {
    sympy.Add: sum,
    sympy.Mul: math.prod,
    sympy.Pow: lambda a: a[0] ** a[1] if a[1] >= 0 else _inexact(a[0]),
    FloorDiv: lambda a: a[0] // a[1],
    Mod: lambda a: a[0] % a[1],
    sympy.Max: max,
    sympy.Min: min,
}


def hint(value: Dim, ranges: Mapping[str, SymbolRange], default: int = 64) -> int:
    """A plausible concrete size for cost models: every symbol takes `default`, clamped into its range and made divisible."""
    if isinstance(value, int):
        return value

    def guess(name: str) -> int:
        r = ranges.get(name, SymbolRange())
        n = max(default, r.lo)
        n = n if r.hi is None else min(n, r.hi)
        down = n - n % r.divisor
        return down if down >= r.lo else down + r.divisor

    return evaluate(value, {s.name: guess(s.name) for s in value.free_symbols})  # type: ignore[attr-defined]


def to_source(value: Dim, functions: Mapping[type, Callable[..., str]] | None = None) -> str:
    """The expression as source text, minimal parentheses; `functions` overrides the spelling of a node type.

    By default the result is valid Python and valid dim syntax of the text form (`//` and `%` for FloorDiv and Mod).
    """
    return _source(value, functions or {}, 0)


def _source(value: Dim, functions: Mapping[type, Callable[..., str]], outer: int) -> str:
    if isinstance(value, int) or value.is_Integer:
        return str(int(value)) if int(value) >= 0 or outer < 2 else f"({int(value)})"
    if value.is_Symbol:
        return value.name  # type: ignore[attr-defined]
    kind = type(value)
    if kind in functions:
        return functions[kind](*(_source(a, functions, 0) for a in value.args))  # type: ignore[arg-type]
    if kind in (FloorDiv, Mod):
        sign = "//" if kind is FloorDiv else "%"
        a, b = (_source(arg, functions, 3) for arg in value.args)  # type: ignore[arg-type]
        return _wrap(f"{a} {sign} {b}", 2, outer)
    if kind is sympy.Add:
        return _wrap(_sum_source(value, functions), 1, outer)
    if kind is sympy.Mul:
        if value.could_extract_minus_sign():
            return _wrap(_negative_source(value, functions), 1, outer)
        return _wrap("*".join(_source(a, functions, 3) for a in value.args), 2, outer)  # type: ignore[arg-type]
    if kind is sympy.Pow and value.args[1].is_Integer and int(value.args[1]) > 0:  # type: ignore[arg-type]
        base = _source(value.args[0], functions, 3)  # type: ignore[arg-type]
        return _wrap("*".join([base] * int(value.args[1])), 2, outer)  # type: ignore[arg-type]
    name = {sympy.Max: "max", sympy.Min: "min"}.get(kind)
    if name is None:
        _unknown(value)
    return f"{name}({', '.join(_source(a, functions, 0) for a in value.args)})"  # type: ignore[arg-type]


def _sum_source(value: sympy.Expr, functions: Mapping[type, Callable[..., str]]) -> str:
    terms: list[Any] = sorted(value.args, key=lambda t: (t.is_Integer, t.could_extract_minus_sign(), str(t)))
    text = ""
    for t in terms:
        if not text:
            text = _negative_source(t, functions) if t.could_extract_minus_sign() else _source(t, functions, 1)
        elif t.could_extract_minus_sign():
            text += " - " + _source(dim(-t), functions, 2)  # type: ignore[operator]
        else:
            text += " + " + _source(t, functions, 1)
    return text


def _negative_source(value: sympy.Expr, functions: Mapping[type, Callable[..., str]]) -> str:
    """-x; the sign binds tighter than // and %, so those take parentheses."""
    positive = dim(-value)
    return "-" + _source(positive, functions, 3 if type(positive) in (FloorDiv, Mod) else 2)


def _wrap(text: str, precedence: int, outer: int) -> str:
    return f"({text})" if precedence < outer else text

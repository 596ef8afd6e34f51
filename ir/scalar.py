"""The scalar language: what one element of a pointwise op computes. Both printers print it.

Operands have a *compute* dtype (f32, f64, integers, bool; 16-bit floats never appear, they are cast on load and store).
`SCALAR_OPS` is the whole vocabulary: a printer is a table with one entry per name. Python operators and the functions below
build expressions; a Python number beside an expression takes that expression's dtype.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Union

import torch

SCALAR_OPS: dict[str, str] = {
    # name: what it computes (dtype of the result is that of the first operand unless said otherwise)
    "add": "a + b", "sub": "a - b", "mul": "a * b",
    "div": "a / b on floats",
    "floordiv": "floor(a / b) on integers, b a non-zero constant",
    "truncdiv": "a / b rounded to zero on integers, b a non-zero constant",
    "mod": "a - floor(a / b) * b, sign of b (integers: b a non-zero constant)",
    "fmod": "a - trunc(a / b) * b, sign of a (integers: b a non-zero constant)",
    "neg": "-a", "abs": "|a|",
    "min": "smaller of a, b; NaN if either is NaN", "max": "larger of a, b; NaN if either is NaN",
    "fmin": "smaller of a, b; the other if one is NaN", "fmax": "larger of a, b; the other if one is NaN",
    "floor": "", "ceil": "", "trunc": "", "round": "to nearest, ties to even",
    "sqrt": "", "rsqrt": "1 / sqrt(a)", "exp": "", "exp2": "", "expm1": "", "log": "", "log2": "", "log10": "", "log1p": "",
    "sin": "", "cos": "", "tan": "", "asin": "", "acos": "", "atan": "", "atan2": "",
    "sinh": "", "cosh": "", "tanh": "", "asinh": "", "acosh": "", "atanh": "",
    "erf": "", "erfc": "", "lgamma": "", "pow": "a ** b on floats", "ipow": "a ** b on integers, b >= 0",
    "fma": "a * b + c, rounded once where the target can", "copysign": "", "nextafter": "", "hypot": "",
    "eq": "bool", "ne": "bool", "lt": "bool", "le": "bool", "gt": "bool", "ge": "bool",
    "and": "bitwise; logical on bool", "or": "bitwise; logical on bool", "xor": "bitwise; logical on bool",
    "not": "bitwise; logical on bool", "shl": "a << b", "shr": "a >> b, arithmetic on signed",
    "isnan": "bool", "isinf": "bool", "signbit": "bool",
    "where": "a ? b : c, dtype of b", "cast": "to the node's dtype, as static_cast (bool: a != 0)",
    "bitcast": "same bits in the node's dtype",
}  # fmt: skip

COMPARISONS = frozenset({"eq", "ne", "lt", "le", "gt", "ge", "isnan", "isinf", "signbit"})


@dataclass(frozen=True, eq=False)
class Scalar:
    """An expression that yields one element of `dtype`. Compared by identity; sharing a node shares its computation."""

    dtype: torch.dtype

    def __add__(self, other: Operand) -> Scalar:
        return apply("or" if self.dtype == torch.bool else "add", self, other)

    def __radd__(self, other: Operand) -> Scalar:
        return lift(other, self.dtype) + self

    def __sub__(self, other: Operand) -> Scalar:
        return apply("sub", self, other)

    def __rsub__(self, other: Operand) -> Scalar:
        return lift(other, self.dtype) - self

    def __mul__(self, other: Operand) -> Scalar:
        return apply("and" if self.dtype == torch.bool else "mul", self, other)

    def __rmul__(self, other: Operand) -> Scalar:
        return lift(other, self.dtype) * self

    def __truediv__(self, other: Operand) -> Scalar:
        return apply("div", self, other)

    def __rtruediv__(self, other: Operand) -> Scalar:
        return lift(other, self.dtype) / self

    def __neg__(self) -> Scalar:
        return apply("neg", self)

    def __and__(self, other: Operand) -> Scalar:
        return apply("and", self, other)

    def __or__(self, other: Operand) -> Scalar:
        return apply("or", self, other)

    def __xor__(self, other: Operand) -> Scalar:
        return apply("xor", self, other)

    def __invert__(self) -> Scalar:
        return apply("not", self)

    def __lt__(self, other: Operand) -> Scalar:
        return apply("lt", self, other)

    def __le__(self, other: Operand) -> Scalar:
        return apply("le", self, other)

    def __gt__(self, other: Operand) -> Scalar:
        return apply("gt", self, other)

    def __ge__(self, other: Operand) -> Scalar:
        return apply("ge", self, other)


@dataclass(frozen=True, eq=False)
class Const(Scalar):
    """A literal of `dtype` (floats may be nan, inf, -0.0)."""

    value: bool | int | float


@dataclass(frozen=True, eq=False)
class Apply(Scalar):
    """`op` of SCALAR_OPS on `args`."""

    op: str
    args: tuple[Scalar, ...]


Operand = Union[Scalar, bool, int, float]


def lift(value: Operand, dtype: torch.dtype) -> Scalar:
    """A number as a constant of `dtype`; expressions pass through."""
    if isinstance(value, Scalar):
        return value
    cast = bool if dtype == torch.bool else float if dtype.is_floating_point else int
    return Const(dtype, cast(value))


def apply(op: str, *args: Operand) -> Scalar:
    """`op` on operands of one dtype; numbers take the dtype of the expressions beside them."""
    dtype = next(a.dtype for a in args[op == "where" :] if isinstance(a, Scalar))
    first = tuple(lift(a, torch.bool) for a in args[:1]) if op == "where" else ()
    lifted = first + tuple(lift(a, dtype) for a in args[op == "where" :])
    return Apply(torch.bool if op in COMPARISONS else dtype, op, lifted)


def where(condition: Scalar, a: Operand, b: Operand) -> Scalar:
    return apply("where", condition, a, b)


def cast(value: Scalar, dtype: torch.dtype) -> Scalar:
    if value.dtype == dtype:
        return value
    return Apply(dtype, "cast", (value,))

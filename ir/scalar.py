"""The scalar language: what one element of a pointwise op computes. Both printers print it.

Operands have a *compute* dtype (f32, f64, integers, bool). 16-bit floats are widened on load and rounded on store; in between they
appear only as the result of a `cast` to them, which rounds, and which a `cast` to f32 widens again.
`SCALAR_OPS` is the whole vocabulary: a printer is a table with one entry per name. Python operators and the functions below
build expressions; a Python number beside an expression takes that expression's dtype.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Union

import torch

SCALAR_OPS: dict[str, str] = {
    # name: what it computes. Operands have one dtype, which is the result's unless said otherwise. Integers are two's complement:
    # add, sub, mul, neg, abs, ipow wrap. Where the sign of a zero or the payload of a NaN is not said, it is free.
    "add": "a + b", "sub": "a - b", "mul": "a * b",
    "div": "a / b on floats, correctly rounded; x / 0 is inf or NaN as in IEEE 754",
    "floordiv": "floor of the exact a / b on integers; b is a non-zero literal; MIN / -1 wraps to MIN",
    "truncdiv": "exact a / b rounded to zero on integers; b is a non-zero literal; MIN / -1 wraps to MIN",
    "mod": "r = fmod(a, b), then r + b if r != 0 and the signs of r and b differ (integers: b is a non-zero literal)",
    "fmod": "C fmod: exact a - trunc(a / b) * b, sign of a, NaN for b = 0 or infinite a, a for infinite b "
            "(integers: C %, b is a non-zero literal)",
    "neg": "-a; flips the sign of zero; unsigned wraps", "abs": "|a|, clears the sign of zero; MIN stays MIN",
    "min": "smaller of a, b; NaN if either is NaN; on bool: and", "max": "larger of a, b; NaN if either is NaN; on bool: or",
    "fmin": "smaller of a, b; the other if one is NaN", "fmax": "larger of a, b; the other if one is NaN",
    "floor": "to integer below; keeps inf, NaN, -0.0", "ceil": "to integer above; ceil(-0.5) = -0.0", "trunc": "to integer towards zero",
    "round": "to nearest integer, ties to even; round(-0.5) = -0.0",
    "sqrt": "correctly rounded; NaN below 0, -0.0 for -0.0", "rsqrt": "1 / sqrt(a); inf for 0.0, -inf for -0.0",
    "exp": "e ** a", "exp2": "2 ** a", "expm1": "e ** a - 1, accurate near 0",
    "log": "NaN below 0, -inf for 0", "log2": "NaN below 0, -inf for 0", "log10": "NaN below 0, -inf for 0",
    "log1p": "log(1 + a), accurate near 0; -inf for -1",
    "sin": "radians; NaN for inf", "cos": "radians; NaN for inf", "tan": "radians; NaN for inf",
    "asin": "NaN outside [-1, 1]", "acos": "NaN outside [-1, 1]", "atan": "in [-pi/2, pi/2]",
    "atan2": "C atan2(a, b): signs of zeros matter", "sinh": "", "cosh": "", "tanh": "-1 and 1 for infinities",
    "asinh": "", "acosh": "NaN below 1",
    "atanh": "NaN outside [-1, 1], inf for 1", "erf": "", "erfc": "1 - erf(a), accurate for large a",
    "lgamma": "log |gamma(a)|; inf for integers <= 0 and for both infinities",
    "pow": "C pow on floats: pow(x, 0) = pow(1, x) = 1 even for NaN; NaN for a < 0 and b no integer",
    "ipow": "a ** b on integers, wrapping; for b < 0 the truncated 1 / a ** -b: 1, +-1 or 0 for a = 1, -1, other (0 included)",
    "fma": "a * b + c, rounded once where the target can", "copysign": "|a| with the sign bit of b, also for zeros and NaN",
    "nextafter": "C nextafter: the float next to a towards b; NaN if either is NaN",
    "hypot": "sqrt(a*a + b*b) without overflow; inf if either is inf",
    "eq": "bool; false on NaN", "ne": "bool; true on NaN", "lt": "bool; false on NaN", "le": "bool; false on NaN",
    "gt": "bool; false on NaN", "ge": "bool; false on NaN; all six order false < true",
    "and": "bitwise; logical on bool", "or": "bitwise; logical on bool", "xor": "bitwise; logical on bool",
    "not": "bitwise; logical on bool",
    "shl": "a << b on integers; 0 for b < 0 or b >= width of a",
    "shr": "a >> b, arithmetic on signed; for b < 0 or b >= width: 0, -1 for a < 0",
    "isnan": "bool", "isinf": "bool", "signbit": "bool: the sign bit of a float, of -0.0 and NaN too",
    "where": "a ? b : c, dtype of b; a is bool; the branch not taken may be computed, its NaN never shows",
    "cast": "to the node's dtype. To bool: a != 0 (NaN is true). From bool: 0 or 1. To float: nearest, ties to even. "
            "Integer to integer: modulo 2 ** width. Float to integer: towards zero, to fewer than 32 bits by way of int32 (-1.5 to uint8 "
            "is 255); any value, never a trap, for NaN and what int32 (int64) cannot hold",
    "bitcast": "same bits in the node's dtype, which has the same width",
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
    """A number as a constant of `dtype` (integers wrap into it); expressions pass through."""
    if isinstance(value, Scalar):
        return value
    if dtype == torch.bool:
        return Const(dtype, bool(value))
    return Const(dtype, float(value) if dtype.is_floating_point else wrap(int(value), dtype))


def wrap(value: int, dtype: torch.dtype) -> int:
    """value modulo 2 ** width, in the range of an integer dtype."""
    info = torch.iinfo(dtype)
    return (value - info.min) % (1 << info.bits) + info.min


def apply(op: str, *args: Operand) -> Scalar:
    """`op` on operands of one dtype; numbers take the dtype of the expressions beside them. Raises ValueError where dtypes differ."""
    dtype = next(a.dtype for a in args[op == "where" :] if isinstance(a, Scalar))
    first = tuple(lift(a, torch.bool) for a in args[:1]) if op == "where" else ()
    rest = tuple(lift(a, dtype) for a in args[op == "where" :])
    if any(a.dtype != dtype for a in rest):
        raise ValueError(f"{op} on operands of different dtypes: {', '.join(str(a.dtype) for a in rest)}")
    return Apply(torch.bool if op in COMPARISONS else dtype, op, first + rest)


def where(condition: Scalar, a: Operand, b: Operand) -> Scalar:
    return apply("where", condition, a, b)


def cast(value: Scalar, dtype: torch.dtype) -> Scalar:
    if value.dtype == dtype:
        return value
    return Apply(dtype, "cast", (value,))

"""Scalar operations as Triton text: one table entry per name of `ir/scalar.py`, with Python's precedence for minimal parentheses.

Transcendental functions go to `libdevice` (CUDA) / `ocml` (HIP), which Triton reaches by one name and which are accurate to 1-2 ulp;
`tl.exp` and its like are fast approximations whose error grows with the argument.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch

from ...ir.scalar import Apply, Const
from .legalize import UNSIGNED, UnsupportedByTriton

TYPES: dict[torch.dtype, str] = {
    torch.float64: "tl.float64", torch.float32: "tl.float32", torch.float16: "tl.float16", torch.bfloat16: "tl.bfloat16",
    torch.int64: "tl.int64", torch.int32: "tl.int32", torch.int16: "tl.int16", torch.int8: "tl.int8",
    torch.uint64: "tl.uint64", torch.uint32: "tl.uint32", torch.uint16: "tl.uint16", torch.uint8: "tl.uint8", torch.bool: "tl.int1",
}  # fmt: skip

FROM_BYTES: dict[torch.dtype, str] = {torch.float8_e4m3fn: "_from_e4m3", torch.float8_e5m2: "_from_e5m2"}
"""Storage that is read as bytes, since not every GPU has the type -> the helper that makes float32 of them."""

COMPARE, OR, XOR, AND, SHIFT, SUM, PRODUCT, UNARY, ATOM = range(1, 10)


class Text(NamedTuple):
    """Source of an expression and how tightly it binds (one of the levels above)."""

    code: str
    level: int = ATOM

    def at(self, level: int) -> str:
        """The source as an operand of something that binds at `level`."""
        return self.code if self.level >= level else f"({self.code})"


_INFIX: dict[str, tuple[str, int]] = {
    "add": ("+", SUM), "sub": ("-", SUM), "mul": ("*", PRODUCT), "truncdiv": ("//", PRODUCT),
    "and": ("&", AND), "or": ("|", OR), "xor": ("^", XOR), "shl": ("<<", SHIFT), "shr": (">>", SHIFT),
    "eq": ("==", COMPARE), "ne": ("!=", COMPARE), "lt": ("<", COMPARE), "le": ("<=", COMPARE), "gt": (">", COMPARE), "ge": (">=", COMPARE),
}  # fmt: skip

_LIBDEVICE = {
    "exp": "exp", "exp2": "exp2", "expm1": "expm1", "log": "log", "log2": "log2", "log10": "log10", "log1p": "log1p",
    "sin": "sin", "cos": "cos", "tan": "tan", "asin": "asin", "acos": "acos", "atan": "atan", "atan2": "atan2",
    "sinh": "sinh", "cosh": "cosh", "tanh": "tanh", "asinh": "asinh", "acosh": "acosh", "atanh": "atanh",
    "erf": "erf", "erfc": "erfc", "lgamma": "lgamma", "pow": "pow", "trunc": "trunc", "round": "nearbyint",
    "copysign": "copysign", "nextafter": "nextafter", "hypot": "hypot",
}  # fmt: skip

_CALLS: dict[str, str] = {name: f"libdevice.{function}" for name, function in _LIBDEVICE.items()} | {
    "abs": "tl.abs", "floor": "tl.floor", "ceil": "tl.ceil", "rsqrt": "tl.rsqrt", "fma": "tl.fma",
    "fmin": "tl.minimum", "fmax": "tl.maximum", "where": "tl.where", "ipow": "_ipow",
}  # fmt: skip


def constant(value: Const) -> Text:
    """A literal that takes the type of the tensor beside it."""
    number = value.value
    if value.dtype == torch.bool:
        return Text(str(bool(number)))
    if value.dtype.is_floating_point:
        number = float(number)
        if not math.isfinite(number):
            return Text(f'float("{number}")')
        return Text(repr(number), UNARY if math.copysign(1.0, number) < 0 else ATOM)
    number = int(number)
    if value.dtype in UNSIGNED and number < 0:
        number += 1 << 8 * value.dtype.itemsize
    return Text(str(number), UNARY if number < 0 else ATOM)


def typed_constant(value: Const) -> Text:
    """A 0-d tensor of exactly the constant's dtype."""
    return Text(f"tl.full((), {constant(value).code}, {TYPES[value.dtype]})")


def keeps_type(value: Const) -> bool:
    """Whether the bare literal means the same as an argument of a function, where Triton reads it as i1, i32 or f32 before promotion."""
    if value.dtype == torch.float64:
        return math.isnan(value.value) or float(torch.tensor(value.value, dtype=torch.float32)) == value.value
    if value.dtype == torch.int64:
        return -(2**31) <= value.value < 2**31
    return value.dtype in (torch.float32, torch.int32)


def scalar_text(value: Apply, args: Sequence[Text]) -> Text:
    """`value` over the texts of its operands."""
    if value.op in _SPECIAL:
        return _SPECIAL[value.op](value, args)
    if value.op in _INFIX:
        sign, level = _INFIX[value.op]
        left, right = (SUM, SUM) if level == COMPARE else (level, level + 1)
        return Text(f"{args[0].at(left)} {sign} {args[1].at(right)}", level)
    if value.op not in _CALLS:
        raise UnsupportedByTriton(what=value.op, reason="it is not an operation the printer knows")
    if value.op in _LIBDEVICE and value.dtype not in (torch.float32, torch.float64):
        raise UnsupportedByTriton(what=value.op, reason=f"it is not defined on {value.dtype}")
    return Text(f"{_CALLS[value.op]}({', '.join(a.code for a in args)})")


def _prefix(sign: str) -> Callable[[Apply, Sequence[Text]], Text]:
    return lambda value, args: Text(f"{sign}{args[0].at(UNARY)}", UNARY)


def _nan_propagating(name: str) -> Callable[[Apply, Sequence[Text]], Text]:
    def text(value: Apply, args: Sequence[Text]) -> Text:
        nan = ", propagate_nan=tl.PropagateNan.ALL" if value.dtype.is_floating_point else ""
        return Text(f"{name}({args[0].code}, {args[1].code}{nan})")

    return text


def _cast(value: Apply, args: Sequence[Text]) -> Text:
    if value.dtype == torch.bool:
        return Text(f"{args[0].at(SUM)} != 0", COMPARE)
    return Text(f"{args[0].at(ATOM)}.to({TYPES[value.dtype]})")


def _signbit(value: Apply, args: Sequence[Text]) -> Text:
    bits = {torch.float32: "tl.int32", torch.float64: "tl.int64"}[value.args[0].dtype]
    return Text(f"{args[0].at(ATOM)}.to({bits}, bitcast=True) < 0", COMPARE)


def _div(value: Apply, args: Sequence[Text]) -> Text:
    """Triton's / is off by up to 2 ulp in float32."""
    if value.dtype == torch.float32:
        return Text(f"tl.div_rn({args[0].code}, {args[1].code})")
    return Text(f"{args[0].at(PRODUCT)} / {args[1].at(PRODUCT + 1)}", PRODUCT)


def _sqrt(value: Apply, args: Sequence[Text]) -> Text:
    return Text(f"tl.{'sqrt_rn' if value.dtype == torch.float32 else 'sqrt'}({args[0].code})")


def _fmod(value: Apply, args: Sequence[Text]) -> Text:
    """Triton's % is C's: exact on integers, but inexact for large quotients of floats."""
    if value.dtype.is_floating_point:
        return Text(f"libdevice.fmod({args[0].code}, {args[1].code})")
    return Text(f"{args[0].at(PRODUCT)} % {args[1].at(PRODUCT + 1)}", PRODUCT)


_SPECIAL: dict[str, Callable[[Apply, Sequence[Text]], Text]] = {
    "neg": _prefix("-"),
    "not": _prefix("~"),
    "min": _nan_propagating("tl.minimum"),
    "max": _nan_propagating("tl.maximum"),
    "div": _div,
    "sqrt": _sqrt,
    "fmod": _fmod,
    "cast": _cast,
    "bitcast": lambda value, args: Text(f"{args[0].at(ATOM)}.to({TYPES[value.dtype]}, bitcast=True)"),
    "signbit": _signbit,
    "isnan": lambda value, args: Text(f"{args[0].at(SUM)} != {args[0].at(SUM)}", COMPARE),
    "isinf": lambda value, args: Text(f'tl.abs({args[0].code}) == float("inf")', COMPARE),
}

PRINTED: frozenset[str] = frozenset(_INFIX) | frozenset(_CALLS) | frozenset(_SPECIAL)
"""Names of scalar operations with a Triton text; `legalize` removes the others."""


def is_infix(value: Apply) -> bool:
    """Operators give a literal operand the type of the other side; functions do not."""
    exact = value.op == "fmod" and not value.dtype.is_floating_point or value.op == "div" and value.dtype == torch.float64
    return value.op in _INFIX or exact

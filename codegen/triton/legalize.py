"""Rewrites a kernel's scalars into those that Triton has, before it is printed.

    floordiv(a, 3)  -->  where(fmod(a, 3) < 0, truncdiv(a, 3) - 1, truncdiv(a, 3))
    mod(a, b)       -->  r = fmod(a, b); where(r != 0 and sign(r) != sign(b), r + b, r)
    pow(a, 2.0)     -->  a * a
    max on bool     -->  or

What is left is a table entry each in `scalars.py`. Grid axes of extent 1 vanish here too: a printed kernel has no index that is
always 0.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import sympy
import torch

from ...ir.errors import TilewrightError
from ...ir.scalar import Apply, Const, Scalar, apply, cast, lift, where
from ..kernel import Kernel, Load, Position, Reduce, Scan, Store, scalars

UNSIGNED = frozenset({torch.uint8, torch.uint16, torch.uint32, torch.uint64, torch.bool})
_LARGEST_UNROLLED_POWER = 8


class UnsupportedByTriton(TilewrightError):
    """A kernel holds something that cannot be printed as Triton; it then runs by eager."""

    template = "Triton cannot express {what}: {reason}"


def legalize(kernel: Kernel) -> Kernel:
    """The same kernel in scalars that the printer knows; raises UnsupportedByTriton where there is no way."""
    units = {a.symbol: sympy.Integer(0) for a in kernel.grid if a.extent == 1}
    new: dict[Scalar, Scalar] = {}
    for value in scalars(kernel.stores):
        new[value] = _legal(_rebuild(value, new, units))
    stores = tuple(Store(s.buffer, _index(s.index, units), new[s.value]) for s in kernel.stores)
    return replace(kernel, axes=tuple(a for a in kernel.axes if a.symbol not in units), stores=stores)


def _index(index: Any, units: dict[Any, Any]) -> sympy.Expr:
    return sympy.sympify(index).xreplace(units)


def _rebuild(value: Scalar, new: dict[Scalar, Scalar], units: dict[Any, Any]) -> Scalar:
    """The scalar over already rewritten operands; itself when nothing changed."""
    if isinstance(value, Apply):
        args = tuple(new[a] for a in value.args)
        return value if args == value.args else replace(value, args=args)
    if isinstance(value, Load):
        indirect = tuple((name, new[v]) for name, v in value.indirect)
        mask = None if value.mask is None else new[value.mask]
        return replace(value, index=_index(value.index, units), indirect=indirect, mask=mask)
    if isinstance(value, Position):
        return replace(value, index=_index(value.index, units))
    if isinstance(value, (Reduce, Scan)):
        return replace(value, value=new[value.value])
    return value


def _legal(value: Scalar) -> Scalar:
    if isinstance(value, Reduce) and value.value.dtype == torch.bool and value.op in _BOOL_REDUCTION:
        return _BOOL_REDUCTION[value.op](value)
    if isinstance(value, Apply) and value.op in _RULES:
        return _RULES[value.op](value)
    return value


def _bool_extremum(op: str) -> Callable[[Reduce], Scalar]:
    return lambda value: replace(value, op=op)


def _bool_position(value: Reduce) -> Scalar:
    return replace(value, value=cast(value.value, torch.int32))


_BOOL_REDUCTION: dict[str, Callable[[Reduce], Scalar]] = {
    "max": _bool_extremum("any"), "min": _bool_extremum("all"), "argmax": _bool_position, "argmin": _bool_position,
}  # fmt: skip


def _floordiv(value: Apply) -> Scalar:
    a, b = value.args
    quotient = apply("truncdiv", a, b)
    return quotient if value.dtype in UNSIGNED else where(_opposite(apply("fmod", a, b), b), quotient - 1, quotient)


def _mod(value: Apply) -> Scalar:
    a, b = value.args
    rest = apply("fmod", a, b)
    return rest if value.dtype in UNSIGNED else where(_opposite(rest, b), rest + b, rest)


def _opposite(rest: Scalar, b: Scalar) -> Scalar:
    """A non-zero remainder whose sign is not that of the divisor."""
    if isinstance(b, Const):
        return rest < 0 if b.value > 0 else rest > 0
    return apply("ne", rest, 0) & apply("ne", rest < 0, b < 0)


def _power(value: Apply) -> Scalar:
    """Small constant powers are products, as torch computes them."""
    a, b = value.args
    if not isinstance(b, Const):
        return value
    if value.op == "pow":
        return {2.0: lambda: a * a, 3.0: lambda: a * a * a}.get(float(b.value), lambda: value)()
    if not 0 <= b.value <= _LARGEST_UNROLLED_POWER:
        return value
    product: Scalar = lift(1, a.dtype)
    for n in range(int(b.value)):
        product = product * a if n else a
    return product


def _on_bool(op: str) -> Callable[[Apply], Scalar]:
    return lambda value: apply(op, *value.args) if value.dtype == torch.bool else value


def _cast(value: Apply) -> Scalar:
    """A float becomes an unsigned integer by way of a signed one, so that negative values wrap as in torch."""
    (a,) = value.args
    if a.dtype == value.dtype:
        return a
    if a.dtype.is_floating_point and value.dtype in UNSIGNED - {torch.bool}:
        return replace(value, args=(cast(a, torch.int64),))
    return value


def _identity_on_unsigned(value: Apply) -> Scalar:
    return value.args[0] if value.dtype in UNSIGNED else value


_RULES: dict[str, Callable[[Apply], Scalar]] = {
    "floordiv": _floordiv, "mod": _mod, "pow": _power, "ipow": _power, "cast": _cast, "abs": _identity_on_unsigned,
    "max": _on_bool("or"), "min": _on_bool("and"), "fmax": _on_bool("or"), "fmin": _on_bool("and"), "mul": _on_bool("and"),
}  # fmt: skip

"""Rewrites a kernel's scalars into those that Triton has, before it is printed.

    floordiv(a, 3)  -->  where(fmod(a, 3) < 0, truncdiv(a, 3) - 1, truncdiv(a, 3))
    mod(a, b)       -->  r = fmod(a, b); where(r != 0 and sign(r) != sign(b), r + b, r)
    pow(a, 2.0)     -->  a * a
    max on bool     -->  or

What is left is a table entry each in `scalars.py`. Grid axes of extent 1 vanish here too: a printed kernel has no index that is
always 0.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from typing import Any

import sympy
import torch

from ...ir.scalar import Apply, Const, Scalar, apply, cast, lift, where
from ..errors import Unsupported
from ..kernel import INSIDE, Attend, Dot, Kernel, Load, Position, Reduce, Scan, Store, cone, scalars

UNSIGNED = frozenset({torch.uint8, torch.uint16, torch.uint32, torch.uint64, torch.bool})
_LARGEST_UNROLLED_POWER = 8


class UnsupportedByTriton(Unsupported):
    """A kernel holds something that cannot be printed as Triton; it then runs by eager."""

    template = "Triton cannot express {what}: {reason}"


def legalize(kernel: Kernel) -> Kernel:
    """The same kernel in scalars that the printer knows; raises UnsupportedByTriton where there is no way."""
    units = {a.symbol: sympy.Integer(0) for a in kernel.grid if a.extent == 1}
    ends = {a.symbol: a.extent - 1 for a in kernel.axes if isinstance(a.extent, int)}
    new: dict[Scalar, Scalar] = {}
    for value in scalars(kernel.stores):
        made = _rebuild(value, new, units)
        new[value] = made if _shifts_within(made, ends) else _legal(made)
    stores = tuple(Store(s.buffer, _index(s.index, units), new[s.value]) for s in kernel.stores)
    return replace(kernel, axes=tuple(a for a in kernel.axes if a.symbol not in units), stores=stores)


def rewritten(stores: Iterable[Store], known: Mapping[Scalar, Scalar], places: Mapping[Any, Any] | None = None) -> tuple[Store, ...]:
    """The stores with some scalars replaced and with symbols of their indices replaced."""
    stores, new, units = tuple(stores), dict(known), dict(places or {})
    for value in cone([s.value for s in stores], known):
        new[value] = _rebuild(value, new, units)
    return tuple(Store(s.buffer, _index(s.index, units), new[s.value]) for s in stores)


def _index(index: Any, units: dict[Any, Any]) -> sympy.Expr:
    return sympy.sympify(index).xreplace(units)


def _rebuild(value: Scalar, new: Mapping[Scalar, Scalar], units: dict[Any, Any]) -> Scalar:
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
    if isinstance(value, Dot):
        return replace(value, left=new[value.left], right=new[value.right], within=tuple(new[v] for v in value.within))
    if isinstance(value, Attend):
        return replace(value, score=new[value.score], value=new[value.value])
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


def _pow(value: Apply) -> Scalar:
    """Small constant powers are products, as torch computes them."""
    a, b = value.args
    if not isinstance(b, Const) or b.value not in (2.0, 3.0):
        return value
    return a * a if b.value == 2.0 else a * a * a


def _ipow(value: Apply) -> Scalar:
    """Small constant powers are products; a negative power is the truncated 1 / a ** -b, which is 0 except for a = 1 and -1."""
    a, b = value.args
    if isinstance(b, Const) and 1 <= b.value <= _LARGEST_UNROLLED_POWER:
        return functools.reduce(operator.mul, [a] * int(b.value))
    if value.dtype in UNSIGNED or isinstance(b, Const) and b.value >= 0:
        return value
    sign = where(apply("eq", a, -1), 1 - 2 * (b & 1), 0)
    return where(b < 0, where(apply("eq", a, 1), 1, sign), value)


def _on_bool(op: str) -> Callable[[Apply], Scalar]:
    return lambda value: apply(op, *value.args) if value.dtype == torch.bool else value


def _cast(value: Apply) -> Scalar:
    """A float becomes a small or unsigned integer by way of a wide signed one, so that values wrap as in torch."""
    (a,) = value.args
    if a.dtype == value.dtype:
        return a
    if not a.dtype.is_floating_point or value.dtype.is_floating_point or value.dtype in (torch.bool, torch.int32, torch.int64):
        return value
    return replace(value, args=(cast(a, torch.int32 if value.dtype.itemsize < 4 else torch.int64),))


def _inside(value: Apply) -> Scalar:
    """Clamped here; `Expressions` asserts what was outside."""
    at, extent, fault = value.args[:3]
    last = Const(extent.dtype, int(extent.value) - 1) if isinstance(extent, Const) else extent - 1
    clamped = apply("max", apply("min", at, last), 0)
    reported = not isinstance(fault, Const) or fault.value != 0
    return replace(value, args=(clamped, *value.args)) if reported else clamped


def _shift(value: Apply) -> Scalar:
    """Shifts by less than 0 or by the width and more are undefined in Triton; here they give 0, or the sign."""
    a, b = value.args
    width = 8 * value.dtype.itemsize
    if isinstance(b, Const) and 0 <= b.value < width:
        return value
    gone = apply("shr", a, width - 1) if value.op == "shr" and value.dtype not in UNSIGNED else lift(0, value.dtype)
    return where((b < 0) | (b >= width), gone, value)


def _shifts_within(value: Scalar, ends: Mapping[Any, int]) -> bool:
    """Whether it shifts by a position that is always less than the width, as values that lie in a byte are taken out of it."""
    if not isinstance(value, Apply) or value.op not in ("shl", "shr"):
        return False
    by = value.args[1]
    by = by.args[0] if isinstance(by, Apply) and by.op == "cast" else by
    if not isinstance(by, Position) or not by.index.is_nonnegative:
        return False
    terms = sympy.Add.make_args(sympy.expand(by.index))
    most = sympy.Add(*(t.xreplace(ends) for t in terms)) if all(t.is_nonnegative for t in terms) else by.index  # type: ignore[arg-type]
    return bool(most.is_Integer and most < 8 * value.dtype.itemsize)  # type: ignore[operator]


def _neg(value: Apply) -> Scalar:
    """Triton before 3.9 negates as 0 - x, which loses the sign of zero."""
    return value.args[0] * -1.0 if value.dtype.is_floating_point else value


def _identity_on_unsigned(value: Apply) -> Scalar:
    return value.args[0] if value.dtype in UNSIGNED else value


_RULES: dict[str, Callable[[Apply], Scalar]] = {
    "floordiv": _floordiv, "mod": _mod, "pow": _pow, "ipow": _ipow, "cast": _cast, "neg": _neg, "shl": _shift, "shr": _shift,
    "abs": _identity_on_unsigned, "max": _on_bool("or"), "min": _on_bool("and"), "fmax": _on_bool("or"), "fmin": _on_bool("and"),
    "mul": _on_bool("and"), INSIDE: _inside,
}  # fmt: skip

"""Sharing: equal scalars become one object, trivial ones fold, so that every value of a kernel is computed once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import sympy
import torch

from ..ir.scalar import Apply, Const, Scalar
from .kernel import INSIDE, Attend, Dot, Load, Position, Reduce, Scan, Store, operands, scalars


def shared(stores: Sequence[Store]) -> tuple[Store, ...]:
    """The same stores over a DAG without duplicates."""
    known: dict[Any, Scalar] = {}
    new: dict[Scalar, Scalar] = {}
    for value in scalars(stores):
        made = folded(rebuilt(value, new))
        new[value] = known.setdefault(_key(made), made)
    return tuple(replace(s, value=new[s.value]) for s in stores)


def rebuilt(value: Scalar, new: dict[Scalar, Scalar]) -> Scalar:
    """The same scalar on new operands."""
    if all(new[v] is v for v in operands(value)):
        return value
    if isinstance(value, Apply):
        return replace(value, args=tuple(new[a] for a in value.args))
    if isinstance(value, Load):
        mask = None if value.mask is None else new[value.mask]
        return replace(value, indirect=tuple((n, new[v]) for n, v in value.indirect), mask=mask)
    if isinstance(value, Dot):
        return replace(value, left=new[value.left], right=new[value.right], within=tuple(new[v] for v in value.within))
    if isinstance(value, Attend):
        return replace(value, score=new[value.score], value=new[value.value])
    return replace(value, value=new[value.value])  # type: ignore[attr-defined]


def folded(value: Scalar) -> Scalar:
    """Constant conditions, casts of literals, a sum with the integer 0, a product with 1, a shift by 0, a mask of what a shift leaves."""
    if isinstance(value, Position) and value.index.is_Integer:
        return Const(torch.int64, int(value.index))
    if not isinstance(value, Apply):
        return value
    if value.op == INSIDE and all(isinstance(v, Const) for v in value.args[:2]):
        at, extent = (v.value for v in value.args[:2])  # type: ignore[attr-defined]
        return value.args[0] if 0 <= at < extent else value
    if value.op == "where":
        return _where(value)
    if value.op == "cast" and isinstance(value.args[0], Const):
        return _cast(value, value.args[0])
    if value.op in ("mul", "div") and isinstance(value.args[1], Const) and value.args[1].value == 1 and value.dtype != torch.bool:
        return value.args[0]
    if value.op in ("shl", "shr") and isinstance(value.args[1], Const) and value.args[1].value == 0:
        return value.args[0]
    if value.op == "and":
        return _and(value)
    if value.op == "add" and isinstance(value.args[1], Const) and value.args[1].value == 0 and not value.dtype.is_floating_point:
        return value.args[0]
    return _position(value)


def _position(value: Apply) -> Scalar:
    """The distance of two positions is one."""
    if value.op not in ("add", "sub") or value.dtype != torch.int64 or not any(isinstance(a, Position) for a in value.args):
        return value
    indices = [_index(a) for a in value.args]
    if indices[0] is None or indices[1] is None:
        return value
    return folded(Position(value.dtype, sympy.expand(indices[0] + (-1 if value.op == "sub" else 1) * indices[1])))


def _index(value: Scalar) -> sympy.Expr | None:
    if isinstance(value, Position):
        return sympy.sympify(value.index)
    return sympy.Integer(int(value.value)) if isinstance(value, Const) and abs(value.value) < 1 << 30 else None


def _and(value: Apply) -> Scalar:
    a, b = value.args
    if isinstance(a, Const) and isinstance(b, Const) and value.dtype != torch.bool:
        return Const(value.dtype, int(a.value) & int(b.value))
    return a if _left_by_shift(value) else value


def _where(value: Apply) -> Scalar:
    """One form for masks: where(drop, -inf, x) is where(keep, x, -inf), if what keeps can be said as plainly."""
    condition, a, b = value.args
    if isinstance(condition, Const):
        return a if condition.value else b
    if not isinstance(a, Const) or a.value != float("-inf") or isinstance(b, Const):
        return value
    keep = _negated(condition)
    return value if keep is None else replace(value, args=(keep, b, a))


_NEGATED = {"lt": "ge", "ge": "lt", "gt": "le", "le": "gt", "eq": "ne", "ne": "eq"}


def _negated(condition: Scalar) -> Scalar | None:
    """Comparisons of integers, negations, and either of two such."""
    if not isinstance(condition, Apply):
        return None
    if condition.op == "not":
        return condition.args[0]
    if condition.op in _NEGATED and not condition.args[0].dtype.is_floating_point:
        return replace(condition, op=_NEGATED[condition.op])
    if condition.op != "or":
        return None
    a, b = map(_negated, condition.args)
    return None if a is None or b is None else replace(condition, op="and", args=(a, b))


def _left_by_shift(value: Apply) -> bool:
    """Whether a mask keeps all bits that a shift of an unsigned integer leaves: x >> 4 & 15 of a byte."""
    shifted, mask = value.args
    if not isinstance(shifted, Apply) or shifted.op != "shr" or value.dtype != torch.uint8 or not isinstance(mask, Const):
        return False
    by = shifted.args[1]
    return isinstance(by, Const) and 0 <= by.value < 8 and mask.value == 255 >> int(by.value)


def _cast(value: Apply, literal: Const) -> Scalar:
    """Truth, widening to a float, and integers that fit; anything that rounds stays for the machine to do."""
    number = literal.value
    if value.dtype == torch.bool:
        return Const(value.dtype, number != 0)
    if value.dtype == torch.float64 and isinstance(number, (bool, int, float)) and abs(number) < 2**53:
        return Const(value.dtype, float(number))
    if value.dtype == torch.float32 and not isinstance(number, float) and abs(number) < 2**24:
        return Const(value.dtype, float(number))
    if value.dtype in (torch.int64, torch.int32) and not isinstance(number, float) and abs(number) < 2**31:
        return Const(value.dtype, int(number))
    if value.dtype in (torch.uint8, torch.int8) and not isinstance(number, float) and 0 <= number < 128:
        return Const(value.dtype, int(number))
    return value


def _key(value: Scalar) -> Any:
    head = (type(value).__name__, value.dtype)
    if isinstance(value, Const):
        return (*head, type(value.value).__name__, repr(value.value))
    if isinstance(value, Apply):
        return (*head, value.op, tuple(map(id, value.args)))
    if isinstance(value, Load):
        indirect = tuple((n, id(v)) for n, v in value.indirect)
        return (*head, value.buffer, value.index, indirect, id(value.mask) if value.mask is not None else None, repr(value.other))
    if isinstance(value, Position):
        return (*head, value.index)
    if isinstance(value, (Dot, Attend)):
        return (*head, *map(id, operands(value)), value.axes if isinstance(value, Dot) else (value.axis, value.rounded, value.weights))
    assert isinstance(value, (Reduce, Scan))
    where = value.axes if isinstance(value, Reduce) else value.axis
    return (*head, value.op, id(value.value), where)

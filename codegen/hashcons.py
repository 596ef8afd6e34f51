"""Sharing: equal scalars become one object, trivial ones fold, so that every value of a kernel is computed once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

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
    """Constant conditions, casts of literals, a sum with the integer 0, a product with 1."""
    if isinstance(value, Position) and value.index.is_Integer:
        return Const(torch.int64, int(value.index))
    if not isinstance(value, Apply):
        return value
    if value.op == INSIDE and all(isinstance(v, Const) for v in value.args[:2]):
        at, extent = (v.value for v in value.args[:2])  # type: ignore[attr-defined]
        return value.args[0] if 0 <= at < extent else value
    if value.op == "where" and isinstance(value.args[0], Const):
        return value.args[1] if value.args[0].value else value.args[2]
    if value.op == "cast" and isinstance(value.args[0], Const):
        return _cast(value, value.args[0])
    if value.op in ("mul", "div") and isinstance(value.args[1], Const) and value.args[1].value == 1 and value.dtype != torch.bool:
        return value.args[0]
    if value.op == "add" and isinstance(value.args[1], Const) and value.args[1].value == 0 and not value.dtype.is_floating_point:
        return value.args[0]
    return value


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
        return (*head, *map(id, operands(value)), value.axes if isinstance(value, Dot) else (value.axis, value.rounded))
    assert isinstance(value, (Reduce, Scan))
    where = value.axes if isinstance(value, Reduce) else value.axis
    return (*head, value.op, id(value.value), where)

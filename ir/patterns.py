"""Patterns: shapes of several nodes, matched from their root down. Commutative ops match in either order.

pat("mul", pat("neg", Var("x")), Var("y"), name="product")
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Union

from .graph import Node
from .ops import OPS
from .rewrite import attr_key


@dataclass(frozen=True)
class Refusal:
    """Why a rule that matched must not apply: a reason (from the caller's closed list, or a sentence) and the guilty value."""

    reason: Any
    value: Any = None

    def __bool__(self) -> bool:
        return False


@dataclass(frozen=True)
class Var:
    """Any value, bound to `name`; the same name twice means the same value. `where` may object with False or a Refusal."""

    name: str
    where: Callable[[Node], Any] | None = None


@dataclass(frozen=True)
class Rest:
    """All remaining operands (none, too), bound to `name` as a tuple; the last operand of a pattern only."""

    name: str


@dataclass(frozen=True)
class Literal:
    """A scalar of exactly this value; a plain number in a pattern means this."""

    value: Any


@dataclass(frozen=True)
class Pat:
    """One of `ops` on operands; `attrs` gives the value of an attribute or a predicate on it."""

    ops: tuple[str, ...]
    operands: tuple[Any, ...]
    name: str
    attrs: Mapping[str, Any]


Pattern = Union[Var, Rest, Literal, Pat]


def pat(ops: str | tuple[str, ...], *operands: Any, name: str = "", attrs: Mapping[str, Any] | None = None) -> Pat:
    """A pattern: `pat("linear", Var("x"), Var("w"), name="lin")`, `pat(("relu", "gelu"), Var("x"))`, `pat("mul", Var("x"), 1.0)`.

    The matched node is bound to `name`. Raises KeyError for an unknown op.
    """
    names = (ops,) if isinstance(ops, str) else ops
    for op in names:
        OPS[op]
    return Pat(names, tuple(o if isinstance(o, (Var, Rest, Literal, Pat)) else Literal(o) for o in operands), name, attrs or {})


@dataclass(frozen=True)
class Trial:
    """A partial match: immutable, so that alternatives do not disturb each other."""

    bound: Mapping[str, Any] = field(default_factory=dict)
    nodes: tuple[Node, ...] = ()

    def bind(self, name: str, value: Any) -> Trial | None:
        if not name:
            return self
        if name in self.bound:
            return self if self.bound[name] == value else None
        return replace(self, bound={**self.bound, name: value})


class Matcher:
    """Enumerates the ways in which a pattern matches; keeps the last refusal of a `where` for the trace."""

    def __init__(self) -> None:
        self.refusal: Refusal | None = None

    def match(self, pattern: Pattern, node: Node, trial: Trial) -> Iterator[Trial]:
        if isinstance(pattern, Pat):
            yield from self._pat(pattern, node, trial)
        elif isinstance(pattern, Literal):
            if node.op.name == "scalar" and attr_key(node.attrs["value"]) == attr_key(pattern.value):
                yield trial
        elif isinstance(pattern, Var) and self._accepts(pattern, node):
            found = trial.bind(pattern.name, node)
            if found is not None:
                yield found

    def _accepts(self, pattern: Var, node: Node) -> bool:
        answer = pattern.where(node) if pattern.where else True
        if isinstance(answer, Refusal):
            self.refusal = answer
        return bool(answer)

    def _pat(self, pattern: Pat, node: Node, trial: Trial) -> Iterator[Trial]:
        if node.op.name not in pattern.ops or not _attributes_fit(pattern, node):
            return
        found = trial.bind(pattern.name, node)
        if found is None:
            return
        found = replace(found, nodes=(*found.nodes, node))
        for operands in _arrangements(pattern, node):
            yield from self._operands(pattern.operands, operands, found)

    def _operands(self, patterns: tuple[Pattern, ...], nodes: tuple[Node, ...], trial: Trial) -> Iterator[Trial]:
        if not patterns:
            if not nodes:
                yield trial
            return
        first = patterns[0]
        if isinstance(first, Rest):
            found = trial.bind(first.name, nodes)
            if found is not None:
                yield found
        elif nodes:
            for found in self.match(first, nodes[0], trial):
                yield from self._operands(patterns[1:], nodes[1:], found)


def _attributes_fit(pattern: Pat, node: Node) -> bool:
    for name, wanted in pattern.attrs.items():
        actual = node.attrs[name]
        if not (wanted(actual) if callable(wanted) else attr_key(actual) == attr_key(wanted)):
            return False
    return True


def _arrangements(pattern: Pat, node: Node) -> Iterator[tuple[Node, ...]]:
    yield node.inputs
    if node.op.commutative and len(node.inputs) == len(pattern.operands) == 2:
        yield node.inputs[::-1]

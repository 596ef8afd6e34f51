"""How passes run rules: tables of functions by the op at their root, and the notes of what was applied and declined."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from ..ir.graph import Graph, Node
from ..ir.rules import Outcome, Rule, Site, Tracer, apply_rules
from .base import Notes, describe

Table = Mapping[str, "tuple[Callable[[Node, Site], Outcome], ...]"]
"""Op name -> the functions tried there, in order. A function's docstring is its picture, its name that of the rule."""


def rules_at(name: str, *tables: Table) -> list[Rule]:
    """The rules of a pass: `def add_zero` is "canonicalize.add-zero"; where several tables name an op, the first goes first."""
    return [
        Rule(f"{name}.{function.__name__.strip('_').replace('_', '-')}", (op,), function)
        for table in tables
        for op, functions in table.items()
        for function in functions
    ]


def settle(graph: Graph, rules: Sequence[Rule], notes: Notes, **changes: Any) -> Graph:
    """The graph on which none of `rules` applies any more, as `apply_rules` gives it, with notes of what was done and refused."""
    tracer = Tracer(may=notes.may)
    graph = apply_rules(graph, rules, tracer, **changes)
    for done in tracer.applied:
        notes.apply(done.rule, f"{describe(done.before)} -> {done.after.op.name}", done.before)
    for miss in tracer.missed:
        notes.decline(miss.rule, describe(miss.node), miss.refusal.reason, miss.node, str(miss.refusal.value or ""))
    return graph

"""`verify(graph)`: is this a graph, and is everything in it legal at its stage? What is legal is a table."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, NoReturn

import sympy

from .analysis.inplace import in_place
from .dims import free_symbols
from .errors import TilewrightError, VerificationError
from .graph import Data, Graph, Node, Stage, order
from .op import Category
from .ops import OPS
from .text import print_nodes
from .text.values import RESERVED
from .types import ScalarType, TensorType, Type, same_type, type_source

Objection = Callable[[Node], "str | None"]


@dataclass(frozen=True)
class Legal:
    """What may stand in a graph at a stage: ops of these categories but those in `without`, and nothing that is objected to."""

    where: str
    categories: frozenset[Category]
    without: frozenset[str] = frozenset()
    objections: tuple[Objection, ...] = ()

    def allows(self, node: Node) -> bool:
        return node.op.category in self.categories and node.op.name not in self.without


def _no_change(node: Node) -> str | None:
    useless = node.op.name == "cast" and same_type(node.type, node.inputs[0].type)
    return "casts to the dtype its operand already has" if useless else None


def _inner_layout(node: Node) -> str | None:
    return "reads a `layout`, which only outputs have" if any(i.op.name == "layout" for i in node.inputs) else None


_EVERYTHING = frozenset(Category)
_UNFUSED = frozenset({"region"})
_SCHEDULED = frozenset({"attention", "attention_gradient"})
"""Composites that code generation schedules as one library call."""
_COMPOSITES = frozenset(op.name for op in OPS.values() if op.category is Category.COMPOSITE) - _SCHEDULED

LEGAL: Mapping[Stage, Legal] = {
    Stage.CAPTURED: Legal("in a captured graph", _EVERYTHING, without=_UNFUSED),
    Stage.CANONICAL: Legal("in a canonical graph", _EVERYTHING, without=_UNFUSED, objections=(_no_change, _inner_layout)),
    Stage.PLANNED: Legal("in a planned graph", _EVERYTHING, without=_UNFUSED, objections=(_no_change, _inner_layout)),
    # beside regions: library calls, views, and what can be no kernel and runs by its eager meaning; composites are expanded by now
    Stage.FUSED: Legal("in a fused graph", _EVERYTHING, without=_COMPOSITES, objections=(_inner_layout,)),
}

BODY = Legal("inside a region", _EVERYTHING, without=_UNFUSED)


def verify(graph: Graph, stage: Stage | None = None) -> None:
    """Raises VerificationError unless the graph is well formed, well typed and legal at `stage` (default: its own).

    The error shows the nodes around the fault.

    Checked: inputs are bound once and no other input is read, operands come before users, ops and attributes are those of the catalogue,
    inferred types equal the recorded ones, sizes are told by the inputs and declared, constants' names are unique, writes fit their
    targets, slots hold their values, nothing reads what was overwritten in place; and the same for the bodies of regions.
    """
    _Verifier(graph, LEGAL[graph.stage if stage is None else stage], {}, frozenset()).run()


class _Verifier:
    """Checks one graph. `outer`: the sizes that the graph around it tells."""

    def __init__(self, graph: Graph, legal: Legal, names: dict[str, Data], outer: frozenset[str]) -> None:
        self.graph = graph
        self.legal = legal
        self.names = names
        self.bound = outer | bound_symbols(graph)
        self.declared = outer | set(graph.symbols)
        self.sequences: dict[int, Node] = {}

    def run(self) -> None:
        nodes = order(self.graph)
        self._inputs()
        self._order(nodes)
        self._symbols()
        for node in nodes:
            self._node(node)
        self._writes()
        self._arena(set(nodes))
        self._inplace(nodes)

    def _fail(self, node: Node | None, reason: str) -> NoReturn:
        at = node if node is not None else (self.graph.outputs or self.graph.inputs or (None,))[0]
        context = print_nodes(self.graph, at) if at is not None else "   (an empty graph)"
        raise VerificationError(node.prov.source if node is not None else "", graph=self.graph.name, reason=reason, context=context)

    def _inputs(self) -> None:
        seen: set[Node] = set()
        for node in self.graph.inputs:
            if node.op.name != "input":
                self._fail(node, f"{_label(node)} is bound as an input but is no `input`")
            if node in seen:
                self._fail(node, f"input {node.hint!r} is bound twice")
            seen.add(node)

    def _order(self, nodes: list[Node]) -> None:
        known: set[Node] = set()
        for node in nodes:
            missing = next((i for i in node.inputs if i not in known), None)
            if missing is not None:
                self._fail(node, f"{_label(node)} reads {_label(missing)} before it is defined: the graph has a cycle")
            known.add(node)

    def _symbols(self) -> None:
        for name, known in self.graph.symbols.items():
            if name in RESERVED or not name.isidentifier():
                self._fail(None, f"{name!r} cannot name a size")
            if known.lo < 0 or known.divisor < 1 or (known.hi is not None and known.hi < known.lo):
                self._fail(None, f"size {name} has an impossible range {known}")

    # -- one node

    def _node(self, node: Node) -> None:
        if OPS.get(node.op.name) is not node.op:
            self._fail(node, f"op {node.op.name!r} is not in the catalogue")
        if node.op.name == "input" and node not in self.graph.inputs:
            self._fail(node, f"input {node.hint!r} is read but not bound by the graph")
        if not self.legal.allows(node):
            self._fail(node, f"{_label(node)} ({node.op.category.value}) is not legal {self.legal.where}")
        for objection in self.legal.objections:
            if reason := objection(node):
                self._fail(node, f"{_label(node)} {reason}")
        self._attributes(node)
        self._sizes(node)
        for value in node.attrs.values():
            self._data(node, value)
            if isinstance(value, Graph):
                self._body(value)
        self._type(node)

    def _attributes(self, node: Node) -> None:
        expected = node.op.attributes
        for name in node.attrs:
            if name not in expected:
                self._fail(node, f"{_label(node)} has no attribute {name!r}")
        for name in expected:
            if name not in node.attrs or node.attrs[name] is inspect.Parameter.empty:
                self._fail(node, f"{_label(node)} lacks its attribute {name!r}")
        sequence = node.attrs.get("sequence")
        if sequence is not None and self.sequences.setdefault(sequence, node) is not node:
            self._fail(node, f"{_label(node)} and {_label(self.sequences[sequence])} are both number {sequence} of the effects")

    def _type(self, node: Node) -> None:
        try:
            inferred = node.op.infer_type(tuple(i.type for i in node.inputs), node.attrs, node.prov)
        except TilewrightError as error:
            self._fail(node, str(error))
        if not same_type(inferred, node.type):
            self._fail(node, f"{_label(node)} is recorded as {type_source(node.type)} but yields {type_source(inferred)}")

    def _sizes(self, node: Node) -> None:
        symbols = free_symbols(sizes_in((node.type, *node.attrs.values())))
        for name in sorted(s.name for s in symbols):  # type: ignore[attr-defined]
            if name not in self.bound:
                self._fail(node, f"size {name} of {_label(node)} is told by no input")
            if name not in self.declared:
                self._fail(node, f"size {name} of {_label(node)} is not declared in the graph's symbols")

    def _data(self, node: Node, value: Any) -> None:
        if isinstance(value, Data) and self.names.setdefault(value.name, value) is not value:
            self._fail(node, f"two different constants are named {value.name!r}")

    def _body(self, body: Graph) -> None:
        if body.writes:
            self._fail(None, f"the body {body.name!r} writes to its inputs")
        _Verifier(body, BODY, self.names, frozenset(self.bound & self.declared)).run()

    # -- beside the nodes

    def _writes(self) -> None:
        seen: set[Node] = set()
        for target, value in self.graph.writes:
            if target not in self.graph.inputs or target in seen:
                self._fail(
                    target, f"{_label(target)} is written twice" if target in seen else f"{_label(target)} is written but is no input"
                )
            if not same_type(target.type, value.type):
                self._fail(value, f"{type_source(value.type)} is written to input {target.hint!r} of type {type_source(target.type)}")
            seen.add(target)

    def _arena(self, nodes: set[Node]) -> None:
        for node, slot in self.graph.arena.items():
            if node not in nodes:
                self._fail(None, f"the arena has a slot for {_label(node)}, which is not in the graph")
            nbytes = node.type.nbytes if isinstance(node.type, TensorType) else 0
            negative = isinstance(slot.offset, int) and slot.offset < 0
            if negative or (isinstance(nbytes, int) and isinstance(slot.size, int) and slot.size < nbytes):
                self._fail(node, f"{_label(node)} of {nbytes} bytes does not fit its slot at {slot.offset} of {slot.size}")

    def _inplace(self, nodes: list[Node]) -> None:
        """What is said to be computed in an input's memory can be; a graph that says so of nothing is not looked at."""
        if not self.graph.inplace:
            return
        possible = in_place(self.graph, nodes).target
        for node, target in self.graph.inplace.items():
            if possible.get(node) is not target:
                self._fail(node, f"{_label(node)} cannot be computed in the memory of {_label(target)}")


def bound_symbols(graph: Graph) -> frozenset[str]:
    """Names of the sizes that the inputs tell: bare dims of tensors, and size inputs."""
    values: list[Any] = []
    for node in graph.inputs:
        values += node.type.shape if isinstance(node.type, TensorType) else [node.type.value] if isinstance(node.type, ScalarType) else []
    return frozenset(v.name for v in values if isinstance(v, sympy.Symbol))


def sizes_in(values: Iterable[Any] | Type) -> Iterable[sympy.Expr]:
    """Every symbolic size inside types and attributes; nested graphs speak for themselves."""
    for value in values:  # type: ignore[union-attr]
        if isinstance(value, sympy.Expr):
            yield value
        elif isinstance(value, tuple):
            yield from sizes_in(value)
        elif isinstance(value, TensorType):
            yield from sizes_in(value.shape)
        elif isinstance(value, ScalarType):
            yield from sizes_in((value.value,))


def _label(node: Node) -> str:
    return f"{node.op.name} {node.hint!r}" if node.hint else node.op.name

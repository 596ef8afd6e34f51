"""`Node` and `Graph`: a graph is its inputs and outputs; everything else hangs from them.

Nodes are immutable. There are no use lists: `users(graph)` computes them. A graph also keeps what is not a node: the ranges of its
size symbols, which outputs are written back into inputs, and the stage it has reached.
"""

from __future__ import annotations

import enum
from collections.abc import Callable, Container, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import Any

import sympy
import torch

from .dims import Dim, SymbolRange
from .op import Category, Op, no_cost
from .provenance import NOWHERE, Provenance
from .types import Number, ScalarType, TensorType, Type, scalar_type

Attrs = Mapping[str, Any]


@dataclass(frozen=True, eq=False, slots=True)
class Node:
    """One value: `op` applied to `inputs` with `attrs`. Compared by identity."""

    op: Op
    inputs: tuple[Node, ...]
    attrs: Attrs
    type: Type
    hint: str = ""
    prov: Provenance = NOWHERE

    @property
    def tensor(self) -> TensorType:
        """The type of a value known to be one tensor."""
        assert isinstance(self.type, TensorType), f"{self.op.name} yields {self.type}, not one tensor"
        return self.type

    @property
    def shape(self) -> tuple[Any, ...]:
        return self.tensor.shape

    @property
    def dtype(self) -> torch.dtype:
        return self.type.dtype  # type: ignore[union-attr]

    def with_inputs(self, inputs: tuple[Node, ...]) -> Node:
        """The same op on other operands, type inferred anew."""
        types = tuple(n.type for n in inputs)
        return replace(self, inputs=inputs, type=self.op.infer_type(types, self.attrs, self.prov))

    def __repr__(self) -> str:
        operands = (str(n.attrs["value"]) if n.op.name == "scalar" else n.hint or n.op.name for n in self.inputs)
        return f"{self.op.name}({', '.join(operands)}): {self.type}"


class Data:
    """The tensor behind a `constant` node; `name` is its name in the text form and in an artifact. Compared by identity.

    `value` is None in a graph that was parsed without weights (`known` is false): such a graph can be rewritten and printed, not run.
    With `make` the tensor is computed when it is first read, so that a weight that is scaled, merged and packed by three passes exists
    in one form at a time; `make` is then let go of, with `sources`, what it computes it from.
    """

    __slots__ = ("__weakref__", "_make", "_value", "name", "sources")

    def __init__(
        self,
        name: str,
        value: torch.Tensor | None = None,
        make: Callable[[], torch.Tensor] | None = None,
        sources: tuple[Data, ...] = (),
    ) -> None:
        self.name, self._value, self._make, self.sources = name, value, make, sources

    @property
    def known(self) -> bool:
        """Whether there is a tensor, computed or yet to be computed."""
        return self._value is not None or self._make is not None

    @property
    def value(self) -> torch.Tensor | None:
        make = self._make
        if make is not None:
            self._value = make()
            self._make, self.sources = None, ()
        return self._value

    def share(self, other: Data) -> None:
        """Holds the tensor of another from now on, which is equal to its own."""
        self._value = other.value

    def __repr__(self) -> str:
        return f'"{self.name}"'


class Stage(enum.IntEnum):
    """How far a graph has come; `ir/verify.py` says what is legal at each stage."""

    CAPTURED = 0
    CANONICAL = 1
    PLANNED = 2
    FUSED = 3


@dataclass(frozen=True)
class Slot:
    """Where a value lives in the arena: `offset` and `size` in bytes, expressions where sizes are symbolic."""

    offset: Dim
    size: Dim


@dataclass(frozen=True, eq=False)
class Graph:
    """A function from `inputs` to `outputs`.

    inputs: nodes of op `input`, in call order. Tensor inputs, and sizes (`ScalarType` holding a symbol).
    outputs: any nodes, in return order; a scalar node is returned as a Python int.
    writes: (input, value) pairs: after the call the input tensor holds the value (in-place update of an argument or buffer).
    symbols: what is known of each size symbol.
    arena: node -> Slot, made by plan-memory; nodes not in it get memory of their own.
    inplace: node -> the input in whose memory it is computed, also by plan-memory (`ir/analysis/inplace.py` says when that is possible).
    """

    name: str
    inputs: tuple[Node, ...]
    outputs: tuple[Node, ...]
    writes: tuple[tuple[Node, Node], ...] = ()
    symbols: Mapping[str, SymbolRange] = field(default_factory=dict)
    stage: Stage = Stage.CAPTURED
    arena: Mapping[Node, Slot] = field(default_factory=dict)
    inplace: Mapping[Node, Node] = field(default_factory=dict)

    @property
    def roots(self) -> tuple[Node, ...]:
        """Everything that must be computed: outputs and written-back values."""
        return self.outputs + tuple(value for _, value in self.writes)

    def __str__(self) -> str:
        from .text import print_graph

        return print_graph(self)


def _infer_input(*, type: Type, strides: tuple[Any, ...] | None = None) -> Type:
    return type


def _infer_scalar(*, value: Any) -> Type:
    return scalar_type(value)


def _no_eager(**attrs: Any) -> Any:
    raise RuntimeError("inputs are bound by the interpreter")


INPUT = Op("input", Category.CONSTANT, _infer_input, _no_eager, no_cost)
"""A graph input. `type` is its type; `strides` (in elements) are given only where the caller's tensor is not row-major contiguous."""

SCALAR = Op("scalar", Category.CONSTANT, _infer_scalar, lambda *, value: value, no_cost)
"""A Python number or size, weak in promotion. The text form writes it in place: `mul(x, 0.5)`."""


def lift(value: Any) -> Node:
    """Nodes pass; Python numbers and sizes become `scalar` nodes."""
    if isinstance(value, Node):
        return value
    if isinstance(value, (bool, int, float, complex, sympy.Expr)):
        if isinstance(value, sympy.Expr) and value.is_Integer:
            value = int(value)
        return Node(SCALAR, (), MappingProxyType({"value": value}), scalar_type(value))
    raise TypeError(f"{value!r} is neither a node nor a number")


def graph_input(name: str, type: Type, strides: tuple[Any, ...] | None = None, prov: Provenance = NOWHERE) -> Node:
    return INPUT(type=type, strides=strides, hint=name, prov=prov)


def is_scalar(node: Node) -> bool:
    return isinstance(node.type, ScalarType)


def scalar_value(node: Node) -> Number | sympy.Expr | None:
    """The literal or size of a scalar node, None for anything else."""
    return node.type.value if isinstance(node.type, ScalarType) else None


def topological(roots: Iterable[Node]) -> list[Node]:
    """Every node under `roots`, operands first, in a deterministic order (depth first, operands left to right).

    Effectful nodes (random draws) keep the order of their `sequence` attribute, which capture numbers in program order: an earlier
    draw is emitted before a later one.
    """
    plain: list[Node] = []
    seen: set[Node] = set()
    for root in roots:
        visit(root, seen, plain)
    effects = [n for n in plain if n.attrs.get("sequence") is not None]
    if not effects:
        return plain
    ordered: list[Node] = []
    seen = set()
    for root in (*sorted(effects, key=lambda n: n.attrs["sequence"]), *roots):
        visit(root, seen, ordered)
    return ordered


def visit(root: Node, seen: set[Node], found: list[Node], stop: Container[Node] = ()) -> None:
    """Appends to `found` what lies under `root` and is neither in `seen` nor in `stop`, operands first; iterative, so depth is no limit."""
    if root in seen or root in stop:
        return
    stack: list[tuple[Node, int]] = [(root, 0)]
    seen.add(root)
    while stack:
        node, i = stack.pop()
        if i == len(node.inputs):
            found.append(node)
            continue
        stack.append((node, i + 1))
        child = node.inputs[i]
        if child not in seen and child not in stop:
            seen.add(child)
            stack.append((child, 0))


def order(graph: Graph) -> list[Node]:
    """Inputs first (all of them, used or not), then every node needed, operands before users."""
    inputs = list(graph.inputs)
    known = set(inputs)
    return inputs + [n for n in topological(graph.roots) if n not in known]


def users(graph: Graph) -> dict[Node, list[Node]]:
    """node -> the nodes that read it, in order; a node that reads it twice is listed once."""
    found: dict[Node, list[Node]] = {n: [] for n in order(graph)}
    for node in found:
        for operand in dict.fromkeys(node.inputs):
            found[operand].append(node)
    return found


def use_counts(graph: Graph) -> dict[Node, int]:
    """node -> how often it is needed: by the nodes that read it, as an output, as a value written back."""
    counts = {node: len(readers) for node, readers in users(graph).items()}
    for root in graph.roots:
        counts[root] += 1
    return counts


def constants(graph: Graph) -> dict[str, Data]:
    """Name -> data of every constant of the graph, regions included."""
    found: dict[str, Data] = {}
    for node in order(graph):
        for value in node.attrs.values():
            if isinstance(value, Data):
                found[value.name] = value
            elif isinstance(value, Graph):
                found.update(constants(value))
    return found


def make_graph(name: str, inputs: Sequence[Node], outputs: Sequence[Node], **fields: Any) -> Graph:
    return Graph(name, tuple(inputs), tuple(outputs), **fields)

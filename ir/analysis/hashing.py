"""`structural_hash`: a content hash of what a graph or group of nodes computes, and `equal`: the first difference of two graphs in words.

The hash does not see names, provenance, stage or memory plan. Nodes are numbered in a canonical order, in which the operands of
commutative ops are sorted, and size symbols are renamed in order of appearance; isomorphic groups therefore align node by node.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import sympy
import torch

from ..dims import SymbolRange, dim, symbol, to_source
from ..graph import Data, Graph, Node, topological
from ..rewrite import attr_key
from ..types import ScalarType, TensorType, Type, same_type, type_source


@dataclass(frozen=True)
class Canonical:
    """digest: sha256 in hex. nodes: the group in canonical order. leaves: what it reads from outside, numbered as they appear."""

    digest: str
    nodes: tuple[Node, ...]
    leaves: tuple[Node, ...]


def structural_hash(graph_or_nodes: Graph | Sequence[Node], weights: bool) -> str:
    """sha256 in hex, equal across processes for equal structure. weights: constants count with their data, else by type only."""
    return canonical(graph_or_nodes, weights).digest


def canonical(graph_or_nodes: Graph | Sequence[Node], weights: bool) -> Canonical:
    """The hash of a graph or of a group of nodes, with the order of nodes it was computed in.

    A group is the function from what it reads outside itself to those of its nodes that no other of its nodes reads.
    """
    if isinstance(graph_or_nodes, Graph):
        return _canonical_graph(graph_or_nodes, weights)
    group = set(graph_or_nodes)
    read = {i for n in group for i in n.inputs}
    roots = [n for n in graph_or_nodes if n not in read]
    return _Numbering(group, weights).run(roots)


def _canonical_graph(graph: Graph, weights: bool) -> Canonical:
    group = set(topological(graph.roots)) - set(graph.inputs)
    numbering = _Numbering(group, weights)
    for node in graph.inputs:
        numbering.leaf(node)
    return numbering.run(graph.roots, lambda: _frame(graph, numbering))


def _frame(graph: Graph, numbering: _Numbering) -> Any:
    """What a graph says beside its nodes: layouts of inputs, targets of writes, and what is known of its sizes."""
    position = {n: i for i, n in enumerate(graph.inputs)}
    layouts = tuple(numbering.attribute(n.attrs["strides"]) for n in graph.inputs)
    targets = tuple(position[target] for target, _ in graph.writes)
    ranges = tuple(graph.symbols.get(s, SymbolRange()) for s in numbering.symbols)
    return (layouts, targets, tuple((r.lo, r.hi, r.divisor) for r in ranges))


class _Numbering:
    """Numbers nodes, leaves, constants, random draws and symbols as a canonical traversal meets them."""

    def __init__(self, group: set[Node], weights: bool) -> None:
        self.group = {n for n in group if n.op.name != "scalar"}
        self.weights = weights
        self.symbols: dict[str, str] = {}
        self.order: dict[Node, int] = {}
        self.leaves: dict[Node, int] = {}
        self.data: dict[Data, int] = {}
        self.anonymous: dict[Node, str] = {}
        self.draws: dict[int, int] = {}

    def run(self, roots: Sequence[Node], frame: Any = lambda: ()) -> Canonical:
        inside = [n for n in topological(roots) if n in self.group]
        draws = sorted(n.attrs["sequence"] for n in inside if n.attrs.get("sequence") is not None)
        self.draws = {sequence: i for i, sequence in enumerate(draws)}
        self._shapes(inside)
        lines = [self.type(leaf.type) for leaf in self.leaves]
        lines += [self._line(n) for n in self._traverse(roots)]
        lines.append(tuple(self.reference(r) for r in roots))
        return Canonical(_digest((lines, frame())), tuple(self.order), tuple(self.leaves))

    def _shapes(self, inside: list[Node]) -> None:
        """A hash of each node by the tree below it, without names: what commutative operands are sorted by."""
        for n in inside:
            operands = [self._shape(i) for i in n.inputs]
            operands = sorted(operands) if n.op.commutative else operands
            attrs = [k for k, v in n.attrs.items() if not isinstance(v, (Data, Graph))]
            self.anonymous[n] = _digest((n.op.name, operands, _kind(n.type), [_anonymous(n.attrs[k]) for k in attrs]))

    def _shape(self, n: Node) -> str:
        """Leaves are told apart only where their number is known beforehand: the inputs of a graph."""
        return self.anonymous.get(n) or f"{_kind(n.type)} {self.leaves.get(n, '')}"

    def _operands(self, n: Node) -> tuple[Node, ...]:
        if not n.op.commutative:
            return n.inputs
        return tuple(sorted(n.inputs, key=self._shape))

    def _traverse(self, roots: Sequence[Node]) -> list[Node]:
        """The group in canonical order, operands first; leaves are numbered on the way."""
        found: list[Node] = []
        seen: set[Node] = set()
        for root in roots:
            stack: list[tuple[Node, bool]] = [(root, False)]
            while stack:
                n, done = stack.pop()
                if done:
                    self.order[n] = len(found)
                    found.append(n)
                elif n not in self.group:
                    self.leaf(n)
                elif n not in seen:
                    seen.add(n)
                    stack.append((n, True))
                    stack += [(i, False) for i in reversed(self._operands(n))]
        return found

    def leaf(self, n: Node) -> None:
        if n.op.name != "scalar":
            self.leaves.setdefault(n, len(self.leaves))

    def reference(self, n: Node) -> Any:
        """How a node is named inside the hash: by its number, or a number or size by itself."""
        if n in self.order:
            return ("node", self.order[n])
        if n in self.leaves:
            return ("leaf", self.leaves[n], self.type(n.type))
        return ("scalar", self.attribute(n.attrs["value"]))

    def _line(self, n: Node) -> Any:
        attrs = tuple((k, self.attribute(v, k)) for k, v in n.attrs.items() if not (n.op.name == "constant" and k == "type"))
        operands = [self.reference(i) for i in self._operands(n)]
        return (n.op.name, sorted(operands, key=repr) if n.op.commutative else operands, attrs, self.type(n.type))

    def type(self, t: Type) -> Any:
        if isinstance(t, tuple):
            return tuple(self.type(x) for x in t)
        if isinstance(t, ScalarType):
            return (str(t.dtype), self.attribute(t.value))
        return (str(t.dtype), tuple(self.attribute(d) for d in t.shape), t.device)

    def attribute(self, value: Any, key: str = "") -> Any:
        if isinstance(value, tuple):
            return tuple(self.attribute(v) for v in value)
        if isinstance(value, sympy.Expr):
            return ("size", to_source(self._renamed(value)))
        if isinstance(value, TensorType):
            return self.type(value)
        if isinstance(value, Data):
            return ("data", self.data.setdefault(value, len(self.data)), content(value) if self.weights else "")
        if isinstance(value, Graph):
            return structural_hash(value, self.weights)
        return self.draws[value] if key == "sequence" and value is not None else attr_key(value)

    def _renamed(self, value: sympy.Expr) -> Any:
        names = sorted(s.name for s in value.free_symbols)  # type: ignore[attr-defined]
        for name in names:
            self.symbols.setdefault(name, f"n{len(self.symbols)}")
        return dim(value.xreplace({s: symbol(self.symbols[s.name]) for s in value.free_symbols}))  # type: ignore[attr-defined]


def _kind(t: Type) -> str:
    """A type without its symbols' names."""
    if isinstance(t, tuple):
        return "+".join(_kind(x) for x in t)
    if isinstance(t, ScalarType):
        return f"{t.dtype} {_anonymous(t.value)}"
    return f"{t.dtype} {_anonymous(t.shape)} {t.device}"


def _anonymous(value: Any) -> Any:
    """An attribute with sizes left out."""
    if isinstance(value, tuple):
        return tuple(_anonymous(v) for v in value)
    return "?" if isinstance(value, sympy.Expr) else _kind(value) if isinstance(value, TensorType) else attr_key(value)


def _digest(value: Any) -> str:
    return hashlib.sha256(repr(value).encode()).hexdigest()


def content(data: Data) -> str:
    """sha256 of a constant's dtype, shape and bytes; of its name where it has no data."""
    if data.value is None:
        return f"name {data.name}"
    value = data.value.detach().cpu().contiguous()
    found = hashlib.sha256(f"{value.dtype} {tuple(value.shape)}".encode())
    if value.numel():
        found.update(value.reshape(-1).view(torch.uint8).numpy().data)
    return found.hexdigest()


# -- comparison


def equal(a: Graph, b: Graph, exact: bool = False) -> str | None:
    """None if the graphs are equal, else their first difference (operands before users) in words.

    Names of values do not count. Constants are equal if their data are, or their names where data is missing. exact: also the
    graphs' names, stages, memory plans and provenance.
    """
    return _Comparison(exact).graphs(a, b)


class _Comparison:
    """A walk over two graphs in step; nodes must correspond one to one."""

    def __init__(self, exact: bool) -> None:
        self.exact = exact
        self.partner: dict[Node, Node] = {}
        self.taken: dict[Node, Node] = {}

    def graphs(self, a: Graph, b: Graph) -> str | None:
        return self._headers(a, b) or self._bodies(a, b) or (self._plans(a, b) if self.exact else None)

    def _headers(self, a: Graph, b: Graph) -> str | None:
        for what in ("inputs", "outputs", "writes"):
            if len(getattr(a, what)) != len(getattr(b, what)):
                return f"{len(getattr(a, what))} {what} and {len(getattr(b, what))}"
        for name in sorted({*a.symbols, *b.symbols}):
            left, right = (g.symbols.get(name, SymbolRange()) for g in (a, b))
            if left != right:
                return f"size {name}: {left} and {right}"
        if self.exact and (a.name, a.stage) != (b.name, b.stage):
            return f"graph {a.name} at {a.stage.name} and {b.name} at {b.stage.name}"
        return None

    def _bodies(self, a: Graph, b: Graph) -> str | None:
        for left, right in zip(a.inputs, b.inputs):
            self._pair(left, right)
            if found := self._nodes(left, right):
                return found
        pairs = [*zip(a.outputs, b.outputs)]
        for (target, value), (target_b, value_b) in zip(a.writes, b.writes):
            pairs += [(target, target_b), (value, value_b)]
        for i, (left, right) in enumerate(pairs):
            if found := self._below(left, right):
                return f"{found}, below {f'output {i}' if i < len(a.outputs) else 'a write'}"
        return None

    def _below(self, a: Node, b: Node) -> str | None:
        stack: list[tuple[Node, Node, bool]] = [(a, b, False)]
        while stack:
            left, right, done = stack.pop()
            if done:
                if found := self._nodes(left, right):
                    return found
                continue
            if left.op.name == right.op.name == "scalar":
                if found := self._nodes(left, right):
                    return found
                continue
            if self.partner.get(left) is right:
                continue
            if left in self.partner or right in self.taken:
                return f"{_label(left)} and {_label(right)} are shared differently"
            if left.op is not right.op or len(left.inputs) != len(right.inputs):
                return f"{_label(left)} and {_label(right)}"
            self._pair(left, right)
            stack.append((left, right, True))
            stack += [(x, y, False) for x, y in reversed([*zip(left.inputs, right.inputs)])]
        return None

    def _pair(self, a: Node, b: Node) -> None:
        self.partner[a], self.taken[b] = b, a

    def _nodes(self, a: Node, b: Node) -> str | None:
        """The difference of two nodes whose operands correspond."""
        for key in dict.fromkeys((*a.attrs, *b.attrs)):
            if found := self._attributes(key, a.attrs.get(key), b.attrs.get(key)):
                return f"{_label(a)}: {found}"
        if not same_type(a.type, b.type):
            return f"{_label(a)}: {type_source(a.type)} and {type_source(b.type)}"
        if self.exact and a.prov != b.prov and a.op.name != "scalar":
            return f"{_label(a)}: from {a.prov} and {b.prov}"
        return None

    def _attributes(self, key: str, a: Any, b: Any) -> str | None:
        if key == "type":  # compared as the type of the node
            return None
        if isinstance(a, Data) and isinstance(b, Data):
            same = content(a) == content(b) if a.value is not None and b.value is not None else a.name == b.name
            return None if same else f"constants {a} and {b}"
        if isinstance(a, Graph) and isinstance(b, Graph):
            found = equal(a, b, self.exact)
            return f"in {key}: {found}" if found else None
        return None if _normal(a) == _normal(b) else f"{key}={a!r} and {key}={b!r}"

    def _plans(self, a: Graph, b: Graph) -> str | None:
        inplace = {self.partner[n]: self.partner[target] for n, target in a.inplace.items() if n in self.partner}
        if inplace != dict(b.inplace):
            return f"computed in place: {sorted(map(_label, inplace))} and {sorted(map(_label, b.inplace))}"
        left = {self.partner[n]: slot for n, slot in a.arena.items() if n in self.partner}
        if left == dict(b.arena):
            return None
        n = next(n for n in (*left, *b.arena) if left.get(n) != b.arena.get(n))
        return f"{_label(n)}: at {left.get(n)} and {b.arena.get(n)}"


def _normal(value: Any) -> Any:
    if isinstance(value, tuple):
        return tuple(_normal(v) for v in value)
    if isinstance(value, sympy.Expr):
        value = dim(value)
    return str(value) if isinstance(value, TensorType) else attr_key(value)


def _label(n: Node) -> str:
    if n.op.name == "scalar":
        return f"{n.attrs['value']}"
    return f"{n.op.name} {n.hint!r}" if n.hint else n.op.name

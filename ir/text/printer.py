"""`print_graph(graph)`: the text form. One line a node, the type after the colon, provenance after `#`; `parse` reads it back."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from typing import Any

import sympy
import torch

from ..dims import Dim, free_symbols, to_source
from ..graph import Graph, Node, Stage, order
from ..ops.structure import Ref
from ..provenance import NOWHERE
from ..rewrite import attr_key
from ..types import DTYPE_NAMES, ScalarType, TensorType, scalar_source, type_source
from .values import RESERVED

_IDENTIFIER = re.compile(r"[A-Za-z_][A-Za-z0-9_]*\Z")
_TARGET = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*\Z", re.ASCII)
_LINE = 120  # inputs go on lines of their own beyond this
_COLUMNS = (10, 60, 40)  # names, applications and types are padded to their widest, up to this


def print_graph(graph: Graph) -> str:
    """The graph as text: deterministic, and `parse` gives an equal graph back."""
    return "\n".join(_graph_lines("graph", graph)) + "\n"


def print_nodes(graph: Graph, around: Node, count: int = 10) -> str:
    """The `count` lines of the graph nearest to the definition of `around`, which is marked: the context of an error."""
    names = name_nodes(graph)
    shown = [n for n in order(graph) if n.op.name != "scalar"]
    at = shown.index(around) if around in shown else 0
    first = max(0, min(at - count // 2, len(shown) - count))
    return "\n".join(("-> " if n is around else "   ") + _plain_line(n, names) for n in shown[first : first + count])


def _plain_line(node: Node, names: dict[Node, str]) -> str:
    if node.op.name == "input":
        return _input_source(node, names)
    return f"{names[node]} = {_application(node, names)} : {type_source(node.type)}{_comment(node)}"


def name_nodes(graph: Graph) -> dict[Node, str]:
    """A distinct valid name for every node but scalars, from its hint or else its op; numbered in order where they collide."""
    nodes = [n for n in order(graph) if n.op.name != "scalar"]
    taken = {s.name for s in _symbols(graph, nodes)} | RESERVED  # type: ignore[attr-defined]
    names: dict[Node, str] = {}
    counts: dict[str, int] = {}
    used = {i for n in nodes for i in n.inputs} | set(graph.roots)
    for node in nodes:
        if _is_symbol_input(node) and node not in used:
            names[node] = node.hint
            continue
        base = _identifier(node.hint or node.op.name)
        name = base
        while name in taken:
            counts[base] = counts.get(base, 0) + 1
            name = f"{base}_{counts[base]}"
        taken.add(name)
        names[node] = name
    return names


def _is_symbol_input(node: Node) -> bool:
    """An input that carries the symbol it is named after; `s0: int` declares both."""
    value = node.type.value if isinstance(node.type, ScalarType) and node.op.name == "input" else None
    return isinstance(value, sympy.Symbol) and value.name == node.hint


def _identifier(text: str) -> str:
    clean = re.sub(r"\W+", "_", text, flags=re.ASCII).strip("_") or "v"
    return f"v{clean}" if clean[0].isdigit() else clean


def _symbols(graph: Graph, nodes: Iterable[Node]) -> set[sympy.Symbol]:
    found = {sympy.Symbol(name) for name in graph.symbols}
    for node in nodes:
        found |= free_symbols(_dims_of(node.type))
        for value in node.attrs.values():
            found |= free_symbols(_dims_of(value))
    return found


def _dims_of(value: Any) -> Iterable[Any]:
    """Every size inside a type or attribute."""
    if isinstance(value, tuple):
        for v in value:
            yield from _dims_of(v)
    elif isinstance(value, TensorType):
        yield from value.shape
    elif isinstance(value, ScalarType):
        yield from _dims_of(value.value)
    elif isinstance(value, sympy.Expr):
        yield value


# -- lines


def _graph_lines(keyword: str, graph: Graph) -> list[str]:
    names = name_nodes(graph)
    title = graph.name if _IDENTIFIER.match(graph.name) else json.dumps(graph.name)
    tail = _where(graph) + (f" stage {graph.stage.name.lower()}" if graph.stage is not Stage.CAPTURED else "") + " {"
    lines = _header(f"{keyword} {title}(", graph, names, f"){tail}")
    known = set(graph.inputs)
    body = [n for n in order(graph) if n not in known and n.op.name != "scalar"]
    lines += [f"  {line}" for line in _node_lines(graph, body, names)]
    lines += [f"  write {names[target]} = {_operand(value, names)}" for target, value in graph.writes]
    lines += [f"  return {', '.join(_operand(n, names) for n in graph.outputs)}".rstrip(), "}"]
    return lines


def _header(start: str, graph: Graph, names: dict[Node, str], end: str) -> list[str]:
    inputs = [_input_source(n, names) for n in graph.inputs]
    line = start + ", ".join(inputs) + end
    if len(line) <= _LINE and all(n.prov == NOWHERE for n in graph.inputs):
        return [line]
    rows = [f"  {text}," + _comment(n) for n, text in zip(graph.inputs, inputs)]
    return [start, *rows, end]


def _input_source(node: Node, names: dict[Node, str]) -> str:
    name = names[node]
    kind = type_source(node.type)
    if _is_symbol_input(node) and name == node.hint:
        kind = "int"
    elif isinstance(node.type, ScalarType) and node.type.value is None:
        kind += "=none"
    strides = node.attrs["strides"]
    return f"{name}: {kind}" + ("" if strides is None else f" strides {value_source(strides)}")


def _where(graph: Graph) -> str:
    facts: list[str] = []
    for name, r in graph.symbols.items():
        facts.append(f"{name} in {r.lo}..{'' if r.hi is None else r.hi}")
        facts += [f"{name} % {r.divisor} == 0"] if r.divisor != 1 else []
    return f" where {', '.join(facts)}" if facts else ""


def _node_lines(graph: Graph, body: list[Node], names: dict[Node, str]) -> list[str]:
    rows = [(names[n], _application(n, names), _place(graph, n, names)) for n in body]
    widths = [min(limit, max((len(r[i]) for r in rows), default=0)) for i, limit in enumerate(_COLUMNS)]
    lines: list[str] = []
    for node, (name, application, place) in zip(body, rows):
        text = f"{name:{widths[0]}} = {application:{widths[1]}} : {place:{widths[2]}}{_comment(node)}"
        lines.append(text.rstrip())
        for key, value in node.attrs.items():
            if isinstance(value, Graph):
                lines += [f"  {line}" for line in _graph_lines(key, value)]
    return lines


def _place(graph: Graph, node: Node, names: dict[Node, str]) -> str:
    slot, target = graph.arena.get(node), graph.inplace.get(node)
    where = f" @ {_bytes(slot.offset)}+{_bytes(slot.size)}" if slot else f" into {names[target]}" if target else ""
    return type_source(node.type) + where


def _bytes(count: Dim) -> str:
    return str(count) if isinstance(count, int) else f"({to_source(count)})"


def _comment(node: Node) -> str:
    return "" if node.prov == NOWHERE else f"  # {node.prov}"


def _application(node: Node, names: dict[Node, str]) -> str:
    if node.op.name == "constant":
        return f"constant {json.dumps(node.attrs['data'].name)}"
    parts = [_operand(n, names) for n in node.inputs]
    parts += [f"{k}={value_source(v)}" for k, v in node.attrs.items() if not _implied(node, k, v)]
    return f"{_op_source(node)}({', '.join(parts)})"


def _op_source(node: Node) -> str:
    if node.op.name != "extern":
        return node.op.name
    target = node.attrs["target"]
    return f"extern[{target if _TARGET.match(target) else json.dumps(target)}]"


def _implied(node: Node, key: str, value: Any) -> bool:
    """True for attributes that the line does not spell out: defaults, nested graphs, and what an extern says in other places."""
    if isinstance(value, Graph):
        return True
    if node.op.name == "extern" and key in ("target", "types"):
        return True
    if node.op.name == "extern" and key == "args":
        return value == tuple(Ref(i) for i in range(len(node.inputs)))
    return attr_key(value) == attr_key(node.op.attributes.get(key))


def _operand(node: Node, names: dict[Node, str]) -> str:
    return value_source(node.attrs["value"]) if node.op.name == "scalar" else names[node]


# -- values


def value_source(value: Any) -> str:
    """An attribute or scalar as text. Raises TypeError for what the text form has no spelling of."""
    for kind, source in _SOURCES:
        if isinstance(value, kind):
            return source(value)
    raise TypeError(f"{type(value).__name__} has no text form: {value!r}")


def _sequence_source(values: tuple[Any, ...]) -> str:
    return f"[{', '.join(value_source(v) for v in values)}]"


def _dtype_source(dtype: torch.dtype) -> str:
    return DTYPE_NAMES.get(dtype, str(dtype).removeprefix("torch."))


_SOURCES: tuple[tuple[Any, Any], ...] = (
    (type(None), lambda v: "none"),
    ((bool, int, float, complex, sympy.Expr), scalar_source),
    (str, json.dumps),
    ((tuple, list), _sequence_source),
    (torch.dtype, _dtype_source),
    (torch.device, lambda v: f'device("{v}")'),
    ((torch.layout, torch.memory_format), str),
    ((TensorType, Ref), str),
)

"""`parse(text)`: a graph from its text form, by recursive descent.

    graph  := "graph" name "(" input, ... ")" ("where" fact, ...)? ("stage" name)? "{" line* "}"
    input  := name ":" type ("strides" value)?
    fact   := symbol "in" lo ".." hi? | symbol "%" divisor "==" 0
    line   := name "=" op "(" operand, ..., attribute=value, ... ")" (":" type)? ("@" offset "+" size)? (attribute graph)*
            | "write" input "=" operand | "return" operand, ...
    op     := name | extern "[" target "]" | constant "name"

A value that is a graph (the body of a region) follows the line of its node, introduced by the attribute's name in place of `graph`.
Types may be left out where they can be inferred; where given they are checked. The comment behind a node or input is its provenance.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch

from ..dims import Dim, SymbolRange
from ..errors import TilewrightError
from ..graph import Data, Graph, Node, Slot, Stage, graph_input, lift
from ..op import Op
from ..ops import OPS, Ref
from ..ops.constants import tensor_type
from ..provenance import Provenance
from ..rewrite import attr_key
from ..types import ScalarType, Type, same_type, type_source
from .tokens import Cursor, Token
from .values import RESERVED, ValueReader, is_dim


def parse(text: str, constants: Mapping[str, torch.Tensor] = {}) -> Graph:
    """The graph that `text` describes. `constants` gives the data of constants by name; the others stay without data.

    Raises ParseError, with the line, for anything that is not a well-typed graph in text form.
    """
    cursor = Cursor(text)
    if not cursor.at("graph"):
        cursor.fail(f"expected 'graph', found {cursor.peek().text!r}")
    graph = _GraphReader(cursor, {}, constants).graph()
    if cursor.peek().kind != "end":
        cursor.fail(f"expected the end of the text, found {cursor.peek().text!r}")
    return graph


class _GraphReader:
    """Reads one graph; the body of a region is read by another one that shares the cursor, the weights and the size symbols."""

    def __init__(
        self, cursor: Cursor, data: dict[str, Data], weights: Mapping[str, torch.Tensor], outer: frozenset[str] = frozenset()
    ) -> None:
        self.cursor = cursor
        self.data = data
        self.weights = weights
        self.outer = outer
        self.symbols: set[str] = set(outer)
        self.values = ValueReader(cursor, self.symbols)
        self.named: dict[str, Node] = {}
        self.scalars: dict[Any, Node] = {}
        self.writes: list[tuple[Node, Node]] = []
        self.arena: dict[Node, Slot] = {}
        self.inplace: dict[Node, Node] = {}

    def graph(self) -> Graph:
        cursor = self.cursor
        cursor.enter()
        cursor.next()
        name = cursor.string() if cursor.peek().kind == "string" else cursor.name("a name of a graph")
        inputs = self._inputs()
        ranges = self._ranges()
        stage = self._stage()
        cursor.expect("{")
        outputs: tuple[Node, ...] | None = None
        while not cursor.at("}"):
            if outputs is not None:
                cursor.fail("'return' must be the last line")
            outputs = self._line()
        cursor.expect("}")
        cursor.leave()
        return Graph(name, tuple(inputs), outputs or (), tuple(self.writes), ranges, stage, self.arena, self.inplace)

    # -- header

    def _inputs(self) -> list[Node]:
        cursor, inputs = self.cursor, []
        cursor.expect("(")
        self.values.declaring = True
        while not cursor.at(")"):
            name, kind, strides = self._input()
            more = cursor.take(",")
            node = graph_input(name, kind, strides, Provenance.read(cursor.comment()))
            inputs.append(node)
            self._define(name, node)
            if not more:
                break
        self.values.declaring = False
        cursor.expect(")")
        return inputs

    def _input(self) -> tuple[str, Type, Any]:
        cursor = self.cursor
        name = cursor.name("an input")
        cursor.expect(":")
        bare = cursor.at("int") and not cursor.at("=", 1) and not cursor.at("[", 1)
        kind = self.values.type()
        if bare:  # `s0: int` declares the size symbol s0
            kind = ScalarType(torch.int64, self.values._symbol(name))
        strides = self.values.value() if cursor.take("strides") else None
        return name, kind, strides

    def _ranges(self) -> dict[str, SymbolRange]:
        """What the where clause says; symbols of the inputs that it leaves out may be any size."""
        ranges: dict[str, SymbolRange] = {}
        if self.cursor.take("where"):
            self._fact(ranges)
            while self.cursor.take(","):
                self._fact(ranges)
        for name in sorted(self.symbols - self.outer - set(ranges)):
            ranges[name] = SymbolRange()
        self.symbols.update(ranges)
        return ranges

    def _fact(self, ranges: dict[str, SymbolRange]) -> None:
        cursor = self.cursor
        name = cursor.name("a size symbol")
        if name in RESERVED:
            cursor.fail(f"{name!r} is a reserved word")
        known = ranges.get(name, SymbolRange())
        if cursor.take("%"):
            divisor = cursor.integer()
            cursor.expect("==")
            if cursor.integer() != 0 or divisor < 1:
                cursor.fail("a size is declared divisible as `s % 8 == 0`")
            ranges[name] = replace(known, divisor=divisor)
            return
        cursor.expect("in")
        lo = cursor.integer()
        cursor.expect("..")
        ranges[name] = replace(known, lo=lo, hi=cursor.integer() if cursor.peek().kind == "number" else None)

    def _stage(self) -> Stage:
        if not self.cursor.take("stage"):
            return Stage.CAPTURED
        name = self.cursor.name("a stage")
        if name.upper() not in Stage.__members__:
            self.cursor.fail(f"unknown stage {name!r}; stages are {', '.join(s.name.lower() for s in Stage)}")
        return Stage[name.upper()]

    # -- lines

    def _line(self) -> tuple[Node, ...] | None:
        """Reads one line; the outputs if it was `return`."""
        cursor = self.cursor
        if cursor.take("return"):
            return tuple(self._operands_until("}"))
        if cursor.take("write"):
            target = self._input_named(cursor.name("an input"))
            cursor.expect("=")
            self.writes.append((target, self._operand()))
            return None
        self._assignment()
        return None

    def _define(self, name: str, node: Node, token: Token | None = None) -> None:
        if name in self.named:
            self.cursor.fail(f"{name!r} is defined twice", token)
        if name in RESERVED:
            self.cursor.fail(f"{name!r} is a reserved word", token)
        self.named[name] = node

    def _input_named(self, name: str) -> Node:
        node = self.named.get(name)
        if node is None or node.op.name != "input":
            self.cursor.fail(f"{name!r} is not an input")
        return node

    def _operands_until(self, end: str) -> list[Node]:
        found: list[Node] = []
        while not self.cursor.at(end):
            found.append(self._operand())
            if not self.cursor.take(","):
                break
        return found

    def _operand(self) -> Node:
        """A value defined above, or a number or size written in place. A symbol's name means the size, also where an input carries it."""
        cursor = self.cursor
        token = cursor.peek()
        if token.kind == "name" and token.text not in self.symbols and token.text in self.named:
            return self.named[cursor.next().text]
        value = self.values.value()
        if not is_dim(value) and not isinstance(value, (bool, float, complex)):
            cursor.fail(f"{value!r} is neither a value nor a number", token)
        return self.scalars.setdefault(attr_key(value), lift(value))

    def _slot(self) -> Slot:
        self.cursor.expect("@")
        offset = self._bytes()
        self.cursor.expect("+")
        return Slot(offset, self._bytes())

    def _bytes(self) -> Dim:
        """A number, or a size in parentheses."""
        if not self.cursor.take("("):
            return self.cursor.integer()
        count = self.values.dim()
        self.cursor.expect(")")
        return count

    # -- nodes

    def _assignment(self) -> None:
        """name = op(...) : type @ slot (or `into input`)  # provenance, then the graphs among the attributes."""
        cursor = self.cursor
        token = cursor.peek()
        name = cursor.name("a line `name = op(...)`, `write` or `return`")
        cursor.expect("=")
        op, operands, attrs = self._application()
        given = self.values.type() if cursor.take(":") else None
        slot = self._slot() if cursor.at("@") else None
        target = self._operand() if cursor.take("into") else None
        prov = Provenance.read(cursor.comment())
        while cursor.peek(1).kind in ("name", "string") and cursor.at("(", 2) and cursor.peek().text in op.attributes:
            self._attribute(attrs, op, cursor.peek().text, _GraphReader(cursor, self.data, self.weights, frozenset(self.symbols)).graph())
        node = self._build(op, operands, attrs, given, token, hint=name, prov=prov)
        self._define(name, node, token)
        if slot is not None:
            self.arena[node] = slot
        if target is not None:
            self.inplace[node] = target

    def _application(self) -> tuple[Op, list[Node], dict[str, Any]]:
        """op(operands, attributes), constant "name" or extern[target](...)."""
        cursor = self.cursor
        token = cursor.peek()
        name = cursor.name("an op")
        if name not in OPS or name in ("input", "scalar"):
            cursor.fail(f"there is no op named {name!r}", token)
        op = OPS[name]
        if name == "constant":
            return op, [], {"data": self._data(cursor.string())}
        attrs: dict[str, Any] = {"target": self._target()} if name == "extern" else {}
        cursor.expect("(")
        operands: list[Node] = []
        while not cursor.at(")"):
            if cursor.peek().kind == "name" and cursor.at("=", 1):
                key = cursor.next().text
                cursor.expect("=")
                self._attribute(attrs, op, key, self.values.value())
            elif set(attrs) - {"target"}:
                cursor.fail("operands come before attributes")
            else:
                operands.append(self._operand())
            if not cursor.take(","):
                break
        cursor.expect(")")
        return op, operands, attrs

    def _attribute(self, attrs: dict[str, Any], op: Op, name: str, value: Any) -> None:
        if name not in op.attributes or name in attrs:
            self.cursor.fail(f"{op.name} has no attribute {name!r}" if name not in attrs else f"attribute {name!r} is given twice")
        attrs[name] = value

    def _target(self) -> str:
        self.cursor.expect("[")
        if self.cursor.peek().kind == "string":
            target = self.cursor.string()
        else:
            target = self.cursor.name("a target")
            while self.cursor.take("."):
                target += "." + self.cursor.name("a part of the target")
        self.cursor.expect("]")
        return target

    def _data(self, name: str) -> Data:
        return self.data.setdefault(name, Data(name, self.weights.get(name)))

    def _build(self, op: Op, operands: list[Node], attrs: dict[str, Any], given: Type | None, token: Token, **fields: Any) -> Node:
        """The node, its type inferred and compared with the one given."""
        if op.name == "extern":
            attrs.setdefault("args", tuple(Ref(i) for i in range(len(operands))))
            attrs["types"] = self._extern_types(given, token)
        elif op.name == "constant" and given is not None:
            attrs["type"] = given
        try:
            node = op(*operands, **attrs, **fields)
        except TilewrightError as error:
            self.cursor.fail(str(error), token)
        actual = node.type
        if op.name == "constant" and attrs["data"].value is not None:  # which may wait elsewhere: weights of a GPU, on a CPU
            actual = replace(tensor_type(attrs["data"].value), device=node.tensor.device)
        if given is not None and not same_type(given, actual):
            self.cursor.fail(f"{fields['hint']} is declared {type_source(given)} but is {type_source(actual)}", token)
        return node

    def _extern_types(self, given: Type | None, token: Token) -> tuple[Any, ...]:
        if given is None or isinstance(given, ScalarType):
            self.cursor.fail("the type of an extern must be given: f32[4] or (f32[4], i64[4])", token)
        return given if isinstance(given, tuple) else (given,)

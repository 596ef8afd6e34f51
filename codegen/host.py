"""The host program as Python text: straight-line code that calls kernels and library functions over an arena.

Three parts, by how often they run. *program*: constants and their views, once. *frame*: tensors in the arena, their views and addresses,
once per set of sizes. *call*: every call; it names values as the graph does.

    h = slot(memory, 0, (8, 384), float32)                 frame
    h_at = h.data_ptr()

    x, = inputs                                            call
    y = empty((8, 384), (384, 1), float32)
    k0_add_gelu(x.data_ptr(), h_at)
    mm(h, w_t, out=y)
    return [y]
"""

from __future__ import annotations

import builtins
import enum
import keyword
import math
import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import sympy
import torch

from ..ir.dims import Dim, contiguous_strides, dim, to_source
from ..ir.graph import Graph, Node, is_scalar, order, scalar_value
from ..ir.types import TensorType


class Scope(enum.IntEnum):
    """How long a value lasts; a value made from several lasts as long as the shortest."""

    PROGRAM = 0
    FRAME = 1
    CALL = 2


@dataclass(frozen=True)
class Value:
    """A tensor of the host program. contiguous: known to be row-major without looking at it."""

    name: str
    scope: Scope
    contiguous: bool


_RESERVED = frozenset(
    {"inputs", "memory", "frame", "sizes", "nbytes", "prepare", "call", *keyword.kwlist, *keyword.softkwlist, *dir(builtins)}
)


class Host:
    """Collects the text of a host program. `names` are the objects that the text refers to; they become its globals."""

    def __init__(self, graph: Graph) -> None:
        self.graph = graph
        self.names: dict[str, Any] = {"torch": torch, "inf": math.inf, "nan": math.nan}
        self.parts: dict[Scope, list[str]] = {scope: [] for scope in Scope}
        self.values: dict[Node, Value] = {}
        self.copies: list[str] = []
        self.items = {(n.inputs[0], n.attrs["index"]): n for n in reversed(order(graph)) if n.op.name == "item"}
        self._taken: set[str] = {
            "inputs",
            "memory",
            "frame",
            "sizes",
            *keyword.kwlist,
            *keyword.softkwlist,
            *dir(__builtins__),
            *graph.symbols,
        }
        self._derived: dict[tuple[str, str], Value] = {}
        self._framed: dict[str, None] = {}  # names of the frame that the call uses
        self._last: dict[str, int] = {}  # name of a call value -> the last line that reads it

    # -- names

    def name(self, wanted: str) -> str:
        """A fresh identifier close to `wanted`."""
        base = re.sub(r"\W+", "_", wanted).strip("_") or "v"
        base = f"v{base}" if base[0].isdigit() else base
        found, count = base, 1
        while found in self._taken or found in self.names:
            count += 1
            found = f"{base}_{count}"
        self._taken.add(found)
        return found

    def bind(self, wanted: str, thing: Any) -> str:
        """A global of the text that is `thing`; one name per thing."""
        for name, known in self.names.items():
            if known is thing:
                return name
        name = wanted if wanted.isidentifier() and wanted not in self._taken and wanted not in self.names else self.name(wanted)
        self.names[name] = thing
        return name

    # -- text

    def line(self, text: str, scope: Scope = Scope.CALL, reads: Iterable[Value] = ()) -> None:
        self.parts[scope].append(text)
        for value in reads:
            self._read(value, scope)

    def _read(self, value: Value, scope: Scope) -> None:
        if scope is not Scope.CALL:
            return
        if value.scope is Scope.FRAME:
            self._framed[value.name] = None
        elif value.scope is Scope.CALL:
            self._last[value.name] = len(self.parts[Scope.CALL]) - 1

    def define(
        self, node: Node | None, expression: str, scope: Scope, reads: Iterable[Value] = (), contiguous: bool = False, hint: str = ""
    ) -> Value:
        """A new value, computed by `expression`."""
        value = Value(self.name(hint or (node.hint if node and node.hint else node.op.name if node else "v")), scope, contiguous)
        self.line(f"{value.name} = {expression}", scope, [*reads, value])
        if node is not None:
            self.values[node] = value
        return value

    def derive(self, value: Value, suffix: str, expression: str, contiguous: bool = False) -> Value:
        """A view of a value (`expression` mentions it by name), made once, and lasting as long as the value."""
        key = (value.name, expression)
        if key not in self._derived:
            self._derived[key] = self.define(None, expression, value.scope, [value], contiguous, hint=f"{value.name}_{suffix}")
        return self._derived[key]

    def dense(self, value: Value, strides: tuple[Dim, ...] | None = None) -> Value:
        """The value laid out row-major, or with the given strides: itself where it is so already."""
        if strides is not None:
            check = f"strided({value.name}, {self.literal(strides)})"
        elif value.contiguous:
            return value
        else:
            check = f"dense({value.name})"
        scope = Scope.PROGRAM if value.scope is Scope.PROGRAM else Scope.CALL
        key = (value.name, check)
        if key not in self._derived:
            if scope is Scope.CALL:
                self.copies.append(value.name)
            self._derived[key] = self.define(None, check, scope, [value], strides is None, hint=f"{value.name}_dense")
        return self._derived[key]

    def address(self, value: Value) -> str:
        """The text of a value's data pointer, as the call reads it."""
        if value.scope is Scope.CALL:
            return f"{value.name}.data_ptr()"
        pointer = self.derive(value, "at", f"{value.name}.data_ptr()")
        self._read(pointer, Scope.CALL)
        return pointer.name

    def literal(self, value: Any) -> str:
        """An attribute as Python text; what has no literal becomes a global."""
        if isinstance(value, (tuple, list)) and not hasattr(value, "_fields"):
            inner = ", ".join(self.literal(v) for v in value)
            return f"({inner},)" if len(value) == 1 else f"({inner})"
        if isinstance(value, sympy.Expr):
            return to_source(dim(value))
        if value is None or isinstance(value, (bool, int, float, str)):
            return repr(value)
        if isinstance(value, torch.dtype):
            return self.bind(str(value).removeprefix("torch."), value)
        return self.bind(re.sub(r"\W+", "_", str(value))[:20] or "c", value)

    def operand(self, node: Node) -> str:
        """An operand as the call writes it: a tensor's name, a number or a size."""
        if not is_scalar(node):
            return self.values[node].name
        value = scalar_value(node)
        return self.literal(value) if value is not None else self.values[node].name

    def tensors(self, nodes: Iterable[Node]) -> list[Value]:
        """The values among the operands."""
        return [self.values[n] for n in nodes if n in self.values]

    # -- memory

    def memory(self, node: Node | None, kind: TensorType, hint: str) -> Value:
        """Contiguous memory for a result: its slot of the arena, else a fresh tensor."""
        slot = self.graph.arena.get(node) if node is not None else None
        shape = self.literal(kind.shape)
        if slot is not None:
            dtype = self.literal(kind.dtype)
            value = self.define(None, f"slot(memory, {to_source(slot.offset)}, {shape}, {dtype})", Scope.FRAME, (), True, hint)
        else:
            value = self.define(None, self.fresh(kind), Scope.CALL, (), True, hint)
        if node is not None:
            self.values[node] = value
        return value

    def fresh(self, kind: TensorType) -> str:
        """The text of a new tensor."""
        shape, dtype = self.literal(kind.shape), self.literal(kind.dtype)
        steps = self.literal(contiguous_strides(kind.shape))
        if kind.device == "cpu":
            return f"empty({shape}, {steps}, {dtype})"
        return f"torch.empty_strided({shape}, {steps}, dtype={dtype}, device={kind.device!r})"

    # -- the whole

    @property
    def symbols(self) -> list[str]:
        return sorted(self.graph.symbols)

    def source(self, peak: Dim, results: list[str], kept: set[str]) -> str:
        """The module: frame and call as functions. `results`: what the call returns; `kept`: names among it."""
        sizes = "".join(f", {s}" for s in self.symbols)
        framed = list(self._framed)
        program = [*self.parts[Scope.PROGRAM]]
        nbytes = [f"def nbytes({sizes[2:]}):", f"    return {to_source(peak)}"]
        frame = [f"def prepare(memory{sizes}):", *_indent(self.parts[Scope.FRAME]), f"    return ({''.join(f'{n}, ' for n in framed)})"]
        call = [f"def call(inputs, frame{sizes}):"]
        if framed:
            call.append(f"    ({', '.join(framed)},) = frame")
        call += _indent(self._freed(kept))
        call.append(f"    return [{', '.join(results)}]")
        return "\n".join([*program, "", *nbytes, "", *frame, "", *call, ""])

    def _freed(self, kept: set[str]) -> list[str]:
        """The lines of the call, each value deleted after the last line that reads it."""
        dying: dict[int, list[str]] = {}
        for name, at in self._last.items():
            if name not in kept:
                dying.setdefault(at, []).append(name)
        lines: list[str] = []
        for i, text in enumerate(self.parts[Scope.CALL]):
            lines.append(text)
            if i in dying:
                lines.append(f"del {', '.join(dying[i])}")
        return lines


def _indent(lines: Iterable[str]) -> list[str]:
    return [f"    {line}" for line in lines]

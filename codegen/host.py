"""The host program as Python text: straight-line code that calls kernels and library functions over an arena.

Three parts, by how often they run. *program*: constants and their views, once. *frame*: tensors in the arena, their views, and the table
that kernels take their addresses from, once per set of sizes. *call*: every call; it names values as the graph does.

    h = slot(memory, 0, (8, 384), float32)                 frame
    pack_1(table, 0, memory_at + 0)

    x, = inputs                                            call
    y = empty((8, 384), (384, 1), float32)
    # calls_0: k0_add_gelu(x, h)
    pack_2(table, 8, threads(), x.data_ptr())
    run(calls_0_at, table_at)
    mm(h, w_t, out=y)
    return [y]

Kernel calls that follow each other are one call of a C routine: see calls.py.
"""

from __future__ import annotations

import builtins
import enum
import keyword
import math
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import sympy
import torch

from ..ir.dims import Dim, contiguous_strides, dim, to_source
from ..ir.dims import hint as hinted
from ..ir.graph import Graph, Node, is_scalar, order, scalar_value
from ..ir.types import TensorType
from .calls import Entry, KernelCall, Line, Moves, Operand, emit_runs, freed


class Scope(enum.IntEnum):
    """How long a value lasts; a value made from several lasts as long as the shortest."""

    PROGRAM = 0
    FRAME = 1
    CALL = 2


@dataclass(frozen=True)
class Value:
    """A tensor of the host program. contiguous: known to be row-major without looking at it.

    at: its address as an expression of the frame; the tensor itself is then only made if something reads it.
    nbytes: about how much memory it holds, 0 where it is not known.
    """

    name: str
    scope: Scope
    contiguous: bool
    at: str = ""
    nbytes: int = 0


_RESERVED = frozenset(
    ["inputs", "memory", "memory_at", "frame", "table", "table_at", "met", "sizes", "nbytes", "prepare", "call", *keyword.kwlist,
     *keyword.softkwlist, *dir(builtins)]
)  # fmt: skip


class Host:
    """Collects the text of a host program. `names` are the objects that the text refers to; they become its globals."""

    def __init__(self, graph: Graph) -> None:
        self.graph = graph
        self.names: dict[str, Any] = {"torch": torch, "inf": math.inf, "nan": math.nan}
        self.program: list[str] = []
        self.frame: list[str] = []
        self.entries: list[Entry] = []  # of the call
        self.values: dict[Node, Value] = {}
        self.copies: list[str] = []
        self.items = {(n.inputs[0], n.attrs["index"]): n for n in reversed(order(graph)) if n.op.name == "item"}
        self._taken: set[str] = {*_RESERVED, *graph.symbols}
        self._derived: dict[tuple[str, str], Value] = {}
        self._unmade: dict[str, tuple[str, list[Value]]] = {}  # tensors of the frame that nothing has read yet: how to make them
        self._scopes: dict[str, Scope] = {"table": Scope.FRAME, "table_at": Scope.FRAME}
        self._run: Callable[..., int] | None = None
        self._aligned: set[str] = set()  # values that begin where any device can read them: memory that was made for them

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

    def line(self, text: str, scope: Scope = Scope.CALL, reads: Iterable[Value] = (), moves: Moves = Moves.NO) -> None:
        """A line of the given part. `moves`: whether it may come before kernel calls that stand in front of it."""
        reads = list(reads)
        for value in reads:
            self._make(value)
            self._scopes[value.name] = value.scope
        if scope is Scope.CALL:
            names = tuple(v.name for v in reads if v.scope is not Scope.PROGRAM)
            framed = any(v.scope is Scope.FRAME for v in reads)  # kernels may write it under another name
            self.entries.append(Line(text, names, Moves.NO if framed else moves))
        else:
            (self.program if scope is Scope.PROGRAM else self.frame).append(text)

    def _make(self, value: Value) -> None:
        """A tensor of the frame, now that something reads it."""
        if value.name in self._unmade:
            text, reads = self._unmade.pop(value.name)
            self.line(f"{value.name} = {text}", Scope.FRAME, reads)

    def call(self, call: KernelCall, run: Callable[..., int]) -> None:
        """A call of a native kernel; `run` is the C routine that makes runs of them."""
        self._run = run
        self.entries.append(call)

    def operand_of_kernel(self, value: Value) -> Operand:
        """A value as a native kernel takes it."""
        if value.scope is Scope.CALL:
            return Operand(value.name, f"{value.name}.data_ptr()", value.name, value.nbytes)
        if value.at:
            return Operand(value.name, value.at)
        self._make(value)
        return Operand(value.name, f"{value.name}.data_ptr()")

    def define(
        self,
        node: Node | None,
        expression: str,
        scope: Scope,
        reads: Iterable[Value] = (),
        contiguous: bool = False,
        hint: str = "",
        moves: Moves = Moves.NO,
        at: str = "",
        nbytes: int = 0,
    ) -> Value:
        """A new value, computed by `expression`. With `at`, its address in the frame, only if something reads it."""
        name = self.name(hint or (node.hint if node and node.hint else node.op.name if node else "v"))
        value = Value(name, scope, contiguous, at, nbytes)
        if at:
            self._unmade[name] = (expression, list(reads))
        else:
            self.line(f"{name} = {expression}", scope, [*reads, value], moves)
        if node is not None:
            self.values[node] = value
        return value

    def derive(self, value: Value, suffix: str, expression: str, contiguous: bool = False) -> Value:
        """A view of a value (`expression` mentions it by name), made once, and lasting as long as the value."""
        key = (value.name, expression)
        if key not in self._derived:
            self._derived[key] = self.define(None, expression, value.scope, [value], contiguous, hint=f"{value.name}_{suffix}")
        return self._derived[key]

    def dense(self, value: Value, strides: tuple[Dim, ...] | None = None, alignment: int = 1) -> Value:
        """The value row-major, or with the given strides, at an address that is a multiple of `alignment`: itself where it is so."""
        check = self._dense_text(value, strides, alignment)
        if not check:
            return value
        scope = Scope.PROGRAM if value.scope is Scope.PROGRAM else Scope.CALL
        key = (value.name, check)
        if key not in self._derived:
            if scope is Scope.CALL:
                self.copies.append(value.name)
            self._derived[key] = self.define(
                None, check, scope, [value], strides is None, f"{value.name}_dense", Moves.READER, nbytes=value.nbytes
            )
            self._aligned.update([self._derived[key].name] if alignment > 1 else [])
        return self._derived[key]

    def _dense_text(self, value: Value, strides: tuple[Dim, ...] | None, alignment: int) -> str:
        """The value or a copy of it, as an expression; "" where it is known to be as wanted."""
        name = value.name
        lies_well = alignment == 1 or bool(value.at) or name in self._aligned
        if strides is not None:
            text = f"strided({name}, {self.literal(strides)})"
            return text if lies_well else f"aligned({text}, {alignment})"
        asked = [] if value.contiguous else [f"{name}.is_contiguous()", f"not {name}.is_neg()"]
        if lies_well:
            return f"{name} if {' and '.join(asked)} else dense({name})" if asked else ""
        return f"{name} if {' and '.join([*asked, f'not {name}.data_ptr() % {alignment}'])} else aligned(dense({name}), {alignment})"

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
            text = f"slot(memory, {to_source(slot.offset)}, {shape}, {self.literal(kind.dtype)})"
            value = self.define(None, text, Scope.FRAME, (), True, hint, at=f"memory_at + {to_source(slot.offset)}")
        else:
            size = hinted(kind.nbytes, self.graph.symbols)
            value = self.define(None, self.fresh(kind), Scope.CALL, (), True, hint, Moves.NAME, nbytes=size)
        self._aligned.add(value.name)
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
        lines, table = emit_runs(self.entries, kept, self._run, self.bind)
        owned = {name for name, scope in self._scopes.items() if scope is Scope.CALL}
        framed = list(dict.fromkeys(n for line in lines for n in line.reads if self._scopes[n] is Scope.FRAME))
        nbytes = [f"def nbytes({sizes[2:]}):", f"    return {to_source(peak)}"]
        start = ["memory_at = memory.data_ptr()"] if any("memory_at" in line for line in table) else []
        frame = [f"def prepare(memory{sizes}):", *_indent([*start, *self.frame, *table])]
        frame.append(f"    return ({''.join(f'{n}, ' for n in framed)})")
        call = [f"def call(inputs, frame{sizes}):"]
        if framed:
            call.append(f"    ({', '.join(framed)},) = frame")
        call += _indent(freed(lines, owned - kept))
        call.append(f"    return [{', '.join(results)}]")
        return "\n".join([*self.program, "", *nbytes, "", *frame, "", *call, ""])


def _indent(lines: Iterable[str]) -> list[str]:
    return [f"    {line}" for line in lines]

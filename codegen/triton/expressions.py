"""Values of a kernel as Triton text: what is written inline, what gets a variable, and in which scope.

There are two scopes: the function, and the body of the loop being printed (a pass over an inner group). A value that depends on the looped
axes is written in the body, anew in every pass; any other is written once, in the function, before the loop that needs it.
"""

from __future__ import annotations

import builtins
import keyword
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

import sympy
import torch

from ...ir.dims import product
from ...ir.scalar import Apply, Const, Scalar
from ..kernel import INSIDE, Kernel, Load, Position, Reduce, Scan, Store, free_axes, operands, scalars
from .indices import Run, Span, index_source
from .layout import Dimension, Layout
from .legalize import UnsupportedByTriton
from .reductions import Reducer, reducer, small_integer
from .scalars import AND, ATOM, COMPARE, FROM_BYTES, SUM, TYPES, Text, constant, is_infix, keeps_type, scalar_text, typed_constant

_INLINE_LENGTH = 72
_RESERVED = {"tl", "triton", "libdevice"} | set(keyword.kwlist) | set(dir(builtins))
_COMPARISONS = {"eq", "ne", "lt", "le", "gt", "ge"}
_POSITIONS = {"argmax", "argmin"}
_METHODS = {"cast", "bitcast", "signbit", "ipow"}
_WORDS = {
    "add": "added", "sub": "difference", "mul": "scaled", "div": "ratio", "neg": "negated", "where": "chosen", "cast": "converted",
    "max": "larger", "min": "smaller", "and": "both", "or": "either", "xor": "differs", "not": "inverse", "abs": "magnitude",
    "pow": "power", "ipow": "power", "round": "rounded", "eq": "equal", "ne": "unequal", "lt": "less", "le": "at_most",
    "gt": "greater", "ge": "at_least", "cumsum": "running", "cumprod": "running",
}  # fmt: skip


@dataclass
class Scope:
    """Lines of a block of code, the text of each value known there, and the variable that holds each right-hand side."""

    lines: list[str] = field(default_factory=list)
    texts: dict[Scalar, Text] = field(default_factory=dict)
    variables: dict[str, str] = field(default_factory=dict)

    def shared(self) -> Scope:
        """The same block of code for values of another kernel."""
        return Scope(self.lines, {}, self.variables)


class Widths(Protocol):
    """What of a schedule expressions depend on: whether index arithmetic is in 64 bits."""

    @property
    def wide(self) -> bool: ...


class Expressions:
    """Writes the values of one legalized kernel."""

    def __init__(self, kernel: Kernel, layout: Layout, schedule: Widths, beside: Expressions | None = None) -> None:
        """beside: another writer of the same function, whose lines and variables this one shares."""
        self.kernel, self.layout, self.schedule = kernel, layout, schedule
        self.outer = Scope() if beside is None else beside.outer.shared()
        self.body: Scope | None = None if beside is None or beside.body is None else beside.body.shared()
        self._free = free_axes(kernel)
        values = scalars(kernel.stores)
        self._uses = Counter(v for value in values for v in operands(value))
        self._uses.update(store.value for store in kernel.stores)
        self._cast = {a for v in values if isinstance(v, Apply) and v.op in _METHODS for a in v.args}
        self._run_names: dict[str, str] = {} if beside is None else beside._run_names
        self._names: dict[Scalar | None, str] = {}
        flats = {d.span.flat for d in layout.dimensions} | {layout.grid.flat}
        parameters = {f"{b.name}_ptr" for b in (*kernel.inputs, *kernel.outputs)} | set(kernel.sizes)
        self._taken = set(_RESERVED) if beside is None else beside._taken
        self._taken |= flats | parameters | {d.mask for d in layout.dimensions} | {a.name for a in kernel.axes}

    # scopes

    def enter(self) -> Scope:
        self.body = Scope()
        return self.body

    def leave(self) -> None:
        self.body = None

    def _scope(self, axes: frozenset[str]) -> Scope:
        return self.body if self.body is not None and self.layout.changes(axes) else self.outer

    def stand_in(self, value: Scalar, text: Text) -> None:
        """What a value is known by from here on."""
        self._scope(self._free[value]).texts[value] = text

    def known(self, value: Scalar) -> bool:
        return value in self._scope(self._free[value]).texts

    # values

    def prepare(self, root: Scalar) -> None:
        """Writes what `root` is computed from, operands first (without recursion: chains may be long)."""
        stack: list[tuple[Scalar, bool]] = [(root, False)]
        while stack:
            value, ready = stack.pop()
            if self.known(value):
                continue
            if ready:
                self.text(value)
                continue
            stack.append((value, True))
            if not _compares_positions(value):
                stack.extend((v, False) for v in reversed(operands(value)))

    def text(self, value: Scalar) -> Text:
        """The text of a value whose operands are known; writes a line where it deserves a variable."""
        scope = self._scope(self._free[value])
        if value in scope.texts:
            return scope.texts[value]
        text = self._write(value)
        if self._deserves_variable(value, text, scope):
            text = Text(self._variable(self._word(value), text.code, scope, value))
        scope.texts[value] = text
        return text

    def _write(self, value: Scalar) -> Text:
        if isinstance(value, Const):
            return constant(value)
        if isinstance(value, Load):
            return self._load(value)
        if isinstance(value, Position):
            return Text(f"tl.cast({self._index(value.index)[0]}, tl.int64)")
        if isinstance(value, Reduce):
            return self._reduce(value)
        if isinstance(value, Scan):
            return self._scan(value)
        if isinstance(value, Apply):
            return self._apply(value)
        raise UnsupportedByTriton(what=type(value).__name__, reason="it is not a scalar of the kernel IR")

    def _deserves_variable(self, value: Scalar, text: Text, scope: Scope) -> bool:
        if isinstance(value, Const) or text.code.isidentifier():
            return False
        crosses = self.body is not None and scope is self.outer
        return crosses or isinstance(value, (Load, Reduce, Scan)) or self._uses[value] > 1 or len(text.code) > _INLINE_LENGTH

    def _word(self, value: Scalar) -> str:
        if isinstance(value, Load):
            return value.buffer
        if isinstance(value, Reduce):
            return "position" if value.op in _POSITIONS else reducer(value).word
        if isinstance(value, Position):
            return "position"
        if isinstance(value, Const):
            return "constant"
        op: str = value.op  # type: ignore[attr-defined]
        return _WORDS.get(op, op)

    def _variable(self, word: str, code: str, scope: Scope, value: Scalar | None = None) -> str:
        """A variable that holds `code`: the one of this scope if there is one. A value has the same name in all passes."""
        if code in scope.variables:
            return scope.variables[code]
        name = self._names.get(value) or self._name(word)
        if value is not None:
            self._names[value] = name
        scope.lines.append(f"{name} = {code}")
        scope.variables[code] = name
        return name

    def _name(self, word: str) -> str:
        name, n = word, 1
        while name in self._taken or not name.isidentifier():
            n += 1
            name = f"{word}_{n}" if word.isidentifier() else f"v{n}"
        self._taken.add(name)
        return name

    def _apply(self, value: Apply) -> Text:
        if value.op == INSIDE:
            return self._inside(value)
        if _compares_positions(value):
            return scalar_text(value, [self._plain_position(a) for a in value.args])
        if value.op == "cast" and value.dtype != torch.bool and isinstance(value.args[0], Position):
            return Text(f"tl.cast({self._index(value.args[0].index)[0]}, {TYPES[value.dtype]})")
        if is_infix(value) and not all(isinstance(a, Const) for a in value.args):
            return scalar_text(value, [self.text(a) for a in value.args])
        return scalar_text(value, [self._argument(a) for a in value.args])

    def _inside(self, value: Apply) -> Text:
        """The clamped position, after an assertion that nothing had to be clamped where it is read."""
        clamped, at, _, fault, *mask = value.args
        here = self.layout.along(self._free[value])
        read = self._mask(here, self.text(mask[0]) if mask else None)
        message = f"index out of range in {self.kernel.faults[int(fault.value) - 1]}"  # type: ignore[attr-defined]
        condition = f"{self.text(at).at(SUM)} == {self.text(clamped).at(SUM)}"
        assertion = f'tl.device_assert({condition}, "{message}"{", " + read if read else ""})'
        self._scope(self._free[value]).lines.append(assertion)
        return self.text(clamped)

    def _plain_position(self, value: Scalar) -> Text:
        """Positions compare as they are: no widening is needed."""
        if isinstance(value, Const):
            return constant(value)
        code = self._index(value.index)[0]  # type: ignore[attr-defined]
        return Text(code, ATOM if code.isidentifier() or code.isdigit() else SUM)

    def _argument(self, value: Scalar) -> Text:
        """An operand of a function or method, where a literal must carry its own type."""
        if not isinstance(value, Const):
            return self.text(value)
        return constant(value) if keeps_type(value) and value not in self._cast else typed_constant(value)

    # memory

    def _index(self, index: sympy.Expr, indirect: dict[str, str] | None = None) -> tuple[str, list[Dimension]]:
        """The index as text, and the dimensions it extends along (without those of indirect names)."""
        names = dict(indirect or {})
        axes = {s.name for s in index.free_symbols}  # type: ignore[attr-defined]
        groups = {g.span: g for g in self.layout.groups}
        for span in (self.layout.grid, *groups):
            index, stands = span.runs(index)
            for name, run in stands.items():
                names[name.name] = self._run(span, run, groups.get(span))
        return index_source(index, names, frozenset(indirect or {})), list(self.layout.along(axes))

    def _run(self, span: Span, run: Run, dimension: Dimension | None = None) -> str:
        """The variable that holds a run of axes."""
        if run.first == 0 and run.last == len(span.axes) - 1:
            return span.flat
        axes = span.axes[run.first : run.last + 1]
        names = frozenset(a.name for a in axes)
        scope = self._scope(names)
        begin = dimension.start if dimension is not None and names <= dimension.steady else ""
        code = index_source(span.value(run), {span.flat: begin} if begin else {})
        code = f"tl.cast({code}, tl.int64)" if begin and self.schedule.wide else code
        if code not in scope.variables:
            word = "group" if begin else "_".join(a.name for a in axes)
            name = self._run_names.get(code) or (word if word in names else self._name(word))
            self._run_names[code] = scope.variables[code] = name
            scope.lines.append(f"{name} = {code}")
        return scope.variables[code]

    def _pointer(self, buffer: str, index: str, along: list[Dimension], needed: tuple[Dimension, ...], blocked: bool = False) -> str:
        """buffer_ptr + index, extended along every dimension that is needed; `blocked`: as a block even where it is one element."""
        terms = [f"{buffer}_ptr"] + ([index] if index != "0" else [])
        missing = [d for d in needed if d not in along]
        if missing or blocked:
            shape = ", ".join(d.constant if d in missing else "1" for d in self.layout.dimensions)
            terms.append(f"tl.full([{shape}], 0, tl.int32)")
        return " + ".join(terms)

    def _mask(self, dimensions: tuple[Dimension, ...], extra: Text | None = None) -> str:
        parts = [d.mask for d in dimensions if d.masked]
        if extra is not None and not parts:
            return extra.code
        return " & ".join(parts + ([extra.at(AND)] if extra is not None else []))

    def _load(self, value: Load) -> Text:
        indirect = {name: self._named(v) for name, v in value.indirect}
        index, along = self._index(value.index, indirect)
        needed = self.layout.along(self._free[value])
        along += [d for _, v in value.indirect for d in self.layout.along(self._free[v])]
        mask = self._mask(needed, None if value.mask is None else self._argument(value.mask))
        arguments = [self._pointer(value.buffer, index, along, needed)] + ([mask] if mask else [])
        buffer = self.kernel.buffer(value.buffer)
        other = self._other(value)
        if other is not None:
            arguments.append(f"other={other}")
        loaded = f"tl.load({', '.join(arguments)})"
        if buffer.dtype in FROM_BYTES:
            return Text(f"{FROM_BYTES[buffer.dtype]}({loaded})")
        return Text(loaded if buffer.dtype == value.dtype else f"{loaded}.to({TYPES[value.dtype]})")

    def _other(self, value: Load) -> str | None:
        """What a load gives where it reads nothing; None where that is never seen."""
        if value.mask is None:
            return None
        dtype = self.kernel.buffer(value.buffer).dtype
        if dtype in FROM_BYTES:
            return self._argument(Const(torch.uint8, int(torch.tensor(value.other).to(dtype).view(torch.uint8)))).code
        return self._argument(Const(dtype, value.other)).code

    def _named(self, value: Scalar) -> str:
        """A variable that holds the value, for use in an index."""
        text = self.text(value)
        if text.code.isidentifier():
            return text.code
        scope = self._scope(self._free[value])
        name = self._variable("index", text.code, scope)
        scope.texts[value] = Text(name)
        return name

    def domain(self, store: Store) -> tuple[Dimension, ...]:
        axes = {s.name for s in sympy.sympify(store.index).free_symbols}  # type: ignore[attr-defined]
        return self.layout.along(self._free[store.value] | axes)

    def store(self, store: Store) -> str:
        """The line that stores a known value."""
        needed = self.domain(store)
        index, along = self._index(sympy.sympify(store.index))
        value = self._argument(store.value)
        mask = self._mask(needed)
        one_of_block = not needed and self.layout.rank > 1
        arguments = [self._pointer(store.buffer, index, along, needed, one_of_block), value.code] + ([mask] if mask else [])
        return f"tl.store({', '.join(arguments)})"

    # reductions and scans

    def _block(self, value: Scalar, dtype: torch.dtype, axes: tuple[str, ...], identity: Text | None, full: bool = False) -> Text:
        """The values to combine along `axes`, as a block that extends along them, masked lanes holding the identity."""
        reduced = self.layout.along(axes)
        text, covered = self._filled(value, dtype, [d for d in reduced if d.masked and identity is not None], identity)
        wanted = self.layout.dimensions if full else reduced
        return text if covered.issuperset(wanted) else self._spread(text, covered, self.layout.dimensions)

    def _filled(self, value: Scalar, dtype: torch.dtype, masked: Sequence[Dimension], identity: Text | None) -> tuple[Text, set[Dimension]]:
        """The value in a dtype, the identity where one of the masks is off; and the dimensions it extends along."""
        text = typed_constant(value) if isinstance(value, Const) else self._argument(value)
        if value.dtype != dtype:
            text = Text(f"{text.at(ATOM)}.to({TYPES[dtype]})")
        if masked:
            text = Text(f"tl.where({self._mask(tuple(masked))}, {text.code}, {self._identity(identity, dtype)})")
        return text, {*self.layout.along(self._free[value]), *masked}

    def _spread(self, text: Text, covered: set[Dimension], wanted: Sequence[Dimension]) -> Text:
        """The text as a block that extends along all that are wanted."""
        if covered.issuperset(wanted):
            return text
        shape = ", ".join(d.constant if d in wanted else "1" for d in self.layout.dimensions)
        return Text(f"tl.broadcast_to({text.code}, [{shape}])")

    def _identity(self, identity: Text | None, dtype: torch.dtype) -> str:
        assert identity is not None
        plain = dtype in (torch.float32, torch.float64, torch.int32, torch.int64)
        return identity.code if plain else f"tl.full((), {identity.code}, {TYPES[dtype]})"

    def _reduce(self, value: Reduce) -> Text:
        how = reducer(value)
        if value.op in _POSITIONS:
            block = self._block(value.value, how.dtype, value.axes, how.identity, full=True)
            return self._reduce_pair(value, how, block.code, self._flat_position(value))
        code = self._block(value.value, how.dtype, value.axes, how.identity).code
        if len(self.layout.along(value.axes)) == 1 and len(code) > _INLINE_LENGTH:
            code = self._variable(f"{how.word}_of", code, self._scope(self._free[value.value]))
        return self._reduced(value, how, code)

    def _reduced(self, value: Reduce, how: Reducer, code: str) -> Text:
        """The reduction of a block, in the dtype of the value."""
        for dimension in reversed(self.layout.along(value.axes)):
            code = how.over(code, self.layout.position(dimension), self.layout.rank > 1)
        if value.op in ("any", "all"):
            return Text(f"{code} != 0", COMPARE)
        return Text(f"{code}.to({TYPES[value.dtype]})" if small_integer(value.dtype) else code)

    def _flat_position(self, value: Reduce) -> str:
        """The position of each point over the reduced axes, as a block of the full shape."""
        axes = [next(a for a in self.kernel.axes if a.name == name) for name in value.axes]
        flat = sum((a.symbol * product(b.extent for b in axes[n + 1 :]) for n, a in enumerate(axes)), sympy.Integer(0))
        index, along = self._index(sympy.sympify(flat))
        return index if self.layout.rank == 1 and along else f"tl.broadcast_to({index}, {self.layout.shape})"

    def _reduce_pair(self, value: Reduce, how: Reducer, block: str, position: str) -> Text:
        """Value and position are reduced together; the position is the result."""
        names = self._name(how.word), self._name("at")
        scope = self._scope(self._free[value])
        for dimension in reversed(self.layout.along(value.axes)):
            reduced = how.over(f"({block}, {position})", self.layout.position(dimension), self.layout.rank > 1)
            scope.lines.append(f"{names[0]}, {names[1]} = {reduced}")
            block, position = names
        return Text(f"{position}.to({TYPES[value.dtype]})")

    def accumulate(self, value: Reduce) -> list[str]:
        """Writes one chunk of a looped reduction; returns its accumulators."""
        assert self.body is not None
        how = reducer(value)
        name = self._name(how.word)
        shape, body = self.layout.shape, self.body
        block = self._block(value.value, how.dtype, value.axes, how.identity)
        self.outer.lines.append(f"{name} = tl.full({shape}, {how.identity.code}, {TYPES[how.dtype]})")
        if value.op not in _POSITIONS:
            body.lines.append(how.combined(name, block))
            return [name]
        position = self._name("position")
        integer, last = ("tl.int64", 2**63 - 1) if self.schedule.wide else ("tl.int32", 2**31 - 1)
        self.outer.lines.append(f"{position} = tl.full({shape}, {last}, {integer})")
        points = self._flat_position(value)
        body.lines.append(f"{name}, {position} = {how.helper}({name}, {position}, {block.code}, {points})")
        return [name, position]

    def finish(self, value: Reduce, names: list[str]) -> None:
        """Reduces the accumulators after the loop."""
        how = reducer(value)
        if len(names) == 2:
            text = self._reduce_pair(value, how, *names)
            names = names[1:]
        else:
            text = self._reduced(value, how, names[0])
        self.outer.lines.append(f"{names[0]} = {text.code}")
        self.outer.texts[value] = Text(names[0])

    def _scan(self, value: Scan) -> Text:
        (dimension,) = self.layout.along((value.axis,))
        identity = Text("0" if value.op == "cumsum" else "1")
        axis = self.layout.position(dimension)
        block = self._block(value.value, value.dtype, (value.axis,), None)
        scanned = f"tl.{value.op}({block.code}, axis={axis})"
        scanned += f".to({TYPES[value.dtype]})" if small_integer(value.dtype) else ""
        if not dimension.looped:
            return Text(scanned)
        assert self.body is not None
        sign, how = ("+", Reducer("", value.dtype, identity, whole="tl.sum")) if value.op == "cumsum" else (
            "*", Reducer("", value.dtype, identity, "_product"))  # fmt: skip
        carry, running = self._name("carry"), self._name("running")
        shape = ", ".join("1" if d is dimension else d.constant for d in self.layout.dimensions)
        self.outer.lines.append(f"{carry} = tl.full([{shape}], {identity.code}, {TYPES[value.dtype]})")
        self.body.lines.append(f"{running} = {carry} {sign} {scanned}")
        chunk = self._block(value.value, value.dtype, (value.axis,), identity)
        self.body.lines.append(f"{carry} = {carry} {sign} {how.over(chunk.code, axis, True)}")
        return Text(running)


def _compares_positions(value: Scalar) -> bool:
    """Whether the value is a comparison of positions, which are compared as they are."""
    return (
        isinstance(value, Apply) and value.op in _COMPARISONS and all(_is_integer_literal(a) or isinstance(a, Position) for a in value.args)
    )


def _is_integer_literal(value: Scalar) -> bool:
    return isinstance(value, Const) and value.dtype == torch.int64

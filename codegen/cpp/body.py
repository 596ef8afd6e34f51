"""Straight-line code of a kernel: scalars become variables and nested expressions, loads and stores become calls of vec.h."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace

import sympy
import torch

from ...ir.dims import Dim, symbol
from ...ir.scalar import Apply, Const, Scalar
from ..kernel import INSIDE, Kernel, Load, Position, Reduce, Scan, Store, cone, operands
from .expressions import ADD, CALLS, COMPARE, NARROW, PRIMARY, STORAGE, Text, apply_text, const_text, index_text, literal, wrap
from .lanes import LaneAnalysis, stride_along

MEETING = frozenset({"and", "or", "xor", *COMPARE})
MAX_INLINE = 90  # characters of an expression before it gets a variable

# what vec.h, C++ and the printed frame call something else
RESERVED = frozenset(
    re.findall(
        r"\w+",
        """
    L way begin end threads tile sequence vec bf16 half load load_if store gather gather_if scatter select mask splat iota offsets as bits
    recast rounded any all each each4 parallel share part next first elem lanes fold join low high map inf nan least greatest Row
    Sum Prod Max Min Any All ArgMax ArgMin auto bool break case char class const continue default delete do double else enum
    export extern false float for goto if inline int long mutable namespace new operator private protected public register return
    short signed sizeof static struct switch template this throw true try typedef typename union unsigned using virtual void
    left right finish row column turned to sums outer last at batch product product_packed product_turned product_of_runs panels from_rows
    from_columns segments batches RowMajor Columns P Checked Span span strips slide plain within met fault inside shl shr volatile
    scale zero group words rows from_word_rows widened_panels byte_panels product_of_words product_of_bytes Nothing
    fetch inverse while xor or and not index remove main asm y0 y1 yn j0 j1 jn""",
    )
) | CALLS | frozenset(STORAGE.values())  # fmt: skip


class Names:
    """Unique C++ names, near what the values are called in the kernel."""

    def __init__(self, kernel: Kernel) -> None:
        self._used = set(RESERVED) | {a.name for a in kernel.axes} | set(kernel.sizes) | {kernel.name}
        self.buffers = {b.name: self.fresh(b.name) for b in (*kernel.inputs, *kernel.outputs)}
        self._stored = {s.value: s.buffer for s in kernel.stores}

    def reserve(self, *names: str) -> None:
        """Names that text of another's making uses already."""
        self._used.update(names)

    def fresh(self, base: str) -> str:
        base = re.sub(r"\W", "_", base).lstrip("0123456789") or "v"
        name, number = base, 1
        while name in self._used:
            number += 1
            name = f"{base}{number}"
        self._used.add(name)
        return name

    def hint(self, value: Scalar) -> str:
        """What a person would call it: loads after their buffer, reductions after their function, stored values after the output."""
        if value in self._stored:
            return self._stored[value] + "_v"
        if isinstance(value, Load):
            return value.buffer + "_v"
        if isinstance(value, Reduce):
            return {"sum": "total", "max": "largest", "min": "smallest"}.get(value.op, value.op + "_v")
        if isinstance(value, Scan):
            return "running"
        return {"exp": "e", "sub": "d", "mul": "p", "add": "s", "where": "w", "div": "q"}.get(getattr(value, "op", ""), "t")


@dataclass
class Scope:
    """A place in the loop nest: what is bound, how many lanes ("L" or "1"), and the texts of the values that exist there."""

    bound: frozenset[str]
    lanes: str = "1"
    texts: dict[Scalar, Text] = field(default_factory=dict)
    phase: int = 0
    unrolled: bool = False

    def inner(self, axes: Iterable[str], lanes: str | None = None) -> Scope:
        return replace(self, bound=self.bound | set(axes), lanes=lanes or self.lanes, texts=dict(self.texts))


class Body:
    """Prints the values of one kernel; `line` takes each statement. rows: kept value -> (row buffer, phase that fills it, index text)."""

    def __init__(self, kernel: Kernel, analysis: LaneAnalysis, names: Names, line: Callable[[str], None]) -> None:
        self.kernel = kernel
        self.analysis = analysis
        self.names = names
        self.line = line
        self.rows: dict[Scalar, tuple[str, int, str]] = {}
        self.scans: dict[Scalar, str] = {}
        self._aliased = {b for pair in kernel.inplace for b in pair}

    def varies(self, value: Scalar, scope: Scope) -> bool:
        return scope.lanes == "L" and self.analysis.varies(value)

    def in_row(self, value: Scalar, scope: Scope) -> bool:
        """Is it in a row buffer that an earlier phase filled?"""
        return value in self.rows and self.rows[value][1] < scope.phase

    def emit(self, roots: list[Scalar], scope: Scope, variables: bool = False) -> None:
        """Makes every root known to the scope; with `variables` as variables of their own."""
        values = cone(roots, self._known(roots, scope))
        uses = Counter(v for value in values for v in operands(value))
        uses.update(roots)
        for value in values:
            text = self._text(value, scope)
            named = variables and value in roots or self._needs_name(value, uses[value], text, scope)
            if named and not isinstance(value, Const):
                name = self.names.fresh(self.names.hint(value))
                self.line(f"const auto {name} = {text[0]};")
                text = (name, PRIMARY)
            scope.texts[value] = text
            if value in self.rows and self.rows[value][1] == scope.phase:
                row, _, at = self.rows[value]
                self.line(f"store<{scope.lanes if self.varies(value, scope) else 1}>({row} + {at}, {text[0]});")

    def _known(self, roots: list[Scalar], scope: Scope) -> set[Scalar]:
        """What the scope has, and what the row buffers of earlier phases hold: loads of those are printed here."""
        known = set(scope.texts)
        for value in cone(roots, known):
            if self.in_row(value, scope):
                known.add(value)
        for value in cone(roots, scope.texts):
            if value in known and self._reached(value, roots, known):
                row, _, at = self.rows[value]
                name = self.names.fresh(self.names.hint(value))
                self.line(f"const auto {name} = load<{scope.lanes if self.varies(value, scope) else 1}>({row} + {at});")
                scope.texts[value] = (name, PRIMARY)
        return known

    def _reached(self, value: Scalar, roots: list[Scalar], known: set[Scalar]) -> bool:
        return value in roots or any(value in operands(v) for v in cone(roots, known))

    def _needs_name(self, value: Scalar, uses: int, text: Text, scope: Scope) -> bool:
        if isinstance(value, (Const, Position)):
            return False
        if isinstance(value, Load) and value.buffer in self._aliased:
            return True
        kept = value in self.rows and self.rows[value][1] == scope.phase
        return kept or isinstance(value, Scan) or uses > 1 or len(text[0]) > MAX_INLINE

    # ---- one value

    def _text(self, value: Scalar, scope: Scope) -> Text:
        if isinstance(value, Const):
            return const_text(value)
        if isinstance(value, Load):
            return self._load(value, scope)
        if isinstance(value, Position):
            return self._position(value.index, scope, value.dtype)
        if isinstance(value, Scan):
            return self._scan(value, scope)
        assert isinstance(value, Apply), value
        if value.op == INSIDE:
            return (f"inside({', '.join(scope.texts[v][0] for v in value.args)}, fault)", PRIMARY)
        if value.op in COMPARE and self.analysis.difference(value) is not None:
            if not self.varies(value, scope):
                return self._uniform_comparison(value)
            if self.analysis.narrow(value):
                return self._position_comparison(value)
        return apply_text(value, self._arguments(value, scope))

    def _arguments(self, value: Apply, scope: Scope) -> list[Text]:
        """The operands' texts; of bools that meet, all are masks if one is: a scalar's true is 1, a vector's -1."""
        texts = [scope.texts[v] for v in value.args]
        wide = [self.varies(v, scope) for v in value.args]
        if value.args[0].dtype == torch.bool and value.op in MEETING and any(wide):
            texts = [t if w else (f"splat<L>(bool({t[0]}))", PRIMARY) for t, w in zip(texts, wide)]
        return texts

    def _scan(self, value: Scan, scope: Scope) -> Text:
        sign = "+=" if value.op == "cumsum" else "*="
        kind = STORAGE[value.dtype]
        operand = scope.texts[value.value]
        wide = value.dtype == torch.float32
        text = f"{self.scans[value]} {sign} " + (f"as<double>({operand[0]})" if wide else operand[0])
        return (f"as<{kind}>({text})", PRIMARY)

    def _uniform_comparison(self, value: Apply) -> Text:
        """Compares positions that all lanes of a block agree on, by those of its first lane."""
        sign, precedence = COMPARE[value.op]
        left, right = (index_text(v.index if isinstance(v, Position) else sympy.sympify(int(v.value)), {}) for v in value.args)  # type: ignore[attr-defined]
        return (f"{wrap(left, precedence + 1)} {sign} {wrap(right, precedence + 1)}", precedence)

    def _position_comparison(self, value: Apply) -> Text:
        """Compares lane offsets in 32 bits, whatever the width of the positions."""
        difference = self.analysis.difference(value)
        assert difference is not None and self.analysis.axis is not None
        step = stride_along(difference, self.analysis.axis, self.analysis.lanes)
        sign, _ = COMPARE[value.op]
        return (f"mask(offsets<L>({index_text(difference, {})[0]}, {int(step)}) {sign} 0)", PRIMARY)  # type: ignore[arg-type]

    def _position(self, index: sympy.Expr, scope: Scope, dtype: torch.dtype = torch.int64) -> Text:
        axis = self.analysis.axis
        step = stride_along(index, axis, self.analysis.lanes) if axis is not None and scope.lanes == "L" else sympy.Integer(0)
        text = index_text(index, {})
        if step is None:
            text = self._vector_index(index, scope, {})
        elif step != 0:
            factor = "" if step == 1 else f"*{wrap(index_text(step, {}), ADD + 1)}"
            text = (f"{text[0]} + iota<int64_t, L>(){factor}", ADD)
        elif not sympy.sympify(index).is_Symbol:
            text = (f"int64_t({text[0]})", PRIMARY)
        return text if dtype == torch.int64 else (f"as<{STORAGE[dtype]}>({text[0]})", PRIMARY)

    def _vector_index(self, index: sympy.Expr, scope: Scope, indirect: dict[str, str]) -> Text:
        assert self.analysis.axis is not None
        axis = self.analysis.axis.name
        if not indirect:
            return (f"sequence<L>([&](int64_t {axis}) {{ return {index_text(index, {})[0]}; }}, {axis})", PRIMARY)
        return index_text(index, indirect | {axis: f"({axis} + iota<int64_t, L>())"}, vectors=True)

    # ---- memory

    def _load(self, value: Load, scope: Scope) -> Text:
        buffer = self.names.buffers[value.buffer]
        indirect = {name: self._as_index(v, scope) for name, v in value.indirect}
        address, step = self._address(value.index, value.indirect, indirect, scope)
        lanes = scope.lanes if self.varies(value, scope) else "1"
        if lanes == "1":
            step = sympy.Integer(1)
        mask = scope.texts[value.mask][0] if value.mask is not None else None
        other = literal(value.other, value.dtype)[0]
        if step is None or step == 0 and lanes == "L" and mask is not None:
            at = address if step is None else (f"int64_t({address[0]})", PRIMARY)
            text = f"gather<{lanes}>({buffer}, {at[0]})" if mask is None else f"gather_if<{lanes}>({mask}, {buffer}, {at[0]}, {other})"
            return (text, PRIMARY)
        place = buffer if address[0] == "0" else f"{buffer} + {wrap(address, ADD)}"
        stride = "" if step == 1 else f", {index_text(step, {})[0]}"
        if mask is not None:
            return (f"load_if<{lanes}>({mask}, {place}{stride}, {other})", PRIMARY)
        if lanes == "1" and value.dtype == self.kernel.buffer(value.buffer).dtype:
            return (f"{buffer}[{address[0]}]", PRIMARY)
        return (f"load<{lanes}>({place}{stride})", PRIMARY)

    def _as_index(self, value: Scalar, scope: Scope) -> str:
        text = scope.texts[value]
        return wrap(text, PRIMARY) if value.dtype == torch.int64 else f"as<int64_t>({text[0]})"

    def _address(self, index: sympy.Expr, computed: tuple[tuple[str, Scalar], ...], indirect: dict[str, str],
                 scope: Scope) -> tuple[Text, sympy.Expr | None]:  # fmt: skip
        """The address of lane 0 and the step to the next lane, or the addresses of all lanes and None."""
        axis = self.analysis.axis
        if axis is None or scope.lanes == "1":
            return index_text(index, indirect), sympy.Integer(0)
        used = {s.name for s in sympy.sympify(index).free_symbols}  # type: ignore[attr-defined]
        varying = any(self.varies(v, scope) for name, v in computed if name in used)
        step = None if varying else stride_along(index, axis, self.analysis.lanes)
        if step is None:
            return self._vector_index(index, scope, indirect), None
        return index_text(index, indirect), step

    def store(self, store: Store, scope: Scope) -> None:
        """The statement that stores a value which the scope knows."""
        buffer = self.kernel.buffer(store.buffer)
        name = self.names.buffers[store.buffer]
        text = scope.texts[store.value]
        address, step = self._address(store.index, (), {}, scope)
        if scope.lanes == "1":
            step = sympy.Integer(1)
        if step is None:
            self.line(f"scatter<{scope.lanes}>({name}, {address[0]}, {text[0]});")
            return
        lanes = "1" if step == 0 else scope.lanes
        place = name if address[0] == "0" else f"{name} + {wrap(address, ADD)}"
        if lanes == "1" and buffer.dtype == store.value.dtype and buffer.dtype not in NARROW:
            self.line(f"{name}[{address[0]}] = {text[0]};")
            return
        stride = "" if step in (0, 1) else f"{index_text(step, {})[0]}, "
        self.line(f"store<{lanes}>({place}, {stride}{text[0]});")


def row_index(axes: Sequence[tuple[str, Dim]]) -> sympy.Expr:
    """Row-major position over (name, extent) pairs."""
    flat: sympy.Expr = sympy.Integer(0)
    for name, extent in axes:
        flat = flat * sympy.sympify(extent) + symbol(name)
    return sympy.expand(flat)

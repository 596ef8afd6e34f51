"""The kernel IR: what a fused region computes, as stores of scalar expressions over named axes. Printers turn it into C++ or Triton.

    kernel add_softmax(x: f32[4096*1024], y: f32[4096*1024]) -> out: f32[4096*1024]
      for i in 4096 (grid), r in 1024 (inner):
        a = load x[1024*i + r] + load y[1024*i + r]
        e = exp(a - reduce max a over r)
        store out[1024*i + r] = e / (reduce sum e over r)

A *grid* axis has independent points: they run in any order, in parallel. An *inner* axis is walked inside one grid point: values may be
reduced over it, and values that depend on it exist once per inner point. A value's domain is the set of axes it depends on
(`free_axes`); a store whose value and index depend on no inner axis happens once per grid point. Views have no trace here: they are
in the index expressions, which are flat element offsets (sympy, over axis names and size symbols).

The scalar operations are those of `ir/scalar.py` (`Const`, `Apply`); this file adds what touches memory or more than one point. How a
kernel is walked - vector width, tiles, threads - is a `Schedule` of the printer and never changes what is computed.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

import sympy
import torch

from ..ir.dims import Dim, SymbolRange, symbol
from ..ir.scalar import Apply, Const, Scalar

REDUCTIONS: dict[str, str] = {
    "sum": "0 when empty; more than 1024 terms are summed in blocks, so that rounding grows slowly",
    "prod": "1 when empty",
    "max": "NaN if any is NaN; -inf (or the least integer) when empty",
    "min": "NaN if any is NaN; +inf (or the greatest integer) when empty",
    "any": "bool",
    "all": "bool",
    "argmax": "i64: flat position over the reduced axes of the first largest; the first NaN wins",
    "argmin": "i64: flat position over the reduced axes of the first smallest; the first NaN wins",
}

WEIGHTS: dict[str, str] = {
    "softmax": "softmax(score) along the axis; 0 where every score is -inf",
    "given": "the score itself: a contraction whose left operand is computed from contractions over axes of their own",
}

SCANS: dict[str, str] = {"cumsum": "inclusive running sum", "cumprod": "inclusive running product"}


@dataclass(frozen=True)
class Axis:
    """`name` is its symbol in index expressions (an axis runs 0 .. extent-1); `inner` as explained above."""

    name: str
    extent: Dim
    inner: bool = False

    @property
    def symbol(self) -> sympy.Symbol:
        return symbol(self.name)


@dataclass(frozen=True)
class Buffer:
    """A parameter of the kernel: `size` elements of storage dtype `dtype` (16-bit floats and bool are stored as such)."""

    name: str
    dtype: torch.dtype
    size: Dim


@dataclass(frozen=True, eq=False)
class Load(Scalar):
    """Element `index` of a buffer, in the buffer's compute dtype (bf16 and f16 widen to f32).

    indirect: axis-like names in `index` whose value is computed: ((name, integer scalar), ...); this is how gathers read.
    mask: where it is false nothing is read and the value is `other`.
    """

    buffer: str
    index: sympy.Expr
    indirect: tuple[tuple[str, Scalar], ...] = ()
    mask: Scalar | None = None
    other: float | int | bool = 0


@dataclass(frozen=True, eq=False)
class Position(Scalar):
    """The value of an index expression over axes and sizes, as an integer (dtype int64)."""

    index: sympy.Expr


INSIDE = "inside"
"""The one operation that is no function of numbers: `inside(at, extent, fault[, mask])` is `at`, which must lie in 0 .. extent-1; where it
does not (and the mask is true) the kernel reports the literal `fault`, and the value is clamped, so that memory stays safe. 0 is not
reported: what holds such positions promises that they are right."""


def inside(at: Scalar, extent: Scalar, fault: int, mask: Scalar | None = None) -> Scalar:
    return Apply(torch.int64, INSIDE, (at, extent, Const(torch.int64, fault), *(() if mask is None else (mask,))))


@dataclass(frozen=True, eq=False)
class Reduce(Scalar):
    """`op` of REDUCTIONS over all points of the inner `axes`; it depends on no inner axis in `axes` any more."""

    op: str
    value: Scalar
    axes: tuple[str, ...]


@dataclass(frozen=True, eq=False)
class Scan(Scalar):
    """`op` of SCANS along the inner axis: the value at point r covers points 0 .. r."""

    op: str
    value: Scalar
    axis: str


@dataclass(frozen=True, eq=False)
class Dot(Scalar):
    """Sum over the inner `axes`, which are its own, of left * right: one element of a contraction.

    Grid axes that only `left` depends on are its rows, those of `right` only its columns, those of both a batch. Elements are added in
    any order, in `dtype` at least.

    within: (at, begin, end), integers: only terms with begin <= at < end are added. Limits that are loaded make a contraction ragged:
    rows of groups (`at` is the row, the limits are those of the group, an axis of the sum), or blocks of a sparse row (`at` is an axis
    of the sum, the limits depend on the row). Limits ascend, and where one interval ends the next one begins.
    """

    left: Scalar
    right: Scalar
    axes: tuple[str, ...]
    within: tuple[Scalar, ...] = ()


@dataclass(frozen=True, eq=False)
class Attend(Scalar):
    """Sum over the inner `axis` of weight * value: one element of an attention, or of what follows from it.

    `score` depends on the row (usually a Dot of query and key under masks), `value` on the column. Both on `axis` and the batch.
    weights: one of WEIGHTS, how they come from the score. With "given" ones a score is any expression over Dots at (row, axis):

        sigmoid attention         score = sigmoid(s)                     s = Dot(q, k) under masks
        gradient of the values    score = exp(s - lse)                   summed over queries, times grad
        gradient of the queries   score = exp(s - lse) * (dp - delta)    dp = Dot(grad, v), summed over keys, times k

    It is 0 at points of the axis that do not count (masked ones: where(keep, .., -inf) under exp or sigmoid, where(keep, .., 0)).
    rounded: the dtype of the operation's tensors, to which the weights may be rounded before they meet the values.
    """

    score: Scalar
    value: Scalar
    axis: str
    rounded: torch.dtype | None = None
    weights: str = "softmax"


@dataclass(frozen=True, eq=False)
class Previous(Scalar):
    """A state of the kernel's recurrence before the step, of the unit at position `at`: the unit axis itself, or an axis of a Dot."""

    state: str
    at: str


@dataclass(frozen=True, eq=False)
class State:
    """A value per grid point that is handed from step to step: `initial` before the first one, `following` after each."""

    name: str
    initial: Scalar
    following: Scalar


@dataclass(frozen=True, eq=False)
class Last(Scalar):
    """A state after the last step."""

    state: State


@dataclass(frozen=True, eq=False)
class Recurrence:
    """The inner axis `step` is walked in order, from its end if `reverse`; a step reads the `states` of the step before.

    Grid axes but `unit` are rows, which know nothing of each other. A Dot of a step has a Previous at its own axis on the left, and a
    weight that depends on that and the unit on the right.
    """

    step: str
    unit: str
    states: tuple[State, ...]
    reverse: bool = False


@dataclass(frozen=True, eq=False)
class Store:
    """buffer[index] = value at every point of the value's and index's domain, converted to the buffer's dtype."""

    buffer: str
    index: sympy.Expr
    value: Scalar


@dataclass(frozen=True, eq=False)
class Kernel:
    """`inputs` are only read, `outputs` only written; an output never overlaps an input unless listed in `inplace` (output, input):
    then both are the same memory and every point reads an element before it writes it.

    sizes: names of the size symbols that extents and indices use, in the order they are passed.
    sources: the user's source lines, for the comment above the kernel; label: what it computes in a few words.
    faults: ops that read at computed positions; number n of `inside` is the n-th of them, counted from 1.
    recurrence: what makes the points along one axis wait for each other; every state has a store of its Last.
    schedule: options of its walk that were chosen, as text; "" leaves them to the printer, and none changes what is computed.
    ranges: what is known of sizes, by name; those that are not among them may be any.
    Outputs are written completely: every element exactly once.
    """

    name: str
    axes: tuple[Axis, ...]
    inputs: tuple[Buffer, ...]
    outputs: tuple[Buffer, ...]
    stores: tuple[Store, ...]
    sizes: tuple[str, ...] = ()
    label: str = ""
    sources: tuple[str, ...] = ()
    inplace: tuple[tuple[str, str], ...] = field(default=())
    faults: tuple[str, ...] = ()
    recurrence: Recurrence | None = None
    schedule: str = ""
    ranges: tuple[tuple[str, SymbolRange], ...] = ()

    @property
    def grid(self) -> tuple[Axis, ...]:
        return tuple(a for a in self.axes if not a.inner)

    @property
    def inner(self) -> tuple[Axis, ...]:
        return tuple(a for a in self.axes if a.inner)

    def buffer(self, name: str) -> Buffer:
        return next(b for b in (*self.inputs, *self.outputs) if b.name == name)


def operands(value: Scalar) -> tuple[Scalar, ...]:
    """The scalars a value is computed from."""
    if isinstance(value, Apply):
        return value.args
    if isinstance(value, Load):
        return tuple(v for _, v in value.indirect) + ((value.mask,) if value.mask is not None else ())
    if isinstance(value, (Reduce, Scan)):
        return (value.value,)
    if isinstance(value, Dot):
        return (value.left, value.right, *value.within)
    if isinstance(value, Attend):
        return (value.score, value.value)
    if isinstance(value, Last):
        return (value.state.initial, value.state.following)
    return ()


def cone(roots: Iterable[Scalar], known: Iterable[Scalar] = ()) -> list[Scalar]:
    """Every scalar the roots need, operands first, each once, without what is known."""
    found: list[Scalar] = []
    seen = set(known)
    stack = [(root, False) for root in reversed(list(roots))]
    while stack:
        value, ready = stack.pop()
        if ready:
            found.append(value)
        elif value not in seen:
            seen.add(value)
            stack.append((value, True))
            stack.extend((v, False) for v in reversed(operands(value)))
    return found


def scalars(stores: Iterable[Store]) -> list[Scalar]:
    """Every scalar under the stores, operands first, each once."""
    return cone(store.value for store in stores)


def free_axes(kernel: Kernel) -> dict[Scalar, frozenset[str]]:
    """Scalar -> names of the axes it depends on."""
    names = {a.name for a in kernel.axes}
    free: dict[Scalar, frozenset[str]] = {}
    for value in scalars(kernel.stores):
        axes = frozenset().union(*(free[v] for v in operands(value)))
        if isinstance(value, (Load, Position)):
            axes |= names & {s.name for s in value.index.free_symbols}  # type: ignore[attr-defined]
        if isinstance(value, (Reduce, Dot)):
            axes -= set(value.axes)
        if isinstance(value, Attend):
            axes -= {value.axis}
        if kernel.recurrence is not None and isinstance(value, (Previous, Last)):
            axes = _axes_of_state(kernel, kernel.recurrence, value)
        free[value] = axes
    return free


def _axes_of_state(kernel: Kernel, recurrence: Recurrence, value: Previous | Last) -> frozenset[str]:
    grid = {a.name for a in kernel.grid}
    if isinstance(value, Last):
        return frozenset(grid)
    return frozenset(grid - {recurrence.unit} | {value.at, recurrence.step})

"""Runs of kernel calls: what of the host program is one call of a C routine that walks a list of words (cpp/call.h).

    k0_gelu(x, h, threads)                           pack(table, 0, threads(), x.data_ptr(), y.data_ptr())
    y = empty((8, 384), (384, 1), float32)    -->    run(calls, table_at)
    k1_softmax(h, y, threads)

The words of a run are made once per program; the table they refer to once per frame: sizes, and addresses in the arena and of weights.
A call fills in the addresses of its inputs and of new memory. No C is compiled per model: a word costs nanoseconds.
"""

from __future__ import annotations

import ctypes
import enum
import functools
import struct
from array import array
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Union

from ..ir.errors import IndexOutOfRange
from ..ir.graph import Graph

Fault = Callable[[int], Exception]
"""From the number that a kernel or a driver returned to the error it stands for."""

MAX_HELD = 8 << 20
"""Bytes: a run ends where its operands that nobody reads any more have that size, so that they can be freed."""


class Moves(enum.Enum):
    """Whether a line may move in front of kernel calls."""

    NO = enum.auto()
    READER = enum.auto()  # in front of those that do not write what it reads
    NAME = enum.auto()  # always: it allocates, or makes a view, and reads no element


@dataclass(frozen=True)
class Line:
    """A line of the call. reads: the values of the call and the frame that it mentions."""

    text: str
    reads: tuple[str, ...] = ()
    moves: Moves = Moves.NO


@dataclass(frozen=True)
class Operand:
    """An argument of a kernel: its name in comments ("" for none), its word - an address, a size - as an expression, the value of the
    call it must keep alive ("" for none: the word is one of the frame), and bytes it may free.
    """

    shown: str
    address: str
    value: str = ""
    nbytes: int = 0


@dataclass(frozen=True)
class KernelCall:
    """A call of a native kernel. writes: values of the call that it writes; asked: the word that comes last, asked for once per call.

    fault: what the number means that it returns; None for one that returns none.
    """

    name: str
    entry: int
    operands: tuple[Operand, ...]
    writes: tuple[str, ...]
    asked: str = "threads()"
    fault: Fault | None = None

    @property
    def reads(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(o.value for o in self.operands if o.value))


Entry = Union[Line, KernelCall]
Grouped = Union[Line, list[KernelCall]]


class Faults:
    """What a run's results mean, as errors: number of the call times 2^32 plus the fault of its kernel."""

    def __init__(self, of_calls: Mapping[int, Fault]) -> None:
        self._of_calls = of_calls

    def __getitem__(self, met: int) -> Exception:
        return self._of_calls[met >> 32](met & 0xFFFFFFFF)


@dataclass(frozen=True)
class PositionFault:
    """The faults of a kernel that computes positions: the op of its body whose position was outside."""

    body: Graph

    def __call__(self, number: int) -> IndexOutOfRange:
        from .lower import position_readers

        node = position_readers(self.body)[number - 1]
        return IndexOutOfRange(node.prov.source, op=node.op.name)


def grouped(entries: Sequence[Entry], kept: set[str]) -> list[Grouped]:
    """Consecutive kernel calls as one item; lines between them that may move come before it. kept: values that are returned."""
    last = {name: i for i, entry in enumerate(entries) for name in entry.reads}
    found: list[Grouped] = []
    run: list[KernelCall] = []
    written: set[str] = set()
    held = 0

    def close() -> None:
        nonlocal run, held
        if run:
            found.append(run)
        run, held = [], 0
        written.clear()

    for i, entry in enumerate(entries):
        if isinstance(entry, KernelCall):
            run.append(entry)
            written.update(entry.writes)
            held += sum({o.value: o.nbytes for o in entry.operands if o.value not in kept and last.get(o.value) == i}.values())
            if held > MAX_HELD:
                close()
            continue
        dirty = not written.isdisjoint(entry.reads)
        if entry.moves is Moves.NO or (dirty and entry.moves is Moves.READER):
            close()
        elif dirty:
            written.update(entry.reads)
        found.append(entry)
    close()
    return found


@dataclass
class Table:
    """The places of a table: words of the frame (expressions evaluated once per frame), then words of the call, run after run."""

    frame: list[str] = field(default_factory=list)
    runs: list[list[str]] = field(default_factory=list)
    _places: dict[str, int] = field(default_factory=dict)
    _asked: dict[str, int] = field(default_factory=dict)

    def add(self, run: Sequence[KernelCall]) -> int:
        """Makes places for what the run reads; its number. What is asked once per call, the first run that needs it sets."""
        number = len(self.runs)
        words = [text for text in dict.fromkeys(c.asked for c in run) if self._asked.setdefault(text, number) == number]
        for call in run:
            for operand in call.operands:
                if operand.value:
                    words += [operand.address] if operand.address not in words else []
                else:
                    self._fixed(operand.address)
        self.runs.append(words)
        return number

    def _fixed(self, text: str) -> None:
        if text not in self._places:
            self._places[text] = len(self.frame)
            self.frame.append(text)

    @property
    def size(self) -> int:
        return len(self.frame) + sum(map(len, self.runs))

    def start(self, number: int) -> int:
        """Where the words of a run begin."""
        return len(self.frame) + sum(map(len, self.runs[:number]))

    def words(self, run: Sequence[KernelCall], number: int) -> array[int]:
        """The run as the routine walks it."""
        own = {text: self.start(number) + i for i, text in enumerate(self.runs[number])}
        asked = {text: self.start(n) + self.runs[n].index(text) for text, n in self._asked.items()}
        found = array("q")
        for call in run:
            places = [(own if o.value else self._places)[o.address] for o in call.operands]
            places.append(asked[call.asked])
            found.extend([call.entry, len(places), *places])
        found.append(0)
        return found


def emit_runs(
    entries: Sequence[Entry], kept: set[str], run: Callable[..., Any] | None, bind: Callable[[str, Any], str]
) -> tuple[list[Line], list[str]]:
    """The lines of the call, and those of the frame that make its table. bind: a name for an object; run: the C routine."""
    items = grouped(entries, kept)
    table = Table()
    numbers = {id(item): table.add(item) for item in items if isinstance(item, list)}
    lines: list[Line] = []
    for item in items:
        lines += [item] if isinstance(item, Line) else _run_lines(item, numbers[id(item)], table, run, bind)
    if not numbers:
        return lines, []
    frame = [
        f"table = ({bind('word', ctypes.c_int64)} * {table.size})()",
        *([f"{_pack(len(table.frame), bind)}(table, 0, {', '.join(table.frame)})"] if table.frame else []),
        f"table_at = {bind('address_of', ctypes.addressof)}(table)",
    ]
    return lines, frame


def _run_lines(calls: Sequence[KernelCall], number: int, table: Table, run: Any, bind: Callable[[str, Any], str]) -> list[Line]:
    words = table.words(calls, number)
    name = bind(f"calls_{number}", words)
    at = bind(f"calls_{number}_at", words.buffer_info()[0])
    lines = [Line(f"# {name}: {c.name}({', '.join(o.shown for o in c.operands if o.shown)})") for c in calls]
    filled = table.runs[number]
    if filled:
        lines.append(Line(f"{_pack(len(filled), bind)}(table, {8 * table.start(number)}, {', '.join(filled)})", ("table",)))
    text = f"{bind('run', run)}({at}, table_at)"
    faults = {i: c.fault for i, c in enumerate(calls) if c.fault is not None}
    if faults:
        text = f"if met := {text}: raise {bind(f'faults_{number}', Faults(faults))}[met]"
    return [*lines, Line(text, ("table", "table_at", *dict.fromkeys(r for c in calls for r in c.reads)))]


def _pack(count: int, bind: Callable[[str, Any], str]) -> str:
    """The name of a function that writes `count` words into a table, from a byte on."""
    return bind(f"pack_{count}", _packer(count))


@functools.cache
def _packer(count: int) -> Callable[..., None]:
    return struct.Struct(f"{count}q").pack_into


def freed(lines: Iterable[Line], deletable: set[str]) -> list[str]:
    """The text, each of the `deletable` values deleted after the last line that reads it."""
    lines = list(lines)
    last = {name: i for i, line in enumerate(lines) for name in line.reads if name in deletable}
    dying: dict[int, list[str]] = {}
    for name, at in last.items():
        dying.setdefault(at, []).append(name)
    text: list[str] = []
    for i, line in enumerate(lines):
        text.append(line.text)
        text += [f"del {', '.join(dying[i])}"] if i in dying else []
    return text

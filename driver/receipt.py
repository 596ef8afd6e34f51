"""`Receipt`: what was done to one graph: kernels, library calls, fallbacks and refusals with reasons, times, coverage. JSON and tables."""

from __future__ import annotations

import dataclasses
import json
from collections import Counter, deque
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from ..codegen.program import Fallback, LibraryCall, Listing
from ..codegen.target import Usage
from ..passes.base import Applied, Notes
from ..search.bench import Searched
from .accuracy import ErrorCheck
from .budget import Spent
from .outline import Machine, Outline
from .typed import typed

if TYPE_CHECKING:
    from rich.console import Console


@dataclass(frozen=True)
class Speed:
    """Median seconds per call, over `runs` calls of each."""

    eager: float
    ours: float
    runs: int


@dataclass(frozen=True)
class Trial:
    """A group of rewrites that was measured against what it replaces: median seconds of a call `with_it` and `without` it, and the noise
    of their ratio. Kept, unless it is slower beyond noise. note: why it was not measured, "" if it was.
    """

    what: str
    kept: bool
    with_it: float = 0.0
    without: float = 0.0
    noise: float = 0.0
    note: str = ""


@dataclass(frozen=True)
class KernelLine:
    """A generated kernel: what it computes, from which source lines, how many ops one call covers, how many places call it.

    flops and bytes are those of all its calls together. notes: the schedules that were tried before, each with what was wrong.
    usage: what it takes of the GPU that it was compiled for elsewhere.
    """

    name: str
    label: str
    sources: tuple[str, ...]
    nodes: int
    uses: int
    flops: int
    bytes: int
    notes: tuple[str, ...] = ()
    usage: Usage | None = None


@dataclass(frozen=True)
class Refusal:
    """A rewrite that was declined `count` times for one reason; `what`, `source` and `value` are those of the first."""

    rule: str
    what: str
    reason: str
    source: str
    value: str
    count: int


@dataclass(frozen=True)
class Share:
    """A quantity by where it runs: in our kernels, in library calls that we schedule, by torch's own ops."""

    kernels: int = 0
    library: int = 0
    fallback: int = 0

    @property
    def total(self) -> int:
        return self.kernels + self.library + self.fallback

    def __str__(self) -> str:
        total = max(self.total, 1)
        return " | ".join(f"{100 * part / total:.1f}%" for part in (self.kernels, self.library, self.fallback))


@dataclass(frozen=True)
class Coverage:
    """nodes: ops that compute (views and constants do not); flops; bytes read and written. Symbolic sizes at a plausible value."""

    nodes: Share = Share()
    flops: Share = Share()
    bytes: Share = Share()


@dataclass(frozen=True)
class Receipt:
    """See the fields' classes. seconds: per pass, and for "lower" and "compile". arena: bytes of the arena, an expression where sizes vary.

    copies: values that are laid out anew when they do not come row-major. failure: why the whole graph runs by eager, "" if it does not.
    error, speed: where they were measured. trials: groups of rewrites that were measured, and taken back if they did not gain.
    schedules: of kernels, where they were searched.
    target: what it was compiled for, "" for the machine at hand; unmeasured: what is therefore not known, and why.
    spent: of a budget. before, after: the graphs in outline, as captured and as it runs. machine: what it ran on, where it was measured.
    """

    graph: str
    kernels: tuple[KernelLine, ...] = ()
    library: tuple[LibraryCall, ...] = ()
    fallbacks: tuple[Fallback, ...] = ()
    applied: tuple[Applied, ...] = ()
    refused: tuple[Refusal, ...] = ()
    seconds: Mapping[str, float] = field(default_factory=dict)
    coverage: Coverage = Coverage()
    arena: str = "0"
    copies: tuple[str, ...] = ()
    failure: str = ""
    error: ErrorCheck | None = None
    speed: Speed | None = None
    trials: tuple[Trial, ...] = ()
    schedules: tuple[Searched, ...] = ()
    target: str = ""
    unmeasured: tuple[str, ...] = ()
    spent: Spent | None = None
    before: Outline | None = None
    after: Outline | None = None
    machine: Machine | None = None

    def to_json(self) -> str:
        return json.dumps(dataclasses.asdict(self), indent=1)

    @staticmethod
    def from_json(text: str) -> Receipt:
        """The receipt written by `to_json`, by this version or an earlier one; raises ValueError for anything else."""
        return typed(Receipt, json.loads(text))

    def render(self, console: Console | None = None, details: bool = False) -> None:
        """Prints the receipt as tables; `details` adds every rewrite, refusal and time."""
        from .render import render

        render(self, console, details)

    @property
    def summary(self) -> str:
        """One line: counts, coverage, error and speed."""
        parts = [f"for {self.target}"] if self.target else []
        parts.append(f"{len(self.kernels)} kernels, {len(self.library)} library calls, {len(self.fallbacks)} fallbacks")
        parts.append(f"ops {self.coverage.nodes} (ours | library | fallback)")
        if self.error is not None:
            parts.append(f"error {self.error.ours:.1e} (eager {self.error.eager:.1e}, allowed {self.error.allowed:.1e})")
        if self.speed is not None:
            ours, eager = self.speed.ours, self.speed.eager
            parts.append(f"{1e3 * ours:.3g} ms (eager {1e3 * eager:.3g} ms, {eager / ours:.2f}x)")
        return "; ".join(parts)


def make_receipt(program: Listing, notes: Notes, seconds: Mapping[str, float]) -> Receipt:
    """The receipt of a compiled graph. seconds: of each pass."""
    return Receipt(
        graph=program.name,
        kernels=tuple(KernelLine(k.name, k.label, k.sources, k.nodes, k.uses, k.flops, k.bytes, k.notes, k.usage) for k in program.kernels),
        library=tuple(program.library),
        fallbacks=tuple(program.fallbacks),
        applied=tuple(notes.applied),
        refused=_grouped(notes),
        seconds={**seconds, **program.seconds},
        coverage=_coverage(program),
        arena=str(program.arena_bytes),
        copies=program.copies,
    )


def failed_receipt(graph: str, reason: str, nodes: int) -> Receipt:
    """The receipt of a graph of that many ops which runs by eager as a whole."""
    fallback = Fallback(graph, "", reason, nodes)
    return Receipt(graph, fallbacks=(fallback,), coverage=Coverage(nodes=Share(fallback=nodes)), failure=reason)


def _coverage(program: Listing) -> Coverage:
    def share(quantity: str) -> Share:
        kernels = sum(k.nodes * k.uses if quantity == "nodes" else getattr(k, quantity) for k in program.kernels)
        library = sum(1 if quantity == "nodes" else getattr(c, quantity) for c in program.library)
        return Share(kernels, library, sum(getattr(f, quantity) for f in program.fallbacks))

    return Coverage(share("nodes"), share("flops"), share("bytes"))


def _grouped(notes: Notes) -> tuple[Refusal, ...]:
    counts = Counter((d.rule, d.reason) for d in notes.declined)
    first = {(d.rule, d.reason): d for d in reversed(notes.declined)}
    return tuple(
        Refusal(rule, d.what, reason.value, d.source, d.value, counts[rule, reason]) for (rule, reason), d in reversed(list(first.items()))
    )


_RECEIPTS: deque[Receipt] = deque(maxlen=4096)


def record(receipt: Receipt) -> None:
    _RECEIPTS.append(receipt)


def receipts() -> list[Receipt]:
    """The receipts of every graph that torch.compile gave us in this process, newest last; the last 4096 are kept."""
    return list(_RECEIPTS)

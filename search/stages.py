"""Where to cut a model into stages: the cuts of least bottleneck, latency or traffic within what each machine has, by OR-Tools.

    segments  0 1 2 3 | 4 5 6 | 7 8 9        seconds of a stage: of its segments, by its machine
    stages        0       1       2          seconds of a link: latency + bytes / bandwidth

    throughput    the largest of all these: in a pipeline stages and links work at the same time, each on another micro-batch
    latency       their sum
    traffic       bytes over all links

Of equal ones, that with least traffic; where that is the goal, with least latency. Everything is a whole number (nanoseconds, bytes), and
what CP-SAT finds is the optimum. A weight that several stages read is held by each of them, and counts once in each.

Source: GPipe (Huang et al., 2019) for the pipeline, Neurosurgeon (Kang et al., 2017) for a head on one machine and a tail on another.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ..ir.errors import TilewrightError

if TYPE_CHECKING:
    from ortools.sat.python.cp_model import CpModel, IntVar

NANOSECONDS = 1_000_000_000
EFFORT = 20.0
"""Deterministic seconds of CP-SAT for one program; a hundred segments take about one second."""

OBJECTIVES = {"throughput": ("bottleneck", "traffic"), "latency": ("latency", "traffic"), "traffic": ("traffic", "latency")}
"""What is made least, and then what of equal ones."""


class CannotSplit(TilewrightError):
    """Nothing keeps what is asked for."""

    template = "cannot split the model into {stages} stages: {reason}"


@dataclass(frozen=True)
class Machine:
    """What runs one stage. memory: bytes that it has for weights and the values of one call. seconds: that its stage may take.
    slowness: how many times as long it takes for the same as the machine that the times are of."""

    memory: float = math.inf
    seconds: float = math.inf
    slowness: float = 1.0


@dataclass(frozen=True)
class Link:
    """From one machine to the next. bandwidth: bytes per second. latency: seconds."""

    bandwidth: float = math.inf
    latency: float = 0.0


@dataclass(frozen=True)
class Load:
    """What segments take. seconds: of a call of each. weights: of each, the constants that it reads, with their bytes. values: the most
    bytes of other values that it holds at a time. crossing: bytes that cross from each one to the next."""

    seconds: Sequence[float]
    weights: Sequence[Mapping[str, int]]
    values: Sequence[int]
    crossing: Sequence[int]


@dataclass(frozen=True)
class Staged:
    """cuts: behind which segments, by number. Of each stage, seconds and bytes (memory); of each link, seconds and bytes (sent)."""

    cuts: tuple[int, ...]
    seconds: tuple[float, ...]
    memory: tuple[int, ...]
    link_seconds: tuple[float, ...]
    sent: tuple[int, ...]

    @property
    def bottleneck(self) -> float:
        return max((*self.seconds, *self.link_seconds))

    @property
    def latency(self) -> float:
        return math.fsum((*self.seconds, *self.link_seconds))

    @property
    def traffic(self) -> int:
        return sum(self.sent)


def stages(load: Load, machines: Sequence[Machine], links: Sequence[Link] = (), objective: str = "throughput") -> Staged:
    """One stage for each machine, none of them empty. links: between one machine and the next; none given: they take no time.

    Raises CannotSplit, which names the limit that stands in the way and the least that there is.
    """
    count = len(machines)
    if count > len(load.seconds):
        reason = f"the graph can be cut in {len(load.seconds) - 1} places only"
        raise CannotSplit(stages=count, reason=reason)
    lines = tuple(links) or (Link(),) * (count - 1)
    limits = _limits(machines)
    program = _Program(load, machines, lines, limits)
    first, second = OBJECTIVES[objective]
    best = program.least(first)
    if best is None:
        raise CannotSplit(stages=count, reason=_why(load, machines, lines, limits))
    cuts = program.least(second, {first: best.value}) or best
    return staged(load, machines, lines, cuts.cuts)


def staged(load: Load, machines: Sequence[Machine], links: Sequence[Link], cuts: Sequence[int]) -> Staged:
    """What stages with these cuts take."""
    ends = [*(c + 1 for c in cuts), len(load.seconds)]
    spans = [range(start, stop) for start, stop in zip([0, *ends], ends)]
    times = [sum(_nanoseconds(load.seconds[s] * m.slowness) for s in span) for span, m in zip(spans, machines)]
    sent = [load.crossing[c] for c in cuts]
    carried = [_sending(nbytes, link) for nbytes, link in zip(sent, links)]
    return Staged(
        tuple(cuts),
        tuple(t / NANOSECONDS for t in times),
        tuple(_memory(load, span) for span in spans),
        tuple(t / NANOSECONDS for t in carried),
        tuple(sent),
    )


def _memory(load: Load, span: range) -> int:
    held = {name: nbytes for s in span for name, nbytes in load.weights[s].items()}
    return sum(held.values()) + max(load.values[s] for s in span)


def _nanoseconds(seconds: float) -> int:
    return round(seconds * NANOSECONDS)


def _sending(nbytes: int, link: Link) -> int:
    return _nanoseconds(link.latency + nbytes / link.bandwidth)


# -- limits, and which of them stand in the way


@dataclass(frozen=True)
class _Limit:
    """On `kind` ("memory" or "seconds") of one stage."""

    stage: int
    kind: str
    most: float

    @property
    def units(self) -> int:
        return math.floor(self.most if self.kind == "memory" else self.most * NANOSECONDS)

    def shown(self, units: float) -> str:
        return f"{units:,.0f} bytes" if self.kind == "memory" else f"{units / NANOSECONDS * 1e3:.3g} ms"

    def __str__(self) -> str:
        return f"the {'memory' if self.kind == 'memory' else 'time'} of stage {self.stage + 1} ({self.shown(self.units)})"


def _limits(machines: Sequence[Machine]) -> list[_Limit]:
    asked = (_Limit(d, kind, getattr(m, kind)) for d, m in enumerate(machines) for kind in ("memory", "seconds"))
    return [limit for limit in asked if limit.most < math.inf]


def _why(load: Load, machines: Sequence[Machine], links: Sequence[Link], limits: Sequence[_Limit]) -> str:
    """A smallest set of limits that rule everything out, in words."""
    for limit in limits:
        least = _Program(load, machines, links, ()).least((limit.kind, limit.stage))
        assert least is not None, "without limits there is a split"
        if least.value > limit.units:
            return f"{limit} is too little, the least that it takes is {limit.shown(least.value)}"
    sets = (chosen for size in range(2, len(limits)) for chosen in itertools.combinations(limits, size))
    conflict = next((c for c in sets if _Program(load, machines, links, c).least("traffic") is None), limits)
    return f"no cut keeps {' and '.join(map(str, conflict))} together"


# -- the program


@dataclass(frozen=True)
class _Found:
    value: int
    cuts: tuple[int, ...]


class _Program:
    """ends[d]: how many segments lie before stage d; behind[d][s]: whether segment s lies in stage d or behind it."""

    def __init__(self, load: Load, machines: Sequence[Machine], links: Sequence[Link], limits: Sequence[_Limit]) -> None:
        from ortools.sat.python import cp_model

        self.load, self.machines, self.links = load, machines, links
        self.model: CpModel = cp_model.CpModel()
        count, size = len(machines), len(load.seconds)
        inner = [self.model.new_int_var(d, size - count + d, "") for d in range(1, count)]
        self.ends: list[Any] = [0, *inner, size]
        for end, following in zip(inner, inner[1:]):
            self.model.add(end < following)  # no stage is empty
        self.behind: list[list[Any]] = []
        self.amounts: dict[Any, Any] = {("seconds", d): self._seconds(d) for d in range(count)}
        self.sent = [self._at(end, (0, *load.crossing)) for end in inner]
        self.carried = [self._at(end, (0, *(_sending(b, link) for b in load.crossing))) for end, link in zip(inner, links)]
        self._totals()
        for limit in limits:
            self.model.add(self._amount((limit.kind, limit.stage)) <= limit.units)

    def _amount(self, what: Any) -> Any:
        """Memory takes many variables: it is counted where somebody asks."""
        if what not in self.amounts:
            size = len(self.load.seconds)
            self.behind = self.behind or [[1] * size, *(self._behind(end, size) for end in self.ends[1:-1]), [0] * size]
            self.amounts[what] = self._memory(what[1])
        return self.amounts[what]

    def _behind(self, end: IntVar, size: int) -> list[IntVar]:
        row = [self.model.new_bool_var("") for _ in range(size)]
        for s, behind in enumerate(row):
            self.model.add(end <= s).only_enforce_if(behind)
            self.model.add(end > s).only_enforce_if(behind.negated())
        return row

    def _has(self, stage: int, segment: int) -> Any:
        return self.behind[stage][segment] - self.behind[stage + 1][segment]

    def _at(self, end: Any, amounts: Sequence[int]) -> Any:
        """amounts[end]."""
        if isinstance(end, int):
            return amounts[end]
        found = self.model.new_int_var(min(amounts), max(amounts), "")
        self.model.add_element(end, list(amounts), found)
        return found

    def _seconds(self, d: int) -> Any:
        sums = [0, *itertools.accumulate(_nanoseconds(t * self.machines[d].slowness) for t in self.load.seconds)]
        return self._at(self.ends[d + 1], sums) - self._at(self.ends[d], sums)

    def _memory(self, d: int) -> Any:
        load = self.load
        readers: dict[str, list[int]] = {}
        nbytes: dict[str, int] = {}
        for s, weights in enumerate(load.weights):
            nbytes |= weights
            for name in weights:
                readers.setdefault(name, []).append(s)
        most = self.model.new_int_var(0, max(load.values), "")
        for s, held in enumerate(load.values):
            self.model.add(most >= held * self._has(d, s))
        return sum(nbytes[name] * self._holds(d, where) for name, where in readers.items()) + most

    def _holds(self, stage: int, segments: Sequence[int]) -> Any:
        """Whether the stage has any of the segments; at least that, which is all that limits and minima need."""
        if len(segments) == 1:
            return self._has(stage, segments[0])
        any_of = self.model.new_bool_var("")
        for s in segments:
            self.model.add(any_of >= self._has(stage, s))
        return any_of

    def _totals(self) -> None:
        times = [self.amounts["seconds", d] for d in range(len(self.machines))] + self.carried
        bound = sum(max(_nanoseconds(t * m.slowness) for m in self.machines) for t in self.load.seconds)
        bound += max((_sending(b, link) for b in self.load.crossing for link in self.links), default=0)
        bottleneck = self.model.new_int_var(0, bound, "")
        for t in times:
            self.model.add(bottleneck >= t)
        self.amounts |= {"bottleneck": bottleneck, "latency": sum(times), "traffic": sum(self.sent)}

    def least(self, what: Any, fixed: Mapping[Any, int] = {}) -> _Found | None:
        """The cuts of least `what`, with what is `fixed` at most that; None where nothing keeps the limits."""
        from ortools.sat.python import cp_model

        for name, value in fixed.items():
            self.model.add(self._amount(name) <= value)
        self.model.minimize(self._amount(what))
        solver = cp_model.CpSolver()
        solver.parameters.num_workers = 1
        solver.parameters.max_deterministic_time = EFFORT
        status = solver.solve(self.model)
        if status not in (cp_model.OPTIMAL, cp_model.FEASIBLE):
            return None
        self.model.clear_hints()
        for end in self.ends[1:-1]:
            self.model.add_hint(end, solver.value(end))
        return _Found(round(solver.objective_value), tuple(solver.value(end) - 1 for end in self.ends[1:-1]))

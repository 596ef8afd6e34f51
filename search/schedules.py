"""Which schedule each kernel of a fused graph is walked by: the best few of each, by the compiler's facts, or measured where a GPU is.

    linear+gelu    2132 legal, 12 compiled    block_m=128 block_n=128 ...    predicted 0.34 ms, by the start 0.40 ms

What is chosen stands in the graph, at the region. Where the library is faster with a kernel behind it, its contraction is named instead.
"""

from __future__ import annotations

import functools
import hashlib
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from types import MappingProxyType
from typing import Any

from ..codegen.kernel import Kernel
from ..codegen.program import Program, compile_program
from ..codegen.regions import internal_error, lowered_regions
from ..codegen.triton.legalize import UnsupportedByTriton
from ..codegen.triton.templates import build, text_of
from ..ir.analysis.hashing import structural_hash
from ..ir.dims import hint, symbol
from ..ir.errors import is_lost
from ..ir.graph import Graph, Node, Stage, order
from ..ir.ops import OPS
from ..passes.base import Notes
from ..passes.contractions import PRODUCTS, signature
from ..passes.fuse_regions import FuseRegions
from ..passes.manager import run_passes
from ..passes.plan_memory import PlanMemory
from .bench import LIBRARY, START, Bench, Found, Searched
from .candidates import Candidate, Candidates, candidates, explored
from .cost import predicted_seconds
from .database import Database, Key
from .examples import example_inputs
from .gpus import Gpu
from .providers import alone
from .tuner import Run, Verdict, remembered

COMPILE_SECONDS = 1.0
"""What compiling one schedule takes, about. Where nothing is measured, time is counted so: equal models get equal schedules."""

COMPILED = 12
"""Schedules of one kernel that are compiled to learn what they take."""

MEASURED = 4
"""Schedules of a kernel that are measured, beside the one to start from."""

KERNEL_SECONDS = 0.5
"""For measuring one kernel, at most."""

WORTH = 0.02
"""A kernel whose best schedule is not predicted to spare more than this is left as it is."""


def region_name(region: Node) -> str:
    """What a region computes, whatever its values are called and whatever they hold."""
    return structural_hash(region.attrs["body"], weights=False)


def with_schedules(graph: Graph, schedules: Mapping[str, str]) -> Graph:
    """The graph with its regions walked as `schedules` says of them by `region_name`. Its memory plan is kept."""
    new: dict[Node, Node] = {}
    for node in order(graph):
        inputs = tuple(new[n] for n in node.inputs)
        attrs = node.attrs
        if node.op.name == "region" and (text := schedules.get(region_name(node))) is not None:
            attrs = MappingProxyType({**attrs, "schedule": text})
        kept = inputs == node.inputs and attrs is node.attrs
        new[node] = node if kept else replace(node, inputs=inputs, attrs=attrs)
    return replace(
        graph,
        outputs=tuple(new[n] for n in graph.outputs),
        writes=tuple((target, new[value]) for target, value in graph.writes),
        arena={new[n]: slot for n, slot in graph.arena.items()},
        inplace={new[n]: new[target] for n, target in graph.inplace.items()},
    )


# ---- without a GPU


def by_facts(graph: Graph, gpu: Gpu, seconds: float, database: Database, device: str = "cuda") -> Found:
    """The schedules that the compiler's facts and the cost model rank first. seconds: for compiling, counted by COMPILE_SECONDS."""
    found, left = Found(), int(seconds / COMPILE_SECONDS)
    for place in _places(graph, gpu, device):
        if left <= 0:
            found.lines.append(place.unsearched(f"not searched: {seconds:g} s buy {int(seconds / COMPILE_SECONDS)} compilations"))
            continue
        legal = candidates(place.kernel, gpu, place.sizes)
        made = _worth_compiling(place, legal, database, min(left, COMPILED))
        left -= len(made)
        found.lines.append(_by_facts(place, legal, made, found))
    return found


def _worth_compiling(place: _Place, legal: Candidates, database: Database, count: int) -> list[Candidate]:
    """About `count` schedules, compiled; only the one to start from where none is predicted to gain, and that one does not spill."""
    made = explored(legal, database, count if place.worth(legal) else 1)
    return explored(legal, database, count) if made[0].spills or made[0].failure else made


def _by_facts(place: _Place, legal: Candidates, made: Sequence[Candidate], found: Found) -> Searched:
    best, start = made[0], next(c for c in made if c.schedule == legal.start)
    gain = 1 - best.seconds / start.seconds
    wrong = start.failure or ("the one to start from spills" if start.spills else "")
    if best is start or best.failure or not wrong and gain < WORTH:
        return place.line(legal, made, "", f"none of the others is predicted to gain {WORTH:.0%}")
    found.schedules[place.name] = text_of(best.schedule)
    return place.line(legal, made, text_of(best.schedule), wrong or f"predicted to take {gain:.0%} less", best.seconds, start.seconds)


# ---- on a GPU


def by_measuring(graph: Graph, bench: Bench, deadline: float, database: Database) -> Found:
    """The fastest of each kernel's best schedules, and of its contraction by the library, until the deadline (of time.perf_counter)."""
    found = Found()
    for place in _places(graph, bench.gpu, bench.device):
        if time.perf_counter() > deadline:
            found.lines.append(place.unsearched("not searched: the time for tuning was used up"))
            continue
        try:
            legal = candidates(place.kernel, bench.gpu, place.sizes)
            made = _worth_compiling(place, legal, database, COMPILED)
            tried = [c for c in made if not c.failure and not c.spills and c.schedule != legal.start][:MEASURED]
            verdict = _verdict(place, [text_of(c.schedule) for c in tried], bench, deadline, database)
            found.lines.append(_by_verdict(place, legal, made, verdict, found))
        except Exception as error:  # a fault of ours costs this kernel its search
            if is_lost(error):
                raise
            found.lines.append(place.unsearched(internal_error(place.kernel.name, error)))
    return found


def _verdict(place: _Place, texts: Sequence[str], bench: Bench, deadline: float, database: Database) -> Verdict:
    """Start, schedules and library, timed in turn. One that has no kernel, or fails, is out."""
    names = [START, *texts, *([LIBRARY] if place.contractions else [])]

    def runs() -> dict[str, Run]:
        made = {name: _run(partial(place.graph, name), bench, ours=True) for name in texts}
        made |= {START: _run(place.graph, bench), LIBRARY: _run(place.by_library, bench)}
        return {name: made[name] for name in names}

    key = Key.on_gpu(place.digest, ", ".join(str(n.type) for n in place.graph().inputs), bench.identity)
    seconds = min(KERNEL_SECONDS, max(0.05, deadline - time.perf_counter()))
    return remembered(key, database, runs, START, names, seconds, bench.clock)


def _run(make: Callable[[], Graph], bench: Bench, ours: bool = False) -> Run:
    """A call of a graph, which the first call makes and compiles. ours: it fails where there is no kernel for it under its schedule."""

    @functools.cache
    def made() -> tuple[Program, list[Any]]:
        graph = make()
        program = compile_program(graph, bench.targets)
        reasons = [*(f.reason for f in program.fallbacks), *(note for k in program.kernels for note in k.notes)]
        if ours and reasons:  # it would run by something else
            raise UnsupportedByTriton(what=graph.name, reason=reasons[0])
        return program, example_inputs(graph)

    def run() -> None:
        program, inputs = made()
        program.run(list(inputs))

    return run


def _by_verdict(place: _Place, legal: Candidates, made: Sequence[Candidate], verdict: Verdict, found: Found) -> Searched:
    start, took = verdict.timings[START].seconds, verdict.timings[verdict.winner].seconds
    failed = "".join(f"; {name} failed: {why}" for name, why in verdict.failed.items())
    found.measured.update(place.contractions)
    if verdict.winner == START:
        return place.line(legal, made, "", f"no other of {len(verdict.timings)} measured is faster{failed}", took, start, True)
    if verdict.winner == LIBRARY:
        found.library.update(place.contractions)
    else:
        found.schedules[place.name] = verdict.winner
    return place.line(legal, made, verdict.winner, f"the fastest of {len(verdict.timings)} measured{failed}", took, start, True)


# ---- the kernels of a graph


@dataclass(frozen=True)
class _Place:
    """A kernel and the regions that it is for. seconds: predicted, of a call."""

    kernel: Kernel
    regions: Sequence[Node]
    whole: Graph
    sizes: Mapping[str, int]
    seconds: float

    @property
    def name(self) -> str:
        return region_name(self.regions[0])

    @property
    def contractions(self) -> list[str]:
        """Signatures of what the library could compute."""
        body = order(self.regions[0].attrs["body"])
        return [signature(n) for n in body if n.op.name in PRODUCTS or n.op.name == "attention"]

    @property
    def digest(self) -> str:
        """Of the code that it starts from, whatever it is called there."""
        return hashlib.sha256(build(replace(self.kernel, name="kernel", label="", sources=(), schedule="")).source.encode()).hexdigest()

    def worth(self, legal: Candidates) -> bool:
        """Whether another schedule might gain."""
        return bool(legal.ranked) and legal.ranked[0].seconds < (1 - WORTH) * legal.predicted

    def graph(self, schedule: str = "") -> Graph:
        """The kernel alone, under a schedule."""
        body: Graph = self.regions[0].attrs["body"]
        attrs = {"body": body, "label": self.regions[0].attrs["label"], "schedule": schedule}
        region = OPS["region"](*body.inputs, **attrs)
        results = (region,) if len(body.outputs) == 1 else tuple(OPS["item"](region, index=k) for k in range(len(body.outputs)))
        return Graph(self.kernel.name, body.inputs, results, symbols=self.whole.symbols, stage=Stage.FUSED)

    def by_library(self) -> Graph:
        """The same with its contractions by the library, and the rest by kernels."""
        passes = (FuseRegions(library=tuple(self.contractions)), PlanMemory())
        return run_passes(alone(self.regions[0], self.whole), passes, Notes())

    def line(
        self,
        legal: Candidates,
        made: Sequence[Candidate],
        schedule: str,
        why: str,
        seconds: float | None = None,
        start: float | None = None,
        measured: bool = False,
    ) -> Searched:
        start = self.seconds if start is None else start
        return Searched(self.kernel.name, schedule, legal.legal, len(made), start if seconds is None else seconds, start, measured, why)

    def unsearched(self, why: str) -> Searched:
        return Searched(self.kernel.name, "", 0, 0, self.seconds, self.seconds, False, why)


def _places(graph: Graph, gpu: Gpu, device: str) -> list[_Place]:
    """The kernels of a graph on a device that Triton prints, those that take most of the time first."""
    sizes = {name: hint(symbol(name), graph.symbols) for name in graph.symbols}
    found: list[_Place] = []
    for kernel, regions in lowered_regions(graph, (device,)):
        if isinstance(kernel, str) or kernel.schedule:
            continue
        try:
            start = build(kernel).schedule
            seconds = predicted_seconds(kernel, start, gpu, sizes=sizes)
        except UnsupportedByTriton:
            continue  # it has no kernel, as the receipt lists
        found.append(_Place(kernel, regions, graph, sizes, seconds))
    return sorted(found, key=lambda place: -len(place.regions) * place.seconds)

"""Never slower: each group of rewrites is measured against what it replaces, and taken back where it does not gain.

    passes as they are            3.1 ms
      without native contractions 3.9 ms    kept
      without channel layouts     2.8 ms    rolled back: channel layouts cost 0.3 ms
    op by op, by the library      4.0 ms    kept: what is left of the rewrites gains

On a GPU the schedules of kernels are chosen first (`search.schedules`).

The two are called in turn, and a difference within noise changes nothing. What was measured is kept in the tuning database, so that the
next process compiles what won.
"""

from __future__ import annotations

import functools
import hashlib
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from ..codegen.regions import internal_error
from ..ir.errors import is_lost
from ..ir.graph import Graph, Node, order
from ..passes.base import Notes, Pass
from ..passes.contractions import can_be_offered, signature
from ..passes.fuse_regions import FuseRegions
from ..passes.pack_weights import PackWeights
from ..search.bench import Searched, bench_of
from ..search.database import Database, Key
from ..search.providers import VENDOR, Provided, providers
from ..search.repeated import from_the_start, updated
from ..search.tuner import LEAST_ROUNDS, Run, Verdict, remembered
from .compile import Compiled, Options, compile_graph, rewritten
from .memory import constant_bytes, return_free_memory
from .offload import offload
from .pipeline import passes_from
from .receipt import Receipt, Trial

WITH, WITHOUT = "with", "without"
SCHEDULES = "schedules to start from"
SEARCHING = 0.7
"""Of the time for tuning, what the search for schedules may take."""
TRIAL_SECONDS = 1.0
TRIAL_CALLS = 2 * (LEAST_ROUNDS + 2)
"""The shortest trial: rounds of two candidates, and the calls that warm them up."""


@dataclass(frozen=True)
class Group:
    """Rewrites that stand or fall together. passes: those that are left out. rules: whose notes tell that there is anything to measure."""

    name: str
    passes: frozenset[str]
    rules: frozenset[str]

    def applied(self, receipt: Receipt) -> bool:
        return any(a.rule in self.rules for a in receipt.applied)


GROUPS = (
    Group("native contractions", frozenset({"pack-weights"}), frozenset({"pack-weights"})),
    Group("channel layouts", frozenset({"choose-layouts"}), frozenset({"choose-layouts"})),
    Group("merged linears", frozenset({"merge-linears"}), frozenset({"merge-linears"})),
    Group("fusion", frozenset({"pack-weights", "split-bias", "fuse-regions", "plan-memory"}), frozenset({"fuse-regions"})),
)


def compile_tuned(graph: Graph, options: Options, inputs: Sequence[Any], notes: Notes | None = None) -> Compiled:
    """As `compile_graph`, of the passes whose results are the fastest on these inputs, which the graph may overwrite.

    The receipt's `trials` say what was measured. Takes `options.tuning_seconds`, beside compiling what is returned, and at most one trial
    longer: that of all rewrites together against running op by op, which is always made.
    """
    with torch.no_grad(), torch.random.fork_rng(devices=()):
        made = _Tuner(graph, options, inputs, notes or Notes()).run()
    if options.offload:
        offload(graph, made.graph)
    return_free_memory(constant_bytes(made.graph))
    return made


class _Tuner:
    def __init__(self, graph: Graph, options: Options, inputs: Sequence[Any], notes: Notes) -> None:
        self.graph, self.options, self.inputs, self.notes = graph, options, inputs, notes
        self.database = Database()
        self.trials: list[Trial] = []
        self.passes = tuple(passes_from(options.passes))
        self.schedules: dict[str, str] = {}  # of regions, where they are not walked as their templates start
        self.searched: tuple[Searched, ...] = ()
        self.current = self.compiled(self.passes)
        self.bench = bench_of(self.current.graph)
        self.start = time.perf_counter()
        self.deadline = self.start + options.tuning_seconds
        self.call_seconds = 0.0

    def run(self) -> Compiled:
        self.try_vendor()
        self.try_schedules()
        for group in GROUPS:
            if group.applied(self.current.receipt):
                self.try_passes(group.name, tuple(p for p in self.passes if p.name not in group.passes))
        self.try_passes("all rewrites", (), always=True)
        if self.options.dump is not None:  # what was compiled last is not what was chosen
            self.current = compile_graph(self.graph, replace(self.options, offload=False), self.copied_notes(), self.passes, self.schedules)
        receipt = self.current.receipt
        seconds = {**receipt.seconds, "tune": time.perf_counter() - self.start}
        receipt = replace(receipt, trials=tuple(self.trials), schedules=self.searched, seconds=seconds)
        return replace(self.current, receipt=receipt)

    def copied_notes(self) -> Notes:
        return Notes(list(self.notes.applied), list(self.notes.declined))

    def compiled(self, passes: Sequence[Pass], schedules: Mapping[str, str] = {}) -> Compiled:
        return compile_graph(self.graph, replace(self.options, dump=None, offload=False), self.copied_notes(), passes, schedules)

    # -- what is tried

    def try_vendor(self) -> None:
        """Contractions that, each for itself, are faster by the library go there, if that gains on the whole."""
        if not any(isinstance(p, PackWeights) for p in self.passes):
            return
        found = providers(self.current.graph, self.database, self.deadline)
        names = _vendor_weights(found)
        if names:
            packed = PackWeights(vendor=tuple(names))
            passes = tuple(packed if isinstance(p, PackWeights) else p for p in self.passes)
            self.try_passes(f"native: {', '.join(_labels(found))}", passes)

    def try_schedules(self) -> None:
        """On a GPU: each kernel by the fastest of its schedules, or its contraction by the library, if that gains on the whole."""
        bench = self.bench
        if bench is None or not any(isinstance(p, FuseRegions) for p in self.passes):
            return
        from ..search.schedules import by_measuring  # Triton need not be there where there is no GPU

        offered = _left_to_the_library(self.current.graph)
        try:
            graph = rewritten(self.graph, Options(), self.fusing(offered=offered), Notes(), {}) if offered else self.current.graph
            found = by_measuring(graph, bench, self.start + SEARCHING * self.options.tuning_seconds, self.database)
        except Exception as error:  # a fault of what we do not need
            if is_lost(error):
                raise
            self.trials.append(Trial(SCHEDULES, True, note=internal_error("the search for schedules", error)))
            return
        self.searched = tuple(found.lines)
        ours = tuple(name for name in offered if name in found.measured - found.library)
        if found.schedules or found.library or ours:
            passes = self.fusing(library=tuple(sorted(found.library.difference(offered))), offered=ours)
            self.try_passes(SCHEDULES, passes, schedules=found.schedules)

    def fusing(self, **options: tuple[str, ...]) -> tuple[Pass, ...]:
        """The passes, with these options of the one that decides the kernels."""
        return tuple(replace(p, **options) if isinstance(p, FuseRegions) else p for p in self.passes)

    def try_passes(self, what: str, passes: tuple[Pass, ...], always: bool = False, schedules: dict[str, str] | None = None) -> None:
        """Goes over to these passes if they are faster than the current ones, beyond noise. always: however little time is left.
        schedules: those to go over to with them; None leaves what there are."""
        schedules = self.schedules if schedules is None else schedules
        if not always and time.perf_counter() + TRIAL_CALLS * self.call_seconds > self.deadline:
            self.trials.append(Trial(what, True, note=f"not measured: the {self.options.tuning_seconds:g} s for tuning were used up"))
            return
        other = functools.cache(lambda: self.compiled(passes, schedules))  # not called where the database knows that it is slower
        try:
            verdict = self.verdict(what, other, schedules)
            self.call_seconds = verdict.timings[WITH].seconds
            if verdict.winner == WITHOUT:
                self.current, self.passes, self.schedules = other(), passes, schedules
        except Exception as error:  # a fault of what we do not need
            if is_lost(error):
                raise
            self.trials.append(Trial(what, True, note=internal_error(f"without {what}", error)))
        else:
            self.trials.append(_trial(what, verdict))
        del other
        return_free_memory(constant_bytes(self.graph))  # before the next is built

    def verdict(self, what: str, other: Callable[[], Compiled], schedules: Mapping[str, str]) -> Verdict:
        def candidates() -> dict[str, Run]:
            return {WITH: _run(self.current, self.inputs), WITHOUT: _run(other(), self.inputs)}

        walked = "".join(f"\0{sorted(s.items())}" for s in (self.schedules, schedules) if s)  # sizes of blocks are in no source
        text = f"{what}\0{self.current.program.source}{walked}"
        digest, shapes = hashlib.sha256(text.encode()).hexdigest(), ", ".join(map(_shape, self.graph.inputs, self.inputs))
        key = Key.here(digest, shapes) if self.bench is None else Key.on_gpu(digest, shapes, self.bench.identity)
        seconds = min(TRIAL_SECONDS, max(0.0, self.deadline - time.perf_counter()))
        return remembered(key, self.database, candidates, WITH, (WITH, WITHOUT), seconds)


def _shape(node: Node, value: Any) -> str:
    return f"{node.type}={tuple(value.shape)}" if isinstance(value, torch.Tensor) else str(value)


def _run(compiled: Compiled, inputs: Sequence[Any]) -> Run:
    on_gpu = any(isinstance(v, torch.Tensor) and v.is_cuda for v in inputs)

    def call() -> None:
        compiled.program.run(list(inputs))
        if on_gpu:
            torch.cuda.synchronize()

    return from_the_start(call, updated(compiled.graph, inputs))


def _trial(what: str, verdict: Verdict) -> Trial:
    if WITHOUT in verdict.failed:
        return Trial(what, True, note=f"nothing to compare with: {verdict.failed[WITHOUT]}")
    timings = verdict.timings
    return Trial(what, verdict.winner == WITH, timings[WITH].seconds, timings[WITHOUT].seconds, timings[WITHOUT].noise)


def _left_to_the_library(graph: Graph) -> tuple[str, ...]:
    """Signatures of the contractions of a fused graph on a GPU that are in no kernel, and could be."""
    return tuple(sorted({signature(node) for node in order(graph) if can_be_offered(node)}))


def _vendor_weights(found: Sequence[Provided]) -> list[str]:
    """Names of the weights, before they were packed, whose contractions are faster by the library."""
    return [name.rpartition(".panels")[0] for p in found if p.verdict.winner == VENDOR for name in p.weights]


def _labels(found: Sequence[Provided]) -> list[str]:
    return [f"{p.label} x{len(p.weights)}" if len(p.weights) > 1 else p.label for p in found if p.verdict.winner == VENDOR]

"""`simplify`: a model with fewer tokens and fewer blocks, as far as a limit of error allows: chosen by measured errors, verified, measured.

    exact graph  -->  error of each choice alone  -->  allocate  -->  all together, on inputs held out  -->  timed beside the exact
                                                          ^                        |
                                                          +-- over: less is allowed

Nothing here is on by default: `rewrites` says which kinds the user allows. What comes back was measured to keep the error, and to be no
slower than the exact model; else it is the exact model.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch

from ..ir.capture import CapturedModule
from ..ir.graph import Graph
from ..ir.interpret import interpret
from ..passes.base import Notes
from ..passes.manager import run_passes
from ..search.allocate import Allocation, Infeasible, allocate
from ..search.device import this_device
from ..search.merging import Merging
from ..search.metrics import metric
from ..search.pruning import REMOVED, SHARED, Pruning
from ..search.rewrites import Effect, Family, Rewrites, predicted_seconds, weight_bytes
from ..search.tuner import CERTAINTY
from .artifact import Optimized
from .budget import Attempt, Spent
from .calibration import batches
from .compile import Options, compile_graph
from .errors import BadOption
from .inputs import Example, copied
from .loading import Model, captured_of, evaluating, export_module
from .measure import apart, timed, with_speed
from .optimize import Stages, optimize_model, outlined
from .pipeline import FINISHING, PREPARING
from .receipt import Trial, make_receipt

ATTEMPTS = 12
MARGIN, ROOM, MOST_ROOM = 0.97, 1.2, 16.0
"""Of what measuring says would just do; so much room is worth another attempt; what one attempt says of the next reaches no further."""

TINY = 1e-30
REWRITES = {"merge-tokens": "", "remove-blocks": REMOVED, "share-blocks": SHARED}
"""What a user may allow -> what that makes of a block."""

COSTS = {"latency": "time", "memory": "bytes"}


@dataclass(frozen=True)
class Allowance:
    """What `simplify` may do. max_error: of the outputs, by `metric` (one of METRICS). rewrites: of REWRITES. protected: so many first
    tokens are never merged (a class token). objective: what to make least, "latency" or "memory". calibration: tuples of arguments (or
    dicts, by name) like the example; a quarter, at least one, is held out to verify. Raises BadOption, and UnknownMetric.
    """

    max_error: float
    rewrites: Sequence[str] = ("merge-tokens",)
    protected: int = 0
    metric: str = "relative"
    objective: str = "latency"
    calibration: Sequence[Any] = ()

    def __post_init__(self) -> None:
        if isinstance(self.rewrites, str):
            raise BadOption(option="rewrites", reason=f'it is a tuple of names, as ("{self.rewrites}",)')
        for name, value, known in (("objective", self.objective, COSTS), *(("rewrites", r, REWRITES) for r in self.rewrites)):
            if value not in known:
                raise BadOption(option=name, reason=f"there is no {value!r}; there are {', '.join(known)}")
        for name, number in (("max_error", self.max_error), ("protected", self.protected)):
            if not (isinstance(number, (int, float)) and number >= 0):
                raise BadOption(option=name, reason=f"it is a number from 0 on, not {number!r}")
        metric(self.metric)


@evaluating
def simplify(
    model: torch.nn.Module, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None, *, max_error: float, **allowance: Any
) -> Optimized:
    """A module with fewer tokens and blocks, its outputs within `max_error` of what they were. allowance: the other fields of `Allowance`.

    Raises CannotOptimize where the model cannot be captured, BadOption and BadCalibration.
    """
    allowed = Allowance(max_error, **allowance)
    return simplify_model(export_module(type(model).__name__, model, Example(tuple(args), dict(kwargs or {}), {})), allowed)


def simplify_model(model: Model, allowed: Allowance, stage: Stages = lambda name: nullcontext()) -> Optimized:
    """A model that was read, as `simplify` makes it."""
    exact = optimize_model(model, stage=stage, tuning_seconds=0)
    search = _Simplify(model, captured_of(model), exact, allowed, stage)
    made = search.run()
    return outlined(made, search.captured, stage)


@dataclass(frozen=True)
class _Found:
    graph: Graph
    notes: Notes
    allocation: Allocation
    error: float


class _Simplify:
    """exact: the model as `optimize` makes it without tuning."""

    def __init__(self, model: Model, captured: CapturedModule, exact: Optimized, allowed: Allowance, stage: Stages) -> None:
        self.model, self.captured, self.exact, self.stage = model, captured, exact, stage
        self.max_error, self.metric, self.objective = allowed.max_error, metric(allowed.metric), allowed.objective
        self.prepared, self.refusals = Notes(), Notes()
        with torch.no_grad():
            graph = run_passes(captured.graph, PREPARING, self.prepared)
        families: list[Family] = [Pruning(graph, [REWRITES[r] for r in dict.fromkeys(allowed.rewrites) if REWRITES[r]])]
        if "merge-tokens" in allowed.rewrites:
            families.append(Merging(graph, self.refusals, allowed.protected))
        self.rewrites = Rewrites(graph, families)
        self.batches = batches(model, captured, exact.convention, allowed.calibration)
        self.attempts: list[Attempt] = []

    def run(self) -> Optimized:
        seconds = partial(predicted_seconds, device=this_device())
        self.seconds = seconds(self.rewrites.graph)
        with torch.no_grad():
            with self.stage("measuring what each choice does to the results") as progress:
                effects = self.rewrites.effects(self.batches.chosen_on, self.metric, seconds, progress or (lambda done, total: None))
            with self.stage("choosing and verifying"):
                self.references = [interpret(self.captured.graph, copied(flat), torch.float64) for flat in self.batches.judged_on]
                best = self._search(effects)
            return self._unchanged(self._why_nothing(effects)) if best is None else self._measured(best)

    def _why_nothing(self, effects: Sequence[Mapping[str, Effect]]) -> str:
        """Why no choice was taken."""
        if self.attempts:
            return f"none of {len(self.attempts)} attempts keeps the error; the nearest errs {min(a.error for a in self.attempts):.2g}"
        found = [e for here in effects for e in here.values()]
        if not found:
            return "there is nothing that it could be done to"
        gain = [e.error for e in found if (e.seconds if self.objective == "latency" else e.bytes) > 0]
        what = "time" if self.objective == "latency" else "memory"
        return f"of those that save {what} the best errs {min(gain):.2g}" if gain else f"none of {len(found)} choices saves {what}"

    # -- which choices together

    def _search(self, effects: Sequence[Mapping[str, Effect]]) -> _Found | None:
        """The allocation that gains most of those that keep the error on the inputs that judge."""
        choices, cost = self.rewrites.choices(effects, self.metric.power), COSTS[self.objective]
        allowed, best = self.max_error**self.metric.power, None
        forbidden: list[tuple[str, ...]] = []
        while len(self.attempts) < ATTEMPTS and choices:
            try:
                allocation = allocate(choices, cost, {"error": allowed}, forbidden=forbidden)
            except Infeasible:
                break
            if allocation.costs[cost] >= (0.0 if best is None else best.allocation.costs[cost]):
                break
            forbidden.append(allocation.names)
            found = self._tried(allocation)
            room = (self.max_error / max(found.error, TINY)) ** self.metric.power
            if found.error <= self.max_error:
                best = found
                if room < ROOM:
                    break
            known = max(allocation.costs["error"], TINY)
            allowed = known * min(MOST_ROOM, max(1 / MOST_ROOM, room * MARGIN))
        return best

    def _tried(self, allocation: Allocation) -> _Found:
        notes = Notes(list(self.prepared.applied), [*self.prepared.declined, *self.refusals.declined])
        graph = self.rewrites.rewritten(self.rewrites.chosen(allocation), notes)
        error = self._error_of(partial(interpret, graph))
        self._note(allocation, error)
        return _Found(graph, notes, allocation, error)

    def _note(self, allocation: Allocation, error: float) -> None:
        predicted = max(allocation.costs["error"], 0.0) ** (1 / self.metric.power)
        verdict = "kept" if error <= self.max_error else "declined: over the error"
        self.attempts.append(Attempt(predicted, error, self.seconds + allocation.costs["time"], 0.0, verdict))

    # -- what it is worth

    def _measured(self, best: _Found) -> Optimized:
        """The model as chosen, or the exact one where that is faster, or kernels do not keep the error."""
        exact = self.exact
        with self.stage("building kernels"):
            compiled = compile_graph(best.graph, Options(), best.notes, FINISHING)
        made = Optimized(compiled.graph, exact.convention, compiled.program, compiled.receipt, self.captured.state)
        error = self._error_of(made.program.run)
        if error > self.max_error:
            self._note(best.allocation, error)
            return self._unchanged(f"its kernels err {error:.2g}")
        with self.stage("measuring speed against the exact model"):
            verdict = timed(apart(self.model, self.captured), ours=made, exact=exact)
        ours, before = verdict.timings["ours"].seconds, verdict.timings["exact"]
        kept = self.objective == "memory" or ours <= before.seconds * (1 + CERTAINTY * before.noise)
        trial = Trial("\n".join(self._said(best)), kept, ours, before.seconds, before.noise)
        if not kept:
            return with_speed(self._exactly(trial), verdict, "exact")
        receipt = replace(made.receipt, trials=(trial,), spent=self._spent(best.graph, error, ours, before.seconds))
        return with_speed(replace(made, receipt=receipt), verdict, "ours")

    def _unchanged(self, why: str) -> Optimized:
        return self._exactly(Trial("fewer tokens or blocks", False, note=f"not done: {why}"))

    def _exactly(self, trial: Trial) -> Optimized:
        """The exact model, with what was tried, and what could not be, on its receipt."""
        receipt = self.exact.receipt
        seconds = receipt.speed.ours if receipt.speed is not None else 0.0
        spent = self._spent(self.rewrites.graph, self._error_of(self.exact.program.run), seconds, seconds)
        refused = make_receipt(self.exact.program, self.refusals, {}).refused
        receipt = replace(receipt, spent=spent, trials=(*receipt.trials, trial), refused=(*receipt.refused, *refused))
        return replace(self.exact, receipt=receipt)

    def _error_of(self, run: Callable[[list[Any]], list[Any]]) -> float:
        runs = zip(self.batches.judged_on, self.references, strict=True)
        return max(self.metric(run(copied(flat)), reference) for flat, reference in runs)

    def _said(self, best: _Found) -> list[str]:
        return [f"{place} {how}" for _, place, how in self.rewrites.chosen(best.allocation)]

    def _spent(self, graph: Graph, error: float, seconds: float, exact_seconds: float) -> Spent:
        return Spent(
            metric=self.metric.name,
            objective=self.objective,
            limits={"error": self.max_error},
            error=error,
            bytes=weight_bytes(graph),
            exact_bytes=weight_bytes(self.rewrites.graph),
            seconds=seconds,
            exact_seconds=exact_seconds,
            held_out=self.batches.held_out,
            attempts=tuple(self.attempts),
        )

"""`simplify`: a model with fewer tokens and fewer blocks, as far as a limit of error allows: chosen by measured errors, verified, measured.

    exact graph  -->  error of each choice alone  -->  allocate  -->  all together, on inputs held out  -->  timed beside the exact
                                                          ^                        |
                                                          +-- over: less is allowed

Nothing here is on by default: `rewrites` says which kinds the user allows. What comes back was measured to keep the error, and to be no
slower than the exact model; else it is the exact model.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
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
from .calling import CallingConvention
from .compile import Options, compile_graph
from .errors import BadOption, CannotOptimize
from .inputs import Example, copied
from .loading import Model, captured_of, export_module
from .measure import apart, convention_for, flat_example, flattened, timed, with_speed
from .optimize import optimize_model
from .pipeline import FINISHING, PREPARING
from .receipt import Trial

ATTEMPTS = 12
HELD_OUT = 4
"""One in so many inputs judges the result, and has no part in choosing."""

MARGIN, ROOM, MOST_ROOM = 0.97, 1.2, 16.0
"""Of what measuring says would just do; so much room is worth another attempt; what one attempt says of the next reaches no further."""

TINY = 1e-30
REWRITES = {"merge-tokens": "", "remove-blocks": REMOVED, "share-blocks": SHARED}
"""What a user may allow -> what that makes of a block."""

COSTS = {"latency": "time", "memory": "bytes"}


def simplify(
    model: torch.nn.Module,
    args: Sequence[Any] = (),
    kwargs: Mapping[str, Any] | None = None,
    *,
    max_error: float,
    calibration: Sequence[Any] = (),
    rewrites: Sequence[str] = ("merge-tokens",),
    protected: int = 0,
    metric: str = "relative",
    objective: str = "latency",
) -> Optimized:
    """A module with fewer tokens and blocks, its outputs within `max_error` by `metric` (one of METRICS) of what they were.

    calibration: tuples of arguments like the example; a quarter, at least one, is held out to verify. rewrites: of REWRITES. protected: so
    many first tokens are never merged (a class token). objective: what to make least, "latency" or "memory".
    Raises CannotOptimize where the model cannot be captured, BadOption.
    """
    for name, value, known in (("objective", objective, COSTS), *(("rewrites", r, REWRITES) for r in rewrites)):
        if value not in known:
            raise BadOption(option=name, reason=f"there is no {value!r}; there are {', '.join(known)}")
    if not max_error >= 0:
        raise BadOption(option="max_error", reason=f"it is a number from 0 on, not {max_error}")
    loaded = export_module(type(model).__name__, model, Example(tuple(args), dict(kwargs or {}), {}))
    return _Simplify(loaded, max_error, calibration, rewrites, protected, metric, objective).run()


@dataclass(frozen=True)
class _Found:
    graph: Graph
    notes: Notes
    allocation: Allocation
    error: float


class _Simplify:
    def __init__(
        self, model: Model, max_error: float, calibration: Sequence[Any], rewrites: Sequence[str], protected: int, name: str, objective: str
    ) -> None:
        self.model, self.max_error, self.metric, self.objective = model, max_error, metric(name), objective
        self.captured: CapturedModule = captured_of(model)
        self.convention: CallingConvention = convention_for(model, self.captured)
        self.notes = Notes()
        with torch.no_grad():
            graph = run_passes(self.captured.graph, PREPARING, self.notes)
        families: list[Family] = [Pruning(graph, [REWRITES[r] for r in dict.fromkeys(rewrites) if REWRITES[r]])]
        if "merge-tokens" in rewrites:
            families.append(Merging(graph, self.notes, protected))
        self.rewrites = Rewrites(graph, families)
        batches = [flat_example(model, self.captured, self.convention), *map(self._flat, calibration)]
        held = max(1, len(batches) // HELD_OUT) if len(batches) > 1 else 0
        self.chosen_on, self.judged_on = (batches[:-held], batches[-held:]) if held else (batches, batches)
        self.held_out = held > 0
        self.attempts: list[Attempt] = []

    def _flat(self, item: Any) -> list[Any]:
        kwargs = dict(item) if isinstance(item, Mapping) else {}
        args = () if kwargs else tuple(item) if isinstance(item, (tuple, list)) else (item,)
        return flattened(self.convention, self.captured, args, kwargs)

    def run(self) -> Optimized:
        exact = optimize_model(self.model, tuning_seconds=0)
        device = this_device()
        with torch.no_grad():
            effects = self.rewrites.effects(self.chosen_on, self.metric, lambda graph: predicted_seconds(graph, device))
            self.references = [interpret(self.captured.graph, copied(flat), torch.float64) for flat in self.judged_on]
            best = self._search(effects)
            return self._unchanged(exact) if best is None else self._measured(exact, best)

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
        notes = Notes(list(self.notes.applied), list(self.notes.declined))
        graph = self.rewrites.rewritten(self.rewrites.chosen(allocation), notes)
        runs = zip(self.judged_on, self.references, strict=True)
        error = max(self.metric(interpret(graph, copied(flat)), reference) for flat, reference in runs)
        predicted = max(allocation.costs["error"], 0.0) ** (1 / self.metric.power)
        verdict = "kept" if error <= self.max_error else "declined: over the error"
        self.attempts.append(Attempt(predicted, error, allocation.costs["time"], 0.0, verdict))
        return _Found(graph, notes, allocation, error)

    # -- what it is worth

    def _measured(self, exact: Optimized, best: _Found) -> Optimized:
        """The model as chosen, or the exact one where that is faster."""
        compiled = compile_graph(best.graph, Options(), best.notes, FINISHING)
        made = Optimized(compiled.graph, self.convention, compiled.program, compiled.receipt, self.captured.state)
        error = self._error_of(made)
        if error > self.max_error:
            reason = f"kernels would be off by {error:.1e} where {self.max_error:.1e} is allowed; please report this model"
            raise CannotOptimize(path=self.model.name, reason=reason)
        verdict = timed(apart(self.model, self.captured), ours=made, exact=exact)
        ours, before = verdict.timings["ours"].seconds, verdict.timings["exact"]
        kept = self.objective == "memory" or ours <= before.seconds * (1 + CERTAINTY * before.noise)
        trial = Trial(", ".join(self._said(best)), kept, ours, before.seconds, before.noise)
        chosen, name = (made, "ours") if kept else (exact, "exact")
        spent = self._spent(best.graph, error, ours, before.seconds) if kept else self._unchanged(exact).receipt.spent
        receipt = replace(chosen.receipt, trials=(*chosen.receipt.trials, trial), spent=spent)
        return with_speed(replace(chosen, receipt=receipt), verdict, name)

    def _unchanged(self, exact: Optimized) -> Optimized:
        """The exact model, with what was tried on its receipt."""
        seconds = exact.receipt.speed.ours if exact.receipt.speed is not None else 0.0
        spent = self._spent(self.rewrites.graph, self._error_of(exact), seconds, seconds)
        return replace(exact, receipt=replace(exact.receipt, spent=spent))

    def _error_of(self, made: Optimized) -> float:
        runs = zip(self.judged_on, self.references, strict=True)
        return max(self.metric(made.program.run(copied(flat)), reference) for flat, reference in runs)

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
            held_out=self.held_out,
            attempts=tuple(self.attempts),
        )

"""A model within a budget: which layer is kept in which format, decided by measured costs, then verified and repaired.

    exact graph  -->  error of each layer in each format, from calibration inputs    --> allocate --> quantize --> measure
                      time of each layer in each format, on this machine                  ^                          |
                                                                                          +-- over: less is allowed -+

What is returned was measured to keep every limit, on inputs held out where there are several; where nothing does, it says which limit
stands in the way, and the nearest there is.
"""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from numbers import Real
from typing import Any

import torch

from ..ir.capture import CapturedModule
from ..ir.graph import Graph
from ..ir.interpret import interpret
from ..passes.base import Notes
from ..passes.layers import layers
from ..passes.quantize import Plan, Quantize
from ..passes.scale_channels import ScaleChannels
from ..search.allocate import Allocation, Infeasible, allocate
from ..search.channels import channel_scales, tried
from ..search.choices import LayerChoices, layer_choices, plan_of
from ..search.curvature import Curvature, traces
from ..search.database import Database
from ..search.layer_times import EXACT
from ..search.pareto import pareto
from ..search.sensitivity import Effect, Progress, Sensitivity, counts
from ..search.tuner import CERTAINTY
from .artifact import Optimized
from .budget import OBJECTIVES, Attempt, Budget, LayerLine, Point, Spent, quantity
from .calibration import batches
from .calling import CallingConvention
from .compile import Options, rewritten
from .errors import BadOption, CannotOptimize, TooManyActivations
from .inputs import copied
from .loading import Model
from .measure import apart, flattened
from .memory import constant_bytes
from .pipeline import PREPARING
from .places import Made, Place, Run
from .words import scaled

ATTEMPTS = 8
LEAST_WEIGHTS = 4096
"""A smaller layer saves nothing that counts."""

MARGIN = 0.97
"""Of what measuring says would just do: the next attempt should not miss by a hair."""

ROOM, MOST_ROOM = 1.3, 16.0
"""So much room is worth another attempt; what one attempt says of the next does not reach further."""

NEARLY = 0.95
"""A candidate that misses its time by less may do with a little less predicted time."""

TINY = 1e-30
"""An error that is none."""

ROUNDING = 4.0
"""So many times the error that eager itself has is no error of ours."""

LOSS_START = 0.05
"""Relative error of the outputs that is allowed first where the user judges by a loss."""

FRONT_POINTS = 12

Stages = Callable[[str], Any]


@dataclass(frozen=True)
class _Tried:
    """A candidate that keeps all limits."""

    made: Made
    error: float


class _Within:
    """place: where it will run."""

    def __init__(
        self, model: Model, captured: CapturedModule, convention: CallingConvention, budget: Budget, place: Place, stage: Stages
    ) -> None:
        self.model, self.captured, self.convention, self.budget = model, captured, convention, budget
        self.place, self.stage = place, stage
        self.database, self.notes = Database(), Notes()
        self.seconds: dict[str, float] = {}
        with torch.no_grad():
            self.graph = rewritten(captured.graph, Options(), PREPARING, self.notes, self.seconds)
        self.metric = budget.of_outputs
        self.foretells = isinstance(budget.metric, str)  # whether what layers err is what the user limits
        self.adds = self.metric.power  # their errors to this power add up
        found = batches(model, captured, convention, budget.calibration)
        self.chosen_on, self.judged_on, self.held_out = found.chosen_on, found.judged_on, found.held_out
        self.graph = self._scaled()
        self.layers = [x for x in layers(self.graph) if x.weight.tensor.numel >= LEAST_WEIGHTS]
        self.exact_bytes = constant_bytes(self.graph)
        self.attempts: list[Attempt] = []
        self.taught: float | None = None  # the last measured error over what the sum over layers was, in the power that adds up

    def _scaled(self) -> Graph:
        """The graph with channels that round better scaled; as it is where no format rounds so coarsely that it would matter."""
        if not tried(self.budget.formats):
            return self.graph
        with self._progress("looking for channels that are hard to round"), torch.no_grad():
            scales = channel_scales(self.graph, self.chosen_on, self.budget.formats)
            return rewritten(self.graph, Options(), [ScaleChannels(scales)], self.notes, self.seconds)

    # -- what is measured first

    def measure(self) -> None:
        """Errors and times of every layer in every format, and what exact results and their own errors are."""
        formats = self.budget.formats
        self.original_loss = 0.0 if isinstance(self.budget.metric, str) else self._loss(apart(self.model, self.captured).module)
        if not math.isfinite(self.original_loss):
            raise BadOption(option="metric", reason=f"of the model itself it is {self.original_loss}")
        with self._progress("measuring what formats do to the results") as progress:
            self.sensitivity = Sensitivity(self.graph, self.layers, self.chosen_on, self.metric, self.database)
            effects = self._effects(formats, progress)
            self.candidates = counts(effects)
        with self._progress(f"{'measuring' if self.place.measured else 'foretelling'} how long layers take in each format") as progress:
            seconds = self.place.layer_times(self.graph, self.layers, formats, self.database, progress)
        self.choices = layer_choices(self.graph, self.layers, formats, effects, seconds, self.adds)
        self.offered = [c.choices for c in self.choices]
        with torch.no_grad():
            self.references = [interpret(self.captured.graph, copied(flat), torch.float64) for flat in self.judged_on]
            own = [interpret(self.captured.graph, copied(flat)) for flat in self.judged_on]
        self.rounding = max(map(self.metric, own, self.references)) if isinstance(self.budget.metric, str) else 0.0
        self.exact_seconds, self.whole_seconds = self.place.exact_times()

    def _effects(self, formats: Sequence[str], progress: Progress) -> dict[tuple[str, str], Effect]:
        """By what formats do to outputs; of a user's loss that can be differentiated twice, by its curvature."""
        if isinstance(self.budget.metric, str):
            return self.sensitivity.effects(formats, progress)
        loss = self.budget.metric
        found = traces(self.layers, lambda known: loss(self._callable(lambda flat: interpret(self.graph, flat, known=known), grad=True)))
        if found is None:
            return self.sensitivity.effects(formats, progress)
        self.foretells, self.adds = True, 1
        score = Curvature(self.graph, self.sensitivity.replays, self.sensitivity.grams, found).error
        return self.sensitivity.foretold(formats, score, progress)

    @contextmanager
    def _progress(self, name: str) -> Iterator[Progress]:
        with self.stage(name) as progress:
            yield progress or (lambda done, total: None)

    # -- limits, as sums over layers

    def limits(self) -> dict[str, float]:
        """By cost. Time is limited in any case: where the user does not say, the result is not to be slower than the exact model."""
        layer_bytes, layer_seconds = self._exact("bytes"), self._exact("time")
        found = {"time": layer_seconds}
        memory = quantity("memory", self.budget.memory, self.exact_bytes)
        if memory is not None:
            found["bytes"] = memory - (self.exact_bytes - layer_bytes)
        if self.budget.bits is not None:
            weights = sum(x.nbytes / x.weight.dtype.itemsize for x in self.layers)
            found["bytes"] = min(found.get("bytes", math.inf), self.budget.bits * weights / 8)
        latency = quantity("latency", self.budget.latency, self.whole_seconds)
        if latency is not None:
            found["time"] = latency - (self.exact_seconds - layer_seconds)
        bops = quantity("bops", self.budget.bops, self._exact("bops"))
        return found if bops is None else found | {"bops": bops}

    def _exact(self, cost: str) -> float:
        return math.fsum(c.named(EXACT).costs[cost] for c in self.choices)

    def allowed(self) -> float:
        """Of the predicted error, to begin with."""
        if self.budget.max_error is None:
            return math.inf
        start = self.budget.max_error if self.foretells else LOSS_START
        return start**self.adds

    def _first_limits(self) -> dict[str, float]:
        """All limits. A loss says itself what it minds: what its outputs are off at first may be all that the other limits need."""
        limits = self.limits() | {"error": self.allowed()}
        if isinstance(self.budget.metric, str):
            return limits
        try:
            least = allocate(self.offered, "error", {name: x for name, x in self._of_user(limits).items() if name != "error"})
        except Infeasible as error:
            raise CannotOptimize(path=self.model.name, reason=self._impossible(error)) from error
        return {**limits, "error": max(limits["error"], least.costs["error"])}

    def _of_user(self, limits: Mapping[str, float]) -> dict[str, float]:
        """Those that the user set: not that on time where it is ours."""
        return {name: limit for name, limit in limits.items() if name != "time" or self.budget.latency is not None}

    # -- the search

    def run(self) -> tuple[_Tried | None, Allocation]:
        """The best candidate that was measured to keep all limits, None for the exact model; and the allocation that it is."""
        limits, cost = self._first_limits(), OBJECTIVES[self.budget.objective]
        best: tuple[_Tried | None, Allocation] | None = None
        forbidden: list[tuple[str, ...]] = []
        while len(self.attempts) < ATTEMPTS:
            try:
                allocation = allocate(self.offered, cost, limits, forbidden=forbidden)
            except Infeasible as error:
                if best is not None:
                    break
                allocation = self._quickest(error, limits, forbidden)
            if best is not None and allocation.costs[cost] >= best[1].costs[cost]:
                break
            forbidden.append(allocation.names)
            tried, missed, room = self._try(allocation)
            if not missed:
                best = tried, allocation
                if room < ROOM:
                    break
            if missed in ("time", "activations") and room < NEARLY:
                slow = self._withdraw(allocation)
                forbidden = [names for names in forbidden if slow not in names]
            else:
                limits = self._moved(limits, missed or "error", room, allocation)
        if best is None:
            reason = f"none of {len(self.attempts)} candidates kept the budget when it was measured"
            raise CannotOptimize(path=self.model.name, reason=reason)
        return best

    def _withdraw(self, allocation: Allocation) -> str:
        """What measures far slower than foretold is rolled back, and what keeps no limit on intermediate values, of which nothing is
        foretold: the format that most weights are in is no choice any more."""
        taken: Counter[str] = Counter()
        for c, name in zip(self.choices, allocation.names):
            taken[name] += c.layer.nbytes if name != EXACT else 0
        slow = max(taken, key=lambda name: taken[name])
        self.offered = [tuple(choice for choice in choices if choice.name != slow) for choices in self.offered]
        return slow

    def _quickest(self, error: Infeasible, limits: Mapping[str, float], forbidden: Sequence[Sequence[str]]) -> Allocation:
        """Where the limits cannot be kept together by what is foretold, and the user set none on time: the quickest that keeps the others.
        Whether it is slower than the exact model is then measured, and what is foretold of noise rules nothing out."""
        others = self._of_user(limits)
        if others.keys() == limits.keys():
            raise CannotOptimize(path=self.model.name, reason=self._impossible(error)) from error
        try:
            return allocate(self.offered, "time", others, forbidden=forbidden)
        except Infeasible as error:
            raise CannotOptimize(path=self.model.name, reason=self._impossible(error)) from error

    def _moved(self, limits: Mapping[str, float], cost: str, room: float, allocation: Allocation) -> dict[str, float]:
        """The limits, with that on one cost where measuring says it should be: room is what there may be, over what there was."""
        if cost == "error":
            known = max(allocation.costs["error"], TINY)
            return {**limits, "error": known * min(MOST_ROOM, max(1 / MOST_ROOM, room * MARGIN))}
        reached, exact = allocation.costs[cost], self._exact(cost)
        return {**limits, cost: min(limits.get(cost, reached), reached) - (exact - reached) / 2 * (1 - room)}

    def _try(self, allocation: Allocation) -> tuple[_Tried | None, str, float]:
        """The candidate; which limit it missed, "" if none; and the room there is, of that or of the error."""
        plan = plan_of(self.choices, allocation, self.sensitivity.grams)
        if not plan.entries:
            return None, "", 1.0
        notes = Notes(list(self.notes.applied), list(self.notes.declined))
        seconds = dict(self.seconds)
        quantized = rewritten(self.graph, Options(), [Quantize(plan)], notes, seconds)
        error = self._error_of(lambda flat: interpret(quantized, flat))
        if error > self._most_error:
            return self._missed(allocation, "error", self._room(error), error)
        try:
            with self.stage("building kernels of a candidate"):
                made = self.place.made(quantized, notes, seconds)
        except TooManyActivations:
            return self._missed(allocation, "activations", 0.0, error)
        return self._judged(allocation, made)

    def _judged(self, allocation: Allocation, made: Made) -> tuple[_Tried | None, str, float]:
        """By what it does when it runs."""
        error, seconds = self._error_when_run(made), made.seconds
        most_seconds = self._user_limits()["time"] or made.exact_seconds * (1 + CERTAINTY * made.noise)
        nbytes, most_bytes = made.nbytes, self._user_limits()["bytes"] or math.inf
        if error > self._most_error:
            return self._missed(allocation, "error", self._room(error), error, seconds)
        if seconds > most_seconds:
            return self._missed(allocation, "time", most_seconds / seconds, error, seconds)
        if nbytes > most_bytes:
            return self._missed(allocation, "bytes", most_bytes / nbytes, error, seconds)
        self._note(allocation, error, seconds, "kept")
        return _Tried(made, error), "", self._room(error)

    def _missed(self, allocation: Allocation, cost: str, room: float, error: float, seconds: float = 0.0) -> tuple[None, str, float]:
        self._note(allocation, error, seconds, f"declined: over the {cost}")
        return None, cost, room

    @property
    def _most_error(self) -> float:
        return math.inf if self.budget.max_error is None else max(self.budget.max_error, ROUNDING * self.rounding)

    def _room(self, error: float) -> float:
        """The error there may be over the one there is, in the power that adds up. A loss grows with the square of what outputs are off."""
        return (self._most_error / max(error, TINY)) ** self._power if self._most_error < math.inf else 1.0

    @property
    def _power(self) -> int:
        return self.metric.power if isinstance(self.budget.metric, str) else 1

    def _error_when_run(self, made: Made) -> float:
        """Of both programs, where there are two: that which leaves padding out, for all calls that it may run, at tokens."""
        error = self._error_of(made.run)
        if made.unpadded is None:
            return error
        rows = made.unpadded.whenever_possible()
        return max(error, self._error_of(partial(rows.run, padded=made.run), rows.at_tokens))

    def _error_of(self, run: Run, part: Callable[[list[Any], list[Any]], list[Any]] = lambda inputs, outputs: outputs) -> float:
        """On the inputs that judge, against float64; of a loss, by how much it grows. part: of the outputs, what counts."""
        if not isinstance(self.budget.metric, str):
            grown = self._loss(self._callable(run)) - self.original_loss
            return grown if grown == grown else math.inf
        with torch.no_grad():
            found = ((part(flat, run(copied(flat))), part(flat, exact)) for flat, exact in zip(self.judged_on, self.references))
            return max(itertools.starmap(self.metric, found))

    def _loss(self, model: Callable[..., Any]) -> float:
        assert not isinstance(self.budget.metric, str)
        with torch.no_grad():
            found = self.budget.metric(model)
        if isinstance(found, torch.Tensor) and found.numel() == 1:
            found = found.item()
        if not isinstance(found, Real):
            raise BadOption(option="metric", reason=f"it is to return a number, not {type(found).__name__}")
        return float(found)

    def _callable(self, run: Run, grad: bool = False) -> Callable[..., Any]:
        def model(*args: Any, **kwargs: Any) -> Any:
            with torch.set_grad_enabled(grad and torch.is_grad_enabled()):
                return self.convention.pack(run(flattened(self.convention, self.captured, args, kwargs)))

        return model

    def _note(self, allocation: Allocation, error: float, seconds: float, verdict: str) -> None:
        self.attempts.append(Attempt(self._predicted_error(allocation), error, self._predicted_seconds(allocation), seconds, verdict))
        total = allocation.costs["error"]
        if total > TINY and TINY < error < math.inf:
            self.taught = error**self._power / total

    def _predicted_error(self, allocation: Allocation) -> float | None:
        """Layers add up to this, as far as they err apart; what the last attempt erred more or less than that, the next will too. None for
        a loss without curvature before the first attempt: what layers do to outputs says nothing of it yet."""
        if self.taught is None and not self.foretells:
            return None
        return (max(allocation.costs["error"], 0.0) * (1.0 if self.taught is None else self.taught)) ** (1 / self._power)

    def _predicted_seconds(self, allocation: Allocation) -> float:
        return self.exact_seconds + allocation.costs["time"] - self._exact("time")

    # -- what is told

    def _impossible(self, error: Infeasible) -> str:
        """In the user's units."""
        wanted = " and ".join(self._said(name, value) for name, value in error.limits.items())
        needed = " and ".join(self._said(name, value) for name, value in error.needed.items())
        return f"no choice of formats keeps {wanted}{' together' if len(error.limits) > 1 else ''}; the nearest has {needed}"

    def _said(self, cost: str, value: float) -> str:
        if cost == "error":
            learned = (self.taught or 1.0, self._power) if self.taught or self.foretells else (1.0, self.adds)
            return f"error {(max(value, 0.0) * learned[0]) ** (1 / learned[1]):.2g}"
        if cost == "bytes":
            return f"{scaled(max(0, round(value + self.exact_bytes - self._exact('bytes'))))}B"
        if cost == "time":
            return f"{1e3 * (value + self.exact_seconds - self._exact('time')):.3g} ms"
        return f"{cost} {value:.3g}"

    def plan(self, allocation: Allocation) -> Plan:
        """The formats of the model as it was captured; what layers read is not known of it where channels have been scaled."""
        scaled = any(applied.rule == ScaleChannels.name for applied in self.notes.applied)
        return plan_of(self.choices, allocation, {} if scaled else self.sensitivity.grams)

    def spent(self, tried: _Tried | None, allocation: Allocation) -> Spent:
        limits = {name: value for name, value in self._user_limits().items() if value is not None}
        return Spent(
            metric=self.budget.metric if isinstance(self.budget.metric, str) else "loss",
            objective=self.budget.objective,
            limits=limits,
            error=tried.error if tried else self.rounding,
            bytes=tried.made.nbytes if tried else self.exact_bytes,
            exact_bytes=self.exact_bytes,
            seconds=tried.made.seconds if tried else self.exact_seconds,
            exact_seconds=tried.made.exact_seconds if tried else self.exact_seconds,
            held_out=self.held_out,
            layers=tuple(map(self._line, self.choices, allocation.names)),
            attempts=tuple(self.attempts),
            front=self._front(),
            prices=dict(allocation.prices),
            candidates=self.candidates,
        )

    def _user_limits(self) -> dict[str, float | None]:
        return {
            "error": self.budget.max_error,
            "bytes": quantity("memory", self.budget.memory, self.exact_bytes),
            "time": quantity("latency", self.budget.latency, self.whole_seconds),
            "bits": self.budget.bits,
            "bops": quantity("bops", self.budget.bops, self._exact("bops")),
        }

    def _line(self, choices: LayerChoices, name: str) -> LayerLine:
        exact, taken, layer = choices.named(EXACT).costs, choices.named(name).costs, choices.layer
        error = taken["error"] ** (1 / self.adds)
        source = layer.readers[0].prov.source
        bits = 8 * layer.weight.dtype.itemsize
        return LayerLine(layer.name, source, name, int(taken["bytes"]), layer.nbytes, taken["time"], exact["time"], error, bits)

    def _front(self) -> tuple[Point, ...]:
        """None of a loss that no attempt taught anything of."""
        front = pareto([c.choices for c in self.choices], ("time", "bytes", "error"), points=FRONT_POINTS)
        others = self.exact_bytes - self._exact("bytes")
        errors = [self._predicted_error(p) for p in front.points]
        rows = zip(front.points, errors)
        return tuple(Point(self._predicted_seconds(p), p.costs["bytes"] + others, error) for p, error in rows if error is not None)


def optimize_within(
    model: Model, captured: CapturedModule, convention: CallingConvention, budget: Budget, place: Place, stage: Stages
) -> Optimized:
    """The model within the budget, `Spent` on its receipt. Raises CannotOptimize where nothing keeps the limits, and BadCalibration."""
    search = _Within(model, captured, convention, budget, place, stage)
    search.measure()
    with stage("choosing and verifying"):
        tried, allocation = search.run()
    with nullcontext() if place.measured else stage("building kernels"):
        made = tried.made.finished() if tried is not None else place.exact()
    return replace(made, receipt=replace(made.receipt, spent=search.spent(tried, allocation)), plan=search.plan(allocation))

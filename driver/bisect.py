"""`tilewright bisect`: which step between a captured graph and what runs makes its results wrong, in logarithmically many runs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch.utils._pytree import tree_leaves

from ..ir.capture import CapturedModule
from ..ir.errors import DeviceLost
from ..ir.graph import Graph, order
from ..passes.base import Pass, Step, describe
from ..search.metrics import METRICS
from .accuracy import ErrorCheck, check
from .calling import CallingConvention
from .errors import CannotOptimize, first_line
from .inputs import copied
from .ladder import CODEGEN, HOST, Ladder
from .loading import Model, captured_of
from .measure import EAGER_TRUST, apart, convention_for, flat_example
from .pipeline import passes_from
from .reproduce import FLOOR, Case, interpreted
from .shrink import smallest_case

Progress = Callable[[int, int], object]
"""Told how many runs are done, and of how many at most."""


@dataclass(frozen=True)
class Finding:
    """step: the first with which the results are wrong, None where they never are. runs: of the model, to find it, among `steps` steps.

    with_it, without: the errors in the states behind and before the step. failure: what it raised, if it did.
    case: what reproduces it alone.
    """

    runs: int
    steps: int
    with_it: ErrorCheck
    step: Step | None = None
    without: ErrorCheck | None = None
    failure: str = ""
    case: Case | None = None

    @property
    def fault(self) -> str:
        """The step in one line: pass, rule, node, source."""
        assert self.step is not None
        step = self.step
        kind = "kernel" if step.item == CODEGEN else "rule"
        rule = f", {kind} {step.rule}" if step.rule and step.rule != step.item else ""
        what = f" at {step.what}" if step.what else ": what it does to every graph"
        return f"{step.item}{rule}{what}{f' ({step.source})' if step.source else ''}"

    @property
    def summary(self) -> str:
        """What was found, in a few lines."""
        error = self.with_it
        if self.step is None:
            return f"nothing drifts: after all {self.steps} steps the results are off by {error.ours:.1e}; {error.allowed:.1e} is allowed"
        assert self.without is not None
        wrong = f"it fails: {self.failure}" if self.failure else f"results are off by {error.ours:.1e}"
        lines = [self.fault, f"  with it {wrong}; without, by {self.without.ours:.1e}; {self.without.allowed:.1e} is allowed"]
        lines.append(f"  found in {self.runs} runs among {self.steps} steps")
        if self.case is None:
            lines.append("  no reproducer: no part of the graph shows it by itself, and the whole is too large to write down")
        return "\n".join(lines)


def bisect_model(
    model: Model, passes: str | None = None, allowed: float | None = None, told: Progress = lambda done, total: None
) -> Finding:
    """Searches between the captured model and its program, on its example.

    passes: as on the command line. allowed: the relative error that results may have, beside the rule of `driver.accuracy`.
    Raises CannotOptimize where the model cannot be captured, ModelFails for an example that it is not for, and StageError.
    """
    chosen = passes_from(passes)
    captured = captured_of(model)
    convention = convention_for(model, captured)
    _require_same(model, captured, convention)
    return bisect_graph(captured.graph, chosen, flat_example(model, captured, convention), allowed, told)


def _require_same(model: Model, captured: CapturedModule, convention: CallingConvention) -> None:
    """What is captured must be the user's model: no step is to blame for what differs before the first."""
    inputs = flat_example(model, captured, convention)
    reference = interpreted(captured.graph, inputs, torch.float64)[: len(captured.graph.outputs)]
    with torch.no_grad():
        eager = apart(model, captured).module(*copied(model.example.args), **copied(dict(model.example.kwargs)))
    values, exact = ([x for x in tree_leaves(tree) if isinstance(x, torch.Tensor)] for tree in (eager, convention.pack(reference)))
    error = METRICS["relative"](values, exact)
    if error > EAGER_TRUST:
        reason = f"the captured graph does not compute what the model does (they differ by {error:.1e})"
        raise CannotOptimize(path=model.name, reason=reason)


def bisect_graph(
    graph: Graph,
    passes: Sequence[Pass],
    inputs: Sequence[Any],
    allowed: float | None = None,
    told: Progress = lambda done, total: None,
) -> Finding:
    """Searches the states of a graph for a step from right to wrong. Where errors come and go several steps may be one; it finds one."""
    ladder = Ladder(graph, passes)
    search = _Search(ladder, inputs, FLOOR if allowed is None else max(allowed, FLOOR), told)
    wrong = search.judged(len(ladder.steps))
    if wrong.ok:
        return Finding(search.runs, len(ladder.steps), wrong.error)
    good, bad, right = 0, len(ladder.steps), _Verdict(search.rule(search.eager))
    while bad - good > 1:
        middle = (good + bad) // 2
        verdict = search.judged(middle)
        if verdict.ok:
            good, right = middle, verdict
        else:
            bad, wrong = middle, verdict
    case = smallest_case(ladder, bad, inputs, search.allowed, bool(wrong.failure))
    return Finding(search.runs, len(ladder.steps), wrong.error, _named(ladder.steps[bad - 1], case), right.error, wrong.failure, case)


def _named(step: Step, case: Case | None) -> Step:
    """A step that stands for all library calls, by the one that was found to be wrong."""
    if step is not HOST or case is None or case.passes:
        return step
    node = order(case.graph(0))[-1]
    return replace(step, what=describe(node), source=node.prov.source)


@dataclass(frozen=True)
class _Verdict:
    """Of one run; failure: what it raised."""

    error: ErrorCheck
    failure: str = ""

    @property
    def ok(self) -> bool:
        return self.error.ok and not self.failure


class _Search:
    """Runs states and judges them by float64 and by the captured graph as it is, run op by op."""

    def __init__(self, ladder: Ladder, inputs: Sequence[Any], allowed: float, told: Progress) -> None:
        self.ladder, self.inputs, self.allowed, self.told = ladder, inputs, allowed, told
        self.reference = interpreted(ladder.graph, inputs, torch.float64)
        self.eager = interpreted(ladder.graph, inputs)
        self.runs = 0

    def rule(self, ours: Sequence[Any]) -> ErrorCheck:
        return check(ours, self.eager, self.reference, budget=self.allowed)

    def judged(self, state: int) -> _Verdict:
        self.told(self.runs, 1 + len(self.ladder.steps).bit_length())
        self.runs += 1
        try:
            if state == len(self.ladder.steps) and self.ladder.failure is not None:
                raise self.ladder.failure
            return _Verdict(self.rule(self.ladder.observed(state, self.inputs)))
        except DeviceLost:
            raise
        except Exception as error:  # a wrong rewrite may fail in any way, in the graph or in what it became
            return _Verdict(ErrorCheck(float("inf"), 0.0, self.allowed), f"{type(error).__name__}: {first_line(error)}")

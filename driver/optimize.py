"""`optimize`: a model in, a measured artifact and its receipt out."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import Any

import torch

from ..ir.capture import CapturedModule
from ..search.tuner import decide
from .activations import unlimited, within_activations
from .artifact import Optimized
from .budget import Budget
from .calling import CallingConvention
from .compile import Options, compile_graph
from .errors import BadOption
from .inputs import Example
from .loading import Model, captured_of, evaluating, export_module
from .measure import apart, convention_for, error_check, flat_example, timed, with_speed
from .outline import machine_of, outline
from .packing import with_packing
from .pipeline import passes_from
from .places import Elsewhere, Here
from .receipt import Trial
from .targets import FORETOLD, UNMEASURED, compile_for, interpreted, require_portable, require_target
from .tune import compile_tuned
from .within import optimize_within

TUNING_SECONDS = Options().tuning_seconds

Stages = Callable[[str], AbstractContextManager[Any]]


@evaluating
def optimize(
    model: torch.nn.Module,
    args: Sequence[Any] = (),
    kwargs: Mapping[str, Any] | None = None,
    *,
    dynamic: Mapping[str, Mapping[int, str]] | None = None,
    passes: str | None = None,
    tuning_seconds: float = TUNING_SECONDS,
    target: str | None = None,
    budget: Budget | None = None,
    remove_padding: bool = False,
    activations: str | float | None = None,
) -> Optimized:
    """Optimizes a module for inference on example arguments: exactly, or as far as a budget of error allows.

    dynamic: input name -> {dimension: symbol name} for sizes that may vary, e.g. {"x": {0: "batch"}}.
    passes: as on the command line; None runs the default list, and takes back what measuring shows not to gain.
    tuning_seconds: how long that may take (0: nothing is measured), beside compiling and the final checks.
    target: "sm_90", "gfx942": compile for such a GPU, which need not be here (`driver.targets`); the result can be saved, and loaded there.
    budget: limits, within which weights may be kept in fewer bits (`driver.budget`, `driver.within`).
    remove_padding: tokens that an attention mask says are padding are not computed, where that gains (`driver.padding`).
    activations: what intermediate values may take at a time, bytes, "2MB" or "30%": images are computed in patches (`driver.activations`).
    What of these does not go together is in APART.
    Raises CannotOptimize where the model cannot be exported or captured, or nothing keeps the budget.
    """
    if target is not None:
        require_target(target)
    example = Example(tuple(args), dict(kwargs or {}), {k: dict(v) for k, v in (dynamic or {}).items()})
    return optimize_model(
        export_module(type(model).__name__, model, example),
        passes,
        tuning_seconds=tuning_seconds,
        target=target,
        budget=budget,
        remove_padding=remove_padding,
        activations=activations,
    )


def optimize_model(
    model: Model,
    passes: str | None = None,
    stage: Stages = lambda name: nullcontext(),
    tuning_seconds: float = TUNING_SECONDS,
    target: str | None = None,
    budget: Budget | None = None,
    remove_padding: bool = False,
    activations: str | float | None = None,
) -> Optimized:
    """Captures, rewrites, generates, builds; then measures error against float64 and speed against eager on the model's example.

    For a target that is elsewhere, speed is not measured, and error only of the rewritten graph.
    """
    given = {"passes": passes, "target": target, "budget": budget, "remove_padding": remove_padding or None, "activations": activations}
    _check_together({name for name, value in given.items() if value is not None})
    options = Options(passes=passes, max_autotune=tuning_seconds > 0, tuning_seconds=tuning_seconds)
    with stage("capturing the graph"):
        captured = captured_of(model)
    convention = convention_for(model, captured)
    if target is not None:
        return outlined(_compiled_for(target, model, captured, convention, options, budget, stage), captured, stage)
    finishing = unlimited
    if activations is not None:
        with stage("looking for patches"):
            options, finishing = within_activations(captured.graph, options, activations)
    optimized = _compiled(model, captured, convention, options, stage)
    if remove_padding:
        with stage("leaving padding out"):
            optimized = with_packing(model, captured, optimized, options.tunes or budget is not None)
            optimized = with_speed(optimized, timed(apart(model, captured), ours=optimized), "ours")  # of the program that runs the example
    if budget is not None:
        place = Here(model, captured, optimized, finishing, remove_padding)
        optimized = optimize_within(model, captured, convention, budget, place, stage)
    if budget is None or budget.allowed_relative is not None:  # else it was verified by another metric
        with stage("checking against float64"):
            ours = replace(optimized, unpadded=None).with_own_state()  # which has what padding computes, too
            error = error_check(apart(model, captured), captured, convention, ours, budget and budget.allowed_relative)
        optimized = replace(optimized, receipt=replace(optimized.receipt, error=error))
    return outlined(optimized, captured, stage, options.tunes)


APART = {
    ("budget", "passes"): "it runs the default ones, with formats between them",
    ("remove_padding", "passes"): "rows are packed between the default ones",
    ("remove_padding", "target"): "when it gains is measured where it runs",
    ("remove_padding", "activations"): "rows without padding are not divided into patches",
    ("activations", "passes"): "patches come between the default ones; put split-space among yours",
    ("activations", "target"): "what kernels of a GPU hold is not foretold",
}
"""Options that do not go together, and why. All others do."""


def _check_together(given: Collection[str]) -> None:
    """Raises BadOption."""
    for (name, other), why in APART.items():
        if name in given and other in given:
            raise BadOption(option=name, reason=f"it does not go together with {other}: {why}; leave out one of the two")


def outlined(made: Optimized, captured: CapturedModule, stage: Stages, measure: bool = False) -> Optimized:
    """With both graphs in outline on the receipt, and, measured or of a data sheet, what the machine can do at most."""
    target, fallbacks = made.receipt.target, {f.node for f in made.receipt.fallbacks}
    with stage("measuring what the machine can do") if measure else nullcontext():
        machine = machine_of(made.graph, target) if target or measure else None
    receipt = replace(made.receipt, before=outline(captured.graph), after=outline(made.graph, fallbacks), machine=machine)
    return replace(made, receipt=receipt)


def _compiled_for(
    target: str,
    model: Model,
    captured: CapturedModule,
    convention: CallingConvention,
    options: Options,
    budget: Budget | None,
    stage: Stages,
) -> Optimized:
    """For a GPU that is not here: what has to run there is not measured."""
    require_portable(model.name, captured.graph, target)
    seconds = options.tuning_seconds if options.tunes else 0.0
    if budget is not None:
        made = optimize_within(model, captured, convention, budget, Elsewhere(target, model, captured, convention, seconds), stage)
    else:
        with stage(f"rewriting and building kernels for {target}"):
            found = compile_for(captured.graph, target, passes_from(options.passes), seconds)
        made = Optimized(found.graph, convention, found.program, found.receipt, captured.state, found.code)
    receipt = replace(made.receipt, target=target, unmeasured=UNMEASURED if budget is None else (*UNMEASURED, FORETOLD))
    if budget is None or budget.allowed_relative is not None:
        allowed = None if budget is None else budget.allowed_relative
        with stage("checking the rewritten graph against float64"):
            ours = interpreted(made.graph, convention, captured.state)
            receipt = replace(receipt, error=error_check(apart(model, captured), captured, convention, ours, allowed))
    return replace(made, receipt=receipt)


def _compiled(model: Model, captured: CapturedModule, convention: CallingConvention, options: Options, stage: Stages) -> Optimized:
    """Exactly, and no slower than eager."""
    with stage("rewriting, building kernels and measuring them" if options.tunes else "rewriting and building kernels"):
        if options.tunes:
            made = compile_tuned(captured.graph, options, flat_example(model, captured, convention))
        else:
            made = compile_graph(captured.graph, options)
    optimized = Optimized(made.graph, convention, made.program, made.receipt, captured.state)
    with stage("measuring speed against eager"):
        return _never_slower(apart(model, captured), captured, optimized, options)


def _never_slower(model: Model, captured: CapturedModule, optimized: Optimized, options: Options) -> Optimized:
    """The model with its speed against eager's on the receipt; op by op as eager does it, where that is faster than our kernels."""
    verdict = timed(model, ours=optimized)
    if not options.tunes or verdict.winner != "eager" or not optimized.program.kernels:
        return with_speed(optimized, verdict, "ours")
    made = compile_graph(captured.graph, options, passes=())
    plain = replace(optimized, graph=made.graph, program=made.program, receipt=made.receipt)
    verdict = timed(model, ours=optimized, plain=plain)
    timings = dict(verdict.timings)
    eager = timings.pop("eager")
    name = decide(timings, "ours")
    trial = Trial("all rewrites, against eager", name == "ours", timings["ours"].seconds, eager.seconds, eager.noise)
    chosen = optimized if trial.kept else plain
    receipt = replace(chosen.receipt, trials=(*optimized.receipt.trials, trial))
    return with_speed(replace(chosen, receipt=receipt), verdict, name)

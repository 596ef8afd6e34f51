"""`optimize`: a model in, a measured artifact and its receipt out."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import Any

import torch

from ..ir.capture import CapturedModule, from_exported
from ..ir.errors import CaptureError
from ..ir.interpret import interpret
from ..search.tuner import Verdict, decide, fastest
from .accuracy import ErrorCheck, check
from .artifact import Optimized
from .calling import CallingConvention, convention_of
from .compile import Compiled, Options, compile_graph
from .errors import CannotOptimize, ModelFails
from .inputs import Example, copied
from .loading import Model, export_module, with_own_buffers
from .receipt import Speed, Trial
from .targets import UNMEASURED, compile_for, interpreted, require_portable, require_target
from .tune import compile_tuned

EAGER_TRUST = 1e-2  # eager further than this from float64 means that the reference is not the user's model
MEASURE_SECONDS = 2.0
MEASURE_ROUNDS = 1000
TUNING_SECONDS = Options().tuning_seconds

Stages = Callable[[str], AbstractContextManager[Any]]


def optimize(
    model: torch.nn.Module,
    args: Sequence[Any] = (),
    kwargs: Mapping[str, Any] | None = None,
    *,
    dynamic: Mapping[str, Mapping[int, str]] | None = None,
    passes: str | None = None,
    tuning_seconds: float = TUNING_SECONDS,
    target: str | None = None,
) -> Optimized:
    """Optimizes a module for inference, exactly, on example arguments.

    dynamic: input name -> {dimension: symbol name} for sizes that may vary, e.g. {"x": {0: "batch"}}.
    passes: as on the command line; None runs the default list, and takes back what measuring shows not to gain.
    tuning_seconds: how long that may take (0: nothing is measured), beside compiling and the final checks.
    target: "sm_90", "gfx942": compile for such a GPU, which need not be here (`driver.targets`); the result can be saved, and loaded there.
    Raises CannotOptimize where the model cannot be exported or captured.
    """
    if target is not None:
        require_target(target)
    example = Example(tuple(args), dict(kwargs or {}), {k: dict(v) for k, v in (dynamic or {}).items()})
    return optimize_model(export_module(type(model).__name__, model, example), passes, tuning_seconds=tuning_seconds, target=target)


def optimize_model(
    model: Model,
    passes: str | None = None,
    stage: Stages = lambda name: nullcontext(),
    tuning_seconds: float = TUNING_SECONDS,
    target: str | None = None,
) -> Optimized:
    """Captures, rewrites, generates, builds; then measures error against float64 and speed against eager on the model's example.

    For a target that is elsewhere, speed is not measured, and error only of the rewritten graph.
    """
    options = Options(passes=passes, max_autotune=tuning_seconds > 0, tuning_seconds=tuning_seconds)
    with stage("capturing the graph"):
        captured = _captured(model)
    convention = replace(convention_of(model.program, captured), names=model.names)
    _require_fitting(model, captured, convention)
    if target is not None:
        return _compiled_for(target, model, captured, convention, options, stage)
    with stage("rewriting, building kernels and measuring them" if options.tunes else "rewriting and building kernels"):
        compiled = _compiled(model, captured, convention, options)
    optimized = Optimized(compiled.graph, convention, compiled.program, compiled.receipt, captured.state)
    with stage("measuring speed against eager"):
        optimized = _never_slower(_apart(model, captured), captured, optimized, options)
    with stage("checking against float64"):
        error = _error(_apart(model, captured), captured, convention, optimized.with_own_state())
    return replace(optimized, receipt=replace(optimized.receipt, error=error))


def _compiled_for(
    target: str, model: Model, captured: CapturedModule, convention: CallingConvention, options: Options, stage: Stages
) -> Optimized:
    """For a GPU that is not here: what has to run there is not measured."""
    require_portable(model.name, captured.graph, target)
    with stage(f"rewriting and building kernels for {target}"):
        made = compile_for(captured.graph, target, options.passes, options.tuning_seconds if options.tunes else 0.0)
    with stage("checking the rewritten graph against float64"):
        error = _error(_apart(model, captured), captured, convention, interpreted(made.graph, convention, captured.state))
    receipt = replace(made.receipt, error=error, target=target, unmeasured=UNMEASURED)
    return Optimized(made.graph, convention, made.program, receipt, captured.state, made.code)


def _compiled(model: Model, captured: CapturedModule, convention: CallingConvention, options: Options) -> Compiled:
    if not options.tunes:
        return compile_graph(captured.graph, options)
    flat = copied(convention.bind(model.example.args, dict(model.example.kwargs))) + _state(captured)
    return compile_tuned(captured.graph, options, flat)


def _apart(model: Model, captured: CapturedModule) -> Model:
    """Measuring runs the model, which may update its buffers: that happens on copies."""
    return replace(model, module=with_own_buffers(model.module)) if captured.state else model


def _state(captured: CapturedModule) -> list[torch.Tensor]:
    return [value.clone() for value in captured.state.values()]


def _never_slower(model: Model, captured: CapturedModule, optimized: Optimized, options: Options) -> Optimized:
    """The model with its speed against eager's on the receipt; op by op as eager does it, where that is faster than our kernels."""
    verdict = _timed(model, ours=optimized)
    if not options.tunes or verdict.winner != "eager" or not optimized.program.kernels:
        return _with_speed(optimized, verdict, "ours")
    made = compile_graph(captured.graph, options, passes=())
    plain = replace(optimized, graph=made.graph, program=made.program, receipt=made.receipt)
    verdict = _timed(model, ours=optimized, plain=plain)
    timings = dict(verdict.timings)
    eager = timings.pop("eager")
    name = decide(timings, "ours")
    trial = Trial("all rewrites, against eager", name == "ours", timings["ours"].seconds, eager.seconds, eager.noise)
    chosen = optimized if trial.kept else plain
    receipt = replace(chosen.receipt, trials=(*optimized.receipt.trials, trial))
    return _with_speed(replace(chosen, receipt=receipt), verdict, name)


def _timed(model: Model, **candidates: Optimized) -> Verdict:
    """Calls of eager and of the candidates on the example, in turn."""
    args, kwargs = model.example.args, model.example.kwargs
    runs: dict[str, Callable[..., Any]] = {name: made.with_own_state() for name, made in candidates.items()}
    runs["eager"] = model.module
    with torch.no_grad():
        calls = {name: functools.partial(run, *args, **kwargs) for name, run in runs.items()}
        return fastest(calls, "ours", MEASURE_SECONDS, MEASURE_ROUNDS, hopeless=math.inf)


def _with_speed(optimized: Optimized, verdict: Verdict, name: str) -> Optimized:
    speed = Speed(verdict.timings["eager"].seconds, verdict.timings[name].seconds, verdict.rounds)
    return replace(optimized, receipt=replace(optimized.receipt, speed=speed))


def _captured(model: Model) -> CapturedModule:
    try:
        return from_exported(model.program, model.name)
    except CaptureError as error:
        raise CannotOptimize(path=model.name, reason=error.fields["reason"]) from error


def _require_fitting(model: Model, captured: CapturedModule, convention: CallingConvention) -> None:
    """The example must be a call that the graph is for; raises ModelFails."""
    try:
        convention.checked(convention.bind(model.example.args, dict(model.example.kwargs)), captured.graph)
    except TypeError as error:
        raise ModelFails(path=model.name, inputs=model.example.described(), reason=error) from error


def _error(model: Model, captured: CapturedModule, convention: CallingConvention, ours: Callable[..., Any]) -> ErrorCheck:
    """By the float64 rule on the example; ours: called as the model is. The reference is the captured graph, interpreted in float64; that
    it is the user's model is seen from eager being near it."""
    args, kwargs = copied(model.example.args), copied(dict(model.example.kwargs))
    flat = copied(convention.bind(args, kwargs)) + [captured.state[name] for name in convention.state]
    with torch.no_grad():
        reference = convention.pack(interpret(captured.graph, copied(flat), torch.float64))
        eager = model.module(*copied(args), **copied(kwargs))
    result = check(ours(*args, **kwargs), eager, reference)
    if result.eager > EAGER_TRUST:
        reason = f"the captured graph does not compute what the model does (they differ by {result.eager:.1e})"
        raise CannotOptimize(path=model.name, reason=reason)
    if not result.ok:
        reason = f"the result would be off by {result.ours:.1e} where {result.allowed:.1e} is allowed; please report this model"
        raise CannotOptimize(path=model.name, reason=reason)
    return result

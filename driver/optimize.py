"""`optimize`: a model in, a measured artifact and its receipt out."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import Any

import torch

from ..ir.capture import CapturedModule, from_exported
from ..ir.errors import CaptureError
from ..ir.interpret import interpret
from .accuracy import ErrorCheck, check
from .artifact import Optimized
from .calling import CallingConvention, convention_of
from .compile import Options, compile_graph
from .errors import CannotOptimize, ModelFails
from .inputs import Example, copied
from .loading import Model, export_module, with_own_buffers
from .receipt import Speed

EAGER_TRUST = 1e-2  # eager further than this from float64 means that the reference is not the user's model
MEASURE_SECONDS = 2.0

Stages = Callable[[str], AbstractContextManager[Any]]


def optimize(
    model: torch.nn.Module,
    args: Sequence[Any] = (),
    kwargs: Mapping[str, Any] | None = None,
    *,
    dynamic: Mapping[str, Mapping[int, str]] | None = None,
    passes: str | None = None,
) -> Optimized:
    """Optimizes a module for inference, exactly, on example arguments.

    dynamic: input name -> {dimension: symbol name} for sizes that may vary, e.g. {"x": {0: "batch"}}.
    passes: as on the command line; None runs the default list.
    Raises CannotOptimize where the model cannot be exported or captured.
    """
    example = Example(tuple(args), dict(kwargs or {}), {k: dict(v) for k, v in (dynamic or {}).items()})
    return optimize_model(export_module(type(model).__name__, model, example), passes)


def optimize_model(model: Model, passes: str | None = None, stage: Stages = lambda name: nullcontext()) -> Optimized:
    """Captures, rewrites, generates, builds; then measures error against float64 and speed against eager on the model's example."""
    with stage("capturing the graph"):
        captured = _captured(model)
    with stage("rewriting and building kernels"):
        compiled = compile_graph(captured.graph, Options(passes=passes))
    convention = replace(convention_of(model.program, captured), names=model.names)
    _require_fitting(model, captured, convention)
    # measuring runs the model, which may update its buffers: that happens on copies
    scratch = {name: value.clone() for name, value in captured.state.items()}
    optimized = Optimized(compiled.graph, convention, compiled.program, compiled.receipt, scratch)
    model = replace(model, module=with_own_buffers(model.module)) if captured.state else model
    with stage("checking against float64"):
        error = _error(model, captured, optimized)
    with stage("measuring speed against eager"):
        speed = _speed(model, optimized)
    return replace(optimized, receipt=replace(compiled.receipt, error=error, speed=speed), state=captured.state)


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


def _error(model: Model, captured: CapturedModule, optimized: Optimized) -> ErrorCheck:
    """By the float64 rule on the example. The reference is the captured graph, interpreted in float64; that it is the user's model is
    seen from eager being near it."""
    args, kwargs = copied(model.example.args), copied(dict(model.example.kwargs))
    convention = optimized.convention
    flat = copied(convention.bind(args, kwargs)) + [captured.state[name] for name in convention.state]
    with torch.no_grad():
        reference = convention.pack(interpret(captured.graph, copied(flat), torch.float64))
        eager = model.module(*copied(args), **copied(kwargs))
    result = check(optimized(*args, **kwargs), eager, reference)
    if result.eager > EAGER_TRUST:
        reason = f"the captured graph does not compute what the model does (they differ by {result.eager:.1e})"
        raise CannotOptimize(path=model.name, reason=reason)
    if not result.ok:
        reason = f"the result would be off by {result.ours:.1e} where {result.allowed:.1e} is allowed; please report this model"
        raise CannotOptimize(path=model.name, reason=reason)
    return result


def _speed(model: Model, optimized: Optimized) -> Speed:
    """Median seconds per call of eager and ours, called alternately on the example."""
    args, kwargs = model.example.args, model.example.kwargs
    times: tuple[list[float], list[float]] = ([], [])
    with torch.no_grad():
        deadline = time.perf_counter() + MEASURE_SECONDS
        while len(times[0]) < 5 or (time.perf_counter() < deadline and len(times[0]) < 1000):
            for run, record in zip((model.module, optimized), times):
                begin = time.perf_counter()
                run(*args, **kwargs)
                record.append(time.perf_counter() - begin)
    return Speed(eager=statistics.median(times[0]), ours=statistics.median(times[1]), runs=len(times[0]))

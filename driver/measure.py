"""Measuring an optimized model beside the original: speed, and error against float64, on copies of what the model updates."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch

from ..ir.capture import CapturedModule
from ..ir.interpret import interpret
from ..search.repeated import from_the_start, updated
from ..search.tuner import Run, Verdict, fastest
from .accuracy import ErrorCheck, check
from .artifact import Optimized
from .calling import CallingConvention, convention_of
from .errors import CannotOptimize, ModelFails
from .inputs import Example, copied
from .loading import Model, with_own_buffers
from .receipt import Speed

EAGER_TRUST = 1e-2  # eager further than this from float64 means that the reference is not the user's model
MEASURE_SECONDS = 2.0
MEASURE_ROUNDS = 1000


def apart(model: Model, captured: CapturedModule) -> Model:
    """Measuring runs the model, which may update its buffers: that happens on copies."""
    return replace(model, module=with_own_buffers(model.module)) if captured.state else model


def convention_for(model: Model, captured: CapturedModule) -> CallingConvention:
    """How the model is called. Raises ModelFails where its example is no call that the graph is for."""
    convention = replace(convention_of(model.program, captured), names=model.names)
    try:
        convention.checked(convention.bind(model.example.args, dict(model.example.kwargs)), captured.graph)
    except TypeError as error:
        raise ModelFails(path=model.name, inputs=model.example.described(), reason=error) from error
    return convention


def flat_example(model: Model, captured: CapturedModule, convention: CallingConvention) -> list[Any]:
    """The example as the graph takes it, copied, with what the model updates."""
    return flattened(convention, captured, model.example.args, dict(model.example.kwargs))


def flattened(convention: CallingConvention, captured: CapturedModule, args: Sequence[Any], kwargs: dict[str, Any]) -> list[Any]:
    """Arguments as the graph takes them, copied, with what the model updates."""
    return copied(convention.bind(tuple(args), kwargs)) + [captured.state[name].clone() for name in convention.state]


def timed(model: Model, **candidates: Optimized) -> Verdict:
    """Calls of eager and of the candidates on the example, in turn."""
    buffers = dict(model.module.named_buffers())
    made = {name: candidate.with_own_state() for name, candidate in candidates.items()}
    ours = made["ours"]
    calls = {name: _repeated(each, ours, model.example, each.state) for name, each in made.items()}
    calls["eager"] = _repeated(model.module, ours, model.example, {name: buffers.get(name) for name in ours.convention.state})
    with torch.no_grad():
        return fastest(calls, "ours", MEASURE_SECONDS, MEASURE_ROUNDS, hopeless=math.inf)


def _repeated(run: Callable[..., Any], like: Optimized, example: Example, state: Mapping[str, Any]) -> Run:
    """Calls on the example of what is called, and updates its arguments and state, as the optimized model does."""
    args, kwargs = example.args, dict(example.kwargs)
    inputs = [*like.convention.bind(args, kwargs), *(state[name] for name in like.convention.state)]
    return from_the_start(functools.partial(run, *args, **kwargs), updated(like.graph, inputs))


def with_speed(optimized: Optimized, verdict: Verdict, name: str) -> Optimized:
    speed = Speed(verdict.timings["eager"].seconds, verdict.timings[name].seconds, verdict.rounds)
    return replace(optimized, receipt=replace(optimized.receipt, speed=speed))


def error_check(
    model: Model, captured: CapturedModule, convention: CallingConvention, ours: Callable[..., Any], allowed: float | None = None
) -> ErrorCheck:
    """By the float64 rule on the example; ours: called as the model is. allowed: a budget for more than rounding.

    The reference is the captured graph, interpreted in float64; that it is the user's model is seen from eager being near it.
    Raises CannotOptimize.
    """
    args, kwargs = copied(model.example.args), copied(dict(model.example.kwargs))
    with torch.no_grad():
        reference = convention.pack(interpret(captured.graph, flattened(convention, captured, args, kwargs), torch.float64))
        eager = model.module(*copied(args), **copied(kwargs))
    result = check(ours(*args, **kwargs), eager, reference, **({} if allowed is None else {"budget": allowed}))
    if result.eager > EAGER_TRUST:
        reason = f"the captured graph does not compute what the model does (they differ by {result.eager:.1e})"
        raise CannotOptimize(path=model.name, reason=reason)
    if not result.ok:
        reason = f"the result would be off by {result.ours:.1e} where {result.allowed:.1e} is allowed; please report this model"
        raise CannotOptimize(path=model.name, reason=reason)
    return result

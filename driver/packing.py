"""Leaving padding out of an optimized model: compiled, checked against float64, and measured to know when it gains."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch

from ..ir.capture import CapturedModule
from ..ir.interpret import interpret
from ..passes.base import Notes
from ..passes.remove_padding import LAST
from ..search.tuner import fastest
from .accuracy import ErrorCheck, check
from .artifact import Optimized
from .compile import Options
from .errors import CannotOptimize
from .loading import Model
from .measure import flat_example
from .packed import compile_packed, plan_without_padding
from .padding import WithoutPadding, layout_of
from .receipt import Trial, make_receipt

MEASURE_SECONDS = 1.0
MARGIN = 0.97
"""Packing must gain so much on what was measured."""
MEASURED = "padding left out, where there is none"


def with_packing(model: Model, captured: CapturedModule, optimized: Optimized, options: Options) -> Optimized:
    """The model with a program beside it that leaves padding out; without one, and with the reason on the receipt, where it cannot.

    Raises CannotOptimize where that program errs by more than the float64 rule allows.
    """
    notes = Notes()
    plan = plan_without_padding(captured.graph, options, notes)
    told = make_receipt(optimized.program, notes, {})
    receipt = optimized.receipt
    receipt = replace(receipt, applied=(*receipt.applied, *told.applied), refused=(*receipt.refused, *told.refused))
    if plan is None:
        return replace(optimized, receipt=receipt)
    made = compile_packed(plan, options, optimized.graph)
    inputs = flat_example(model, captured, optimized.convention)
    error = packed_error(captured, made, inputs)
    if not error.ok:
        off = f"off by {error.ours:.1e} where {error.allowed:.1e} is allowed"
        raise CannotOptimize(path=model.name, reason=f"without padding the result would be {off}; please report this model")
    if options.tunes:
        made, trial = _measured(made, optimized, inputs)
        receipt = replace(receipt, trials=(*receipt.trials, trial))
    return replace(optimized, unpadded=made, receipt=receipt)


def packed_error(captured: CapturedModule, made: WithoutPadding, inputs: Sequence[Any]) -> ErrorCheck:
    """By the float64 rule, at tokens that are no padding, for sequences of all lengths; the graph may overwrite the inputs."""
    mask = _mask_of_lengths(inputs[made.plan.mask], made, left=LAST in made.plan.present)
    given = [mask if i == made.plan.mask else x for i, x in enumerate(inputs)]
    present = mask != made.plan.padding
    with torch.no_grad():
        eager, exact = (interpret(captured.graph, _copied(given), dtype) for dtype in (None, torch.float64))
        ours = made.program.run([*_copied(given), *(torch.from_numpy(x).to(mask.device) for x in layout_of(present.cpu().numpy()))])
    theirs, reference = ([_at_tokens(x, dims, present) for x, dims in zip(xs, made.plan.spread)] for xs in (eager, exact))
    return check(ours[: len(reference)], theirs, reference)


def _copied(inputs: Sequence[Any]) -> list[Any]:
    return [x.clone() if isinstance(x, torch.Tensor) else x for x in inputs]


def _mask_of_lengths(mask: torch.Tensor, made: WithoutPadding, left: bool) -> torch.Tensor:
    """A mask like this one of sequences of 1 to all tokens."""
    batch, length = mask.shape
    count = torch.linspace(1, length, batch).round().flip(0)[:, None]
    at = torch.arange(length)
    present = at >= length - count if left else at < count
    return (present ^ bool(made.plan.padding)).to(mask.device, mask.dtype)


def _at_tokens(x: Any, dims: tuple[int, int] | None, present: torch.Tensor) -> Any:
    """A result with zeros where padding stood."""
    if dims is None or not isinstance(x, torch.Tensor):
        return x
    batch, tokens = dims
    there = present.t() if tokens < batch else present.reshape(-1) if tokens == batch else present
    shape = [1] * x.dim()
    for d in dims:
        shape[d] = x.shape[d]
    return torch.where(there.reshape(shape), x, torch.zeros((), dtype=x.dtype, device=x.device))


def _measured(made: WithoutPadding, optimized: Optimized, inputs: Sequence[Any]) -> tuple[WithoutPadding, Trial]:
    """With the share of tokens below which it gains: time is thought to follow the rows, and to be that of all tokens for all of them."""
    mask = torch.full_like(inputs[made.plan.mask], 1 - made.plan.padding)
    full = [mask if i == made.plan.mask else x for i, x in enumerate(inputs)]
    layout = [torch.from_numpy(x).to(mask.device) for x in layout_of((mask != made.plan.padding).cpu().numpy())]
    calls = {"padded": lambda: optimized.program.run(list(full)), "packed": lambda: made.program.run([*full, *layout])}
    with torch.no_grad():
        timings = fastest(calls, "padded", MEASURE_SECONDS).timings
    padded, packed = timings["padded"], timings["packed"]
    below = min(MARGIN, MARGIN * padded.seconds / packed.seconds)
    return replace(made, pays_below=below), Trial(MEASURED, True, packed.seconds, padded.seconds, packed.noise)

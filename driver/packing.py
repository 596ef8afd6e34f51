"""Leaving padding out of an optimized model: compiled, checked against float64, and measured to know when it gains."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch

from ..ir.capture import CapturedModule
from ..ir.graph import Graph, order
from ..ir.interpret import interpret
from ..passes.base import Notes
from ..passes.remove_padding import LAST, without_padding
from ..search.metrics import METRICS
from ..search.tuner import fastest
from .accuracy import ErrorCheck, check
from .artifact import Optimized
from .compile import Options
from .errors import CannotOptimize
from .inputs import copied
from .loading import Model
from .measure import flat_example
from .packed import compile_packed, plan_without_padding
from .padding import WithoutPadding, layout_of, rows_at
from .receipt import Trial, make_receipt

MEASURE_SECONDS = 1.0
MARGIN = 0.97
"""Packing must gain so much on what was measured."""
MEASURED = "padding left out, where there is none"

RELATIVE, TINY = METRICS["relative"], 1e-6
"""How errors are told, and one that is not looked at."""

OTHER_CODES = 0.1
"""Inputs that lie between two codes may be rounded either way: so much of what rounding does to the results is chance."""


def with_packing(model: Model, captured: CapturedModule, optimized: Optimized, measure: bool, formatted: Graph | None = None) -> Optimized:
    """The model with a program beside it that leaves padding out; without one, and with the reason on the receipt, where it cannot.

    measure: how much padding there has to be, rather than assume it. formatted: the graph with its weights in the formats of a budget,
    before layouts and kernels are decided: that is then what is to be computed, and not once more in how far it is the model.
    Raises CannotOptimize where that program errs by more than the float64 rule allows.
    """
    notes = Notes()
    plan = plan_without_padding(captured.graph, Options(), notes) if formatted is None else without_padding(formatted, notes)
    told = make_receipt(optimized.program, notes, {})
    receipt = optimized.receipt
    receipt = replace(receipt, applied=(*receipt.applied, *told.applied), refused=(*receipt.refused, *told.refused))
    if plan is None:
        return replace(optimized, receipt=receipt)
    made = compile_packed(plan, Options(), optimized.graph)
    inputs = flat_example(model, captured, optimized.convention)
    error = packed_error(captured.graph, formatted, made, inputs)
    if not error.ok:
        off = f"off by {error.ours:.1e} where {error.allowed:.1e} is allowed"
        raise CannotOptimize(path=model.name, reason=f"without padding the result would be {off}; please report this model")
    if measure:
        made, trial = _measured(made, optimized, inputs)
        receipt = replace(receipt, trials=(*receipt.trials, trial))
    return replace(optimized, unpadded=made, receipt=receipt)


def packed_error(captured: Graph, formatted: Graph | None, made: WithoutPadding, inputs: Sequence[Any]) -> ErrorCheck:
    """By the float64 rule, for sequences of all lengths: what the graph computes at tokens, zeros where padding stands."""
    mask = _mask_of_lengths(inputs[made.plan.mask], made, left=LAST in made.plan.present)
    given = [mask if i == made.plan.mask else x for i, x in enumerate(inputs)]
    present = mask != made.plan.padding
    layout = [torch.from_numpy(x).to(mask.device) for x in layout_of(present.cpu().numpy())]
    meant = captured if formatted is None else formatted
    with torch.no_grad():
        eager, reference = (interpret(meant, copied(given), dtype) for dtype in (None, torch.float64))
        ours = made.program.run([*copied(given), *layout])
        tiny = TINY
        if any(n.op.name == "quantize_rows" for n in order(meant)):
            exact = interpret(captured, copied(given), torch.float64)
            tiny += OTHER_CODES * RELATIVE(made.at_tokens(given, reference), made.at_tokens(given, exact))
    padding = [rows_at(x, dims, ~present) for x, dims in zip(ours, made.plan.spread) if dims is not None]
    zeros = [torch.zeros_like(x) for x in padding]
    ours, eager, reference = (made.at_tokens(given, xs) for xs in (ours, eager, reference))
    return check(ours + padding, eager + zeros, reference + zeros, budget=tiny)


def _mask_of_lengths(mask: torch.Tensor, made: WithoutPadding, left: bool) -> torch.Tensor:
    """A mask like this one of sequences of 1 to all tokens."""
    batch, length = mask.shape
    count = torch.linspace(1, length, batch).round().flip(0)[:, None]
    at = torch.arange(length)
    present = at >= length - count if left else at < count
    return (present ^ bool(made.plan.padding)).to(mask.device, mask.dtype)


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

"""The rule of correctness: err(optimized, float64) <= max(k * err(eager, float64), budget)."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils import _pytree as pytree

from ..search.metrics import relative_error

TIMES_EAGER = 4.0
"""So much more than eager's error may ours be: it allows for another order of summation."""


@dataclass(frozen=True)
class ErrorCheck:
    """Relative Frobenius errors against float64, worst output: `ours` and `eager`; `allowed` is what the rule permits `ours` to be."""

    ours: float
    eager: float
    allowed: float

    @property
    def ok(self) -> bool:
        return self.ours <= self.allowed


def check(ours: Any, eager: Any, reference: Any, k: float = TIMES_EAGER, budget: float = 1e-6) -> ErrorCheck:
    """The rule over all tensors of three equal pytrees of outputs; the output nearest to breaking it is reported.

    budget is the floor below which rounding is not looked at (float32 outputs).
    """
    worst: ErrorCheck | None = None
    for a, b, r in zip(_tensors(ours), _tensors(eager), _tensors(reference), strict=True):
        error = relative_error(b, r)
        one = ErrorCheck(relative_error(a, r), error, max(k * error, budget))
        if worst is None or _margin(one) > _margin(worst):
            worst = one
    return worst or ErrorCheck(0.0, 0.0, budget)


def _margin(check: ErrorCheck) -> float:
    return check.ours / check.allowed


def _tensors(tree: Any) -> list[torch.Tensor]:
    return [x for x in pytree.tree_leaves(tree) if isinstance(x, torch.Tensor)]


def to_double(tree: Any) -> Any:
    """The same inputs with floating-point tensors in float64."""
    return pytree.tree_map(lambda x: x.double() if isinstance(x, torch.Tensor) and x.is_floating_point() else x, tree)


def reference_outputs(model: torch.nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any] | None = None) -> Any:
    """What a float64 copy of the model returns."""
    double = copy.deepcopy(model).double()
    with torch.no_grad():
        return double(*to_double(tuple(args)), **to_double(dict(kwargs or {})))

"""Tables of pairs: what came of each, in a cell, and below them why some are not done."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable
from dataclasses import dataclass

EXACT = 1e-7
"""Relative error in float64 of what computes the same function; some sums, such as those over processes, are ATen's, in float32."""


@dataclass(frozen=True)
class Outcome:
    """error: relative, in float64, to the model as it was; allowed: how large it may be. refused: why one of the two is not done."""

    error: float = 0.0
    allowed: float = EXACT
    refused: str = ""


def table(corner: str, names: Iterable[str], pair: Callable[[str, str], Outcome]) -> str:
    """The matrix of all pairs in words."""
    names, reasons = list(names), dict[str, int]()
    cells = {both: _cell(pair(*both), reasons) for both in itertools.combinations(names, 2)}
    rows = [f"| **{first}** | {' | '.join(cells.get((first, second), '') for second in names)} |" for first in names]
    notes = [f"{number}. {reason}" for reason, number in reasons.items()]
    return "\n".join([f"| {corner} | {' | '.join(names)} |", f"|---|{'---|' * len(names)}", *rows, "", "Why not:", "", *notes, ""])


def _cell(found: Outcome, reasons: dict[str, int]) -> str:
    if found.refused:
        return f"[{reasons.setdefault(found.refused, len(reasons) + 1)}]"
    return "=" if found.allowed == EXACT else f"{100 * found.error:.2g}%"

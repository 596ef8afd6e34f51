"""`Space`: the schedules that a template offers for a kernel, as data - variables with their values, and limits over them.

    block_m in 16 32 64 128, block_k in 16 32 64, stages in 1 2 3 4
    operand blocks fit shared memory:  2*stages*block_k*(block_m + 128) <= 232448

`search/tiles.py` enumerates what keeps all limits.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from ..ir.dims import Dim, evaluate, to_source


@dataclass(frozen=True)
class Limit:
    """amount <= at_most, both integer expressions over variables; that b divides a is `Mod(a, b) <= 0`. name: the sentence a user reads."""

    name: str
    amount: Dim
    at_most: Dim = 0

    def __str__(self) -> str:
        return f"{self.name}: {to_source(self.amount)} <= {to_source(self.at_most)}"


@dataclass(frozen=True)
class Space:
    """variables: name -> the values it may take, each >= 0."""

    variables: Mapping[str, tuple[int, ...]]
    limits: tuple[Limit, ...] = ()

    def broken(self, values: Mapping[str, int]) -> Limit | None:
        """The first limit that a schedule breaks; None where it is legal. Raises KeyError where a variable is missing."""
        return next((x for x in self.limits if evaluate(x.amount, values) > evaluate(x.at_most, values)), None)

    def refusal(self, values: Mapping[str, int]) -> str | None:
        """Why a schedule is not legal: a value that is not offered, or the first limit that it breaks; None where it is."""
        for name, offered in self.variables.items():
            if values[name] not in offered:
                return f"{name} is one of {', '.join(map(str, offered))}, not {values[name]}"
        limit = self.broken(values)
        return None if limit is None else str(limit)

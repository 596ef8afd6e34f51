"""One choice per layer: the least of one cost within limits on others, proved, and never above a limit.

    allocate(layers, minimize="error", limits={"bytes": 5e6}, ties=[(4, 6)])

Source: "HAWQ-V3: Dyadic Neural Network Quantization" (Yao et al., 2021), whose program has these costs, limits and ties; interactions as in
"IMPQ" (Zhao et al., 2025). What is our own: sums are exact, so that a limit is kept to the last bit and may be met exactly.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction

from ..ir.errors import TilewrightError
from .problem import AllocationError, Choice, Interactions, Picks, Problem, check_number, make_problem, rounded
from .solve import Limits, Solution, least_excess, solve

__all__ = ["Allocation", "AllocationError", "Choice", "Infeasible", "allocate"]


@dataclass(frozen=True)
class Allocation:
    """choices: one per layer, in order. objective: the cost that was minimized, added up in floats (`math.fsum`).

    bound: proved, no allocation within the limits has less; at most the objective. prices: for each limit, by how much the objective of
    the linear relaxation falls with one more unit of it - its dual, never negative, 0 where the limit does not bind. The true optimum
    falls in steps around this slope. costs: the totals of all costs that every choice taken has.
    """

    choices: tuple[Choice, ...]
    objective: float
    bound: float
    prices: Mapping[str, float]
    costs: Mapping[str, float]

    @property
    def names(self) -> tuple[str, ...]:
        """Of the choices; what `forbidden` wants."""
        return tuple(choice.name for choice in self.choices)


class Infeasible(TilewrightError):
    """limits: a smallest set of limits that no allocation keeps together; empty where all allocations are forbidden.

    nearest: the allocation with the least excess over limits, each relative to the limit, summed; None where all are forbidden.
    needed: to what the limits must be raised for it, only those that must.
    """

    template = "no allocation keeps {reason}"

    def __init__(self, limits: Mapping[str, float], nearest: Allocation | None, needed: Mapping[str, float]) -> None:
        super().__init__(reason=_reason(limits, needed))
        self.limits, self.nearest, self.needed = dict(limits), nearest, dict(needed)


def _reason(limits: Mapping[str, float], needed: Mapping[str, float]) -> str:
    if not limits:
        return "what is asked for: each one is forbidden"
    kept = " and ".join(f"{name} <= {limit:g}" for name, limit in limits.items()) + (" together" if len(limits) > 1 else "")
    return f"{kept}; the nearest one has {' and '.join(f'{name} {value:g}' for name, value in needed.items())}"


def allocate(
    layers: Sequence[Sequence[Choice]],
    minimize: str = "error",
    limits: Mapping[str, float] | None = None,
    ties: Iterable[Sequence[int]] = (),
    interactions: Interactions | None = None,
    forbidden: Iterable[Sequence[str]] = (),
) -> Allocation:
    """For each layer one of its choices, of least total `minimize`, each total in `limits` at most the limit.

    Costs have any names and units, and may be negative. ties: sets of layers that take choices of the same name; sets that meet are one.
    interactions: (layer, name, other layer, name) -> what taking both adds: to the cost that is minimized, or to several, {cost: value}.
    forbidden: allocations not to return, as names, one per layer.

    Raises AllocationError where the question is wrong, Infeasible where no allocation keeps the limits.
    """
    asked = {name: check_number(limit, f"the limit on {name}") for name, limit in (limits or {}).items()}
    problem = make_problem(layers, [minimize, *asked], minimize, ties, interactions, forbidden)
    return optimum(problem, minimize, asked)


def optimum(problem: Problem, minimize: str, limits: Mapping[str, float]) -> Allocation:
    """What `allocate` returns for a problem."""
    objective, rows = problem.row({minimize: Fraction(1)}), exact_limits(problem, limits)
    found = solve(problem, objective, rows)
    if found is None:
        raise infeasible(problem, minimize, limits)
    return allocation(problem, minimize, rows, found, limits)


def exact_limits(problem: Problem, limits: Mapping[str, float]) -> Limits:
    """In units. What is infinite is no limit."""
    rows = {name: problem.row({name: Fraction(1)}) for name, limit in limits.items() if limit < math.inf}
    return {name: (row, row.within(limits[name])) for name, row in rows.items()}


def allocation(problem: Problem, minimize: str, rows: Limits, found: Solution, limits: Iterable[str]) -> Allocation:
    """In the units of the costs."""
    objective, totals = problem.row({minimize: Fraction(1)}), _totals(problem, found.picks, [minimize, *limits])
    prices = {name: rounded(found.prices[name] * objective.unit / rows[name][0].unit) if name in rows else 0.0 for name in limits}
    bound = below(found.bound * objective.unit) if problem.units(objective, found.picks) > found.bound else totals[minimize]
    return Allocation(problem.choices(found.picks), totals[minimize], min(bound, totals[minimize]), prices, totals)


def below(value: Fraction) -> float:
    """The nearest float that is not more."""
    nearest = rounded(value)
    return math.nextafter(nearest, -math.inf) if nearest > value else nearest


def _totals(problem: Problem, picks: Picks, used: Iterable[str]) -> dict[str, float]:
    choices = problem.choices(picks)
    common = [cost for cost in (choices[0].costs if choices else ()) if all(cost in choice.costs for choice in choices)]
    return {cost: problem.total(cost, picks) for cost in dict.fromkeys([*used, *common])}


def infeasible(problem: Problem, minimize: str, limits: Mapping[str, float]) -> Infeasible:
    """Says which limits are too low, and by how much."""
    rows = exact_limits(problem, limits)
    nearest = least_excess(problem, rows)
    if nearest is None:
        return Infeasible({}, None, {})
    raised = {name: max(limits[name], problem.total(name, nearest)) for name in rows}
    found = optimum(problem, minimize, raised)
    needed = {name: found.costs[name] for name in rows if found.costs[name] > limits[name]}
    return Infeasible({name: limits[name] for name in _conflict(problem, rows)}, found, needed)


def _conflict(problem: Problem, rows: Limits) -> tuple[str, ...]:
    """A smallest set of limits that rule out everything."""
    nothing = problem.row({})
    sets = (names for size in range(1, len(rows)) for names in itertools.combinations(rows, size))
    return next((names for names in sets if solve(problem, nothing, {n: rows[n] for n in names}) is None), tuple(rows))

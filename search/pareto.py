"""The Pareto front of several costs: allocations of which none is worse than another in every cost.

A front begins with the least of each cost. What may still be found lies in *zones*: sets of limits, one per cost, that no point known
keeps. The widest zone is searched with the other costs limited to its middle, then all of it, for the least of the first cost (and, by a
small weight, of the others: so nothing is better in every cost). The point found splits the zones it lies in; a zone without a solution
goes. When no zone is left, the front is complete.
Source: "On the representation of the search region in multi-objective optimization" (Klamroth, Lacour, Vanderpooten, 2015).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction

from .allocate import Allocation, allocation, below, exact_limits, infeasible
from .problem import AllocationError, Choice, Interactions, Problem, Row, check_number, make_problem
from .solve import Solution, prices, solve

__all__ = ["Front", "pareto"]

LEAD = 1024
"""What the first cost counts more than others, all relative to their ranges: little else decides where the others are limited."""

Zone = tuple[float, ...]
"""The most of each cost."""


@dataclass(frozen=True)
class Front:
    """points: from the least of the first cost on. complete: there are no others; else they are a sample, spread over the front.

    The `prices` of a point say, for each of the other costs, by how much the first falls with one more unit of it; see `Allocation`.
    """

    points: tuple[Allocation, ...]
    complete: bool


def pareto(
    layers: Sequence[Sequence[Choice]],
    costs: Sequence[str] = ("time", "bytes", "error"),
    limits: Mapping[str, float] | None = None,
    ties: Iterable[Sequence[int]] = (),
    interactions: Interactions | None = None,
    forbidden: Iterable[Sequence[str]] = (),
    points: int = 32,
) -> Front:
    """The front of costs within limits: all of it where it has at most so many points, else so many. The rest is as in `allocate`.

    Interactions that do not name a cost add to the first. Raises AllocationError and Infeasible.
    """
    if not costs or len(set(costs)) < len(costs):
        raise AllocationError(reason=f"a front wants costs that differ, not {', '.join(costs) or 'none'}")
    asked = {name: check_number(limit, f"the limit on {name}") for name, limit in (limits or {}).items()}
    problem = make_problem(layers, [*costs, *asked], costs[0], ties, interactions, forbidden)
    return _Search(problem, tuple(costs), asked).front(points)


class _Search:
    """points: the costs found, and how. least, most: of each cost, on the whole front.

    zones: where other points may be, each with the points it ends at, one per cost; `least` stands for none.
    """

    def __init__(self, problem: Problem, costs: tuple[str, ...], limits: Mapping[str, float]) -> None:
        self.problem, self.costs, self.limits = problem, costs, limits
        self.points: dict[Zone, Solution] = {}
        self.whole: Zone = tuple(limits.get(cost, math.inf) for cost in costs)
        rows = [problem.row({cost: Fraction(1)}) for cost in costs]
        found = [self._solve(row, self.whole) for row in rows]
        if None in found:
            raise infeasible(problem, costs[0], limits)
        self.ends = [end for end in found if end is not None]
        self.least = tuple(below(end.bound * row.unit) for end, row in zip(self.ends, rows))
        self.most = tuple(map(max, zip(*(self._totals(end) for end in self.ends))))
        self.zones: dict[Zone, tuple[Zone, ...]] = {self.whole: (self.least,) * len(costs)}
        # powers of two, so that the sum is exact as well
        self.weights = [Fraction(2) ** -math.frexp(most - least)[1] for least, most in zip(self.least, self.most)]
        self.weights[0] *= LEAD
        self.sum = problem.row(dict(zip(costs, self.weights)))

    def front(self, most: int) -> Front:
        for k, end in enumerate(self.ends[:most]):
            self._add(self._solve(self.sum, _lowered(self.whole, k, self._totals(end)[k])))
        while self.zones and len(self.points) < most:
            zone = max(self.zones, key=lambda zone: (self._size(zone), zone))
            middle = [min(u, (low + min(u, top)) / 2) for low, u, top in zip(self._low(zone), zone, self.most)]
            self._add(self._solve(self.sum, (zone[0], *middle[1:])) or self._solve(self.sum, zone), zone)
        best = [p for p in self.points if not any(q != p and _within(q, p) for q in self.points)]
        return Front(tuple(self._allocation(p, self.points[p]) for p in sorted(best)), not self.zones)

    def _add(self, found: Solution | None, zone: Zone = ()) -> None:
        """A point found, which splits the zones it lies in; nothing rules out the zone."""
        if found is None:
            del self.zones[zone]
            return
        point = self._totals(found)
        self.points.setdefault(point, found)
        split = [z for z in self.zones if _within(point, z)]
        for z in split:
            ends = self.zones.pop(z)
            for k, x in enumerate(point):
                part = _lowered(z, k, math.nextafter(x, -math.inf))
                if _within(self.least, part):
                    self.zones[part] = tuple(point if j == k else end if end[k] < x else self.least for j, end in enumerate(ends))
        for z in [z for z in self.zones if any(other != z and _within(z, other) for other in self.zones)]:
            del self.zones[z]

    def _low(self, zone: Zone) -> Zone:
        """Below this a point of the zone would be better than one known: for two costs always, for more mostly."""
        ends = self.zones[zone]
        return tuple(min([ends[k][j] for k in range(len(zone)) if k != j], default=low) for j, low in enumerate(self.least))

    def _solve(self, objective: Row, zone: Zone) -> Solution | None:
        return solve(self.problem, objective, exact_limits(self.problem, {**self.limits, **dict(zip(self.costs, zone))}))

    def _totals(self, found: Solution) -> Zone:
        return tuple(self.problem.total(cost, found.picks) for cost in self.costs)

    def _size(self, zone: Zone) -> float:
        """The part of the box around all points which the zone takes."""
        sides = [(min(u, most) - low, most - least) for u, low, least, most in zip(zone, self._low(zone), self.least, self.most)]
        return math.prod(max(0.0, side) / whole for side, whole in sides if whole > 0)

    def _allocation(self, point: Zone, found: Solution) -> Allocation:
        """As the least of the first cost where the others are at most what they are here."""
        first, *others = self.costs
        limits = {**self.limits, **dict(zip(others, point[1:]))}
        limits.pop(first, None)
        rows, objective = exact_limits(self.problem, limits), self.problem.row({first: Fraction(1)})
        rest = sum(weight * rows[cost][1] * rows[cost][0].unit for cost, weight in zip(others, self.weights[1:]))
        least = (found.bound * self.sum.unit - rest) / self.weights[0] / objective.unit
        slopes = prices(self.problem, objective, rows)
        return allocation(self.problem, first, rows, Solution(found.picks, math.floor(least), slopes), limits)


def _within(point: Zone, zone: Zone) -> bool:
    return all(x <= u for x, u in zip(point, zone))


def _lowered(zone: Zone, k: int, most: float) -> Zone:
    return (*zone[:k], min(zone[k], most), *zone[k + 1 :])

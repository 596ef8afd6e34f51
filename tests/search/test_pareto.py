"""Fronts: all of it on small questions, a spread of points none of which is dominated on large ones."""

from __future__ import annotations

import itertools
import math
import random

import pytest
from tilewright.search import AllocationError, Choice, Front, Infeasible, allocate, pareto

Layers = list[list[Choice]]
Point = tuple[float, ...]
COSTS = ("time", "bytes", "error")


def random_layers(seed: int, count: int, options: int, whole: bool) -> Layers:
    r = random.Random(seed)
    number = (lambda: r.randint(0, 6)) if whole else r.random
    return [[Choice(name, {cost: number() for cost in COSTS}) for name in "abcdefgh"[:options]] for _ in range(count)]


def dominated(point: Point, points: list[Point]) -> bool:
    return any(q != point and all(x <= y for x, y in zip(q, point)) for q in points)


def brute_force(layers: Layers, costs: tuple[str, ...]) -> list[Point]:
    points = {tuple(math.fsum(c.costs[cost] for c in taken) for cost in costs) for taken in itertools.product(*layers)}
    return sorted(p for p in points if not dominated(p, list(points)))


def totals(front: Front, costs: tuple[str, ...]) -> list[Point]:
    return [tuple(point.costs[cost] for cost in costs) for point in front.points]


@pytest.mark.parametrize("whole", [True, False])
@pytest.mark.parametrize("costs", [COSTS[:2], COSTS, COSTS[:1]])
def test_the_whole_front_of_small_questions(costs: tuple[str, ...], whole: bool) -> None:
    for seed in range(5):
        layers = random_layers(seed, 4, 3, whole)
        front = pareto(layers, costs, points=1000)
        assert front.complete and totals(front, costs) == brute_force(layers, costs)
        for point in front.points:
            assert math.isclose(point.objective, point.bound, rel_tol=1e-9, abs_tol=1e-9) and point.bound <= point.objective
            assert set(point.prices) == set(costs[1:]) and min(point.prices.values(), default=0) >= 0


def supported(points: list[Point]) -> list[Point]:
    """Of a front of two costs those on its convex hull: what weighted sums find."""

    def above(p: Point, q: Point, r: Point) -> bool:
        return (q[1] - p[1]) * (r[0] - p[0]) > (r[1] - p[1]) * (q[0] - p[0]) + 1e-12

    return [q for q in points if not any(p < q < r and above(p, q, r) for p in points for r in points)]


def test_few_points_are_spread() -> None:
    """Fewer than there are: the ends, points of the front, no wide gap. All of them: those too that weighted sums would find."""
    layers = [
        [Choice(str(b), {"error": s * 4.0**-b, "bytes": n * b}) for b in (2, 3, 4, 6)]
        for s, n in [(1.0, 100), (3.0, 70), (0.5, 150), (2.0, 90), (0.1, 200)]
    ]
    costs = ("error", "bytes")
    everything = brute_force(layers, costs)
    front = pareto(layers, costs, points=20)
    found = totals(front, costs)
    assert not front.complete and len(found) == 20 and set(found) <= set(everything)
    assert found[0] == everything[0] and found[-1] == everything[-1]
    jumps = [q[1] - p[1] for p, q in zip(found[::-1], found[-2::-1])]
    assert max(jumps) < (found[0][1] - found[-1][1]) / 3
    assert set(supported(everything)) <= set(totals(pareto(layers, costs, points=len(everything)), costs))


def test_a_larger_front() -> None:
    layers = random_layers(0, 40, 6, whole=False)
    front = pareto(layers, points=8)
    found = totals(front, COSTS)
    assert len(found) == 8 and not any(dominated(p, found) for p in found) and front == pareto(layers, points=8)
    for k, cost in enumerate(COSTS):
        least = math.fsum(min(c.costs[cost] for c in layer) for layer in layers)
        assert min(point[k] for point in found) == least


def test_limits_ties_interactions_and_what_is_forbidden() -> None:
    layers = random_layers(3, 3, 3, whole=True)
    costs = ("time", "bytes")
    question = {"limits": {"error": 9, "bytes": 14}, "ties": [(0, 2)], "interactions": {(0, "a", 1, "b"): {"time": 3}}}
    front = pareto(layers, costs, **question)
    names = [p for p in itertools.product("abc", repeat=3) if p[0] == p[2]]
    every = [allocate([[c for c in layer if c.name == n] for layer, n in zip(layers, p)]).costs for p in names]
    points = {(c["time"] + 3 * (p[:2] == ("a", "b")), c["bytes"]) for p, c in zip(names, every) if c["error"] <= 9 and c["bytes"] <= 14}
    assert points and totals(front, costs) == sorted(p for p in points if not dominated(p, list(points)))
    rest = pareto(layers, costs, **question, forbidden=[point.names for point in front.points])
    assert not {point.names for point in rest.points} & {point.names for point in front.points}


def test_what_cannot_be() -> None:
    layers = random_layers(0, 2, 2, whole=True)
    with pytest.raises(Infeasible, match="bytes <= -1"):
        pareto(layers, limits={"bytes": -1})
    with pytest.raises(AllocationError, match="costs that differ, not time, time"):
        pareto(layers, ("time", "time"))
    with pytest.raises(AllocationError, match="no choice has a cost named 'bops'"):
        pareto(layers, ("time", "bops"))
    assert pareto([], points=5).points[0].choices == ()

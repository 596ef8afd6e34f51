"""Where a model is cut into stages: as brute force finds it, and what is said where nothing keeps the limits."""

from __future__ import annotations

import itertools
import math
import random

import pytest
from tilewright.search.stages import OBJECTIVES, CannotSplit, Link, Load, Machine, Staged, staged, stages


def instance(seed: int, size: int) -> Load:
    """Segments of random load; some weights are read by several of them."""
    draw = random.Random(seed)
    weights: list[dict[str, int]] = [{f"w{i}": draw.randrange(100)} for i in range(size)]
    for name in ("tied", "shared"):
        nbytes = draw.randrange(100)
        for s in draw.sample(range(size), min(size, 2)):
            weights[s][name] = nbytes
    seconds = [draw.randrange(1, 1000) * 1e-6 for _ in range(size)]
    return Load(seconds, weights, [draw.randrange(50) for _ in range(size)], [draw.randrange(1, 5000) for _ in range(size - 1)])


def machines(seed: int, count: int) -> tuple[list[Machine], list[Link]]:
    draw = random.Random(seed + 1)
    made = [Machine(draw.choice([math.inf, 250, 400]), draw.choice([math.inf, 3e-3]), draw.choice([1.0, 1.0, 2.5])) for _ in range(count)]
    return made, [Link(draw.choice([1e6, 1e7, math.inf]), draw.choice([0.0, 1e-4])) for _ in range(count - 1)]


def keeps(found: Staged, made: list[Machine]) -> bool:
    return all(t <= m.seconds + 1e-12 and b <= m.memory for t, b, m in zip(found.seconds, found.memory, made))


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("seed", range(12))
def test_the_best_stages_are_those_of_brute_force(seed: int, objective: str) -> None:
    size, count = 4 + seed % 5, 2 + seed % 3
    load, (made, links) = instance(seed, size), machines(seed, count)
    every = [staged(load, made, links, cuts) for cuts in itertools.combinations(range(size - 1), count - 1)]
    fitting = [found for found in every if keeps(found, made)]
    if not fitting:
        with pytest.raises(CannotSplit, match="stage|together"):
            stages(load, made, links, objective)
        return
    first, second = OBJECTIVES[objective]

    def rank(found: Staged) -> tuple[int, int]:
        return tuple(round(getattr(found, name) * (1 if name == "traffic" else 1e9)) for name in (first, second))  # type: ignore

    assert rank(stages(load, made, links, objective)) == min(map(rank, fitting))


PLAIN = Load([1e-3] * 4, [{"a": 10}, {"b": 20}, {"a": 10}, {"c": 40}], [5, 5, 5, 5], [7, 3, 9])


def test_equal_segments_are_cut_in_the_middle() -> None:
    found = stages(PLAIN, [Machine(), Machine()])
    assert found.cuts == (1,) and found.seconds == (2e-3, 2e-3) and found.sent == (3,)
    assert found.bottleneck == 2e-3 and found.latency == 4e-3


def test_a_weight_that_both_stages_read_is_held_by_both() -> None:
    assert stages(PLAIN, [Machine(), Machine()]).memory == (10 + 20 + 5, 10 + 40 + 5)


def test_a_slow_link_moves_the_cut_to_where_least_crosses() -> None:
    slow = [Link(bandwidth=1e3)]
    assert stages(Load([1e-3] * 4, [{}] * 4, [0] * 4, [1, 900, 900]), [Machine(), Machine()], slow).cuts == (0,)


def test_a_slow_machine_gets_less() -> None:
    assert stages(Load([1e-3] * 8, [{}] * 8, [0] * 8, [1] * 7), [Machine(slowness=3.0), Machine()]).cuts == (1,)


def test_the_limit_that_stands_in_the_way_is_named() -> None:
    with pytest.raises(CannotSplit, match=r"the memory of stage 2 \(30 bytes\) is too little, the least that it takes is 45 bytes"):
        stages(PLAIN, [Machine(), Machine(memory=30)])
    with pytest.raises(CannotSplit, match=r"the time of stage 1 \(0.5 ms\) is too little, the least that it takes is 1 ms"):
        stages(PLAIN, [Machine(seconds=0.5e-3), Machine()])
    with pytest.raises(CannotSplit, match=r"no cut keeps the memory of stage 1 \(40 bytes\) and the time of stage 2 \(1 ms\) together"):
        stages(Load([1e-3] * 4, [{"a": 10}, {"b": 20}, {"d": 10}, {"c": 40}], [5] * 4, [7, 3, 9]), [Machine(40), Machine(seconds=1e-3)])
    with pytest.raises(CannotSplit, match="into 5 stages: the graph can be cut in 3 places only"):
        stages(PLAIN, [Machine()] * 5)


def test_a_long_chain_of_segments_comes_out_even() -> None:
    load = instance(1, 100)
    found = stages(load, [Machine()] * 6, [Link(1e9)] * 5)
    assert len(found.cuts) == 5 and found.bottleneck <= 1.1 * sum(load.seconds) / 6

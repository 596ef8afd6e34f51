"""Schedules by constraint programming: equal to brute force, in time, and a conflict names its limits."""

from __future__ import annotations

import itertools
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sympy import Max, Min
from tilewright.codegen.space import Limit, Space
from tilewright.ir.dims import FloorDiv, Mod, evaluate, symbol
from tilewright.search.tiles import NoSchedule, schedules

a, b, c = (symbol(name) for name in "abc")


def brute_force(space: Space) -> list[dict[str, int]]:
    choices = itertools.product(*space.variables.values())
    return [v for v in (dict(zip(space.variables, values)) for values in choices) if space.broken(v) is None]


AMOUNTS = [
    a,
    a + 2 * b,
    a * b,
    a * b * c,
    a * (b + c),
    a**2 + b,
    Max(a, b * c),
    Min(a, b) * c,
    FloorDiv(a * b, c),
    Mod(a, b),
    Mod(a * c, b) + c,
]


@settings(max_examples=150, deadline=None)
@given(
    values=st.lists(st.lists(st.integers(1, 24), min_size=1, max_size=5, unique=True), min_size=3, max_size=3),
    limits=st.lists(st.tuples(st.sampled_from(AMOUNTS), st.integers(0, 200)), max_size=3),
)
def test_equal_to_brute_force(values: list[list[int]], limits: list[tuple]) -> None:
    space = Space(dict(zip("abc", map(tuple, map(sorted, values)))), tuple(Limit("limit", x, n) for x, n in limits))
    expected = brute_force(space)
    if expected:
        assert schedules(space) == expected
    else:
        with pytest.raises(NoSchedule):
            schedules(space)


def contraction() -> Space:
    """Blocks of a product in 16-bit floats on a GPU with 228 KB of shared memory."""
    m, n, k, stages, warps, split = (symbol(x) for x in ("m", "n", "k", "stages", "warps", "split"))
    powers = tuple(2**p for p in range(4, 9))
    variables = {"m": powers, "n": powers, "k": powers[:4], "stages": (1, 2, 3, 4, 5), "warps": (1, 2, 4, 8, 16), "split": (1, 2, 4, 8)}
    limits = (
        Limit("operand blocks fit shared memory", 2 * stages * k * (m + n), 227 << 10),
        Limit("accumulators fit registers", m * n, 128 * 32 * warps),
        Limit("every warp has a tile", 256 * warps, m * n),
        Limit("the split divides the depth", Mod(4096, k * split)),
        Limit("enough programs", 132, FloorDiv(4096, m) * FloorDiv(4096, n) * split),
    )
    return Space(variables, limits)


def test_a_template_is_enumerated_in_time() -> None:
    space = contraction()
    start = time.process_time()
    found = schedules(space)
    assert time.process_time() - start < 2
    assert found == brute_force(space) and len(found) > 1000


def test_no_more_than_asked_for() -> None:
    assert len(schedules(contraction(), most=10)) == 10


def test_a_conflict_names_a_smallest_set_of_limits() -> None:
    impossible = (Limit("large enough", 100 - a * b), Limit("harmless", c, 1000), Limit("small enough", a + b, 12))
    with pytest.raises(NoSchedule, match="large enough: .* together with small enough") as caught:
        schedules(Space({"a": (1, 2, 4), "b": (1, 8, 30), "c": (1, 2)}, impossible))
    assert [x.name for x in caught.value.limits] == ["large enough", "small enough"]


def test_what_is_no_variable_is_an_error() -> None:
    with pytest.raises(KeyError, match="c is no variable"):
        schedules(Space({"a": (1,)}, (Limit("limit", c, 1),)))
    with pytest.raises(NoSchedule, match="no values"):
        schedules(Space({"a": ()}))


def test_the_first_broken_limit_is_given() -> None:
    space = Space({"a": (1, 2)}, (Limit("small", a, 1), Limit("smaller", a)))
    found = space.broken({"a": 1})
    assert found is not None and found.name == "smaller" and str(found) == "smaller: a <= 0"
    assert evaluate(found.amount, {"a": 1}) == 1

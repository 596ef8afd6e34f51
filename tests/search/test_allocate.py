"""Allocation: equal to brute force, limits kept to the last bit, published tables solved, and every wrong question one sentence."""

from __future__ import annotations

import itertools
import json
import math
import random
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tilewright.search import Allocation, AllocationError, Choice, Infeasible, allocate

Layers = list[list[Choice]]
Question = dict[str, Any]
NUMBERS = {
    "floats": lambda r: r.random(),
    "tenths": lambda r: r.randint(0, 9) / 10,  # sums that round
    "whole": lambda r: r.randint(0, 5),  # many equal ones
    "signed": lambda r: r.uniform(-1, 1),
    "decades": lambda r: 10 ** r.uniform(-12, 12),
}


def total(layers: Layers, names: Sequence[str], cost: str, question: Question) -> float:
    taken = [next(c for c in layer if c.name == name) for layer, name in zip(layers, names)]
    extra = [x for (i, a, j, b), value in question["interactions"].items() if (names[i], names[j]) == (a, b) for x in [value.get(cost, 0)]]
    return math.fsum([*(c.costs[cost] for c in taken), *extra])


def allowed(layers: Layers, question: Question) -> Iterator[tuple[str, ...]]:
    for names in itertools.product(*([c.name for c in layer] for layer in layers)):
        if all(len({names[i] for i in tie}) == 1 for tie in question["ties"]) and names not in question["forbidden"]:
            yield names


def random_question(r: random.Random) -> tuple[Layers, Question]:
    """Up to 5 layers, 4 choices, 3 limits, most of them just met by some allocation."""
    number, names, costs = NUMBERS[r.choice(list(NUMBERS))], "abcd", ["error", "bytes", "time", "bops"]
    count = r.randint(1, 5)
    layers = [
        [Choice(n, {c: number(r) for c in costs}) for n in sorted(r.sample(names, r.randint(1, 4)) if r.random() < 0.3 else names)]
        for _ in range(count)
    ]
    shared = [i for i in range(count) if len(layers[i]) == 4]
    question: Question = {"minimize": "error", "interactions": {}, "forbidden": [], "ties": []}
    if len(shared) > 1 and r.random() < 0.5:
        question["ties"] = [r.sample(shared, r.randint(1, len(shared))) for _ in range(r.randint(1, 2))]
    if count > 1 and r.random() < 0.4:
        for _ in range(r.randint(1, 4)):
            i, j = r.sample(range(count), 2)
            key = (i, r.choice(layers[i]).name, j, r.choice(layers[j]).name)
            question["interactions"][key] = {c: number(r) - r.choice((0, 0.5)) for c in r.sample(costs, r.randint(1, 2))}
    everything = list(allowed(layers, question))
    if r.random() < 0.3:
        question["forbidden"] = r.sample(everything, min(len(everything) - 1, 3))
    question["limits"] = {}
    for cost in r.sample(costs, r.randint(0, 3)):
        low, some, high = sorted(total(layers, r.choice(everything), cost, question) for _ in range(3))
        question["limits"][cost] = r.choice((some, some, low, high, math.nextafter(some, -math.inf), 0, math.inf))
    return layers, question


def kept(layers: Layers, names: Sequence[str], question: Question, limits: Mapping[str, float]) -> bool:
    return all(total(layers, names, cost, question) <= limit for cost, limit in limits.items())


@pytest.mark.parametrize("part", range(10))
def test_equal_to_brute_force(part: int) -> None:
    answers = {Allocation: 0, Infeasible: 0}
    for seed in range(100 * part, 100 * part + 100):
        layers, question = random_question(random.Random(seed))
        good = [names for names in allowed(layers, question) if kept(layers, names, question, question["limits"])]
        try:
            found = allocate(layers, **question)
        except Infeasible as error:
            assert not good, seed
            check_infeasible(layers, question, error)
            answers[Infeasible] += 1
            continue
        answers[Allocation] += 1
        best = min(total(layers, names, "error", question) for names in good)
        size = math.fsum(max(abs(c.costs["error"]) for c in layer) for layer in layers)
        assert found.names in good, seed
        assert found.objective == total(layers, found.names, "error", question) == found.costs["error"]
        assert math.isclose(found.objective, best, rel_tol=1e-9, abs_tol=1e-12 * size), seed
        assert best - 1e-9 * abs(best) - 1e-12 * size <= found.bound <= best, seed
        assert set(found.prices) == set(question["limits"]) and all(0 <= p < math.inf for p in found.prices.values())
    assert min(answers.values()) > 5


def test_deep_questions_equal_to_brute_force() -> None:
    """14 layers with two choices each: sums of sixty-fourths are exact, however they are added."""
    every = np.array(list(itertools.product((0, 1), repeat=14)))
    r = np.random.default_rng(0)
    for _ in range(60):
        costs = {cost: r.integers(0, 1 << 12, (14, 2)) / 64 for cost in ("error", "bytes", "time")}
        layers = [[Choice("ab"[k], {cost: table[i, k] for cost, table in costs.items()}) for k in (0, 1)] for i in range(14)]
        sums = {cost: np.where(every, table[:, 1], table[:, 0]).sum(1) for cost, table in costs.items()}
        limits = {cost: r.choice(np.sort(sums[cost])[1000:9000]) for cost in ("bytes", "time")}
        good = (sums["bytes"] <= limits["bytes"]) & (sums["time"] <= limits["time"])
        if good.any():
            assert allocate(layers, limits=limits).objective == sums["error"][good].min()


def check_infeasible(layers: Layers, question: Question, error: Infeasible) -> None:
    """A smallest conflict, and an allocation that keeps the raised limits."""
    everything = list(allowed(layers, question))
    assert error.limits and all(question["limits"][name] == limit for name, limit in error.limits.items())
    assert not any(kept(layers, names, question, error.limits) for names in everything)
    for smaller in itertools.combinations(question["limits"], len(error.limits) - 1):
        assert any(kept(layers, names, question, {c: question["limits"][c] for c in smaller}) for names in everything)
    assert error.nearest is not None and error.nearest.names in everything and error.needed
    assert kept(layers, error.nearest.names, question, {**question["limits"], **error.needed})
    assert all(value > question["limits"][name] for name, value in error.needed.items())


def test_the_nearest_has_the_least_relative_excess() -> None:
    r = random.Random(0)
    for _ in range(40):
        layers = [
            [Choice(n, {"error": r.randint(0, 9), "bytes": r.randint(0, 9), "time": r.randint(0, 9)}) for n in "abc"] for _ in range(4)
        ]
        question: Question = {
            "ties": [],
            "interactions": {},
            "forbidden": [],
            "limits": {"bytes": r.randint(1, 9), "time": r.randint(1, 9)},
        }
        excess = {
            names: sum(max(0, total(layers, names, c, question) / limit - 1) for c, limit in question["limits"].items())
            for names in allowed(layers, question)
        }
        if min(excess.values()) > 0:
            with pytest.raises(Infeasible) as caught:
                allocate(layers, **question)
            assert caught.value.nearest is not None
            assert math.isclose(excess[caught.value.nearest.names], min(excess.values()), rel_tol=1e-9)


HAWQ = json.loads((Path(__file__).parent / "data" / "hawq_v3.json").read_text())["models"]


def hawq(model: str) -> Layers:
    table = HAWQ[model]
    return [
        [
            Choice(
                str(bits),
                {
                    "error": trace * table[f"weight_error_{bits}bit"][i],
                    "size": table["parameters"][i] * bits / 8,
                    "bops": table["bops"][i] / share,
                    "latency": table[f"latency_int{bits}"][i],
                },
            )
            for bits, share in ((4, 64), (8, 16))
        ]
        for i, trace in enumerate(table["hessian_trace"])
    ]


@pytest.mark.parametrize(("model", "limit"), [(model, limit) for model, table in HAWQ.items() for limit in table["published"]])
def test_hawq_v3(model: str, limit: str) -> None:
    """The bits published are the optimum, but for one: ResNet50 at a quarter of the size."""
    layers, ties = hawq(model), HAWQ[model]["tied_layers"]
    published = HAWQ[model]["published"][limit].replace(" ", "")
    cost, share = limit.split()
    four, eight = (math.fsum(layer[k].costs[cost] for layer in layers) for k in (0, 1))
    most = four + float(share) * (eight - four)
    start = time.process_time()
    found = allocate(layers, limits={cost: most}, ties=ties)
    assert time.process_time() - start < 1
    question: Question = {"interactions": {}}
    theirs = total(layers, published, cost, question), total(layers, published, "error", question)
    assert found.costs[cost] <= most and theirs[0] <= most
    assert all(published[i] == published[j] for i, j in ties)
    if (model, limit) == ("resnet50", "size 0.25"):
        assert found.objective < 0.999 * theirs[1]
    else:
        assert "".join(found.names) == published
    assert 0 <= found.objective - found.bound <= 1e-9 * found.objective


def large(count: int, options: int, seed: int) -> Layers:
    r = random.Random(seed)
    layers = []
    for _ in range(count):
        size, sensitivity = 10 ** r.uniform(3, 7), 10 ** r.uniform(-4, 0)
        layers.append(
            [
                Choice(
                    str(2 + k),
                    {
                        "error": sensitivity * 4.0**-k * r.uniform(0.8, 1.2),
                        "bytes": int(size * (2 + k)),
                        "time": size * r.uniform(1, 2 + k),
                    },
                )
                for k in range(options)
            ]
        )
    return layers


def ends(layers: Layers, cost: str) -> tuple[float, float]:
    return tuple(math.fsum(pick(c.costs[cost] for c in layer) for layer in layers) for pick in (min, max))  # type: ignore[return-value]


def test_many_layers_in_time_with_the_gap_said() -> None:
    layers = large(500, 8, 0)
    limits = {cost: low + 0.3 * (high - low) for cost in ("bytes", "time") for low, high in [ends(layers, cost)]}
    start = time.process_time()
    found = allocate(layers, limits=limits)
    assert time.process_time() - start < 10
    assert all(found.costs[cost] <= limit for cost, limit in limits.items())
    assert 0 <= found.objective - found.bound < 1e-3 * found.objective


def test_equal_questions_have_equal_answers() -> None:
    layers = large(60, 6, 1)
    limit = sum(ends(layers, "bytes")) / 2
    assert allocate(layers, limits={"bytes": limit}) == allocate(layers, limits={"bytes": limit})


def test_a_price_is_what_one_more_unit_gains() -> None:
    """About: the true optimum falls in steps around the slope of the relaxation."""
    layers = large(120, 6, 2)
    low, high = ends(layers, "bytes")
    middle, step = low + 0.4 * (high - low), 0.02 * (high - low)
    tight, loose = (allocate(layers, limits={"bytes": x}) for x in (middle, middle + step))
    assert tight.prices["bytes"] > loose.prices["bytes"] > 0
    assert loose.prices["bytes"] * step * 0.9 < tight.objective - loose.objective < tight.prices["bytes"] * step * 1.1
    assert allocate(layers, limits={"bytes": 2 * high, "time": math.inf}).prices == {"bytes": 0, "time": 0}


def pair(**costs: tuple[float, float]) -> list[Choice]:
    return [Choice(name, {cost: values[k] for cost, values in costs.items()}) for k, name in enumerate(("low", "high"))]


def test_a_limit_may_be_met_exactly_and_is_never_passed() -> None:
    layers = [pair(error=(1, 0), bytes=(0.1, 0.2)) for _ in range(30)]
    for count in range(31):
        exact = math.fsum([0.2] * count + [0.1] * (30 - count))
        assert allocate(layers, limits={"bytes": exact}).names.count("high") == count
        if count:
            assert allocate(layers, limits={"bytes": math.nextafter(exact, 0)}).names.count("high") == count - 1


def test_limits_of_a_hundred_bits() -> None:
    """Amounts that no 64-bit number holds together: 1 and 2**-70 beside 2**30."""
    layers = [pair(error=(2, 1), bytes=(0, 2.0**30)), pair(error=(3, 0), bytes=(0, 2.0**-70)), pair(error=(4, 0), bytes=(0, 1))]
    assert allocate(layers, limits={"bytes": 1}).names == ("low", "high", "high")  # 1 + 2**-70 is 1, rounded
    assert allocate(layers, limits={"bytes": 2.0**-70}).names == ("low", "high", "low")
    assert allocate(layers, limits={"bytes": 2.0**-71}).names == ("low", "low", "low")
    assert allocate(layers, limits={"bytes": 0}).names == ("low", "low", "low")


@pytest.mark.parametrize("scale", [1e-300, 1, 1e300])
def test_costs_of_any_size(scale: float) -> None:
    layers = [pair(error=(3 * scale, scale), bytes=(scale, 2 * scale)) for _ in range(4)]
    found = allocate(layers, limits={"bytes": 6 * scale})
    assert found.names.count("high") == 2 and math.isclose(found.objective, 8 * scale) and math.isclose(found.prices["bytes"], 2)
    assert allocate([pair(error=(1, 1.7e308)), pair(error=(1.7e308, 1.7e308))]).objective == 1.7e308


def test_what_is_trivial() -> None:
    empty = allocate([], limits={"bytes": 0})
    assert empty == Allocation((), 0.0, 0.0, {"bytes": 0.0}, {"error": 0.0, "bytes": 0.0})
    with pytest.raises(Infeasible, match="bytes <= -1"):
        allocate([], limits={"bytes": -1})
    one = allocate([[Choice("only", {"error": 2, "bits": 3})]], minimize="bits", limits={"bits": 3})
    assert one.names == ("only",) and one.objective == one.bound == 3 and one.costs == {"bits": 3, "error": 2}
    assert allocate([pair(error=(-1, -2)), pair(error=(-3, 4))]).objective == -5


def test_a_mean_is_a_limit_on_the_sum() -> None:
    """Bits per weight: each layer counts with its weights."""
    weights = [100, 10, 10]
    layers = [[Choice(str(b), {"error": i * 2.0**-b, "bits": b * n}) for b in (2, 4, 8)] for i, n in enumerate(weights, 1)]
    found = allocate(layers, limits={"bits": 4.5 * sum(weights)})
    assert found.names == ("4", "4", "8")


def test_infinite_costs_are_never_taken() -> None:
    layers = [pair(error=(0, 1), time=(math.inf, 1)), pair(error=(0, 1), time=(1, 1))]
    assert allocate(layers).names == ("high", "low")
    assert allocate(layers, ties=[(0, 1)]).names == ("high", "high")
    with pytest.raises(AllocationError, match="every choice of layer 0 has an infinite cost"):
        allocate([pair(error=(math.inf, math.inf))])


def test_ties_that_meet_are_one_and_take_common_names() -> None:
    layers = [[Choice(n, {"error": i}) for i, n in enumerate(names)] for names in ("abc", "bc", "ca", "ab")]
    assert allocate(layers).names == ("a", "b", "c", "a")
    assert allocate(layers, ties=[(1, 0), (0, 2)]).names == ("c", "c", "c", "a")
    with pytest.raises(AllocationError, match="tied layers 0, 1, 2, 3 have no choice of the same name"):
        allocate(layers, ties=[(0, 1), (2, 3), (3, 0)])


def test_interactions() -> None:
    layers = [pair(error=(1, 0), bytes=(1, 2)) for _ in range(2)]
    assert allocate(layers, interactions={(0, "high", 1, "high"): 3}).objective == 1
    assert allocate(layers, interactions={(0, "high", 1, "high"): 3, (1, "low", 0, "low"): -9}).objective == -7
    bytes_too = {(0, "high", 1, "high"): {"bytes": 1.0, "error": 0.5}}
    assert allocate(layers, limits={"bytes": 5}, interactions=bytes_too).costs == {"error": 0.5, "bytes": 5}
    assert allocate(layers, limits={"bytes": 4}, interactions=bytes_too).objective == 1
    assert allocate(layers, ties=[(0, 1)], interactions=bytes_too, limits={"bytes": 4}).names == ("low", "low")


def test_cutting_off_answers_gives_the_next_best() -> None:
    layers = [pair(error=(4, 0)), pair(error=(2, 0)), pair(error=(1, 0))]
    seen: list[tuple[str, ...]] = []
    for rank in range(8):
        found = allocate(layers, forbidden=seen)
        assert found.objective == rank
        seen.append(found.names)
    with pytest.raises(Infeasible, match="each one is forbidden") as caught:
        allocate(layers, limits={"error": 3}, forbidden=seen)
    assert caught.value.limits == {} and caught.value.nearest is None
    with pytest.raises(Infeasible, match="each one is forbidden"):
        allocate(layers, forbidden=seen)


def test_an_infeasible_question_says_what_would_do() -> None:
    layers = [pair(error=(4, 1), bytes=(1, 2), time=(1, 1)) for _ in range(3)]
    with pytest.raises(Infeasible) as caught:
        allocate(layers, limits={"error": 6, "bytes": 4, "time": 1e300})
    error = caught.value
    assert error.limits == {"error": 6, "bytes": 4} and error.needed == {"bytes": 5}
    assert error.nearest is not None and error.nearest.costs == {"error": 6, "bytes": 5, "time": 3}
    assert str(error) == "no allocation keeps error <= 6 and bytes <= 4 together; the nearest one has bytes 5"


def choice(**costs: Any) -> list[list[Choice]]:
    return [[Choice("a", costs)], [Choice("a", {"error": 1.0, "bytes": 1.0})]]


PLAIN = choice(error=1.0, bytes=1.0)


@pytest.mark.parametrize(
    ("layers", "question", "sentence"),
    [
        (choice(error=math.nan, bytes=1), {}, "the error of 'a' in layer 0 is nan"),
        (choice(error=-math.inf, bytes=1), {}, "the error of 'a' in layer 0 is -inf"),
        (choice(error="x", bytes=1), {}, "the error of 'a' in layer 0 is 'x', which is no number"),
        (choice(error=10**400, bytes=1), {}, "which is no number"),
        (choice(bytes=1), {}, "the choice 'a' of layer 0 has no cost named 'error'"),
        (PLAIN, {"limits": {"byte": 1}}, "no choice has a cost named 'byte'; there are bytes, error"),
        (PLAIN, {"minimize": "time"}, "no choice has a cost named 'time'"),
        (PLAIN, {"limits": {"bytes": math.nan}}, "the limit on bytes is nan"),
        ([[]], {}, "layer 0 offers no choice"),
        ([PLAIN[0] * 2], {}, "layer 0 offers two choices named 'a'"),
        (PLAIN, {"ties": [(0, 2)]}, "a tie names layer 2; layers are numbered from 0 to 1"),
        (PLAIN, {"interactions": {(0, "b", 1, "a"): 1.0}}, "an interaction names the choice 'b', which layer 0 does not offer"),
        (PLAIN, {"interactions": {(0, "a", 0, "a"): 1.0}}, "an interaction of layer 0 with itself"),
        (PLAIN, {"interactions": {(0, "a", 1, "a"): math.inf}}, "the interaction of layers 0 and 1 is infinite"),
        (PLAIN, {"interactions": {(0, "a", 1, "a"): {"time": 1.0}}}, "adds to a cost named 'time', which no choice has"),
        (PLAIN, {"forbidden": [("a",)]}, "a forbidden allocation names 1 choices for 2 layers"),
        (PLAIN, {"forbidden": [("a", "b")]}, "a forbidden allocation names the choice 'b', which layer 1 does not offer"),
    ],
)
def test_a_wrong_question_is_one_sentence(layers: Layers, question: Question, sentence: str) -> None:
    with pytest.raises(AllocationError) as caught:
        allocate(layers, **question)
    assert sentence in str(caught.value) and str(caught.value).startswith("cannot allocate: ")

"""fastest: what gains beyond noise wins, nothing else; verdicts are remembered."""

from __future__ import annotations

import random

import pytest
from tilewright.search.database import Database, Key, Timing
from tilewright.search.tuner import decide, fastest, remembered


class Bench:
    """Candidates that take as long as they are told, by a clock of their own."""

    def __init__(self, noise: float = 0.0, seed: int = 0) -> None:
        self.now, self.calls, self.noise, self.random = 0.0, dict[str, int](), noise, random.Random(seed)

    def clock(self) -> float:
        return self.now

    def candidate(self, name: str, seconds: float):
        def run() -> None:
            self.calls[name] = self.calls.get(name, 0) + 1
            self.now += seconds * (1 + self.noise * self.random.random())

        return run

    def fastest(self, default: str = "a", **seconds: float):
        return fastest({n: self.candidate(n, s) for n, s in seconds.items()}, default, clock=self.clock)


def test_the_faster_wins() -> None:
    verdict = Bench().fastest(a=0.010, b=0.008, c=0.009)
    assert verdict.winner == "b" and verdict.gain == pytest.approx(0.2) and verdict.ratio("c") == pytest.approx(0.9)


def test_a_gain_within_noise_is_none() -> None:
    for seed in range(20):
        assert Bench(noise=0.5, seed=seed).fastest(a=0.010, b=0.0099).winner == "a"
    assert Bench(noise=0.5).fastest(a=0.010, b=0.006).winner == "b"


def test_equal_candidates_keep_the_default() -> None:
    assert Bench().fastest(default="b", a=0.01, b=0.01).winner == "b"


def test_drift_disturbs_both_alike() -> None:
    bench = Bench()
    runs = {n: bench.candidate(n, 0.010) for n in "ab"}

    def slower(run):
        def wrapped() -> None:
            before = bench.now
            run()
            bench.now = before + (bench.now - before) * (1 + 0.2 * bench.now)  # the machine gets slower and slower

        return wrapped

    assert fastest({n: slower(r) for n, r in runs.items()}, "a", clock=bench.clock).winner == "a"


def test_what_is_hopeless_is_timed_no_more() -> None:
    bench = Bench()
    bench.fastest(a=0.01, b=0.1)
    assert bench.calls["b"] < 10


def test_short_calls_are_timed_together() -> None:
    bench = Bench()
    assert bench.fastest(a=2e-6, b=1e-6).winner == "b"
    assert bench.calls["b"] > 1000


def test_a_candidate_that_fails_is_out_and_says_why() -> None:
    bench = Bench()

    def broken() -> None:
        raise MemoryError("no shared memory")

    verdict = fastest({"a": bench.candidate("a", 1e-3), "b": broken}, "a", clock=bench.clock)
    assert verdict.winner == "a" and verdict.failed == {"b": "MemoryError: no shared memory"}
    with pytest.raises(MemoryError):
        fastest({"a": broken}, "a")


def test_one_candidate_wins() -> None:
    assert Bench().fastest(a=1.0).winner == "a"


def test_decide_weighs_noise() -> None:
    timings = {"a": Timing(1.0, 0.001), "b": Timing(0.9, 0.05), "c": Timing(0.95, 0.001)}
    assert decide(timings, "a") == "c"


def test_verdicts_are_remembered(tmp_path) -> None:
    database, key = Database(tmp_path / "t.sqlite"), Key.here("k", "8x8")
    made = []

    def make():
        made.append(1)
        return {"a": lambda: sum(range(20000)), "b": lambda: None}

    for _ in range(2):
        assert remembered(key, database, make, "a", ("a", "b"), 0.01).winner == "b"
    assert len(made) == 1
    remembered(key, database, lambda: {**make(), "c": lambda: None}, "a", ("a", "b", "c"), 0.01)
    assert len(made) == 2 and set(database.get(key)) == {"a", "b", "c"}

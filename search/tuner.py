"""`fastest`: which of several ways to compute the same thing takes the least time, as far as that can be told from noise."""

from __future__ import annotations

import functools
import math
import sqlite3
import statistics
import time
import warnings
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar

from ..ir.errors import is_lost
from .database import Database, Key, Timing

ROUNDS = 40
LEAST_ROUNDS = 5
SECONDS = 1.0
"""Time for one comparison, if `LEAST_ROUNDS` do not take longer."""
CALL_SECONDS = 200e-6
"""Shorter calls are timed several at once."""
CERTAINTY = 2.5
"""Standard errors that a gain must exceed."""
LEAST_GAIN = 0.01
"""A smaller gain is none: clocks, alignment and placement of memory differ by as much from process to process."""
HOPELESS = 1.3

Run = Callable[[], Any]


@dataclass(frozen=True)
class Verdict:
    """winner: the candidate to take. timings: of all that ran. failed: those that did not, and why. rounds: calls of the default that
    were timed, 0 where the verdict was remembered."""

    winner: str
    default: str
    timings: Mapping[str, Timing]
    failed: Mapping[str, str] = field(default_factory=dict)
    rounds: int = 0

    @property
    def gain(self) -> float:
        """The fraction of the default's time that the winner spares; 0 where it is the default."""
        return 1 - self.timings[self.winner].seconds / self.timings[self.default].seconds

    def ratio(self, name: str) -> float:
        """Time of a candidate over that of the default."""
        return self.timings[name].seconds / self.timings[self.default].seconds


def fastest(
    candidates: Mapping[str, Run],
    default: str,
    seconds: float = SECONDS,
    rounds: int = ROUNDS,
    hopeless: float = HOPELESS,
    clock: Callable[[], float] = time.perf_counter,
) -> Verdict:
    """Times the candidates, called in turn (A B, B A, ...), for about so many seconds and at most so many rounds.

    The winner is the default unless another one gains beyond noise. A candidate that raises is out; the default must not raise. One that
    takes `hopeless` times as long as the default, for certain, is called no more.
    """
    running, failed = _started(candidates, default)
    batch = _batches(running, clock)
    times: dict[str, list[float]] = {name: [] for name in running}
    deadline = clock() + seconds
    for turn in range(rounds):
        if turn >= LEAST_ROUNDS and clock() > deadline:
            break
        for name in list(running)[:: 1 if turn % 2 else -1]:
            start = clock()
            for _ in range(batch):
                running[name]()
            times[name].append((clock() - start) / batch)
        if turn + 1 >= LEAST_ROUNDS:
            running = {n: r for n, r in running.items() if n == default or not _hopeless(times[n], times[default], hopeless)}
        if len(running) == 1:
            break
    timings = {name: _timing(values, times[default]) for name, values in times.items()}
    return Verdict(decide(timings, default), default, timings, failed, batch * len(times[default]))


def decide(timings: Mapping[str, Timing], default: str) -> str:
    """The fastest of those that gain beyond noise over the default, or the default."""
    base = timings[default].seconds
    ratios = {n: t.seconds / base for n, t in timings.items()}
    gaining = [n for n, ratio in ratios.items() if 1 - ratio > max(LEAST_GAIN, CERTAINTY * timings[n].noise * ratio)]
    return min(gaining, key=lambda n: timings[n].seconds, default=default)


def remembered(
    key: Key,
    database: Database,
    make: Callable[[], Mapping[str, Run]],
    default: str,
    names: Collection[str],
    seconds: float = SECONDS,
    clock: Callable[[], float] = time.perf_counter,
) -> Verdict:
    """The verdict of what the database holds for the key; where it lacks one of `names`, `make` gives candidates, which are timed."""
    known = reading(lambda: database.get(key), {})
    if all(name in known for name in names):
        timings = {name: known[name] for name in names}
        return Verdict(decide(timings, default), default, timings)
    verdict = fastest(make(), default, seconds, clock=clock)
    writing(database, lambda: database.put(key, verdict.timings))
    return verdict


Known = TypeVar("Known")


def reading(read: Callable[[], Known], otherwise: Known) -> Known:
    """What `read` finds in a database; `otherwise` where that cannot be read."""
    try:
        return read()
    except sqlite3.Error:
        return otherwise


def writing(database: Database, write: Callable[[], None]) -> None:
    """Writes into a database; a warning, once, where that cannot be written."""
    try:
        write()
    except sqlite3.Error as error:
        _warn_once(f"{database.path} cannot be written ({error}): the next process measures again")


@functools.cache
def _warn_once(message: str) -> None:
    warnings.warn(message, stacklevel=3)


def _started(candidates: Mapping[str, Run], default: str) -> tuple[dict[str, Run], dict[str, str]]:
    """The candidates that run; the first call is not timed, it may set things up."""
    running: dict[str, Run] = {}
    failed: dict[str, str] = {}
    for name, run in candidates.items():
        try:
            run()
        except Exception as error:  # whatever it is, this candidate is out
            if name == default or is_lost(error):
                raise
            failed[name] = f"{type(error).__name__}: {error}"
        else:
            running[name] = run
    return running, failed


def _batches(running: Mapping[str, Run], clock: Callable[[], float]) -> int:
    """How many calls are timed at once, so that the shortest are not lost in the clock."""
    took: list[float] = []
    for run in running.values():
        start = clock()
        run()
        took.append(clock() - start)
    return max(1, min(100, math.ceil(CALL_SECONDS / max(min(took), 1e-9))))


def _timing(times: list[float], base: list[float]) -> Timing:
    """The median time, in units of the default's in the same round: what disturbs both cancels."""
    ratios = [a / b for a, b in zip(times, base)]
    ratio = statistics.median(ratios)
    return Timing(ratio * statistics.median(base), _error(ratios, ratio))


def _error(values: list[float], middle: float) -> float:
    """Standard error of the median, from the median deviation, as a fraction of it."""
    deviation = statistics.median(abs(v - middle) for v in values)
    return 1.2533 * 1.4826 * deviation / math.sqrt(len(values)) / middle if middle else 0.0


def _hopeless(times: list[float], base: list[float], factor: float) -> bool:
    timing = _timing(times, base)
    return timing.seconds * (1 - CERTAINTY * timing.noise) > factor * statistics.median(base)

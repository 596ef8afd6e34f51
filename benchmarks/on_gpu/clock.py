"""Times of calls on a device: by its own events, the candidates in turn, the second-level cache emptied before each call."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from .place import Place

Call = Callable[[], Any]
Answer = dict[str, Any]

FLUSH_BYTES = 256 << 20
"""Larger than any cache of a GPU; writing it takes longer than it takes the host to enqueue what is timed."""
WARM_UP, LEAST_ROUNDS, MOST_ROUNDS = 3, 5, 60


def race(
    place: Place,
    candidates: Mapping[str, Sequence[Call]],
    flush: bool = True,
    recorded: bool = False,
    started: Mapping[str, Answer] = {},
    before: Call = lambda: None,
) -> dict[str, Answer]:
    """Per candidate the median seconds of one of its calls; {"failed": why} for one that raises.

    candidates: each a series of calls that is timed as a whole: one call, or several on different memory. recorded: as a CUDA graph, so
    that launching costs nothing. started: what is known of a candidate already. before: done before each series, and not timed.
    """
    found: dict[str, Answer] = {name: dict(started.get(name, {})) for name in candidates}
    running: dict[str, Call] = {}
    for name, calls in candidates.items():
        try:
            running[name] = _warm(place, calls, recorded, before)
        except Exception as error:  # a candidate that fails is a result
            found[name]["failed"] = in_a_line(error)
    for name, times in _rounds(place, running, flush, before).items():
        found[name] |= {"seconds": statistics.median(times) / len(candidates[name]), "rounds": len(times)}
    return found


def in_a_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"[:400]


def _warm(place: Place, calls: Sequence[Call], recorded: bool, before: Call) -> Call:
    """All calls in one, after they have run some times."""

    def work() -> None:
        for call in calls:
            call()

    for _ in range(WARM_UP):
        before()
        work()
    place.synchronize()
    return _recorded(work) if recorded and place.on_gpu else work


def _recorded(work: Call) -> Call:
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        work()
    graph.replay()
    torch.cuda.synchronize()
    return graph.replay


def _rounds(place: Place, running: Mapping[str, Call], flush: bool, before: Call) -> dict[str, list[float]]:
    """Seconds of each in every round; A B, B A, ..."""
    times: dict[str, list[float]] = {name: [] for name in running}
    time_one = _DeviceClock(place, flush) if place.on_gpu else _host_seconds
    deadline = time.perf_counter() + place.seconds
    for turn in range(MOST_ROUNDS):
        if turn >= LEAST_ROUNDS and time.perf_counter() > deadline:
            break
        for name in list(running)[:: 1 if turn % 2 else -1]:
            before()
            times[name].append(time_one(running[name]))
    return times


def _host_seconds(work: Call) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


class _DeviceClock:
    """Seconds between two events around what is enqueued."""

    def __init__(self, place: Place, flush: bool) -> None:
        self._waste = torch.empty(FLUSH_BYTES, dtype=torch.uint8, device=place.device) if flush else None
        self._start, self._end = (torch.cuda.Event(enable_timing=True) for _ in range(2))

    def __call__(self, work: Call) -> float:
        if self._waste is not None:
            self._waste.zero_()
        self._start.record()
        work()
        self._end.record()
        self._end.synchronize()
        return self._start.elapsed_time(self._end) / 1e3

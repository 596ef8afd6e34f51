"""A clock of what a GPU does: it stands still while the GPU waits for Python, and while it empties its cache before each measurement.

clock = EventClock(0)
start = clock()        the GPU is idle; it begins to empty its cache, which takes longer than a launch
run()                  is enqueued meanwhile
clock() - start        seconds from the end of the emptying to the end of what was enqueued
"""

from __future__ import annotations

import torch

EMPTIED_BYTES = 256 << 20
"""Written before each measurement: more than a second-level cache holds, and some 0.1 ms of work, in which Python gets ahead."""


class EventClock:
    """Seconds that the current stream of a device has worked between calls of this clock."""

    def __init__(self, index: int) -> None:
        self._index = index
        self._seconds = 0.0
        self._begin, self._end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        self._started = False
        self._memory = torch.empty(EMPTIED_BYTES, dtype=torch.uint8, device=f"cuda:{index}")

    def __call__(self) -> float:
        stream = torch.cuda.current_stream(self._index)
        if self._started:
            self._end.record(stream)
            self._end.synchronize()
            self._seconds += self._begin.elapsed_time(self._end) / 1e3
        else:
            torch.cuda.synchronize(self._index)
        self._memory.zero_()
        self._begin.record(stream)
        self._started = True
        return self._seconds

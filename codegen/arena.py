"""Arenas: one block of memory per call in flight, and the tensors that live in it, made once per set of sizes."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch

Frame = tuple[Any, ...]
MAX_FRAMES = 64  # sets of sizes that one arena remembers
MAX_STREAMS = 64  # whose arenas are kept


class Arena:
    """A block of memory and its frames. A frame is what the host program prepared in it for one set of sizes: tensors and pointers."""

    def __init__(self, device: str) -> None:
        self._memory = torch.empty(0, dtype=torch.uint8, device=device)
        self._frames: dict[tuple[int, ...], Frame] = {}

    def frame(self, sizes: tuple[int, ...], nbytes: Callable[..., int], prepare: Callable[..., Frame]) -> Frame:
        """The frame of these sizes. The block grows to the largest need; growing forgets the frames of the old block."""
        found = self._frames.get(sizes)
        if found is not None:
            return found
        with torch.inference_mode(False), torch.no_grad():  # memory that calls in any mode may write
            return self._new_frame(sizes, nbytes(*sizes), prepare)

    def _new_frame(self, sizes: tuple[int, ...], need: int, prepare: Callable[..., Frame]) -> Frame:
        if need > self._memory.numel():
            self._frames.clear()
            self._memory = torch.empty(need, dtype=torch.uint8, device=self._memory.device)
        if len(self._frames) >= MAX_FRAMES:
            self._frames.clear()
        self._frames[sizes] = made = prepare(self._memory, *sizes)
        return made


class PerStream:
    """The arenas that no call is using, apart for each stream of a GPU: what is enqueued on one may still work in the arenas of its calls.

    streams: ask for the current ones of the devices. capturing: whether they are being captured; then a graph owns what is allocated, and
    no later call may have it.
    """

    def __init__(self, streams: Sequence[Callable[[], int]], capturing: Callable[[], bool]) -> None:
        self._streams = tuple(streams)
        self._capturing = capturing
        self._free: dict[tuple[int, ...], list[Arena]] = {}

    def __call__(self) -> list[Arena]:
        """Those of the current streams; new ones are added to the list."""
        if self._capturing():
            return []
        key = tuple(stream() for stream in self._streams)
        if key not in self._free and len(self._free) >= MAX_STREAMS:
            self._free.clear()
        return self._free.setdefault(key, [])


def per_stream(devices: Sequence[str]) -> PerStream | None:
    """For the GPUs among the devices; None where there are none."""
    places = [torch.device(d) for d in devices if d.startswith("cuda")]
    if not places or not torch.cuda.is_available():  # a program for another machine
        return None
    indices = sorted({torch.cuda.current_device() if place.index is None else place.index for place in places})
    return PerStream([functools.partial(raw_stream, index) for index in indices], torch.cuda.is_current_stream_capturing)


def finish(devices: Sequence[str]) -> None:
    """Waits for what the GPUs among the devices are doing: what is made once, on one stream, is read by calls on any."""
    if not torch.cuda.is_available() or torch.cuda.is_current_stream_capturing():
        return
    for device in devices:
        if device.startswith("cuda"):
            torch.cuda.synchronize(device)


def raw_stream(index: int) -> int:
    """The address of the current stream of a GPU, as Triton's launches ask for it: a tenth of the cost of torch.cuda.current_stream."""
    return torch._C._cuda_getCurrentRawStream(index)  # type: ignore[attr-defined]


def slot(memory: torch.Tensor, offset: int, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """A contiguous tensor at `offset` bytes of the block."""
    count = 1
    for d in shape:
        count *= d
    return memory.narrow(0, offset, count * dtype.itemsize).view(dtype).view(shape)

"""Arenas: one block of memory per call in flight, and the tensors that live in it, made once per set of sizes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

Frame = tuple[Any, ...]
MAX_FRAMES = 64  # sets of sizes that one arena remembers


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


def slot(memory: torch.Tensor, offset: int, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """A contiguous tensor at `offset` bytes of the block."""
    count = 1
    for d in shape:
        count *= d
    return memory.narrow(0, offset, count * dtype.itemsize).view(dtype).view(shape)

"""What a model remembers of the texts in a batch: `State`, and memory for it that costs what is used of it."""

from __future__ import annotations

import mmap
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from ..ir.types import TensorType

PAGED_BYTES = 1 << 20
"""Zeros that are worth pages of their own."""


@dataclass
class State:
    """tensors: the batch lies in the first dimension, and in `dims` of each the tokens. given: what the model computed from its other
    inputs, once. ends: of each row, how far steps have written; zeros follow.

    A text may go on from any position that was reached, or begin anew: what stood behind it means nothing.
    """

    tensors: list[torch.Tensor]
    dims: tuple[int, ...]
    given: tuple[torch.Tensor, ...]
    ends: list[int]

    @property
    def length(self) -> int:
        """Of a text, at most."""
        return self.tensors[0].shape[self.dims[0]]

    def expect(self, count: int) -> None:
        """So many tokens of each row are now written by the caller, into a state that holds nothing yet.

        Where that is most of a text, it gets memory of the heap, which tends to have it at hand, and what will be written is not cleared.
        Pages that come as a text grows cost more when all of them come.
        """
        if 2 * count < self.length or self.tensors[0].device.type != "cpu":
            return
        for i, d in enumerate(self.dims):
            self.tensors[i] = torch.empty_like(self.tensors[i])
            self.tensors[i].narrow(d, count, self.length - count).zero_()
        self.ends = [count] * len(self.ends)

    def reach(self, starts: Sequence[int], count: int) -> None:
        """Before a step of `count` tokens from these positions on: clears what an earlier one left behind them.

        A key that is masked may have a weight of 0, and 0 times what is not finite is NaN.
        """
        for row, start in enumerate(starts):
            end, before = min(start + count, self.length), self.ends[row]
            self.ends[row] = end
            if end < before:
                for tensor, d in zip(self.tensors, self.dims):
                    tensor[row].narrow(d - 1, end, before - end).zero_()


def zeros(kind: TensorType) -> torch.Tensor:
    """As torch.zeros, but of many the system gives those pages only that are written: the others take no memory, and no time to clear."""
    shape, nbytes = tuple(map(int, kind.shape)), int(kind.nbytes)
    if torch.device(kind.device).type == "cpu" and nbytes >= PAGED_BYTES and hasattr(mmap, "MAP_ANONYMOUS"):
        pages = mmap.mmap(-1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        return torch.frombuffer(pages, dtype=kind.dtype).view(shape)
    return torch.zeros(shape, dtype=kind.dtype, device=kind.device)

"""Threads in place of processes: torch's collectives among them, to run the graphs of all ranks in one test."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from support import in_threads
from tilewright.ir.graph import Graph
from tilewright.ir.interpret import interpret
from tilewright.ir.ops import structure


class Processes:
    def __init__(self, count: int) -> None:
        self.count, self.values = count, [torch.empty(0)] * count
        self.barrier = threading.Barrier(count, timeout=20)
        self.own = threading.local()
        self.others = structure.resolve

    def exchange(self, value: torch.Tensor) -> list[torch.Tensor]:
        self.values[self.own.rank] = value
        self.barrier.wait()
        found = list(self.values)
        self.barrier.wait()
        return found

    def scatter(self, value: torch.Tensor, *rest: Any) -> torch.Tensor:
        return torch.stack(self.exchange(value)).sum(0).chunk(self.count)[self.own.rank]

    def resolve(self, target: str) -> Callable[..., Any]:
        collectives = {
            "_c10d_functional.all_reduce.default": lambda x, *rest: torch.stack(self.exchange(x)).sum(0),
            "_c10d_functional.all_gather_into_tensor.default": lambda x, *rest: torch.cat(self.exchange(x)),
            "_c10d_functional.reduce_scatter_tensor.default": self.scatter,
            "_c10d_functional.wait_tensor.default": lambda x: x,
        }
        return collectives[target] if target in collectives else self.others(target)


def together(
    graphs: Sequence[Graph], inputs: Sequence[Any], patch: pytest.MonkeyPatch, dtype: torch.dtype | None = None
) -> list[list[Any]]:
    """What each of the processes returns. dtype: as `interpret` has it."""
    processes, found = Processes(len(graphs)), list[list[Any]]([[]] * len(graphs))
    patch.setattr(structure, "resolve", processes.resolve)

    def work(rank: int) -> None:
        processes.own.rank = rank
        with torch.no_grad():
            found[rank] = interpret(graphs[rank], inputs, dtype)

    in_threads(work, len(graphs))
    return found

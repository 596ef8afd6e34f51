"""Where a row is measured: the device, how long, and how kernels of ours are made there."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from tilewright.codegen.program import Program, compile_program
from tilewright.codegen.target import TARGETS, Target
from tilewright.ir.graph import Graph, Node, Stage, graph_input, make_graph
from tilewright.ir.ops import OPS
from tilewright.ir.types import TensorType

Build = Callable[..., Node]
Kind = tuple[torch.dtype, tuple[int, ...]]


class NotHere(Exception):
    """What a row needs is not there: it is listed with this note, and is no failure."""


@dataclass(frozen=True)
class Place:
    """device: "cuda:0"; on "cpu" kernels run in Triton's interpreter, in sizes that it can do, which tests the benchmark.

    seconds: for the rounds of one race. rival: the backend of torch.compile that whole models are compared with. tuned: kernels have the
    schedule that a search finds.
    """

    device: str = "cuda:0"
    seconds: float = 1.0
    rival: str = "inductor"
    tuned: bool = False

    @property
    def on_gpu(self) -> bool:
        return self.device != "cpu"

    def size(self, full: int, small: int) -> int:
        return full if self.on_gpu else small

    def tensor(self, dtype: torch.dtype, shape: Sequence[int]) -> torch.Tensor:
        """Random numbers: of integers all there are."""
        if dtype.is_floating_point:
            return torch.randn(tuple(shape), device=self.device).to(dtype)
        about = torch.iinfo(dtype)
        return torch.randint(max(about.min, -1000), min(about.max, 1000) + 1, tuple(shape), device=self.device, dtype=dtype)

    def tensors(self, kinds: Sequence[Kind]) -> list[torch.Tensor]:
        return [self.tensor(*kind) for kind in kinds]

    def kernel(self, build: Build, kinds: Sequence[Kind], schedule: str = "") -> Program:
        """What `build` makes of inputs of these kinds, as one kernel of ours; raises NotHere with the reason where it cannot be one.

        schedule: that it must have, as a region of a graph names it.
        """
        graph = one_region(build, kinds, self.device, schedule)
        program = compile_program(searched(graph) if self.tuned else graph, TARGETS if self.on_gpu else INTERPRETED)
        if program.fallbacks:
            raise NotHere(f"no kernel of ours: {program.fallbacks[0].reason}")
        if schedule and program.kernels[0].notes:
            raise NotHere(program.kernels[0].notes[0])
        return program

    def synchronize(self) -> None:
        if self.on_gpu:
            torch.cuda.synchronize(self.device)


def _interpreted(kernels: Sequence[Any], device: str) -> Any:
    from tilewright.codegen.triton.toolchain import compile_kernels

    return compile_kernels(kernels, device)


INTERPRETED = {"cpu": Target("triton", _interpreted)}


SEARCH_SECONDS = 60.0


def searched(graph: Graph) -> Graph:
    """The graph with the schedules that are fastest on the device; what was found goes to the log."""
    from tilewright.search.bench import bench_of
    from tilewright.search.database import Database
    from tilewright.search.schedules import by_measuring, with_schedules

    bench = bench_of(graph)
    if bench is None:
        raise NotHere("schedules are measured on a GPU")
    found = by_measuring(graph, bench, time.perf_counter() + SEARCH_SECONDS, Database())
    print(*found.lines, sep="\n", file=sys.stderr)
    if not found.schedules and not any(line.measured for line in found.lines):
        raise NotHere(found.lines[0].why if found.lines else "there is nothing to search")
    return with_schedules(graph, found.schedules)


def graph_of(build: Build, kinds: Sequence[Kind], device: str) -> Graph:
    inputs = [graph_input(f"x{i}", TensorType(dtype, tuple(shape), device)) for i, (dtype, shape) in enumerate(kinds)]
    return make_graph("row", inputs, [build(*inputs)])


def one_region(build: Build, kinds: Sequence[Kind], device: str, schedule: str) -> Graph:
    """A graph that is a single region: nobody decides whether the library had better do a part of it."""
    body = graph_of(build, kinds, device)
    inputs = [graph_input(n.hint, n.type) for n in body.inputs]
    return make_graph("row", inputs, [OPS["region"](*inputs, body=body, label="row", schedule=schedule)], stage=Stage.FUSED)


def op(name: str) -> Any:
    """An op of the catalogue; raises NotHere where this version has none of that name."""
    if name not in OPS:
        raise NotHere(f"this version has no op {name}")
    return OPS[name]

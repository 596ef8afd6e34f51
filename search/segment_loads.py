"""What each segment of a graph takes, for `search/stages.py`: seconds, measured on this machine or by its rates, and bytes."""

from __future__ import annotations

import hashlib
import statistics
import time
from collections.abc import Callable, Collection, Sequence
from typing import Any

import torch

from ..ir.analysis.footprint import held_bytes
from ..ir.analysis.hashing import structural_hash
from ..ir.analysis.segments import Segments
from ..ir.dims import Dim, hint
from ..ir.graph import Graph, Node, order
from ..ir.op import Category
from ..ir.types import TensorType
from ..passes.split_layers import split
from .database import Database, Key, Timing
from .device import Device
from .examples import example_inputs
from .repeated import from_the_start, updated
from .stages import Load
from .tuner import reading, writing

SECONDS = 0.1
"""For measuring one segment, beside the first call."""
LEAST_CALLS = 5
NAME = "segment"

Compile = Callable[[Graph], Callable[[list[Any]], Any]]
Progress = Callable[[int, int], object]


def load_of(found: Segments, seconds: Callable[[Sequence[Graph]], list[float]], sent: Callable[[Node], Dim]) -> Load:
    """What the segments take. seconds: `measured` or `by_rates`, of each. sent: bytes of a value that crosses."""
    parts = [part.graph for part in split(found, range(len(found.cuts)))]
    weights = [{n.attrs["data"].name: _nbytes(part, n.tensor) for n in order(part) if n.op.name == "constant"} for part in parts]
    values = [held_bytes(part) for part in parts]
    crossing = [sum(hint(sent(n), found.graph.symbols) for n in cut.crosses) for cut in found.cuts]
    return Load(seconds(parts), weights, values, crossing)


def _nbytes(graph: Graph, kind: Any) -> int:
    return hint(kind.nbytes, graph.symbols) if isinstance(kind, TensorType) else 0


def measured(graphs: Sequence[Graph], compiled: Compile, database: Database, progress: Progress = lambda done, total: None) -> list[float]:
    """Seconds of a call of each; of those that are equal but for their weights one is run. compiled: makes a graph something to call."""
    names = [structural_hash(graph, weights=False) for graph in graphs]
    distinct = {name: graph for name, graph in zip(names, graphs)}
    found: dict[str, float] = {}
    for done, (name, graph) in enumerate(distinct.items()):
        progress(done, len(distinct))
        found[name] = _remembered(name, graph, compiled, database).seconds
    progress(len(distinct), len(distinct))
    return [found[name] for name in names]


def _remembered(name: str, graph: Graph, compiled: Compile, database: Database) -> Timing:
    key = Key.here(hashlib.sha256(f"{NAME}\0{name}\0{_gpus(graph)}".encode()).hexdigest(), ", ".join(str(n.type) for n in graph.inputs))
    known = reading(lambda: database.get(key), {})
    if NAME not in known:
        known = {NAME: timed(graph, compiled(graph))}
        writing(database, lambda: database.put(key, known))
    return known[NAME]


def _gpus(graph: Graph) -> str:
    """The names of those that the graph is on."""
    places = {n.tensor.device for n in graph.inputs if isinstance(n.type, TensorType) and n.tensor.device.startswith("cuda")}
    return ", ".join(sorted(torch.cuda.get_device_name(place) for place in places))


def timed(graph: Graph, run: Callable[[list[Any]], Any]) -> Timing:
    """The least of calls on made-up inputs, after one that may set things up: what else the machine does only adds."""
    inputs, times = example_inputs(graph), list[float]()
    places = {x.device for x in inputs if isinstance(x, torch.Tensor) and x.is_cuda}

    def call() -> None:
        run(list(inputs))
        _finish(places)

    again = from_the_start(call, updated(graph, inputs))
    again()
    begin = time.perf_counter()
    while len(times) < LEAST_CALLS or time.perf_counter() - begin < SECONDS:
        start = time.perf_counter()
        again()
        times.append(time.perf_counter() - start)
    return Timing(min(times), statistics.median(times) / min(times) - 1)


def _finish(places: Collection[torch.device]) -> None:
    for place in places:
        torch.cuda.synchronize(place)


def by_rates(graphs: Sequence[Graph], device: Device) -> list[float]:
    """Seconds of a call of each as the rates of the device say: of each op the longer of computing and moving memory."""
    return [sum(_op_seconds(graph, node, device) for node in order(graph)) for graph in graphs]


def _op_seconds(graph: Graph, node: Node, device: Device) -> float:
    if node.op.category in (Category.VIEW, Category.CONSTANT):
        return 0.0
    cost = node.op.cost(tuple(i.type for i in node.inputs), node.type, node.attrs)
    dtype = str(node.type.dtype) if isinstance(node.type, TensorType) else ""
    rate = device.gemm.get(dtype.removeprefix("torch."), device.gemm["float32"])
    return max(hint(cost.flops, graph.symbols) / rate, hint(cost.bytes, graph.symbols) / device.copy)

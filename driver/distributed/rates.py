"""How fast the processes of a group are: what each computes, and what all of them sum, in a second. All find the same numbers.

What the whole program takes, less what its sums would, is computing; the slowest process counts. The number of calls is fixed: each has
collectives in it, which all processes take part in.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist

from ...ir.graph import Graph
from ...ir.types import TensorType
from ...search.examples import example_inputs
from ...search.simulate import Cluster, alone, layers_of, tokens_summed

CALLS = 5
LEAST_SHARE = 0.1
"""Of a call, that computing takes: both times are noisy, and sums may seem to take it all."""
GPU_WAVE = 128
"""Rows that one tile of a product has on a GPU: fewer take as long."""


def may_pay(graph: Graph, processes: int) -> bool:
    """Whether two parts could gain anything, whatever the rates are."""
    batch, length = tokens_summed(graph) or (0, 0)
    return batch * length > 0 and not alone(layers_of(graph, batch * length), batch * length, Cluster(processes, 1.0))


def cluster_of(graph: Graph, seconds: float, group: dist.ProcessGroup | None) -> Cluster:
    """seconds: that a call of the graph takes, as `call_seconds` has it."""
    batch, length = tokens_summed(graph) or (1, 1)
    tokens, device = batch * length, _device(graph)
    layers = layers_of(graph, tokens)
    largest = max(tokens * layer.nbytes for layer in layers)
    latency = _summing(4, device, group)
    link = largest / max(_summing(int(largest), device, group) - latency, 1e-9)
    waves = Cluster(dist.get_world_size(group), 1.0, GPU_WAVE if device.type == "cuda" else 1, link, latency)
    sums = sum(waves.summing(layer, tokens) for layer in layers)
    operations = sum(waves.computing(layer, tokens, 0) for layer in layers)
    return Cluster(waves.devices, operations / max(seconds - sums, LEAST_SHARE * seconds), waves.wave, link, latency)


def call_seconds(graph: Graph, run: Callable[[list[Any]], Any], group: dist.ProcessGroup | None) -> float:
    """Of a call of a program on inputs made up, by the slowest process. To be called by all of them."""
    inputs, device = example_inputs(graph), _device(graph)
    return _seconds(lambda: run(list(inputs)), device, group)


def _summing(nbytes: int, device: torch.device, group: dist.ProcessGroup | None) -> float:
    value = torch.zeros(max(nbytes // 4, 1), device=device)
    return _seconds(lambda: dist.all_reduce(value, group=group), device, group)


def _seconds(call: Callable[[], Any], device: torch.device, group: dist.ProcessGroup | None) -> float:
    """The least of some calls, after one that may set things up; the most that any process takes."""
    times: list[float] = []
    for _ in range(CALLS + 1):
        start = time.perf_counter()
        call()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        times.append(time.perf_counter() - start)
    found = torch.tensor([min(times[1:])], dtype=torch.float64, device=device)
    dist.all_reduce(found, dist.ReduceOp.MAX, group)
    return float(found)


def _device(graph: Graph) -> torch.device:
    return torch.device(next((n.type.device for n in graph.inputs if isinstance(n.type, TensorType)), "cpu"))

"""Which bounded rewrites of a graph's structure to make: places that offer choices, what each costs, and the best that keep an error.

    place                       choice      error      saves
    encoder.layers.0.self_attn  merge 4     2.1e-3     0.31 ms
    encoder.layers.1.linear2    removed     8.0e-2     0.55 ms, 131 kB

A family of rewrites knows its places and makes the passes for what is chosen there (`merging.py`, `pruning.py`). Errors are measured, each
choice alone, on calibration inputs; time and bytes are counted.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from ..ir.dims import hint
from ..ir.graph import Graph, order
from ..ir.op import Category
from ..passes.base import Notes, Pass
from ..passes.manager import run_passes
from .allocate import Allocation, Choice
from .device import Device
from .metrics import Metric
from .replay import Replay

EXACT = "exact"
_FREE = (Category.VIEW, Category.CONSTANT, Category.POINTWISE, Category.STRUCTURE)
"""Computed within kernels of others, or not at all."""

Progress = Callable[[int, int], object]


@dataclass(frozen=True)
class Place:
    """Where a rewrite offers choices, beside leaving everything as it is."""

    name: str
    source: str
    choices: tuple[str, ...]


class Family(Protocol):
    """A kind of rewrite of one graph."""

    places: tuple[Place, ...]

    def passes(self, chosen: Mapping[str, str]) -> list[Pass]:
        """That make of the graph what is chosen, by the names of places."""
        ...


@dataclass(frozen=True)
class Effect:
    """What a choice does by itself: the error of the outputs; predicted seconds and bytes of weights that it saves."""

    error: float
    seconds: float
    bytes: int


class Rewrites:
    """Families of rewrites of one canonical graph, applied in their order."""

    def __init__(self, graph: Graph, families: Sequence[Family]) -> None:
        self.graph, self.families = graph, families
        self.places = [(family, place) for family in families for place in family.places]

    def passes(self, chosen: Iterable[tuple[Family, str, str]]) -> list[Pass]:
        """Of what is chosen: (family, place, choice)."""
        found = list(chosen)
        return [p for family in self.families for p in family.passes({place: how for f, place, how in found if f is family})]

    def rewritten(self, chosen: Iterable[tuple[Family, str, str]], notes: Notes | None = None) -> Graph:
        return run_passes(self.graph, self.passes(chosen), notes if notes is not None else Notes())

    def effects(
        self,
        batches: Sequence[Sequence[Any]],
        metric: Metric,
        seconds: Callable[[Graph], float],
        progress: Progress = lambda done, total: None,
    ) -> list[dict[str, Effect]]:
        """For each place, choice -> what it does. batches: values of the graph's inputs; seconds: of a graph, predicted.

        A choice that changes nothing is left out.
        """
        replays = [Replay(self.graph, batch) for batch in batches]
        before, weights = seconds(self.graph), weight_bytes(self.graph)
        found: list[dict[str, Effect]] = []
        total = sum(len(place.choices) for _, place in self.places)
        for family, place in self.places:
            effects: dict[str, Effect] = {}
            for name in place.choices:
                progress(sum(map(len, found)) + len(effects), total)
                variant = self.rewritten([(family, place.name, name)])
                if variant is not self.graph:
                    error = max(metric(replay.run(variant), replay.outputs) for replay in replays)
                    effects[name] = Effect(error, before - seconds(variant), weights - weight_bytes(variant))
            found.append(effects)
        progress(total, total)
        return found

    def choices(self, effects: Sequence[Mapping[str, Effect]], power: int) -> list[list[Choice]]:
        """For `allocate`. Costs: "error" in the power that adds up; "time" and "bytes", less what they are now."""
        nothing = Choice(EXACT, {"error": 0.0, "time": 0.0, "bytes": 0.0})
        return [
            [nothing, *(Choice(name, {"error": e.error**power, "time": -e.seconds, "bytes": -float(e.bytes)}) for name, e in here.items())]
            for here in effects
        ]

    def chosen(self, allocation: Allocation) -> list[tuple[Family, str, str]]:
        """Where something changes."""
        pairs = zip(self.places, allocation.names, strict=True)
        return [(family, place.name, name) for (family, place), name in pairs if name != EXACT]


def predicted_seconds(graph: Graph, device: Device) -> float:
    """Of a call: for each contraction, reduction, gather and the like the longer of computing and of moving its operands and result."""
    rate = max(device.gemm.values())
    total = 0.0
    for node in order(graph):
        if node.op.category in _FREE:
            continue
        cost = node.op.cost(tuple(i.type for i in node.inputs), node.type, node.attrs)
        total += max(hint(cost.flops, graph.symbols) / rate, hint(cost.bytes, graph.symbols) / device.copy)
    return total


def weight_bytes(graph: Graph) -> int:
    """Of the constants that the graph reads; computes none."""
    sizes = {node.attrs["data"]: hint(node.tensor.nbytes, graph.symbols) for node in order(graph) if node.op.name == "constant"}
    return sum(sizes.values())

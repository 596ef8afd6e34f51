"""What a search for schedules takes and gives: a GPU to measure on, and what was found for each kernel."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch

from ..codegen.program import devices_of
from ..codegen.target import TARGETS, Target
from ..codegen.triton.driver import driver_of
from ..ir.graph import Graph
from .events import EventClock
from .gpus import Gpu, gpu_in_hand, gpu_name

START, LIBRARY = "start", "library"
"""Candidates beside other schedules: the one that a template starts from, and the contraction by the library."""


@dataclass(frozen=True)
class Bench:
    """A GPU to measure on. device: its type in graphs; identity: its name in the database; clock: seconds of its work."""

    gpu: Gpu
    identity: str
    clock: Callable[[], float]
    targets: Mapping[str, Target]
    device: str = "cuda"


def bench_of(graph: Graph) -> Bench | None:
    """The GPU that a graph is on, if it is on one that is here."""
    places = [torch.device(d) for d in devices_of(graph) if d.startswith("cuda")]
    if len(places) != 1 or not torch.cuda.is_available():
        return None
    index = torch.cuda.current_device() if places[0].index is None else places[0].index
    driver = driver_of(index)
    if driver is None:
        return None
    return Bench(gpu_in_hand(index, driver.facts.architecture), gpu_name(index), EventClock(index), TARGETS)


@dataclass(frozen=True)
class Searched:
    """What was found for a kernel. schedule: "" where it stays the one its template starts from, LIBRARY where the contraction goes
    there. legal, compiled: how many schedules there are, and were compiled. seconds, start_seconds: of a call, by the chosen schedule and
    by the one to start from; measured, or predicted. why: in words.
    """

    kernel: str
    schedule: str
    legal: int
    compiled: int
    seconds: float
    start_seconds: float
    measured: bool
    why: str


@dataclass
class Found:
    """schedules: of regions, by `region_name`; library: signatures of contractions and attentions that it computes faster; measured: of all
    that were measured."""

    schedules: dict[str, str] = field(default_factory=dict)
    library: set[str] = field(default_factory=set)
    measured: set[str] = field(default_factory=set)
    lines: list[Searched] = field(default_factory=list)

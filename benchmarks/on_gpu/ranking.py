"""Does the cost model order schedules as the device does? Rank correlation of predicted with measured seconds, over some that are legal."""

from __future__ import annotations

import random
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any

import torch
from tilewright.codegen.build import cores
from tilewright.codegen.lower import lower
from tilewright.codegen.program import Program
from tilewright.codegen.triton.driver import driver_of
from tilewright.codegen.triton.spaces import Offer, offers
from tilewright.codegen.triton.templates import text_of
from tilewright.ir import ops
from tilewright.search.cost import predicted_seconds, spearman
from tilewright.search.gpus import Gpu, gpu_in_hand, of_target

from .clock import Answer, in_a_line, race
from .kernels import soft
from .place import Build, Kind, NotHere, Place, graph_of

BF16 = torch.bfloat16
SCHEDULES, DRAWS = 24, 20_000
SHORT = 0.05
"""Seconds for the rounds of one schedule."""


@dataclass(frozen=True)
class Ranked:
    """A kernel. kinds: of its inputs, in the size of a place."""

    build: Build
    kinds: Callable[[Place], list[Kind]]


def _shape(place: Place, *sizes: int) -> tuple[int, ...]:
    return tuple(place.size(size, min(size, 16)) for size in sizes)


RANKED: dict[str, Ranked] = {
    "product": Ranked(lambda x, w: ops.linear(x, w), lambda at: [(BF16, _shape(at, 4096, 4096))] * 2),
    "one row": Ranked(lambda x, w: ops.linear(x, w), lambda at: [(BF16, _shape(at, 1, 4096)), (BF16, _shape(at, 4096, 4096))]),
    "attention": Ranked(
        lambda q, k, v: ops.op("attention")(q, k, v, causal=True, scale=0.125),
        lambda at: [(BF16, (at.size(64, 1), *_shape(at, 4096, 64)))] * 3,
    ),
    "softmax": Ranked(soft, lambda at: [(torch.float32, _shape(at, 16_384, 1024))]),
}


def ranked(name: str, place: Place) -> Answer:
    """The correlation, and times of the schedule that a template starts from, of the one that is ranked first, and of the fastest."""
    one, gpu = RANKED[name], _gpu(place)
    kinds = one.kinds(place)
    kernel = lower(graph_of(one.build, kinds, place.device), "row")
    schedules = drawn(offers(kernel, gpu.target), place.size(SCHEDULES, 3))
    tried = _measured(one.build, kinds, schedules, place)
    taken = {schedule: seconds for schedule, seconds in tried.items() if isinstance(seconds, float)}
    if len(taken) < 2:
        raise NotHere(f"{len(taken)} schedules ran: {next((s for s in tried.values() if isinstance(s, str)), '')}")
    predicted = {schedule: predicted_seconds(kernel, schedule, gpu) for schedule in taken}
    first = min(taken, key=predicted.__getitem__)
    return {
        "correlation": spearman(list(predicted.values()), list(taken.values())), "schedules": len(taken),
        "failed_schedules": len(tried) - len(taken), "start": taken.get(schedules[0]), "ranked_first": taken[first],
        "best": min(taken.values()), "times": {str(schedule): [predicted[schedule], taken[schedule]] for schedule in taken},
        "reasons": {str(schedule): reason for schedule, reason in tried.items() if isinstance(reason, str)},
    }  # fmt: skip


def _gpu(place: Place) -> Gpu:
    driver = driver_of(torch.device(place.device).index) if place.on_gpu else None
    return of_target("sm_90") if driver is None else gpu_in_hand(driver.index, driver.facts.architecture)


def drawn(offered: list[Offer], count: int) -> list[Any]:
    """Some legal schedules, the same in every run, and first the one that a template starts from."""
    chance, found = random.Random(0), dict.fromkeys([offered[0].start])
    for _ in range(DRAWS):
        offer = chance.choice(offered)
        values = {name: chance.choice(choices) for name, choices in offer.space.variables.items()}
        if offer.space.broken(values) is None:
            found[offer.schedule(values)] = None
        if len(found) >= count:
            break
    return list(found)


def _measured(build: Build, kinds: list[Kind], schedules: list[Any], place: Place) -> dict[Any, float | str]:
    """Seconds of each schedule, or why it does not run."""

    def made(schedule: Any) -> Program | str:
        try:
            return place.kernel(build, kinds, text_of(schedule))
        except Exception as error:  # what the space calls legal, and the printer, Triton or the device does not
            return in_a_line(error)

    with ThreadPoolExecutor(cores()) as pool:
        programs = dict(zip(schedules, pool.map(made, schedules)))
    quick, inputs = replace(place, seconds=min(SHORT, place.seconds)), place.tensors(kinds)
    found: dict[Any, float | str] = {s: p for s, p in programs.items() if isinstance(p, str)}
    for schedule, program in programs.items():
        if isinstance(program, Program):
            one = race(quick, {"": [lambda run=program.run: run(list(inputs))]})[""]
            found[schedule] = one.get("seconds", one.get("failed", ""))
    return found

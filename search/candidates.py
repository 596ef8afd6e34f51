"""The schedules of a kernel worth trying on a GPU: enumerated, ranked by the cost model, the best compiled and ranked again.

    2132 legal  -->  12 by predicted seconds  -->  compiled: registers, spills, shared memory  -->  best first, those that spill last

No GPU takes part. What compiling told is kept in the database, so that it is asked once.
"""

from __future__ import annotations

import hashlib
import itertools
import math
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, fields, replace
from functools import partial
from typing import Any

import triton

from ..codegen.build import cores
from ..codegen.kernel import Kernel
from ..codegen.target import Usage
from ..codegen.triton.binary import SHARED_BYTES, OfflineError
from ..codegen.triton.legalize import UnsupportedByTriton
from ..codegen.triton.offline import launch_usage, most
from ..codegen.triton.prebuilt import key
from ..codegen.triton.program import Program
from ..codegen.triton.spaces import offers
from ..codegen.triton.templates import build
from ..codegen.triton.tiles import UNITS
from .cost import seconds
from .database import Database
from .gpus import Gpu
from .tiles import NoSchedule, schedules
from .tuner import reading, writing
from .work import Estimate, estimator

TOGETHER = 4
"""Of them at a time."""

ALIKE = 2
"""Of those that differ in the pipeline and in the order of programs only, so many."""

NEAR = 0.01
"""Predicted seconds that differ by less are equal: then the schedule nearest to the one a template starts from comes first."""


@dataclass(frozen=True)
class Candidate:
    """seconds: predicted. usage: of the compiled kernel. failure: why there is none, "" where it was not compiled, or could be."""

    schedule: Any
    seconds: float
    usage: Usage | None = None
    failure: str = ""

    @property
    def spills(self) -> bool:
        return self.usage is not None and self.usage.spills > 0


@dataclass(frozen=True)
class Candidates:
    """start: what the template starts from. legal: how many schedules there are. ranked: all of them, best first by prediction alone."""

    kernel: Kernel
    start: Any
    legal: int
    ranked: tuple[Candidate, ...]
    estimate: Estimate
    gpu: Gpu

    @property
    def predicted(self) -> float:
        """Of the schedule that the template starts from."""
        return seconds(self.estimate(self.start), self.gpu)


_FREE = frozenset({"num_stages", "group_m"})


def _kind(schedule: Any) -> tuple[Any, ...]:
    return tuple(getattr(schedule, f.name) for f in fields(schedule) if f.name not in _FREE)


def candidates(kernel: Kernel, gpu: Gpu, sizes: Mapping[str, int] = {}) -> Candidates:
    """The legal schedules of a kernel. sizes: of symbolic extents, to predict for. Raises UnsupportedByTriton."""
    kernel = replace(kernel, schedule="")
    made, estimate = offers(kernel, gpu.target if gpu.target in UNITS else None), estimator(kernel, sizes)
    start = made[0].start
    found: list[Candidate] = []
    for offer in made:
        try:
            values = schedules(offer.space)
        except NoSchedule:
            continue
        found.extend(Candidate(s, seconds(estimate(s), gpu)) for s in map(offer.schedule, values))
    found.sort(key=partial(_order, start))
    return Candidates(kernel, start, len(found), tuple(found), estimate, gpu)


def _order(start: Any, candidate: Candidate) -> tuple[Any, ...]:
    """Those that fail last, before them those that spill; then by predicted seconds, as far as these tell anything."""
    rank = round(math.log(candidate.seconds) / NEAR)
    far = sum(getattr(start, f.name) != getattr(candidate.schedule, f.name) for f in fields(start))
    return (bool(candidate.failure), candidate.spills, rank, far, candidate.seconds)


def explored(found: Candidates, database: Database, count: int) -> list[Candidate]:
    """About `count` schedules with what the compiler says of them, best first: spilling ones behind all others, failing ones last.

    The one that a template starts from is among them. They are compiled a few at a time: once some spill, those that are thought to take
    as many registers are left out.
    """
    made: list[Candidate] = []
    most_registers = math.inf
    waiting = _various(found)
    with ThreadPoolExecutor(cores()) as pool:
        while len(made) < count:
            room = min(TOGETHER, count - len(made))
            chosen = [found.start] if not made else []
            fitting = (s for s in waiting if s != found.start and found.estimate(s)[0].registers < most_registers)
            chosen += itertools.islice(fitting, room - len(chosen))
            if not chosen:
                break
            made += pool.map(lambda schedule: _compiled(found, schedule, database), chosen)
            most_registers = min([found.estimate(c.schedule)[0].registers for c in made if c.spills], default=math.inf)
    return sorted(made, key=partial(_order, found.start))


def _various(found: Candidates) -> Iterator[Any]:
    """All schedules, best first, but few of those that are alike."""
    alike: dict[Any, int] = {}
    for candidate in found.ranked:
        kind = _kind(candidate.schedule)
        alike[kind] = alike.get(kind, 0) + 1
        if alike[kind] <= ALIKE:
            yield candidate.schedule


def _compiled(found: Candidates, schedule: Any, database: Database) -> Candidate:
    works = found.estimate(schedule)
    try:
        usage = usage_of(build(found.kernel, schedule), found.gpu.target, database)
    except (UnsupportedByTriton, OfflineError) as error:
        return Candidate(schedule, seconds(works, found.gpu), failure=str(error))
    most = SHARED_BYTES.get(found.gpu.target, found.gpu.shared)
    if usage.shared > most:
        reason = f"it takes {usage.shared} bytes of shared memory, and there are {most} for one program"
        return Candidate(schedule, seconds(works, found.gpu), usage, reason)
    return Candidate(schedule, seconds(works, found.gpu, usage), usage)


def usage_of(program: Program, target: str, database: Database) -> Usage:
    """What the launches of a program take, the most of each: from the database, else compiled. Raises OfflineError."""
    text = f"{triton.__version__} {' '.join(key(program, one, target) for one in program.launches)}"
    digest = hashlib.sha256(text.encode()).hexdigest()
    known = reading(lambda: database.usage(digest), None)
    if known is None:
        known = most([launch_usage(program, one, target) for one in program.launches])
        writing(database, partial(database.put_usage, digest, known))
    return known

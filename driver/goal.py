"""`Goal`: what a split is for: the machines, the links between them, and what is to be made least."""

from __future__ import annotations

import math
from dataclasses import dataclass

from ..search.stages import OBJECTIVES, Link, Machine
from .budget import quantity
from .errors import BadOption

ROUNDED_ERROR = 0.05
"""What rounding may cost where the user does not say."""


@dataclass(frozen=True)
class Goal:
    """machines: one for each stage; links: from one to the next, () for such that take no time. objective: of `search.stages.OBJECTIVES`.
    shares: of the model's time, what each stage may take at most. round_cut: what crosses does so in 8 bits, as long as the results are
    not off by more than `max_error`. measure: how long segments take is measured; else it is told by the rates of this machine.
    Raises BadOption.
    """

    machines: tuple[Machine, ...] = (Machine(), Machine())
    links: tuple[Link, ...] = ()
    objective: str = "throughput"
    shares: tuple[float, ...] = ()
    round_cut: bool = False
    max_error: float = ROUNDED_ERROR
    measure: bool = True

    def __post_init__(self) -> None:
        count = len(self.machines)
        if count < 2:
            raise BadOption(option="stages", reason="a model is split into two or more")
        if self.objective not in OBJECTIVES:
            raise BadOption(option="objective", reason=f"it is {', '.join(OBJECTIVES)}, not {self.objective!r}")
        if self.links and len(self.links) != count - 1:
            raise BadOption(option="links", reason=f"there are {count - 1} between {count} stages, not {len(self.links)}")
        if self.shares and len(self.shares) != count:
            raise BadOption(option="shares", reason=f"there are {count} stages, not {len(self.shares)}")


def goal_from(
    stages: int,
    objective: str,
    memory: str | None = None,
    compute: str | None = None,
    slowness: str | None = None,
    bandwidth: str | None = None,
    delay: str | None = None,
    round_cut: bool = False,
    max_error: float = ROUNDED_ERROR,
    measure: bool = True,
) -> Goal:
    """The goal of a command line: of each option one value for all, or one for each stage (link), "-" for no limit. Raises BadOption."""
    if stages < 2:
        raise BadOption(option="stages", reason="a model is split into two or more")
    room = _amounts("memory", memory, stages, math.inf)
    slow = _amounts("slowness", slowness, stages, 1.0)
    wide = _amounts("bandwidth", bandwidth and bandwidth.replace("/s", ""), stages - 1, math.inf)
    late = _amounts("delay", delay, stages - 1, 0.0)
    return Goal(
        tuple(Machine(memory=m, slowness=s) for m, s in zip(room, slow)),
        tuple(Link(w, d) for w, d in zip(wide, late)),
        objective,
        _amounts("compute", compute, stages, math.inf, 1.0),
        round_cut,
        max_error,
        measure,
    )


def _amounts(option: str, text: str | None, count: int, none: float, whole: float | None = None) -> tuple[float, ...]:
    """`count` amounts. none: where nothing, or "-", is given. whole: what a percentage is of, None where there is no such."""
    words = [word.strip() for word in (text or "-").split(",")]
    if len(words) not in (1, count):
        raise BadOption(option=option, reason=f"give one value for all, or {count}, not {len(words)}")
    if whole is None and "%" in (text or ""):
        raise BadOption(option=option, reason=f"{text!r} is a share; give an amount")
    found = [none if word == "-" else quantity(option, word, whole or 1.0) for word in words]
    if any(value is None or not value > 0 for value in found) and option != "delay":
        raise BadOption(option=option, reason="it is more than nothing")
    return tuple(float(value or 0.0) for value in (found * count if len(found) == 1 else found))

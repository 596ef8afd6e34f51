"""`Goal`: what a split is for: the machines, the links between them, and what is to be made least."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass

from ..search.stages import OBJECTIVES, Link, Machine
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


_BYTES = {"": 1.0, "b": 1.0, "kb": 1e3, "mb": 1e6, "gb": 1e9}
_UNITS: Mapping[str, Mapping[str, float]] = {
    "memory": _BYTES,
    "compute": {"": 1.0, "%": 0.01},
    "slowness": {"": 1.0, "x": 1.0},
    "bandwidth": {f"{unit}/s" if unit else "": size for unit, size in _BYTES.items()},
    "delay": {"": 1.0, "s": 1.0, "ms": 1e-3, "us": 1e-6},
}
_WRITTEN = {"memory": "200MB", "compute": "20%", "slowness": "5", "bandwidth": "10MB/s", "delay": "5ms"}
_AMOUNT = re.compile(r"(\d+(?:\.\d*)?(?:e[+-]?\d+)?)\s*(%|[a-zA-Z/]*)")


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
    wide = _amounts("bandwidth", bandwidth, stages - 1, math.inf)
    late = _amounts("delay", delay, stages - 1, 0.0)
    return Goal(
        tuple(Machine(memory=m, slowness=s) for m, s in zip(room, slow)),
        tuple(Link(w, d) for w, d in zip(wide, late)),
        objective,
        _amounts("compute", compute, stages, math.inf),
        round_cut,
        max_error,
        measure,
    )


def _amounts(option: str, text: str | None, count: int, none: float) -> tuple[float, ...]:
    """`count` amounts. none: where nothing, or "-", is given."""
    words = [word.strip() for word in (text or "-").split(",")]
    if len(words) not in (1, count):
        raise BadOption(option=option, reason=f"give one value for all, or {count}, not {len(words)}")
    found = tuple(none if word == "-" else _amount(option, word) for word in words)
    return found * count if len(found) == 1 else found


def _amount(option: str, word: str) -> float:
    match = _AMOUNT.fullmatch(word)
    unit = match[2].lower() if match else ""
    if match is None or unit not in _UNITS[option]:
        raise BadOption(option=option, reason=f"{word!r} is no amount; write for example {_WRITTEN[option]!r}")
    value = float(match[1]) * _UNITS[option][unit]
    if not value and option != "delay":
        raise BadOption(option=option, reason="it is more than nothing")
    return value

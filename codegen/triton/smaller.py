"""Schedules to fall back on, where a device has not enough registers or shared memory for the one that was chosen."""

from __future__ import annotations

from dataclasses import fields, replace
from typing import Any

from .features import FEATURES

TRIES = 4
"""Schedules for one kernel."""

LEAST = {"xblock": 1, "rblock": 16, "block_m": 16, "block_n": 16, "block_k": 16}
"""Lengths of blocks, by the name that every template has for them, and how small they may become."""


def smaller(schedule: Any) -> Any:
    """The same walk with less at hand at once: no pipeline, and the longest block halved. None where it cannot become smaller.

    Tiles(block_m=128, block_n=64, num_stages=3)    -->    Tiles(block_m=64, block_n=64, num_stages=1)

    What not every GPU has is left out before.
    """
    options = [name for name in FEATURES if getattr(schedule, name, False)]
    if options:
        warps = schedule.num_warps * (2 if "specialized" in options else 1)  # Triton had added a second group that multiplied
        return replace(schedule, num_warps=warps, **{name: type(getattr(schedule, name))() for name in options})
    kept = {"rblock"} if getattr(schedule, "persistent", False) else set[str]()  # the block that holds a whole extent
    lengths = {f.name: getattr(schedule, f.name) for f in fields(schedule) if f.name in LEAST and f.name not in kept}
    longest = max((name for name, length in lengths.items() if length > LEAST[name]), key=lengths.__getitem__, default=None)
    return None if longest is None else replace(schedule, num_stages=1, **{longest: lengths[longest] // 2})

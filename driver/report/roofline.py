"""Kernels under the roof of their machine: operations per byte across, operations per second up (Williams, Waterman, Patterson, 2009)."""

from __future__ import annotations

import re

from markupsafe import Markup

from ..outline import Machine
from ..receipt import KernelLine, Receipt
from ..words import duration, scaled
from .charts import Dot, Plot, axis, dots, finite
from .marks import mark
from .parts import Figure

_VARYING = re.compile(r"\[[^\]]*[A-Za-z_]")


def roofline(receipt: Receipt) -> tuple[Figure, ...]:
    """Nothing where the machine is not known."""
    machine = receipt.machine
    if machine is None or len(finite([machine.bandwidth, machine.rate], positive=True)) < 2:
        return ()
    points = [*_kernels(receipt, machine), *_whole(receipt)]
    if not points:
        return ()
    ridge = machine.rate / machine.bandwidth
    across = axis([p.x for p in points] + [ridge / 4, ridge * 4], lambda v: f"{v:g}", log=True)
    up = axis([p.y for p in points] + [machine.rate], lambda v: scaled(v).strip(), log=True)
    plot = Plot(across, up)
    low = max(across.low, up.low / machine.bandwidth)  # where the roof enters the picture
    roof = mark("path", d="M" + "L".join(_point(plot, x, machine) for x in (low, ridge, across.high)), cls="roof")
    picture = plot.made("kernels under the roof", "operations per byte", "operations per second", [roof, *dots(plot, points)])
    return (Figure(picture, _caption(machine), _legend(points)),)


def _point(plot: Plot, intensity: float, machine: Machine) -> str:
    return f"{plot.x(intensity):.1f} {plot.y(_attainable(intensity, machine)):.1f}"


def _attainable(intensity: float, machine: Machine) -> float:
    return min(intensity * machine.bandwidth, machine.rate)


def _kernels(receipt: Receipt, machine: Machine) -> list[Dot]:
    """Where they were timed one by one, by their times; else at the roof, which is what they can reach at most."""
    seconds = {s.kernel: s.seconds for s in receipt.schedules if s.measured and s.seconds > 0}
    found = []
    for k in receipt.kernels:
        if k.flops <= 0 or k.bytes <= 0:
            continue
        intensity = k.flops / k.bytes
        if k.name in seconds:
            rate = k.flops / max(k.uses, 1) / seconds[k.name]
            found.append(Dot(intensity, rate, f"{k.name}: {_rate(rate)}, {duration(seconds[k.name])} a call", "timed", 4.5))
        else:
            rate = _attainable(intensity, machine)
            found.append(Dot(intensity, rate, f"{k.name}: at most {_rate(rate)}, {_least(k, machine)} at least", "bound", 4.0))
    return found


def _least(kernel: KernelLine, machine: Machine) -> str:
    return duration(max(kernel.bytes / machine.bandwidth, kernel.flops / machine.rate))


def _whole(receipt: Receipt) -> list[Dot]:
    """The model as it was measured, and by eager. Where sizes vary, operations are counted for others than the example's: nothing then."""
    flops, moved, speed = receipt.coverage.flops.total, receipt.coverage.bytes.total, receipt.speed
    if speed is None or flops <= 0 or moved <= 0 or speed.ours <= 0 or speed.eager <= 0 or _varies(receipt):
        return []
    ours, eager = flops / speed.ours, flops / speed.eager
    at = flops / moved
    return [Dot(at, eager, f"the model by eager: {_rate(eager)}", "eager", 5.0), Dot(at, ours, f"the model: {_rate(ours)}", "chosen", 6.0)]


def _varies(receipt: Receipt) -> bool:
    return not receipt.arena.isdigit() or any(_VARYING.search(word) for word in (receipt.after.words if receipt.after else ()))


def _rate(rate: float) -> str:
    return f"{scaled(rate)}flop/s"


def _caption(machine: Machine) -> str:
    how = "measured on" if machine.measured else "by the data sheet of"
    return f"The roof: {scaled(machine.bandwidth)}B/s from memory and {_rate(machine.rate)} in float32, {how} {machine.name}."


_LEGEND = {
    "bound": "kernel, at what it can reach at most: not timed alone",
    "timed": "kernel, as timed",
    "eager": "the model by eager",
    "chosen": "the model as it runs",
}


def _legend(points: list[Dot]) -> tuple[tuple[str, str], ...]:
    used: dict[str, Markup | str] = {p.cls: "" for p in points}
    return tuple((cls, text) for cls, text in _LEGEND.items() if cls in used)

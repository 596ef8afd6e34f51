"""Charts as SVG, drawn for 340 units of width: readable on a phone, and scaled up elsewhere. Colours are classes of the style sheet."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from markupsafe import Markup

from .marks import clipped, mark

WIDTH = 340.0
LEFT, RIGHT, TOP, BOTTOM = 46.0, 20.0, 10.0, 34.0
COLOURS = 8

Words = Callable[[float], str]


@dataclass(frozen=True)
class Axis:
    """From a quantity to a place; `words` writes its ticks. Logarithmic axes hold positive numbers only."""

    low: float
    high: float
    words: Words
    log: bool = False

    def share(self, value: float) -> float:
        """Of the axis: 0 at its beginning, 1 at its end; what lies outside is at the nearer end."""
        value = min(max(value, self.low), self.high)
        if self.log:
            return math.log(value / self.low) / math.log(self.high / self.low)
        return (value - self.low) / (self.high - self.low)

    def ticks(self) -> list[float]:
        if not self.log:
            step = _nice((self.high - self.low) / 4)
            first = math.ceil(self.low / step)
            return [step * i for i in range(first, math.floor(self.high / step * (1 + 1e-9)) + 1)]
        first, last = math.ceil(math.log10(self.low) - 1e-9), math.floor(math.log10(self.high) + 1e-9)
        every = max(1, math.ceil((last - first) / 5))
        return [10.0**i for i in range(first, last + 1, every)]


def _nice(step: float) -> float:
    """The next of 1, 2, 5 times a power of ten."""
    power = 10.0 ** math.floor(math.log10(step))
    return next(n * power for n in (1, 2, 5, 10) if n * power >= step * (1 - 1e-9))


def finite(values: Sequence[float], positive: bool = False) -> list[float]:
    """Those that can be drawn."""
    return [v for v in values if math.isfinite(v) and abs(v) < 1e100 and (v > 1e-100 or not positive)]


def axis(values: Sequence[float], words: Words, log: bool = False) -> Axis:
    """One that holds all these values, as far as they can be drawn, with some air; from one power of ten to another if `log`."""
    known = finite(values, positive=log) or [1.0]
    low, high = min(known), max(known)
    if log:
        first, last = math.floor(math.log10(low) + 1e-9), math.ceil(math.log10(high) - 1e-9)
        return Axis(10.0**first, 10.0 ** max(last, first + 1), words, log=True)
    air = (high - low) * 0.08 or abs(high) * 0.1 or 1.0
    return Axis(low - air, high + air, words)


@dataclass(frozen=True)
class Plot:
    """A field with two axes; `x` and `y` give places on the page."""

    across: Axis
    up: Axis
    height: float = 210.0

    def x(self, value: float) -> float:
        return LEFT + self.across.share(value) * (WIDTH - LEFT - RIGHT)

    def y(self, value: float) -> float:
        return TOP + (1 - self.up.share(value)) * (self.height - TOP - BOTTOM)

    def made(self, title: str, across: str, up: str, marks: Sequence[Markup]) -> Markup:
        """With ticks, names of both axes, and a title for those who do not see it."""
        foot, right = self.height - BOTTOM, WIDTH - RIGHT
        grid = [mark("line", x1=LEFT, x2=right, y1=self.y(t), y2=self.y(t), cls="grid") for t in self.up.ticks()]
        grid += [mark("text", self.up.words(t), x=LEFT - 5, y=self.y(t) + 4, cls="tick end") for t in self.up.ticks()]
        grid += [mark("text", self.across.words(t), x=self.x(t), y=foot + 14, cls="tick mid") for t in self.across.ticks()]
        names = [mark("text", across, x=right, y=self.height - 4, cls="axis end"), mark("text", up, x=LEFT + 4, y=TOP + 4, cls="axis")]
        frame = mark("path", d=f"M{LEFT} {TOP}V{foot}H{right}", cls="frame")
        return chart(title, self.height, *grid, frame, *marks, *names)


def chart(title: str, height: float, *parts: Markup) -> Markup:
    return mark("svg", mark("title", title), *parts, viewBox=f"0 0 {WIDTH:g} {height:g}", cls="chart", role="img", aria_label=title)


@dataclass(frozen=True)
class Dot:
    x: float
    y: float
    about: str
    cls: str = "dot"
    size: float = 4.0


def dots(plot: Plot, points: Sequence[Dot]) -> list[Markup]:
    """Those that can be drawn."""
    return [
        mark("circle", mark("title", d.about), cx=plot.x(d.x), cy=plot.y(d.y), r=d.size, cls=d.cls)
        for d in points
        if len(finite((d.x, d.y))) == 2
    ]


@dataclass(frozen=True)
class Bar:
    """name, length and what is written behind it; `colour` is 0 ... COLOURS - 1."""

    name: str
    value: float
    text: str
    colour: int = 0


def bars(title: str, rows: Sequence[Bar]) -> Markup:
    """Horizontal bars from zero, a line each."""
    names, step = 118.0, 20.0
    longest = max(finite([r.value for r in rows]), default=0.0) or 1.0
    parts: list[Markup] = []
    for i, row in enumerate(rows):
        y = 2 + i * step
        length = (WIDTH - names - 72) * max(0.0, min(row.value / longest, 1.0)) if finite([row.value]) else 0.0
        parts.append(mark("text", clipped(row.name, 18), mark("title", row.name), x=names - 6, y=y + 13, cls="name end"))
        parts.append(mark("rect", x=names, y=y + 3, width=max(length, 1.0), height=step - 7, rx=2, cls=f"c{row.colour % COLOURS}"))
        parts.append(mark("text", row.text, x=names + max(length, 1.0) + 5, y=y + 13, cls="tick"))
    return chart(title, step * len(rows) + 4, *parts)


def columns(title: str, rows: Sequence[Bar], high: float, ticks: Sequence[float]) -> Markup:
    """A column for each row, side by side, against a scale from 0 to `high`."""
    plot = Plot(Axis(0.0, float(max(len(rows), 1)), str), Axis(0.0, high, lambda v: f"{v:g}"), height=150.0)
    foot, step = plot.y(0.0), plot.x(1.0) - plot.x(0.0)
    gap = 1.0 if step > 4 else 0.0
    parts = [mark("line", x1=LEFT, x2=WIDTH - RIGHT, y1=plot.y(t), y2=plot.y(t), cls="grid") for t in ticks]
    parts += [mark("text", f"{t:g}", x=LEFT - 5, y=plot.y(t) + 4, cls="tick end") for t in ticks]
    for i, row in enumerate(rows):
        top = plot.y(row.value) if finite([row.value]) else foot
        place = {"x": plot.x(float(i)) + gap / 2, "width": min(step - gap, 40.0), "y": top, "height": max(foot - top, 0.5)}
        parts.append(mark("rect", mark("title", f"{row.name}: {row.text}"), **place, cls=f"c{row.colour % COLOURS}"))
    frame = mark("path", d=f"M{LEFT} {foot}H{WIDTH - RIGHT}", cls="frame")
    names = [mark("text", "layers, in the order of the model", x=WIDTH - RIGHT, y=foot + 16, cls="axis end")]
    return chart(title, 150.0, *parts, frame, *names)


def scale(title: str, marks: Sequence[tuple[str, float, str]], words: Words) -> Markup:
    """Values on one logarithmic line, each (name, value, class); what is 0 stands at its beginning."""
    line = axis([v for _, v, _ in marks], words, log=True)
    wide = Axis(line.low / 10, line.high, words, log=True)
    plot = Plot(wide, Axis(0.0, 1.0, str), height=40.0 + 18.0 * len(marks))
    foot = plot.height - 26
    parts = [mark("path", d=f"M{LEFT} {foot}H{WIDTH - RIGHT}", cls="frame")]
    parts += [mark("text", words(t), x=plot.x(t), y=foot + 16, cls="tick mid") for t in wide.ticks()]
    for i, (name, value, cls) in enumerate(marks):
        x, y = plot.x(value if value > 0 else wide.low) if finite([value]) else WIDTH - RIGHT, 14 + 18.0 * i
        right = x < WIDTH * 0.6
        parts.append(mark("line", x1=x, x2=x, y1=y, y2=foot, cls=f"stem {cls}"))
        parts.append(mark("circle", cx=x, cy=y, r=4, cls=f"dot {cls}"))
        parts.append(mark("text", name, x=x + (8 if right else -8), y=y + 4, cls="tick" if right else "tick end"))
    return chart(title, plot.height, *parts)

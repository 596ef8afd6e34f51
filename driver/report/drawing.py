"""A view of a graph as SVG: boxes in rows, lines between them."""

from __future__ import annotations

import unicodedata
from collections.abc import Iterator

from markupsafe import Markup

from .groups import Item, View
from .layout import Placed, place
from .marks import clipped, mark, number

BOX, ROW, MARGIN = 38.0, 66.0, 14.0
"""Heights of a box and of a row, and what is left around all."""
LETTER, PADDING = 6.9, 22.0
LONGEST = 26
"""Letters of a text in a box."""


def drawn(view: View) -> Markup:
    """The drawing of a view. It does not depend on the view's path: equal modules are equal texts."""
    at = place([_width(item) for item in view.items], view.edges)
    rows = max(at.row, default=0) + 1
    width, height = at.width + 2 * MARGIN, rows * ROW - (ROW - BOX) + 2 * MARGIN
    pieces = dict.fromkeys(piece for edge in view.edges for piece in _pieces(at, *edge))  # what lines share is drawn once
    lines = [mark("path", d="".join(pieces), cls="edge")] if pieces else []
    lines += [mark("path", d="".join(_pieces(at, a, b)), cls="edge back") for a, b in view.back]
    boxes = [_box(item, at.x[i] + MARGIN, at.row[i] * ROW + MARGIN) for i, item in enumerate(view.items)]
    return mark("svg", *lines, *boxes, viewBox=f"0 0 {number(width)} {number(height)}", width=width, height=height, cls="graph")


def _width(item: Item) -> float:
    return max(_letters(clipped(text, LONGEST)) for text in (item.label, item.detail)) * LETTER + PADDING


def _letters(text: str) -> int:
    return max(4, sum(2 if unicodedata.east_asian_width(c) in "WF" else 1 for c in text))


def _box(item: Item, x: float, y: float) -> Markup:
    width = _width(item)
    single = not item.detail
    lines = [mark("text", clipped(item.label, LONGEST), x=x, y=y + (BOX / 2 + 4 if single else 16.0), cls="label")]
    if not single:
        lines.append(mark("text", clipped(item.detail, LONGEST), x=x, y=y + 30.0, cls="detail"))
    opens = item.opens is not None
    opening = {"tabindex": 0, "role": "button", "data_open": item.opens, "aria_label": f"open {item.about}"} if opens else {}
    rounded = BOX / 2 if item.kind in ("outside", "input") else 7.0
    behind = mark("rect", x=x - width / 2 + 4, y=y + 4, width=width, height=BOX, rx=rounded) if opens else None
    box = mark("rect", x=x - width / 2, y=y, width=width, height=BOX, rx=rounded)
    return mark("g", mark("title", item.about) if item.about else None, behind, box, *lines, cls=f"box {item.kind}", **opening)


def _pieces(at: Placed, a: int, b: int) -> Iterator[str]:
    """From below one box to above another; past the rows between them straight down."""
    x, y = at.x[a], at.row[a] * ROW + BOX
    for bend, row in at.routes.get((a, b), []):
        yield _curve(x, y, bend, row * ROW) + f"V{number(row * ROW + BOX + MARGIN)}"
        x, y = bend, row * ROW + BOX
    yield _curve(x, y, at.x[b], at.row[b] * ROW)


def _curve(x: float, y: float, to_x: float, to_y: float) -> str:
    x, y, to_x, to_y = x + MARGIN, y + MARGIN, to_x + MARGIN, to_y + MARGIN
    start, middle = f"M{number(x)} {number(y)}", number((y + to_y) / 2)
    if abs(x - to_x) < 0.5:
        return f"{start}V{number(to_y)}"
    return f"{start}C{number(x)} {middle} {number(to_x)} {middle} {number(to_x)} {number(to_y)}"

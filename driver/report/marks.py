"""`mark("rect", x=1, cls="bar")`: an element as text, its attributes and texts escaped. All SVG of the page is made of it."""

from __future__ import annotations

from markupsafe import Markup, escape


def mark(element: str, *children: str | None, **attributes: object) -> Markup:
    """Text children are escaped, elements are not; None is left out. An attribute's underscores are hyphens; `cls` is the class."""
    named = ((("class" if k == "cls" else k.replace("_", "-")), v) for k, v in attributes.items() if v is not None)
    head = "".join(f' {k}="{escape(number(v) if isinstance(v, float) else v)}"' for k, v in named)
    body = "".join(escape(child) for child in children if child is not None)
    return Markup(f"<{element}{head}>{body}</{element}>")


def number(value: float) -> str:
    """A coordinate: a tenth of a pixel is enough."""
    return f"{value:.1f}".removesuffix(".0")


def clipped(text: str, length: int) -> str:
    return text if len(text) <= length else text[: length - 1] + "\u2026"

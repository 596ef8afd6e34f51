"""`page(receipt)`: the receipt as HTML. The same receipt gives the same bytes.

The receipt may come from a stranger. Its texts are escaped by the template and by `mark`; the policy in the page's head allows one style
sheet and one script, by their hashes, and no connection at all.
"""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import jinja2
from markupsafe import Markup

from ..outline import Outline
from ..receipt import Receipt
from ..render import headline
from .cards import cards
from .drawing import drawn
from .groups import View, views
from .parts import Section
from .sections import sections


@dataclass(frozen=True)
class Side:
    """A graph's drawings. key: "before" or "after". pictures: distinct ones; `places` are, for each view, its path, the number of its
    picture, and the places that its boxes open.
    """

    key: str
    title: str
    about: str
    pictures: tuple[Markup, ...]
    places: tuple[tuple[str, int, tuple[int, ...]], ...]
    legend: tuple[tuple[str, str], ...]


def page(receipt: Receipt) -> str:
    style, script = _part("page.css"), _part("page.js")
    made = sections(receipt)
    sides = _sides(receipt)
    links = ([Section("graph", "The graph, before and after")] if sides else []) + made
    environment = jinja2.Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined)
    text = environment.from_string(_part("page.html")).render(
        receipt=receipt,
        headline=headline(receipt),
        cards=cards(receipt),
        sides=sides,
        sections=made,
        links=links,
        places=_places(sides),
        policy=_policy(style, script),
        style=Markup(style),
        script=Markup(script),
    )
    return text.encode("utf-8", "replace").decode()  # half of a surrogate pair cannot be written


def write(receipt: Receipt, path: Path) -> None:
    """Raises CannotWrite."""
    from ..artifact import replacing

    text = page(receipt)
    with replacing(path) as temporary:
        Path(temporary).write_text(text, encoding="utf-8")


def _part(name: str) -> str:
    return Path(__file__).with_name(name).read_text(encoding="utf-8")


def _policy(style: str, script: str) -> str:
    sources = {
        "default-src": "'none'",
        "style-src": _hash(style),
        "script-src": _hash(script),
        "base-uri": "'none'",
        "form-action": "'none'",
    }
    return "; ".join(f"{name} {value}" for name, value in sources.items())


def _hash(text: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"


def _sides(receipt: Receipt) -> list[Side]:
    captured = (("box op", "op"), ("box group", "module, opens"))
    runs = (("box kernel", "our kernel"), ("box library", "library call"), ("box eager", "eager"), ("box group", "module, opens"))
    return [
        _side(key, title, graph, legend)
        for key, title, graph, legend in (("before", "Before", receipt.before, captured), ("after", "After", receipt.after, runs))
        if graph is not None and graph.rows
    ]


def _side(key: str, title: str, graph: Outline, legend: tuple[tuple[str, str], ...]) -> Side:
    """Modules that look alike, as equal layers do, share a picture."""
    numbers: dict[tuple[object, ...], int] = {}
    pictures: list[Markup] = []
    places: list[tuple[str, int, tuple[int, ...]]] = []
    for view in views(graph):
        known = numbers.get(_look(view))
        if known is None:
            known = numbers[_look(view)] = len(pictures)
            pictures.append(drawn(view))
        places.append((view.path, known, view.children))
    steps = sum(1 for row in graph.rows if not row.startswith("i"))
    what = "ops" if key == "before" else "steps"
    return Side(key, title, f"{steps} {what}", tuple(pictures), tuple(places), legend)


def _look(view: View) -> tuple[object, ...]:
    return view.items, view.edges, view.back


def _places(sides: Sequence[Side]) -> Markup:
    """For the script: JSON in which nothing ends an element."""
    text = json.dumps({side.key: side.places for side in sides}, separators=(",", ":"))
    return Markup(text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026"))

"""What a page is made of, before it is HTML: cards, sections, figures, tables. All text is plain; the template escapes it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Union

from markupsafe import Markup


@dataclass(frozen=True)
class Amount:
    """A number in a table: as it is written, and as it is sorted."""

    text: str
    value: float


Cell = Union[str, int, Amount]


@dataclass(frozen=True)
class Table:
    """name: what the rows are, in the plural. code: the columns that hold names from the model or of code. Long ones start closed."""

    name: str
    columns: tuple[str, ...]
    rows: Sequence[Sequence[Cell]]
    code: tuple[str, ...] = ()

    @property
    def title(self) -> str:
        return f"{len(self.rows)} {self.name if len(self.rows) != 1 else self.name.removesuffix('s')}"

    @property
    def open(self) -> bool:
        return len(self.rows) <= 12


@dataclass(frozen=True)
class Figure:
    """legend: (class of the colour, what it stands for)."""

    picture: Markup
    caption: str
    legend: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True)
class Section:
    """One headed part of the page; `id` is what links lead to."""

    id: str
    title: str
    about: str = ""
    figures: tuple[Figure, ...] = ()
    tables: tuple[Table, ...] = ()
    lines: tuple[str, ...] = ()


@dataclass(frozen=True)
class Card:
    """A headline. meter: how much of the limit is used, a picture; over: whether it is more than all."""

    title: str
    value: str
    detail: str = ""
    limit: str = ""
    meter: Markup | None = None
    over: bool = False

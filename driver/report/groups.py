"""What is drawn of a graph at a time: a module with what is in it, small enough to read; what does not fit is a box to open.

    views(outline)  -->  View("", ...), View("encoder.layer.0", ...), View("encoder.layer.0.attention", ...)

A graph of 2000 ops becomes views of at most `LIMIT` boxes each. Ops are grouped by module path, and what has no path by their order.
"""

from __future__ import annotations

import heapq
import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Union

from ..outline import Outline, Row

LIMIT = 24
"""Boxes of a view, but for what comes from outside."""
OUTSIDE = 6
"""Values from outside that are drawn one by one."""
INPUTS = 8
DEPTH = 24
"""Of module paths, beyond which parts are not looked at."""
OUT = -1
"""What reads a row that leaves the graph."""


@dataclass
class Group:
    """The ops of a module, or a run of them; members are rows and smaller groups, in the order of their first rows.

    base: the path of the module, also where this is a run.
    """

    path: str
    base: str
    members: list[Union[int, Group]] = field(default_factory=list)

    def rows(self) -> Iterator[int]:
        for member in self.members:
            if isinstance(member, Group):
                yield from member.rows()
            else:
                yield member


@dataclass(frozen=True)
class Item:
    """A box. kind: of `outline.KINDS`, or "group", or "outside" for values that come from outside the view or leave it.

    opens: which of the view's children shows more.
    """

    label: str
    detail: str
    kind: str
    about: str = ""
    opens: int | None = None


@dataclass(frozen=True)
class View:
    """A module's drawing. Edges lead from lower items to higher ones; `back` are those that cannot, of modules called several times.

    children: places of the views that open, in the list of all.
    """

    path: str
    items: tuple[Item, ...]
    edges: tuple[tuple[int, int], ...]
    back: tuple[tuple[int, int], ...]
    children: tuple[int, ...]


def views(outline: Outline) -> list[View]:
    """The view of the whole graph first, then of every group that one of them leaves closed."""
    rows = outline.decoded()
    readers: list[set[int]] = [set() for _ in rows]
    for i, row in enumerate(rows):
        for operand in row.operands:
            readers[operand].add(i)
    for i in outline.results:
        readers[i].add(OUT)
    waiting = [_tree(rows)]
    found: list[View] = []
    for group in waiting:  # grows as it goes
        members = _opened(group)
        opening = [m for m in members if isinstance(m, Group)]
        children = tuple(range(len(waiting), len(waiting) + len(opening)))
        waiting += opening
        found.append(_View(rows, readers, group, members).made(children))
    return found


# ---- groups


def _tree(rows: Sequence[Row]) -> Group:
    root = Group("", "")
    known: dict[tuple[str, ...], Group] = {(): root}
    many = sum(row.kind == "input" for row in rows) > INPUTS
    for i, row in enumerate(rows):
        parts = ("(inputs)",) if many and row.kind == "input" else tuple(row.module.split(".")[:DEPTH]) if row.module else ()
        for depth in range(1, len(parts) + 1):
            if parts[:depth] not in known:
                known[parts[:depth]] = Group(".".join(parts[:depth]), ".".join(parts[:depth]))
                known[parts[: depth - 1]].members.append(known[parts[:depth]])
        known[parts].members.append(i)
    root.members = [_tidied(m) for m in root.members]
    return _in_runs(root)


def _tidied(member: int | Group) -> int | Group:
    """Groups of one are what is in them, all the way down; long ones are cut into runs."""
    if not isinstance(member, Group):
        return member
    member.members = [_tidied(m) for m in member.members]
    return member.members[0] if len(member.members) == 1 else _in_runs(member)


def _in_runs(group: Group) -> Group:
    """With at most LIMIT members: neighbours become groups of their own where there are more."""
    while len(group.members) > LIMIT:
        length = math.ceil(len(group.members) / math.ceil(len(group.members) / LIMIT))  # of runs of about equal length
        runs = [group.members[i : i + length] for i in range(0, len(group.members), length)]
        group.members = [Group(f"{group.base}.{_run_name(run)}".lstrip("."), group.base, run) for run in runs]
    return group


def _run_name(run: Sequence[int | Group]) -> str:
    first, last = (str(m) if isinstance(m, int) else m.path.rpartition(".")[2].strip("()") for m in (run[0], run[-1]))
    return f"({first}-{last})"


def _opened(group: Group) -> list[int | Group]:
    """The members, with small groups opened as long as all fits; groups of equal size open together, so that equal layers look alike."""
    members = [*group.members]
    while True:
        sizes = sorted({len(m.members) for m in members if isinstance(m, Group)})
        for size in sizes:
            opened = [x for m in members for x in (m.members if isinstance(m, Group) and len(m.members) == size else [m])]
            if len(opened) <= LIMIT:
                members = opened
                break
        else:
            return members


# ---- one view


class _View:
    """readers: of each row, OUT among them where it leaves the graph. members: what is drawn as a box each."""

    def __init__(self, rows: Sequence[Row], readers: Sequence[set[int]], group: Group, members: Sequence[int | Group]) -> None:
        self.rows, self.readers, self.path, self.base = rows, readers, group.path, group.base
        self.members = members
        self.inside = {row: k for k, m in enumerate(members) for row in (m.rows() if isinstance(m, Group) else (m,))}

    def made(self, children: tuple[int, ...]) -> View:
        """children: places of the groups among the members."""
        sources, entering = self._entering()
        count = len(sources)
        edges = {(self.inside[o] + count, k + count) for row, k in self.inside.items() for o in self.rows[row].operands if o in self.inside}
        leaving = {k + count for row, k in self.inside.items() if not self.readers[row] <= self.inside.keys()}
        ordinals = itertools.count()
        boxes = [self._closed(m, next(ordinals)) if isinstance(m, Group) else self._row(m) for m in self.members]
        items = [*sources, *boxes, Item("result", "", "outside")]
        last = len(items) - 1
        edges = {(a, b) for a, b in edges if a != b} | entering | {(a, last) for a in leaving}
        return self._sorted(items if leaving else items[:-1], edges, children)

    def _entering(self) -> tuple[list[Item], set[tuple[int, int]]]:
        """What is read from outside, and by which members (as numbers behind these items)."""
        readers: dict[int, set[int]] = {}
        for row, k in self.inside.items():
            for operand in self.rows[row].operands:
                if operand not in self.inside:
                    readers.setdefault(operand, set()).add(k)
        if len(readers) > OUTSIDE:
            return [Item(f"{len(readers)} values", "", "outside")], {(0, k + 1) for found in readers.values() for k in found}
        items = [Item(self.rows[row].op, "", "outside", self.rows[row].type) for row in sorted(readers)]
        return items, {(i, k + len(items)) for i, row in enumerate(sorted(readers)) for k in readers[row]}

    def _closed(self, group: Group, ordinal: int) -> Item:
        count = sum(1 for _ in group.rows())
        where = self._relative(group.path)
        return Item(where, f"{count} ops", "group", f"{where}: {count} ops", ordinal)

    def _row(self, number: int) -> Item:
        row = self.rows[number]
        where = self._relative(row.module)
        return Item(row.op, where or row.type, row.kind, "\n".join(filter(None, (row.op, where, row.type))))

    def _relative(self, path: str) -> str:
        if path == self.base:
            return ""
        return path.removeprefix(f"{self.base}.") if self.base else path

    def _sorted(self, items: Sequence[Item], edges: set[tuple[int, int]], children: tuple[int, ...]) -> View:
        """Items in an order in which edges lead down, as near to the given one as that can be."""
        below: dict[int, list[int]] = {}
        missing = [0] * len(items)
        for a, b in edges:
            below.setdefault(a, []).append(b)
            missing[b] += 1
        ready = [i for i, count in enumerate(missing) if not count]
        place: dict[int, int] = {}
        left = iter(range(len(items)))
        while len(place) < len(items):
            at = heapq.heappop(ready) if ready else next(i for i in left if i not in place)  # none is ready: a cycle, cut at its first
            if at in place:
                continue
            place[at] = len(place)
            for b in below.get(at, ()):
                missing[b] -= 1
                if not missing[b]:
                    heapq.heappush(ready, b)
        moved = sorted((place[a], place[b]) for a, b in edges)
        order = sorted(place, key=place.__getitem__)
        return View(
            self.path,
            tuple(items[i] for i in order),
            tuple((a, b) for a, b in moved if a < b),
            tuple((a, b) for a, b in moved if a > b),
            children,
        )

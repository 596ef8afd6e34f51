"""What differs between two receipts: `tilewright diff A B`.

    speed     a call            41 ms  ->  36.2 ms, 1.13x faster
    formats   encoder.0.fc      int8   ->  int4-g64
    kernels   add_layer_norm    11 calls  ->  gone
    declined  fuse-regions: ... ->  2 x, because the kernel would grow too large

Times differ from run to run: what is within NOISE of each other is equal. Kernels are known by what they compute, not by their numbers.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from rich.console import Console
from rich.table import Table
from rich.text import Text

from .receipt import Receipt
from .words import change, duration, scaled

NOISE = 0.1
"""Share of a time."""
_NUMBER = re.compile(r"^k\d+_")
_GONE = "-"


@dataclass(frozen=True)
class Difference:
    """section: a word for what kind of thing differs; "-" stands for what is not there."""

    section: str
    what: str
    before: str
    now: str


def differences(a: Receipt, b: Receipt, contents_a: Mapping[str, str] = {}, contents_b: Mapping[str, str] = {}) -> tuple[Difference, ...]:
    """From `a` to `b`, in the order of a receipt. contents: of artifacts, as `artifact.contents` gives them; compared if there are both."""
    found = [d for compare in _SECTIONS for d in compare(a, b)]
    return (*found, *(_contents(contents_a, contents_b) if contents_a and contents_b else ()))


def render(found: Sequence[Difference], console: Console) -> None:
    """A line each, nothing for nothing. Control characters of names are not printed."""
    if not found:
        return
    table = Table(box=None, pad_edge=False, show_header=False, padding=(0, 2, 0, 0))
    for style in ("dim", None, None, "dim", None):
        table.add_column(style=style, overflow="fold")
    for d in found:
        table.add_row(*(Text(_printable(cell)) for cell in (d.section, d.what, d.before, "->", d.now)))
    console.print(table)


def _printable(text: str) -> str:
    return "".join(c if c.isprintable() else "\ufffd" for c in text)


# ---- single values


def _headline(a: Receipt, b: Receipt) -> Iterator[Difference]:
    for what, before, now in (("graph", a.graph, b.graph), ("target", a.target, b.target), ("eager because", a.failure, b.failure)):
        if before != now:
            yield Difference("model", what, before or _GONE, now or _GONE)


def _speed(a: Receipt, b: Receipt) -> Iterator[Difference]:
    before, now = (r.speed.ours if r.speed else None for r in (a, b))
    if before is None and now is None:
        return
    if before is None or now is None:
        yield Difference("speed", "a call", *(_GONE if x is None else duration(x) for x in (before, now)))
    elif abs(before - now) > NOISE * max(before, now):
        yield Difference("speed", "a call", duration(before), f"{duration(now)}, {change(before, now)}")


def _errors(a: Receipt, b: Receipt) -> Iterator[Difference]:
    yield from _values("error", _error_values(a), _error_values(b), lambda v: f"{v:.2g}")


def _error_values(r: Receipt) -> dict[str, float]:
    found = {"against float64": r.error.ours} if r.error else {}
    return found | ({f"by {r.spent.metric}": r.spent.error} if r.spent else {})


def _bytes(a: Receipt, b: Receipt) -> Iterator[Difference]:
    yield from _values("bytes", _byte_values(a), _byte_values(b), lambda v: f"{scaled(v)}B")


def _byte_values(r: Receipt) -> dict[str, float]:
    found = {"weights": float(r.after.weights)} if r.after else {"weights": float(r.spent.bytes)} if r.spent else {}
    return found | ({"arena": float(r.arena)} if r.arena.isdigit() else {})


def _limits(a: Receipt, b: Receipt) -> Iterator[Difference]:
    yield from _values("limits", a.spent.limits if a.spent else {}, b.spent.limits if b.spent else {}, lambda v: f"{v:.4g}")


def _values(section: str, a: Mapping[str, float], b: Mapping[str, float], words: Callable[[float], str]) -> Iterator[Difference]:
    """Equal is what is written alike."""
    yield from _texts(section, {k: words(v) for k, v in a.items()}, {k: words(v) for k, v in b.items()})


def _texts(section: str, a: Mapping[str, str], b: Mapping[str, str]) -> Iterator[Difference]:
    for name in dict.fromkeys((*a, *b)):
        before, now = a.get(name, _GONE), b.get(name, _GONE)
        if before != now:
            yield Difference(section, name, before, now)


# ---- lists


def _formats(a: Receipt, b: Receipt) -> Iterator[Difference]:
    one, other = ({x.name: x.format for x in r.spent.layers} if r.spent else {} for r in (a, b))
    yield from _texts("formats", one, other)


def _kernels(a: Receipt, b: Receipt) -> Iterator[Difference]:
    yield from _counts("kernels", "calls", *(_calls((_NUMBER.sub("", k.name), k.uses) for k in r.kernels) for r in (a, b)))


def _calls(uses: Iterator[tuple[str, int]]) -> Counter[str]:
    found: Counter[str] = Counter()
    for name, count in uses:
        found[name] += count
    return found


def _library(a: Receipt, b: Receipt) -> Iterator[Difference]:
    yield from _counts("library", "calls", *(Counter(c.node for c in r.library) for r in (a, b)))


def _fallbacks(a: Receipt, b: Receipt) -> Iterator[Difference]:
    yield from _counts("eager", "times", *(Counter(f"{f.node}, because {f.reason}" for f in r.fallbacks) for r in (a, b)))


def _trials(a: Receipt, b: Receipt) -> Iterator[Difference]:
    one, other = ({t.what: t.note or ("kept" if t.kept else "rolled back") for t in r.trials} for r in (a, b))
    yield from _texts("measured", one, other)


def _applied(a: Receipt, b: Receipt) -> Iterator[Difference]:
    yield from _counts("rewrites", "times", *(Counter(f"{x.rule}: {x.what}" for x in r.applied) for r in (a, b)))


def _declined(a: Receipt, b: Receipt) -> Iterator[Difference]:
    yield from _counts("declined", "times", *(_calls((f"{x.rule}, because {x.reason}", x.count) for x in r.refused) for r in (a, b)))


def _counts(section: str, unit: str, a: Counter[str], b: Counter[str]) -> Iterator[Difference]:
    one, other = ({name: f"{n} {unit}" if n != 1 else f"1 {unit.removesuffix('s')}" for name, n in c.items()} for c in (a, b))
    yield from _texts(section, one, other)


def _contents(a: Mapping[str, str], b: Mapping[str, str]) -> Iterator[Difference]:
    """Parts of artifacts by their sums: what receipts do not tell, as other weights of the same model."""
    names = {"graph": "graph", "kernels": "generated code"}
    yield from (Difference("file", said, "", "differs") for name, said in names.items() if a.get(name) != b.get(name))
    rest = [name for name in dict.fromkeys((*a, *b)) if name not in names]
    other = [name for name in rest if a.get(name) != b.get(name)]
    if other:
        yield Difference("file", "weights and binaries", "", f"{len(other)} of {len(rest)} differ")


_SECTIONS: tuple[Callable[[Receipt, Receipt], Iterator[Difference]], ...] = (
    _headline, _speed, _errors, _bytes, _limits, _formats, _kernels, _library, _fallbacks, _trials, _applied, _declined,
)  # fmt: skip

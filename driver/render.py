"""A receipt for a terminal: one headline, then what runs where, and what was declined and why. Reads well from 80 columns on."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

from rich.console import Console, Group, RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

if TYPE_CHECKING:
    from .receipt import KernelLine, Receipt, Share

SHORT = 72  # characters of a description that the short form shows


def render(receipt: Receipt, console: Console | None = None, details: bool = False) -> None:
    """Prints a receipt; `details` adds every rewrite, what the kernels compute, times and memory."""
    out = console or Console()
    for part in _parts(receipt, details):
        out.print(part)


def headline(receipt: Receipt) -> str:
    """Speed, error and coverage in one line, as far as they were measured."""
    parts: list[str] = [f"for {receipt.target}"] if receipt.target else []
    if receipt.speed is not None:
        ours, eager = receipt.speed.ours, receipt.speed.eager
        ratio = f"{eager / ours:.3g}x faster" if eager >= ours else f"{ours / eager:.3g}x slower"
        parts.append(f"{ratio} ({_time(eager)} -> {_time(ours)})")
    if receipt.error is not None:
        parts.append(f"error {receipt.error.ours:.0e} (eager {receipt.error.eager:.0e})")
    nodes = receipt.coverage.nodes
    native = 100 * (nodes.kernels + nodes.library) // max(nodes.total, 1)  # rounded down: 100 means all
    parts.append(f"{native}% native")
    return ", ".join(parts)


def _parts(receipt: Receipt, details: bool) -> Iterator[RenderableType]:
    yield Text.assemble((receipt.graph, "bold"), "  ", headline(receipt))
    if receipt.failure:
        yield Padding(Text(f"runs by eager: {receipt.failure}"), (0, 0, 0, 2))
    yield from _section("coverage", [_coverage(receipt)])
    if receipt.kernels:
        yield from _section(f"{len(receipt.kernels)} kernels", [_kernels(receipt, details)])
    if receipt.library:
        calls = Counter(c.node for c in receipt.library)
        yield from _section("library calls", [Text(", ".join(f"{count} {name}" for name, count in calls.most_common()))])
    if receipt.fallbacks:
        yield from _section("run by eager, one by one", list(_fallbacks(receipt)))
    if receipt.trials:
        yield from _section("measured", [_trials(receipt)])
    if receipt.schedules:
        yield from _section("schedules", [_schedules(receipt, details)])
    if receipt.unmeasured:
        yield from _section("not measured", map(Text, receipt.unmeasured))
    if receipt.refused:
        yield from _section("declined", list(_refused(receipt, details)))
    if details:
        yield from _details(receipt)


def _section(title: str, body: Iterable[RenderableType]) -> Iterator[RenderableType]:
    yield Text(f"\n{title}", style="bold")
    for item in body:
        yield Padding(item, (0, 0, 0, 2))


def _grid(*columns: tuple[str, Any]) -> Table:
    """A table without lines; columns are (title, justify)."""
    table = Table(box=None, pad_edge=False, header_style="dim", padding=(0, 2, 0, 0))
    for title, justify in columns:
        table.add_column(title, justify=justify, overflow="fold", no_wrap=title == "name")
    return table


def _row(table: Table, *cells: Any) -> None:
    table.add_row(*(Text(str(c)) for c in cells))  # as text: brackets in a name are no markup


def _coverage(receipt: Receipt) -> Table:
    table = _grid(("", "left"), ("our kernels", "right"), ("library", "right"), ("eager", "right"), ("of", "right"))
    for name, unit in (("nodes", ""), ("flops", ""), ("bytes", "B")):
        share: Share = getattr(receipt.coverage, name)
        parts = (_percent(p, share.total) for p in (share.kernels, share.library, share.fallback))
        _row(table, "ops" if name == "nodes" else name, *parts, f"{_scaled(share.total)}{unit}")
    return table


def _kernels(receipt: Receipt, details: bool) -> Table:
    table = _grid(("name", "left"), ("ops", "right"), ("calls", "right"), ("moves", "right"), ("from", "left"))
    for k in receipt.kernels:
        name = "\n  ".join((k.name, k.label, *_usage(k), *k.notes)) if details else k.name
        sources = "\n".join(k.sources) if details else _few(k.sources)
        _row(table, name, k.nodes, k.uses, f"{_scaled(k.bytes)}B", sources)
    return table


def _usage(kernel: KernelLine) -> list[str]:
    """What a kernel takes of the GPU it was compiled for."""
    if kernel.usage is None:
        return []
    spilled = f", {kernel.usage.spills} spilled" if kernel.usage.spills else ""
    return [f"{kernel.usage.registers} registers{spilled}, {kernel.usage.shared} bytes shared"]


def _fallbacks(receipt: Receipt) -> Iterator[RenderableType]:
    counts = Counter((f.node, f.reason) for f in receipt.fallbacks)
    first = {(f.node, f.reason): f.source for f in reversed(receipt.fallbacks)}
    for (node, reason), count in counts.most_common():
        yield _entry(f"{_times(count)}{node}", reason, first[node, reason])


def _trials(receipt: Receipt) -> Table:
    """What each group of rewrites gains on the whole graph, and which were taken back."""
    table = _grid(("name", "left"), ("with", "right"), ("without", "right"), ("", "left"))
    for t in receipt.trials:
        if t.note:
            _row(table, t.what, "", "", t.note)
            continue
        change = f"{t.without / t.with_it:.3g}x faster" if t.with_it <= t.without else f"{t.with_it / t.without:.3g}x slower"
        _row(table, t.what, _time(t.with_it), _time(t.without), f"{change}, {'kept' if t.kept else 'rolled back'}")
    return table


def _schedules(receipt: Receipt, details: bool) -> RenderableType:
    """Which kernels are not walked as their templates start, and why; with details all that were looked at."""
    chosen = [s for s in receipt.schedules if s.schedule or details]
    if not chosen:
        return Text(f"{len(receipt.schedules)} kernels stay with those that their templates start from")
    table = _grid(("kernel", "left"), ("legal", "right"), ("compiled", "right"), ("before", "right"), ("now", "right"), ("", "left"))
    for s in chosen:
        how = "measured" if s.measured else "predicted"
        because = f"{s.why} ({how})" if s.schedule else s.why
        _row(
            table,
            _short(s.kernel),
            s.legal,
            s.compiled,
            _time(s.start_seconds),
            _time(s.seconds),
            "\n".join(filter(None, (s.schedule, because))),
        )
    return table


def _refused(receipt: Receipt, details: bool) -> Iterator[RenderableType]:
    """Most frequent first; the first place where it happened stands for all."""
    for r in sorted(receipt.refused, key=lambda r: -r.count):
        what, value = (r.what, r.value) if details else (_short(r.what), _short(r.value))
        reason = f"{r.reason}: {value}" if value else r.reason
        yield _entry(f"{_times(r.count)}{r.rule}: {what}", reason, r.source)


def _entry(what: str, reason: str, source: str) -> RenderableType:
    because = f"because {reason}" + (f"  ({source})" if source else "")
    return Group(Text(what), Padding(Text(because, style="dim"), (0, 0, 0, 4)))


def _details(receipt: Receipt) -> Iterator[RenderableType]:
    applied = Counter((a.rule, a.what) for a in receipt.applied)
    lines = [Text(f"{_times(count)}{rule}: {what}") for (rule, what), count in applied.items()]
    yield from _section(f"{len(receipt.applied)} rewrites", lines)
    times = ", ".join(f"{name} {_time(seconds)}" for name, seconds in receipt.seconds.items())
    if times:
        yield from _section("time", [Text(times)])
    memory = [Text(f"arena {receipt.arena} bytes")]
    if receipt.copies:
        memory.append(Text(f"laid out anew if they do not come row by row: {', '.join(receipt.copies)}"))
    yield from _section("memory", memory)
    if receipt.error is not None:
        error = receipt.error
        text = f"{error.ours:.2e} against float64 (relative); eager has {error.eager:.2e}, {error.allowed:.2e} is allowed"
        yield from _section("error", [Text(text)])
    if receipt.speed is not None:
        yield from _section("speed", [Text(f"medians of {receipt.speed.runs} calls of each, alternating")])


def _times(count: int) -> str:
    return f"{count} x " if count > 1 else ""


def _percent(part: int, total: int) -> str:
    return f"{100 * part / total:.1f}%" if total else "-"


def _time(seconds: float) -> str:
    for unit, size in (("s", 1.0), ("ms", 1e-3)):
        if seconds >= size:
            return f"{seconds / size:.3g} {unit}"
    return f"{seconds * 1e6:.3g} us"


def _scaled(count: int) -> str:
    for unit, size in (("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if count >= size:
            return f"{count / size:.3g} {unit}"
    return f"{count} "


def _short(text: str) -> str:
    return text if len(text) <= SHORT else text[: SHORT - 3].rstrip() + "..."


def _few(items: Sequence[str], count: int = 2) -> str:
    return "\n".join(items[:count]) + (f"\nand {len(items) - count} more" if len(items) > count else "")

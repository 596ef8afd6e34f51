"""A receipt for a terminal: one headline, then what runs where, and what was declined and why. Reads well from 80 columns on."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

from rich.console import Console, Group, RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from .words import change, duration, percent, scaled

if TYPE_CHECKING:
    from .budget import LayerLine, Spent
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
        parts.append(f"{change(eager, ours)} ({duration(eager)} -> {duration(ours)})")
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
    for title, there, body in _sections(receipt, details):
        if there:
            yield from _section(title, body())
    if details:
        yield from _details(receipt)


def _sections(receipt: Receipt, details: bool) -> Iterator[tuple[str, object, Callable[[], Iterable[RenderableType]]]]:
    """Title, what there must be for it to be shown, and what is."""
    r, spent = receipt, receipt.spent
    calls = Counter(c.node for c in r.library)
    yield "coverage", True, lambda: [_coverage(r)]
    yield f"{len(r.kernels)} kernels", r.kernels, lambda: [_kernels(r, details)]
    yield "library calls", r.library, lambda: [Text(", ".join(f"{count} {name}" for name, count in calls.most_common()))]
    yield "run by eager, one by one", r.fallbacks, lambda: _fallbacks(r)
    yield "budget", spent, lambda: _spent(spent, details) if spent is not None else ()
    yield "measured", r.trials, lambda: [_trials(r)]
    yield "not measured", r.unmeasured, lambda: map(Text, r.unmeasured)
    yield "declined", r.refused, lambda: _refused(r, details)


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
        parts = (percent(p, share.total) for p in (share.kernels, share.library, share.fallback))
        _row(table, "ops" if name == "nodes" else name, *parts, f"{scaled(share.total)}{unit}")
    return table


def _kernels(receipt: Receipt, details: bool) -> Table:
    table = _grid(("name", "left"), ("ops", "right"), ("calls", "right"), ("moves", "right"), ("from", "left"))
    for k in receipt.kernels:
        name = "\n  ".join((k.name, k.label, *_usage(k), *k.notes)) if details else k.name
        sources = "\n".join(k.sources) if details else _few(k.sources)
        _row(table, name, k.nodes, k.uses, f"{scaled(k.bytes)}B", sources)
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
        verdict = f"{change(t.without, t.with_it)}, {'kept' if t.kept else 'rolled back'}"
        _row(table, t.what, duration(t.with_it), duration(t.without), verdict)
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
            duration(s.start_seconds),
            duration(s.seconds),
            "\n".join(filter(None, (s.schedule, because))),
        )
    return table


def _spent(spent: Spent, details: bool) -> Iterator[RenderableType]:
    """What was allowed and what was needed; in which formats the layers are, most bytes saved first."""
    table = _grid(("", "left"), ("before", "right"), ("now", "right"), ("limit", "right"), ("", "left"))
    error, where = spent.limits.get("error"), "on held-out inputs" if spent.held_out else "on the inputs it was chosen by"
    _row(table, f"error ({spent.metric})", "", f"{spent.error:.2g}", "" if error is None else f"{error:.2g}", where)
    for name, before, now, show in (
        ("bytes", spent.exact_bytes, spent.bytes, lambda n: f"{scaled(int(n))}B"),
        ("time", spent.exact_seconds, spent.seconds, duration),
    ):
        limit = spent.limits.get(name)
        _row(table, name, show(before), show(now), "" if limit is None else show(limit), f"{now / before:.0%}" if before else "")
    yield table
    if spent.layers:
        yield Text()
        yield _formats(spent, details)
    if spent.candidates and details:
        yield Text("formats of layers: " + ", ".join(f"{count} {how}" for how, count in spent.candidates.items()))
    for a in spent.attempts if details else ():
        foretold = "no error" if a.predicted_error is None else f"error {a.predicted_error:.2g}"
        predicted = f"predicted {foretold}, {duration(a.predicted_seconds)}"
        yield Text(f"{predicted}; measured {a.error:.2g}, {duration(a.seconds)}: {a.verdict}")


def _formats(spent: Spent, details: bool) -> Table:
    """A line for each layer, or for each format."""
    table = _grid(
        ("layers" if not details else "name", "left"), ("format", "left"), ("bytes", "right"), ("time", "right"), ("error", "right")
    )
    groups: dict[tuple[str, str], list[LayerLine]] = {}
    for line in spent.layers:
        groups.setdefault((line.name if details else "", line.format), []).append(line)
    for (name, form), lines in sorted(groups.items(), key=lambda item: -sum(x.exact_bytes - x.bytes for x in item[1])):
        nbytes, before = sum(x.bytes for x in lines), sum(x.exact_bytes for x in lines)
        seconds = sum(x.seconds - x.exact_seconds for x in lines)
        error = max(x.error for x in lines)
        time = f"{'+' if seconds > 0 else '-'}{duration(abs(seconds))}" if seconds else ""
        _row(table, name or len(lines), form, f"{scaled(before)}B -> {scaled(nbytes)}B", time, f"{error:.1e}" if error else "0")
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
    times = ", ".join(f"{name} {duration(seconds)}" for name, seconds in receipt.seconds.items())
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


def _short(text: str) -> str:
    return text if len(text) <= SHORT else text[: SHORT - 3].rstrip() + "..."


def _few(items: Sequence[str], count: int = 2) -> str:
    return "\n".join(items[:count]) + (f"\nand {len(items) - count} more" if len(items) > count else "")

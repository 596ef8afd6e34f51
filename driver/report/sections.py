"""The sections of a page, each a function from a receipt to what there is to say, nothing where there is nothing."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator

from markupsafe import Markup

from ...search.layer_times import EXACT
from ..budget import LayerLine, Point, Spent
from ..receipt import Receipt
from ..words import change, duration, percent, scaled
from .charts import COLOURS, Bar, Dot, Plot, axis, bars, columns, dots, finite, scale
from .marks import mark, number
from .parts import Amount, Figure, Section, Table
from .roofline import roofline


def sections(receipt: Receipt) -> list[Section]:
    return [section for make in _SECTIONS for section in make(receipt)]


def nbytes(value: float) -> str:
    return f"{scaled(value)}B"


# ---- a budget


def _layers(receipt: Receipt) -> Iterator[Section]:
    spent = receipt.spent
    if spent is None or not spent.layers:
        return
    formats = _formats(spent)
    rows = [Bar(x.name, x.bits, f"{x.format}, {x.bits:.3g} bits", formats[x.format]) for x in spent.layers]
    high = float(max(*(x.exact_bits for x in spent.layers), 1))
    ticks = [t for t in (4.0, 8.0, 16.0, 32.0, 64.0) if t <= high]
    picture = columns("bits of a weight, layer by layer", rows, high, ticks)
    counts = Counter(x.format for x in spent.layers)
    legend = tuple((f"c{c}", f"{name}, {counts[name]} of {len(spent.layers)}") for name, c in formats.items())
    weights = sum(8 * x.exact_bytes / max(x.exact_bits, 1) for x in spent.layers)
    mean = 8 * sum(x.bytes for x in spent.layers) / max(weights, 1.0)
    figure = Figure(picture, f"Bits of a weight, scales and zeros included; {mean:.3g} on average.", legend)
    names = ("layer", "format", "bits", "bytes", "before", "time", "error alone", "from")
    table = Table("layers", names, [_layer_row(x) for x in spent.layers], code=("layer", "format", "from"))
    yield Section("layers", "Bits per layer", figures=(figure,), tables=(table,))


def _formats(spent: Spent) -> dict[str, int]:
    """Format -> colour: most bits first, the exact one in the first."""
    bits = {x.format: x.bits for x in spent.layers}
    names = sorted(bits, key=lambda name: (name != EXACT, -bits[name], name))
    first = 0 if EXACT in bits else 1
    return {name: (first + i) % COLOURS for i, name in enumerate(names)}


def _layer_row(x: LayerLine) -> tuple[str | Amount, ...]:
    seconds = x.seconds - x.exact_seconds
    sign = "+" if seconds > 0 else "\u2212"
    time = Amount(f"{sign}{duration(abs(seconds))}" if seconds else "", seconds)
    error = Amount(f"{x.error:.1e}" if x.error else "0", x.error)
    return (x.name, x.format, Amount(f"{x.bits:.3g}", x.bits), Amount(nbytes(x.bytes), x.bytes),
            Amount(nbytes(x.exact_bytes), x.exact_bytes), time, error, x.source)  # fmt: skip


def _front(receipt: Receipt) -> Iterator[Section]:
    spent = receipt.spent
    if spent is None or not spent.front:
        return
    about = (
        "Choices of formats that nothing beats in time, bytes and error at once, as predicted; larger, what was chosen, as measured. "
        "Dashed lines are limits."
    )
    exact = (("bound", "no error, at the foot"),) if any(p.error <= 0 for p in spent.front) else ()
    legend = (("dot", "predicted"), *exact, ("chosen", "chosen, measured"))
    size = Figure(_size_and_error(spent), "Error over size.", legend)
    time = Figure(_time_and_error(spent), "Error over time of a call.", legend)
    yield Section("front", "What else there was", about, figures=(size, time), lines=tuple(_prices(spent)))


_UNITS = {"bytes": (1e6, "MB"), "time": (1e-3, "millisecond"), "bits": (1.0, "bit")}
"""Costs whose limits have a price that can be said: how much of one, and in words."""
_GAINS: dict[str, Callable[[float], str]] = {"latency": duration, "memory": nbytes, "error": lambda v: f"{v:.2g}"}


def _prices(spent: Spent) -> Iterator[str]:
    """What a little more of each limit would gain."""
    for cost, (amount, unit) in _UNITS.items():
        gain = amount * spent.prices.get(cost, 0.0)
        if gain > 0 and spent.objective in _GAINS:
            yield f"One more {unit} would gain {_GAINS[spent.objective](gain)} of {spent.objective}."


def _size_and_error(spent: Spent) -> Markup:
    points = [_dot(p, p.bytes) for p in spent.front]
    return _against_error(spent, points, spent.bytes, "bytes", "size", nbytes)


def _time_and_error(spent: Spent) -> Markup:
    points = [_dot(p, p.seconds) for p in spent.front]
    return _against_error(spent, points, spent.seconds, "time", "time of a call", duration)


def _dot(p: Point, across: float) -> Dot:
    return Dot(across, p.error, f"{nbytes(p.bytes)}, {duration(p.seconds)}, error {p.error:.2g}", "dot" if p.error > 0 else "bound")


def _against_error(spent: Spent, points: list[Dot], reached: float, cost: str, name: str, words: Callable[[float], str]) -> Markup:
    limit, most = (next(iter(finite([spent.limits[name]])), None) if name in spent.limits else None for name in (cost, "error"))
    across = axis([p.x for p in points] + [reached] + ([limit] if limit is not None else []), words)
    up = axis([p.y for p in points] + [spent.error] + ([most] if most is not None else []), lambda v: f"{v:.0e}", log=True)
    plot = Plot(across, up)
    left, right, top, foot = (number(v) for v in (plot.x(across.low), plot.x(across.high), plot.y(up.high), plot.y(up.low)))
    lines: list[Markup] = []
    if limit is not None:
        lines.append(mark("path", d=f"M{number(plot.x(limit))} {top}V{foot}", cls="limit"))
    if most is not None:
        lines.append(mark("path", d=f"M{left} {number(plot.y(most))}H{right}", cls="limit"))
    chosen = Dot(reached, spent.error, f"chosen: {words(reached)}, error {spent.error:.2g}", "chosen", 6.0)
    return plot.made(f"error over {name}", name, "error", [*lines, *dots(plot, [*points, chosen])])


def _attempts(receipt: Receipt) -> Iterator[Section]:
    spent = receipt.spent
    if spent is None or not spent.attempts:
        return
    rows = [
        (i + 1, Amount("" if a.predicted_error is None else f"{a.predicted_error:.2g}", a.predicted_error or 0.0),
         Amount(f"{a.error:.2g}", a.error), Amount(duration(a.predicted_seconds), a.predicted_seconds),
         Amount(duration(a.seconds) if a.seconds else "not timed", a.seconds), a.verdict)
        for i, a in enumerate(spent.attempts)
    ]  # fmt: skip
    names = ("", "error predicted", "error measured", "time predicted", "time measured", "verdict")
    about = "What was solved for, built and measured; what misses a limit is declined, and solved for again with what was learned."
    yield Section("attempts", "Attempts at the budget", about, tables=(Table("attempts", names, rows),))


# ---- what runs


def _kernels(receipt: Receipt) -> Iterator[Section]:
    figures = roofline(receipt)
    names = ("kernel", "computes", "ops", "calls", "operations", "moves", "flop/byte", "from")
    rows = [
        (k.name, k.label, k.nodes, k.uses, Amount(scaled(k.flops), k.flops), Amount(nbytes(k.bytes), k.bytes),
         Amount(f"{k.flops / k.bytes:.2g}" if k.bytes else "", k.flops / max(k.bytes, 1)), ", ".join(k.sources))
        for k in receipt.kernels
    ]  # fmt: skip
    calls = Counter(c.node for c in receipt.library)
    flops, moved = Counter[str](), Counter[str]()
    for call in receipt.library:
        flops[call.node] += call.flops
        moved[call.node] += call.bytes
    library = [(name, n, Amount(scaled(flops[name]), flops[name]), Amount(nbytes(moved[name]), moved[name])) for name, n in calls.items()]
    tables = [Table("kernels", names, rows, code=("kernel", "computes", "from"))] if rows else []
    tables += [Table("library ops", ("op", "calls", "operations", "moves"), library, code=("op",))] if library else []
    if tables or figures:
        yield Section("kernels", "Kernels", figures=figures, tables=tuple(tables))


def _eager(receipt: Receipt) -> Iterator[Section]:
    counts = Counter((f.node, f.reason) for f in receipt.fallbacks)
    sources = {(f.node, f.reason): f.source for f in reversed(receipt.fallbacks)}
    rows = [(node, n, reason, sources[node, reason]) for (node, reason), n in counts.most_common()]
    if rows or receipt.failure:
        about = f"The whole graph runs by eager: {receipt.failure}." if receipt.failure else ""
        yield Section(
            "eager", "Run by eager, one by one", about, tables=(Table("ops", ("op", "times", "because", "from"), rows, ("op", "from")),)
        )


def _checks(receipt: Receipt) -> Iterator[Section]:
    error = receipt.error
    if error is None:
        return
    values = [("allowed", error.allowed, "limit"), ("eager", error.eager, "eager"), ("ours", error.ours, "ours")]
    marks = [(f"{name} {value:.1e}", value, cls) for name, value, cls in values]
    verdict = "kept" if error.ok else "broken"
    caption = (
        f"Relative distance of the worst output to the captured graph in float64. The rule is {verdict}: ours is at most what is allowed."
    )
    yield Section("error", "Checked against float64", figures=(Figure(scale("errors", marks, lambda v: f"{v:.0e}"), caption),))


def _trials(receipt: Receipt) -> Iterator[Section]:
    rows = [
        (t.what, t.note, "", "", "") if t.note else
        (t.what, change(t.without, t.with_it), Amount(duration(t.with_it), t.with_it), Amount(duration(t.without), t.without),
         "kept" if t.kept else "rolled back")
        for t in receipt.trials
    ]  # fmt: skip
    if rows:
        about = "A call with each group of rewrites, and one without, in turn; medians. What is slower beyond noise is taken back."
        yield Section(
            "measured", "Measured rewrites", about, tables=(Table("groups", ("group", "change", "with", "without", "verdict"), rows),)
        )


def _time(receipt: Receipt) -> Iterator[Section]:
    parts = {name: s for name, s in receipt.seconds.items() if name != "total"}
    if not parts:
        return
    rows = [Bar(name, seconds, duration(seconds), 3 if name in ("lower", "compile", "tune") else 1) for name, seconds in parts.items()]
    total = receipt.seconds.get("total")
    caption = "Passes in their order, then lowering and compiling." + (f" Together {duration(total)}." if total is not None else "")
    yield Section("time", "Time per pass", figures=(Figure(bars("time per pass", rows), caption),))


# ---- rewrites


def _applied(receipt: Receipt) -> Iterator[Section]:
    counts = Counter((a.rule, a.what) for a in receipt.applied)
    sources = {(a.rule, a.what): a.source for a in reversed(receipt.applied)}
    saved = Counter[tuple[str, str]]()
    for a in receipt.applied:
        saved[a.rule, a.what] += a.bytes_saved
    rows = [
        (rule, what, n, Amount(nbytes(saved[rule, what]) if saved[rule, what] else "", saved[rule, what]), sources[rule, what])
        for (rule, what), n in counts.items()
    ]
    if rows:
        table = Table("rewrites", ("rule", "what", "times", "memory traffic saved", "first from"), rows, code=("what", "first from"))
        yield Section("applied", "Accepted rewrites", f"{len(receipt.applied)} in all, in their order.", tables=(table,))


def _declined(receipt: Receipt) -> Iterator[Section]:
    rows = [
        (r.rule, r.what, r.count, f"{r.reason}: {r.value}" if r.value else r.reason, r.source)
        for r in sorted(receipt.refused, key=lambda r: -r.count)
    ]
    if rows:
        about = "Considered and not done; of several for one reason the first is named."
        table = Table("reasons", ("rule", "what", "times", "because", "from"), rows, code=("what", "from"))
        yield Section("declined", "Declined rewrites", about, tables=(table,))


def _unmeasured(receipt: Receipt) -> Iterator[Section]:
    if receipt.unmeasured:
        yield Section("unmeasured", "Not measured", lines=receipt.unmeasured)


def _memory(receipt: Receipt) -> Iterator[Section]:
    size = nbytes(int(receipt.arena)) if receipt.arena.isdecimal() else f"{receipt.arena} bytes"
    lines = [f"Intermediate results lie in one arena of {size}."]
    if receipt.copies:
        lines.append(f"Laid out anew if they do not come row by row: {', '.join(receipt.copies)}.")
    shares = receipt.coverage.bytes
    if shares.total:
        parts = zip(("our kernels", "the library", "eager"), (shares.kernels, shares.library, shares.fallback))
        lines.append(f"Of {nbytes(shares.total)} moved: " + ", ".join(f"{percent(n, shares.total)} by {who}" for who, n in parts) + ".")
    yield Section("memory", "Memory", lines=tuple(lines))


_SECTIONS: tuple[Callable[[Receipt], Iterator[Section]], ...] = (
    _layers, _front, _attempts, _kernels, _eager, _checks, _trials, _time, _applied, _declined, _unmeasured, _memory,
)  # fmt: skip

"""The headline of a page: speed, error, bytes and coverage, against the limits that there are."""

from __future__ import annotations

from collections.abc import Iterator

from ..receipt import Receipt
from ..words import change, duration, percent, scaled
from .marks import mark
from .parts import Card


def cards(receipt: Receipt) -> list[Card]:
    return [*_speed(receipt), *_error(receipt), *_weights(receipt), _coverage(receipt)]


def _against(title: str, value: str, detail: str, used: float, limit: float | None, words: str) -> Card:
    """With a meter, where there is a limit."""
    if limit is None or not limit > 0:
        return Card(title, value, detail)
    share = max(0.0, min(used / limit, 1.0)) if used == used else 1.0
    over = not used <= limit
    bar = mark("rect", width=max(100 * share, 1.0), height=4, rx=2, cls="used")
    meter = mark(
        "svg",
        mark("rect", width=100, height=4, rx=2, cls="room"),
        bar,
        viewBox="0 0 100 4",
        preserveAspectRatio="none",
        cls="meter",
        aria_hidden="true",
    )
    return Card(title, value, detail, f"{percent(used, limit)} of the limit, {words}", meter, over)


def _speed(receipt: Receipt) -> Iterator[Card]:
    speed, spent = receipt.speed, receipt.spent
    if speed is None:
        yield Card("speed", "not measured", f"compiled for {receipt.target}" if receipt.target else "")
        return
    detail = f"{duration(speed.eager)} \u2192 {duration(speed.ours)} a call, medians of {speed.runs}"
    limit = spent.limits.get("time") if spent is not None else None
    seconds = spent.seconds if spent is not None else speed.ours
    yield _against("speed", change(speed.eager, speed.ours), detail, seconds, limit, duration(limit or 0.0))


def _error(receipt: Receipt) -> Iterator[Card]:
    spent, error = receipt.spent, receipt.error
    if spent is not None:
        where = "held-out inputs" if spent.held_out else "the inputs it was chosen by"
        limit = spent.limits.get("error")
        yield _against("error", f"{spent.error:.2g}", f"{spent.metric}, on {where}", spent.error, limit, f"{limit or 0.0:.2g}")
    elif error is not None:
        detail = f"relative, against float64; eager has {error.eager:.1e}"
        yield _against("error", f"{error.ours:.1e}", detail, error.ours, error.allowed, f"{error.allowed:.1e}")


def _weights(receipt: Receipt) -> Iterator[Card]:
    spent = receipt.spent
    if spent is not None:
        before, now, limit = spent.exact_bytes, spent.bytes, spent.limits.get("bytes")
    elif receipt.before is not None and receipt.after is not None:
        before, now, limit = receipt.before.weights, receipt.after.weights, None
    else:
        return
    value = f"{now / before:.0%}" if before else "none"
    yield _against("weights", value, f"{scaled(before)}B \u2192 {scaled(now)}B", now, limit, f"{scaled(limit or 0.0)}B")


def _coverage(receipt: Receipt) -> Card:
    nodes = receipt.coverage.nodes
    native = 100 * (nodes.kernels + nodes.library) // max(nodes.total, 1)  # rounded down: 100 means all
    detail = f"{nodes.kernels} ops in {len(receipt.kernels)} kernels, {nodes.library} by the library, {nodes.fallback} by eager"
    return Card("native", f"{native}%", detail)

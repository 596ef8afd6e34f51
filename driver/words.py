"""Quantities in words: shares, times, counts. What a terminal and a page write alike."""

from __future__ import annotations


def percent(part: float, total: float) -> str:
    return f"{100 * part / total:.1f}%" if total else "-"


def duration(seconds: float) -> str:
    for unit, size in (("s", 1.0), ("ms", 1e-3)):
        if seconds >= size:
            return f"{seconds / size:.3g} {unit}"
    return f"{seconds * 1e6:.3g} us"


def scaled(count: float) -> str:
    """With a prefix, and a space before the unit that follows."""
    for unit, size in (("T", 1e12), ("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if count >= size:
            return f"{count / size:.3g} {unit}"
    return f"{count:.3g} "


def change(before: float, now: float) -> str:
    """How the time of a call changed."""
    return f"{before / now:.3g}x faster" if before >= now > 0 else f"{now / max(before, 1e-12):.3g}x slower"

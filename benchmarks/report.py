"""The results of `benchmarks/cpu.py` as tables in Markdown."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Any

Results = dict[str, Any]

OURS = ("tilewright", "tilewright-max", "tilewright-ahead")


def markdown(results: Results) -> str:
    """Speed-up over eager with the best of the others beside ours, roofline, first calls, CPU seconds, memory, error."""
    peers = list(dict.fromkeys(p for row in results["rows"].values() for p in row if p != "price"))
    others = [p for p in peers if p != "eager"]
    caching = [p for p in peers if any("first_call_warm" in row.get(p, {}) for row in results["rows"].values())]
    tables = (
        _limits(results["machine"]),
        _speed(results, others),
        _simple(results, "fraction of the roofline", peers, "roofline", ".2f"),
        _simple(results, "milliseconds of a call", peers, "median", ".3g", 1e3),
        _simple(results, "first call, cold, s", peers, "first_call", ".1f"),
        _simple(results, "first call, warm cache, s", caching, "first_call_warm", ".1f"),
        _simple(results, "CPU seconds of the first call", peers, "cpu", ".1f"),
        _simple(results, "peak memory, MB", peers, "peak_mb", ".0f"),
        _simple(results, "error against float64", peers, "error", ".1e"),
        _failures(results),
    )  # fmt: skip
    return "\n\n".join(t for t in tables if t)


def _limits(machine: Results) -> str:
    return (
        f"{machine['cpu']}, {machine['threads']} threads, torch {machine['torch']}: {machine['gemm'] / 1e9:.0f} GFLOP/s in the fastest "
        f"product by torch.mm, {machine['copy'] / 1e9:.1f} GB/s in a copy, {machine['read'] / 1e9:.1f} GB/s in a read."
    )


def _speed(results: Results, peers: Sequence[str]) -> str:
    ours = [p for p in OURS if p in peers]
    rows: list[list[str]] = []
    gains: list[float] = []
    for name, row in results["rows"].items():
        rows.append([name, *(_cell(row, p, "speedup", ".2f") for p in peers)])
        mine, theirs = _best(row, ours), _best(row, [p for p in peers if p not in OURS])
        if mine and theirs:
            gains.append(mine / theirs)
        rows[-1].append(f"{mine / theirs:.2f}" if mine and theirs else "")
    mean = f"{statistics.geometric_mean(gains):.2f}" if gains else ""
    rows.append(["geomean", *(_geomean(results, p) for p in peers), mean])
    return _table(["speed-up over eager", *peers, "our best / their best"], rows)


def _best(row: Results, peers: Sequence[str]) -> float:
    return max((row[p]["speedup"] for p in peers if "speedup" in row.get(p, {})), default=0.0)


def _geomean(results: Results, peer: str) -> str:
    values = [row[peer]["speedup"] for row in results["rows"].values() if "speedup" in row.get(peer, {})]
    return f"{statistics.geometric_mean(values):.2f}" if values else ""


def _simple(results: Results, head: str, peers: Sequence[str], field: str, form: str, scale: float = 1.0) -> str:
    if not peers:
        return ""
    return _table([head, *peers], [[name, *(_cell(row, p, field, form, scale) for p in peers)] for name, row in results["rows"].items()])


def _cell(row: Results, peer: str, field: str, form: str, scale: float = 1.0) -> str:
    if "failed" in row.get(peer, {}):
        return "fails"
    value = row.get(peer, {}).get(field)
    return format(value * scale, form) if value is not None else ""


def _failures(results: Results) -> str:
    """Why a peer failed, and notes on how it was run, one line each."""
    lines: dict[str, None] = {}
    for name, row in results["rows"].items():
        for peer, found in row.items():
            if "failed" in found:
                lines[f"- {peer} fails on {name}: {found['failed'][:200]}"] = None
            for note in found.get("notes", ()):
                lines[f"- {peer} on {name}: {note[:200]}"] = None
    return "\n".join(lines)


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)

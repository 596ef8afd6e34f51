"""The results of `benchmarks/gpu.py` as tables in Markdown."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import Any

Results = dict[str, Any]
Row = dict[str, Any]

OURS = "tilewright"
Column = Callable[[Row], str]


def markdown(results: Results) -> str:
    """Tables of what was measured, and what was not, with why."""
    parts = [_machine(results["machine"])]
    for table, (title, columns) in TABLES.items():
        rows = [r for r in results["rows"].values() if r["table"] == table and not {"failed", "skipped", "note"} & r.keys()]
        if rows:
            parts.append(f"## {title}\n\n" + _table(rows, columns))
    for table, title in MODEL_TABLES.items():
        rows = [r for r in results["rows"].values() if r["table"] == table and "peers" in r]
        if rows:
            parts.append(f"## {title}\n\n" + _models(rows))
    return "\n\n".join([*parts, *_missing(results)])


def _machine(machine: Results) -> str:
    return f"# {machine['name']}\n\ntorch {machine['torch']}, Triton {machine['triton']}, CUDA {machine['cuda']}."


def _table(rows: Sequence[Row], columns: Mapping[str, Column]) -> str:
    return lines(["", *columns], [[row["name"], *(column(row) for column in columns.values())] for row in rows])


def lines(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    return "\n".join("| " + " | ".join(cells) + " |" for cells in (head, ["---"] * len(head), *rows))


# -- cells


def seconds(row: Row, peer: str) -> float | None:
    return row["peers"].get(peer, {}).get("seconds")


def time_of(peer: str) -> Column:
    """In microseconds."""
    return lambda row: "fails" if "failed" in row["peers"].get(peer, {}) else _number(seconds(row, peer), 1e6, ".1f")


def against(*peers: str) -> Column:
    """Our speed as a fraction of that of the fastest of them."""

    def cell(row: Row) -> str:
        times = [t for peer in peers if (t := seconds(row, peer))]
        ours = seconds(row, OURS)
        return _number(min(times) / ours, 1, ".2f") if times and ours else ""

    return cell


def rate(amount: str, unit: float) -> Column:
    """Of ours, per second."""
    return lambda row: _number(row[amount] / ours, 1 / unit, ".0f") if (ours := seconds(row, OURS)) and amount in row else ""


def of_bandwidth(row: Row) -> str:
    """Of that of a large copy."""
    ours = seconds(row, OURS)
    return _number(row["nbytes"] / ours / row["bandwidth"], 1, ".2f") if ours and "bandwidth" in row else ""


def value(name: str, form: str, scale: float = 1.0) -> Column:
    return lambda row: _number(row.get(name), scale, form)


def _number(number: float | None, scale: float, form: str) -> str:
    return "" if number is None else format(number * scale, form)


# -- tables

SDPA = ("flash", "efficient", "cudnn")
TABLES: dict[str, tuple[str, dict[str, Column]]] = {
    "checks": (
        "Templates against float64",
        {"error": value("ours", ".1e"), "of eager": value("eager", ".1e"), "allowed": value("allowed", ".1e"),
         "schedules": value("schedules", ".0f"), "": lambda row: "ok" if row["ok"] else f"WRONG {row['schedule']}"},
    ),
    "bandwidth": (
        "Speed as a fraction of a copy of as many bytes",
        {"of a copy": against("copy"), "GB/s": rate("nbytes", 1e9), "us": time_of(OURS), "us, copy": time_of("copy"),
         "us, eager": time_of("eager")},
    ),
    "products": (
        "Products",
        {"of cuBLAS": against("cublas"), "of cuBLAS and GELU": against("cublas, then gelu"), "TFLOP/s": rate("flops", 1e12),
         "us": time_of(OURS), "us, cuBLAS": time_of("cublas"), "us, cuBLAS and GELU": time_of("cublas, then gelu")},
    ),
    "attention": (
        "Attention in bfloat16",
        {"of the best": against(*SDPA), "TFLOP/s": rate("flops", 1e12), "of the bandwidth": of_bandwidth, "us": time_of(OURS)}
        | {f"us, {name}": time_of(name) for name in SDPA},
    ),
    "few bits": (
        "Few bits",
        {"of the bandwidth": of_bandwidth, "of bfloat16": against("bfloat16"), "of cuBLAS": against("cublas"),
         "of cuBLAS and scale": against("cublas, then scale"), "us": time_of(OURS)},
    ),
    "ranking": (
        "The cost model",
        {"rank correlation": value("correlation", ".2f"), "schedules": value("schedules", ".0f"),
         "failed": value("failed_schedules", ".0f"), "us, fastest": value("best", ".1f", 1e6),
         "us, ranked first": value("ranked_first", ".1f", 1e6), "us, default": value("start", ".1f", 1e6)},
    ),
}  # fmt: skip
MODEL_TABLES = {
    "models": "Models: speed-up over eager",
    "models, replayed": "Models as CUDA graphs: speed-up over eager",
    "models, max-autotune": "Models, tuned: speed-up over eager",
}


def _models(rows: Sequence[Row]) -> str:
    """Speed-ups, milliseconds, tokens per second, first calls, errors."""
    peers = list(dict.fromkeys(peer for row in rows for peer in row["peers"]))
    others = [p for p in peers if p != "eager"]
    speeds = [[row["name"], *(_speed_up(row, p) for p in others)] for row in rows]
    speeds.append(["geomean", *(_geomean(rows, p) for p in others)])
    tables = [
        lines(["", *others], speeds),
        _of_peers(rows, peers, "milliseconds of a call", lambda found, row: _number(found.get("seconds"), 1e3, ".3f")),
        _of_peers([r for r in rows if r.get("tokens")], peers, "tokens per second", _tokens),
        _of_peers(rows, peers, "first call, s", lambda found, row: _number(found.get("first_call"), 1, ".1f")),
        _of_peers(rows, peers, "error against float64", lambda found, row: _number(found.get("error"), 1, ".1e")),
    ]
    return "\n\n".join(t for t in tables if t)


def _speed_up(row: Row, peer: str) -> str:
    if "failed" in row["peers"].get(peer, {}):
        return "fails"
    ours, eager = seconds(row, peer), seconds(row, "eager")
    return f"{eager / ours:.2f}" if ours and eager else ""


def _geomean(rows: Sequence[Row], peer: str) -> str:
    ratios = [eager / ours for row in rows if (ours := seconds(row, peer)) and (eager := seconds(row, "eager"))]
    return f"{statistics.geometric_mean(ratios):.2f}" if ratios else ""


def _of_peers(rows: Sequence[Row], peers: Sequence[str], head: str, cell: Callable[[Row, Row], str]) -> str:
    if not rows:
        return ""
    return lines([head, *peers], [[row["name"], *(cell(row["peers"].get(p, {}), row) for p in peers)] for row in rows])


def _tokens(found: Row, row: Row) -> str:
    return f"{row['tokens'] / found['seconds']:.0f}" if "seconds" in found else ""


# -- what is not there


def _missing(results: Results) -> list[str]:
    """Rows and candidates that failed, and rows that were left out, a line each."""
    failed: list[str] = []
    left: list[str] = []
    for key, row in results["rows"].items():
        if "failed" in row:
            failed.append(f"- {key}: {row['failed'][:300]}")
        failed.extend(f"- {key}, {peer}: {found['failed'][:300]}" for peer, found in row.get("peers", {}).items() if "failed" in found)
        if reason := row.get("skipped") or row.get("note"):
            left.append(f"- {key}: {reason}")
    parts = (("Failed", failed), ("Not measured", left))
    return [f"## {title}\n\n" + "\n".join(found) for title, found in parts if found]

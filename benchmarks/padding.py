"""Padding removal on the CPU: an encoder of 6 layers x 384, batch 16, lengths uniform in 16 .. 128, against padded programs.

    python benchmarks/padding.py [--rounds 11] [--out benchmarks/results/padding.json]

Each program runs in a process of its own, calls of all are interleaved round by round, and ratios are medians over the rounds of one run.
Errors are against float64, at tokens; elsewhere all results are 0.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
from pathlib import Path

from cpu import HERE, RUN_LIMIT, SETUP_LIMIT, interleaved, machine, started
from process import Answer

WORKLOAD = "encoder, lengths 16 to 128"
OURS, PADDED = "tilewright-unpadded", "tilewright-ahead"
PEERS = (PADDED, OURS, "eager", "inductor-max", "onnxruntime", "openvino")
LEAST = 1.6
"""What is claimed: so many times as fast as our padded program, and as the best of the others."""


def measured(rounds: int) -> Answer:
    """Per program its median seconds, its error, and how many times as long as ours it takes."""
    with tempfile.TemporaryDirectory() as cache:
        workers = {peer: started(peer, WORKLOAD, cache) for peer in PEERS}
        rows: Answer = {peer: worker.ask("setup", SETUP_LIMIT) for peer, worker in workers.items()}
        times = interleaved({p: w for p, w in workers.items() if "failed" not in rows[p]}, rows, rounds)
        for peer, values in times.items():
            ratio = statistics.median(t / o for t, o in zip(values, times[OURS])) if OURS in times else 0.0
            rows[peer] |= workers[peer].ask("finish", RUN_LIMIT) | {"median": statistics.median(values), "ratio": ratio}
        for worker in workers.values():
            worker.close()
    return rows


def table(rows: Answer) -> str:
    lines = ["| program | ms | times ours | error |", "|---|---|---|---|"]
    for peer, row in rows.items():
        if "failed" in row:
            lines.append(f"| {peer} | {row['failed']} | | |")
        else:
            lines.append(f"| {peer} | {1e3 * row['median']:.1f} | {row['ratio']:.2f} | {row['error']:.1e} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=11)
    parser.add_argument("--out", type=Path, default=HERE / "results" / "padding.json")
    args = parser.parse_args()
    rows = measured(args.rounds)
    others = [row["ratio"] for peer, row in rows.items() if peer not in (OURS, PADDED) and "ratio" in row]
    padded, best = rows[PADDED].get("ratio", 0.0), min(others, default=0.0)
    print(table(rows))
    print(f"against our padded program {padded:.2f}x, against the best of the others {best:.2f}x; claimed: {LEAST}x")
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps({"machine": machine(), "rows": rows, "padded": padded, "best": best}, indent=1) + "\n")
    args.out.with_suffix(".md").write_text(table(rows) + "\n")


if __name__ == "__main__":
    main()

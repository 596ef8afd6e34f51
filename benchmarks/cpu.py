"""Speed, first-call time, memory and error on the CPU against eager, Inductor, ONNX Runtime and OpenVINO.

    python benchmarks/cpu.py [--workloads bert,vit] [--rounds 11] [--peers eager,tilewright,inductor] [--out benchmarks/results/cpu.json]

Each peer runs in its own process; the calls of all peers are interleaved round by round, medians are compared, and speed is given as a
ratio to eager in the same run. First calls are cold: every peer gets an empty cache. The second first call of tilewright is warm.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from workloads import WORKLOADS

HERE = Path(__file__).parent
PEERS = ("eager", "tilewright", "inductor", "onnxruntime", "openvino")


class Worker:
    """A peer's process; `ask` sends one command and waits for its one-line answer."""

    def __init__(self, peer: str, workload: str, cache: str) -> None:
        self.peer = peer
        env = os.environ | {"TILEWRIGHT_CACHE": f"{cache}/tilewright", "TORCHINDUCTOR_CACHE_DIR": f"{cache}/inductor"}
        self._log = open(f"{cache}/{peer}.log", "a")  # noqa: SIM115 (closed with the worker)
        command = [sys.executable, str(HERE / "worker.py"), peer, workload]
        self._process = subprocess.Popen(command, env=env, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._log)

    def ask(self, command: str) -> dict[str, Any] | None:
        """The answer, or None if the peer has died (its log says why)."""
        assert self._process.stdin and self._process.stdout
        try:
            self._process.stdin.write(command + "\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            return None
        line = self._process.stdout.readline()
        return json.loads(line) if line else None

    def close(self) -> str:
        """Ends the process; returns the last line it logged."""
        if self._process.stdin:
            self._process.stdin.close()
        self._process.wait()
        self._log.close()
        lines = Path(self._log.name).read_text().strip().splitlines()
        return lines[-1] if lines else ""


def measure(workload: str, peers: tuple[str, ...], rounds: int) -> dict[str, Any]:
    """One row of the table: per peer the first call, CPU seconds, peak memory, error, and the median time of a call."""
    with tempfile.TemporaryDirectory() as cache:
        workers = [Worker(p, workload, cache) for p in peers]
        row: dict[str, Any] = {}
        for w in workers:
            row[w.peer] = w.ask("setup")
        alive = [w for w in workers if row[w.peer] is not None]
        repeat = {w.peer: _repeats(w) for w in alive}
        times: dict[str, list[float]] = {w.peer: [] for w in alive}
        for _ in range(rounds):
            for w in alive:
                answer = w.ask(f"run {repeat[w.peer]}")
                times[w.peer].append(statistics.median(answer["times"]) if answer else float("nan"))
        for peer, values in times.items():
            row[peer]["median"] = statistics.median(values)
            row[peer]["speedup"] = statistics.median(e / t for e, t in zip(times["eager"], values))
        last = {w.peer: w.close() for w in workers}
        for peer in peers:
            if row[peer] is None:
                row[peer] = {"failed": last[peer][:200]}
        if "tilewright" in times:
            again = Worker("tilewright", workload, cache)
            warm = again.ask("setup")
            again.close()
            row["tilewright"]["first_call_warm"] = warm["first_call"] if warm else None
        return row


def _repeats(worker: Worker) -> int:
    """Calls per round so that a round lasts some 0.2 s."""
    answer = worker.ask("run 2")
    return max(1, min(50, int(0.2 / max(answer["times"][-1], 1e-4)))) if answer else 1


def copy_bandwidth() -> float:
    """Bytes per second of an out-of-place copy of 256 MiB, reads and writes counted: the ceiling of memory-bound work."""
    source, target = torch.randn(1 << 26), torch.empty(1 << 26)
    times = []
    for _ in range(7):
        begin = time.perf_counter()
        target.copy_(source)
        times.append(time.perf_counter() - begin)
    return 2 * source.nbytes / statistics.median(times)


def markdown(results: dict[str, Any]) -> str:
    """Three tables: speed-up over eager, seconds of the first call, peak memory of the process."""
    peers = [p for p in PEERS if any(p in row for row in results["rows"].values())]
    others = [p for p in peers if p != "eager"]
    speed = [[name, *(_cell(row, p, "speedup", ".2f") for p in others)] for name, row in results["rows"].items()]
    speed.append(["geomean", *(f"{_geomean(results, p):.2f}" for p in others)])
    first = [
        [name, *(_cell(row, p, "first_call", ".1f") for p in others), _cell(row, "tilewright", "first_call_warm", ".1f")]
        for name, row in results["rows"].items()
    ]
    memory = [[name, *(_cell(row, p, "peak_mb", ".0f") for p in peers)] for name, row in results["rows"].items()]
    return "\n\n".join((
        _table(["speed-up over eager", *others], speed),
        _table(["first call, s", *others, "tilewright, warm cache"], first),
        _table(["peak memory, MB", *peers], memory),
    ))  # fmt: skip


def _table(head: list[str], rows: list[list[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)


def _cell(row: dict[str, Any], peer: str, field: str, form: str) -> str:
    value = row.get(peer, {}).get(field)
    return format(value, form) if value is not None else "fails"


def _geomean(results: dict[str, Any], peer: str) -> float:
    values = [row[peer]["speedup"] for row in results["rows"].values() if "speedup" in row.get(peer, {})]
    return statistics.geometric_mean(values) if values else float("nan")


def machine() -> dict[str, Any]:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    model = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.processor())
    return {
        "cpu": model,
        "threads": torch.get_num_threads(),
        "capability": torch.backends.cpu.get_cpu_capability(),
        "torch": torch.__version__,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workloads", default="", help="comma-separated beginnings of names; default: all")
    parser.add_argument("--peers", default=",".join(PEERS))
    parser.add_argument("--rounds", type=int, default=11)
    parser.add_argument("--out", type=Path, default=HERE / "results" / "cpu.json")
    args = parser.parse_args()
    wanted = [w.strip().lower() for w in args.workloads.split(",") if w.strip()]
    names = [n for n in WORKLOADS if not wanted or any(n.lower().startswith(w) for w in wanted)]
    results: dict[str, Any] = {"machine": machine(), "copy_bandwidth": copy_bandwidth(), "rows": {}}
    for name in names:
        results["rows"][name] = measure(name, tuple(args.peers.split(",")), args.rounds)
        print(name, json.dumps(results["rows"][name]), flush=True)
        args.out.parent.mkdir(parents=True, exist_ok=True)
        partial = args.out.with_suffix(".tmp")
        partial.write_text(json.dumps(results, indent=1) + "\n")
        partial.replace(args.out)
    table = markdown(results)
    args.out.with_suffix(".md").write_text(table + "\n")
    print(table)


if __name__ == "__main__":
    main()

"""Speed, first-call time, memory and error on the CPU against eager, Inductor, ONNX Runtime and OpenVINO.

    python benchmarks/cpu.py [--workloads encoder,decode] [--rounds 11] [--peers eager,tilewright,inductor] [--out results/cpu.json]

Each peer runs in its own process; the calls of all peers are interleaved round by round, medians are compared, and speed is given as a
ratio to eager in the same run. First calls are cold: every peer gets an empty cache. A second first call of each peer that keeps a cache
is warm. Roofline: the time that a workload's products take at the machine's best measured rate or its memory traffic at the measured
bandwidth, whichever is longer, as a fraction of the time taken.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import tempfile
from pathlib import Path

import torch
from process import Answer, Worker
from report import markdown
from roofline import least_seconds, machine_limits

HERE = Path(__file__).parent
PEERS = ("eager", "tilewright", "tilewright-max", "tilewright-ahead", "inductor", "inductor-max", "onnxruntime", "openvino")
CACHING = ("tilewright", "tilewright-max", "tilewright-ahead", "inductor", "inductor-max")
SETUP_LIMIT = 180.0  # seconds a peer has to import, build, compile and call
RUN_LIMIT = 120.0  # seconds a peer has for one round
ROUND = 0.3  # seconds a round of one peer should last


def started(peer: str, workload: str, cache: str) -> Worker:
    """A peer's process."""
    variables = {"TILEWRIGHT_CACHE": f"{cache}/tilewright", "TORCHINDUCTOR_CACHE_DIR": f"{cache}/{peer}"}
    return Worker([str(HERE / "worker.py"), peer, workload], variables, Path(cache) / f"{peer}.log")


def measure(workload: str, peers: tuple[str, ...], rounds: int, limits: dict[str, float]) -> Answer:
    """One row of the table: per peer the first call, CPU seconds, peak memory, error, and the median time of a call."""
    with tempfile.TemporaryDirectory() as cache:
        workers = {p: started(p, workload, cache) for p in peers}
        row: Answer = {p: w.ask("setup", SETUP_LIMIT) for p, w in workers.items()}
        times = interleaved({p: w for p, w in workers.items() if "failed" not in row[p]}, row, rounds)
        price = workers["eager"].ask("price", RUN_LIMIT) if "eager" in times else {}
        for peer, values in times.items():
            row[peer] |= workers[peer].ask("finish", RUN_LIMIT) | _speed(values, times.get("eager"), price, limits)
        for w in workers.values():
            w.close()
        for peer in (p for p in CACHING if p in times):
            again = started(peer, workload, cache)
            warm = again.ask("setup", SETUP_LIMIT)
            again.close()
            row[peer] |= {"first_call_warm": warm.get("first_call"), "cpu_warm": warm.get("cpu")}
        return row | {"price": price}


def interleaved(workers: dict[str, Worker], row: Answer, rounds: int) -> dict[str, list[float]]:
    """Median seconds of a call in every round, peer after peer; a peer that fails on the way leaves, and its row says why."""
    repeats: dict[str, int] = {}
    for peer, w in list(workers.items()):
        answer = w.ask("run 3", RUN_LIMIT)
        if "failed" in answer:
            row[peer] = answer
        else:
            repeats[peer] = max(1, min(100, int(ROUND / max(min(answer["times"]), 1e-5))))
    times: dict[str, list[float]] = {p: [] for p in repeats}
    for _ in range(rounds):
        for peer in list(times):
            answer = workers[peer].ask(f"run {repeats[peer]}", RUN_LIMIT)
            if "failed" in answer:
                row[peer] = answer
                del times[peer]
            else:
                times[peer].append(statistics.median(answer["times"]))
    return times


def _speed(times: list[float], eager: list[float] | None, price: Answer, limits: dict[str, float]) -> Answer:
    found: Answer = {"median": statistics.median(times), "least": min(times)}
    if eager is not None:
        found["speedup"] = statistics.median(e / t for e, t in zip(eager, times))
    if price and "failed" not in price:
        found["roofline"] = least_seconds(price, limits) / found["median"]
    return found


def machine() -> Answer:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    model = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.processor())
    return {
        "cpu": model,
        "threads": torch.get_num_threads(),
        "capability": torch.backends.cpu.get_cpu_capability(),
        "torch": torch.__version__,
    }


def main() -> None:
    from workloads import WORKLOADS

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workloads", default="", help="comma-separated beginnings of names; default: all")
    parser.add_argument("--peers", default=",".join(PEERS))
    parser.add_argument("--rounds", type=int, default=11)
    parser.add_argument("--out", type=Path, default=HERE / "results" / "cpu.json")
    args = parser.parse_args()
    wanted = [w.strip().lower() for w in args.workloads.split(",") if w.strip()]
    names = [n for n in WORKLOADS if not wanted or any(n.lower().startswith(w) for w in wanted)]
    limits = machine_limits()
    results: Answer = {"machine": machine() | limits, "rows": {}}
    for name in names:
        results["rows"][name] = measure(name, tuple(args.peers.split(",")), args.rounds, limits)
        print(name, json.dumps(results["rows"][name]), flush=True)
        _save(args.out, results)
    print(args.out.with_suffix(".md").read_text())


def _save(path: Path, results: Answer) -> None:
    """Results so far, JSON and tables."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".tmp")
    partial.write_text(json.dumps(results, indent=1) + "\n")
    partial.replace(path)
    path.with_suffix(".md").write_text(markdown(results) + "\n")


if __name__ == "__main__":
    main()

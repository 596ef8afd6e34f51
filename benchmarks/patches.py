"""Image models in patches with halo, against the same models as they are: memory of intermediate values, and time.

    python benchmarks/patches.py [--rounds 30] [--overhead 0.25] [--out benchmarks/results/patches.json]

One image of 224 x 224 in float32. Both are compiled with constant weights, as `optimize` does, and called in turn; medians of all rounds
count. Memory is what torch's allocator holds at most in a program's first call, its arena included. The error is that of the patched
model against the other.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from tilewright.codegen.program import Program
from tilewright.driver.compile import build_program
from tilewright.driver.inputs import Example
from tilewright.driver.loading import captured_of, export_module
from tilewright.driver.pipeline import FINISHING, PREPARING
from tilewright.ir.graph import Graph
from tilewright.passes.base import Notes
from tilewright.passes.manager import run_passes
from tilewright.passes.space_plans import graph_flops
from tilewright.passes.split_space import SplitSpace
from tilewright.search.device import identity
from torch import nn
from torch.profiler import ProfilerActivity, profile
from vision import mobilenet_v2, resnet18

MODELS: dict[str, Callable[[], tuple[nn.Module, tuple[torch.Tensor, ...]]]] = {"MobileNetV2-like": mobilenet_v2, "ResNet-18": resnet18}


def held(run: Callable[[], Any]) -> int:
    """The most bytes that torch's allocator has given out during a call."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        result = run()
    events = [e for e in seen.profiler.kineto_results.events() if e.name() == "[memory]"]  # type: ignore[union-attr]
    live = most = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        live += event.nbytes()
        most = max(most, live)
    del result
    return most


def timed(programs: dict[str, Program], x: torch.Tensor, rounds: int) -> dict[str, list[float]]:
    """Seconds of calls in turn, in either order."""
    times: dict[str, list[float]] = {name: [] for name in programs}
    for k in range(rounds):
        for name in programs if k % 2 else reversed(programs):
            begin = time.perf_counter()
            programs[name].run([x])
            times[name].append(time.perf_counter() - begin)
    return times


def prepared(model: nn.Module, x: torch.Tensor) -> Graph:
    captured = captured_of(export_module(type(model).__name__, model.eval(), Example((x,), {}, {})))
    return run_passes(captured.graph, PREPARING, Notes())


def measured(make: Callable[[], tuple[nn.Module, tuple[torch.Tensor, ...]]], overhead: float, rounds: int) -> dict[str, Any]:
    torch.manual_seed(0)
    model, (images,) = make()
    x = images[:1].contiguous()
    graph, notes = prepared(model, x), Notes()
    split = SplitSpace(overhead=overhead).run(graph, notes)
    programs = {name: build_program(run_passes(g, FINISHING, Notes())) for name, g in (("exact", graph), ("patched", split))}
    bytes_held = {name: held(lambda p=p: p.run([x])) for name, p in programs.items()}
    with torch.no_grad():
        bytes_held["eager"] = held(lambda: model(x))
    exact, patched = (programs[name].run([x])[0] for name in ("exact", "patched"))
    found: dict[str, Any] = {
        "plan": notes.applied[0].what if notes.applied else "none",
        "bytes": bytes_held,
        "memory": bytes_held["patched"] / bytes_held["exact"],
        "arithmetic": graph_flops(split) / graph_flops(graph),
        "kernels": {name: len(p.kernels) for name, p in programs.items()},
        "error": float((exact - patched).norm() / exact.norm()),
        "time": {},
    }
    for threads in sorted({1, os.cpu_count() or 1}):
        torch.set_num_threads(threads)
        times = {name: statistics.median(t) for name, t in timed(programs, x, rounds).items()}
        found["time"][str(threads)] = {**times, "ratio": times["patched"] / times["exact"]}
    return found


def markdown(results: dict[str, Any]) -> str:
    head = ("model", "exact, MiB", "in patches, MiB", "memory", "arithmetic", "error", "eager, MiB")
    threads = list(next(iter(results["rows"].values()))["time"])
    lines = [f"{results['machine']}, torch {results['torch']}. Ratios are to the exact model, compiled likewise.", ""]
    lines.append("| " + " | ".join((*head, *(f"time, threads: {n}" for n in threads))) + " |")
    lines.append("| --- " * (len(head) + len(threads)) + "|")
    for name, row in results["rows"].items():
        exact, patched, eager = (f"{row['bytes'][k] / 2**20:.2f}" for k in ("exact", "patched", "eager"))
        cells = [name, exact, patched, f"{row['memory']:.2f}", f"{row['arithmetic']:.2f}", f"{row['error']:.0e}", eager]
        lines.append("| " + " | ".join([*cells, *(f"{row['time'][n]['ratio']:.2f}" for n in threads)]) + " |")
    lines += ["", *(f"- {name}: {row['plan']}; {row['kernels']['exact']} -> {row['kernels']['patched']} kernels"
                    for name, row in results["rows"].items())]  # fmt: skip
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--overhead", type=float, default=0.25)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "patches.json")
    options = parser.parse_args()
    rows = {name: measured(make, options.overhead, options.rounds) for name, make in MODELS.items()}
    results = {"machine": identity(), "torch": torch.__version__, "rows": rows}
    options.out.write_text(json.dumps(results, indent=1) + "\n")
    options.out.with_suffix(".md").write_text(markdown(results))
    print(markdown(results))


if __name__ == "__main__":
    main()

"""Linears with weights of few bits on the CPU, against our own kernel of float32 weights and the bandwidth of memory.

    python benchmarks/low_bit.py [--rounds 15] [--out benchmarks/results/low_bit.json]

One thread, CPU time. Every form is compiled as a graph with constant weights, as `optimize` does, so many times that its weights take
as much memory as bandwidth is measured on; calls of all forms and reads of that memory are interleaved round by round, and the least time
of a call counts. Products of many rows have one copy. The error is that of the result against float64, of the very weights that the form
stands for, and beside it that of eager.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from tilewright.driver.accuracy import relative_error
from tilewright.driver.compile import compile_graph
from tilewright.ir.graph import Data, Graph, graph_input, make_graph
from tilewright.ir.interpret import interpret
from tilewright.ir.ops import OPS
from tilewright.ir.types import TensorType
from tilewright.passes.formats import FORMATS, columns
from tilewright.search.device import STREAM_BYTES, identity

FEW_FORMS = ("f32", "bf16", "fp16", "int8", "int4-g128", "int4-g64", "int4-g32", "int8-dynamic", "bfp6", "int4-split3")
MANY_FORMS = ("f32", "bf16", "int8", "int4-g128", "int8-dynamic", "bfp6", "int4-split3")
SHAPES = {
    "batch 1, 4096 x 4096": (1, 4096, 4096, FEW_FORMS),
    "batch 4, 4096 x 4096": (4, 4096, 4096, FEW_FORMS),
    "1024 rows, 1024 x 1024": (1024, 1024, 1024, MANY_FORMS),
    "1024 rows, 4096 x 1024": (1024, 4096, 1024, MANY_FORMS),
}
FEW = 64
"""Rows up to which memory sets the time."""


def encoded(form: str, weight: torch.Tensor) -> dict[str, torch.Tensor]:
    return {"weight": weight} if form == "f32" else FORMATS[form].encode(weight, None)


def linear(form: str, parts: dict[str, torch.Tensor], rows: int, depth: int) -> Graph:
    """x [rows, depth] times the weight that the parts stand for; each graph has tensors of its own."""
    x = graph_input("x", TensorType(torch.float32, (rows, depth), "cpu"))
    given = {name: OPS["constant"](data=Data(name, value.clone())) for name, value in parts.items()}
    if form == "f32":
        return make_graph("linear", [x], (OPS["linear"](x, given["weight"]),))
    kind = FORMATS[form]
    if kind.linear is not None:
        return make_graph("linear", [x], (kind.linear(x, given),))
    assert kind.weight is not None
    return make_graph("linear", [x], (OPS["linear"](x, columns(kind.weight(given, torch.float32), depth)),))


def forms_of(rows: int, count: int, depth: int, names: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Form -> its programs, the bytes of one weight, and its error."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(count, depth, generator=generator) * depth**-0.5
    x = torch.randn(rows, depth, generator=generator)
    made: dict[str, dict[str, Any]] = {}
    for name in names:
        parts = encoded(name, weight)
        size = sum(p.nbytes for p in parts.values())
        copies = max(1, -(-STREAM_BYTES // size)) if rows <= FEW else 1
        programs = [compile_graph(linear(name, parts, rows, depth)).program.run for _ in range(copies)]
        graph = linear(name, parts, rows, depth)
        (exact,), (ours,) = interpret(graph, [x], torch.float64), programs[0]([x])
        (eager,) = interpret(graph, [x])
        made[name] = {"programs": programs, "bytes": size, "error": relative_error(ours, exact), "eager": relative_error(eager, exact)}
    return made


def timed(made: dict[str, dict[str, Any]], x: torch.Tensor, rounds: int) -> float:
    """Adds the least and the median seconds of a call; returns the bytes per second of reading memory."""
    times: dict[str, list[float]] = {name: [] for name in made}
    source, reads = torch.ones(STREAM_BYTES // 4), list[float]()
    for _ in range(rounds):
        for name, form in made.items():
            times[name] += [_seconds(lambda run=run: run([x])) for run in form["programs"]]
            reads.append(_seconds(source.sum))
    for name, form in made.items():
        form["seconds"], form["median"] = min(times[name]), statistics.median(times[name])
    return STREAM_BYTES / min(reads)


def _seconds(run: Callable[[], Any]) -> float:
    begin = time.process_time()
    run()
    return time.process_time() - begin


def measured(rows: int, count: int, depth: int, names: Sequence[str], rounds: int) -> dict[str, dict[str, float]]:
    made = forms_of(rows, count, depth, names)
    read = timed(made, torch.randn(rows, depth), rounds)
    base = made["f32"]["seconds"]
    read = max(read, made["f32"]["bytes"] / base)
    return {
        name: {
            "ms": 1e3 * form["seconds"],
            "median_ms": 1e3 * form["median"],
            "speedup": base / form["seconds"],
            "gflops": 2e-9 * rows * count * depth / form["seconds"],
            "bandwidth": form["bytes"] / form["seconds"] / read,
            "read_gbs": 1e-9 * read,
            "mb": form["bytes"] / 1e6,
            "error": form["error"],
            "eager_error": form["eager"],
        }
        for name, form in made.items()
    }


def markdown(results: dict[str, Any]) -> str:
    how = (
        "Bandwidth is that of `torch.sum` over memory, as in `search/device.py`, or of the kernel of float32 weights if that reads faster."
    )
    lines = [f"{results['machine']}, torch {results['torch']}. {how}", ""]
    for shape, forms in results["rows"].items():
        lines += [f"| {shape} | ms | times float32 | of the bandwidth | GFLOP/s | MB | error | of eager |", "| --- " * 8 + "|"]
        for name, form in forms.items():
            numbers = f"{form['ms']:.3f} | {form['speedup']:.2f} | {form['bandwidth']:.2f} | {form['gflops']:.0f} | {form['mb']:.1f}"
            lines.append(f"| {name} | {numbers} | {form['error']:.1e} | {form['eager_error']:.1e} |")
        lines.append("")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "low_bit.json")
    options = parser.parse_args()
    torch.set_num_threads(1)
    results: dict[str, Any] = {"machine": identity(), "torch": torch.__version__, "rows": {}}
    for shape, (rows, count, depth, names) in SHAPES.items():
        results["rows"][shape] = measured(rows, count, depth, names, options.rounds)
        print(markdown({**results, "rows": {shape: results["rows"][shape]}}), flush=True)
    options.out.write_text(json.dumps(results, indent=1) + "\n")
    options.out.with_suffix(".md").write_text(markdown(results))


if __name__ == "__main__":
    main()

"""Legal schedules of every template, a sample of them compiled for GPUs that need not be here: do they compile, and does the best spill?

    python benchmarks/schedules.py [--count 200] [--targets sm_80,sm_90] [--only linear] [--out results]

Per kernel and target: how many schedules are legal and how long enumerating them takes, how many of a random sample of them fail to compile
or spill registers, and what the one that ranks first takes. Results are results/schedules.json and .md. No GPU takes part.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
import triton
from tilewright.codegen.build import cores
from tilewright.codegen.kernel import Kernel
from tilewright.codegen.lower import lower
from tilewright.codegen.triton.binary import OfflineError
from tilewright.codegen.triton.legalize import UnsupportedByTriton
from tilewright.codegen.triton.spaces import offers
from tilewright.codegen.triton.templates import build, text_of
from tilewright.ir import ops
from tilewright.ir.dims import symbol
from tilewright.ir.graph import Graph, Node, graph_input
from tilewright.ir.types import TensorType
from tilewright.search.candidates import candidates, explored, usage_of
from tilewright.search.database import Database
from tilewright.search.gpus import of_target
from tilewright.search.tiles import NoSchedule, schedules

HERE = Path(__file__).parent
F32, F16, BF16 = torch.float32, torch.float16, torch.bfloat16
Kind = tuple[torch.dtype, tuple[Any, ...]]


def fused(build: Callable[..., Any], *kinds: Kind) -> Kernel:
    inputs = [graph_input(f"x{i}", TensorType(dtype, shape)) for i, (dtype, shape) in enumerate(kinds)]
    results = build(*inputs)
    return lower(Graph("g", tuple(inputs), results if isinstance(results, tuple) else (results,)), "kernel")


def linear(dtype: torch.dtype, rows: Any, columns: int, depth: int) -> Kernel:
    kinds = ((dtype, (rows, depth)), (dtype, (columns, depth)), (dtype, (columns,)))
    return fused(lambda x, w, b: ops.gelu(ops.linear(x, w, b)), *kinds)


def attention(dtype: torch.dtype, heads: int, queries: int, keys: int, width: int, causal: bool) -> Kernel:
    shapes = [(2, heads, n, width) for n in (queries, keys, keys)]
    return fused(lambda q, k, v: ops.op("attention")(q, k, v, causal=causal, scale=0.125), *((dtype, s) for s in shapes))


def experts(dtype: torch.dtype, rows: Any, count: int, columns: int, depth: int) -> Kernel:
    kinds = ((dtype, (rows, depth)), (dtype, (count, columns, depth)), (torch.int32, (count,)))
    return fused(lambda x, w, ends: ops.silu(ops.grouped_matmul(x, ops.permute(w, dims=(0, 2, 1)), ends)), *kinds)


def sparse(dtype: torch.dtype, rows: int, side: int, count: int) -> Kernel:
    kinds = ((dtype, (rows, 2048)), (dtype, (count, side, side)), (torch.int32, (count,)), (torch.int32, (2048 // side + 1,)))
    return fused(lambda *blocks: ops.gelu(ops.op("block_sparse_linear")(*blocks)), *kinds)


def _steps(layer: Node) -> tuple[Node, ...]:
    return tuple(ops.op("item")(layer, index=i) for i in range(len(layer.type)))


def rnn(rows: int, units: int) -> Kernel:
    kinds = ((F32, (100, rows, units)), (F32, (rows, units)), (F32, (units, units)))
    return fused(lambda x, h, w: _steps(ops.op("rnn_layer")(x, h, w)), *kinds)


KERNELS: dict[str, Callable[[], Kernel]] = {
    "add + gelu, 16M float32": lambda: fused(lambda x, y: ops.gelu(ops.add(x, y)), (F32, (1 << 24,)), (F32, (1 << 24,))),
    "softmax, 4096 x 1024 float32": lambda: fused(lambda x: ops.softmax(x, dim=-1), (F32, (4096, 1024))),
    "softmax, 64 x 100000 float32": lambda: fused(lambda x: ops.softmax(x, dim=-1), (F32, (64, 100_000))),
    "sum over rows, 4096 x 4096 bfloat16": lambda: fused(lambda x: ops.sum(x, dims=(0,)), (BF16, (4096, 4096))),
    "linear + gelu, 4096^3 bfloat16": lambda: linear(BF16, 4096, 4096, 4096),
    "linear + gelu, rows vary, float16": lambda: linear(F16, symbol("s"), 1024, 1024),
    "linear + gelu, 1000 x 1024 x 512 float32": lambda: linear(F32, 1000, 1024, 512),
    "linear + gelu, 1 x 4096 x 4096 bfloat16": lambda: linear(BF16, 1, 4096, 4096),
    "attention, causal, 2048, head 64 bfloat16": lambda: attention(BF16, 16, 2048, 2048, 64, True),
    "attention, 1 of 4096, head 128 float16": lambda: attention(F16, 16, 1, 4096, 128, False),
    "attention, 512, head 64 float32": lambda: attention(F32, 8, 512, 512, 64, False),
    "8 experts, 4096 x 1408 x 2048 bfloat16": lambda: experts(BF16, 4096, 8, 1408, 2048),
    "60 experts, rows vary, float16": lambda: experts(F16, symbol("s"), 60, 1408, 2048),
    "blocks of 64, a third, 2048^3 bfloat16": lambda: sparse(BF16, 2048, 64, 340),
    "blocks of 32, a tenth, 2048^3 float32": lambda: sparse(F32, 2048, 32, 400),
    "rnn, 64 rows, 256 units": lambda: rnn(64, 256),
    "rnn, 1 row, 64 units": lambda: rnn(1, 64),
}
"""At least two of each template."""


@dataclass
class Row:
    """legal: schedules, enumerated in `seconds` of one core. sampled of them were compiled: failed says why some were not, spilled how many
    spill. best: what ranks first of those compiled for ranking, and what it takes; start_spills: of the one the template starts from."""

    kernel: str
    target: str
    legal: int
    seconds: float
    sampled: int = 0
    spilled: int = 0
    failed: dict[str, str] = field(default_factory=dict)
    best: str = ""
    registers: int = 0
    spills: int = 0
    shared: int = 0
    start_spills: int = 0


def measured(name: str, target: str, count: int, ranked: int, database: Database, seed: int = 0) -> Row:
    """A kernel on a target: `count` of its legal schedules compiled, and `ranked` of the best."""
    kernel = KERNELS[name]()
    begin = time.process_time()
    legal = enumerated(kernel, target)
    row = Row(name, target, len(legal), time.process_time() - begin)
    sample = random.Random(f"{seed} {name} {target}").sample(legal, min(count, len(legal)))
    with ThreadPoolExecutor(cores()) as pool:
        for schedule, answer in zip(sample, pool.map(lambda s: taken(kernel, s, target, database), sample)):
            row.sampled += 1
            row.spilled += not isinstance(answer, str) and answer > 0
            row.failed |= {text_of(schedule): answer} if isinstance(answer, str) else {}
    found = candidates(kernel, of_target(target))
    made = explored(found, database, ranked)
    best, start = made[0], next(c for c in made if c.schedule == found.start)
    row.best = text_of(best.schedule)
    if best.usage is not None:
        row.registers, row.spills, row.shared = best.usage.registers, best.usage.spills, best.usage.shared
    row.start_spills = start.usage.spills if start.usage else 0
    return row


def enumerated(kernel: Kernel, target: str) -> list[Any]:
    """Every legal schedule."""
    found: list[Any] = []
    for offer in offers(kernel, target):
        try:
            found += map(offer.schedule, schedules(offer.space))
        except NoSchedule:
            continue
    return found


def taken(kernel: Kernel, schedule: Any, target: str, database: Database) -> int | str:
    """What a schedule spills, or why it does not compile."""
    try:
        return usage_of(build(kernel, schedule), target, database).spills
    except (UnsupportedByTriton, OfflineError) as error:
        return str(error)


def markdown(rows: Sequence[Row]) -> str:
    """A table, and what is to be said of all."""
    lines = [
        f"Triton {triton.__version__}. Of {sum(r.sampled for r in rows)} legal schedules, drawn at random and compiled, "
        f"{sum(len(r.failed) for r in rows)} failed and {sum(r.spilled for r in rows)} spill; of {len(rows)} that rank first, "
        f"{sum(r.spills > 0 for r in rows)} spill.",
        "",
        "| kernel | target | legal | enumerated in, s | sampled | failed | spill | ranks first | registers | spills | shared |",
        "|---|---|---:|---:|---:|---:|---:|---|---:|---:|---:|",
    ]
    for r in rows:
        counts = f"{r.legal} | {r.seconds:.2f} | {r.sampled} | {len(r.failed)} | {r.spilled}"
        lines.append(f"| {r.kernel} | {r.target} | {counts} | {r.best} | {r.registers} | {r.spills} | {r.shared} |")
    failures = [f"- {r.kernel}, {r.target}, {text}: {why}" for r in rows for text, why in r.failed.items()]
    return "\n".join([*lines, *(["", *failures] if failures else []), ""])


def main(arguments: Sequence[str]) -> int:
    """The number of legal schedules that do not compile, and of those that rank first and spill."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=200, help="schedules to draw, over all kernels and targets")
    parser.add_argument("--ranked", type=int, default=12, help="schedules to compile for ranking, of each kernel and target")
    parser.add_argument("--targets", default="sm_80,sm_90")
    parser.add_argument("--only", default="", help="kernels whose name begins so")
    parser.add_argument("--out", type=Path, default=HERE / "results")
    asked = parser.parse_args(arguments)
    cases = [(name, target) for name in KERNELS if name.startswith(asked.only) for target in asked.targets.split(",")]
    rows: list[Row] = []
    for number, (name, target) in enumerate(cases):
        left = asked.count - sum(r.sampled for r in rows)
        rows.append(measured(name, target, -(-left // (len(cases) - number)), asked.ranked, Database()))
        print(json.dumps(asdict(replace(rows[-1], failed=dict(rows[-1].failed)))), flush=True)
        asked.out.mkdir(parents=True, exist_ok=True)
        (asked.out / "schedules.json").write_text(json.dumps([asdict(r) for r in rows], indent=1) + "\n")
        (asked.out / "schedules.md").write_text(markdown(rows))
    return sum(len(r.failed) + (r.spills > 0) for r in rows)


if __name__ == "__main__":
    sys.exit(min(main(sys.argv[1:]), 1))

"""A model in two processes, each on a core of its own: the stages are cut by measured cost, micro-batches go through, results are compared.

python examples/two_process_pipeline.py                              starts both processes itself
torchrun --nproc-per-node 2 examples/two_process_pipeline.py         the same, started by torchrun
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

import tilewright
import torch
import torch.distributed as dist
from rich.console import Console
from rich.table import Table
from torch import nn

WIDTH, LAYERS, HEADS, LENGTH, ROWS = 384, 6, 6, 128, 4
LIMIT = timedelta(minutes=5)
"""Nobody waits for longer for the other process."""
ONE = "one process"
Way = Callable[[], "torch.Tensor | None"]
Took = tuple[float, float]


class Encoder(nn.Module):
    """Tokens [rows, length] -> one vector for each row."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.places = nn.Embedding(8192, WIDTH), nn.Embedding(LENGTH, WIDTH)
        self.layers = nn.ModuleList(
            nn.TransformerEncoderLayer(WIDTH, HEADS, 4 * WIDTH, dropout=0.0, activation="gelu", batch_first=True, norm_first=True)
            for _ in range(LAYERS)
        )
        self.norm = nn.LayerNorm(WIDTH)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.words(tokens) + self.places(torch.arange(tokens.shape[1]))
        for layer in self.layers:
            x = layer(x)
        return self.norm(x).mean(1)


def pin(rank: int) -> None:
    """To one core, and one thread."""
    torch.set_num_threads(1)
    if hasattr(os, "sched_setaffinity"):
        cores = sorted(os.sched_getaffinity(0))
        os.sched_setaffinity(0, {cores[rank % len(cores)]})


def tokens(rows: int) -> torch.Tensor:
    return torch.randint(0, 8192, (rows, LENGTH), generator=torch.Generator().manual_seed(0))


def run(micro_batches: int, rounds: int) -> None:
    """What both processes do: rank 0 cuts the model, each takes its stage, and one process and two are timed in turn."""
    rank = int(os.environ["RANK"])
    pin(rank)
    dist.init_process_group("gloo", timeout=LIMIT)
    torch.manual_seed(0)
    model, one, all_rows = Encoder().eval(), tokens(ROWS), tokens(micro_batches * ROWS)
    with tempfile.TemporaryDirectory() as folder:
        told: list[object] = [None]
        if rank == 0:
            made = tilewright.split(model, (one,), stages=dist.get_world_size())
            made.render()
            told = [[str(path) for path in made.save(Path(folder) / "encoder.tw", levels=())]]
        dist.broadcast_object_list(told)
        pipeline = tilewright.Pipeline.load(told[0], micro_batches)  # type: ignore[arg-type]
        dist.barrier()
    alone = tilewright.optimize(model, (one,), tuning_seconds=0) if rank == 0 else None
    shards = tilewright.shard(model, (one,))

    def by_one() -> torch.Tensor | None:
        return torch.cat([alone(part) for part in all_rows.split(ROWS)]) if alone is not None else None

    ways = {
        ONE: by_one,
        "pipeline of two": lambda: pipeline(all_rows),
        "shards in two": lambda: torch.cat([shards(part) for part in all_rows.split(ROWS)]),
    }
    times, results = timed(ways, rounds)
    last = dist.get_world_size() - 1
    results = {name: sent_to_first(value, micro_batches * ROWS, last if "pipeline" in name else 0) for name, value in results.items()}
    if rank == 0:
        report(times, results, micro_batches)
    dist.destroy_process_group()


def timed(ways: dict[str, Way], rounds: int) -> tuple[dict[str, list[Took]], dict[str, torch.Tensor | None]]:
    """Seconds of each way, in turn, and those that the busier of the processes computes; and what they return."""
    times: dict[str, list[Took]] = {name: [] for name in ways}
    results: dict[str, torch.Tensor | None] = {}
    for turn in range(rounds + 1):  # the first one warms up
        for name, way in ways.items():
            dist.barrier()
            start, busy = time.perf_counter(), time.process_time()
            results[name] = way()
            computed = torch.tensor(time.process_time() - busy)
            dist.barrier()
            seconds = time.perf_counter() - start
            dist.all_reduce(computed, dist.ReduceOp.MAX)
            if turn:
                times[name].append((seconds, float(computed)))
    return times, results


def sent_to_first(value: torch.Tensor | None, rows: int, source: int) -> torch.Tensor:
    """What the process `source` has, on the first one."""
    value = torch.empty(rows, WIDTH) if value is None else value
    dist.broadcast(value, src=source)
    return value


def report(times: dict[str, list[Took]], results: dict[str, torch.Tensor], micro_batches: int) -> None:
    table = Table(title=f"{micro_batches} micro-batches of {ROWS} x {LENGTH} tokens, a core for each process")
    for heading in ("", "seconds", "busy", "rows a second", "speed-up", "differs by"):
        table.add_column(heading, justify="right" if heading else "left")
    for name, took in times.items():
        ratio = statistics.median(a / b for (a, _), (b, _) in zip(times[ONE], took))
        seconds, busy = (statistics.median(values) for values in zip(*took))
        error = float((results[name] - results[ONE]).norm() / results[ONE].norm())
        table.add_row(name, f"{seconds:.3f}", f"{busy:.3f}", f"{micro_batches * ROWS / seconds:.1f}", f"{ratio:.2f}x", f"{error:.0e}")
    Console().print(table)
    Console().print("busy: seconds that the busier process computes; on a machine with other work it is less than what passes")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--micro-batches", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    if "RANK" in os.environ:
        run(options.micro_batches, options.rounds)
        return
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", __file__, *sys.argv[1:]]
    sys.exit(subprocess.run(command, timeout=2 * LIMIT.total_seconds(), env={"OMP_NUM_THREADS": "1"} | os.environ).returncode)


if __name__ == "__main__":
    main()

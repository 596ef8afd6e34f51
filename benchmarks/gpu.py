"""Kernels and models on a GPU against a copy, the vendor's library, eager and Inductor; every template against float64.

    python benchmarks/gpu.py [--seconds 560] [--only products,models] [--out results] [--resume]

Times are the device's own, of calls in turn, with the second-level cache emptied before each; medians are compared. The rows that matter
most come first, each is written down as soon as it is known, and one that there is no time for is listed. `--resume` measures what an
earlier run on this kind of GPU left out, or failed at. Results are results/gpu-<name of the GPU>.json and .md.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

from on_gpu.report import markdown
from process import Answer, Worker

HERE = Path(__file__).parent
START_LIMIT, ROW_LIMIT = 120.0, 400.0  # seconds to import and find the device, and for the longest row
RESERVE = 5.0  # seconds that ending takes


class Row(Protocol):
    """As `on_gpu.rows.Row`."""

    @property
    def table(self) -> str: ...
    @property
    def name(self) -> str: ...
    @property
    def seconds(self) -> float: ...


class Asked(Protocol):
    """As `process.Worker`."""

    def ask(self, command: str, limit: float) -> Answer: ...
    @property
    def alive(self) -> bool: ...
    def close(self) -> None: ...


def measure(
    rows: Sequence[Row], wanted: Sequence[str], results: Answer, worker: Asked, start: Callable[[], Asked], save: Callable[[], None],
    deadline: float, clock: Callable[[], float] = time.monotonic,
) -> None:  # fmt: skip
    """Rows one after the other into `results`, those it holds already not again. The worker is replaced when it has died."""
    for number, row in enumerate(rows):
        key = f"{row.table}: {row.name}"
        if not chosen(row, wanted) or done(results["rows"].get(key)):
            continue
        left = deadline - clock()
        if left < row.seconds:
            results["rows"][key] = about(row) | {"skipped": f"it takes about {row.seconds:.0f} s, and {max(left, 0):.0f} s were left"}
        else:
            worker = worker if worker.alive else start()
            begin = clock()
            answer = worker.ask(f"row {number}", min(left, ROW_LIMIT))
            results["rows"][key] = about(row) | answer | {"took": clock() - begin}
        print(key, json.dumps(results["rows"][key]), flush=True)
        save()
    worker.close()


def about(row: Row) -> Answer:
    return {"table": row.table, "name": row.name}


def chosen(row: Row, wanted: Sequence[str]) -> bool:
    return not wanted or any(text.startswith(w) for w in wanted for text in (row.table.lower(), row.name.lower()))


def done(found: Answer | None) -> bool:
    """Whether a row was measured; a candidate that failed in it does not count."""
    return found is not None and not {"failed", "skipped", "note"} & found.keys()


def file_name(gpu: str) -> str:
    return "gpu-" + re.sub(r"[^a-z0-9]+", "-", gpu.lower()).strip("-")


def saved(path: Path, machine: Answer) -> Answer:
    """What an earlier run found; nothing where it ran other versions."""
    try:
        results = json.loads(path.read_text())
        return results if results["machine"] == machine else {"machine": machine, "rows": {}}
    except (OSError, ValueError, KeyError, TypeError):
        return {"machine": machine, "rows": {}}


def save(path: Path, results: Answer) -> None:
    """JSON and tables, each whole or as it was."""
    path.parent.mkdir(parents=True, exist_ok=True)
    for file, text in ((path, json.dumps(results, indent=1)), (path.with_suffix(".md"), markdown(results))):
        partial = file.with_suffix(file.suffix + ".tmp")
        partial.write_text(text + "\n")
        partial.replace(file)


@contextmanager
def workers(folder: Path) -> Iterator[Callable[[], Worker]]:
    """Starts workers with empty caches."""
    with tempfile.TemporaryDirectory() as cache:
        names = {"TILEWRIGHT_CACHE": "tilewright", "TORCHINDUCTOR_CACHE_DIR": "inductor", "TRITON_CACHE_DIR": "triton"}
        variables = {variable: f"{cache}/{name}" for variable, name in names.items()}
        variables["PYTHONPATH"] = os.pathsep.join([str(HERE), *filter(None, [os.environ.get("PYTHONPATH")])])
        folder.mkdir(parents=True, exist_ok=True)
        yield lambda: Worker(["-m", "on_gpu.worker"], variables, folder / "gpu.log")


def arguments(words: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=float("inf"), help="for all of it; default: no limit")
    parser.add_argument("--only", default="", help="comma-separated beginnings of tables or rows; default: all")
    parser.add_argument("--out", type=Path, default=HERE / "results", help="the folder for the results")
    parser.add_argument("--resume", action="store_true", help="keep the rows that the results hold already")
    made = parser.parse_args(words)
    if not made.seconds > 0:
        parser.error("--seconds must be more than 0")
    made.only = [w.strip().lower() for w in made.only.split(",") if w.strip()]
    return made


def main(words: Sequence[str] | None = None) -> int:
    begin, args = time.monotonic(), arguments(words)
    import torch

    if not torch.cuda.is_available():
        print("benchmarks/gpu.py needs a GPU that torch can use, and there is none here.", file=sys.stderr)
        return 1
    from on_gpu.rows import ROWS

    if not any(chosen(row, args.only) for row in ROWS):
        print(f"no row begins with {', '.join(args.only)}; tables are {', '.join(dict.fromkeys(r.table for r in ROWS))}", file=sys.stderr)
        return 2
    with workers(args.out) as start:
        first = start()
        machine = first.ask("machine", START_LIMIT)
        if "failed" in machine:
            first.close()
            print(f"the device cannot be used: {machine['failed']}", file=sys.stderr)
            return 1
        path = args.out / f"{file_name(machine['name'])}.json"
        results: dict[str, Any] = saved(path, machine) if args.resume else {"machine": machine, "rows": {}}
        measure(ROWS, args.only, results, first, start, lambda: save(path, results), begin + args.seconds - RESERVE)
    print(path.with_suffix(".md").read_text())
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""`Device`: a machine as data. Measured once on the machine in hand (about two seconds) and kept in the cache directory."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import os
import platform
import re
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from ..codegen.build import cache_directory

STREAM_BYTES = 256 << 20
"""Size of the arrays that bandwidth is measured on, where memory allows: beyond the share of a cache that a process gets."""
GEMM_SIZE = 768
DTYPES = (torch.float32, torch.bfloat16, torch.float64)
SECONDS = 0.2
"""Time spent on each quantity, at least three runs; the best of them is the rate."""
_CPUS = Path("/sys/devices/system/cpu")


@dataclass(frozen=True)
class Device:
    """name: what identifies the machine, threads included. cores: that this process may use; threads: that torch uses.

    read, copy: bytes per second, from memory too large for the caches (copy counts what is read and what is written). gemm: dtype name
    -> floating-point operations per second of the vendor's product of square matrices. caches: bytes of the data caches that a core
    sees, L1 first; empty where the system does not tell.
    """

    name: str
    cores: int
    threads: int
    read: float
    copy: float
    gemm: Mapping[str, float]
    caches: tuple[int, ...]

    @staticmethod
    def from_json(text: str) -> Device:
        """Raises ValueError, KeyError or TypeError for anything but what `json.dumps(asdict(device))` writes."""
        data = json.loads(text)
        return Device(**{**data, "caches": tuple(data["caches"]), "gemm": {str(k): float(v) for k, v in data["gemm"].items()}})


def identity() -> str:
    """A machine in words: CPU, cores, threads. Equal names, equal times."""
    return f"{_cpu_name()}, {_cores()} cores, {torch.get_num_threads()} threads"


def this_device() -> Device:
    """The CPU in hand: from the cache directory, measured where it is not there."""
    return _device(identity(), cache_directory())


@functools.cache
def _device(name: str, directory: Path) -> Device:
    digest = hashlib.sha256(f"{name} {torch.__version__}".encode()).hexdigest()[:16]
    path = directory / f"device-{digest}.json"
    try:
        return Device.from_json(path.read_text())
    except (OSError, ValueError, KeyError, TypeError, AttributeError):  # absent or damaged
        device = measure()
        write_whole(path, json.dumps(dataclasses.asdict(device), indent=1))
        return device


def write_whole(path: Path, text: str) -> None:
    """All of it under its final name, or nothing."""
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix="tmp-")
    with os.fdopen(handle, "w") as file:
        file.write(text)
    os.replace(temporary, path)


def measure() -> Device:
    """Measures the CPU in hand."""
    count = min(STREAM_BYTES // 4, _available_bytes() // 32)
    source, target = torch.ones(count), torch.empty(count)
    copy = 8 * count / _best(lambda: target.copy_(source))
    read = 4 * count / _best(source.sum)
    return Device(identity(), _cores(), torch.get_num_threads(), read, copy, {_word(d): gemm_rate(d) for d in DTYPES}, cache_sizes())


def gemm_rate(dtype: torch.dtype, size: int = GEMM_SIZE) -> float:
    """Floating-point operations per second of torch.mm on square matrices."""
    a, b = (torch.randn(size, size).to(dtype) for _ in range(2))
    out = torch.empty(size, size, dtype=dtype)
    return 2 * size**3 / _best(lambda: torch.mm(a, b, out=out))


def _best(run: Callable[[], object]) -> float:
    """Least seconds of a run."""
    best, runs, begin = float("inf"), 0, time.perf_counter()
    run()
    while runs < 3 or time.perf_counter() - begin < SECONDS:
        start = time.perf_counter()
        run()
        best = min(best, time.perf_counter() - start)
        runs += 1
    return best


def cache_sizes() -> tuple[int, ...]:
    """Bytes of the data caches of the first core, nearest first."""
    sizes: dict[int, int] = {}
    for index in sorted((_CPUS / "cpu0" / "cache").glob("index*")):
        try:
            kind, level, size = ((index / name).read_text().strip() for name in ("type", "level", "size"))
        except OSError:
            continue  # not told
        if kind != "Instruction" and (match := re.fullmatch(r"(\d+)([KMG]?)", size)):
            sizes[int(level)] = int(match[1]) << {"": 0, "K": 10, "M": 20, "G": 30}[match[2]]
    return tuple(sizes[level] for level in sorted(sizes))


def _word(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@functools.cache
def _cpu_name() -> str:
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        text = ""
    match = re.search(r"^model name\s*:\s*(.+)$", text, re.MULTILINE)
    return match[1].strip() if match else platform.processor() or platform.machine()


def _available_bytes() -> int:
    try:
        match = re.search(r"^MemAvailable:\s*(\d+) kB", Path("/proc/meminfo").read_text(), re.MULTILINE)
    except OSError:
        match = None
    return int(match[1]) << 10 if match else 2 << 30

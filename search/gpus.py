"""GPUs as data: a table of known ones, and the one in hand, with what was measured on it (about a second, kept in the cache directory).

    of_target("sm_90")  -->  H100: 132 processors, 3.35 TB/s, 989 Tflop/s in bfloat16, ...

Sources: the vendors' data sheets and architecture papers (A100, H100 and H200; CDNA 3); bandwidth of the second-level cache and delays as
microbenchmarks found them (Luo et al., "Benchmarking and dissecting the NVIDIA Hopper GPU architecture", 2024).
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from ..codegen.build import cache_directory
from .device import write_whole
from .events import EventClock

STREAM_BYTES = 1 << 30
"""Size of the arrays that bandwidth is measured on: beyond any cache."""
GEMM_SIZE = 4096
RUNS = 5


@dataclass(frozen=True)
class Gpu:
    """name: as its driver says; target: what code is compiled for; processors: those that each run programs ("SM", "CU").

    bandwidth, cache_bandwidth: bytes per second from memory and from the second-level cache of `cache` bytes. rates: dtype name ->
    operations per second of its matrix units, of plain float32 and float64 where there are none. plain: of float32 arithmetic.
    shared, registers (of 32 bits), threads, programs: of one processor, at most. delay, cache_delay: seconds until a load is there.
    launch: seconds from one kernel of a stream to the next.
    """

    name: str
    target: str
    processors: int
    bandwidth: float
    cache_bandwidth: float
    cache: int
    rates: Mapping[str, float]
    plain: float
    shared: int
    registers: int = 65_536
    threads: int = 2048
    programs: int = 32
    lanes: int = 32
    delay: float = 0.65e-6
    cache_delay: float = 0.25e-6
    launch: float = 2.5e-6

    @staticmethod
    def from_json(text: str) -> Gpu:
        """Raises ValueError, KeyError or TypeError for anything but what `json.dumps(asdict(gpu))` writes."""
        data = json.loads(text)
        return Gpu(**{**data, "rates": {str(k): float(v) for k, v in data["rates"].items()}})


_A100 = Gpu(
    "NVIDIA A100-SXM4-80GB", "sm_80", 108, 2.04e12, 5e12, 40 << 20,
    {"float16": 312e12, "bfloat16": 312e12, "int8": 624e12, "float32": 19.5e12, "float64": 19.5e12},
    plain=19.5e12, shared=164 << 10,
)  # fmt: skip
_H100 = Gpu(
    "NVIDIA H100 80GB HBM3", "sm_90", 132, 3.35e12, 7.5e12, 50 << 20,
    {"float16": 989e12, "bfloat16": 989e12, "int8": 1979e12, "float8_e4m3fn": 1979e12, "float8_e5m2": 1979e12, "float32": 66.9e12,
     "float64": 66.9e12},
    plain=66.9e12, shared=228 << 10,
)  # fmt: skip
_MI300 = Gpu(
    "AMD Instinct MI300X", "gfx942", 304, 5.3e12, 17.2e12, 256 << 20,
    {"float16": 1307e12, "bfloat16": 1307e12, "int8": 2615e12, "float8_e4m3fn": 2615e12, "float8_e5m2": 2615e12, "float32": 163.4e12,
     "float64": 163.4e12},
    plain=163.4e12, shared=64 << 10, registers=131_072, lanes=64, delay=0.8e-6, cache_delay=0.35e-6, launch=4e-6,
)  # fmt: skip

GPUS: tuple[Gpu, ...] = (
    _A100,
    dataclasses.replace(_A100, name="NVIDIA A100-SXM4-40GB", bandwidth=1.555e12),
    _H100,
    dataclasses.replace(_H100, name="NVIDIA H200", bandwidth=4.8e12),
    dataclasses.replace(
        _H100, name="NVIDIA H100 PCIe", processors=114, bandwidth=2.04e12, plain=51.2e12,
        rates={name: rate * 51.2 / 66.9 for name, rate in _H100.rates.items()},
    ),
    _MI300,
)  # fmt: skip
"""Rates are those of dense operands. The first of a target stands for it."""


def of_target(target: str) -> Gpu:
    """The GPU that stands for a target; raises KeyError for one that none is known of."""
    return {gpu.target: gpu for gpu in reversed(GPUS)}[target]


# ---- in hand


def gpu_name(index: int) -> str:
    """A GPU in words. Equal names, equal times."""
    about = torch.cuda.get_device_properties(index)
    return f"{about.name}, {about.multi_processor_count} processors, {round(about.total_memory / (1 << 30))} GiB"


def gpu_in_hand(index: int, target: str) -> Gpu:
    """Torch's device of that number: from the cache directory, measured where it is not there."""
    return _gpu(index, target, gpu_name(index), cache_directory())


@functools.cache
def _gpu(index: int, target: str, name: str, directory: Path) -> Gpu:
    path = directory / f"device-{hashlib.sha256(f'{name} {torch.__version__}'.encode()).hexdigest()[:16]}.json"
    try:
        return Gpu.from_json(path.read_text())
    except (OSError, ValueError, KeyError, TypeError, AttributeError):  # absent or damaged
        with torch.cuda.device(index):
            gpu = measured(_described(index, target, name), torch.device("cuda", index), EventClock(index))
        write_whole(path, json.dumps(dataclasses.asdict(gpu), indent=1))
        return gpu


def _described(index: int, target: str, name: str) -> Gpu:
    """What the driver says of it, over what is known of one like it."""
    about = torch.cuda.get_device_properties(index)
    known = next((g for g in GPUS if g.name == about.name), None) or next((g for g in GPUS if g.target == target), _A100)
    said = {
        "cache": getattr(about, "L2_cache_size", 0), "shared": getattr(about, "shared_memory_per_multiprocessor", 0),
        "threads": getattr(about, "max_threads_per_multi_processor", 0), "registers": getattr(about, "regs_per_multiprocessor", 0),
        "lanes": getattr(about, "warp_size", 0), "processors": about.multi_processor_count,
    }  # fmt: skip
    return dataclasses.replace(known, name=name, target=target, **{key: value for key, value in said.items() if value})


def measured(gpu: Gpu, device: torch.device, clock: Callable[[], float]) -> Gpu:
    """The GPU with the bandwidth and the rates that a copy and the library's products reach on a device, by a clock of it."""
    bandwidth, rates = _copied(device, clock), dict(gpu.rates)
    for dtype in (torch.float16, torch.bfloat16, torch.float32):
        a = torch.randn(GEMM_SIZE, GEMM_SIZE, device=device).to(dtype)
        rates[str(dtype).removeprefix("torch.")] = 2 * GEMM_SIZE**3 / _best(lambda a=a: torch.mm(a, a), clock)
    return dataclasses.replace(gpu, bandwidth=bandwidth, rates=rates)


def _copied(device: torch.device, clock: Callable[[], float]) -> float:
    """Bytes per second of a copy, read and written."""
    source = torch.ones(STREAM_BYTES // 4, device=device)
    target = torch.empty_like(source)
    return 2 * STREAM_BYTES / _best(lambda: target.copy_(source), clock)


def _best(run: Callable[[], object], clock: Callable[[], float]) -> float:
    """Least seconds of a run."""
    run()
    times: list[float] = []
    for _ in range(RUNS):
        start = clock()
        run()
        times.append(clock() - start)
    return min(times)

"""A GPU of memory that the CPU has: its driver library is fake_driver.cc, and kernels run in Triton's interpreter.

gpu = FakeGpu("sm_90")
program = compile_program(graph, gpu.targets)      # everything but the device is real: binaries, words, grids, streams, errors
"""

from __future__ import annotations

import ctypes
import functools
import subprocess
import tempfile
import threading
from dataclasses import dataclass
from pathlib import Path

import torch
from tilewright.codegen.build import find_compiler
from tilewright.codegen.target import Target
from tilewright.codegen.triton import prebuilt, toolchain
from tilewright.codegen.triton.driver import FUNCTIONS, Driver, Facts
from tilewright.codegen.triton.program import Launch, Program
from tilewright.codegen.triton.runtime import launch_one
from tilewright.ir.dims import evaluate

STREAM = 0x5EED
CONTEXT = 0x1000


class Seen(ctypes.Structure):
    _fields_ = (
        ("name", ctypes.c_char_p), ("function", ctypes.c_void_p), ("grid", ctypes.c_uint32 * 3), ("threads", ctypes.c_uint32),
        ("shared", ctypes.c_uint32), ("stream", ctypes.c_void_p), ("context", ctypes.c_void_p),
        ("parameters", ctypes.POINTER(ctypes.c_void_p)),
    )  # fmt: skip


@dataclass(frozen=True)
class Launched:
    """One launch as the driver saw it. function: its handle; words: of its parameters, 64 bits each; pointers come first."""

    name: str
    function: int
    grid: tuple[int, int, int]
    threads: int
    shared: int
    stream: int
    context: int
    words: tuple[int, ...]


@functools.cache
def library() -> ctypes.CDLL:
    with tempfile.TemporaryDirectory() as folder:
        return ctypes.CDLL(str(built(Path(folder))))


def built(folder: Path) -> Path:
    """The library as a file."""
    compiler, path = find_compiler(), folder / "fake_driver.so"
    assert compiler is not None
    subprocess.run([compiler, "-shared", "-fPIC", "-std=c++20", str(Path(__file__).with_suffix(".cc")), "-o", str(path)], check=True)
    return path


class FakeGpu:
    """launches: what was launched, in order. Kernels with a program that `run` is told of are computed."""

    def __init__(self, architecture: str, shared: int = 232_448, threads: int = 1024, index: int = 0) -> None:
        self.library = library()
        self.library.fake_fail(0)
        self.library.fake_most_threads(threads)
        self.launches: list[Launched] = []
        self.stream = STREAM
        functions = FUNCTIONS["hip" if architecture.startswith("gfx") else "cuda"]
        self.driver = Driver(functions, self.library, index, Facts(architecture, shared), lambda: self.stream)
        self.targets = {"cpu": Target("triton", lambda kernels, device: toolchain.compile_kernels(kernels, device, self.driver))}
        self._one_at_a_time = threading.Lock()  # as the interpreter works
        self._programs: dict[str, tuple[Program, Launch, int]] = {}
        self._handler = ctypes.CFUNCTYPE(None, ctypes.POINTER(Seen))(lambda seen: self._take(seen.contents))
        self.library.fake_handler(self._handler)

    def watch(self, monkeypatch) -> None:
        """Computes kernels from now on: remembers every program that is loaded."""
        native = toolchain.native

        def remember(program, find, *rest):
            def found(program, one, multiples):
                binary = find(program, one, multiples)
                self._programs[binary.function] = (program, one, binary.extra)
                return binary

            return native(program, found, *rest)

        for module in (toolchain, prebuilt):
            monkeypatch.setattr(module, "native", remember)

    def _take(self, seen: Seen) -> None:
        name = seen.name.decode()
        program, one, extra = self._programs.get(name, (None, None, 0))
        count = len(one.buffers) + len(program.kernel.sizes) + extra if program is not None and one is not None else 0
        words = tuple(ctypes.c_int64.from_address(seen.parameters[i] or 0).value for i in range(count))
        self.launches.append(
            Launched(name, seen.function or 0, tuple(seen.grid), seen.threads, seen.shared, seen.stream or 0, seen.context or 0, words)
        )
        if program is not None and one is not None:
            with self._one_at_a_time:
                _compute(program, one, tuple(seen.grid), words)


def _compute(program: Program, one: Launch, grid: tuple[int, ...], words: tuple[int, ...]) -> None:
    """What the kernel does, on the memory that it was given."""
    sizes = dict(zip(program.kernel.sizes, words[len(one.buffers) :]))
    buffers = [program.buffer(name) for name in one.buffers]
    tensors = {b.name: _tensor(address, evaluate(b.size, sizes), b.dtype) for b, address in zip(buffers, words)}
    launch_one(program, one, grid, tensors, sizes)


def _tensor(address: int, count: int, dtype: torch.dtype) -> torch.Tensor:
    if count == 0:
        return torch.empty(0, dtype=dtype)
    return torch.frombuffer((ctypes.c_char * (count * dtype.itemsize)).from_address(address), dtype=dtype)

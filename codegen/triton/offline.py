"""Compiles a printed kernel for a GPU that need not be there: registers, spills, shared memory and the binary, on any machine.

Triton's wheel carries what it takes: LLVM for both vendors, `ptxas` and `cuobjdump` for NVIDIA.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
import threading
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import triton
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, CompiledKernel
from triton.runtime.jit import JITFunction

from ..kernel import Kernel
from ..target import Usage
from .binary import Binary, OfflineError, parameter_sizes
from .features import lacking
from .program import Launch, Program
from .program import multiples as known_multiples
from .runtime import load
from .templates import build

TARGETS: dict[str, GPUTarget] = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
_POINTERS: dict[torch.dtype, str] = {
    torch.float64: "*fp64", torch.float32: "*fp32", torch.float16: "*fp16", torch.bfloat16: "*bf16",
    torch.int64: "*i64", torch.int32: "*i32", torch.int16: "*i16", torch.int8: "*i8",
    torch.uint64: "*u64", torch.uint32: "*u32", torch.uint16: "*u16", torch.uint8: "*u8", torch.bool: "*i1",
    torch.float8_e4m3fn: "*u8", torch.float8_e5m2: "*u8",
}  # fmt: skip


TENSOR_COLUMNS = 512
"""Of tensor memory, where a GPU has some."""

ASSEMBLY = {"cuda": "ptx", "hip": "amdgcn"}
IMAGE = {"cuda": "cubin", "hip": "hsaco"}


@dataclass(frozen=True)
class Compiled:
    """A kernel compiled for `target`.

    registers: per thread; spills: registers spilled to memory (NVIDIA: bytes of local memory per thread); shared: bytes per program.
    binary: cubin or hsaco; stages: text of each stage ("ttir", "ttgir", "llir", "ptx" or "amdgcn").
    """

    target: str
    registers: int
    spills: int
    shared: int
    binary: bytes
    stages: Mapping[str, str]


def compile_offline(kernel: Kernel, schedule: Any = None, target: str = "sm_90") -> Compiled:
    """Compiles a kernel for one of TARGETS; raises OfflineError for another target or when Triton fails, naming the reason.

    Of a program of several launches this is the first; `compile_program` gives all.
    """
    return compile_program(build(kernel, schedule), target)[0]


def compile_program(program: Program, target: str) -> tuple[Compiled, ...]:
    """Every launch of a program, compiled as `compile_offline` does."""
    if target not in TARGETS:
        raise OfflineError(kernel=program.kernel.name, target=target, reason=f"known targets are {', '.join(TARGETS)}")
    return tuple(_compile(program, launch, target) for launch in program.launches)


def gpu_target(name: str) -> GPUTarget:
    """What Triton calls a GPU: of NVIDIA like "sm_90", of AMD like "gfx942"."""
    if name in TARGETS:
        return TARGETS[name]
    if found := re.fullmatch(r"sm_(\d+)", name):
        return GPUTarget("cuda", int(found[1]), 32)
    generation = re.fullmatch(r"gfx(\d+)[0-9a-f]{2}", name)
    return GPUTarget("hip", name, 64 if generation and int(generation[1]) < 10 else 32)


def compile_binary(program: Program, launch: Launch, target: str, multiples: Collection[str] = ()) -> Binary:
    """A launch of a program as data; raises OfflineError when Triton fails. Triton's cache on disk knows what it has compiled before."""
    return _binary(program, launch, target, compile_launch(program, launch, target, multiples))


def binary_and_usage(program: Program, launch: Launch, target: str, multiples: Collection[str] = ()) -> tuple[Binary, Usage]:
    """The same, and what it takes of the device."""
    compiled = compile_launch(program, launch, target, multiples)
    return _binary(program, launch, target, compiled), _taken(compiled)


def launch_usage(program: Program, launch: Launch, target: str) -> Usage:
    """What a launch takes of the device; raises OfflineError when Triton fails, or what it makes cannot be launched."""
    return binary_and_usage(program, launch, target)[1]


def most(usages: Sequence[Usage]) -> Usage:
    """The most that one of several launches takes, of each."""
    return Usage(max(u.registers for u in usages), max(u.spills for u in usages), max(u.shared for u in usages))


def _taken(compiled: CompiledKernel) -> Usage:
    return Usage(*_usage(compiled), compiled.metadata.shared)


def _binary(program: Program, launch: Launch, target: str, compiled: CompiledKernel) -> Binary:
    about = compiled.metadata
    assembly, image = compiled.asm[ASSEMBLY[about.target.backend]], compiled.asm[IMAGE[about.target.backend]]
    given = len(launch.buffers) + len(program.kernel.sizes)
    extra = len(parameter_sizes(assembly)) - given
    reason = f"it takes {given + extra} parameters for {given} buffers and sizes" if extra < 0 else _unlaunchable(about)
    if reason:
        raise OfflineError(kernel=program.kernel.name, target=target, reason=reason)
    threads = about.num_warps * about.target.warp_size
    return Binary(target, about.name, threads, about.shared, extra, _need(about, "global_scratch_size"), image)


def _unlaunchable(about: Any) -> str:
    """What of a compiled kernel's needs no plain launch gives it; "" for none."""
    if _need(about, "profile_scratch_size"):
        return "it is instrumented"
    if _need(about, "num_ctas") > 1 or _need(about, "launch_cooperative_grid") or _need(about, "launch_pdl"):
        return "its programs work together"
    columns = _need(about, "tmem_size")
    return f"it takes {columns} columns of tensor memory, and there are {TENSOR_COLUMNS}" if columns > TENSOR_COLUMNS else ""


def _need(about: Any, name: str) -> int:
    """A number of the metadata that not every version and backend of Triton writes."""
    return int(getattr(about, name, None) or 0)


def compile_launch(program: Program, launch: Launch, target: str, multiples: Collection[str] = ()) -> CompiledKernel:
    """A launch compiled by Triton. Buffers are taken to lie at multiples of 16 bytes; multiples: sizes that are taken to be some of 16."""
    kernel = program.kernel
    if missing := [reason for option in launch.needs if (reason := lacking(option, target))]:
        raise OfflineError(kernel=kernel.name, target=target, reason=missing[0])
    function = load(program.source)[launch.function]
    if not isinstance(function, JITFunction):
        raise OfflineError(kernel=kernel.name, target=target, reason="TRITON_INTERPRET is set")
    pointers = [_POINTERS[program.buffer(name).dtype] for name in launch.buffers]
    kinds = [*pointers, *("i64" if launch.wide else "i32" for _ in kernel.sizes), *("constexpr" for _ in launch.constants)]
    places = [*range(len(pointers)), *(len(pointers) + kernel.sizes.index(size) for size in {*multiples, *known_multiples(kernel)})]
    aligned = {(n,): [["tt.divisibility", 16]] for n in places}
    source = ASTSource(function, dict(zip(function.arg_names, kinds)), dict(launch.constants), aligned)
    try:
        with _NO_LINES:
            return triton.compile(source, target=gpu_target(target), options=launch.options(kernel))
    except Exception as error:
        raise OfflineError(kernel=kernel.name, target=target, reason=f"{type(error).__name__}: {error}") from error


class _WithoutLines:
    """While any thread is inside, Triton compiles without line tables: these hold paths of this machine, and differ with them."""

    def __init__(self) -> None:
        self._lock, self._inside, self._before = threading.Lock(), 0, False

    def __enter__(self) -> None:
        with self._lock:
            if not self._inside:
                self._before, knobs.compilation.disable_line_info = knobs.compilation.disable_line_info, True
            self._inside += 1

    def __exit__(self, *_: object) -> None:
        with self._lock:
            self._inside -= 1
            if not self._inside:
                knobs.compilation.disable_line_info = self._before


_NO_LINES = _WithoutLines()


def _compile(program: Program, launch: Launch, target: str) -> Compiled:
    compiled = compile_launch(program, launch, target)
    binary = compiled.asm["cubin" if "cubin" in compiled.asm else "hsaco"]
    stages = {name: text for name, text in compiled.asm.items() if isinstance(text, str)}
    registers, spills = _usage(compiled)
    return Compiled(target, registers, spills, compiled.metadata.shared, binary, stages)


def _usage(compiled: CompiledKernel) -> tuple[int, int]:
    """Registers, and how many of them are spilled."""
    return _amd_usage(compiled.asm["amdgcn"]) if "amdgcn" in compiled.asm else _nvidia_usage(compiled.asm["cubin"])


def _amd_usage(assembly: str) -> tuple[int, int]:
    """Vector registers and spilled vector registers, from the metadata at the end of the assembly."""
    counts = {name: int(n) for name, n in re.findall(r"\.(vgpr_count|vgpr_spill_count):\s+(\d+)", assembly)}
    return counts["vgpr_count"], counts["vgpr_spill_count"]


def _nvidia_usage(cubin: bytes) -> tuple[int, int]:
    """Registers and bytes of local memory per thread, as `cuobjdump` reads them from the binary."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        report = subprocess.run([knobs.nvidia.cuobjdump.path, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
    usage = {name: int(n) for name, n in re.findall(r"(REG|STACK|LOCAL):(\d+)", report)}
    return usage["REG"], usage["STACK"] + usage["LOCAL"]

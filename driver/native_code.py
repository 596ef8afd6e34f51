"""The code in an artifact, for levels of a CPU or for a GPU: how it is stored, when it is run, and the machine that it needs.

Binaries can do whatever the device can. They are run if this user compiled them, which their sums in the cache tell, or says that whoever
did is trusted; otherwise the kernels are compiled anew from the graph.
"""

from __future__ import annotations

import hashlib
import json
import warnings
from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from ..codegen.build import BuildError, compiler_available
from ..codegen.code import Code
from ..codegen.cpp.levels import LEVELS
from ..codegen.cpp.prebuilt import TARGET as CPU
from ..codegen.cpp.prebuilt import Library, best, compile_for_levels
from ..codegen.cpp.prebuilt import prebuilt as prebuilt_for_cpu
from ..codegen.kernel import Kernel
from ..codegen.libraries import library_directory
from ..codegen.program import Program, compile_program, devices_of
from ..codegen.regions import lowered_regions
from ..codegen.target import Target
from ..codegen.triton.binary import SHARED_BYTES, Binary, runs_on
from ..codegen.triton.driver import Driver, driver_of
from ..ir.graph import Graph, constants
from ..ir.text import parse
from .errors import BadArtifact, BadOption, CodeNotTrusted, WrongMachine

VENDORS = {"sm": "NVIDIA", "gfx": "AMD"}


# -- in the file


def described(code: Code[Any]) -> dict[str, Any]:
    """What the manifest says of it: all but the images."""
    return {"target": code.target, "binaries": {key: _about(binary) for key, binary in code.binaries.items()}}


def images(code: Code[Any]) -> dict[str, torch.Tensor]:
    """The images, as tensors of bytes."""
    return {_name(key): torch.frombuffer(bytearray(binary.image), dtype=torch.uint8) for key, binary in code.binaries.items()}


def sums(code: Code[Any]) -> dict[str, str]:
    """sha256 of each binary: its image, what is said of it, and what it was compiled from."""
    found: dict[str, str] = {}
    for key, binary in code.binaries.items():
        about = json.dumps([key, sorted(_about(binary).items())])
        found[_name(key)] = hashlib.sha256(about.encode() + b"\0" + binary.image).hexdigest()
    return found


def code_of(manifest: Mapping[str, Any], tensors: Mapping[str, torch.Tensor]) -> Code[Any] | None:
    """The code of an artifact that has some."""
    if "code" not in manifest:
        return None
    target, rows = manifest["code"]["target"], manifest["code"]["binaries"].items()
    kind = Library if target == CPU else Binary
    return Code(target, {key: kind(**about, image=tensors[_name(key)].numpy().tobytes()) for key, about in rows})


def _name(key: str) -> str:
    return f"binary {key}"


def _about(binary: Library | Binary) -> dict[str, Any]:
    return {name: value for name, value in asdict(binary).items() if name != "image"}


def build_program(graph: Graph) -> Program:
    """Compiled on this machine, for it."""
    return compile_program(graph)


# -- for CPUs


def levels_from(text: str) -> tuple[str, ...]:
    """Names of LEVELS from what the command line says: "v2,v3", or "none". Raises BadOption."""
    known: dict[str, list[str]] = {}
    for name in LEVELS:
        known.setdefault(name.split("-")[2], []).append(name)
    words = [] if text == "none" else [word.strip() for word in text.split(",")]
    unknown = next((word for word in words if word not in known), None)
    if unknown is not None:
        raise BadOption(option="--levels", reason=f"there is no level {unknown!r}; give some of {', '.join(known)}, or none")
    return tuple(name for word in dict.fromkeys(words) for name in known[word])


def is_for_cpu(graph: Graph, code: Code[Any] | None) -> bool:
    """Whether it runs on any CPU."""
    return devices_of(graph) in ([], ["cpu"]) and (code is None or code.target == CPU)


def compiled_for_levels(graph: Graph, levels: Collection[str]) -> Code[Library] | None:
    """The kernels of a graph, as they are printed when it is read again, compiled for levels of x86-64. None for a graph that lies on a
    GPU, and where nothing can be compiled."""
    if not is_for_cpu(graph, None) or not levels:
        return None
    weights = {name: data.value for name, data in constants(graph).items() if data.value is not None}
    lowered = lowered_regions(parse(str(graph), weights), {"cpu"})
    try:
        code = compile_for_levels([kernel for kernel, _ in lowered if isinstance(kernel, Kernel)], levels)
    except BuildError as error:
        warnings.warn(f"{graph.name} is stored without code, and compiled where it is loaded: {error}", RuntimeWarning, 3)
        return None
    if code is not None:
        remember(code)
    return code


# -- whose it is


def remember(code: Code[Any]) -> None:
    """Notes in the cache that this user compiled it."""
    try:
        directory = library_directory()
        for total in sums(code).values():
            (directory / total).touch()
    except OSError as error:
        warnings.warn(f"the cache cannot be written ({error.strerror}): loading the code takes trust_code=True", RuntimeWarning, 2)


def is_own(code: Code[Any]) -> bool:
    directory = library_directory()
    return all((directory / total).exists() for total in sums(code).values())


# -- where it runs


@dataclass(frozen=True)
class Machine:
    """The GPU here: its name, and its driver."""

    device: str
    driver: Driver

    def move(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor.to(self.device)


def machine_for(path: Path, target: str | None) -> Machine:
    """The GPU here, if what was compiled for `target` (None: for no kind in particular) runs on it. Raises WrongMachine."""
    vendor = next((name for prefix, name in VENDORS.items() if (target or "").startswith(prefix)), "unknown")
    what = "a GPU" if target is None else f"{target} ({vendor})"
    driver = driver_of(torch.cuda.current_device()) if torch.cuda.is_available() else None
    if driver is None:
        reason = "this machine has no GPU that torch can use; load it on one that has, or optimize again for the CPU, without --target"
        raise WrongMachine(path=path, target=what, reason=reason)
    here = driver.facts.architecture
    if target is not None and not runs_on(target, here):
        other = f"with --target {here}" if here in SHARED_BYTES else "on this machine"
        raise WrongMachine(path=path, target=what, reason=f"the GPU of this machine is {here}; optimize again {other}")
    return Machine(f"cuda:{driver.index}", driver)


def program_on_cpu(path: Path, graph: Graph, code: Code[Library], kernels: int, trusted: bool) -> Program:
    """The program of a graph, its `kernels` from the best library for this machine; compiled anew where none is, or may be run.

    Raises CodeNotTrusted, or BadArtifact, where that takes a compiler and there is none.
    """
    level = best(code)
    if level is None:
        return build_program(graph)
    chosen = Code(code.target, {level: code.binaries[level]})
    if not trusted and not is_own(chosen):
        if not compiler_available():
            raise CodeNotTrusted(path=path, target=level, maker="a C++ compiler")
        return build_program(graph)
    run = {"cpu": prebuilt_for_cpu(code, level)}
    return _from_code(path, graph, run, kernels, "a C++ compiler", compiler_available())


def program_on_gpu(path: Path, graph: Graph, code: Code[Binary], machine: Machine, kernels: int, trusted: bool) -> Program:
    """The program of a graph that lies on the machine, its `kernels` from binaries; compiled anew where they must not or cannot be run.

    Raises CodeNotTrusted, or BadArtifact, where that takes Triton and there is none.
    """
    able = find_spec("triton") is not None
    if not trusted and not is_own(code):
        if not able:
            raise CodeNotTrusted(path=path, target=code.target, maker="Triton")
        _warn(path, "its code was not compiled by you (trust_code=True runs it nevertheless)")
        return build_program(graph)
    from ..codegen.triton.prebuilt import prebuilt

    run = {torch.device(machine.device).type: prebuilt(code, machine.driver)}
    return _from_code(path, graph, run, kernels, "Triton", able)


def _from_code(path: Path, graph: Graph, run: Mapping[str, Target], kernels: int, maker: str, able: bool) -> Program:
    """able: whether what makes kernels anew, where they cannot be run from code, is installed."""
    program = compile_program(graph, run)
    if len(program.kernels) >= kernels:
        return program
    reason = next((f.reason for f in program.fallbacks), "")
    if not able:
        advice = f"and {maker}, which could compile them anew, is not installed; optimize the model again with this version of tilewright"
        raise BadArtifact(path=path, reason=f"some of its kernels cannot be run from their code ({reason}), {advice}")
    _warn(path, f"some of them cannot be run from their code ({reason})")
    return build_program(graph)


def _warn(path: Path, reason: str) -> None:
    warnings.warn(f"the kernels of {path} are compiled here, because {reason}", RuntimeWarning, 6)

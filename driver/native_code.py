"""The code in an artifact that was made for a target: how it is stored, when it is run, and the machine that it needs.

Binaries can do whatever the device can. They are run if this user compiled them, which their sums in the cache tell, or says that whoever
did is trusted; otherwise the kernels are compiled anew from the graph, as those of any artifact are.
"""

from __future__ import annotations

import hashlib
import json
import warnings
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from ..codegen.build import cache_directory
from ..codegen.program import Program, compile_program
from ..codegen.triton.binary import SHARED_BYTES, Binary, Code, runs_on
from ..codegen.triton.driver import Driver, driver_of
from ..ir.graph import Graph
from .compile import build_program
from .errors import BadArtifact, CodeNotTrusted, WrongMachine

VENDORS = {"sm": "NVIDIA", "gfx": "AMD"}


# -- in the file


def described(code: Code) -> dict[str, Any]:
    """What the manifest says of it: all but the images."""
    return {"target": code.target, "binaries": {key: _about(binary) for key, binary in code.binaries.items()}}


def images(code: Code) -> dict[str, torch.Tensor]:
    """The images, as tensors of bytes."""
    return {_name(key): torch.frombuffer(bytearray(binary.image), dtype=torch.uint8) for key, binary in code.binaries.items()}


def sums(code: Code) -> dict[str, str]:
    """sha256 of each binary: its image, what is said of it, and what it was compiled from."""
    found: dict[str, str] = {}
    for key, binary in code.binaries.items():
        about = json.dumps([key, sorted(_about(binary).items())])
        found[_name(key)] = hashlib.sha256(about.encode() + b"\0" + binary.image).hexdigest()
    return found


def code_of(manifest: Mapping[str, Any], tensors: Mapping[str, torch.Tensor]) -> Code | None:
    """The code of an artifact that has some."""
    if "code" not in manifest:
        return None
    rows = manifest["code"]["binaries"].items()
    binaries = {key: Binary(**about, image=tensors[_name(key)].numpy().tobytes()) for key, about in rows}
    return Code(manifest["code"]["target"], binaries)


def _name(key: str) -> str:
    return f"binary {key}"


def _about(binary: Binary) -> dict[str, Any]:
    return {name: value for name, value in asdict(binary).items() if name != "image"}


# -- whose it is


def remember(code: Code) -> None:
    """Notes in the cache that this user compiled it."""
    directory = _own()
    try:
        directory.mkdir(exist_ok=True)
        for total in sums(code).values():
            (directory / total).touch()
    except OSError as error:
        warnings.warn(f"{directory} cannot be written ({error.strerror}): loading the code takes trust_code=True", RuntimeWarning, 2)


def is_own(code: Code) -> bool:
    return all((_own() / total).exists() for total in sums(code).values())


def _own() -> Path:
    return cache_directory() / "compiled"


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


def program_from(path: Path, graph: Graph, code: Code, machine: Machine, kernels: int, trusted: bool) -> Program:
    """The program of a graph that lies on the machine, its `kernels` from binaries; compiled anew where they must not or cannot be run.

    Raises CodeNotTrusted, or BadArtifact, where that takes Triton and there is none.
    """
    if not trusted and not is_own(code):
        if find_spec("triton") is None:
            raise CodeNotTrusted(path=path, target=code.target)
        _warn(path, "its code was not compiled by you (trust_code=True runs it nevertheless)")
        return build_program(graph)
    from ..codegen.triton.prebuilt import prebuilt

    program = compile_program(graph, {torch.device(machine.device).type: prebuilt(code, machine.driver)})
    if len(program.kernels) >= kernels:
        return program
    reason = next((f.reason for f in program.fallbacks), "")
    if find_spec("triton") is None:
        advice = "and Triton, which could compile them anew, is not installed; optimize the model again with this version of tilewright"
        raise BadArtifact(path=path, reason=f"some of its kernels cannot be run from their code ({reason}), {advice}")
    _warn(path, f"some of them cannot be run from their code ({reason})")
    return build_program(graph)


def _warn(path: Path, reason: str) -> None:
    warnings.warn(f"the kernels of {path} are compiled here, because {reason}", RuntimeWarning, 5)

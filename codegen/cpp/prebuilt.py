"""Kernels compiled ahead of time for levels of x86-64, and run from their libraries. A compiler takes no part in that.

Loading prints the kernels again, for the level of the library, and takes the functions that were compiled from that very text.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field, replace
from typing import Union

from ..build import FLAGS, BuildError, Loaded, Source, cached, toolchain
from ..code import Code
from ..kernel import Kernel
from ..libraries import compile_libraries, load_functions
from ..target import Compiled, Failed, Target
from .levels import LEVELS, compiles_here, levels_here
from .toolchain import compile_kernels, sources_of

TARGET = "x86-64"


@dataclass(frozen=True)
class Library:
    """The kernels of a model for one level. compiler: who made it, in words."""

    compiler: str
    image: bytes = field(repr=False)


def compile_for_levels(kernels: Sequence[Kernel], levels: Collection[str]) -> Code[Library] | None:
    """Libraries of the kernels for those of the levels (of LEVELS) that serve them; None where there is nothing to compile, or no compiler.

    Raises BuildError.
    """
    base = toolchain(TARGET)
    if not kernels or base is None or not compiles_here():
        return None
    wanted = {}
    for level in LEVELS.values():
        sources = sources_of(kernels, level.target)
        if level.name in levels and level.serves(s.text for s in sources):
            wanted[level.name] = sources, replace(base, flags=(*FLAGS, *level.flags))
    made = dict(zip(wanted, compile_libraries(list(wanted.values()))))
    failed = next((image for image in made.values() if isinstance(image, BuildError)), None)
    if failed is not None:
        raise failed
    compiler = base.identity.splitlines()[0]
    return Code(TARGET, {name: Library(compiler, image) for name, image in made.items() if isinstance(image, bytes)})


def best(code: Code[Library]) -> str | None:
    """The level that this machine runs best; None where it runs none of them."""
    return next((level.name for level in levels_here() if level.name in code.binaries), None)


def prebuilt(code: Code[Library], level: str) -> Target:
    """Runs kernels from a library; those that it lacks fail. What is cached, compiled for this very machine, comes first."""
    image, target = code.binaries[level].image, LEVELS[level].target

    def find(sources: Sequence[Source], name: str) -> list[Loaded]:
        return cached(sources) or load_functions(image, sources)

    def compile(kernels: Sequence[Kernel], device: str) -> list[Union[Compiled, Failed]]:
        return compile_kernels(kernels, target, find)

    return Target("libraries", compile)

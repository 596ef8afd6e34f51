"""Levels of x86-64: instruction sets that code is compiled for ahead of time, and which of them this machine has.

The levels are those of the System V ABI (-march=x86-64-v3 and so on); one more adds the products of bytes that int8 kernels live on.
"""

from __future__ import annotations

import functools
import platform
import re
import sys
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

from .schedule import CpuTarget, detect_target

V2 = frozenset({"cx16", "lahf_lm", "pni", "popcnt", "sse4_1", "sse4_2", "ssse3"})
V3 = V2 | {"abm", "avx", "avx2", "bmi1", "bmi2", "f16c", "fma", "movbe", "xsave"}
V4 = V3 | {"avx512bw", "avx512cd", "avx512dq", "avx512f", "avx512vl"}


@dataclass(frozen=True)
class Level:
    """flags: for the compiler; needs: of /proc/cpuinfo; gains: what in texts of kernels is faster than on the level before (None: all)"""

    name: str
    vector_bytes: int
    flags: tuple[str, ...]
    needs: frozenset[str] = field(repr=False)
    gains: str | None = None

    @property
    def target(self) -> CpuTarget:
        return CpuTarget(self.vector_bytes, level=self.name)

    def serves(self, texts: Iterable[str]) -> bool:
        """Whether any of the kernels gains by it."""
        return self.gains is None or any(re.search(self.gains, text) for text in texts)


LEVELS: dict[str, Level] = {
    level.name: level
    for level in (
        Level("x86-64-v2", 16, ("-march=x86-64-v2",), V2),
        Level("x86-64-v3", 32, ("-march=x86-64-v3",), V3),
        Level("x86-64-v4", 64, ("-march=x86-64-v4",), V4),
        Level("x86-64-v4-vnni", 64, ("-march=x86-64-v4", "-mavx512vnni"), V4 | {"avx512_vnni"}, r"\bbyte_panels\b"),
    )
}
"""By name, each better than those before it."""


def levels_here() -> list[Level]:
    """Those that this machine runs, the best first; none where libraries for x86-64 Linux cannot be loaded.

    No wider than torch's own kernels are (its ATEN_CPU_CAPABILITY included).
    """
    widest = detect_target().vector_bytes
    return [level for level in reversed(LEVELS.values()) if level.needs <= _features() and level.vector_bytes <= widest]


def compiles_here() -> bool:
    """Whether libraries can be compiled here: not what they are compiled for."""
    return sys.platform == "linux" and platform.machine() == "x86_64"


@functools.cache
def _features() -> frozenset[str]:
    """Of the processor, as far as the system lets programs use them."""
    if not compiles_here():
        return frozenset()
    try:
        found = re.search(r"^flags\s*:(.*)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    except OSError:
        found = None
    return frozenset(found[1].split()) if found else frozenset()

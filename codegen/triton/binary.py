"""`Binary`: a launch compiled for one kind of GPU, as data: what an artifact holds, and all that loading and launching it take."""

from __future__ import annotations

import re
from dataclasses import dataclass, field

from ...ir.errors import TilewrightError

SHARED_BYTES = {"sm_80": 166_912, "sm_90": 232_448, "gfx942": 65_536}
"""Targets that can be compiled for without one at hand, and the shared memory that one program may have there."""

ARCHITECTURE_SPECIFIC = 90
"""From this one on Triton compiles for "sm_90a": such code runs on that very architecture."""


class OfflineError(TilewrightError):
    """There is no code for a kernel: Triton does not compile it, or nobody has."""

    template = "cannot compile {kernel} for {target}: {reason}"


@dataclass(frozen=True)
class Binary:
    """target: "sm_90", "gfx942"; function: its name in the `image`, a cubin or hsaco.

    threads: per program; shared: bytes of shared memory per program. extra: pointers that it takes behind buffers and sizes, for memory of
    the compiler's own: `scratch` bytes per program of the grid for the first, the others may be null.
    """

    target: str
    function: str
    threads: int
    shared: int
    extra: int
    scratch: int
    image: bytes = field(repr=False)


def runs_on(target: str, device: str) -> bool:
    """Whether code compiled for the one runs on the other: both like "sm_90" or "gfx942"."""
    if target == device:
        return True
    ours, theirs = _capability(target), _capability(device)
    if ours is None or theirs is None or ours >= ARCHITECTURE_SPECIFIC:
        return False
    return ours // 10 == theirs // 10 and ours <= theirs


def _capability(target: str) -> int | None:
    found = re.fullmatch(r"sm_(\d+)", target)
    return int(found[1]) if found else None


def parameter_sizes(assembly: str) -> tuple[int, ...]:
    """Bytes of each parameter of the kernel, from its PTX or AMD assembly: there they stand whatever version of Triton wrote it.

    Raises ValueError where that cannot be read.
    """
    entry = re.search(r"^\.visible \.entry \w+\((.*?)\)", assembly, re.MULTILINE | re.DOTALL)
    if entry is not None:
        sizes = tuple(int(bits) // 8 for bits in re.findall(r"\.param \.[a-z](\d+)", entry[1]))
        if len(sizes) == entry[1].count(".param"):
            return sizes
    elif ".amdgpu_metadata" in assembly:
        return tuple(int(size) for size in re.findall(r"\.size: +(\d+)\n +\.value_kind: +(?!hidden_)", assembly))
    raise ValueError("the parameters of the kernel cannot be read from its assembly")

"""`Code`: what was compiled of a model ahead of time, as data."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Generic, TypeVar

Image = TypeVar("Image", covariant=True)


@dataclass(frozen=True)
class Code(Generic[Image]):
    """target: the machine that it is for, e.g. "sm_90", "x86-64".

    binaries: for a GPU the launches by the key of what they were compiled from (`triton.prebuilt.key`); for a CPU the libraries by level
    (`cpp.levels`).
    """

    target: str
    binaries: Mapping[str, Image]

"""Memory that is free, back to the system."""

from __future__ import annotations

import ctypes
import sys

from ..ir.graph import Graph, constants

LARGE_BYTES = 32 << 20
"""Weights that are worth 30 ms of tidying up."""


def constant_bytes(graph: Graph, beside: Graph | None = None) -> int:
    """What the constants of a graph take, computed where they are not yet; without those that lie in the memory of the graph beside it."""
    known = [d.value for d in constants(graph).values()]
    theirs = {d.value.data_ptr() for d in constants(beside).values() if d.value is not None} if beside is not None else ()
    return sum(int(x.nbytes) for x in known if x is not None and x.data_ptr() not in theirs)


def return_free_memory(nbytes: int) -> None:
    """Gives back what was left free, beside that many bytes of weights: glibc's heap keeps the holes."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" and nbytes > LARGE_BYTES else None
    if trim is not None:
        trim(0)

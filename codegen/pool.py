"""Memory of large results. Fresh, it costs as much as many a kernel that fills it; so it is kept when they die, by C code (cpp/pool.h).

    y = empty((4096, 1024), (1024, 1), float32)       takes an idle block, or allocates one
    del y                                             and whatever else holds its storage: the block is idle

Nothing here watches tensors: a tensor owns its block as one from another library would, and torch says when it is free.
"""

from __future__ import annotations

import ctypes
import functools
import math
import struct
import sys
from collections.abc import Callable

import torch

from .build import BuildError, Loaded, Source

LEAST = 1 << 20
"""Bytes from which on a tensor takes a block; for smaller ones malloc seldom needs the system."""

MOST_IDLE = 256 << 20
PROCESS_PART = 16
"""How much may lie idle: so many bytes, and so small a part of the most memory the process had when it last compiled."""

MAX_RANK = 8  # as pool.h has it

Empty = Callable[..., torch.Tensor]
"""(shape, strides, dtype) -> a tensor with any values. The strides are row-major."""

empty: Empty = torch._C._dynamo.guards._empty_strided_cpu  # type: ignore[attr-defined]  # a third of the cost of torch.empty_strided

START = Source(
    "start_pool",
    '#include "pool.h"\nvoid start_pool(const int64_t* python, int64_t* mine) { output_pool::start(python, mine); }\n',
    (ctypes.POINTER(ctypes.c_int64),) * 2,
)
"""The routine that opens the pool of the library it lies in. Libraries are never unloaded, so blocks may die at any time."""

_START = ctypes.CFUNCTYPE(None, *START.arguments)
_TAKE = ctypes.PYFUNCTYPE(ctypes.py_object, ctypes.c_int64, ctypes.c_int32, ctypes.c_int32, ctypes.c_char_p)
_SHRINK_TO = ctypes.CFUNCTYPE(None, ctypes.c_int64)
_PYTHON = ("PyCapsule_New", "PyCapsule_IsValid", "PyCapsule_GetPointer", "PyErr_NoMemory")
_USED, _, _IDLE, _MOST_IDLE, _LOCKED = range(5)  # numbers of the state

_KINDS = {
    torch.bool: 6, torch.uint8: 1, torch.uint16: 1, torch.uint32: 1, torch.uint64: 1, torch.int8: 0, torch.int16: 0, torch.int32: 0,
    torch.int64: 0, torch.float16: 2, torch.float32: 2, torch.float64: 2, torch.bfloat16: 4, torch.complex64: 5, torch.complex128: 5,
}  # fmt: skip
"""DLPack's kinds of numbers."""


class Pool:
    """Makes tensors as `empty` does. Large ones lie in kept memory; their storage cannot grow, like any that torch did not allocate."""

    def __init__(self, address: int) -> None:
        python = [ctypes.cast(getattr(ctypes.pythonapi, name), ctypes.c_void_p).value for name in _PYTHON]
        mine = (ctypes.c_int64 * 3)()
        _START(address)((ctypes.c_int64 * len(python))(*python), mine)
        self._take, self._shrink_to = _TAKE(mine[0]), _SHRINK_TO(mine[1])
        self._state = (ctypes.c_int64 * 5).from_address(mine[2])

    def __call__(self, shape: tuple[int, ...], strides: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        request = _request(shape, dtype)
        if request is None:
            return empty(shape, strides, dtype)
        try:
            capsule = self._take(*request)
        except MemoryError:  # torch has words for it
            return empty(shape, strides, dtype)
        return torch._C._from_dlpack(capsule)  # type: ignore[attr-defined]

    @property
    def used(self) -> int:
        """Bytes that tensors own."""
        return self._state[_USED]

    @property
    def idle(self) -> int:
        """Bytes that are kept for tensors to come."""
        return self._state[_IDLE]

    def allow(self, most_idle: int) -> None:
        """Sets how many bytes may lie idle, and frees what is more."""
        self._state[_MOST_IDLE] = most_idle
        self._shrink_to(most_idle)


@functools.lru_cache(maxsize=1024)
def _request(shape: tuple[int, ...], dtype: torch.dtype) -> tuple[int, int, int, bytes] | None:
    """What C is asked for: bytes, type, rank, shape. None for a tensor that is not the pool's."""
    nbytes = math.prod(shape) * dtype.itemsize
    if nbytes < LEAST or dtype not in _KINDS or len(shape) > MAX_RANK:
        return None
    lanes = 1
    code = int.from_bytes(struct.pack("=BBH", _KINDS[dtype], 8 * dtype.itemsize, lanes), sys.byteorder)
    return nbytes, code, len(shape), struct.pack(f"{len(shape)}q", *shape)


def allocator(start: Loaded) -> Empty:
    """The pool that `start`, as it was built, opens; plain `empty` where it could not be built."""
    if isinstance(start, BuildError):
        return empty
    pool = _pool(ctypes.cast(start, ctypes.c_void_p).value)  # type: ignore[arg-type]
    pool.allow(min(MOST_IDLE, _peak() // PROCESS_PART))
    return pool


_pool = functools.cache(Pool)


def _peak() -> int:
    """The most bytes of memory that the process had."""
    import resource  # Windows has none, and nothing is built there

    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit

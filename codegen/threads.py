"""How many threads kernels may use, and the OpenMP runtime across `fork`.

GNU's OpenMP runtime keeps the threads of a parallel loop waiting for the next one. A forked child (a worker of a DataLoader) inherits the
record of those threads but not the threads, and its first parallel loop waits for them forever, torch's own loops included. So the
threads are sent home before each fork; both processes make new ones when they need them. LLVM's and Intel's runtimes do so by themselves.
"""

from __future__ import annotations

import ctypes
import os
import re
from pathlib import Path

import torch

SOFT_PAUSE = 1  # omp_pause_soft

_stayed = False  # the last fork found the threads of the calling thread in use, or its runtime too old to send them home
_alone = False  # in a child of such a fork


def threads() -> int:
    """The number of threads for kernels now: torch's."""
    return 1 if _alone else torch.get_num_threads()


def gnu_openmp() -> list[str]:
    """The paths of GNU's OpenMP runtime as this process has loaded it; more than one where libraries brought their own."""
    return loaded_libraries("libgomp")


def loaded_libraries(name: str) -> list[str]:
    """The paths of the libraries that this process has loaded whose file names begin so."""
    try:
        maps = Path("/proc/self/maps").read_text()
    except OSError:
        return []
    return list(dict.fromkeys(re.findall(rf"(/\S*/{re.escape(name)}[^/\s]*)$", maps, re.MULTILINE)))


def _send_home() -> None:
    """Ends the waiting threads of the calling thread."""
    global _stayed
    if _alone:  # their record is void: nothing may touch it
        return
    try:
        results = [ctypes.CDLL(path).omp_pause_resource_all(SOFT_PAUSE) for path in gnu_openmp()]
    except (OSError, AttributeError):  # the file was replaced, or the runtime is older than OpenMP 5
        results = [-1]
    _stayed = any(results)


def _in_child() -> None:
    global _alone
    _alone = _alone or _stayed


if hasattr(os, "register_at_fork"):
    os.register_at_fork(before=_send_home, after_in_child=_in_child)

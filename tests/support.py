"""What tests of every folder share: marks for what they need of the machine, and work in several threads at once."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from tilewright.codegen.build import compiler_available

ON_GPU = (pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"))
"""Marks of a parameter, or of a whole test."""

EVERYWHERE = pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=ON_GPU)])
"""For a test that computes by Triton kernels: in the interpreter, and on the GPU there is."""

NATIVE = pytest.mark.skipif(not compiler_available(), reason="needs a C++ compiler")


def on_gpu(test: Callable[..., None]) -> Callable[..., None]:
    """A test that needs a GPU."""
    for mark in ON_GPU:
        test = mark(test)
    return test


def in_threads(work: Callable[[int], None], count: int = 4) -> None:
    """Calls `work(0)`, `work(1)`, ... at the same time; raises what one of them raises."""
    with ThreadPoolExecutor(count) as pool:
        list(pool.map(work, range(count)))

"""What tests of every folder share: a mark for those that need a C++ compiler, and work in several threads at once."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest
from tilewright.codegen.build import compiler_available

NATIVE = pytest.mark.skipif(not compiler_available(), reason="needs a C++ compiler")


def in_threads(work: Callable[[int], None], count: int = 4) -> None:
    """Calls `work(0)`, `work(1)`, ... at the same time; raises what one of them raises."""
    with ThreadPoolExecutor(count) as pool:
        list(pool.map(work, range(count)))

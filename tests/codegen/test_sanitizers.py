"""Generated kernels read and write only what is theirs, and nothing undefined: a sample under the sanitizers (see sanitized.py)."""

from __future__ import annotations

import subprocess
import sys

import pytest
import sanitized
from support import NATIVE

pytestmark = NATIVE

OUTSIDE = """
import ctypes, sanitized, torch
sanitized.sanitize()
from tilewright.codegen.build import Source, build
(read,) = build([Source("read", "void read(float* x, float* y) { *y = x[5]; }", (ctypes.c_void_p,) * 2)])
x, y = torch.ones(5), torch.ones(1)
read(x.data_ptr(), y.data_ptr())
"""


@pytest.fixture(scope="module")
def environment() -> dict[str, str]:
    found = sanitized.environment()
    if found is None:
        pytest.skip("the compiler has no sanitizers")
    return found


def test_kernels_of_every_family_are_clean(environment: dict[str, str]) -> None:
    result = subprocess.run([sys.executable, sanitized.__file__], capture_output=True, text=True, env=environment, timeout=600)
    assert result.returncode == 0, result.stdout + result.stderr
    assert result.stdout.endswith("kernels are clean\n")


def test_one_element_too_far_is_seen(environment: dict[str, str]) -> None:
    path = f"{sanitized.HERE}:{environment['PYTHONPATH']}"
    child = subprocess.run(
        [sys.executable, "-c", OUTSIDE], capture_output=True, text=True, env={**environment, "PYTHONPATH": path}, timeout=300
    )
    assert child.returncode != 0 and "heap-buffer-overflow" in child.stderr
